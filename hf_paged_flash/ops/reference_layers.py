"""Norms, rotary embeddings, gates and linear layers in plain torch, as transformers' models write them."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0, casting_mode: str = "llama"
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight), of the last dim, in x's dtype.

    Args:
        x: (..., N).
        weight: (N,).
        casting_mode: what happens in fp32: in "llama" the norm, whose result takes x's dtype before it is multiplied;
            in "gemma" all of it.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    if casting_mode == "llama":
        normed = normed.to(x.dtype)
    else:
        weight = weight.float()
    return (normed * (weight + offset if offset else weight)).to(x.dtype)


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys turned by their positions' angles.

    Args:
        q, k: (B, Hq, S, D) and (B, Hk, S, D), of which the first R of D are turned, halves against each other.
        cos, sin: (B | 1, S, R).

    Returns:
        Tensors like q and k.
    """
    cos, sin = cos[:, None], sin[:, None]
    return _turned(q, cos, sin), _turned(k, cos, sin)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, which takes gate's dtype after each of both.

    Args:
        gate, up: of one shape (..., N).
    """
    return F.silu(gate) * up


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x weight^T + bias.

    Args:
        x: (..., K), of few rows.
        weight: (N, K).
        bias: (N,).

    Returns:
        (..., N) in x's dtype.
    """
    return F.linear(x, weight, bias)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), -1)
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned
