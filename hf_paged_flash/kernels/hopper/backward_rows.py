"""What lies around the Hopper backward: D and lse in tiles before it, the scaled dQ after it, packed rows as a list.

Query rows are padded to tiles of BLOCK_M: head h of row b begins at tile (b * Hq + h) * tiles_m; packed, row b of
head h at tile h * tiles_m + (cu_seqlens_q[b] + b * BLOCK_M) // BLOCK_M, which leaves room for each row's last tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..primitives import LOG2_E


@triton.jit
def _row_of(cu_seqlens_q, tiles_m, max_seqlen_q, PACKED: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of the program's row and head, grid (tiles, Hq, B): first token, length, first padded tile, head, row."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    if PACKED:
        first = tl.load(cu_seqlens_q + row).to(tl.int64)
        seqlen_q = (tl.load(cu_seqlens_q + row + 1) - first).to(tl.int32)
        tile = head * tiles_m + (first + row * BLOCK_M) // BLOCK_M
        row = row * 0
    else:
        first = row * 0
        seqlen_q = max_seqlen_q
        tile = (row * tl.num_programs(1) + head) * tiles_m
    return first, seqlen_q, tile, head, row


# a length that turns into a multiple of 16 must not compile anew
@triton.jit(do_not_specialize=["stride_lse_b", "stride_lse_h", "tiles_m", "max_seqlen_q"])
def before_backward_kernel(
    Out,
    DOut,
    Lse,
    DLse,
    cu_seqlens_q,
    LseDelta,
    DQ,
    stride_o_b,
    stride_o_m,
    stride_o_h,
    stride_do_b,
    stride_do_m,
    stride_do_h,
    stride_lse_b,
    stride_lse_h,
    tiles_m,
    max_seqlen_q,
    HEAD_DIM: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """LseDelta (tiles, 2, BLOCK_M): lse in log2 units, +inf for rows without keys and padding, and D; clears DQ.

    D = rowsum(dO o O) - dlse (FlashAttention-2, algorithm 2). Out, DOut (B, Sq, Hq, D) or packed; Lse, DLse fp32.
    """
    first, seqlen_q, tile, head, row = _row_of(cu_seqlens_q, tiles_m, max_seqlen_q, PACKED, BLOCK_M)
    start_m = tl.program_id(0) * BLOCK_M
    if start_m >= seqlen_q:
        return
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, HEAD_DIM)
    in_row = offs_m < seqlen_q
    tokens = (first + offs_m)[:, None]
    o_pointers = Out + row * stride_o_b + head * stride_o_h + tokens * stride_o_m + offs_d[None, :]
    do_pointers = DOut + row * stride_do_b + head * stride_do_h + tokens * stride_do_m + offs_d[None, :]
    o = tl.load(o_pointers, mask=in_row[:, None], other=0.0).to(tl.float32)
    do = tl.load(do_pointers, mask=in_row[:, None], other=0.0).to(tl.float32)
    delta = tl.sum(o * do, 1)
    lse_offsets = row * stride_lse_b + head * stride_lse_h + first + offs_m
    lse = tl.load(Lse + lse_offsets, mask=in_row, other=float("-inf"))
    no_key = lse == float("-inf")
    if HAS_DLSE:
        delta -= tl.where(no_key, 0.0, tl.load(DLse + lse_offsets, mask=in_row, other=0.0))
    pairs = LseDelta + (tile + tl.program_id(0)) * (2 * BLOCK_M) + tl.arange(0, BLOCK_M)
    tl.store(pairs, tl.where(no_key, float("inf"), lse * LOG2_E))
    tl.store(pairs + BLOCK_M, delta)
    rows = (tile * BLOCK_M + offs_m)[:, None]
    tl.store(DQ + rows * HEAD_DIM + offs_d[None, :], tl.zeros([BLOCK_M, HEAD_DIM], tl.float32))


# a length that turns into a multiple of 16 must not compile anew
@triton.jit(do_not_specialize=["tiles_m", "max_seqlen_q"])
def after_backward_kernel(
    Sum,
    DQ,
    cu_seqlens_q,
    stride_dq_b,
    stride_dq_m,
    stride_dq_h,
    tiles_m,
    max_seqlen_q,
    softmax_scale,
    HEAD_DIM: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """DQ = softmax_scale * Sum, from fragments in padded tiles to (B, Sq, Hq, D) or (Tq, Hq, D)."""
    first, seqlen_q, tile, head, row = _row_of(cu_seqlens_q, tiles_m, max_seqlen_q, PACKED, BLOCK_M)
    start_m = tl.program_id(0) * BLOCK_M
    if start_m >= seqlen_q:
        return
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, HEAD_DIM)
    # a tile as `backward_kernel._reduce_dq` leaves it: eights of columns, warps, lanes, a thread's 2 rows x 2 columns
    WARPS_N: tl.constexpr = 128 // BLOCK_M
    x = tl.load(Sum + (tile * BLOCK_M + start_m) * HEAD_DIM + tl.arange(0, BLOCK_M * HEAD_DIM))
    x = tl.reshape(x, [HEAD_DIM // WARPS_N // 8, WARPS_N, BLOCK_M // 16, 8, 4, 2, 2])
    dq = tl.reshape(tl.permute(x, [2, 5, 3, 1, 0, 4, 6]), [BLOCK_M, HEAD_DIM])
    pointers = DQ + row * stride_dq_b + head * stride_dq_h + (first + offs_m)[:, None] * stride_dq_m + offs_d[None, :]
    tl.store(pointers, (dq * softmax_scale).to(DQ.dtype.element_ty), mask=(offs_m < seqlen_q)[:, None])


@triton.jit(do_not_specialize=["batch"])
def _list_keys_kernel(
    cu_seqlens_q, cu_seqlens_k, items, batch, ROWS: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr
):
    """Lists the tiles of ROWS keys, one program a row: (row, tile, queries that see it); items[0] is their number."""
    row = tl.program_id(0)
    before = 0
    for other in range(0, row, BLOCK):
        rows = other + tl.arange(0, BLOCK)
        there = rows < row
        ends = tl.load(cu_seqlens_k + rows + 1, mask=there, other=0)
        begins = tl.load(cu_seqlens_k + rows, mask=there, other=0)
        before += tl.sum((ends - begins + ROWS - 1) // ROWS)
    seqlen_q = tl.load(cu_seqlens_q + row + 1) - tl.load(cu_seqlens_q + row)
    seqlen_k = tl.load(cu_seqlens_k + row + 1) - tl.load(cu_seqlens_k + row)
    tiles = tl.cdiv(seqlen_k, ROWS)
    for first in range(0, tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        seen = tl.zeros([BLOCK], tl.int32) + seqlen_q
        if CAUSAL:
            seen = tl.minimum(seen, seqlen_k - tile * ROWS)
        place = items + 1 + 3 * (before + tile)
        tl.store(place, row, mask=tile < tiles)
        tl.store(place + 1, tile, mask=tile < tiles)
        tl.store(place + 2, seen, mask=tile < tiles)
    if row == batch - 1:
        tl.store(items, before + tiles)


@triton.jit
def _sort_keys_kernel(items, work, BLOCK: tl.constexpr):
    """work (1 + 2 * n): the number of items, then (row, tile) by falling number of queries that see it."""
    count = tl.load(items)
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seen = tl.load(items + 3 + 3 * mine, mask=mine < count, other=0)
    place = tl.zeros([BLOCK], tl.int32)
    for first in range(0, count, BLOCK):
        theirs = first + tl.arange(0, BLOCK)
        their_seen = tl.load(items + 3 + 3 * theirs, mask=theirs < count, other=-1)
        more = their_seen[None, :] > seen[:, None]
        as_many = (their_seen[None, :] == seen[:, None]) & (theirs[None, :] < mine[:, None])
        place += tl.sum((more | as_many).to(tl.int32), 1)
    row = tl.load(items + 1 + 3 * mine, mask=mine < count, other=0)
    tile = tl.load(items + 2 + 3 * mine, mask=mine < count, other=0)
    tl.store(work + 1 + 2 * place, row, mask=mine < count)
    tl.store(work + 2 + 2 * place, tile, mask=mine < count)
    if tl.program_id(0) == 0:
        tl.store(work, count)


def plan_keys(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, total_k: int, *, rows: int, causal: bool
) -> torch.Tensor:
    """The work of packed rows, tiles of `rows` keys, those that most queries see first: int32 (1 + 2 * most,).

    [0] their number, then (row, tile) of each. Sized by `total_k`: no length is read here.
    """
    batch = cu_seqlens_k.numel() - 1
    most = total_k // rows + batch
    items = cu_seqlens_k.new_empty(1 + 3 * most, dtype=torch.int32)
    work = cu_seqlens_k.new_empty(1 + 2 * most, dtype=torch.int32)
    _list_keys_kernel[(batch,)](
        cu_seqlens_q, cu_seqlens_k, items, batch, ROWS=rows, CAUSAL=causal, BLOCK=128, num_warps=4
    )
    _sort_keys_kernel[(triton.cdiv(most, 64),)](items, work, BLOCK=64, num_warps=4)
    return work
