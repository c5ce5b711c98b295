"""Which full blocks hold what follows which tokens, so that a prompt finds what another one computed. Host only."""

from collections.abc import Hashable, Sequence

import numpy as np


class _Entry:
    """A full block's tokens after those of its `parent`; `below` are the entries that go on from it, by tokens."""

    __slots__ = ("below", "block", "parent", "tokens")

    def __init__(self, parent: "_Entry | None" = None, tokens: bytes = b"", block: int = -1) -> None:
        self.parent, self.tokens, self.block = parent, tokens, block
        self.below: dict[bytes, _Entry] = {}


class PrefixIndex:
    """A tree of full blocks in which the path from a root spells the tokens that a block's keys and values stand for.

    The tokens themselves are compared, no hash of them: a block is never taken for another one. Whatever else keys and
    values depend on (the adapters that are on) chooses the root.

    `Blocks` counts a reference for each block in here: its contents stay as long, whoever writes to it gets a copy.
    Along a path the parent was always used after its child, so that the least recently used entries are leaves.

    Attributes:
        used_at: int64 (num_blocks,), when a block was last looked for, counted in blocks; -1 for those not in here.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.clear()

    def clear(self) -> None:
        self._roots: dict[Hashable, _Entry] = {}
        self._entries: dict[int, _Entry] = {}  # by block
        self._now = 0
        self.used_at = np.full(0, -1, np.int64)

    def __len__(self) -> int:
        return len(self._entries)

    def full_blocks(self, tokens: np.ndarray) -> list[bytes]:
        """What the full blocks of `tokens`, integers (n,), hold."""
        data, size = np.ascontiguousarray(tokens, np.int32).tobytes(), 4 * self.block_size
        return [data[start : start + size] for start in range(0, len(data) // size * size, size)]

    def find(self, root: Hashable, tokens: Sequence[bytes]) -> np.ndarray:
        """The blocks of the first of these full blocks' `tokens` that are known, int64 (n,), and used now."""
        entry, blocks = self._roots.get(root), []
        for each in tokens:
            entry = entry and entry.below.get(each)
            if entry is None:
                break
            blocks.append(entry.block)
        return self._use(blocks)

    def add(self, root: Hashable, tokens: Sequence[bytes], blocks: np.ndarray) -> np.ndarray:
        """Notes that `blocks` (n,) hold n full blocks' `tokens`, from the first on; they count as used now.

        Returns those that are new here, int64. Where another block is known to hold the same, that one stays.
        """
        entry, path, new = self._roots.setdefault(root, _Entry()), [], []
        for each, block in zip(tokens, blocks.tolist(), strict=True):
            known = entry.below.get(each)
            if known is None:
                known = entry.below[each] = self._entries[block] = _Entry(entry, each, block)
                new.append(block)
            entry = known
            path.append(entry.block)
        self._use(path)
        return np.array(new, np.int64)

    def _use(self, path: list[int]) -> np.ndarray:
        blocks = np.array(path, np.int64)
        self._now += len(blocks)
        self.used_at[blocks] = self._now - np.arange(len(blocks))
        return blocks

    def remove_oldest(self, candidates: np.ndarray, count: int) -> np.ndarray:
        """Forgets the `count` of the `candidates`, blocks (n,), that were used least recently, and what goes on from
        them: that may be others. Returns all that were forgotten, int64."""
        if count < len(candidates):
            candidates = candidates[np.argpartition(self.used_at[candidates], count)[:count]]
        gone = []
        for block in candidates.tolist():
            entry = self._entries.get(block)
            if entry is not None:
                del entry.parent.below[entry.tokens]
                gone += self._drop(entry)
        blocks = np.array(gone, np.int64)
        self.used_at[blocks] = -1
        return blocks

    def _drop(self, entry: _Entry) -> list[int]:
        gone, left = [], [entry]
        while left:
            entry = left.pop()
            left += entry.below.values()
            gone.append(entry.block)
            del self._entries[entry.block]
        return gone

    def move(self, moves: np.ndarray) -> None:
        """Block `moves[i, 1]` is what `moves[i, 0]` was; no block is both."""
        sources, targets = moves.T
        moved = [self._entries.pop(block, None) for block in sources.tolist()]
        for entry, block in zip(moved, targets.tolist(), strict=True):
            if entry is not None:
                entry.block = block
                self._entries[block] = entry
        self.used_at[targets] = self.used_at[sources]
        self.used_at[sources] = -1

    def resize(self, num_blocks: int) -> None:
        """From now on `num_blocks` blocks exist, all those in here among them."""
        more = max(num_blocks - len(self.used_at), 0)
        self.used_at = np.concatenate([self.used_at[:num_blocks], np.full(more, -1, np.int64)])


def shared_in_batch(rows: Sequence[Sequence[bytes]]) -> tuple[np.ndarray, np.ndarray]:
    """Which rows, given by what their full blocks hold, begin as an earlier one does.

    Returns (source, blocks), int64 (rows,): row b begins with the first `blocks[b]` full blocks of row `source[b]`.
    """
    source, blocks = np.arange(len(rows)), np.zeros(len(rows), np.int64)
    known: dict[tuple[int, bytes], tuple[int, int]] = {}  # {(path, tokens): (longer path, row)}
    for row, tokens in enumerate(rows):
        path = 0
        for column, each in enumerate(tokens):
            longer, first = known.setdefault((path, each), (len(known) + 1, row))
            if first != row:
                source[row], blocks[row] = first, column + 1
            path = longer
    return source, blocks
