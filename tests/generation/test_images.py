"""Models of images and text: their steps are replayed as a text's are, whatever images came before."""

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.pattern_models import build, image_inputs

MODEL_TYPES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3")
STEPS = 12

pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.fixture(params=MODEL_TYPES)
def model_type(request):
    return request.param


@pytest.fixture
def pair(model_type):
    models = [build(model_type, attention, AutoModelForImageTextToText) for attention in ("eager", "paged_flash")]
    models[1].load_state_dict(models[0].state_dict())  # CLIP begins with a random vector of its own
    return [model.eval() for model in models]


def prompts(model_type: str, seed: int) -> dict[str, torch.Tensor]:
    """Two padded rows with an image each."""
    inputs, _ = image_inputs(model_type, "left")
    inputs["pixel_values"] = torch.randn(
        inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(seed)
    )
    return inputs


def generate(model, inputs: dict[str, torch.Tensor], **options) -> torch.Tensor:
    return model.generate(**inputs, **{"max_new_tokens": STEPS, "do_sample": False} | options)


def test_steps_are_replayed(pair, model_type, recorders, elastic):
    """One capture serves all images, and texts without."""
    eager, paged = pair
    for call, seed in enumerate((1, 2, 3)):
        inputs = prompts(model_type, seed)
        assert torch.equal(generate(paged, inputs), generate(eager, inputs))
        assert (recorders.captured, recorders.replayed) == (1, (call + 1) * (STEPS - 1) - 1)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    text["input_ids"] = text["input_ids"].clamp(max=80)
    before = recorders.replayed
    assert torch.equal(generate(paged, text), generate(eager, text))
    assert recorders.replayed >= before + STEPS - 2
