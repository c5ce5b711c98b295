"""Which full blocks hold what follows which tokens, so that a prompt finds what another one computed. Host only."""

from collections.abc import Hashable, Sequence

import numpy as np


class PrefixIndex:
    """A tree of full blocks in which the path from a root spells the tokens that a block's keys and values stand for.

    The tokens themselves are compared, no hash of them: a block is never taken for another one (`PromptRow` says what
    else is). What keys and values of all tokens depend on, the adapters that are on, chooses the root. The tree is a
    dict of numbers and bytes, which the garbage collector does not look at: it may be large.

    `Blocks` counts a reference for each block in here: its contents stay as long, whoever writes to it gets a copy.
    Along a path the parent was always used after its child, so that the least recently used blocks are leaves.

    Attributes:
        used_at: int64 (num_blocks,), when a block was last looked for, counted in blocks; -1 for those not in here.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._roots: dict[Hashable, int] = {}
        self._known: dict[tuple[int, bytes], tuple[int, int]] = {}  # {(node, tokens): (the next node, its block)}
        self._keys: dict[int, tuple[int, bytes]] = {}  # in `_known`, by block
        self._nodes = self._now = 0
        self.used_at = np.full(0, -1, np.int64)
        self._parent = np.full(0, -1, np.int64)  # by block, the block before it; -1 at a root
        self._below = np.zeros(0, np.int64)  # by block, how many have it as parent

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, root: Hashable, tokens: Sequence[bytes]) -> np.ndarray:
        """The blocks of the first of these full blocks' `tokens` that are known, int64 (n,), and used now."""
        return self._use(self._follow(self._roots.get(root, 0), tokens)[1])

    def add(self, root: Hashable, tokens: Sequence[bytes], blocks: np.ndarray) -> np.ndarray:
        """Notes that `blocks` (n,) hold n full blocks' `tokens`, from the first on; they count as used now.

        Returns those that are new here, int64. Where another block is known to hold the same, that one stays.
        """
        if root not in self._roots:
            self._roots[root] = self._new_node()
        node, path = self._follow(self._roots[root], tokens)
        known = len(path)
        new = blocks[known:].astype(np.int64)
        for each, block in zip(tokens[known:], new.tolist(), strict=True):
            key = self._keys[block] = node, each
            node = self._new_node()
            self._known[key] = node, block
        parents = np.concatenate([np.array(path[-1:] or [-1], np.int64), new[:-1]])[: len(new)]
        self._parent[new] = parents
        self._below[parents[parents >= 0]] += 1
        self._use(path + new.tolist())
        return new

    def _new_node(self) -> int:
        self._nodes += 1
        return self._nodes

    def _follow(self, node: int, tokens: Sequence[bytes]) -> tuple[int, list[int]]:
        """The last node of the path that is known, and its blocks."""
        path = []
        for each in tokens:
            found = self._known.get((node, each))
            if found is None:
                break
            node, block = found
            path.append(block)
        return node, path

    def _use(self, path: list[int]) -> np.ndarray:
        blocks = np.array(path, np.int64)
        self._now += len(blocks)
        self.used_at[blocks] = self._now - np.arange(len(blocks))
        return blocks

    def remove_oldest(self, candidates: np.ndarray, count: int) -> np.ndarray:
        """Forgets the `count` of the `candidates`, blocks (n,), that were used least recently.

        And those behind them, which nobody would find any more. Returns all that were forgotten, int64.
        """
        if count < len(candidates):
            candidates = candidates[np.argpartition(self.used_at[candidates], count)[:count]]
        gone = [candidates]
        while len(gone[-1]):
            blocks = gone[-1]
            parents = self._parent[blocks]
            np.subtract.at(self._below, parents[parents >= 0], 1)
            self.used_at[blocks] = -1
            is_behind = (self.used_at >= 0) & np.isin(self._parent, blocks) if self._below[blocks].any() else []
            gone.append(np.flatnonzero(is_behind))
        gone = np.concatenate(gone)
        self._below[gone] = 0
        for block in gone.tolist():
            del self._known[self._keys.pop(block)]
        return gone

    def move(self, moves: np.ndarray) -> None:
        """Block `moves[i, 1]` is what `moves[i, 0]` was; no block is both."""
        moves = moves[self.used_at[moves[:, 0]] >= 0]
        for source, target in moves.tolist():
            key = self._keys[target] = self._keys.pop(source)
            self._known[key] = self._known[key][0], target
        sources, targets = moves.T
        for array, nothing in ((self.used_at, -1), (self._parent, -1), (self._below, 0)):
            array[targets] = array[sources]
            array[sources] = nothing
        place = np.arange(len(self._parent))
        place[sources] = targets
        self._parent = np.where(self._parent >= 0, place[self._parent], -1)

    def resize(self, num_blocks: int) -> None:
        """From now on `num_blocks` blocks exist, all those in here among them."""
        more = max(num_blocks - len(self.used_at), 0)
        self.used_at = np.concatenate([self.used_at[:num_blocks], np.full(more, -1, np.int64)])
        self._parent = np.concatenate([self._parent[:num_blocks], np.full(more, -1, np.int64)])
        self._below = np.concatenate([self._below[:num_blocks], np.zeros(more, np.int64)])


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
