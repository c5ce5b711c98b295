"""The benchmarks' own checks, and their commands on a CPU, where they show that they work and no rate is meant."""

import json
import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from typer.testing import CliRunner

from hf_paged_flash.errors import ArgumentError
from hf_paged_flash.eval.bench import flash_attention, paged_decode
from hf_paged_flash.eval.bench.correctness import MAX_ERROR_RATIO, attention_rows, error_ratio
from hf_paged_flash.eval.bench.timing import median_ms, replayed_us


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
    assert {row["impl"] for row in rows} == {
        "paged_flash",
        "sdpa_fa2",
    } and "– sdpa_cudnn, 4 of 4 cases" in result.stdout
    assert rows[0]["case"] == {"pass": "fwd", "b": 1, "h": 4, "hk": 2, "s": 64, "d": 64, "causal": True}
    assert {row["run"] for row in rows} == {summary["run"]} and len(summary["rows"]) == 4
    assert all(0 <= row["error_ratio"] <= MAX_ERROR_RATIO for row in summary["rows"])


def test_paged_decode_command(tmp_path):
    options = ["--implementations", "paged_flash,sdpa_fa2", "--shapes", "2,50", "--block-sizes", "16,32"]
    result, summary = run(paged_decode.app, *options, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "paged_decode.jsonl").read_text().splitlines()]
    assert [row["metric"] for row in rows[:2]] == ["us", "gbps"] and len(rows) == 8
    assert rows[0]["case"] == {"b": 2, "ctx": 50, "block_size": 16, "h": 32, "hk": 8, "d": 128}
    assert rows[0]["value"] * rows[1]["value"] == pytest.approx(2 * 2 * 2 * 50 * 8 * 128 / 1e3)


@pytest.mark.parametrize("module", [flash_attention, paged_decode])
@pytest.mark.parametrize("shapes", ["1,2,3", "1,x", "0,5", "", "1,2;3"])
def test_shapes_that_are_none_are_refused(module, shapes):
    result = CliRunner().invoke(module.app, ["--device", "cpu", "--shapes", shapes])
    assert isinstance(result.exception, ArgumentError) and "`shapes` must be" in str(result.exception)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", [flash_attention, paged_decode])
def test_missing_gpu_is_said(module):
    assert "torch finds no GPU" in str(CliRunner().invoke(module.app, []).exception)


@pytest.mark.gpu
def test_graph_replay_gives_the_time_of_one_call():
    x = torch.randn(2**28, device="cuda")
    one, four = (replayed_us([lambda: torch.add(x, 1)] * calls, x.device) for calls in (1, 4))
    assert one == pytest.approx(four, rel=0.3)
    by_events = median_ms(lambda: torch.add(x, 1), x.device) * 1e3
    assert four == pytest.approx(by_events, rel=0.3)


@pytest.mark.parametrize("module", [flash_attention, paged_decode])
def test_wrong_output_is_exit_status_1_and_no_row(module, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "error_ratio", lambda *arguments, **options: math.nan)
    shape = "1,2,2,8,16" if module is flash_attention else "1,20"
    result, summary = run(module.app, "--implementations", "paged_flash", "--shapes", shape, "--out", tmp_path)
    assert result.exit_code == 1 and summary["wrong"] and not list(tmp_path.iterdir())
