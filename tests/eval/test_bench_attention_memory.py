"""The benchmark of attention's memory: its comparison on a CPU, its bytes on a GPU."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from hf_paged_flash.eval.bench import attention_memory
from hf_paged_flash.eval.bench.attention_memory import Case, Measured, difference, measure_all


def run(*arguments):
    result = CliRunner().invoke(attention_memory.app, [*map(str, arguments)])
    return result, json.loads(result.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("direction", attention_memory.PASSES)
def test_all_implementations_agree(direction):
    found = measure_all(Case(direction, 50, 4, 2, 16), ["eager", "paged_flash", "sdpa"], torch.device("cpu"))
    assert list(found) == ["sdpa", "paged_flash", "eager"] and found["sdpa"].difference is None
    assert 0 < found["paged_flash"].difference < attention_memory.TOLERANCE
    assert 0 < found["eager"].difference < attention_memory.TOLERANCE
    assert not any(item.results for item in found.values())


def test_difference_is_the_largest_and_keeps_nan():
    x, y = torch.ones(4), torch.full((4,), 1.5)
    assert difference((x, y), (x, x)) == 0.5
    assert math.isnan(difference((x, torch.full((4,), math.nan)), (x, x)))


def test_a_wrong_result_is_exit_status_1_and_no_row(tmp_path, monkeypatch):
    monkeypatch.setitem(attention_memory.CALLS, "paged_flash", lambda q, k, v: q * v.mean())
    options = ["--device", "cpu", "--lengths", "20", "--heads", "2,2,16", "--passes", "fwd"]
    result, summary = run(*options, "--implementations", "sdpa,paged_flash", "--out", tmp_path)
    assert result.exit_code == 1 and summary["wrong"][0]["impl"] == "paged_flash" and not list(tmp_path.iterdir())


def test_rows(tmp_path, monkeypatch):
    def measured(case, implementations, device):
        return {"paged_flash": Measured(extra=2**20, ms=2.5), "eager": Measured(out_of_memory=True)}

    monkeypatch.setattr(attention_memory, "measure_all", measured)
    options = ["--device", "cpu", "--lengths", "4096", "--implementations", "paged_flash,eager", "--out", tmp_path]
    result, _ = run(*options)
    assert result.exit_code == 0 and "out of memory" in result.stdout and "1.0 (2.5)" in result.stdout
    rows = [json.loads(line) for line in (tmp_path / "attention_memory.jsonl").read_text().splitlines()]
    assert rows[0]["case"] == {"pass": "fwd", "b": 1, "s": 4096, "h": 32, "hk": 8, "d": 128, "causal": True}
    assert [(row["impl"], row["metric"], row["value"]) for row in rows[:3]] == [
        ("paged_flash", "extra_gib", 2**-10), ("paged_flash", "ms", 2.5), ("eager", "out_of_memory", 1),
    ]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("direction", attention_memory.PASSES)
def test_ours_grows_no_faster_than_the_length(direction):
    extra = []
    for length in (4096, 16384):
        found = measure_all(Case(direction, length), ["paged_flash", "sdpa"], torch.device("cuda"))
        assert found["paged_flash"].difference <= attention_memory.TOLERANCE
        extra.append(found["paged_flash"].extra)
    assert extra[1] <= 4.2 * extra[0]
