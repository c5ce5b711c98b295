"""Padded batches to packed rows and back."""

from dataclasses import dataclass

import torch
from torch import nn


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


def pack(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """(B, H, S, D) to the tokens at `indices` (T,) of B * S, as (T, H, D)."""
    return x.transpose(1, 2).flatten(0, 1)[indices]


def unpack(x: torch.Tensor, indices: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """The reverse for (T, H, D), to (B, S, H, D); places not in `indices` are 0."""
    out = x.new_zeros(batch * length, *x.shape[1:])
    return out.index_copy(0, indices, x).unflatten(0, (batch, length))
