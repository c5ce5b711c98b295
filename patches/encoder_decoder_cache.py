"""`EncoderDecoderCache` crops, repeats and selects the rows of PagedCaches.

Why: these methods are open to DynamicCache alone, by name; a PagedCache has all of them. There is no list to add to.
"""

from transformers import DynamicCache, EncoderDecoderCache

from hf_paged_flash.patches.base import Patch


def _check_dynamic_cache(original, self, method, *args, **kwargs):
    from hf_paged_flash.cache import PagedCache

    halves = self.self_attention_cache, self.cross_attention_cache
    if not all(isinstance(half, (DynamicCache, PagedCache)) for half in halves):
        original(self, method, *args, **kwargs)


ENCODER_DECODER_CACHE = Patch(
    owner=lambda: EncoderDecoderCache,
    name="check_dynamic_cache",
    parameters=("self", "method"),
    wrapper=_check_dynamic_cache,
    reason="an EncoderDecoderCache of PagedCaches can be cropped, and its rows repeated and selected",
    checked=("5.17.0", "5.23.0"),
)
