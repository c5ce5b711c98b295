"""Exceptions of hf_paged_flash. Each also derives from the built-in type that a caller would expect to catch."""

from __future__ import annotations

from functools import partial


class PagedFlashError(Exception):
    """Base of every error that hf_paged_flash raises."""


class ArgumentError(PagedFlashError, ValueError):
    """An argument has the wrong shape, dtype, device or value; the message says what it must be and what it was."""


class UnsupportedFeatureError(PagedFlashError, NotImplementedError):
    """A feature that was asked for by name is not built; the message names it and the way out."""


class BackendError(PagedFlashError, RuntimeError):
    """The chosen backend cannot run here, e.g. Triton kernels on CPU tensors without Triton's interpreter."""


class IncompatibleTransformersError(PagedFlashError, ImportError):
    """The installed transformers is outside the supported range, or differs where a patch must fit."""


class CacheFullError(PagedFlashError, RuntimeError):
    """The paged cache has reached its cap; the cache and the tokens it stores stay usable.

    Attributes:
        blocks_needed: blocks that the refused request needed.
        blocks_free: blocks that were free, or could still be added under the cap.
    """

    def __init__(self, message: str, *, blocks_needed: int, blocks_free: int) -> None:
        super().__init__(message)
        self.blocks_needed = blocks_needed
        self.blocks_free = blocks_free

    def __reduce__(self):
        # Exception's own __reduce__ passes positional arguments only, and a worker process pickles what it raises.
        return partial(type(self), blocks_needed=self.blocks_needed, blocks_free=self.blocks_free), self.args
