"""BlockManager: its invariants under random histories, and that no row ever reads what another one wrote."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_paged_flash.cache import block_manager
from hf_paged_flash.cache.block_manager import BlockManager
from hf_paged_flash.errors import CacheFullError

UNWRITTEN = -1
MANY = block_manager._MANY


def snapshot(manager: BlockManager) -> tuple:
    """All that a manager knows, comparable."""
    return (
        manager.num_blocks,
        manager.lengths.tolist(),
        manager.table[:, : int(manager.row_blocks().max(initial=0))].tolist(),
        manager.references.tolist(),
        sorted(manager._free),
    )


class Machine(RuleBasedStateMachine):
    """Random appends, truncations and selections beside a model that keeps each row's tokens in a list.

    `slots` is the device: what each slot of each block holds. Tokens are written where the tables say, after the
    copies that `append` asks for, so a block shared by mistake shows as a row that reads another one's tokens.
    """

    @initialize(
        block_size=st.sampled_from([1, 2, 4, 16]),
        max_blocks=st.one_of(st.none(), st.integers(1, 24)),
        rows=st.integers(1, 5),
        many=st.sampled_from([0, 2, MANY]),
    )
    def start(self, block_size, max_blocks, rows, many):
        self.manager = BlockManager(block_size, max_blocks)
        self.manager.start_rows(rows)
        self.rows: list[list[int]] = [[] for _ in range(rows)]
        self.slots: dict[tuple[int, int], int] = {}
        self.next_token = 0
        block_manager._MANY = many

    def teardown(self):
        block_manager._MANY = MANY

    def read(self, row: int) -> list[int]:
        size = self.manager.block_size
        places = ((int(self.manager.table[row, i // size]), i % size) for i in range(int(self.manager.lengths[row])))
        return [self.slots.get(place, UNWRITTEN) for place in places]

    @rule(data=st.data())
    def append(self, data):
        counts = data.draw(st.lists(st.integers(0, 20), min_size=len(self.rows), max_size=len(self.rows)))
        before = snapshot(self.manager)
        try:
            change = self.manager.append(np.array(counts, np.int64))
        except CacheFullError as error:
            assert snapshot(self.manager) == before
            assert error.blocks_needed > error.blocks_free >= 0
            return
        taken = change.blocks.tolist()
        assert taken == sorted(taken) and all(block > taken[-1] for block in self.manager._free if taken)
        for source, target in change.copies:
            for offset in range(self.manager.block_size):
                self.slots[int(target), offset] = self.slots.get((int(source), offset), UNWRITTEN)
        for row, count in enumerate(counts):
            for _ in range(count):
                position, self.next_token = len(self.rows[row]), self.next_token + 1
                block = int(self.manager.table[row, position // self.manager.block_size])
                assert self.manager.references[block] == 1, "a row was given a shared block to write to"
                self.slots[block, position % self.manager.block_size] = self.next_token
                self.rows[row].append(self.next_token)

    @rule(data=st.data())
    def append_and_undo(self, data):
        counts = data.draw(st.lists(st.integers(0, 20), min_size=len(self.rows), max_size=len(self.rows)))
        before = snapshot(self.manager)
        try:
            change = self.manager.append(np.array(counts, np.int64))
        except CacheFullError:
            return
        # what a forward that failed half way may have written
        for target in change.blocks:
            for offset in range(self.manager.block_size):
                self.slots[int(target), offset] = UNWRITTEN
        room = data.draw(st.integers(0, self.manager.num_blocks + 1))
        kept = max(change.num_blocks, min(room, self.manager.num_blocks))
        self.manager.undo(change, room)
        assert self.manager.num_blocks == kept
        if kept == change.num_blocks:
            assert snapshot(self.manager) == before

    @rule(data=st.data())
    def truncate(self, data):
        lengths = [data.draw(st.integers(0, len(tokens))) for tokens in self.rows]
        self.manager.truncate(np.array(lengths))
        self.rows = [tokens[:length] for tokens, length in zip(self.rows, lengths, strict=True)]

    @rule(data=st.data())
    def select(self, data):
        chosen = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=6))
        blocks_used = self.manager.blocks_used
        self.manager.select(np.array(chosen))
        self.rows = [list(self.rows[row]) for row in chosen]
        assert self.manager.blocks_used <= blocks_used, "selecting rows took blocks"

    @rule(data=st.data())
    def resize(self, data):
        most = self.manager.max_blocks or self.manager.num_blocks + 100
        num_blocks = data.draw(st.integers(self.manager.blocks_spanned, max(most, self.manager.num_blocks)))
        blocks_used = self.manager.blocks_used
        self.manager.resize(num_blocks)
        assert (self.manager.num_blocks, self.manager.blocks_used) == (num_blocks, blocks_used)

    @rule()
    def move_to_front(self):
        manager = self.manager
        moves = manager.moves_to_front()
        for source, target in moves:
            assert manager.references[target] == 0 < manager.references[source]
            for offset in range(manager.block_size):
                self.slots[int(target), offset] = self.slots.get((int(source), offset), UNWRITTEN)
                self.slots[int(source), offset] = UNWRITTEN  # given back to the device
        manager.move(moves)
        assert manager.blocks_spanned == manager.blocks_used

    @precondition(lambda self: self.manager.num_blocks)
    @rule()
    def empty(self):
        self.manager.truncate(np.zeros(len(self.rows), np.int64))
        self.rows = [[] for _ in self.rows]
        assert self.manager.blocks_used == 0
        assert sorted(self.manager._free) == list(range(self.manager.num_blocks))

    @invariant()
    def rows_read_their_own_tokens(self):
        for row, tokens in enumerate(self.rows):
            assert self.read(row) == tokens

    @invariant()
    def tables_hold_what_lengths_need(self):
        manager = self.manager
        assert manager.lengths.tolist() == [len(tokens) for tokens in self.rows]
        needed = -(-manager.lengths // manager.block_size)
        held = np.arange(manager.table.shape[1])[None, :] < needed[:, None]
        assert (manager.table >= 0).tolist() == held.tolist()

    @invariant()
    def every_block_is_free_or_referenced(self):
        manager = self.manager
        named = np.bincount(manager.table[manager.table >= 0], minlength=manager.num_blocks)
        assert named.tolist() == manager.references.tolist()
        assert sorted(manager._free) == np.flatnonzero(manager.references == 0).tolist()
        assert manager.blocks_used + manager.blocks_free == manager.num_blocks
        assert manager.blocks_shared == int((named > 1).sum())
        assert manager.max_blocks is None or manager.num_blocks <= manager.max_blocks

    @invariant()
    def stored_tokens_are_counted_once(self):
        size = self.manager.block_size
        places = {
            (int(self.manager.table[row, i // size]), i % size)
            for row in range(len(self.rows))
            for i in range(int(self.manager.lengths[row]))
        }
        assert self.manager.stored_tokens() == len(places)


TestRandomHistories = Machine.TestCase
TestRandomHistories.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)


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
    assert (manager.blocks_used, manager.blocks_shared) == (2, 2)
    change = manager.append(np.array([1, 1, 1]))
    assert len(change.copies) == 2
    assert len({int(block) for block in manager.table[:, 1]}) == 3
    assert manager.blocks_shared == 1  # the full block, which nobody writes to


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
    assert manager.blocks_shared == 2


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
    assert (manager.blocks_free, manager.blocks_spanned) == (50, 200)
    manager.truncate(np.array([0, 16 * 100, 0]))
    assert manager.blocks_spanned == 150
    manager.append(np.array([16 * 40, 0, 0]))
    manager.truncate(np.array([16 * 40, 0, 0]))
    assert manager.blocks_spanned == 40
    manager.resize(40)
    assert (manager.num_blocks, manager.blocks_free) == (40, 0)


def test_a_block_that_others_name_too_does_not_move():
    manager = BlockManager(16)
    manager.start_rows(2)
    manager.append(np.array([32, 32]))
    manager.truncate(np.array([0, 32]))
    manager.references[3] += 1  # of a table elsewhere
    assert manager.moves_to_front().tolist() == [[2, 0]]


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
    assert (manager.blocks_shared, manager.lengths.tolist()) == (1, [5, 5])
