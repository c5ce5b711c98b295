"""Forwards whose tokens generation code tells before it calls the model, rather than the mask function within it.

While one is under way the cache takes no mask, every layer joins the step that was planned, and the mask function
hands on no padding; windows it notes as always. A forward that does not come to its end is taken back: nothing stored
before is lost, and the next one finds the cache as this one did.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import ArgumentError, PagedFlashError
from .forward_step import ForwardStep, NewTokens, to_device
from .mask_handoff import expect_mask, expect_no_mask
from .step_buffers import StepBuffers

if TYPE_CHECKING:
    from .page_group import PageGroup
    from .page_groups import PageGroups


@dataclass(frozen=True)
class PackedTokens:
    """The tokens that a packed forward computes, a row's after another's: those of a mask that are not stored yet.

    Attributes:
        real: bool (batch, columns), which they are, among all columns so far.
        mask: bool (batch, columns), which columns are tokens, on the user's device; None where all are.
        counts: int64 (batch,), how many of them a row has.
        indices: int64 (tokens,), their places among batch * columns.
        stored: int64 (batch,), tokens that a row has before them.
        sharing: as in `NewTokens`.
    """

    real: np.ndarray
    mask: torch.Tensor | None
    counts: np.ndarray
    indices: np.ndarray
    stored: np.ndarray
    sharing: tuple[np.ndarray, np.ndarray] | None

    @staticmethod
    def of(
        attention_mask: torch.Tensor, stored: np.ndarray, sharing: tuple[np.ndarray, np.ndarray] | None
    ) -> "PackedTokens":
        """The tokens of `attention_mask`, bool (batch, columns), after the `stored[b]` first ones of each row b.

        Waits for the device.
        """
        on_host = attention_mask.cpu().numpy()
        real = on_host & (np.cumsum(on_host, 1) > stored[:, None])
        mask = None if on_host.all() else attention_mask.clone()  # kept: it may be the user's own
        return PackedTokens(real, mask, real.sum(1, dtype=np.int64), np.flatnonzero(real), stored, sharing)

    def new_tokens(self, floor: np.ndarray, device: torch.device) -> NewTokens:
        """These, for groups whose rows hold `floor[b]` tokens at least."""
        return NewTokens(
            real=self.real,
            counts=self.counts,
            floor=floor,
            cache_seqlens=to_device((self.stored + self.counts).astype(np.int32), device),
            indices=None,
            cu_seqlens_q=to_device(np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int32), device),
            is_packed=True,
            sharing=self.sharing,
        )


@dataclass
class PreparedForward:
    """The forward that is under way in `groups`.

    Attributes:
        start: columns before.
        packed: what it computes where its rows are packed, else None.
        is_planned: its step is there. A packed one is planned in the first layer: then the device is known and, from
            the mask function, the windows.
    """

    groups: "PageGroups"
    start: int
    packed: PackedTokens | None = None
    is_planned: bool = False

    @property
    def is_static(self) -> bool:
        """Whether it may be replayed without its Python code, which must not go by what the host knows."""
        return self.packed is None

    @property
    def is_complete(self) -> bool:
        """Whether every layer that holds columns has stored this forward's."""
        return all(set(group.layer_columns.values()) == {group.columns} for group in self.groups)

    def skip_layers(self) -> None:
        """Every layer has stored the forward's tokens, as far as the host can tell: a replay of it does."""
        for group in self.groups:
            group.layer_columns = dict.fromkeys(group.layer_columns, group.columns)

    def mask_sizes(self, group: "PageGroup", q_length: int) -> tuple[int, int]:
        """(kv_length, kv_offset), of no consequence for a packed forward."""
        kv_length = self.start + q_length if self.packed is None else q_length
        expect_mask(group, (q_length, kv_length), is_prepared=True)
        return kv_length, 0

    def join(self, group: "PageGroup", layer_columns: int, size: tuple[int, int], device: torch.device) -> ForwardStep:
        """The step of `group`, for a layer that holds `layer_columns` columns and gets keys (batch, length, ...)."""
        if not self.is_planned:
            self.is_planned = True
            self.groups.begin_packed(self.packed, device)
        expected = None if group.step is None else group.step.size  # None once it was taken back
        if layer_columns != self.start or expected != size:
            raise PagedFlashError(
                f"a layer that holds {layer_columns} columns of the paged cache got keys of (batch, length) {size}, "
                f"the forward prepared after column {self.start} has {expected}: call the model once, with its tokens"
            )
        return group.step


@contextmanager
def packed_forward(groups: "PageGroups", attention_mask: torch.Tensor) -> Iterator[PackedTokens]:
    """Within it the model is called once with [1, tokens], the tokens that it yields, and no mask.

    They are those of each row's tokens in `attention_mask` that are not stored: a row may hold tokens before its first
    forward, which others have computed. Attention runs over each row by itself. Afterwards the cache is as after the
    padded forward: it holds as many columns as the mask, and the mask.

    Args:
        attention_mask: (batch, columns), all columns so far: what there is, and at least one more.

    Raises:
        ArgumentError: a mask that does not continue the stored one. What the model raises within takes all back.
    """
    packed = new_tokens(groups, attention_mask)
    groups.sharing = None
    with _under_way(PreparedForward(groups, groups.columns, packed)):
        yield packed
    for group in groups:  # what is read from now on are rows, not what was packed
        group.end_packed()


def new_tokens(groups: "PageGroups", attention_mask: torch.Tensor) -> PackedTokens:
    """The tokens of `attention_mask` (batch, columns) that are not stored yet; see `packed_forward`."""
    attention_mask = attention_mask.bool()
    batch, columns = attention_mask.shape
    groups.sync_lengths()
    groups.check(batch, None, 0, may_hold_tokens=True)
    if columns <= groups.columns:
        raise ArgumentError(f"`attention_mask` must have more than the {groups.columns} stored columns, got {columns}")
    if groups.columns:
        groups[0].check_history(attention_mask[:, : groups.columns].cpu())
    stored, sharing = groups[0].manager.lengths, groups.sharing
    if sharing is not None:
        stored = np.maximum(stored, sharing[1] * groups[0].block_size)
    return PackedTokens.of(attention_mask, stored, sharing)


@contextmanager
def static_forward(
    groups: "PageGroups",
    q_length: int,
    buffers: Callable[[], StepBuffers],
    finished: np.ndarray | None = None,
    packed: PackedTokens | None = None,
) -> Iterator[PreparedForward]:
    """Plans a forward of `q_length` columns, tokens of their rows all, within which the model is called with them.

    It may be replayed instead: the step is in tensors whose addresses stay. `buffers` gives these once the rows have
    their blocks, and knows then how wide tables must be and where pools lie. Windows give back what the last forward
    said. Rows `finished`, bool (batch,), compute their columns and store none.

    With `packed` tokens the columns are these, the last ones of each row, behind padding: afterwards the cache is as
    after their packed forward.

    Raises:
        CacheFullError: no room; the cache is as it was.
    """
    prepared = PreparedForward(groups, groups.columns, is_planned=True)
    counts = np.full(groups.batch, q_length, np.int64) if packed is None else packed.counts
    counts = counts if finished is None else np.where(finished, 0, counts)
    groups.begin_static(counts, q_length, buffers, packed)
    with _under_way(prepared):
        yield prepared


@contextmanager
def _under_way(prepared: PreparedForward) -> Iterator[None]:
    groups = prepared.groups
    groups.prepared = prepared
    try:
        yield
        for group in groups:
            group.note_window()
    except BaseException:
        if groups.columns > prepared.start:
            groups.take_back(groups[0].step)
        raise
    finally:
        groups.prepared = None
        expect_no_mask()
        for group in groups:
            group.forget_announcement()


def read_only(step: ForwardStep) -> ForwardStep:
    """`step` after its packed forward, for whoever reads what is stored."""
    rest = {"cu_seqlens_q": None, "max_seqlen_q": 0, "is_packed": False, "_on_device": {}}
    return replace(step, slot_mapping=step.slot_mapping[:0], **rest)
