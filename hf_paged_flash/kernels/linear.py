"""A linear layer of one row or two, whose time is that of reading its weights."""

import torch
import triton
import triton.language as tl

from .launches import overlap
from .primitives import let_next_start, wait_for_previous

# {rows: BLOCK_N, most of BLOCK_K}, of eleven tiles the fastest for an 8B model's weights on an H200
_TILES = {1: (1, 2048), 2: (4, 1024)}


@triton.jit
def _linear_kernel(
    X,
    Weight,
    Bias,
    Out,
    stride_x,
    stride_weight,
    N,
    K,
    ROWS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Out = X Weight^T + Bias of ROWS rows, 1 or 2; products and sums in fp32.

    X (ROWS, K), Weight (N, K), both with contiguous rows, Bias (N,) or None, Out (ROWS, N) contiguous. Grid
    (cdiv(N, BLOCK_N),). No tensor cores: a thread has multiplied its weights by the time that the next have come.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    weights = Weight + offs_n.to(tl.int64)[:, None] * stride_weight + offs_k[None, :]
    acc_0 = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
    acc_1 = acc_0
    let_next_start(PDL)
    mask = mask_n[:, None] if EVEN_K else mask_n[:, None] & (offs_k < K)[None, :]
    first = tl.load(weights, mask=mask, other=0.0).to(tl.float32)  # which no kernel before has written
    wait_for_previous(PDL)
    acc_0 += _sums_of_eight(first, X + offs_k, K, EVEN_K)
    if ROWS > 1:
        acc_1 += _sums_of_eight(first, X + offs_k + stride_x, K, EVEN_K)
    for start_k in range(BLOCK_K, K, BLOCK_K):
        mask = mask_n[:, None] if EVEN_K else mask_n[:, None] & (offs_k < K - start_k)[None, :]
        weight = tl.load(weights + start_k, mask=mask, other=0.0).to(tl.float32)
        x = X + start_k + offs_k
        acc_0 += _sums_of_eight(weight, x, K - start_k, EVEN_K)
        if ROWS > 1:
            acc_1 += _sums_of_eight(weight, x + stride_x, K - start_k, EVEN_K)
    bias = 0.0
    if Bias is not None:
        bias = tl.load(Bias + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    out = Out + offs_n
    tl.store(out, (tl.sum(acc_0, 1) + bias).to(Out.dtype.element_ty), mask=mask_n)
    if ROWS > 1:
        tl.store(out + N, (tl.sum(acc_1, 1) + bias).to(Out.dtype.element_ty), mask=mask_n)


@triton.jit
def _sums_of_eight(weight, x_pointers, rest, EVEN_K: tl.constexpr):
    """weight (N, K) times a row (K,), eight products summed: what one load of a thread holds becomes one register."""
    BLOCK_N: tl.constexpr = weight.shape[0]
    BLOCK_K: tl.constexpr = weight.shape[1]
    if EVEN_K:
        x = tl.load(x_pointers)
    else:
        x = tl.load(x_pointers, mask=tl.arange(0, BLOCK_K) < rest, other=0.0)
    products = weight * x.to(tl.float32)[None, :]
    return tl.sum(tl.reshape(products, [BLOCK_N, BLOCK_K // 8, 8]), 2)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Launches `_linear_kernel`; arguments and result as in `hf_paged_flash.ops.reference_layers`, one row or two."""
    n, k = weight.shape
    out = x.new_empty(*x.shape[:-1], n)
    if out.numel() == 0:
        return out
    x = x.reshape(-1, k)
    x = x if x.stride(1) == 1 else x.contiguous()
    block_n, block_k = _TILES[len(x)]
    block_k = min(block_k, max(64, triton.next_power_of_2(k)))
    with torch.cuda.device_of(x):
        _linear_kernel[(triton.cdiv(n, block_n),)](
            X=x,
            Weight=weight,
            Bias=bias,
            Out=out,
            stride_x=x.stride(0),
            stride_weight=weight.stride(0),
            N=n,
            K=k,
            ROWS=len(x),
            EVEN_K=k % block_k == 0,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            **overlap(x),
            num_warps=max(1, min(4, block_n * block_k // 512)),
        )
    return out
