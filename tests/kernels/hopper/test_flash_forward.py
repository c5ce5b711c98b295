"""kernels/hopper/flash_forward.py against fp64, and which calls it takes."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from hf_paged_flash.kernels import hopper  # noqa: E402
from tests.kernels.attention_problem import check, make_problem, packed, strided  # noqa: E402
from tests.kernels.pairwise import pairwise  # noqa: E402

# rows (Sq, Sk); work items have 128 or 192 queries, tiles 64 or 128 keys
LENGTHS = {
    "one": [(1, 1), (1, 1)],
    "tiles": [(256, 256), (256, 256)],
    "odd": [(333, 333), (1, 1111), (150, 630), (0, 3), (129, 129)],
    "blind": [(700, 33), (523, 77), (64, 0), (129, 128)],
    "long": [(2047, 2047), (190, 3333)],
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
    }
)


def case_id(case) -> str:
    return "-".join("x".join(map(str, value)) if isinstance(value, tuple) else str(value) for value in case.values())


def run(case, problem):
    """Launches `problem` in the case's layout; each row's out (Sq, Hq, D) and lse (Hq, Sq)."""
    from hf_paged_flash.kernels.hopper.flash_forward import flash_forward

    arrange = strided if case.get("memory") == "strided" else torch.Tensor.contiguous
    arguments = {"max_seqlen_q": max(map(len, problem.q)), "max_seqlen_k": max(map(len, problem.k)), **problem.scoring}
    if case["layout"] == "dense":
        q, k, v = (arrange(torch.stack(rows)) for rows in (problem.q, problem.k, problem.v))
    else:
        q, arguments["cu_seqlens_q"] = packed(problem.q)
        # NaN behind the last key, as in a buffer that was never written
        k, v = (torch.cat([packed(rows)[0], rows[0].new_full((50, *rows[0].shape[1:]), math.nan)])
                for rows in (problem.k, problem.v))  # fmt: skip
        arguments["cu_seqlens_k"] = packed(problem.k)[1]
        q, k, v = arrange(q), arrange(k), arrange(v)
    assert hopper.supports(q, k, v, **arguments)
    out, lse = flash_forward(q, k, v, **arguments)
    if case["layout"] == "dense":
        return list(out), list(lse)
    lengths = [len(rows) for rows in problem.q]
    return list(out.split(lengths)), list(lse.split(lengths, 1))


@pytest.fixture
def on_hopper():
    problem = hopper.unavailable(torch.device("cuda"))
    if problem:
        pytest.skip(f"Hopper's kernels: {problem}")


@pytest.mark.gpu
@pytest.mark.parametrize("problem_case", CASES, ids=case_id)
def test_matches_fp64(problem_case, on_hopper):
    rows = LENGTHS[problem_case["lengths"]]
    if problem_case["layout"] == "dense":
        rows = [(max(q for q, _ in rows), max(k for _, k in rows))] * 2
    problem = make_problem(rows, device="cuda", **problem_case)
    check(problem, *run(problem_case, problem))


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [64, 128, 256])
def test_runs_alike(dims, on_hopper):
    """Whichever block draws a tile: a result that moves would be a race."""
    case = {"dims": dims, "heads": (8, 2), "mask": "causal", "dtype": "bf16", "layout": "varlen"}
    problem = make_problem(LENGTHS["long"] + LENGTHS["blind"], device="cuda", **case)
    outs, lses = run(case, problem)
    for _ in range(20):
        again, lses_again = run(case, problem)
        assert all(map(torch.equal, outs, again)) and all(map(torch.equal, lses, lses_again))


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [0.0, -0.3], ids=["zero", "negative"])
def test_any_scale(scale, on_hopper):
    case = {"dims": 128, "heads": (4, 2), "mask": "causal", "dtype": "bf16", "layout": "dense"}
    problem = make_problem([(300, 300)] * 2, device="cuda", scale=scale, **case)
    check(problem, *run(case, problem))


def tensors(dtype=torch.bfloat16, head_dim=128, v_head_dim=None, packed=False):
    batch = () if packed else (2,)
    q = torch.empty(*batch, 64, 8, head_dim, dtype=dtype)
    k = torch.empty(*batch, 64, 2, head_dim, dtype=dtype)
    return q, k, torch.empty(*batch, 64, 2, v_head_dim or head_dim, dtype=dtype)


BOUNDS = torch.tensor([0, 64], dtype=torch.int32)


def test_takes_plain_attention():
    for head_dim in hopper.HEAD_DIMS:
        for dtype in (torch.bfloat16, torch.float16):
            q, k, v = tensors(dtype, head_dim)
            assert hopper.supports(q, k, v, causal=True) and hopper.supports(q, k, v, causal=False)
            transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
            assert hopper.supports(*transposed, causal=True)
    assert hopper.supports(*tensors(packed=True), cu_seqlens_q=BOUNDS, cu_seqlens_k=BOUNDS, causal=True)
    assert hopper.supports(*tensors(), causal=True, window_right=0)


@pytest.mark.parametrize(
    "feature",
    [
        {"window_left": 7},
        {"causal": False, "window_right": 0},
        {"softcap": 2.0},
        {"s_aux": torch.zeros(8)},
        {"seqused_k": BOUNDS},
        {"block_table": BOUNDS[None]},
        {"cu_seqlens_q": BOUNDS},
        {"bias": torch.zeros(1, 8, 64, 64)},
        {"alibi_slopes": torch.zeros(1, 8)},
        {"dropout_p": 0.1},
    ],
    ids=lambda feature: "-".join(feature),
)
def test_leaves_features_to_the_portable_kernel(feature):
    assert not hopper.supports(*tensors(), **{"causal": True, **feature})


def test_leaves_other_tensors_to_the_portable_kernel():
    assert not hopper.supports(*tensors(torch.float32), causal=True)
    assert not hopper.supports(*tensors(head_dim=96), causal=True)
    assert not hopper.supports(*tensors(head_dim=256, v_head_dim=128), causal=True)
    q, k, v = tensors()
    assert not hopper.supports(q, k[:, :0], v[:, :0], causal=True)
    assert not hopper.supports(q, k[:, :1].expand(-1, 64, -1, -1), v, causal=True)
    shifted = torch.empty(k.numel() + 1, dtype=k.dtype)[1:].view(k.shape)
    assert not hopper.supports(q, shifted, v, causal=True)


def test_says_why_not():
    assert "CUDA" in hopper.unavailable(torch.device("cpu"))
    assert hopper._version_problem("3.6.0") is None and hopper._version_problem("3.8.1+git") is None
    assert "3.9.0" in hopper._version_problem("3.9.0") and "3.5.1" in hopper._version_problem("3.5.1")
