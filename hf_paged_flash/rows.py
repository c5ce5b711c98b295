"""The ways in which rows of queries and keys reach attention: dense, packed, padded, paged, or under a bias."""

from dataclasses import dataclass

import torch

from .cache import PagedTensor
from .errors import ArgumentError
from .masks import as_matrix, masks_nothing
from .ops import library
from .ops.dropout import draw_seed
from .ops.flash_attn import MAX_DECODE_QUERIES
from .ops.validation import fail, has_values
from .packing import Packing, longest, pack, row_offsets, unpack


@dataclass(frozen=True)
class Scoring:
    """What a layer asks of attention, in the ops' terms."""

    softmax_scale: float
    causal: bool
    window_left: int
    window_right: int
    softcap: float
    s_aux: torch.Tensor | None
    dropout_p: float
    deterministic: bool


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring, bias=None) -> torch.Tensor:
    """query (B, Hq, Sq, D), key and value (B, Hkv, Sk, D | Dv), bias (B | 1, Hq | 1, Sq | 1, Sk) or None."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return _attend(query, key, value, scoring, query.shape[1], key.shape[1], bias=bias)


def biased(query, key, value, mask, position_bias, scoring: Scoring) -> torch.Tensor:
    """Dense keys under a bias, or a mask that lengths can't say: a matrix (B | 1, Hq | 1, Sq | 1, Sk)."""
    mask = None if masks_nothing(mask) else mask
    room = key.shape[2]
    columns = room if mask is None or mask.dim() == 4 else mask.shape[1]
    key, value = key[:, :, :columns], value[:, :, :columns]  # a static cache holds more columns than it has filled
    bias = as_matrix(mask)
    if position_bias is not None:
        if position_bias.shape[-1] == room:
            position_bias = position_bias[..., :columns]
        if bias is None:
            bias = position_bias
        elif bias.dtype == torch.bool:
            bias = position_bias.masked_fill(~bias, float("-inf"))
        else:
            bias = position_bias + bias
    sizes = (*query.shape[:3], key.shape[2])
    if bias.dim() != 4 or any(got not in (1, size) for got, size in zip(bias.shape, sizes, strict=True)):
        raise ArgumentError(
            f"`attention_mask` and `position_bias` must have shape {sizes}, (batch, heads, queries, keys), or 1 where "
            f"all are alike, got {tuple(bias.shape)}"
        )
    return dense(query, key, value, scoring, bias)


def paged(query: torch.Tensor, key: PagedTensor, value: PagedTensor, scoring: Scoring) -> torch.Tensor:
    """Keys of a PagedCache, and the forward that is under way there."""
    step = key.step.to(query.device)
    batch, _, q_length, _ = query.shape
    is_plain = step.cu_seqlens_q is None
    if key.fresh is not None and q_length == step.size[1] and not key.layer.groups.is_cross:
        # nothing was stored before: the forward's own keys are all there is, and they lie dense
        k, v = key.fresh.to(query.dtype), value.fresh.to(query.dtype)
        if is_plain:
            return dense(query, k, v, scoring)
        q, k, v = (pack(x, step.indices) for x in (query, k, v))
        out = _attend(
            q, k, v, scoring, step.max_seqlen_q, step.max_seqlen_q,
            cu_seqlens_q=step.cu_seqlens_q, cu_seqlens_k=step.cu_seqlens_q,
        )  # fmt: skip
        return unpack(out, step.indices, batch, q_length)
    key.layer.group.check_reach(scoring.window_left)
    pool = key.layer.pool
    q = query.to(pool.key.dtype)
    if q_length <= MAX_DECODE_QUERIES and is_plain and scoring.dropout_p == 0.0:
        return library.paged_decode_no_backward(
            q.transpose(1, 2), pool.key, pool.value, cache_seqlens=step.cache_seqlens, block_table=step.block_table,
            softmax_scale=scoring.softmax_scale, causal=scoring.causal, window_left=scoring.window_left,
            window_right=scoring.window_right, softcap=scoring.softcap, s_aux=scoring.s_aux,
        )[0]  # fmt: skip
    if is_plain:
        return _attend(
            q.transpose(1, 2), pool.key, pool.value, scoring, q_length, step.max_seqlen_k,
            seqused_k=step.cache_seqlens, block_table=step.block_table,
        )  # fmt: skip
    out = _attend(
        pack(q, step.indices), pool.key, pool.value, scoring, step.max_seqlen_q, step.max_seqlen_k,
        cu_seqlens_q=step.cu_seqlens_q, seqused_k=step.cache_seqlens, block_table=step.block_table,
    )  # fmt: skip
    return unpack(out, step.indices, batch, q_length)


def packed(
    query, key, value, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, scoring: Scoring, *, is_replica: bool
) -> torch.Tensor:
    """Rows packed one after another in a batch of 1, offsets given by the caller, maybe within nn.DataParallel."""
    if query.shape[0] != 1:
        raise ArgumentError(f"`cu_seq_lens_q` describes packed rows in a batch of 1, got a batch of {query.shape[0]}")
    _check_offsets("cu_seq_lens_q", cu_seq_lens_q, query.shape[2], is_replica)
    cu_seq_lens_k = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
    _check_offsets("cu_seq_lens_k", cu_seq_lens_k, key.shape[2], is_replica)
    q, k, v = (x.transpose(1, 2)[0] for x in (query, key, value))
    return _attend(
        q, k, v, scoring,
        _bound(max_length_q, cu_seq_lens_q, query.shape[2]), _bound(max_length_k, cu_seq_lens_k, key.shape[2]),
        cu_seqlens_q=cu_seq_lens_q.to(torch.int32), cu_seqlens_k=cu_seq_lens_k.to(torch.int32),
    )[None]  # fmt: skip


def _check_offsets(name: str, offsets: torch.Tensor, tokens: int, is_replica: bool) -> None:
    """Refuses offsets that leave tokens out, where they can be read without waiting for the device.

    Those of a replica are read anyway: nn.DataParallel splits what it is given, but a model may make some of its own.
    """
    if not has_values(offsets) or not offsets.numel() or not (is_replica or offsets.device.type == "cpu"):
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if (first, last) == (0, tokens):
        return
    got = f"{first} to {last}"
    if is_replica:
        got += (
            ". nn.DataParallel, which Trainer takes where one process sees several GPUs, splits them as if each "
            "offset were a row: start one process a GPU (torchrun, accelerate launch), or let the process see only "
            "one (CUDA_VISIBLE_DEVICES=0)"
        )
    fail(name, f"rise from 0 to {tokens}, the packed tokens", got)


def _bound(given: int | torch.Tensor | None, cu_seqlens: torch.Tensor, tokens: int) -> int:
    """No row is longer; while tracing, nothing is read from a tensor for it."""
    if given is not None and not isinstance(given, torch.Tensor):
        return given
    if torch.compiler.is_compiling():
        return tokens
    return longest(cu_seqlens) if given is None else int(given)


def padded(query, key, value, mask: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """Dense keys, some of them padding: packed, attended to, spread out again; padded queries give 0."""
    batch, _, q_length, _ = query.shape
    columns = mask.shape[1]
    # The mask speaks of keys. Where positions count, queries are the last of them; else (an encoder, cross-attention)
    # every query sees every key that is a token.
    positional = scoring.causal or scoring.window_left >= 0
    if columns > key.shape[2] or (positional and q_length > columns):
        raise ArgumentError(
            f"`attention_mask` has {columns} columns, which does not fit {q_length} new tokens and {key.shape[2]} keys"
        )
    keys, queries = Packing.of_padding(mask, q_length, positional)
    key, value = key[:, :, :columns], value[:, :, :columns]  # a static cache holds more columns than it has filled
    out = _attend(
        pack(query, queries.indices), pack(key, keys.indices), pack(value, keys.indices), scoring,
        queries.max_seqlen, keys.max_seqlen, cu_seqlens_q=queries.cu_seqlens, cu_seqlens_k=keys.cu_seqlens,
    )  # fmt: skip
    return unpack(out, queries.indices, batch, q_length)


def segmented(query, key, value, segments: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """Rows packed with ids (B, S) that count up inside each batch row: a segment ends where the id changes."""
    batch, _, q_length, _ = query.shape
    if key.shape[2] != q_length or segments.shape != (batch, q_length):
        raise ArgumentError(
            f"packed rows need as many keys as queries, {q_length}, and an id for each, got {key.shape[2]} keys and "
            f"ids of shape {tuple(segments.shape)} for a batch of {batch}"
        )
    cu_seqlens, packed_lengths = row_offsets(segments)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = _attend(
        q, k, v, scoring, q_length, q_length,
        cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, packed_lengths=packed_lengths,
    )  # fmt: skip
    return out.unflatten(0, (batch, q_length))


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scoring: Scoring,
    max_seqlen_q: int,
    max_seqlen_k: int,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    packed_lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    # written out, for Dynamo does not trace `**vars(scoring)`
    return library.flash_attention(
        query,
        key,
        value,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        block_table=block_table,
        s_aux=scoring.s_aux,
        bias=bias,
        dropout_seed=draw_seed(query.device) if scoring.dropout_p > 0.0 else None,
        packed_lengths=packed_lengths,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=scoring.softmax_scale,
        causal=scoring.causal,
        window_left=scoring.window_left,
        window_right=scoring.window_right,
        softcap=scoring.softcap,
        dropout_p=scoring.dropout_p,
        deterministic=scoring.deterministic,
    )[0]
