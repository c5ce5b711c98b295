"""kernels/rotary.py: what a model's own operators give, with every product and sum rounded as theirs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from hf_paged_flash.kernels.rotary import rotary  # noqa: E402
from hf_paged_flash.ops import reference_layers  # noqa: E402
from tests.kernels.attention_problem import DTYPES  # noqa: E402
from tests.kernels.pairwise import pairwise  # noqa: E402

LAYOUTS = {
    "token-major": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "head-major": torch.Tensor.contiguous,
    "slices": lambda x: torch.cat([x, x], 1).transpose(1, 2).contiguous().transpose(1, 2)[:, : x.shape[1]],
    "transposed": lambda x: x.mT.contiguous().mT,
}
FACTORS = {
    "dims": ((64, 64), (128, 128), (80, 80), (96, 32), (24, 2)),  # of a head, and those that are turned
    "heads": ((4, 2), (1, 1), (6, 3), (32, 8)),
    "layout": tuple(LAYOUTS),
    "tokens": ((1, 1), (3, 5), (2, 1), (0, 4)),
    "angles": ("of each row", "of one row"),
}
CASES = pairwise(FACTORS | {"dtype": ("fp32", "fp16")})
GPU_CASES = pairwise(FACTORS | {"dtype": ("fp32", "fp16", "bf16")})


def test_turns(case, device):
    batch, seqlen = case["tokens"]
    head_dim, rotary_dim = case["dims"]
    dtype = DTYPES[case["dtype"]]

    def normal(*shape):
        return torch.randn(shape).to(device, dtype)

    q, k = (LAYOUTS[case["layout"]](normal(batch, heads, seqlen, head_dim)) for heads in case["heads"])
    cos, sin = (normal(1 if "one" in case["angles"] else batch, seqlen, rotary_dim) for _ in range(2))
    expected = reference_layers.rotary(q, k, cos, sin)
    for out, x, source in zip(rotary(q, k, cos, sin), expected, (q, k), strict=True):
        assert out.dtype == dtype and out.shape == source.shape
        assert torch.equal(out, x)


def test_heads_of_a_token_stay_together(device):
    """Queries and keys reach attention and cache laid out as they were, and are not copied there."""
    q = torch.randn(2, 1, 4, 64, device=device).transpose(1, 2)
    cos = torch.ones(1, 1, 64, device=device)
    for out in rotary(q, q, cos, cos):
        assert out.transpose(1, 2).is_contiguous()
