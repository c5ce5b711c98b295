"""The list of work for packed rows: which query tiles there are, those with most keys first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["batch"])
def _plan_packed_kernel(
    cu_seqlens_q, cu_seqlens_k, work, batch, ROWS: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr
):
    """Lists the query tiles of packed rows by falling number of visible keys, one program a row.

    work int32: [0] the counter that blocks draw from, [1] the number of query tiles, then (row, tile) of each. A
    tile's place is the number of tiles with more keys, or as many in an earlier row.
    """
    row = tl.program_id(0)
    begin_q = tl.load(cu_seqlens_q + row)
    begin_k = tl.load(cu_seqlens_k + row)
    seqlen_q = tl.load(cu_seqlens_q + row + 1) - begin_q
    seqlen_k = tl.load(cu_seqlens_k + row + 1) - begin_k
    tiles = tl.cdiv(seqlen_q, ROWS)
    all_tiles = 0
    for first in range(0, tl.maximum(tiles, 1), BLOCK):
        tile = first + tl.arange(0, BLOCK)
        place = tl.zeros([BLOCK], tl.int32)
        all_tiles = 0
        for other in range(0, batch, BLOCK):
            rows = other + tl.arange(0, BLOCK)
            there = rows < batch
            q_ends = tl.load(cu_seqlens_q + rows + 1, mask=there, other=0)
            k_ends = tl.load(cu_seqlens_k + rows + 1, mask=there, other=0)
            seqlens_q = q_ends - tl.load(cu_seqlens_q + rows, mask=there, other=0)
            seqlens_k = k_ends - tl.load(cu_seqlens_k + rows, mask=there, other=0)
            their_tiles = (seqlens_q + ROWS - 1) // ROWS
            all_tiles += tl.sum(their_tiles)
            if CAUSAL:
                # tile t of a row sees its first (t + 1) * ROWS + seqlen_k - seqlen_q keys
                ahead = (tile[:, None] + 1) * ROWS + (seqlen_k - seqlen_q) - (seqlens_k - seqlens_q)[None, :]
                fewer = tl.minimum(tl.maximum(ahead // ROWS, 0), their_tiles[None, :])
                as_many = (ahead % ROWS == 0) & (ahead > 0) & (ahead // ROWS <= their_tiles[None, :])
                place += tl.sum(their_tiles[None, :] - fewer + (as_many & (rows < row)[None, :]).to(tl.int32), 1)
            else:
                before = (seqlens_k > seqlen_k) | ((seqlens_k == seqlen_k) & (rows < row))
                place += tl.sum(tl.where(before, their_tiles, 0))
        if not CAUSAL:
            place += tile
        tl.store(work + 2 + 2 * place, row, mask=tile < tiles)
        tl.store(work + 3 + 2 * place, tile, mask=tile < tiles)
    if row == 0:
        tl.store(work, 0)
        tl.store(work + 1, all_tiles)


def plan_packed(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, total_q: int, *, rows: int, causal: bool
) -> torch.Tensor:
    """`_plan_packed_kernel`'s work for query tiles of `rows` rows, sized by `total_q`: no length is read here."""
    batch = cu_seqlens_q.numel() - 1
    work = cu_seqlens_q.new_empty(2 + 2 * (total_q // rows + batch), dtype=torch.int32)
    _plan_packed_kernel[(batch,)](
        cu_seqlens_q, cu_seqlens_k, work, batch, ROWS=rows, CAUSAL=causal, BLOCK=32, num_warps=4
    )
    return work
