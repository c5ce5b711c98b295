"""generate() under paged_flash on the CPU path: token for token what eager with DynamicCache gives."""

import gc
import threading
import weakref

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import DynamicCache, PreTrainedTokenizerFast, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from hf_paged_flash import ArgumentError, PagedCache, UnsupportedFeatureError, counters
from tests.integration.models import LENGTHS, NEW_TOKENS, Pair, held, new_tokens, unpadded_runs
from tests.tiny_models import VOCAB_SIZE, ragged_batch

# fp32 in another order of operations, over logits of size 5
LOGIT_TOLERANCE = {"rtol": 0.0, "atol": 5e-5}
# One of each way that keys are read, for what does not depend on the architecture: full, mixed windows with sinks, and
# the dense way
KINDS = ("llama", "gpt_oss", "deepseek_v3")


def test_every_layer_runs_through_us_in_every_forward(pair):
    input_ids, mask = ragged_batch(LENGTHS, "left")
    out = pair.paged.generate(input_ids, attention_mask=mask, max_new_tokens=8, return_dict_in_generate=True)
    assert pair.paged.config._attn_implementation == "paged_flash"
    assert isinstance(out.past_key_values, PagedCache)
    layers, decode_steps = pair.paged.config.num_hidden_layers, 7
    ran = counters()
    assert ran.kernel_total == 0
    assert ran.reference["store_kv"] == layers * (1 + decode_steps)
    if pair.is_dense:
        assert ran.reference["flash_forward"] == layers * (1 + decode_steps)
        assert "paged_decode" not in ran.reference
        assert ran.dense_gather_total > 0
    else:
        assert ran.reference["flash_forward"] == layers
        assert ran.reference["paged_decode"] == layers * decode_steps
        assert ran.dense_gather_total == 0
    memory = out.past_key_values.memory()
    lengths = [length + decode_steps for length in LENGTHS]
    assert (memory.tokens, memory.blocks_used) == held(out.past_key_values, lengths)


def test_left_padding(pair):
    input_ids, mask = ragged_batch(LENGTHS, "left")
    paged = new_tokens(pair.paged, input_ids, mask)
    assert torch.equal(paged, new_tokens(pair.eager, input_ids, mask))
    assert torch.equal(paged, unpadded_runs(pair.eager))
    assert len({tuple(row) for row in paged.tolist()}) == len(LENGTHS)
    assert max(len(set(row)) for row in paged.tolist()) > 4, "a model that only repeats itself shows no attention"


@pytest.mark.parametrize("pad", ["left", "right"])
def test_tensors_of_the_host_stay_there(pad, pair):
    """`torch.set_default_device` speaks of tensors for which nothing else is said."""
    input_ids, mask = ragged_batch(LENGTHS, pad)
    expected = new_tokens(pair.paged, input_ids, mask)
    with torch.device("meta"):
        assert torch.equal(new_tokens(pair.paged, input_ids, mask), expected)


@pytest.mark.parametrize("explicit", [True, False], ids=["mask of ones", "no mask"])
def test_no_padding(pair, explicit):
    input_ids, mask = ragged_batch([21, 21, 21], None)
    mask = mask if explicit else None
    assert torch.equal(new_tokens(pair.paged, input_ids, mask), new_tokens(pair.eager, input_ids, mask))


def test_right_padding_equals_the_unpadded_rows(pair):
    input_ids, mask = ragged_batch(LENGTHS, "right")
    expected = unpadded_runs(pair.eager)
    assert torch.equal(new_tokens(pair.paged, input_ids, mask), expected)
    # eager goes on from the padding
    assert not torch.equal(new_tokens(pair.eager, input_ids, mask), expected)


@pytest.mark.parametrize("shape", [(2, 7), (1, 5)])
def test_a_mask_of_another_shape_is_refused(load, shape):
    with pytest.raises(ArgumentError, match=r"must have the shape of `input_ids`, \(1, 7\), got"):
        new_tokens(load("llama").paged, torch.arange(5, 12)[None], torch.ones(shape, dtype=torch.long))


def test_a_right_padded_prompt_is_refused_where_tokens_are_tried(load):
    input_ids = torch.tensor([[5, 6, 7, 5, 6, 7, 0, 0]])
    with pytest.raises(UnsupportedFeatureError, match="right-padded prompt: pad on the left"):
        new_tokens(load("llama").paged, input_ids, (input_ids > 0).long(), prompt_lookup_num_tokens=2)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8},
        {"repetition_penalty": 1.3, "num_return_sequences": 2},
        {"do_sample": False, "num_beams": 3},
    ],
    ids=["sample", "two samples", "beams"],
)
def test_strategies_scores_and_logits(pair, options):
    input_ids, mask = ragged_batch(LENGTHS, "left")
    # top_k, 50 if nothing is said, would turn the last bit of a logit at its edge into -inf
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 16, "return_dict_in_generate": True} | options
    outputs = []
    for model in (pair.eager, pair.paged):
        torch.manual_seed(11)
        outputs.append(
            model.generate(input_ids, attention_mask=mask, output_scores=True, output_logits=True, **options)
        )
    expected, paged = outputs
    assert isinstance(paged.past_key_values, PagedCache) and isinstance(expected.past_key_values, DynamicCache)
    assert torch.equal(paged.sequences, expected.sequences)
    assert len(paged.scores) == len(paged.logits) == 16
    for name in ("logits", "scores"):
        torch.testing.assert_close(torch.stack(paged[name]), torch.stack(expected[name]), **LOGIT_TOLERANCE)


def test_rows_that_end_early(pair):
    input_ids, mask = ragged_batch(LENGTHS, "left")
    end = int(unpadded_runs(pair.eager)[2, 3])
    paged = new_tokens(pair.paged, input_ids, mask, eos_token_id=end)
    assert torch.equal(paged, new_tokens(pair.eager, input_ids, mask, eos_token_id=end))
    assert paged.shape[1] > 4 and not paged[2, 4:].any(), "row 2 goes on"


def test_without_a_cache(pair):
    input_ids, mask = ragged_batch(LENGTHS, "left")
    paged = new_tokens(pair.paged, input_ids, mask, use_cache=False, max_new_tokens=4)
    assert torch.equal(paged, unpadded_runs(pair.eager)[:, :4])
    layers = pair.paged.config.num_hidden_layers
    assert counters().reference == {"flash_forward": 4 * layers}


def test_inputs_embeds(pair):
    input_ids, mask = ragged_batch(LENGTHS, "left")
    embeds = pair.paged.get_input_embeddings()(input_ids).detach()
    paged = pair.paged.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(paged, unpadded_runs(pair.eager)[:, :12])


@pytest.mark.parametrize("chunk", [1, 7, 16, 17])
def test_chunked_prefill(pair, chunk):
    # 7: the rows begin in different chunks; 17: the last chunk is longer than a decode step takes
    input_ids, mask = ragged_batch((34, 11, 19, 1), "left")
    paged = new_tokens(pair.paged, input_ids, mask, prefill_chunk_size=chunk, max_new_tokens=8)
    assert torch.equal(paged, unpadded_runs(pair.eager, (34, 11, 19, 1), 8))


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("model_type", KINDS)
def test_explicit_cache_of_any_block_size(load, model_type, block_size):
    pair = load(model_type)
    input_ids, mask = ragged_batch(LENGTHS, "left")
    cache = PagedCache(pair.paged.config, block_size=block_size)
    assert torch.equal(new_tokens(pair.paged, input_ids, mask, past_key_values=cache), unpadded_runs(pair.eager))
    memory = cache.memory()
    stored = [length + NEW_TOKENS - 1 for length in LENGTHS]  # the last token is never fed back
    assert (memory.block_size, memory.tokens, memory.blocks_used) == (block_size, *held(cache, stored))


@pytest.mark.parametrize("model_type", KINDS)
def test_more_new_tokens_than_the_first_pool_holds(load, model_type):
    pair = load(model_type)
    input_ids, mask = ragged_batch((16, 5), "left")
    cache = PagedCache(pair.paged.config)
    pools = []
    streamer = _Tokens(lambda: pools.append(cache.memory().blocks_used))
    paged = new_tokens(pair.paged, input_ids[:1], None, past_key_values=cache, max_new_tokens=90, streamer=streamer)
    assert torch.equal(paged, unpadded_runs(pair.eager, (16, 5), 90)[:1])
    assert pools[1] == len(cache.groups) and pools[-1] == held(cache, [105])[1]  # 16 tokens after the prefill
    cache = PagedCache(pair.paged.config)
    paged = new_tokens(pair.paged, input_ids, mask, past_key_values=cache, max_new_tokens=90)
    assert torch.equal(paged, unpadded_runs(pair.eager, (16, 5), 90))
    assert cache.memory().blocks_used == held(cache, [105, 94])[1]


class _Tokens(BaseStreamer):
    """Keeps what `generate()` streams: the prompt, then token after token; calls `each_time`."""

    def __init__(self, each_time=lambda: None):
        self.tokens: list[int] = []
        self.ended = False
        self.each_time = each_time

    def put(self, value):
        self.tokens += value.flatten().tolist()
        self.each_time()

    def end(self):
        self.ended = True


def test_streamer_gets_every_token(pair):
    input_ids, _ = ragged_batch([13], None)
    streamer = _Tokens()
    pair.paged.generate(input_ids, streamer=streamer, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert streamer.ended
    assert streamer.tokens == input_ids[0].tolist() + unpadded_runs(pair.eager, (13,))[0].tolist()


def test_text_streamed_from_another_thread(load):
    pair = load("llama")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
    inputs = tokenizer(["w5 w71 w8 w30 w9"], return_tensors="pt")
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=pair.paged.generate, kwargs={**inputs, **options, "streamer": streamer})
    thread.start()
    # the mask function finds its cache by thread: another generation here must not get in the way
    here = new_tokens(pair.paged, *ragged_batch(LENGTHS, "left"))
    text = "".join(streamer)
    thread.join()
    expected = pair.eager.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    assert text == tokenizer.decode(expected)
    assert torch.equal(here, unpadded_runs(pair.eager))


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("pass_whole", [True, False], ids=["whole conversation", "new tokens only"])
def test_several_turns_on_one_cache(pair, pass_whole, pad):
    """Four user turns of other lengths in every row, so padding lies between the turns too."""
    cache = PagedCache(pair.paged.config)
    input_ids = torch.zeros(4, 0, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for turn, lengths in enumerate([LENGTHS, (3, 9, 1, 20), (2, 2, 2, 2), (1, 5, 3, 2)]):
        said, said_mask = ragged_batch(lengths, pad, seed=turn)
        input_ids, mask = torch.cat([input_ids, said], 1), torch.cat([mask, said_mask], 1)
        # the last answer's last token is not in the cache yet: it is new as well
        given = input_ids if pass_whole else input_ids[:, cache.get_seq_length() :]
        answer = new_tokens(pair.paged, given, mask, past_key_values=cache, max_new_tokens=8)
        assert torch.equal(answer, _alone(pair, input_ids, mask))
        input_ids = torch.cat([input_ids, answer], 1)
        mask = torch.cat([mask, torch.ones_like(answer)], 1)
    assert cache.get_seq_length() == input_ids.shape[1] - 1
    assert cache.memory().tokens == held(cache, (mask.sum(1) - 1).tolist())[0]


@pytest.mark.parametrize("turns", [(True, False), (False, True)], ids=["then without", "then with"])
def test_autocast_in_some_turns(pair, turns):
    """Keys come in another dtype than they are stored in."""
    logits = []
    for model, cache in ((pair.eager, DynamicCache()), (pair.paged, PagedCache(pair.paged.config))):
        for is_on, length, new in zip(turns, (40, 52), (1, 3), strict=True):
            ids = torch.cat([ragged_batch([40, 40], None)[0], ragged_batch([12, 12], None, seed=1)[0]], 1)[:, :length]
            with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
                shown = model.generate(
                    ids, past_key_values=cache, max_new_tokens=new, do_sample=False,
                    output_logits=True, return_dict_in_generate=True,
                )  # fmt: skip
        logits.append(shown.logits[0].float())
    expected, ours = logits
    assert (ours - expected).norm() < 0.05 * expected.norm()


def _alone(pair: Pair, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What eager answers to each row, without padding and from an empty cache."""
    rows = [row[keep.bool()][None] for row, keep in zip(input_ids, mask, strict=True)]
    # a mask of ones: given none, transformers takes an answer's token 0 for padding
    return torch.cat([new_tokens(pair.eager, row, torch.ones_like(row), max_new_tokens=8) for row in rows])


@pytest.mark.parametrize("model_type", KINDS)
def test_a_cache_serves_again_after_reset(load, model_type):
    pair = load(model_type)
    input_ids, mask = ragged_batch(LENGTHS, "left")
    cache = PagedCache(pair.paged.config)
    new_tokens(pair.paged, *ragged_batch((40, 3), "left", seed=5), past_key_values=cache)
    cache.reset()
    assert cache.memory().bytes_reserved == 0
    assert torch.equal(new_tokens(pair.paged, input_ids, mask, past_key_values=cache), unpadded_runs(pair.eager))


@pytest.mark.parametrize("model_type", KINDS)
def test_a_dropped_cache_frees_its_blocks_at_once(load, model_type):
    pair = load(model_type)
    cache = PagedCache(pair.paged.config)
    gc.disable()
    try:
        new_tokens(pair.paged, *ragged_batch(LENGTHS, "left"), past_key_values=cache)
        pool = weakref.ref(cache.layers[0].pool.key)
        del cache
        assert pool() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("way", ["assistant", "lookup"])
def test_assisted_decoding_does_not_go_on_from_a_kept_cache(load, way):
    """transformers would compute the kept columns once more, and with a DynamicCache gives wrong tokens."""
    pair = load("llama")
    input_ids = ragged_batch([20], None)[0]
    cache = PagedCache(pair.paged.config)
    ids = pair.paged.generate(input_ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    ids = torch.cat([ids, input_ids[:, :3]], 1)
    options = {"prompt_lookup_num_tokens": 3} if way == "lookup" else {"assistant_model": pair.eager}
    columns = cache.get_seq_length()
    with pytest.raises(UnsupportedFeatureError, match="can't go on from the 23 columns"):
        pair.paged.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False, **options)
    assert cache.get_seq_length() == columns
    more = pair.paged.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert torch.equal(more, pair.eager.generate(ids, max_new_tokens=4, do_sample=False))
