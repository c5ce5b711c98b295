"""Every way of generate() that repeats, reorders or rolls back rows: eager's tokens, blocks as theory counts them."""

import copy
import inspect

import numpy as np
import pytest
import torch
from transformers import DynamicCache
from transformers.generation.utils import GenerationMixin

from hf_paged_flash import PagedCache, counters
from hf_paged_flash.cache.layer_pools import LayerPools
from tests.integration.models import Pair, attentive_config, new_tokens, unpadded_runs
from tests.tiny_models import VOCAB_SIZE, ragged_batch, tiny_config, tiny_model

LENGTHS = (30, 7, 1)
NEW = 12
# top_k, 50 if nothing is said, would turn the last bit of a logit at its edge into -inf
SAMPLE = {"do_sample": True, "top_k": 0}
WAYS = {
    "sample": SAMPLE,
    "5 samples": SAMPLE | {"num_return_sequences": 5},
    "5 samples in chunks": SAMPLE | {"num_return_sequences": 5, "prefill_chunk_size": 11},
    "2 beams": {"num_beams": 2},
    "4 beams, stop early": {"num_beams": 4, "early_stopping": True, "num_return_sequences": 2},
    "4 beams, never stop early": {"num_beams": 4, "early_stopping": "never"},
    "8 beams": {"num_beams": 8, "num_return_sequences": 8},
    "3 beams in chunks": {"num_beams": 3, "prefill_chunk_size": 7},
    "beam sample": SAMPLE | {"num_beams": 4},
}


@pytest.fixture
def copied(monkeypatch):
    """How many blocks each step has copied."""
    counts = []
    original = LayerPools.copy_blocks

    def copy_blocks(self, copies: np.ndarray) -> None:
        counts.append(len(copies))
        original(self, copies)

    monkeypatch.setattr(LayerPools, "copy_blocks", copy_blocks)
    return counts


@pytest.fixture
def prefilled():
    """Rows and columns of each forward of a model, once it is watched."""
    seen, hooks = [], []

    def watch(model) -> list:
        def note(module, args, kwargs):
            seen.append(tuple(kwargs["input_ids"].shape))

        hooks.append(model.register_forward_pre_hook(note, with_kwargs=True))
        return seen

    yield watch
    for hook in hooks:
        hook.remove()


def _both(pair: Pair, input_ids, mask, **options) -> tuple[torch.Tensor, torch.Tensor, PagedCache]:
    outputs = []
    for model in (pair.eager, pair.paged):
        torch.manual_seed(5)
        options = {"do_sample": False, "max_new_tokens": NEW, "return_dict_in_generate": True} | options
        outputs.append(model.generate(input_ids, attention_mask=mask, **options))
    eager, paged = outputs
    assert isinstance(eager.past_key_values, DynamicCache) and isinstance(paged.past_key_values, PagedCache)
    return eager.sequences, paged.sequences, paged.past_key_values


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_eagers(pair, way):
    """With an end that rows reach at different steps, which is where early stopping matters."""
    end = int(unpadded_runs(pair.eager)[0, 3])
    eager, paged, _ = _both(pair, *ragged_batch(LENGTHS), eos_token_id=end, **WAYS[way])
    assert torch.equal(paged, eager)


@pytest.mark.parametrize("way", ["5 samples", "4 beams, stop early"])
def test_right_padding_equals_left_padding(pair, way):
    options = WAYS[way]
    left, mask = ragged_batch(LENGTHS)
    expected = _both(pair, left, mask, **options)[0]
    torch.manual_seed(5)
    options = {"do_sample": False, "max_new_tokens": NEW} | options
    right, mask = ragged_batch(LENGTHS, "right")
    ours = pair.paged.generate(right, attention_mask=mask, **options)
    assert torch.equal(ours[:, max(LENGTHS) :], expected[:, max(LENGTHS) :])


def _assistant(pair: Pair):
    """A smaller model of the same kind and the same seed, so that it is right at times."""
    changes = {"num_hidden_layers": 2}
    if getattr(pair.eager.config, "layer_types", None):
        changes["layer_types"] = pair.eager.config.layer_types[:2]
    if pair.eager.config.model_type == "gpt2":
        changes = {"n_layer": 2}
    return tiny_model(attentive_config(pair.eager.config.model_type, **changes), "paged_flash")


def test_an_assistant_with_convolutions_takes_its_tokens_back(tmp_path):
    """The layers that keep their own state must be told to remember it, on the assistant's PagedCache too."""
    config = tiny_config("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"])
    eager, paged = (tiny_model(config, name) for name in ("eager", "paged_flash"))
    input_ids, _ = ragged_batch([20], None)
    for seed in (0, 1):
        assistant = tiny_model(config, "paged_flash", seed=seed)
        cache = PagedCache(config)
        ours = new_tokens(paged, input_ids, None, assistant_model=assistant, past_key_values=cache)
        assert torch.equal(ours, new_tokens(eager, input_ids, None))


@pytest.mark.parametrize("way", ["5 samples", "4 beams, stop early"])
def test_inputs_embeds(load, prefilled, way):
    pair = load("llama")
    input_ids, mask = ragged_batch(LENGTHS)
    options = {"do_sample": False, "max_new_tokens": NEW} | WAYS[way]
    outputs, rows = [], []
    hook = pair.paged.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["inputs_embeds"])) if not rows else None, with_kwargs=True
    )
    for model in (pair.eager, pair.paged):
        torch.manual_seed(5)
        embeds = model.get_input_embeddings()(input_ids).detach()
        outputs.append(model.generate(inputs_embeds=embeds, attention_mask=mask, **options))
    hook.remove()
    assert torch.equal(*outputs)
    assert rows == [3]


def _held(cache: PagedCache, length: int) -> tuple[int, int]:
    """(tokens, blocks) of a row after which a window, where there is one, has given back what it left behind."""
    first = [max(length - group.window + 1, 0) // 16 if group.window else 0 for group in cache.groups]
    return length - 16 * min(first), sum(-(-length // 16) - skipped for skipped in first)


@pytest.mark.parametrize("helper", ["a smaller model", "the model itself", "prompt lookup"])
def test_assisted(pair, helper):
    input_ids = ragged_batch([9], None)[0].repeat(1, 3)  # a prompt with something to look up
    if helper == "prompt lookup":
        options = {"prompt_lookup_num_tokens": 4}
    else:
        assistant = _assistant(pair) if helper == "a smaller model" else pair.paged
        options = {"assistant_model": assistant}
    expected = new_tokens(pair.eager, input_ids, torch.ones_like(input_ids))
    cache = PagedCache(pair.paged.config)
    paged = new_tokens(pair.paged, input_ids, torch.ones_like(input_ids), past_key_values=cache, **options)
    assert torch.equal(paged, expected)
    assert cache.get_seq_length() <= 27 + expected.shape[1]
    assert (cache.memory().tokens, cache.memory().blocks_used) == _held(cache, cache.get_seq_length())


def test_hidden_states_and_scores_are_those_of_the_rows(load):
    pair = load("llama")
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_hidden_states": True}
    outputs = []
    for model in (pair.eager, pair.paged):
        torch.manual_seed(5)
        options |= SAMPLE | {"num_return_sequences": 3, "output_logits": True}
        outputs.append(model.generate(*[ragged_batch(LENGTHS)[0]], attention_mask=ragged_batch(LENGTHS)[1], **options))
    eager, paged = outputs
    torch.testing.assert_close(torch.stack(paged.logits), torch.stack(eager.logits), rtol=0, atol=5e-5)
    real = ragged_batch(LENGTHS)[1].bool().repeat_interleave(3, 0)
    for step, (ours, theirs) in enumerate(zip(paged.hidden_states, eager.hidden_states, strict=True)):
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.shape == other.shape
            kept = real if step == 0 else slice(None)
            torch.testing.assert_close(mine[kept], other[kept], rtol=0, atol=1e-4)


class TestBlocksAreCounted:
    @pytest.mark.parametrize(("length", "copies"), [(40, 15), (32, 0), (7, 15)])
    def test_16_samples(self, load, copied, prefilled, length, copies):
        """The prompt is computed and stored once; its last block, if partial, is copied for all samples but one."""
        pair, cache = load("llama"), PagedCache(load("llama").paged.config)
        seen = prefilled(pair.paged)
        options = SAMPLE | {"num_return_sequences": 16, "past_key_values": cache}
        pair.paged.generate(ragged_batch([length], None)[0], max_new_tokens=2, **options)
        assert seen == [(1, length), (16, 1)]
        assert sum(copied) == copies and len(copied) <= 1
        assert counters().reference.get("copy_blocks", 0) == len(copied)
        whole, rest = divmod(length, 16)
        memory = cache.memory()
        assert memory.blocks_used == whole + 16
        assert memory.blocks_shared == whole
        assert memory.tokens == whole * 16 + 16 * (rest + 1)

    def test_16_samples_of_a_ragged_batch_to_the_end(self, load, copied):
        pair, cache = load("llama"), PagedCache(load("llama").paged.config)
        input_ids, mask = ragged_batch([40, 7, 16])
        options = SAMPLE | {"num_return_sequences": 16, "past_key_values": cache, "max_new_tokens": 33}
        pair.paged.generate(input_ids, attention_mask=mask, **options)
        assert sum(copied) == 2 * 15
        memory, new = cache.memory(), 32
        assert memory.tokens == sum(n // 16 * 16 + 16 * (n % 16 + new) for n in (40, 7, 16))
        assert memory.blocks_used == sum(n // 16 + 16 * -(-(n % 16 + new) // 16) for n in (40, 7, 16))
        assert memory.blocks_shared == 2 + 0 + 1

    def test_beams_store_the_prompt_once(self, load, prefilled):
        pair, cache = load("llama"), PagedCache(load("llama").paged.config)
        seen = prefilled(pair.paged)
        options = {"num_beams": 8, "past_key_values": cache, "do_sample": False}
        pair.paged.generate(ragged_batch([64], None)[0], max_new_tokens=10, **options)
        assert seen == [(1, 64)] + [(8, 1)] * 9
        memory = cache.memory()
        assert 4 < memory.blocks_used <= 4 + 8
        assert memory.blocks_shared >= 4
        assert 64 + 9 <= memory.tokens <= 64 + 8 * 9

    def test_a_chat_is_continued_in_several_ways(self, load, prefilled):
        """A cache of one row serves 4 samples: only the new turn is computed, once."""
        pair, cache = load("llama"), PagedCache(load("llama").paged.config)
        said, _ = ragged_batch([30], None)
        answer = pair.paged.generate(said, past_key_values=cache, max_new_tokens=5, do_sample=False)
        turn = torch.cat([answer, ragged_batch([6], None, seed=3)[0]], 1)
        seen = prefilled(pair.paged)
        torch.manual_seed(5)
        options = SAMPLE | {"num_return_sequences": 4, "max_new_tokens": NEW}
        ours = pair.paged.generate(turn, past_key_values=cache, **options)
        torch.manual_seed(5)
        assert torch.equal(ours, pair.eager.generate(turn, **options))
        assert seen[:2] == [(1, 7), (4, 1)]
        assert cache.memory().blocks_shared == 41 // 16


def test_a_prompt_copied_for_many_questions(pair):
    """The idiom of transformers' documentation: deepcopy of a prompt's cache."""
    prompt, _ = ragged_batch([37], None)
    cache = PagedCache(pair.paged.config)
    with torch.no_grad():
        pair.paged(prompt, past_key_values=cache)
    for question in range(3):
        asked = torch.cat([prompt, ragged_batch([3 + question], None, seed=question)[0]], 1)
        mine = copy.deepcopy(cache)
        ours = new_tokens(pair.paged, asked, None, past_key_values=mine, max_new_tokens=8)
        assert torch.equal(ours, new_tokens(pair.eager, asked, None, max_new_tokens=8))
        full = [group.blocks_used for group in mine.groups if group.window is None]
        # shared, its own, the copy's
        assert all(blocks == 2 + 1 + -(-(asked.shape[1] + 7 - 32) // 16) for blocks in full)
        assert cache.get_seq_length() == 37
    del mine
    assert (cache.memory().tokens, cache.memory().blocks_used) == _held(cache, 37)


def test_forks_of_a_chat_go_their_own_ways(pair):
    input_ids, mask = ragged_batch(LENGTHS)
    cache = PagedCache(pair.paged.config)
    first = new_tokens(pair.paged, input_ids, mask, past_key_values=cache, max_new_tokens=6)
    chat, mask = torch.cat([input_ids, first], 1), torch.cat([mask, torch.ones_like(first)], 1)
    forks = [(cache, [0, 1, 2]), (cache.fork(), [0, 1, 2]), (cache.fork([2, 0]), [2, 0]), (cache.fork(1), [1])]
    for seed, (fork, rows) in enumerate(forks):
        said = torch.cat([chat[rows], ragged_batch([4] * len(rows), None, seed=seed)[0]], 1)
        said_mask = torch.cat([mask[rows], mask.new_ones(len(rows), 4)], 1)
        ours = new_tokens(pair.paged, said, said_mask, past_key_values=fork, max_new_tokens=8)
        assert torch.equal(ours, new_tokens(pair.eager, said, said_mask, max_new_tokens=8))


def test_rows_that_are_done_are_released(load):
    pair = load("llama")
    input_ids, mask = ragged_batch(LENGTHS)
    cache = PagedCache(pair.paged.config)
    tokens = new_tokens(pair.paged, input_ids, mask, past_key_values=cache, max_new_tokens=6)
    cache.release(1)
    assert cache.memory().tokens == 30 + 1 + 2 * 5
    rows = [0, 2]
    chat = torch.cat([input_ids, tokens], 1)[rows]
    chat_mask = torch.cat([mask, torch.ones_like(tokens)], 1)[rows]
    ours = new_tokens(pair.paged, chat, chat_mask, past_key_values=cache, max_new_tokens=6)
    assert torch.equal(ours, new_tokens(pair.eager, chat, chat_mask, max_new_tokens=6))


class TestTransformersWayIsKept:
    def test_for_a_model_that_repeats_its_inputs_itself(self, load, prefilled, monkeypatch):
        pair = load("llama")
        expand = inspect.getattr_static(GenerationMixin, "_expand_inputs_for_generation")
        is_static = isinstance(expand, staticmethod)  # in older versions
        own = staticmethod(lambda **kwargs: expand(**kwargs)) if is_static else lambda self, **kw: expand(self, **kw)
        monkeypatch.setattr(type(pair.paged), "_expand_inputs_for_generation", own)
        self._check(pair, prefilled, rows=3)

    def test_where_an_input_changed_after_it_was_repeated(self, load, prefilled, monkeypatch):
        pair = load("llama")
        sample = type(pair.paged)._sample

        def other_mask(self, input_ids, **kwargs):
            return sample(self, input_ids, **kwargs | {"attention_mask": torch.ones_like(input_ids)})

        monkeypatch.setattr(type(pair.paged), "_sample", other_mask)
        self._check(pair, prefilled, rows=3)

    def test_and_left_for_a_plain_one(self, load, prefilled):
        self._check(load("llama"), prefilled, rows=1)

    def _check(self, pair: Pair, prefilled, rows: int) -> None:
        input_ids, _ = ragged_batch([20], None)
        options = SAMPLE | {"num_return_sequences": 3, "max_new_tokens": NEW}
        torch.manual_seed(5)
        expected = pair.eager.generate(input_ids, **options)
        seen = prefilled(pair.paged)
        torch.manual_seed(5)
        assert torch.equal(pair.paged.generate(input_ids, **options), expected)
        assert seen[0] == (rows, 20)

    def test_on_other_caches(self, load, prefilled):
        pair = load("llama")
        seen = prefilled(pair.paged)
        options = SAMPLE | {"num_return_sequences": 3, "max_new_tokens": 3}
        pair.paged.generate(ragged_batch([20], None)[0], past_key_values=DynamicCache(), **options)
        pair.paged.generate(ragged_batch([20], None)[0], use_cache=False, **options)
        assert seen[0] == (3, 20) and (3, 22) in seen

    def test_on_a_cache_of_the_repeated_rows(self, load):
        pair, cache = load("llama"), PagedCache(load("llama").paged.config)
        options = SAMPLE | {"num_return_sequences": 3, "max_new_tokens": 4}
        said = pair.paged.generate(ragged_batch([20], None)[0], past_key_values=cache, **options)
        assert cache.batch_size == 3
        said = torch.cat([said, ragged_batch([2] * 3, None, seed=4)[0]], 1)
        ours = pair.paged.generate(said, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(ours, pair.eager.generate(said, max_new_tokens=NEW, do_sample=False))
        assert said.max() < VOCAB_SIZE


def test_the_inputs_kept_for_the_prefill_are_let_go(load, monkeypatch):
    """What the ids remember of the rows as given is gone once the prefill ran, or no PagedCache was there."""
    pair, seen = load("llama"), []
    original = GenerationMixin._prefill

    def prefill(self, input_ids, *args, **kwargs):
        out = original(self, input_ids, *args, **kwargs)
        seen.append(hasattr(input_ids, "unexpanded"))
        return out

    monkeypatch.setattr(GenerationMixin, "_prefill", prefill)
    for model in (pair.paged, pair.eager):
        model.generate(ragged_batch([9], None)[0], num_beams=2, max_new_tokens=2, do_sample=False)
    assert seen == [False, False]
