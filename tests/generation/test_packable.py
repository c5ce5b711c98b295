"""Which prefills keep their rows, each for a reason that has a name, and that they give the same."""

import pytest
import torch
from transformers import AutoConfig, DynamicCache, PreTrainedModel

from hf_paged_flash import PagedCache
from hf_paged_flash.generation.packable import attends_alone, why_not_these, why_padded
from tests.generation.runs import TOKENS, batch, generate, models, shapes_of
from tests.tiny_models import ragged_batch, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("reference_backend")


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

    @pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
    def test_hooks_that_look_for_the_last_token_of_each_row(self, kind):
        input_ids, mask = batch("left")

        def steer(module, args, *outputs):
            x = (outputs or args)[0].clone()
            x[:, -1] += torch.linspace(-3, 3, x.shape[-1])
            return x

        tokens = []
        for model in models("llama"):
            handle = getattr(model.model.layers[1].mlp, f"register_{kind}")(steer)
            try:
                with shapes_of(model) as shapes:
                    tokens.append(generate(model, input_ids, mask))
            finally:
                handle.remove()
            assert shapes[0] == input_ids.shape
        assert torch.equal(*tokens)

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

    @pytest.mark.parametrize(
        ("options", "each"),
        [({"num_beams": 3}, 1), ({"num_return_sequences": 2, "do_sample": True, "top_k": 1}, 2)],
        ids=["beams", "sequences"],
    )
    def test_adapters_by_row_of_repeated_prompts(self, options, each):
        """PEFT repeats the names of beams, those of sequences are to be given for each."""
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        input_ids, mask = batch("left")
        names = [name for name in ("one", "two", "one", "two") for _ in range(each)]
        tokens = []
        for model in (tiny_model(tiny_config("llama"), name) for name in ("eager", "paged_flash")):
            torch.manual_seed(0)
            adapted = peft.get_peft_model(model, lora, adapter_name="one").eval()
            adapted.add_adapter("two", lora)
            inputs = {"input_ids": input_ids, "attention_mask": mask, "adapter_names": names, "max_new_tokens": 6}
            tokens.append(adapted.generate(**inputs, **({"do_sample": False} | options)))
        assert torch.equal(*tokens)

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
