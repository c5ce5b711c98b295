"""Layers that share block tables, and the step that the current forward takes."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..errors import CacheFullError
from .block_manager import Append
from .blocks import GROWTH
from .forward_step import ForwardStep, NewTokens, to_device
from .layer_pools import growth_error
from .mask_handoff import expect_mask
from .prepared_forward import read_only
from .stored_rows import StoredRows
from .window import first_in_reach


@dataclass(frozen=True)
class _Before:
    """What a forward changed in a group, to take it back."""

    change: Append | None
    mask: torch.Tensor | None
    cache_seqlens: torch.Tensor | None  # as `_cache_seqlens`
    exact: bool


class PageGroup(StoredRows):
    """`StoredRows` of all layers that see the same tokens, and the step that the current forward takes with them."""

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._before = None  # its version is of the blocks that it came from

    def _start(self) -> None:
        super()._start()
        self.step: ForwardStep | None = None
        self.pending_mask: torch.Tensor | None = None  # of the forward to come, once announced
        self.pending_window: int | None = None  # keys left of its own that its queries see at most
        self.is_announced = False
        self._asked_sizes = (0, 0)  # (q_length, kv_length) of that mask
        self._before: _Before | None = None  # the step; None once it can't be taken back
        self._first: np.ndarray | None = None  # of empty rows, the first block that the step stores tokens in
        self._block_table: torch.Tensor | None = None
        self._dropped: list[tuple[np.ndarray, np.ndarray]] = []  # entries that `_block_table` has yet to lose

    def mask_sizes(self, q_length: int) -> tuple[int, int]:
        """(kv_length, kv_offset) for transformers' masks, and notice of the mask that follows."""
        sizes = q_length, self.columns + q_length
        if sizes != self._asked_sizes:  # else a layer may ask again, in a forward whose mask has come (Inkling)
            self.forget_announcement()
        self._asked_sizes = sizes
        expect_mask(self, sizes)
        return sizes[1], 0

    def forget_announcement(self) -> None:
        self.pending_mask = self.pending_window = None
        self.is_announced = False

    # ------------------------------------------------------------------------------------------------ one forward

    def prepare(self, new: NewTokens, keeps_to_window: bool) -> None:
        """Begins a step for a forward's new tokens, and gives back what its queries, and later ones, can't reach."""
        self.keeps_to_window = keeps_to_window
        self._first = None
        if keeps_to_window and not self.record_past:
            self.give_back(new.floor)
            self.store.shrink()  # after a prefill in chunks; decode steps take again what they give back
            # the forward's own tokens reach attention without the cache
            if not self.holds_tokens:
                self._first = first_in_reach(new.counts, self.window, self.block_size)
        counts_on_device = new.real is None and new.cache_seqlens is not None
        before = self.cache_seqlens if counts_on_device else self._cache_seqlens
        self._before = _Before(None, self._mask, before, self._exact)

    def blocks_short(self, counts: np.ndarray) -> int:
        """Blocks that `plan` must add to those that exist for `counts[b]` more tokens in each row."""
        self.store.blocks.collect()
        return max(self.manager.blocks_needed(counts, self._first) - self.store.blocks.blocks_free, 0)

    def plan(self, new: NewTokens, max_blocks: int | None, growth: float = GROWTH) -> None:
        """Hands out blocks for the new tokens; nothing on the device has changed yet.

        `growth`: what pools that must be copied to grow take beyond that, as a share of what they have.

        Raises:
            CacheFullError: no room under the cap of `max_blocks`.
        """
        self.store.set_cap(max_blocks)
        # pools that take whole pages copy nothing when they grow
        self.store.blocks.growth = 0 if self.pools.is_elastic else growth
        try:
            change = self._append(new)
        except CacheFullError as error:
            raise self.below_one_block(error.blocks_needed) or error from None
        self._before = replace(self._before, change=change)

    def _append(self, new: NewTokens) -> Append:
        if new.sharing is not None:
            return self.manager.append_sharing(new.counts, *new.sharing)
        if new.repeats == 1:
            return self.manager.append(new.counts, self._first)
        rows = np.arange(0, self.batch, new.repeats)
        self.manager.start_rows(len(rows))
        change = self.manager.append(new.counts[rows])
        self.manager.select(np.arange(len(rows)).repeat(new.repeats))
        return change

    def grow_pools(self) -> None:
        """Grows the layers' pools to the blocks that `plan` took.

        Raises:
            CacheFullError: the device has no room.
        """
        change, blocks = self._before.change, self.store.blocks
        if blocks.num_blocks <= change.num_blocks:  # as in nearly every decode step
            return
        try:
            self.pools.grow(blocks.num_blocks)
        except BaseException as error:
            free = blocks.blocks_free + len(change.blocks) - (blocks.num_blocks - change.num_blocks)
            raise growth_error(error, len(change.blocks), free) from error
        self.store.use_room()

    def copy_shared(self) -> None:
        """Copies the shared blocks that `plan` found rows about to write to."""
        if len(self._before.change.copies):
            self.pools.copy_blocks(self._before.change.copies)

    def begin(
        self, new: NewTokens, mask: torch.Tensor | None, end: int, device: torch.device, *, knows_mask: bool
    ) -> None:
        """Makes the step that `plan` prepared, up to column `end`: tables and slots on the device."""
        change, start = self._before.change, self.columns
        self._cache_seqlens, self._device = new.cache_seqlens, new.cache_seqlens.device
        block_table = self._table_on(device, change)
        if new.real is None:
            self._exact = False
            slots = self._slots_on_device(mask, block_table, self._before.cache_seqlens.to(device))
        else:
            before = self.manager.lengths - new.counts
            position = before[:, None] + np.cumsum(new.real, 1, dtype=np.int64) - 1
            self.has_padding |= mask is not None if new.is_packed else not new.real.all()
            is_stored = new.real & (np.arange(self.batch) % new.repeats == 0)[:, None]
            slots = self.slots(np.where(is_stored, position, -1))
            slots = to_device(slots[new.real] if new.is_packed else slots.reshape(-1), device)
        step = ForwardStep(
            start=start,
            end=end,
            batch=self.batch,
            slot_mapping=slots,
            block_table=block_table,
            cache_seqlens=new.cache_seqlens,
            max_seqlen_k=int(self.manager.lengths.max(initial=0)),
            max_seqlen_q=int(new.counts.max(initial=0)),
            num_blocks=self.manager.num_blocks,
            indices=new.indices,
            cu_seqlens_q=new.cu_seqlens_q,
            knows_mask=knows_mask,
            is_packed=new.is_packed,
            has_past=start > 0 or bool((self.manager.lengths > new.counts).any()),
        )
        self.knows_mask = knows_mask
        self._mask = mask if mask is not None else self._mask
        self.columns = step.end
        self.step = step

    def begin_static(
        self,
        slot_mapping: torch.Tensor,
        block_table: torch.Tensor,
        cache_seqlens: torch.Tensor,
        q_length: int,
        end: int,
        mask: torch.Tensor | None,
    ) -> None:
        """As `begin`, over tensors at addresses that stay, which hold the step already, see `StepBuffers`."""
        self.step = ForwardStep(
            start=self.columns,
            end=end,
            batch=self.batch,
            slot_mapping=slot_mapping,
            block_table=block_table,
            cache_seqlens=cache_seqlens,
            max_seqlen_k=block_table.shape[1] * self.block_size,
            max_seqlen_q=q_length,
            num_blocks=self.manager.num_blocks,
            knows_mask=True,
            has_past=True,
        )
        self.columns, self._cache_seqlens, self._device = end, cache_seqlens, cache_seqlens.device
        if mask is not None:
            self._mask, self.has_padding = mask, True
        self._block_table = None  # the next step's changes alone would not do
        self._dropped.clear()

    def empty_rows(self, rows: np.ndarray) -> None:
        """See `PageGroups.empty_rows`."""
        self.manager.truncate(np.where(rows, 0, self.manager.lengths))
        self._lengths_changed(self.columns)
        self.store.shrink()

    def own_tensors(self) -> None:
        """Leaves the tensors of a static step to the next one."""
        if self.is_exact:
            self._lengths_changed(self.columns)

    def end_packed(self) -> None:
        """Leaves of a packed step what rows of a batch can read."""
        if self.step is not None and self.step.is_packed:
            self.step = read_only(self.step)

    def note_window(self) -> None:
        """Takes in what the mask of a forward says that was planned before it."""
        if self.is_announced:
            self.keeps_to_window = self.is_told_to_keep

    @property
    def is_told_to_keep(self) -> bool:
        """Whether this forward's mask says that the group's layers see no further than its window."""
        told = self.pending_window
        return self.window is not None and self.is_announced and told is not None and told < self.window

    def _slots_on_device(
        self, mask: torch.Tensor | None, block_table: torch.Tensor, before: torch.Tensor
    ) -> torch.Tensor:
        # No value is read back: where a row's new column is padding, the device knows, the host counts it as a token.
        block = block_table.gather(1, (before // self.block_size).long()[:, None])[:, 0]
        slots = block.long() * self.block_size + before % self.block_size
        return slots if mask is None else torch.where(mask[:, -1].to(slots.device), slots, -1)

    @torch.inference_mode(False)
    def current_step(self, device: torch.device) -> ForwardStep:
        """The step under way; where rows have moved since, one of no new columns, to read what is stored."""
        if self.step is None:
            self._cache_seqlens, self._device = self.cache_seqlens.to(device), device
            self._block_table = to_device(self.manager.table, device)
            self.step = ForwardStep(
                start=self.columns,
                end=self.columns,
                batch=self.batch,
                slot_mapping=torch.empty(0, dtype=torch.int64, device=device),
                block_table=self._block_table,
                cache_seqlens=self._cache_seqlens,
                max_seqlen_k=int(self.manager.lengths.max(initial=0)),
                max_seqlen_q=0,
                num_blocks=self.manager.num_blocks,
                knows_mask=self.knows_mask,
            )
        return self.step

    def _counts_on_device(self, mask: torch.Tensor | None, q_length: int, device: torch.device) -> bool:
        on_device = mask is not None and mask.is_cuda or not self._exact
        return device.type == "cuda" and q_length == 1 and self.columns > 0 and on_device

    @property
    def blocks_taken(self) -> int:
        """Blocks that the last step took."""
        return len(self._before.change.blocks)

    def below_one_block(self, blocks_needed: int) -> CacheFullError | None:
        """What to raise where `max_memory` is too small for any block, as the layers that have stored show."""
        if self.pools.cap != 0:
            return None
        return CacheFullError(
            f"`max_memory` is {self.pools.max_memory} bytes, and one block of {self.block_size} tokens takes "
            f"{self.pools.block_bytes} in {self.pools.num_layers} layers: make a cache with at least that",
            blocks_needed=blocks_needed,
            blocks_free=0,
        )

    def can_undo(self, columns: int) -> bool:
        """Whether the last step, if all from `columns` on goes, can be taken back as if it had never been."""
        change = None if self._before is None else self._before.change
        return change is not None and columns <= self.step.start and self.manager.can_undo(change)

    def undo(self, columns: int) -> None:
        """Takes back the step that has begun at `columns`: what layers stored for it is forgotten."""
        before = self._before
        if before.change is not None and len(before.change.lengths) == self.batch:
            self.manager.undo(before.change, self.pools.room)
        elif before.change is not None:  # rows alike were stored as one
            self.manager.start_rows(self.batch)
        self._mask, self._cache_seqlens, self._exact = before.mask, before.cache_seqlens, before.exact
        self._set_columns(columns)
        self.own_tensors()  # a static step has written over those of the one before

    def _table_on(self, device: torch.device, change: Append) -> torch.Tensor:
        """The block table on `device`, only the changed entries sent where that is possible."""
        table = self._block_table
        width = self.manager.table.shape[1]
        if table is None or table.shape != (self.batch, width) or table.device != device:
            self._block_table = to_device(self.manager.table, device)
        elif len(change.blocks) or self._dropped:
            changed = [np.stack([row, column, np.full_like(row, -1)]) for row, column in self._dropped]
            changed.append(np.stack([change.rows, change.columns, change.blocks]))
            entries = to_device(np.concatenate(changed, 1), device)
            table[entries[0], entries[1]] = entries[2].int()
        self._dropped.clear()
        used = int(self.manager.row_blocks().max(initial=0))
        return self._block_table[:, : max(used, 1)]

    # ------------------------------------------------------------------------ where the rows change, beside a step

    def sync_lengths(self) -> None:
        if not self.is_exact:
            super().sync_lengths()
            self._block_table = self._before = None
            self._dropped.clear()

    def give_back(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        dropped = super().give_back(lengths)
        if len(dropped[0]):
            self._dropped.append(dropped)
        return dropped

    def _set_columns(self, columns: int) -> None:
        super()._set_columns(columns)
        self.step = self._before = self._block_table = None
        self._dropped.clear()
