"""Attention, paged decode and the K/V store in plain torch: the oracle of the kernels' tests and the CPU path.

O = dropout(softmax(mask(cap(scale * Q K^T) + bias))) V, computed in fp32 (fp64 for fp64 inputs), in chunks of queries,
so that no S x S tensor exists for long inputs. The functions have the keyword signatures of the kernels' launchers.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from hf_paged_flash.ops.layouts import Keys, gather, key_rows, row_index
from hf_paged_flash.ops.scoring import Rows, Scoring, chunks, keep_scale

# Ragged rows are padded into one batch below this many score elements, whatever the padding costs.
_SMALL_BATCH_ELEMENTS = 1 << 20


@torch.no_grad()
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
    """Attention over dense, packed or paged keys: flash-attn 2's semantics, with sinks and flash-attn 3's `seqused_k`.

    Query i of a row with Sq queries and Sk keys sits at position i + Sk - Sq. It sees key j if j < Sk and, unless
    unbounded (-1), position - window_left <= j <= position + window_right; `causal` means window_right = 0.

    Args:
        q: dense (B, Sq, Hq, D) or, with `cu_seqlens_q`, packed (Tq, Hq, D).
        k, v: dense (B, Sk, Hkv, D | Dv); packed (Tk, Hkv, D | Dv) with `cu_seqlens_k`; or paged
            (num_blocks, block_size, Hkv, D | Dv) with `block_table`. Hq is a multiple of Hkv.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, where each packed row begins, and the end.
        seqused_k: (B,) int32, keys of each row that are used; below 0 counts as 0. Paged keys take their lengths from
            here, or from the differences of `cu_seqlens_k`.
        block_table: (B, max_blocks) int32; -1 = no block there, its keys are invisible.
        max_seqlen_q, max_seqlen_k: upper bounds; the launcher needs them, the reference does not.
        softmax_scale: factor on Q K^T.
        softcap: if > 0, scores become softcap * tanh(score / softcap), before masking.
        s_aux: (Hq,), one logit a head that takes part in the softmax's denominator only.
        bias: (B | 1, Hq | 1, Sq | 1, Sk | 1), added to the scores after the softcap, or bool, False where a key is
            hidden; indices count inside each row, Sq and Sk are at least the longest row's.
        alibi_slopes: (B | 1, Hq) fp32, slope * |position - j| is subtracted from the scores.
        dropout_p: share of the probabilities that are dropped, the others grow by 1 / (1 - dropout_p); lse is the
            softmax's without dropout.
        dropout_seed: (1,) int64, which ones; see `hf_paged_flash.ops.dropout`.

    Returns:
        out in q's layout with Dv, in q's dtype; lse, natural log, fp32 (fp64 for fp64 inputs), (B, Hq, Sq) or packed
        (Hq, Tq). A query that sees no key gives out 0 and lse -inf, with a sink too.
    """
    rows = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    keys = key_rows(k, v, rows, cu_seqlens_k, seqused_k, block_table)
    window_right = 0 if causal else window_right
    scoring = Scoring(
        softmax_scale, window_left, window_right, softcap, s_aux, bias, alibi_slopes, dropout_p, dropout_seed
    )
    compute_dtype = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    if cu_seqlens_q is None:
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=compute_dtype)
    else:
        lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=compute_dtype)
    with without_autocast(q):
        if cu_seqlens_q is None:
            _dense_queries(q, keys, scoring, out, lse)
        else:
            _packed_queries(q, cu_seqlens_q.tolist(), keys, scoring, out, lse)
    return out, lse


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
    """`flash_forward` of a few new tokens a row over a K/V cache.

    Args:
        q: (B, Sq, Hq, D).
        k_cache, v_cache: paged (num_blocks, block_size, Hkv, D | Dv) with `block_table` (B, max_blocks) int32, or
            dense (B, Smax, Hkv, D | Dv).
        cache_seqlens: (B,) int32, tokens in the cache, the Sq new ones included; below 0 counts as 0.
        num_splits: how the kernel divides the keys; the reference does not.
        The rest as in `flash_forward`.

    Returns:
        out (B, Sq, Hq, Dv) in q's dtype; lse (B, Hq, Sq).
    """
    return flash_forward(
        q,
        k_cache,
        v_cache,
        seqused_k=cache_seqlens,
        block_table=block_table,
        max_seqlen_q=q.shape[1],
        max_seqlen_k=k_cache.shape[1] * (1 if block_table is None else block_table.shape[1]),
        softmax_scale=softmax_scale,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        s_aux=s_aux,
    )


@torch.no_grad()
def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write new keys and values into their slots of the paged cache, in place.

    Args:
        k, v: (B, S, Hkv, D | Dv) or (T, Hkv, D | Dv), any strides.
        k_cache, v_cache: (num_blocks, block_size, Hkv, D | Dv), any strides, the dtype of k and v.
        slot_mapping: (B * S,) int64, block * block_size + offset of each token; -1 = don't store it.
    """
    k = k.reshape(-1, *k.shape[-2:])
    v = v.reshape(-1, *v.shape[-2:])
    stored = slot_mapping >= 0
    if not bool(stored.all()):
        k, v, slot_mapping = k[stored], v[stored], slot_mapping[stored]
    block_size = k_cache.shape[1]
    slots = (slot_mapping // block_size, slot_mapping % block_size)
    k_cache[slots] = k
    v_cache[slots] = v


@torch.no_grad()
def copy_blocks(caches: list[torch.Tensor], copies: torch.Tensor) -> None:
    """Copy whole blocks within each of several caches, in place.

    Args:
        caches: (num_blocks, ...) of any shapes and dtypes, on one device; blocks are contiguous, of 8-byte words.
        copies: (n, 2) int64, block `copies[i, 0]` to block `copies[i, 1]`; no block is both source and target.
    """
    source, target = copies.unbind(1)
    for cache in caches:
        cache[target] = cache[source]


def without_autocast(tensor):
    # Autocast would take the matmuls of this file to bf16.
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _one_batch(q_lengths: list[int], k_lengths: list[int], heads: int) -> bool:
    """Whether rows are padded into one batch: they are equal, few, or padding at most doubles the work."""
    padded = len(q_lengths) * max(q_lengths, default=0) * max(k_lengths, default=0)
    exact = sum(m * n for m, n in zip(q_lengths, k_lengths, strict=True))
    return padded <= 2 * exact or padded * heads <= _SMALL_BATCH_ELEMENTS


def _dense_queries(q, keys: Keys, scoring: Scoring, out, lse) -> None:
    rows, seqlen_q = q.shape[:2]
    q_lengths = [seqlen_q] * rows
    step = max(rows, 1) if _one_batch(q_lengths, keys.lengths, q.shape[2]) else 1
    for b in range(0, rows, step):
        picked = slice(b, b + step)
        _attend_rows(q[picked], keys, picked, q_lengths[picked], scoring, out[picked], lse[picked])


def _packed_queries(q, bounds: list[int], keys: Keys, scoring: Scoring, out, lse) -> None:
    starts = bounds[:-1]
    lengths = [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
    if not lengths or max(lengths) == 0:
        return
    if len(lengths) == 1 or not _one_batch(lengths, keys.lengths, q.shape[1]):
        for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            row = slice(start, start + length)
            _attend_rows(q[None, row], keys, slice(b, b + 1), [length], scoring, out[None, row], lse[None, :, row])
        return
    index, real = row_index(starts, lengths, q.shape[0], q.device)
    padded_q = q[index]
    padded_out = padded_q.new_zeros((*padded_q.shape[:-1], out.shape[-1]))
    padded_lse = lse.new_full((len(lengths), q.shape[1], index.shape[1]), float("-inf"))
    _attend_rows(padded_q, keys, slice(0, len(lengths)), lengths, scoring, padded_out, padded_lse)
    out[index[real]] = padded_out[real]
    lse[:, index[real]] = padded_lse.transpose(0, 1)[:, real]


def _attend_rows(q, keys: Keys, batch: slice, q_lengths: list[int], scoring: Scoring, out, lse) -> None:
    """Attention of the rows `batch`: q (R, Sq, Hq, D), out (R, Sq, Hq, Dv), lse (R, Hq, Sq), each a view or padded."""
    lengths = keys.lengths[batch]
    if not q.numel() or max(lengths) == 0:
        return
    offsets = [length - seqlen_q for length, seqlen_q in zip(lengths, q_lengths, strict=True)]
    first = max(0, min(offsets) - scoring.window_left) if scoring.window_left >= 0 else 0
    k, v, valid, first = gather(keys, batch, lengths, first)
    # (R, Sk, Hkv, D) -> (R, Hkv, Sk, D), contiguous: matmul would otherwise copy them again for every chunk.
    k, v = (x.permute(0, 2, 1, 3).to(lse.dtype).contiguous() for x in (k, v))
    rows = Rows(q, k, v, valid, [offset - first for offset in offsets], batch, first)
    sink = None if scoring.s_aux is None else scoring.s_aux.to(lse.dtype).view(k.shape[1], -1, 1)
    for chunk in chunks(rows, scoring):
        kept = keep_scale(rows, scoring, chunk)
        chunk_out, chunk_lse = _softmax_matmul(chunk.scores, v[:, :, chunk.keys], sink, kept)
        # (R, Hkv, G, C, Dv) -> (R, C, Hq, Dv)
        out[:, chunk.queries] = chunk_out.permute(0, 3, 1, 2, 4).flatten(2, 3)
        lse[:, :, chunk.queries] = chunk_lse.flatten(1, 2)


def _softmax_matmul(scores: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None, kept: torch.Tensor | None):
    """softmax(scores) V and lse; scores (R, Hkv, G, C, K) is overwritten, v (R, Hkv, K, Dv), sink (Hkv, G, 1)."""
    highest = scores.amax(-1)
    sees_none = highest == float("-inf")
    if sink is not None:
        highest = torch.maximum(highest, sink)
    highest = highest.masked_fill(sees_none, 0.0)
    scores.sub_(highest.unsqueeze(-1)).exp_()
    total = scores.sum(-1)
    if sink is not None:
        total = total + torch.exp(sink - highest)
    total = total.masked_fill(sees_none, 1.0)
    if kept is not None:
        scores.mul_(kept)
    out = torch.matmul(scores.flatten(2, 3), v).unflatten(2, scores.shape[2:4])
    lse = (highest + total.log()).masked_fill(sees_none, float("-inf"))
    return out / total.unsqueeze(-1), lse
