"""`generate()` with beams or several returned sequences computes and stores each prompt once.

Why: it repeats every row before the prefill, so that equal prompts are computed and cached side by side, and a cache
never learns that they are equal. Here the prefill runs on the rows as they were given; then the cache repeats its
tables and we the logits. No public hook lies between.

Transformers' own way is kept where ours might not be sound: where a model repeats its inputs, runs its prefill or goes
on from it by code of its own, or keeps states outside of its cache (RecurrentGemma), for encoder-decoder models, where
an input was changed or added after it was repeated, where each row has an adapter of its own (PEFT's `adapter_names`),
and on a cache that holds the repeated rows already. Assisted generation never repeats rows.
"""

import copy
from dataclasses import dataclass

import torch
from transformers.generation.utils import GenerationMixin

from hf_paged_flash.patches.base import Patch, cache_name

_OWN_ARGUMENTS = {"expand_size", "is_encoder_decoder", "input_ids"}
_CHECKED = ("5.17.0", "5.23.0", "5.24.0")
# what a model must not have of its own
_METHODS = ("_expand_inputs_for_generation", "_prefill", "_update_model_kwargs_for_generation")
_OF_ALL_ROWS = ("past_key_values", "cache", "logits_to_keep")
_PER_ROW = ("logits", "hidden_states", "attentions")  # outputs that decoding goes on to read
# a static method in older versions
_SELF = () if isinstance(vars(GenerationMixin)["_expand_inputs_for_generation"], staticmethod) else ("self",)


@dataclass(frozen=True)
class _Unexpanded:
    """What repeated inputs were made of: `times` times each row of `input_ids`, and of the tensors in `kwargs`."""

    input_ids: torch.Tensor
    kwargs: dict
    times: int
    expanded: dict  # what became of `kwargs`

    def is_all_of(self, model_kwargs: dict) -> bool:
        """Whether `model_kwargs` still holds the repeated inputs, and no others."""
        tensors = {name for name, value in model_kwargs.items() if isinstance(value, torch.Tensor)}
        same = all(model_kwargs.get(name) is value for name, value in self.expanded.items())
        return same and tensors <= {*self.expanded, "logits_to_keep"}


def _expand(original, *args, **kwargs):
    given = {name: _kept(value) for name, value in kwargs.items() if name not in _OWN_ARGUMENTS}
    input_ids, expanded = original(*args, **kwargs)
    ids = kwargs.get("input_ids")
    if ids is not None and input_ids is not ids and set(given) == set(expanded):
        # on the tensor itself: `generate()` hands this very tensor to `_prefill`, and threads don't meet
        input_ids.unexpanded = _Unexpanded(ids, given, kwargs["expand_size"], dict(expanded))
    return input_ids, expanded


def _kept(value):
    """`value` as it is now: what encoders made of images is in a dict of outputs, which are repeated in place."""
    return {name: copy.copy(output) for name, output in value.items()} if isinstance(value, dict) else value


def _computes_once(model, cache, unexpanded: _Unexpanded | None, model_kwargs: dict) -> bool:
    from hf_paged_flash.cache import PagedCache
    from hf_paged_flash.generation.packable import has_adapters_by_row

    return (
        unexpanded is not None
        and isinstance(cache, PagedCache)
        and not model.config.is_encoder_decoder
        and all(getattr(type(model), name) is getattr(GenerationMixin, name) for name in _METHODS)
        and not any(hasattr(module, "_setup_cache") for module in model.modules())
        and not has_adapters_by_row(list(model.modules()))
        and (not cache.get_seq_length() or cache.batch_size == len(unexpanded.input_ids))
        and unexpanded.is_all_of(model_kwargs)
    )


def _prefill(original, self, input_ids, generation_config, model_kwargs, *args, **kwargs):
    cache, unexpanded = model_kwargs.get(cache_name(model_kwargs)), getattr(input_ids, "unexpanded", None)
    if not _computes_once(self, cache, unexpanded, model_kwargs):
        outputs = original(self, input_ids, generation_config, model_kwargs, *args, **kwargs)
        if unexpanded is not None:
            del input_ids.unexpanded  # the prompt's inputs need not live as long as the ids
        return outputs
    once = model_kwargs | {name: value for name, value in unexpanded.kwargs.items() if name not in _OF_ALL_ROWS}
    outputs = original(self, unexpanded.input_ids, generation_config, once, *args, **kwargs)
    del input_ids.unexpanded
    cache.batch_repeat_interleave(unexpanded.times)
    for name in _PER_ROW:
        if outputs.get(name) is not None:
            outputs[name] = _repeat(outputs[name], unexpanded.times)
    return outputs


def _repeat(value, times: int):
    """Each row of a tensor, or of those in a tuple, `times` times."""
    if isinstance(value, (tuple, list)):
        return tuple(_repeat(item, times) for item in value)
    return value if value is None else value.repeat_interleave(times, dim=0)


SHARED_PROMPT = (
    Patch(
        owner=lambda: GenerationMixin,
        name="_expand_inputs_for_generation",
        parameters=(*_SELF, "expand_size", "is_encoder_decoder", "input_ids", "model_kwargs"),
        wrapper=_expand,
        reason="repeated inputs remember what they were made of",
        checked=_CHECKED,
    ),
    Patch(
        owner=lambda: GenerationMixin,
        name="_prefill",
        parameters=("self", "input_ids", "generation_config", "model_kwargs", "is_first_iteration"),
        wrapper=_prefill,
        reason="equal prompts are computed and stored once",
        checked=_CHECKED,
    ),
)
