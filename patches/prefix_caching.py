"""`generate()` with a cache that has `prefix_caching` computes of a prompt what is not known of it.

Why: a call begins new rows whatever the cache holds, what a prompt begins with is known before the prefill, and what
was generated when the call ends; no public hook lies at any of these places.
"""

from transformers.generation.utils import GenerationMixin

from hf_paged_flash.patches.base import Patch, cache_name

_CHECKED = ("5.17.0", "5.23.0", "5.24.0")


def prefix_cache(model_kwargs: dict):
    """The cache among a model's arguments, if it keeps prefixes; else None."""
    from hf_paged_flash.cache import PagedCache

    cache = model_kwargs.get(cache_name(model_kwargs))
    return cache if isinstance(cache, PagedCache) and cache.prefixes is not None else None


def _prepare_generation_config(original, self, generation_config, **kwargs):
    config, model_kwargs = original(self, generation_config, **kwargs)
    cache = prefix_cache(model_kwargs)
    if cache is not None and not config.is_assistant:
        from hf_paged_flash.generation import prefix_caching

        prefix_caching.begin_rows(cache, self)
    return config, model_kwargs


def _prefill(original, self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
    cache = prefix_cache(model_kwargs)

    def run(model_kwargs):
        return original(self, input_ids, generation_config, model_kwargs, is_first_iteration)

    if cache is None:
        return run(model_kwargs)
    from hf_paged_flash.generation import prefix_caching

    return prefix_caching.prefill(run, self, input_ids, cache, generation_config, model_kwargs)


def _decode(original, self, input_ids, *args, **kwargs):
    result = original(self, input_ids, *args, **kwargs)
    cache = prefix_cache(kwargs)
    if cache is not None:
        from hf_paged_flash.generation import prefix_caching

        prefix_caching.keep_answers(cache, result, input_ids.shape[1])
    return result


_PARAMETERS = (
    "self", "input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer",
)  # fmt: skip
_LOOPS = {
    "_sample": (*_PARAMETERS, "model_kwargs"),
    "_assisted_decoding": (
        *_PARAMETERS, "inputs_tensor", "assistant_model", "assistant_tokenizer", "tokenizer", "model_kwargs",
    ),
}  # fmt: skip
PREFIX_CACHING = (
    Patch(
        owner=lambda: GenerationMixin,
        name="_prepare_generation_config",
        parameters=("self", "generation_config", "kwargs"),
        wrapper=_prepare_generation_config,
        reason="a call begins new rows before positions are counted from the cache's",
        checked=_CHECKED,
    ),
    Patch(
        owner=lambda: GenerationMixin,
        name="_prefill",
        parameters=("self", "input_ids", "generation_config", "model_kwargs", "is_first_iteration"),
        wrapper=_prefill,
        reason="what is known of a prompt is not computed",
        checked=_CHECKED,
    ),
    *(
        Patch(
            owner=lambda: GenerationMixin,
            name=name,
            parameters=parameters,
            wrapper=_decode,
            reason="what was generated is known to later prompts",
            checked=_CHECKED,
        )
        for name, parameters in _LOOPS.items()
    ),
)
