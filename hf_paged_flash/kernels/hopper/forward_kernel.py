"""FlashAttention forward for Hopper (sm_90) in Triton's Gluon: dense and packed keys, causal and full.

One warp copies tiles of Q, K and V into shared memory with the copy engine (TMA); two or three warpgroups consume
them, each with rows of its own. As in FlashAttention-3 (Shah et al. 2024), a warpgroup issues the next S = Q K^T
before the present P V, so that its softmax runs under a product, and warpgroups may take turns at the tensor cores
(ping-pong). A block stays on its SM and draws query tiles from a counter, longest first.
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

LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _locate(tile, work, cu_seqlens_q, cu_seqlens_k, shape, ROWS: gl.constexpr, PACKED: gl.constexpr):
    """Work item `tile`: row (0 for packed), head, head_k, start_m, first_q, seqlen_q, first_k, seqlen_k."""
    heads, group, sections, tiles_m, max_seqlen_q, max_seqlen_k = shape
    section_heads = heads // sections
    head = tile % section_heads
    rest = tile // section_heads
    tile = rest % tiles_m
    rest = rest // tiles_m
    head += rest % sections * section_heads
    if PACKED:
        row = gl.load(work + 2 + 2 * tile)
        tile_m = gl.load(work + 3 + 2 * tile)
        first_q = gl.load(cu_seqlens_q + row)
        first_k = gl.load(cu_seqlens_k + row)
        seqlen_q = gl.load(cu_seqlens_q + row + 1) - first_q
        seqlen_k = gl.load(cu_seqlens_k + row + 1) - first_k
        row = 0
    else:
        tile_m = tiles_m - 1 - tile
        row = rest // sections
        first_q = 0
        first_k = 0
        seqlen_q = max_seqlen_q
        seqlen_k = max_seqlen_k
    return row, head, head // group, tile_m * ROWS, first_q, seqlen_q, first_k, seqlen_k


@gluon.jit
def _key_tiles(start_m, rows, seqlen_q, seqlen_k, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """How many tiles of keys the query rows `start_m .. start_m + rows` see, from key 0 on."""
    end = seqlen_k
    if CAUSAL:
        end = gl.minimum(end, gl.minimum(start_m + rows, seqlen_q) + seqlen_k - seqlen_q)
    return (gl.maximum(end, 0) + BLOCK_N - 1) // BLOCK_N


@gluon.jit
def _draw(work, tile_s, bars, drawn):
    """The producer draws the block's next work item and hands it to the consumers."""
    tile_full, tile_empty = bars[7:]
    slot = drawn % 2
    tile = gl.atomic_add(work, 1) + gl.num_programs(0)
    mbarrier.wait(tile_empty.index(slot), ((drawn // 2) & 1) ^ 1)
    tile_s.index(slot).store(gl.zeros([1], gl.int32, gl.BlockedLayout([1], [32], [1], [0])) + tile)
    mbarrier.arrive(tile_full.index(slot), count=1)
    return tile


@gluon.jit
def _produce(
    arguments, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Keeps STAGES tiles of K and V in flight, the last keys first; runs ahead into the block's next work item."""
    Q, K, V, cu_seqlens_q, cu_seqlens_k, work, shape, num_tiles, q_s, k_s, v_s, tile_s, bars = arguments
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars[:6]
    ROWS: gl.constexpr = CONSUMERS * BLOCK_M
    tile = gl.program_id(0)
    ring = 0  # tiles of K, and of V, so far: entry ring % STAGES
    queries = 0
    drawn = 0
    while tile < num_tiles:
        row, head, head_k, start_m, first_q, seqlen_q, first_k, seqlen_k = _locate(
            tile, work, cu_seqlens_q, cu_seqlens_k, shape, ROWS, PACKED
        )
        n = _key_tiles(start_m, ROWS, seqlen_q, seqlen_k, BLOCK_N, CAUSAL)
        if n > 0:
            for c in gl.static_range(CONSUMERS):
                mbarrier.wait(q_empty.index(c), (queries & 1) ^ 1)
                mbarrier.expect(q_full.index(c), Q.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    Q, [row, first_q + start_m + c * BLOCK_M, head, 0], q_full.index(c), q_s.index(c)
                )
            queries += 1
        for g in range(ring, ring + n):
            slot = g % STAGES
            phase = ((g // STAGES) & 1) ^ 1
            key = first_k + (n - 1 - (g - ring)) * BLOCK_N
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_full.index(slot), K.block_type.nbytes)
            tma.async_copy_global_to_shared(K, [row, key, head_k, 0], k_full.index(slot), k_s.index(slot))
            mbarrier.wait(v_empty.index(slot), phase)
            mbarrier.expect(v_full.index(slot), V.block_type.nbytes)
            tma.async_copy_global_to_shared(V, [row, key, head_k, 0], v_full.index(slot), v_s.index(slot))
        ring += n
        tile = _draw(work, tile_s, bars, drawn)
        drawn += 1


@gluon.jit
def _mask(s, limit):
    """-inf for the columns of s (M, N) from `limit` (M,) on; a column costs one comparison with a constant."""
    LAYOUT: gl.constexpr = s.type.layout
    M: gl.constexpr = s.shape[0]
    N: gl.constexpr = s.shape[1]
    # a thread holds two neighbouring columns of every eight: of (N / 8, 8) the first index is known when compiling
    x = s.reshape([M, N // 8, 8])
    EIGHTS: gl.constexpr = x.type.layout
    eights = gl.arange(0, N // 8, gl.SliceLayout(0, gl.SliceLayout(2, EIGHTS))) * 8
    within = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, EIGHTS)))
    limit = gl.convert_layout(limit, gl.SliceLayout(1, gl.SliceLayout(2, EIGHTS)))
    rest = limit.expand_dims(1).expand_dims(2) - within.expand_dims(0).expand_dims(1)
    x = gl.where(eights.expand_dims(0).expand_dims(2) < rest, x, float("-inf"))
    return gl.convert_layout(x.reshape([M, N]), LAYOUT)


@gluon.jit
def _softmax_update(s, m_i, l_i, scale_log2, limit, MASKED: gl.constexpr):
    """`primitives.online_softmax_update` of s (M, N) with the columns from `limit` on hidden: (p, alpha, m, l).

    l_i (M, 8) holds sums of every eighth column: their sum over the threads of a row waits until the end.
    """
    N: gl.constexpr = s.shape[1]
    if MASKED:
        s = _mask(s, limit)
    m_new = gl.maximum(m_i, gl.max(s, 1) * scale_log2)
    m_safe = m_new
    if MASKED:
        m_safe = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(s * scale_log2 - m_safe[:, None])
    alpha = gl.exp2(m_i - m_safe)
    sums = gl.convert_layout(gl.sum(p.reshape([p.shape[0], N // 8, 8]), 1), l_i.type.layout)
    l_new = l_i * gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout))[:, None] + sums
    return p, alpha, m_new, l_new


@gluon.jit
def _pack(p, DTYPE: gl.constexpr):
    """p (M, N) fp32 as pairs of DTYPE (M, N / 2) int32.

    A loop that carries 16-bit values splits and joins every register anew. Not pure: called behind the wait for P V,
    it must stay there, where the registers of the last P are free.
    """
    low, high = gl.split(p.reshape([p.shape[0], p.shape[1] // 2, 2]))
    if DTYPE == gl.bfloat16:
        pairs = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=gl.int32, is_pure=False, pack=1
        )
    else:
        pairs = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=gl.int32, is_pure=False, pack=1
        )
    return pairs


@gluon.jit
def _unpack(pairs, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """P (M, N) as the left operand of P V; no instruction of its own."""
    low = pairs.to(gl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    p = gl.join(low, high).reshape([pairs.shape[0], pairs.shape[1] * 2])
    return gl.convert_layout(p, LAYOUT)


@gluon.jit
def _zero_tail(v, rest, BLOCK_N: gl.constexpr, D: gl.constexpr):
    """Values (BLOCK_N, D) in shared memory from row `rest` on become 0: 0 * NaN is NaN.

    Packed, they belong to the next row, or were never written. Each consumer does it; all write the same.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    row = gl.arange(0, 32, gl.SliceLayout(1, LAYOUT))
    for i in gl.static_range(BLOCK_N // 32):
        if rest < (i + 1) * 32:
            part = v.slice(i * 32, 32, 0)
            x = part.load(LAYOUT)
            part.store(gl.where((row < rest - i * 32)[:, None], x, 0.0).to(x.dtype))
    fence_async_shared()


@gluon.jit
def _step(
    q, k_s, v_s, bars, acc, pairs, m_i, l_i, g, scale_log2, limit, c: gl.constexpr, MASKED: gl.constexpr,
    BLOCK_N: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PING_PONG: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """S of ring entry g, then P V of entry g - 1 under which the softmax of S runs."""
    k_full, k_empty, v_full, v_empty, turn = bars[2:7]
    BLOCK_M: gl.constexpr = q.shape[0]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = acc.type.layout
    slot = g % STAGES
    last = (g - 1) % STAGES
    p = _unpack(pairs, DTYPE, gl.DotOperandLayout(0, O_LAYOUT, 2))
    mbarrier.wait(k_full.index(slot), (g // STAGES) & 1)
    if PING_PONG:
        mbarrier.wait(turn.index(c), g & 1)
    k = k_s.index(slot).reshape([BLOCK_N, D]).permute((1, 0))
    s = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, S_LAYOUT)
    s = warpgroup_mma(q, k, s, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(last), ((g - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, v_s.index(last).reshape([BLOCK_N, D]), acc, is_async=True)
    if PING_PONG:
        mbarrier.arrive(turn.index((c + 1) % CONSUMERS), count=1)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    p_new, alpha, m_i, l_i = _softmax_update(s, m_i, l_i, scale_log2, limit, MASKED)
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    mbarrier.arrive(v_empty.index(last), count=1)
    pairs = _pack(p_new, DTYPE)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
    return acc, pairs, m_i, l_i


@gluon.jit
def _attend(
    q, k_s, v_s, bars, m_i, l_i, ring, n, limit, seqlen_k, full, scale_log2, c: gl.constexpr,
    BLOCK_N: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr,
    OWN_OUTPUT: gl.constexpr, PING_PONG: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """One consumer's rows over key tiles n - 1 .. 0, ring entries `ring ..`: unnormalised O, m and l.

    Rows see the keys before `limit` (M,); all of them see the tiles before `full`.
    """
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = bars[:7]
    BLOCK_M: gl.constexpr = q.shape[0]
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    slot = ring % STAGES
    mbarrier.wait(k_full.index(slot), (ring // STAGES) & 1)
    if PING_PONG:
        mbarrier.wait(turn.index(c), ring & 1)
    k = k_s.index(slot).reshape([BLOCK_N, D]).permute((1, 0))
    s = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, S_LAYOUT)
    s = warpgroup_mma(q, k, s, use_acc=False, is_async=True)
    if PING_PONG:
        mbarrier.arrive(turn.index((c + 1) % CONSUMERS), count=1)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    p, _, m_i, l_i = _softmax_update(s, m_i, l_i, scale_log2, limit - (n - 1) * BLOCK_N, True)
    pairs = _pack(p, DTYPE)
    if PACKED:
        rest = seqlen_k - (n - 1) * BLOCK_N
        if rest < BLOCK_N:
            mbarrier.wait(v_full.index(slot), (ring // STAGES) & 1)
            _zero_tail(v_s.index(slot).reshape([BLOCK_N, D]), rest, BLOCK_N, D)
    acc = gl.zeros([BLOCK_M, D], gl.float32, O_LAYOUT)
    masked = gl.minimum(gl.maximum(n - full, 1), n)
    for j in range(1, masked):
        acc, pairs, m_i, l_i = _step(
            q, k_s, v_s, bars, acc, pairs, m_i, l_i, ring + j, scale_log2, limit - (n - 1 - j) * BLOCK_N, c, True,
            BLOCK_N, D, CONSUMERS, STAGES, PING_PONG, DTYPE,
        )  # fmt: skip
    for j in range(masked, n):
        acc, pairs, m_i, l_i = _step(
            q, k_s, v_s, bars, acc, pairs, m_i, l_i, ring + j, scale_log2, limit, c, False, BLOCK_N, D, CONSUMERS,
            STAGES, PING_PONG, DTYPE,
        )  # fmt: skip
    if OWN_OUTPUT:
        mbarrier.arrive(q_empty.index(c), count=1)
    last = ring + n - 1
    slot = last % STAGES
    mbarrier.wait(v_full.index(slot), (last // STAGES) & 1)
    p = _unpack(pairs, DTYPE, gl.DotOperandLayout(0, O_LAYOUT, 2))
    acc = warpgroup_mma(p, v_s.index(slot).reshape([BLOCK_N, D]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_empty.index(slot), count=1)
    return acc, m_i, l_i


@gluon.jit
def _consume(
    c: gl.constexpr, arguments, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, PACKED: gl.constexpr,
    OWN_OUTPUT: gl.constexpr, PING_PONG: gl.constexpr,
):  # fmt: skip
    """Consumer c: rows c * BLOCK_M .. (c + 1) * BLOCK_M of every work item of the block."""
    Out, Lse, cu_seqlens_q, cu_seqlens_k, work, shape, strides, num_tiles, scale_log2 = arguments[:9]
    q_s, k_s, v_s, o_s, tile_s, bars = arguments[9:]
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn, tile_full, tile_empty = bars
    stride_o_b, stride_o_m, stride_o_h, stride_lse_b, stride_lse_h = strides
    DTYPE: gl.constexpr = Out.dtype.element_ty
    ROWS: gl.constexpr = CONSUMERS * BLOCK_M
    S_ROWS: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16]))
    O_ROWS: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16]))
    WRITE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    q = q_s.index(c).reshape([BLOCK_M, D])
    o = o_s.index(c).reshape([BLOCK_M, D])
    tile = gl.program_id(0)
    ring = 0
    queries = 0
    drawn = 0
    while tile < num_tiles:
        row, head, head_k, start_m, first_q, seqlen_q, first_k, seqlen_k = _locate(
            tile, work, cu_seqlens_q, cu_seqlens_k, shape, ROWS, PACKED
        )
        first_m = start_m + c * BLOCK_M
        rows = first_m + gl.arange(0, BLOCK_M, S_ROWS)
        m_i = gl.full([BLOCK_M], float("-inf"), gl.float32, S_ROWS)
        l_i = gl.zeros([BLOCK_M, 8], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16]))
        out = gl.zeros([BLOCK_M, D], DTYPE, WRITE)
        n = _key_tiles(start_m, ROWS, seqlen_q, seqlen_k, BLOCK_N, CAUSAL)
        own = 0
        if first_m < seqlen_q:
            own = _key_tiles(first_m, BLOCK_M, seqlen_q, seqlen_k, BLOCK_N, CAUSAL)
        if n > 0:
            mbarrier.wait(q_full.index(c), queries & 1)
            queries += 1
            # tiles that only later rows see: hand them back, and the turn on
            for g in range(ring, ring + n - own):
                slot = g % STAGES
                mbarrier.wait(k_full.index(slot), (g // STAGES) & 1)
                if PING_PONG:
                    mbarrier.wait(turn.index(c), g & 1)
                    mbarrier.arrive(turn.index((c + 1) % CONSUMERS), count=1)
                mbarrier.arrive(k_empty.index(slot), count=1)
                mbarrier.wait(v_full.index(slot), (g // STAGES) & 1)
                mbarrier.arrive(v_empty.index(slot), count=1)
            if own == 0:
                mbarrier.arrive(q_empty.index(c), count=1)
            else:
                limit = gl.full([BLOCK_M], 0, gl.int32, S_ROWS) + seqlen_k
                full = seqlen_k // BLOCK_N
                if CAUSAL:
                    limit = gl.minimum(limit, rows + (seqlen_k - seqlen_q + 1))
                    full = gl.minimum(full, gl.maximum(first_m + seqlen_k - seqlen_q + 1, 0) // BLOCK_N)
                acc, m_i, l_i = _attend(
                    q, k_s, v_s, bars, m_i, l_i, ring + n - own, own, limit, seqlen_k, full, scale_log2, c, BLOCK_N,
                    D, CONSUMERS, STAGES, PACKED, OWN_OUTPUT, PING_PONG, DTYPE,
                )  # fmt: skip
                shrink = 1.0 / gl.convert_layout(gl.sum(l_i, 1), O_ROWS)
                shrink = gl.where(gl.convert_layout(m_i, O_ROWS) == float("-inf"), 0.0, shrink)
                o.store((acc * shrink[:, None]).to(DTYPE))
                out = o.load(WRITE)
                if not OWN_OUTPUT:
                    # the copy engine will write Q where these threads wrote O
                    fence_async_shared()
                    mbarrier.arrive(q_empty.index(c), count=1)
            ring += n
        no_key = m_i == float("-inf")
        l_safe = gl.where(no_key, 1.0, gl.convert_layout(gl.sum(l_i, 1), S_ROWS))
        lse = gl.where(no_key, float("-inf"), (m_i + gl.log2(l_safe)) * LN_2)
        lse_row = Lse + (row.to(gl.int64) * stride_lse_b + head.to(gl.int64) * stride_lse_h + first_q)
        gl.store(lse_row + rows, lse, mask=rows < seqlen_q)
        offs_m = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, WRITE))
        offs_d = gl.arange(0, D, gl.SliceLayout(0, WRITE))
        o_row = Out + row.to(gl.int64) * stride_o_b + head.to(gl.int64) * stride_o_h
        o_pointers = o_row + (first_q + offs_m).to(gl.int64)[:, None] * stride_o_m + offs_d[None, :]
        gl.store(o_pointers, out, mask=(offs_m < seqlen_q)[:, None])

        slot = drawn % 2
        mbarrier.wait(tile_full.index(slot), (drawn // 2) & 1)
        tile = gl.max(tile_s.index(slot).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
        mbarrier.arrive(tile_empty.index(slot), count=1)
        drawn += 1


@gluon.jit
def _consume_0(
    arguments, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, PACKED: gl.constexpr, OWN_OUTPUT: gl.constexpr,
    PING_PONG: gl.constexpr,
):  # fmt: skip
    _consume(0, arguments, BLOCK_M, BLOCK_N, D, CONSUMERS, STAGES, CAUSAL, PACKED, OWN_OUTPUT, PING_PONG)


@gluon.jit
def _consume_1(
    arguments, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, PACKED: gl.constexpr, OWN_OUTPUT: gl.constexpr,
    PING_PONG: gl.constexpr,
):  # fmt: skip
    _consume(1, arguments, BLOCK_M, BLOCK_N, D, CONSUMERS, STAGES, CAUSAL, PACKED, OWN_OUTPUT, PING_PONG)


@gluon.jit
def _consume_2(
    arguments, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, PACKED: gl.constexpr, OWN_OUTPUT: gl.constexpr,
    PING_PONG: gl.constexpr,
):  # fmt: skip
    _consume(2, arguments, BLOCK_M, BLOCK_N, D, CONSUMERS, STAGES, CAUSAL, PACKED, OWN_OUTPUT, PING_PONG)


@gluon.jit
def _barriers(N: gl.constexpr, COUNT: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


# lengths and heads must not compile anew when they turn into multiples of 16
@gluon.jit(
    do_not_specialize=[
        "stride_lse_b", "stride_lse_h", "num_heads", "group", "num_sections", "tiles_m", "num_tiles", "max_seqlen_q",
        "max_seqlen_k",
    ]
)  # fmt: skip
def flash_forward_hopper_kernel(
    Q,
    K,
    V,
    cu_seqlens_q,
    cu_seqlens_k,
    work,
    Out,
    Lse,
    stride_o_b,
    stride_o_m,
    stride_o_h,
    stride_lse_b,
    stride_lse_h,
    num_heads,
    group,
    num_sections,
    tiles_m,
    num_tiles,
    max_seqlen_q,
    max_seqlen_k,
    scale_log2,
    HEAD_DIM: gl.constexpr,
    CAUSAL: gl.constexpr,
    PACKED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    CONSUMERS: gl.constexpr,
    STAGES: gl.constexpr,
    OWN_OUTPUT: gl.constexpr,
    PING_PONG: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """O = softmax(scale * Q K^T) V and lse = m + ln l, as `kernels.flash_forward` defines them.

    Q, K, V are TMA descriptors of (B, S, H, D) with blocks of one head's rows, packed rows as B = 1; Out (B, Sq, Hq,
    D) or (Tq, Hq, D); Lse fp32 (B, Hq, Sq) or (Hq, Tq). work int32: the counter, for packed rows `plan_packed`'s list.
    A work item is CONSUMERS * BLOCK_M rows of one head; the heads of a section follow each other and share K/V in L2.
    """
    DTYPE: gl.constexpr = Q.dtype
    q_s = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 1, BLOCK_M, 1, HEAD_DIM], Q.layout)
    k_s = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BLOCK_N, 1, HEAD_DIM], K.layout)
    v_s = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BLOCK_N, 1, HEAD_DIM], V.layout)
    o_s = q_s
    if OWN_OUTPUT:
        o_s = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 1, BLOCK_M, 1, HEAD_DIM], Q.layout)
    tile_s = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # full and empty of Q, K and V, whose turn it is, full and empty of tile_s
    bars = (
        _barriers(CONSUMERS, 1), _barriers(CONSUMERS, 1), _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS),
        _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS), _barriers(CONSUMERS, 1), _barriers(2, 1),
        _barriers(2, CONSUMERS),
    )  # fmt: skip
    if PING_PONG:
        mbarrier.arrive(bars[6].index(0), count=1)
    if PACKED:
        tiles_m = gl.load(work + 1)
        num_tiles = tiles_m * num_heads
    shape = (num_heads, group, num_sections, tiles_m, max_seqlen_q, max_seqlen_k)
    strides = (stride_o_b, stride_o_m, stride_o_h, stride_lse_b, stride_lse_h)
    produced = (Q, K, V, cu_seqlens_q, cu_seqlens_k, work, shape, num_tiles, q_s, k_s, v_s, tile_s, bars)
    consumed = (
        Out, Lse, cu_seqlens_q, cu_seqlens_k, work, shape, strides, num_tiles, scale_log2, q_s, k_s, v_s, o_s, tile_s,
        bars,
    )  # fmt: skip
    # constants keep their values only in the call itself: a tuple with a name would hold tensors
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume_0, (consumed, BLOCK_M, BLOCK_N, HEAD_DIM, CONSUMERS, STAGES, CAUSAL, PACKED, OWN_OUTPUT,
                              PING_PONG)),
                (_consume_1, (consumed, BLOCK_M, BLOCK_N, HEAD_DIM, CONSUMERS, STAGES, CAUSAL, PACKED, OWN_OUTPUT,
                              PING_PONG)),
                (_produce, (produced, BLOCK_M, BLOCK_N, CONSUMERS, STAGES, CAUSAL, PACKED)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume_0, (consumed, BLOCK_M, BLOCK_N, HEAD_DIM, CONSUMERS, STAGES, CAUSAL, PACKED, OWN_OUTPUT,
                              PING_PONG)),
                (_consume_1, (consumed, BLOCK_M, BLOCK_N, HEAD_DIM, CONSUMERS, STAGES, CAUSAL, PACKED, OWN_OUTPUT,
                              PING_PONG)),
                (_consume_2, (consumed, BLOCK_M, BLOCK_N, HEAD_DIM, CONSUMERS, STAGES, CAUSAL, PACKED, OWN_OUTPUT,
                              PING_PONG)),
                (_produce, (produced, BLOCK_M, BLOCK_N, CONSUMERS, STAGES, CAUSAL, PACKED)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )  # fmt: skip
