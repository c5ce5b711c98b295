"""The training benchmark on a CPU, where it shows that it works and no rate is meant."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from hf_paged_flash.eval.bench import training
from hf_paged_flash.eval.bench.training import Case, Measured

TINY = ["--device", "cpu", "--layers", "1", "--hidden-size", "256", "--steps", "1", "--lengths", "24"]


def run(*arguments):
    result = CliRunner().invoke(training.app, [*TINY, *map(str, arguments)])
    return result, json.loads(result.stdout.strip().splitlines()[-1])


def test_the_model_has_a_billion_parameters():
    with torch.device("meta"):
        model = training.model_of("paged_flash", Case(65536), torch.device("meta"))
    assert sum(x.numel() for x in model.parameters()) == pytest.approx(1.04e9, rel=0.01)
    assert model.config._attn_implementation == "paged_flash" and model.is_gradient_checkpointing
    assert not training.model_of("sdpa", Case(16384), torch.device("meta")).is_gradient_checkpointing


def test_command(tmp_path):
    result, summary = run("--out", tmp_path)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert {row["impl"] for row in rows} == {"paged_flash", "sdpa", "eager"} and not summary["wrong"]
    assert rows[0]["case"] == {
        "model": "llama-1b", "b": 1, "s": 24, "layers": 1, "hidden_size": 256, "checkpointing": False,
    }  # fmt: skip
    values = {(row["impl"], row["metric"]): row["value"] for row in rows}
    assert values["paged_flash", "first_loss"] == pytest.approx(math.log(32_000), rel=0.02)
    # the second step has seen the tokens before
    assert all(values[impl, "last_loss"] < values[impl, "first_loss"] for impl in training.IMPLEMENTATIONS)
    assert all(value > 0 for (_, metric), value in values.items() if metric == "tokens_per_s")


def test_out_of_memory_is_a_row(tmp_path, monkeypatch):
    train = training._train

    def short_of_memory(impl, *arguments):
        if impl == "eager":
            raise torch.OutOfMemoryError("CUDA out of memory")
        train(impl, *arguments)

    monkeypatch.setattr(training, "_train", short_of_memory)
    result, _ = run("--implementations", "paged_flash,eager", "--out", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert result.exit_code == 0 and "out of memory" in result.stdout
    assert [(row["metric"], row["value"]) for row in rows if row["impl"] == "eager"] == [("out_of_memory", 1)]


def test_other_losses_are_exit_status_1_and_no_row(tmp_path, monkeypatch):
    train = training._train

    def wrong(impl, case, steps, device, measured):
        train(impl, case, steps, device, measured)
        measured.losses[-1] *= 1.1 if impl == "paged_flash" else 1

    monkeypatch.setattr(training, "_train", wrong)
    result, summary = run("--implementations", "paged_flash,sdpa", "--out", tmp_path)
    assert result.exit_code == 1 and summary["wrong"] and not list(tmp_path.iterdir())


def test_loss_difference():
    def measured(*losses):
        return Measured(losses=list(losses))

    assert training.loss_difference({"a": measured(1.0, 2.0)}) is None
    apart = {"a": measured(1.0, 2.0), "b": measured(1.0, 2.5), "c": Measured(out_of_memory=True)}
    assert training.loss_difference(apart) == 0.25
    assert math.isnan(training.loss_difference({"a": measured(1.0, 2.0), "b": measured(2.0, math.nan)}))
