"""What lies between the products of a gated MLP, in one launch where torch takes two."""

import torch
import triton
import triton.language as tl

from .launches import overlap
from .primitives import let_next_start, wait_for_previous

_BLOCK = 1024


@triton.jit
def _swiglu_kernel(Gate, Up, Out, stride_gate, stride_up, N, PDL: tl.constexpr, BLOCK: tl.constexpr):
    """Out = Gate / (1 + exp(-Gate)) * Up (Shazeer 2020), in fp32; the first factor takes Out's dtype in between.

    Gate, Up (rows, N), columns contiguous, Out (rows, N) contiguous. Grid (rows, cdiv(N, BLOCK)).
    """
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    wait_for_previous(PDL)
    gate = tl.load(Gate + row * stride_gate + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(Up + row * stride_up + offs, mask=mask, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(Out.dtype.element_ty).to(tl.float32)
    tl.store(Out + row * N + offs, (silu * up).to(Out.dtype.element_ty), mask=mask)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Launches `_swiglu_kernel`; arguments and result as in `hf_paged_flash.ops.reference_layers`."""
    out = gate.new_empty(gate.shape)
    n = gate.shape[-1]
    if out.numel() == 0:
        return out
    gate, up = (x if x.stride(-1) == 1 else x.contiguous() for x in (gate.reshape(-1, n), up.reshape(-1, n)))
    with torch.cuda.device_of(gate):
        _swiglu_kernel[(len(gate), triton.cdiv(n, _BLOCK))](
            Gate=gate,
            Up=up,
            Out=out,
            stride_gate=gate.stride(0),
            stride_up=up.stride(0),
            N=n,
            BLOCK=_BLOCK,
            **overlap(gate),
            num_warps=4,
        )
    return out
