"""Attention written out query by query, and K/V in the layouts that the operations take; for tests."""

from __future__ import annotations

import math

import torch


def naive_row(q, k, v, *, softmax_scale, causal, window_left=-1, window_right=-1, softcap=0.0, s_aux=None):
    """One sequence, query by query, in fp64: q (Sq, Hq, D), k (Sk, Hkv, D), v (Sk, Hkv, Dv)."""
    q, k, v = q.double(), k.double(), v.double()
    seqlen_q, heads, _ = q.shape
    seqlen_k, kv_heads = k.shape[:2]
    out = torch.zeros(seqlen_q, heads, v.shape[-1], dtype=torch.float64)
    lse = torch.full((heads, seqlen_q), -math.inf, dtype=torch.float64)
    for i in range(seqlen_q):
        position = i + seqlen_k - seqlen_q
        right = 0 if causal else window_right
        visible = [
            j
            for j in range(seqlen_k)
            if (right < 0 or j <= position + right) and (window_left < 0 or j >= position - window_left)
        ]
        if not visible:
            continue
        for h in range(heads):
            kv_head = h // (heads // kv_heads)
            scores = softmax_scale * (k[visible, kv_head] @ q[i, h])
            if softcap > 0:
                scores = softcap * torch.tanh(scores / softcap)
            logits = scores if s_aux is None else torch.cat([scores, s_aux[h : h + 1].double()])
            lse[h, i] = torch.logsumexp(logits, 0)
            out[i, h] = torch.softmax(logits, 0)[: len(visible)] @ v[visible, kv_head]
    return out, lse


def paged(k, v, lengths, block_size, *, spare=3):
    """Dense k, v (B, S, H, D) in scattered blocks, and the table (B, max_blocks).

    Unused slots are NaN, and so is block 0, where an entry of -1 would read if it were taken as an address.
    """
    needed = [-(-n // block_size) for n in lengths]
    order = 1 + torch.randperm(sum(needed) + spare, generator=torch.Generator().manual_seed(sum(lengths)))
    table = torch.full((len(lengths), max(needed) + 1), -1, dtype=torch.int32)
    blocks = 1 + len(order)
    k_cache, v_cache = (torch.full((blocks, block_size, *x.shape[2:]), math.nan, dtype=x.dtype) for x in (k, v))
    for b, length in enumerate(lengths):
        for n in range(needed[b]):
            block, order = int(order[0]), order[1:]
            table[b, n] = block
            used = min(block_size, length - n * block_size)
            k_cache[block, :used] = k[b, n * block_size : n * block_size + used]
            v_cache[block, :used] = v[b, n * block_size : n * block_size + used]
    return k_cache, v_cache, table


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
