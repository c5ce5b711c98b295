"""kernels/linear.py against fp64: one rounding of the result, after a sum in fp32."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from hf_paged_flash.kernels.linear import linear  # noqa: E402
from hf_paged_flash.ops import reference_layers  # noqa: E402
from hf_paged_flash.ops.layers import MOST_ROWS  # noqa: E402
from tests.kernels.attention_problem import DTYPES  # noqa: E402
from tests.kernels.pairwise import pairwise  # noqa: E402

LAYOUTS = {
    "contiguous": lambda x: x,
    "columns": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "transposed": lambda x: x.mT.contiguous().mT,
}
FACTORS = {
    "rows": tuple(range(1, MOST_ROWS + 1)),
    "weight": ((64, 64), (7, 72), (1, 8), (130, 2048), (3, 2056), (16, 4096), (5, 6000)),
    "bias": (False, True),
    "x": tuple(LAYOUTS),
    "w": ("contiguous", "columns"),
}
CASES = pairwise(FACTORS | {"dtype": ("fp16",)})
GPU_CASES = pairwise(FACTORS | {"dtype": ("fp16", "bf16")})


def _problem(case, device):
    dtype, (n, k) = DTYPES[case["dtype"]], case["weight"]

    def normal(*shape):
        return torch.randn(shape).to(device, dtype)

    x = LAYOUTS[case["x"]](normal(case["rows"], k))
    return x, LAYOUTS[case["w"]](normal(n, k)), normal(n) if case["bias"] else None


def test_products(case, device):
    x, weight, bias = _problem(case, device)
    out = linear(x, weight, bias)
    assert out.dtype == x.dtype and out.shape == (case["rows"], len(weight))
    exact = reference_layers.linear(*(None if y is None else y.double() for y in (x, weight, bias)))
    scale = x.double().abs() @ weight.double().abs().mT
    epsilon = torch.finfo(x.dtype).eps
    assert ((out.double() - exact).abs() <= 0.501 * epsilon * exact.abs() + 2e-6 * scale + 1e-7).all()


def test_rows_do_not_depend_on_each_other(device):
    x = torch.randn(3, 4096, device=device).half()
    weight = torch.randn(9, 4096, device=device).half()
    assert torch.equal(linear(x[:2], weight)[1], linear(x[1:], weight)[0])


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 1, 64), (1, 1, 2, 64), (0, 64)])
def test_shapes(shape, device):
    x, weight = torch.randn(shape, device=device).half(), torch.randn(5, 64, device=device).half()
    torch.testing.assert_close(linear(x, weight), reference_layers.linear(x, weight), rtol=2e-3, atol=2e-2)


def test_weights_beyond_32_bits(device, tmp_path):
    """In storage that is mostly never touched."""
    n, stride = 130, 1 << 24
    elements = (n - 1) * stride + 64
    assert elements > 1 << 31
    if device == "cuda":
        storage = torch.empty(elements, dtype=torch.float16, device=device)
    else:
        storage = torch.from_file(str(tmp_path / "weight"), shared=True, size=elements, dtype=torch.float16)
    weight = storage.as_strided((n, 64), (stride, 1))
    weight.copy_(torch.randn(n, 64))
    x = torch.randn(1, 64, device=device).half()
    torch.testing.assert_close(linear(x, weight), reference_layers.linear(x, weight.clone()), rtol=2e-3, atol=2e-2)


def test_weights_that_are_not_aligned(device):
    weight = torch.randn(8 * 64 + 3, device=device).half()[3:].view(8, 64)
    x = torch.randn(1, 64, device=device).half()
    torch.testing.assert_close(linear(x, weight), reference_layers.linear(x, weight), rtol=2e-3, atol=2e-2)


def test_infinities_and_nan_stay(device):
    x = torch.ones(2, 64, device=device).half()
    x[0, 3], x[1, 5] = float("inf"), float("nan")
    out = linear(x, torch.ones(4, 64, device=device).half())
    assert out[0].isinf().all() and out[1].isnan().all()
