"""FlashAttention forward for dense, packed (varlen) and paged keys: one kernel, tiled, online softmax."""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..ops.validation import MAX_ROWS
from . import configs, hopper
from .modifiers import add_biases, dropout_factors, modifier_arguments
from .primitives import (
    LOG2_E,
    attention_scores,
    finish_softmax,
    load_tile,
    online_softmax_update,
    tile_blocks,
    tile_pointers,
    visible_keys,
    visible_runs,
)


@triton.jit
def _attend(
    acc,
    m_i,
    l_i,
    q,
    k_base,
    v_base,
    k_descriptor,
    v_descriptor,
    descriptor_row,
    descriptor_n,
    head_k,
    block_table_row,
    first,
    last,
    first_key,
    q_pos,
    seqlen_k,
    window_left,
    window_right,
    scale_log2,
    tanh_scale,
    stride_k_block,
    stride_k_n,
    stride_v_block,
    stride_v_n,
    seqlen_q,
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
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    K_DESCRIPTOR: tl.constexpr,
    V_DESCRIPTOR: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the keys of tiles `first .. last` (token indices, multiples of BLOCK_N) to acc, m_i and l_i.

    No query of the tile sees a key before `first_key`.
    """
    # the first tile may begin in blocks that the window has left behind, which are no blocks any more
    CHECK_FIRST: tl.constexpr = MASKED and HAS_LEFT and PAGE_SIZE > 0 and PAGE_SIZE % BLOCK_N != 0
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    blocks = tile_blocks(block_table_row, first, offs_n, seqlen_k, BLOCK_N, PAGE_SIZE, first_key, CHECK_FIRST)
    for start_n in range(first, last, BLOCK_N):
        rest = seqlen_k - start_n
        first_n = first_key - start_n
        next_blocks = tile_blocks(block_table_row, start_n + BLOCK_N, offs_n, seqlen_k, BLOCK_N, PAGE_SIZE)
        if K_DESCRIPTOR:
            k = k_descriptor.load([descriptor_row, descriptor_n + start_n, head_k, 0]).reshape(BLOCK_N, BLOCK_D)
        else:
            k_pointers = tile_pointers(
                k_base, blocks, start_n, offs_n, offs_d, stride_k_block, stride_k_n, BLOCK_N, PAGE_SIZE
            )
            k = load_tile(k_pointers, offs_n, offs_d, rest, HEAD_DIM, BLOCK_D, MASKED, first_n, CHECK_FIRST)
        s = attention_scores(q, k, tanh_scale, HAS_SOFTCAP, PRECISION)
        queries, keys = (q_pos - (seqlen_k - seqlen_q))[:, None], (start_n + offs_n)[None, :]
        score_scale = scale_log2
        if BIAS > 0 or HAS_ALIBI:
            s = add_biases(
                s * scale_log2, queries, keys, seqlen_q, seqlen_k, bias_base, stride_bias_m, stride_bias_n,
                alibi_slope, BIAS, HAS_ALIBI,
            )  # fmt: skip
            score_scale = 1.0
        if MASKED:
            mask = visible_keys(q_pos, start_n + offs_n, seqlen_k, window_left, window_right, HAS_LEFT, HAS_RIGHT)
            s = tl.where(mask, s, float("-inf"))
        p, alpha, m_i, l_i = online_softmax_update(s, score_scale, m_i, l_i, MASKED or BIAS > 0)
        if HAS_DROPOUT:
            p *= dropout_factors(seed, dropout_threshold, keep_scale, queries, keys, head, row)
        acc = acc * alpha[:, None]
        if V_DESCRIPTOR:
            v = v_descriptor.load([descriptor_row, descriptor_n + start_n, head_k, 0]).reshape(BLOCK_N, BLOCK_DV)
        else:
            v_pointers = tile_pointers(
                v_base, blocks, start_n, offs_n, offs_dv, stride_v_block, stride_v_n, BLOCK_N, PAGE_SIZE
            )
            v = load_tile(v_pointers, offs_n, offs_dv, rest, V_HEAD_DIM, BLOCK_DV, MASKED, first_n, CHECK_FIRST)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        blocks = next_blocks
    return acc, m_i, l_i


# a length that turns into a multiple of 16 must not compile anew
@triton.jit(
    do_not_specialize=[
        "stride_lse_b", "stride_lse_h", "stride_table", "num_sections", "max_seqlen_q", "max_seqlen_k", "window_left",
        "window_right",
    ]
)  # fmt: skip
def _flash_forward_kernel(
    Q,
    K,
    V,
    KDescriptor,
    VDescriptor,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_k,
    block_table,
    sinks,
    Bias,
    alibi_slopes,
    dropout_seed,
    Out,
    Lse,
    stride_q_b,
    stride_q_m,
    stride_q_h,
    stride_k_b,
    stride_k_n,
    stride_k_h,
    stride_v_b,
    stride_v_n,
    stride_v_h,
    stride_o_b,
    stride_o_m,
    stride_o_h,
    stride_lse_b,
    stride_lse_h,
    stride_table,
    num_sections,
    stride_bias_b,
    stride_bias_h,
    stride_bias_m,
    stride_bias_n,
    stride_alibi_b,
    max_seqlen_q,
    max_seqlen_k,
    scale_log2,
    tanh_scale,
    window_left,
    window_right,
    dropout_threshold,
    keep_scale,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    PACKED_Q: tl.constexpr,
    PACKED_K: tl.constexpr,
    HAS_CU_K: tl.constexpr,
    HAS_SEQUSED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINK: tl.constexpr,
    BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """O = dropout(softmax(S)) V and lse = m + ln l, with S = scale * Q K^T + bias, per tile of BLOCK_M query rows.

    FlashAttention-2 (Dao 2023), algorithm 1: m and l are rescaled tile by tile, nothing of size Sq x Sk is stored.
    Q (B, Sq, Hq, D) or packed (Tq, Hq, D); K, V (B, Sk, Hkv, D | Dv), packed, or blocks (num_blocks, PAGE_SIZE, Hkv,
    D | Dv); Out as Q; Lse fp32 (B, Hq, Sq) or (Hq, Tq). Query i stands at key position i + Sk - Sq. Grid
    (Hq / num_sections, tiles of max_seqlen_q, B * num_sections): the heads of a section run side by side and share K/V
    in L2; the longest rows of a causal mask start first. Keys are visited in up to three runs, so that only tiles cut
    by a mask's edge pay for masking.
    """
    head = tl.program_id(2) % num_sections * tl.num_programs(0) + tl.program_id(0)
    tile_m = tl.num_programs(1) - 1 - tl.program_id(1)
    row = (tl.program_id(2) // num_sections).to(tl.int64)
    head_k = (head // GROUP).to(tl.int64)

    if PACKED_Q:
        first_q = tl.load(cu_seqlens_q + row).to(tl.int64)
        seqlen_q = (tl.load(cu_seqlens_q + row + 1) - first_q).to(tl.int32)
        q_row = first_q * stride_q_m
        o_row = first_q * stride_o_m
        lse_row = first_q
    else:
        seqlen_q = max_seqlen_q
        q_row = row * stride_q_b
        o_row = row * stride_o_b
        lse_row = row * stride_lse_b
    start_m = tile_m * BLOCK_M
    if start_m >= seqlen_q:
        return

    if HAS_CU_K:
        first_k = tl.load(cu_seqlens_k + row).to(tl.int64)
        seqlen_k = (tl.load(cu_seqlens_k + row + 1) - first_k).to(tl.int32)
    else:
        first_k = tl.cast(0, tl.int64)
        seqlen_k = max_seqlen_k
    if HAS_SEQUSED:
        used = tl.maximum(tl.load(seqused_k + row), 0)
        seqlen_k = used if PAGE_SIZE > 0 else tl.minimum(used, seqlen_k)
    if PAGE_SIZE > 0:
        # what lies behind a table is no block
        seqlen_k = tl.minimum(seqlen_k, max_seqlen_k)
        k_row = head_k * stride_k_h
        v_row = head_k * stride_v_h
    elif PACKED_K:
        k_row = first_k * stride_k_n + head_k * stride_k_h
        v_row = first_k * stride_v_n + head_k * stride_v_h
    else:
        k_row = row * stride_k_b + head_k * stride_k_h
        v_row = row * stride_v_b + head_k * stride_v_h
    block_table_row = 0
    if PAGE_SIZE > 0:
        block_table_row = block_table + row * stride_table

    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    row_mask = offs_m < seqlen_q
    q_base = Q + q_row + head.to(tl.int64) * stride_q_h
    q_pointers = q_base + offs_m.to(tl.int64)[:, None] * stride_q_m + offs_d[None, :]
    q = tl.load(q_pointers, mask=row_mask[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)

    shift = seqlen_k - seqlen_q
    last_m = tl.minimum(start_m + BLOCK_M, seqlen_q) - 1
    begin, full_begin, full_end, end = visible_runs(
        start_m + shift, last_m + shift, seqlen_k, window_left, window_right, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    first_key = 0
    if HAS_LEFT:
        first_key = tl.maximum(start_m + shift - window_left, 0)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    k_base = K + k_row
    v_base = V + v_row
    descriptor_row = row.to(tl.int32)
    descriptor_n = 0
    if PACKED_K:
        descriptor_row = 0
        descriptor_n = first_k.to(tl.int32)
    # past a row's values a descriptor reads the next row's, or some that were never written, and 0 * NaN is NaN
    V_DESCRIPTOR_AT_END: tl.constexpr = DESCRIPTORS and not PACKED_K and not HAS_SEQUSED
    q_pos = offs_m + shift
    row32 = row.to(tl.int32)
    bias_base = Bias + row * stride_bias_b + head.to(tl.int64) * stride_bias_h if BIAS > 0 else Q
    alibi_slope = tl.load(alibi_slopes + row * stride_alibi_b + head) if HAS_ALIBI else 0.0
    seed = tl.load(dropout_seed) if HAS_DROPOUT else 0
    if HAS_LEFT:
        acc, m_i, l_i = _attend(
            acc, m_i, l_i, q, k_base, v_base, KDescriptor, VDescriptor, descriptor_row, descriptor_n, head // GROUP,
            block_table_row, begin, full_begin, first_key, q_pos, seqlen_k, window_left, window_right, scale_log2,
            tanh_scale, stride_k_b, stride_k_n, stride_v_b, stride_v_n, seqlen_q, bias_base, stride_bias_m,
            stride_bias_n, alibi_slope, seed, dropout_threshold, keep_scale, head, row32,
            HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV, BLOCK_N,
            PAGE_SIZE, DESCRIPTORS, V_DESCRIPTOR_AT_END, True,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, BIAS, HAS_ALIBI, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
    acc, m_i, l_i = _attend(
        acc, m_i, l_i, q, k_base, v_base, KDescriptor, VDescriptor, descriptor_row, descriptor_n, head // GROUP,
        block_table_row, full_begin, full_end, first_key, q_pos, seqlen_k, window_left, window_right, scale_log2,
        tanh_scale, stride_k_b, stride_k_n, stride_v_b, stride_v_n, seqlen_q, bias_base, stride_bias_m,
        stride_bias_n, alibi_slope, seed, dropout_threshold, keep_scale, head, row32,
        HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV, BLOCK_N,
        PAGE_SIZE, DESCRIPTORS, DESCRIPTORS, False,
        HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, BIAS, HAS_ALIBI, HAS_DROPOUT, PRECISION,
    )  # fmt: skip
    acc, m_i, l_i = _attend(
        acc, m_i, l_i, q, k_base, v_base, KDescriptor, VDescriptor, descriptor_row, descriptor_n, head // GROUP,
        block_table_row, full_end, end, first_key, q_pos, seqlen_k, window_left, window_right, scale_log2,
        tanh_scale, stride_k_b, stride_k_n, stride_v_b, stride_v_n, seqlen_q, bias_base, stride_bias_m,
        stride_bias_n, alibi_slope, seed, dropout_threshold, keep_scale, head, row32,
        HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV, BLOCK_N,
        PAGE_SIZE, DESCRIPTORS, V_DESCRIPTOR_AT_END, True,
        HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, BIAS, HAS_ALIBI, HAS_DROPOUT, PRECISION,
    )  # fmt: skip

    sink = m_i
    if HAS_SINK:
        sink = tl.full([BLOCK_M], 0.0, tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2_E
    out, lse = finish_softmax(acc, m_i, l_i, sink, HAS_SINK)
    o_base = Out + o_row + head.to(tl.int64) * stride_o_h
    o_pointers = o_base + offs_m.to(tl.int64)[:, None] * stride_o_m + offs_dv[None, :]
    tl.store(o_pointers, out.to(Out.dtype.element_ty), mask=row_mask[:, None] & (offs_dv < V_HEAD_DIM)[None, :])
    tl.store(Lse + lse_row + head.to(tl.int64) * stride_lse_h + offs_m, lse, mask=row_mask)


def score_scales(q: torch.Tensor, softmax_scale: float, softcap: float) -> tuple[torch.Tensor, float, float]:
    """The queries, `scale_log2` > 0 of `online_softmax_update` and `tanh_scale` of `attention_scores`."""
    if softcap > 0:
        return q, softcap * LOG2_E.value, 2.0 * LOG2_E.value * softmax_scale / softcap
    if softmax_scale > 0:
        return q, softmax_scale * LOG2_E.value, 0.0
    # the running maximum is taken before the scale
    return (-q, -softmax_scale * LOG2_E.value, 0.0) if softmax_scale < 0 else (torch.zeros_like(q), LOG2_E.value, 0.0)


def dot_precision(dtype: torch.dtype) -> str:
    """IEEE products for fp32 unless torch was told that TF32 will do; 16-bit inputs ignore it."""
    # torch.get_float32_matmul_precision() raises once the newer setting has been set, as TrainingArguments do
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def last_dim_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _descriptor(x: torch.Tensor, block_n: int, block_d: int) -> TensorDescriptor | None:
    """Keys or values (B, S, H, D), or packed (T, H, D), for loads by the GPU's copy engine, or None if it cannot."""
    x = x[None] if x.dim() == 3 else x
    sizes, strides = list(x.shape), list(x.stride())
    for dim in range(3):
        if sizes[dim] == 1:  # torch keeps any stride there
            strides[dim] = strides[2] if dim < 2 else sizes[3]
    if x.data_ptr() % 16 or min(sizes) == 0 or any(n <= 0 or n * x.element_size() % 16 for n in strides[:3]):
        return None
    return TensorDescriptor(x, sizes, strides, [1, block_n, 1, block_d])


def flash_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches `_flash_forward_kernel`, or Hopper's own kernel where there is one for the call.

    Arguments and results as in `hf_paged_flash.ops.reference.flash_forward`.
    """
    if hopper.unavailable(q.device) is None and hopper.supports(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k, block_table=block_table,
        causal=causal, window_left=window_left, window_right=window_right, softcap=softcap, s_aux=s_aux, bias=bias,
        alibi_slopes=alibi_slopes, dropout_p=dropout_p,
    ):  # fmt: skip
        from .hopper.flash_forward import flash_forward as hopper_flash_forward

        return hopper_flash_forward(
            q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k, softmax_scale=softmax_scale, causal=causal,
        )  # fmt: skip
    packed_q = cu_seqlens_q is not None
    packed_k = k.dim() == 3
    q, k, v = last_dim_contiguous(q), last_dim_contiguous(k), last_dim_contiguous(v)
    num_heads, head_dim = q.shape[-2:]
    num_kv_heads, v_head_dim = v.shape[-2:]
    batch = cu_seqlens_q.numel() - 1 if packed_q else q.shape[0]
    if packed_q:
        out = q.new_empty(q.shape[0], num_heads, v_head_dim)
        lse = q.new_empty(num_heads, q.shape[0], dtype=torch.float32)
        lse_strides = (0, lse.stride(0))
    else:
        max_seqlen_q = q.shape[1]
        out = q.new_empty(batch, max_seqlen_q, num_heads, v_head_dim)
        lse = q.new_empty(batch, num_heads, max_seqlen_q, dtype=torch.float32)
        lse_strides = (lse.stride(0), lse.stride(1))
    room = max_seqlen_k  # keys that a row has, or that its blocks can hold
    if not packed_k:
        room = k.shape[1] * (1 if block_table is None else block_table.shape[1])
        max_seqlen_k = room if block_table is None else max_seqlen_k
    if out.numel() == 0:
        return out, lse
    if causal:
        window_right = 0

    block_d = max(16, triton.next_power_of_2(head_dim))
    block_dv = max(16, triton.next_power_of_2(v_head_dim))
    page_size = 0 if block_table is None else k.shape[1]
    device = configs.device_of(q)
    modified = bias is not None or alibi_slopes is not None or dropout_p > 0.0
    tile = configs.forward_tile(block_d, block_dv, page_size, q.dtype, device, modified)
    q, scale_log2, tanh_scale = score_scales(q, softmax_scale, softcap)
    kv_bytes = max_seqlen_k * (head_dim + v_head_dim) * k.element_size()
    sections = configs.head_sections(num_kv_heads, kv_bytes, device)
    if batch * sections > MAX_ROWS:
        sections = 1
    grid = (num_heads // sections, triton.cdiv(max_seqlen_q, tile.block_m), batch * sections)
    k_descriptor = v_descriptor = None
    if block_table is None and configs.has_descriptors(q.dtype, device):
        k_descriptor = _descriptor(k, tile.block_n, block_d)
        v_descriptor = _descriptor(v, tile.block_n, block_dv)
    with torch.cuda.device_of(q):
        _flash_forward_kernel[grid](
            Q=q,
            K=k,
            V=v,
            KDescriptor=k_descriptor,
            VDescriptor=v_descriptor,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            seqused_k=seqused_k,
            block_table=block_table,
            sinks=s_aux,
            Out=out,
            Lse=lse,
            stride_q_b=0 if packed_q else q.stride(0),
            stride_q_m=q.stride(-3),
            stride_q_h=q.stride(-2),
            stride_k_b=0 if packed_k else k.stride(0),
            stride_k_n=k.stride(-3),
            stride_k_h=k.stride(-2),
            stride_v_b=0 if packed_k else v.stride(0),
            stride_v_n=v.stride(-3),
            stride_v_h=v.stride(-2),
            stride_o_b=0 if packed_q else out.stride(0),
            stride_o_m=out.stride(-3),
            stride_o_h=out.stride(-2),
            stride_lse_b=lse_strides[0],
            stride_lse_h=lse_strides[1],
            stride_table=0 if block_table is None else block_table.stride(0),
            num_sections=sections,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=room,
            scale_log2=scale_log2,
            tanh_scale=tanh_scale,
            window_left=window_left,
            window_right=window_right,
            GROUP=num_heads // num_kv_heads,
            HEAD_DIM=head_dim,
            V_HEAD_DIM=v_head_dim,
            PACKED_Q=packed_q,
            PACKED_K=packed_k,
            HAS_CU_K=cu_seqlens_k is not None,
            HAS_SEQUSED=seqused_k is not None,
            HAS_LEFT=window_left >= 0,
            HAS_RIGHT=window_right >= 0,
            HAS_SOFTCAP=softcap > 0,
            HAS_SINK=s_aux is not None,
            PRECISION=dot_precision(q.dtype),
            PAGE_SIZE=page_size,
            DESCRIPTORS=k_descriptor is not None and v_descriptor is not None,
            BLOCK_D=block_d,
            BLOCK_DV=block_dv,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **modifier_arguments(bias, alibi_slopes, dropout_p, dropout_seed),
        )
    return out, lse
