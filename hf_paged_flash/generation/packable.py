"""Which prefills may run with their rows packed, `[1, tokens]`: those that are known to give the same.

A model must look at other tokens in its attention alone, and give that nothing but queries, keys, values and what
`PagedCache` and its mask tell. What a model's attention does is in no flag: its source is asked, and has to be as
transformers' models mostly are. Everything else keeps its padding; `why_padded` says for which reason.
"""

import functools
import re
from collections.abc import Callable

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.generation.utils import GenerationMixin

from ..cache import PagedCache
from ..masks import MATRIX_CONFIGS
from ..model_source import module_source, parts
from .looking import look_at
from .media import CONTENTS, LAYOUT, PLACES

_UPDATE = re.compile(r"(\w+), (\w+) = \w*(?:past|cache)\w*\.update\([^()]*(?:\([^()]*\)[^()]*)*\)\n")
# an encoder's keys, and what convolutions pad with, are in caches of their own
_ANY_UPDATE = re.compile(r"\w*(?:past|cache)\w*(?<!cross_attention_cache)(?<!padding_cache)\.update\(")
_CALL = re.compile(r"\battention_interface\((.*?)\n\s*\)\n", re.DOTALL)
_SHARES = re.compile(r"shared_kv_states\[[\w.]+\] = \w+, \w+")  # later layers attend to them, and do no more
_UNDER_EAGER = re.compile(r"if using_eager and .*?\n\s*else:\n", re.DOTALL)
_OVERLAYS = re.compile(r"\bblock_sequence_ids\b|\bor_mask_function\b")
_TAKEN = {"attention_mask", "dropout", "scaling", "sliding_window", "softcap", "s_aux", "position_ids", "is_causal"}
# what the forward of a text may get beside numbers, names and nothing
_UNDERSTOOD = {"input_ids", "attention_mask", "position_ids", "past_key_values", "cache", "logits_to_keep"}
_UNDERSTOOD |= {*LAYOUT, PLACES}  # of use with images alone
_OF_NO_ROW = (bool, int, float, str, torch.dtype, type(None))
# those of them that keys and values do not depend on
_OF_OUTPUTS = {"use_cache", "return_dict", "logits_to_keep", "output_attentions", "output_hidden_states"}
_STEPS = ("_prefill", "_update_model_kwargs_for_generation", "_sample", "_beam_search")
_OF_LIBRARIES = {"accelerate", "peft", "torch", "transformers"}  # hooks of theirs keep to no row
_WRITTEN_OUT = ("output_hidden_states", "output_attentions")


class NotPacked(Exception):
    """Rows that begin with what is known of them can only be computed whole."""


@functools.cache
def attends_alone(model_class: type) -> bool:
    """Whether attention layers of `model_class` pass what `update()` returned to the attention function, and no more.

    And whether that function gets no bias, and no selection or sink of a query's own.
    """
    updates = 0
    for source in parts(model_class).values():
        found = list(_UPDATE.finditer(source))
        if len(found) != len(_ANY_UPDATE.findall(source)):
            return False
        updates += len(found)
        for update in found:
            method = _UNDER_EAGER.sub("", source[update.end() :].partition("\n    def ")[0])
            call = _CALL.search(method)
            if call is None or not set(re.findall(r"(\w+)=", call[1])) <= _TAKEN:
                return False
            keys = re.compile(rf"\b({update[1]}|{update[2]})\b")
            uses = [line.strip() for line in method.splitlines() if keys.search(line)]
            handed_on = {f"{update[1]},", f"{update[2]},"}
            if any(use not in handed_on and not _SHARES.fullmatch(use) for use in uses):
                return False
    return updates > 0


def _has_own_steps(model: PreTrainedModel) -> bool:
    return any(
        name in vars(model) or getattr(type(model), name) is not getattr(GenerationMixin, name) for name in _STEPS
    )


def _works_on_its_mask(model: PreTrainedModel, modules: list[nn.Module]) -> bool:
    if any(type(part.config) in MATRIX_CONFIGS for part in _models(modules)):
        return True
    text = _text_config(model)
    if getattr(text, "use_bidirectional_attention", None) not in (None, False, "vision"):
        return True
    # images in a text see all of themselves, and some models say so where there is none
    return text is not model.config and bool(_OVERLAYS.search(module_source(type(model))))


def _does_more_with_keys(model: PreTrainedModel, modules: list[nn.Module]) -> bool:
    decoders = _decoders(model, modules)
    return not decoders or not all(attends_alone(type(part)) for part in decoders)


def _attends_otherwise(model: PreTrainedModel, modules: list[nn.Module]) -> bool:
    return any(part.config._attn_implementation != "paged_flash" for part in _decoders(model, modules))


def _decoders(model: PreTrainedModel, modules: list[nn.Module]) -> list[PreTrainedModel]:
    text = type(_text_config(model))
    return [part for part in _models(modules) if type(part.config) is text]


def _models(modules: list[nn.Module]) -> list[PreTrainedModel]:
    return [module for module in modules if isinstance(module, PreTrainedModel)]


def _text_config(model: PreTrainedModel) -> PreTrainedConfig:
    return model.config.get_text_config(decoder=True)


def _has_chunks(model: PreTrainedModel) -> bool:
    return "chunked_attention" in (getattr(_text_config(model), "layer_types", None) or ())


def has_adapters_by_row(modules: list[nn.Module]) -> bool:
    """PEFT gives each row an adapter of its own by hooks that hold something a row."""
    hooks = (hook for module in modules for hook in module._forward_pre_hooks.values())
    return any(getattr(hook, "keywords", {}).keys() & {"adapter_names", "alora_offsets"} for hook in hooks)


def _has_hooks(model: PreTrainedModel, modules: list[nn.Module]) -> bool:
    """Of the user's: they may look for a row where it lies in a batch, or change what keys are made of."""
    hooks = [hook for module in modules for hook in module._forward_hooks.values()]
    hooks += [hook for module in modules if module is not model for hook in module._forward_pre_hooks.values()]
    hooks = [hook.func if isinstance(hook, functools.partial) else hook for hook in hooks]
    return any(getattr(hook, "__module__", "").partition(".")[0] not in _OF_LIBRARIES for hook in hooks)


# {what it is: whether a model with these modules is so}
_OF_MODEL: dict[str, Callable[[PreTrainedModel, list[nn.Module]], bool]] = {
    "another attention than paged_flash": _attends_otherwise,
    "an encoder beside the decoder": lambda model, modules: model.config.is_encoder_decoder,
    "a mask that the model works on": _works_on_its_mask,
    "attention in chunks": lambda model, modules: _has_chunks(model),
    "convolutions or recurrences over tokens": lambda model, modules: any(
        isinstance(module, (nn.Conv1d, nn.RNNBase)) for module in modules
    ),
    "attention that does more with its keys than attend to them": _does_more_with_keys,
    "an adapter for each row": lambda model, modules: has_adapters_by_row(modules),
    "forward hooks inside": _has_hooks,
}


def why_padded(
    model: PreTrainedModel, cache: object, generation_config: GenerationConfig, model_kwargs: dict
) -> str | None:
    """Why a prefill of `model` into `cache` with `model_kwargs` keeps its padding; None where rows may be packed."""
    if type(cache) is not PagedCache:
        return "another cache than PagedCache"
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
        return "layers with another state than keys"
    for name in _WRITTEN_OUT:
        asked = getattr(generation_config, name, None), model_kwargs.get(name), getattr(model.config, name, None)
        if any(asked):
            return f"`{name}`"
    if model_kwargs.get("inputs_embeds") is not None:
        return "`inputs_embeds`"
    if _has_own_steps(model):
        return "steps of generation of the model's own"
    return look_at(model).of(_why_of_model)


def _why_of_model(model: PreTrainedModel) -> str | None:
    modules = list(model.modules())
    return next((name for name, holds in _OF_MODEL.items() if holds(model, modules)), None)


def why_not_these(inputs: dict, cache: PagedCache) -> str | None:
    """Why `inputs`, as `prepare_inputs_for_generation` made them of rows, can't be packed; None where they can."""
    ids, mask, position_ids = (inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if ids is None or ids.dim() != 2 or (mask is not None and mask.dim() != 2):
        return "inputs that are no rows of tokens"
    if position_ids is None or position_ids.shape[-2:] not in (ids.shape, (1, ids.shape[1])):
        return "a model that takes no positions"
    if not any(inputs.get(name) is cache for name in ("past_key_values", "cache")):
        return "a model that starts another cache"
    name = of_rows(inputs, len(ids))
    return None if name is None else f"`{name}`, which may be of rows"


def of_rows(inputs: dict, rows: int) -> str | None:
    """What among a model's `inputs`, or generate()'s for it, may be of one of `rows` rows alone; None for nothing.

    Images of an only row are its own.
    """
    understood = _UNDERSTOOD | set(CONTENTS) if rows == 1 else _UNDERSTOOD
    for name, value in inputs.items():
        is_empty = isinstance(value, (dict, list, tuple)) and not value
        if name not in understood and not (is_empty or isinstance(value, _OF_NO_ROW)):
            return name
    return None


def settings_in(inputs: dict) -> frozenset:
    """What of a model's `inputs`, or generate()'s for it, keys and values may depend on beside tensors."""
    return frozenset(
        (name, type(value), value)
        for name, value in inputs.items()
        if isinstance(value, _OF_NO_ROW) and value is not None and name not in _OF_OUTPUTS
    )
