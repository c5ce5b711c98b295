"""Models whose attention code is their own refuse "paged_flash" when they are loaded.

Why: transformers takes any registered name for every model, though dozens of them (bloom, falcon, roformer, swin ...)
never look at it. They would get our masks under their own attention: a KeyError, a NameError or a shape error in the
first forward. There is no flag for them, so their source is asked, as `set_attn_implementation` does. A model whose
attention takes what paged_flash does not know would be wrong in silence: its eager function tells.
"""

import functools
import inspect
import re
import sys

from transformers import PreTrainedModel
from transformers.utils import logging

from hf_paged_flash.attention import paged_flash_attention_forward
from hf_paged_flash.errors import UnsupportedFeatureError
from hf_paged_flash.model_source import module_source, parts
from hf_paged_flash.patches.base import Patch

logger = logging.get_logger(__name__)


@functools.cache
def _has_attention_of_its_own(model_class: type) -> bool:
    """Whether `model_class` never asks transformers for an implementation, or looks its name up among its own."""
    source = module_source(model_class)
    defines_attention = re.search(r"^class \w*Attention\w*\(nn\.Module\):", source, re.MULTILINE)
    if defines_attention is None or "ALL_ATTENTION_FUNCTIONS" not in source:
        return defines_attention is not None
    return any(re.search(r"_CLASSES\[config\._attn_implementation\]", part) for part in parts(model_class).values())


@functools.cache
def _unknown_argument(model_class: type) -> str | None:
    """An argument that the eager attention of `model_class` takes and that means nothing to paged_flash."""
    eager = getattr(sys.modules.get(model_class.__module__), "eager_attention_forward", None)
    if not inspect.isfunction(eager):
        return None
    taken = inspect.signature(eager).parameters.values()
    named = [parameter.name for parameter in taken if parameter.kind is not parameter.VAR_KEYWORD]
    known = inspect.signature(paged_flash_attention_forward).parameters
    return next((name for name in named[4:] if name not in known), None)  # after the module and the tensors


def _refusal(model_class: type) -> str | None:
    """Why `model_class` can't run paged_flash; None where it can."""
    if _has_attention_of_its_own(model_class):
        reason = "has attention code of its own, which transformers' AttentionInterface does not reach: paged_flash "
        reason += "can't run there"
    elif (name := _unknown_argument(model_class)) is not None:
        reason = f"gives its attention `{name}`, which paged_flash does not know"
    else:
        return None
    return f'{model_class.__name__} {reason}. Load it with attn_implementation="eager"'


def _check_and_adjust(original, self, attn_implementation, *args, **kwargs):
    if attn_implementation == "paged_flash" and (message := _refusal(type(self))) is not None:
        if not self.can_generate():
            message += ", or name the parts of a larger model that can run it: attn_implementation="
            message += '{"text_config": "paged_flash"}'
        if self.config.get_text_config(decoder=True) is self.config:
            raise UnsupportedFeatureError(message)
        logger.warning_once(message)  # the text part of a composite model is a model of its own and checked too
    return original(self, attn_implementation, *args, **kwargs)


UNREACHED_MODELS = Patch(
    owner=lambda: PreTrainedModel,
    name="_check_and_adjust_attn_implementation",
    parameters=("self", "attn_implementation", "is_init_check", "allow_all_kernels"),
    wrapper=_check_and_adjust,
    reason="models that the attention interface does not reach say so when they are loaded",
    checked=("5.17.0", "5.23.0", "5.24.0"),
)
