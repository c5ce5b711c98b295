"""The rows of a group of layers as they are stored: which columns are tokens, and which blocks these lie in."""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch

from ..errors import ArgumentError
from .block_manager import BlockManager
from .forward_step import to_device
from .layer_pools import LayerPools
from .page_store import PageStore
from .window import check_reach, check_truncate, first_in_reach


class StoredRows:
    """Rows of tokens in blocks, with transformers' columns, padding among them; `PageGroup` adds what forwards do.

    On CUDA a decode step must not wait for the device, so a mask that lies there is not read back: the device counts
    (`cache_seqlens`), and `manager.lengths` holds upper bounds until the next forward of several tokens, `crop` or
    `memory()` reads the truth. Blocks are handed out by the bounds: one too many for each `block_size` columns of
    padding that a row has got since.

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
        self.keeps_to_window = False  # the last forward did
        self.knows_mask = False  # as in the last step
        self.has_padding = False  # some column is known to be padding
        self._mask: torch.Tensor | None = None  # bool (batch, n <= columns), later columns are real; None: all real
        self._exact = True
        self._cache_seqlens: torch.Tensor | None = None  # None: to be made of `manager.lengths`, on `_device`
        self._device: torch.device | None = None

    def clear(self) -> None:
        """Forgets every token and gives the memory back, as soon as no fork has a token either."""
        self.manager.start_rows(0)
        if self.store.blocks.index is not None:
            self.store.blocks.forget()
        self._start()
        if not self.store.give_back():
            self.store.shrink()
        elif all(group.columns == 0 for group in list(self.store.groups)):
            self.pools.clear()  # what comes next may have another dtype or device

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

    @property
    def cache_seqlens(self) -> torch.Tensor | None:
        """Tokens of each row, int32 (batch,), as the device counts them; None before the first forward."""
        if self._cache_seqlens is None and self._device is not None:
            self._cache_seqlens = to_device(self.manager.lengths.astype(np.int32), self._device)
        return self._cache_seqlens

    def real_columns(self) -> np.ndarray | None:
        """bool (batch, columns): which columns are tokens; None where all are. Waits for the device."""
        if self._mask is None:
            return None
        known = self._mask[:, : self.columns].cpu().numpy()
        return np.pad(known, ((0, 0), (0, self.columns - known.shape[1])), constant_values=True)

    @property
    def holds_tokens(self) -> bool:
        """Whether a forward finds something stored: columns, or tokens that rows without columns were given."""
        return self.columns > 0 or bool(self.manager.lengths.any())

    @property
    def is_exact(self) -> bool:
        """Whether `manager.lengths` are the true lengths, not upper bounds."""
        return self._exact

    def sync_lengths(self) -> None:
        """Replaces the host's upper bounds by the true lengths. Waits for the device where they differ."""
        if not self._exact:
            self.manager.truncate(self._cache_seqlens.cpu().numpy().astype(np.int64))
            self._exact = True

    def column_slots(self, columns: int, device: torch.device) -> torch.Tensor:
        """Slots int64 (batch, columns) of the first `columns` columns, -1 for padding and for what was given back."""
        self.sync_lengths()
        real = self.real_columns()
        real = np.ones((self.batch, columns), bool) if real is None else real[:, :columns]
        return to_device(self.slots(np.where(real, np.cumsum(real, 1, dtype=np.int64) - 1, -1)), device)

    def slots(self, positions: np.ndarray) -> np.ndarray:
        """Slots int64 of token `positions` (batch, n) of each row, -1 for -1 and for tokens that are not stored."""
        row, column = np.nonzero(positions >= self.manager.first[:, None] * self.block_size)
        position = positions[row, column]
        slots = np.full(positions.shape, -1, np.int64)
        blocks = self.manager.table[row, position // self.block_size].astype(np.int64)
        slots[row, column] = blocks * self.block_size + position % self.block_size
        return slots

    def give_back(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gives back what no query after `lengths[b]` tokens can reach; no row has fewer.

        Returns the entries of the table that are no blocks any more, (rows, columns).
        """
        return self.manager.drop_front(first_in_reach(lengths, self.window, self.block_size))

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
        return np.maximum(lengths - gone, 0)  # rows that were emptied hold none of their columns

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

    def start_from(self, blocks: Sequence[np.ndarray]) -> None:
        """Begins rows without a column that hold full `blocks[b]`; those there were are gone."""
        self.manager.start_from(blocks)
        self._exact = True
        self._lengths_changed(0)

    def move(self, place: np.ndarray) -> None:
        """Follows blocks that moved from b to `place[b]`; the last step can't be taken back any more."""
        self.manager.move(place)
        self._set_columns(self.columns)

    def fork(self, rows: np.ndarray) -> Self:
        """A group of its own whose row i is what row `rows[i]` is here; it shares the blocks and the pools."""
        self.sync_lengths()
        fork = type(self)(self.store, self.window)
        fork.manager = self.manager.fork(rows)
        fork.columns, fork.layer_columns = self.columns, dict(self.layer_columns)
        fork.record_past, fork.keeps_to_window = self.record_past, self.keeps_to_window
        fork.knows_mask, fork.has_padding = self.knows_mask, self.has_padding
        if self._mask is not None:
            fork._mask = self._mask[torch.from_numpy(rows).to(self._mask.device)]
        fork._device = self._device
        return fork

    def restore(
        self, table: np.ndarray, lengths: np.ndarray, first: np.ndarray, columns: int, mask: torch.Tensor | None
    ) -> None:
        """Takes over rows that were saved, into a group that has none; its blocks are 0 to the largest in `table`."""
        self.store.blocks.resize(int(table.max(initial=-1)) + 1)
        self.manager.table, self.manager.lengths, self.manager.first = table.copy(), lengths.copy(), first.copy()
        self.store.blocks.adopt(table[table >= 0])
        self.columns, self._mask = columns, mask
        self._device = torch.device("cpu")

    def _lengths_changed(self, columns: int) -> None:
        self._set_columns(columns)
        self._cache_seqlens = None

    def _set_columns(self, columns: int) -> None:
        self.columns = columns
        self.layer_columns = {layer: min(stored, columns) for layer, stored in self.layer_columns.items()}
        if columns == 0:  # another batch may follow
            self._mask, self.has_padding = None, False

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
