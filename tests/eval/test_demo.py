"""The demo on a tiny random model: it tells the truth about text and memory."""

import json

import pytest
import torch
from typer.testing import CliRunner

from hf_paged_flash.backend import Counters
from hf_paged_flash.eval import assets, demo


@pytest.fixture
def shipped(tiny_model_path, text_file, monkeypatch):
    monkeypatch.setattr(assets, "model_path", lambda: tiny_model_path)
    monkeypatch.setattr(assets, "heldout_path", lambda: text_file)


def run():
    return CliRunner().invoke(demo.app, ["--device", "cpu", "--new-tokens", "6", "--max-tokens", "300"])


def test_texts_are_equal_and_memory_is_saved(shipped):
    result = run()
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.strip().splitlines()[-1])
    assert summary["equal"] and summary["device"] == "cpu"
    assert summary["waste"]["paged_flash"] < summary["waste"]["eager"]
    assert summary["ppl"]["paged_flash"] == pytest.approx(summary["ppl"]["eager"], rel=1e-4)
    assert "DynamicCache" in result.stdout and "PagedCache" in result.stdout


def test_different_texts_are_exit_status_1(shipped, monkeypatch):
    honest = demo.generate

    def wrong(model, *arguments):
        made = honest(model, *arguments)
        changes = {"tokens": made.tokens + 1} if model.config._attn_implementation == "paged_flash" else {}
        return demo.Generated(**vars(made) | changes)

    monkeypatch.setattr(demo, "generate", wrong)
    result = run()
    assert result.exit_code == 1 and "DIFFERENT" in result.stdout


@pytest.mark.parametrize(
    ("counters", "said"),
    [
        (Counters(kernel={"store_kv": 2}), "Triton kernels on the CPU, interpreted"),
        (Counters(reference={"store_kv": 2}), "the CPU (torch reference)"),
        (Counters(kernel={"store_kv": 2}, reference={"flash_forward": 1}), "2 kernel and 1 reference calls"),
    ],
)
def test_what_ran_is_what_was_counted(counters, said):
    assert demo.ran_on(counters, torch.device("cpu")) == said
