"""Encoder-decoder models on two PagedCaches: eager's tokens, and an encoder's keys that are stored once."""

import copy
import inspect

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    DynamicCache,
    EncoderDecoderCache,
)

from hf_paged_flash import PagedCache, UnsupportedFeatureError, counters, reset_counters
from hf_paged_flash.cache import paged_encoder_decoder_cache
from hf_paged_flash.patches.base import cache_name
from tests.integration.models import pairs_of
from tests.tiny_models import ragged_batch, randomize, tiny_config

LENGTHS = (30, 7, 19)
NEW = 24
_COMMON = dict(vocab_size=97, pad_token_id=0, eos_token_id=None, bos_token_id=1, decoder_start_token_id=1)
_BART = dict(
    d_model=64,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=96,
    decoder_ffn_dim=96,
    max_position_embeddings=256,
    forced_eos_token_id=None,
    forced_bos_token_id=None,
)
_T5GEMMA_HALF = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=8,
    layer_types=["sliding_attention", "full_attention"],
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
_CONFIGS = {
    "t5": dict(d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, tie_word_embeddings=False),
    "bart": _BART,
    "marian": _BART,
    "whisper": dict(
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_mel_bins=8,
        max_source_positions=30,
        max_target_positions=128,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
}
METHODS = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 0},
    "beams2": {"num_beams": 2},
    "beams4": {"num_beams": 4, "early_stopping": True},
    "beams8": {"num_beams": 8, "num_return_sequences": 3},
    "samples": {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
}


def make(model_type, implementation, seed=0):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **_COMMON | _CONFIGS[model_type])
    kind = AutoModelForSpeechSeq2Seq if model_type == "whisper" else AutoModelForSeq2SeqLM
    model = kind.from_config(config, attn_implementation=implementation)
    randomize(model, seed)
    return model.eval()


@pytest.fixture(scope="module")
def pairs():
    return pairs_of(make)


@pytest.fixture(params=_CONFIGS)
def model_type(request):
    return request.param


def inputs_for(model_type, pad="right"):
    if model_type == "whisper":
        return {"input_features": torch.randn(3, 8, 60, generator=torch.Generator().manual_seed(0))}
    input_ids, mask = ragged_batch(LENGTHS, pad)
    return {"input_ids": input_ids, "attention_mask": mask}


def generate(model, inputs, **options):
    torch.manual_seed(3)
    return model.generate(**inputs, **{"do_sample": False, "max_new_tokens": NEW} | options)


def caches_of(model, monkeypatch):
    """The caches that `model` is called with, as whisper's generate() returns copies of its own."""
    seen, forward = [], model.forward

    def watched(*args, **kwargs):
        if (cache := kwargs.get(cache_name(kwargs))) is not None and not any(cache is one for one in seen):
            seen.append(cache)
        return forward(*args, **kwargs)

    watched.__signature__ = inspect.signature(forward)  # generate() asks it what the model takes
    monkeypatch.setattr(model, "forward", watched)
    return seen


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_decoding_methods(pairs, model_type, method, monkeypatch):
    eager, paged = pairs(model_type)
    inputs = inputs_for(model_type)
    expected = generate(eager, inputs, **method)
    seen = caches_of(paged, monkeypatch)
    reset_counters()
    assert torch.equal(generate(paged, inputs, **method), expected)
    (cache,) = seen
    own, cross = cache.self_attention_cache, cache.cross_attention_cache
    assert isinstance(cache, EncoderDecoderCache) and isinstance(own, PagedCache) and isinstance(cross, PagedCache)
    beams, returned = method.get("num_beams", 1), method.get("num_return_sequences", 1)
    prompts, rows = 3, 3 * max(beams, returned)
    if model_type == "whisper":  # repeats its prompts for the sequences to return before it encodes them
        prompts, rows = 3 * returned, 3 * returned * beams
    assert own.groups.batch == cross.groups.batch == rows
    lengths = [30] * prompts if model_type == "whisper" else LENGTHS
    memory = cross.memory()
    assert memory.tokens == sum(lengths), "an encoder's keys are stored once, its padding never"
    assert memory.blocks_used == sum(-(-length // 16) for length in lengths)
    assert memory.blocks_shared == (memory.blocks_used if rows > prompts else 0)
    ran = counters()
    if model_type == "t5":  # its position biases reach the kernels with dense keys
        assert set(ran.dense_gather) == {"attention"}
    else:
        assert ran.dense_gather_total == 0
        # two layers with two attentions each, in all forwards; the first one's own attention has its keys at hand
        assert ran.reference["paged_decode"] == 2 * 2 * NEW - 2


@pytest.mark.parametrize("pad", ["left", "right", None])
@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_padding_of_the_encoder(pairs, model_type, pad):
    eager, paged = pairs(model_type)
    input_ids, mask = ragged_batch(LENGTHS if pad else (21, 21, 21), pad)
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    assert torch.equal(generate(paged, inputs), generate(eager, inputs))


@pytest.mark.parametrize("model_type", ["t5", "bart", "whisper"])
def test_a_prompt_for_the_decoder(pairs, model_type):
    eager, paged = pairs(model_type)
    prompt = torch.cat([torch.ones(3, 1, dtype=torch.int64), ragged_batch([20] * 3, None, seed=4)[0]], 1)
    for options in ({}, {"num_beams": 3}):
        options = {"decoder_input_ids": prompt} | options
        inputs = inputs_for(model_type)
        assert torch.equal(generate(paged, inputs, **options), generate(eager, inputs, **options))


@pytest.mark.parametrize("model_type", ["t5", "bart", "whisper"])
def test_an_assistant(pairs, model_type):
    eager, paged = pairs(model_type)
    assistant = make(model_type, "paged_flash")
    with torch.no_grad():  # right now and then
        for parameter in assistant.parameters():
            parameter.add_(0.02 * parameter.abs().mean() * parameter.sign())
    inputs = {name: value[:1] for name, value in inputs_for(model_type).items()}
    if model_type == "whisper":
        inputs["attention_mask"] = torch.ones(1, 60, dtype=torch.int64)
    expected = generate(eager, inputs)
    assert torch.equal(generate(paged, inputs, assistant_model=assistant), expected)


@pytest.mark.parametrize("model_type", ["bart", "t5"])
def test_a_pair_of_caches_of_the_users_own(pairs, model_type):
    """It is told nothing of the encoder's padding, which the masks hide then."""
    eager, paged = pairs(model_type)
    inputs = inputs_for(model_type)
    for options in ({}, {"num_beams": 3}):
        config = paged.config
        cache = EncoderDecoderCache(PagedCache(config, block_size=32), PagedCache(config))
        ours = generate(paged, inputs, past_key_values=cache, **options)
        assert torch.equal(ours, generate(eager, inputs, **options))
        assert cache.self_attention_cache.memory().block_size == 32


def test_a_copy_of_the_pair_before_its_first_forward(pairs):
    """Its halves know of each other: the encoder's padding is not stored, and nothing is made dense."""
    eager, paged = pairs("bart")
    inputs = inputs_for("bart")
    cache = copy.deepcopy(paged_encoder_decoder_cache(paged.config, batch_size=3))
    reset_counters()
    ours = generate(paged, inputs, past_key_values=cache)
    assert torch.equal(ours, generate(eager, inputs))
    assert cache.cross_attention_cache.memory().tokens == int(inputs["attention_mask"].sum())
    assert counters().dense_gather_total == 0


def test_the_encoders_keys_have_no_window():
    config = tiny_config("mistral", sliding_window=8)
    cache = paged_encoder_decoder_cache(config, batch_size=1)
    assert [group.window for group in cache.self_attention_cache.groups] == [8]
    assert [group.window for group in cache.cross_attention_cache.groups] == [None]


class TestMethods:
    """Of EncoderDecoderCache, beside the same on a pair of DynamicCaches."""

    @pytest.fixture
    def both(self, pairs):
        """(model, cache, inputs): eager with DynamicCaches and ours, after a forward of five tokens."""
        eager, paged = pairs("bart")
        inputs = inputs_for("bart") | {"decoder_input_ids": ragged_batch([5] * 3, None, seed=2)[0]}
        made = []
        for model, kind in ((eager, DynamicCache), (paged, PagedCache)):
            cache = EncoderDecoderCache(kind(config=model.config), kind(config=model.config))
            with torch.no_grad():
                model(**inputs, past_key_values=cache)
            made.append((model, cache))
        return made, inputs

    @pytest.mark.parametrize(
        ("change", "rows"),
        [
            (lambda cache: cache.crop(-2), [0, 1, 2]),
            (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
            (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        ],
        ids=["crop", "reorder", "repeat", "select"],
    )
    def test_change(self, both, change, rows):
        made, inputs = both
        logits = []
        for model, cache in made:
            assert cache.is_updated == {0: True, 1: True}
            change(cache)
            columns = cache.get_seq_length()
            encoded = model.get_encoder()(inputs["input_ids"], inputs["attention_mask"])
            encoded.last_hidden_state = encoded.last_hidden_state[rows]
            with torch.no_grad():
                logits.append(
                    model(
                        encoder_outputs=encoded,
                        attention_mask=inputs["attention_mask"][rows],
                        decoder_input_ids=torch.arange(5, 5 + len(rows))[:, None],
                        past_key_values=cache,
                    ).logits
                )
            assert cache.get_seq_length() == columns + 1
        torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)

    def test_reset(self, both):
        ((_, _), (model, cache)), inputs = both
        cache.reset()
        assert cache.is_updated == {0: False, 1: False}
        assert cache.cross_attention_cache.memory().bytes_reserved == 0
        with torch.no_grad():
            again = model(**inputs, past_key_values=cache).logits
            fresh = model(**inputs, use_cache=False).logits
        torch.testing.assert_close(again, fresh, rtol=0, atol=1e-5)

    def test_other_caches_are_refused_as_before(self):
        class Other(DynamicCache.__mro__[1]):
            pass

        cache = EncoderDecoderCache(Other(layers=[]), Other(layers=[]))
        with pytest.raises(TypeError, match="only defined for dynamic cache"):
            cache.crop(-1)


def test_a_mask_that_hides_other_keys_later_on_is_refused(pairs, monkeypatch):
    _, paged = pairs("bart")
    seen = caches_of(paged, monkeypatch)
    inputs = inputs_for("bart")
    generate(paged, inputs, max_new_tokens=4)
    encoded = paged.get_encoder()(**inputs)
    with torch.no_grad(), pytest.raises(UnsupportedFeatureError, match="padding was left out"):
        paged(
            encoder_outputs=encoded,
            attention_mask=None,
            decoder_input_ids=torch.ones(3, 1, dtype=torch.int64),
            past_key_values=seen[0],
        )


def test_caches_that_were_named_are_left_alone(pairs, monkeypatch):
    eager, paged = pairs("bart")
    seen = caches_of(paged, monkeypatch)
    inputs = inputs_for("bart")
    given = EncoderDecoderCache(DynamicCache(config=paged.config), DynamicCache(config=paged.config))
    ours = generate(paged, inputs, past_key_values=given)
    assert torch.equal(ours, generate(eager, inputs))
    assert seen == [given] and type(given.self_attention_cache) is DynamicCache


def test_a_model_that_makes_its_own_cross_attention_cache():
    """T5Gemma: sliding windows in the decoder, none over the encoder."""
    models = []
    for implementation in ("eager", "paged_flash"):
        torch.manual_seed(0)
        config = AutoConfig.for_model("t5gemma", encoder=dict(_T5GEMMA_HALF), decoder=dict(_T5GEMMA_HALF), **_COMMON)
        model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation=implementation)
        randomize(model)
        models.append(model.eval())
    inputs = inputs_for("t5")
    for options in ({}, {"num_beams": 3}):
        options |= {"return_dict_in_generate": True, "max_new_tokens": 40}
        expected, ours = (generate(model, inputs, **options) for model in models)
        assert torch.equal(ours.sequences, expected.sequences)
        assert isinstance(ours.past_key_values.self_attention_cache, PagedCache)
        assert type(ours.past_key_values.cross_attention_cache) is DynamicCache
        (sliding,) = (g for g in ours.past_key_values.self_attention_cache.groups if g.window)
        assert sliding.has_given_back


def test_long_speech(pairs):
    """Whisper's own loop over 30-second pieces, here of 60 frames."""
    eager, paged = pairs("whisper")
    features = torch.randn(2, 8, 150, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 150, dtype=torch.int64)
    mask[1, 130:] = 0
    results = []
    for model in (eager, paged):
        model.generation_config.no_timestamps_token_id = 80
        model.generation_config.eos_token_id = 2
        torch.manual_seed(0)
        results.append(
            model.generate(
                features,
                attention_mask=mask,
                return_timestamps=True,
                return_segments=True,
                temperature=(0.0, 0.4),
                logprob_threshold=-1.0,
                compression_ratio_threshold=1.35,
                max_new_tokens=20,
            )
        )
    expected, ours = results
    assert torch.equal(ours["sequences"], expected["sequences"])
    assert [len(row) for row in ours["segments"]] == [len(row) for row in expected["segments"]]
