"""Merging attention over two sets of keys, from each one's output and lse."""

from __future__ import annotations

import torch

from hf_paged_flash.ops.validation import fail


def merge_states(
    o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys; differentiable in all four arguments.

    With attention sinks, only one of the two states may include them.

    Args:
        o1, o2: (B, Sq, Hq, Dv) or packed (Tq, Hq, Dv), one shape, the attention functions' outputs.
        lse1, lse2: (B, Hq, Sq) or packed (Hq, Tq), natural log, as `return_attn_probs=True` returns them.

    Returns:
        (out, lse) over both, out in o1's dtype: lse = log(e^lse1 + e^lse2), out = e^(lse1-lse) o1 + e^(lse2-lse) o2
        (FlashDecoding's reduction). Where both lse are -inf, out is 0 and lse -inf.

    Raises:
        ArgumentError: the shapes do not fit.
    """
    if o1.dim() not in (3, 4):
        layouts = "(batch, seqlen_q, num_heads, head_dim) or (total_q, num_heads, head_dim)"
        fail("o1", f"have shape {layouts}", tuple(o1.shape))
    if o2.shape != o1.shape:
        fail("o2", f"have the shape of `o1`, {tuple(o1.shape)}", tuple(o2.shape))
    expected = (*o1.shape[:-3], o1.shape[-2], o1.shape[-3])
    for name, lse in (("lse1", lse1), ("lse2", lse2)):
        if lse.shape != expected:
            fail(name, f"have shape {tuple(expected)}", tuple(lse.shape))
    highest = torch.maximum(lse1, lse2).detach()
    highest = highest.masked_fill(highest == float("-inf"), 0.0)
    weight1, weight2 = torch.exp(lse1 - highest), torch.exp(lse2 - highest)
    total = weight1 + weight2
    sees_none = total == 0.0
    total = total.masked_fill(sees_none, 1.0)
    lse = (highest + total.log()).masked_fill(sees_none, float("-inf"))
    share1, share2 = ((w / total).transpose(-1, -2).unsqueeze(-1) for w in (weight1, weight2))
    return (share1 * o1.to(lse.dtype) + share2 * o2.to(lse.dtype)).to(o1.dtype), lse
