"""PrefixIndex by itself; its life among blocks that rows take and give back is in test_block_manager.py."""

import time

import numpy as np
import pytest

from hf_paged_flash.cache.prefix_index import PrefixIndex, shared_in_batch


@pytest.fixture
def index() -> PrefixIndex:
    """Blocks of two tokens: 1 2 3 4 5 6 in blocks 0, 1, 2, and 1 2 7 8 in blocks 0 and 3, under root "a"."""
    index = PrefixIndex(2)
    index.resize(8)
    assert add(index, "a", [1, 2, 3, 4, 5, 6], [0, 1, 2]) == [0, 1, 2]
    assert add(index, "a", [1, 2, 7, 8], [5, 3]) == [3]
    return index


def add(index: PrefixIndex, root: str, tokens: list[int], blocks: list[int]) -> list[int]:
    return index.add(root, index.full_blocks(np.array(tokens)), np.array(blocks)).tolist()


def find(index: PrefixIndex, root: str, tokens: list[int]) -> list[int]:
    return index.find(root, index.full_blocks(np.array(tokens, np.int64))).tolist()


def test_the_longest_known_beginning_in_whole_blocks(index):
    assert find(index, "a", [1, 2, 3, 4, 5, 6, 9]) == [0, 1, 2]
    assert find(index, "a", [1, 2, 7, 8, 5, 6]) == [0, 3]
    assert find(index, "a", [1, 2, 3, 9]) == [0]
    assert find(index, "a", [3, 4, 5, 6]) == find(index, "a", [1]) == find(index, "a", []) == []


def test_roots_share_nothing(index):
    assert find(index, "b", [1, 2, 3, 4]) == []
    assert add(index, "b", [1, 2], [6]) == [6]
    assert (find(index, "a", [1, 2]), find(index, "b", [1, 2])) == ([0], [6])


def test_the_least_recently_used_goes_first_and_leaves_before_their_parents(index):
    find(index, "a", [1, 2, 3, 4])
    everything = np.arange(4)
    assert index.remove_oldest(everything, 1).tolist() == [2]
    assert index.remove_oldest(np.array([0, 1, 3]), 1).tolist() == [3]
    find(index, "a", [1, 2])
    assert index.remove_oldest(np.array([0, 1]), 1).tolist() == [1]
    assert find(index, "a", [1, 2, 3, 4]) == [0] and len(index) == 1


def test_what_is_behind_goes_along(index):
    assert sorted(index.remove_oldest(np.array([1]), 1).tolist()) == [1, 2]
    assert find(index, "a", [1, 2, 7, 8]) == [0, 3]
    assert sorted(index.remove_oldest(np.array([0]), 1).tolist()) == [0, 3]
    assert len(index) == 0 and (index.used_at == -1).all()


def test_blocks_that_move_are_found_in_their_new_place(index):
    index.move(np.array([[0, 7], [2, 6], [4, 5]]))  # nothing was known of block 4
    assert find(index, "a", [1, 2, 3, 4, 5, 6]) == [7, 1, 6]
    assert sorted(index.remove_oldest(np.array([7]), 1).tolist()) == [1, 3, 6, 7]


@pytest.mark.parametrize(
    "rows, source, blocks",
    [
        (["abc", "xyz", "abd", "abdc", "", "xy"], [0, 1, 0, 2, 4, 1], [0, 0, 2, 3, 0, 2]),
        (["ab", "ab", "ab"], [0, 0, 0], [0, 2, 2]),
        (["a"], [0], [0]),
    ],
)
def test_rows_of_a_batch_that_begin_alike(rows, source, blocks):
    found = shared_in_batch([[each.encode() for each in row] for row in rows])
    assert [x.tolist() for x in found] == [source, blocks]


def test_time_goes_by_the_blocks_not_by_the_tokens():
    """64 prompts of 8,192 tokens: 16 times as few blocks are several times as fast."""
    prompts = np.random.default_rng(0).integers(0, 50_000, (64, 8192))

    def seconds(block_size: int) -> float:
        index, begun = PrefixIndex(block_size), time.thread_time()
        full = [index.full_blocks(prompt) for prompt in prompts]
        each = len(full[0])
        index.resize(64 * each)
        shared_in_batch(full)
        for number, tokens in enumerate(full):
            index.add("a", tokens, np.arange(each) + each * number)
        assert sum(len(index.find("a", tokens)) for tokens in full) == 64 * each
        return time.thread_time() - begun

    assert 3 * min(seconds(256) for _ in range(3)) < min(seconds(16) for _ in range(3))
