"""Generations much longer than the sliding window: eager's tokens, and memory that stays flat."""

from functools import partial

import pytest
import torch
from transformers import DynamicCache

from hf_paged_flash import ArgumentError, PagedCache
from hf_paged_flash.cache import PagedLayer
from hf_paged_flash.cache.page_group import PageGroup
from tests.integration.models import attentive_config, held, loaded_pairs, new_tokens
from tests.tiny_models import VOCAB_SIZE, ragged_batch, tiny_config, tiny_model

WINDOW = 8
LENGTHS = (30, 7, 19, 1)
NEW = 70
MODELS = ("mistral", "gemma3_text", "gpt_oss")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return loaded_pairs(partial(attentive_config, sliding_window=WINDOW), tmp_path_factory)


@pytest.fixture(params=MODELS)
def pair(request, pairs):
    return pairs(request.param)


def sliding(cache: PagedCache) -> PageGroup:
    return next(group for group in cache.groups if group.window is not None)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "top_k": 0, "temperature": 0.8},
        {"num_beams": 2},
        {"num_beams": 4, "early_stopping": True},
        {"num_beams": 8, "num_return_sequences": 3},
        {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
        {"prefill_chunk_size": 7},
        {"prefill_chunk_size": 17},
    ],
    ids=["greedy", "sample", "beams2", "beams4", "beams8", "samples", "chunks7", "chunks17"],
)
def test_batches(pair, options):
    input_ids, mask = ragged_batch(LENGTHS)
    outputs = []
    for model in (pair.eager, pair.paged):
        torch.manual_seed(5)
        if model is pair.eager:  # in chunks, eager with DynamicCache lets short rows see other padding
            options = {name: value for name, value in options.items() if name != "prefill_chunk_size"}
        outputs.append(new_tokens(model, input_ids, mask, max_new_tokens=NEW, **options))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("prompt", [5, 40])
@pytest.mark.parametrize("draft", ["assistant", "prompt lookup"])
def test_drafts_that_are_taken_back(pair, draft, prompt):
    input_ids = ragged_batch([prompt], None)[0]
    if draft == "assistant":
        config = pair.paged.config
        options = {"assistant_model": tiny_model(config, "paged_flash", seed=1)}
        # one that is right now and then: its weights are the model's, a little off
        with torch.no_grad():
            for ours, its in zip(pair.paged.parameters(), options["assistant_model"].parameters(), strict=True):
                its.copy_(ours + 0.02 * its.sign() * ours.abs().mean())
    else:
        input_ids = input_ids.repeat(1, 2)
        options = {"prompt_lookup_num_tokens": 5}
    cache = PagedCache(pair.paged.config)
    mask = torch.ones_like(input_ids)
    paged = new_tokens(pair.paged, input_ids, mask, max_new_tokens=NEW, past_key_values=cache, **options)
    assert torch.equal(paged, new_tokens(pair.eager, input_ids, mask, max_new_tokens=NEW))
    columns = cache.get_seq_length()
    group = sliding(cache)
    assert columns >= input_ids.shape[1] + NEW - 1
    assert group.manager.first.tolist() == [(columns - WINDOW + 1) // 16]
    assert cache.memory().blocks_used == sum(
        -(-columns // 16) - int(group.manager.first[0]) for group in cache.groups
    )


def test_memory_stays_flat(pair):
    input_ids, mask = ragged_batch(LENGTHS)
    cache, used = PagedCache(pair.paged.config), []
    with torch.no_grad():
        for start in range(30, 130):
            step = input_ids if start == 30 else torch.full((4, 1), start % 90 + 2)
            mask = mask if start == 30 else torch.cat([mask, mask.new_ones(4, 1)], 1)
            pair.paged(step, attention_mask=mask, past_key_values=cache)
            used.append(sliding(cache).blocks_used)
    assert max(used) <= 4 * 2  # a window of 8 lies in two blocks of 16 at most
    assert cache.memory().blocks_used == held(cache, mask.sum(1).tolist())[1]
    assert sliding(cache).pools.bytes_reserved <= 10 * sliding(cache).pools.block_bytes


def test_a_long_prompt_leaves_its_last_tokens_alone(pair):
    input_ids, mask = ragged_batch([200, 3])
    cache = PagedCache(pair.paged.config)
    with torch.no_grad():
        logits = pair.paged(input_ids, attention_mask=mask, past_key_values=cache).logits
        expected = pair.eager(input_ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=5e-5)
    group = sliding(cache)
    assert group.blocks_used == 2
    assert group.pools.bytes_reserved == 2 * group.pools.block_bytes


def test_other_attention_goes_on_with_the_cache(pair):
    """What has been given back reads as zeros, which its masks hide."""
    input_ids, _ = ragged_batch([60, 60], None)
    cache = PagedCache(pair.paged.config)
    model = pair.paged
    with torch.no_grad():
        for start, end in ((0, 40), (40, 41), (41, 42)):
            model(input_ids[:, start:end], past_key_values=cache)
        assert sliding(cache).manager.first.tolist() == [2, 2]
        other = tiny_model(model.config, "eager")
        other.load_state_dict(model.state_dict())
        logits = other(input_ids[:, 42:], past_key_values=cache).logits
        expected = pair.eager(input_ids).logits[:, 42:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)


def test_other_attention_alone_keeps_everything(pair):
    """No mask of ours says there that the layers keep to their window."""
    input_ids, mask = ragged_batch(LENGTHS)
    other = tiny_model(pair.paged.config, "eager")
    other.load_state_dict(pair.eager.state_dict())
    cache = PagedCache(other.config)
    assert torch.equal(
        new_tokens(other, input_ids, mask, past_key_values=cache), new_tokens(pair.eager, input_ids, mask)
    )
    assert not any(group.has_given_back for group in cache.groups)


class TestCrop:
    def test_back_to_any_column_where_the_past_was_recorded(self, pair):
        input_ids, mask = ragged_batch([60, 33])
        cache = PagedCache(pair.paged.config)
        cache.activate_past_recording()
        with torch.no_grad():
            pair.paged(input_ids, attention_mask=mask, past_key_values=cache)
            assert not sliding(cache).has_given_back
            cache.crop(-25)
            assert cache.get_seq_length() == 35
            # 35 and 8 tokens are left, of which the next token sees 7
            assert sliding(cache).manager.first.tolist() == [(35 - 7) // 16, (8 - 7) // 16]
            logits = pair.paged(input_ids[:, 35:], attention_mask=mask, past_key_values=cache).logits
            expected = pair.eager(input_ids, attention_mask=mask).logits[:, 35:]
        torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)

    def test_further_than_what_is_kept_is_refused_and_changes_nothing(self, pair):
        input_ids, mask = ragged_batch([60, 33])
        cache = PagedCache(pair.paged.config)
        with torch.no_grad():
            pair.paged(input_ids[:, :50], attention_mask=mask[:, :50], past_key_values=cache)
            memory = cache.memory()
            with pytest.raises(ArgumentError, match=r"window of 8 have given back .* `activate_past_recording\(\)`"):
                cache.crop(-20)
            assert cache.memory() == memory and cache.get_seq_length() == 50
            logits = pair.paged(input_ids[:, 50:], attention_mask=mask, past_key_values=cache).logits
            expected = pair.eager(input_ids, attention_mask=mask).logits[:, 50:]
        torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)
        cache.crop(-60)  # an empty cache needs nothing
        assert (cache.get_seq_length(), cache.memory().blocks_used) == (0, 0)
        assert torch.equal(new_tokens(pair.paged, input_ids, mask, past_key_values=cache),
                           new_tokens(pair.eager, input_ids, mask))  # fmt: skip

    def test_the_last_forward_can_always_be_taken_back(self, pair):
        input_ids, _ = ragged_batch([90], None)
        cache = PagedCache(pair.paged.config)
        with torch.no_grad():
            for start, end in ((0, 50), (50, 70), (70, 90)):
                pair.paged(input_ids[:, start:end], past_key_values=cache)
            cache.crop(-20)
            logits = pair.paged(input_ids[:, 70:], past_key_values=cache).logits
            expected = pair.eager(input_ids).logits[:, 70:]
        torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)

    def test_assisted_decoding_as_transformers_own_cache(self, pair):
        """The same rollbacks on both caches, keys compared where the window reaches."""
        input_ids, _ = ragged_batch([80], None)
        paged, dynamic = PagedCache(pair.paged.config), DynamicCache(config=pair.eager.config)
        paged.activate_past_recording()
        dynamic.activate_past_recording()
        with torch.no_grad():
            for start, end, dropped in ((0, 30, 4), (26, 33, 0), (33, 45, 11), (34, 35, 0), (35, 60, 1)):
                ours = pair.paged(input_ids[:, start:end], past_key_values=paged).logits
                theirs = pair.eager(input_ids[:, start:end], past_key_values=dynamic).logits
                torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5)
                paged.crop(-dropped)
                dynamic.crop(-dropped)
                assert paged.get_seq_length() == dynamic.get_seq_length() == end - dropped


def test_several_turns(pair):
    cache = PagedCache(pair.paged.config)
    input_ids, mask = torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)
    for turn in range(4):
        said, said_mask = ragged_batch((25, 25), None, seed=turn)
        input_ids, mask = torch.cat([input_ids, said], 1), torch.cat([mask, said_mask], 1)
        answer = new_tokens(pair.paged, input_ids, mask, past_key_values=cache, max_new_tokens=20)
        assert torch.equal(answer, new_tokens(pair.eager, input_ids, mask, max_new_tokens=20))
        input_ids, mask = torch.cat([input_ids, answer], 1), torch.cat([mask, torch.ones_like(answer)], 1)
    assert sliding(cache).blocks_used <= 2 * 2


def test_rows_end_where_they_are_chosen(pair):
    """Rows that are dropped or repeated take their place behind the window with them."""
    input_ids, mask = ragged_batch([60, 20, 33])
    cache, rows = PagedCache(pair.paged.config), [2, 0, 0]
    more = torch.arange(5, 17).reshape(3, 4)
    with torch.no_grad():
        pair.paged(input_ids, attention_mask=mask, past_key_values=cache)
        cache.reorder_cache(torch.tensor(rows))
        longer = torch.cat([mask[rows], mask.new_ones(3, 4)], 1)
        logits = pair.paged(more, attention_mask=longer, past_key_values=cache).logits
        whole = torch.cat([input_ids[rows], more], 1)
        position_ids = (longer.cumsum(1) - 1).clamp(min=0)
        expected = pair.eager(whole, attention_mask=longer, position_ids=position_ids).logits[:, -4:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)


def test_layers_of_other_sizes_and_layers_that_share_keys():
    """Gemma 4: global layers 512 wide with a KV head of their own, and layers that read an earlier one's keys."""
    config = tiny_config(
        "gemma4_text",
        vocab_size_per_layer_input=VOCAB_SIZE,
        num_hidden_layers=6,
        head_dim=16,
        global_head_dim=512,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=WINDOW,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=16,
        tie_word_embeddings=False,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )
    eager, paged = tiny_model(config, "eager"), tiny_model(config, "paged_flash")
    input_ids, mask = ragged_batch(LENGTHS)
    for options in ({}, {"num_beams": 4}, {"do_sample": True, "top_k": 0}):
        outputs = []
        for model in (eager, paged):
            torch.manual_seed(5)
            outputs.append(new_tokens(model, input_ids, mask, max_new_tokens=NEW, **options))
        assert torch.equal(*outputs)
    cache = PagedCache(config)
    new_tokens(paged, input_ids, mask, max_new_tokens=NEW, past_key_values=cache)
    assert [tuple(layer.pool.key.shape[2:]) for layer in cache.layers if isinstance(layer, PagedLayer)] == [
        (2, 16),
        (2, 16),
        (1, 512),
        (2, 16),
    ]
    lengths = [length + NEW - 1 for length in LENGTHS]
    memory = cache.memory()
    assert (memory.tokens, memory.blocks_used) == held(cache, lengths)
    sliding_tokens = sum(length - max(length - WINDOW, 0) // 16 * 16 for length in lengths)
    assert memory.bytes_stored == 4 * (sliding_tokens * 3 * 2 * 2 * 16 + sum(lengths) * 2 * 512)
