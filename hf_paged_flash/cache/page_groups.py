"""The groups of a cache: all take a forward's tokens together, or none does."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from ..errors import ArgumentError, CacheFullError
from .block_pool import BlockPool
from .blocks import GROWTH
from .forward_step import ForwardStep, NewTokens, to_device
from .layer_pools import growth_error
from .length_floor import LengthFloor
from .mask_handoff import expect_no_mask
from .page_group import PageGroup
from .prepared_forward import PackedTokens, PreparedForward
from .shared_cap import cap_of
from .step_buffers import StepBuffers


class PageGroups(list[PageGroup]):
    """A cache's groups of layers. Every row has the same tokens in each of them; which of these are kept differs.

    Args:
        groups: one or more, empty.
        max_memory: cap on the bytes of all groups together; None for none.

    Attributes:
        cross: the groups of the cross-attention cache beside this one; None for none.
        is_cross: whether these hold an encoder's keys, which the queries of another sequence look at.
        repeats: (rows, n), where `rows` rows are stored at once, each n of them are alike and share their blocks.
        sharing: what rows of the next packed forward begin with that others compute in it, see `NewTokens.sharing`.
        prepared: the forward under way, where its tokens were told before; see prepared_forward.py.
        states_changed: a layer's other state (linear attention, a convolution) has taken in this forward's tokens.
        states_ahead: such a state holds tokens of a forward that was taken back.
    """

    def __init__(self, groups: list[PageGroup], max_memory: int | None) -> None:
        super().__init__(groups)
        self.max_memory = max_memory
        self.cross: PageGroups | None = None
        self.is_cross = False
        self.repeats = (0, 1)
        self.sharing: tuple[np.ndarray, np.ndarray] | None = None
        self.prepared: PreparedForward | None = None
        self.states_changed = self.states_ahead = False
        self._floor = LengthFloor()

    __hash__ = object.__hash__  # two caches are never the same one

    @property
    def columns(self) -> int:
        return self[0].columns

    @property
    def batch(self) -> int:
        return self[0].batch

    def take_cross_mask(self, attention_mask: torch.Tensor | None, kv_length: int) -> bool:
        """Keeps the mask over an encoder's columns until these are stored; whether it is known, then and later."""
        if self.columns == 0:
            for group in self:
                group.pending_mask, group.is_announced = attention_mask, True
            return True
        return self.columns == kv_length and all(group.knows_mask for group in self)

    # ------------------------------------------------------------------------------------------------ one forward

    @torch.inference_mode(False)  # a step's tensors are written to by later ones, perhaps in another mode
    def begin(self, batch: int, q_length: int, device: torch.device) -> None:
        """Plans every group's step for `q_length` new columns: blocks, slots and lengths; nothing is stored yet.

        Raises:
            CacheFullError: no room under the cap or on the device; every group is as it was.
            ArgumentError: another batch size than stored, or a mask that does not continue the stored one.
        """
        expect_no_mask()  # whoever made this forward's mask, the next one is another forward's
        announced = [group for group in self if group.is_announced]
        keeps = [group.is_told_to_keep for group in self]
        masks = [group.pending_mask for group in self if group.pending_mask is not None]
        mask = masks[0] if masks else None
        for group in self:
            group.forget_announcement()
        if self.is_cross and mask is not None and mask.shape != (batch, q_length):
            announced, mask = [], None  # of something else than these keys
        self.check(batch, mask, q_length)
        new = self._new_tokens(mask, batch, q_length, device)
        self._take(new, keeps, mask, self.columns + q_length, device, knows_mask=bool(announced))

    @torch.inference_mode(False)
    def begin_packed(self, packed: PackedTokens, device: torch.device) -> None:
        """`begin` for the tokens of a packed forward, see `packed_forward`."""
        self._floor.restart(self[0].manager.lengths)
        new = packed.new_tokens(self._floor.lengths, device)
        keeps = [group.is_told_to_keep for group in self]
        self._take(new, keeps, packed.mask, packed.real.shape[1], device, knows_mask=True)

    @torch.inference_mode(False)
    def begin_static(
        self,
        counts: np.ndarray,
        q_length: int,
        buffers: Callable[[], StepBuffers],
        packed: PackedTokens | None = None,
    ) -> None:
        """`begin` for `counts[b]` more tokens in row b, of `q_length` columns, see `static_forward`."""
        self.sync_lengths()
        self._floor.restart(self[0].manager.lengths)
        sharing = None if packed is None else packed.sharing
        new = NewTokens(None, counts, self._floor.lengths, None, None, None, sharing=sharing)
        keeps = [group.keeps_to_window for group in self]
        mask, end = (None, self.columns + q_length) if packed is None else (packed.mask, packed.real.shape[1])
        # padding before a row's tokens sees further back than these
        gives_back = keeps if packed is None else [False] * len(self)
        with self._taking(new, gives_back, growth=1):  # each growth costs what was captured
            for group, keeps_to_window in zip(self, keeps, strict=True):
                group.keeps_to_window = keeps_to_window
            static = buffers()
            static.write(self, counts)
            for group, *tensors in zip(self, static.slot_mapping, static.block_table, strict=True):
                group.begin_static(*tensors, static.cache_seqlens, q_length, end, mask)

    def empty_rows(self, rows: np.ndarray) -> None:
        """Gives back what `rows`, bool (batch,), hold; they stay, and nobody may ask for what they held."""
        self.sync_lengths()
        for group in self:
            group.empty_rows(rows)

    def own_tensors(self) -> None:
        """What stays is no tensor of a static step."""
        for group in self:
            group.own_tensors()

    def _take(self, new: NewTokens, keeps: list[bool], mask, end: int, device, *, knows_mask: bool) -> None:
        with self._taking(new, keeps):
            for group in self:
                group.begin(new, mask, end, device, knows_mask=knows_mask)

    @contextmanager
    def _taking(self, new: NewTokens, keeps: list[bool], growth: float = GROWTH) -> Iterator[None]:
        """Hands out every group's blocks for the new tokens; takes them back where what follows is refused."""
        start = self.columns
        self._hand_out(new, keeps, growth)
        try:
            yield
        except BaseException:
            self._refuse(start)
            raise

    def _hand_out(self, new: NewTokens, keeps: list[bool], growth: float) -> None:
        start = self.columns
        for group, keeps_to_window in zip(self, keeps, strict=True):
            group.prepare(new, keeps_to_window)
        try:
            for index, group in enumerate(self):
                to_come = [other.blocks_short(new.counts) for other in self[index + 1 :]]
                group.plan(new, cap_of(self, group, [0] * (index + 1) + to_come), growth)
            for group in self:
                group.grow_pools()
            for group in self:
                group.copy_shared()
        except BaseException as error:
            self._refuse(start)
            # a device that is full may hold blocks that only an index of prefixes keeps
            is_of_device = isinstance(error, CacheFullError) and error.__cause__ is not None
            if not is_of_device or not any(group.store.forget_kept() for group in self):
                raise
            self._hand_out(new, keeps, growth)

    def check(self, batch: int, mask: torch.Tensor | None, q_length: int, *, may_hold_tokens: bool = False) -> None:
        """Begins empty rows where there are no columns; `may_hold_tokens`: those that were given tokens stay.

        Raises:
            ArgumentError: another batch size than stored, or a mask that does not cover all columns.
        """
        columns = self.columns
        if columns == 0 and (batch != self.batch or (self[0].holds_tokens and not may_hold_tokens)):
            for group in self:
                group.manager.start_rows(batch)
        elif batch != self.batch:
            raise ArgumentError(
                f"the paged cache holds {self.batch} rows, got keys for {batch}: continue with the same batch, or "
                "start a new cache (`reset()` empties this one)"
            )
        if mask is not None and mask.shape != (batch, columns + q_length):
            raise ArgumentError(
                f"`attention_mask` must cover the {columns} cached and {q_length} new columns of {batch} rows, "
                f"shape {(batch, columns + q_length)}, got {tuple(mask.shape)}. On a kept cache pass the whole "
                "conversation to generate(), not the new turn alone; `crop()` takes a turn back, `reset()` starts anew"
            )

    def _new_tokens(self, mask: torch.Tensor | None, batch: int, q_length: int, device: torch.device) -> NewTokens:
        first = self[0]
        on_device = any(group._counts_on_device(mask, q_length, device) for group in self)
        if not on_device:
            self.sync_lengths()
        if all(group.is_exact for group in self):
            self._floor.restart(first.manager.lengths)
        if on_device:
            before = first.cache_seqlens.to(device)
            if any(group.window is not None for group in self):
                self._floor.refresh(before)
            cache_seqlens = before + (1 if mask is None else mask[:, -1].to(device))
            return NewTokens(None, np.ones(batch, np.int64), self._floor.lengths, cache_seqlens, None, None)
        real = np.ones((batch, q_length), bool)
        if mask is not None:
            on_host = mask.cpu()
            first.check_history(on_host[:, : self.columns])
            real = on_host[:, self.columns :].numpy()
        counts = real.sum(1, dtype=np.int64)
        indices = cu_seqlens_q = None
        if not real.all() and not self.is_cross:  # the queries are none of these columns
            indices = to_device(np.flatnonzero(real), device)
            cu_seqlens_q = to_device(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), device)
        lengths = first.manager.lengths
        cache_seqlens = to_device((lengths + counts).astype(np.int32), device)
        rows, repeats = self.repeats
        repeats = repeats if self.columns == 0 and rows == batch else 1
        return NewTokens(real, counts, self._floor.lengths, cache_seqlens, indices, cu_seqlens_q, repeats)

    def take_back(self, step: ForwardStep) -> None:
        """Forgets `step` if it is the last one begun: a forward that is refused half way leaves nothing behind."""
        if any(step is group.step for group in self):
            self.truncate(step.start)
            self.states_ahead |= self.states_changed
            if step.start == 0:
                self._give_memory_back()

    def join_pool(self, group: PageGroup, pool: BlockPool, step: ForwardStep) -> None:
        """Makes room in the pool of a layer that stores for the first time; the others grow in `begin`.

        Raises:
            CacheFullError: no room under `max_memory` or on the device; every group is as it was before the step.
        """
        blocks, cap = group.manager.num_blocks, cap_of(self, group)
        if cap is not None and blocks > cap:  # layers differ in size, and the first ones were the smaller ones
            below = group.below_one_block(blocks)
            self._refuse(step.start)
            raise below or CacheFullError(
                f"the paged cache is full: {blocks} blocks take more than the {self.max_memory} bytes of "
                "`max_memory`. The tokens stored before this forward are intact: raise it, shorten or split the batch",
                blocks_needed=blocks,
                blocks_free=max(cap, 0),
            )
        try:
            pool.grow(step.num_blocks)
        except BaseException as error:
            needed = group.blocks_taken
            self._refuse(step.start)
            raise growth_error(error, needed, group.store.blocks.blocks_free) from error
        group.store.use_room()

    def _refuse(self, columns: int) -> None:
        """Undoes the step that has begun at `columns`, which was too large; the next forward may be smaller."""
        self.states_ahead |= self.states_changed
        for group in self:
            group.undo(columns)
        if columns == 0:
            self._give_memory_back()

    def _give_memory_back(self) -> None:
        for group in self:
            group.store.give_back()

    # ------------------------------------------------------------------------------------- tokens stored before

    def sync_lengths(self) -> None:
        """Replaces upper bounds of lengths by the true ones. Waits for the device where they differ."""
        for group in self:
            group.sync_lengths()

    def truncate(self, columns: int) -> None:
        """Drops all columns from `columns` on, and the blocks behind them.

        Raises:
            ArgumentError: layers with a sliding window have given back what they would need; nothing has changed.
        """
        undoes = all(group.can_undo(columns) for group in self)  # before lengths are read back
        lengths = self[0].lengths_at(columns)
        for group in self:
            group.check_truncate(lengths)
        if undoes:
            for group in self:
                group.undo(group.step.start)  # rows that were about to part share their blocks again
        if columns < self.columns:
            for group in self:
                group.truncate(columns, lengths)
        for group in self:
            group.store.shrink()

    def give_back(self) -> None:
        """Gives back what sliding windows have left behind in groups that waited for a `crop` to do so."""
        for group in self:
            if group.record_past and group.keeps_to_window and group.columns:
                group.give_back(group.manager.lengths if group.is_exact else self._floor.lengths)

    def select(self, rows: np.ndarray) -> None:
        """Row i becomes what row `rows[i]` was; blocks are shared, no K/V moves. Nothing while nothing is stored."""
        for group in self:
            group.select(rows)

    def start_from(self, blocks: Sequence[np.ndarray]) -> None:
        """Begins rows without a column that hold full `blocks[b]`; those there were are gone."""
        for group in self:
            group.start_from(blocks)

    def fork(self, rows: np.ndarray) -> "PageGroups":
        """Groups of their own whose row i is what row `rows[i]` is here, see `PageGroup.fork`."""
        fork = PageGroups([group.fork(rows) for group in self], self.max_memory)
        fork.is_cross, fork.states_ahead, fork.repeats = self.is_cross, self.states_ahead, self.repeats
        return fork

    def __deepcopy__(self, memo: dict) -> "PageGroups":
        fork = self.fork(np.arange(self.batch))
        fork.cross = copy.deepcopy(self.cross, memo)  # of the pair that is copied
        return fork

    def clear(self) -> None:
        """Forgets every token and gives the memory back."""
        self.states_changed = self.states_ahead = False
        for group in self:
            group.clear()
