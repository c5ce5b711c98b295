"""Decode steps replayed as graphs, over a recorder on the CPU: eager's tokens, whatever `generate()` is asked for."""

import copy
import gc
import itertools
import logging
import threading
import weakref
from unittest import mock

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import DeferredStopCheck
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_paged_flash import CacheFullError, PagedCache, disable_prefix_caching, enable_prefix_caching
from hf_paged_flash.generation import decode_graph
from hf_paged_flash.patches import deferred_stops
from hf_paged_flash.patches.base import cache_name
from tests.integration.models import LENGTHS, NEW_TOKENS, new_tokens, unpadded_runs
from tests.tiny_models import ragged_batch, tiny_config, tiny_model

STEPS = NEW_TOKENS - 1  # forwards of one token a row
# full attention; learned positions; windows beside it, in groups that give blocks back; sinks and experts
MODELS = ("llama", "gpt2", "gemma3_text", "gpt_oss")
LOGIT_TOLERANCE = {"rtol": 0.0, "atol": 5e-5}


@pytest.fixture(autouse=True)
def steps_alone(monkeypatch):
    """Prompts are not replayed."""
    monkeypatch.setattr("hf_paged_flash.generation.decode_loop.length_of", lambda counts: None)


@pytest.fixture(params=MODELS)
def pair(request, load):
    return _without_waiting(load(request.param))


@pytest.fixture
def llama(load):
    return load("llama")


def _without_waiting(pair):
    if "gpt_oss" in pair.paged.config.model_type:
        pair.paged.set_experts_implementation("batched_mm")  # as generate() does on a GPU
    return pair


class TestReplays:
    def test_greedy(self, pair, recorders, elastic):
        """A ragged batch; the second call replays what the first one has captured."""
        batch = ragged_batch(LENGTHS)
        assert torch.equal(new_tokens(pair.paged, *batch), unpadded_runs(pair.eager))
        assert (recorders.captured, recorders.replayed) == (1, STEPS - 1), "the first step is the warm-up"
        assert elastic.pages == len(elastic.ranges), "more than a page a layer of the cache's memory is kept"
        assert torch.equal(new_tokens(pair.paged, *batch), unpadded_runs(pair.eager))
        assert (recorders.captured, recorders.replayed) == (1, 2 * STEPS - 1)

    def test_other_prompts_of_the_same_batch_size(self, llama, recorders, elastic):
        for seed, lengths in enumerate([LENGTHS, (3, 40, 2, 9), (60, 60, 60, 60)]):
            tokens = new_tokens(llama.paged, *ragged_batch(lengths, seed=seed))
            assert torch.equal(tokens, unpadded_runs(llama.eager, lengths, seed=seed))
        assert (recorders.captured, recorders.replayed) == (1, 3 * STEPS - 1)

    def test_wider_tables(self, pair, recorders, elastic, monkeypatch):
        monkeypatch.setattr(decode_graph, "MIN_WIDTH", 1)
        tokens = new_tokens(pair.paged, *ragged_batch(LENGTHS), max_new_tokens=70)
        assert torch.equal(tokens, unpadded_runs(pair.eager, LENGTHS, 70))
        assert (recorders.captured, recorders.replayed) == (3, 68)  # of 2, 4 and 8 blocks: 31 to 99 tokens

    def test_pools_that_move(self, pair, recorders):
        """Ordinary tensors are copied when they grow, and each cache has its own."""
        for calls in (1, 2):
            tokens = new_tokens(pair.paged, *ragged_batch(LENGTHS), max_new_tokens=70)
            assert torch.equal(tokens, unpadded_runs(pair.eager, LENGTHS, 70))
            assert recorders.replayed == calls * 69 - 1
            assert recorders.captured <= calls * 4
            assert len(decode_graph.graphs_of(pair.paged)._graphs) == 1, "what is captured over old pools goes"

    def test_batch_sizes(self, llama, recorders, elastic):
        for rows in (1, 2, 1, 2):
            input_ids, mask = ragged_batch(LENGTHS[:rows])
            assert torch.equal(new_tokens(llama.paged, input_ids, mask), unpadded_runs(llama.eager, LENGTHS[:rows]))
        assert (recorders.captured, recorders.replayed) == (2, 4 * STEPS - 2)

    @pytest.mark.parametrize(
        "options",
        [
            {"do_sample": True, "top_k": 0, "temperature": 0.8},
            {"do_sample": True, "top_k": 0, "repetition_penalty": 1.3, "num_return_sequences": 2},
            {"num_beams": 3},
            {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True},
        ],
        ids=["sample", "two samples", "beams", "two of four beams"],
    )
    def test_strategies_scores_and_logits(self, pair, recorders, elastic, options):
        input_ids, mask = ragged_batch(LENGTHS)
        options = {"do_sample": False, "max_new_tokens": 20, "return_dict_in_generate": True} | options
        outputs = []
        for model in (pair.eager, pair.paged):
            torch.manual_seed(11)
            options |= {"output_scores": True, "output_logits": True}
            outputs.append(model.generate(input_ids, attention_mask=mask, **options))
        expected, paged = outputs
        assert torch.equal(paged.sequences, expected.sequences)
        for name in ("logits", "scores"):
            torch.testing.assert_close(
                torch.stack(getattr(paged, name)), torch.stack(getattr(expected, name)), **LOGIT_TOLERANCE
            )
        assert recorders.replayed == 18

    def test_a_cache_can_be_saved_afterwards(self, llama, recorders, elastic, tmp_path):
        """It holds none of the tensors that graphs read, which are parts of one."""
        input_ids, mask = ragged_batch(LENGTHS)
        options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True}
        for _ in range(2):
            cache = llama.paged.generate(input_ids, **options).past_key_values
        assert recorders.replayed
        torch.save(cache, tmp_path / "cache.pt")
        again = torch.load(tmp_path / "cache.pt", weights_only=False)
        for stored, saved in zip(cache.layers, again.layers, strict=True):
            assert torch.equal(stored.keys, saved.keys) and torch.equal(stored.values, saved.values)

    @pytest.mark.parametrize("helper", ["an assistant", "the model itself", "prompt lookup"])
    def test_drafts(self, pair, recorders, elastic, helper, monkeypatch):
        reasons = []
        monkeypatch.setattr("hf_paged_flash.generation.decode_loop._say", reasons.append)
        input_ids = ragged_batch([17], None)[0].repeat(1, 2)
        options = {"prompt_lookup_num_tokens": 5}
        if helper == "an assistant":
            assistant = copy.deepcopy(pair.paged)
            with torch.no_grad():  # right now and then
                for parameter in assistant.parameters():
                    parameter.add_(0.02 * parameter.sign() * parameter.abs().mean())
            options = {"assistant_model": assistant}
        elif helper == "the model itself":
            options = {"assistant_model": pair.paged}
            for name, value in {"num_assistant_tokens": 4, "assistant_confidence_threshold": 0.0}.items():
                monkeypatch.setattr(pair.paged.generation_config, name, value)
        results = [
            model.generate(
                input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, max_new_tokens=40,
                return_dict_in_generate=True, output_logits=True, **(options if model is pair.paged else {}),
            )
            for model in (pair.eager, pair.paged)
        ]  # fmt: skip
        assert torch.equal(results[1].sequences, results[0].sequences)
        logits = [torch.stack(result.logits[:40]) for result in results]
        torch.testing.assert_close(*logits, **LOGIT_TOLERANCE)
        assert recorders.replayed >= 5
        assert ["its own assistant" in reason for reason in set(reasons)] == [True] * (helper == "the model itself")

    def test_streamer(self, llama, recorders, elastic):
        input_ids = ragged_batch([13], None)[0]
        streamer = _Tokens()
        llama.paged.generate(input_ids, streamer=streamer, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert streamer.tokens == input_ids[0].tolist() + unpadded_runs(llama.eager, (13,))[0].tolist()
        assert recorders.replayed == STEPS - 1

    def test_rows_that_end_early(self, pair, recorders, elastic):
        input_ids, mask = ragged_batch(LENGTHS)
        end = int(unpadded_runs(pair.eager)[2, 3])
        outputs = [new_tokens(model, input_ids, mask, eos_token_id=end) for model in (pair.eager, pair.paged)]
        assert torch.equal(*outputs)
        assert recorders.replayed == outputs[0].shape[1] - 2

    def test_inference_mode(self, llama, recorders, elastic):
        """A graph that was captured in one mode is replayed in the other."""
        for mode in (True, False, True):
            with torch.inference_mode(mode):
                tokens = new_tokens(llama.paged, *ragged_batch(LENGTHS))
                assert torch.equal(tokens, unpadded_runs(llama.eager).clone())
        assert (recorders.captured, recorders.replayed) == (1, 3 * STEPS - 1)

    def test_right_padding(self, pair, recorders, elastic):
        assert torch.equal(new_tokens(pair.paged, *ragged_batch(LENGTHS, "right")), unpadded_runs(pair.eager))
        assert recorders.replayed == STEPS - 1


class TestTheCache:
    def test_turns_on_one_cache(self, pair, recorders, elastic):
        """Replayed and eager forwards after one another: turns have padding between them."""
        cache = PagedCache(pair.paged.config)
        input_ids = torch.zeros(4, 0, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for turn, lengths in enumerate([LENGTHS, (3, 9, 1, 20), (2, 2, 2, 2)]):
            said, said_mask = ragged_batch(lengths, seed=turn)
            input_ids, mask = torch.cat([input_ids, said], 1), torch.cat([mask, said_mask], 1)
            answer = new_tokens(pair.paged, input_ids, mask, past_key_values=cache, max_new_tokens=8)
            rows = [row[keep.bool()][None] for row, keep in zip(input_ids, mask, strict=True)]
            alone = [new_tokens(pair.eager, row, torch.ones_like(row), max_new_tokens=8) for row in rows]
            assert torch.equal(answer, torch.cat(alone))
            input_ids, mask = torch.cat([input_ids, answer], 1), torch.cat([mask, torch.ones_like(answer)], 1)
        assert (recorders.captured, recorders.replayed) == (1, 3 * 7 - 1)

    def test_it_is_as_after_eager_steps(self, llama, recorders, elastic):
        input_ids, mask = ragged_batch(LENGTHS)
        options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 20, "return_dict_in_generate": True}
        cache = llama.paged.generate(input_ids, **options).past_key_values
        other = llama.paged.generate(input_ids, disable_compile=True, **options).past_key_values
        # another generation writes over what the graph has read
        new_tokens(llama.paged, *ragged_batch(LENGTHS, seed=3), past_key_values=PagedCache(llama.paged.config))
        assert cache.get_seq_length() == other.get_seq_length() == 30 + 19
        assert cache.memory() == other.memory()
        assert cache.group.cache_seqlens.tolist() == other.group.cache_seqlens.tolist()
        for ours, theirs in zip(cache.layers, other.layers, strict=True):
            torch.testing.assert_close(torch.clone(ours.keys), torch.clone(theirs.keys), **LOGIT_TOLERANCE)

    def test_full(self, llama, recorders):
        """What is refused in the middle leaves the cache as it was, and the next call goes on with it."""
        cache = PagedCache(llama.paged.config, num_blocks=4)
        input_ids = ragged_batch([30], None)[0]
        streamer = _Tokens()
        with pytest.raises(CacheFullError, match="1 more blocks"):
            new_tokens(llama.paged, input_ids, None, past_key_values=cache, max_new_tokens=90, streamer=streamer)
        assert cache.get_seq_length() == 64 and recorders.replayed == 64 - 30 - 1
        expected = unpadded_runs(llama.eager, (30,), 90)[0].tolist()
        assert streamer.tokens[30:] == expected[:35]
        assert cache.group.cache_seqlens.tolist() == [64]
        cache.crop(-10)
        so_far = torch.tensor([streamer.tokens[:55]])
        assert (
            new_tokens(llama.paged, so_far, None, past_key_values=cache, max_new_tokens=9)[0].tolist()
            == expected[25:34]
        )

    def test_caches_of_the_user(self, llama, recorders, elastic):
        """New ones each time, with a cap or none: they lie where the last one lay."""
        for cap in (None, 40, None):
            cache = PagedCache(llama.paged.config, num_blocks=cap)
            tokens = new_tokens(llama.paged, *ragged_batch(LENGTHS), past_key_values=cache)
            assert torch.equal(tokens, unpadded_runs(llama.eager))
            del cache
        assert (recorders.captured, recorders.replayed) == (1, 3 * STEPS - 1)

    def test_block_sizes_and_dtypes(self, llama, recorders, elastic):
        """Other blocks at the same addresses are another graph, after a warm-up that compiles kernels for them."""
        options = [{"block_size": 16}, {"block_size": 32}, {"dtype": torch.float64}]
        for option in options * 2:
            cache = PagedCache(llama.paged.config, **option)
            tokens = new_tokens(llama.paged, *ragged_batch(LENGTHS), past_key_values=cache)
            assert torch.equal(tokens, unpadded_runs(llama.eager))
            del cache
        assert (recorders.captured, recorders.replayed) == (3, 6 * STEPS - 3)

    def test_addresses_are_handed_on(self, llama, recorders, elastic):
        """A cache that is kept keeps its addresses; those of a dropped one serve the next."""
        input_ids, mask = ragged_batch(LENGTHS)
        options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 5, "return_dict_in_generate": True}
        kept = llama.paged.generate(input_ids, **options).past_key_values
        first = len(elastic.ranges)
        other = llama.paged.generate(input_ids, **options).past_key_values
        assert recorders.captured == 2 and len(elastic.ranges) == 2 * first
        del other
        gc.collect()
        del kept
        gc.collect()
        assert elastic.pages == len(elastic.ranges) == first
        llama.paged.generate(input_ids, **options)
        assert recorders.captured == 2


class _Tokens(BaseStreamer):
    def __init__(self):
        self.tokens: list[int] = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        pass


class TestFinishedRows:
    """Rows that have ended give their blocks back while the others go on."""

    @pytest.fixture
    def watched(self, monkeypatch):
        """The blocks that each step leaves in use in the layers without a window."""
        monkeypatch.setattr("hf_paged_flash.generation.decode_loop.LISTENING", 1)
        used = []
        original = decode_graph.DecodeGraphs.forward

        def forward(self, model, cache, *args):
            outputs = original(self, model, cache, *args)
            used.append(next(group.blocks_used for group in cache.groups if group.window is None))
            return outputs

        monkeypatch.setattr(decode_graph.DecodeGraphs, "forward", forward)
        return used

    def _end(self, pair) -> int:
        """A token with which the longest row ends early, and another one goes on for long."""
        tokens = unpadded_runs(pair.eager, LENGTHS, 40)
        for token in tokens[0, 2:8].tolist():
            first = [row.index(token) if token in row else 40 for row in tokens.tolist()]
            if first[0] < 8 and max(first) >= 30:
                return token
        raise AssertionError("no such token: other weights are needed")

    def test_blocks_come_back(self, pair, recorders, elastic, watched):
        end = self._end(pair)
        batch = ragged_batch(LENGTHS)
        options = {"max_new_tokens": 40, "eos_token_id": end}
        expected = new_tokens(pair.eager, *batch, **options)
        assert torch.equal(new_tokens(pair.paged, *batch, **options), expected)
        assert recorders.captured == 1 and recorders.replayed == expected.shape[1] - 2
        steps = expected.shape[1]
        # it is heard of a token later, and holds for the forward after
        ended = [row.index(end) + 2 if end in row else steps for row in expected.tolist()]
        assert min(ended) < 12 and max(ended) >= 30
        for step, used in enumerate(watched, 1):
            lengths = [length + step for length, last in zip(LENGTHS, ended, strict=True) if last > step]
            assert used == sum(-(-length // 16) for length in lengths), step
        assert elastic.pages == len(elastic.ranges)

    @pytest.mark.parametrize("kept", ["returned", "given"])
    def test_not_from_a_cache_that_is_kept(self, llama, recorders, elastic, watched, kept):
        input_ids, mask = ragged_batch(LENGTHS)
        options = {"max_new_tokens": 40, "eos_token_id": self._end(llama), "do_sample": False}
        cache = PagedCache(llama.paged.config)
        options |= {"past_key_values": cache} if kept == "given" else {"return_dict_in_generate": True}
        out = llama.paged.generate(input_ids, attention_mask=mask, **options)
        cache = cache if kept == "given" else out.past_key_values
        columns = cache.get_seq_length()
        assert cache.memory().tokens == sum(LENGTHS) + len(LENGTHS) * (columns - max(LENGTHS))
        assert watched == sorted(watched)

    def test_not_where_answers_are_kept_for_later_prompts(self, llama, recorders, elastic, watched):
        cache = enable_prefix_caching(llama.paged)
        try:
            input_ids, mask = ragged_batch(LENGTHS)
            new_tokens(llama.paged, input_ids, mask, max_new_tokens=40, eos_token_id=self._end(llama))
            assert watched == sorted(watched)
            # what a row that ended early went on with is known, in whole blocks
            answer = unpadded_runs(llama.eager, LENGTHS, 40)[0, :8]
            prompt = torch.cat([input_ids[0, mask[0].bool()], answer])[None, :33]
            new_tokens(llama.paged, prompt, None, max_new_tokens=1)
            assert cache.memory().prefix_tokens_hit == 32 > LENGTHS[0] // 16 * 16
        finally:
            disable_prefix_caching(llama.paged)
            del cache

    def test_sampled(self, llama, recorders, elastic, watched):
        """The rows that go on draw the same numbers."""
        input_ids, mask = ragged_batch(LENGTHS)
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": 40, "eos_token_id": list(range(2, 9))}
        results = []
        for model in (llama.eager, llama.paged):
            torch.manual_seed(3)
            results.append(new_tokens(model, input_ids, mask, **options))
        assert torch.equal(*results)
        assert watched[-1] < max(watched)


class TestDeferredStops:
    """The check that does not wait, which costs a forward that is taken back."""

    @pytest.fixture(autouse=True)
    def on_the_cpu(self, monkeypatch):
        monkeypatch.setattr(deferred_stops, "DEVICE_TYPES", {"cpu"})
        monkeypatch.setattr(torch, "Event", lambda **options: mock.Mock())
        finished = []
        original = DeferredStopCheck.finish
        monkeypatch.setattr(DeferredStopCheck, "finish", lambda self: finished.append(original(self)) or finished[-1])
        return finished

    @pytest.mark.parametrize("kept", [False, True])
    @pytest.mark.parametrize("ends", [False, True])
    def test_tokens_scores_and_cache(self, pair, recorders, elastic, on_the_cpu, ends, kept):
        input_ids, mask = ragged_batch(LENGTHS[:1])
        tokens = unpadded_runs(pair.eager, LENGTHS[:1])[0].tolist()
        end = next(token for token in tokens[5:] if tokens.index(token) >= 5) if ends else None
        options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": end}
        options |= {"return_dict_in_generate": True, "output_scores": True} if kept else {}
        streamer = _Tokens()
        results = [pair.eager.generate(input_ids, **options)]
        results.append(pair.paged.generate(input_ids, streamer=streamer, **options))
        sequences = [result.sequences if kept else result for result in results]
        assert torch.equal(*sequences) and streamer.tokens == sequences[0][0].tolist()
        assert on_the_cpu == [int(ends)], "the last step was not taken back"
        if kept:
            assert len(results[1].scores) == len(results[0].scores)
            cache = results[1].past_key_values
            assert cache.get_seq_length() == sequences[0].shape[1] - 1
            assert not any(layer.record_past for layer in cache.layers)

    def test_a_cache_with_a_cap_waits(self, llama, recorders, on_the_cpu):
        cache = PagedCache(llama.paged.config, num_blocks=4)
        new_tokens(llama.paged, ragged_batch([20], None)[0], None, past_key_values=cache)
        assert on_the_cpu == []

    @pytest.mark.parametrize("was_recording", [False, True])
    def test_a_loop_that_raises_leaves_windows_as_they_were(self, recorders, on_the_cpu, was_recording):
        paged = tiny_model(tiny_config("gemma3_text"), "paged_flash")
        cache = PagedCache(paged.config)
        if was_recording:
            cache.activate_past_recording()

        class Raising(LogitsProcessor):
            def __call__(self, input_ids, scores):
                if input_ids.shape[1] == 24:
                    raise RuntimeError("mine")
                return scores

        options = {"past_key_values": cache, "logits_processor": LogitsProcessorList([Raising()])}
        with pytest.raises(RuntimeError, match="mine"):
            new_tokens(paged, ragged_batch([20], None)[0], None, **options)
        assert cache.columns == 24
        assert {layer.record_past for layer in cache.layers} == {was_recording}

    def test_not_without_graphs(self, llama, recorders, on_the_cpu, monkeypatch):
        monkeypatch.setattr("hf_paged_flash.backend._graphs", False)
        new_tokens(llama.paged, ragged_batch([20], None)[0], None)
        assert on_the_cpu == []


class TestInvalidation:
    @pytest.fixture
    def model(self):
        return tiny_model(tiny_config("llama"), "paged_flash")

    def _check(self, model, recorders, captured: int) -> None:
        """The model's tokens are those it gives without graphs, and so many captures were needed up to now."""
        input_ids, mask = ragged_batch(LENGTHS)
        expected = new_tokens(model, input_ids, mask, max_new_tokens=8, disable_compile=True)
        before = recorders.replayed
        assert torch.equal(new_tokens(model, input_ids, mask, max_new_tokens=8), expected)
        assert recorders.captured == captured and recorders.replayed >= before + 6

    def test_weights(self, model, recorders, elastic):
        self._check(model, recorders, 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1.1)  # in place: the graph reads them anew
        self._check(model, recorders, 1)
        model.model.layers[1].mlp.up_proj.weight.data = torch.randn_like(model.model.layers[1].mlp.up_proj.weight)
        self._check(model, recorders, 2)
        model.model.layers[0].self_attn.q_proj = torch.nn.Linear(64, 64, bias=False)
        self._check(model, recorders, 3)
        model.double()
        self._check(model, recorders, 4)

    def test_configuration(self, model, recorders, elastic):
        self._check(model, recorders, 1)
        model.model.layers[2].self_attn.scaling = 0.7
        self._check(model, recorders, 2)
        model.config.num_hidden_layers = 2
        input_ids, mask = ragged_batch(LENGTHS)
        new_tokens(model, input_ids, mask, max_new_tokens=8, past_key_values=PagedCache(model.config))
        assert recorders.captured == 3

    def test_adapters(self, model, recorders, elastic):
        peft = pytest.importorskip("peft")
        self._check(model, recorders, 1)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, config).eval()
        self._check(model, recorders, 2)
        with adapted.disable_adapter():
            self._check(model, recorders, 3)
        self._check(model, recorders, 4)
        adapted.merge_adapter()
        self._check(model, recorders, 5)
        adapted.unmerge_adapter()
        adapted.add_adapter("other", config)
        adapted.set_adapter("other")
        adapted.eval()
        self._check(model, recorders, 6)

    def test_they_go_with_the_model(self, recorders, elastic):
        model = tiny_model(tiny_config("llama"), "paged_flash")
        self._check(model, recorders, 1)
        weight = weakref.ref(model.lm_head.weight)
        del model
        gc.collect()
        assert weight() is None and not decode_graph._of_models and not elastic.ranges


class TestRefusals:
    @pytest.fixture
    def model(self):
        return tiny_model(tiny_config("llama"), "paged_flash")

    @pytest.fixture
    def said(self, monkeypatch):
        reasons = []
        monkeypatch.setattr("hf_paged_flash.generation.decode_loop._say", reasons.append)
        return reasons

    def _runs_eager(self, model, recorders, **options) -> None:
        eager = tiny_model(tiny_config("llama"), "eager")
        batch = ragged_batch(LENGTHS)
        assert torch.equal(
            new_tokens(model, *batch, max_new_tokens=8, **options), new_tokens(eager, *batch, max_new_tokens=8)
        )
        assert recorders.replayed == 0

    def test_disable_compile(self, model, recorders, said):
        self._runs_eager(model, recorders, disable_compile=True)
        assert said == ["`disable_compile` is set"]

    def test_hooks(self, model, recorders, said):
        seen = []
        handle = model.model.layers[1].register_forward_hook(lambda *args: seen.append(1))
        self._runs_eager(model, recorders)
        assert len(seen) == 8 and said == ["`model.layers.1` has a forward hook, which a graph would not run"]
        handle.remove()
        new_tokens(model, *ragged_batch(LENGTHS))
        assert recorders.replayed == STEPS - 1

    def test_hidden_states(self, model, recorders, said):
        self._runs_eager(model, recorders, output_hidden_states=True)
        assert said == ["`output_hidden_states` is asked for"]
        model.generate(
            ragged_batch([5], None)[0], max_new_tokens=4, output_hidden_states=True, return_dict_in_generate=True
        )
        new_tokens(model, *ragged_batch(LENGTHS))  # transformers' hooks have stayed, and do nothing
        assert recorders.replayed == STEPS - 1

    def test_training(self, model, recorders, said):
        model.train()
        new_tokens(model, *ragged_batch(LENGTHS), max_new_tokens=4)
        assert recorders.replayed == 0 and "training mode" in said[0]

    def test_autocast(self, model, recorders, said):
        with torch.autocast("cpu", torch.bfloat16):
            new_tokens(model, *ragged_batch(LENGTHS), max_new_tokens=4)
        assert recorders.replayed == 0 and "autocast" in said[0]

    def test_a_forward_that_waits(self, model, recorders, said, monkeypatch):
        norm = model.model.norm
        original = norm.forward
        monkeypatch.setattr(norm, "forward", lambda x: original(x) * float(x[0, 0, 0] * 0 + 1))
        self._runs_eager(model, recorders)
        assert "waits for the device" in said[0]
        said.clear()
        self._runs_eager(model, recorders)  # known from before
        assert said == []

    def test_a_capture_that_fails(self, model, recorders, said):
        recorders.failing = RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self._runs_eager(model, recorders)
        assert said == ["of RuntimeError: CUDA error: operation not permitted when stream is capturing"]

    @pytest.mark.parametrize("failing", [0, 3], ids=["warm-up", "capture"])
    def test_a_want_of_memory_ends_with_its_call(self, model, recorders, said, monkeypatch, failing):
        calls, computed, original = itertools.count(), [], LlamaMLP.forward

        def forward(mlp, x):
            if x.shape[1] == 1 and next(calls) == failing:
                result = original(mlp, x)
                computed.append(weakref.ref(result))
                raise torch.OutOfMemoryError("simulated")
            assert not computed or computed[0]() is None, "kept while the forward runs once more"
            return original(mlp, x)

        monkeypatch.setattr(LlamaMLP, "forward", forward)
        self._runs_eager(model, recorders)
        assert set(said) == {"of OutOfMemoryError: simulated"}
        said.clear()
        for _ in range(2):
            new_tokens(model, *ragged_batch(LENGTHS))
        assert recorders.replayed >= 2 * STEPS - 2 and not said

    def test_a_length_that_the_model_asks_for(self, recorders, said):
        """A replay would go on with that of the capture."""
        model = tiny_model(tiny_config("llama"), "paged_flash")
        original = type(model.model).forward

        def forward(self, *args, **kwargs):
            kwargs[cache_name(kwargs)].get_seq_length()
            return original(self, *args, **kwargs)

        model.model.forward = forward.__get__(model.model)
        self._runs_eager(model, recorders)
        assert "asks how long its cache is" in said[0]

    def test_dense_models(self, load, recorders, said):
        pair = load("deepseek_v3")
        tokens = new_tokens(pair.paged, *ragged_batch(LENGTHS))
        assert torch.equal(tokens, unpadded_runs(pair.eager)) and recorders.replayed == 0
        assert "needs dense keys and values" in said[0]

    def test_long_drafts(self, llama, recorders, said):
        """Verify steps of more tokens than a decode kernel takes are run as they are."""
        input_ids = ragged_batch([17], None)[0].repeat(1, 3)
        paged = new_tokens(llama.paged, input_ids, None, prompt_lookup_num_tokens=30)
        assert torch.equal(paged, new_tokens(llama.eager, input_ids, None)) and said == []

    def test_reasons_are_logged_once(self, model, recorders, caplog):
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                new_tokens(model, *ragged_batch(LENGTHS), max_new_tokens=4, disable_compile=True)
        records = [record.message for record in caplog.records if "CUDA graphs" in record.message]
        assert len(records) <= 1  # none where another test has had it logged

    def test_a_device_without_graphs(self, model, said, monkeypatch):
        from hf_paged_flash import backend

        monkeypatch.setattr(backend, "_graphs", True)
        new_tokens(model, *ragged_batch(LENGTHS), max_new_tokens=4)
        assert said == [] and decode_graph.graphs_of(model) is None

    def test_switched_off(self, model, recorders, monkeypatch):
        new_tokens(model, *ragged_batch(LENGTHS), max_new_tokens=2)
        assert model in decode_graph._of_models
        monkeypatch.setattr("hf_paged_flash.backend._graphs", False)
        self._runs_eager(model, recorders)
        assert model not in decode_graph._of_models, "graphs that nobody uses hold memory"


class TestCudaGraphs:
    """The calls of torch.cuda, which are not there without a GPU."""

    @pytest.fixture
    def cuda(self, monkeypatch):
        cuda = mock.MagicMock()
        cuda.current_stream.return_value = "the user's stream"
        for name in ("CUDAGraph", "graph", "graph_pool_handle", "current_stream", "set_stream", "device"):
            monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
        cuda.graph.return_value.__exit__.return_value = False
        return cuda

    def test_all_share_one_pool(self, cuda):
        graphs = decode_graph.CudaGraphs(torch.device("cuda", 0))
        for run in (lambda: 1, lambda: 2):
            outputs, replay = graphs.capture(run)
            assert outputs == run() and replay is cuda.CUDAGraph.return_value.replay
        assert cuda.graph_pool_handle.call_count == 1 and cuda.graph.call_count == 2
        assert {call.kwargs["pool"] for call in cuda.graph.call_args_list} == {cuda.graph_pool_handle.return_value}
        cuda.set_stream.assert_not_called()

    def test_a_capture_that_can_not_be_ended(self, cuda):
        cuda.graph.return_value.__exit__.side_effect = RuntimeError("CUDA error: capture was invalidated")
        graphs = decode_graph.CudaGraphs(torch.device("cuda", 0))
        with pytest.raises(RuntimeError, match="invalidated"):
            graphs.capture(lambda: 1)
        cuda.set_stream.assert_called_once_with("the user's stream")
        assert not graphs._one_at_a_time.locked()


def test_two_threads(llama, recorders, elastic, monkeypatch):
    """One of them has the graphs, the other runs as it is."""
    results, reasons, barrier = {}, [], threading.Barrier(2)
    monkeypatch.setattr("hf_paged_flash.generation.decode_loop._say", reasons.append)

    class Together(_Tokens):
        def put(self, value):
            super().put(value)
            if len(self.tokens) < 20:
                barrier.wait(30)

    def run(seed):
        input_ids = ragged_batch([12], None, seed=seed)[0]
        streamer = Together()
        llama.paged.generate(input_ids, streamer=streamer, max_new_tokens=NEW_TOKENS, do_sample=False)
        results[seed] = streamer.tokens[12:]

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (0, 1):
        assert results[seed] == unpadded_runs(llama.eager, (12,), seed=seed)[0].tolist()
    assert recorders.replayed == STEPS - 1
    assert reasons == ["a generate() of another thread uses its graphs"]
