"""Masks that transformers refuses or drops for every name with "flash" in it reach "paged_flash".

Why: it takes such a name for a package that knows lengths alone. Chunked attention (Llama4) raises there before it
asks for a mask, and up to 5.17 or later Pixtral leaves out the bounds of its images, which then see each other.
paged_flash takes chunks as packed rows, and any mask as a matrix; there is nowhere to say so.
"""

import inspect

from transformers import masking_utils
from transformers.models.pixtral import modeling_pixtral

from hf_paged_flash.patches.base import Patch


def _is_flash_attention_requested(original, config=None, *args, **kwargs):
    if config is not None and config._attn_implementation == "paged_flash":
        return False
    return original(config, *args, **kwargs)


def _where_asked(module) -> Patch:
    return Patch(
        owner=lambda: module,
        name="is_flash_attention_requested",
        parameters=("config", "requested_attention_implementation", "version"),
        wrapper=_is_flash_attention_requested,
        reason="masks that other flash implementations can't take are made for paged_flash",
        checked=("5.17.0", "5.23.0"),
    )


# Newer versions of Pixtral pass the images' offsets, as other vision towers do
_PIXTRAL = () if "cu_seq_lens_q" in inspect.getsource(modeling_pixtral) else (_where_asked(modeling_pixtral),)
FLASH_MASKS = (_where_asked(masking_utils), *_PIXTRAL)
