"""PagedCache as a user meets it: what it stores, what it reports, where it ends, and how it recovers."""

import copy
import gc
import pickle
import sys
import threading
import weakref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hf_paged_flash import ArgumentError, CacheFullError, PagedCache, PagedFlashError, UnsupportedFeatureError
from hf_paged_flash.cache import page_group
from hf_paged_flash.cache.block_pool import BlockPool
from hf_paged_flash.cache.page_group import PageGroup
from tests.tiny_models import ragged_batch, tiny_config, tiny_model

ROW_BYTES = 3 * 2 * 2 * 16 * 4  # a token of the tiny Llama: layers, K and V, KV heads, head_dim, fp32


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config("llama"), "paged_flash")


@pytest.fixture(scope="module")
def eager():
    return tiny_model(tiny_config("llama"), "eager")


@torch.no_grad()
def extend(model, cache, input_ids, attention_mask=None):
    """Logits of a forward that continues `cache`."""
    return model(input_ids, attention_mask=attention_mask, past_key_values=cache).logits


def stored(cache, columns=None):
    """Copies of all layers' dense keys and values."""
    return [torch.clone(x) for layer in cache.layers for x in (layer.keys, layer.values)]


def out_of_memory_in(monkeypatch, calls):
    """Makes `BlockPool.grow` run out of memory at the given ones of its calls that take memory, counted from 0."""
    original, count = BlockPool.grow, iter(range(10**6))

    def grow(self, num_blocks):
        if num_blocks > self.num_blocks and next(count) in calls:
            raise torch.OutOfMemoryError("simulated")
        return original(self, num_blocks)

    monkeypatch.setattr(BlockPool, "grow", grow)


class TestWhatIsStored:
    @pytest.mark.parametrize("pad", ["left", "right"])
    @pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
    def test_memory_is_exact(self, model, pad, block_size):
        lengths = [30, 7, 17, 1]
        cache = PagedCache(model.config, block_size=block_size)
        extend(model, cache, *ragged_batch(lengths, pad))
        memory = cache.memory()
        blocks = sum(-(-length // block_size) for length in lengths)
        assert memory.tokens == sum(lengths)
        assert (memory.block_size, memory.blocks_used, memory.blocks_free) == (block_size, blocks, 0)
        assert memory.bytes_stored == sum(lengths) * ROW_BYTES
        assert memory.bytes_reserved == blocks * block_size * ROW_BYTES
        assert memory.bytes_wasted == memory.bytes_reserved - memory.bytes_stored
        assert memory.blocks_shared == 0
        assert memory.bytes_reserved == sum(
            pool.nbytes for layer in cache.layers for pool in (layer.pool.key, layer.pool.value)
        )
        assert cache.get_seq_length() == 30  # columns, as transformers counts

    def test_nothing_is_reserved_before_the_first_forward(self, model):
        memory = PagedCache(model.config).memory()
        assert (memory.bytes_reserved, memory.tokens, memory.blocks_used) == (0, 0, 0)

    def test_dense_view_is_what_a_dynamic_cache_holds(self, model, eager):
        input_ids, mask = ragged_batch([21, 5, 13])
        paged, dynamic = PagedCache(model.config), DynamicCache(config=eager.config)
        extend(model, paged, input_ids, mask)
        extend(eager, dynamic, input_ids, mask)
        real = mask.bool()[:, None, :, None]
        for ours, theirs in zip(paged.layers, dynamic.layers, strict=True):
            for mine, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                assert mine.shape == other.shape
                torch.testing.assert_close(torch.clone(mine), other * real, rtol=0, atol=1e-5)

    def test_holes_between_turns_take_no_room(self, model):
        turns = [ragged_batch([9, 4, 6], "right", seed=1), ragged_batch([3, 8, 1], "left", seed=2)]
        cache, mask, logits = PagedCache(model.config), torch.zeros(3, 0, dtype=torch.long), []
        for input_ids, turn_mask in turns:
            mask = torch.cat([mask, turn_mask], 1)
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
            with torch.no_grad():
                logits.append(
                    model(
                        input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache
                    ).logits
                )
        assert cache.memory().tokens == int(mask.sum())
        input_ids, logits = torch.cat([ids for ids, _ in turns], 1), torch.cat(logits, 1)
        for row in range(3):
            real = mask[row].bool()
            alone = extend(model, PagedCache(model.config), input_ids[row][real][None])
            torch.testing.assert_close(logits[row][real], alone[0], rtol=0, atol=1e-4)

    def test_an_empty_row_in_a_chunk_stores_nothing(self, model):
        input_ids, mask = ragged_batch([12, 3])
        cache = PagedCache(model.config)
        extend(model, cache, input_ids[:, :6], mask[:, :6])  # row 1 is padding so far
        assert cache.groups[0].manager.lengths.tolist() == [6, 0]
        logits = extend(model, cache, input_ids[:, 6:], mask)
        whole = extend(model, PagedCache(model.config), input_ids, mask)[:, 6:]
        torch.testing.assert_close(logits[mask[:, 6:].bool()], whole[mask[:, 6:].bool()], rtol=0, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("implementation", ["paged_flash", "eager"])
    def test_dtype_of_the_store(self, dtype, implementation):
        model = tiny_model(tiny_config("llama"), implementation)
        input_ids, mask = ragged_batch([20, 9])
        cache = PagedCache(model.config, dtype=dtype)
        with torch.no_grad():
            model(input_ids[:, :12], attention_mask=mask[:, :12], past_key_values=cache)
            logits = model(input_ids[:, 12:], attention_mask=mask, past_key_values=cache).logits
            exact = model(input_ids, attention_mask=mask, use_cache=False).logits[:, 12:]
        assert logits.dtype == torch.float32
        assert all(layer.pool.key.dtype == layer.pool.value.dtype == dtype for layer in cache.layers)
        assert cache.memory().bytes_stored == cache.memory().tokens * ROW_BYTES * dtype.itemsize // 4
        real = mask[:, 12:].bool()
        error = (logits - exact)[real].abs().max() / exact[real].abs().max()
        assert error <= {2: 0.05, 8: 1e-5}[dtype.itemsize]

    def test_the_users_bool_mask_may_change_afterwards(self, model):
        input_ids, mask = ragged_batch([12, 5])
        buffer = mask.bool()
        cache = PagedCache(model.config)
        extend(model, cache, input_ids[:, :10], buffer[:, :10])
        buffer.fill_(True)
        assert cache.groups[0].real_columns().tolist() == mask[:, :10].bool().tolist()
        with pytest.raises(ArgumentError, match=r"row 1, column 0 was padding"):
            extend(model, cache, input_ids[:, 10:], buffer)


class TestGrowthAndCaps:
    def test_tokens_beyond_the_first_pool(self, model, eager):
        input_ids, mask = ragged_batch([10, 3])
        cache = PagedCache(model.config)
        options = {"max_new_tokens": 80, "do_sample": False}
        ours = model.generate(input_ids, attention_mask=mask, past_key_values=cache, **options)
        assert torch.equal(ours, eager.generate(input_ids, attention_mask=mask, **options))
        assert cache.memory().tokens == 13 + 2 * 79
        assert cache.memory().blocks_used == -(-(10 + 79) // 16) + -(-(3 + 79) // 16)

    @pytest.mark.parametrize("cap", [{"num_blocks": 5}, {"max_memory": 5 * 16 * ROW_BYTES}, {"max_memory": "60.5KiB"}])
    def test_a_full_cache_says_so_and_stays_usable(self, model, cap):
        input_ids, mask = ragged_batch([40, 20])  # 3 + 2 blocks
        cache = PagedCache(model.config, **cap)
        extend(model, cache, input_ids, mask)
        before, memory = stored(cache), cache.memory()
        assert memory.bytes_reserved == 5 * 16 * ROW_BYTES
        more, more_mask = ragged_batch([20, 20], None, seed=5)
        with pytest.raises(CacheFullError, match="needed") as raised:
            extend(model, cache, more, torch.cat([mask, more_mask], 1))
        assert (raised.value.blocks_needed, raised.value.blocks_free) == (2, 0)
        assert cache.memory() == memory
        assert cache.get_seq_length() == 40
        assert all(torch.equal(a, b) for a, b in zip(before, stored(cache), strict=True))
        # 8 more tokens a row fit
        logits = extend(model, cache, more[:, :8], torch.cat([mask, more_mask[:, :8]], 1))
        free = PagedCache(model.config)
        extend(model, free, input_ids, mask)
        assert torch.equal(logits, extend(model, free, more[:, :8], torch.cat([mask, more_mask[:, :8]], 1)))

    @pytest.mark.parametrize("cap", [{"num_blocks": 3}, {"max_memory": 3 * 16 * ROW_BYTES}, {"max_memory": "36.5KiB"}])
    def test_a_first_prompt_that_is_too_long(self, model, cap):
        cache = PagedCache(model.config, **cap)
        input_ids, _ = ragged_batch([49], None)
        with pytest.raises(CacheFullError) as raised:
            extend(model, cache, input_ids)
        assert (raised.value.blocks_needed, raised.value.blocks_free) == (4, 3)
        assert cache.memory().bytes_reserved == 0
        assert cache.get_seq_length() == 0
        logits = extend(model, cache, input_ids[:, :48])
        assert torch.equal(logits, extend(model, PagedCache(model.config), input_ids[:, :48]))
        assert cache.memory().bytes_reserved == 3 * 16 * ROW_BYTES

    def test_the_lower_of_two_caps_holds(self, model):
        cache = PagedCache(model.config, num_blocks=2, max_memory="1GiB")
        with pytest.raises(CacheFullError) as raised:
            extend(model, cache, ragged_batch([33], None)[0])
        assert raised.value.blocks_free == 2

    def test_a_batch_of_another_size_after_a_refusal(self, model):
        cache = PagedCache(model.config, num_blocks=3)
        with pytest.raises(CacheFullError):
            extend(model, cache, ragged_batch([20, 20], None)[0])
        assert extend(model, cache, ragged_batch([20], None)[0]).shape[0] == 1

    def test_full_in_the_middle_of_generate(self, model):
        input_ids, mask = ragged_batch([30, 11])
        cache = PagedCache(model.config, num_blocks=4)
        with pytest.raises(CacheFullError):
            model.generate(input_ids, attention_mask=mask, past_key_values=cache, max_new_tokens=40)
        held = cache.memory().tokens
        assert held > 41
        cache.crop(-(cache.get_seq_length() - 29))  # all of the prompt but its last token
        assert cache.memory().tokens == 41 - 2
        out = model.generate(input_ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2, do_sample=False)
        assert torch.equal(out, model.generate(input_ids, attention_mask=mask, max_new_tokens=2, do_sample=False))

    @pytest.mark.parametrize("failing", [0, 1, 2])
    def test_out_of_memory_in_the_first_forward(self, model, monkeypatch, failing):
        input_ids, mask = ragged_batch([40, 20])
        cache = PagedCache(model.config)
        with monkeypatch.context() as patch:
            out_of_memory_in(patch, {failing})
            with pytest.raises(CacheFullError, match="no memory for 5 more blocks") as raised:
                extend(model, cache, input_ids, mask)
            assert raised.value.blocks_needed == 5
        assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)
        assert cache.get_seq_length() == 0
        assert cache.memory().bytes_reserved == 0, "a smaller batch must find the memory free"
        logits = extend(model, cache, input_ids[1:, 20:])
        assert torch.equal(logits, extend(model, PagedCache(model.config), input_ids[1:, 20:]))
        assert cache.memory().blocks_used == 2

    @pytest.mark.parametrize("failing", [0, 1, 2])
    @pytest.mark.parametrize("shared", [False, True])
    def test_out_of_memory_while_growing(self, model, monkeypatch, failing, shared):
        input_ids, mask = ragged_batch([30, 11, 20])
        caches = [PagedCache(model.config) for _ in range(2)]
        for cache in caches:
            extend(model, cache, input_ids, mask)
            if shared:
                cache.reorder_cache(torch.tensor([1, 1, 1]))  # the next token of each needs a copy of its block
        cache, memory = caches[0], caches[0].memory()
        if shared:
            mask = mask[[1, 1, 1]]
        token = input_ids[:, :1] + 1
        more, more_mask = token.repeat(1, 20), torch.cat([mask, mask.new_ones(3, 20)], 1)
        before = stored(cache)
        with monkeypatch.context() as patch:
            out_of_memory_in(patch, {failing})
            with pytest.raises(CacheFullError, match="are intact"):
                extend(model, cache, more, more_mask)
        assert cache.get_seq_length() == 30
        assert (cache.memory().tokens, cache.memory().blocks_shared) == (memory.tokens, memory.blocks_shared)
        assert all(torch.equal(a, b) for a, b in zip(before, stored(cache), strict=True))
        for tokens, tokens_mask in ((token, more_mask[:, :31]), (more[:, 1:], more_mask)):
            ours, theirs = (extend(model, one, tokens, tokens_mask) for one in caches)
            assert torch.equal(ours, theirs)

    def test_another_error_while_growing_is_passed_on(self, model, monkeypatch):
        cache = PagedCache(model.config)
        extend(model, cache, ragged_batch([16], None)[0])
        with monkeypatch.context() as patch:
            patch.setattr(BlockPool, "grow", lambda self, blocks: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                extend(model, cache, ragged_batch([5], None)[0])
        assert (cache.get_seq_length(), cache.memory().blocks_used) == (16, 1)
        assert extend(model, cache, ragged_batch([5], None)[0]).shape == (1, 5, 97)

    def test_layers_of_different_sizes_share_one_cap(self):
        class Unequal(PagedCache):
            def fill(self, heads):
                for layer, count in enumerate(heads):
                    keys = torch.randn(1, count, 20, 8)
                    self.update(keys, keys, layer)

        config = tiny_config("llama")
        block_bytes = 16 * 8 * 4 * 2
        cache = Unequal(config, max_memory=2 * block_bytes * (1 + 1 + 4))
        cache.fill((1, 1, 4))
        assert cache.memory().bytes_reserved == 2 * block_bytes * 6
        cache = Unequal(config, max_memory=2 * block_bytes * (1 + 1 + 4) - 1)
        with pytest.raises(CacheFullError, match="max_memory"):
            cache.fill((1, 1, 4))
        assert (cache.get_seq_length(), cache.memory().bytes_reserved) == (0, 0)


class TestHalfAForward:
    def test_a_forward_that_stopped_half_way_is_noticed(self, model, monkeypatch):
        input_ids, _ = ragged_batch([12], None)
        cache = PagedCache(model.config)
        extend(model, cache, input_ids[:, :8])

        def broken(*args, **kwargs):
            raise RuntimeError("broken layer")

        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[1].self_attn, "forward", broken)
            with pytest.raises(RuntimeError, match="broken layer"):
                extend(model, cache, input_ids[:, 8:])
        with pytest.raises(PagedFlashError, match=r"stopped half way. Take it back with `crop\(-8\)`"):
            extend(model, cache, input_ids[:, 8:])
        cache.crop(-8)
        assert cache.get_seq_length() == 8
        logits = extend(model, cache, input_ids[:, 8:])
        whole = extend(model, PagedCache(model.config), input_ids)[:, 8:]
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("layer", [0, 1, 2])
    @pytest.mark.parametrize("length", [12, 16, 20])
    def test_rows_that_were_about_to_part_stay_together(self, model, monkeypatch, layer, length):
        """Layers that the broken forward did not reach hold nothing in the blocks it meant to copy to."""
        caches = [PagedCache(model.config) for _ in range(2)]
        for cache in caches:
            extend(model, cache, ragged_batch([length], None)[0])
            cache.batch_repeat_interleave(3)
        token = torch.tensor([[5], [6], [7]])

        def broken(*args, **kwargs):
            raise torch.OutOfMemoryError("in the layer")

        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[layer].mlp, "forward", broken)
            with pytest.raises(torch.OutOfMemoryError):
                extend(model, caches[0], token)
        caches[0].crop(-1)
        for held in ("tokens", "blocks_used", "blocks_shared"):
            assert getattr(caches[0].memory(), held) == getattr(caches[1].memory(), held)
        assert torch.equal(extend(model, caches[0], token), extend(model, caches[1], token))

    def test_no_room_for_what_a_step_needs_itself(self, model, monkeypatch):
        cache = PagedCache(model.config)
        extend(model, cache, ragged_batch([12, 12], None)[0])
        cache.batch_select_indices(torch.tensor([0, 0]))
        memory = cache.memory()

        def broken(*args, **kwargs):
            raise torch.OutOfMemoryError("in the step")

        with monkeypatch.context() as patch:
            patch.setattr(page_group, "to_device", broken)
            with pytest.raises(torch.OutOfMemoryError):
                extend(model, cache, torch.tensor([[5], [6]]))
        assert cache.memory() == memory
        assert cache.get_seq_length() == 12
        assert extend(model, cache, torch.tensor([[5], [6]])).shape == (2, 1, 97)
        assert cache.groups[0].manager.lengths.tolist() == [13, 13]


class TestRowsAndColumns:
    @pytest.mark.parametrize("pad", ["left", "right"])
    @pytest.mark.parametrize("by", ["negative", "positive"])
    def test_crop(self, model, pad, by):
        input_ids, mask = ragged_batch([30, 7, 19], pad)
        cache = PagedCache(model.config)
        extend(model, cache, input_ids, mask)
        cache.crop(-13 if by == "negative" else 17)
        memory = cache.memory()
        assert cache.get_seq_length() == 17
        assert [layer.keys.shape[2] for layer in cache.layers] == [17] * 3
        assert memory.tokens == int(mask[:, :17].sum())
        assert memory.blocks_used == sum(-(-int(n) // 16) for n in mask[:, :17].sum(1))
        logits = extend(model, cache, input_ids[:, 17:], mask)
        whole = extend(model, PagedCache(model.config), input_ids, mask)
        real = mask[:, 17:].bool()
        torch.testing.assert_close(logits[real], whole[:, 17:][real], rtol=0, atol=1e-4)
        assert cache.memory().tokens == int(mask.sum())

    def test_crop_of_nothing_and_of_everything(self, model):
        input_ids, mask = ragged_batch([20, 9])
        cache = PagedCache(model.config)
        extend(model, cache, input_ids, mask)
        before = cache.memory()
        cache.crop(0)
        cache.crop(20)
        cache.crop(50)
        assert cache.memory() == before
        with pytest.raises(ArgumentError, match="is -21, the cache holds 20 columns"):
            cache.crop(-21)
        cache.crop(-20)
        assert (cache.get_seq_length(), cache.memory().blocks_used) == (0, 0)
        one = extend(model, cache, input_ids[:1])  # another batch size may follow
        assert torch.equal(one, extend(model, PagedCache(model.config), input_ids[:1]))

    def test_crop_leaves_shared_blocks_to_the_others(self, model):
        cache = PagedCache(model.config)
        extend(model, cache, ragged_batch([40], None)[0])
        cache.batch_repeat_interleave(2)
        cache.crop(-20)
        assert (cache.memory().blocks_used, cache.memory().blocks_shared) == (2, 2)
        extend(model, cache, ragged_batch([5, 5], None)[0])
        assert (cache.memory().blocks_used, cache.memory().blocks_shared) == (3, 1)

    @pytest.mark.parametrize(
        ("change", "rows"),
        [
            (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
            (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
            (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        ],
        ids=["reorder", "repeat", "select", "select-bool"],
    )
    def test_rows_move_without_their_keys(self, model, change, rows):
        input_ids, mask = ragged_batch([30, 7, 19])
        cache = PagedCache(model.config)
        extend(model, cache, input_ids, mask)
        pointers = [layer.pool.key.data_ptr() for layer in cache.layers]
        used = cache.memory().blocks_used
        change(cache)
        memory = cache.memory()
        assert [layer.pool.key.data_ptr() for layer in cache.layers] == pointers
        assert memory.blocks_used <= used
        lengths = mask.sum(1)
        assert memory.tokens == int(lengths[sorted(set(rows))].sum())
        blocks = [-(-int(length) // 16) for length in lengths]
        assert memory.blocks_shared == sum(blocks[row] for row in set(rows) if rows.count(row) > 1)
        # each row goes on as the row it was, and equal rows may now differ
        token = torch.arange(5, 5 + len(rows))[:, None].repeat(1, 3)
        longer = torch.cat([mask[rows], mask.new_ones(len(rows), 3)], 1)
        logits = extend(model, cache, token, longer)
        whole = extend(model, PagedCache(model.config), torch.cat([input_ids[rows], token], 1), longer)[:, -3:]
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-4)

    def test_rows_of_an_empty_cache(self, model):
        cache = PagedCache(model.config)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([0]))
        cache.crop(0)
        assert extend(model, cache, ragged_batch([4, 4], None)[0]).shape[0] == 2

    def test_one_prompt_continued_in_several_ways(self, model):
        prompt, _ = ragged_batch([40], None)
        endings, _ = ragged_batch([6] * 4, None, seed=3)
        cache = PagedCache(model.config)
        extend(model, cache, prompt)
        cache.batch_repeat_interleave(4)
        assert cache.memory().blocks_used == 3
        logits = extend(model, cache, endings)
        assert (cache.memory().blocks_used, cache.memory().tokens) == (2 + 4, 32 + 4 * 14)
        whole = extend(model, PagedCache(model.config), torch.cat([prompt.repeat(4, 1), endings], 1))[:, -6:]
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-4)

    def test_another_batch_size_is_refused(self, model):
        cache = PagedCache(model.config)
        extend(model, cache, ragged_batch([8, 8], None)[0])
        with pytest.raises(ArgumentError, match="holds 2 rows, got keys for 3"):
            extend(model, cache, ragged_batch([2, 2, 2], None)[0])
        assert cache.memory().tokens == 16
        assert extend(model, cache, ragged_batch([2, 2], None)[0]).shape[0] == 2

    STATES = {
        "more heads": (((2, 3, 1, 16), (2, 3, 1, 16)), r"layer 0 .* keys of .* \(2, 16\), the model makes \(3, 16\)"),
        "a wider head": (((2, 2, 1, 24), (2, 2, 1, 16)), r"layer 0 .* keys of .* the model makes \(2, 24\)"),
        "wider values": (((2, 2, 1, 16), (2, 2, 1, 24)), r"layer 0 .* values of .* the model makes \(2, 24\)"),
        "fewer values": (((2, 2, 2, 16), (2, 2, 1, 16)), "`value_states` must be as `key_states`"),
        "values of one row": (((2, 2, 1, 16), (1, 2, 1, 16)), "`value_states` must be as `key_states`"),
        "values of one head": (((2, 2, 1, 16), (2, 1, 1, 16)), "`value_states` must be as `key_states`"),
        "no heads": (((2, 1, 16), (2, 1, 16)), r"`key_states` must be \(batch, heads, tokens, head_dim\)"),
    }

    @pytest.mark.parametrize("wrong", STATES)
    @pytest.mark.parametrize("layer", [0, 1])
    def test_keys_of_another_shape_are_refused(self, model, wrong, layer):
        """Kernels would store them over others' tokens. In the middle of a forward what came before is taken back."""
        (key, value), match = self.STATES[wrong]
        cache = PagedCache(model.config)
        input_ids = ragged_batch([8, 8], None)[0]
        extend(model, cache, input_ids[:, :6])
        before = [torch.clone(layer.keys) for layer in cache.layers]
        for earlier in range(layer):
            cache.update(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16), earlier)
        with pytest.raises(ArgumentError, match=match.replace("layer 0", f"layer {layer}")):
            cache.update(torch.randn(key), torch.randn(value), layer)
        assert cache.get_seq_length() == 6
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
        expected = extend(model, PagedCache(model.config), input_ids)[:, 6:]
        torch.testing.assert_close(extend(model, cache, input_ids[:, 6:]), expected, rtol=0, atol=1e-4)

    def test_integers_are_refused(self, model):
        states = torch.ones(1, 2, 1, 16, dtype=torch.long)
        with pytest.raises(ArgumentError, match="`key_states` .* floating dtype, got .*int64"):
            PagedCache(model.config).update(states, states, 0)

    BAD = {
        "crop(1.5)": (lambda cache: cache.crop(1.5), "`tokens_to_remove` must be an integer, got 1.5"),
        "crop(True)": (lambda cache: cache.crop(True), "`tokens_to_remove` must be an integer, got True"),
        "repeat 0": (lambda cache: cache.batch_repeat_interleave(0), "`repeats` must be at least 1, got 0"),
        "repeat 1.5": (lambda cache: cache.batch_repeat_interleave(1.5), "`repeats` must be an integer, got 1.5"),
        "select none": (lambda cache: cache.batch_select_indices(torch.tensor([False] * 2)), "`indices` must name"),
        "reorder none": (lambda cache: cache.reorder_cache(torch.tensor([]).long()), "`beam_idx` must name"),
    }

    @pytest.mark.parametrize("bad", BAD)
    def test_bad_arguments_leave_the_cache_as_it_was(self, model, bad):
        call, match = self.BAD[bad]
        cache = PagedCache(model.config)
        extend(model, cache, ragged_batch([8, 5])[0])
        before = cache.memory()
        with pytest.raises(ArgumentError, match=match):
            call(cache)
        assert cache.memory() == before
        cache.crop(torch.tensor(-1))
        assert cache.get_seq_length() == 7

    def test_a_mask_that_rewrites_the_past_is_refused(self, model):
        input_ids, mask = ragged_batch([12, 5])
        cache = PagedCache(model.config)
        extend(model, cache, input_ids[:, :10], mask[:, :10])
        for row, column, word in ((1, 2, "padding"), (0, 4, "a token")):
            other = mask.clone()
            other[row, column] = 1 - other[row, column]
            with pytest.raises(ArgumentError, match=f"row {row}, column {column} was {word}"):
                extend(model, cache, input_ids[:, 10:], other)
        assert cache.get_seq_length() == 10
        extend(model, cache, input_ids[:, 10:], mask)

    @pytest.mark.parametrize("columns", [2, 9, 13])
    def test_a_mask_of_another_width_is_refused(self, model, columns):
        cache = PagedCache(model.config)
        extend(model, cache, ragged_batch([8, 8], None)[0])
        with pytest.raises(ArgumentError, match=r"8 cached and 2 new columns of 2 rows, shape \(2, 10\), got"):
            extend(model, cache, ragged_batch([2, 2], None)[0], torch.ones(2, columns, dtype=torch.long))
        assert cache.get_seq_length() == 8

    def test_a_mask_may_be_left_out_where_nothing_is_padded(self, model):
        input_ids, _ = ragged_batch([12, 12], None)
        cache = PagedCache(model.config)
        extend(model, cache, input_ids[:, :7])
        logits = extend(model, cache, input_ids[:, 7:], torch.ones(2, 12, dtype=torch.long))
        whole = extend(model, PagedCache(model.config), input_ids)[:, 7:]
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)


@pytest.fixture
def counting_on_device(monkeypatch):
    """Decode steps as on a GPU: no length is read back, the host plans with upper bounds."""
    taken = []

    def on_device(self, mask, q_length, device):
        chosen = q_length == 1 and self.columns > 0 and (mask is not None or not self._exact)
        taken.append(chosen)
        return chosen

    monkeypatch.setattr(PageGroup, "_counts_on_device", on_device)
    return taken


class TestCountingOnTheDevice:
    """What a GPU does in a decode step, on CPU tensors."""

    @pytest.mark.parametrize("pad", ["left", "right"])
    def test_generate(self, model, eager, counting_on_device, pad):
        options = {"max_new_tokens": 40, "do_sample": False}
        lengths = [30, 16, 1]
        ours = model.generate(ragged_batch(lengths, pad)[0], attention_mask=ragged_batch(lengths, pad)[1], **options)
        input_ids, mask = ragged_batch(lengths)
        assert torch.equal(ours[:, 30:], eager.generate(input_ids, attention_mask=mask, **options)[:, 30:])
        assert sum(counting_on_device) == 39

    def test_beams(self, model, eager, counting_on_device):
        input_ids, mask = ragged_batch([30, 16, 1])
        options = {"max_new_tokens": 20, "do_sample": False, "num_beams": 4}
        ours = model.generate(input_ids, attention_mask=mask, **options)
        assert torch.equal(ours, eager.generate(input_ids, attention_mask=mask, **options))
        assert any(counting_on_device)

    def test_rows_that_pause(self, model, counting_on_device):
        """Padding in decode steps: the host counts it as a token until the truth is read."""
        input_ids, mask = ragged_batch([20, 15, 3])
        steps, _ = ragged_batch([40] * 3, None, seed=4)
        pauses = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.5
        mask = torch.cat([mask, (~pauses).long()], 1)
        tokens = torch.cat([input_ids, steps], 1)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        cache, logits = PagedCache(model.config), []
        with torch.no_grad():
            for start, end in [(0, 20)] + [(20 + i, 21 + i) for i in range(30)] + [(50, 60)]:
                part = {"attention_mask": mask[:, :end], "position_ids": position_ids[:, start:end]}
                logits.append(model(tokens[:, start:end], past_key_values=cache, **part).logits)
                if end == 33:
                    assert cache.groups[0].manager.lengths.sum() > mask[:, :33].sum()  # bounds
                    assert cache.memory().tokens == int(mask[:, :33].sum())  # the truth
                if end == 40:
                    cache.crop(-3)
                    part = {"attention_mask": mask[:, :40], "position_ids": position_ids[:, 37:40]}
                    model(tokens[:, 37:40], past_key_values=cache, **part)
        assert sum(counting_on_device) == 30
        assert cache.memory().tokens == int(mask.sum())
        assert cache.memory().blocks_used == sum(-(-int(n) // 16) for n in mask.sum(1))
        logits = torch.cat(logits, 1)
        for row in range(3):
            real = mask[row].bool()
            alone = extend(model, PagedCache(model.config), tokens[row][real][None])
            torch.testing.assert_close(logits[row][real], alone[0], rtol=0, atol=1e-4)

    def test_forks_and_rows_that_move(self, model, counting_on_device):
        """Between decode steps of which the host knows bounds alone, and in which rows pause."""
        input_ids, mask = ragged_batch([20, 15, 3])
        steps, _ = ragged_batch([9] * 3, None, seed=4)
        mask = torch.cat([mask, torch.tensor([[1] * 9, [1, 0, 0] * 3, [0] * 4 + [1] * 5])], 1)
        tokens = torch.cat([input_ids, steps], 1)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        cache = PagedCache(model.config)

        @torch.no_grad()
        def step(cache, rows, start, end):
            part = {"attention_mask": mask[rows, :end], "position_ids": position_ids[rows, start:end]}
            return model(tokens[rows, start:end], past_key_values=cache, **part).logits

        for start, end in [(0, 20), *((i, i + 1) for i in range(20, 26))]:
            step(cache, [0, 1, 2], start, end)
        forks = {(2, 0): cache.fork([2, 0]), (1, 1): cache.fork([1, 1]), (0, 1, 2): cache}
        for rows, fork in forks.items():
            logits = torch.cat([step(fork, list(rows), column, column + 1) for column in range(26, 29)], 1)
            for index, row in enumerate(rows):
                real = mask[row].bool()
                alone = extend(model, PagedCache(model.config), tokens[row][real][None])[0]
                last = real[26:]
                torch.testing.assert_close(logits[index][last], alone[len(alone) - last.sum() :], rtol=0, atol=1e-4)
        lengths = mask.sum(1)
        for rows, fork in forks.items():
            fork.memory()
            assert fork.groups[0].manager.lengths.tolist() == lengths[list(rows)].tolist()
        assert sum(counting_on_device) == 6 + 3 * 3

    @pytest.mark.parametrize("failing", [0, 2])
    def test_out_of_memory(self, model, counting_on_device, monkeypatch, failing):
        input_ids, mask = ragged_batch([32, 16])
        token, mask = torch.tensor([[5], [6]]), torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        caches = [PagedCache(model.config) for _ in range(2)]
        for cache in caches:
            extend(model, cache, input_ids, mask[:, :32])
        with monkeypatch.context() as patch:
            out_of_memory_in(patch, {failing})
            with pytest.raises(CacheFullError):
                extend(model, caches[0], token, mask)
        assert caches[0].memory().tokens == caches[1].memory().tokens == 48
        ours, theirs = (extend(model, cache, token, mask) for cache in caches)
        assert torch.equal(ours, theirs)


class TestLifetime:
    def test_reset_gives_the_memory_back(self, model):
        input_ids, mask = ragged_batch([20, 9])
        cache = PagedCache(model.config, num_blocks=3)
        first = extend(model, cache, input_ids, mask)
        pools = [weakref.ref(layer.pool.key) for layer in cache.layers]
        cache.reset()
        gc.disable()
        try:
            assert [pool() for pool in pools] == [None] * 3
        finally:
            gc.enable()
        assert cache.memory().bytes_reserved == cache.get_seq_length() == 0
        assert torch.equal(extend(model, cache, input_ids, mask), first)
        cache.reset()
        with pytest.raises(CacheFullError):  # the cap stays
            extend(model, cache, ragged_batch([49], None)[0])

    @pytest.mark.parametrize("use", ["forward", "generate", "crop", "full"])
    def test_dropping_the_cache_frees_it_without_the_garbage_collector(self, model, use):
        gc.collect()
        gc.disable()
        try:
            input_ids, mask = ragged_batch([20, 9])
            cache = PagedCache(model.config, num_blocks=6)
            if use == "generate":
                model.generate(input_ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4)
            else:
                extend(model, cache, input_ids, mask)
            if use == "crop":
                cache.crop(-3)
                extend(model, cache, input_ids[:, -3:], mask)
            if use == "full":
                with pytest.raises(CacheFullError):
                    extend(model, cache, ragged_batch([90, 90], None)[0])
            alive = [weakref.ref(layer.pool.key) for layer in cache.layers] + [weakref.ref(cache)]
            del cache
            assert [reference() for reference in alive] == [None] * 4
        finally:
            gc.enable()

    def test_handles_of_a_forward_do_not_outlive_it(self, model):
        cache = PagedCache(model.config)
        extend(model, cache, ragged_batch([20], None)[0])
        assert cache.layers[0].keys.fresh is None

    def test_a_pickled_cache_goes_on(self, model):
        input_ids, mask = ragged_batch([20, 9])
        cache = PagedCache(model.config)
        extend(model, cache, input_ids[:, :15], mask[:, :15])
        other = pickle.loads(pickle.dumps(cache))
        assert other.memory() == cache.memory()
        assert torch.equal(
            extend(model, other, input_ids[:, 15:], mask), extend(model, cache, input_ids[:, 15:], mask)
        )

    def test_begun_under_inference_mode_continued_without(self, model):
        input_ids, mask = ragged_batch([20, 9])
        cache = PagedCache(model.config)
        with torch.inference_mode():
            model(input_ids[:, :12], attention_mask=mask[:, :12], past_key_values=cache)
        logits = [extend(model, cache, input_ids[:, s:e], mask[:, :e]) for s, e in ((12, 19), (19, 20))]
        whole = extend(model, PagedCache(model.config), input_ids, mask)[:, 12:]
        real = mask[:, 12:].bool()
        torch.testing.assert_close(torch.cat(logits, 1)[real], whole[real], rtol=0, atol=1e-4)
        with torch.inference_mode():
            model.generate(input_ids, attention_mask=mask, max_new_tokens=3)

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
    def test_threads_with_one_model(self, model, options):
        """Each with a cache of its own, or the one that generate() makes."""
        rows = 1 if "prompt_lookup_num_tokens" in options else 3
        batches = [
            ragged_batch([30, 7 + index, 19][:rows], ("left", "right")[index % 2 if rows > 1 else 0], seed=index)
            for index in range(4)
        ]
        options = {"max_new_tokens": 20, "do_sample": False} | options

        def run(index: int, cache: PagedCache | None) -> list[torch.Tensor]:
            ids, mask = batches[index]
            first = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
            mask = torch.cat([mask, mask.new_ones(rows, first.shape[1] - mask.shape[1])], 1)
            if cache is not None:
                cache.reset()
            return [first, model.generate(first, attention_mask=mask, past_key_values=cache, **options)]

        alone = [run(index, None) for index in range(4)]
        together, barrier = [None] * 4, threading.Barrier(4)

        def run_in_thread(index: int) -> None:
            barrier.wait()
            together[index] = run(index, PagedCache(model.config) if index < 2 else None)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            threads = [threading.Thread(target=run_in_thread, args=(index,)) for index in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
        for ours, theirs in zip(together, alone, strict=True):
            assert ours is not None and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    def test_a_cache_asked_for_its_sizes_elsewhere_takes_no_mask_of_another_forward(self, model, eager):
        input_ids, _ = ragged_batch([20], None)
        cache = PagedCache(eager.config)
        extend(eager, cache, input_ids)  # asks the cache for its mask sizes; eager's masks go elsewhere
        position_ids = torch.cat([torch.arange(9), torch.arange(11)])[None]
        with torch.no_grad():
            ours = model(input_ids, position_ids=position_ids, use_cache=False).logits
            theirs = eager(input_ids, position_ids=position_ids, use_cache=False).logits
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        cache = PagedCache(eager.config)
        extend(eager, cache, input_ids)
        padded = torch.ones_like(input_ids)
        padded[0, :5] = 0
        with torch.no_grad():
            model(input_ids, attention_mask=padded, use_cache=False)
        assert cache.groups[0].pending_mask is None and not cache.groups[0].is_announced


class TestUnderOtherImplementations:
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_tokens_are_the_same(self, eager, implementation):
        model = tiny_model(tiny_config("llama"), implementation)
        input_ids, mask = ragged_batch([20, 9, 13])
        cache, options = PagedCache(model.config), {"max_new_tokens": 12, "do_sample": False}
        ours = model.generate(input_ids, attention_mask=mask, past_key_values=cache, **options)
        assert torch.equal(ours, eager.generate(input_ids, attention_mask=mask, **options))

    def test_gradients_do_not_stop_silently(self, eager):
        input_ids, _ = ragged_batch([6], None)
        loss = eager(input_ids, labels=input_ids, past_key_values=PagedCache(eager.config)).loss
        with pytest.raises(UnsupportedFeatureError, match="gradients can't pass through a PagedCache"):
            loss.backward()

    def test_own_attention_code(self):
        config = AutoConfig.for_model("bloom", vocab_size=97, hidden_size=64, n_layer=2, n_head=4, eos_token_id=None)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        input_ids, mask = ragged_batch([14, 5])
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        ours = model.generate(input_ids, attention_mask=mask, past_key_values=PagedCache(config), **options)
        assert torch.equal(ours, model.generate(input_ids, attention_mask=mask, **options))


class TestConfigurations:
    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"block_size": 15}, r"`block_size` must be one of \(16, 32, 64, 128, 256\), got 15"),
            ({"block_size": "16"}, "`block_size` must be one of"),
            ({"num_blocks": 0}, "`num_blocks` must be an integer from 1, or None for no cap, got 0"),
            ({"num_blocks": 2.5}, "`num_blocks` must be an integer"),
            ({"num_blocks": "4"}, "`num_blocks` must be an integer"),
            ({"max_memory": 0}, "`max_memory` must be bytes above 0"),
            ({"max_memory": -5}, "`max_memory` must be bytes above 0"),
            ({"max_memory": 1e9}, "`max_memory` must be bytes above 0"),
            ({"max_memory": "lots"}, "`max_memory` must be bytes above 0 .* got 'lots'"),
            ({"dtype": "bfloat16"}, "`dtype` must be one of"),
            ({"dtype": torch.int8}, "`dtype` must be one of"),
        ],
    )
    def test_arguments_are_checked(self, arguments, match):
        with pytest.raises(ArgumentError, match=match):
            PagedCache(tiny_config("llama"), **arguments)

    def test_config_must_be_one(self, model):
        with pytest.raises(ArgumentError, match=r"`config` must be .*\(model.config\), got LlamaForCausalLM"):
            PagedCache(model)

    @pytest.mark.parametrize(("text", "size"), [("4MiB", 4 * 2**20), ("1.5GiB", 3 * 2**29), ("2GB", 2 * 10**9)])
    def test_sizes_with_units(self, text, size):
        assert PagedCache(tiny_config("llama"), max_memory=text).groups[0].pools.max_memory == size

    @pytest.mark.parametrize(
        ("arguments", "block"),
        [
            ({}, 16 * ROW_BYTES),
            ({"dtype": torch.bfloat16}, 8 * ROW_BYTES),
            ({"block_size": 64, "dtype": torch.float64}, 128 * ROW_BYTES),
        ],
    )
    def test_a_cap_below_one_block(self, model, arguments, block):
        with pytest.raises(ArgumentError, match=f"`max_memory` must be at least {block} bytes.*got {block - 1}"):
            PagedCache(model.config, max_memory=block - 1, **arguments)
        cache = PagedCache(model.config, max_memory=block, **arguments)
        extend(model, cache, ragged_batch([16], None)[0])
        assert cache.memory().blocks_used == 1

    def test_a_cap_below_one_block_of_an_unknown_size(self, model):
        config = tiny_config("llama")  # says nothing of a dtype
        assert config.dtype is None
        cache = PagedCache(config, max_memory=16 * ROW_BYTES - 1)
        message = f"`max_memory` is {16 * ROW_BYTES - 1} bytes, and one block of 16 tokens takes {16 * ROW_BYTES} in 3"
        with pytest.raises(CacheFullError, match=message) as raised:
            extend(model, cache, ragged_batch([1], None)[0])
        assert (raised.value.blocks_needed, raised.value.blocks_free) == (1, 0)
        assert cache.get_seq_length() == 0
        cache = PagedCache(config, max_memory=16 * ROW_BYTES - 1)
        keys = torch.zeros(1, 1, 1, 16), torch.zeros(1, 7, 1, 16)  # the first layer alone would fit
        with pytest.raises(CacheFullError, match="one block of 16 tokens takes"):
            for layer in range(3):
                cache.update(keys[layer > 0], keys[layer > 0], layer)

    def test_linear_attention_layers_keep_their_own_state(self):
        config = AutoConfig.for_model(
            "qwen3_next",
            **{"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
            **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4},
            **{"linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
            **{"pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1},
            layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        )
        model, eager = tiny_model(config, "paged_flash"), tiny_model(config, "eager")
        input_ids, mask = ragged_batch([14, 5])
        options = {"max_new_tokens": 8, "do_sample": False}
        out = model.generate(input_ids, attention_mask=mask, return_dict_in_generate=True, **options)
        assert torch.equal(out.sequences, eager.generate(input_ids, attention_mask=mask, **options))
        cache = out.past_key_values
        assert isinstance(cache, PagedCache)
        assert [type(layer).__name__ for layer in cache.layers] == ["LinearAttentionLayer"] * 3 + ["PagedLayer"]
        memory = cache.memory()
        assert memory.tokens == 14 + 5 + 2 * 7
        assert memory.bytes_reserved == memory.blocks_used * 16 * 2 * 2 * 16 * 4  # of the one attention layer

    def test_layers_that_share_keys(self):
        config = AutoConfig.for_model(
            "gemma3n_text",
            **{"vocab_size": 97, "vocab_size_per_layer_input": 97, "hidden_size": 64, "intermediate_size": [96] * 4},
            **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
            **{"sliding_window": 12, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16, "laurel_rank": 8},
            **{"activation_sparsity_pattern": [0.0] * 4, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1},
            layer_types=["sliding_attention", "full_attention"] * 2,
        )
        model, eager = tiny_model(config, "paged_flash"), tiny_model(config, "eager")
        input_ids, mask = ragged_batch([20, 5])
        options = {"max_new_tokens": 8, "do_sample": False}
        out = model.generate(input_ids, attention_mask=mask, return_dict_in_generate=True, **options)
        assert torch.equal(out.sequences, eager.generate(input_ids, attention_mask=mask, **options))
        assert isinstance(out.past_key_values, PagedCache)
        memory = out.past_key_values.memory()
        assert memory.tokens == 25 + 2 * 7
        assert memory.bytes_stored == memory.tokens * 2 * 2 * 2 * 16 * 4  # two layers store, two read theirs

    def test_layers_it_cannot_page_are_named(self):
        config = tiny_config("llama")
        config.layer_types = ["full_attention", "deepseek_sparse_attention", "full_attention"]
        with pytest.raises(UnsupportedFeatureError, match="layer 1 of LlamaConfig is of type `deep.*DynamicCache"):
            PagedCache(config)

    def test_a_model_without_keys_is_refused(self):
        with pytest.raises(UnsupportedFeatureError, match="no layer of MambaConfig has keys and values.*DynamicCache"):
            PagedCache(AutoConfig.for_model("mamba", num_hidden_layers=2))

    def test_offloading_a_layer_is_refused(self, model):
        cache = PagedCache(model.config)
        extend(model, cache, ragged_batch([4], None)[0])
        with pytest.raises(UnsupportedFeatureError, match="does not offload"):
            cache.layers[0].offload()
        with pytest.raises(UnsupportedFeatureError, match=r"call `PagedCache.crop`"):
            cache.layers[0].crop(-1)


@pytest.mark.parametrize("max_memory", [None, "1MiB"])
def test_sizes_that_differ_by_layer(max_memory):
    """Gemma 4's configuration raises where it is asked for the one head_dim of all layers."""
    config = AutoConfig.for_model("gemma4_text")
    assert len(PagedCache(config, max_memory=max_memory).layers) == config.num_hidden_layers


class TestLayersThatModelsCopy:
    """Models that run layers in loops (Dory) append copies of them to the cache before its first forward."""

    def test_a_copy_is_one_more_layer_of_the_group(self, model):
        cache = PagedCache(model.config)
        cache.layers.append(copy.deepcopy(cache.layers[0]))
        first, second = (torch.randn(2, 2, 5, 16) for _ in range(2))
        for layer in cache.layers[:3]:
            layer.update(first, -first)
        cache.layers[3].update(second, -second)
        cache.reorder_cache(torch.tensor([1, 1]))
        assert cache.memory().tokens == 5 and cache.memory().bytes_stored == 5 * ROW_BYTES * 4 // 3
        assert torch.equal(cache.layers[3].keys.clone(), second[[1, 1]])
        assert torch.equal(cache.layers[0].values.clone(), -first[[1, 1]])

    def test_a_layer_that_stores_tokens_is_not_copied(self, model):
        cache = PagedCache(model.config)
        extend(model, cache, ragged_batch([5])[0])
        with pytest.raises(UnsupportedFeatureError, match="one layer can't be copied"):
            copy.deepcopy(cache.layers[0])
