"""Attention as a plain differentiable softmax in fp64, with every feature, and problems to compare gradients on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from hf_paged_flash.ops import dropout
from tests.ops.naive import cumulative

FEATURES = {
    "causal": {"causal": True},
    "window": {"window_left": 13, "window_right": 7},
    "softcap": {"softcap": 2.5},
    "sinks": {"sinks": True},
    "bias": {"bias": (1, "heads", "q", "k")},
    "alibi": {"alibi": True},
    "dropout": {"dropout_p": 0.3},
    "dlse": {"with_dlse": True},
}


@dataclass
class Problem:
    """Rows of (queries, keys); `keep` keys of each row are used, all without."""

    lengths: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    v_head_dim: int = 16
    dtype: torch.dtype = torch.float32
    packed: bool = True
    used: tuple[int, ...] | None = None
    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    sinks: bool = False
    bias: tuple | None = None
    bias_dtype: torch.dtype = torch.float32
    alibi: bool = False
    dropout_p: float = 0.0
    with_dlse: bool = False
    tensors: dict = field(default_factory=dict)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(sum(map(sum, self.lengths)))

        def random(*shape, dtype=self.dtype):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        total_q, total_k = (sum(x) for x in zip(*self.lengths, strict=True))
        self.max_q, self.max_k = (max(x) for x in zip(*self.lengths, strict=True))
        self.q = random(total_q, self.heads, self.head_dim)
        self.k = random(total_k, self.kv_heads, self.head_dim)
        self.v = random(total_k, self.kv_heads, self.v_head_dim)
        self.dout = random(total_q, self.heads, self.v_head_dim)
        self.dlse = random(self.heads, total_q, dtype=torch.float32) if self.with_dlse else None
        self.s_aux = random(self.heads, dtype=torch.float32) if self.sinks else None
        self.alibi_slopes = random(1, self.heads, dtype=torch.float32).abs() if self.alibi else None
        self.dropout_seed = torch.tensor([0x1234_5678_9ABC]) if self.dropout_p else None
        self.bias_tensor = None
        if self.bias is not None:
            sizes = {"batch": len(self.lengths), "heads": self.heads, "q": self.max_q, "k": self.max_k, 1: 1}
            self.bias_tensor = random(*(sizes[x] for x in self.bias), dtype=torch.float32)
            if self.bias_dtype == torch.bool:
                self.bias_tensor = self.bias_tensor > 0
        self.cu_q, self.cu_k = (cumulative(x) for x in zip(*self.lengths, strict=True))

    def rows(self):
        for b in range(len(self.lengths)):
            yield b, slice(self.cu_q[b], self.cu_q[b + 1]), slice(self.cu_k[b], self.cu_k[b + 1])

    def expected(self):
        """(out, lse, dq, dk, dv, ds_aux, dbias) in fp64, tensors packed."""
        leaves = [x.double().requires_grad_() for x in (self.q, self.k, self.v)]
        q, k, v = leaves
        s_aux = None if self.s_aux is None else self.s_aux.double().requires_grad_()
        bias = self.bias_tensor
        if bias is not None and bias.dtype != torch.bool:
            bias = bias.double().requires_grad_()
        outs, lses = [], []
        for b, row_q, row_k in self.rows():
            used = row_k
            if self.used is not None:
                used = slice(row_k.start, min(row_k.stop, row_k.start + max(0, self.used[b])))
            out, lse = self._row(b, q[row_q], k[used], v[used], s_aux, bias)
            outs.append(out)
            lses.append(lse)
        out, lse = torch.cat(outs), torch.cat(lses, 1)
        loss = (out * self.dout).sum()
        if self.dlse is not None:
            seen = lse != -math.inf
            loss = loss + (lse[seen] * self.dlse[seen]).sum()
        inputs = [*leaves, s_aux, bias if bias is not None and bias.requires_grad else None]
        wanted = [x for x in inputs if x is not None]
        found = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
        gradients = [None if x is None else next(found) for x in inputs]
        for i, x in enumerate(inputs):
            if x is not None and gradients[i] is None:
                gradients[i] = torch.zeros_like(x)
        return (out.detach(), lse.detach(), *gradients)

    def _row(self, b, q, k, v, s_aux, bias):
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        seqlen_q, seqlen_k = len(q), len(k)
        scores = torch.einsum("mhd,nhd->hmn", q, k) * self.head_dim**-0.5
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        query, key = torch.arange(seqlen_q)[:, None], torch.arange(seqlen_k)
        position = query + seqlen_k - seqlen_q
        visible = torch.ones(1, seqlen_q, seqlen_k, dtype=torch.bool)
        right = 0 if self.causal else self.window_right
        if right >= 0:
            visible = visible & (key <= position + right)
        if self.window_left >= 0:
            visible = visible & (key >= position - self.window_left)
        if self.alibi:
            scores = scores - self.alibi_slopes[0, :, None, None].double() * (position - key).abs()
        if bias is not None:
            part = bias[b if bias.shape[0] > 1 else 0]
            part = part[:, :seqlen_q] if part.shape[1] > 1 else part
            part = part[..., :seqlen_k] if part.shape[2] > 1 else part
            if bias.dtype == torch.bool:
                visible = visible & part
            else:
                scores = scores + part
        sees_none = ~visible.any(-1).expand(self.heads, -1)
        scores = scores.masked_fill(~visible, -1e30)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux[:, None, None].expand(-1, seqlen_q, 1)], -1)
        lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.new_zeros(self.heads, seqlen_q)
        lse = lse.masked_fill(sees_none, -math.inf)
        p = torch.exp(scores[..., :seqlen_k] - lse.masked_fill(sees_none, 0.0)[..., None]).masked_fill(~visible, 0.0)
        if self.dropout_p:
            head = torch.arange(self.heads)[:, None, None]
            kept = dropout.keep(self.dropout_seed, self.dropout_p, query, key, head, torch.tensor(b))
            p = p * kept / (1.0 - self.dropout_p)
        return torch.einsum("hmn,nhd->mhd", p, v), lse

    def arguments(self):
        """Keyword arguments of the launchers and of the reference."""
        shared = dict(
            max_seqlen_q=self.max_q, max_seqlen_k=self.max_k, softmax_scale=self.head_dim**-0.5, causal=self.causal,
            window_left=self.window_left, window_right=self.window_right, softcap=self.softcap, s_aux=self.s_aux,
            bias=self.bias_tensor, alibi_slopes=self.alibi_slopes, dropout_p=self.dropout_p,
            dropout_seed=self.dropout_seed,
        )  # fmt: skip
        if self.used is not None:
            shared["seqused_k"] = torch.tensor(self.used, dtype=torch.int32)
        return shared | ({"cu_seqlens_q": self.cu_q, "cu_seqlens_k": self.cu_k} if self.packed else {})

    def layout(self, x):
        """A packed tensor in the problem's layout: dense rows have equal lengths."""
        return x if self.packed else x.unflatten(0, (len(self.lengths), -1))

    def lse_layout(self, lse):
        return lse if self.packed else lse.unflatten(1, (len(self.lengths), -1)).transpose(0, 1).contiguous()
