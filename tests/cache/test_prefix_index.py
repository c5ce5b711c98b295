"""PrefixIndex by itself; its life among blocks that rows take and give back is in test_block_manager.py."""

import time

import numpy as np
import pytest

from hf_paged_flash.cache.prefix_index import PrefixIndex, shared_in_batch
from hf_paged_flash.cache.prompt_row import Media, PromptRow


@pytest.fixture
def index() -> PrefixIndex:
    """Blocks of two tokens: 1 2 3 4 5 6 in blocks 0, 1, 2, and 1 2 7 8 in blocks 0 and 3, under root "a"."""
    index = PrefixIndex()
    index.resize(8)
    assert add(index, "a", [1, 2, 3, 4, 5, 6], [0, 1, 2]) == [0, 1, 2]
    assert add(index, "a", [1, 2, 7, 8], [5, 3]) == [3]
    return index


def full_blocks(tokens: list[int]) -> list[bytes]:
    return PromptRow(np.array(tokens, np.int64)).full_blocks(2)


def add(index: PrefixIndex, root: str, tokens: list[int], blocks: list[int]) -> list[int]:
    return index.add(root, full_blocks(tokens), np.array(blocks)).tolist()


def find(index: PrefixIndex, root: str, tokens: list[int]) -> list[int]:
    return index.find(root, full_blocks(tokens)).tolist()


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


class TestPromptRow:
    TOKENS = np.arange(10, 20)

    def test_positions_that_count_the_tokens_are_none(self):
        counted = np.stack([np.arange(10)] * 3, 1)
        assert PromptRow.of(self.TOKENS, counted).full_blocks(4) == PromptRow(self.TOKENS).full_blocks(4)

    def test_blocks_differ_where_positions_do(self):
        blocks = PromptRow(self.TOKENS).full_blocks(4)
        for axis in range(3):
            positions = np.stack([np.arange(10)] * 3, 1)
            positions[5:, axis] += 1
            moved = PromptRow.of(self.TOKENS, positions).full_blocks(4)
            assert (len(moved), moved[0] == blocks[0], moved[1] == blocks[1]) == (2, True, False)

    def test_less_than_a_block(self):
        places = np.isin(np.arange(10), (5, 6))
        assert PromptRow.of(self.TOKENS, np.arange(1, 11)[:, None], Media(places, b"a" * 32)).full_blocks(16) == []

    def test_blocks_differ_where_an_image_is(self):
        places = np.isin(np.arange(10), (5, 6))
        one, two = (PromptRow(self.TOKENS, None, Media(places, digest * 32)) for digest in (b"a", b"b"))
        blocks = PromptRow(self.TOKENS).full_blocks(2)
        same = [x == y == z for x, y, z in zip(one.full_blocks(2), two.full_blocks(2), blocks, strict=True)]
        assert same == [True, True, False, False, True]
        assert one.full_blocks(2)[2] != two.full_blocks(2)[2]

    @pytest.mark.parametrize("known, usable, holds", [(0, 0, False), (4, 4, False), (6, 5, False), (7, 7, True)])
    def test_images_are_taken_whole(self, known, usable, holds):
        row = PromptRow(self.TOKENS, None, Media(np.isin(np.arange(10), (5, 6)), b"a" * 32))
        assert (row.usable(known), row.holds_media(known)) == (usable, holds)
        assert (PromptRow(self.TOKENS).usable(known), PromptRow(self.TOKENS).holds_media(known)) == (known, False)

    def test_what_follows_is_text_behind_it(self):
        positions = np.array([[0, 0], [1, 0], [2, 5]])
        row = PromptRow.of(np.arange(3), positions, Media(np.array([False, True, True]), b"a" * 32))
        row = row.followed_by(np.array([7, 8]))
        assert row.tokens.tolist() == [0, 1, 2, 7, 8]
        assert row.positions.tolist() == [*positions.tolist(), [3, 6], [4, 7]]
        assert row.media.places.tolist() == [False, True, True, False, False]


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
        index, begun = PrefixIndex(), time.thread_time()
        full = [PromptRow(prompt).full_blocks(block_size) for prompt in prompts]
        each = len(full[0])
        index.resize(64 * each)
        shared_in_batch(full)
        for number, tokens in enumerate(full):
            index.add("a", tokens, np.arange(each) + each * number)
        assert sum(len(index.find("a", tokens)) for tokens in full) == 64 * each
        return time.thread_time() - begun

    assert 3 * min(seconds(256) for _ in range(3)) < min(seconds(16) for _ in range(3))
