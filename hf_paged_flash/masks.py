"""The mask function of "paged_flash": padding as a 2-D mask or packed rows as segment ids, no S x S matrix for them.

transformers describes a mask by a composed function (causal, window, padding, packed rows, overlays). Causality
reaches the attention function as an argument of the layer; what is left is handed over as

- None: every key is a token;
- bool (B, kv_length): False where a key is padding;
- int32 (B, kv_length): packed rows, tokens attend within equal ids.

With a sliding window it is always a tensor, and has the window as an attribute (`window_of`): not every layer that
slides says so (Qwen2-MoE, Phi-MoE), and two-sided windows are one key wider here than in the layers' `sliding_window`.

What none of these can carry (image blocks in a text, mask functions of the user's) becomes a matrix, bool
(B, 1, q_length, kv_length), built by transformers' own mask functions: such models pay for it everywhere. While
torch.compile traces, rows packed by their position_ids become one too: pass `cu_seq_lens_q` and its companions to do
without. Chunked attention is refused by transformers before it asks for a mask, for any name with "flash" in it.
"""

from collections.abc import Callable

import torch
from transformers import masking_utils

from .cache.mask_handoff import announce_mask

_WINDOWS = ("sliding_window_overlay", "sliding_window_bidirectional_overlay")


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


_Window = tuple[int, int] | None


def _pattern(mask_function: Callable) -> tuple[torch.Tensor | None, _Window, bool]:
    """Segment ids (B, S) of packed rows, (left, right) window, each or None, and whether only a matrix says it all."""
    segments, window, needs_matrix = None, None, False
    for part in _parts(mask_function):
        maker = _maker(part)
        if part in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function):
            continue
        if maker in _WINDOWS:
            size = _closure(part)["sliding_window"]
            window = (size - 1, 0) if maker == "sliding_window_overlay" else (size, size)
        elif maker == "packed_sequence_mask_function":
            segments = _closure(part)["packed_sequence_mask"]
        else:
            needs_matrix = True
    return segments, window, needs_matrix


def _compiled_pattern(mask_function: Callable, arguments: dict) -> tuple[None, _Window, bool]:
    """`_pattern` while torch.compile traces, which can't look into a closure: by what transformers says beside it.

    It allows to skip a mask only where nothing was put on top of causality and the window (`local_size`).
    """
    if mask_function in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function):
        return None, None, False
    size = arguments.get("local_size")
    if size is not None and arguments.get("allow_is_causal_skip"):
        return None, (size - 1, 0), False
    if size is not None and arguments.get("allow_is_bidirectional_skip"):
        return None, (size, size), False
    return None, None, True


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
        None, bool (B, <= kv_length) or int32 (B, kv_length), perhaps with a window, or bool (B, 1, q_length,
        kv_length); see the module's docstring.
    """
    is_compiling = torch.compiler.is_compiling()
    segments, window, needs_matrix = (
        _compiled_pattern(mask_function, kwargs) if is_compiling else _pattern(mask_function)
    )
    if needs_matrix:
        announce_mask(None if attention_mask is None else attention_mask.clone(), q_length, kv_length)
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return masking_utils.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **kwargs
        )
    if segments is not None:  # only without a cache
        mask = segments.to(torch.int32, copy=True)
    else:
        sizes = batch_size, q_length, kv_length, q_offset, kv_offset
        allowed = kwargs.get("allow_is_bidirectional_skip", False)
        two_sided = allowed if is_compiling else _is_bidirectional(mask_function)
        mask = _padding(attention_mask, sizes, two_sided, kwargs.get("device"))
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


def as_matrix(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask that `paged_flash_mask` returned, or the user's own 4-D one, as (B | 1, Hq | 1, Sq | 1, Sk).

    Without the causal mask and the window, which the layer or `window_of` tells.
    """
    if mask is None or mask.dim() == 4:
        return mask
    if mask.dtype == torch.int32:  # packed rows
        return mask[:, None, :, None] == mask[:, None, None, :]
    return mask.bool()[:, None, None, :]
