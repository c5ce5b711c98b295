"""Masks that transformers refuses or drops for every name with "flash" in it reach "paged_flash".

Why: it takes such a name for a package that knows lengths alone. Chunked attention (Llama4) raises there before it
asks for a mask, HRM raises when it is loaded, for its prefixes, and up to 5.17 or later Pixtral leaves out the bounds
of its images, which then see each other. paged_flash takes chunks as packed rows, and any mask as a matrix; there is
nowhere to say so.

Importing the code of two models would take as long as importing this package: it is patched once something else has
imported it, when a class is made there.
"""

from importlib import import_module
from importlib.util import find_spec

from transformers import PreTrainedModel, masking_utils
from transformers.models.hrm_text import configuration_hrm_text

from hf_paged_flash.patches.base import Patch

_CHECKED = ("5.17.0", "5.23.0", "5.24.0")


def _is_flash_attention_requested(original, config=None, requested_attention_implementation=None, version=None):
    name = config._attn_implementation if config is not None else requested_attention_implementation
    if name == "paged_flash":
        return False
    return original(config, requested_attention_implementation, version)


def _where_asked(name: str, *, waits: bool = False) -> Patch:
    return Patch(
        owner=lambda: import_module(name),
        name="is_flash_attention_requested",
        parameters=("config", "requested_attention_implementation", "version"),
        wrapper=_is_flash_attention_requested,
        reason="masks that other flash implementations can't take are made for paged_flash",
        checked=_CHECKED,
        module=name if waits else None,
    )


def _class_is_made(original, cls, /, **kwargs):
    original(cls, **kwargs)
    for patch in _IN_MODELS:
        if patch.module == cls.__module__:
            patch.apply()


_HRM = "transformers.models.hrm_text.modeling_hrm_text"
_PIXTRAL = find_spec("transformers.models.pixtral.modeling_pixtral")
_IN_MODELS = (_where_asked(_HRM, waits=True),)
# Newer versions of Pixtral pass the images' offsets, as other vision towers do
if _PIXTRAL is not None and "cu_seq_lens_q" not in _PIXTRAL.loader.get_source(_PIXTRAL.name):
    _IN_MODELS += (_where_asked(_PIXTRAL.name, waits=True),)
FLASH_MASKS = (
    _where_asked(masking_utils.__name__),
    _where_asked(configuration_hrm_text.__name__),  # asked before the model's code is imported
    *_IN_MODELS,
    Patch(
        owner=lambda: PreTrainedModel,
        name="__init_subclass__",
        parameters=("kwargs",),
        wrapper=_class_is_made,
        reason="the code of these models is patched when it is imported, and is not imported for it",
        checked=_CHECKED,
    ),
)
