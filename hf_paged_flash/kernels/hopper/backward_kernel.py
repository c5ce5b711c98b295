"""FlashAttention backward for Hopper (sm_90) in Triton's Gluon: dQ, dK and dV in one pass, five products a tile.

A block holds BLOCK_N keys of one KV head and walks over the queries that see them, of all query heads of the group.
One warp copies tiles of Q and dO into shared memory with the copy engine (TMA), two warpgroups compute, as in
FlashAttention-3 (Shah et al. 2024), scores transposed: S^T = K Q^T and dP^T = V dO^T come out as the left operands
that dV and dK need. dQ is added to fp32 in global memory by vector reductions straight from the registers: through
shared memory, which the products keep busy, it measured 7 % slower at head_dim 64.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .forward_kernel import _barriers


@gluon.jit
def _locate(
    work, cu_seqlens_q, cu_seqlens_k, shape, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, PACKED: gl.constexpr
):
    """The block's work: row (0 for packed), head_k, start_n, first_q, seqlen_q, first_k, seqlen_k, padded tile.

    The last is where the row begins among the padded tiles of `LseDelta` and the sum of dQ, see backward_rows.py.
    """
    kv_heads, sections, tiles_n, tiles_m, max_seqlen_q, max_seqlen_k = shape
    section_heads = kv_heads // sections
    item = gl.program_id(0)
    head_k = item % section_heads
    rest = item // section_heads
    item = rest % tiles_n
    rest = rest // tiles_n
    head_k += rest % sections * section_heads
    if PACKED:
        there = item < gl.load(work)
        row = gl.load(work + 1 + 2 * item, mask=there, other=0)
        tile_n = gl.load(work + 2 + 2 * item, mask=there, other=0)
        first_q = gl.load(cu_seqlens_q + row)
        first_k = gl.load(cu_seqlens_k + row)
        seqlen_q = gl.where(there, gl.load(cu_seqlens_q + row + 1) - first_q, 0)
        seqlen_k = gl.where(there, gl.load(cu_seqlens_k + row + 1) - first_k, 0)
        padded = (first_q + row * BLOCK_M) // BLOCK_M
        row = 0
    else:
        tile_n = item
        row = rest // sections
        first_q = 0
        first_k = 0
        seqlen_q = max_seqlen_q
        seqlen_k = max_seqlen_k
        padded = 0
    return row, head_k, tile_n * BLOCK_N, first_q, seqlen_q, first_k, seqlen_k, padded


@gluon.jit
def _query_tiles(start_n, seqlen_q, seqlen_k, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """(first, masked, all) tiles of queries that see keys `start_n ..`; from `masked` on a tile needs no mask."""
    tiles = (seqlen_q + BLOCK_M - 1) // BLOCK_M
    first = 0
    masked = 0
    if CAUSAL:
        shift = seqlen_k - seqlen_q
        first = gl.minimum(gl.maximum(start_n - shift, 0) // BLOCK_M, tiles)
        masked = gl.minimum((gl.maximum(start_n + BLOCK_N - 1 - shift, 0) + BLOCK_M - 1) // BLOCK_M, tiles)
    if start_n + BLOCK_N > seqlen_k:
        masked = tiles
    return first, masked, tiles


@gluon.jit
def _first_tile(first, tiles, start_n, BLOCK_M: gl.constexpr, CAUSAL: gl.constexpr):
    """The tile a block begins with: without a causal mask each with another, or all would add to one tile of dQ."""
    if not CAUSAL:
        first = start_n // BLOCK_M % gl.maximum(tiles, 1)
    return first


@gluon.jit
def _next_tile(tile, tiles, CAUSAL: gl.constexpr):
    tile += 1
    if not CAUSAL:
        tile = gl.where(tile == tiles, 0, tile)
    return tile


@gluon.jit
def _produce(
    arguments, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    PACKED: gl.constexpr,
):  # fmt: skip
    """K and V once, then STAGES tiles of Q with their lse and D, and of dO, in flight."""
    Q, K, V, DO, LseDelta, cu_seqlens_q, cu_seqlens_k, work, shape, group, tensors, bars = arguments
    q_s, do_s, ld_s, k_s, v_s = tensors
    kv_full, q_full, do_full, empty = bars
    row, head_k, start_n, first_q, seqlen_q, first_k, seqlen_k, padded = _locate(
        work, cu_seqlens_q, cu_seqlens_k, shape, BLOCK_M, BLOCK_N, PACKED
    )
    first, masked, tiles = _query_tiles(start_n, seqlen_q, seqlen_k, BLOCK_M, BLOCK_N, CAUSAL)
    tiles_m = shape[3]
    mbarrier.expect(kv_full.index(0), K.block_type.nbytes)
    tma.async_copy_global_to_shared(K, [row, first_k + start_n, head_k, 0], kv_full.index(0), k_s.index(0))
    r = 0
    for g in range(group):
        head = head_k * group + g
        tile = _first_tile(first, tiles, start_n, BLOCK_M, CAUSAL)
        for _ in range(first, tiles):
            slot = r % STAGES
            phase = ((r // STAGES) & 1) ^ 1
            start_m = first_q + tile * BLOCK_M
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(q_full.index(slot), Q.block_type.nbytes + 2 * LseDelta.block_type.nbytes)
            tma.async_copy_global_to_shared(Q, [row, start_m, head, 0], q_full.index(slot), q_s.index(slot))
            padded_tile = (row * (shape[0] * group) + head) * tiles_m + padded + tile
            for i in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    LseDelta, [padded_tile * 2 + i, 0], q_full.index(slot), ld_s.index(2 * slot + i)
                )
            if r == 0:
                mbarrier.expect(kv_full.index(1), V.block_type.nbytes)
                tma.async_copy_global_to_shared(V, [row, first_k + start_n, head_k, 0], kv_full.index(1), v_s.index(0))
            mbarrier.expect(do_full.index(slot), DO.block_type.nbytes)
            tma.async_copy_global_to_shared(DO, [row, start_m, head, 0], do_full.index(slot), do_s.index(slot))
            r += 1
            tile = _next_tile(tile, tiles, CAUSAL)


@gluon.jit
def _zero_tail(x, rest, ROWS: gl.constexpr, D: gl.constexpr):
    """Rows of x (ROWS, D) in shared memory from `rest` on become 0: packed, they are another row's; 0 * NaN is NaN."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [8, 1], [1, 0])
    row = gl.arange(0, 32, gl.SliceLayout(1, LAYOUT))
    for i in gl.static_range(ROWS // 32):
        if rest < (i + 1) * 32:
            part = x.slice(i * 32, 32, 0)
            values = part.load(LAYOUT)
            part.store(gl.where((row < rest - i * 32)[:, None], values, 0.0).to(values.dtype))
    fence_async_shared()


@gluon.jit
def _reduce_dq(dq, tile):
    """Adds dq (M, D) to the fp32 of `tile`, an int64 address, four neighbours of a thread at once.

    They lie there as the fragments of the product lie in registers; `backward_rows.after_backward_kernel` undoes it.
    """
    LAYOUT: gl.constexpr = dq.type.layout
    M: gl.constexpr = dq.shape[0]
    D: gl.constexpr = dq.shape[1]
    # warps along D: two where M has rows for one warpgroup only
    COLUMNS: gl.constexpr = D // (128 // M)
    m = gl.arange(0, M, gl.SliceLayout(1, LAYOUT))[:, None]
    d = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
    lane = (d // COLUMNS * (M // 16) + m // 16) * 32 + m % 8 * 4 + d % 8 // 2
    # the same for all of a thread's columns but for a constant each, which the instruction can hold
    addresses = (tile + (lane * 16).to(gl.int64)) + (d % COLUMNS // 8 * 4096).to(gl.int64)
    gl.inline_asm_elementwise(
        """
        red.relaxed.gpu.global.add.v4.f32 [$4], {$8, $9, $10, $11};
        mov.u32 $0, 0;
        mov.u32 $1, 0;
        mov.u32 $2, 0;
        mov.u32 $3, 0;
        """,
        "=r,=r,=r,=r,l,l,l,l,f,f,f,f", [addresses, dq], dtype=gl.int32, is_pure=False, pack=4,
    )  # fmt: skip


@gluon.jit
def _await_tile(tensors, bars, r, rest, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
                STAGES: gl.constexpr, PACKED: gl.constexpr):  # fmt: skip
    """Ring entry r once its Q is there: q, do, k, v, their lse and D, room for dS, all in shared memory."""
    q_s, do_s, ld_s, k_s, v_s, p_s, ds_s = tensors
    kv_full, q_full, do_full, empty = bars
    # 0, but not for the compiler, which would keep every operand's address in a register of its own
    zero = r >> 30
    slot = r % STAGES
    phase = (r // STAGES) & 1
    q = q_s.index(slot).reshape([BLOCK_M, D])
    do = do_s.index(slot).reshape([BLOCK_M, D])
    mbarrier.wait(q_full.index(slot), phase)
    if PACKED:
        if rest < BLOCK_M:
            mbarrier.wait(do_full.index(slot), phase)
            _zero_tail(q, rest, BLOCK_M, D)
            _zero_tail(do, rest, BLOCK_M, D)
    k = k_s.index(zero).reshape([BLOCK_N, D])
    v = v_s.index(zero).reshape([BLOCK_N, D])
    lse = ld_s.index(2 * slot).reshape([BLOCK_M])
    delta = ld_s.index(2 * slot + 1).reshape([BLOCK_M])
    return q, do, k, v, lse, delta, p_s.index(zero), ds_s.index(zero)


@gluon.jit
def _probabilities(s, lse, limit, scale_log2, MASKED: gl.constexpr):
    """P^T (N, M) of scores s = K Q^T and lse (M,) in log2 units; key n sees the queries from `limit` (N,) on."""
    p = gl.exp2(s * scale_log2 - lse[None, :])
    if MASKED:
        queries = gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))
        p = gl.where(queries[None, :] < limit[:, None], 0.0, p)
    return p


@gluon.jit
def _step(
    tensors, bars, dq_tile, dk, dv, r, limit, rest, scale_log2, MASKED: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """The five products of ring entry r, a tile of queries of which `rest` are left in their row.

    Key n sees the tile's queries from `limit` (N,) on. dq_tile: where `_reduce_dq` adds.
    """
    do_full, empty = bars[2:]
    DTYPE: gl.constexpr = tensors[0].dtype
    # with keys for one warpgroup only, the two share a tile's queries, and exchange P and dS in shared memory
    EXCHANGE: gl.constexpr = BLOCK_N == 64
    S_WARPS: gl.constexpr = [4, 2] if EXCHANGE else [8, 1]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], S_WARPS, [16, BLOCK_M // S_WARPS[1], 16])
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D // 2, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, dv.type.layout, 2)
    QUERIES: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    q, do, k, v, lse, delta, p_shared, ds_shared = _await_tile(
        tensors, bars, r, rest, BLOCK_M, BLOCK_N, D, STAGES, PACKED
    )
    zeros = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, S_LAYOUT)
    s = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(do_full.index(r % STAGES), (r // STAGES) & 1)
    dp = warpgroup_mma(v, do.permute((1, 0)), zeros, use_acc=False, is_async=True)
    lse = lse.load(QUERIES)
    s = warpgroup_mma_wait(1, deps=(s,))
    p = _probabilities(s, lse, limit, scale_log2, MASKED)
    if EXCHANGE:
        p_shared.store(p.to(DTYPE))
    delta = delta.load(QUERIES)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    ds = (p * (dp - delta[None, :])).to(DTYPE)
    ds_shared.store(ds)
    zeros = gl.zeros([BLOCK_M, D], gl.float32, DQ_LAYOUT)
    if EXCHANGE:
        fence_async_shared()
        dv = warpgroup_mma(p_shared, do, dv, is_async=True)
        dq = warpgroup_mma(ds_shared.permute((1, 0)), k, zeros, use_acc=False, is_async=True)
        dk = warpgroup_mma(ds_shared, q, dk, is_async=True)
        dq, dv = warpgroup_mma_wait(1, deps=(dq, dv))
        _reduce_dq(dq, dq_tile)
        dk = warpgroup_mma_wait(0, deps=(dk,))
    else:
        p = gl.convert_layout(p.to(DTYPE), OPERAND)
        dv = warpgroup_mma(p, do, dv, is_async=True)  # runs while dS reaches the other warpgroup
        fence_async_shared()
        ds = gl.convert_layout(ds, OPERAND)
        dq = warpgroup_mma(ds_shared.permute((1, 0)), k, zeros, use_acc=False, is_async=True)
        dk = warpgroup_mma(ds, q, dk, is_async=True)
        dq, dv, p = warpgroup_mma_wait(1, deps=(dq, dv, p))
        _reduce_dq(dq, dq_tile)
        dk, ds = warpgroup_mma_wait(0, deps=(dk, ds))
    mbarrier.arrive(empty.index(r % STAGES), count=1)
    return dk, dv


@gluon.jit
def _step_in_halves(
    tensors, bars, dq_tile, dk, dv, r, limit, rest, scale_log2, MASKED: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """`_step` with the tile's queries in two halves: the products of one run under the softmax of the other."""
    do_full, empty = bars[2:]
    DTYPE: gl.constexpr = tensors[0].dtype
    HALF: gl.constexpr = BLOCK_M // 2
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, HALF, 16])
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, dv.type.layout, 2)
    QUERIES: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    q, do, k, v, lse, delta, p_shared, ds_shared = _await_tile(
        tensors, bars, r, rest, BLOCK_M, BLOCK_N, D, STAGES, PACKED
    )
    zeros = gl.zeros([BLOCK_N, HALF], gl.float32, S_LAYOUT)
    q_0 = q.slice(0, HALF, 0)
    q_1 = q.slice(HALF, HALF, 0)
    do_0 = do.slice(0, HALF, 0)
    do_1 = do.slice(HALF, HALF, 0)
    s_0 = warpgroup_mma(k, q_0.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(do_full.index(r % STAGES), (r // STAGES) & 1)
    dp_0 = warpgroup_mma(v, do_0.permute((1, 0)), zeros, use_acc=False, is_async=True)
    s_1 = warpgroup_mma(k, q_1.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dp_1 = warpgroup_mma(v, do_1.permute((1, 0)), zeros, use_acc=False, is_async=True)
    s_0 = warpgroup_mma_wait(3, deps=(s_0,))
    p_0 = _probabilities(s_0, lse.slice(0, HALF, 0).load(QUERIES), limit, scale_log2, MASKED)
    dp_0 = warpgroup_mma_wait(2, deps=(dp_0,))
    ds_0 = (p_0 * (dp_0 - delta.slice(0, HALF, 0).load(QUERIES)[None, :])).to(DTYPE)
    ds_shared.slice(0, HALF, 1).store(ds_0)
    p_0 = gl.convert_layout(p_0.to(DTYPE), OPERAND)
    ds_0 = gl.convert_layout(ds_0, OPERAND)
    dv = warpgroup_mma(p_0, do_0, dv, is_async=True)
    dk = warpgroup_mma(ds_0, q_0, dk, is_async=True)
    s_1 = warpgroup_mma_wait(3, deps=(s_1,))
    p_1 = _probabilities(s_1, lse.slice(HALF, HALF, 0).load(QUERIES), limit - HALF, scale_log2, MASKED)
    dp_1 = warpgroup_mma_wait(2, deps=(dp_1,))
    ds_1 = (p_1 * (dp_1 - delta.slice(HALF, HALF, 0).load(QUERIES)[None, :])).to(DTYPE)
    ds_shared.slice(HALF, HALF, 1).store(ds_1)
    fence_async_shared()
    p_1 = gl.convert_layout(p_1.to(DTYPE), OPERAND)
    ds_1 = gl.convert_layout(ds_1, OPERAND)
    dv = warpgroup_mma(p_1, do_1, dv, is_async=True)
    zeros = gl.zeros([BLOCK_M, D], gl.float32, DQ_LAYOUT)
    dq = warpgroup_mma(ds_shared.permute((1, 0)), k, zeros, use_acc=False, is_async=True)
    dk = warpgroup_mma(ds_1, q_1, dk, is_async=True)
    dq, dv, p_0, p_1, ds_0 = warpgroup_mma_wait(1, deps=(dq, dv, p_0, p_1, ds_0))
    _reduce_dq(dq, dq_tile)
    dk, ds_1 = warpgroup_mma_wait(0, deps=(dk, ds_1))
    mbarrier.arrive(empty.index(r % STAGES), count=1)
    return dk, dv


@gluon.jit
def _store(x, x_s, Out, stride_n, stride_h, first, head_k, rows, BLOCK_N: gl.constexpr, D: gl.constexpr):
    """x (BLOCK_N, D) to `rows` rows of Out from `first` on, through x_s."""
    WRITE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [8, 1], [1, 0])
    x_s = x_s.reshape([BLOCK_N, D])
    x_s.store(x.to(Out.dtype.element_ty))
    out = x_s.load(WRITE)
    offs_n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, WRITE))
    offs_d = gl.arange(0, D, gl.SliceLayout(0, WRITE))
    base = Out + head_k.to(gl.int64) * stride_h + first
    gl.store(base + offs_n.to(gl.int64)[:, None] * stride_n + offs_d[None, :], out, mask=(offs_n < rows)[:, None])


@gluon.jit
def _consume(
    arguments, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Two warpgroups: dK and dV of the block's keys, and what these add to dQ."""
    (DQ, DK, DV, cu_seqlens_q, cu_seqlens_k, work, shape, strides, group, softmax_scale, scale_log2, tensors,
     bars) = arguments  # fmt: skip
    k_s, v_s = tensors[3:5]
    kv_full = bars[0]
    stride_dk_b, stride_dk_n, stride_dk_h, stride_dv_b, stride_dv_n, stride_dv_h = strides
    S_WARPS: gl.constexpr = [4, 2] if BLOCK_N == 64 else [8, 1]
    STEP: gl.constexpr = _step_in_halves if BLOCK_M == 128 else _step
    KEYS: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], S_WARPS, [16, 64 // S_WARPS[1], 16]))
    KV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], S_WARPS, [16, D // S_WARPS[1], 16])
    row, head_k, start_n, first_q, seqlen_q, first_k, seqlen_k, padded = _locate(
        work, cu_seqlens_q, cu_seqlens_k, shape, BLOCK_M, BLOCK_N, PACKED
    )
    first, masked, tiles = _query_tiles(start_n, seqlen_q, seqlen_k, BLOCK_M, BLOCK_N, CAUSAL)
    keys = start_n + gl.arange(0, BLOCK_N, KEYS)
    limit = gl.zeros([BLOCK_N], gl.int32, KEYS)
    if CAUSAL:
        limit = keys - (seqlen_k - seqlen_q)
    limit = gl.where(keys < seqlen_k, limit, 1 << 30)
    dk = gl.zeros([BLOCK_N, D], gl.float32, KV_LAYOUT)
    dv = gl.zeros([BLOCK_N, D], gl.float32, KV_LAYOUT)
    mbarrier.wait(kv_full.index(0), 0)
    mbarrier.wait(kv_full.index(1), 0, pred=first < tiles)  # without a query V is not fetched
    if PACKED:
        if seqlen_k - start_n < BLOCK_N:
            _zero_tail(k_s.index(0).reshape([BLOCK_N, D]), seqlen_k - start_n, BLOCK_N, D)
            _zero_tail(v_s.index(0).reshape([BLOCK_N, D]), seqlen_k - start_n, BLOCK_N, D)
    r = 0
    for g in range(group):
        head_tiles = (row * (shape[0] * group) + head_k * group + g) * shape[3] + padded
        dq_head = (DQ + head_tiles.to(gl.int64) * (BLOCK_M * D)).to(gl.int64, bitcast=True)
        tile = _first_tile(first, tiles, start_n, BLOCK_M, CAUSAL)
        for _ in range(first, masked):
            dk, dv = STEP(
                tensors, bars, dq_head + tile.to(gl.int64) * (BLOCK_M * D * 4), dk, dv, r, limit - tile * BLOCK_M,
                seqlen_q - tile * BLOCK_M, scale_log2, True, BLOCK_M, BLOCK_N, D, STAGES, PACKED,
            )  # fmt: skip
            r += 1
            tile = _next_tile(tile, tiles, CAUSAL)
        for _ in range(masked, tiles):
            dk, dv = STEP(
                tensors, bars, dq_head + tile.to(gl.int64) * (BLOCK_M * D * 4), dk, dv, r, limit,
                seqlen_q - tile * BLOCK_M, scale_log2, False, BLOCK_M, BLOCK_N, D, STAGES, PACKED,
            )  # fmt: skip
            r += 1
            tile = _next_tile(tile, tiles, CAUSAL)
    rows = seqlen_k - start_n
    dk_first = row.to(gl.int64) * stride_dk_b + (first_k + start_n).to(gl.int64) * stride_dk_n
    dv_first = row.to(gl.int64) * stride_dv_b + (first_k + start_n).to(gl.int64) * stride_dv_n
    _store(dv, v_s.index(0), DV, stride_dv_n, stride_dv_h, dv_first, head_k, rows, BLOCK_N, D)
    _store(dk * softmax_scale, k_s.index(0), DK, stride_dk_n, stride_dk_h, dk_first, head_k, rows, BLOCK_N, D)


# lengths and heads must not compile anew when they turn into multiples of 16
@gluon.jit(
    do_not_specialize=["kv_heads", "group", "num_sections", "tiles_n", "tiles_m", "max_seqlen_q", "max_seqlen_k"]
)
def flash_backward_hopper_kernel(
    Q,
    K,
    V,
    DO,
    LseDelta,
    DQ,
    DK,
    DV,
    cu_seqlens_q,
    cu_seqlens_k,
    work,
    stride_dk_b,
    stride_dk_n,
    stride_dk_h,
    stride_dv_b,
    stride_dv_n,
    stride_dv_h,
    kv_heads,
    group,
    num_sections,
    tiles_n,
    tiles_m,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale,
    scale_log2,
    HEAD_DIM: gl.constexpr,
    CAUSAL: gl.constexpr,
    PACKED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """dK and dV of BLOCK_N keys of one KV head, and what they add to dQ (FlashAttention-2, algorithm 2).

    Q, K, V, DO are TMA descriptors of (B, S, H, D), packed rows as B = 1; LseDelta fp32 (tiles * 2, BLOCK_M), of each
    tile of padded query rows lse in log2 units, then D; DQ fp32, the sum without softmax_scale, see `_reduce_dq`.
    DK, DV (B, Sk, Hkv, D) or (Tk, Hkv, D). work int32, for packed rows `plan_keys`' list of up to tiles_n items. A
    section is the heads whose blocks follow each other and share Q, dO and dQ in L2.
    """
    DTYPE: gl.constexpr = Q.dtype
    q_s = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BLOCK_M, 1, HEAD_DIM], Q.layout)
    do_s = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BLOCK_M, 1, HEAD_DIM], Q.layout)
    ld_s = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, BLOCK_M], LseDelta.layout)
    k_s = gl.allocate_shared_memory(DTYPE, [1, 1, BLOCK_N, 1, HEAD_DIM], K.layout)
    v_s = gl.allocate_shared_memory(DTYPE, [1, 1, BLOCK_N, 1, HEAD_DIM], K.layout)
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], DTYPE)
    ds_s = gl.allocate_shared_memory(DTYPE, [1, BLOCK_N, BLOCK_M], DS_LAYOUT)
    p_s = ds_s
    if BLOCK_N == 64:
        p_s = gl.allocate_shared_memory(DTYPE, [1, BLOCK_N, BLOCK_M], DS_LAYOUT)
    # full of K and V, full of Q and of dO, empty of both
    bars = (_barriers(2, 1), _barriers(STAGES, 1), _barriers(STAGES, 1), _barriers(STAGES, 1))
    shape = (kv_heads, num_sections, tiles_n, tiles_m, max_seqlen_q, max_seqlen_k)
    strides = (stride_dk_b, stride_dk_n, stride_dk_h, stride_dv_b, stride_dv_n, stride_dv_h)
    consumed = (
        DQ, DK, DV, cu_seqlens_q, cu_seqlens_k, work, shape, strides, group, softmax_scale, scale_log2,
        (q_s, do_s, ld_s, k_s, v_s, p_s, ds_s), bars,
    )  # fmt: skip
    produced = (
        Q, K, V, DO, LseDelta, cu_seqlens_q, cu_seqlens_k, work, shape, group, (q_s, do_s, ld_s, k_s, v_s), bars,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consume, (consumed, BLOCK_M, BLOCK_N, HEAD_DIM, STAGES, CAUSAL, PACKED)),
            (_produce, (produced, BLOCK_M, BLOCK_N, STAGES, CAUSAL, PACKED)),
        ],
        [1],
        [24],
    )
