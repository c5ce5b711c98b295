"""Models that see images and write text: the text decoder on a PagedCache, the tokens of eager."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from hf_paged_flash import PagedCache, counters, reset_counters
from tests.integration.models import pairs_of
from tests.pattern_models import CONFIGS, IMAGE_TOKEN, build, image_inputs
from tests.tiny_models import randomize

NEW = 40
METHODS = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 0},
    "beams": {"num_beams": 4},
    "samples": {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
}
MODEL_TYPES = ("llava", "qwen2_vl", "qwen2_5_vl", "gemma3", "paligemma")


def make(model_type, implementation):
    torch.manual_seed(0)  # of weights that are vectors, as CLIP's class embedding
    if model_type != "llava":
        return build(model_type, implementation, AutoModelForImageTextToText).eval()
    vision = CONFIGS["pixtral"] | {"model_type": "clip_vision_model", "projection_dim": 32}
    text = CONFIGS["gemma3"]["text_config"] | {"model_type": "llama"}
    config = AutoConfig.for_model(
        "llava",
        text_config={name: value for name, value in text.items() if name not in ("sliding_window", "layer_types")},
        vision_config=vision,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=16,
    )
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=implementation)
    randomize(model)
    return model.eval()


@pytest.fixture(scope="module")
def pairs():
    return pairs_of(make)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_images_then_text(pairs, model_type, method):
    inputs, mask = image_inputs("paligemma" if model_type == "llava" else model_type, "left")
    outputs = []
    for model in pairs(model_type):
        torch.manual_seed(3)
        reset_counters()
        options = {"do_sample": False, "max_new_tokens": NEW, "return_dict_in_generate": True} | method
        outputs.append(model.generate(**inputs, **options))
    expected, ours = outputs
    assert torch.equal(ours.sequences, expected.sequences)
    cache = ours.past_key_values
    assert isinstance(cache, PagedCache)
    ran = counters()
    assert ran.dense_gather_total == 0
    layers = len(cache.layers)
    assert ran.reference["paged_decode"] == layers * (NEW - 1)
    if not method:
        assert cache.groups[-1].manager.lengths.tolist() == (mask.sum(1) + NEW - 1).tolist()
    windows = [group for group in cache.groups if group.window is not None]
    assert len(windows) == (model_type == "gemma3")
    # blocks of image tokens see beyond the window in the prompt, and nothing does afterwards
    assert all((group.blocks_used <= 2 * group.batch) and group.has_given_back for group in windows)


def test_a_conversation_about_images(pairs):
    """A second turn on the same cache, of text alone."""
    eager, paged = pairs("gemma3")
    inputs, _ = image_inputs("gemma3", None)
    answers = []
    for model in (eager, paged):
        cache = PagedCache(model.config) if model is paged else None
        first = model.generate(**inputs, past_key_values=cache, max_new_tokens=12, do_sample=False)
        said = torch.tensor([[5, 17, 33], [8, 8, 60]])
        turn = {"input_ids": torch.cat([first, said], 1)}
        turn["attention_mask"] = torch.ones_like(turn["input_ids"])
        turn["token_type_ids"] = (turn["input_ids"] == IMAGE_TOKEN).long()
        if model is eager:
            turn["pixel_values"] = inputs["pixel_values"]
        answers.append(model.generate(**turn, past_key_values=cache, max_new_tokens=12, do_sample=False))
    assert torch.equal(*answers)
