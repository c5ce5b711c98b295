"""The benchmarks' own checks, and their commands on a CPU, where they show that they work and no rate is meant."""

import json
import math
from contextlib import contextmanager

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from typer.testing import CliRunner

from hf_paged_flash import flash_attn_func
from hf_paged_flash.errors import ArgumentError
from hf_paged_flash.eval.bench import attention_cases, compile_ahead, flash_attention, linear, paged_decode
from hf_paged_flash.eval.bench.attention_cases import Case
from hf_paged_flash.eval.bench.correctness import (
    MAX_ERROR_RATIO,
    attention_rows,
    error_ratio,
    gradient_error_ratios,
    head_gradients,
)
from hf_paged_flash.eval.bench.timing import interleaved_ms, replayed_us
from hf_paged_flash.kernels import hopper


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [1, 5, 9])
def test_attention_rows_agree_with_sdpa(queries, causal):
    q, k, v = torch.randn(queries, 8), torch.randn(9, 8), torch.randn(9, 8)
    mask = torch.ones(queries, 9, dtype=torch.bool).tril(9 - queries) if causal else None
    expected = scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0]
    rows = torch.arange(queries)
    torch.testing.assert_close(attention_rows(q, k, v, rows, causal=causal), expected)


def test_error_ratio_accepts_eager_and_refuses_what_is_wrong():
    q, k, v = (torch.randn(2, 33, heads, 16, dtype=torch.bfloat16) for heads in (4, 2, 2))
    exact = scaled_dot_product_attention(
        *(x.transpose(1, 2).double() for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    assert error_ratio(exact.bfloat16(), q, k, v, causal=True) <= MAX_ERROR_RATIO
    assert error_ratio(exact.bfloat16(), q, k, v, causal=False) > MAX_ERROR_RATIO
    shifted = exact.bfloat16().roll(1, 2)
    assert error_ratio(shifted, q, k, v, causal=True) > MAX_ERROR_RATIO
    broken = exact.bfloat16()
    broken[1, 5, 3, 2] = math.nan
    assert math.isnan(error_ratio(broken, q, k, v, causal=True))


@pytest.mark.parametrize("causal", [True, False])
def test_head_gradients_are_autograds(causal, monkeypatch):
    monkeypatch.setattr("hf_paged_flash.eval.bench.correctness.ROWS_AT_ONCE", 7)
    q, k, v, dout = (torch.randn(20, 8, dtype=torch.float64) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = scaled_dot_product_attention(*(x[None] for x in leaves), is_causal=causal)[0]
    expected = torch.autograd.grad(out, leaves, dout)
    torch.testing.assert_close(head_gradients(q, k, v, dout, causal=causal, rounding=torch.float64), expected)


@pytest.mark.parametrize("causal", [True, False])
def test_gradient_error_ratios_accept_ours_and_refuse_what_is_wrong(causal):
    q, k, v, dout = (torch.randn(2, 33, heads, 16, dtype=torch.bfloat16) for heads in (4, 2, 2, 4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dq, dk, dv = torch.autograd.grad(flash_attn_func(*leaves, causal=causal), leaves, dout)
    broken = dk.clone()
    broken[1, 5, 1, 2] = math.nan
    candidates = {"ours": (dq, dk, dv), "shifted": (dq, dk, dv.roll(1, 1)), "broken": (dq, broken, dv)}
    candidates["of one query head"] = (dq, dk / 2, dv)
    ratios = gradient_error_ratios(candidates, q, k, v, dout, causal=causal)
    assert ratios.pop("ours") <= MAX_ERROR_RATIO and math.isnan(ratios.pop("broken"))
    assert min(ratios.values()) > MAX_ERROR_RATIO


def test_cases_count_their_operations():
    assert Case("fwd", 2, 4, 2, 64, 32, False).flops == 4 * 2 * 4 * 64**2 * 32
    assert Case("bwd", 2, 4, 2, 64, 32, True).flops == 2.5 * 2 * 2 * 4 * 64**2 * 32
    packed = attention_cases.packed_case("fwd", 65536, 32, 8, 128)
    assert packed.tokens == sum(packed.lengths) == 65536 and len(packed.lengths) == packed.b
    assert packed.flops == 2 * 32 * 128 * sum(n * n for n in packed.lengths)
    dense = packed.dense
    assert dense.tokens == pytest.approx(packed.tokens, rel=0.05)
    assert dense.flops == pytest.approx(packed.flops, rel=0.05) and not dense.lengths
    assert packed.row["packed"] == {
        "tokens": 65536, "shortest": min(packed.lengths), "dense_b": dense.b, "dense_s": dense.s,
    }  # fmt: skip


def test_log_uniform_lengths_fill_the_tokens():
    lengths = attention_cases.log_uniform_lengths(65536, 256, 16384)
    assert sum(lengths) == 65536 and max(lengths) <= 16384 and min(lengths[:-1]) >= 256
    assert sum(n < 2048 for n in lengths) / len(lengths) == pytest.approx(0.5, abs=0.15)  # the geometric middle


def test_calls_take_turns_inside_their_setting():
    order, times = [], {"a": 0, "b": 0}

    @contextmanager
    def around(name):
        order.append(name)
        yield

    calls = {name: lambda name=name: times.update({name: times[name] + 1}) for name in times}
    found = interleaved_ms(calls, torch.device("cpu"), around)
    assert found.keys() == times.keys() and min(times.values()) >= 3 and set(order) == set(times)


def test_portable_kernels_are_measured_with_hoppers_switched_off():
    device = torch.device("cpu")
    before = hopper.unavailable(device)
    with flash_attention.setting("paged_flash_portable"), flash_attention.setting("paged_flash_portable"):
        assert "switched off" in hopper.unavailable(device)
    assert hopper.unavailable(device) == before != "switched off"


def test_calls_that_share_kernels_compile_in_one_process():
    cases = [Case("fwd", 1, 2, 1, s, 16, causal) for s in (16, 32) for causal in (True, False)]
    cases.append(attention_cases.packed_case("bwd", 64, 2, 1, 16))
    names = ["paged_flash", "sdpa_fa2", "flex"]
    groups = compile_ahead._groups(cases, names, torch.device("cpu"))
    assert sorted(len(grouped) for impl, grouped in groups if impl == "paged_flash") == [1, 2, 2]
    assert [len(grouped) for impl, grouped in groups if impl == "flex"] == [1] * 4
    assert {impl for impl, _ in groups} == {"paged_flash", "flex"}
    for impl, grouped in groups:
        if impl == "paged_flash":
            compile_ahead._run_once(impl, grouped, torch.device("cpu"))


def test_paged_sets_hold_the_dense_keys_in_scrambled_blocks():
    case = paged_decode.Case(b=3, ctx=40, block_size=16, h=4, hk=2, d=8)
    first, second = paged_decode.paged_sets(case, torch.device("cpu"))
    assert not torch.equal(first.k, second.k)
    assert sorted(first.block_table.flatten().tolist()) == list(range(9))
    assert first.block_table.flatten().tolist() != list(range(9))
    k, _ = first.dense(case.ctx)
    assert torch.equal(k[1, 17], first.k[first.block_table[1, 1], 1])
    assert case.kv_bytes == 2 * k.numel() * 2


def run(app, *arguments):
    result = CliRunner().invoke(app, ["--device", "cpu", *map(str, arguments)])
    return result, json.loads(result.stdout.strip().splitlines()[-1])


def test_flash_attention_command(tmp_path):
    options = ["--implementations", "paged_flash,sdpa_fa2,sdpa_cudnn", "--shapes", "1,4,2,64,64;2,2,2,33,32"]
    result, summary = run(flash_attention.app, *options, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "flash_attention.jsonl").read_text().splitlines()]
    # cuDNN attends on GPUs alone: that is said, and no row pretends otherwise.
    assert {row["impl"] for row in rows} == {"paged_flash", "sdpa_fa2"}
    assert "– sdpa_cudnn, 8 of 8 cases" in result.stdout
    assert rows[0]["case"] == {"pass": "fwd", "b": 1, "h": 4, "hk": 2, "s": 64, "d": 64, "causal": True}
    assert [row["case"]["pass"] for row in rows] == ["fwd"] * 8 + ["bwd"] * 8
    assert {row["run"] for row in rows} == {summary["run"]} and len(summary["rows"]) == 8
    assert all(0 <= row["error_ratio"]["paged_flash"] <= MAX_ERROR_RATIO for row in summary["rows"])


def test_portable_kernels_that_are_the_only_ones_are_not_measured_twice():
    options = ["--implementations", "paged_flash,paged_flash_portable", "--shapes", "1,2,2,16,16", "--passes", "bwd"]
    result, summary = run(flash_attention.app, *options)
    assert result.exit_code == 0 and "– paged_flash_portable, 2 of 2 cases: paged_flash runs the" in result.stdout
    assert [list(row["tflops"]) for row in summary["rows"]] == [["paged_flash"]] * 2


def test_packed_rows_stand_beside_a_dense_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(attention_cases, "SHAPES", ())
    monkeypatch.setattr(attention_cases, "SHORTEST", 32)
    options = ["--implementations", "paged_flash,sdpa_fa2", "--packed-tokens", "200", "--out", tmp_path]
    result, summary = run(flash_attention.app, *options)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "flash_attention.jsonl").read_text().splitlines()]
    packed = [row["case"] for row in rows if "packed" in row["case"]]
    dense = [row["case"] for row in rows if "packed" not in row["case"] and row["impl"] == "paged_flash"]
    assert [(case["pass"], case["d"]) for case in packed] == [("fwd", 128), ("fwd", 64), ("bwd", 128), ("bwd", 64)]
    wanted = [(case["packed"]["dense_b"], case["packed"]["dense_s"]) for case in packed]
    assert wanted == [(case["b"], case["s"]) for case in dense]
    assert "≤" in result.stdout and all(item["error_ratio"]["paged_flash"] <= 2 for item in summary["rows"])


def test_paged_decode_command(tmp_path):
    options = ["--implementations", "paged_flash,sdpa_fa2", "--shapes", "2,50", "--block-sizes", "16,32"]
    result, summary = run(paged_decode.app, *options, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "paged_decode.jsonl").read_text().splitlines()]
    assert [row["metric"] for row in rows[:2]] == ["us", "gbps"] and len(rows) == 8
    assert rows[0]["case"] == {"b": 2, "ctx": 50, "block_size": 16, "h": 32, "hk": 8, "d": 128}
    assert rows[0]["value"] * rows[1]["value"] == pytest.approx(2 * 2 * 2 * 50 * 8 * 128 / 1e3)


def test_linear_command(tmp_path, monkeypatch):
    options = ["--shapes", "1,64,128;2,32,256"]
    result, summary = run(linear.app, *options, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "linear.jsonl").read_text().splitlines()]
    assert [(row["impl"], row["metric"]) for row in rows[:2]] == [("paged_flash", "us"), ("paged_flash", "gbps")]
    assert len(rows) == 8 and rows[0]["case"] == {"rows": 1, "n": 64, "k": 128}
    assert rows[0]["value"] * rows[1]["value"] == pytest.approx(2 * 64 * 128 / 1e3)

    monkeypatch.setattr(linear.layers, "linear", lambda x, weight: 1.01 * torch.nn.functional.linear(x, weight))
    result, summary = run(linear.app, *options, "--out", tmp_path / "wrong")
    assert result.exit_code == 1 and len(summary["wrong"]) == 2 and not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("module", [flash_attention, paged_decode])
@pytest.mark.parametrize("shapes", ["1,2,3", "1,x", "0,5", "", "1,2;3"])
def test_shapes_that_are_none_are_refused(module, shapes):
    result = CliRunner().invoke(module.app, ["--device", "cpu", "--shapes", shapes])
    assert isinstance(result.exception, ArgumentError) and "`shapes` must be" in str(result.exception)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", [flash_attention, linear, paged_decode])
def test_missing_gpu_is_said(module):
    assert "torch finds no GPU" in str(CliRunner().invoke(module.app, []).exception)


@pytest.mark.gpu
def test_graph_replay_gives_the_time_of_one_call():
    x = torch.randn(2**28, device="cuda")
    one, four = (replayed_us([lambda: torch.add(x, 1)] * calls, x.device) for calls in (1, 4))
    assert one == pytest.approx(four, rel=0.3)
    by_events = interleaved_ms({"add": lambda: torch.add(x, 1)}, x.device)["add"] * 1e3
    assert four == pytest.approx(by_events, rel=0.3)


@pytest.mark.parametrize("module", [flash_attention, paged_decode])
def test_wrong_output_is_exit_status_1_and_no_row(module, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "error_ratio", lambda *arguments, **options: math.nan)
    shapes = ["1,2,2,8,16", "--passes", "fwd"] if module is flash_attention else ["1,20"]
    result, summary = run(module.app, "--implementations", "paged_flash", "--out", tmp_path, "--shapes", *shapes)
    assert result.exit_code == 1 and summary["wrong"] and not list(tmp_path.iterdir())
