"""dK and dV of FlashAttention: one tile of keys a program, walking over the queries that see it."""

import triton
import triton.language as tl

from .modifiers import add_biases, dropout_factors, scores_and_slope
from .primitives import load_tile, padded_row


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
    start_m,
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
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WITH_DK: tl.constexpr,
    WITH_DV: tl.constexpr,
):
    """Adds what queries `start_m ..` of one head give to dK (N, D) and dV (N, Dv) of one key tile."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    rest = seqlen_q - start_m
    start = tl.cast(start_m, tl.int64)
    q_pointers = q_base + start * stride_q_m + (offs_m[:, None] * stride_q_m + offs_d[None, :])
    q = load_tile(q_pointers, offs_m, offs_d, rest, HEAD_DIM, BLOCK_D, True)
    # behind a row's end lse is +inf, so P is 0 there
    lse_log2 = tl.load(lse_base + start_m + offs_m)
    # S^T = K Q^T: P^T and dS^T come out as the left operands that dV and dK need
    s_t = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    s_t, slope = scores_and_slope(s_t, scale_log2, softcap_log2, HAS_SOFTCAP)
    queries = (start_m + offs_m)[None, :]
    s_t = add_biases(
        s_t, queries, k_pos[:, None], seqlen_q, seqlen_k, bias_base, stride_bias_m, stride_bias_n, alibi_slope,
        BIAS, HAS_ALIBI,
    )  # fmt: skip
    p_t = tl.exp2(s_t - lse_log2[None, :])
    # keys past the row's end touch their own dK and dV alone, which the kernel clears
    reach = k_pos[:, None] - (queries + (seqlen_k - seqlen_q))
    if HAS_RIGHT:
        p_t = tl.where(reach <= window_right, p_t, 0.0)
    if HAS_LEFT:
        p_t = tl.where(reach >= -window_left, p_t, 0.0)
    do_pointers = do_base + start * stride_do_m + (offs_m[:, None] * stride_do_m + offs_dv[None, :])
    do = load_tile(do_pointers, offs_m, offs_dv, rest, V_HEAD_DIM, BLOCK_DV, True)
    kept = 1.0
    if HAS_DROPOUT:
        kept = dropout_factors(seed, dropout_threshold, keep_scale, queries, k_pos[:, None], head, row)
    if WITH_DV:
        dv = tl.dot((p_t * kept).to(do.dtype), do, dv, input_precision=PRECISION)
    if WITH_DK:
        dp_t = tl.dot(v, tl.trans(do), input_precision=PRECISION) * kept
        delta = tl.load(delta_base + start_m + offs_m)
        ds_t = p_t * (dp_t - delta[None, :]) * slope
        dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


# a length that turns into a multiple of 16 must not compile anew
@triton.jit(do_not_specialize=["max_seqlen_q", "max_seqlen_k", "window_left", "window_right"])
def dkv_kernel(
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
    WITH_DK: tl.constexpr,
    WITH_DV: tl.constexpr,
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
        q_row, do_row, lse_row = first_q * stride_q_m, first_q * stride_do_m, padded_row(first_q, row)
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
        seqlen_k = tl.minimum(tl.maximum(tl.load(seqused_k + row), 0), seqlen_k)
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
    v = k
    if WITH_DK:
        v = load_tile(v_pointers, offs_n, offs_dv, seqlen_k - start_n, V_HEAD_DIM, BLOCK_DV, True)

    # queries [begin, end) can see a key of this tile
    shift = seqlen_k - seqlen_q
    begin = 0
    if HAS_RIGHT:
        begin = tl.maximum(start_n - shift - window_right, 0) // BLOCK_M * BLOCK_M
    end = seqlen_q
    if HAS_LEFT:
        end = tl.minimum(seqlen_q, tl.minimum(start_n + BLOCK_N, seqlen_k) - shift + window_left)
    if start_n >= seqlen_k:
        end = 0

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    k_pos = start_n + offs_n
    row32 = row.to(tl.int32)
    seed = tl.load(dropout_seed) if HAS_DROPOUT else 0
    # one loop over all heads' queries: loops within loops would wait for loads anew, and take registers
    steps = (tl.maximum(end - begin, 0) + BLOCK_M - 1) // BLOCK_M
    for step in range(0, GROUP * steps):
        head32 = head_k.to(tl.int32) * GROUP + step // steps
        head = head32.to(tl.int64)
        bias_base = Bias + row * stride_bias_b + head * stride_bias_h if BIAS > 0 else Q
        alibi_slope = tl.load(alibi_slopes + row * stride_alibi_b + head) if HAS_ALIBI else 0.0
        dk, dv = _add_queries(
            dk, dv, k, v, Q + q_row + head * stride_q_h, DOut + do_row + head * stride_do_h,
            LseLog2 + lse_row + head * stride_lse_h, Delta + lse_row + head * stride_lse_h,
            begin + step % steps * BLOCK_M, k_pos, seqlen_q, seqlen_k, window_left, window_right, scale_log2,
            softcap_log2, stride_q_m, stride_do_m, bias_base, stride_bias_m, stride_bias_n, alibi_slope, seed,
            dropout_threshold, keep_scale, head32, row32,
            HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
            BIAS, HAS_ALIBI, HAS_DROPOUT, PRECISION, WITH_DK, WITH_DV,
        )  # fmt: skip
    # keys behind `seqused_k` are stored but unseen: their gradients are 0
    used = (start_n + offs_n < seqlen_k)[:, None]
    in_row = (start_n + offs_n < stored_k)[:, None]
    if WITH_DK:
        dk = tl.where(used, dk * softmax_scale, 0.0)
        dk_pointers = DK + dk_row + head_k * stride_dk_h + keys[:, None] * stride_dk_n + offs_d[None, :]
        tl.store(dk_pointers, dk.to(DK.dtype.element_ty), mask=in_row & (offs_d < HEAD_DIM)[None, :])
    if WITH_DV:
        dv = tl.where(used, dv, 0.0)
        dv_pointers = DV + dv_row + head_k * stride_dv_h + keys[:, None] * stride_dv_n + offs_dv[None, :]
        tl.store(dv_pointers, dv.to(DV.dtype.element_ty), mask=in_row & (offs_dv < V_HEAD_DIM)[None, :])
