"""kernels/paged_decode.py against fp64, every feature alone and combined with every other one."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from hf_paged_flash.kernels.paged_decode import paged_decode  # noqa: E402
from tests.kernels.attention_problem import (  # noqa: E402
    EXTRAS,
    MASKS,
    Problem,
    check,
    dense,
    make_problem,
    paged,
    strided,
)
from tests.kernels.pairwise import pairwise  # noqa: E402

# tokens in the cache, the new ones included; a tile in the interpreter is 32 keys
LENGTHS = {
    "odd": (111, 1, 63, 33),
    "edges": (0, 1, 15, 2, 16, 17),
    "tiles": (32, 64, 31, 65, 96),
    "long": (301, 17, 129),
    "huge": (5000, 1, 333, 2048),
}
CASES = pairwise(
    {
        "dims": (16, 24, 40, 64, 80, 96, 128, 256, (192, 128)),
        "heads": ((2, 2), (4, 2), (6, 2), (7, 1), (16, 1)),
        "mask": tuple(MASKS),
        "extras": EXTRAS,
        "page": (0, 16, 32, 64, 128, 256),
        "q": (1, 2, 5, 16),
        "splits": (0, 1, 3, 7),
        "lengths": ("odd", "edges", "tiles", "long"),
        "dtype": ("fp32", "fp16"),
        "memory": ("contiguous", "strided"),
    },
    # the interpreter runs one program of the reduce kernel for each query of each head
    allowed=lambda case: case["heads"][0] * case["q"] * len(LENGTHS[case["lengths"]]) <= 350,
)
GPU_CASES = pairwise(
    {
        "dims": (64, 128, 256, (192, 128)),
        "page": (0, 16, 64),
        "dtype": ("bf16", "fp16", "fp32"),
        "heads": ((8, 8), (32, 8), (16, 2)),
        "mask": ("causal", "sliding"),
        "extras": ("plain", "softcap-sinks"),
        "q": (1, 5, 16),
        "splits": (0, 1, 7),
        "lengths": ("odd", "huge"),
        "memory": ("contiguous", "strided"),
    }
)


def make(case, device="cpu", lengths=None):
    lengths = LENGTHS[case["lengths"]] if lengths is None else lengths
    return make_problem([(case["q"], length) for length in lengths], device=device, **case)


def run(case, problem, cache_seqlens=None):
    """Launches `problem` in blocks of `case["page"]` tokens, 0: dense; each row's out (Sq, Hq, Dv), lse (Hq, Sq)."""
    arrange = strided if case.get("memory") == "strided" else torch.Tensor.contiguous
    table = None
    if case["page"]:
        k_cache, v_cache, table = paged(problem, case["page"])
    else:
        room = max(map(len, problem.k)) + 9
        k_cache, v_cache = dense(problem.k, room), dense(problem.v, room)
    out, lse = paged_decode(
        arrange(torch.stack(problem.q)),
        arrange(k_cache),
        arrange(v_cache),
        cache_seqlens=problem.lengths(problem.k) if cache_seqlens is None else cache_seqlens,
        block_table=table,
        num_splits=case["splits"],
        **problem.scoring,
    )
    return list(out), list(lse)


def test_matches_fp64(case, device):
    problem = make(case, device)
    check(problem, *run(case, problem))


# what the tests below vary around
PLAIN = {
    "dims": 64, "heads": (8, 2), "mask": "causal", "dtype": "fp16", "page": 16, "q": 2, "splits": 3, "lengths": "odd"
}  # fmt: skip


@pytest.mark.parametrize("page", [0, 16])
def test_a_row_does_not_depend_on_its_neighbours(page, device):
    case = {**PLAIN, "page": page}
    problem = make(case, device)
    outs, lses = run(case, problem)
    for b in range(len(outs)):
        alone = Problem(problem.q[b : b + 1], problem.k[b : b + 1], problem.v[b : b + 1], problem.scoring)
        (out,), (lse,) = run(case, alone)
        assert torch.equal(out, outs[b]) and torch.equal(lse, lses[b])


@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value")
@pytest.mark.parametrize("splits", [1, 3])
def test_nan_stays_in_its_row(splits, device):
    case = {**PLAIN, "splits": splits, "extras": "sinks"}
    problem = make(case, device)
    expected, _ = run(case, problem)
    for rows in (problem.q, problem.k, problem.v):
        rows[2].fill_(math.nan)
    outs, _ = run(case, problem)
    assert outs[2].isnan().all()
    assert all(torch.equal(outs[b], expected[b]) for b in (0, 1, 3))


@pytest.mark.parametrize("page", [16, 64])
def test_physical_blocks_change_no_bit(page, device):
    case = {**PLAIN, "page": page}
    problem = make(case, device)
    results, tables = [], []
    for seed in (1, 2):
        problem.block_order.manual_seed(seed)
        tables.append(paged(problem, page)[2])
        problem.block_order.manual_seed(seed)
        outs, lses = run(case, problem)
        results.append(outs + lses)
    assert not torch.equal(*tables)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("varied, values", [("page", (16, 32, 48, 64, 128, 256)), ("splits", (0, 1, 2, 3, 7, 40))])
def test_how_the_keys_are_divided_changes_no_result(varied, values, device):
    case = {**PLAIN, "dtype": "fp32", "extras": "sinks"}
    problem = make(case, device)
    expected = run({**case, varied: values[0]}, problem)
    for value in values[1:]:
        results = run({**case, varied: value}, problem)
        for result, same in zip(results[0] + results[1], expected[0] + expected[1], strict=True):
            torch.testing.assert_close(result, same, rtol=1e-5, atol=1e-5)


def test_more_splits_than_are_reduced_at_once(device):
    case = {**PLAIN, "dims": 256, "heads": (1, 1), "page": 64, "q": 1, "splits": 70}
    problem = make(case, device, lengths=(70 * 32 - 3, 33))
    problem.k[0][:-150] *= 0.1  # the last splits count most
    problem.k[0][-150:] *= 3.0
    check(problem, *run(case, problem))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("page", [0, 16])
def test_a_row_without_tokens_gives_zero(page, splits, device):
    # a finished row of a batch that goes on: its length is -1 and its table row holds no block
    case = {**PLAIN, "page": page, "splits": splits, "extras": "sinks"}
    problem = make(case, device, lengths=(40, 0, 33))
    outs, lses = run(case, problem, torch.tensor([40, -1, 33], dtype=torch.int32, device=device))
    assert (outs[1] == 0).all() and (lses[1] == -math.inf).all()
    check(problem, outs, lses)


def test_queries_before_the_first_key_give_zero(device):
    case = {**PLAIN, "q": 5, "extras": "sinks"}
    problem = make(case, device, lengths=(2, 40))
    outs, lses = run(case, problem)
    assert (outs[0][:3] == 0).all() and (lses[0][:, :3] == -math.inf).all()
    check(problem, outs, lses)


def test_lengths_are_read_on_the_device(device):
    # one launch, the same pool and table: only the lengths change
    problem = make(PLAIN, device, lengths=(70, 70))
    for lengths in ((70, 33), (1, 70), (16, 17)):
        short = [(k[:n], v[:n]) for k, v, n in zip(problem.k, problem.v, lengths, strict=True)]
        expected = Problem(problem.q, [k for k, _ in short], [v for _, v in short], problem.scoring)
        cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
        check(expected, *run(PLAIN, problem, cache_seqlens))


def test_a_length_beyond_the_table_counts_as_the_table(device):
    problem = make({**PLAIN, "page": 0}, device, lengths=(70, 33))
    k, v = dense(problem.k[:1], 70), dense(problem.v[:1], 70)
    out, lse = paged_decode(
        problem.q[0][None],
        k,
        v,
        cache_seqlens=torch.tensor([500], dtype=torch.int32, device=device),
        **problem.scoring,
    )
    check(Problem(problem.q[:1], problem.k[:1], problem.v[:1], problem.scoring), list(out), list(lse))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 4.0], ids="scale{}".format)
@pytest.mark.parametrize("extras", ["plain", "softcap"])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # NumPy, where tanh saturates
def test_softmax_scales(scale, extras, device):
    case = {**PLAIN, "dtype": "fp32", "scale": scale, "extras": extras}
    problem = make(case, device)
    check(problem, *run(case, problem))


def test_an_empty_batch(device):
    q, cache = torch.ones(0, 1, 4, 16, device=device), torch.ones(3, 16, 2, 16, device=device)
    table = torch.ones(0, 2, dtype=torch.int32, device=device)
    options = {"cache_seqlens": table[:, 0], "block_table": table, "softmax_scale": 1.0, "causal": True}
    out, lse = paged_decode(q, cache, cache, **options)
    assert out.shape == q.shape and lse.shape == (0, 4, 1)


@pytest.mark.parametrize("page", [16, 64])
def test_blocks_beyond_2_to_31_elements(page, far_pool, device):
    problem = make({**PLAIN, "heads": (2, 1), "dims": 16}, device, lengths=(2 * page,))
    k_cache, v_cache, table = far_pool(problem, page)
    used = problem.lengths(problem.k)
    out, lse = paged_decode(
        problem.q[0][None], k_cache, v_cache, cache_seqlens=used, block_table=table, num_splits=2, **problem.scoring
    )
    check(problem, list(out), list(lse))
