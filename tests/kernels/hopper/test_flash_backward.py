"""kernels/hopper/flash_backward.py against fp64, and which calls it takes."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from hf_paged_flash.kernels import hopper  # noqa: E402
from tests.kernels.attention_problem import make_problem, packed, strided  # noqa: E402
from tests.kernels.hopper.test_flash_forward import BOUNDS, case_id, on_hopper, tensors  # noqa: E402, F401
from tests.kernels.pairwise import pairwise  # noqa: E402
from tests.naive import attention  # noqa: E402

# rows (Sq, Sk); tiles have 64 or 128 queries and 64 or 128 keys
LENGTHS = {
    "one": [(1, 1), (1, 1)],
    "tiles": [(256, 256), (256, 256)],
    "odd": [(333, 333), (1, 611), (150, 630), (0, 3), (129, 129)],
    "blind": [(700, 33), (523, 77), (64, 0), (129, 128)],
    "long": [(1100, 1100), (190, 2333)],
}
CASES = pairwise(
    {
        "dims": (64, 128, 256),
        "heads": ((8, 8), (8, 2), (3, 1)),
        "mask": ("causal", "full"),
        "layout": ("dense", "varlen"),
        "lengths": tuple(LENGTHS),
        "dtype": ("bf16", "fp16"),
        "memory": ("contiguous", "strided"),
        "dlse": (False, True),
    }
)


def gradients(problem, douts, dlses, dtype):
    """Each row's (dq, dk, dv) through a plain softmax in `dtype`."""
    rows = []
    for q, k, v, dout, dlse in zip(problem.q, problem.k, problem.v, douts, dlses, strict=True):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out, lse = attention(*leaves, dtype=dtype, **problem.scoring)
        seen = lse > -math.inf
        loss = (out * dout.to(out.dtype)).sum() + (lse * dlse.to(lse.dtype))[seen].sum()
        rows.append(torch.autograd.grad(loss, leaves))
    return list(zip(*rows, strict=True))


def run(case, problem, douts, dlses):
    """Launches forward and backward in the case's layout; each row's dq, dk, dv as three lists."""
    from hf_paged_flash.kernels.hopper.flash_backward import flash_backward
    from hf_paged_flash.kernels.hopper.flash_forward import flash_forward

    arrange = strided if case.get("memory") == "strided" else torch.Tensor.contiguous
    arguments = {"max_seqlen_q": max(map(len, problem.q)), "max_seqlen_k": max(map(len, problem.k)), **problem.scoring}
    if case["layout"] == "dense":
        q, k, v, dout = (arrange(torch.stack(x)) for x in (problem.q, problem.k, problem.v, douts))
        dlse = torch.stack(dlses)
    else:
        arguments |= {"cu_seqlens_q": packed(problem.q)[1], "cu_seqlens_k": packed(problem.k)[1]}
        # NaN behind the last token, as in a buffer that was never written
        q, k, v, dout = (
            arrange(torch.cat([packed(x)[0], x[0].new_full((50, *x[0].shape[1:]), math.nan)]))
            for x in (problem.q, problem.k, problem.v, douts)
        )
        dlse = torch.cat([*dlses, dlses[0].new_full((len(dlses[0]), 50), math.nan)], 1)
    out, lse = flash_forward(q, k, v, **arguments)
    assert hopper.supports_backward(dout, q, k, v, deterministic=False, **arguments)
    found = flash_backward(dout, dlse if case.get("dlse") else None, q, k, v, out, lse, **arguments)
    if case["layout"] == "dense":
        return [list(x) for x in found]
    sizes = [[len(x) for x in rows] for rows in (problem.q, problem.k, problem.k)]
    assert all(not x[sum(n) :].any() for x, n in zip(found, sizes, strict=True)), "tokens outside every row"
    return [x[: sum(n)].split(n) for x, n in zip(found, sizes, strict=True)]


def setting(case):
    """The case's problem, its dO and its dlse."""
    rows = LENGTHS[case["lengths"]]
    if case["layout"] == "dense":
        rows = [(max(q for q, _ in rows), max(k for _, k in rows))] * 2
    problem = make_problem(rows, device="cuda", **case)
    generator = torch.Generator("cuda").manual_seed(1)
    douts = [torch.randn(q.shape, generator=generator, device="cuda").to(q.dtype) for q in problem.q]
    scale = float(case.get("dlse", False))
    dlses = [scale * torch.randn(q.shape[1], len(q), generator=generator, device="cuda") for q in problem.q]
    return problem, douts, dlses


def check(problem, found, douts, dlses):
    """Within twice eager's own error in the same dtype."""
    exact, eager = (gradients(problem, douts, dlses, dtype) for dtype in (torch.float64, problem.q[0].dtype))
    eps = torch.finfo(problem.q[0].dtype).eps
    for name, *tensors_of in zip(("dq", "dk", "dv"), found, exact, eager, strict=True):
        for b, (x, wanted, peer) in enumerate(zip(*tensors_of, strict=True)):
            assert x.shape == wanted.shape and torch.isfinite(x).all(), f"{name} of row {b}"
            error, budget = ((y.double() - wanted).norm().item() for y in (x, peer))
            budget = 2 * budget + 2 * eps * max(1.0, wanted.norm().item())
            assert error <= budget, f"{name} of row {b}: {error} > {budget}"


@pytest.mark.gpu
@pytest.mark.parametrize("problem_case", CASES, ids=case_id)
def test_matches_fp64(problem_case, on_hopper):  # noqa: F811
    problem, douts, dlses = setting(problem_case)
    check(problem, run(problem_case, problem, douts, dlses), douts, dlses)


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [64, 128, 256])
def test_runs_alike(dims, on_hopper):  # noqa: F811
    """dK and dV to the bit, dQ but for the order of its sum: anything else that moves would be a race."""
    case = {"dims": dims, "heads": (8, 2), "mask": "causal", "dtype": "bf16", "layout": "varlen", "lengths": "long"}
    problem, douts, dlses = setting(case)
    first = run(case, problem, douts, dlses)
    for _ in range(20):
        again = run(case, problem, douts, dlses)
        for x, y in zip(first[1] + first[2], again[1] + again[2], strict=True):
            assert torch.equal(x, y)
        for x, y in zip(first[0], again[0], strict=True):
            assert (x - y).norm() <= 4e-3 * x.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [64, 128, 256])
def test_a_row_of_nan_stays_alone(dims, on_hopper):  # noqa: F811
    case = {"dims": dims, "heads": (4, 2), "mask": "full", "dtype": "bf16", "layout": "varlen", "lengths": "odd"}
    problem, douts, dlses = setting(case)
    expected = run(case, problem, douts, dlses)
    for x in (problem.q, problem.k, problem.v, douts):
        x[1].fill_(math.nan)
    found = run(case, problem, douts, dlses)
    for b in (0, 2, 3, 4):
        for x, y in zip(found[1:], expected[1:], strict=True):
            assert torch.equal(x[b], y[b])
        assert torch.isfinite(found[0][b]).all()


@pytest.mark.gpu
def test_negative_scale(on_hopper):  # noqa: F811
    case = {"dims": 128, "heads": (4, 2), "mask": "causal", "dtype": "bf16", "layout": "dense", "lengths": "tiles"}
    problem, douts, dlses = setting({**case, "scale": -0.3})
    check(problem, run(case, problem, douts, dlses), douts, dlses)


@pytest.mark.gpu
def test_takes_any_layout_of_dout(on_hopper):  # noqa: F811
    """The gradient of a sum is one number seen from everywhere: no copy engine reads that."""
    from hf_paged_flash import flash_attn_func

    q, k, v = (x.cuda().normal_().requires_grad_() for x in tensors())
    found = torch.autograd.grad(flash_attn_func(q, k, v, causal=True).sum(), (q, k, v))
    out = flash_attn_func(q, k, v, causal=True)
    expected = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_takes_what_the_forward_takes_but_not_deterministic():
    q, k, v = tensors()
    assert hopper.supports_backward(q, q, k, v, causal=True, deterministic=False)
    assert not hopper.supports_backward(q, q, k, v, causal=True, deterministic=True)
    assert not hopper.supports_backward(q.float(), q, k, v, causal=True, deterministic=False)
    assert not hopper.supports_backward(q, q, k, v, causal=True, deterministic=False, dropout_p=0.1)
    assert not hopper.supports_backward(q, q, k, v, causal=True, deterministic=False, seqused_k=BOUNDS)
