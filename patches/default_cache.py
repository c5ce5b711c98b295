"""`generate()` of a model under "paged_flash" builds a PagedCache where it would build a DynamicCache.

Why: `cache_implementation` knows a fixed set of names, and "paged" already means continuous batching there. A cache
that the caller passed or named, and `use_cache=False`, are left alone.
"""

from transformers import DynamicCache, EncoderDecoderCache
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerationMixin
from transformers.utils import logging

from hf_paged_flash.errors import UnsupportedFeatureError
from hf_paged_flash.patches.base import Patch, cache_name

logger = logging.get_logger(__name__)


def _prepare_cache(original, self, generation_config, model_kwargs, generation_mode, batch_size, *args, **kwargs):
    given = model_kwargs.get(cache_name(model_kwargs))
    result = original(self, generation_config, model_kwargs, generation_mode, batch_size, *args, **kwargs)
    name = cache_name(model_kwargs)
    built = model_kwargs.get(name)
    config = self.config.get_text_config(decoder=True)
    if (
        given is None
        and _is_default(built)
        and generation_config.cache_implementation is None
        and config._attn_implementation == "paged_flash"
    ):
        if getattr(self, "_compiled_call_impl", None) or hasattr(self.forward, "_torchdynamo_orig_callable"):
            logger.warning_once(
                "generate() keeps DynamicCache for a model compiled by torch.compile: PagedCache can't be traced yet"
            )
            return result
        try:
            cache = _paged(self, config, built, generation_config, batch_size)
        except UnsupportedFeatureError as error:
            logger.warning_once(f"generate() keeps DynamicCache for this model: {error}")
            return result
        if generation_config.is_assistant:  # as transformers has told the cache it built: tokens will be taken back
            cache.activate_past_recording()
        model_kwargs[name] = cache
    if generation_mode == GenerationMode.ASSISTED_GENERATION:
        _refuse_right_padding(model_kwargs)
    return result


def _refuse_right_padding(model_kwargs: dict) -> None:
    """Assisted generation never stops between the prompt and the tokens it tries: what `prefill_logits` mends."""
    from hf_paged_flash.cache import PagedCache

    cache, mask = model_kwargs.get(cache_name(model_kwargs)), model_kwargs.get("attention_mask")
    if isinstance(cache, PagedCache) and mask is not None and mask.dim() == 2 and not bool(mask[:, -1].all()):
        raise UnsupportedFeatureError(
            "assisted generation and prompt lookup can't go on from a right-padded prompt: pad on the left "
            '(`tokenizer.padding_side = "left"`), or cut the padding off'
        )


def _is_default(cache) -> bool:
    halves = [cache]
    if type(cache) is EncoderDecoderCache:
        halves = [cache.self_attention_cache, cache.cross_attention_cache]
    return all(type(half) is DynamicCache and not half.offloading for half in halves)


def _paged(model, config, built, generation_config, batch_size: int):
    """The paged counterpart of what transformers `built`."""
    from hf_paged_flash.cache import PagedCache, paged_encoder_decoder_cache
    from hf_paged_flash.generation import prefix_caching

    if not isinstance(built, EncoderDecoderCache):
        # one round of an assistant, which may be the model itself cut short, is no call of the model's
        kept = None if generation_config.is_assistant else prefix_caching.enabled_cache(model)
        return kept or PagedCache(config)
    if "_prepare_cache_for_generation" in _own_methods(type(model)):
        # such a model goes on to build a cross-attention cache of its own
        return EncoderDecoderCache(PagedCache(config), built.cross_attention_cache)
    repeats = max(generation_config.num_beams, generation_config.num_return_sequences)
    return paged_encoder_decoder_cache(config, batch_size=batch_size, repeats=repeats)


def _own_methods(model_class: type) -> set[str]:
    """Names that a model class or a base defines in front of GenerationMixin."""
    order = model_class.__mro__
    return {name for base in order[: order.index(GenerationMixin)] for name in vars(base)}


DEFAULT_CACHE = Patch(
    owner=lambda: GenerationMixin,
    name="_prepare_cache_for_generation",
    parameters=("self", "generation_config", "model_kwargs", "generation_mode", "batch_size", "max_cache_length"),
    wrapper=_prepare_cache,
    reason="generate() runs on a PagedCache without another argument",
    checked=("5.17.0", "5.23.0", "5.24.0"),
)
