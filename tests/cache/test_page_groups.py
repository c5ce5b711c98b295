"""Groups of layers: all take a forward's tokens or none does, and a sliding window gives back what it leaves."""

import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from hf_paged_flash import ArgumentError, CacheFullError, PagedCache, UnsupportedFeatureError
from hf_paged_flash.cache.block_pool import BlockPool
from hf_paged_flash.cache.length_floor import LengthFloor
from hf_paged_flash.cache.page_group import PageGroup
from hf_paged_flash.masks import paged_flash_mask
from tests.tiny_models import ragged_batch, tiny_config, tiny_model

HEADS, DIM = 1, 4
BLOCK_BYTES = 16 * 2 * HEADS * DIM * 4  # of one layer


def make_cache(layer_types: str = "sfs", window: int = 512, **options) -> PagedCache:
    """`layer_types`: a letter a layer, s for sliding, f for full attention."""
    names = {"s": "sliding_attention", "f": "full_attention"}
    types = [names[letter] for letter in layer_types]
    config = tiny_config("gemma3_text", num_hidden_layers=len(types), layer_types=types, sliding_window=window)
    return PagedCache(config, **options)


def announce(cache: PagedCache, mask: torch.Tensor | None, new: int, batch: int) -> None:
    """What transformers does before a forward: one mask a kind of layer."""
    for kind in (False, True):
        if kind in cache.is_sliding:
            layer = cache.is_sliding.index(kind)
            kv_length, kv_offset = cache.get_mask_sizes(new, layer)
            function = sliding_window_causal_mask_function(cache.layers[layer].group.window) if kind else None
            paged_flash_mask(
                batch, new, kv_length, cache.get_seq_length(), kv_offset, function or causal_mask_function, mask
            )


def forward(cache: PagedCache, new: int, batch: int = 1, mask: torch.Tensor | None = None, heads=None) -> None:
    """Stores `new` columns: token t of a row has keys t and values -t."""
    announce(cache, mask, new, batch)
    start = cache.get_seq_length()
    for layer in range(len(cache.layers)):
        count = HEADS if heads is None else heads[layer]
        keys = torch.arange(start, start + new, dtype=torch.float32)[None, None, :, None]
        keys = keys.expand(batch, count, new, DIM).contiguous()
        cache.update(keys, -keys, layer)


def kept(group: PageGroup) -> list[tuple[int, int]]:
    """Each row's stored tokens, (first, end)."""
    return [(int(f) * 16, int(n)) for f, n in zip(group.manager.first, group.manager.lengths, strict=True)]


class TestWindows:
    def test_layers_alike_share_a_group(self):
        cache = make_cache("sfssf", window=20)
        assert [group.window for group in cache.groups] == [20, None]
        assert [layer.group.window for layer in cache.layers] == [20, None, 20, 20, None]
        assert [group.pools.num_layers for group in cache.groups] == [3, 2]
        assert cache.is_sliding == [True, False, True, True, False]

    def test_chunks_see_their_first_token(self):
        config = tiny_config("llama")
        config.layer_types, config.attention_chunk_size = ["chunked_attention"] * 3, 16
        assert [group.window for group in PagedCache(config).groups] == [None]

    def test_4096_new_tokens_at_window_512(self):
        cache, used = make_cache("sf"), []
        sliding, full = cache.groups
        forward(cache, 700)
        for _ in range(4096):
            forward(cache, 1)
            used.append(sliding.blocks_used)
        assert set(used) == {512 // 16 + 1, 512 // 16}
        assert full.blocks_used == -(-4796 // 16)
        assert sliding.pools.bytes_reserved <= (512 // 16 + 2) * BLOCK_BYTES
        # the last query saw tokens 4284 to 4795
        assert kept(sliding) == [(4284 // 16 * 16, 4796)]
        dense = torch.clone(cache.layers[0].keys)[0, 0, :, 0]
        assert torch.equal(dense[4284 // 16 * 16 :], torch.arange(4284 // 16 * 16, 4796.0))
        assert not dense[: 4284 // 16 * 16].any()
        assert torch.equal(torch.clone(cache.layers[1].values)[0, 0, :, 0], -torch.arange(4796.0))
        memory = cache.memory()
        assert memory.tokens == 4796
        assert memory.bytes_stored == (4796 + 4796 - 4284 // 16 * 16) * BLOCK_BYTES // 16
        assert memory.blocks_used == full.blocks_used + sliding.blocks_used

    @pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 33])
    def test_every_length(self, window):
        """A query's window is there whenever it comes, and no block more than that."""
        cache = make_cache("s", window=window)
        (group,) = cache.groups
        for length in range(1, 70):
            forward(cache, 1)
            first, end = kept(group)[0]
            assert end == length
            assert first <= max(length - window, 0) < first + 16

    def test_a_prompt_stores_the_end_of_each_row(self):
        cache = make_cache("sf", window=20)
        mask = torch.zeros(3, 100, dtype=torch.bool)
        mask[0], mask[1, 95:], mask[2, 40:] = True, True, True
        forward(cache, 100, 3, mask)
        sliding, full = cache.groups
        assert kept(sliding) == [(80, 100), (0, 5), (32, 60)]
        assert kept(full) == [(0, 100), (0, 5), (0, 60)]
        assert sliding.pools.bytes_reserved == (2 + 1 + 2) * BLOCK_BYTES

    def test_a_forwards_own_handles_hold_all_of_its_tokens(self):
        cache = make_cache("s", window=20)
        mask = torch.ones(2, 50, dtype=torch.bool)
        mask[1, :30] = False
        announce(cache, mask, 50, 2)
        keys = torch.randn(2, HEADS, 50, DIM)
        handle, _ = cache.update(keys, keys, 0)
        assert cache.groups[0].has_given_back
        assert torch.equal(handle.clone(), keys * mask[:, None, :, None])

    def test_nothing_is_given_back_unless_the_mask_says_that_layers_keep_to_the_window(self):
        cache = make_cache("sf", window=20)
        for function in (causal_mask_function, sliding_window_causal_mask_function(21)):
            layer = cache.layers[0]
            kv_length, _ = layer.get_mask_sizes(100)
            paged_flash_mask(1, 100, kv_length, 0, 0, function)
            keys = torch.zeros(1, HEADS, 100, DIM)
            for index in range(2):
                cache.update(keys, keys, index)
            assert not cache.groups[0].has_given_back
        keys = torch.zeros(1, HEADS, 1, DIM)
        for index in range(2):
            cache.update(keys, keys, index)  # a forward without a mask
        assert not cache.groups[0].has_given_back
        forward(cache, 1)
        assert kept(cache.groups[0]) == [((201 - 19) // 16 * 16, 202)]

    def test_a_layer_that_reaches_further_than_what_is_kept_is_refused(self):
        cache = make_cache("s", window=20)
        forward(cache, 60)
        group = cache.groups[0]
        group.check_reach(19)
        for reach, words in ((-1, "all tokens"), (20, "21 tokens")):
            with pytest.raises(UnsupportedFeatureError, match=f"attends to {words}.* the last 20"):
                group.check_reach(reach)

    def test_a_model_that_drops_its_window_is_refused_and_can_go_on_with_it(self):
        config = tiny_config("mistral", sliding_window=8)
        model = tiny_model(config, "paged_flash")
        input_ids, _ = ragged_batch([40], None)
        cache = PagedCache(model.config)
        with torch.no_grad():
            model(input_ids[:, :38], past_key_values=cache)
            model.config.sliding_window = None
            attention = [layer.self_attn for layer in model.model.layers]
            for module in attention:
                module.config.sliding_window = None
            with pytest.raises(UnsupportedFeatureError, match="a window of 8 tokens which only its cache knows of"):
                model(input_ids[:, 38:], past_key_values=cache)
            assert cache.get_seq_length() == 38
            for module in (model, *attention):
                module.config.sliding_window = 8
            logits = model(input_ids[:, 38:], past_key_values=cache).logits
            whole = model(input_ids, use_cache=False).logits[:, 38:]
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)


class TestAllOrNothing:
    """Two groups, and the second one finds no room."""

    @pytest.mark.parametrize("layer_types", ["sf", "fs"])
    def test_blocks(self, layer_types):
        cache = make_cache(layer_types, window=20, num_blocks=6)
        forward(cache, 90)
        before = [torch.clone(layer.keys) for layer in cache.layers]
        memory = cache.memory()
        with pytest.raises(CacheFullError) as raised:
            forward(cache, 7)
        assert (raised.value.blocks_needed, raised.value.blocks_free) == (1, 0)
        assert cache.memory() == memory and cache.get_seq_length() == 90
        assert all(torch.equal(torch.clone(layer.keys), old) for layer, old in zip(cache.layers, before, strict=True))
        forward(cache, 6)
        assert cache.get_seq_length() == 96

    @pytest.mark.parametrize("layer_types", ["sf", "fs", "ssf", "ffs"])
    def test_bytes_of_all_groups_together(self, layer_types):
        slides, full = layer_types.count("s"), layer_types.count("f")
        # 100 tokens: 7 blocks in full layers; 81 to 100 and the rest of a block in sliding ones: 2; 8 and 3 at 115
        cap = (8 * full + 3 * slides) * BLOCK_BYTES
        cache = make_cache(layer_types, window=20, max_memory=cap)
        forward(cache, 100)
        forward(cache, 12)
        memory = cache.memory()
        assert memory.bytes_reserved <= cap
        with pytest.raises(CacheFullError):
            forward(cache, 40)
        assert cache.memory() == memory and cache.get_seq_length() == 112
        cache = make_cache(layer_types, window=20, max_memory=(7 * full + 2 * slides) * BLOCK_BYTES - 1)
        with pytest.raises(CacheFullError):
            forward(cache, 100)
        assert (cache.get_seq_length(), cache.memory().bytes_reserved) == (0, 0)
        forward(cache, 60)

    def test_layers_larger_than_the_first_ones(self):
        heads = (1, 8, 1)
        cap = 2 * BLOCK_BYTES * 10
        cache = make_cache("sfs", window=50, max_memory=cap)
        forward(cache, 20, heads=heads)
        assert cache.memory().bytes_reserved == cap
        cache = make_cache("sfs", window=50, max_memory=cap - 1)
        with pytest.raises(CacheFullError, match="max_memory"):
            forward(cache, 20, heads=heads)
        assert (cache.get_seq_length(), cache.memory().bytes_reserved) == (0, 0)
        forward(cache, 16, heads=heads)

    @pytest.mark.parametrize("failing", range(3))
    @pytest.mark.parametrize("shared", [False, True])
    def test_out_of_memory(self, monkeypatch, failing, shared):
        caches = [make_cache("sfs", window=20) for _ in range(2)]
        for cache in caches:
            forward(cache, 60)
            forward(cache, 1)
            cache.batch_repeat_interleave(2 if shared else 1)
        batch = 2 if shared else 1
        cache, held = caches[0], caches[0].memory().tokens
        original, calls = BlockPool.grow, iter(range(100))

        def grow(self, num_blocks):
            if num_blocks > self.num_blocks and next(calls) == failing:
                raise torch.OutOfMemoryError("simulated")
            return original(self, num_blocks)

        before = [torch.clone(layer.keys) for layer in cache.layers]
        with monkeypatch.context() as patch:
            patch.setattr(BlockPool, "grow", grow)
            with pytest.raises(CacheFullError, match="are intact"):
                forward(cache, 90, batch)
        assert (cache.get_seq_length(), cache.memory().tokens) == (61, held)
        for layer, old in zip(cache.layers, before, strict=True):
            kept_from = int(layer.group.manager.first[0]) * 16
            assert torch.equal(torch.clone(layer.keys)[:, :, kept_from:], old[:, :, kept_from:])
        for one in caches:
            forward(one, 90, batch)
        for ours, theirs in zip(*(one.layers for one in caches), strict=True):
            assert torch.equal(torch.clone(ours.keys), torch.clone(theirs.keys))

    def test_a_mask_that_does_not_fit_changes_no_group(self):
        cache = make_cache("sf", window=20)
        forward(cache, 40, 2)
        states = [pickle.dumps(group.manager) for group in cache.groups]
        with pytest.raises(ArgumentError, match="must cover the 40 cached"):
            forward(cache, 2, 2, torch.ones(2, 9, dtype=torch.bool))
        with pytest.raises(ArgumentError, match="holds 2 rows"):
            forward(cache, 1, 3)
        assert [pickle.dumps(group.manager) for group in cache.groups] == states
        forward(cache, 2, 2)


class TestCrop:
    @pytest.mark.parametrize("record", [False, True])
    def test_against_what_is_kept(self, record):
        for length in (30, 48, 61):
            for dropped in range(length + 1):
                cache = make_cache("sf", window=20)
                if record:
                    cache.activate_past_recording()
                forward(cache, length)
                left = length - dropped
                needs, first = max(left - 19, 0), kept(cache.groups[0])[0][0]
                if left and needs < min(first, left):
                    assert not record
                    with pytest.raises(ArgumentError, match=f"row 0 would be {left} tokens long"):
                        cache.crop(-dropped)
                    assert cache.get_seq_length() == length
                    continue
                cache.crop(-dropped)
                assert cache.get_seq_length() == left
                forward(cache, 3)
                stored, dense = kept(cache.groups[0])[0], torch.clone(cache.layers[0].keys)[0, 0, :, 0]
                assert stored[0] <= needs and stored[1] == left + 3
                assert torch.equal(dense[stored[0] :], torch.arange(stored[0], left + 3.0))

    def test_a_window_of_one_goes_back_to_whole_blocks(self):
        cache = make_cache("s", window=1)
        forward(cache, 50)
        with pytest.raises(ArgumentError, match="row 0 would be 40 tokens long"):
            cache.crop(-10)
        cache.crop(-18)
        forward(cache, 3)
        assert kept(cache.groups[0]) == [(32, 35)]

    def test_recording_gives_back_with_each_crop(self):
        cache = make_cache("sf", window=20)
        cache.activate_past_recording()
        forward(cache, 100)
        forward(cache, 5)
        assert kept(cache.groups[0]) == [(0, 105)]
        cache.crop(0)
        assert kept(cache.groups[0]) == [(80, 105)]
        forward(cache, 30)
        assert kept(cache.groups[0]) == [(80, 135)]
        cache.crop(-3)
        assert kept(cache.groups[0]) == [(112, 132)]
        for layer in cache.layers:  # as generate() does when it hands the cache back
            layer.record_past = False
        forward(cache, 20)
        forward(cache, 1)
        assert kept(cache.groups[0]) == [((152 - 19) // 16 * 16, 153)]

    def test_an_old_block_table_loses_what_a_crop_of_nothing_gave_back(self):
        cache = make_cache("s", window=20)
        cache.activate_past_recording()
        forward(cache, 60)
        forward(cache, 1)
        cache.crop(0)
        forward(cache, 1)
        group = cache.groups[0]
        assert group.step.block_table.tolist() == group.manager.table[:, :4].tolist()
        assert group.step.block_table[0, :2].tolist() == [-1, -1]


class TestCountingOnTheDevice:
    """What a GPU does in a decode step, on CPU tensors: lower bounds come back late, upper bounds are planned with."""

    @pytest.fixture(autouse=True)
    def on_device(self, monkeypatch):
        monkeypatch.setattr(
            PageGroup,
            "_counts_on_device",
            lambda self, mask, q_length, device: q_length == 1 and self.columns > 0 and mask is not None,
        )

    def test_blocks_are_given_back_one_step_late(self):
        cache = make_cache("sf", window=20)
        mask = torch.ones(2, 200, dtype=torch.bool)
        mask[1, :30] = False
        forward(cache, 40, 2, mask[:, :40])
        for end in range(41, 200):
            forward(cache, 1, 2, mask[:, :end])
            for group in cache.groups:
                assert not group.is_exact
            lengths = mask[:, :end].sum(1)
            for (first, _), length in zip(kept(cache.groups[0]), lengths.tolist(), strict=True):
                reach = max(length - 20, 0)
                assert first <= reach and reach - first <= 16 + 2
        table = cache.groups[0].step.block_table
        assert ((table >= 0).sum(1) <= 3).all()
        assert torch.equal(table, torch.from_numpy(cache.groups[0].manager.table[:, : table.shape[1]]))

    def test_rows_that_pause_keep_their_window(self):
        """The host counts a pause as a token; blocks are given back by what is sure."""
        cache, config = make_cache("sf", window=20), torch.Generator().manual_seed(0)
        mask = torch.cat([torch.ones(3, 40, dtype=torch.bool), torch.rand(3, 150, generator=config) < 0.4], 1)
        forward(cache, 40, 3, mask[:, :40])
        for end in range(41, 190):
            forward(cache, 1, 3, mask[:, :end])
            before, true = mask[:, : end - 1].sum(1).numpy(), mask[:, :end].sum(1).numpy()
            assert (cache.groups[0].manager.first * 16 <= np.maximum(before - 19, 0)).all()
        assert (cache.groups[0].manager.lengths > true).all()
        cache.memory()
        assert cache.groups[0].manager.lengths.tolist() == true.tolist()
        forward(cache, 2, 3, torch.cat([mask[:, :189], torch.ones(3, 2, dtype=torch.bool)], 1))
        for row in range(3):
            dense = torch.clone(cache.layers[0].keys)[row, 0, :, 0]
            columns = torch.cat([torch.nonzero(mask[row, :189])[:, 0], torch.tensor([189, 190])])[-21:]
            assert torch.equal(dense[columns], columns.float())

    def test_whole_model(self):
        config = tiny_config("gemma3_text", sliding_window=8, tie_word_embeddings=False)
        model, eager = tiny_model(config, "paged_flash"), tiny_model(config, "eager")
        input_ids, mask = ragged_batch([30, 7, 19])
        for options in ({}, {"num_beams": 3}):
            options |= {"max_new_tokens": 40, "do_sample": False, "attention_mask": mask}
            assert torch.equal(model.generate(input_ids, **options), eager.generate(input_ids, **options))

    def test_bounds_never_fall(self):
        floor = LengthFloor()
        floor.restart(np.array([5, 7]))
        floor.refresh(torch.tensor([6, 7], dtype=torch.int32))
        assert floor.lengths.tolist() == [5, 7]  # on its way
        floor.refresh(torch.tensor([9, 9], dtype=torch.int32))
        assert floor.lengths.tolist() == [6, 7]
        copied = pickle.loads(pickle.dumps(floor))
        copied.refresh(torch.tensor([9, 9], dtype=torch.int32))
        assert copied.lengths.tolist() == [6, 7]


class TestLifetime:
    def test_dropping_the_cache_frees_it_without_the_garbage_collector(self):
        gc.collect()
        gc.disable()
        try:
            cache = make_cache("sfs", window=20)
            forward(cache, 60)
            forward(cache, 1)
            alive = [weakref.ref(layer.pool.key) for layer in cache.layers] + [weakref.ref(cache.groups)]
            del cache
            assert [reference() for reference in alive] == [None] * 4
        finally:
            gc.enable()

    def test_a_pickled_cache_goes_on(self):
        cache = make_cache("sf", window=20)
        forward(cache, 60)
        other = pickle.loads(pickle.dumps(cache))
        assert other.memory() == cache.memory()
        for one in (cache, other):
            forward(one, 5)
        assert torch.equal(torch.clone(other.layers[0].keys), torch.clone(cache.layers[0].keys))
        assert kept(other.groups[0]) == kept(cache.groups[0]) == [(32, 65)]

    def test_reset(self):
        cache = make_cache("sf", window=20)
        forward(cache, 60)
        cache.reset()
        assert (cache.memory().bytes_reserved, cache.get_seq_length()) == (0, 0)
        assert not cache.groups[0].has_given_back
        forward(cache, 10, 3)
        assert kept(cache.groups[0]) == [(0, 10)] * 3


class TestForks:
    def test_each_goes_on_behind_its_own_window(self):
        cache = make_cache("sf", window=20)
        forward(cache, 60, 2)
        fork = cache.fork([1])
        for _ in range(40):
            forward(fork, 1)
        forward(cache, 3, 2)
        assert kept(fork.groups[0]) == [(80, 100)]
        assert kept(cache.groups[0]) == [(32, 63)] * 2
        assert [layer.group for layer in fork.layers] == list(fork.groups)
        for one, length in ((fork, 100), (cache, 63)):
            dense = torch.clone(one.layers[0].keys)[-1, 0, :, 0]
            start = kept(one.groups[0])[-1][0]
            assert torch.equal(dense[start:], torch.arange(start, float(length)))
            assert torch.equal(torch.clone(one.layers[1].keys)[-1, 0, :, 0], torch.arange(float(length)))
        blocks = cache.groups[0].store.blocks.blocks_used
        del fork
        assert cache.memory().blocks_used == 2 * 2 + 2 * 4 and blocks == 2 * 2 + 2

    def test_a_saved_one_goes_on(self, tmp_path):
        config = tiny_config("gemma3_text", sliding_window=8)
        model = tiny_model(config, "paged_flash")
        input_ids, mask = ragged_batch([60, 33, 5])
        cache = PagedCache(model.config)
        with torch.no_grad():
            model(input_ids[:, :50], attention_mask=mask[:, :50], past_key_values=cache)
            cache.save(tmp_path / "cache.safetensors")
            loaded = PagedCache.load(tmp_path / "cache.safetensors", model.config)
            assert kept(loaded.groups[0]) == kept(cache.groups[0]) and cache.groups[0].has_given_back
            ours, theirs = (
                model(input_ids[:, 50:], attention_mask=mask, past_key_values=one).logits for one in (loaded, cache)
            )
        assert torch.equal(ours, theirs)
