"""BlockManager: its invariants under random histories, and that no row ever reads what another one wrote."""

import pickle

import numpy as np
import pytest
from hypothesis import seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hf_paged_flash.cache.block_manager import BlockManager
from hf_paged_flash.cache.prefix_index import PrefixIndex, shared_in_batch
from hf_paged_flash.cache.prompt_row import PromptRow
from hf_paged_flash.errors import CacheFullError

UNWRITTEN = -1
STEPS = 50_000  # of random histories, in all


def snapshot(manager: BlockManager) -> tuple:
    """All that a manager knows, comparable."""
    return (
        manager.num_blocks,
        manager.lengths.tolist(),
        manager.first.tolist(),
        manager.table[:, : int(manager.row_blocks().max(initial=0))].tolist(),
        manager.blocks.references.tolist(),
        manager.blocks.blocks_free,
    )


class Fork:
    """A manager, and beside it what each row must read."""

    def __init__(self, manager: BlockManager, rows: list[list[int]]) -> None:
        self.manager = manager
        self.rows = rows


class Machine(RuleBasedStateMachine):
    """Random appends, truncations, selections and forks beside a model that keeps each row's tokens in a list.

    `slots[block, offset]` is the device. Tokens are written where the tables say, after the copies that `append` asks
    for, so a block shared by mistake shows as a row that reads another one's tokens.
    """

    steps = 0

    @initialize(
        block_size=st.sampled_from([1, 2, 4, 16]),
        max_blocks=st.one_of(st.none(), st.integers(1, 24)),
        max_kept=st.one_of(st.none(), st.integers(0, 12)),
        rows=st.integers(1, 5),
    )
    def start(self, block_size, max_blocks, max_kept, rows):
        manager = BlockManager(block_size, max_blocks)
        manager.start_rows(rows)
        self.blocks = manager.blocks
        self.blocks.index, self.blocks.max_kept = PrefixIndex(), max_kept
        self.prompts = [[]]  # what was put in the index; it may have forgotten them
        self.forks = [Fork(manager, [[] for _ in range(rows)])]
        self.slots = np.full((0, block_size), UNWRITTEN)
        self.next_token = 0

    def one(self, data) -> Fork:
        return self.forks[data.draw(st.integers(0, len(self.forks) - 1))]

    def places(self, fork: Fork, row: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        position = np.arange(start, end)
        return fork.manager.table[row, position // self.blocks.block_size], position % self.blocks.block_size

    def copy_blocks(self, change) -> None:
        more = self.blocks.num_blocks - len(self.slots)
        if more > 0:
            self.slots = np.pad(self.slots, ((0, more), (0, 0)), constant_values=UNWRITTEN)
        self.slots[change.blocks] = UNWRITTEN  # whatever an earlier owner left there
        self.slots[change.copies[:, 1]] = self.slots[change.copies[:, 0]]

    def draw_first(self, data, fork: Fork, counts: list[int]) -> np.ndarray | None:
        """Of rows that are empty, a first block to store tokens in, now and then."""
        if not data.draw(st.booleans()):
            return None
        size = self.blocks.block_size
        return np.array(
            [
                0 if tokens else data.draw(st.integers(0, count // size))
                for tokens, count in zip(fork.rows, counts, strict=True)
            ]
        )

    def append_to(self, fork: Fork, counts: list[int], first: np.ndarray | None = None):
        self.blocks.collect()
        before, needed = snapshot(fork.manager), fork.manager.blocks_needed(np.array(counts, np.int64), first)
        surplus = self.surplus()
        try:
            change = fork.manager.append(np.array(counts, np.int64), first)
        except CacheFullError as error:
            assert snapshot(fork.manager) == before or surplus
            assert needed == error.blocks_needed > error.blocks_free >= 0
            return None
        assert needed == len(change.blocks)
        taken, free = change.blocks, np.flatnonzero(self.blocks.references == 0)
        assert (np.diff(taken) > 0).all() and (not len(taken) or (free > taken[-1]).all()), "not the lowest ones"
        self.copy_blocks(change)
        return change

    @rule(data=st.data())
    def append(self, data):
        fork = self.one(data)
        counts = data.draw(st.lists(st.integers(0, 20), min_size=len(fork.rows), max_size=len(fork.rows)))
        if self.append_to(fork, counts, self.draw_first(data, fork, counts)) is None:
            return
        for row, count in enumerate(counts):
            length = len(fork.rows[row])
            start = max(length, int(fork.manager.first[row]) * self.blocks.block_size)
            places = self.places(fork, row, start, length + count)
            assert (self.blocks.references[places[0]] == 1).all(), "a row was given a shared block to write to"
            tokens = np.arange(self.next_token, self.next_token + count)
            self.slots[places] = tokens[start - length :]
            fork.rows[row] += tokens.tolist()
            self.next_token += count

    @rule(data=st.data())
    def decode(self, data):
        """A token for every row of every fork, as samples and beams go on."""
        for fork in self.forks:
            if self.append_to(fork, [1] * len(fork.rows)) is None:
                continue
            for row, tokens in enumerate(fork.rows):
                block, offset = self.places(fork, row, len(tokens), len(tokens) + 1)
                assert self.blocks.references[block] == 1, "a row was given a shared block to write to"
                self.slots[block, offset] = self.next_token
                tokens.append(self.next_token)
                self.next_token += 1

    @rule(data=st.data())
    def append_and_undo(self, data):
        fork = self.one(data)
        counts = data.draw(st.lists(st.integers(0, 20), min_size=len(fork.rows), max_size=len(fork.rows)))
        before, known = snapshot(fork.manager), len(self.blocks.index)
        change = self.append_to(fork, counts, self.draw_first(data, fork, counts))
        if change is None:
            return
        self.slots[change.blocks] = UNWRITTEN  # what a forward that failed half way may have written
        assert fork.manager.can_undo(change)
        room = data.draw(st.integers(0, self.blocks.num_blocks + 1))
        kept = max(change.num_blocks, min(room, self.blocks.num_blocks))
        fork.manager.undo(change, room)
        assert self.blocks.num_blocks == kept
        if kept == change.num_blocks and known == len(self.blocks.index):
            assert snapshot(fork.manager) == before

    def surplus(self) -> int:
        """Blocks that are kept beyond `max_kept`."""
        return 0 if self.blocks.max_kept is None else max(self.blocks.blocks_kept - self.blocks.max_kept, 0)

    @rule(data=st.data())
    def keep(self, data):
        """A row's full blocks go in the index, as its prompt does after a prefill."""
        fork = self.one(data)
        row = data.draw(st.integers(0, len(fork.rows) - 1))
        tokens = fork.rows[row]
        if fork.manager.first[row]:
            return  # models with sliding windows have no index
        full = PromptRow(np.array(tokens)).full_blocks(self.blocks.block_size)
        self.blocks.keep("root", full, fork.manager.table[row, : len(full)])
        self.prompts.append(list(tokens))

    @rule(data=st.data())
    def start_from_what_is_known(self, data):
        """Rows that begin anew with prompts seen before, and others alike in the batch."""
        fork, index = self.one(data), self.blocks.index
        count = len(fork.rows)
        prompts = [
            self.prompts[data.draw(st.integers(0, len(self.prompts) - 1))]
            + list(range(self.next_token, self.next_token + data.draw(st.integers(1, 9))))
            for _ in range(count)
        ]
        self.next_token += 9
        full = [PromptRow(np.array(prompt)).full_blocks(self.blocks.block_size, -1) for prompt in prompts]
        found = [index.find("root", tokens) for tokens in full]
        fork.manager.start_from(found)
        source, shared = shared_in_batch(full)
        held = np.array([len(blocks) for blocks in found])
        stored = np.maximum(held, shared) * self.blocks.block_size
        counts = np.array([len(prompt) for prompt in prompts]) - stored
        try:
            change = fork.manager.append_sharing(counts, source, shared)
        except CacheFullError:
            change = None
        else:
            self.copy_blocks(change)
        if change is not None and data.draw(st.booleans()):
            fork.rows = prompts
            for row, prompt in enumerate(prompts):
                self.slots[self.places(fork, row, int(stored[row]), len(prompt))] = prompt[int(stored[row]) :]
            return
        if change is not None:
            fork.manager.undo(change)
        lengths = held * self.blocks.block_size
        fork.rows = [prompt[:length] for prompt, length in zip(prompts, lengths, strict=True)]

    @rule(count=st.one_of(st.none(), st.integers(0, 5)))
    def forget(self, count):
        kept = self.blocks.blocks_kept
        self.blocks.forget(count)
        assert self.blocks.blocks_kept <= max(kept - (kept if count is None else count), 0)
        assert count is not None or not len(self.blocks.index)

    @rule(data=st.data())
    def crop(self, data):
        fork = self.one(data)
        stored = fork.manager.first * self.blocks.block_size
        lengths = [
            data.draw(st.one_of(st.just(0), st.integers(int(start), len(tokens))))
            for start, tokens in zip(stored, fork.rows, strict=True)
        ]
        fork.manager.truncate(np.array(lengths, np.int64))
        fork.rows = [tokens[:length] for tokens, length in zip(fork.rows, lengths, strict=True)]

    @rule(data=st.data())
    def drop_front(self, data):
        fork = self.one(data)
        manager, size = fork.manager, self.blocks.block_size
        first = np.array([data.draw(st.integers(0, len(tokens) // size)) for tokens in fork.rows])
        before, held, used = manager.table.copy(), manager.first, self.blocks.blocks_used
        rows, columns = manager.drop_front(first)
        assert manager.first.tolist() == np.maximum(held, first).tolist()
        assert (before[rows, columns] >= 0).all() and (manager.table[rows, columns] == -1).all()
        assert len(rows) == int((before >= 0).sum() - (manager.table >= 0).sum())
        assert self.blocks.blocks_used <= used

    @rule(data=st.data())
    def reorder(self, data):
        """Any rows in any order: what beams, repeated rows and released rows come to."""
        fork = self.one(data)
        chosen = data.draw(st.lists(st.integers(0, len(fork.rows) - 1), min_size=1, max_size=6))
        blocks_used = self.blocks.blocks_used
        fork.manager.select(np.array(chosen))
        fork.rows = [list(fork.rows[row]) for row in chosen]
        assert self.blocks.blocks_used <= blocks_used, "selecting rows took blocks"

    @precondition(lambda self: len(self.forks) < 4)
    @rule(data=st.data())
    def fork(self, data):
        fork = self.one(data)
        chosen = data.draw(st.lists(st.integers(0, len(fork.rows) - 1), min_size=1, max_size=4))
        blocks_used = self.blocks.blocks_used
        self.forks.append(Fork(fork.manager.fork(np.array(chosen)), [list(fork.rows[row]) for row in chosen]))
        assert self.blocks.blocks_used == blocks_used, "a fork took blocks"

    @precondition(lambda self: len(self.forks) > 1)
    @rule(data=st.data())
    def drop_a_fork(self, data):
        del self.forks[data.draw(st.integers(0, len(self.forks) - 1))]
        self.blocks.collect()

    @rule(data=st.data())
    def resize(self, data):
        blocks = self.blocks
        most = blocks.num_blocks + 100 if blocks.max_blocks is None else max(blocks.max_blocks, blocks.num_blocks)
        num_blocks = data.draw(st.integers(blocks.blocks_spanned, most))
        blocks_used = blocks.blocks_used
        blocks.resize(num_blocks)
        assert (blocks.num_blocks, blocks.blocks_used) == (num_blocks, blocks_used)

    @rule()
    def move_to_front(self):
        moves = self.blocks.moves_to_front()
        assert (self.blocks.references[moves[:, 0]] > 0).all() and not self.blocks.references[moves[:, 1]].any()
        more = self.blocks.num_blocks - len(self.slots)
        if more > 0:
            self.slots = np.pad(self.slots, ((0, more), (0, 0)), constant_values=UNWRITTEN)
        self.slots[moves[:, 1]] = self.slots[moves[:, 0]]
        self.slots[moves[:, 0]] = UNWRITTEN  # given back to the device
        place = np.arange(self.blocks.num_blocks)
        place[moves[:, 0]] = moves[:, 1]
        self.blocks.move(moves)
        for fork in self.forks:
            fork.manager.move(place)
        assert self.blocks.blocks_spanned == self.blocks.blocks_used

    @rule()
    def pickle_all(self):
        managers = pickle.loads(pickle.dumps([fork.manager for fork in self.forks]))
        self.blocks = managers[0].blocks
        for fork, manager in zip(self.forks, managers, strict=True):
            assert manager.blocks is self.blocks
            fork.manager = manager

    @precondition(lambda self: self.blocks.num_blocks)
    @rule()
    def empty(self):
        for fork in self.forks:
            fork.manager.truncate(np.zeros(len(fork.rows), np.int64))
            fork.rows = [[] for _ in fork.rows]
        assert self.blocks.blocks_used == self.blocks.blocks_kept == len(self.blocks.index)
        assert self.blocks.blocks_free == self.blocks.num_blocks - self.blocks.blocks_used

    @invariant()
    def rows_read_their_own_tokens(self):
        Machine.steps += 1
        for fork in self.forks:
            assert fork.manager.lengths.tolist() == [len(tokens) for tokens in fork.rows]
            for row, tokens in enumerate(fork.rows):
                start = min(int(fork.manager.first[row]) * self.blocks.block_size, len(tokens))
                assert self.slots[self.places(fork, row, start, len(tokens))].tolist() == tokens[start:]

    @invariant()
    def tables_hold_what_lengths_need(self):
        for fork in self.forks:
            table = fork.manager.table
            needed = -(-fork.manager.lengths // self.blocks.block_size)
            columns = np.arange(table.shape[1])[None, :]
            held = (columns >= fork.manager.first[:, None]) & (columns < needed[:, None])
            assert (fork.manager.first <= needed).all()
            assert ((table >= 0) == held).all()

    @invariant()
    def every_block_is_free_or_referenced(self):
        blocks = self.blocks
        tables = np.concatenate([fork.manager.table.ravel() for fork in self.forks])
        named = np.bincount(tables[tables >= 0], minlength=blocks.num_blocks)
        is_indexed = blocks.index.used_at >= 0
        assert len(blocks.index) == is_indexed.sum()
        assert (named + is_indexed).tolist() == blocks.references.tolist()
        assert blocks.blocks_free == (blocks.references == 0).sum()
        assert blocks.blocks_kept == (is_indexed & (named == 0)).sum()
        assert blocks.blocks_used + blocks.blocks_free == blocks.num_blocks
        assert blocks.blocks_shared == int((named > 1).sum())
        assert blocks.max_blocks is None or blocks.num_blocks <= blocks.max_blocks

    @invariant()
    def what_is_known_is_what_was_computed(self):
        """Each path spells what its blocks hold; a parent was used after its children."""
        index = self.blocks.index
        assert {index._known[key][1] for key in index._keys.values()} == set(index._keys)
        nodes = {node: block for node, block in index._known.values()} | {node: -1 for node in index._roots.values()}
        for (node, tokens), (_, block) in index._known.items():
            parent = nodes[node]
            assert np.frombuffer(tokens, np.int32).tolist() == self.slots[block].tolist()
            assert index._parent[block] == parent
            assert parent < 0 or index.used_at[parent] > index.used_at[block]
        parents = index._parent[list(index._keys)]
        assert np.bincount(parents[parents >= 0], minlength=self.blocks.num_blocks).tolist() == index._below.tolist()

    @invariant()
    def stored_tokens_are_counted_once(self):
        for fork in self.forks:
            starts = fork.manager.first * self.blocks.block_size
            places = [self.places(fork, row, int(starts[row]), len(tokens)) for row, tokens in enumerate(fork.rows)]
            block, offset = (np.concatenate(part) for part in zip(*places, strict=True))
            distinct = set((block.astype(int) * self.blocks.block_size + offset).tolist())
            assert int(fork.manager.filled().sum()) == len(distinct)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_random_histories(part):
    """In parts, so that workers can share them; seeded, so that every run is the same."""
    Machine.steps, begun = 0, 0
    options = settings(max_examples=100, stateful_step_count=50, deadline=None, derandomize=False)
    while Machine.steps < STEPS // 5:
        run_state_machine_as_test(seed(100 * part + begun)(lambda: Machine()), settings=options)
        begun += 1


def test_appends_of_no_tokens_change_nothing():
    manager = BlockManager(16)
    manager.start_rows(2)
    manager.append(np.array([5, 0]))
    before = snapshot(manager)
    change = manager.append(np.array([0, 0]))
    assert snapshot(manager) == before
    assert len(change.blocks) == len(change.copies) == 0


def test_one_of_the_rows_that_all_write_keeps_the_shared_block():
    manager = BlockManager(16)
    manager.start_rows(1)
    manager.append(np.array([20]))
    manager.select(np.array([0, 0, 0]))
    assert (manager.blocks.blocks_used, manager.blocks.blocks_shared) == (2, 2)
    change = manager.append(np.array([1, 1, 1]))
    assert len(change.copies) == 2
    assert len({int(block) for block in manager.table[:, 1]}) == 3
    assert manager.blocks.blocks_shared == 1  # the full block, which nobody writes to


def test_a_row_that_does_not_write_keeps_its_block():
    manager = BlockManager(16)
    manager.start_rows(1)
    manager.append(np.array([20]))
    manager.select(np.array([0, 0]))
    old = int(manager.table[1, 1])
    change = manager.append(np.array([1, 0]))
    assert change.copies.tolist() == [[old, int(manager.table[0, 1])]]
    assert int(manager.table[1, 1]) == old


def test_a_full_last_block_is_shared_and_never_copied():
    manager = BlockManager(16)
    manager.start_rows(1)
    manager.append(np.array([32]))
    manager.select(np.array([0, 0]))
    assert len(manager.append(np.array([1, 1])).copies) == 0
    assert manager.blocks.blocks_shared == 2


def test_freed_blocks_are_used_again_before_new_ones():
    manager = BlockManager(16)
    manager.start_rows(2)
    manager.append(np.array([64, 64]))
    manager.truncate(np.array([0, 64]))
    manager.append(np.array([64, 0]))
    assert manager.num_blocks == 8


def test_the_end_empties():
    """What comes goes into the lowest free blocks, so that rows which leave free the end of the pools."""
    manager = BlockManager(16)
    manager.start_rows(3)
    manager.append(np.array([16 * 50, 16 * 100, 16 * 50]))
    manager.truncate(np.array([0, 16 * 100, 16 * 50]))
    assert (manager.blocks.blocks_free, manager.blocks.blocks_spanned) == (50, 200)
    manager.truncate(np.array([0, 16 * 100, 0]))
    assert manager.blocks.blocks_spanned == 150
    manager.append(np.array([16 * 40, 0, 0]))
    manager.truncate(np.array([16 * 40, 0, 0]))
    assert manager.blocks.blocks_spanned == 40
    manager.blocks.resize(40)
    assert (manager.num_blocks, manager.blocks.blocks_free) == (40, 0)


def test_growth_is_an_eighth_at_least_and_stays_under_the_cap():
    manager = BlockManager(16, max_blocks=82)
    manager.start_rows(1)
    manager.append(np.array([16 * 80]))
    assert manager.num_blocks == 80
    manager.append(np.array([1]))
    assert manager.num_blocks == 82  # an eighth of 80 is 10, the cap leaves 2
    manager.append(np.array([16]))
    with pytest.raises(CacheFullError) as raised:
        manager.append(np.array([16]))
    assert (raised.value.blocks_needed, raised.value.blocks_free) == (1, 0)
    assert "1 more blocks of 16 tokens are needed, 0 are free under the cap of 82 blocks" in str(raised.value)


def test_a_copy_counts_against_the_cap():
    manager = BlockManager(16, max_blocks=1)
    manager.start_rows(1)
    manager.append(np.array([5]))
    manager.select(np.array([0, 0]))
    with pytest.raises(CacheFullError):
        manager.append(np.array([1, 1]))
    assert (manager.blocks.blocks_shared, manager.lengths.tolist()) == (1, [5, 5])
