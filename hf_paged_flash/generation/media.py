"""Images, videos and sound in a prompt: what models of transformers get of them, and keep of them, beside tokens."""

from typing import Any

# What is seen or heard, and what it looks like; of it a model needs what is among the tokens of a forward
CONTENTS = (
    "pixel_values", "pixel_values_videos", "pixel_attention_mask", "pixel_mask", "image_sizes", "image_sizes_videos",
)  # fmt: skip
# Where it lies in a prompt. Positions are counted by it, which transformers does before the first forward
LAYOUT = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids")
# How far positions have moved by it. Models read it where nobody gives them positions, and return it to nobody
MOVED = "rope_deltas"


def of_text(inputs: dict[str, Any]) -> dict[str, Any]:
    """A forward's `inputs` without what they say of images before its tokens, if these have their positions."""
    if inputs.get("position_ids") is None:
        return inputs
    return {name: value for name, value in inputs.items() if name not in LAYOUT}
