"""The shipped model's training, recipe and text, under "paged_flash" and "sdpa": one loss curve."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, set_seed

import hf_paged_flash
from hf_paged_flash.eval import train_tiny
from hf_paged_flash.eval.assets import model_path


def curve(options: train_tiny.TinyTraining, logging_steps: int) -> list[float]:
    """The logged losses of a run, each the mean of `logging_steps` steps."""
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    options = replace(options, smoke=False, vocab_size=len(tokenizer))
    texts, heldout = train_tiny.read_texts(options)
    texts = texts[:: max(1, 2 * len(texts) // options.steps)]  # half a file a step
    tokens = [i for ids in tokenizer(texts, verbose=False)["input_ids"] for i in (*ids, tokenizer.eos_token_id)]
    heldout_ids = torch.tensor(tokenizer(heldout, verbose=False)["input_ids"])[: options.context]
    stream = torch.tensor(tokens, dtype=torch.int32)
    train_set = train_tiny.RandomWindows(stream, options.context, options.steps * options.batch_size, options.seed)
    model = train_tiny.build_model(options, tokenizer)
    heldout_set = [{"input_ids": heldout_ids, "labels": heldout_ids}]
    log = train_tiny.train(options, model, train_set, heldout_set, logging_steps)
    return [entry["loss"] for entry in log if "loss" in entry]


def curves(options: train_tiny.TinyTraining, logging_steps: int) -> tuple[list[float], list[float]]:
    """Under paged_flash and under sdpa."""
    return tuple(curve(replace(options, attn_implementation=a), logging_steps) for a in ("paged_flash", "sdpa"))


def test_a_short_run_in_fp32_on_a_cpu(tmp_path, monkeypatch):
    # as on a machine without a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hf_paged_flash.reset_counters()
    options = train_tiny.TinyTraining(
        output=tmp_path, steps=10, batch_size=2, context=96, hidden_size=128, layers=2, evaluations=1,
        include_tests=False,
    )  # fmt: skip
    ours, theirs = curves(options, logging_steps=1)
    assert len(ours) == 10 and ours[-1] < 0.95 * ours[0]
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.gpu
def test_300_steps_in_bf16_stay_within_half_a_percent(tmp_path):
    options = train_tiny.TinyTraining(
        output=tmp_path, steps=300, batch_size=8, context=1024, evaluations=1, include_tests=False
    )
    hf_paged_flash.reset_counters()
    ours, theirs = curves(options, logging_steps=10)
    counted = hf_paged_flash.counters()
    assert counted.kernel["flash_backward"] == 300 * options.layers and counted.reference_total == 0
    assert len(ours) == 30 and ours[-1] < 0.8 * ours[0]
    print("step, paged_flash, sdpa, difference in %:")
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        print(10 * (index + 1), f"{a:.4f} {b:.4f} {100 * (a / b - 1):+.3f}")
    assert ours == pytest.approx(theirs, rel=5e-3)
