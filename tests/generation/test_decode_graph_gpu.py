"""Decode steps as CUDA graphs on a GPU: eager's tokens, no wait for the device, steps that cost the same all along."""

import gc
import statistics
import time

import pytest
import torch
from transformers import CompileConfig
from transformers.generation.streamers import BaseStreamer

from hf_paged_flash import PagedCache, backend, counters, reset_counters
from hf_paged_flash.cache import elastic_memory
from hf_paged_flash.generation import decode_graph
from tests.generation.test_images import MODEL_TYPES as IMAGE_MODELS
from tests.generation.test_images import models_that_see
from tests.generation.test_images import prompts as image_prompts
from tests.integration.models import DENSE, LENGTHS, NEW_TOKENS, attentive_config, new_tokens
from tests.tiny_models import MODEL_TYPES, ragged_batch, tiny_config, tiny_model

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}  # layers wide enough for pages
_EXPERTS = {"num_experts_per_tok": 4, "experts_implementation": "batched_mm"}
MODELS = tuple(name for name in MODEL_TYPES if name not in DENSE)


class Counted(decode_graph.CudaGraphs):
    captured = replayed = 0

    def capture(self, run):
        outputs, replay = super().capture(run)
        Counted.captured += 1
        return outputs, lambda: self._replay(replay)

    def _replay(self, replay):
        Counted.replayed += 1
        replay()


@pytest.fixture(autouse=True)
def graphs(request, monkeypatch):
    """They are switched on, counted, and none are there yet."""
    monkeypatch.setitem(decode_graph.CAPTURERS, "cuda", Counted)
    if "prompt" not in request.node.name:  # steps alone
        monkeypatch.setattr("hf_paged_flash.generation.decode_loop.length_of", lambda counts: None)
    monkeypatch.setattr(Counted, "captured", 0)
    monkeypatch.setattr(Counted, "replayed", 0)
    before = backend.graphs()
    backend.configure(graphs=True)
    yield Counted
    backend.configure(graphs=before)
    decode_graph._of_models.clear()


def _model(model_type: str, attn_implementation: str, **changes):
    """In fp32."""
    config = attentive_config(model_type, **(_EXPERTS if model_type == "gpt_oss" else {}), **changes)
    return tiny_model(config, attn_implementation).to(DEVICE)


def _wide(**changes):
    """A tiny Llama whose pools grow in place."""
    return tiny_model(tiny_config("llama", **WIDE, **changes), "paged_flash").to(DEVICE)


def _batch(lengths=LENGTHS, pad="left", **options):
    return [x.to(DEVICE) for x in ragged_batch(lengths, pad, **options)]


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "top_k": 0}, {"num_beams": 4}, {"eos_token_id": list(range(2, 12))}],
    ids=["greedy", "sample", "beams", "ends"],
)
@pytest.mark.parametrize("model_type", MODELS)
def test_tokens_are_those_without_graphs(model_type, options, graphs):
    eager, paged = (_model(model_type, name) for name in ("eager", "paged_flash"))
    results = []
    for model in (eager, paged, paged):
        torch.manual_seed(3)
        results.append(new_tokens(model, *_batch(), **options))
    assert torch.equal(results[1], results[0]) and torch.equal(results[2], results[0])
    assert graphs.replayed >= 2 * (results[0].shape[1] - 2) - 1
    assert counters().reference_total == 0


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_verify_steps(model_type, graphs):
    eager, paged = (_model(model_type, name) for name in ("eager", "paged_flash"))
    input_ids = _batch([17], None)[0].repeat(1, 2)
    mask = torch.ones_like(input_ids)
    expected = new_tokens(eager, input_ids, mask, max_new_tokens=60)
    assert torch.equal(new_tokens(paged, input_ids, mask, max_new_tokens=60, prompt_lookup_num_tokens=4), expected)
    assert graphs.replayed > 5


@pytest.mark.parametrize("model_type", IMAGE_MODELS)
def test_models_that_see(model_type, graphs):
    eager, paged = (model.to(DEVICE) for model in models_that_see(model_type))
    for seed in (1, 2):
        inputs = {name: value.to(DEVICE) for name, value in image_prompts(model_type, seed).items()}
        expected, tokens = (model.generate(**inputs, max_new_tokens=20, do_sample=False) for model in (eager, paged))
        assert torch.equal(tokens, expected)
    assert graphs.replayed == 2 * 19 - 1


def test_a_later_call_replays_the_same_graph(graphs, monkeypatch):
    """And the memory of the cache is given back in between, but for a page a layer behind the addresses it had."""
    model = _wide()
    driver, pages = elastic_memory.driver_of(torch.device(DEVICE, 0)), []
    for name, change in (("create", 1), ("release", -1)):  # the device's free memory is other processes', too
        original = getattr(driver, name)
        monkeypatch.setattr(driver, name, lambda *page, call=original, n=change: (pages.append(n), call(*page))[1])
    for seed in range(3):
        reset_counters()
        new_tokens(model, *_batch(seed=seed))
        gc.collect()
        assert sum(pages) == model.config.num_hidden_layers
    assert graphs.captured == 1 and graphs.replayed == 3 * (NEW_TOKENS - 1) - 1
    assert "paged_decode" not in counters().kernel, "a forward ran in Python"


def test_growth_over_pages_and_tables(graphs, monkeypatch):
    monkeypatch.setattr(decode_graph, "MIN_WIDTH", 2)
    model = _wide(max_position_embeddings=2048)
    batch = _batch((700, 30))
    expected = new_tokens(model, *batch, max_new_tokens=900, disable_compile=True)
    assert torch.equal(new_tokens(model, *batch, max_new_tokens=900), expected)
    assert graphs.captured == 2  # 64 and 128 blocks
    assert graphs.replayed == 898


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_oss"])
def test_replays_never_wait_for_the_device(model_type, graphs, monkeypatch):
    original = decode_graph.DecodeGraphs.forward
    checked = []

    def forward(self, *args):
        if not graphs.captured:
            return original(self, *args)
        before = graphs.captured
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs = original(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert graphs.captured == before
        checked.append(1)
        return outputs

    monkeypatch.setattr(decode_graph.DecodeGraphs, "forward", forward)
    model = _model(model_type, "paged_flash", **WIDE)  # a pool that is copied would be captured anew
    assert new_tokens(model, *_batch(), past_key_values=PagedCache(model.config)).shape[1] == NEW_TOKENS
    assert len(checked) >= NEW_TOKENS - 4


class _Clock(BaseStreamer):
    def __init__(self):
        self.times: list[float] = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def test_steps_cost_the_same_all_along(graphs):
    model = _wide(max_position_embeddings=8192)
    input_ids, mask = _batch((64,) * 4, None)
    new_tokens(model, input_ids, mask, max_new_tokens=3000)
    early, late = [], []
    for _ in range(3):  # others may use the GPU during a part of one
        clock = _Clock()
        model.generate(
            input_ids[:1], attention_mask=mask[:1], max_new_tokens=3000, do_sample=False, streamer=clock
        )
        steps = [1e3 * (after - before) for before, after in zip(clock.times[10:], clock.times[11:], strict=False)]
        early, late = early + steps[:400], late + steps[-400:]
    early, late = (statistics.quantiles(part, n=10)[0] for part in (early, late))  # what others do aside
    assert late <= 1.25 * early, f"{early:.3f} ms a step at first, {late:.3f} ms at last"


def test_deferred_stops(graphs):
    """The host runs a step ahead, and what it did too much is taken back."""
    eager, paged = (_model("llama", name) for name in ("eager", "paged_flash"))
    input_ids, mask = _batch()
    expected = new_tokens(eager, input_ids, mask)
    end = int(expected[0, 9])
    options = {"attention_mask": mask, "eos_token_id": end, "do_sample": False, "max_new_tokens": NEW_TOKENS}
    out = paged.generate(input_ids, return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences, eager.generate(input_ids, **options))
    assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1


def test_a_model_that_goes_frees_its_graphs():
    model = _wide()
    new_tokens(model, *_batch())
    del model
    gc.collect()
    assert not decode_graph._of_models


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_oss"])
def test_compiled_steps(model_type, graphs):
    eager, paged = (_model(model_type, name) for name in ("eager", "paged_flash"))
    expected = new_tokens(eager, *_batch())
    for mode in ("default", "max-autotune-no-cudagraphs")[: 2 if model_type == "llama" else 1]:
        tokens = new_tokens(paged, *_batch(), compile_config=CompileConfig(mode=mode))
        assert torch.equal(tokens, expected)
    assert graphs.replayed >= NEW_TOKENS - 2


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_short_prompts(model_type, graphs):
    """Warm-up, capture, replay; the host never waits in a replay."""
    eager, paged = (_model(model_type, name, **WIDE) for name in ("eager", "paged_flash"))
    for lengths in ((5, 3), (90, 50, 60, 70), (40,)):
        expected = new_tokens(eager, *_batch(lengths))
        for _ in range(4):
            assert torch.equal(new_tokens(paged, *_batch(lengths)), expected)
    assert graphs.captured == 6
    reset_counters()
    new_tokens(paged, *_batch((40,)))
    assert counters().kernel == {}, "a forward ran in Python"
