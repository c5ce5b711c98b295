"""Prefills of padded prompts run packed, `[1, tokens]`, and give what eager gives; what can't be keeps its rows."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache as cached

import pytest
import torch
from transformers import AutoConfig, DynamicCache, PreTrainedModel
from transformers.generation.utils import GenerationMixin

from hf_paged_flash import CacheFullError, PagedCache, backend
from hf_paged_flash.generation import packed_prefill
from hf_paged_flash.generation.packable import attends_alone, why_not_these, why_padded
from tests.integration.models import attentive_config
from tests.tiny_models import ragged_batch, tiny_config, tiny_model

LENGTHS = (30, 7, 19, 1)  # beyond the windows of 12
TOKENS = sum(LENGTHS)
MODEL_TYPES = ("llama", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_oss", "gpt2", "mixtral")
pytestmark = pytest.mark.usefixtures("reference_backend")


def config_of(model_type: str, **changes):
    if model_type == "mixtral":
        shape = tiny_config("llama").to_dict() | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
        return AutoConfig.for_model("mixtral", **{key: value for key, value in shape.items() if key != "model_type"})
    return attentive_config(model_type, **changes)


@cached
def models(model_type: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(paged, eager)"""
    config = config_of(model_type)
    return tiny_model(config, "paged_flash"), tiny_model(config, "eager")


@pytest.fixture(params=MODEL_TYPES)
def pair(request):
    return models(request.param)


@contextmanager
def shapes_of(model: PreTrainedModel) -> Iterator[list[tuple[int, int]]]:
    """The (batch, length) that `model` is called with."""
    shapes = []

    def note(module, args, kwargs):
        given = kwargs.get("input_ids")
        shapes.append(tuple((kwargs["inputs_embeds"] if given is None else given).shape[:2]))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


def batch(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of LENGTHS; "holes": left padding and columns in the middle that are none, of three tokens fewer."""
    input_ids, mask = ragged_batch(LENGTHS, "left" if side == "holes" else side)
    if side == "holes":
        mask[0, 3:5], mask[2, 20] = 0, 0
    return input_ids, mask


def generate(model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor, **options) -> torch.Tensor:
    """The new tokens of greedy search, (rows, new)."""
    options = {"do_sample": False, "max_new_tokens": 12} | options
    return model.generate(input_ids, attention_mask=mask, **options)[:, input_ids.shape[1] :]


def unpadded(model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor, **options) -> torch.Tensor:
    """Each row by itself."""
    rows = [row[real.bool()][None] for row, real in zip(input_ids, mask, strict=True)]
    return torch.cat([generate(model, row, torch.ones_like(row), **options) for row in rows])


class TestEqualsEager:
    @pytest.mark.parametrize("side", ["left", "right", "holes"])
    def test_one_call_with_real_tokens_alone(self, pair, side):
        paged, eager = pair
        input_ids, mask = batch(side)
        with shapes_of(paged) as shapes:
            tokens = generate(paged, input_ids, mask)
        assert shapes[0] == (1, int(mask.sum())) and set(shapes[1:]) == {(4, 1)}
        assert torch.equal(tokens, unpadded(eager, input_ids, mask))

    def test_logits(self, pair):
        input_ids, mask = batch("left")
        ours, theirs = (
            model.generate(
                input_ids, attention_mask=mask, max_new_tokens=4, return_dict_in_generate=True, output_logits=True
            ).logits
            for model in pair
        )
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=5e-5)

    @pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
    @pytest.mark.parametrize(
        "options",
        [
            {"num_beams": 3},
            {"num_beams": 4, "num_return_sequences": 2},
            {"num_return_sequences": 3, "do_sample": True},
        ],
        ids=["beams", "returned-beams", "samples"],
    )
    def test_repeated_rows_are_packed_once(self, model_type, options):
        input_ids, mask = batch("left")
        tokens = []
        for model in models(model_type):
            torch.manual_seed(3)
            with shapes_of(model) as shapes:
                tokens.append(generate(model, input_ids, mask, **options))
            assert shapes[0][0] == (1 if model is models(model_type)[0] else 4 * options.get("num_beams", 3))
        assert torch.equal(*tokens)

    @pytest.mark.parametrize("side", ["left", "right", "holes"])
    @pytest.mark.parametrize("chunk", [1, 7, 16, 64])
    @pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_oss"])
    def test_chunks(self, model_type, chunk, side):
        paged, eager = models(model_type)
        input_ids, mask = batch(side)
        with shapes_of(paged) as shapes:
            tokens = generate(paged, input_ids, mask, prefill_chunk_size=chunk)
        prefill = [length for rows, length in shapes if rows == 1]
        expected = [int(part.sum()) for part in mask.split(chunk, 1)]
        assert prefill == [count for count in expected if count]
        assert max(prefill) <= chunk * len(LENGTHS)
        assert torch.equal(tokens, unpadded(eager, input_ids, mask))

    @pytest.mark.parametrize("chunk", [None, 5])
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
    def test_turns_on_one_cache(self, model_type, side, chunk):
        paged, eager = models(model_type)
        cache = PagedCache(paged.config)
        input_ids, mask = batch(side)
        for turn in range(3):
            with shapes_of(paged) as shapes:
                tokens = generate(paged, input_ids, mask, past_key_values=cache, prefill_chunk_size=chunk)
            assert torch.equal(tokens, unpadded(eager, input_ids, mask))
            assert shapes[0][0] == 1
            stored = cache.groups[0].manager.lengths
            assert stored.tolist() == (mask.sum(1) + tokens.shape[1] - 1).tolist()
            said, said_mask = ragged_batch((4, 9, 1, 6), side, seed=turn + 1)
            input_ids = torch.cat([input_ids, tokens, said], 1)
            mask = torch.cat([mask, torch.ones_like(tokens), said_mask], 1)

    @pytest.mark.parametrize("how", ["assistant", "lookup"])
    def test_assisted(self, how):
        paged, eager = models("llama")
        input_ids, mask = ragged_batch((20,))
        input_ids, mask = (torch.nn.functional.pad(x, (4, 0)) for x in (input_ids, mask))
        options = {"prompt_lookup_num_tokens": 3} if how == "lookup" else {"assistant_model": paged}
        tokens = generate(paged, input_ids, mask, **options)
        assert torch.equal(tokens, generate(eager, input_ids, mask))

    def test_positions_of_the_users(self):
        paged, eager = models("gpt2")
        input_ids, mask = batch("left")
        positions = (mask.cumsum(1) - 1).clamp(min=0) + torch.tensor([[0], [5], [40], [3]])
        tokens = [generate(model, input_ids, mask, position_ids=positions) for model in (paged, eager)]
        assert torch.equal(*tokens)
        assert not torch.equal(tokens[0], generate(paged, input_ids, mask))


class TestCache:
    @pytest.mark.parametrize(("model_type", "chunk"), [("gemma3_text", None), ("llama", None), ("llama", 8)])
    def test_a_full_cache_is_as_before_and_usable(self, model_type, chunk):
        paged, eager = models(model_type)
        cache = PagedCache(paged.config, num_blocks=7)
        input_ids, mask = ragged_batch((10, 3))
        tokens = generate(paged, input_ids, mask, past_key_values=cache, max_new_tokens=2)
        said, said_mask = ragged_batch((60, 41), seed=1)
        whole = torch.cat([input_ids, tokens, said], 1)
        whole_mask = torch.cat([mask, torch.ones_like(tokens), said_mask], 1)
        with pytest.raises(CacheFullError):
            generate(paged, whole, whole_mask, past_key_values=cache, prefill_chunk_size=chunk)
        assert (cache.get_seq_length() > 11) == (chunk is not None)
        if chunk is not None:
            cache.crop(11)  # the chunks that had room go
        assert cache.groups[-1].manager.lengths.tolist() == [11, 4]
        again, again_mask = torch.cat([input_ids, tokens], 1), torch.cat([mask, torch.ones_like(tokens)], 1)
        continued = generate(paged, again, again_mask, past_key_values=cache)
        assert torch.equal(continued, generate(eager, again, again_mask))

    @pytest.mark.parametrize("chunk", [None, 12])
    @pytest.mark.parametrize("pad", [None, "left", "right"])
    def test_prefixes_that_rows_hold_are_not_computed(self, pad, chunk):
        """Blocks in the rows of a cache without columns, as a prefix index gives them."""
        paged, eager = models("llama")
        lengths = (40, 40, 40) if pad is None else (40, 20, 33)
        input_ids, mask = ragged_batch(lengths, pad)
        cache = PagedCache(paged.config)
        generate(paged, input_ids, mask, past_key_values=cache, max_new_tokens=2)
        held = torch.tensor([32, 0, 16])
        cache.group.manager.truncate(held.numpy())
        cache.group.columns, cache.group.layer_columns, cache.group._mask = 0, {}, None
        with shapes_of(paged) as shapes:
            tokens = generate(paged, input_ids, mask, past_key_values=cache, prefill_chunk_size=chunk)
        assert sum(length for rows, length in shapes if rows == 1) == sum(lengths) - 48
        assert torch.equal(tokens, unpadded(eager, input_ids, mask))
        assert cache.get_seq_length() == input_ids.shape[1] + 11
        assert cache.group.manager.lengths.tolist() == [length + 11 for length in lengths]

    def test_a_forward_that_fails_is_taken_back(self):
        paged, eager = models("llama")
        cache = PagedCache(paged.config)
        input_ids, mask = batch("left")

        def fail(module, args):
            raise RuntimeError("half way")

        handle = paged.model.layers[1].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="half way"):
            generate(paged, input_ids, mask, past_key_values=cache)
        handle.remove()
        assert cache.get_seq_length() == 0 and cache.memory().blocks_used == 0
        assert torch.equal(generate(paged, input_ids, mask, past_key_values=cache), generate(eager, input_ids, mask))

    def test_the_users_mask_is_not_kept(self):
        paged, eager = models("llama")
        cache = PagedCache(paged.config)
        input_ids, mask = batch("left")
        mask = mask.bool()
        tokens = generate(paged, input_ids, mask, past_key_values=cache)
        whole, whole_mask = torch.cat([input_ids, tokens], 1), torch.cat([mask, torch.ones_like(tokens).bool()], 1)
        mask.fill_(True)
        assert torch.equal(
            generate(paged, whole, whole_mask, past_key_values=cache), generate(eager, whole, whole_mask)
        )


class TestPadded:
    """What keeps its rows, and gives the same."""

    def test_rows_without_padding(self):
        paged, _ = models("llama")
        input_ids, mask = ragged_batch((9, 9), None)
        with shapes_of(paged) as shapes:
            generate(paged, input_ids, mask)
        assert shapes[0] == (2, 9)

    @pytest.mark.parametrize(
        "options",
        [
            {"output_hidden_states": True, "return_dict_in_generate": True},
            {"past_key_values": "dynamic"},
            {"use_cache": False},
            {"inputs_embeds": "of the ids"},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_arguments(self, options):
        paged, eager = models("llama")
        input_ids, mask = batch("left")
        options = {"do_sample": False, "max_new_tokens": 6} | options
        if "inputs_embeds" in options:
            options["inputs_embeds"] = paged.model.embed_tokens(input_ids)
        outputs = []
        for model in (paged, eager):
            if "past_key_values" in options:
                options["past_key_values"] = DynamicCache(config=model.config)
            with shapes_of(model) as shapes:
                outputs.append(model.generate(input_ids, attention_mask=mask, **options))
            assert shapes[0] == (4, 30)
        if "output_hidden_states" in options:
            assert outputs[0].hidden_states[0][0].shape[:2] == (4, 30)
            outputs = [output.sequences for output in outputs]
        assert torch.equal(*outputs)

    @pytest.mark.parametrize("model_type", ["deepseek_v3"])
    def test_models(self, model_type):
        paged, eager = models(model_type)
        input_ids, mask = batch("left")
        with shapes_of(paged) as shapes:
            tokens = generate(paged, input_ids, mask)
        assert shapes[0] == (4, 30)
        assert torch.equal(tokens, generate(eager, input_ids, mask))

    def test_adapters_by_row(self):
        peft = pytest.importorskip("peft")
        model = tiny_model(tiny_config("llama"), "paged_flash")
        lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, lora, adapter_name="one").eval()
        adapted.add_adapter("two", lora)
        input_ids, mask = batch("left")
        names = ["one", "two", "__base__", "one"]
        rows = []
        for row in range(4):
            single = {"input_ids": input_ids[row : row + 1], "attention_mask": mask[row : row + 1]}
            rows.append(
                adapted.generate(**single, adapter_names=names[row : row + 1], max_new_tokens=6, do_sample=False)
            )
        with shapes_of(model) as shapes:
            tokens = adapted.generate(
                input_ids=input_ids, attention_mask=mask, adapter_names=names, max_new_tokens=6, do_sample=False
            )
        assert shapes[0] == (4, 30)
        assert torch.equal(tokens, torch.cat(rows))
        with shapes_of(model) as shapes:  # one for all rows
            adapted.generate(input_ids=input_ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
        assert shapes[0] == (1, TOKENS)

    def test_a_row_of_arguments(self):
        paged, _ = models("llama")
        cache = PagedCache(paged.config)
        input_ids, mask = batch("left")
        inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": mask, "past_key_values": cache}
        assert why_not_these(inputs | {"use_cache": True, "logits_to_keep": 1, "labels": None}, cache) is None
        for changes, reason in (
            ({"token_type_ids": mask}, "`token_type_ids`"),
            ({"rows": [1, 2, 3, 4]}, "`rows`"),
            ({"input_ids": None}, "no rows of tokens"),
            ({"position_ids": None}, "no positions"),
            ({"attention_mask": mask[:, None, None]}, "no rows of tokens"),
            ({"past_key_values": PagedCache(paged.config)}, "another cache"),
        ):
            assert reason in why_not_these(inputs | changes, cache)


class TestConditions:
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda model: setattr(model.config, "is_encoder_decoder", True), "encoder"),
            (lambda model: setattr(model, "_prefill", None), "steps of generation"),
            (lambda model: setattr(model.config, "use_bidirectional_attention", True), "a mask that"),
            (lambda model: setattr(model.config, "layer_types", ["chunked_attention"] * 3), "in chunks"),
            (lambda model: model.model.add_module("mix", torch.nn.Conv1d(4, 4, 1)), "convolutions"),
            (lambda model: model.set_attn_implementation("sdpa"), "another attention"),
            (lambda model: setattr(model.config, "output_hidden_states", True), "`output_hidden_states`"),
        ],
        ids=["encoder", "prefill", "mask", "chunks", "convolution", "attention", "hidden states"],
    )
    def test_each_has_a_name(self, change, reason):
        model = tiny_model(tiny_config("llama"), "paged_flash")
        cache = PagedCache(model.config)
        assert why_padded(model, cache, model.generation_config, {}) is None
        change(model)
        assert reason in why_padded(model, cache, model.generation_config, {})

    def test_other_caches(self):
        paged, _ = models("llama")
        reason = why_padded(paged, DynamicCache(config=paged.config), paged.generation_config, {})
        assert reason == "another cache than PagedCache"

    def test_other_states(self):
        paged, _ = models("llama")
        config = AutoConfig.for_model("lfm2", hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                      layer_types=["conv", "full_attention"])  # fmt: skip
        assert (
            why_padded(paged, PagedCache(config), paged.generation_config, {}) == "layers with another state than keys"
        )

    def test_source_that_does_more_with_its_keys(self):
        for model_type, alone in (("llama", True), ("gpt2", True), ("deepseek_v3", False)):
            assert attends_alone(type(models(model_type)[0])) is alone
        assert not attends_alone(PreTrainedModel)


@pytest.mark.gpu
@pytest.mark.parametrize("side", ["left", "right"])
def test_waits_for_the_device_twice_at_most(monkeypatch, side):
    """Once for each that reads the mask, of the packed prefill and of what mends right padding."""
    backend.configure(backend="auto")
    model = tiny_model(tiny_config("llama"), "paged_flash", dtype=torch.bfloat16).cuda()
    input_ids, mask = (x.cuda() for x in batch(side))
    seen = []

    def prefill(self, *args, **kwargs):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                return original(self, *args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            seen.append([str(one.message) for one in caught if "synchroniz" in str(one.message)])

    original = GenerationMixin._prefill
    generate(model, input_ids, mask, max_new_tokens=2)  # pools and kernels are there
    monkeypatch.setattr(GenerationMixin, "_prefill", prefill)
    with shapes_of(model) as shapes:
        generate(model, input_ids, mask, max_new_tokens=2)
    assert shapes[0] == (1, TOKENS)
    assert len(seen) == 1 and len(seen[0]) <= 2, seen


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_oss"])
def test_kernels_give_what_padded_rows_give(model_type, monkeypatch):
    backend.configure(backend="auto")
    model = tiny_model(attentive_config(model_type), "paged_flash", dtype=torch.bfloat16).cuda()
    input_ids, mask = (x.cuda() for x in ragged_batch((300, 70, 190, 1)))
    logits = []
    for reason in (None, "a test"):
        monkeypatch.setattr(packed_prefill, "why_padded", lambda *args, reason=reason: reason)
        out = model.generate(
            input_ids, attention_mask=mask, max_new_tokens=1, return_dict_in_generate=True, output_logits=True
        )
        logits.append(out.logits[0])
    torch.testing.assert_close(*logits, rtol=0, atol=0.02 * logits[1].abs().max().item())
