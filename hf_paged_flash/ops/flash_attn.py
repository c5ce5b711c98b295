"""FlashAttention's public functions: names, argument order and semantics of Dao-AILab/flash-attention 2.8.

Added, keyword-only: `s_aux`, attention sinks, on all three, and `seqused_k` on the varlen function (flash-attn 3 has
both). Head dimensions of values and keys may differ. What is not built is refused by name.

Causal masks and windows are aligned to the bottom right: query i of a row with Sq queries and Sk keys stands at key
position i + Sk - Sq. With causal=True (1 = visible):

    Sq 2, Sk 5:  1 1 1 1 0        Sq 5, Sk 2:  0 0
                 1 1 1 1 1                     0 0
                                               0 0
                                               1 0
                                               1 1

A query that sees no key gets output 0, lse -inf and gradients 0.

`flash_attn_func` and `flash_attn_varlen_func` are differentiable in q, k, v and s_aux over keys that are not paged,
through out and, with `return_attn_probs`, through lse.
"""

from __future__ import annotations

import torch

from hf_paged_flash.errors import UnsupportedFeatureError
from hf_paged_flash.ops import library
from hf_paged_flash.ops import validation as check
from hf_paged_flash.ops.dropout import draw_seed

# Up to here a row's new tokens count as decoding: split over the keys, not over the queries.
MAX_DECODE_QUERIES = 16


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """Attention over a dense batch; matches `flash_attn.flash_attn_func`.

    Args:
        q: (B, Sq, Hq, D), bf16, fp16 or fp32 (fp64 with the reference backend).
        k, v: (B, Sk, Hkv, D | Dv), Hq a multiple of Hkv, dtype and device of q.
        dropout_p: share of the probabilities that are dropped, drawn from torch's generator of q's device.
        softmax_scale: factor on Q K^T; None = 1 / sqrt(D).
        causal: no query sees a key after its own position; see the module's docstring.
        window_size: (left, right), keys [position - left, position + right] are visible; -1 = unbounded.
        softcap: if > 0, scores become softcap * tanh(score / softcap).
        alibi_slopes: (Hq,) or (B, Hq) fp32, slope * |position - key| is subtracted from the scores; gets no gradient.
        deterministic: gradients that are the same, bit for bit, in every run; also where
            `torch.use_deterministic_algorithms(True)` is in force. The portable kernels and the reference are so
            always. Without it, a kernel for Hopper may sum dQ by atomic adds in fp32, whose order varies.
        return_attn_probs: also return lse.
        s_aux: (Hq,), a logit a head that takes part in the softmax's denominator only.

    Returns:
        out (B, Sq, Hq, Dv) in q's dtype, or (out, lse, None) with lse (B, Hq, Sq) fp32, natural log.

    Raises:
        ArgumentError: an argument has the wrong shape, dtype, device or value.
        UnsupportedFeatureError: autograd records the call and has no way back: head_dim above 256 with the kernels,
            paged keys, slopes that require grad.
    """
    check.check_dropout("dropout_p", dropout_p)
    check.check_qkv(q, k, v, check.DENSE_Q, check.DENSE_K)
    check.check_batch("k", k, q.shape[0])
    check.check_backward(q, k, v, s_aux, None)
    window_left, window_right = check.check_options(q, window_size, softcap, s_aux)
    out, lse = library.flash_attention(
        q,
        k,
        v,
        max_seqlen_q=q.shape[1],
        max_seqlen_k=k.shape[1],
        softmax_scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        s_aux=s_aux,
        alibi_slopes=check.check_alibi_slopes(alibi_slopes, q, q.shape[0]),
        dropout_p=dropout_p,
        deterministic=deterministic,
        dropout_seed=draw_seed(q.device) if dropout_p > 0.0 else None,
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    *,
    seqused_k: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """Attention over rows of different lengths, packed without padding; matches `flash_attn.flash_attn_varlen_func`.

    Args:
        q: (Tq, Hq, D), the rows one after another.
        k, v: (Tk, Hkv, D | Dv), or paged (num_blocks, block_size, Hkv, D | Dv) with `block_table`.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, where each row begins, and the end. `cu_seqlens_k` may be None if
            `block_table` and `seqused_k` are given.
        max_seqlen_q, max_seqlen_k: upper bounds of the rows' lengths.
        block_table: (B, max_blocks) int32, each row's blocks; -1 = none.
        seqused_k: (B,) int32, how many of each row's keys are used; None = all.
        The rest as in `flash_attn_func`.

    Returns:
        out (Tq, Hq, Dv) in q's dtype, or (out, lse, None) with lse (Hq, Tq) fp32, natural log.

    Raises:
        ArgumentError, UnsupportedFeatureError: as `flash_attn_func`.
    """
    check.check_dropout("dropout_p", dropout_p)
    check.check_backward(q, k, v, s_aux, block_table)
    check.check_qkv(q, k, v, check.PACKED_Q, check.PACKED_K if block_table is None else check.PAGED_K)
    cu_seqlens_q = check.check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q)
    batch = cu_seqlens_q.shape[0] - 1
    if block_table is not None:
        block_table = check.check_block_table(block_table, q, batch)
    if cu_seqlens_k is not None:
        cu_seqlens_k = check.check_lengths("cu_seqlens_k", cu_seqlens_k, q, batch + 1, "(batch + 1,)")
    elif block_table is None or seqused_k is None:
        check.fail("cu_seqlens_k", "be given unless both `block_table` and `seqused_k` are", None)
    if seqused_k is not None:
        seqused_k = check.check_lengths("seqused_k", seqused_k, q, batch, "(batch,)")
    check.check_rows("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    if block_table is None:
        check.check_rows("k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    window_left, window_right = check.check_options(q, window_size, softcap, s_aux)
    out, lse = library.flash_attention(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        block_table=block_table,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        s_aux=s_aux,
        alibi_slopes=check.check_alibi_slopes(alibi_slopes, q, batch),
        dropout_p=dropout_p,
        deterministic=deterministic,
        dropout_seed=draw_seed(q.device) if dropout_p > 0.0 else None,
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of new tokens over a K/V cache, appending k and v to it first; matches `flash_attn`'s namesake.

    Args:
        q: (B, Sq, Hq, D).
        k_cache, v_cache: dense (B, Smax, Hkv, D | Dv), or paged (num_blocks, block_size, Hkv, D | Dv) with
            `block_table`; the last dimension is contiguous. With the kernels, block_size is 16, 32, 64, 128 or 256.
        k, v: (B, Snew, Hkv, D | Dv), written into the cache in place from position `cache_seqlens` on. The cache, and
            the blocks in `block_table`, must have room: tokens beyond it are not stored, which raises only where it
            shows without a device sync (CPU tensors, an int `cache_seqlens`).
        cache_seqlens: int or (B,) int32, tokens in the cache before k and v; None = the cache is full. A negative
            length marks a row without a sequence: nothing is stored and its output is 0.
        block_table: (B, max_blocks) int32, each row's blocks; -1 = none.
        num_splits: in how many parts the keys of a row are processed; 0 = chosen.
        return_softmax_lse: also return lse.
        rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, alibi_slopes: must be None; `rotary_interleaved` is
            then moot.
        The rest as in `flash_attn_func`.

    Returns:
        out (B, Sq, Hq, Dv) in q's dtype, or (out, lse) with lse (B, Hq, Sq) fp32, natural log.

    Raises:
        ArgumentError: an argument has the wrong shape, dtype, device or value, or the cache has no room.
        UnsupportedFeatureError: a feature above that must be None, or an input that requires grad in grad mode.
    """
    _refuse_cache_features(rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, alibi_slopes)
    check.refuse_gradients(check.NO_PAGED_BACKWARD, q, k_cache, v_cache, k, v, s_aux)
    check.check_qkv(q, k_cache, v_cache, check.DENSE_Q, check.PAGED_K if block_table is not None else check.DENSE_K,
                    "k_cache", "v_cache")  # fmt: skip
    check.check_cache_strides("k_cache", k_cache)
    check.check_cache_strides("v_cache", v_cache)
    batch, seqlen_q = q.shape[:2]
    room = k_cache.shape[1]
    if block_table is None:
        check.check_batch("k_cache", k_cache, batch)
    else:
        block_table = check.check_block_table(block_table, q, batch)
        room *= block_table.shape[1]
    window_left, window_right = check.check_options(q, window_size, softcap, s_aux)
    seqlens = _lengths(cache_seqlens, q, room)
    if k is not None or v is not None:
        check.check_new_kv(k, v, k_cache, v_cache, batch)
        if cache_seqlens is None:
            check.fail("cache_seqlens", "be given when `k` and `v` are appended", None)
        seqlens = _append(k, v, k_cache, v_cache, cache_seqlens, seqlens, block_table, room)
    options = {
        "softmax_scale": q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        "causal": causal,
        "window_left": window_left,
        "window_right": window_right,
        "softcap": softcap,
        "s_aux": s_aux,
    }
    if seqlen_q <= MAX_DECODE_QUERIES:
        out, lse = library.paged_decode(
            q, k_cache, v_cache, cache_seqlens=seqlens, block_table=block_table, num_splits=num_splits, **options
        )
    else:
        out, lse = library.flash_attention(
            q, k_cache, v_cache, seqused_k=seqlens, block_table=block_table, max_seqlen_q=seqlen_q, max_seqlen_k=room,
            **options,
        )  # fmt: skip
    return (out, lse) if return_softmax_lse else out


def _refuse_cache_features(rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad, alibi_slopes) -> None:
    if rotary_cos is not None or rotary_sin is not None:
        name = "rotary_cos" if rotary_cos is not None else "rotary_sin"
        raise UnsupportedFeatureError(f"`{name}` is not supported: rotate q and k before the call")
    if cache_batch_idx is not None:
        raise UnsupportedFeatureError(
            "`cache_batch_idx` is not supported: pass a `block_table`, which names each row's blocks"
        )
    if cache_leftpad is not None:
        raise UnsupportedFeatureError(
            "`cache_leftpad` is not supported: store each row's real tokens only, from position 0 on"
        )
    if alibi_slopes is not None:
        raise UnsupportedFeatureError(
            "`alibi_slopes` is not supported: over a cache, use the 'eager' attention for ALiBi models"
        )


def _lengths(cache_seqlens: int | torch.Tensor | None, q: torch.Tensor, room: int) -> torch.Tensor:
    """(B,) int32 beside q."""
    if isinstance(cache_seqlens, torch.Tensor):
        seqlens = check.check_lengths("cache_seqlens", cache_seqlens, q, q.shape[0], "(batch,)")
        is_seen = seqlens.device.type == "cpu" and type(seqlens) is torch.Tensor  # without waiting for a GPU
        if is_seen and not torch.compiler.is_compiling() and bool((seqlens > room).any()):
            check.fail("cache_seqlens", f"be at most {room}, the tokens that the cache has room for", seqlens.tolist())
        return seqlens
    length = room if cache_seqlens is None else cache_seqlens
    if not 0 <= length <= room:
        check.fail("cache_seqlens", f"be from 0 to {room}, the tokens that the cache has room for", length)
    return torch.full((q.shape[0],), length, dtype=torch.int32, device=q.device)


def _append(k, v, k_cache, v_cache, cache_seqlens, seqlens, block_table, room: int) -> torch.Tensor:
    """Stores k, v (B, Snew, Hkv, ·) from positions `seqlens` on; returns the rows' new lengths (B,) int32."""
    seqlen_new = k.shape[1]
    if not isinstance(cache_seqlens, torch.Tensor) and cache_seqlens + seqlen_new > room:
        check.fail("cache_seqlens", f"leave room for {seqlen_new} new tokens in a cache of {room}", cache_seqlens)
    position = seqlens[:, None] + torch.arange(seqlen_new, device=k.device)
    block_size = k_cache.shape[1]
    if block_table is None:
        # A dense cache is one with a block of Smax tokens a row.
        block = torch.arange(k.shape[0], device=k.device)[:, None]
    else:
        column = (position // block_size).clamp(0, block_table.shape[1] - 1)
        block = block_table.gather(1, column.long()).long()
    slot = block * block_size + position % block_size
    active = seqlens[:, None] >= 0
    slot = torch.where(active & (position < room) & (block >= 0), slot, -1)
    if slot.device.type == "cpu" and not torch.compiler.is_compiling() and bool(((slot < 0) & active).any()):
        name, must = ("block_table", "name a block") if block_table is not None else ("k_cache", "have room")
        check.fail(name, f"{must} for {seqlen_new} new tokens of every row", f"cache_seqlens {seqlens.tolist()}")
    library.store_kv(k, v, k_cache, v_cache, slot.flatten())
    return torch.where(active[:, 0], seqlens + seqlen_new, 0)
