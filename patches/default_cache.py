"""`generate()` of a model under "paged_flash" builds a PagedCache where it would build a DynamicCache.

Why: `cache_implementation` knows a fixed set of names, and "paged" already means continuous batching there. A cache
that the caller passed or named, `use_cache=False` and encoder-decoder caches are left alone.
"""

from transformers import DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.utils import logging

from hf_paged_flash.errors import UnsupportedFeatureError
from hf_paged_flash.patches.base import Patch, cache_name

logger = logging.get_logger(__name__)


def _prepare_cache(original, self, generation_config, model_kwargs, *args, **kwargs):
    given = model_kwargs.get(cache_name(model_kwargs))
    result = original(self, generation_config, model_kwargs, *args, **kwargs)
    name = cache_name(model_kwargs)
    built = model_kwargs.get(name)
    config = self.config.get_text_config(decoder=True)
    if (
        given is None
        and type(built) is DynamicCache
        and not built.offloading
        and generation_config.cache_implementation is None
        and config._attn_implementation == "paged_flash"
    ):
        from hf_paged_flash.cache import PagedCache
        from hf_paged_flash.cache.paged_layer import PagedLayer

        if getattr(self, "_compiled_call_impl", None) or hasattr(self.forward, "_torchdynamo_orig_callable"):
            logger.warning_once(
                "generate() keeps DynamicCache for a model compiled by torch.compile: PagedCache can't be traced yet"
            )
            return result
        try:
            cache = PagedCache(config)
        except UnsupportedFeatureError as error:
            logger.warning_once(f"generate() keeps DynamicCache for this model: {error}")
            return result
        if not any(isinstance(layer, PagedLayer) for layer in cache.layers):
            return result  # there is nothing to page (Mamba)
        model_kwargs[name] = cache
        if generation_config.is_assistant:  # as transformers has told the cache it built: tokens will be taken back
            cache.activate_past_recording()
    return result


DEFAULT_CACHE = Patch(
    owner=lambda: GenerationMixin,
    name="_prepare_cache_for_generation",
    parameters=("self", "generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length"),
    wrapper=_prepare_cache,
    reason="generate() runs on a PagedCache without another argument",
    checked=("5.17.0", "5.23.0", "5.24.0"),
)
