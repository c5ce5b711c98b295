"""Masks that transformers refuses or drops for every name with "flash" in it reach "paged_flash".

Why: it takes such a name for a package that knows lengths alone. Chunked attention (Llama4) raises there before it
asks for a mask, HRM raises when it is loaded, for its prefixes, and up to 5.17 or later Pixtral leaves out the bounds
of its images, which then see each other. paged_flash takes chunks as packed rows, and any mask as a matrix; there is
nowhere to say so.
"""

import inspect

from transformers import masking_utils
from transformers.models.hrm_text import configuration_hrm_text, modeling_hrm_text
from transformers.models.pixtral import modeling_pixtral

from hf_paged_flash.patches.base import Patch


def _is_flash_attention_requested(original, config=None, requested_attention_implementation=None, version=None):
    name = config._attn_implementation if config is not None else requested_attention_implementation
    if name == "paged_flash":
        return False
    return original(config, requested_attention_implementation, version)


def _where_asked(module) -> Patch:
    return Patch(
        owner=lambda: module,
        name="is_flash_attention_requested",
        parameters=("config", "requested_attention_implementation", "version"),
        wrapper=_is_flash_attention_requested,
        reason="masks that other flash implementations can't take are made for paged_flash",
        checked=("5.17.0", "5.23.0", "5.24.0"),
    )


# Newer versions of Pixtral pass the images' offsets, as other vision towers do
_PIXTRAL = () if "cu_seq_lens_q" in inspect.getsource(modeling_pixtral) else (_where_asked(modeling_pixtral),)
_HRM = (_where_asked(configuration_hrm_text), _where_asked(modeling_hrm_text))
FLASH_MASKS = (_where_asked(masking_utils), *_HRM, *_PIXTRAL)
