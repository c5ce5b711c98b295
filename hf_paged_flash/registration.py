"""Makes transformers know "paged_flash", and forget it again."""

import threading
import warnings

import transformers
from packaging.version import Version
from transformers import AttentionInterface, AttentionMaskInterface

from .attention import paged_flash_attention_forward
from .errors import IncompatibleTransformersError
from .masks import paged_flash_mask

ATTENTION_NAME = "paged_flash"
OLDEST_TRANSFORMERS = Version("5.17.0")
NEWEST_TRANSFORMERS = Version("5.23.0")  # the newest that the tests have seen

_lock = threading.RLock()


def register() -> None:
    """Registers the attention and mask functions under "paged_flash" and applies the patches; idempotent.

    `import hf_paged_flash` calls it.

    Raises:
        IncompatibleTransformersError: transformers is too old, or differs where a patch must fit; nothing is changed.
    """
    # imported here: `hf_paged_flash.patches` imports what this package exports
    from hf_paged_flash.patches import ALL_PATCHES

    version = Version(transformers.__version__)
    if version < OLDEST_TRANSFORMERS:
        raise IncompatibleTransformersError(
            f"hf_paged_flash needs transformers {OLDEST_TRANSFORMERS} or newer, found {version}: "
            f"pip install -U 'transformers>={OLDEST_TRANSFORMERS}'"
        )
    if version > NEWEST_TRANSFORMERS:
        warnings.warn(
            f"hf_paged_flash has been tested up to transformers {NEWEST_TRANSFORMERS}, found {version}", stacklevel=3
        )
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
