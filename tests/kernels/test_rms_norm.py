"""kernels/rms_norm.py against fp64, and against a model's own operators, bit by bit but for the order of the sum."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from hf_paged_flash.kernels.rms_norm import rms_norm  # noqa: E402
from hf_paged_flash.ops import reference_layers  # noqa: E402
from tests.kernels.attention_problem import DTYPES  # noqa: E402
from tests.kernels.pairwise import pairwise  # noqa: E402

FORMS = {"llama": {}, "olmo": {"casting_mode": "gemma"}, "gemma": {"casting_mode": "gemma", "offset": 1.0}}
FACTORS = {
    "shape": ((1, 1, 64), (2, 3, 100), (3, 4096), (2, 5, 2, 128), (1, 1), (0, 64)),
    "form": tuple(FORMS),
    "layout": ("contiguous", "slice"),
}
CASES = pairwise(FACTORS | {"dtype": ("fp32", "fp16")})
GPU_CASES = pairwise(FACTORS | {"dtype": ("fp32", "fp16", "bf16")})


def test_norms(case, device):
    dtype = DTYPES[case["dtype"]]
    x = (torch.randn(case["shape"]) * 3).to(device, dtype)
    x = torch.cat([x, x], -1)[..., : x.shape[-1]] if case["layout"] == "slice" else x
    weight = (torch.randn(case["shape"][-1]) + 1).to(device, dtype)
    options = FORMS[case["form"]]
    out = rms_norm(x, weight, 1e-5, **options)
    assert out.dtype == dtype and out.shape == x.shape
    eager = reference_layers.rms_norm(x, weight, 1e-5, **options)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    exact = exact * (weight.double() + options.get("offset", 0.0))
    budget = 1.01 * (eager.double() - exact).abs().amax() if x.numel() else 0.0
    assert ((out.double() - exact).abs() <= budget + 1e-6 * exact.abs()).all()
    if dtype != torch.float32:  # the sum's last bits turn few roundings
        assert (out != eager).sum() <= 0.01 * out.numel()


def test_large_values_and_none(device):
    """Squares beyond fp16, and rows of zeros."""
    x = torch.tensor([[3e4] * 64, [0.0] * 64], device=device, dtype=torch.float16)
    out = rms_norm(x, torch.ones(64, device=device, dtype=torch.float16), 1e-6)
    assert torch.equal(out, torch.tensor([[1.0] * 64, [0.0] * 64], device=device, dtype=torch.float16))
