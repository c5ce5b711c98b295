"""What tests of `generate()` share: tiny models in pairs, ragged batches, and the calls that reach a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache as cached

import torch
from transformers import AutoConfig, PreTrainedModel

from tests.integration.models import attentive_config
from tests.tiny_models import ragged_batch, tiny_config, tiny_model

LENGTHS = (30, 7, 19, 1)  # beyond the windows of 12
TOKENS = sum(LENGTHS)


def config_of(model_type: str, **changes):
    if model_type == "mixtral":
        shape = tiny_config("llama").to_dict() | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
        return AutoConfig.for_model("mixtral", **{key: value for key, value in shape.items() if key != "model_type"})
    return attentive_config(model_type, **changes)


@cached
def models(model_type: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(paged, eager)"""
    config = config_of(model_type)
    return tiny_model(config, "paged_flash"), tiny_model(config, "eager")


@contextmanager
def shapes_of(model: PreTrainedModel) -> Iterator[list[tuple[int, int]]]:
    """The (batch, length) that `model` is called with."""
    shapes = []

    def note(module, args, kwargs):
        given = kwargs.get("input_ids")
        shapes.append(tuple((kwargs["inputs_embeds"] if given is None else given).shape[:2]))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


def batch(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of LENGTHS; "holes": left padding and columns in the middle that are none, of three tokens fewer."""
    input_ids, mask = ragged_batch(LENGTHS, "left" if side == "holes" else side)
    if side == "holes":
        mask[0, 3:5], mask[2, 20] = 0, 0
    return input_ids, mask


def generate(model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor, **options) -> torch.Tensor:
    """The new tokens of greedy search, (rows, new)."""
    options = {"do_sample": False, "max_new_tokens": 12} | options
    return model.generate(input_ids, attention_mask=mask, **options)[:, input_ids.shape[1] :]


def unpadded(model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor, **options) -> torch.Tensor:
    """Each row by itself."""
    rows = [row[real.bool()][None] for row, real in zip(input_ids, mask, strict=True)]
    return torch.cat([generate(model, row, torch.ones_like(row), **options) for row in rows])
