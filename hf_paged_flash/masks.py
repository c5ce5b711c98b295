"""The mask function of "paged_flash": padding as a 2-D mask or packed rows as segment ids, never an S x S matrix.

transformers describes a mask by a composed function (causal, window, padding, packed rows, overlays). Causality and
windows reach the attention function as arguments of the layer; what is left is handed over as

- None: every key is a token;
- bool (B, kv_length): False where a key is padding;
- int32 (B, kv_length): packed rows, tokens attend within equal ids.

An overlay that none of these can carry (image blocks, chunked attention, a mask function of the user's) is refused.
"""

from collections.abc import Callable

import torch
from transformers import masking_utils

from .cache.mask_handoff import announce_mask
from .errors import UnsupportedFeatureError

# Windows are told to the attention function too, by the layer (`sliding_window`).
_CARRIED_BY_THE_LAYER = ("sliding_window_overlay", "sliding_window_bidirectional_overlay")
_REFUSED = {
    "chunked_overlay": "chunked attention",
    "blockwise_overlay": "blocks of tokens that see each other (images in a text)",
}


def _parts(mask_function: Callable) -> list[Callable]:
    """The functions that `and_masks` was made of; a function of another make as it is."""
    if _maker(mask_function) != "and_masks":
        return [mask_function]
    return [part for function in _closure(mask_function)["mask_functions"] for part in _parts(function)]


def _maker(mask_function: Callable) -> str:
    """The transformers function that returned `mask_function`, or its own name."""
    if getattr(mask_function, "__module__", None) != masking_utils.__name__:
        return ""
    return mask_function.__qualname__.split(".")[0]


def _closure(function: Callable) -> dict:
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))


def _segments(mask_function: Callable) -> torch.Tensor | None:
    """Segment ids (B, S) of packed rows, or None. Raises for what the attention function would not be told."""
    segments = None
    for part in _parts(mask_function):
        maker = _maker(part)
        if part in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function):
            continue
        if maker in _CARRIED_BY_THE_LAYER:
            continue
        if maker == "packed_sequence_mask_function":
            segments = _closure(part)["packed_sequence_mask"]
            continue
        asked = _REFUSED.get(maker, "a mask function other than causal, sliding window, padding and packed rows")
        if maker == "or_masks":
            asked = " or ".join(
                _REFUSED.get(_maker(f), "a mask of its own") for f in _closure(part)["mask_functions"][1:]
            )
        raise UnsupportedFeatureError(
            f"this model asks for {asked}, which paged_flash can't honour yet: load it with "
            'attn_implementation="sdpa" or "eager"'
        )
    return segments


def paged_flash_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor | None:
    """transformers' mask interface for "paged_flash".

    Args:
        batch_size, q_length, kv_length, q_offset, kv_offset: sizes of the forward; keys `kv_offset ..` are given.
        mask_function: the composed pattern.
        attention_mask: bool (B, columns so far), False for padding, or None.

    Returns:
        None, bool (B, <= kv_length) or int32 (B, kv_length); see the module's docstring.

    Raises:
        UnsupportedFeatureError: the pattern holds an overlay that can't be honoured.
    """
    segments = _segments(mask_function)
    if segments is not None:  # only without a cache
        return segments.to(torch.int32)
    if attention_mask is not None:
        attention_mask = attention_mask.clone()  # kept beyond this call: a bool mask may be the user's own tensor
    if announce_mask(attention_mask, q_length, kv_length):
        return attention_mask
    if attention_mask is None:
        seen = int(q_offset) + q_length - kv_offset
        if kv_length <= seen or _is_bidirectional(mask_function):
            return None
        # a static cache is longer than what it holds: the rest is padding
        return torch.ones(batch_size, seen, dtype=torch.bool, device=kwargs.get("device"))
    attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length]
    if torch.compiler.is_compiling():
        return attention_mask
    # one of another width is kept, for the attention function to check
    is_whole = attention_mask.shape[1] == kv_length == int(q_offset) + q_length - kv_offset
    if is_whole and bool(attention_mask.all()):
        return None
    return attention_mask


def _is_bidirectional(mask_function: Callable) -> bool:
    return masking_utils.causal_mask_function not in _parts(mask_function)
