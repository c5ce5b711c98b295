"""What may be done to scores and probabilities beside masks: biases, ALiBi, dropout; shared by forward and backward.

Index tensors broadcast against each other, so that one helper serves tiles (M, N) and transposed ones (N, M).
"""

import torch
import triton
import triton.language as tl

from .primitives import LOG2_E


@triton.jit
def add_biases(
    s,
    queries,
    keys,
    seqlen_q,
    seqlen_k,
    bias_base,
    stride_bias_m,
    stride_bias_n,
    alibi_slope,
    BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
):
    """Scores in log2 units plus a bias of the row and head at `bias_base`, minus alibi_slope * |position - key|.

    BIAS 0: none, 1: added, 2: uint8, 0 hides the key. `queries` and `keys` are int32 indices within the row.
    """
    if BIAS > 0:
        offsets = queries.to(tl.int64) * stride_bias_m + keys.to(tl.int64) * stride_bias_n
        bias = tl.load(bias_base + offsets, mask=(queries < seqlen_q) & (keys < seqlen_k), other=0)
        if BIAS == 1:
            s += bias.to(tl.float32) * LOG2_E
        else:
            s = tl.where(bias != 0, s, float("-inf"))
    if HAS_ALIBI:
        s -= (alibi_slope * LOG2_E) * tl.abs(queries + (seqlen_k - seqlen_q) - keys).to(tl.float32)
    return s


@triton.jit
def scores_and_slope(s, scale_log2, softcap_log2, HAS_SOFTCAP: tl.constexpr):
    """Scores in log2 units and dS/d(scale * QK^T) from raw products s.

    With a softcap S = softcap * tanh(x / softcap), so dS/dx = 1 - (S / softcap)^2; without one it is 1.
    """
    if HAS_SOFTCAP:
        t = 1.0 - 2.0 / (1.0 + tl.exp2(s * scale_log2))
        return softcap_log2 * t, 1.0 - t * t
    else:
        return s * scale_log2, 1.0


@triton.jit
def dropout_factors(seed, threshold, keep_scale, queries, keys, head, row):
    """0 where a probability is dropped, else keep_scale: Philox of (query, key, head, row), see ops/dropout.py."""
    zeros = (queries + keys) * 0
    random, _, _, _ = tl.philox(seed, zeros + queries, zeros + keys, zeros + head, zeros + row)
    return tl.where((random >> 8).to(tl.int32) >= threshold, keep_scale, 0.0)


def modifier_arguments(
    bias: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
) -> dict:
    """The kernels' arguments for `add_biases` and `dropout_factors`; shapes as in `ops.reference.flash_forward`."""
    strides = [0, 0, 0, 0]
    kind = 0
    if bias is not None:
        kind = 2 if bias.dtype == torch.bool else 1
        strides = [0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride(), strict=True)]
        bias = bias.view(torch.uint8) if kind == 2 else bias
    return dict(
        Bias=bias, stride_bias_b=strides[0], stride_bias_h=strides[1],
        stride_bias_m=strides[2], stride_bias_n=strides[3],
        alibi_slopes=alibi_slopes,
        stride_alibi_b=0 if alibi_slopes is None or len(alibi_slopes) == 1 else alibi_slopes.stride(0),
        dropout_seed=dropout_seed, dropout_threshold=int(dropout_p * (1 << 24)), keep_scale=1.0 / (1.0 - dropout_p),
        BIAS=kind, HAS_ALIBI=alibi_slopes is not None, HAS_DROPOUT=dropout_p > 0.0,
    )  # fmt: skip
