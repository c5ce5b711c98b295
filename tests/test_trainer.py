"""transformers' Trainer under "paged_flash": the losses of a run equal eager's, whatever the way of training."""

from __future__ import annotations

import pytest
import torch

import hf_paged_flash
from hf_paged_flash.errors import ArgumentError
from tests.trainer_runs import STEPS, WAYS, losses


@pytest.fixture
def reference_backend():
    hf_paged_flash.configure(backend="reference")
    yield
    hf_paged_flash.configure(backend="auto")


@pytest.fixture
def one_gpu(monkeypatch):
    """One process that sees several takes all, by nn.DataParallel."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def needs(way: str) -> None:
    if "lora" in way:
        pytest.importorskip("peft")


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("way", WAYS)
def test_losses_equal_eagers(way):
    needs(way)
    expected = losses(WAYS[way], "eager", use_cpu=True)
    hf_paged_flash.reset_counters()
    actual = losses(WAYS[way], "paged_flash", use_cpu=True)
    assert len(actual) == STEPS and actual[-1] != actual[0]
    assert hf_paged_flash.counters().reference["flash_backward"] >= 3 * STEPS
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("way", ["padding", "position_ids"])
@pytest.mark.parametrize("model_type", ["mistral", "gpt_oss"])
def test_windows_and_sinks(way, model_type):
    actual, expected = (losses(WAYS[way], a, model_type=model_type, use_cpu=True) for a in ("paged_flash", "eager"))
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def error_of(actual: list[float], exact: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(actual, exact, strict=True))


@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("way", ["padding", "position_ids"])
def test_autocast_in_bf16_is_as_near_as_eagers(way):
    exact = losses(WAYS[way], "eager", use_cpu=True)
    ours, eager = (losses(WAYS[way], a, use_cpu=True, bf16=True) for a in ("paged_flash", "eager"))
    assert error_of(ours, exact) <= 2 * error_of(eager, exact) + 1e-3


@pytest.mark.gpu
@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("way", WAYS)
def test_bf16_on_a_gpu_is_as_near_as_eagers(way):
    needs(way)
    exact = losses(WAYS[way], "eager")
    eager = losses(WAYS[way], "eager", bf16=True)
    hf_paged_flash.reset_counters()
    ours = losses(WAYS[way], "paged_flash", bf16=True)
    assert hf_paged_flash.counters().kernel["flash_backward"] >= 3 * STEPS
    assert hf_paged_flash.counters().reference_total == 0
    assert error_of(ours, exact) <= 2 * error_of(eager, exact) + 2e-3


@pytest.mark.gpu
@pytest.mark.usefixtures("one_gpu", "precision_of_fp32")
@pytest.mark.parametrize("way", ["padding", "position_ids", "offsets"])
def test_compiled_by_inductor_on_a_gpu(way):
    torch._dynamo.reset()
    exact = losses(WAYS[way], "eager")
    eager = losses(WAYS[way], "eager", bf16=True)
    ours = losses(WAYS[way], "paged_flash", bf16=True, torch_compile=True)
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert error_of(ours, exact) <= 2 * error_of(eager, exact) + 5e-3


@pytest.mark.gpu
@pytest.mark.usefixtures("one_gpu", "precision_of_fp32")
def test_fp32_products_in_tf32_on_a_gpu():
    exact = losses(WAYS["padding"], "eager")
    ours, eager = (losses(WAYS["padding"], a, tf32=True) for a in ("paged_flash", "eager"))
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert error_of(ours, exact) <= 2 * error_of(eager, exact) + 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
class TestDataParallel:
    """What Trainer takes where one process sees several GPUs."""

    @pytest.mark.parametrize("way", ["padding", "position_ids"])  # the latter is one row, all on the first GPU
    def test_losses(self, way):
        expected = losses(WAYS[way], "eager")
        assert losses(WAYS[way], "paged_flash") == pytest.approx(expected, rel=1e-4)

    def test_offsets_that_it_splits(self):
        with pytest.raises(ArgumentError, match="torchrun"):
            losses(WAYS["offsets"], "paged_flash")
