"""The mask function of "paged_flash": padding as a 2-D mask or packed rows as segment ids, never an S x S matrix.

transformers describes a mask by a composed function (causal, window, padding, packed rows, overlays). Causality
reaches the attention function as an argument of the layer; what is left is handed over as

- None: every key is a token;
- bool (B, kv_length): False where a key is padding;
- int32 (B, kv_length): packed rows, tokens attend within equal ids.

With a sliding window it is always a tensor, and has the window as an attribute (`window_of`): not every layer that
slides says so (Qwen2-MoE, Phi-MoE), and two-sided windows are one key wider here than in the layers' `sliding_window`.

An overlay that none of these can carry (image blocks, chunked attention, a mask function of the user's) is refused.
"""

from collections.abc import Callable

import torch
from transformers import masking_utils

from .cache.mask_handoff import announce_mask
from .errors import UnsupportedFeatureError

_WINDOWS = ("sliding_window_overlay", "sliding_window_bidirectional_overlay")
_REFUSED = {
    "chunked_overlay": "chunked attention",
    "blockwise_overlay": "blocks of tokens that see each other (images in a text)",
}


def _parts(mask_function: Callable) -> list[Callable]:
    """The functions that `and_masks` was made of; a function of another make as it is."""
    maker = _maker(mask_function)
    if maker == "remap_positions_for_packed_sequence":  # packed rows count their positions from 0 here anyway
        return _parts(_closure(mask_function)["mask_function"])
    if maker != "and_masks":
        return [mask_function]
    return [part for function in _closure(mask_function)["mask_functions"] for part in _parts(function)]


def _maker(mask_function: Callable) -> str:
    """The transformers function that returned `mask_function`, or its own name."""
    if getattr(mask_function, "__module__", None) != masking_utils.__name__:
        return ""
    return mask_function.__qualname__.split(".")[0]


def _closure(function: Callable) -> dict:
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))


def _pattern(mask_function: Callable) -> tuple[torch.Tensor | None, tuple[int, int] | None]:
    """Segment ids (B, S) of packed rows and (left, right) window, or None. Raises for what can't be handed over."""
    segments = window = None
    for part in _parts(mask_function):
        maker = _maker(part)
        if part in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function):
            continue
        if maker in _WINDOWS:
            size = _closure(part)["sliding_window"]
            window = (size - 1, 0) if maker == "sliding_window_overlay" else (size, size)
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
    return segments, window


def window_of(mask: torch.Tensor | None) -> tuple[int, int] | None:
    """Keys to the left and right of a query's own that it sees, as the mask's pattern says; None for no window."""
    return getattr(mask, "_paged_flash_window", None)


def masks_nothing(mask: torch.Tensor | None) -> bool:
    """Whether a mask is there for its window alone."""
    return mask is None or getattr(mask, "_paged_flash_masks_nothing", False)


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
        None, bool (B, <= kv_length) or int32 (B, kv_length), perhaps with a window; see the module's docstring.

    Raises:
        UnsupportedFeatureError: the pattern holds an overlay that can't be honoured.
    """
    segments, window = _pattern(mask_function)
    if segments is not None:  # only without a cache
        mask = segments.to(torch.int32, copy=True)
    else:
        sizes = batch_size, q_length, kv_length, q_offset, kv_offset
        mask = _padding(attention_mask, sizes, _is_bidirectional(mask_function), kwargs.get("device"))
    if window is not None:
        if mask is None:
            mask = torch.ones(1, 1, dtype=torch.bool, device=kwargs.get("device")).expand(batch_size, kv_length)
            mask._paged_flash_masks_nothing = True
        mask._paged_flash_window = window
    return mask


def _padding(
    attention_mask: torch.Tensor | None, sizes: tuple, is_bidirectional: bool, device: torch.device | None
) -> torch.Tensor | None:
    """The padding among the keys of a forward, bool (B, <= kv_length), or None; tells the cache, if there is one."""
    batch_size, q_length, kv_length, q_offset, kv_offset = sizes
    if attention_mask is not None:
        attention_mask = attention_mask.clone()  # kept beyond this call: a bool mask may be the user's own tensor
    if announce_mask(attention_mask, q_length, kv_length):
        return attention_mask
    if attention_mask is None:
        seen = int(q_offset) + q_length - kv_offset
        if kv_length <= seen or is_bidirectional:
            return None
        # a static cache is longer than what it holds: the rest is padding
        return torch.ones(batch_size, seen, dtype=torch.bool, device=device)
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
