"""kernels/swiglu.py against torch's two operators, bit by bit but for the last bits of exp, and against fp64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from hf_paged_flash.kernels.swiglu import swiglu  # noqa: E402
from hf_paged_flash.ops import reference_layers  # noqa: E402
from tests.kernels.attention_problem import DTYPES  # noqa: E402
from tests.kernels.pairwise import pairwise  # noqa: E402

FACTORS = {
    "shape": ((1, 1, 64), (2, 3, 100), (3, 4096), (1, 1), (0, 64), (7,), (1, 14336)),
    "layout": ("contiguous", "halves", "columns"),
}
CASES = pairwise(FACTORS | {"dtype": ("fp32", "fp16")})
GPU_CASES = pairwise(FACTORS | {"dtype": ("fp32", "fp16", "bf16")})


def test_gates(case, device):
    dtype, shape = DTYPES[case["dtype"]], case["shape"]
    gate, up = ((torch.randn(shape) * 3).to(device, dtype) for _ in range(2))
    if case["layout"] == "halves":
        gate, up = torch.cat([gate, up], -1).chunk(2, -1)
    elif case["layout"] == "columns":
        gate, up = (x.mT.contiguous().mT if x.dim() > 1 else x for x in (gate, up))
    out = swiglu(gate, up)
    assert out.dtype == dtype and out.shape == gate.shape
    eager, exact = reference_layers.swiglu(gate, up), reference_layers.swiglu(gate.double(), up.double())
    epsilon = torch.finfo(dtype).eps
    assert ((out.double() - exact).abs() <= 1.1 * epsilon * exact.abs() + 1e-6 * up.double().abs() + 1e-7).all()
    if dtype != torch.float32:  # few roundings turn
        assert (out != eager).sum() <= 0.01 * out.numel()


def test_ends_of_the_range(device):
    gate = torch.tensor([0.0, -0.0, 1e4, -1e4, float("inf"), float("-inf"), float("nan")], device=device)
    up = torch.full_like(gate, 2.0)
    torch.testing.assert_close(swiglu(gate, up), reference_layers.swiglu(gate, up), rtol=1e-6, atol=0, equal_nan=True)
