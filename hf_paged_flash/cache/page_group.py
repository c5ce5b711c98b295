"""Layers that share block tables: their tokens, their blocks, and the step that the current forward takes."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..errors import ArgumentError, CacheFullError
from .block_manager import Append, BlockManager
from .block_pool import BlockPool
from .forward_step import ForwardStep, to_device
from .layer_pools import LayerPools, growth_error
from .mask_handoff import expect_mask, expect_no_mask
from .page_store import PageStore


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
    """

    def __init__(self, store: PageStore) -> None:
        self.store = store
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
        self.is_announced = False
        self._mask: torch.Tensor | None = None  # bool (batch, n <= columns), later columns are real; None: all real
        self._exact = True
        self._before: _Before | None = None  # the step; None once it can't be taken back
        self._cache_seqlens: torch.Tensor | None = None
        self._block_table: torch.Tensor | None = None

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

    def mask_sizes(self, q_length: int) -> tuple[int, int]:
        """(kv_length, kv_offset) for transformers' masks, and notice of the mask that follows."""
        kv_length = self.columns + q_length
        self.pending_mask, self.is_announced = None, False
        expect_mask(self, (q_length, kv_length))
        return kv_length, 0

    # ------------------------------------------------------------------------------------------------ one forward

    @torch.inference_mode(False)  # a step's tensors are written to by later ones, perhaps in another mode
    def begin(self, batch: int, q_length: int, device: torch.device) -> ForwardStep:
        """Plans the step for `q_length` new columns: blocks, slots and lengths; nothing is stored yet.

        Raises:
            CacheFullError: no room under the cap or on the device; the group is as it was.
            ArgumentError: another batch size than stored, or a mask that does not continue the stored one.
        """
        expect_no_mask()  # whoever made this forward's mask, the next one is another forward's
        if self.columns == 0 and batch != self.batch:
            self.manager.start_rows(batch)
        elif batch != self.batch:
            raise ArgumentError(
                f"the paged cache holds {self.batch} rows, got keys for {batch}: continue with the same batch, or "
                "start a new cache (`reset()` empties this one)"
            )
        mask, self.pending_mask = self.pending_mask, None
        if mask is not None and mask.shape != (batch, self.columns + q_length):
            raise ArgumentError(
                f"`attention_mask` must cover the {self.columns} cached and {q_length} new columns of {batch} rows, "
                f"shape {(batch, self.columns + q_length)}, got {tuple(mask.shape)}. On a kept cache pass the whole "
                "conversation to generate(), not the new turn alone; `crop()` takes a turn back, `reset()` starts anew"
            )
        on_device = self._counts_on_device(mask, q_length, device)
        if not on_device:
            self.sync_lengths()
        self._before = _Before(None, self._mask, self._cache_seqlens, self._exact)
        try:
            step = self._decode_on_device(mask, device) if on_device else self._step_on_host(mask, q_length, device)
        except BaseException:
            self._refuse(self.columns)
            raise
        self._mask = mask if mask is not None else self._mask
        step.knows_mask, self.is_announced = self.is_announced, False
        self.columns = step.end
        self.step = step
        return step

    def _counts_on_device(self, mask: torch.Tensor | None, q_length: int, device: torch.device) -> bool:
        on_device = mask is not None and mask.is_cuda or not self._exact
        return device.type == "cuda" and q_length == 1 and self.columns > 0 and on_device

    def take_back(self, step: ForwardStep) -> None:
        """Forgets `step` if it is the last one begun: a forward that is refused half way leaves nothing behind."""
        if step is self.step:
            self.truncate(step.start)
            if step.start == 0:
                self.store.give_back()

    def join_pool(self, pool: BlockPool, step: ForwardStep) -> None:
        """Makes room in the pool of a layer that stores for the first time; the others grow in `begin`.

        Raises:
            CacheFullError: no room under `max_memory` or on the device; the group is as it was before the step.
        """
        blocks, cap = self.manager.num_blocks, self.pools.cap
        if cap is not None and blocks > cap:  # layers differ in size, and the first ones were the smaller ones
            below = self._below_one_block(blocks)
            self._refuse(step.start)
            raise below or CacheFullError(
                f"the paged cache is full: {blocks} blocks take more than the {self.pools.max_memory} bytes of "
                "`max_memory`. The tokens stored before this forward are intact: raise it, shorten or split the batch",
                blocks_needed=blocks,
                blocks_free=cap,
            )
        try:
            pool.grow(step.num_blocks)
        except BaseException as error:
            needed = len(self._before.change.blocks)
            self._refuse(step.start)
            raise growth_error(error, needed, self.store.blocks.blocks_free) from error
        self.store.use_room()

    def _append(self, counts: np.ndarray) -> Append:
        """`manager.append`, with the layers' pools grown to match and shared blocks copied for those who write."""
        blocks = self.store.blocks
        blocks.max_blocks = self.pools.cap
        if self.pools.is_elastic:
            blocks.growth = 0  # it takes whole pages anyway, and copies nothing
        try:
            change = self.manager.append(counts)
        except CacheFullError as error:
            raise self._below_one_block(error.blocks_needed) or error from None
        self._before = replace(self._before, change=change)
        if blocks.num_blocks > change.num_blocks:  # in few decode steps
            try:
                self.pools.grow(blocks.num_blocks)
            except BaseException as error:
                free = blocks.blocks_free + len(change.blocks) - (blocks.num_blocks - change.num_blocks)
                raise growth_error(error, len(change.blocks), free) from error
            self.store.use_room()
        if len(change.copies):
            self.pools.copy_blocks(change.copies)
        return change

    def _refuse(self, columns: int) -> None:
        """Undoes the step that has begun at `columns`, which was too large; the next forward may be smaller."""
        self._undo(columns)
        if columns == 0:
            self.store.give_back()

    def _below_one_block(self, blocks_needed: int) -> CacheFullError | None:
        """What to raise where `max_memory` is too small for any block, as the layers that have stored show."""
        if self.pools.cap != 0:
            return None
        return CacheFullError(
            f"`max_memory` is {self.pools.max_memory} bytes, and one block of {self.block_size} tokens takes "
            f"{self.pools.block_bytes} in {self.pools.num_layers} layers: make a cache with at least that",
            blocks_needed=blocks_needed,
            blocks_free=0,
        )

    def _undo(self, columns: int) -> None:
        """Takes back the step that has begun at `columns`: what layers stored for it is forgotten."""
        before = self._before
        if before.change is not None:
            self.manager.undo(before.change, self.pools.room)
        self._mask, self._cache_seqlens, self._exact = before.mask, before.cache_seqlens, before.exact
        self._step_gone(columns)

    def _step_on_host(self, mask: torch.Tensor | None, q_length: int, device: torch.device) -> ForwardStep:
        batch, start = self.batch, self.columns
        new = np.ones((batch, q_length), bool)
        if mask is not None:
            on_host = mask.cpu()
            self._check_history(on_host[:, :start])
            new = on_host[:, start:].numpy()
        counts = new.sum(1, dtype=np.int64)
        before = self.manager.lengths
        change = self._append(counts)
        position = before[:, None] + np.cumsum(new, 1, dtype=np.int64) - 1
        slots = self._slots(np.where(new, position, -1))
        indices = cu_seqlens_q = None
        if not new.all():
            indices = to_device(np.flatnonzero(new), device)
            cu_seqlens_q = to_device(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), device)
        self._cache_seqlens = to_device(self.manager.lengths.astype(np.int32), device)
        return ForwardStep(
            start=start,
            end=start + q_length,
            batch=batch,
            slot_mapping=to_device(slots.reshape(-1), device),
            block_table=self._table_on(device, change),
            cache_seqlens=self._cache_seqlens,
            max_seqlen_k=int(self.manager.lengths.max(initial=0)),
            max_seqlen_q=int(counts.max(initial=0)),
            num_blocks=self.manager.num_blocks,
            indices=indices,
            cu_seqlens_q=cu_seqlens_q,
        )

    def _decode_on_device(self, mask: torch.Tensor | None, device: torch.device) -> ForwardStep:
        # No value is read back: where a row's new column is padding, the device knows, the host counts it as a token.
        change = self._append(np.ones(self.batch, np.int64))
        self._exact = False
        before = self._cache_seqlens.to(device)
        block_table = self._table_on(device, change)
        block = block_table.gather(1, (before // self.block_size).long()[:, None])[:, 0]
        slots = block.long() * self.block_size + before % self.block_size
        if mask is None:
            self._cache_seqlens = before + 1
        else:
            real = mask[:, -1].to(device)
            slots = torch.where(real, slots, -1)
            self._cache_seqlens = before + real
        return ForwardStep(
            start=self.columns,
            end=self.columns + 1,
            batch=self.batch,
            slot_mapping=slots,
            block_table=block_table,
            cache_seqlens=self._cache_seqlens,
            max_seqlen_k=int(self.manager.lengths.max(initial=0)),
            max_seqlen_q=1,
            num_blocks=self.manager.num_blocks,
        )

    def _table_on(self, device: torch.device, change: Append) -> torch.Tensor:
        """The block table on `device`, only the changed entries sent where that is possible."""
        table = self._block_table
        width = self.manager.table.shape[1]
        if table is None or table.shape != (self.batch, width) or table.device != device:
            self._block_table = to_device(self.manager.table, device)
        elif len(change.blocks):
            entries = to_device(np.stack([change.rows, change.columns, change.blocks]), device)
            table[entries[0], entries[1]] = entries[2].int()
        used = int(self.manager.row_blocks().max(initial=0))
        return self._block_table[:, : max(used, 1)]

    # ------------------------------------------------------------------------------------- tokens stored before

    def real_columns(self) -> np.ndarray | None:
        """bool (batch, columns): which columns are tokens; None where all are. Waits for the device."""
        if self._mask is None:
            return None
        known = self._mask[:, : self.columns].cpu().numpy()
        return np.pad(known, ((0, 0), (0, self.columns - known.shape[1])), constant_values=True)

    def sync_lengths(self) -> None:
        """Replaces the host's upper bounds by the true lengths. Waits for the device where they differ."""
        if not self._exact:
            self.manager.truncate(self._cache_seqlens.cpu().numpy().astype(np.int64))
            self._exact = True
            self._block_table = self._before = None

    def column_slots(self, columns: int, device: torch.device) -> torch.Tensor:
        """Slots int64 (batch, columns) of the first `columns` columns, -1 for padding."""
        self.sync_lengths()
        real = self.real_columns()
        real = np.ones((self.batch, columns), bool) if real is None else real[:, :columns]
        return to_device(self._slots(np.where(real, np.cumsum(real, 1, dtype=np.int64) - 1, -1)), device)

    def _slots(self, positions: np.ndarray) -> np.ndarray:
        """Slots int64 of token `positions` (batch, n) of each row, -1 for -1."""
        row, column = np.nonzero(positions >= 0)
        position = positions[row, column]
        slots = np.full(positions.shape, -1, np.int64)
        blocks = self.manager.table[row, position // self.block_size].astype(np.int64)
        slots[row, column] = blocks * self.block_size + position % self.block_size
        return slots

    def truncate(self, columns: int) -> None:
        """Drops all columns from `columns` on, and the blocks behind them."""
        if self._can_undo(columns):
            self._undo(self.step.start)  # rows that were about to part share their blocks again
        if columns < self.columns:
            self.sync_lengths()
            gone = self.columns - columns
            if self._mask is not None and self._mask.shape[1] > columns:
                known = self._mask[:, columns:].cpu().numpy()
                gone = gone - known.shape[1] + np.array([np.count_nonzero(row) for row in known])
            self.manager.truncate(self.manager.lengths - gone)
            self._mask = None if self._mask is None else self._mask[:, :columns]
            self._lengths_changed(columns)
        self.store.shrink()

    def _can_undo(self, columns: int) -> bool:
        """Whether the last step, if all of it goes, can be taken back as if it had never been."""
        change = None if self._before is None else self._before.change
        return change is not None and columns <= self.step.start and self.manager.can_undo(change)

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
        fork = PageGroup(self.store)
        fork.manager = self.manager.fork(rows)
        fork.columns, fork.layer_columns = self.columns, dict(self.layer_columns)
        if self._mask is not None:
            fork._mask = self._mask[torch.from_numpy(rows).to(self._mask.device)]
        if self._cache_seqlens is not None:
            fork._cache_seqlens = to_device(fork.manager.lengths.astype(np.int32), self._cache_seqlens.device)
        return fork

    def restore(self, table: np.ndarray, lengths: np.ndarray, columns: int, mask: torch.Tensor | None) -> None:
        """Takes over rows that were saved, into a group that has none; its blocks are 0 to the largest in `table`."""
        self.store.blocks.resize(int(table.max(initial=-1)) + 1)
        self.manager.table, self.manager.lengths = table.copy(), lengths.copy()
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

    def _check_history(self, mask: torch.Tensor) -> None:
        stored = self.real_columns()
        stored = torch.ones_like(mask) if stored is None else torch.from_numpy(stored)
        if not torch.equal(mask, stored):
            row, column = (int(i) for i in torch.nonzero(mask != stored)[0])
            raise ArgumentError(
                f"`attention_mask` changes columns that the paged cache has stored (row {row}, column {column} was "
                f"{'a token' if stored[row, column] else 'padding'}): padding is never stored and tokens can't be "
                "masked afterwards. Keep the earlier columns as they were, or start a new cache"
            )
