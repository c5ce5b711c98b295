"""RMSNorm in one launch, where a model's own code takes eight."""

import torch
import triton
import triton.language as tl

from .launches import overlap
from .primitives import let_next_start, wait_for_previous


@triton.jit
def _rms_norm_kernel(
    X,
    Weight,
    Out,
    eps,
    OFFSET: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    N: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Out = X / sqrt(mean(X^2) + eps) * (OFFSET + Weight), each row by itself, in fp32 (Zhang, Sennrich 2019).

    X, Out (rows, N) contiguous, Weight (N,). ROUNDS_FIRST: the normalized row takes Out's dtype before it is
    multiplied. Grid (rows,).
    """
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_N)
    mask = offs < N
    let_next_start(PDL)
    wait_for_previous(PDL)
    x = tl.load(X + row * N + offs, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(Weight + offs, mask=mask, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, 0) / N + eps)
    if ROUNDS_FIRST:
        normed = normed.to(Out.dtype.element_ty).to(tl.float32)
    out = normed * (weight + OFFSET)
    tl.store(Out + row * N + offs, out.to(Out.dtype.element_ty), mask=mask)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0, casting_mode: str = "llama"
) -> torch.Tensor:
    """Launches `_rms_norm_kernel`; arguments and result as in `hf_paged_flash.ops.reference_layers`."""
    n = x.shape[-1]
    x = x.contiguous()
    out = x.new_empty(x.shape)
    rows = x.numel() // n
    if rows == 0:
        return out
    with torch.cuda.device_of(x):
        _rms_norm_kernel[(rows,)](
            X=x,
            Weight=weight,
            Out=out,
            eps=eps,
            OFFSET=offset,
            ROUNDS_FIRST=casting_mode == "llama",
            N=n,
            BLOCK_N=triton.next_power_of_2(n),
            **overlap(x),
            num_warps=max(1, min(16, triton.next_power_of_2(n) // 512)),
        )
    return out
