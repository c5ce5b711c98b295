"""The patterns of masks on a GPU: bf16 outputs and gradients within eager's own error, compiled by inductor too."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

import hf_paged_flash
from tests.pattern_models import build, image_inputs, results
from tests.tiny_models import ragged_batch, tiny_config, tiny_model

pytestmark = pytest.mark.gpu

LENGTHS = (75, 140)  # more than one block of queries and keys
WIDE = dict(hidden_size=64, num_attention_heads=2, max_position_embeddings=256)  # head dims that the kernels take


def text(side):
    input_ids, mask = ragged_batch(LENGTHS, "left" if side == "holes" else side)
    if side == "holes":
        mask[1, 60:67] = 0
    return {"input_ids": input_ids, "attention_mask": mask}, lambda out: out[0][mask.bool()]


def packed():
    input_ids, _ = ragged_batch((140, 140), None)
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((70, 3, 67), (1, 139))])
    return {"input_ids": input_ids, "position_ids": position_ids}, lambda out: out[0]


def images(model_type):
    inputs, mask = image_inputs(model_type, "left")
    if model_type == "paligemma":
        inputs["token_type_ids"] = (mask.cumsum(1) > 16).long()
    return inputs, lambda out: out.logits[mask.bool()]


def translation():
    input_ids, mask = ragged_batch(LENGTHS, "right")
    labels, label_mask = ragged_batch((33, 70), "right", seed=1)
    inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": labels.masked_fill(label_mask == 0, -100)}
    return inputs, lambda out: out.logits[label_mask.bool()]


def own_matrix():
    input_ids, _ = ragged_batch((140, 140), None)
    visible = torch.rand(2, 1, 140, 140, generator=torch.Generator().manual_seed(3)) < 0.5
    visible |= torch.eye(140, dtype=torch.bool)
    added = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.bfloat16).min)
    return {"input_ids": input_ids, "attention_mask": added}, lambda out: out[0]


def causal(model_type):
    return lambda attention: tiny_model(tiny_config(model_type, use_cache=False), attention).train()


def llama4(attention):
    # every expert for every token: which one is chosen may hang on a last bit
    changes = dict(use_cache=False, num_experts_per_tok=2, attention_chunk_size=32, max_position_embeddings=256)
    return build("llama4_text", attention, AutoModelForCausalLM, **changes)


def multimodal(model_type):
    return lambda attention: build(model_type, attention, AutoModelForImageTextToText)


CASES = {
    "padding": (causal("llama"), lambda: text("left")),
    "holes": (causal("llama"), lambda: text("holes")),
    "holes under windows": (causal("mistral"), lambda: text("holes")),
    "packed": (causal("gemma3_text"), packed),
    "chunks": (llama4, lambda: text("left")),
    "packed chunks": (llama4, packed),
    "own matrix": (causal("llama"), own_matrix),
    "encoder": (lambda a: build("bert", a, **WIDE), lambda: text("right")),
    "local encoder": (lambda a: build("modernbert", a, **WIDE), lambda: text("left")),
    "cross attention": (
        lambda a: build("bart", a, AutoModelForSeq2SeqLM, max_position_embeddings=256), translation,
    ),
    "position bias": (lambda a: build("t5", a, AutoModelForSeq2SeqLM), translation),
} | {
    model_type: (multimodal(model_type), lambda model_type=model_type: images(model_type))
    for model_type in ("gemma3", "paligemma", "qwen2_5_vl", "qwen3_vl")
}  # fmt: skip


def on_gpu(inputs, dtype):
    return {name: x.cuda().to(dtype) if x.is_floating_point() else x.cuda() for name, x in inputs.items()}


@pytest.mark.parametrize("case", CASES)
def test_bf16_stays_within_eagers_own_error(case):
    make, given = CASES[case]
    inputs, pick = given()
    exact = results(make("eager").cuda(), on_gpu(inputs, torch.float32), pick)
    hf_paged_flash.reset_counters()
    eager, ours = (
        results(make(attention).cuda().bfloat16(), on_gpu(inputs, torch.bfloat16), pick)
        for attention in ("eager", "paged_flash")
    )
    counted = hf_paged_flash.counters().kernel
    assert counted["flash_forward"] == counted["flash_backward"] > 0
    assert not hf_paged_flash.counters().reference
    names = exact[1].keys() & eager[1].keys()
    assert names == ours[1].keys()
    floor = 1e-2 * max(exact[1][name].norm() for name in names)  # of a gradient that is 0 but for rounding
    tensors = {name: (ours[1][name], eager[1][name], exact[1][name]) for name in names}
    for name, (found, eagers, true) in ({"output": (ours[0], eager[0], exact[0])} | tensors).items():
        error, budget = ((x.float() - true).norm() / true.norm().clamp(min=floor) for x in (found, eagers))
        # the backward rebuilds rowsum(P dP) from the rounded output, and a bucket of T5's sums it over whole rows
        factor = 4 if "relative_attention_bias" in name else 2
        assert error <= factor * budget + 1e-2, name


@pytest.mark.parametrize("case", ["packed", "chunks", "local encoder"])
def test_compiled_by_inductor(case):
    torch._dynamo.reset()
    make, given = CASES[case]
    inputs, pick = given()
    inputs = on_gpu(inputs, torch.float32)
    expected = results(make("eager").cuda(), inputs, pick)
    out, gradients = results(torch.compile(make("paged_flash").cuda(), fullgraph=True), inputs, pick)
    torch.testing.assert_close(out, expected[0], rtol=1e-3, atol=1e-3 * float(expected[0].abs().max()))
    floor = 1e-2 * max(gradient.norm() for gradient in expected[1].values())
    for name, gradient in gradients.items():
        reference = expected[1][name.removeprefix("_orig_mod.")]
        assert (gradient - reference).norm() <= 2e-3 * reference.norm().clamp(min=floor), name
