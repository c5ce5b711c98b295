"""`generate_batch()` (continuous batching) refuses "paged_flash" at once and by name.

Why: it would rename the implementation, start a thread and fail there, half way. Continuous batching keeps its own
paged cache; running our kernels under it is not built yet.
"""

from transformers.generation.continuous_batching.continuous_api import ContinuousMixin

from hf_paged_flash.errors import UnsupportedFeatureError
from hf_paged_flash.patches.base import Patch


def _init_continuous_batching(original, self, *args, **kwargs):
    if "paged_flash" in (self.config.get_text_config(decoder=True)._attn_implementation or ""):
        raise UnsupportedFeatureError(
            "`generate_batch` and continuous batching are not built for paged_flash yet: use `generate()`, or call "
            '`model.set_attn_implementation("sdpa")` first'
        )
    return original(self, *args, **kwargs)


GENERATE_BATCH = Patch(
    owner=lambda: ContinuousMixin,
    name="init_continuous_batching",
    parameters=("self", "generation_config", "continuous_batching_config", "workload_hints"),
    wrapper=_init_continuous_batching,
    reason="continuous batching refuses paged_flash instead of failing half way",
    checked=("5.17.0", "5.23.0"),
)
