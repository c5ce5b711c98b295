"""Decode attention: 1 to 16 query tokens a row over paged (or dense) keys, split over programs, then reduced."""

import torch
import triton
import triton.language as tl

from . import configs
from .flash_forward import dot_precision, last_dim_contiguous, score_scales
from .launches import overlap
from .primitives import (
    LOG2_E,
    attention_scores,
    finish_softmax,
    let_next_start,
    load_tile,
    online_softmax_update,
    tile_blocks,
    tile_pointers,
    visible_keys,
    wait_for_previous,
)


# a length that turns into a multiple of 16 must not compile anew
@triton.jit(do_not_specialize=["stride_table", "max_seqlen_k", "window_left", "window_right"])
def _paged_decode_kernel(
    Q,
    K,
    V,
    cache_seqlens,
    block_table,
    sinks,
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
    stride_table,
    num_heads,
    max_seqlen_k,
    scale_log2,
    tanh_scale,
    window_left,
    window_right,
    SEQLEN_Q: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINK: tl.constexpr,
    PRECISION: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILES_M: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Split `s` of row b and KV head h: O_s = softmax(S_s) V_s and lse_s over its share of the keys.

    Flash-decoding (Dao, Haziza, Massa, Sizov 2023). A KV head's GROUP query heads times SEQLEN_Q tokens are the rows
    of one tile, so that K and V are read once. Q (B, SEQLEN_Q, Hq, D); K, V blocks (num_blocks, PAGE_SIZE, Hkv,
    D | Dv) or dense (B, Smax, Hkv, ·) with PAGE_SIZE 0. Grid (Hkv * TILES_M, B, num_splits), whatever the lengths:
    they are read on the device, an empty split writes lse -inf. With one split Out (B, SEQLEN_Q, Hq, Dv) and Lse
    (B, Hq, SEQLEN_Q) are final, else fp32 partials (B, Hq, SEQLEN_Q, num_splits, Dv) and (…, num_splits), natural log.
    """
    let_next_start(PDL)
    wait_for_previous(PDL)
    head_k = tl.program_id(0) // TILES_M
    tile_m = tl.program_id(0) % TILES_M
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    num_splits = tl.num_programs(2)
    seqlen_k = tl.minimum(tl.maximum(tl.load(cache_seqlens + row), 0), max_seqlen_k)

    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    query = offs_m // GROUP
    head = head_k * GROUP + offs_m % GROUP
    row_mask = query < SEQLEN_Q
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    q_pos = query + seqlen_k - SEQLEN_Q

    first_key = 0
    end = seqlen_k
    if HAS_LEFT:
        first_key = tl.maximum(seqlen_k - SEQLEN_Q - window_left, 0)
    first_tile = first_key // BLOCK_N
    # the first tile may begin in blocks that the window has left behind, which are no blocks any more
    CHECK_FIRST: tl.constexpr = HAS_LEFT and PAGE_SIZE > 0 and PAGE_SIZE % BLOCK_N != 0
    if HAS_RIGHT:
        end = tl.minimum(seqlen_k, tl.maximum(seqlen_k + window_right, 0))
    last_tile = (end + BLOCK_N - 1) // BLOCK_N
    tiles = (last_tile - first_tile + num_splits - 1) // num_splits
    begin = (first_tile + split * tiles) * BLOCK_N
    end = tl.minimum(end, begin + tiles * BLOCK_N)

    k_base = K + head_k.to(tl.int64) * stride_k_h
    v_base = V + head_k.to(tl.int64) * stride_v_h
    block_table_row = 0
    if PAGE_SIZE > 0:
        block_table_row = block_table + row * stride_table
    else:
        k_base += row * stride_k_b
        v_base += row * stride_v_b
    q_pointers = Q + row * stride_q_b + query[:, None] * stride_q_m + head[:, None] * stride_q_h + offs_d[None, :]
    q = tl.load(q_pointers, mask=row_mask[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    blocks = tile_blocks(block_table_row, begin, offs_n, seqlen_k, BLOCK_N, PAGE_SIZE, first_key, CHECK_FIRST)
    for start_n in range(begin, end, BLOCK_N):
        rest = seqlen_k - start_n
        next_blocks = tile_blocks(block_table_row, start_n + BLOCK_N, offs_n, seqlen_k, BLOCK_N, PAGE_SIZE)
        k_pointers = tile_pointers(k_base, blocks, start_n, offs_n, offs_d, stride_k_b, stride_k_n, BLOCK_N, PAGE_SIZE)
        v_pointers = tile_pointers(
            v_base, blocks, start_n, offs_n, offs_dv, stride_v_b, stride_v_n, BLOCK_N, PAGE_SIZE
        )
        first_n = first_key - start_n
        k = load_tile(k_pointers, offs_n, offs_d, rest, HEAD_DIM, BLOCK_D, True, first_n, CHECK_FIRST)
        v = load_tile(v_pointers, offs_n, offs_dv, rest, V_HEAD_DIM, BLOCK_DV, True, first_n, CHECK_FIRST)
        s = attention_scores(q, k, tanh_scale, HAS_SOFTCAP, PRECISION)
        mask = visible_keys(q_pos, start_n + offs_n, seqlen_k, window_left, window_right, HAS_LEFT, HAS_RIGHT)
        s = tl.where(mask, s, float("-inf"))
        p, alpha, m_i, l_i = online_softmax_update(s, scale_log2, m_i, l_i, True)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        blocks = next_blocks

    HAS_FINAL_SINK: tl.constexpr = HAS_SINK and not SPLIT
    sink = m_i
    if HAS_FINAL_SINK:
        sink = tl.load(sinks + head, mask=row_mask, other=0.0).to(tl.float32) * LOG2_E
    out, lse = finish_softmax(acc, m_i, l_i, sink, HAS_FINAL_SINK)
    if SPLIT:
        out_row = ((row * num_heads + head) * SEQLEN_Q + query) * num_splits + split
        lse_row = out_row
    else:
        out_row = (row * SEQLEN_Q + query) * num_heads + head
        lse_row = (row * num_heads + head) * SEQLEN_Q + query
    out_mask = row_mask[:, None] & (offs_dv < V_HEAD_DIM)[None, :]
    tl.store(Out + out_row[:, None] * V_HEAD_DIM + offs_dv[None, :], out.to(Out.dtype.element_ty), mask=out_mask)
    tl.store(Lse + lse_row, lse, mask=row_mask)


@triton.jit(do_not_specialize=["num_splits"])
def _reduce_splits_kernel(
    PartialOut,
    PartialLse,
    sinks,
    Out,
    Lse,
    num_splits,
    V_HEAD_DIM: tl.constexpr,
    HAS_SINK: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """O = sum_s exp(lse_s - lse) O_s with lse = ln sum_s exp(lse_s), a sink added to the sum.

    PartialOut fp32 (B, Hq, SEQLEN_Q, num_splits, Dv), PartialLse (…, num_splits); Out (B, SEQLEN_Q, Hq, Dv), Lse
    (B, Hq, SEQLEN_Q). Grid (Hq, SEQLEN_Q, B). The order of the sum is fixed: results do not vary from run to run.
    """
    let_next_start(PDL)
    wait_for_previous(PDL)
    head, query, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_heads, seqlen_q = tl.num_programs(0), tl.num_programs(1)
    index = (row * num_heads + head) * seqlen_q + query
    offs_dv = tl.arange(0, BLOCK_DV)
    m_i = tl.full([1], float("-inf"), tl.float32)
    l_i = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_DV], tl.float32)
    for start_s in range(0, num_splits, BLOCK_S):
        offs_s = start_s + tl.arange(0, BLOCK_S)
        lse_s = tl.load(PartialLse + index * num_splits + offs_s, mask=offs_s < num_splits, other=float("-inf"))
        mask = (offs_s < num_splits)[:, None] & (offs_dv < V_HEAD_DIM)[None, :]
        pointers = PartialOut + (index * num_splits + offs_s)[:, None] * V_HEAD_DIM + offs_dv[None, :]
        partial = tl.load(pointers, mask=mask, other=0.0)
        # an empty split wrote a partial output of 0, its weight is 0
        weights, alpha, m_i, l_i = online_softmax_update(lse_s[None, :], LOG2_E, m_i, l_i, True)
        acc = acc * alpha[:, None] + tl.sum(partial * tl.trans(weights), 0)[None, :]
    sink = m_i
    if HAS_SINK:
        sink = tl.load(sinks + head + tl.arange(0, 1)).to(tl.float32) * LOG2_E
    out, lse = finish_softmax(acc, m_i, l_i, sink, HAS_SINK)
    out_row = (row * seqlen_q + query) * num_heads + head
    offs_out = out_row * V_HEAD_DIM + offs_dv[None, :]
    tl.store(Out + offs_out, out.to(Out.dtype.element_ty), mask=(offs_dv < V_HEAD_DIM)[None, :])
    tl.store(Lse + index + tl.arange(0, 1), lse)


def paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None = None,
    softmax_scale: float,
    causal: bool,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    s_aux: torch.Tensor | None = None,
    num_splits: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the split and the reduce kernel; arguments and results as `hf_paged_flash.ops.reference.paged_decode`.

    `num_splits` 0 chooses from the SM count and the table's width; no length is read on the host.
    """
    q = last_dim_contiguous(q)
    batch, seqlen_q, num_heads, head_dim = q.shape
    num_kv_heads, v_head_dim = v_cache.shape[-2:]
    group = num_heads // num_kv_heads
    out = q.new_empty(batch, seqlen_q, num_heads, v_head_dim)
    lse = q.new_empty(batch, num_heads, seqlen_q, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    page_size = 0 if block_table is None else k_cache.shape[1]
    max_seqlen_k = k_cache.shape[1] if block_table is None else block_table.shape[1] * page_size
    if causal:
        window_right = 0

    block_d = max(16, triton.next_power_of_2(head_dim))
    block_dv = max(16, triton.next_power_of_2(v_head_dim))
    device = configs.device_of(q)
    rows = seqlen_q * group
    tile, most_splits = configs.decode_plan(batch * num_kv_heads, block_d, block_dv, rows, q.dtype, device)
    tiles_m = triton.cdiv(rows, tile.block_m)
    if num_splits > 0:
        most_splits = num_splits
    else:
        num_splits = max(1, min(most_splits, triton.cdiv(max_seqlen_k, 2 * tile.block_n)))
    split = most_splits > 1  # num_splits grows with the table: one compilation serves every length
    partial_out, partial_lse = out, lse
    if split:
        partial_out = q.new_empty(batch, num_heads, seqlen_q, num_splits, v_head_dim, dtype=torch.float32)
        partial_lse = q.new_empty(batch, num_heads, seqlen_q, num_splits, dtype=torch.float32)
    q, scale_log2, tanh_scale = score_scales(q, softmax_scale, softcap)
    with torch.cuda.device_of(q):
        _paged_decode_kernel[(num_kv_heads * tiles_m, batch, num_splits)](
            Q=q,
            K=k_cache,
            V=v_cache,
            cache_seqlens=cache_seqlens,
            block_table=block_table,
            sinks=s_aux,
            Out=partial_out,
            Lse=partial_lse,
            stride_q_b=q.stride(0),
            stride_q_m=q.stride(1),
            stride_q_h=q.stride(2),
            stride_k_b=k_cache.stride(0),
            stride_k_n=k_cache.stride(1),
            stride_k_h=k_cache.stride(2),
            stride_v_b=v_cache.stride(0),
            stride_v_n=v_cache.stride(1),
            stride_v_h=v_cache.stride(2),
            stride_table=0 if block_table is None else block_table.stride(0),
            num_heads=num_heads,
            max_seqlen_k=max_seqlen_k,
            scale_log2=scale_log2,
            tanh_scale=tanh_scale,
            window_left=window_left,
            window_right=window_right,
            SEQLEN_Q=seqlen_q,
            GROUP=group,
            HEAD_DIM=head_dim,
            V_HEAD_DIM=v_head_dim,
            SPLIT=split,
            HAS_LEFT=window_left >= 0,
            HAS_RIGHT=window_right >= 0,
            HAS_SOFTCAP=softcap > 0,
            HAS_SINK=s_aux is not None,
            PRECISION=dot_precision(q.dtype),
            PAGE_SIZE=page_size,
            TILES_M=tiles_m,
            BLOCK_D=block_d,
            BLOCK_DV=block_dv,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            **overlap(q),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        if split:
            block_s, reduce_warps = configs.reduce_tile(most_splits, block_dv)
            _reduce_splits_kernel[(num_heads, seqlen_q, batch)](
                PartialOut=partial_out,
                PartialLse=partial_lse,
                sinks=s_aux,
                Out=out,
                Lse=lse,
                num_splits=num_splits,
                V_HEAD_DIM=v_head_dim,
                HAS_SINK=s_aux is not None,
                BLOCK_S=block_s,
                BLOCK_DV=block_dv,
                **overlap(q),
                num_warps=reduce_warps,
            )
    return out, lse
