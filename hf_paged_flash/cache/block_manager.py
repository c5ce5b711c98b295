"""Which row owns which block: free list, reference counts, block tables, copy-on-write. Host only, no tensors."""

from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from ..errors import CacheFullError

_MANY = 64  # blocks that are sorted at once rather than pushed and popped one by one; a sorted list is a heap


@dataclass(frozen=True)
class Append:
    """What an `append` changed.

    rows, columns, blocks: int64 (n,), entry `table[row, column]` is now `block`.
    copies: int64 (n, 2), (source, target) blocks whose contents must be copied before anything is written.
    lengths, num_blocks: what the manager's were before.
    """

    rows: np.ndarray
    columns: np.ndarray
    blocks: np.ndarray
    copies: np.ndarray
    lengths: np.ndarray
    num_blocks: int


class BlockManager:
    """Hands out blocks of `block_size` tokens to rows, as an operating system hands out pages (Kwon et al. 2023, 4.2).

    Invariants, after every call:
    - a block is free, or `references[block]` tables name it; never both;
    - row b's `ceil(lengths[b] / block_size)` first table entries are blocks, all others -1;
    - a block that more than one row names is never handed out for writing: its writer gets a copy first;
    - a call that cannot be served raises `CacheFullError` and changes nothing.

    The lowest free block is handed out first, so that the end of the pools empties and can be given back.
    """

    def __init__(self, block_size: int, max_blocks: int | None = None) -> None:
        self.block_size = block_size
        self.max_blocks = max_blocks  # None: no cap
        self.growth = 1 / 40  # the least that growth adds, as a share of the blocks that exist
        self.num_blocks = 0  # blocks that exist, used and free
        self.lengths = np.zeros(0, np.int64)  # tokens of each row
        self.table = np.full((0, 0), -1, np.int32)
        self.references = np.zeros(0, np.int32)
        self._free: list[int] = []  # a heap

    @property
    def blocks_free(self) -> int:
        return len(self._free)

    @property
    def blocks_used(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def blocks_shared(self) -> int:
        return int((self.references > 1).sum())

    @property
    def blocks_spanned(self) -> int:
        """One more than the highest block in use."""
        used = np.flatnonzero(self.references)
        return int(used[-1]) + 1 if len(used) else 0

    def row_blocks(self) -> np.ndarray:
        """Blocks that each row's tokens need, int64 (rows,)."""
        return -(-self.lengths // self.block_size)

    def start_rows(self, rows: int) -> None:
        """Begins `rows` empty rows; only when there are none."""
        self.lengths = np.zeros(rows, np.int64)
        self.table = np.full((rows, 0), -1, np.int32)

    def append(self, counts: np.ndarray) -> Append:
        """Makes room for `counts[b]` more tokens in each row b, all or nothing.

        Raises:
            CacheFullError: the cap leaves fewer blocks than the rows need.
        """
        lengths, num_blocks = self.lengths, self.num_blocks
        old_blocks = self.row_blocks()
        new_blocks = -(-(self.lengths + counts) // self.block_size)
        added = new_blocks - old_blocks
        copies = self._rows_to_copy(counts)
        needed = int(added.sum()) + len(copies)
        self._reserve(needed)

        blocks = self._take(needed)
        self.references[blocks] = 1
        copy_targets, new = blocks[: len(copies)], blocks[len(copies) :]
        rows = np.repeat(np.arange(len(counts)), added)
        first = np.cumsum(added) - added
        columns = np.arange(len(rows)) - first[rows] + old_blocks[rows]
        self._widen(int(new_blocks.max(initial=0)))
        self.table[rows, columns] = new
        last = old_blocks[copies] - 1
        sources = self.table[copies, last].astype(np.int64)
        np.subtract.at(self.references, sources, 1)
        self.table[copies, last] = copy_targets
        self.lengths = self.lengths + counts
        return Append(
            rows=np.concatenate([copies, rows]),
            columns=np.concatenate([last, columns]),
            blocks=blocks,
            copies=np.stack([sources, copy_targets], axis=1),
            lengths=lengths,
            num_blocks=num_blocks,
        )

    def undo(self, change: Append, room: int = 0) -> None:
        """Takes back the last `append`: for a device that had no room for what it planned.

        Of the blocks that `append` added, `room` in all stay, free.
        """
        num_blocks = max(change.num_blocks, min(room, self.num_blocks))
        self.table[change.rows, change.columns] = -1
        copied = slice(0, len(change.copies))
        sources = change.copies[:, 0]
        self.table[change.rows[copied], change.columns[copied]] = sources
        np.add.at(self.references, sources, 1)
        self.references[change.blocks] = 0
        self._give(change.blocks.tolist())
        self.resize(num_blocks)
        self.lengths = change.lengths

    def resize(self, num_blocks: int) -> None:
        """From now on `num_blocks` blocks exist, at least `blocks_spanned`; those that come are free."""
        added = num_blocks - self.num_blocks
        if added > 0:
            self._free += range(self.num_blocks, num_blocks)  # higher than all others: still a heap
            self.references = np.concatenate([self.references, np.zeros(added, np.int32)])
        elif added < 0:
            self._free = sorted(block for block in self._free if block < num_blocks)
            self.references = self.references[:num_blocks]
        self.num_blocks = num_blocks

    def moves_to_front(self) -> np.ndarray:
        """Moves that would leave the end free, int64 (n, 2): the highest blocks in use, the lowest free ones."""
        named = np.bincount(self.table[self.table >= 0], minlength=self.num_blocks)
        # a block that is not named as often as referenced here is someone else's as well, and stays
        sources = np.flatnonzero((self.references > 0) & (named == self.references))[::-1]
        targets = np.array(sorted(self._free), np.int64)
        count = min(len(sources), len(targets))
        moves = np.stack([sources[:count], targets[:count]], axis=1)
        return moves[moves[:, 0] > moves[:, 1]]

    def move(self, moves: np.ndarray) -> None:
        """Rows that named `moves[i, 0]` name `moves[i, 1]`, free until now, to which its K/V has been copied."""
        sources, targets = moves.T
        place = np.arange(self.num_blocks)
        place[sources] = targets
        named = self.table >= 0
        self.table[named] = place[self.table[named]]
        self.references[targets] = self.references[sources]
        self.references[sources] = 0
        self._free = np.flatnonzero(self.references == 0).tolist()

    def truncate(self, lengths: np.ndarray) -> None:
        """Shortens row b to `lengths[b]` tokens and releases the blocks behind them."""
        keep = -(-lengths // self.block_size)
        gone = (np.arange(self.table.shape[1])[None, :] >= keep[:, None]) & (self.table >= 0)
        self._release(self.table[gone])
        self.table[gone] = -1
        self.lengths = np.asarray(lengths, np.int64).copy()

    def select(self, rows: np.ndarray) -> None:
        """Row i becomes what row `rows[i]` was: reorders, repeats and drops rows. Blocks are shared, not copied."""
        table, lengths = self.table[rows], self.lengths[rows]
        np.add.at(self.references, table[table >= 0], 1)
        self._release(self.table[self.table >= 0])
        self.table, self.lengths = table, lengths

    def stored_tokens(self) -> int:
        """Tokens that blocks hold, a shared block's tokens once."""
        filled = np.zeros(self.num_blocks, np.int64)
        columns = np.arange(self.table.shape[1])[None, :]
        inside = np.clip(self.lengths[:, None] - columns * self.block_size, 0, self.block_size)
        used = self.table >= 0
        np.maximum.at(filled, self.table[used], inside[used])
        return int(filled.sum())

    def _rows_to_copy(self, counts: np.ndarray) -> np.ndarray:
        # Rows that are about to write into a last block which others share; one may keep the original if all write.
        rows = np.flatnonzero((counts > 0) & (self.lengths % self.block_size > 0))
        last = self.table[rows, self.lengths[rows] // self.block_size]
        shared = self.references[last] > 1
        rows, last = rows[shared], last[shared]
        keepers = []
        for block in np.unique(last):
            writers = rows[last == block]
            if len(writers) == self.references[block]:
                keepers.append(writers[-1])
        return np.setdiff1d(rows, keepers)

    def _reserve(self, needed: int) -> None:
        if needed <= len(self._free):
            return
        room = len(self._free) if self.max_blocks is None else len(self._free) + self.max_blocks - self.num_blocks
        if self.max_blocks is not None and needed > room:
            raise CacheFullError(
                f"the paged cache is full: {needed} more blocks of {self.block_size} tokens are needed, "
                f"{max(room, 0)} are free under the cap of {self.max_blocks} blocks. This forward stored nothing, "
                "earlier tokens are intact: free room with `crop()` or `reset()`, shorten or split the batch, or make "
                "a cache with a larger `num_blocks` or `max_memory`",
                blocks_needed=needed,
                blocks_free=max(room, 0),
            )
        # A first prefill gets what it needs; later growth takes a little more, so that pools are copied rarely.
        total = max(self.blocks_used + needed, self.num_blocks + int(self.num_blocks * self.growth))
        self.resize(total if self.max_blocks is None else min(total, self.max_blocks))

    def _take(self, count: int) -> np.ndarray:
        """The lowest `count` free blocks, int64, no longer free."""
        if count > _MANY:
            self._free.sort()
            taken, self._free = self._free[:count], self._free[count:]
        else:
            taken = [heappop(self._free) for _ in range(count)]
        return np.array(taken, np.int64)

    def _give(self, blocks: list[int]) -> None:
        if len(blocks) > _MANY:
            self._free = sorted(self._free + blocks)
        else:
            for block in blocks:
                heappush(self._free, block)

    def _release(self, blocks: np.ndarray) -> None:
        np.subtract.at(self.references, blocks, 1)
        blocks = np.unique(blocks)
        self._give(blocks[self.references[blocks] == 0].tolist())

    def _widen(self, width: int) -> None:
        if width > self.table.shape[1]:
            wider = np.full((len(self.table), max(width, self.table.shape[1] * 5 // 4)), -1, np.int32)
            wider[:, : self.table.shape[1]] = self.table
            self.table = wider
