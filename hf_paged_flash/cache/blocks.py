"""Blocks of a pool: how many table entries name each, and which are free. Host only, no tensors."""

from collections import deque
from collections.abc import Hashable, Sequence

import numpy as np

from ..errors import CacheFullError
from .prefix_index import PrefixIndex

GROWTH = 1 / 40  # the least that growth adds, as a share of the blocks that exist


class Blocks:
    """Reference counts of one pool's blocks, for every `BlockManager` that takes blocks from it.

    A block without references is free; the lowest is taken first. NumPy finds them, from the first that may be free.
    `version` changes whenever a block changes hands.

    An index of prefixes, where there is one, is a reference of its own to each block in it. Blocks that have no other
    one are kept: they are free for whoever needs them, once there are no others under the cap.
    """

    def __init__(self, block_size: int, max_blocks: int | None = None) -> None:
        self.block_size = block_size
        self.max_blocks = max_blocks  # None: no cap
        self.max_kept: int | None = None  # as many at most stay kept while others are added; None: no cap
        self.growth = GROWTH
        self.version = 0
        self.index: PrefixIndex | None = None
        self._dropped: deque[np.ndarray] = deque()  # tables whose managers are gone
        self.clear()

    def clear(self) -> None:
        """No block exists; only while none is used."""
        self.references = np.zeros(0, np.int32)
        self.blocks_free = 0
        self._first_free = 0  # all blocks before it are used
        self.version += 1
        if self.index is not None:
            self.index.clear()

    @property
    def num_blocks(self) -> int:
        """Blocks that exist, used and free."""
        return len(self.references)

    @property
    def blocks_used(self) -> int:
        return self.num_blocks - self.blocks_free

    @property
    def blocks_shared(self) -> int:
        rows = self.references if self.index is None else self.references - (self.index.used_at >= 0)
        return int((rows > 1).sum())

    @property
    def blocks_kept(self) -> int:
        """Blocks in use that the index of prefixes alone names."""
        return len(self._kept())

    @property
    def blocks_spanned(self) -> int:
        """One more than the highest block in use."""
        used = np.flatnonzero(self.references)
        return int(used[-1]) + 1 if len(used) else 0

    def take(self, needed: int) -> np.ndarray:
        """The lowest `needed` free blocks, int64, each referenced once.

        Raises:
            CacheFullError: the cap leaves fewer; nothing has changed.
        """
        self._reserve(needed)
        found, start, width, missing = [np.zeros(0, np.int64)], self._first_free, 1024, needed
        while missing:
            found.append(np.flatnonzero(self.references[start : start + width] == 0)[:missing] + start)
            missing -= len(found[-1])
            start, width = start + width, 2 * width
        blocks = np.concatenate(found)
        if needed:
            self.references[blocks] = 1
            self.blocks_free -= needed
            self._first_free = int(blocks[-1]) + 1
        self.version += 1
        return blocks

    def hold(self, blocks: np.ndarray, times: int | np.ndarray = 1) -> None:
        """Adds a reference for each time that a block is among `blocks`, or `times` of them."""
        self._add(blocks, times)

    def release(self, blocks: np.ndarray) -> None:
        """Takes back a reference for each time that a block is among `blocks`; blocks without any are free."""
        self._freed(self._add(blocks, -1))

    def put_back(self, blocks: np.ndarray, num_blocks: int) -> None:
        """The last `take`, undone: `blocks` are free again, and of all blocks the first `num_blocks` stay."""
        self.references[blocks] = 0
        self._freed(blocks)
        self.resize(num_blocks)

    def resize(self, num_blocks: int) -> None:
        """From now on `num_blocks` blocks exist, at least `blocks_spanned`; those that come are free."""
        added = num_blocks - self.num_blocks
        if added > 0:
            self.references = np.concatenate([self.references, np.zeros(added, np.int32)])
        elif added < 0:
            self.references = self.references[:num_blocks]
        self.blocks_free += added
        self._first_free = min(self._first_free, num_blocks)
        if self.index is not None:
            self.index.resize(num_blocks)

    def keep(self, root: Hashable, tokens: Sequence[bytes], blocks: np.ndarray) -> None:
        """Puts `blocks`, which rows name, in the index: see `PrefixIndex.add`."""
        self.hold(self.index.add(root, tokens, blocks))

    def forget(self, count: int | None = None) -> None:
        """Takes at least `count` of the kept blocks (None: all that the index names) out of it, the oldest first."""
        if count is None:
            everything = np.flatnonzero(self.index.used_at >= 0)
            self.release(self.index.remove_oldest(everything, len(everything)))
        elif count > 0:
            self.release(self.index.remove_oldest(self._kept(), count))

    def forget_surplus(self) -> None:
        """Forgets what is kept beyond `max_kept`."""
        if self.index is not None and self.max_kept is not None:
            self.forget(self.blocks_kept - self.max_kept)

    def _kept(self) -> np.ndarray:
        if self.index is None:
            return np.zeros(0, np.int64)
        return np.flatnonzero((self.index.used_at >= 0) & (self.references == 1))

    def moves_to_front(self) -> np.ndarray:
        """Moves that would leave the end free, int64 (n, 2): the highest blocks in use, the lowest free ones."""
        sources = np.flatnonzero(self.references)[::-1]
        targets = np.flatnonzero(self.references == 0)
        count = min(len(sources), len(targets))
        moves = np.stack([sources[:count], targets[:count]], axis=1)
        return moves[moves[:, 0] > moves[:, 1]]

    def move(self, moves: np.ndarray) -> None:
        """Block `moves[i, 1]`, free until now, is what `moves[i, 0]` was. The managers' `move` must follow."""
        sources, targets = moves.T
        self.references[targets] = self.references[sources]
        self.references[sources] = 0
        self._first_free = 0
        self.version += 1
        if self.index is not None:
            self.index.move(moves)

    def drop(self, table: np.ndarray) -> None:
        """Notes a table that nobody has any longer; called by the garbage collector, at any moment."""
        self._dropped.append(table)

    def collect(self) -> None:
        """Releases the blocks of dropped tables."""
        while self._dropped:
            table = self._dropped.popleft()
            self.release(table[table >= 0])

    def adopt(self, blocks: np.ndarray) -> None:
        """Counts `blocks` of a manager that comes with these blocks from elsewhere: unpickled, or loaded."""
        self._add(blocks, 1)
        self.blocks_free = int((self.references == 0).sum())
        self._first_free = 0

    def _add(self, blocks: np.ndarray, change: int | np.ndarray) -> np.ndarray:
        """Adds `change`, or `change[i]`, to the references of `blocks[i]`; returns the blocks that have none now."""
        if not blocks.size:
            return blocks
        self.version += 1
        blocks = blocks.astype(np.intp, copy=False)
        np.add.at(self.references, blocks, np.asarray(change, np.int32))  # fast where no type is converted
        return np.unique(blocks[self.references[blocks] == 0])

    def _freed(self, blocks: np.ndarray) -> None:
        self.blocks_free += len(blocks)
        self._first_free = min(self._first_free, int(blocks.min(initial=self.num_blocks)))
        self.version += 1

    def _reserve(self, needed: int) -> None:
        if needed <= self.blocks_free:
            return
        self.forget_surplus()
        free, num_blocks = self.blocks_free, self.num_blocks
        if needed <= free:
            return
        room = free if self.max_blocks is None else free + self.max_blocks - num_blocks
        if self.max_blocks is not None and needed > room:
            kept = self.blocks_kept
            if needed <= room + kept:
                self.forget(needed - room)
                return self._reserve(needed)
            room += kept
            raise CacheFullError(
                f"the paged cache is full: {needed} more blocks of {self.block_size} tokens are needed, "
                f"{max(room, 0)} are free under the cap of {self.max_blocks} blocks. This forward stored nothing, "
                "earlier tokens are intact: free room with `crop()`, `release()` or `reset()`, shorten or split the "
                "batch, or make a cache with a larger `num_blocks` or `max_memory`",
                blocks_needed=needed,
                blocks_free=max(room, 0),
            )
        # A first prefill gets what it needs; later growth takes a little more, so that pools are copied rarely.
        total = max(self.blocks_used + needed, num_blocks + int(num_blocks * self.growth))
        self.resize(total if self.max_blocks is None else min(total, self.max_blocks))

    def __getstate__(self) -> dict:
        # managers that are pickled along count their own references when they come back
        state = {"block_size": self.block_size, "max_blocks": self.max_blocks, "num_blocks": self.num_blocks}
        return state | {"has_index": self.index is not None}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["block_size"], state["max_blocks"])
        self.index = PrefixIndex() if state["has_index"] else None
        self.resize(state["num_blocks"])
