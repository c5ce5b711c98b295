"""FlashAttention backward for dense and packed (varlen) keys: two kernels without atomics, P recomputed from lse."""

import torch
import triton
import triton.language as tl

from . import backward_configs, configs, hopper
from .backward_dkv import dkv_kernel
from .backward_dq import dq_kernel
from .bias_gradient import bias_gradient
from .flash_forward import dot_precision, last_dim_contiguous
from .modifiers import modifier_arguments
from .primitives import LOG2_E, ROW_PAD, padded_row


# a length that turns into a multiple of 16 must not compile anew
@triton.jit(do_not_specialize=["stride_in_b", "stride_in_h", "max_seqlen_q"])
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
    stride_in_b,
    stride_in_h,
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

    Out, DOut (B, Sq, Hq, Dv) or packed; Lse, DLse fp32 (B, Hq, Sq) or (Hq, Tq), with strides `stride_in`; Delta and
    LseLog2 likewise, but with ROW_PAD behind each row. Grid (Hq, tiles, B).
    """
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    if PACKED_Q:
        first = tl.load(cu_seqlens_q + row).to(tl.int64)
        seqlen_q = (tl.load(cu_seqlens_q + row + 1) - first).to(tl.int32)
        o_row, do_row = first * stride_o_m, first * stride_do_m
        in_row, lse_row = first, padded_row(first, row)
    else:
        seqlen_q = max_seqlen_q
        o_row, do_row = row * stride_o_b, row * stride_do_b
        in_row, lse_row = row * stride_in_b, row * stride_lse_b
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows = offs_m.to(tl.int64)
    mask = (offs_m < seqlen_q)[:, None] & (offs_dv < V_HEAD_DIM)[None, :]
    o_pointers = Out + o_row + head * stride_o_h + rows[:, None] * stride_o_m + offs_dv[None, :]
    do_pointers = DOut + do_row + head * stride_do_h + rows[:, None] * stride_do_m + offs_dv[None, :]
    o = tl.load(o_pointers, mask=mask, other=0.0).to(tl.float32)
    do = tl.load(do_pointers, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(o * do, 1)
    row_mask = offs_m < seqlen_q
    offsets_in = in_row + head * stride_in_h + offs_m
    lse = tl.load(Lse + offsets_in, mask=row_mask, other=0.0)
    no_key = lse == float("-inf")
    if HAS_DLSE:
        delta -= tl.where(no_key, 0.0, tl.load(DLse + offsets_in, mask=row_mask, other=0.0))
    offsets = lse_row + head * stride_lse_h + offs_m
    tl.store(Delta + offsets, delta, mask=row_mask)
    tl.store(LseLog2 + offsets, tl.where(no_key, float("inf"), lse * LOG2_E), mask=row_mask)


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
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Launches the kernels, Hopper's own where there is one for the call.

    Arguments and results as in `hf_paged_flash.ops.reference_backward.flash_backward`. No sum's order depends on
    timing here; Hopper's kernel adds up dQ in any order and stays away from `deterministic` calls.
    """
    if hopper.unavailable(q.device) is None and hopper.supports_backward(
        dout, q, k, v, deterministic=deterministic, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k, causal=causal, window_left=window_left, window_right=window_right, softcap=softcap,
        s_aux=s_aux, bias=bias, alibi_slopes=alibi_slopes, dropout_p=dropout_p,
    ):  # fmt: skip
        from .hopper.flash_backward import flash_backward as hopper_flash_backward

        gradients = hopper_flash_backward(
            dout, dlse, q, k, v, out, lse, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, softmax_scale=softmax_scale, causal=causal,
        )  # fmt: skip
        return *gradients, None, None
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
    pad = ROW_PAD.value
    padded_rows = triton.cdiv(q.shape[0] if packed else max_seqlen_q, pad) * pad + (2 * pad * batch if packed else 0)
    lse_log2 = lse.new_full((*lse.shape[:-1], padded_rows), float("inf"))
    delta = torch.zeros_like(lse_log2)
    if causal:
        window_right = 0
    scale_log2, softcap_log2 = softmax_scale * LOG2_E.value, 0.0
    if softcap > 0:
        scale_log2, softcap_log2 = 2.0 * scale_log2 / softcap, softcap * LOG2_E.value
    lse_strides = {"stride_lse_b": 0 if packed else delta.stride(0), "stride_lse_h": delta.stride(-2)}

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
    biased, modified = bias is not None or alibi_slopes is not None, dropout_p > 0.0 or softcap > 0.0
    with torch.cuda.device_of(q):
        if out.numel():
            _delta_kernel[(num_heads, triton.cdiv(max_seqlen_q, 64), batch)](
                Out=out, DOut=dout, DLse=dlse, Lse=lse, cu_seqlens_q=cu_seqlens_q, Delta=delta, LseLog2=lse_log2,
                **strides("o", out, "m"), **strides("do", dout, "m"), **lse_strides,
                stride_in_b=0 if packed else lse.stride(0), stride_in_h=lse.stride(-2), max_seqlen_q=max_seqlen_q,
                V_HEAD_DIM=v_head_dim, PACKED_Q=packed, HAS_DLSE=dlse is not None, BLOCK_DV=block_dv, BLOCK_M=64,
            )  # fmt: skip
            tile = backward_configs.dq_tile(block_d, block_dv, q.dtype, device, modified=biased or modified)
            dq_kernel[(num_heads, triton.cdiv(max_seqlen_q, tile.block_m), batch)](
                **shared, DQ=dq, **strides("dq", dq, "m"), BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
        if dk.numel():
            launches = backward_configs.dkv_launches(
                block_d, block_dv, q.dtype, device, biased=biased, modified=modified
            )
            for tile, with_dk, with_dv in launches:
                dkv_kernel[(triton.cdiv(max_seqlen_k, tile.block_n), num_kv_heads, batch)](
                    **shared, DK=dk, DV=dv, **strides("dk", dk, "n"), **strides("dv", dv, "n"),
                    WITH_DK=with_dk, WITH_DV=with_dv, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
                    num_warps=tile.num_warps, num_stages=tile.num_stages,
                )  # fmt: skip
        dbias = bias_gradient(bias, batch, shared) if bias_needs_grad else None
    dq, dk, dv = (x.to(dtype) for x in (dq, dk, dv))
    return dq, dk, dv, None if s_aux is None else _sink_gradient(s_aux, delta, lse_log2), dbias


def _sink_gradient(s_aux: torch.Tensor, delta: torch.Tensor, lse_log2: torch.Tensor) -> torch.Tensor:
    """dsink = -sum over rows of exp(sink - lse) * D, per head; rows without keys, whose lse is +inf here, give 0."""
    weight = torch.exp2(s_aux.float()[:, None] * LOG2_E.value - lse_log2)
    summed = -(weight * delta).sum(-1)
    return (summed if summed.dim() == 1 else summed.sum(0)).to(s_aux.dtype)
