"""Padded batches to packed rows and back, and where packed rows begin.

What is read from a mask costs a device sync, and every layer of a forward gets the same mask object: it is kept on it.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .ops import library


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a padded batch are, and where each row begins once packed."""

    indices: torch.Tensor  # int64 (tokens,), places among B * S
    cu_seqlens: torch.Tensor  # int32 (B + 1,)
    max_seqlen: int

    @staticmethod
    def of(mask: torch.Tensor) -> "Packing":
        """The packing of a batch whose tokens are True in `mask`, bool (B, S)."""
        lengths = mask.sum(1, dtype=torch.int32)
        cu_seqlens = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return Packing(torch.nonzero(mask.flatten())[:, 0], cu_seqlens, int(lengths.max()))

    @staticmethod
    def of_padding(mask: torch.Tensor, q_length: int, positional: bool) -> tuple["Packing", "Packing"]:
        """Of the keys that are tokens in `mask`, bool (B, Sk), and of `q_length` queries a row.

        Queries are the last of the keys where they are `positional`; else all of them count, padding or not.
        """
        asked = q_length, positional, _writes(mask)
        known, packings = getattr(mask, "_paged_flash_padding", (None, None))
        if known == asked:
            return packings
        keys = Packing.of(mask)
        if not positional:
            queries = Packing.of(mask.new_ones(mask.shape[0], q_length))
        else:
            queries = keys if q_length == mask.shape[1] else Packing.of(mask[:, mask.shape[1] - q_length :])
        mask._paged_flash_padding = asked, (keys, queries)
        return keys, queries


def row_offsets(segments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`library.segment_offsets` of ids (B, S), which every layer of a forward gets as the same tensor."""
    offsets = getattr(segments, "_paged_flash_offsets", None)
    if offsets is None:
        offsets = library.segment_offsets(segments)
        if not torch.compiler.is_compiling():  # no side effects in a checkpoint's body, which is traced by itself
            segments._paged_flash_offsets = offsets
    return offsets


def longest(cu_seqlens: torch.Tensor) -> int:
    """The longest row's length, from the user's own offsets (B + 1,)."""
    known, length = getattr(cu_seqlens, "_paged_flash_longest", (None, None))
    if known is None or known != _writes(cu_seqlens):
        length = int(cu_seqlens.diff().max())
        cu_seqlens._paged_flash_longest = _writes(cu_seqlens), length
    return length


def _writes(x: torch.Tensor) -> int | None:
    """How often `x` was written to: what was read from it before counts no more. None where torch does not tell."""
    return None if x.is_inference() else x._version


def pack(x: torch.Tensor, indices: torch.Tensor | None) -> torch.Tensor:
    """(B, H, S, D) to the tokens at `indices` (T,) of B * S, as (T, H, D); None for all."""
    x = x.transpose(1, 2).flatten(0, 1)
    return x if indices is None else x.index_select(0, indices)  # `x[indices]` sorts in its backward


def unpack(x: torch.Tensor, indices: torch.Tensor | None, batch: int, length: int) -> torch.Tensor:
    """The reverse for (T, H, D), to (B, S, H, D); places not in `indices` are 0."""
    if indices is None:
        return x.unflatten(0, (batch, length))
    out = x.new_zeros(batch * length, *x.shape[1:])
    return out.index_copy(0, indices, x).unflatten(0, (batch, length))
