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

from transformers import PreTrainedModel

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


def _class_is_made(original, cls, **kwargs):
    original(cls, **kwargs)
    for patch in _IN_MODELS:
        if patch.module == cls.__module__:
            patch.apply()


_PIXTRAL = "transformers.models.pixtral.modeling_pixtral"
# Newer versions of Pixtral pass the images' offsets, as other vision towers do
_DROPS_BOUNDS = "cu_seq_lens_q" not in find_spec(_PIXTRAL).loader.get_source(_PIXTRAL)
_IN_MODELS = (
    _where_asked("transformers.models.hrm_text.modeling_hrm_text", waits=True),
    *((_where_asked(_PIXTRAL, waits=True),) if _DROPS_BOUNDS else ()),
)
FLASH_MASKS = (
    _where_asked("transformers.masking_utils"),
    _where_asked("transformers.models.hrm_text.configuration_hrm_text"),  # asked before the model's code is imported
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
