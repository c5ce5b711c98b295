"""kernels/flash_forward.py against fp64, every feature alone and combined with every other one."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from hf_paged_flash.kernels import configs  # noqa: E402
from hf_paged_flash.kernels.flash_forward import dot_precision, flash_forward  # noqa: E402
from tests.kernels.attention_problem import (  # noqa: E402
    EXTRAS,
    MASKS,
    Problem,
    check,
    dense,
    make_problem,
    packed,
    paged,
    strided,
)
from tests.kernels.pairwise import pairwise  # noqa: E402

# rows (Sq, Sk); tiles in the interpreter are 32 x 32
LENGTHS = {
    "odd": [(33, 33), (1, 111), (15, 63)],
    "blind": [(63, 15), (111, 1), (32, 31)],
    "edges": [(0, 5), (5, 0), (1, 1), (3, 1)],
    "tiles": [(32, 64), (64, 96), (31, 65)],
    "long-odd": [(333, 333), (1, 1111), (150, 630), (0, 3)],
    "long-tiles": [(256, 512), (128, 1024), (255, 513), (700, 300)],
}
# "-used" limits the keys with seqused_k, "-cu" takes paged lengths from cu_seqlens_k, "-rows" has q dense, "copied-"
# loads through descriptors
LAYOUTS = (
    "dense", "dense-used", "varlen", "varlen-used", "paged16", "paged32-rows", "paged64-cu", "paged128", "paged256",
    "copied-dense", "copied-dense-used", "copied-varlen-used",
)  # fmt: skip


def dense_queries(case) -> bool:
    return "dense" in case["layout"] or "rows" in case["layout"]


def run(case, problem):
    """Launches `problem` in the case's layout; each row's out (Sq, Hq, Dv) and lse (Hq, Sq)."""
    layout = case["layout"]
    arrange = strided if case.get("memory") == "strided" else torch.Tensor.contiguous
    options = {"max_seqlen_q": max(map(len, problem.q)), "max_seqlen_k": max(map(len, problem.k))}
    if dense_queries(case):
        q = arrange(torch.stack(problem.q))
    else:
        q, options["cu_seqlens_q"] = packed(problem.q)
        q = arrange(q)
    if layout.startswith("paged"):
        k, v, options["block_table"] = paged(problem, int(layout.removeprefix("paged").split("-")[0]))
        if layout.endswith("-cu"):
            options["cu_seqlens_k"] = packed(problem.k)[1]
        else:
            options["seqused_k"] = problem.lengths(problem.k)
    elif "dense" in layout:
        room = options["max_seqlen_k"] + (11 if "used" in layout else 0)
        k, v = dense(problem.k, room), dense(problem.v, room)
    else:
        room = [len(k) + (7 if "used" in layout else 0) for k in problem.k]
        k, options["cu_seqlens_k"] = packed(problem.k, room)
        v, _ = packed(problem.v, room)
    if "used" in layout:
        options["seqused_k"] = problem.lengths(problem.k)
    out, lse = flash_forward(q, arrange(k), arrange(v), **options, **problem.scoring)
    if dense_queries(case):
        return list(out), list(lse)
    lengths = [len(rows) for rows in problem.q]
    return list(out.split(lengths)), list(lse.split(lengths, 1))


def case_lengths(case):
    """The case's rows; a dense tensor has one length for all of them."""
    rows = LENGTHS[case["lengths"]]
    longest_q, longest_k = max(q for q, _ in rows), max(k for _, k in rows)
    if case["layout"] in ("dense", "copied-dense"):
        return [(longest_q, longest_k)] * 2
    return [(longest_q, k) for _, k in rows] if dense_queries(case) else rows


CASES = pairwise(
    {
        "dims": (16, 24, 40, 64, 80, 96, 128, 256, (192, 128)),
        "heads": ((2, 2), (4, 2), (3, 1)),
        "mask": tuple(MASKS),
        "extras": EXTRAS,
        "layout": LAYOUTS,
        "lengths": ("odd", "blind", "edges", "tiles"),
        "dtype": ("fp32", "fp16"),
        "memory": ("contiguous", "strided"),
    }
)
GPU_CASES = pairwise(
    {
        "dims": (64, 128, 256, (192, 128), 40),
        "dtype": ("bf16", "fp16", "fp32"),
        "layout": ("dense", "varlen", "paged16", "paged256"),
        "mask": ("causal", "full", "window"),
        "extras": ("plain", "softcap-sinks"),
        "lengths": ("long-odd", "long-tiles"),
        "heads": ((8, 8), (8, 2)),
        "memory": ("contiguous", "strided"),
    }
)


@pytest.fixture
def copied(monkeypatch):
    """K and V come through tensor descriptors, as the copy engine of a GPU loads them."""
    monkeypatch.setattr(configs, "has_descriptors", lambda dtype, device: True)


def test_matches_fp64(case, device, request):
    if case["layout"].startswith("copied"):
        request.getfixturevalue("copied")
    problem = make_problem(case_lengths(case), device=device, **case)
    check(problem, *run(case, problem))


# what the tests below vary around
PLAIN = {"dims": 64, "heads": (4, 2), "mask": "causal", "dtype": "fp16"}


@pytest.mark.parametrize("layout", ["varlen", "paged16"])
def test_a_row_does_not_depend_on_its_neighbours(layout, device):
    case = {**PLAIN, "layout": layout}
    problem = make_problem(LENGTHS["odd"], device=device, **case)
    outs, lses = run(case, problem)
    for b in range(len(outs)):
        alone = Problem(problem.q[b : b + 1], problem.k[b : b + 1], problem.v[b : b + 1], problem.scoring)
        (out,), (lse,) = run(case, alone)
        assert torch.equal(out, outs[b]) and torch.equal(lse, lses[b])


@pytest.mark.parametrize("layout", ["varlen", "paged16", "copied-varlen"])
@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value")
def test_nan_stays_in_its_row(layout, device, request):
    if layout.startswith("copied"):
        request.getfixturevalue("copied")
    case = {**PLAIN, "layout": layout}
    problem = make_problem(LENGTHS["odd"], device=device, **case)
    expected, _ = run(case, problem)
    for rows in (problem.q, problem.k, problem.v):
        rows[1].fill_(math.nan)
    outs, _ = run(case, problem)
    assert outs[1].isnan().all()
    assert torch.equal(outs[0], expected[0]) and torch.equal(outs[2], expected[2])


@pytest.mark.parametrize("block_size", [16, 64])
def test_physical_blocks_change_no_bit(block_size, device):
    case = {**PLAIN, "layout": f"paged{block_size}"}
    problem = make_problem(LENGTHS["odd"], device=device, **case)
    results, tables = [], []
    for seed in (1, 2):
        problem.block_order.manual_seed(seed)
        tables.append(paged(problem, block_size)[2])
        problem.block_order.manual_seed(seed)
        outs, lses = run(case, problem)
        results.append(outs + lses)
    assert not torch.equal(*tables)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_block_size_changes_no_result(device):
    problem = make_problem(LENGTHS["odd"], device=device, **PLAIN)
    expected, _ = run({**PLAIN, "layout": "varlen"}, problem)
    for block_size in (16, 32, 48, 64, 128, 256):
        outs, _ = run({**PLAIN, "layout": f"paged{block_size}"}, problem)
        for out, same in zip(outs, expected, strict=True):
            torch.testing.assert_close(out, same, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("extras", ["plain", "sinks"])
def test_queries_that_see_no_key_give_zero(extras, device):
    case = {**PLAIN, "extras": extras, "layout": "varlen"}
    problem = make_problem([(40, 3), (33, 0)], device=device, **case)
    outs, lses = run(case, problem)
    for out, lse, blind in zip(outs, lses, (37, 33), strict=True):
        assert (out[:blind] == 0).all() and (lse[:, :blind] == -math.inf).all()
        assert (out[blind:] != 0).all() and torch.isfinite(lse[:, blind:]).all()


@pytest.mark.parametrize("layout", ["dense-used", "paged32"])
def test_a_length_below_zero_counts_as_zero(layout, device):
    case = {**PLAIN, "layout": layout}
    problem = make_problem([(5, 40), (5, 0), (5, 33)], device=device, **case)
    expected, _ = run(case, problem)
    problem.lengths = lambda rows: torch.tensor([40, -1, 33], dtype=torch.int32, device=device)
    outs, lses = run(case, problem)
    assert (outs[1] == 0).all() and (lses[1] == -math.inf).all()
    assert all(torch.equal(out, same) for out, same in zip(outs, expected, strict=True))


@pytest.mark.parametrize("layout", ["dense-used", "varlen-used", "paged16", "paged32"])
def test_a_length_beyond_the_keys_counts_as_the_keys(layout, device):
    case = {**PLAIN, "layout": layout}
    options = {"max_seqlen_q": 4, "max_seqlen_k": 96}
    problem = make_problem([(4, 96), (4, 96)], device=device, **case)
    q, k, v = dense(problem.q, 4), dense(problem.k, 96), dense(problem.v, 96)
    if layout.startswith("paged"):
        k, v, table = paged(problem, int(layout.removeprefix("paged")))
        options["block_table"] = table[:, : 96 // k.shape[1]].contiguous()
    elif layout == "varlen-used":
        (q, options["cu_seqlens_q"]), (k, options["cu_seqlens_k"]) = packed(problem.q), packed(problem.k)
        v, _ = packed(problem.v)
    options["seqused_k"] = torch.tensor([97, 5000], dtype=torch.int32, device=device)
    out, _ = flash_forward(q, k, v, **options, **problem.scoring)
    expected, _ = run({**case, "layout": "varlen"}, problem)
    torch.testing.assert_close(out.reshape(-1, *out.shape[-2:]), torch.cat(expected), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_nothing_to_do(empty, device):
    batch, seqlen_q, seqlen_k = (0 if empty == name else 3 for name in ("batch", "queries", "keys"))
    q = torch.ones(batch, seqlen_q, 4, 16, device=device)
    k = v = torch.ones(batch, seqlen_k, 2, 16, device=device)
    options = {"max_seqlen_q": seqlen_q, "max_seqlen_k": seqlen_k, "softmax_scale": 1.0, "causal": False}
    out, lse = flash_forward(q, k, v, **options)
    assert out.shape == q.shape and (out == 0).all()
    assert lse.shape == (batch, 4, seqlen_q) and (lse == -math.inf).all()


@pytest.mark.parametrize("extras", ["plain", "softcap"])
@pytest.mark.parametrize("scale", [-0.3, 0.0, 4.0], ids="scale{}".format)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # NumPy, where tanh saturates
def test_softmax_scales(scale, extras, device):
    case = {**PLAIN, "extras": extras, "dtype": "fp32", "layout": "varlen", "scale": scale}
    problem = make_problem(LENGTHS["odd"], device=device, **case)
    check(problem, *run(case, problem))


def test_keys_of_a_group_are_its_own(device):
    # every KV head's values are its number, so a query head's output tells which one it read
    q = torch.randn(1, 5, 6, 16, device=device)
    k = torch.randn(1, 40, 3, 16, device=device)
    v = torch.arange(3.0, device=device)[None, None, :, None].expand(1, 40, 3, 16).contiguous()
    out, _ = flash_forward(q, k, v, max_seqlen_q=5, max_seqlen_k=40, softmax_scale=0.25, causal=False)
    heads = torch.tensor([0.0, 0, 1, 1, 2, 2], device=device)[None, None, :, None]
    torch.testing.assert_close(out, heads.expand_as(out))


@pytest.mark.parametrize("block_size", [16, 32])
def test_blocks_beyond_2_to_31_elements(block_size, far_pool, device):
    case = {**PLAIN, "heads": (2, 1), "dims": 16, "layout": f"paged{block_size}"}
    problem = make_problem([(3, 2 * block_size)], device=device, **case)
    k_cache, v_cache, table = far_pool(problem, block_size)
    used = problem.lengths(problem.k)
    options = {"max_seqlen_q": 3, "max_seqlen_k": 2 * block_size, "block_table": table, "seqused_k": used}
    out, lse = flash_forward(problem.q[0][None], k_cache, v_cache, **options, **problem.scoring)
    check(problem, [out[0]], [lse[0]])


PRECISIONS = {
    "set_float32_matmul_precision": lambda: torch.set_float32_matmul_precision("high"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "fp32_precision": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "fp32_precision of products": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
}


@pytest.mark.usefixtures("precision_of_fp32")
@pytest.mark.parametrize("allow", PRECISIONS.values(), ids=PRECISIONS)
def test_tf32_where_torch_allows_it(allow):
    assert dot_precision(torch.float32) == "ieee"
    allow()
    assert [dot_precision(dtype) for dtype in (torch.float32, torch.float16)] == ["tf32", "ieee"]
