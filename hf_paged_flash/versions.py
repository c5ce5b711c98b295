"""The range of transformers that is supported, checked before anything that older versions lack is imported."""

import warnings

import transformers
from packaging.version import Version

from .errors import IncompatibleTransformersError

OLDEST_TRANSFORMERS = Version("5.17.0")
NEWEST_TRANSFORMERS = Version("5.24.0")  # the newest that the tests have seen


def check_transformers() -> None:
    """Raises IncompatibleTransformersError for a transformers that is too old, warns of one newer than ever tested."""
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


check_transformers()
