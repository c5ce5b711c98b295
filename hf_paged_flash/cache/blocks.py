"""Blocks of a pool: which are free, and how many table entries name each. Host only, no tensors."""

from collections import deque

import numpy as np

from ..errors import CacheFullError

_FEW = 512  # blocks below which sorting them costs less than a pass over the pool's


class Blocks:
    """Reference counts and the free list of one pool, for every `BlockManager` that takes blocks from it.

    Each block costs O(1), in NumPy. `version` changes whenever a block changes hands.
    """

    def __init__(self, block_size: int, max_blocks: int | None = None) -> None:
        self.block_size = block_size
        self.max_blocks = max_blocks  # None: no cap
        self.version = 0
        self._dropped: deque[np.ndarray] = deque()  # tables whose managers are gone
        self.clear()

    def clear(self) -> None:
        """No block exists; only while none is used."""
        self.num_blocks = 0  # blocks that exist, used and free
        self.references = np.zeros(0, np.int32)
        self._free = np.zeros(0, np.int32)  # a stack: its first `_num_free` entries, the last one is taken next
        self._num_free = 0
        self.version += 1

    @property
    def free(self) -> np.ndarray:
        """The free blocks; the last one is taken first."""
        return self._free[: self._num_free]

    @property
    def blocks_free(self) -> int:
        return self._num_free

    @property
    def blocks_used(self) -> int:
        return self.num_blocks - self.blocks_free

    @property
    def blocks_shared(self) -> int:
        return int((self.references > 1).sum())

    def take(self, needed: int) -> np.ndarray:
        """`needed` blocks, int64, each referenced once.

        Raises:
            CacheFullError: the cap leaves fewer; nothing has changed.
        """
        self._reserve(needed)
        blocks = self._free[self._num_free - needed : self._num_free][::-1].astype(np.int64)
        self._num_free -= needed
        self.references[blocks] = 1
        self.version += 1
        return blocks

    def hold(self, blocks: np.ndarray, times: int | np.ndarray = 1) -> None:
        """Adds a reference for each time that a block is among `blocks`, or `times` of them."""
        self._add(blocks, np.broadcast_to(times, blocks.shape))

    def release(self, blocks: np.ndarray) -> None:
        """Takes back a reference for each time that a block is among `blocks`; blocks without any are free."""
        changed = self._add(blocks, np.broadcast_to(-1, blocks.shape))
        self._push(changed[self.references[changed] == 0])

    def put_back(self, blocks: np.ndarray, num_blocks: int) -> None:
        """The last `take`, undone: `blocks` are free again, and of all blocks the first `num_blocks` stay."""
        self.references[blocks] = 0
        self._push(blocks[::-1])
        kept = self._free[: self._num_free]
        kept = kept[kept < num_blocks]
        self._free[: len(kept)] = kept
        self._num_free = len(kept)
        self.references = self.references[:num_blocks]
        self.num_blocks = num_blocks

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
        self._add(blocks, np.broadcast_to(1, blocks.shape))
        self._list_free()

    def _add(self, blocks: np.ndarray, changes: np.ndarray) -> np.ndarray:
        """Adds `changes[i]` to the references of `blocks[i]`; returns the blocks that changed, each once."""
        self.version += 1
        if blocks.size < _FEW:
            changed, place = np.unique(blocks, return_inverse=True)
            sums = np.bincount(place, weights=changes, minlength=len(changed))
        else:  # no sorting: room for all blocks between the first and the last
            first = int(blocks.min())
            sums = np.bincount(blocks - first, weights=changes)
            place = np.flatnonzero(sums)
            changed, sums = place + first, sums[place]
        self.references[changed] += sums.astype(np.int32)  # whole numbers, exact in bincount's float64
        return changed

    def _push(self, blocks: np.ndarray) -> None:
        self._free[self._num_free : self._num_free + len(blocks)] = blocks
        self._num_free += len(blocks)
        self.version += 1

    def _reserve(self, needed: int) -> None:
        if needed <= self._num_free:
            return
        room = self._num_free if self.max_blocks is None else self._num_free + self.max_blocks - self.num_blocks
        if self.max_blocks is not None and needed > room:
            raise CacheFullError(
                f"the paged cache is full: {needed} more blocks of {self.block_size} tokens are needed, "
                f"{max(room, 0)} are free under the cap of {self.max_blocks} blocks. This forward stored nothing, "
                "earlier tokens are intact: free room with `crop()`, `release()` or `reset()`, shorten or split the "
                "batch, or make a cache with a larger `num_blocks` or `max_memory`",
                blocks_needed=needed,
                blocks_free=max(room, 0),
            )
        # A first prefill gets what it needs; later growth takes a little more, so that pools are copied rarely.
        total = max(self.num_blocks - self._num_free + needed, self.num_blocks + self.num_blocks // 40)
        if self.max_blocks is not None:
            total = min(total, self.max_blocks)
        free = np.empty(total, np.int32)
        added = total - self.num_blocks
        free[:added] = np.arange(total - 1, self.num_blocks - 1, -1)
        free[added : added + self._num_free] = self._free[: self._num_free]
        self._free, self._num_free = free, added + self._num_free
        self.references = np.concatenate([self.references, np.zeros(added, np.int32)])
        self.num_blocks = total
        self.version += 1

    def _list_free(self) -> None:
        free = np.flatnonzero(self.references == 0)[::-1]
        self._free = np.empty(self.num_blocks, np.int32)
        self._free[: len(free)] = free
        self._num_free = len(free)

    def __getstate__(self) -> dict:
        # managers that are pickled along count their own references when they come back
        return {"block_size": self.block_size, "max_blocks": self.max_blocks, "num_blocks": self.num_blocks}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["block_size"], state["max_blocks"])
        self.extend(state["num_blocks"])

    def extend(self, num_blocks: int) -> None:
        """`num_blocks` blocks exist, all free."""
        self.num_blocks = num_blocks
        self.references = np.zeros(num_blocks, np.int32)
        self._list_free()
        self.version += 1
