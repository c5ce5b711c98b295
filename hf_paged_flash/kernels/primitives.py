"""Mathematics and addressing that the attention kernels share."""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
# room behind each row of the backward's lse and D, at least the tallest tile of queries
ROW_PAD: tl.constexpr = tl.constexpr(128)


@triton.jit
def attention_scores(q, k, tanh_scale, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Scores q @ k^T, or tanh(scale * q @ k^T / softcap), before the factor `scale_log2` of `online_softmax_update`.

    q (M, D), k (N, D); `tanh_scale` is 2 * scale / softcap * log2(e).
    """
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + e^2x) saturates without overflow at both ends
        two_x_log2 = s * tanh_scale
        s = 1.0 - 2.0 / (1.0 + tl.exp2(two_x_log2))
        if q.dtype == tl.float32:
            # near 0 that difference has lost fp32's last digits; x + x^3 P(x^2), fitted up to 0.55, is good to 1e-7
            x = two_x_log2 * (0.5 * LN_2)
            x2 = x * x
            series = 0.02107164636 + x2 * -0.006274195854
            series = -0.3333331645 + x2 * (0.1333258599 + x2 * (-0.05385230109 + x2 * series))
            s = tl.where(x2 < 0.3025, x + x * x2 * series, s)
    return s


@triton.jit
def visible_keys(q_pos, k_pos, seqlen_k, window_left, window_right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Mask (M, N): key inside the sequence and inside `[q_pos - window_left, q_pos + window_right]`.

    q_pos (M,) and k_pos (N,) are positions in the keys' sequence; causal is `window_right == 0`.
    """
    mask = (k_pos < seqlen_k)[None, :]
    if HAS_RIGHT:
        mask = mask & (k_pos[None, :] <= q_pos[:, None] + window_right)
    if HAS_LEFT:
        mask = mask & (k_pos[None, :] >= q_pos[:, None] - window_left)
    return mask


@triton.jit
def online_softmax_update(s, scale_log2, m_i, l_i, MASKED: tl.constexpr):
    """One step of the online softmax (Milakov & Gimelshein 2018; FlashAttention, algorithm 1), in base 2.

    s (M, N) scores, `scale_log2 * s` in units of log2 with scale_log2 > 0; m_i (M,) running maximum in units of log2,
    l_i (M,) running sum. Returns p = 2^(scale_log2 * s - m'), the factor 2^(m_i - m') by which earlier sums shrink, m'
    and l'.
    """
    # scaling the maximum rather than every score leaves one multiply-add per score
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
    if MASKED:
        # a row that has seen no key yet keeps m_i = -inf: subtract 0 instead, so that 2^-inf = 0 and never NaN
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    else:
        m_safe = m_new
    p = tl.exp2(s * scale_log2 - m_safe[:, None])
    alpha = tl.exp2(m_i - m_safe)
    return p, alpha, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def tile_blocks(
    block_table_row,
    start_n,
    offs_n,
    seqlen_k,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    first_key=0,
    CHECK_FIRST: tl.constexpr = False,
):
    """Blocks of the keys `start_n ..`: one id where a tile lies within a block, else one a key (BLOCK_N,).

    Token t of a row lies in block `block_table_row[t // PAGE_SIZE]` at offset `t % PAGE_SIZE`; tokens past `seqlen_k`
    have no block and read as 0, and so do those before `first_key` (CHECK_FIRST). Load a tile's ids one iteration
    ahead, so that its keys do not wait for them.
    """
    if PAGE_SIZE == 0:
        blocks = 0
    elif PAGE_SIZE % BLOCK_N == 0:
        blocks = tl.load(block_table_row + start_n // PAGE_SIZE, mask=start_n < seqlen_k, other=0)
    else:
        tokens = start_n + offs_n
        mask = tokens < seqlen_k
        if CHECK_FIRST:
            mask = mask & (tokens >= first_key)
        blocks = tl.load(block_table_row + tokens // PAGE_SIZE, mask=mask, other=0)
    return blocks


@triton.jit
def tile_pointers(
    base,
    blocks,
    start_n,
    offs_n,
    offs_d,
    stride_block,
    stride_n,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Pointers (BLOCK_N, D) to keys or values `start_n ..`, contiguous (PAGE_SIZE 0) or in `blocks` of `tile_blocks`.

    `start_n` is a multiple of BLOCK_N. 64-bit wherever a pool can pass 2^31 elements.
    """
    if PAGE_SIZE == 0:
        pointers = base + tl.cast(start_n, tl.int64) * stride_n + (offs_n[:, None] * stride_n + offs_d[None, :])
    elif PAGE_SIZE % BLOCK_N == 0:
        first = blocks.to(tl.int64) * stride_block + tl.cast(start_n % PAGE_SIZE, tl.int64) * stride_n
        pointers = base + first + (offs_n[:, None] * stride_n + offs_d[None, :])
    else:
        rows = blocks.to(tl.int64) * stride_block + ((start_n + offs_n) % PAGE_SIZE) * stride_n
        pointers = base + rows[:, None] + offs_d[None, :]
    return pointers


@triton.jit
def load_tile(
    pointers,
    offs_n,
    offs_d,
    limit_n,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK_N: tl.constexpr,
    first_n=0,
    CHECK_FIRST: tl.constexpr = False,
):
    """A tile (N, BLOCK_D); rows from `limit_n` on (CHECK_N) and columns from D on read as 0.

    With CHECK_N and CHECK_FIRST rows before `first_n` too.
    """
    rows = offs_n < limit_n
    if CHECK_FIRST:
        rows = rows & (offs_n >= first_n)
    if CHECK_N and D != BLOCK_D:
        tile = tl.load(pointers, mask=rows[:, None] & (offs_d < D)[None, :], other=0.0)
    elif CHECK_N:
        tile = tl.load(pointers, mask=rows[:, None], other=0.0)
    elif D != BLOCK_D:
        tile = tl.load(pointers, mask=(offs_d < D)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def padded_row(first_q, row):
    """Where packed row `row`, whose queries begin at `first_q`, begins if ROW_PAD or more elements follow each row.

    A multiple of ROW_PAD: tiles are read aligned and without masks.
    """
    return (first_q + row * (2 * ROW_PAD)) // ROW_PAD * ROW_PAD


@triton.jit
def finish_softmax(acc, m_i, l_i, sink, HAS_SINK: tl.constexpr):
    """Normalised output (M, Dv) and natural-log lse (M,); `sink` (M,), in log2 units, is part of the denominator only.

    A row that saw no key gives 0 and -inf, with a sink too.
    """
    # not m_i == -inf: a maximum passes over NaN, which must reach the output
    no_key = l_i == 0.0
    if HAS_SINK:
        m_new = tl.maximum(m_i, sink)
        shrink = tl.exp2(m_i - m_new)
        l_i = l_i * shrink + tl.exp2(sink - m_new)
        acc = acc * shrink[:, None]
        m_i = m_new
    l_safe = tl.where(no_key, 1.0, l_i)
    out = tl.where(no_key[:, None], 0.0, acc / l_safe[:, None])
    lse = tl.where(no_key, float("-inf"), (m_i + tl.log2(l_safe)) * LN_2)
    return out, lse


@triton.jit
def visible_runs(
    first_pos,
    last_pos,
    seqlen_k,
    window_left,
    window_right,
    BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """Keys that queries at positions `first_pos .. last_pos` can see: (begin, full_begin, full_end, end).

    Keys [begin, end) are visible to some of the queries, tiles in [full_begin, full_end) to all of them: only the two
    outer runs need a mask. All but `end` are multiples of BLOCK_N, or equal `end`.
    """
    begin = 0
    full_begin = 0
    if HAS_LEFT:
        begin = tl.maximum(first_pos - window_left, 0) // BLOCK_N * BLOCK_N
        full_begin = (tl.maximum(last_pos - window_left, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    end = seqlen_k
    full_end = seqlen_k // BLOCK_N * BLOCK_N
    if HAS_RIGHT:
        end = tl.minimum(seqlen_k, last_pos + window_right + 1)
        full_end = tl.minimum(full_end, tl.maximum(first_pos + window_right + 1, 0) // BLOCK_N * BLOCK_N)
    end = tl.maximum(end, 0)
    full_begin = tl.minimum(full_begin, end)
    full_end = tl.maximum(full_end, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """The kernel after this one may start, once all programs of this one have got here or ended; see launches.py."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """From here on what kernels before this one wrote can be read, and what they read can be written over."""
    if PDL:
        tl.extra.cuda.gdc_wait()
