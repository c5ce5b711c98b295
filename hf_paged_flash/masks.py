"""The mask function of "paged_flash": padding as a 2-D mask or packed rows as segment ids, never an S x S matrix.

transformers describes a mask by a composed function (causal, window, padding, packed rows, overlays). Causality and
windows reach the attention function as arguments of the layer; what is left is handed over as

- None: every key is a token;
- bool (B, kv_length): False where a key is padding;
- int32 (B, kv_length): packed rows, tokens attend within equal ids.

- bool (B, 1, q_length, kv_length), built by transformers' own mask functions: everything else (image blocks in a text,
  mask functions of the user's). Such models pay for an S x S mask under any implementation.

While torch.compile traces, rows packed by their position_ids become such a matrix too: pass `cu_seq_lens_q` and its
companions to do without. Chunked attention is refused by transformers before it asks for a mask, for any implementation
with "flash" in its name.
"""

from collections.abc import Callable

import torch
from transformers import masking_utils

from .cache.mask_handoff import announce_mask

# Windows are told to the attention function too, by the layer (`sliding_window`).
_CARRIED_BY_THE_LAYER = ("sliding_window_overlay", "sliding_window_bidirectional_overlay")


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


def _pattern(mask_function: Callable) -> tuple[torch.Tensor | None, bool]:
    """Segment ids (B, S) of packed rows, or None; and whether there is more that only a matrix can say."""
    segments, needs_matrix = None, False
    for part in _parts(mask_function):
        maker = _maker(part)
        if part in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function):
            continue
        if maker in _CARRIED_BY_THE_LAYER:
            continue
        if maker == "packed_sequence_mask_function":
            segments = _closure(part)["packed_sequence_mask"]
        else:
            needs_matrix = True
    return segments, needs_matrix


def _compiled_pattern(mask_function: Callable, arguments: dict) -> tuple[None, bool]:
    """`_pattern` while torch.compile traces, which can't look into a closure: by what transformers says beside it.

    It allows to skip a mask only where nothing was put on top of causality and the window (`local_size`).
    """
    if mask_function in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function):
        return None, False
    skips = arguments.get("allow_is_causal_skip") or arguments.get("allow_is_bidirectional_skip")
    return None, not (skips and arguments.get("local_size") is not None)


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
        None, bool (B, <= kv_length), int32 (B, kv_length) or bool (B, 1, q_length, kv_length); see the module's
        docstring.
    """
    if torch.compiler.is_compiling():
        segments, needs_matrix = _compiled_pattern(mask_function, kwargs)
    else:
        segments, needs_matrix = _pattern(mask_function)
    if needs_matrix:
        announce_mask(None if attention_mask is None else attention_mask.clone(), q_length, kv_length)
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return masking_utils.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs
        )
    if segments is not None:  # only without a cache
        return segments.to(torch.int32)
    if attention_mask is not None:
        attention_mask = attention_mask.clone()  # kept beyond this call: a bool mask may be the user's own tensor
    if announce_mask(attention_mask, q_length, kv_length):
        return attention_mask
    if attention_mask is None:
        seen = int(q_offset) + q_length - kv_offset
        if kv_length <= seen or (not torch.compiler.is_compiling() and _is_bidirectional(mask_function)):
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


def as_matrix(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask that `paged_flash_mask` returned, or the user's own 4-D one, as (B | 1, Hq | 1, Sq | 1, kv_length).

    Without the causal mask and the window, which the layer tells.
    """
    if mask is None or mask.dim() == 4:
        return mask
    if mask.dtype == torch.bool:
        return mask[:, None, None, :]
    return mask[:, None, :, None] == mask[:, None, None, :]  # packed rows
