"""Memory that grows and shrinks in place: on the CPU over a driver of the tests' own, on a GPU over CUDA's."""

import copy
import gc
import pickle
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_paged_flash import CacheFullError, PagedCache, PagedFlashError
from hf_paged_flash.cache import elastic_memory, layer_pools
from hf_paged_flash.cache.elastic_memory import ElasticMemory
from hf_paged_flash.cache.kept_addresses import KeptAddresses
from hf_paged_flash.cache.page_group import PageGroup
from tests.cache.fake_driver import FakeDriver
from tests.cache.feed import Feed, pointers
from tests.tiny_models import ragged_batch, tiny_config, tiny_model

PAGE = 16384
BLOCK_BYTES = 16 * 2 * 16 * 4 * 2  # of one layer of the tiny Llama: four blocks a page


@pytest.fixture
def driver(monkeypatch):
    """The device whose pools grow in place; at the end of the test nothing of it may be taken."""
    driver = FakeDriver(PAGE)
    monkeypatch.setattr(elastic_memory, "driver_of", lambda device: driver)
    yield driver
    gc.collect()
    assert (driver.pages, driver.handles, driver.ranges, driver.abandoned) == (0, 0, {}, [])


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config("llama"), "paged_flash")


class TestElasticMemory:
    def test_growth_keeps_address_and_contents(self, driver):
        memory = ElasticMemory(driver, 100 * PAGE)
        memory.grow(1)
        assert (memory.mapped, driver.pages) == (PAGE, 1)
        tensor = memory.tensor()
        tensor[:PAGE] = 7
        memory.grow(3 * PAGE + 1)
        assert (memory.mapped, driver.pages) == (4 * PAGE, 4)
        assert memory.tensor().data_ptr() == tensor.data_ptr()
        assert bool((tensor[:PAGE] == 7).all())
        assert driver.calls.count("allow") == 2, "access to the pages of one growth is given at once"
        memory.grow(2 * PAGE)
        assert memory.mapped == 4 * PAGE

    def test_shrinking_waits_and_keeps_a_page(self, driver):
        memory = ElasticMemory(driver, 100 * PAGE)
        memory.shrink(0)
        memory.grow(6 * PAGE)
        tensor = memory.tensor()
        tensor[: 6 * PAGE] = 7
        driver.use()
        assert memory.after_shrink(PAGE + 1) == memory.after_shrink(5 * PAGE) == 5 * PAGE
        memory.shrink(5 * PAGE + 1)
        assert driver.in_use, "the device was waited for without need"
        memory.shrink(PAGE + 1)
        assert (memory.mapped, driver.pages) == (5 * PAGE, 5), "four pages come and go together"
        assert bool((tensor[: 5 * PAGE] == 7).all())
        assert memory.after_shrink(0) == PAGE
        memory.shrink(0)
        assert driver.pages == 1
        memory.grow(2 * PAGE)
        assert memory.tensor().data_ptr() == tensor.data_ptr()

    def test_calls_do_not_follow_the_size(self, driver):
        memory = ElasticMemory(driver, 250 * PAGE)
        memory.grow(200 * PAGE)
        sizes = [len(driver.mapped[address].data) // PAGE for address in sorted(driver.mapped)]
        assert sizes == [1] + [25] * 7 + [24] and driver.handles == 9
        memory.shrink(100 * PAGE)
        assert driver.pages == 101
        memory.grow(102 * PAGE)
        assert driver.pages == 102 and driver.handles == 6

    def test_beyond_the_reserved_addresses_the_pages_move_along(self, driver):
        memory = ElasticMemory(driver, 2 * PAGE)
        memory.grow(2 * PAGE)
        memory.tensor()[: 2 * PAGE] = 7
        driver.use()
        memory.grow(3 * PAGE)
        assert (memory.mapped, driver.pages, len(driver.ranges)) == (3 * PAGE, 3, 1)
        assert bool((memory.tensor()[: 2 * PAGE] == 7).all())
        address = memory.tensor().data_ptr()
        memory.grow(6 * PAGE)
        assert memory.tensor().data_ptr() == address, "growth by a page at a time must not move each time"

    @pytest.mark.parametrize("reserve", [20, 2], ids=["in place", "moving"])
    def test_every_call_may_fail(self, driver, reserve):
        memory = ElasticMemory(driver, reserve * PAGE)
        memory.grow(2 * PAGE)
        memory.tensor()[: 2 * PAGE] = 7
        for failing in range(100):
            driver.failing = failing
            try:
                memory.grow(14 * PAGE)
            except torch.OutOfMemoryError:
                pytest.fail("one failure is what emptying torch's cache is for")
            finished = driver.failing is not None and driver.failing >= 0
            driver.failing = None
            assert (driver.pages, driver.handles, len(driver.ranges)) == (14, 5, 1)
            assert bool((memory.tensor()[: 2 * PAGE] == 7).all())
            if finished:
                break
            memory.shrink(2 * PAGE)
            if reserve == 2:  # where it was before it moved
                memory.release()
                memory.grow(2 * PAGE)
                memory.tensor()[: 2 * PAGE] = 7
        assert failing > 6

    def test_a_full_device_leaves_it_as_it_was(self, driver):
        memory = ElasticMemory(driver, driver.total_memory)
        memory.grow(10 * PAGE)
        with pytest.raises(torch.OutOfMemoryError, match="no page left"):
            memory.grow(driver.total_memory + PAGE)
        assert driver.calls.count("empty_cache") == 1
        gc.collect()
        assert (memory.mapped, driver.pages, driver.handles, len(driver.ranges)) == (10 * PAGE, 10, 4, 1)
        memory.grow(11 * PAGE)
        assert memory.mapped == 11 * PAGE

    def test_what_torch_keeps_is_asked_back(self, driver):
        driver.kept_by_torch = driver.total_memory - 3 * PAGE
        memory = ElasticMemory(driver, driver.total_memory)
        memory.grow(3 * PAGE)
        assert "empty_cache" not in driver.calls
        memory.grow(4 * PAGE)
        assert driver.calls.count("empty_cache") == 1

    @pytest.mark.parametrize("how", ["release", "del"])
    def test_a_tensor_outlives_its_memory(self, driver, how):
        memory = ElasticMemory(driver, 10 * PAGE)
        memory.grow(2 * PAGE)
        view = memory.tensor()[:PAGE].view(torch.float32)[3:]
        view.fill_(2.0)
        driver.use()
        if how == "release":
            memory.release()
            assert memory.mapped == 0
        else:
            del memory
        assert driver.pages == 2
        assert bool((view == 2.0).all())
        del view
        assert (driver.pages, driver.ranges) == (0, {})

    def test_dropped_while_a_graph_is_captured(self, driver):
        memory, other = (ElasticMemory(driver, 10 * PAGE) for _ in range(2))
        memory.grow(2 * PAGE)
        driver.use()
        driver.capturing = True
        del memory
        assert (driver.pages, len(driver.abandoned)) == (2, 1)
        driver.capturing = False
        other.grow(PAGE)
        assert (driver.pages, driver.abandoned) == (1, [])

    def test_a_forked_child_leaves_it_alone(self, driver):
        memory = ElasticMemory(driver, 10 * PAGE)
        memory.grow(2 * PAGE)
        driver.process += 1
        del memory
        assert driver.pages == 2
        driver.unmap_all()


class TestKeptAddresses:
    def test_the_next_memory_lies_where_the_last_one_lay(self, driver):
        kept = KeptAddresses()
        memory = ElasticMemory(driver, 10 * PAGE, kept)
        memory.grow(2 * PAGE)
        address = memory.tensor().data_ptr()
        del memory
        assert driver.pages == 1 and list(driver.ranges) == [address], "more than a page is kept, or addresses are not"
        first, second = (ElasticMemory(driver, 10 * PAGE, kept) for _ in range(2))
        first.grow(PAGE)
        assert driver.pages == 1, "a page was mapped that is there"
        second.grow(PAGE)
        assert first.tensor().data_ptr() == address != second.tensor().data_ptr()
        assert bool((first.tensor()[:PAGE] == 0xFF).all()), "what lay there before is still there"
        del second, first
        assert (len(driver.ranges), driver.pages) == (1, 1), "of two, one is kept"
        del kept
        assert (driver.ranges, driver.pages) == ({}, 0)

    def test_the_largest_range_serves_all(self, driver):
        kept, places = KeptAddresses(), []
        for reserve in (10, 20, 10, 20):
            memory = ElasticMemory(driver, reserve * PAGE, kept)
            memory.grow(PAGE)
            places.append(memory.tensor().data_ptr())
            del memory
            assert len(driver.ranges) == 1
        assert places[0] != places[1] == places[2] == places[3]

    def test_beyond_the_reserved_addresses(self, driver):
        kept = KeptAddresses()
        for _ in range(2):  # the second memory need not move
            memory = ElasticMemory(driver, 2 * PAGE, kept)
            memory.grow(2 * PAGE)
            memory.tensor()[: 2 * PAGE] = 7
            memory.grow(5 * PAGE)
            assert bool((memory.tensor()[: 2 * PAGE] == 7).all())
            assert (driver.pages, len(driver.ranges)) == (5, 1)
            del memory
            assert (driver.pages, len(driver.ranges)) == (1, 1)

    def test_pages_that_moved_are_not_kept(self, driver):
        """Or two caches would write to them."""
        kept = KeptAddresses()
        first, second = (ElasticMemory(driver, 2 * PAGE, kept) for _ in range(2))
        first.grow(2 * PAGE)
        first.grow(5 * PAGE)
        second.grow(PAGE)
        chunks = [handle for memory in (first, second) for handle, _ in memory._range.chunks]
        assert len(set(map(id, chunks))) == len(chunks) and driver.pages == 6

    def test_pages_move_where_one_is_kept(self, driver):
        kept = KeptAddresses()
        memory = ElasticMemory(driver, 2 * PAGE)
        large = ElasticMemory(driver, 9 * PAGE, kept)
        large.grow(PAGE)
        del large
        memory.grow(2 * PAGE)
        memory.tensor()[: 2 * PAGE] = 7
        memory._addresses = kept
        memory.grow(4 * PAGE)  # to the range of which a page is mapped
        assert bool((memory.tensor()[: 2 * PAGE] == 7).all()) and driver.pages == 4

    def test_a_pickle_has_none(self, driver):
        kept = KeptAddresses()
        ElasticMemory(driver, 10 * PAGE, kept).grow(PAGE)
        copy = pickle.loads(pickle.dumps(kept))
        memory = ElasticMemory(driver, 10 * PAGE, copy)
        memory.grow(PAGE)
        assert len(driver.ranges) == 2

    def test_a_forked_child_leaves_them_alone(self, driver):
        kept = KeptAddresses()
        ElasticMemory(driver, 10 * PAGE, kept).grow(PAGE)
        driver.process += 1
        del kept
        assert (len(driver.ranges), driver.pages) == (1, 1)
        driver.unmap_all()


class TestCacheOverElasticMemory:
    def test_generate(self, model, driver):
        input_ids, mask = ragged_batch([90, 40, 7])
        options = {"attention_mask": mask, "max_new_tokens": 60, "do_sample": False}
        cache = PagedCache(model.config)
        tokens = model.generate(input_ids, past_key_values=cache, **options)
        assert all(layer.pool.memory is not None for layer in cache.layers)
        memory = cache.memory()
        assert memory.bytes_reserved == driver.pages * PAGE
        assert memory.blocks_used + memory.blocks_free == driver.pages // 3 * 4
        assert memory.bytes_reserved - memory.blocks_used * 3 * BLOCK_BYTES < 3 * PAGE, "more than a page a layer free"
        del cache
        assert driver.pages == 0
        driver.total_memory = 0
        assert torch.equal(tokens, model.generate(input_ids, past_key_values=ordinary(model), **options))

    def test_growth_moves_nothing(self, driver):
        cache, feed = PagedCache(tiny_config("llama")), Feed()
        feed.update(cache, feed.columns(10))
        before, pages = pointers(cache), driver.pages
        for count in (1, 200, 1, 60):
            feed.update(cache, feed.columns(count))
        assert driver.pages > 4 * pages
        assert pointers(cache) == before
        feed.check(cache)

    def test_keys_and_values_lie_in_one_range_a_layer(self, driver):
        cache, feed = PagedCache(tiny_config("llama")), Feed()
        feed.update(cache, feed.columns(40))
        assert len(driver.ranges) == 3
        for layer in cache.layers:
            key, value = layer.pool.key, layer.pool.value
            assert key.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
            assert key.shape == value.shape == (12, 16, 2, 16)
            assert key.stride() == value.stride() == (1024, 32, 16, 1)
            assert value.data_ptr() - key.data_ptr() == 2048

    def test_layers_of_different_shapes_and_dtypes(self, driver):
        shapes = ((2, 16, 16), (1, 48, 24), (4, 8, 40))
        dtypes = (torch.float32, torch.float64, torch.bfloat16)
        cache, feed = PagedCache(tiny_config("llama")), Feed(shapes=shapes, dtypes=dtypes)
        for count in (20, 1, 100):
            feed.update(cache, feed.columns(count))
        feed.check(cache)
        elements = [16 * heads * sum(dims) for heads, *dims in shapes]
        blocks = [count * dtype.itemsize for count, dtype in zip(elements, dtypes, strict=True)]
        assert [layer.pool.block_bytes for layer in cache.layers] == blocks
        assert cache.memory().bytes_reserved == driver.pages * PAGE
        assert driver.pages == sum(-(-24 * block // PAGE) for block in blocks)
        assert cache.memory().blocks_free == min(-(-24 * block // PAGE) * PAGE // block for block in blocks) - 24

    @pytest.mark.parametrize(
        ("config", "cap", "elastic"),
        [
            ({}, {}, True),
            ({"num_key_value_heads": 4, "head_dim": 64}, {}, True),
            ({}, {"num_blocks": 16}, True),
            ({}, {"num_blocks": 15}, False),
            ({}, {"max_memory": 3 * 4 * PAGE}, True),
            ({}, {"max_memory": 3 * 4 * PAGE - 1}, False),
        ],
    )
    def test_narrow_layers_and_small_caps_get_ordinary_tensors(self, driver, config, cap, elastic):
        cache, feed = PagedCache(tiny_config("llama", **config), **cap), Feed()
        feed.update(cache, feed.columns(10))
        assert [layer.pool.memory is not None for layer in cache.layers] == [elastic] * 3
        assert (driver.pages > 0) == elastic

    def test_layers_too_narrow_for_a_page(self, driver, monkeypatch):
        monkeypatch.setattr(layer_pools, "MAX_BLOCKS_A_PAGE", 3)
        cache, feed = PagedCache(tiny_config("llama")), Feed()
        feed.update(cache, feed.columns(10))
        assert driver.pages == 0 and cache.memory().bytes_reserved == 3 * 3 * BLOCK_BYTES

    @pytest.mark.parametrize("pages", [12, 14, 15])
    def test_the_cap_counts_whole_pages(self, driver, pages):
        cache, feed = PagedCache(tiny_config("llama"), max_memory=pages * PAGE + 5), Feed(rows=1)
        room = pages // 3 * 4 * 16  # three layers grow together
        feed.update(cache, feed.columns(room - 20))
        with pytest.raises(CacheFullError) as raised:
            cache.update(*feed.columns(21)[0], 0)
        assert (raised.value.blocks_needed, raised.value.blocks_free) == (2, 1)
        feed.update(cache, feed.columns(20))
        assert cache.memory().bytes_reserved == driver.pages * PAGE == pages // 3 * 3 * PAGE
        with pytest.raises(CacheFullError, match=f"cap of {room // 16} blocks"):
            cache.update(*feed.columns(1)[0], 0)
        feed.check(cache)

    def test_blocks_of_the_last_page_are_within_the_cap(self, driver):
        cache, feed = PagedCache(tiny_config("llama"), num_blocks=17), Feed(rows=1)
        feed.update(cache, feed.columns(16 * 17))
        assert driver.pages == 3 * 5
        with pytest.raises(CacheFullError, match="cap of 17 blocks"):
            cache.update(*feed.columns(1)[0], 0)

    def test_a_full_device(self, driver):
        driver.total_memory = 3 * 6 * PAGE + 2 * PAGE
        cache, feed = PagedCache(tiny_config("llama")), Feed(rows=2)
        feed.update(cache, feed.columns(16 * 8))
        before = cache.memory()
        with pytest.raises(CacheFullError, match="no memory for 10 more blocks.*0 are free") as raised:
            cache.update(*feed.columns(70)[0], 0)
        assert (raised.value.blocks_needed, raised.value.blocks_free) == (10, 0)
        assert cache.memory() == before and driver.pages == 3 * 4
        feed.check(cache)
        feed.update(cache, feed.columns(60))
        assert driver.pages == 3 * 6
        feed.check(cache)

    def test_reset_and_reuse(self, driver):
        cache, feed = PagedCache(tiny_config("llama")), Feed()
        feed.update(cache, feed.columns(100))
        driver.use()
        cache.reset()
        assert (driver.pages, driver.ranges) == (0, {})
        feed.crop(0)
        feed.update(cache, feed.columns(30))
        feed.check(cache)

    def test_after_a_reset_ordinary_tensors_grow_ahead_again(self, driver, monkeypatch):
        cache = PagedCache(tiny_config("llama"))
        feed = Feed()
        feed.update(cache, feed.columns(16))
        assert cache.groups[0].store.blocks.growth == 0  # pages are mapped one by one
        cache.reset()
        monkeypatch.setattr(elastic_memory, "driver_of", lambda device: None)
        feed = Feed()
        feed.update(cache, feed.columns(16 * 100))
        feed.update(cache, feed.columns(1))
        assert cache.groups[0].store.blocks.num_blocks == 3 * 100 * 41 // 40

    def test_a_pickled_cache_goes_on_in_pages(self, driver):
        cache, feed = PagedCache(tiny_config("llama")), Feed()
        feed.update(cache, feed.columns(100))
        other = pickle.loads(pickle.dumps(cache))
        pages = driver.pages
        assert other.memory() == cache.memory()
        del cache
        assert driver.pages == pages // 2
        feed.update(other, feed.columns(40))
        feed.check(other)

    def test_begun_under_inference_mode(self, driver):
        cache, feed = PagedCache(tiny_config("llama")), Feed()
        with torch.inference_mode():
            feed.update(cache, feed.columns(40))
            cache.crop(-5)
        feed.crop(35)
        feed.update(cache, feed.columns(50))
        cache.reset()
        feed.crop(0)
        feed.update(cache, feed.columns(5))
        feed.check(cache)


class TestShrinking:
    def filled(self, driver, rows=4, columns=320):
        cache, feed = PagedCache(tiny_config("llama")), Feed(rows=rows)
        feed.update(cache, feed.columns(columns))
        assert driver.pages == 3 * rows * columns // 64
        driver.use()
        return cache, feed

    def test_crop(self, driver):
        cache, feed = self.filled(driver, rows=1, columns=1280)
        before = pointers(cache)
        cache.crop(-960)
        feed.crop(320)
        assert driver.pages == 3 * (1 + 4 + 4), "20 blocks, two so that growth need not ask again, and whole chunks"
        assert cache.memory().bytes_reserved == 27 * PAGE
        assert (cache.memory().blocks_used, cache.memory().blocks_free) == (20, 16)
        feed.check(cache)
        feed.update(cache, feed.columns(960))
        assert pointers(cache) == before
        feed.check(cache)

    def test_rows_that_are_dropped(self, driver):
        cache, feed = self.filled(driver)
        cache.batch_select_indices(torch.tensor([1]))
        feed.select([1])
        assert driver.pages == 3 * 9, "row 1 lay behind row 0 and moves to the front"
        assert cache.groups[0].manager.table[0, :20].max() == 19
        feed.check(cache)
        driver.use()
        cache.crop(-320)
        assert driver.pages == 3
        feed.crop(0)
        feed.update(cache, feed.columns(100))
        feed.check(cache)

    @pytest.mark.parametrize("how", ["release", "select", "crop"])
    def test_after_a_forward_that_stopped_half_way(self, driver, how):
        """Some layers have no memory yet, in which blocks could move."""
        states = [torch.randn(4, 2, tokens, 16) for tokens in (400, 1)]
        cache = PagedCache(tiny_config("llama"))
        cache.update(states[0], states[0], 0)
        with pytest.raises(PagedFlashError, match="stopped half way"):
            for layer in range(3):
                cache.update(states[1], states[1], layer)
        if how == "release":
            cache.release([0, 1, 2])
        elif how == "select":
            cache.batch_select_indices(torch.tensor([3]))
        else:
            cache.crop(-300)
        assert cache.memory().tokens == (4 * 101 if how == "crop" else 401)
        cache.reset()
        for layer in range(3):
            keys, _ = cache.update(states[1], states[1], layer)
            assert torch.equal(torch.clone(keys), states[1])

    def test_low_blocks_are_filled_first(self, driver):
        cache, feed = self.filled(driver, columns=160)
        cache.batch_select_indices(torch.tensor([1, 2, 3]))
        feed.select([1, 2, 3])
        pages = driver.pages
        feed.update(cache, feed.columns(48))
        assert driver.pages == pages, "the blocks of the row that left hold the new tokens"
        feed.check(cache)

    def test_shared_blocks_move_once(self, driver):
        cache, feed = self.filled(driver)
        cache.reorder_cache(torch.tensor([3, 3, 2, 3]))
        feed.select([3, 3, 2, 3])
        assert driver.pages == 3 * 13
        assert (cache.memory().blocks_used, cache.memory().blocks_shared) == (40, 20)
        feed.check(cache)
        feed.update(cache, feed.columns(30))
        feed.check(cache)

    @pytest.mark.parametrize("who", ["cache", "fork"])
    def test_blocks_of_forks_move_with_them(self, driver, who):
        """Whoever frees the blocks: the tables of all forks follow."""
        cache, feed = self.filled(driver)
        fork, fork_feed = cache.fork([3]), copy.deepcopy(feed)
        fork_feed.select([3])
        fork_feed.update(fork, fork_feed.columns(20))
        if who == "cache":
            cache.release([0, 1])
            feed.select([2, 3])
        else:
            cache.reset()
            feed = None
        assert driver.pages == 3 * (13 if who == "cache" else 9), "what both still name, a sixteenth, whole chunks"
        assert fork.groups[0].manager.table.max() < 48
        for one, held in ((fork, fork_feed), (cache, feed)):
            if held is not None:
                held.check(one)
                held.update(one, held.columns(30))
        for one, held in ((fork, fork_feed), (cache, feed)):
            if held is not None:
                held.check(one)

    def test_no_room_to_move_anything(self, driver, monkeypatch):
        cache, feed = self.filled(driver)
        before = driver.pages

        def full(self, copies):
            raise torch.OutOfMemoryError("simulated")

        with monkeypatch.context() as patch:
            patch.setattr(layer_pools.LayerPools, "copy_blocks", full)
            cache.batch_select_indices(torch.tensor([3]))
        feed.select([3])
        assert driver.pages == before
        feed.check(cache)
        feed.update(cache, feed.columns(30))
        feed.check(cache)

    @pytest.mark.parametrize("removed", [20, 160])
    def test_a_little_stays(self, driver, removed):
        cache, _ = self.filled(driver, rows=1, columns=640)
        pages = driver.pages
        cache.crop(-removed)
        assert driver.pages == pages
        assert driver.in_use, "the device was waited for without need"

    @pytest.mark.parametrize("on_device", [False, True])
    def test_beams(self, model, driver, monkeypatch, on_device):
        """Blocks come and go in every step; `on_device` counts as on a GPU."""
        if on_device:
            monkeypatch.setattr(
                PageGroup, "_counts_on_device", lambda self, mask, q_length, device: q_length == 1 and self.columns > 0
            )
        cache = PagedCache(model.config)
        input_ids, mask = ragged_batch([300, 2])
        options = {"attention_mask": mask, "max_new_tokens": 50, "num_beams": 3, "do_sample": False}
        tokens = model.generate(input_ids, past_key_values=cache, **options)
        memory = cache.memory()
        assert memory.bytes_reserved == driver.pages * PAGE
        assert memory.blocks_used * 3 * BLOCK_BYTES >= 0.7 * memory.bytes_reserved, "free blocks stayed"
        del cache
        driver.total_memory = 0
        assert torch.equal(tokens, model.generate(input_ids, past_key_values=ordinary(model), **options))

    def test_ordinary_tensors_stay(self):
        cache, feed = PagedCache(tiny_config("llama")), Feed(rows=1)
        feed.update(cache, feed.columns(1280))
        before = pointers(cache)
        cache.crop(-1200)
        assert pointers(cache) == before
        assert cache.memory().bytes_reserved == 80 * 3 * BLOCK_BYTES


def ordinary(model) -> PagedCache:
    return PagedCache(model.config, num_blocks=1000)


class OutOfMemoryAt(TorchDispatchMode):
    """The n-th operation of torch runs out of memory, counted from 0."""

    def __init__(self, failing: int) -> None:
        super().__init__()
        self.left = failing

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == -1:
            raise torch.OutOfMemoryError(f"simulated in {func}")
        return func(*args, **kwargs or {})


def _scenario(shared: bool) -> tuple[PagedCache, Feed, list]:
    """A cache that holds something, and columns for which every layer must grow."""
    cache, feed = PagedCache(tiny_config("llama")), Feed()
    feed.update(cache, feed.columns(37))
    if shared:
        cache.reorder_cache(torch.tensor([1, 1, 2]))
        feed.select([1, 1, 2])
    return cache, feed, feed.columns(70)


class TestFaults:
    """Memory runs out at every point of a forward in which three layers grow."""

    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("columns", [0, 37], ids=["first forward", "growth"])
    def test_calls_of_the_driver(self, driver, shared, columns):
        for failing in range(1000):
            cache, feed, new = _scenario(shared)
            if columns == 0:
                cache.reset()
                feed.crop(0)
            pages = driver.pages
            memory = cache.memory()
            driver.empty_cache = lambda failing=failing: setattr(driver, "failing", 0)  # and once more after it
            driver.failing = failing
            try:
                feed.update(cache, new)
                break
            except CacheFullError as error:
                assert error.blocks_needed > error.blocks_free
                assert "in " in str(error.__cause__)
            finally:
                driver.failing = None
            assert cache.memory() == memory and driver.pages == pages
            assert cache.get_seq_length() == columns
            if columns:
                feed.check(cache)
            feed.update(cache, new)
            feed.check(cache)
            del cache, feed
            assert (driver.pages, driver.handles, driver.ranges) == (0, 0, {})
        assert failing == 3 * (3 if columns else 6), "not every call of three layers has failed once"

    @pytest.mark.parametrize("elastic", [False, True], ids=["tensors", "pages"])
    @pytest.mark.parametrize("start", ["empty", "filled", "shared"])
    def test_operations_of_torch(self, driver, elastic, start):
        """More than allocations: whatever breaks inside `update` takes the forward back."""
        driver.total_memory *= elastic
        for failing in range(1000):
            cache, feed, new = _scenario(start == "shared")
            assert (cache.layers[0].pool.memory is not None) == elastic
            if start == "empty":
                cache = PagedCache(tiny_config("llama"))
                feed.crop(0)
            stored, columns = cache.memory(), cache.get_seq_length()
            try:
                with OutOfMemoryAt(failing):
                    for layer, (key, value) in enumerate(new):
                        cache.update(key, value, layer)
                break
            except (CacheFullError, torch.OutOfMemoryError):
                pass
            memory = cache.memory()
            for held in ("tokens", "blocks_used", "blocks_shared"):
                assert getattr(memory, held) == getattr(stored, held)
            assert cache.get_seq_length() == columns
            if columns:
                feed.check(cache)
            feed.update(cache, new)
            feed.check(cache)
        assert failing > 30


class TestWhereItIsNotToBeHad:
    def test_on_the_cpu(self):
        assert elastic_memory.unavailable(torch.device("cpu")) == "only CUDA has the virtual memory API"
        assert elastic_memory.driver_of(torch.device("cpu")) is None

    def test_without_bindings(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        monkeypatch.setattr(torch.version, "hip", None)
        reason = elastic_memory.unavailable.__wrapped__(torch.device("cuda", 0))
        assert "cuda-bindings can't be imported" in reason
