"""The check that comes before a number: a few rows of an attention output against fp64."""

import math

import torch


def attention_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, *, causal: bool
) -> torch.Tensor:
    """softmax(scale·Q K^T) V of some query rows of one head, in the dtype of the inputs, as eager attention does it.

    Args:
        q: (Sq, D) one head; k, v: (Sk, D) its keys and values.
        rows: (n,) int64, the query rows to compute; row i stands at position i + Sk - Sq.

    Returns:
        (n, D), q's dtype. The softmax is in fp32, or in fp64 for fp64 inputs.
    """
    scores = (q[rows] @ k.T) * (1 / math.sqrt(q.shape[-1]))
    if causal:
        position = rows[:, None] + k.shape[0] - q.shape[0]
        scores = scores.masked_fill(torch.arange(k.shape[0], device=k.device)[None] > position, -math.inf)
    probabilities = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return probabilities.to(q.dtype) @ v


def error_ratio(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> float:
    """Largest error of `out` against fp64, over eager's own largest error in the same dtype.

    Looks at 64 query rows of the first and last head of the first and last sequence. At most 2 is right; NaN is not.

    Args:
        out, q: (B, Sq, Hq, D); k, v: (B, Sk, Hkv, D).

    Returns:
        The ratio. Eager's error counts as at least one rounding of the largest output to the dtype.
    """
    group = q.shape[2] // k.shape[2]
    rows = torch.linspace(0, q.shape[1] - 1, min(64, q.shape[1]), device=q.device).round().long()
    worst = 0.0
    for batch in {0, q.shape[0] - 1}:
        for head in {0, q.shape[2] - 1}:
            inputs = q[batch, :, head], k[batch, :, head // group], v[batch, :, head // group]
            exact = attention_rows(*(x.double() for x in inputs), rows, causal=causal)
            eager = attention_rows(*inputs, rows, causal=causal)
            budget = (eager.double() - exact).abs().max().clamp_min(exact.abs().max() * torch.finfo(q.dtype).eps)
            ratio = ((out[batch, rows, head].double() - exact).abs().max() / budget).item()
            worst = ratio if math.isnan(ratio) else max(worst, ratio)
            if math.isnan(worst):
                return worst
    return worst


MAX_ERROR_RATIO = 2.0
