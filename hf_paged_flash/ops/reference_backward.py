"""FlashAttention's backward in plain torch: the oracle of the kernels' tests and the CPU path.

P is recomputed from lse in chunks of queries; with D = rowsum(dO o O) - dlse and dropout's factors M

    dV = (P o M)^T dO,    dS = P o (dO V^T o M - D),    dQ = scale * dS K,    dK = scale * dS^T Q

(FlashAttention-2, Dao 2023, algorithm 2). A sink gets -sum exp(sink - lse) * D, a bias dS itself, and a softcap puts
its slope on dS on the way to dQ and dK.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from hf_paged_flash.ops.layouts import Keys, key_rows
from hf_paged_flash.ops.reference import without_autocast
from hf_paged_flash.ops.scoring import Rows, Scoring, bias_chunk, chunks, keep_scale


class _Gradients(NamedTuple):
    """Where a group of rows leaves its gradients: views of dQ (R, Sq, Hq, D), dK and dV (R, Sk, Hkv, D | Dv)."""

    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor
    dbias: torch.Tensor | None


@torch.no_grad()
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
    """Gradients of `reference.flash_forward`, whose arguments and results it takes; keys are dense or packed.

    Args:
        dout: gradient of out, as out.
        dlse: gradient of lse, as lse, or None for zero.
        bias_needs_grad: whether the bias's gradient is wanted.
        deterministic: whether the same inputs must give the same bits each time, as they always do here.

    Returns:
        dq, dk, dv as q, k, v, contiguous; the gradients of s_aux (Hq,) and of bias, in their dtypes, None where there
        is none. Queries that see no key, keys that no query sees and tokens outside every row get 0.
    """
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    dtype = torch.promote_types(q.dtype, torch.float32)
    window_right = 0 if causal else window_right
    scoring = Scoring(
        softmax_scale, window_left, window_right, softcap, s_aux, bias, alibi_slopes, dropout_p, dropout_seed
    )
    keys = key_rows(k, v, batch, cu_seqlens_k, seqused_k, None)
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    ds_aux = None if s_aux is None else torch.zeros(s_aux.shape, dtype=dtype, device=q.device)
    dbias = torch.zeros(bias.shape, dtype=dtype, device=q.device) if bias_needs_grad else None
    with without_autocast(q):
        for rows, of_q, of_lse, of_k in _row_groups(batch, cu_seqlens_q, keys):
            q_rows, dout_rows, out_rows = (x[of_q].to(dtype) for x in (q, dout, out))
            k_rows, v_rows = (x[of_k].to(dtype).transpose(1, 2).contiguous() for x in (k, v))
            delta = (dout_rows * out_rows).sum(-1).transpose(1, 2)  # (R, Hq, Sq)
            lse_rows = lse[of_lse]
            if dlse is not None:
                delta = delta - dlse[of_lse]
            sees_none = lse_rows == float("-inf")
            delta, lse_rows = delta.masked_fill(sees_none, 0.0), lse_rows.masked_fill(sees_none, float("inf"))
            if s_aux is not None:
                ds_aux -= (torch.exp(s_aux.to(dtype)[None, :, None] - lse_rows) * delta).sum((0, 2))
            offsets = [k_rows.shape[2] - q_rows.shape[1]] * len(q_rows)
            inputs = Rows(q_rows, k_rows, v_rows, None, offsets, rows, 0)
            gradients = _Gradients(dq[of_q], dk[of_k], dv[of_k], dbias)
            _add_rows(inputs, scoring, dout_rows, lse_rows, delta, gradients)
    return dq, dk, dv, _like(ds_aux, s_aux), _like(dbias, bias)


def _like(gradient: torch.Tensor | None, of: torch.Tensor | None) -> torch.Tensor | None:
    return None if gradient is None else gradient.to(of.dtype)


def _row_groups(batch: int, cu_seqlens_q, keys: Keys) -> Iterator[tuple]:
    """(rows, index into q, index into lse, index into k) of rows that are computed together, empty ones left out."""
    if cu_seqlens_q is None and keys.starts is None and len(set(keys.lengths)) == 1:
        every = slice(0, batch)
        if keys.lengths[0]:
            yield every, every, every, (every, slice(0, keys.lengths[0]))
        return
    bounds = None if cu_seqlens_q is None else cu_seqlens_q.tolist()
    for b, length in enumerate(keys.lengths):
        row = slice(b, b + 1)
        of_q, of_lse, of_k = row, row, (row, slice(0, length))
        if bounds is not None:
            tokens = slice(bounds[b], bounds[b + 1])
            of_q, of_lse = (None, tokens), (None, slice(None), tokens)
        if keys.starts is not None:
            of_k = (None, slice(keys.starts[b], keys.starts[b] + length))
        if length and (bounds is None or tokens.stop > tokens.start):
            yield row, of_q, of_lse, of_k


def _add_rows(rows: Rows, scoring: Scoring, dout, lse, delta, gradients: _Gradients) -> None:
    """Gradients of one group; dout (R, Sq, Hq, Dv), lse and delta (R, Hq, Sq)."""
    kv_heads = rows.k.shape[1]
    dk, dv = torch.zeros_like(rows.k), torch.zeros_like(rows.v)
    for chunk in chunks(rows, scoring, with_slope=True):
        shape = chunk.scores.shape  # (R, Hkv, G, C, K)
        of_group = (1, (kv_heads, -1))
        p = torch.exp(chunk.scores - lse[:, :, chunk.queries].unflatten(*of_group)[..., None])
        dout_chunk = dout[:, chunk.queries].transpose(1, 2).unflatten(*of_group).flatten(2, 3)
        dp = torch.matmul(dout_chunk, rows.v[:, :, chunk.keys].mT).unflatten(2, shape[2:4])
        kept = keep_scale(rows, scoring, chunk)
        weights = p if kept is None else p * kept
        dp = dp if kept is None else dp * kept
        dv[:, :, chunk.keys] += torch.matmul(weights.flatten(2, 3).mT, dout_chunk)
        ds = p * (dp - delta[:, :, chunk.queries].unflatten(*of_group)[..., None])
        if gradients.dbias is not None:
            part = bias_chunk(gradients.dbias, rows, chunk.queries, chunk.keys, kv_heads)
            part += ds.sum_to_size(part.shape)
        if chunk.slope is not None:
            ds = ds * chunk.slope
        ds = ds.flatten(2, 3) * scoring.softmax_scale
        dq = torch.matmul(ds, rows.k[:, :, chunk.keys]).unflatten(2, shape[2:4])
        gradients.dq[:, chunk.queries] = dq.permute(0, 3, 1, 2, 4).flatten(2, 3).to(gradients.dq.dtype)
        dk[:, :, chunk.keys] += torch.matmul(ds.mT, chunk.q)
    gradients.dk.copy_(dk.transpose(1, 2))
    gradients.dv.copy_(dv.transpose(1, 2))
