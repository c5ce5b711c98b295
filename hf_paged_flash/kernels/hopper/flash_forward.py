"""Launcher of the Hopper forward: its tiles, its list of work for packed rows, its descriptors.

Importing it imports Gluon: ask `hopper.unavailable` and `hopper.supports` first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .. import configs
from ..flash_forward import last_dim_contiguous, score_scales
from . import tensor_strides
from .forward_kernel import flash_forward_hopper_kernel
from .packed_work import plan_packed


@dataclass(frozen=True)
class Plan:
    """`consumers` warpgroups of `block_m` rows each, `stages` tiles of `block_n` keys and values in flight.

    `registers` a thread of a consumer has; `own_output`: O has shared memory of its own, rather than Q's; `ping_pong`:
    consumers take turns at the tensor cores.
    """

    block_m: int
    block_n: int
    consumers: int
    stages: int
    registers: int
    own_output: bool
    ping_pong: bool


# measured on an H200; three consumers hide more of the softmax where head_dim leaves it long beside the products
PLANS = {
    64: Plan(64, 128, 3, 2, registers=160, own_output=True, ping_pong=True),
    128: Plan(64, 128, 2, 2, registers=240, own_output=True, ping_pong=False),
    256: Plan(64, 64, 2, 2, registers=240, own_output=False, ping_pong=True),
}
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@lru_cache
def tile_layout(block: tuple[int, ...], dtype: gl.dtype) -> gl.NVMMASharedLayout:
    """How a copied tile lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(list(block), dtype)


def tile_descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """A TMA descriptor of (B, S, H, D), or packed (T, H, D), for tiles of one head's `rows`."""
    x = x[None] if x.dim() == 3 else x
    block = (1, rows, 1, x.shape[3])
    return TensorDescriptor(x, list(x.shape), tensor_strides(x), list(block), tile_layout(block, _DTYPES[x.dtype]))


def flash_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    plan: Plan | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches `flash_forward_hopper_kernel` on what `hopper.supports` takes; results as `kernels.flash_forward`'s.

    `plan` replaces the tiles of `PLANS`, for measurements.
    """
    packed = cu_seqlens_q is not None
    q, k, v = last_dim_contiguous(q), last_dim_contiguous(k), last_dim_contiguous(v)
    num_heads, head_dim = q.shape[-2:]
    num_kv_heads = k.shape[-2]
    out = q.new_empty(q.shape)
    if packed:
        batch = cu_seqlens_q.numel() - 1
        lse = q.new_empty(num_heads, q.shape[0], dtype=torch.float32)
        lse_strides = (0, lse.stride(0))
    else:
        batch, max_seqlen_q, max_seqlen_k = q.shape[0], q.shape[1], k.shape[1]
        lse = q.new_empty(batch, num_heads, max_seqlen_q, dtype=torch.float32)
        lse_strides = (lse.stride(0), lse.stride(1))
    if out.numel() == 0:
        return out, lse

    plan = plan or PLANS[head_dim]
    device = configs.device_of(q)
    q, scale_log2, _ = score_scales(q, softmax_scale, 0.0)
    rows = plan.consumers * plan.block_m
    kv_bytes = max_seqlen_k * 2 * head_dim * k.element_size()
    sections = configs.head_sections(num_kv_heads, kv_bytes, device)
    tiles_m = triton.cdiv(max_seqlen_q, rows)
    num_tiles = (q.shape[0] // rows + batch if packed else tiles_m * batch) * num_heads
    with torch.cuda.device_of(q):
        if packed:
            work = plan_packed(cu_seqlens_q, cu_seqlens_k, q.shape[0], rows=rows, causal=causal)
        else:
            work = q.new_zeros(1, dtype=torch.int32)
        flash_forward_hopper_kernel[(min(num_tiles, device.num_sms),)](
            Q=tile_descriptor(q, plan.block_m),
            K=tile_descriptor(k, plan.block_n),
            V=tile_descriptor(v, plan.block_n),
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            work=work,
            Out=out,
            Lse=lse,
            stride_o_b=0 if packed else out.stride(0),
            stride_o_m=out.stride(-3),
            stride_o_h=out.stride(-2),
            stride_lse_b=lse_strides[0],
            stride_lse_h=lse_strides[1],
            num_heads=num_heads,
            group=num_heads // num_kv_heads,
            num_sections=sections,
            tiles_m=tiles_m,
            num_tiles=num_tiles,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            scale_log2=scale_log2,
            HEAD_DIM=head_dim,
            CAUSAL=causal,
            PACKED=packed,
            BLOCK_M=plan.block_m,
            BLOCK_N=plan.block_n,
            CONSUMERS=plan.consumers,
            STAGES=plan.stages,
            OWN_OUTPUT=plan.own_output,
            PING_PONG=plan.ping_pong,
            REGISTERS=plan.registers,
            num_warps=4,
        )
    return out, lse
