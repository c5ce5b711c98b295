"""Writes new keys and values into their slots of the block pool."""

import torch
import triton
import triton.language as tl

from .launches import overlap
from .primitives import let_next_start, wait_for_previous


@triton.jit
def _store_kv_kernel(
    K,
    V,
    slot_mapping,
    KCache,
    VCache,
    stride_k_b,
    stride_k_s,
    stride_k_h,
    stride_k_d,
    stride_v_b,
    stride_v_s,
    stride_v_h,
    stride_v_d,
    stride_kc_block,
    stride_kc_n,
    stride_kc_h,
    stride_vc_block,
    stride_vc_n,
    stride_vc_h,
    seqlen,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """KCache[slot // PAGE_SIZE, slot % PAGE_SIZE] = K[b, s], V likewise, for token b * seqlen + s; slot -1 is skipped.

    K, V (B, S, Hkv, D | Dv) with any strides; caches (num_blocks, PAGE_SIZE, Hkv, D | Dv). Grid (B * S,): one token.
    """
    let_next_start(PDL)
    wait_for_previous(PDL)
    token = tl.program_id(0)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot < 0:
        return
    batch = (token // seqlen).to(tl.int64)
    position = (token % seqlen).to(tl.int64)
    block = slot // PAGE_SIZE
    offset = slot % PAGE_SIZE
    offs_h = tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    heads = (offs_h < NUM_KV_HEADS)[:, None]
    k_mask = heads & (offs_d < HEAD_DIM)[None, :]
    k_source = K + batch * stride_k_b + position * stride_k_s
    k_source += offs_h[:, None] * stride_k_h + offs_d[None, :] * stride_k_d
    k_target = KCache + block * stride_kc_block + offset * stride_kc_n
    k_target += offs_h[:, None] * stride_kc_h + offs_d[None, :]
    tl.store(k_target, tl.load(k_source, mask=k_mask), mask=k_mask)
    v_mask = heads & (offs_dv < V_HEAD_DIM)[None, :]
    v_source = V + batch * stride_v_b + position * stride_v_s
    v_source += offs_h[:, None] * stride_v_h + offs_dv[None, :] * stride_v_d
    v_target = VCache + block * stride_vc_block + offset * stride_vc_n
    v_target += offs_h[:, None] * stride_vc_h + offs_dv[None, :]
    tl.store(v_target, tl.load(v_source, mask=v_mask), mask=v_mask)


def store_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Launches `_store_kv_kernel`; arguments as in `hf_paged_flash.ops.reference.store_kv`."""
    if k.dim() == 3:
        k, v = k[None], v[None]
    batch, seqlen, num_kv_heads, head_dim = k.shape
    if batch * seqlen == 0:
        return
    v_head_dim = v.shape[-1]
    # heads are addressed in 32 bits: a layout whose heads lie 2^31 elements apart is brought together first
    k, v = (x if x.stride(2) * num_kv_heads < 2**31 else x.contiguous() for x in (k, v))
    with torch.cuda.device_of(k):
        _store_kv_kernel[(batch * seqlen,)](
            K=k,
            V=v,
            slot_mapping=slot_mapping,
            KCache=k_cache,
            VCache=v_cache,
            stride_k_b=k.stride(0),
            stride_k_s=k.stride(1),
            stride_k_h=k.stride(2),
            stride_k_d=k.stride(3),
            stride_v_b=v.stride(0),
            stride_v_s=v.stride(1),
            stride_v_h=v.stride(2),
            stride_v_d=v.stride(3),
            stride_kc_block=k_cache.stride(0),
            stride_kc_n=k_cache.stride(1),
            stride_kc_h=k_cache.stride(2),
            stride_vc_block=v_cache.stride(0),
            stride_vc_n=v_cache.stride(1),
            stride_vc_h=v_cache.stride(2),
            seqlen=seqlen,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            V_HEAD_DIM=v_head_dim,
            PAGE_SIZE=k_cache.shape[1],
            BLOCK_H=triton.next_power_of_2(num_kv_heads),
            BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_DV=triton.next_power_of_2(v_head_dim),
            **overlap(k),
            num_warps=4,
        )
