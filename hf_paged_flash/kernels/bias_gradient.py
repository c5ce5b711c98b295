"""The gradient of an additive bias: dS itself, summed over the rows and heads that share an element of the bias."""

import torch
import triton
import triton.language as tl

from .modifiers import add_biases, dropout_factors, scores_and_slope
from .primitives import load_tile, padded_row, visible_keys

BLOCK = 32


# a length that turns into a multiple of 16 must not compile anew
@triton.jit(do_not_specialize=["max_seqlen_q", "max_seqlen_k", "window_left", "window_right"])
def _bias_gradient_kernel(
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
    DBias,
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
    stride_lse_b,
    stride_lse_h,
    stride_bias_b,
    stride_bias_h,
    stride_bias_m,
    stride_bias_n,
    stride_alibi_b,
    stride_db_b,
    stride_db_h,
    stride_db_m,
    batch,
    num_heads,
    bias_batch,
    bias_heads,
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
    """dBias = sum of P o (dP - D) over the rows and heads of one element, for one tile (BLOCK_M, BLOCK_N) of the bias.

    The sums run in a loop: no atomics, no S x S tensor beside the bias's own gradient. DBias fp32 (bias_batch,
    bias_heads, Sq, Sk); layouts as in flash_backward. Grid (tiles of Sk, tiles of Sq, bias_batch * bias_heads).
    """
    start_n = tl.program_id(0) * BLOCK_N
    start_m = tl.program_id(1) * BLOCK_M
    bias_row = tl.program_id(2) // bias_heads
    bias_head = tl.program_id(2) % bias_heads
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    queries = start_m + offs_m
    keys = start_n + offs_n
    seed = tl.load(dropout_seed) if HAS_DROPOUT else 0
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # a bias of its own for each row has bias_batch == batch: one round; a shared one has bias_batch 1: all rows
    for b in range(bias_row, batch, bias_batch):
        row = tl.cast(b, tl.int64)
        if PACKED_Q:
            first_q = tl.load(cu_seqlens_q + row).to(tl.int64)
            seqlen_q = (tl.load(cu_seqlens_q + row + 1) - first_q).to(tl.int32)
            q_row, do_row, lse_row = first_q * stride_q_m, first_q * stride_do_m, padded_row(first_q, row)
        else:
            seqlen_q = max_seqlen_q
            q_row, do_row, lse_row = row * stride_q_b, row * stride_do_b, row * stride_lse_b
        if PACKED_K:
            first_k = tl.load(cu_seqlens_k + row).to(tl.int64)
            seqlen_k = (tl.load(cu_seqlens_k + row + 1) - first_k).to(tl.int32)
            k_row, v_row = first_k * stride_k_n, first_k * stride_v_n
        else:
            seqlen_k = max_seqlen_k
            k_row, v_row = row * stride_k_b, row * stride_v_b
        if HAS_SEQUSED:
            seqlen_k = tl.minimum(tl.maximum(tl.load(seqused_k + row), 0), seqlen_k)
        visible = visible_keys(
            queries + seqlen_k - seqlen_q, keys, seqlen_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
        )
        for h in range(bias_head, num_heads, bias_heads):
            head = tl.cast(h, tl.int64)
            q_base = Q + q_row + head * stride_q_h + start_m.to(tl.int64) * stride_q_m
            k_base = K + k_row + (head // GROUP) * stride_k_h + start_n.to(tl.int64) * stride_k_n
            v_base = V + v_row + (head // GROUP) * stride_v_h + start_n.to(tl.int64) * stride_v_n
            do_base = DOut + do_row + head * stride_do_h + start_m.to(tl.int64) * stride_do_m
            rest_m, rest_n = seqlen_q - start_m, seqlen_k - start_n
            q_pointers = q_base + (offs_m[:, None] * stride_q_m + offs_d[None, :])
            q = load_tile(q_pointers, offs_m, offs_d, rest_m, HEAD_DIM, BLOCK_D, True)
            k_pointers = k_base + (offs_n[:, None] * stride_k_n + offs_d[None, :])
            k = load_tile(k_pointers, offs_n, offs_d, rest_n, HEAD_DIM, BLOCK_D, True)
            v_pointers = v_base + (offs_n[:, None] * stride_v_n + offs_dv[None, :])
            v = load_tile(v_pointers, offs_n, offs_dv, rest_n, V_HEAD_DIM, BLOCK_DV, True)
            do_pointers = do_base + (offs_m[:, None] * stride_do_m + offs_dv[None, :])
            do = load_tile(do_pointers, offs_m, offs_dv, rest_m, V_HEAD_DIM, BLOCK_DV, True)
            lse_offsets = lse_row + head * stride_lse_h + queries
            lse_log2 = tl.load(LseLog2 + lse_offsets, mask=queries < seqlen_q, other=float("inf"))
            delta = tl.load(Delta + lse_offsets, mask=queries < seqlen_q, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            s, _ = scores_and_slope(s, scale_log2, softcap_log2, HAS_SOFTCAP)
            bias_base = Bias + row * stride_bias_b + head * stride_bias_h
            alibi_slope = tl.load(alibi_slopes + row * stride_alibi_b + head) if HAS_ALIBI else 0.0
            s = add_biases(
                s, queries[:, None], keys[None, :], seqlen_q, seqlen_k, bias_base, stride_bias_m, stride_bias_n,
                alibi_slope, BIAS, HAS_ALIBI,
            )  # fmt: skip
            p = tl.where(visible, tl.exp2(s - lse_log2[:, None]), 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            if HAS_DROPOUT:
                dp *= dropout_factors(seed, dropout_threshold, keep_scale, queries[:, None], keys[None, :], h, b)
            acc += p * (dp - delta[:, None])
    targets = DBias + bias_row.to(tl.int64) * stride_db_b + bias_head.to(tl.int64) * stride_db_h
    targets += queries.to(tl.int64)[:, None] * stride_db_m + keys[None, :]
    tl.store(targets, acc, mask=(queries < max_seqlen_q)[:, None] & (keys < max_seqlen_k)[None, :])


def bias_gradient(bias: torch.Tensor, batch: int, shared: dict) -> torch.Tensor:
    """The gradient of `bias` (B | 1, Hq | 1, Sq | 1, Sk | 1); `shared` are the backward kernels' common arguments."""
    max_seqlen_q, max_seqlen_k = shared["max_seqlen_q"], shared["max_seqlen_k"]
    bias_batch, bias_heads, bias_q, bias_k = bias.shape
    size = (bias_batch, bias_heads, max(bias_q, max_seqlen_q), max(bias_k, max_seqlen_k))
    full = torch.zeros(size, dtype=torch.float32, device=bias.device)
    grid = (triton.cdiv(max_seqlen_k, BLOCK), triton.cdiv(max_seqlen_q, BLOCK), bias_batch * bias_heads)
    if full.numel() and batch:
        _bias_gradient_kernel[grid](
            **shared, DBias=full, stride_db_b=full.stride(0), stride_db_h=full.stride(1), stride_db_m=full.stride(2),
            batch=batch, num_heads=shared["Q"].shape[-2], bias_batch=bias_batch, bias_heads=bias_heads,
            BLOCK_M=BLOCK, BLOCK_N=BLOCK, num_warps=4, num_stages=1,
        )  # fmt: skip
    return full.sum_to_size(bias.shape).to(bias.dtype)
