"""Launcher of the Hopper backward: its tiles, its descriptors, and the kernels before and after it.

Importing it imports Gluon: ask `hopper.unavailable` and `hopper.supports_backward` first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .. import configs
from ..flash_forward import last_dim_contiguous
from ..primitives import LOG2_E
from . import copyable
from .backward_kernel import flash_backward_hopper_kernel
from .backward_rows import after_backward_kernel, before_backward_kernel, plan_keys
from .flash_forward import tile_descriptor, tile_layout


@dataclass(frozen=True)
class Plan:
    """Blocks of `block_n` keys walk over tiles of `block_m` queries, `stages` of them in flight."""

    block_m: int
    block_n: int
    stages: int


# measured on an H200
PLANS = {64: Plan(128, 128, 2), 128: Plan(64, 128, 2), 256: Plan(64, 64, 2)}


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
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    plan: Plan | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) of what `hopper.supports_backward` takes, as `kernels.flash_backward` defines them.

    dQ is summed in fp32 in no fixed order: its last bits may differ from run to run. `plan` replaces the tiles of
    `PLANS`, for measurements.
    """
    packed = cu_seqlens_q is not None
    q, k, v, out = (last_dim_contiguous(x) for x in (q, k, v, out))
    if not copyable(dout):  # the gradient of a sum has no strides, say
        dout = dout.clone(memory_format=torch.contiguous_format)
    num_heads, head_dim = q.shape[-2:]
    kv_heads = k.shape[-2]
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    if packed:
        batch = cu_seqlens_q.numel() - 1
        for x in (dq, dk, dv):  # packed tensors may hold tokens outside every row: their gradients are 0
            x.zero_()
    else:
        batch, max_seqlen_q, max_seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    if not out.numel():
        return dq, dk.zero_(), dv.zero_()

    plan = plan or PLANS[head_dim]
    device = configs.device_of(q)
    rows_m = triton.cdiv(max_seqlen_q, plan.block_m)
    tiles_m = q.shape[0] // plan.block_m + batch if packed else rows_m
    all_tiles = num_heads * tiles_m * (1 if packed else batch)
    lse_delta = q.new_empty(2 * all_tiles, plan.block_m, dtype=torch.float32)
    dq_sum = q.new_empty(all_tiles * plan.block_m, head_dim, dtype=torch.float32)

    def strides(name: str, x: torch.Tensor, sequence: str) -> dict[str, int]:
        return {
            f"stride_{name}_b": 0 if packed else x.stride(0),
            f"stride_{name}_{sequence}": x.stride(-3),
            f"stride_{name}_h": x.stride(-2),
        }

    rows = dict(
        cu_seqlens_q=cu_seqlens_q, tiles_m=tiles_m, max_seqlen_q=max_seqlen_q, HEAD_DIM=head_dim, PACKED=packed,
        BLOCK_M=plan.block_m,
    )  # fmt: skip
    row_grid = (rows_m, num_heads, batch)
    with torch.cuda.device_of(q):
        before_backward_kernel[row_grid](
            Out=out, DOut=dout, Lse=lse, DLse=dlse, LseDelta=lse_delta, DQ=dq_sum, HAS_DLSE=dlse is not None,
            stride_lse_b=0 if packed else lse.stride(0), stride_lse_h=lse.stride(-2),
            **strides("o", out, "m"), **strides("do", dout, "m"), **rows,
        )  # fmt: skip
        work, tiles_n = None, triton.cdiv(max_seqlen_k, plan.block_n)
        if packed:
            work = plan_keys(cu_seqlens_q, cu_seqlens_k, k.shape[0], rows=plan.block_n, causal=causal)
            tiles_n = k.shape[0] // plan.block_n + batch
        # a query row moves Q and dO (2 bytes) and the sum of dQ (4 bytes) of each head of the group
        group_bytes = max_seqlen_q * (num_heads // kv_heads) * 8 * head_dim
        pair = (1, plan.block_m)  # a tile's lse, or its D
        flash_backward_hopper_kernel[(tiles_n * kv_heads * (1 if packed else batch),)](
            Q=tile_descriptor(q, plan.block_m),
            K=tile_descriptor(k, plan.block_n),
            V=tile_descriptor(v, plan.block_n),
            DO=tile_descriptor(dout, plan.block_m),
            LseDelta=TensorDescriptor(
                lse_delta, list(lse_delta.shape), [pair[1], 1], list(pair), tile_layout(pair, gl.float32)
            ),
            DQ=dq_sum,
            DK=dk,
            DV=dv,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            work=work,
            **strides("dk", dk, "n"),
            **strides("dv", dv, "n"),
            kv_heads=kv_heads,
            group=num_heads // kv_heads,
            num_sections=configs.head_sections(kv_heads, group_bytes, device),
            tiles_n=tiles_n,
            tiles_m=tiles_m,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            softmax_scale=softmax_scale,
            scale_log2=softmax_scale * LOG2_E.value,
            HEAD_DIM=head_dim,
            CAUSAL=causal,
            PACKED=packed,
            BLOCK_M=plan.block_m,
            BLOCK_N=plan.block_n,
            STAGES=plan.stages,
            num_warps=8,
        )
        after_backward_kernel[row_grid](
            Sum=dq_sum, DQ=dq, **strides("dq", dq, "m"), softmax_scale=softmax_scale, **rows
        )
    return dq, dk, dv
