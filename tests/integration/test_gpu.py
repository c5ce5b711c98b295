"""Whole models on a CUDA GPU: as near to the exact logits as eager, no host sync in a decode step, memory given back.

Nearly all the time goes into compiling kernels: `pytest -n 8 tests/integration/test_gpu.py` shares it out.
"""

from collections.abc import Callable, Collection

import pytest
import torch
from accelerate import dispatch_model
from transformers import DynamicCache, PreTrainedModel

from hf_paged_flash import PagedCache, counters, reset_counters
from hf_paged_flash.cache import paged_encoder_decoder_cache
from hf_paged_flash.ops import layers
from tests.generation.test_fused_layers import FUSED
from tests.integration.models import DENSE, LENGTHS, attentive_config, new_tokens
from tests.integration.test_encoder_decoder import generate, inputs_for, make
from tests.tiny_models import MODEL_TYPES, ragged_batch, tiny_model

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
PROMPTS = (140, 75, 99, 38)
DECODE_STEPS = 8
# Columns before which the prefill's chunks end. Rows 1, 2 and 3 begin in the second, after it there is no padding: 3
# columns are read as a decode step, 21 as a prefill of blocks.
CHUNK_ENDS = (40, 116, 119, 140)
# Every expert for every token: which two are chosen may hang on a last bit, in eager as in ours, and then changes all.
# `batched_mm` is the one implementation of experts that never waits for the device.
_EVERY_EXPERT = {"num_experts_per_tok": 4, "experts_implementation": "batched_mm"}
_EXPERTS = ("gpt_oss", "deepseek_v3")
# Logits have a spread of 1. Below this, which of two errors is larger says nothing: 4 units in fp32's last place.
FLOOR = 4 * torch.finfo(torch.float32).eps


def _model(model_type: str, attn_implementation: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the GPU; one model type has the same weights, rounded to `dtype`, under both names."""
    config = attentive_config(model_type, **(_EVERY_EXPERT if model_type in _EXPERTS else {}))
    return tiny_model(config, attn_implementation, dtype=dtype).to(DEVICE)


def _batch() -> dict[str, torch.Tensor]:
    """Left-padded input_ids, attention_mask and position_ids, each (4, prompt + DECODE_STEPS).

    What is decoded is given, so that no choice of a token can differ.
    """
    input_ids, mask = ragged_batch([length + DECODE_STEPS for length in PROMPTS], "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": input_ids.to(DEVICE),
        "attention_mask": mask.to(DEVICE),
        "position_ids": positions.to(DEVICE),
    }


@torch.no_grad()
def _in_one_forward(model: PreTrainedModel, cache_class: Callable) -> torch.Tensor:
    batch = _batch()
    return model(**batch, use_cache=False).logits[batch["attention_mask"].bool()]


@torch.no_grad()
def _through_a_cache(model: PreTrainedModel, cache_class: Callable) -> torch.Tensor:
    """Prefill in chunks, then one column at a time."""
    input_ids, mask, positions = _batch().values()
    cache = cache_class(config=model.config)
    ends = [*CHUNK_ENDS, *range(CHUNK_ENDS[-1] + 1, CHUNK_ENDS[-1] + DECODE_STEPS + 1)]
    logits = [
        model(
            input_ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
        ).logits
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    return torch.cat(logits, 1)[mask.bool()]


@torch.no_grad()
def _exact(eager: PreTrainedModel) -> torch.Tensor:
    """fp64 logits of the weights as `eager` holds them; eager's own fp32 steps (softmax, norms) stay in fp32.

    Row by row: in a padded batch eager's mask, the lowest fp64, is -inf in that softmax, and a row of padding NaN.
    """
    input_ids, mask, _ = _batch().values()
    eager = eager.double()
    rows = [row[keep.bool()][None] for row, keep in zip(input_ids, mask, strict=True)]
    return torch.cat([eager(row, use_cache=False).logits[0] for row in rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_error_against_fp64_is_within_twice_eagers(model_type, dtype):
    eager, paged = (_model(model_type, name, dtype) for name in ("eager", "paged_flash"))
    ways = (_in_one_forward, _through_a_cache)
    eagers = [way(eager, DynamicCache) for way in ways]
    exact = _exact(eager)
    for way, eager_logits in zip(ways, eagers, strict=True):
        error = (way(paged, PagedCache) - exact).abs()
        budget = (eager_logits - exact).abs()
        for measure in (torch.max, torch.mean):
            assert measure(error) <= 2 * measure(budget) + FLOOR, f"{way.__name__}, {measure.__name__}"
    _assert_kernels_ran(model_type)


def _assert_kernels_ran(model_type: str, fused: Collection[str] = ()) -> None:
    ran = counters()
    dense = model_type in DENSE
    assert set(ran.kernel) == {"flash_forward", "store_kv", *fused} | (set() if dense else {"paged_decode"})
    assert ran.reference_total == 0
    assert (ran.dense_gather_total > 0) == dense


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_fp32_tokens_equal_eagers(model_type):
    eager, paged = (_model(model_type, name, torch.float32) for name in ("eager", "paged_flash"))
    left, mask = (x.to(DEVICE) for x in ragged_batch(LENGTHS, "left"))
    expected = new_tokens(eager, left, mask)
    assert torch.equal(new_tokens(paged, left, mask), expected)
    right, mask = (x.to(DEVICE) for x in ragged_batch(LENGTHS, "right"))
    assert torch.equal(new_tokens(paged, right, mask), expected)
    _assert_kernels_ran(model_type, FUSED[model_type])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_one_row_in_half_precision(dtype, monkeypatch):
    """Its linear layers run on their kernel where they are captured, and in the step that warms up for it."""
    monkeypatch.setattr(layers, "LEAST_WEIGHTS", 1)
    model = _model("llama", "paged_flash", dtype)
    input_ids, mask = (x[-1:].to(DEVICE) for x in ragged_batch(LENGTHS, "left"))
    tokens = new_tokens(model, input_ids, mask)
    _assert_kernels_ran("llama", (*FUSED["llama"], "linear"))
    assert torch.equal(new_tokens(model, input_ids, mask), tokens)
    reset_counters()
    new_tokens(model, input_ids, mask, disable_compile=True)
    _assert_kernels_ran("llama", FUSED["llama"])


@pytest.fixture
def no_host_sync():
    """A function that forbids torch to wait for the device; allowed again at the end of the test."""

    def forbid() -> None:
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device=DEVICE).item()

    yield forbid
    torch.cuda.set_sync_debug_mode("default")


# deepseek_v3 takes the dense way, which reads the lengths back
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name not in DENSE])
@torch.no_grad()
def test_decode_steps_never_wait_for_the_device(model_type, masked, no_host_sync):
    model = _model(model_type, "paged_flash", torch.float32)
    input_ids, mask, _ = _batch().values()
    if not masked:
        input_ids, mask = input_ids[:1], None
        model.config.pad_token_id = None  # else GPT-2 looks for padding in the tokens, to warn of a missing mask
    prompt, columns = CHUNK_ENDS[-1], input_ids.shape[1]
    cache = PagedCache(model.config)
    new = [input_ids[:, column : column + 1] for column in range(columns)]
    masks = [None if mask is None else mask[:, : column + 1] for column in range(columns)]
    model(input_ids[:, :prompt], attention_mask=masks[prompt - 1], past_key_values=cache)
    model(new[prompt], attention_mask=masks[prompt], past_key_values=cache)  # compiles
    blocks = cache.group.manager.row_blocks().sum()
    no_host_sync()
    for column in range(prompt + 1, columns):
        logits = model(new[column], attention_mask=masks[column], past_key_values=cache).logits
    torch.cuda.set_sync_debug_mode("default")
    assert cache.group.manager.row_blocks().sum() > blocks, "no row went on to a new block: that went untested"
    whole = model(input_ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits[:, -1], whole[:, -1], rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text", "gpt_oss"])
@torch.no_grad()
def test_a_window_gives_back_without_waiting_for_the_device(model_type, no_host_sync):
    """The lengths are on the device: lower bounds come back some steps late, and blocks go by them."""
    model = _model(model_type, "paged_flash", torch.float32)
    input_ids, mask = (x.to(DEVICE) for x in ragged_batch([length + 100 for length in PROMPTS], "left"))
    prompt, columns = max(PROMPTS), input_ids.shape[1]
    cache = PagedCache(model.config)
    group = next(group for group in cache.groups if group.window is not None)
    steps = [(input_ids[:, column : column + 1], mask[:, : column + 1]) for column in range(columns)]
    model(input_ids[:, :prompt], attention_mask=mask[:, :prompt], past_key_values=cache)
    model(steps[prompt][0], attention_mask=steps[prompt][1], past_key_values=cache)  # compiles
    used = []
    no_host_sync()
    for token, token_mask in steps[prompt + 1 :]:
        logits = model(token, attention_mask=token_mask, past_key_values=cache).logits
        used.append(group.blocks_used)
    torch.cuda.set_sync_debug_mode("default")
    # 12 tokens lie in two blocks at most; a row may keep one or two more until its bound comes back
    assert max(used) <= 4 * 4 and group.has_given_back
    assert cache.memory().blocks_used < sum(-(-int(n) // 16) for n in mask.sum(1)) * len(cache.groups)
    whole = model(input_ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(logits[:, -1], whole[:, -1], rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("model_type", ["bart", "whisper", "t5"])
def test_encoder_decoder_tokens_equal_eagers(model_type):
    eager, paged = (make(model_type, name).to(DEVICE) for name in ("eager", "paged_flash"))
    inputs = {name: x.to(DEVICE) for name, x in inputs_for(model_type).items()}
    for options in ({}, {"num_beams": 4}):
        assert torch.equal(generate(paged, inputs, **options), generate(eager, inputs, **options))
    assert counters().reference_total == 0


@torch.no_grad()
def test_decode_steps_of_an_encoder_decoder_model_never_wait(no_host_sync):
    model = make("bart", "paged_flash").to(DEVICE)
    inputs = {name: x.to(DEVICE) for name, x in inputs_for("bart").items()}
    cache = paged_encoder_decoder_cache(model.config, batch_size=3)
    encoded = model.get_encoder()(**inputs)
    tokens = ragged_batch([40] * 3, None, seed=2)[0].to(DEVICE)
    new = [tokens[:, column : column + 1] for column in range(40)]
    options = {"encoder_outputs": encoded, "attention_mask": inputs["attention_mask"], "past_key_values": cache}
    for column in range(2):  # compiles
        model(decoder_input_ids=new[column], **options)
    no_host_sync()
    for column in range(2, 40):
        logits = model(decoder_input_ids=new[column], **options).logits
    torch.cuda.set_sync_debug_mode("default")
    assert cache.cross_attention_cache.memory().tokens == int(inputs["attention_mask"].sum())
    assert counters().dense_gather_total == 0
    options |= {"past_key_values": None, "use_cache": False}
    whole = model(decoder_input_ids=tokens, **options).logits
    torch.testing.assert_close(logits[:, -1], whole[:, -1], rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("devices", [("cpu", 0, "cpu"), (0, "cpu", 0), (0, 1, 0)], ids=str)
def test_layers_on_several_devices(devices):
    """`device_map`: each layer's blocks lie where the layer does."""
    if 1 in devices and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = tiny_model(attentive_config("llama"), "paged_flash")
    input_ids, mask = ragged_batch(LENGTHS, "left")
    expected = new_tokens(model, input_ids, mask)
    device_map = {"model.embed_tokens": devices[0], "model.rotary_emb": devices[0]}
    device_map |= {f"model.layers.{layer}": device for layer, device in enumerate(devices)}
    device_map |= {"model.norm": devices[-1], "lm_head": devices[-1]}
    skip = model._skip_keys_device_placement
    model = dispatch_model(model, device_map, main_device="cpu", skip_keys=skip, force_hooks=True)
    cache = PagedCache(model.config)
    first = "cpu" if devices[0] == "cpu" else f"cuda:{devices[0]}"
    tokens = new_tokens(model, input_ids.to(first), mask.to(first), past_key_values=cache)
    assert torch.equal(tokens.cpu(), expected)
    for layer, device in zip(cache.layers, devices, strict=True):
        assert {layer.pool.key.device, layer.pool.value.device} == {torch.ones(0, device=device).device}


@pytest.mark.parametrize("give_back", ["reset", "del"])
@torch.no_grad()
def test_memory_is_given_back(give_back):
    model = _model("llama", "paged_flash", torch.bfloat16)
    input_ids, mask = (x.to(DEVICE) for x in ragged_batch((400, 300, 400, 17), "left"))

    def fill(cache: PagedCache) -> int:
        new_tokens(model, input_ids, mask, past_key_values=cache, max_new_tokens=20)
        return cache.memory().bytes_reserved

    fill(PagedCache(model.config))  # what a first run leaves behind: workspaces, compiled kernels
    before = torch.cuda.memory_allocated()
    cache = PagedCache(model.config)
    reserved = fill(cache)
    assert torch.cuda.memory_allocated() - before >= reserved > 2**18
    if give_back == "reset":
        cache.reset()
        assert cache.memory().bytes_reserved == 0
    else:
        del cache
    # without a garbage collection; an empty cache may keep a few bytes a layer
    assert torch.cuda.memory_allocated() - before <= 2**14


@pytest.mark.parametrize("options", [{"do_sample": True, "top_k": 0, "num_return_sequences": 16}, {"num_beams": 8}])
@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "gemma2"])
def test_samples_and_beams_share_the_prompt(model_type, options):
    eager, paged = (_model(model_type, name, torch.float32) for name in ("eager", "paged_flash"))
    input_ids, mask = (x.to(DEVICE) for x in ragged_batch(PROMPTS, "left"))
    options = {"do_sample": False, "max_new_tokens": 20} | options
    torch.manual_seed(5)
    expected = eager.generate(input_ids, attention_mask=mask, **options)
    cache = PagedCache(paged.config)
    torch.manual_seed(5)
    assert torch.equal(paged.generate(input_ids, attention_mask=mask, past_key_values=cache, **options), expected)
    assert counters().kernel["copy_blocks"] >= 1 and counters().reference_total == 0
    memory, new = cache.memory(), 19
    if "num_beams" in options:
        assert sum(n // 16 for n in PROMPTS) <= memory.blocks_shared
        assert memory.tokens <= sum(n // 16 * 16 + 8 * (n % 16 + new) for n in PROMPTS)
    else:
        assert memory.tokens == sum(n // 16 * 16 + 16 * (n % 16 + new) for n in PROMPTS)
        (full,) = (group.blocks_used for group in cache.groups if group.window is None)
        assert full == sum(n // 16 + 16 * -(-(n % 16 + new) // 16) for n in PROMPTS)


@torch.no_grad()
def test_forks_and_saved_caches_go_on(tmp_path):
    """A fork in the middle of decoding, and a cache from a file that moves to the GPU in its first forward."""
    model = _model("llama", "paged_flash", torch.float32)
    input_ids, mask, _ = _batch().values()
    prompt = PROMPTS[0]
    cache = PagedCache(model.config)
    for start, end in [(0, prompt), (prompt, prompt + 1), (prompt + 1, prompt + 2)]:
        model(input_ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
    rows = [2, 0, 0]
    fork = cache.fork(rows)
    cache.save(tmp_path / "cache.safetensors")
    loaded = PagedCache.load(tmp_path / "cache.safetensors", model.config)
    whole = model(input_ids, attention_mask=mask, use_cache=False).logits
    for column in range(prompt + 2, input_ids.shape[1]):
        for one, which in ((fork, rows), (cache, [0, 1, 2, 3]), (loaded, [0, 1, 2, 3])):
            new, seen = input_ids[which, column : column + 1], mask[which, : column + 1]
            logits = model(new, attention_mask=seen, past_key_values=one).logits
            torch.testing.assert_close(logits[:, 0], whole[which, column], rtol=0.0, atol=1e-4)
    assert all(layer.pool.key.is_cuda for layer in loaded.layers)
    assert cache.layers[0].pool is fork.layers[0].pool
