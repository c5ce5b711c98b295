"""Memory that grows and shrinks in place, on a CUDA GPU: what the driver does, and what the device has left.

Run by itself: it looks at the device's free memory and takes nearly all of it for a moment.
"""

import gc
import subprocess
import sys
import threading

import pytest
import torch

from hf_paged_flash import CacheFullError, PagedCache, flash_attn_with_kvcache
from hf_paged_flash.cache import elastic_memory
from hf_paged_flash.cache.block_pool import BlockPool
from hf_paged_flash.cache.elastic_memory import ElasticMemory
from tests.cache.feed import Feed, pointers
from tests.tiny_models import ragged_batch, tiny_config, tiny_model

pytestmark = pytest.mark.gpu

MIB = 2**20
SHAPE = (8, 128, 128)  # of a layer of Llama-3.1-8B: 64 KiB a block of 16 tokens in bf16
TOLERANCE = 16 * MIB


@pytest.fixture
def driver():
    device = torch.device("cuda", torch.cuda.current_device())
    assert elastic_memory.unavailable(device) is None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    yield elastic_memory.driver_of(device)
    gc.collect()
    torch.cuda.empty_cache()


def free_memory() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


def wide_config():
    """A tiny Llama whose layers are wide enough for pages: 128 KiB a block in fp32."""
    return tiny_config("llama", num_attention_heads=8, num_key_value_heads=8, head_dim=128)


def wide_cache(rows: int = 2, **arguments) -> tuple[PagedCache, Feed]:
    """A cache of two layers of Llama-3.1-8B, and what feeds it."""
    config = tiny_config("llama", num_hidden_layers=2)
    feed = Feed(rows=rows, shapes=(SHAPE,) * 2, dtypes=(torch.bfloat16,) * 2, device="cuda")
    return PagedCache(config, **arguments), feed


def wide_pool(driver) -> BlockPool:
    heads, dim, _ = SHAPE
    key = torch.empty(1, heads, 0, dim, dtype=torch.bfloat16, device="cuda")
    pool = BlockPool(16, key, key, None)
    pool.memory = ElasticMemory(driver, 2**30)
    return pool


def test_growth_keeps_pointers_and_contents(driver):
    cache, feed = wide_cache()
    feed.update(cache, feed.columns(40))
    assert all(layer.pool.memory is not None for layer in cache.layers)
    before = pointers(cache)
    for count in (1, 3000, 1, 100):
        feed.update(cache, feed.columns(count))
    assert pointers(cache) == before
    feed.check(cache)
    reserved = cache.memory().bytes_reserved
    assert reserved == sum(layer.pool.memory.mapped for layer in cache.layers)
    assert reserved % driver.granularity == 0
    cache.crop(-3100)
    feed.crop(42)
    assert cache.memory().bytes_reserved < reserved // 8
    feed.check(cache)
    feed.update(cache, feed.columns(2000))
    assert pointers(cache) == before
    feed.check(cache)


def test_pages_come_from_the_device_and_go_back(driver):
    cache, feed = wide_cache(rows=4)
    feed.update(cache, feed.columns(20))  # loads kernels, which take memory too
    del cache, feed
    torch.cuda.empty_cache()
    before, of_torch = free_memory(), torch.cuda.memory_reserved()
    cache, feed = wide_cache(rows=4)
    feed.update(cache, feed.columns(2048))
    reserved = cache.memory().bytes_reserved
    assert reserved == 2 * 4 * 128 * 65536
    feed.fed = []
    torch.cuda.empty_cache()
    taken = before - free_memory()
    assert abs(taken - reserved) <= TOLERANCE
    assert torch.cuda.memory_reserved() - of_torch <= TOLERANCE, "pages are not torch's"
    cache.batch_select_indices(torch.tensor([0]))
    torch.cuda.empty_cache()
    assert cache.memory().bytes_reserved < reserved // 3
    assert abs(before - free_memory() - cache.memory().bytes_reserved) <= TOLERANCE
    cache.reset()
    torch.cuda.empty_cache()
    assert abs(before - free_memory()) <= TOLERANCE


def test_nothing_leaks(driver):
    def fill() -> None:
        cache, feed = wide_cache(rows=4)
        feed.update(cache, feed.columns(1000))
        cache.batch_select_indices(torch.tensor([1, 1]))
        feed.select([1, 1])
        feed.update(cache, feed.columns(1000))

    fill()
    torch.cuda.empty_cache()
    before = free_memory()
    for _ in range(10):
        fill()
    torch.cuda.empty_cache()
    assert before - free_memory() <= 2 * driver.granularity, "ten caches left something behind"


def test_a_tensor_outlives_its_cache(driver):
    cache, feed = wide_cache()
    feed.update(cache, feed.columns(64))
    block, key = cache.groups[0].manager.table[0, 0], cache.layers[1].pool.key
    expected = feed.fed[1][0][0, :, :16].clone()
    cache.reset()
    assert torch.equal(key[int(block)].transpose(0, 1), expected)


@torch.no_grad()
def test_a_captured_graph_reads_pages_mapped_after_it(driver):
    heads, dim, _ = SHAPE
    pool = wide_pool(driver)
    pool.grow(32)  # one page
    pool.key.normal_()
    pool.value.normal_()
    q = torch.randn(1, 1, heads, dim, dtype=torch.bfloat16, device="cuda")
    table = torch.zeros(1, 100, dtype=torch.int32, device="cuda")
    lengths = torch.tensor([16], dtype=torch.int32, device="cuda")

    def decode() -> torch.Tensor:
        return flash_attn_with_kvcache(q, pool.key, pool.value, cache_seqlens=lengths, block_table=table, causal=True)

    decode()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode()
    graph.replay()
    first = out.clone()
    pointer = pool.key.data_ptr()
    pool.grow(200)
    assert pool.num_blocks == 224 and pool.key.data_ptr() == pointer
    pool.key[32:].normal_()
    pool.value[32:].normal_()
    table.copy_(torch.randperm(200, device="cuda")[:100])
    lengths.fill_(1600)
    graph.replay()
    assert torch.equal(out, decode())
    assert not torch.equal(out, first)
    pool.shrink(32)  # and goes on with what is left
    table.zero_()
    lengths.fill_(16)
    graph.replay()
    assert torch.equal(out, first)


def test_generate_in_pages_gives_the_same_tokens(driver):
    model = tiny_model(wide_config(), "paged_flash").cuda()
    input_ids, mask = (x.cuda() for x in ragged_batch([250, 130, 9]))
    options = {"attention_mask": mask, "max_new_tokens": 60, "do_sample": False}
    caches = [PagedCache(model.config), PagedCache(model.config, num_blocks=60)]
    pages, ordinary = (model.generate(input_ids, past_key_values=cache, **options) for cache in caches)
    assert [cache.layers[0].pool.memory is not None for cache in caches] == [True, False]
    assert caches[0].groups[0].manager.num_blocks > 2 * driver.granularity // caches[0].layers[0].pool.block_bytes
    assert torch.equal(pages, ordinary)


@torch.no_grad()
def test_decode_steps_that_map_a_page_do_not_wait(driver):
    model = tiny_model(wide_config(), "paged_flash").cuda()
    cache = PagedCache(model.config)
    input_ids = ragged_batch([250], None)[0].cuda()
    model(input_ids, past_key_values=cache)
    token = input_ids[:, :1]
    model(token, past_key_values=cache)  # compiles
    pages = cache.memory().bytes_reserved
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            model(token, past_key_values=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.memory().bytes_reserved > pages, "no page was mapped: nothing was tested"


def test_out_of_memory(driver):
    cache, feed = wide_cache(rows=1)
    feed.update(cache, feed.columns(1000))
    new = [[torch.zeros(1, 8, 1, 128, dtype=torch.bfloat16, device="cuda").expand(1, 8, 20000, 128)] * 2] * 2
    reserved = cache.memory().bytes_reserved
    torch.cuda.empty_cache()
    ballast = torch.empty(free_memory() - 100 * MIB, dtype=torch.uint8, device="cuda")
    try:
        with pytest.raises(CacheFullError, match="the device has no memory") as raised:
            cache.update(*new[0], 0)  # 80 MiB a layer in two layers
    finally:
        full = free_memory()
        del ballast
        torch.cuda.empty_cache()
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)
    assert full > 80 * MIB, "the pages that were mapped before the failure stayed"
    assert (cache.get_seq_length(), cache.memory().bytes_reserved) == (1000, reserved)
    feed.check(cache)
    feed.update(cache, feed.columns(3000))
    feed.check(cache)


def test_memory_that_torch_keeps_is_used(driver):
    pool = wide_pool(driver)
    pool.grow(1)
    kept = torch.empty(free_memory() - 20 * MIB, dtype=torch.uint8, device="cuda")
    del kept  # torch keeps it
    assert free_memory() < 64 * MIB
    pool.grow(100 * MIB // pool.block_bytes)
    assert pool.bytes_reserved == 100 * MIB


def test_dropped_while_a_graph_is_captured(driver):
    pool = wide_pool(driver)
    pool.grow(100)
    x = torch.zeros(8, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x + 1
        del pool
    assert len(driver.abandoned) == 1
    graph.replay()
    assert float(y.sum()) == 8
    other = wide_pool(driver)
    other.grow(1)
    assert driver.abandoned == []


def test_beyond_the_reserved_addresses(driver):
    pool = wide_pool(driver)
    pool.memory = ElasticMemory(driver, 2 * driver.granularity)
    pool.grow(60)
    pool.key.normal_()
    expected = pool.key.clone()
    before = free_memory()
    pool.grow(100)
    assert abs(before - free_memory() - 2 * driver.granularity) <= driver.granularity
    assert torch.equal(pool.key[: len(expected)], expected)


def test_threads(driver):
    model = tiny_model(wide_config(), "paged_flash").cuda()
    options = {"max_new_tokens": 60, "do_sample": False}
    batches = [[x.cuda() for x in ragged_batch([200, 30 + seed], seed=seed)] for seed in range(3)]
    alone = [model.generate(ids, attention_mask=mask, **options) for ids, mask in batches]
    together: list = [None] * 3

    def run(index: int) -> None:
        ids, mask = batches[index]
        cache = PagedCache(model.config)
        together[index] = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
        assert cache.layers[0].pool.memory is not None

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(together, alone, strict=True):
        assert torch.equal(ours, theirs)


_AT_EXIT = """
import os, torch
from hf_paged_flash import PagedCache
from transformers import LlamaConfig

cache = PagedCache(LlamaConfig(num_hidden_layers=1))
keys = torch.ones(1, 8, 100, 128, dtype=torch.bfloat16, device="cuda")
cache.update(keys, keys, 0)
assert cache.layers[0].pool.memory is not None
child = os.fork()
if child == 0:
    del cache
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert bool((torch.clone(cache.layers[0].keys) == 1).all())
print("stored")
"""


def test_a_cache_that_lives_until_the_end(driver):
    """Neither a forked child that drops it nor the interpreter's exit may complain."""
    done = subprocess.run([sys.executable, "-c", _AT_EXIT], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout.strip()) == (0, "stored"), done.stderr
    assert "Exception" not in done.stderr and "Error" not in done.stderr, done.stderr
