"""Rotary embedding of queries and keys in one launch, where a model's own code takes ten."""

import torch
import triton
import triton.language as tl

from .launches import overlap
from .primitives import let_next_start, wait_for_previous

_HEADS = 4  # of a program


@triton.jit
def _rotary_kernel(
    Q,
    K,
    Cos,
    Sin,
    QOut,
    KOut,
    stride_q_b,
    stride_q_h,
    stride_q_s,
    stride_k_b,
    stride_k_h,
    stride_k_s,
    stride_qo_b,
    stride_qo_h,
    stride_qo_s,
    stride_ko_b,
    stride_ko_h,
    stride_ko_s,
    stride_cos_b,
    stride_cos_s,
    stride_sin_b,
    stride_sin_s,
    seqlen,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Out = [x1 cos - x2 sin, x2 cos + x1 sin, rest], x1 and x2 the halves of the first ROTARY_DIM (Su et al. 2021).

    Q (B, Hq, S, D), K (B, Hk, S, D), last dim contiguous; Cos, Sin (B | 1, S, ROTARY_DIM), stride 0 for one row of
    all. Products and sums are rounded as torch does one by one. Grid (B * S, blocks of BLOCK_H heads, Q's first).
    """
    let_next_start(PDL)
    wait_for_previous(PDL)
    token = tl.program_id(0)
    batch = (token // seqlen).to(tl.int64)
    position = (token % seqlen).to(tl.int64)
    cos = Cos + batch * stride_cos_b + position * stride_cos_s
    sin = Sin + batch * stride_sin_b + position * stride_sin_s
    block = tl.program_id(1)
    q_blocks: tl.constexpr = (Q_HEADS + BLOCK_H - 1) // BLOCK_H
    if block < q_blocks:
        heads = (block * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
        x = Q + batch * stride_q_b + position * stride_q_s + heads[:, None] * stride_q_h
        out = QOut + batch * stride_qo_b + position * stride_qo_s + heads[:, None] * stride_qo_h
        _rotate(x, cos, sin, out, heads < Q_HEADS, HEAD_DIM, ROTARY_DIM, BLOCK_D, BLOCK_REST)
    else:
        heads = ((block - q_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
        x = K + batch * stride_k_b + position * stride_k_s + heads[:, None] * stride_k_h
        out = KOut + batch * stride_ko_b + position * stride_ko_s + heads[:, None] * stride_ko_h
        _rotate(x, cos, sin, out, heads < K_HEADS, HEAD_DIM, ROTARY_DIM, BLOCK_D, BLOCK_REST)


@triton.jit
def _rotate(
    X, cos, sin, Out, head_mask, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """One token's heads: X, Out (BLOCK_H, 1) pointers to where each begins."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    offs = tl.arange(0, BLOCK_D)[None, :]
    half = offs < HALF
    mask = head_mask[:, None] & half
    x1 = tl.load(X + offs, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(X + HALF + offs, mask=mask, other=0.0).to(tl.float32)
    cos1 = tl.load(cos + offs, mask=half, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + HALF + offs, mask=half, other=0.0).to(tl.float32)
    sin1 = tl.load(sin + offs, mask=half, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + HALF + offs, mask=half, other=0.0).to(tl.float32)
    tl.store(Out + offs, _sum_of_products(x1, cos1, -x2, sin1, Out.dtype.element_ty), mask=mask)
    tl.store(Out + HALF + offs, _sum_of_products(x2, cos2, x1, sin2, Out.dtype.element_ty), mask=mask)
    if ROTARY_DIM < HEAD_DIM:
        rest = ROTARY_DIM + tl.arange(0, BLOCK_REST)[None, :]
        mask = head_mask[:, None] & (rest < HEAD_DIM)
        tl.store(Out + rest, tl.load(X + rest, mask=mask), mask=mask)


@triton.jit
def _sum_of_products(a, b, c, d, dtype: tl.constexpr):
    first = (a * b).to(dtype).to(tl.float32)
    second = (c * d).to(dtype).to(tl.float32)
    return (first + second).to(dtype)


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches `_rotary_kernel`; arguments and results as in `hf_paged_flash.ops.reference_layers`."""
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    batch, q_heads, seqlen, head_dim = q.shape
    if q.numel() == 0:
        return q_out, k_out
    k_heads, rotary_dim = k.shape[1], cos.shape[-1]
    blocks = triton.cdiv(q_heads, _HEADS) + triton.cdiv(k_heads, _HEADS)
    with torch.cuda.device_of(q):
        _rotary_kernel[(batch * seqlen, blocks)](
            Q=q,
            K=k,
            Cos=cos,
            Sin=sin,
            QOut=q_out,
            KOut=k_out,
            stride_q_b=q.stride(0),
            stride_q_h=q.stride(1),
            stride_q_s=q.stride(2),
            stride_k_b=k.stride(0),
            stride_k_h=k.stride(1),
            stride_k_s=k.stride(2),
            stride_qo_b=q_out.stride(0),
            stride_qo_h=q_out.stride(1),
            stride_qo_s=q_out.stride(2),
            stride_ko_b=k_out.stride(0),
            stride_ko_h=k_out.stride(1),
            stride_ko_s=k_out.stride(2),
            stride_cos_b=cos.stride(0) if cos.shape[0] > 1 else 0,
            stride_cos_s=cos.stride(1),
            stride_sin_b=sin.stride(0) if sin.shape[0] > 1 else 0,
            stride_sin_s=sin.stride(1),
            seqlen=seqlen,
            Q_HEADS=q_heads,
            K_HEADS=k_heads,
            HEAD_DIM=head_dim,
            ROTARY_DIM=rotary_dim,
            BLOCK_H=_HEADS,
            BLOCK_D=triton.next_power_of_2(rotary_dim // 2),
            BLOCK_REST=triton.next_power_of_2(max(1, head_dim - rotary_dim)),
            **overlap(q),
            num_warps=2,
            enable_fp_fusion=False,  # a product and a sum in one would not be rounded as two
        )
    return q_out, k_out
