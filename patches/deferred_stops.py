"""On CUDA, too, `generate()` looks one step late whether all rows have ended, where decode steps are graphs.

Why: the loop asks the device after every token and waits for the answer, so that the next step is prepared while the
device stands still. transformers has the check that does not wait and keeps it to "mps", by name; there is no option.
It costs one more forward, which is taken back, after a stop by anything but `max_length`: the only thing left of it is
that samples drawn after this `generate()` come from further on in the random numbers. A cache with a cap may have no
room for that forward, and keeps the check that waits.
"""

from transformers.generation import utils

from hf_paged_flash.patches.base import Patch

DEVICE_TYPES = {"cuda"}


def _is_supported(original, device, cache, cache_is_returned, is_assistant):
    from hf_paged_flash import backend
    from hf_paged_flash.cache import PagedCache

    if original(device, cache, cache_is_returned, is_assistant):
        return True
    is_ours = backend.graphs() and device.type in DEVICE_TYPES and isinstance(cache, PagedCache)
    if not is_ours or is_assistant or cache.is_capped:
        return False
    return cache.is_croppable or not cache_is_returned


DEFERRED_STOPS = Patch(
    owner=lambda: utils.DeferredStopCheck,
    name="is_supported",
    parameters=("device", "cache", "cache_is_returned", "is_assistant"),
    wrapper=_is_supported,
    reason="the host prepares the next step while the device computes this one",
    checked=("5.17.0", "5.23.0", "5.24.0"),
)
