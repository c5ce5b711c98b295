"""Scores of queries against keys in chunks, for the reference's forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from hf_paged_flash.ops import dropout

# Elements of one chunk's score matrix: 2 MiB in fp32, which a CPU core's cache holds.
CHUNK_ELEMENTS = 1 << 19
MIN_CHUNK = 16


class Scoring(NamedTuple):
    """What turns Q K^T into probabilities; see `reference.flash_forward`. Window bounds -1 = unbounded."""

    softmax_scale: float
    window_left: int
    window_right: int
    softcap: float = 0.0
    s_aux: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: torch.Tensor | None = None


class Rows(NamedTuple):
    """Rows of a batch with equally many queries and keys, padded if need be, in the dtype to compute in.

    q (R, Sq, Hq, D); k (R, Hkv, Sk, D), v (R, Hkv, Sk, Dv), key 0 being key `first_key` of its row; valid (R, Sk)
    bool, None if all keys are; query i of row r stands at key `offsets[r] + i`; `batch`, which rows of the batch.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    valid: torch.Tensor | None
    offsets: list[int]
    batch: slice
    first_key: int


class Chunk(NamedTuple):
    """Queries `queries` against keys `keys`: q (R, Hkv, G * C, D), scores (R, Hkv, G, C, K), -inf where masked.

    `slope` is d score / d (scale * q k), None for 1.
    """

    queries: slice
    keys: slice
    q: torch.Tensor
    scores: torch.Tensor
    slope: torch.Tensor | None


def chunks(rows: Rows, scoring: Scoring, with_slope: bool = False) -> Iterator[Chunk]:
    """All queries in chunks that bound the memory; chunks that see no key are left out."""
    seqlen_q, heads = rows.q.shape[1:3]
    kv_heads, seqlen_k = rows.k.shape[1:3]
    left, right = scoring.window_left, scoring.window_right
    lowest, highest = min(rows.offsets), max(rows.offsets)
    size = max(MIN_CHUNK, CHUNK_ELEMENTS // max(1, len(rows.offsets) * heads * seqlen_k))
    for start in range(0, seqlen_q, size):
        stop = min(start + size, seqlen_q)
        first = max(0, start + lowest - left) if left >= 0 else 0
        last = min(seqlen_k, stop + highest + right) if right >= 0 else seqlen_k
        if first >= last:
            continue
        q = rows.q[:, start:stop].to(rows.k.dtype).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        # the query heads of a group share one matmul
        scores = torch.matmul(q * scoring.softmax_scale, rows.k[:, :, first:last].mT).unflatten(2, (-1, stop - start))
        slope = None
        if scoring.softcap > 0.0:
            scores.div_(scoring.softcap).tanh_()
            slope = 1.0 - scores.square() if with_slope else None
            scores.mul_(scoring.softcap)
        queries, keys = slice(start, stop), slice(first, last)
        _add_biases(scores, rows, scoring, queries, keys)
        _mask(scores, rows, scoring, queries, keys)
        yield Chunk(queries, keys, q, scores, slope)


def _places(rows: Rows, queries: slice, keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the queries (R | 1, C) among the keys, and the keys' (K,)."""
    equal = min(rows.offsets) == max(rows.offsets)
    offset = torch.tensor(rows.offsets[:1] if equal else rows.offsets, device=rows.q.device)[:, None]
    position = torch.arange(queries.start, queries.stop, device=rows.q.device) + offset
    return position, torch.arange(keys.start, keys.stop, device=rows.q.device)


def _mask(scores, rows: Rows, scoring: Scoring, queries: slice, keys: slice) -> None:
    left, right = scoring.window_left, scoring.window_right
    hidden = None if rows.valid is None else ~rows.valid[:, None, keys]
    position, key = _places(rows, queries, keys)
    if right >= 0 and queries.start + min(rows.offsets) + right < keys.stop - 1:
        late = key > position[:, :, None] + right
        hidden = late if hidden is None else hidden | late
    if left >= 0 and queries.stop - 1 + max(rows.offsets) - left > keys.start:
        early = key < position[:, :, None] - left
        hidden = early if hidden is None else hidden | early
    if hidden is not None:
        scores.masked_fill_(hidden[:, None, None], float("-inf"))


def _add_biases(scores, rows: Rows, scoring: Scoring, queries: slice, keys: slice) -> None:
    if scoring.alibi_slopes is not None:
        position, key = _places(rows, queries, keys)
        slopes = scoring.alibi_slopes.expand(-1, scores.shape[1] * scores.shape[2]).to(scores.dtype)
        slopes = slopes[rows.batch] if len(slopes) > 1 else slopes
        distance = (position[:, :, None] - key).abs()
        scores.sub_(slopes.unflatten(1, scores.shape[1:3])[..., None, None] * distance[:, None, None])
    if scoring.bias is not None:
        bias = bias_chunk(scoring.bias, rows, queries, keys, scores.shape[1])
        if bias.dtype == torch.bool:
            scores.masked_fill_(~bias, float("-inf"))
        else:
            scores.add_(bias)


def bias_chunk(bias: torch.Tensor, rows: Rows, queries: slice, keys: slice, kv_heads: int) -> torch.Tensor:
    """The part of a bias (B | 1, Hq | 1, Sq | 1, Sk | 1) as (R | 1, Hkv | 1, G | 1, C | 1, K | 1), a view."""
    bias = bias[rows.batch] if bias.shape[0] > 1 else bias
    bias = bias[:, :, queries] if bias.shape[2] > 1 else bias
    if bias.shape[3] > 1:
        bias = bias[..., rows.first_key + keys.start : rows.first_key + keys.stop]
    return bias.unflatten(1, (kv_heads, -1)) if bias.shape[1] > 1 else bias.unsqueeze(2)


def keep_scale(rows: Rows, scoring: Scoring, chunk: Chunk) -> torch.Tensor | None:
    """Dropout's factors (R, Hkv, G, C, K), 0 or 1 / (1 - p); None without dropout."""
    if scoring.dropout_p == 0.0:
        return None
    device = chunk.scores.device
    batch, kv_heads, group = chunk.scores.shape[:3]
    row = torch.arange(rows.batch.start, rows.batch.start + batch, device=device).view(-1, 1, 1, 1, 1)
    head = torch.arange(kv_heads * group, device=device).view(1, kv_heads, group, 1, 1)
    query = torch.arange(chunk.queries.start, chunk.queries.stop, device=device)[:, None]
    key = torch.arange(chunk.keys.start, chunk.keys.stop, device=device) + rows.first_key
    kept = dropout.keep(scoring.dropout_seed, scoring.dropout_p, query, key, head, row)
    return kept.to(chunk.scores.dtype) / (1.0 - scoring.dropout_p)
