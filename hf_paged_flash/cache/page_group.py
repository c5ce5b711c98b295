"""Layers that share block tables: their tokens, their blocks, and the step that the current forward takes."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..errors import ArgumentError, CacheFullError
from .block_manager import Append, BlockManager
from .forward_step import ForwardStep, NewTokens, to_device
from .layer_pools import LayerPools, growth_error
from .mask_handoff import expect_mask
from .page_store import PageStore
from .window import check_reach, check_truncate, first_in_reach


@dataclass(frozen=True)
class _Before:
    """What a forward changed in a group, to take it back."""

    change: Append | None
    mask: torch.Tensor | None
    cache_seqlens: torch.Tensor | None
    exact: bool


class PageGroup:
    """Rows of tokens in blocks, for all layers that see the same tokens.

    On CUDA a decode step must not wait for the device, so a mask that lies there is not read back: the device counts
    (`cache_seqlens`), and `manager.lengths` holds upper bounds until the next forward of several tokens, `crop` or
    `memory()` reads the truth. Blocks are handed out by the bounds: at most one too many a row.

    Attributes:
        window: tokens that a query of these layers sees, itself included; None: all. Blocks that no later query can
            reach are given back, once the forward's mask says that its layers keep to the window.
        record_past: give nothing back before the next `crop`, which may take tokens away and needs what lies before.
    """

    def __init__(self, store: PageStore, window: int | None = None) -> None:
        self.store = store
        self.window = window
        self.record_past = False
        store.groups.add(self)
        self._start()

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.store.groups.add(self)

    def _start(self) -> None:
        self.manager = BlockManager(self.block_size, blocks=self.store.blocks)
        self.columns = 0
        self.layer_columns: dict[int, int] = {}  # columns that each layer has stored, by layer index
        self.step: ForwardStep | None = None
        self.pending_mask: torch.Tensor | None = None  # of the forward to come, once announced
        self.pending_window: int | None = None  # keys left of its own that its queries see at most
        self.is_announced = False
        self._asked_sizes = (0, 0)  # (q_length, kv_length) of that mask
        self.keeps_to_window = False  # the last forward did
        self.knows_mask = False  # as in the last step
        self.has_padding = False  # some column is known to be padding
        self._mask: torch.Tensor | None = None  # bool (batch, n <= columns), later columns are real; None: all real
        self._exact = True
        self._before: _Before | None = None  # the step; None once it can't be taken back
        self._first: np.ndarray | None = None  # of empty rows, the first block that the step stores tokens in
        self._cache_seqlens: torch.Tensor | None = None
        self._block_table: torch.Tensor | None = None
        self._dropped: list[tuple[np.ndarray, np.ndarray]] = []  # entries that `_block_table` has yet to lose

    def clear(self) -> None:
        """Forgets every token and gives the memory back, as soon as no fork has a token either."""
        self.manager.start_rows(0)
        if not self.store.give_back():
            self.store.shrink()
        elif len(self.store.groups) == 1:
            self.pools.clear()  # what comes next may have another dtype or device
        self._start()

    @property
    def block_size(self) -> int:
        return self.store.blocks.block_size

    @property
    def pools(self) -> LayerPools:
        return self.store.pools

    @property
    def batch(self) -> int:
        return len(self.manager.lengths)

    @property
    def blocks_used(self) -> int:
        """Blocks that hold tokens, of this group and its forks."""
        self.store.blocks.collect()
        return self.store.blocks.blocks_used

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
            if self.columns == 0:
                self._first = first_in_reach(new.counts, self.window, self.block_size)
        self._before = _Before(None, self._mask, self._cache_seqlens, self._exact)

    def blocks_short(self, counts: np.ndarray) -> int:
        """Blocks that `plan` must add to those that exist for `counts[b]` more tokens in each row."""
        self.store.blocks.collect()
        return max(self.manager.blocks_needed(counts, self._first) - self.store.blocks.blocks_free, 0)

    def plan(self, new: NewTokens, max_blocks: int | None) -> None:
        """Hands out blocks for the new tokens; nothing on the device has changed yet.

        Raises:
            CacheFullError: no room under the cap of `max_blocks`.
        """
        self.store.blocks.max_blocks = max_blocks
        if self.pools.is_elastic:
            self.store.blocks.growth = 0  # it takes whole pages anyway, and copies nothing
        try:
            change = self._append(new)
        except CacheFullError as error:
            raise self.below_one_block(error.blocks_needed) or error from None
        self._before = replace(self._before, change=change)

    def _append(self, new: NewTokens) -> Append:
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
        self, new: NewTokens, mask: torch.Tensor | None, q_length: int, device: torch.device, *, knows_mask: bool
    ) -> None:
        """Makes the step that `plan` prepared: tables and slots on the device; `step` is it then."""
        change, start = self._before.change, self.columns
        self._cache_seqlens = new.cache_seqlens
        block_table = self._table_on(device, change)
        if new.real is None:
            self._exact = False
            slots = self._slots_on_device(mask, block_table, self._before.cache_seqlens.to(device))
        else:
            before = self.manager.lengths - new.counts
            position = before[:, None] + np.cumsum(new.real, 1, dtype=np.int64) - 1
            self.has_padding |= not new.real.all()
            is_stored = new.real & (np.arange(self.batch) % new.repeats == 0)[:, None]
            slots = to_device(self._slots(np.where(is_stored, position, -1)).reshape(-1), device)
        step = ForwardStep(
            start=start,
            end=start + q_length,
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
        )
        self.knows_mask = knows_mask
        self._mask = mask if mask is not None else self._mask
        self.columns = step.end
        self.step = step

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
            self._cache_seqlens = self._cache_seqlens.to(device)
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
    def cache_seqlens(self) -> torch.Tensor | None:
        """Tokens of each row, int32 (batch,), as the device counts them; None before the first forward."""
        return self._cache_seqlens

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
        self._step_gone(columns)

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

    # ------------------------------------------------------------------------------------- tokens stored before

    def real_columns(self) -> np.ndarray | None:
        """bool (batch, columns): which columns are tokens; None where all are. Waits for the device."""
        if self._mask is None:
            return None
        known = self._mask[:, : self.columns].cpu().numpy()
        return np.pad(known, ((0, 0), (0, self.columns - known.shape[1])), constant_values=True)

    @property
    def is_exact(self) -> bool:
        """Whether `manager.lengths` are the true lengths, not upper bounds."""
        return self._exact

    def sync_lengths(self) -> None:
        """Replaces the host's upper bounds by the true lengths. Waits for the device where they differ."""
        if not self._exact:
            self.manager.truncate(self._cache_seqlens.cpu().numpy().astype(np.int64))
            self._exact = True
            self._block_table = self._before = None
            self._dropped.clear()

    def column_slots(self, columns: int, device: torch.device) -> torch.Tensor:
        """Slots int64 (batch, columns) of the first `columns` columns, -1 for padding and for what was given back."""
        self.sync_lengths()
        real = self.real_columns()
        real = np.ones((self.batch, columns), bool) if real is None else real[:, :columns]
        return to_device(self._slots(np.where(real, np.cumsum(real, 1, dtype=np.int64) - 1, -1)), device)

    def _slots(self, positions: np.ndarray) -> np.ndarray:
        """Slots int64 of token `positions` (batch, n) of each row, -1 for -1 and for tokens that are not stored."""
        row, column = np.nonzero(positions >= self.manager.first[:, None] * self.block_size)
        position = positions[row, column]
        slots = np.full(positions.shape, -1, np.int64)
        blocks = self.manager.table[row, position // self.block_size].astype(np.int64)
        slots[row, column] = blocks * self.block_size + position % self.block_size
        return slots

    def give_back(self, lengths: np.ndarray) -> None:
        """Gives back what no query after `lengths[b]` tokens can reach; no row has fewer."""
        dropped = self.manager.drop_front(first_in_reach(lengths, self.window, self.block_size))
        if len(dropped[0]):
            self._dropped.append(dropped)

    @property
    def has_given_back(self) -> bool:
        """Whether there are tokens that are not stored any more, or never were."""
        return bool(self.manager.first.any())

    def check_reach(self, window_left: int) -> None:
        """Raises UnsupportedFeatureError where queries see further back (-1: to the start) than tokens are kept."""
        if self.has_given_back:
            check_reach(window_left, self.window)

    def lengths_at(self, columns: int) -> np.ndarray:
        """Tokens of each row in the first `columns` columns, int64 (batch,). Waits for the device."""
        lengths = self.manager.lengths if self._exact else self._cache_seqlens.cpu().numpy().astype(np.int64)
        gone = self.columns - columns
        if self._mask is not None and self._mask.shape[1] > columns:
            known = self._mask[:, columns:].cpu().numpy()
            gone = gone - known.shape[1] + np.array([np.count_nonzero(row) for row in known])
        return lengths - gone

    def check_truncate(self, lengths: np.ndarray) -> None:
        """Raises ArgumentError where rows cut to `lengths` would see tokens that have been given back."""
        if self.window is not None:
            check_truncate(lengths, self.manager.first, self.window, self.block_size)

    def truncate(self, columns: int, lengths: np.ndarray) -> None:
        """Drops all columns from `columns` on, which leaves `lengths`, and the blocks behind them."""
        self.sync_lengths()
        self.manager.truncate(lengths)
        self._mask = None if self._mask is None else self._mask[:, :columns]
        self._lengths_changed(columns)

    def select(self, rows: np.ndarray) -> None:
        """Row i becomes what row `rows[i]` was; blocks are shared, no K/V moves. Nothing while nothing is stored."""
        if self.columns == 0 or np.array_equal(rows, np.arange(self.batch)):
            return
        self.sync_lengths()
        self.manager.select(rows)
        if self._mask is not None:
            self._mask = self._mask[torch.from_numpy(rows).to(self._mask.device)]
        self._lengths_changed(self.columns)
        self.store.shrink()

    def move(self, place: np.ndarray) -> None:
        """Follows blocks that moved from b to `place[b]`; the last step can't be taken back any more."""
        self.manager.move(place)
        self._step_gone(self.columns)

    def fork(self, rows: np.ndarray) -> "PageGroup":
        """A group of its own whose row i is what row `rows[i]` is here; it shares the blocks and the pools."""
        self.sync_lengths()
        fork = PageGroup(self.store, self.window)
        fork.manager = self.manager.fork(rows)
        fork.columns, fork.layer_columns = self.columns, dict(self.layer_columns)
        fork.record_past, fork.keeps_to_window = self.record_past, self.keeps_to_window
        fork.knows_mask, fork.has_padding = self.knows_mask, self.has_padding
        if self._mask is not None:
            fork._mask = self._mask[torch.from_numpy(rows).to(self._mask.device)]
        if self._cache_seqlens is not None:
            fork._cache_seqlens = to_device(fork.manager.lengths.astype(np.int32), self._cache_seqlens.device)
        return fork

    def restore(
        self, table: np.ndarray, lengths: np.ndarray, first: np.ndarray, columns: int, mask: torch.Tensor | None
    ) -> None:
        """Takes over rows that were saved, into a group that has none; its blocks are 0 to the largest in `table`."""
        self.store.blocks.resize(int(table.max(initial=-1)) + 1)
        self.manager.table, self.manager.lengths, self.manager.first = table.copy(), lengths.copy(), first.copy()
        self.store.blocks.adopt(table[table >= 0])
        self.columns, self._mask = columns, mask
        self._cache_seqlens = to_device(lengths.astype(np.int32), torch.device("cpu"))

    def _lengths_changed(self, columns: int) -> None:
        self._step_gone(columns)
        if self._cache_seqlens is not None:
            self._cache_seqlens = to_device(self.manager.lengths.astype(np.int32), self._cache_seqlens.device)

    def _step_gone(self, columns: int) -> None:
        self.columns = columns
        self.layer_columns = {layer: min(stored, columns) for layer, stored in self.layer_columns.items()}
        self.step = self._before = self._block_table = None
        self._dropped.clear()

    def check_history(self, mask: torch.Tensor) -> None:
        stored = self.real_columns()
        stored = torch.ones_like(mask) if stored is None else torch.from_numpy(stored)
        if not torch.equal(mask, stored):
            row, column = (int(i) for i in torch.nonzero(mask != stored)[0])
            raise ArgumentError(
                f"`attention_mask` changes columns that the paged cache has stored (row {row}, column {column} was "
                f"{'a token' if stored[row, column] else 'padding'}): padding is never stored and tokens can't be "
                "masked afterwards. Keep the earlier columns as they were, or start a new cache"
            )
