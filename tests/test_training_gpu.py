"""Training on a GPU: bf16 gradients within eager's own error, torch.compile with inductor, memory linear in length."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel

import hf_paged_flash
from tests.test_mask_patterns import CONFIGS
from tests.test_training import BATCHES, gradients, model_of, no_dropout
from tests.tiny_models import randomize

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fresh_counters():
    hf_paged_flash.reset_counters()


def on_gpu(batch):
    return {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in batch.items()}


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mistral", "gpt2"])
def test_bf16_gradients_stay_within_eagers_own_error(model_type, kind):
    batch = on_gpu(BATCHES[kind]())
    exact = gradients(model_of(model_type, "eager", **no_dropout(model_type)).cuda(), batch)
    eager, ours = (
        gradients(model_of(model_type, attention, **no_dropout(model_type)).cuda().bfloat16(), batch)
        for attention in ("eager", "paged_flash")
    )
    for name, gradient in exact[1].items():
        error, budget = ((x[1][name].float() - gradient).norm() / gradient.norm() for x in (ours, eager))
        assert error <= 2 * budget + 5e-3, name


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_a_step_compiled_by_inductor(model_type, kind):
    torch._dynamo.reset()
    batch = on_gpu(BATCHES[kind]())
    expected = gradients(model_of(model_type, "eager").cuda(), batch)
    model = torch.compile(model_of(model_type, "paged_flash").cuda(), fullgraph=True)
    loss, compiled = gradients(model, batch)
    torch.testing.assert_close(loss, expected[0], rtol=1e-4, atol=1e-4)
    for name, gradient in compiled.items():
        reference = expected[1][name.removeprefix("_orig_mod.")]
        assert (gradient - reference).norm() <= 1e-3 * reference.norm() + 1e-5, name


@pytest.mark.parametrize("model_type", ["bert", "vit"])
def test_encoders_in_bf16(model_type):
    if model_type == "vit":
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16, device="cuda")}
    else:
        inputs = {"input_ids": torch.randint(2, 97, (2, 40), device="cuda")}
    # heads of 16: the smallest that the kernels take
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type] | dict(hidden_size=64))
    outputs = []
    for attention, dtype in (("eager", torch.float32), ("eager", torch.bfloat16), ("paged_flash", torch.bfloat16)):
        model = AutoModel.from_config(config, attn_implementation=attention)
        randomize(model)
        model = model.cuda().to(dtype).eval()
        given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        with torch.no_grad():
            outputs.append(model(**given).last_hidden_state.float())
    exact, eager, ours = outputs
    assert hf_paged_flash.counters().kernel["flash_forward"] == config.num_hidden_layers
    assert (ours - exact).norm() <= 2 * (eager - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("packed", [False, True])
def test_deterministic_gradients_are_the_same_bits(packed, head_dim):
    q, k, v = (torch.randn(2, 2048, h, head_dim, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2))
    dout = torch.randn_like(q)
    offsets = torch.tensor([0, 1000, 1001, 4096], device="cuda", dtype=torch.int32)

    def run(deterministic):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        if packed:
            rows = [x.flatten(0, 1) for x in leaves]
            out = hf_paged_flash.flash_attn_varlen_func(
                *rows, offsets, offsets, 3095, 3095, causal=True, deterministic=deterministic
            ).view_as(q)
        else:
            out = hf_paged_flash.flash_attn_func(*leaves, causal=True, deterministic=deterministic)
        return torch.autograd.grad(out, leaves, dout)

    first, *others = (run(True) for _ in range(5))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    for a, b in zip(first, run(False), strict=True):
        assert (a - b).norm() <= 1e-2 * a.norm()


def test_memory_grows_linearly():
    def peak(length):
        shapes = (1, length, 8, 64), (1, length, 2, 64), (1, length, 2, 64)
        q, k, v = (torch.randn(x, device="cuda", dtype=torch.bfloat16, requires_grad=True) for x in shapes)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        hf_paged_flash.flash_attn_func(q, k, v, causal=True).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    peak(1024)
    assert peak(65536) <= 2.2 * peak(32768)
