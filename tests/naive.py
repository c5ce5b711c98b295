"""Attention as its formula says, in any precision: fp64 is the tests' reference, the inputs' own dtype is "eager"."""

from __future__ import annotations

import math

import torch


def attention(
    q, k, v, *, softmax_scale, causal, window_left=-1, window_right=-1, softcap=0.0, s_aux=None, dtype=torch.float64
):
    """softmax(softcap(scale * Q K^T)) V of one sequence: q (Sq, Hq, D), k (Sk, Hkv, D), v (Sk, Hkv, Dv).

    Computed in `dtype` as transformers' eager attention does: products in `dtype`, the softmax in at least fp32.
    Returns out (Sq, Hq, Dv) and lse (Hq, Sq) in fp64; a query that sees no key gives 0 and -inf.
    """
    seqlen_q, heads = q.shape[:2]
    seqlen_k, kv_heads = k.shape[:2]
    q, k, v = (x.to(dtype).transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // kv_heads, 0) for x in (k, v))
    scores = torch.matmul(q, k.mT) * softmax_scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(seqlen_q, device=q.device)[:, None] + seqlen_k - seqlen_q
    key = torch.arange(seqlen_k, device=q.device)
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
    if causal or window_right >= 0:
        visible &= key <= position + (0 if causal else window_right)
    if window_left >= 0:
        visible &= key >= position - window_left
    blind = ~visible.any(-1)
    scores = scores.masked_fill(~visible & ~blind[:, None], -math.inf)  # all -inf would have no gradient
    if s_aux is not None:
        sink = s_aux.to(dtype)[:, None, None].expand(-1, seqlen_q, 1)
        scores = torch.cat([scores, sink], -1)
    scores = scores.to(torch.promote_types(dtype, torch.float32))
    probabilities = torch.softmax(scores, -1)[..., :seqlen_k].masked_fill(blind[:, None], 0.0)
    out = torch.matmul(probabilities.to(dtype), v)
    lse = torch.logsumexp(scores, -1).masked_fill(blind, -math.inf)
    return out.transpose(0, 1).double(), lse.double()
