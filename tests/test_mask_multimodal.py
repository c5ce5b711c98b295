"""Masks of models that see: blocks of image tokens, prefixes, packed images; outputs and gradients equal eager's."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText

import hf_paged_flash
from tests.pattern_models import build, compare, image_inputs

MODEL_TYPES = ("gemma3", "paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_images_in_a_text(model_type, side):
    inputs, mask = image_inputs(model_type, side)
    if model_type == "paligemma":  # what is to be predicted is causal, all before it a prefix
        inputs["token_type_ids"] = ((torch.arange(mask.shape[1]) > 15) & (mask.cumsum(1) > 16)).long()
    if side is None:
        del inputs["attention_mask"]
    compare(lambda a: build(model_type, a, AutoModelForImageTextToText), inputs, lambda out: out.logits[mask.bool()])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_images_and_generate(model_type):
    inputs, _ = image_inputs(model_type, "left")
    tokens = []
    for attention in ("paged_flash", "eager"):
        model = build(model_type, attention, AutoModelForImageTextToText).eval()
        tokens.append(model.generate(**inputs, max_new_tokens=12, do_sample=False))
    assert torch.equal(*tokens)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "top_k": 0, "num_return_sequences": 3}])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_images_and_rows_that_are_repeated(model_type, options):
    """Beams and samples: prompts are computed once where transformers' own code repeats them, and images with them."""
    inputs, _ = image_inputs(model_type, "left")
    if model_type == "paligemma":  # all of the prompt is a prefix, as its processor says
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    tokens = []
    for attention in ("paged_flash", "eager"):
        model = build(model_type, attention, AutoModelForImageTextToText).eval()
        torch.manual_seed(5)
        tokens.append(model.generate(**inputs, **{"max_new_tokens": 8, "do_sample": False} | options))
    assert torch.equal(*tokens)


def test_vision_transformer():
    compare(lambda a: build("vit", a), {"pixel_values": torch.randn(2, 3, 16, 16)}, lambda out: out.last_hidden_state)


def test_images_of_any_size_see_themselves_alone():
    """Pixtral packs them; up to transformers 5.17 or later it leaves out their bounds for a flash implementation."""
    images = {"pixel_values": torch.randn(3, 3, 16, 16), "image_sizes": [(16, 12), (8, 16), (16, 16)]}
    compare(lambda a: build("pixtral", a), images, lambda out: out.last_hidden_state)
    model = build("pixtral", "paged_flash").eval()
    together = model(**images).last_hidden_state[0].split([12, 8, 16])
    for index, one in enumerate(together):
        alone = {"pixel_values": images["pixel_values"][index, None], "image_sizes": [images["image_sizes"][index]]}
        torch.testing.assert_close(model(**alone).last_hidden_state[0], one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_vision_towers_pack_their_images(model_type):
    """One call of attention a layer, whatever the number of images and windows."""
    inputs, _ = image_inputs(model_type, None)
    model = build(model_type, "paged_flash", AutoModelForImageTextToText).eval()
    hf_paged_flash.reset_counters()
    with torch.no_grad():
        model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    assert hf_paged_flash.counters().reference["flash_forward"] == len(model.model.visual.blocks)
