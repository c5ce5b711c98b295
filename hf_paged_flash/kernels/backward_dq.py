"""dQ of FlashAttention: one tile of queries a program, walking over the keys that it sees."""

import triton
import triton.language as tl

from .modifiers import add_biases, dropout_factors, scores_and_slope
from .primitives import load_tile, padded_row, visible_keys, visible_runs


@triton.jit
def _add_keys(
    dq,
    q,
    do,
    lse_log2,
    delta,
    k_base,
    v_base,
    first,
    last,
    queries,
    seqlen_q,
    seqlen_k,
    window_left,
    window_right,
    scale_log2,
    softcap_log2,
    stride_k_n,
    stride_v_n,
    bias_base,
    stride_bias_m,
    stride_bias_n,
    alibi_slope,
    seed,
    dropout_threshold,
    keep_scale,
    head,
    row,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what keys `first .. last` (multiples of BLOCK_N) give to dQ (M, D) of one query tile."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    for start_n in range(first, last, BLOCK_N):
        rest = seqlen_k - start_n
        start = tl.cast(start_n, tl.int64)
        k_pointers = k_base + start * stride_k_n + (offs_n[:, None] * stride_k_n + offs_d[None, :])
        v_pointers = v_base + start * stride_v_n + (offs_n[:, None] * stride_v_n + offs_dv[None, :])
        k = load_tile(k_pointers, offs_n, offs_d, rest, HEAD_DIM, BLOCK_D, MASKED)
        v = load_tile(v_pointers, offs_n, offs_dv, rest, V_HEAD_DIM, BLOCK_DV, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s, slope = scores_and_slope(s, scale_log2, softcap_log2, HAS_SOFTCAP)
        keys = start_n + offs_n
        s = add_biases(
            s, queries[:, None], keys[None, :], seqlen_q, seqlen_k, bias_base, stride_bias_m, stride_bias_n,
            alibi_slope, BIAS, HAS_ALIBI,
        )  # fmt: skip
        p = tl.exp2(s - lse_log2[:, None])
        if MASKED:
            q_pos = queries + seqlen_k - seqlen_q
            mask = visible_keys(q_pos, keys, seqlen_k, window_left, window_right, HAS_LEFT, HAS_RIGHT)
            p = tl.where(mask, p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if HAS_DROPOUT:
            dp *= dropout_factors(seed, dropout_threshold, keep_scale, queries[:, None], keys[None, :], head, row)
        ds = p * (dp - delta[:, None]) * slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


# a length that turns into a multiple of 16 must not compile anew
@triton.jit(do_not_specialize=["max_seqlen_q", "max_seqlen_k", "window_left", "window_right"])
def dq_kernel(
    Q,
    K,
    V,
    DOut,
    LseLog2,
    Delta,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_k,
    Bias,
    alibi_slopes,
    dropout_seed,
    DQ,
    stride_q_b,
    stride_q_m,
    stride_q_h,
    stride_k_b,
    stride_k_n,
    stride_k_h,
    stride_v_b,
    stride_v_n,
    stride_v_h,
    stride_do_b,
    stride_do_m,
    stride_do_h,
    stride_dq_b,
    stride_dq_m,
    stride_dq_h,
    stride_lse_b,
    stride_lse_h,
    stride_bias_b,
    stride_bias_h,
    stride_bias_m,
    stride_bias_n,
    stride_alibi_b,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale,
    scale_log2,
    softcap_log2,
    window_left,
    window_right,
    dropout_threshold,
    keep_scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    PACKED_Q: tl.constexpr,
    PACKED_K: tl.constexpr,
    HAS_SEQUSED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dQ = scale * dS K with dS = P o (dP - D), for one tile of BLOCK_M query rows: the forward's loop once more.

    Layouts and grid as in the forward.
    """
    head = tl.program_id(0)
    row = tl.program_id(2).to(tl.int64)
    head_k = (head // GROUP).to(tl.int64)
    head = head.to(tl.int64)
    if PACKED_Q:
        first_q = tl.load(cu_seqlens_q + row).to(tl.int64)
        seqlen_q = (tl.load(cu_seqlens_q + row + 1) - first_q).to(tl.int32)
        q_row, do_row, dq_row = first_q * stride_q_m, first_q * stride_do_m, first_q * stride_dq_m
        lse_row = padded_row(first_q, row)
    else:
        seqlen_q = max_seqlen_q
        q_row, do_row, dq_row, lse_row = row * stride_q_b, row * stride_do_b, row * stride_dq_b, row * stride_lse_b
    start_m = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    if start_m >= seqlen_q:
        return
    if PACKED_K:
        first_k = tl.load(cu_seqlens_k + row).to(tl.int64)
        seqlen_k = (tl.load(cu_seqlens_k + row + 1) - first_k).to(tl.int32)
        k_row, v_row = first_k * stride_k_n, first_k * stride_v_n
    else:
        seqlen_k = max_seqlen_k
        k_row, v_row = row * stride_k_b, row * stride_v_b
    if HAS_SEQUSED:
        seqlen_k = tl.minimum(tl.maximum(tl.load(seqused_k + row), 0), seqlen_k)

    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows = offs_m.to(tl.int64)
    row_mask = offs_m < seqlen_q
    q_pointers = Q + q_row + head * stride_q_h + rows[:, None] * stride_q_m + offs_d[None, :]
    do_pointers = DOut + do_row + head * stride_do_h + rows[:, None] * stride_do_m + offs_dv[None, :]
    q = tl.load(q_pointers, mask=row_mask[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    do = tl.load(do_pointers, mask=row_mask[:, None] & (offs_dv < V_HEAD_DIM)[None, :], other=0.0)
    lse_log2 = tl.load(LseLog2 + lse_row + head * stride_lse_h + offs_m)
    delta = tl.load(Delta + lse_row + head * stride_lse_h + offs_m)

    shift = seqlen_k - seqlen_q
    last_m = tl.minimum(start_m + BLOCK_M, seqlen_q) - 1
    begin, full_begin, full_end, end = visible_runs(
        start_m + shift, last_m + shift, seqlen_k, window_left, window_right, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k_base = K + k_row + head_k * stride_k_h
    v_base = V + v_row + head_k * stride_v_h
    row32, head32 = row.to(tl.int32), head.to(tl.int32)
    bias_base = Bias + row * stride_bias_b + head * stride_bias_h if BIAS > 0 else Q
    alibi_slope = tl.load(alibi_slopes + row * stride_alibi_b + head) if HAS_ALIBI else 0.0
    seed = tl.load(dropout_seed) if HAS_DROPOUT else 0
    if HAS_LEFT:
        dq = _add_keys(
            dq, q, do, lse_log2, delta, k_base, v_base, begin, full_begin, offs_m, seqlen_q, seqlen_k, window_left,
            window_right, scale_log2, softcap_log2, stride_k_n, stride_v_n, bias_base, stride_bias_m, stride_bias_n,
            alibi_slope, seed, dropout_threshold, keep_scale, head32, row32,
            HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, True, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
            BIAS, HAS_ALIBI, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
    dq = _add_keys(
        dq, q, do, lse_log2, delta, k_base, v_base, full_begin, full_end, offs_m, seqlen_q, seqlen_k, window_left,
        window_right, scale_log2, softcap_log2, stride_k_n, stride_v_n, bias_base, stride_bias_m, stride_bias_n,
        alibi_slope, seed, dropout_threshold, keep_scale, head32, row32,
        HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, False, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
        BIAS, HAS_ALIBI, HAS_DROPOUT, PRECISION,
    )  # fmt: skip
    dq = _add_keys(
        dq, q, do, lse_log2, delta, k_base, v_base, full_end, end, offs_m, seqlen_q, seqlen_k, window_left,
        window_right, scale_log2, softcap_log2, stride_k_n, stride_v_n, bias_base, stride_bias_m, stride_bias_n,
        alibi_slope, seed, dropout_threshold, keep_scale, head32, row32,
        HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, True, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
        BIAS, HAS_ALIBI, HAS_DROPOUT, PRECISION,
    )  # fmt: skip
    dq_pointers = DQ + dq_row + head * stride_dq_h + rows[:, None] * stride_dq_m + offs_d[None, :]
    dq_mask = row_mask[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(dq_pointers, (dq * softmax_scale).to(DQ.dtype.element_ty), mask=dq_mask)
