"""The decode loops of `generate()` replay their steps on a PagedCache as CUDA graphs, once these are switched on.

Why: each loop calls the model itself, some through `get_compiled_call`, which hands out the same function for a chunk
of the prompt as for a token, and others directly. Only around a loop is it known that what comes is a token of every
row, and when there is no more. The loop gets a stand-in for the model; nothing is set on the model, so that other
threads may use it meanwhile.
"""

import transformers
from packaging.version import Version
from transformers.generation.utils import GenerationMixin

from hf_paged_flash.errors import UnsupportedFeatureError
from hf_paged_flash.patches.base import Patch, cache_name

_CHECKED = ("5.17.0", "5.23.0", "5.24.0")


def _in_decode_loop(**traits):
    def decode(
        original, self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, **kwargs
    ):
        from hf_paged_flash.generation.decode_loop import decode_loop, recording_as_before
        from hf_paged_flash.generation.looking import ModelChanged
        from hf_paged_flash.generation.prefix_caching import begin_anew

        cache = kwargs.get(cache_name(kwargs))
        if traits.get("begins_with_prefill"):
            _check_begins(cache, input_ids, kwargs)
        options = traits | {"synced_gpus": synced_gpus}

        def run(**options):
            with (
                recording_as_before(cache),
                decode_loop(self, cache, generation_config, stopping_criteria, **options) as (model, criteria),
            ):
                return original(model, input_ids, logits_processor, criteria, generation_config, synced_gpus, **kwargs)

        try:
            return run(**options)
        except ModelChanged:  # since the last call; no token was chosen yet
            begin_anew(cache, self)
        return run(**options, glances=False)

    return decode


def _check_begins(cache, input_ids, model_kwargs) -> None:
    """Raises UnsupportedFeatureError where transformers would compute what a kept cache holds once more.

    Before 5.24 it does so whatever it gets, and with a DynamicCache, too, goes on from the wrong tokens.
    """
    from hf_paged_flash.cache import PagedCache

    if not isinstance(cache, PagedCache) or not cache.columns:
        return
    told = [model_kwargs[name] for name in ("attention_mask", "position_ids") if model_kwargs.get(name) is not None]
    is_whole = not told or input_ids.shape[1] >= max(x.shape[-1] for x in told)
    if is_whole or Version(transformers.__version__) < Version("5.24.0"):
        raise UnsupportedFeatureError(
            f"assisted decoding and prompt lookup can't go on from the {cache.columns} columns that the PagedCache "
            "holds, transformers computes them once more: leave `assistant_model` and `prompt_lookup_num_tokens` out, "
            "or pass an empty cache with the whole conversation (from transformers 5.24 on also the new turn alone, "
            "with the whole attention_mask)"
        )


def _compiled_by_the_loop(original, self, model_kwargs, generation_config):
    from hf_paged_flash.cache import PagedCache
    from hf_paged_flash.generation.decode_graph import may_capture

    # no warning that `compile_config` is passed over: the decode loop follows it, or raises
    is_ours = isinstance(model_kwargs.get(cache_name(model_kwargs)), PagedCache) and may_capture(self)
    return False if is_ours else original(self, model_kwargs, generation_config)


_PARAMETERS = (
    "self", "input_ids", "logits_processor", "stopping_criteria", "generation_config", "synced_gpus",
)  # fmt: skip
_ASSISTED = ("streamer", "inputs_tensor", "assistant_model", "assistant_tokenizer", "tokenizer")

DECODE_LOOPS = tuple(
    Patch(
        owner=lambda: GenerationMixin,
        name=name,
        parameters=(*_PARAMETERS, *more, "model_kwargs"),
        wrapper=_in_decode_loop(**traits),
        reason="decode steps are replayed as CUDA graphs",
        checked=_CHECKED,
    )
    for name, more, traits in (
        ("_sample", ("streamer",), {"pads_finished_rows": True}),
        ("_beam_search", (), {}),
        # it prefills by itself, and keeps views of the logits as scores
        ("_assisted_decoding", _ASSISTED, {"begins_with_prefill": True, "keeps_logits": True}),
    )
)
COMPILE_CRITERIA = Patch(
    owner=lambda: GenerationMixin,
    name="_valid_auto_compile_criteria",
    parameters=("self", "model_kwargs", "generation_config"),
    wrapper=_compiled_by_the_loop,
    reason="decode steps on a PagedCache are compiled within their graphs",
    checked=_CHECKED,
)
