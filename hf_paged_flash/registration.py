"""Makes transformers know "paged_flash", and forget it again."""

import threading

import transformers
from transformers import AttentionInterface, AttentionMaskInterface

from .attention import paged_flash_attention_forward
from .errors import IncompatibleTransformersError
from .masks import paged_flash_mask

ATTENTION_NAME = "paged_flash"

_lock = threading.RLock()


def register() -> None:
    """Registers the attention and mask functions under "paged_flash" and applies the patches; idempotent.

    `import hf_paged_flash` calls it.

    Raises:
        IncompatibleTransformersError: transformers differs where a patch must fit; nothing is changed.
    """
    try:
        # imported here: `hf_paged_flash.patches` imports what this package exports
        from hf_paged_flash.patches import ALL_PATCHES
    except ImportError as error:
        if (error.name or "").startswith("hf_paged_flash"):
            raise
        raise IncompatibleTransformersError(
            f"transformers {transformers.__version__} does not fit this version of hf_paged_flash: {error}"
        ) from error
    with _lock:
        for patch in ALL_PATCHES:
            if not patch.applied:
                patch.check()
        for patch in ALL_PATCHES:
            patch.apply()
        AttentionInterface.register(ATTENTION_NAME, paged_flash_attention_forward)
        AttentionMaskInterface.register(ATTENTION_NAME, paged_flash_mask)


def unregister() -> None:
    """Undoes `register()`: transformers is as it was. Models loaded with "paged_flash" no longer run."""
    from hf_paged_flash.patches import ALL_PATCHES

    with _lock:
        for patch in reversed(ALL_PATCHES):
            patch.undo()
        AttentionInterface._global_mapping.pop(ATTENTION_NAME, None)
        AttentionMaskInterface._global_mapping.pop(ATTENTION_NAME, None)
