"""K/V in the layouts that attention takes (dense, packed, paged), gathered into one padded batch of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Keys(NamedTuple):
    """Keys and values in one of three layouts, and how many of them each row uses.

    Dense (B, Sk, Hkv, D | Dv): `starts` and `block_table` are None. Packed (Tk, Hkv, D | Dv): row b begins at
    `starts[b]`. Paged (num_blocks, block_size, Hkv, D | Dv): row b's blocks are `block_table[b]`.
    """

    k: torch.Tensor
    v: torch.Tensor
    lengths: list[int]
    starts: list[int] | None
    block_table: torch.Tensor | None


def key_rows(k, v, rows: int, cu_seqlens_k, seqused_k, block_table) -> Keys:
    """`Keys` from the arguments of `reference.flash_forward`; the lengths are read to the host."""
    starts, room = None, k.shape[1]
    if block_table is not None:
        room *= block_table.shape[1]
    lengths = [room] * rows
    if cu_seqlens_k is not None:
        bounds = cu_seqlens_k.tolist()
        differences = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
        starts = bounds[:-1] if block_table is None else None
        lengths = differences if block_table is None else [min(n, room) for n in differences]
    if seqused_k is not None:
        limits = lengths if block_table is None else [room] * rows
        lengths = [max(0, min(used, limit)) for used, limit in zip(seqused_k.tolist(), limits, strict=True)]
    return Keys(k, v, lengths, starts, block_table)


def row_index(starts: list[int], lengths: list[int], total: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (R, max length) of each row's tokens in a packed tensor, and which of them are real."""
    offsets = torch.arange(max(lengths), device=device)
    index = torch.tensor(starts, device=device)[:, None] + offsets
    real = offsets < torch.tensor(lengths, device=device)[:, None]
    return index.clamp_(max=total - 1), real


def gather(keys: Keys, batch: slice, lengths: list[int], first: int):
    """Keys and values [first', max length) of the rows, `first'` <= `first`.

    Returns k (R, Sk, Hkv, D); v (R, Sk, Hkv, Dv), 0 where a key is not valid; valid (R, Sk) bool, None if all are;
    and first'.
    """
    stop = max(lengths)
    device = keys.k.device
    table = None
    if keys.block_table is not None:
        block_size = keys.k.shape[1]
        first_block = first // block_size
        first = first_block * block_size
        table = keys.block_table[batch, first_block : -(-stop // block_size)]
        blocks = table.clamp(min=0).flatten()
        k, v = (x.index_select(0, blocks).unflatten(0, table.shape).flatten(1, 2) for x in (keys.k, keys.v))
    elif keys.starts is None:
        k, v = (x[batch, first:stop] for x in (keys.k, keys.v))
    elif len(lengths) == 1:
        start = keys.starts[batch.start]
        k, v = (x[None, start + first : start + stop] for x in (keys.k, keys.v))
    else:
        starts = [start + first for start in keys.starts[batch]]
        index, _ = row_index(starts, [length - first for length in lengths], keys.k.shape[0], device)
        k, v = keys.k[index], keys.v[index]
    valid = None
    if min(lengths) < stop:
        position = torch.arange(first, first + k.shape[1], device=device)
        valid = position < torch.tensor(lengths, device=device)[:, None]
    if table is not None and bool((table < 0).any()):
        present = (table >= 0).repeat_interleave(block_size, 1)
        valid = present if valid is None else valid & present
    if valid is not None:
        # 0 * NaN is NaN, and what no query sees may be anything.
        if table is None and keys.starts is None:
            v = v.clone(memory_format=torch.contiguous_format)
        v.view(-1, *v.shape[2:]).index_fill_(0, (~valid).flatten().nonzero().squeeze(1), 0.0)
        valid = valid[:, : stop - first]
    return k[:, : stop - first], v[:, : stop - first], valid, first
