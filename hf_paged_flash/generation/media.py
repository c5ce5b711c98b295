"""Images and videos in a prompt: what models of transformers get of them, and keep of them, beside tokens."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from ..cache.prompt_row import Media

# What is seen, of which a forward needs what is among its tokens; transformers 5.24 encodes it before the first one
CONTENTS = (
    "pixel_values", "pixel_values_videos", "pixel_attention_mask", "pixel_mask", "image_sizes", "image_sizes_videos",
    "mm_encoder_outputs",
)  # fmt: skip
# How it is laid out, which positions are counted by, before the first forward, and its contents are read by
LAYOUT = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
PLACES = "mm_token_type_ids"  # (batch, columns), not 0 where it is; of use for positions alone
# How far positions have moved by it. Models read it where nobody gives them positions, and return it to nobody
MOVED = "rope_deltas"
_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def has_contents(inputs: Mapping[str, Any]) -> bool:
    """Whether there are images among a model's `inputs`, or generate()'s for it."""
    values = (inputs.get(name) for name in CONTENTS)
    return any(value is not None and (isinstance(value, torch.Tensor) or len(value) > 0) for value in values)


def of_tokens(inputs: dict[str, Any]) -> dict[str, Any]:
    """A forward's `inputs` without what they say of images before its tokens, if these have their positions."""
    if inputs.get("position_ids") is None:
        return inputs
    unused = {PLACES} if has_contents(inputs) else {PLACES, *LAYOUT}
    return {name: value for name, value in inputs.items() if name not in unused}


def without_media(model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What generate() has for a model, but for images."""
    return {name: value for name, value in model_kwargs.items() if name not in {*CONTENTS, *LAYOUT, PLACES}}


def media_of(input_ids: np.ndarray, model_kwargs: dict[str, Any], config: PreTrainedConfig) -> Media | None:
    """The images of a prompt (columns,), which is the only one; None where nobody says which tokens they are.

    Waits for the device, to read them.
    """
    places = model_kwargs.get(PLACES)
    if places is not None:
        places = places.cpu().numpy().reshape(-1) != 0
    else:
        places = np.isin(input_ids, [x for x in (getattr(config, name, None) for name in _TOKENS) if x is not None])
    if places.shape != input_ids.shape or not places.any():
        return None
    digest = hashlib.sha256()
    for name in (*CONTENTS, *LAYOUT):
        digest.update(name.encode())
        _read(model_kwargs.get(name), digest)
    return Media(places, digest.digest())


def _read(value: Any, digest) -> None:
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        for item in value:
            _read(item, digest)
    elif isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    else:
        digest.update(repr(value).encode())
