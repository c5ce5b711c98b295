"""Short prompts replayed as graphs, over a recorder on the CPU: eager's tokens, and the same cache."""

import gc
from types import FunctionType

import numpy as np
import pytest
import torch
from transformers import CompileConfig, DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_paged_flash import (
    CacheFullError,
    PagedCache,
    UnsupportedFeatureError,
    disable_prefix_caching,
    enable_prefix_caching,
)
from hf_paged_flash.cache import elastic_memory
from hf_paged_flash.generation import decode_graph, decode_loop
from hf_paged_flash.generation.looking import ModelChanged
from hf_paged_flash.generation.short_prompt import length_of
from tests.cache.fake_driver import FakeDriver
from tests.generation.recorder import Recorder
from tests.generation.runs import batch, generate, models, unpadded
from tests.tiny_models import ragged_batch, tiny_config, tiny_model

MODELS = ("llama", "qwen3", "gpt2", "gemma3_text", "mistral")


@pytest.fixture(autouse=True)
def elastic(recorders, monkeypatch):
    """Pools that grow in place, as on a GPU."""
    driver = FakeDriver(4096, 2**24)
    monkeypatch.setattr(elastic_memory, "driver_of", lambda device: driver)
    recorders.elastic = True
    yield driver
    decode_graph._of_models.clear()
    gc.collect()
    assert (driver.pages, driver.handles) == (0, 0)


@pytest.fixture
def prompts(monkeypatch):
    """How each prompt that was short enough came about: "warm-up", "capture", "replay", or None for otherwise."""
    seen = []
    original = decode_graph.DecodeGraphs.forward

    def forward(self, model, cache, inputs, finished=None, settings=None, packed=None):
        if packed is None:
            return original(self, model, cache, inputs, finished, settings)
        graphs, warm = len(self._graphs), len(self._warm)
        seen.append(None)
        outputs = original(self, model, cache, inputs, packed=packed)
        seen[-1] = "warm-up" if len(self._warm) > warm else "replay" if len(self._graphs) == graphs else "capture"
        return outputs

    monkeypatch.setattr(decode_graph.DecodeGraphs, "forward", forward)
    return seen


def test_new_caches_are_not_as_under_autocast(prompts):
    paged, eager = (tiny_model(tiny_config("llama"), name) for name in ("paged_flash", "eager"))
    expected = unpadded(eager, *batch("left"))
    with torch.autocast("cpu", torch.bfloat16):
        generate(paged, *batch("left"))
    for _ in range(4):
        assert torch.equal(generate(paged, *batch("left")), expected)
    assert prompts[-1] == "replay"


def test_a_want_of_memory_ends_with_its_call(prompts, monkeypatch):
    paged, eager = (tiny_model(tiny_config("llama"), name) for name in ("paged_flash", "eager"))
    expected = unpadded(eager, *batch("left"))
    original, failing = LlamaMLP.forward, []

    def forward(mlp, x):
        if failing:
            failing.clear()
            raise torch.OutOfMemoryError("simulated")
        return original(mlp, x)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    generate(paged, *batch("left"))
    failing.append(True)
    for _ in range(4):
        assert torch.equal(generate(paged, *batch("left")), expected)
    assert not failing and prompts[1] is None and prompts[-1] == "replay"


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("model_type", MODELS)
def test_tokens_are_eager_ones(model_type, side, prompts):
    paged, eager = models(model_type)
    expected = unpadded(eager, *batch(side))
    for _ in range(5):
        assert torch.equal(generate(paged, *batch(side)), expected)
    assert prompts[0] is None and "replay" in prompts[-2:]


def test_other_lengths_of_the_same_bucket(prompts):
    paged, eager = models("llama")
    for seed, lengths in enumerate([(30, 7), (17, 20), (5, 32), (31, 1), (32, 32)]):
        rows = ragged_batch(lengths, "left", seed=seed)
        assert torch.equal(generate(paged, *rows), generate(eager, *rows))
    assert prompts == [None, "warm-up", "warm-up", "replay", "replay"] or prompts[-1] == "replay"


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_hundreds_of_tokens(model_type, prompts):
    """Many times a window."""
    paged, eager = models(model_type)
    for seed, lengths in enumerate([(380, 290), (260, 384), (300, 301), (384, 1)]):
        input_ids, mask = ragged_batch(lengths, "left", seed=seed)
        expected = generate(eager, input_ids, mask, max_new_tokens=3)
        assert torch.equal(generate(paged, input_ids, mask, max_new_tokens=3), expected), lengths
    assert prompts[-1] == "replay"


def test_one_new_token_a_call(prompts):
    """No step is ever taken, and prompts are replayed all the same."""
    paged, eager = models("llama")
    input_ids, _ = ragged_batch([20], None)
    expected = generate(eager, input_ids, torch.ones_like(input_ids), max_new_tokens=1)
    for mask in (None, torch.ones_like(input_ids)) * 3:
        assert torch.equal(generate(paged, input_ids, mask, max_new_tokens=1), expected)
    assert prompts[-1] == "replay"


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mistral"])
def test_turns_on_one_cache(model_type, prompts):
    """Beyond a window, where padding would look at what was given back."""
    paged, eager = models(model_type)
    input_ids, mask = batch("left")
    caches = [PagedCache(paged.config) for _ in range(3)]
    for cache in caches:
        ids, known = input_ids, mask
        for turn in range(3):
            expected = generate(eager, ids, known, max_new_tokens=9)
            answer = generate(paged, ids, known, max_new_tokens=9, past_key_values=cache)
            assert torch.equal(answer, expected), f"turn {turn}"
            more = ragged_batch((4, 4, 4, 4), None, seed=turn)[0]
            ids = torch.cat([ids, answer, more], 1)
            known = torch.cat([known, known.new_ones(4, 13)], 1)
        assert cache.get_seq_length() == ids.shape[1] - 5
    assert "replay" in prompts or model_type != "llama"


@pytest.mark.parametrize("new", [1, 12])
def test_prefixes(prompts, new):
    paged, eager = models("llama")
    system = ragged_batch([50], None, seed=9)[0]
    try:
        enable_prefix_caching(paged)
        for seed in range(5):
            input_ids = torch.cat([system, ragged_batch([10 + seed], None, seed=seed)[0]], 1)
            mask = torch.ones_like(input_ids)
            expected = generate(eager, input_ids, mask, max_new_tokens=new)
            assert torch.equal(generate(paged, input_ids, mask, max_new_tokens=new), expected)
        assert prompts[-1] == "replay"
        rows = torch.cat([system, ragged_batch([12], None, seed=3)[0]], 1).repeat(3, 1)
        rows[1:, -3:] += 1
        for _ in range(3):
            assert torch.equal(
                generate(paged, rows, torch.ones_like(rows)), generate(eager, rows, torch.ones_like(rows))
            )
    finally:
        disable_prefix_caching(paged)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"do_sample": True, "top_k": 0, "num_return_sequences": 3}, {"prompt_lookup_num_tokens": 3}],
    ids=["beams", "samples", "lookup"],
)
def test_ways_of_decoding(options, prompts):
    paged, eager = models("llama")
    rows = ragged_batch([20] if "prompt_lookup_num_tokens" in options else [20, 9], "left")
    for _ in range(4):
        results = []
        for model in (eager, paged):
            torch.manual_seed(4)
            results.append(generate(model, *rows, **options))
        assert torch.equal(*results)


def test_the_cache_is_as_after_a_prompt_of_python(prompts):
    paged, _ = models("llama")
    input_ids, mask = batch("left")
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "attention_mask": mask}
    told = []
    for _ in range(5):
        cache = paged.generate(input_ids, **options).past_key_values
        fork = cache.fork([1, 0])
        keys = [layer.keys.clone() for layer in cache.layers]
        told.append((cache.memory(), cache.group.real_columns().tolist(), keys, fork.get_seq_length()))
    assert prompts[-1] == "replay"
    for memory, real, keys, columns in told[1:]:
        assert (memory, real, columns) == (told[0][0], told[0][1], told[0][3])
        for ours, first in zip(keys, told[0][2], strict=True):
            torch.testing.assert_close(ours, first, rtol=0, atol=1e-5)


def test_full(prompts):
    """Refused before anything runs, and the cache goes on."""
    paged, eager = models("llama")
    short, long = ragged_batch([20], None)[0], ragged_batch([60], None)[0]
    for _ in range(4):
        generate(paged, short, None)
        generate(paged, long, None, max_new_tokens=2)
    cache = PagedCache(paged.config, num_blocks=3)
    with pytest.raises(CacheFullError):
        generate(paged, long, None, past_key_values=cache)
    assert cache.get_seq_length() == 0 and cache.memory().blocks_used == 0
    assert torch.equal(generate(paged, short, None, past_key_values=cache), generate(eager, short, None))


def test_another_model_shape_of_the_same_object(prompts):
    """What caches were like is forgotten with the model that was."""
    model = tiny_model(tiny_config("llama"), "paged_flash")
    input_ids = ragged_batch([20], None)[0]
    for _ in range(3):
        generate(model, input_ids, None)
    model.to(torch.float64)
    eager = tiny_model(tiny_config("llama"), "eager").to(torch.float64)
    for _ in range(4):
        assert torch.equal(generate(model, input_ids, None), generate(eager, input_ids, None))
    assert prompts[-1] == "replay"


def _hook(model):
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * 1.5)


def _swap(model):
    layers = model.model.layers
    layers[0].mlp, layers[1].mlp = layers[1].mlp, layers[0].mlp


def _patch(model):
    forward = LlamaMLP.forward
    model.model.layers[0].mlp.__class__ = type("Mlp", (LlamaMLP,), {"forward": lambda self, x: 2 * forward(self, x)})


CHANGES = {
    "a hook": _hook,
    "layers in another order": _swap,
    "a class": _patch,
    "a number": lambda model: setattr(model.model.layers[1].input_layernorm, "variance_epsilon", 10.0),
    "a number for a tensor": lambda model: vars(model.model.rotary_emb).update(attention_scaling=0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("cached", [None, "enabled", "own"])
def test_a_model_that_changes_between_calls(change, cached, prompts, monkeypatch):
    """Noticed while the graph of what it was runs, which is taken back."""
    paged, eager = (tiny_model(tiny_config("llama"), name) for name in ("paged_flash", "eager"))
    cache = {"enabled": enable_prefix_caching, "own": lambda model: PagedCache(model.config, prefix_caching=True)}
    cache = cache[cached](paged) if cached else None
    options = {"past_key_values": cache} if cached == "own" else {}
    input_ids, mask = ragged_batch([40, 33], "left")

    def rows(seed):
        ids = input_ids.clone()
        ids[:, -4:] = ragged_batch([4, 4], None, seed=seed)[0]
        return ids, mask

    def check(seed):
        expected = generate(eager, *rows(seed))
        assert torch.equal(generate(paged, *rows(seed), **options), expected)
        return expected

    for seed in range(4):
        check(seed)
    assert prompts[-1] == "replay"
    before, hit = generate(eager, *rows(4)), cache.memory().prefix_tokens_hit if cached else 0
    for model in (paged, eager):
        change(model)
    del prompts[:]
    replays, replay = [], Recorder.replay
    monkeypatch.setattr(Recorder, "replay", lambda self: (replays.append(len(prompts)), replay(self)))
    assert not torch.equal(check(4), before)
    assert replays[:1] == [1] and prompts[0] is None, "it was replayed before anybody looked"
    if cached:
        assert cache.memory().prefix_tokens_hit == hit, "keys of another model"
    for seed in range(4):
        check(seed)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "top_k": 0, "num_return_sequences": 3}],
                         ids=["beams", "samples"])  # fmt: skip
def test_rows_alike_are_computed_once_after_a_change_too(options, prompts, monkeypatch):
    paged, eager = (tiny_model(tiny_config("llama"), name) for name in ("paged_flash", "eager"))
    rows, seen = ragged_batch([20, 9], "left"), []
    monkeypatch.setattr(decode_loop, "length_of", lambda counts: (seen.append(len(counts)), length_of(counts))[1])
    for call in range(6):
        if call == 4:
            assert prompts[-1] == "replay"
            for model in (paged, eager):
                _swap(model)
        results = []
        for model in (eager, paged):
            torch.manual_seed(4)
            results.append(generate(model, *rows, **options))
        assert torch.equal(*results)
    assert seen == [2] * 7, "once more where the model has changed"


def test_a_model_that_changes_in_each_call(prompts):
    """It runs, with one attempt more."""
    paged, eager = (tiny_model(tiny_config("llama"), name) for name in ("paged_flash", "eager"))
    prepare, calls = paged.prepare_inputs_for_generation, []

    def noted(*args, **inputs):
        calls.append(args)
        paged.model.calls = len(calls)
        return prepare(*args, **inputs)

    paged.prepare_inputs_for_generation = noted
    for length in (20, 600):
        input_ids = ragged_batch([length], None)[0]
        expected = generate(eager, input_ids, None, max_new_tokens=3)
        for _ in range(3):
            del calls[:]
            assert torch.equal(generate(paged, input_ids, None, max_new_tokens=3), expected)
            assert len(calls) <= 6


def test_a_prefill_of_the_models_own(prompts):
    """Nobody looks at the model between its launch and the first token."""

    class Own(LlamaForCausalLM):
        def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
            inputs = self.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
            return self(**inputs, return_dict=True)

    paged, eager = (tiny_model(tiny_config("llama"), name) for name in ("paged_flash", "eager"))
    paged.__class__ = Own
    input_ids, mask = ragged_batch([20, 9], "left")
    for call in range(6):
        if call in (3, 5):
            for model in (paged, eager):
                _swap(model)
        assert torch.equal(generate(paged, input_ids, mask), generate(eager, input_ids, mask))


def test_reasons_that_are_gone(prompts):
    """An error is of the model as it is."""
    paged, eager = (tiny_model(tiny_config("llama"), name) for name in ("paged_flash", "eager"))
    handle = paged.model.layers[0].register_forward_hook(lambda module, args, output: output)
    rows, options = ragged_batch([20, 9], "right"), {"prefill_chunk_size": 7}
    with pytest.raises(UnsupportedFeatureError, match="in chunks"):
        generate(paged, *rows, **options)
    handle.remove()
    assert torch.equal(generate(paged, *rows, **options), unpadded(eager, *rows))


def test_reasons_against_graphs_that_are_gone(prompts):
    paged, eager = (tiny_model(tiny_config("llama"), name) for name in ("paged_flash", "eager"))
    hook = FunctionType((lambda module, args, output: None).__code__, {"__name__": "torch"})  # rows go without padding
    handle = paged.model.layers[0].register_forward_hook(hook)
    rows, options = ragged_batch([20, 9], "left"), {"compile_config": CompileConfig(), "max_new_tokens": 1}
    with pytest.raises(UnsupportedFeatureError, match="has a forward hook"):
        generate(paged, *rows, **options)
    handle.remove()
    assert torch.equal(generate(paged, *rows, **options), generate(eager, *rows, max_new_tokens=1))


def test_other_heads(prompts):
    """A cache that was made ready for what the model was is made ready anew."""
    paged, eager = (tiny_model(tiny_config("llama"), name) for name in ("paged_flash", "eager"))
    config = tiny_config("llama", num_key_value_heads=1)
    others = [tiny_model(config, name) for name in ("paged_flash", "eager")]
    input_ids = ragged_batch([20], None)[0]
    for _ in range(3):
        generate(paged, input_ids, None)
    before = [(model.model, model.config) for model in (paged, eager)]
    for model, other in zip((paged, eager), others, strict=True):
        model.model, model.config = other.model, other.config
    for _ in range(4):
        assert torch.equal(generate(paged, input_ids, None), generate(eager, input_ids, None))
    assert prompts[-1] == "replay" and before


def test_a_model_that_changes_between_turns(prompts, monkeypatch):
    paged, eager = (tiny_model(tiny_config("llama"), name) for name in ("paged_flash", "eager"))
    ids = ragged_batch([20, 20], None)[0]
    for _ in range(4):
        generate(paged, ids, None)
    caches = PagedCache(paged.config), DynamicCache(config=eager.config)
    changes, confirm = [], decode_graph.confirm

    def noted(model):
        try:
            confirm(model)
        except ModelChanged:
            changes.append(model)
            raise

    monkeypatch.setattr(decode_graph, "confirm", noted)
    for turn in range(3):
        answers = [generate(paged, ids, None, past_key_values=caches[0])]
        answers.append(generate(eager, ids, None, past_key_values=caches[1]))
        assert torch.equal(*answers), f"turn {turn}"
        ids = torch.cat([ids, answers[0], ragged_batch([4, 4], None, seed=turn)[0]], 1)
        for model in (paged, eager):
            model.model.layers[1].input_layernorm.variance_epsilon += 10.0
    assert len(changes) == 2, "once before each turn but the first"
    assert caches[0].get_seq_length() == caches[1].get_seq_length()


@pytest.mark.parametrize(
    "counts, length",
    [
        ([1], 16), ([16], 16), ([17], 32), ([128], 128), ([129], 256), ([257], 384), ([512], 512),
        ([513], None), ([0], None), ([5, 0], None),
        ([128, 1], 128), ([128, 1, 1], None), ([128] * 8, 128), ([128] * 9, None), ([16] * 64, 16), ([1] * 64, None),
    ],
)  # fmt: skip
def test_lengths(counts, length):
    assert length_of(np.array(counts, np.int64)) == length


def test_a_cache_that_was_loaded(load, recorders, elastic, tmp_path):
    """Goes on where it stood, though the model has seen other caches."""
    pair = load("llama")
    input_ids, mask = ragged_batch([20, 11])
    more, more_mask = ragged_batch([3, 2], seed=5)
    cache = PagedCache(pair.paged.config)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    answers = pair.paged.generate(input_ids, attention_mask=mask, past_key_values=cache, **options)
    cache.save(tmp_path / "cache")
    mask = torch.cat([mask, mask.new_ones(2, 5), more_mask], 1)
    turn = torch.cat([answers, more], 1)
    expected = pair.paged.generate(turn, attention_mask=mask, past_key_values=cache, **options)
    loaded = PagedCache.load(tmp_path / "cache", pair.paged.config)
    assert torch.equal(pair.paged.generate(turn, attention_mask=mask, past_key_values=loaded, **options), expected)
    assert loaded.get_seq_length() == cache.get_seq_length()
