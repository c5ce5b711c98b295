"""The mask function of "paged_flash": padding as a 2-D mask or packed rows as segment ids, no S x S matrix for them.

transformers describes a mask by a composed function (causal, window, chunks, padding, packed rows, overlays); a patch
has its makers say what it is made of (`hf_paged_flash.patches.mask_functions`). Causality reaches the attention
function as an argument of the layer; what is left is handed over as

- None: every key is a token;
- bool (B, kv_length): False where a key is padding;
- int32 (B, kv_length): packed rows, or the chunks of chunked attention: tokens attend within equal ids.

With a sliding window it is always a tensor, and has the window as an attribute (`window_of`): not every layer that
slides says so (Qwen2-MoE, Phi-MoE), and two-sided windows are one key wider here than in the layers' `sliding_window`.
Causality is noted likewise where layers deny it that a mask makes causal (PaliGemma after its prefix).

What none of these can carry (image blocks in a text, chunks over cached keys, mask functions of the user's) becomes a
matrix, bool (B, 1, q_length, kv_length), built by transformers' own mask functions: such models pay for it everywhere.
Models that work on their mask themselves (`MATRIX_CONFIGS`) get eager's matrix, which is added to the scores.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_map_only
from transformers import masking_utils

from .cache.mask_handoff import announce_cross_mask, announce_mask, is_prepared
from .errors import UnsupportedFeatureError
from .ops import library

_aten = torch.ops.aten
_COPIES = {_aten._to_copy.default, _aten.detach.default, _aten.alias.default, _aten.clone.default}
_NOTES = ("_paged_flash_window", "_paged_flash_is_causal", "_paged_flash_masks_nothing", "_paged_flash_are_chunks")


# configurations of models that work on their mask themselves, see `hf_paged_flash.patches.mask_readers`
MATRIX_CONFIGS: set[type] = set()


@dataclass
class _Pattern:
    """What a mask function says, where it is a conjunction of things known here.

    Attributes:
        causal: no query sees a later key.
        window: (left, right), keys that a query sees beside its own.
        chunks: (size, left_padding (B,)), a row's tokens see those of the same `size` tokens, counted from its first.
        segments: (B, S), tokens see those of an equal id.
        positions: (B, S), the positions of packed rows, where these count rather than columns.
        needs_matrix: there is more to it.
    """

    causal: bool = False
    window: tuple[int, int] | None = None
    chunks: tuple[int, torch.Tensor] | None = None
    segments: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    needs_matrix: bool = False


def _pattern(mask_function: Callable) -> _Pattern:
    pattern, open_ends = _Pattern(), [mask_function]
    while open_ends:
        function = open_ends.pop()
        maker, arguments = getattr(function, "made_of", ("", ()))
        if function is masking_utils.causal_mask_function:
            pattern.causal = True
        elif maker == "and_masks":
            open_ends.extend(arguments)
        elif maker == "remap_positions_for_packed_sequence":
            pattern.positions = arguments[1]
            open_ends.append(arguments[0])
        elif maker == "sliding_window_overlay" and pattern.window is None:
            pattern.window = (arguments[0] - 1, 0)
        elif maker == "sliding_window_bidirectional_overlay" and pattern.window is None:
            pattern.window = (arguments[0], arguments[0])
        elif maker == "chunked_overlay" and pattern.chunks is None:
            pattern.chunks = arguments
        elif maker == "packed_sequence_mask_function" and pattern.segments is None:
            pattern.segments = arguments[0]
        elif function is not masking_utils.bidirectional_mask_function:
            pattern.needs_matrix = True
    return pattern


class _Annotated(torch.Tensor):
    """A mask that keeps what is said of it when it is copied, to the device of a layer or by a checkpoint.

    A wrapper, as torch.compile takes no other subclass: layers may be compiled one by one, with the mask an input.
    """

    @staticmethod
    def __new__(cls, mask: torch.Tensor, notes: dict):
        return cls._make_wrapper_subclass(cls, mask.shape, strides=mask.stride(), dtype=mask.dtype, device=mask.device)

    def __init__(self, mask: torch.Tensor, notes: dict):
        self._mask = mask
        for name, note in notes.items():
            setattr(self, name, note)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._mask!r}, {_notes_of(self)})"

    def __tensor_flatten__(self) -> tuple[list[str], dict]:
        return ["_mask"], _notes_of(self)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], notes: dict, outer_size, outer_stride) -> "_Annotated":
        return _Annotated(inner["_mask"], notes)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = tree_map_only(cls, lambda x: x._mask, (args, kwargs or {}))
        result = func(*plain[0], **plain[1])
        return cls(result, _notes_of(args[0])) if func in _COPIES else result


def _notes_of(mask: torch.Tensor) -> dict:
    return {name: getattr(mask, name) for name in _NOTES if hasattr(mask, name)}


def _annotated(mask: torch.Tensor, **notes) -> torch.Tensor:
    if not torch.compiler.is_compiling():  # nothing copies it there
        plain = mask._mask if isinstance(mask, _Annotated) else mask
        return _Annotated(plain, _notes_of(mask) | notes)
    for name, note in notes.items():
        setattr(mask, name, note)
    return mask


def window_of(mask: torch.Tensor | None) -> tuple[int, int] | None:
    """Keys to the left and right of a query's own that it sees, as the mask's pattern says; None for no window."""
    return getattr(mask, "_paged_flash_window", None)


def is_causal_by_itself(mask: torch.Tensor | None) -> bool:
    """Whether a mask's pattern is causal, whatever the layer says (PaliGemma's say that they are not)."""
    return getattr(mask, "_paged_flash_is_causal", False)


def masks_nothing(mask: torch.Tensor | None) -> bool:
    """Whether a mask is there for what is noted on it alone."""
    return mask is None or getattr(mask, "_paged_flash_masks_nothing", False)


def are_chunks(mask: torch.Tensor | None) -> bool:
    """Whether a mask's ids are chunks, alone or of packed rows, which nothing but the mask tells."""
    return getattr(mask, "_paged_flash_are_chunks", False)


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
        kv_length), or float for models that work on it; see the module's docstring.
    """
    sizes = batch_size, q_length, kv_length, q_offset, kv_offset
    pattern = _pattern(mask_function)
    _settle_segments(pattern, attention_mask, sizes, kwargs.get("use_vmap", False))
    if isinstance(attention_mask, _Annotated):
        attention_mask = attention_mask._mask  # a composite model passes on what it got from here
    is_settled = is_prepared(q_length, kv_length)
    if is_settled:
        attention_mask = None
    if attention_mask is not None:
        attention_mask = attention_mask.clone()  # kept beyond this call: a bool mask may be the user's own tensor
    keeps_to_window = pattern.window is not None and pattern.causal and not pattern.needs_matrix
    is_paged = announce_mask(attention_mask, q_length, kv_length, pattern.window[0] if keeps_to_window else None)
    if not is_paged and pattern == _Pattern():  # every query sees every token
        is_paged = announce_cross_mask(attention_mask, kv_length)
    if pattern.window is not None and not is_paged:
        pattern.needs_matrix |= not _fits_window(pattern.window, attention_mask, sizes)
    is_read = type(kwargs.get("config")) in MATRIX_CONFIGS
    if is_settled and (pattern.needs_matrix or is_read or pattern.segments is not None):
        raise UnsupportedFeatureError(
            "the model's mask says more than padding and windows, which paged_flash took it not to do when it packed "
            "the rows of a batch or planned a step: pass `past_key_values=DynamicCache(config=model.config)`, and "
            "report it"
        )
    if pattern.needs_matrix or is_read:
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        make_matrix = masking_utils.eager_mask if is_read else masking_utils.sdpa_mask
        return make_matrix(*sizes, mask_function=mask_function, attention_mask=attention_mask, **kwargs)
    if pattern.segments is not None:
        mask = pattern.segments.to(torch.int32, copy=True)
        if pattern.chunks is not None:
            mask = _annotated(mask, _paged_flash_are_chunks=True)
        if torch.compiler.is_compiling():  # for all layers at once: `packing.row_offsets`
            mask._paged_flash_offsets = library.segment_offsets(mask)
    elif is_paged:
        mask = attention_mask
    else:
        mask = _padding(attention_mask, sizes, pattern.causal, kwargs.get("device"))
    notes = {} if pattern.window is None else {"_paged_flash_window": pattern.window}
    if pattern.causal and getattr(kwargs.get("config"), "use_bidirectional_attention", False):
        notes["_paged_flash_is_causal"] = True  # its layers say that they are not
    if notes and mask is None:
        mask = torch.ones(1, 1, dtype=torch.bool, device=kwargs.get("device")).expand(batch_size, kv_length)
        notes["_paged_flash_masks_nothing"] = True
    return _annotated(mask, **notes) if notes else mask


def _fits_window(window: tuple[int, int], attention_mask: torch.Tensor | None, sizes: tuple) -> bool:
    """Whether a window means the same counted from the last key, and with the padding taken out."""
    _, q_length, kv_length, q_offset, kv_offset = sizes
    if window[1] > 0 and int(q_offset) + q_length != kv_offset + kv_length:
        return False
    # transformers counts columns; what is traced is not packed
    return torch.compiler.is_compiling() or _is_one_run(attention_mask)


def _settle_segments(pattern: _Pattern, attention_mask: torch.Tensor | None, sizes: tuple, is_users: bool) -> None:
    """Says chunks as segments, and asks for a matrix where segments are no runs of columns or not all there is."""
    _, q_length, kv_length, _, kv_offset = sizes
    packed = pattern.segments
    if packed is None and pattern.chunks is not None and kv_length + kv_offset <= pattern.chunks[0]:
        pattern.chunks = None  # the first holds all
    if packed is None and pattern.chunks is None:
        return
    fits = q_length == kv_length
    if packed is not None:
        fits = fits and attention_mask is None and packed.shape[1] == kv_length
        fits = fits and (not is_users or _counts_up(packed))  # transformers' own ids do
    if fits and pattern.chunks is not None:
        # left padding gets chunks of its own, and no query looks at padding on its right; a hole would be seen
        fits = pattern.causal and _is_one_run(attention_mask)
        size, left_padding = pattern.chunks
        positions = pattern.positions
        if positions is None:
            positions = torch.arange(kv_length, device=left_padding.device)
        pattern.segments = (positions - left_padding[:, None]) // size
        if packed is not None:
            changes = (packed.diff() != 0) | (pattern.segments.diff() != 0)
            pattern.segments = torch.nn.functional.pad(changes.cumsum(1), (1, 0))
    pattern.needs_matrix |= not fits


def _counts_up(ids: torch.Tensor) -> bool:
    return not torch.compiler.is_compiling() and bool((ids.diff() >= 0).all())


def _is_one_run(attention_mask: torch.Tensor | None) -> bool:
    """Whether each row's tokens are known to lie side by side."""
    if attention_mask is None or torch.compiler.is_compiling():
        return attention_mask is None
    begins = (attention_mask[:, 1:] & ~attention_mask[:, :-1]).sum(1) + attention_mask[:, 0]
    return bool((begins <= 1).all())


def _padding(
    attention_mask: torch.Tensor | None, sizes: tuple, causal: bool, device: torch.device | None
) -> torch.Tensor | None:
    """The padding among the keys of a forward, bool (B, <= kv_length), or None."""
    batch_size, q_length, kv_length, q_offset, kv_offset = sizes
    if attention_mask is not None and torch.compiler.is_compiling():
        return attention_mask[:, kv_offset : kv_offset + kv_length]
    seen = int(q_offset) + q_length - kv_offset if causal else kv_length
    if attention_mask is None:
        # a static cache is longer than what it holds: the rest is padding
        return None if kv_length <= seen else torch.ones(batch_size, seen, dtype=torch.bool, device=device)
    attention_mask = attention_mask[:, kv_offset : kv_offset + kv_length]
    if isinstance(q_offset, torch.Tensor):  # a static cache's mask may be as long as the cache
        attention_mask = attention_mask[:, :seen]
    # one of another width is kept, for the attention function to check
    is_whole = attention_mask.shape[1] == kv_length == seen
    return None if is_whole and bool(attention_mask.all()) else attention_mask


def as_matrix(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask that `paged_flash_mask` returned, or the user's own 4-D one, as (B | 1, Hq | 1, Sq | 1, Sk).

    Without the causal mask and the window, which the layer or `window_of` tells.
    """
    if mask is None or mask.dim() == 4:
        return mask
    if mask.dtype == torch.int32:  # packed rows
        return mask[:, None, :, None] == mask[:, None, None, :]
    return mask.bool()[:, None, None, :]
