"""The check that comes before a number: rows of an attention output, and gradients of two heads, against fp64."""

import math

import torch

MAX_ERROR_RATIO = 2.0
ROWS_AT_ONCE = 2048


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

    Looks at 64 query rows of the first and last head of the first and last sequence. At most `MAX_ERROR_RATIO` is
    right; NaN is not.

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


def head_gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, *, causal: bool, rounding: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK and dV of one head by the formulas of FlashAttention-2 (section 2.3), with P and dS formed.

    Args:
        q, dout: (S, D) one head; k, v: (S, D) its keys and values.
        rounding: what scores, P, dP and dS are rounded to, as eager attention in that dtype does; fp64 for none.

    Returns:
        (S, D) each, fp64, not rounded.
    """
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    scale = 1 / math.sqrt(q.shape[-1])

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.to(rounding).double()

    columns = torch.arange(len(k), device=k.device)
    for rows in columns.split(ROWS_AT_ONCE):
        scores = rounded(rounded(q[rows] @ k.T) * scale)
        if causal:
            scores.masked_fill_(columns[None] > rows[:, None], -math.inf)
        probabilities = scores.softmax(-1)
        dprobabilities = rounded(dout[rows] @ v.T)
        delta = (probabilities * dprobabilities).sum(-1, keepdim=True)
        dscores = rounded(probabilities * (dprobabilities - delta)) * scale
        dq[rows] = dscores @ k
        dk += dscores.T @ q[rows]
        dv += rounded(probabilities).T @ dout[rows]
    return dq, dk, dv


def gradient_error_ratios(
    gradients: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    *,
    causal: bool,
) -> dict[str, float]:
    """For each implementation, the largest error of its dQ, dK, dV against fp64 over eager's own in the same dtype.

    Looks at the first key/value head of the first sequence and the last of the last, with their query heads.

    Args:
        gradients: {implementation: (dq, dk, dv)}, each of the shape of its input.
        q, dout: (B, S, Hq, D); k, v: (B, S, Hkv, D).

    Returns:
        The ratios: at most `MAX_ERROR_RATIO` is right, NaN is not. Eager's error counts as at least one rounding of
        the largest gradient to the dtype.
    """
    group = q.shape[2] // k.shape[2]
    ratios = dict.fromkeys(gradients, 0.0)
    for batch, kv_head in {(0, 0), (q.shape[0] - 1, k.shape[2] - 1)}:
        heads = slice(kv_head * group, (kv_head + 1) * group)
        exact, eager = (
            _group_gradients(q[batch, :, heads], k[batch, :, kv_head], v[batch, :, kv_head], dout[batch, :, heads],
                             causal=causal, rounding=rounding)
            for rounding in (torch.float64, q.dtype)
        )  # fmt: skip
        for impl, (dq, dk, dv) in gradients.items():
            ours = dq[batch, :, heads], dk[batch, :, kv_head], dv[batch, :, kv_head]
            for got, right, low in zip(ours, exact, eager, strict=True):
                budget = (low - right).abs().max().clamp_min(right.abs().max() * torch.finfo(q.dtype).eps)
                ratio = ((got.double() - right).abs().max() / budget).item()
                ratios[impl] = math.nan if math.isnan(ratio + ratios[impl]) else max(ratio, ratios[impl])
    return ratios


def _group_gradients(q, k, v, dout, *, causal, rounding) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ (S, group, D) and dK, dV (S, D) of a key/value head, summed over its query heads; rounded to `rounding`."""
    dq, dk, dv = torch.empty_like(q, dtype=torch.float64), 0.0, 0.0
    for head in range(q.shape[1]):
        dq[:, head], dk_head, dv_head = head_gradients(
            q[:, head], k, v, dout[:, head], causal=causal, rounding=rounding
        )
        dk, dv = dk + dk_head, dv + dv_head
    return tuple(x.to(rounding).double() for x in (dq, dk, dv))
