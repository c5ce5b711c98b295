"""FlashAttention backward for dense and packed (varlen) keys: two kernels without atomics, P recomputed from lse."""

import torch
import triton
import triton.language as tl

from . import backward_configs, configs
from .bias_gradient import bias_gradient
from .flash_forward import dot_precision, last_dim_contiguous
from .modifiers import add_biases, dropout_factors, modifier_arguments, scores_and_slope
from .primitives import LOG2_E, load_tile, visible_keys, visible_runs


@triton.jit
def _delta_kernel(
    Out,
    DOut,
    DLse,
    Lse,
    cu_seqlens_q,
    Delta,
    LseLog2,
    stride_o_b,
    stride_o_m,
    stride_o_h,
    stride_do_b,
    stride_do_m,
    stride_do_h,
    stride_lse_b,
    stride_lse_h,
    max_seqlen_q,
    V_HEAD_DIM: tl.constexpr,
    PACKED_Q: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """D = rowsum(dO o O) - dlse (FlashAttention-2, algorithm 2), and lse in log2 units, +inf for rows without keys.

    Out, DOut (B, Sq, Hq, Dv) or packed; Lse, DLse, Delta, LseLog2 fp32 (B, Hq, Sq) or (Hq, Tq). Grid (tiles, Hq, B).
    """
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    if PACKED_Q:
        first = tl.load(cu_seqlens_q + row).to(tl.int64)
        seqlen_q = (tl.load(cu_seqlens_q + row + 1) - first).to(tl.int32)
        o_row, do_row, lse_row = first * stride_o_m, first * stride_do_m, first
    else:
        seqlen_q = max_seqlen_q
        o_row, do_row, lse_row = row * stride_o_b, row * stride_do_b, row * stride_lse_b
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows = offs_m.to(tl.int64)
    mask = (offs_m < seqlen_q)[:, None] & (offs_dv < V_HEAD_DIM)[None, :]
    o_pointers = Out + o_row + head * stride_o_h + rows[:, None] * stride_o_m + offs_dv[None, :]
    do_pointers = DOut + do_row + head * stride_do_h + rows[:, None] * stride_do_m + offs_dv[None, :]
    o = tl.load(o_pointers, mask=mask, other=0.0).to(tl.float32)
    do = tl.load(do_pointers, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(o * do, 1)
    lse_offsets = lse_row + head * stride_lse_h + offs_m
    in_row = offs_m < seqlen_q
    lse = tl.load(Lse + lse_offsets, mask=in_row, other=0.0)
    no_key = lse == float("-inf")
    if HAS_DLSE:
        delta -= tl.where(no_key, 0.0, tl.load(DLse + lse_offsets, mask=in_row, other=0.0))
    tl.store(Delta + lse_offsets, delta, mask=in_row)
    tl.store(LseLog2 + lse_offsets, tl.where(no_key, float("inf"), lse * LOG2_E), mask=in_row)


@triton.jit
def _add_queries(
    dk,
    dv,
    k,
    v,
    q_base,
    do_base,
    lse_base,
    delta_base,
    first,
    last,
    k_pos,
    seqlen_q,
    seqlen_k,
    window_left,
    window_right,
    scale_log2,
    softcap_log2,
    stride_q_m,
    stride_do_m,
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
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what queries `first .. last` (multiples of BLOCK_M) give to dK (N, D) and dV (N, Dv) of one key tile."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    for start_m in range(first, last, BLOCK_M):
        rest = seqlen_q - start_m
        start = tl.cast(start_m, tl.int64)
        q_pointers = q_base + start * stride_q_m + (offs_m[:, None] * stride_q_m + offs_d[None, :])
        q = load_tile(q_pointers, offs_m, offs_d, rest, HEAD_DIM, BLOCK_D, MASKED)
        # rows past the end read lse = +inf, so their P is 0
        lse_log2 = tl.load(lse_base + start_m + offs_m, mask=offs_m < rest, other=float("inf"))
        # S^T = K Q^T: P^T and dS^T come out as the left operands that dV and dK need
        s_t = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        s_t, slope = scores_and_slope(s_t, scale_log2, softcap_log2, HAS_SOFTCAP)
        queries = (start_m + offs_m)[None, :]
        s_t = add_biases(
            s_t, queries, k_pos[:, None], seqlen_q, seqlen_k, bias_base, stride_bias_m, stride_bias_n, alibi_slope,
            BIAS, HAS_ALIBI,
        )  # fmt: skip
        p_t = tl.exp2(s_t - lse_log2[None, :])
        if MASKED:
            # keys past the row's end touch their own dK and dV alone, which the kernel clears
            reach = k_pos[:, None] - (queries + (seqlen_k - seqlen_q))
            if HAS_RIGHT:
                p_t = tl.where(reach <= window_right, p_t, 0.0)
            if HAS_LEFT:
                p_t = tl.where(reach >= -window_left, p_t, 0.0)
        do_pointers = do_base + start * stride_do_m + (offs_m[:, None] * stride_do_m + offs_dv[None, :])
        do = load_tile(do_pointers, offs_m, offs_dv, rest, V_HEAD_DIM, BLOCK_DV, MASKED)
        kept = 1.0
        if HAS_DROPOUT:
            kept = dropout_factors(seed, dropout_threshold, keep_scale, queries, k_pos[:, None], head, row)
        dv = tl.dot((p_t * kept).to(do.dtype), do, dv, input_precision=PRECISION)
        dp_t = tl.dot(v, tl.trans(do), input_precision=PRECISION) * kept
        delta = tl.load(delta_base + start_m + offs_m, mask=offs_m < rest, other=0.0)
        ds_t = p_t * (dp_t - delta[None, :]) * slope
        dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _dkv_kernel(
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
    DK,
    DV,
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
    stride_dk_b,
    stride_dk_n,
    stride_dk_h,
    stride_dv_b,
    stride_dv_n,
    stride_dv_h,
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
    """dV = P^T dO and dK = scale * dS^T Q with dS = P o (dP - D), for one tile of BLOCK_N keys of one KV head.

    FlashAttention-2, algorithm 2. The GROUP query heads of the KV head are summed in the loop: no expanded copies, no
    atomics, the same order every time. Grid (tiles of max_seqlen_k, Hkv, B). Layouts as in the forward.
    """
    head_k = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    if PACKED_Q:
        first_q = tl.load(cu_seqlens_q + row).to(tl.int64)
        seqlen_q = (tl.load(cu_seqlens_q + row + 1) - first_q).to(tl.int32)
        q_row, do_row, lse_row = first_q * stride_q_m, first_q * stride_do_m, first_q
    else:
        seqlen_q = max_seqlen_q
        q_row, do_row, lse_row = row * stride_q_b, row * stride_do_b, row * stride_lse_b
    if PACKED_K:
        first_k = tl.load(cu_seqlens_k + row).to(tl.int64)
        stored_k = (tl.load(cu_seqlens_k + row + 1) - first_k).to(tl.int32)
        k_row, v_row = first_k * stride_k_n, first_k * stride_v_n
        dk_row, dv_row = first_k * stride_dk_n, first_k * stride_dv_n
    else:
        stored_k = max_seqlen_k
        k_row, v_row, dk_row, dv_row = row * stride_k_b, row * stride_v_b, row * stride_dk_b, row * stride_dv_b
    seqlen_k = stored_k
    if HAS_SEQUSED:
        seqlen_k = tl.maximum(tl.load(seqused_k + row), 0)
    start_n = tl.program_id(0) * BLOCK_N
    if start_n >= stored_k:
        return

    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    keys = (start_n + offs_n).to(tl.int64)
    k_pointers = K + k_row + head_k * stride_k_h + keys[:, None] * stride_k_n + offs_d[None, :]
    v_pointers = V + v_row + head_k * stride_v_h + keys[:, None] * stride_v_n + offs_dv[None, :]
    k = load_tile(k_pointers, offs_n, offs_d, seqlen_k - start_n, HEAD_DIM, BLOCK_D, True)
    v = load_tile(v_pointers, offs_n, offs_dv, seqlen_k - start_n, V_HEAD_DIM, BLOCK_DV, True)

    # queries [begin, end) can see a key of this tile, tiles in [full_begin, full_end) see all of them
    shift = seqlen_k - seqlen_q
    last_n = tl.minimum(start_n + BLOCK_N, seqlen_k) - 1
    begin = 0
    full_begin = 0
    if HAS_RIGHT:
        begin = tl.maximum(start_n - shift - window_right, 0) // BLOCK_M * BLOCK_M
        full_begin = (tl.maximum(last_n - shift - window_right, 0) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    end = seqlen_q
    full_end = seqlen_q // BLOCK_M * BLOCK_M
    if HAS_LEFT:
        end = tl.minimum(seqlen_q, last_n - shift + window_left + 1)
        full_end = tl.minimum(full_end, tl.maximum(start_n - shift + window_left + 1, 0) // BLOCK_M * BLOCK_M)
    if start_n >= seqlen_k:
        end = 0
    end = tl.maximum(end, 0)
    full_begin = tl.minimum(full_begin, end)
    full_end = tl.minimum(tl.maximum(full_end, full_begin), end)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    k_pos = start_n + offs_n
    row32 = row.to(tl.int32)
    seed = tl.load(dropout_seed) if HAS_DROPOUT else 0
    for group in range(GROUP):
        head = head_k * GROUP + group
        head32 = head.to(tl.int32)
        bias_base = Bias + row * stride_bias_b + head * stride_bias_h if BIAS > 0 else Q
        alibi_slope = tl.load(alibi_slopes + row * stride_alibi_b + head) if HAS_ALIBI else 0.0
        q_base = Q + q_row + head * stride_q_h
        do_base = DOut + do_row + head * stride_do_h
        lse_base = LseLog2 + lse_row + head * stride_lse_h
        delta_base = Delta + lse_row + head * stride_lse_h
        if HAS_RIGHT:
            dk, dv = _add_queries(
                dk, dv, k, v, q_base, do_base, lse_base, delta_base, begin, full_begin, k_pos, seqlen_q, seqlen_k,
                window_left, window_right, scale_log2, softcap_log2, stride_q_m, stride_do_m, bias_base, stride_bias_m,
                stride_bias_n, alibi_slope, seed, dropout_threshold, keep_scale, head32, row32,
 HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, True, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
 BIAS, HAS_ALIBI, HAS_DROPOUT, PRECISION,
            )  # fmt: skip
        dk, dv = _add_queries(
            dk, dv, k, v, q_base, do_base, lse_base, delta_base, full_begin, full_end, k_pos, seqlen_q, seqlen_k,
            window_left, window_right, scale_log2, softcap_log2, stride_q_m, stride_do_m, bias_base, stride_bias_m,
            stride_bias_n, alibi_slope, seed, dropout_threshold, keep_scale, head32, row32,
 HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, False, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
 BIAS, HAS_ALIBI, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
        dk, dv = _add_queries(
            dk, dv, k, v, q_base, do_base, lse_base, delta_base, full_end, end, k_pos, seqlen_q, seqlen_k,
            window_left, window_right, scale_log2, softcap_log2, stride_q_m, stride_do_m, bias_base, stride_bias_m,
            stride_bias_n, alibi_slope, seed, dropout_threshold, keep_scale, head32, row32,
 HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, True, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
 BIAS, HAS_ALIBI, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
    # keys behind `seqused_k` are stored but unseen: their gradients are 0
    used = (start_n + offs_n < seqlen_k)[:, None]
    dk = tl.where(used, dk * softmax_scale, 0.0)
    dv = tl.where(used, dv, 0.0)
    in_row = (start_n + offs_n < stored_k)[:, None]
    dk_pointers = DK + dk_row + head_k * stride_dk_h + keys[:, None] * stride_dk_n + offs_d[None, :]
    dv_pointers = DV + dv_row + head_k * stride_dv_h + keys[:, None] * stride_dv_n + offs_dv[None, :]
    tl.store(dk_pointers, dk.to(DK.dtype.element_ty), mask=in_row & (offs_d < HEAD_DIM)[None, :])
    tl.store(dv_pointers, dv.to(DV.dtype.element_ty), mask=in_row & (offs_dv < V_HEAD_DIM)[None, :])


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


@triton.jit
def _dq_kernel(
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
        q_row, do_row, dq_row, lse_row = first_q * stride_q_m, first_q * stride_do_m, first_q * stride_dq_m, first_q
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
        seqlen_k = tl.maximum(tl.load(seqused_k + row), 0)

    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows = offs_m.to(tl.int64)
    row_mask = offs_m < seqlen_q
    q_pointers = Q + q_row + head * stride_q_h + rows[:, None] * stride_q_m + offs_d[None, :]
    do_pointers = DOut + do_row + head * stride_do_h + rows[:, None] * stride_do_m + offs_dv[None, :]
    q = tl.load(q_pointers, mask=row_mask[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    do = tl.load(do_pointers, mask=row_mask[:, None] & (offs_dv < V_HEAD_DIM)[None, :], other=0.0)
    lse_log2 = tl.load(LseLog2 + lse_row + head * stride_lse_h + offs_m, mask=row_mask, other=float("inf"))
    delta = tl.load(Delta + lse_row + head * stride_lse_h + offs_m, mask=row_mask, other=0.0)

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


def flash_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    s_aux: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    bias_needs_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Launches the three kernels; arguments and results as in `hf_paged_flash.ops.reference.flash_backward`."""
    packed = cu_seqlens_q is not None
    packed_k = k.dim() == 3
    num_heads, head_dim = q.shape[-2:]
    num_kv_heads, v_head_dim = v.shape[-2:]
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_dv = max(16, triton.next_power_of_2(v_head_dim))
    device = configs.device_of(q)
    dtype, compute_dtype = q.dtype, backward_configs.compute_dtype(block_d, block_dv, q.dtype, device)
    dout, q, k, v, out = (last_dim_contiguous(x.to(compute_dtype)) for x in (dout, q, k, v, out))
    batch = cu_seqlens_q.numel() - 1 if packed else q.shape[0]
    max_seqlen_q = max_seqlen_q if packed else q.shape[1]
    max_seqlen_k = max_seqlen_k if packed_k else k.shape[1]
    # packed tensors may hold tokens outside every row: their gradients are 0
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for x in [dq] * packed + [dk, dv] * packed_k:
        x.zero_()
    delta, lse_log2 = torch.zeros_like(lse), torch.full_like(lse, float("inf"))
    if causal:
        window_right = 0
    scale_log2, softcap_log2 = softmax_scale * LOG2_E.value, 0.0
    if softcap > 0:
        scale_log2, softcap_log2 = 2.0 * scale_log2 / softcap, softcap * LOG2_E.value
    lse_strides = {"stride_lse_b": 0 if packed else lse.stride(0), "stride_lse_h": lse.stride(-2)}

    def strides(name: str, x: torch.Tensor, sequence: str) -> dict[str, int]:
        return {
            f"stride_{name}_b": 0 if x.dim() == 3 else x.stride(0),
            f"stride_{name}_{sequence}": x.stride(-3),
            f"stride_{name}_h": x.stride(-2),
        }

    shared = dict(
        Q=q, K=k, V=v, DOut=dout, LseLog2=lse_log2, Delta=delta,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k,
        **strides("q", q, "m"), **strides("k", k, "n"), **strides("v", v, "n"), **strides("do", dout, "m"),
        **lse_strides,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, softmax_scale=softmax_scale,
        scale_log2=scale_log2, softcap_log2=softcap_log2, window_left=window_left, window_right=window_right,
        GROUP=num_heads // num_kv_heads, HEAD_DIM=head_dim, V_HEAD_DIM=v_head_dim, PACKED_Q=packed, PACKED_K=packed_k,
        HAS_SEQUSED=seqused_k is not None, HAS_LEFT=window_left >= 0, HAS_RIGHT=window_right >= 0,
        HAS_SOFTCAP=softcap > 0, PRECISION=dot_precision(q.dtype), BLOCK_D=block_d, BLOCK_DV=block_dv,
        **modifier_arguments(bias, alibi_slopes, dropout_p, dropout_seed),
    )  # fmt: skip
    with torch.cuda.device_of(q):
        if out.numel():
            _delta_kernel[(triton.cdiv(max_seqlen_q, 64), num_heads, batch)](
                Out=out, DOut=dout, DLse=dlse, Lse=lse, cu_seqlens_q=cu_seqlens_q, Delta=delta, LseLog2=lse_log2,
                **strides("o", out, "m"), **strides("do", dout, "m"), **lse_strides, max_seqlen_q=max_seqlen_q,
                V_HEAD_DIM=v_head_dim, PACKED_Q=packed, HAS_DLSE=dlse is not None, BLOCK_DV=block_dv, BLOCK_M=64,
            )  # fmt: skip
            tile = backward_configs.dq_tile(block_d, block_dv, q.dtype, device)
            _dq_kernel[(num_heads, triton.cdiv(max_seqlen_q, tile.block_m), batch)](
                **shared, DQ=dq, **strides("dq", dq, "m"), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
        if dk.numel():
            modified = bias is not None or alibi_slopes is not None or dropout_p > 0.0
            tile = backward_configs.dkv_tile(block_d, block_dv, q.dtype, device, modified)
            _dkv_kernel[(triton.cdiv(max_seqlen_k, tile.block_n), num_kv_heads, batch)](
                **shared, DK=dk, DV=dv, **strides("dk", dk, "n"), **strides("dv", dv, "n"),
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
        dbias = bias_gradient(bias, batch, shared) if bias_needs_grad else None
    dq, dk, dv = (x.to(dtype) for x in (dq, dk, dv))
    return dq, dk, dv, None if s_aux is None else _sink_gradient(s_aux, delta, lse_log2), dbias


def _sink_gradient(s_aux: torch.Tensor, delta: torch.Tensor, lse_log2: torch.Tensor) -> torch.Tensor:
    """dsink = -sum over rows of exp(sink - lse) * D, per head; rows without keys, whose lse is +inf here, give 0."""
    weight = torch.exp2(s_aux.float()[:, None] * LOG2_E.value - lse_log2)
    summed = -(weight * delta).sum(-1)
    return (summed if summed.dim() == 1 else summed.sum(0)).to(s_aux.dtype)
