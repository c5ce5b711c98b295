"""Which row owns which block: block tables, copy-on-write, forks. Host only, no tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .blocks import Blocks


@dataclass(frozen=True)
class Append:
    """What an `append` changed.

    rows, columns, blocks: int64 (n,), entry `table[row, column]` is now `block`.
    copies: int64 (n, 2), (source, target) blocks whose contents must be copied before anything is written.
    lengths, first, num_blocks: what the manager's were before.
    version: of the blocks, once appended.
    shared: int64 (n, 2), other entries of the table that are blocks now, as another row took them.
    """

    rows: np.ndarray
    columns: np.ndarray
    blocks: np.ndarray
    copies: np.ndarray
    lengths: np.ndarray
    first: np.ndarray
    num_blocks: int
    version: int
    shared: np.ndarray | None = None


class BlockManager:
    """Hands out blocks of `block_size` tokens to rows, as an operating system hands out pages (Kwon et al. 2023, 4.2).

    Managers that were forked from one another share their `blocks`, each with rows of its own. One that is garbage
    collected gives its references back.

    Invariants, after every call:
    - a block is free, or `references[block]` entries of tables name it, an index of prefixes counted as one; never
      both;
    - row b's table entries `first[b]` to `ceil(lengths[b] / block_size)` are blocks, all others -1: what lies before
      was given back, or never stored, as nobody will read it;
    - a block that more than one row names is never handed out for writing: its writer gets a copy first;
    - a call that cannot be served raises `CacheFullError` and changes nothing.

    The lowest free block is handed out first, so that the end of the pools empties and can be given back.
    """

    def __init__(self, block_size: int, max_blocks: int | None = None, blocks: Blocks | None = None) -> None:
        self.blocks = Blocks(block_size, max_blocks) if blocks is None else blocks
        self.block_size = block_size
        self.lengths = np.zeros(0, np.int64)  # tokens of each row
        self.first = np.zeros(0, np.int64)  # leading table entries of each row that are no blocks
        self.table = np.full((0, 0), -1, np.int32)

    def __del__(self) -> None:
        # at any moment, perhaps in the middle of another manager's call: the blocks are released in the next one
        table = self.__dict__.get("table")
        if table is not None and table.size:
            self.blocks.drop(table)

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.blocks.adopt(self.table[self.table >= 0])

    @property
    def num_blocks(self) -> int:
        """Blocks that exist, used and free, this manager's and others'."""
        return self.blocks.num_blocks

    def row_blocks(self) -> np.ndarray:
        """Blocks that each row's tokens need, int64 (rows,)."""
        return -(-self.lengths // self.block_size)

    def start_rows(self, rows: int) -> None:
        """Begins `rows` empty rows; those there were are gone."""
        self.blocks.release(self.table[self.table >= 0])
        self.lengths, self.first = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        self.table = np.full((rows, 0), -1, np.int32)

    def start_from(self, blocks: Sequence[np.ndarray]) -> None:
        """Begins rows that hold full `blocks[b]`, which the index of prefixes has; those there were are gone."""
        held = np.array([len(row) for row in blocks], np.int64)
        table = np.full((len(blocks), int(held.max(initial=0))), -1, np.int32)
        table[np.arange(table.shape[1])[None, :] < held[:, None]] = np.concatenate([np.zeros(0, np.int64), *blocks])
        self.start_rows(len(blocks))
        self.blocks.hold(table[table >= 0])
        self.table, self.lengths = table, held * self.block_size

    def append(self, counts: np.ndarray, first: np.ndarray | None = None) -> Append:
        """Makes room for `counts[b]` more tokens in each row b, all or nothing.

        Args:
            first: of rows that are empty, the first block to store tokens in; those before are not taken. None: all.

        Raises:
            CacheFullError: the cap leaves fewer blocks than the rows need.
        """
        self.blocks.collect()
        lengths, num_blocks, old_first = self.lengths, self.num_blocks, self.first
        old_blocks = self.row_blocks()
        if first is not None:
            old_blocks = np.maximum(old_blocks, first)
        new_blocks = -(-(self.lengths + counts) // self.block_size)
        added = new_blocks - old_blocks
        copies = self._rows_to_copy(counts)
        blocks = self.blocks.take(int(added.sum()) + len(copies))

        copy_targets, new = blocks[: len(copies)], blocks[len(copies) :]
        rows = np.repeat(np.arange(len(counts)), added)
        added_before = np.cumsum(added) - added
        columns = np.arange(len(rows)) - added_before[rows] + old_blocks[rows]
        self._widen(int(new_blocks.max(initial=0)))
        self.table[rows, columns] = new
        last = old_blocks[copies] - 1
        sources = self.table[copies, last].astype(np.int64)
        self.blocks.release(sources)
        self.table[copies, last] = copy_targets
        self.lengths = self.lengths + counts
        self.first = old_first if first is None else np.maximum(old_first, first)
        return Append(
            rows=np.concatenate([copies, rows]),
            columns=np.concatenate([last, columns]),
            blocks=blocks,
            copies=np.stack([sources, copy_targets], axis=1),
            lengths=lengths,
            first=old_first,
            num_blocks=num_blocks,
            version=self.blocks.version,
        )

    def append_sharing(self, counts: np.ndarray, source: np.ndarray, blocks: np.ndarray) -> Append:
        """`append` where row b, of full blocks, begins with the first `blocks[b]` blocks of row `source[b]`.

        That is an earlier row, which fills them in this very forward; those that row b has already stay.
        """
        lengths, held = self.lengths, self.row_blocks()
        self.lengths = np.maximum(lengths, blocks * self.block_size)
        try:
            change = self.append(counts)
        except BaseException:
            self.lengths = lengths
            raise
        entries = []
        for row in np.flatnonzero(blocks > held):  # the rows before it are complete
            columns = np.arange(held[row], blocks[row])
            self.table[row, columns] = self.table[source[row], columns]
            self.blocks.hold(self.table[row, columns])
            entries.append(np.stack([np.full_like(columns, row), columns], axis=1))
        shared = np.concatenate(entries) if entries else None
        return replace(change, lengths=lengths, version=self.blocks.version, shared=shared)

    def undo(self, change: Append, room: int = 0) -> None:
        """Takes back the last `append`, as if it had never been; only while `can_undo(change)`.

        Of the blocks that `append` added, `room` in all stay, free.
        """
        if change.shared is not None:
            rows, columns = change.shared.T
            self.blocks.release(self.table[rows, columns])
            self.table[rows, columns] = -1
        self.table[change.rows, change.columns] = -1
        copied = slice(0, len(change.copies))
        sources = change.copies[:, 0]
        self.table[change.rows[copied], change.columns[copied]] = sources
        self.blocks.hold(sources)
        self.blocks.put_back(change.blocks, max(change.num_blocks, min(room, self.num_blocks)))
        self.lengths, self.first = change.lengths, change.first

    def can_undo(self, change: Append) -> bool:
        """Whether no block has changed hands since: a fork may have written to what a row would get back."""
        self.blocks.collect()
        return change.version == self.blocks.version

    def blocks_needed(self, counts: np.ndarray, first: np.ndarray | None = None) -> int:
        """Blocks that `append(counts, first)` takes."""
        held = self.row_blocks() if first is None else np.maximum(self.row_blocks(), first)
        added = -(-(self.lengths + counts) // self.block_size) - held
        return int(added.sum()) + len(self._rows_to_copy(counts))

    def drop_front(self, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gives back the blocks before block `first[b]` of each row b, which keeps the rest.

        Returns the entries of the table that are no blocks any more, (rows, columns).
        """
        rows = np.flatnonzero(first > self.first)
        if not len(rows):
            return rows, rows
        start = int(self.first[rows].min())
        columns = np.arange(start, int(first[rows].max()))[None, :]
        gone = (columns >= self.first[rows, None]) & (columns < first[rows, None])
        row, column = np.nonzero(gone)
        row, column = rows[row], column + start
        self.blocks.release(self.table[row, column])
        self.table[row, column] = -1
        self.first = np.maximum(self.first, first)
        return row, column

    def truncate(self, lengths: np.ndarray) -> None:
        """Shortens row b to `lengths[b]` tokens and releases the blocks behind them."""
        keep = -(-lengths // self.block_size)
        start = int(keep.min(initial=self.table.shape[1]))
        tail = self.table[:, start:]
        gone = (np.arange(start, self.table.shape[1])[None, :] >= keep[:, None]) & (tail >= 0)
        self.blocks.release(tail[gone])
        tail[gone] = -1
        self.lengths = np.asarray(lengths, np.int64).copy()
        self.first = np.minimum(self.first, keep)

    def select(self, rows: np.ndarray) -> None:
        """Row i becomes what row `rows[i]` was: reorders, repeats and drops rows. Blocks are shared, not copied."""
        uses = np.bincount(rows, minlength=len(self.lengths))
        more, gone = np.flatnonzero(uses > 1), np.flatnonzero(uses == 0)
        table = self.table[more]
        used = table >= 0
        self.blocks.hold(table[used], np.broadcast_to(uses[more, None] - 1, table.shape)[used])
        table = self.table[gone]
        self.blocks.release(table[table >= 0])
        self.table, self.lengths, self.first = self.table[rows], self.lengths[rows], self.first[rows]

    def fork(self, rows: np.ndarray) -> "BlockManager":
        """A manager of its own whose row i is what row `rows[i]` is here; it shares the blocks."""
        fork = BlockManager(self.block_size, blocks=self.blocks)
        table = self.table[rows]
        self.blocks.hold(table[table >= 0])
        fork.table, fork.lengths, fork.first = table, self.lengths[rows], self.first[rows]
        return fork

    def move(self, place: np.ndarray) -> None:
        """Rows that named block b name `place[b]`, as every manager of these blocks must do by itself."""
        named = self.table >= 0
        self.table[named] = place[self.table[named]]

    def filled(self) -> np.ndarray:
        """Tokens in each block, of those that this manager's rows name, int64 (num_blocks,)."""
        filled = np.zeros(self.num_blocks, np.int64)
        columns = np.arange(self.table.shape[1])[None, :]
        inside = np.clip(self.lengths[:, None] - columns * self.block_size, 0, self.block_size)
        used = self.table >= 0
        np.maximum.at(filled, self.table[used], inside[used])
        return filled

    def _rows_to_copy(self, counts: np.ndarray) -> np.ndarray:
        # Rows that are about to write into a last block which others share; one may keep the original if all write.
        rows = np.flatnonzero((counts > 0) & (self.lengths % self.block_size > 0))
        last = self.table[rows, self.lengths[rows] // self.block_size]
        shared = self.blocks.references[last] > 1
        rows, last = rows[shared], last[shared]
        if not len(rows):
            return rows
        # the last writer of each block, and how many there are
        blocks, keeper, writers = np.unique(last[::-1], return_index=True, return_counts=True)
        keeper = keeper[writers == self.blocks.references[blocks]]
        return np.delete(rows, len(rows) - 1 - keeper)

    def _widen(self, width: int) -> None:
        if width > self.table.shape[1]:
            wider = np.full((len(self.table), max(width, self.table.shape[1] * 5 // 4)), -1, np.int32)
            wider[:, : self.table.shape[1]] = self.table
            self.table = wider
