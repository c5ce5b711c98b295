"""Prompts that begin as earlier ones did: eager's tokens whether they hit or miss, and what is known not computed."""

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from torch.nn.utils import prune
from transformers import AutoConfig

import hf_paged_flash
from hf_paged_flash import ArgumentError, PagedCache, UnsupportedFeatureError, backend
from hf_paged_flash.cache import elastic_memory
from hf_paged_flash.generation.looking import stand_in
from tests.cache.fake_driver import FakeDriver
from tests.integration.models import attentive_config, new_tokens
from tests.tiny_models import VOCAB_SIZE, ragged_batch, tiny_config, tiny_model

NEW = 20
BLOCK = 16
_SHAPE = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
_SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
_SHAPE |= {"eos_token_id": None}
_MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
pytestmark = pytest.mark.usefixtures("reference_backend")


def config_of(model_type: str):
    if model_type == "qwen3_moe":
        return AutoConfig.for_model(model_type, **_SHAPE, **_MOE)
    return attentive_config(model_type)


@pytest.fixture(scope="module")
def models():
    """A function from a model type to its models under (eager, paged_flash)."""
    made = {}

    def of(model_type: str):
        if model_type not in made:
            config = config_of(model_type)
            made[model_type] = tuple(tiny_model(config, name) for name in ("eager", "paged_flash"))
        return made[model_type]

    return of


@pytest.fixture
def computed(monkeypatch):
    """Tokens of each forward of a model, once it is watched."""
    hooks = []

    def watch(model) -> list[int]:
        counts = []

        def note(module, args, kwargs):
            counts.append(kwargs["input_ids"].numel())

        hooks.append(model.register_forward_pre_hook(note, with_kwargs=True))
        return counts

    yield watch
    for hook in hooks:
        hook.remove()


def text(length: int, seed: int) -> torch.Tensor:
    return torch.randint(2, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))


def batch(*rows: torch.Tensor, side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens as padded ids and their mask."""
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids, mask


def check(models, ids, mask, **options) -> torch.Tensor:
    """Asserts that both add the same tokens, and returns them."""
    eager, paged = models
    expected = new_tokens(eager, ids, mask, max_new_tokens=NEW)
    ours = new_tokens(paged, ids, mask, **{"max_new_tokens": NEW} | options)
    assert torch.equal(ours, expected)
    return ours


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("kept", ["by the model", "by a cache"])
def test_tokens_are_eagers(models, computed, model_type, kept):
    pair = models(model_type)
    options = {}
    if kept == "by the model":
        cache = hf_paged_flash.enable_prefix_caching(pair[1])
    else:
        cache = options["past_key_values"] = PagedCache(pair[1].config, prefix_caching=True)
    counts = computed(pair[1])
    system = text(70, 1)
    try:
        first = torch.cat([system, text(10, 2)])
        check(pair, first[None], None, **options)
        assert counts[0] == 80 and cache.memory().prefix_tokens_hit == 0
        counts.clear()
        rows = [torch.cat([system, text(5, 3)]), torch.cat([system[:40], text(8, 4)]), text(30, 5), first[:64]]
        check(pair, *batch(*rows), **options)
        # whole blocks: 4 of the system prompt, 2 of its 40 tokens, none, and 3, as the last token is always computed
        assert counts[0] == sum(map(len, rows)) - BLOCK * (4 + 2 + 0 + 3)
        memory = cache.memory()
        assert (memory.prefix_tokens, memory.prefix_tokens_hit) == (80 + sum(map(len, rows)), 9 * BLOCK)
        assert memory.prefix_hit_rate == memory.prefix_tokens_hit / memory.prefix_tokens
        counts.clear()
        check(pair, *batch(*rows), **options)
        assert counts[0] == sum(map(len, rows)) - BLOCK * (4 + 2 + 1 + 3)
    finally:
        hf_paged_flash.disable_prefix_caching(pair[1])


def test_disabled_again_nothing_is_kept(models, computed):
    pair = models("llama")
    hf_paged_flash.enable_prefix_caching(pair[1])
    prompt = text(40, 1)[None]
    counts = computed(pair[1])
    check(pair, prompt, None)
    hf_paged_flash.disable_prefix_caching(pair[1])
    hf_paged_flash.disable_prefix_caching(pair[1])
    counts.clear()
    check(pair, prompt, None)
    assert counts[0] == 40


def test_the_next_turn_knows_the_answer(models, computed):
    pair = models("llama")
    cache = PagedCache(pair[1].config, prefix_caching=True)
    counts = computed(pair[1])
    chat = text(20, 1)[None]
    for turn in range(4):
        counts.clear()
        answer = check(pair, chat, None, past_key_values=cache, max_new_tokens=NEW)
        stored = 0 if turn == 0 else chat.shape[1] - 7 - 1
        assert counts[0] == chat.shape[1] - stored // BLOCK * BLOCK
        chat = torch.cat([chat, answer, text(7, 10 + turn)[None]], 1)


def test_other_prompts_on_the_same_cache_begin_anew(models):
    """Shorter, longer, more and fewer rows, with none of the earlier rows' tokens."""
    pair = models("llama")
    cache = PagedCache(pair[1].config, prefix_caching=True)
    for seed, lengths in enumerate([(30,), (50, 7, 19), (3, 3), (64,), (64, 33, 64, 1)]):
        check(pair, *ragged_batch(lengths, seed=seed), past_key_values=cache)
        assert cache.batch_size == len(lengths)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_rows_of_a_batch_share_is_computed_once(models, computed, side):
    """In levels: all begin alike, some go on alike, two are the same."""
    pair = models("qwen3")
    cache = PagedCache(pair[1].config, prefix_caching=True)
    system, example = text(50, 1), text(40, 2)
    rows = [torch.cat([system, text(9, 3)]), torch.cat([system, example, text(6, 4)])]
    rows += [torch.cat([system, example, text(21, 5)]), text(30, 6), rows[0], rows[0][:48]]
    ids, mask = batch(*rows, side=side)
    alone = torch.cat([new_tokens(pair[0], row[None], None, max_new_tokens=NEW) for row in rows])
    counts = computed(pair[1])
    ours = new_tokens(pair[1], ids, mask, max_new_tokens=NEW, past_key_values=cache)
    assert torch.equal(ours, alone)
    # 48 of the system prompt's tokens, then 80 with the example; the same row; and 32 of 48, as one token must be left
    shared = 48 + 80 + 48 + 32
    assert counts[0] == sum(map(len, rows)) - shared
    assert cache.memory().prefix_tokens_hit == shared
    assert cache.memory().blocks_shared >= 5


def test_rows_without_padding_share_as_well(models, computed):
    pair = models("llama")
    rows = torch.stack([torch.cat([text(40, 1), text(9, seed)]) for seed in (2, 3, 4)])
    counts = computed(pair[1])
    check(pair, rows, None, past_key_values=PagedCache(pair[1].config, prefix_caching=True))
    assert counts[0] == rows.numel() - 2 * 2 * BLOCK


@pytest.mark.parametrize("option", ["3 samples", "3 beams", "chunks", "prompt lookup", "assistant"])
def test_ways_to_generate(models, option):
    pair = models("llama")
    options = {
        "3 samples": {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
        "3 beams": {"num_beams": 3, "num_return_sequences": 2},
        "chunks": {"prefill_chunk_size": 11},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {},
    }[option]
    rows = [torch.cat([text(50, 1), text(9, seed)]) for seed in (2, 3)]
    if option in ("prompt lookup", "assistant"):
        rows = rows[:1]
    cache = hf_paged_flash.enable_prefix_caching(pair[1])
    assistant = tiny_model(tiny_config("llama", num_hidden_layers=2), "paged_flash")
    hf_paged_flash.enable_prefix_caching(assistant)
    try:
        for seed in (0, 1):
            ids, mask = batch(*rows)
            outputs = []
            for model in pair:
                torch.manual_seed(seed)
                extra = {"assistant_model": assistant} if option == "assistant" and model is pair[1] else {}
                outputs.append(new_tokens(model, ids, mask, max_new_tokens=NEW, **options, **extra))
            assert torch.equal(*outputs)
            rows = [torch.cat([row, text(4, 5)]) for row in rows]
        # two rows share 3 blocks in the first call, and find them in the second
        assert cache.memory().prefix_tokens_hit > 0
    finally:
        hf_paged_flash.disable_prefix_caching(pair[1])


@pytest.mark.parametrize("padding", [0, 5])
def test_assisted_decoding_has_prefixes(models, computed, padding):
    """Its first forward is of the rest of the prompt and a draft; the answer is known to the next turn."""
    eager, paged = pair = models("llama")
    cache = PagedCache(paged.config, prefix_caching=True)
    phrase = text(12, 1)
    prompt, counts = phrase.repeat(5), computed(paged)  # which drafts repeat
    options = {"past_key_values": cache, "prompt_lookup_num_tokens": 4}
    for known in (0, 48):
        ids, mask = (torch.nn.functional.pad(x[None], (padding, 0)) for x in (prompt, torch.ones_like(prompt)))
        counts.clear()
        answer = check(pair, ids, mask, **options)
        assert counts[0] == 60 - known + 4
        assert cache.memory().prefix_tokens_hit == known
    turn = torch.cat([prompt, answer[0], text(9, 2)])[None]
    counts.clear()
    check(pair, turn, None, **options)
    hit = cache.memory().prefix_tokens_hit - 48
    assert (hit, counts[0]) in [(64, 25 + draft) for draft in range(5)], "the last tokens of the answer are not stored"


@pytest.mark.parametrize("blocks", [8, 12, 20])
def test_a_tight_cap_evicts_and_stays_right(models, blocks):
    """Prompts out of a few texts, in an order that makes some of them give way to others."""
    pair = models("llama")
    cache = PagedCache(pair[1].config, num_blocks=blocks, prefix_caching=True)
    texts = [text(40, seed) for seed in range(4)]
    random = np.random.default_rng(blocks)
    hits = 0
    for _ in range(12):
        first, second = texts[random.integers(4)], texts[random.integers(4)]
        prompt = torch.cat([first[: random.integers(1, 41)], second[: random.integers(1, 41)]])
        check(pair, prompt[None], None, past_key_values=cache)
        memory = cache.memory()
        assert memory.blocks_used + memory.blocks_free <= blocks
        hits = memory.prefix_tokens_hit
    assert hits > 0


def test_a_cache_that_is_full_of_rows_says_so(models):
    pair = models("llama")
    cache = PagedCache(pair[1].config, num_blocks=6, prefix_caching=True)
    check(pair, text(40, 1)[None], None, past_key_values=cache)
    with pytest.raises(hf_paged_flash.CacheFullError):
        new_tokens(pair[1], text(100, 2)[None], None, past_key_values=cache)
    check(pair, text(41, 1)[None], None, past_key_values=cache)
    assert cache.memory().prefix_tokens_hit == 2 * BLOCK


def test_a_prefill_that_fails_between_chunks_leaves_no_row(models, monkeypatch):
    """A row that was known holds more than the columns of the chunks so far."""
    eager, paged = models("llama")
    cache = PagedCache(paged.config, prefix_caching=True)
    check((eager, paged), text(64, 1)[None], None, past_key_values=cache)
    rows = torch.stack([torch.cat([text(64, 1), text(6, 2)]), text(70, 3)])
    mlp, chunks = paged.model.layers[1].mlp, []

    def fail(hidden_states):
        chunks.append(None)
        if len(chunks) == 2:
            raise RuntimeError("a layer fails")
        return type(mlp).forward(mlp, hidden_states)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="a layer fails"):
        patched.setattr(mlp, "forward", stand_in(fail))  # no change of the model, which would make all be forgotten
        new_tokens(paged, rows, None, past_key_values=cache, prefill_chunk_size=16)
    assert cache.columns == 0 and cache.memory().blocks_used == cache.memory().blocks_kept > 0
    check((eager, paged), rows, None, past_key_values=cache, prefill_chunk_size=16)


def test_kept_blocks_have_a_bound_of_their_own(models):
    pair = models("llama")
    config = pair[1].config
    block = 3 * BLOCK * 2 * 2 * 16 * 4  # layers, tokens, keys and values, heads, head_dim, bytes
    cache = PagedCache(config, prefix_caching=4 * block)
    for seed in range(5):
        check(pair, text(60, seed)[None], None, past_key_values=cache)
        cache.release(0)
        memory = cache.memory()
        assert memory.blocks_kept == memory.blocks_used == 4
    check(pair, text(60, 4)[None], None, past_key_values=cache)
    assert cache.memory().prefix_tokens_hit == 3 * BLOCK


def test_a_device_without_room_takes_what_is_kept(models, monkeypatch):
    """Ten pages of four blocks for each of three layers; a prompt and its answer take five."""
    driver = FakeDriver(16384, total_memory=30 * 16384)
    monkeypatch.setattr(elastic_memory, "driver_of", lambda device: driver)
    pair = models("llama")
    cache = PagedCache(pair[1].config, prefix_caching=True)
    for seed in (1, 2, 3):
        check(pair, text(290, seed)[None], None, past_key_values=cache)
        assert cache.memory().blocks_used == (20, 39, 20)[seed - 1]
    check(pair, text(290, 3)[None], None, past_key_values=cache)
    assert cache.memory().prefix_tokens_hit == 288


def test_blocks_are_found_where_they_have_moved(models, monkeypatch):
    """Rows that leave free the front, and what is kept at the end moves there."""
    driver = FakeDriver(16384)
    monkeypatch.setattr(elastic_memory, "driver_of", lambda device: driver)
    pair = models("llama")
    block = 3 * BLOCK * 2 * 2 * 16 * 4  # layers, tokens, keys and values, heads, head_dim, bytes
    cache = PagedCache(pair[1].config, prefix_caching=12 * block)
    check(pair, text(800, 1)[None], None, past_key_values=cache)
    other = cache.fork()
    check(pair, text(150, 2)[None], None, past_key_values=cache)
    pages = driver.pages
    other.release(0)
    assert driver.pages < pages and cache.group.manager.table.max() < 26
    check(pair, text(150, 2)[None], None, past_key_values=cache)
    assert cache.memory().prefix_tokens_hit == 144


def test_reset_forgets_and_gives_back(models):
    pair = models("llama")
    cache = PagedCache(pair[1].config, prefix_caching=True)
    check(pair, text(60, 1)[None], None, past_key_values=cache)
    cache.release(0)
    assert cache.memory().blocks_kept == cache.memory().blocks_used > 0
    cache.reset()
    memory = cache.memory()
    assert memory.bytes_reserved == memory.blocks_used == 0
    check(pair, text(60, 1)[None], None, past_key_values=cache)
    assert cache.memory().prefix_tokens_hit == 0


def test_rows_can_be_cropped_and_forked_after_a_call(models):
    """Known blocks are never written to: who goes on in one gets a copy."""
    eager, paged = models("llama")
    cache = PagedCache(paged.config, prefix_caching=True)
    prompt = text(60, 1)[None]
    answer = new_tokens(paged, prompt, None, past_key_values=cache)
    fork = cache.fork()
    for each in (cache, fork):
        each.crop(40 - each.get_seq_length())
        other = torch.cat([prompt[:, :40], text(30, 2)[None]], 1)
        with torch.no_grad():
            logits = paged(other[:, 40:], past_key_values=each).logits
            torch.testing.assert_close(logits, eager(other).logits[:, 40:])
    assert torch.equal(new_tokens(paged, prompt, None, past_key_values=cache), answer)
    assert cache.memory().prefix_tokens_hit == 3 * BLOCK


def test_changed_weights_are_noticed(models):
    eager, paged = (copy.deepcopy(model) for model in models("llama"))
    cache = hf_paged_flash.enable_prefix_caching(paged)
    prompt = text(60, 1)[None]
    before = check((eager, paged), prompt, None)
    for model in (eager, paged):
        with torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(-1.5)
    assert not torch.equal(check((eager, paged), prompt, None), before)
    assert cache.memory().prefix_tokens_hit == 0
    check((eager, paged), prompt, None)
    assert cache.memory().prefix_tokens_hit == 3 * BLOCK
    others = tiny_model(config_of("llama"), "eager", seed=1).state_dict()
    for model in (eager, paged):
        model.load_state_dict(others, assign=True)
    check((eager, paged), prompt, None)
    for model in (eager, paged):
        model.double()
    check((eager, paged), prompt, None)
    for model in (eager, paged):
        model.model.rotary_emb.inv_freq.mul_(3)
    check((eager, paged), prompt, None)


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_steps_of_an_optimizer_are_noticed(models, how):
    eager, paged = (copy.deepcopy(model) for model in models("llama"))
    cache = hf_paged_flash.enable_prefix_caching(paged)
    prompt = text(60, 1)[None]
    check((eager, paged), prompt, None)
    for weights in (paged.parameters(), [torch.nn.Parameter(torch.ones(1))]):
        optimizer = torch.optim.AdamW(weights, lr=0.05, **how)
        for weight in optimizer.param_groups[0]["params"]:
            weight.grad = torch.ones_like(weight)
        for _ in range(2):
            before = cache.memory().prefix_tokens_hit
            optimizer.step()
            eager.load_state_dict(paged.state_dict())
            check((eager, paged), prompt, None)
    assert before == 3 * BLOCK and cache.memory().prefix_tokens_hit == 2 * before, "weights of others do not matter"


def test_a_compiled_step_of_an_optimizer_is_noticed(models):
    eager, paged = (copy.deepcopy(model) for model in models("llama"))
    cache = hf_paged_flash.enable_prefix_caching(paged)
    prompt = text(60, 1)[None]
    check((eager, paged), prompt, None)
    optimizer = torch.optim.SGD([paged.lm_head.weight, paged.model.embed_tokens.weight], lr=0.5)
    for weight in optimizer.param_groups[0]["params"]:
        weight.grad = torch.ones_like(weight)
    torch.compile(optimizer.step, backend="aot_eager")()
    eager.load_state_dict(paged.state_dict())
    check((eager, paged), prompt, None)
    assert cache.memory().prefix_tokens_hit == 0


@pytest.mark.parametrize("own", [False, True], ids=["enabled", "own cache"])
def test_autocast_has_keys_of_its_own(models, own):
    eager, paged = models("llama")
    cache = PagedCache(paged.config, prefix_caching=True) if own else hf_paged_flash.enable_prefix_caching(paged)
    prompt = text(60, 1)[None]
    inputs = {"input_ids": prompt, "max_new_tokens": NEW, "do_sample": False}
    inputs |= {"return_dict_in_generate": True, "output_logits": True}
    options = {"past_key_values": cache} if own else {}
    expected = torch.stack(eager.generate(**inputs).logits)
    try:
        for is_on in (True, False, True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
                logits = torch.stack(paged.generate(**inputs, **options).logits)
            if not is_on:
                torch.testing.assert_close(logits, expected)
        assert cache.memory().prefix_tokens_hit == 0
    finally:
        hf_paged_flash.disable_prefix_caching(paged)


class _Twice(torch.nn.Module):
    """A module put around another."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def _replaced_forward(model):
    layer = model.model.layers[0].self_attn.v_proj
    layer.forward = lambda x: -torch.nn.Linear.forward(layer, x)


def _with_gain(attention):
    project = attention.v_proj
    return lambda x: attention.gain * torch.nn.Linear.forward(project, x)


def _other_inputs(model):
    prepare = model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def other(*args, **given):
        inputs = prepare(*args, **given)
        return inputs | {"input_ids": (inputs["input_ids"] + 1) % 97}

    model.prepare_inputs_for_generation = other


CHANGES = {
    "a module around another": lambda model: setattr(
        model.model.layers[0].self_attn, "v_proj", _Twice(model.model.layers[0].self_attn.v_proj)
    ),
    "a scale": lambda model: setattr(model.model.layers[0].self_attn, "scaling", 3.0),
    "a forward": _replaced_forward,
    "a tensor": lambda model: model.model.layers[0].self_attn.gain.mul_(-3),
    "a hook of the whole": lambda model: model.register_forward_pre_hook(
        lambda _, args, given: (args, given | {"input_ids": (given["input_ids"] + 1) % 97}), with_kwargs=True
    ),
    "inputs": _other_inputs,
    "a norm's epsilon": lambda model: setattr(model.model.layers[1].input_layernorm, "variance_epsilon", 10.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("own", [False, True], ids=["enabled", "own cache"])
def test_changes_beside_weights_are_noticed(models, change, own):
    eager, paged = (copy.deepcopy(model) for model in models("llama"))
    for model in (eager, paged):
        attention = model.model.layers[0].self_attn
        attention.gain, attention.v_proj.forward = torch.tensor(1.0), _with_gain(attention)
    cache = PagedCache(paged.config, prefix_caching=True) if own else hf_paged_flash.enable_prefix_caching(paged)
    options = {"past_key_values": cache} if own else {}
    prompt = text(60, 1)[None]
    before = check((eager, paged), prompt, None, **options)
    for model in (eager, paged):
        change(model)
    assert not torch.equal(check((eager, paged), prompt, None, **options), before)
    assert cache.memory().prefix_tokens_hit == 0
    check((eager, paged), prompt, None, **options)
    assert cache.memory().prefix_tokens_hit == 3 * BLOCK


def _prefill_alone(model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
    """Decoding of the user's own, without one of transformers' loops."""
    for name in ("synced_gpus", "streamer"):
        inputs.pop(name, None)
    logits = model._prefill(input_ids, generation_config, inputs).logits
    return torch.cat([input_ids, logits[:, -1:].argmax(-1)], 1)


def test_changes_before_decoding_of_ones_own_are_noticed(models):
    eager, paged = (copy.deepcopy(model) for model in models("llama"))
    options = {"past_key_values": PagedCache(paged.config, prefix_caching=True), "custom_generate": _prefill_alone}
    prompt = text(60, 1)[None]
    for epsilon in (1e-6, 10.0):
        for model in (eager, paged):
            model.model.layers[1].input_layernorm.variance_epsilon = epsilon
        expected = eager.generate(prompt, do_sample=False, max_new_tokens=1)
        for _ in range(2):
            assert torch.equal(paged.generate(prompt, **options), expected)
    assert options["past_key_values"].memory().prefix_tokens_hit == 2 * 3 * BLOCK, "once for each epsilon"


def _pruned(model):
    prune.l1_unstructured(model.model.layers[0].self_attn.v_proj, "weight", 0.3)


@pytest.mark.parametrize(
    ("change", "options"),
    [(_pruned, {}), (_other_inputs, {}), (lambda model: None, {"assistant_early_exit": 1})],
    ids=["a weight that is computed in each forward", "inputs", "fewer layers for a while"],
)
def test_nothing_is_forgotten_without_a_change(models, change, options):
    eager, paged = (copy.deepcopy(model) for model in models("llama"))
    for model in (eager, paged):
        change(model)
    cache = hf_paged_flash.enable_prefix_caching(paged)
    for calls in range(3):
        check((eager, paged), text(60, 1)[None], None, **options)
        assert cache.memory().prefix_tokens_hit == 2 * calls * 3 * BLOCK
        check((eager, paged), text(60, 1)[None], None)


def test_a_cache_that_comes_back_from_a_pickle_begins_with_nothing_known(models):
    pair = models("llama")
    cache = PagedCache(pair[1].config, prefix_caching=True)
    prompt = text(60, 1)[None]
    check(pair, prompt, None, past_key_values=cache)
    again = pickle.loads(pickle.dumps(cache))
    assert again.memory().tokens == cache.memory().tokens
    for hits in (0, 3 * BLOCK):
        check(pair, prompt, None, past_key_values=again)
        assert again.memory().prefix_tokens_hit == hits


def test_two_models_never_share(models):
    first, second = (tiny_model(config_of("llama"), "paged_flash", seed=seed) for seed in (0, 1))
    cache = PagedCache(first.config, prefix_caching=True)
    prompt = text(60, 1)[None]
    alone = [new_tokens(model, prompt, None) for model in (first, second)]
    for model, expected in zip((first, second), alone, strict=True):
        assert torch.equal(new_tokens(model, prompt, None, past_key_values=cache), expected)
    assert not torch.equal(*alone)
    assert cache.memory().prefix_tokens_hit == 0


def test_adapters_have_prefixes_of_their_own():
    peft = pytest.importorskip("peft")
    model = tiny_model(config_of("llama"), "paged_flash")
    lora = peft.LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, lora, adapter_name="a")
    model.add_adapter("b", lora)
    model.eval()
    prompt = text(60, 1)[None]
    options = {"do_sample": False, "max_new_tokens": NEW}

    def run() -> list[torch.Tensor]:
        outputs = []
        for name in ("a", "b"):
            model.set_adapter(name)
            outputs.append(model.generate(input_ids=prompt, **options))
        with model.disable_adapter():
            outputs.append(model.generate(input_ids=prompt, **options))
        return outputs

    expected = run()
    assert not torch.equal(expected[0], expected[1]) and not torch.equal(expected[0], expected[2])
    cache = hf_paged_flash.enable_prefix_caching(model)
    for hit in (0, 9 * BLOCK):
        assert all(torch.equal(*pair) for pair in zip(run(), expected, strict=True))
        assert cache.memory().prefix_tokens_hit == hit


def test_virtual_tokens_are_not_taken_for_the_prompts():
    peft = pytest.importorskip("peft")
    model = tiny_model(config_of("llama"), "paged_flash")
    tuning = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=BLOCK)
    model = peft.get_peft_model(model, tuning).eval()
    options = {"input_ids": text(60, 1)[None], "do_sample": False, "max_new_tokens": NEW}
    options["attention_mask"] = torch.ones_like(options["input_ids"])

    def run() -> list[torch.Tensor]:
        outputs = [model.generate(**options)]
        with model.disable_adapter():
            outputs.append(model.generate(**options))
        return outputs

    expected = run()
    assert not torch.equal(*expected)
    cache = hf_paged_flash.enable_prefix_caching(model)
    for hit in (0, 3 * BLOCK):
        assert all(torch.equal(*pair) for pair in zip(run(), expected, strict=True))
        assert cache.memory().prefix_tokens_hit == hit


def test_what_hooks_have_changed_is_not_kept(models):
    eager, paged = models("llama")
    cache = PagedCache(paged.config, prefix_caching=True)
    prompt = text(60, 1)[None]
    check((eager, paged), prompt, None, past_key_values=cache)
    hooks = [model.model.layers[0].register_forward_hook(lambda *args: args[2] * 2) for model in (eager, paged)]
    try:
        check((eager, paged), prompt, None, past_key_values=cache)
    finally:
        for hook in hooks:
            hook.remove()
    check((eager, paged), prompt, None, past_key_values=cache)


def test_what_a_model_adds_to_its_inputs(models, monkeypatch):
    """It may be of rows, which are computed whole then: it shows after what is known of them was found."""
    pair = eager, paged = models("llama")
    cache = PagedCache(paged.config, prefix_caching=True)
    rows, mask = batch(torch.cat([text(50, 1), text(9, 2)]), torch.cat([text(50, 1), text(4, 3)]))
    prepare, added = paged.prepare_inputs_for_generation, {}

    @functools.wraps(prepare)
    def prepare_more(*args, **given):
        return prepare(*args, **given) | added

    monkeypatch.setattr(paged, "prepare_inputs_for_generation", prepare_more)
    check(pair, rows, mask, past_key_values=cache)
    shared = cache.memory().prefix_tokens_hit
    added["of_rows"] = torch.ones(2)
    check(pair, rows, mask, past_key_values=cache)
    assert cache.memory().prefix_tokens_hit == shared
    added.clear()
    check(pair, rows, mask, past_key_values=cache)
    assert cache.memory().prefix_tokens_hit == shared + 2 * 3 * BLOCK


def test_embeddings_are_not_looked_up(models):
    eager, paged = models("llama")
    cache = PagedCache(paged.config, prefix_caching=True)
    prompt = text(60, 1)[None]
    check((eager, paged), prompt, None, past_key_values=cache)
    embeds = eager.get_input_embeddings()(text(60, 2)[None])
    options = {"do_sample": False, "max_new_tokens": NEW}
    ours = paged.generate(inputs_embeds=embeds, past_key_values=cache, **options)
    assert torch.equal(ours, eager.generate(inputs_embeds=embeds, **options))
    assert (cache.memory().prefix_tokens, cache.memory().prefix_tokens_hit) == (60, 0)


def test_positions_of_the_users_own(models):
    """A block is another one where its tokens lie elsewhere; what is generated lies behind them."""
    eager, paged = models("llama")
    cache = PagedCache(paged.config, prefix_caching=True)
    prompt = text(60, 1)[None]
    counted = torch.arange(60)[None]
    moved = counted + 7 * (counted >= 20)  # its first block is where it is elsewhere, too

    def hits(prompt: torch.Tensor, position_ids: torch.Tensor) -> int:
        before = cache.memory().prefix_tokens_hit
        options = {"position_ids": position_ids, "do_sample": False, "max_new_tokens": NEW}
        ours = paged.generate(prompt, past_key_values=cache, **options)
        assert torch.equal(ours, eager.generate(prompt, **options))
        hit = cache.memory().prefix_tokens_hit - before
        turn = torch.cat([ours, text(5, 3)[None]], 1)
        more = position_ids[:, -1:] + 1 + torch.arange(turn.shape[1] - 60)
        turns.append((turn, torch.cat([position_ids, more], 1)))
        return hit

    turns: list[tuple] = []
    assert [hits(prompt, x) for x in (counted, moved, moved, counted, counted * 2)] == [
        0, BLOCK, 3 * BLOCK, 3 * BLOCK, 0
    ]  # fmt: skip
    assert [hits(*turn) for turn in turns[2:]] == [4 * BLOCK] * 3, "the answers are known"


def test_the_new_turn_alone_is_refused(models):
    pair = models("llama")
    cache = PagedCache(pair[1].config, prefix_caching=True)
    check(pair, text(30, 1)[None], None, past_key_values=cache)
    with pytest.raises(ArgumentError, match="Pass the whole conversation"):
        new_tokens(pair[1], text(5, 2)[None], torch.ones(1, 54), past_key_values=cache)


@pytest.mark.parametrize(
    "model_type, changes, reason",
    [
        ("mistral", {}, "sliding window"),
        ("gpt_oss", {}, "sliding window"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "length of the"),
    ],
)
def test_models_whose_keys_do_not_stay_are_refused(model_type, changes, reason):
    config = tiny_config(model_type, **changes)
    with pytest.raises(UnsupportedFeatureError, match=reason):
        PagedCache(config, prefix_caching=True)


def test_states_beside_keys_are_refused():
    shape = _SHAPE | {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    with pytest.raises(UnsupportedFeatureError, match="`conv`"):
        PagedCache(AutoConfig.for_model("lfm2", **shape), prefix_caching=True)


@pytest.mark.parametrize("size", [0, -1, "much", 1.5])
def test_a_bound_that_is_none_is_refused(size):
    with pytest.raises(ArgumentError, match="`prefix_caching` must be bytes"):
        PagedCache(tiny_config("llama"), prefix_caching=size)


def test_no_model_is_refused():
    with pytest.raises(ArgumentError, match="`model` must be a model"):
        hf_paged_flash.enable_prefix_caching(torch.nn.Linear(2, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_give_hits_what_they_give_misses(dtype):
    """Logits of the first new token, from blocks of earlier calls and of the batch's other rows."""
    backend.configure(backend="auto")
    model = tiny_model(config_of("llama"), "paged_flash", dtype=dtype).cuda()
    system = text(1000, 1)
    rows = [torch.cat([system, text(40, 2)]), torch.cat([system[:700], text(300, 3)]), system[:512], text(5, 4)]
    ids, mask = (x.cuda() for x in batch(*rows))
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(ids, attention_mask=mask, **options).logits[0]
    cache = PagedCache(model.config, prefix_caching=True)
    in_batch, known = 688 + 496, 1024 + 992 + 496
    for hits in (in_batch, in_batch + known):
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
        assert cache.memory().prefix_tokens_hit == hits
        difference = (out.logits[0] - expected).abs().max()
        assert difference <= (1e-4 if dtype == torch.float32 else 0.02) * expected.abs().max()


@pytest.mark.gpu
def test_what_is_kept_beyond_its_bound_goes_back_to_the_device():
    backend.configure(backend="auto")
    config = tiny_config("llama", hidden_size=1024, num_attention_heads=8, num_key_value_heads=8)
    model = tiny_model(config, "paged_flash").cuda()
    page = 2 * 2**20
    cache = hf_paged_flash.enable_prefix_caching(model, max_memory=12 * page)
    try:
        for seed in range(3):
            model.generate(text(400, seed).expand(8, -1).flatten()[None].cuda(), max_new_tokens=2, do_sample=False)
            memory = cache.memory()
            assert memory.blocks_used == memory.blocks_kept > 0
            assert memory.bytes_reserved <= 20 * page
    finally:
        hf_paged_flash.disable_prefix_caching(model)
