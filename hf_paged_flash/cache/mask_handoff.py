"""How a forward's mask finds the cache it belongs to.

transformers asks a cache for its mask sizes and then calls the mask function, which gets no handle on the cache: the
group of layers that was asked last on this thread is the one whose mask comes next.
"""

import threading
import weakref
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .page_group import PageGroup
    from .page_groups import PageGroups

_asked = threading.local()


def expect_mask(group: "PageGroup", sizes: tuple[int, int], *, is_prepared: bool = False) -> None:
    """Notes that `group` was asked for `sizes`, (q_length, kv_length); `is_prepared`: it knows the tokens."""
    _asked.group, _asked.sizes, _asked.cross = weakref.ref(group), sizes, None
    _asked.is_prepared = is_prepared


def is_prepared(q_length: int, kv_length: int) -> bool:
    """Whether the group that was asked for these sizes knows the forward's tokens, whatever a mask says of them."""
    known = getattr(_asked, "group", None) is not None and _asked.is_prepared
    return known and _asked.sizes == (q_length, kv_length)


def expect_cross_mask(cross: "PageGroups") -> None:
    """Notes that a mask over what `cross`, the groups of a cross-attention cache, holds may follow."""
    _asked.cross = weakref.ref(cross)


def expect_no_mask() -> None:
    """Forgets who was asked."""
    _asked.group = _asked.cross = None


def announce_mask(
    attention_mask: torch.Tensor | None, q_length: int, kv_length: int, window_left: int | None = None
) -> bool:
    """Hands the coming forward's mask, bool (batch, kv_length) or None, to the group whose sizes were just asked for.

    `window_left`: queries see at most so many keys before their own; None: any. The group keeps the mask: it must not
    be a tensor that the user may write to. Returns whether there is a group: not where the forward runs without a
    paged cache.
    """
    reference, sizes = getattr(_asked, "group", None), getattr(_asked, "sizes", None)
    _asked.group = None
    group = reference() if reference is not None else None
    if group is None or sizes != (q_length, kv_length):
        return False
    group.pending_mask, group.pending_window, group.is_announced = attention_mask, window_left, True
    return True


def announce_cross_mask(attention_mask: torch.Tensor | None, kv_length: int) -> bool:
    """Hands the mask over an encoder's columns, bool (batch, kv_length) or None, to the cross-attention cache.

    Returns whether there is one for so many columns: it takes the mask when it stores them, and knows it from then on.
    """
    reference, _asked.cross = getattr(_asked, "cross", None), None
    cross = reference() if reference is not None else None
    return cross is not None and cross.take_cross_mask(attention_mask, kv_length)
