"""register() and unregister(): the name "paged_flash" in transformers, what it reaches, and how it leaves again."""

import copy
import subprocess
import sys
import warnings
from functools import wraps
from unittest import mock

import pytest
import torch
import transformers
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)
from transformers import modeling_flash_attention_utils as flash_utils

import hf_paged_flash
from hf_paged_flash import IncompatibleTransformersError, PagedCache, UnsupportedFeatureError, versions
from hf_paged_flash.attention import paged_flash_attention_forward
from hf_paged_flash.patches import ALL_PATCHES
from tests.tiny_models import ragged_batch, tiny_config, tiny_model

TARGETS = [(patch.owner(), patch.name) for patch in ALL_PATCHES]


@pytest.fixture
def registered():
    """Leaves the package registered, whatever the test did."""
    yield
    hf_paged_flash.unregister()
    hf_paged_flash.register()
    assert all(patch.applied for patch in ALL_PATCHES)


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config("llama"), "paged_flash")


@pytest.fixture(scope="module")
def eager():
    return tiny_model(tiny_config("llama"), "eager")


def generate(model, input_ids, mask, **options):
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True} | options
    return model.generate(input_ids, attention_mask=mask, **options)


def in_force(model):
    """The implementation that each model inside `model` runs."""
    return [part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)]


class TestTheName:
    def test_from_config(self):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"), attn_implementation="paged_flash")
        assert in_force(model) == ["paged_flash", "paged_flash"]

    def test_from_pretrained_and_back(self, eager, tmp_path):
        eager.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="paged_flash")
        assert in_force(model) == ["paged_flash", "paged_flash"]
        input_ids, mask = ragged_batch([20, 9])
        assert torch.equal(generate(model, input_ids, mask).sequences, generate(eager, input_ids, mask).sequences)
        model.save_pretrained(tmp_path / "again")  # the name is the user's choice, not the model's
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert "paged_flash" not in in_force(plain)

    @pytest.mark.parametrize("name", ["paged_flash", {"": "paged_flash"}])
    def test_set_attn_implementation(self, name):
        model = tiny_model(tiny_config("llama"), "eager")
        input_ids, mask = ragged_batch([20, 9])
        expected = generate(model, input_ids, mask).sequences
        model.set_attn_implementation(name)
        out = generate(model, input_ids, mask)
        assert isinstance(out.past_key_values, PagedCache)
        assert torch.equal(out.sequences, expected)
        model.set_attn_implementation("eager")
        assert type(generate(model, input_ids, mask).past_key_values) is DynamicCache

    def test_models_that_list_their_flash_implementations(self):
        model = tiny_model(tiny_config("gpt_oss"), "paged_flash")
        assert in_force(model) == ["paged_flash", "paged_flash"]
        assert "paged_flash" not in model._compatible_flash_implementations
        assert "_compatible_flash_implementations" not in vars(model)
        model.set_attn_implementation("eager")
        model.set_attn_implementation("paged_flash")
        assert in_force(model) == ["paged_flash", "paged_flash"]

    def test_t5_stacks_run_it_only_when_loaded_with_it(self):
        sizes = {"vocab_size": 97, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        config = transformers.T5Config(**sizes, decoder_start_token_id=0)
        model = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="paged_flash")
        assert in_force(model) == ["paged_flash"] * 3
        hf_paged_flash.reset_counters()
        model.eval()(input_ids=torch.ones(1, 4, dtype=torch.long), decoder_input_ids=torch.zeros(1, 1).long())
        assert hf_paged_flash.counters().reference["flash_forward"] == 6  # encoder, decoder and cross-attention
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
        before = in_force(model)
        model.set_attn_implementation("paged_flash")
        after = in_force(model)
        # transformers before 5.18 changes the top alone, where no attention runs; what runs is asked, not the top
        assert after[1:] in (before[1:], ["paged_flash"] * 2)
        if after[1:] == before[1:]:
            model(input_ids=torch.ones(1, 4, dtype=torch.long), decoder_input_ids=torch.zeros(1, 1).long())

    @pytest.mark.parametrize(
        ("model_type", "arguments"),
        [
            ("falcon", {"num_hidden_layers": 1, "num_attention_heads": 4}),
            ("gpt_neo", {"num_layers": 1, "attention_types": [[["global"], 1]], "num_heads": 4}),
            ("bloom", {"n_layer": 1, "n_head": 4}),
            ("mpt", {"n_layers": 1, "n_heads": 4}),
        ],
    )
    def test_models_out_of_reach_say_so_when_loaded(self, model_type, arguments):
        config = AutoConfig.for_model(model_type, vocab_size=97, hidden_size=64, **arguments)
        with pytest.raises(UnsupportedFeatureError, match=r"has attention code of its own.*implementation=\"eager\""):
            AutoModelForCausalLM.from_config(config, attn_implementation="paged_flash")
        config = AutoConfig.for_model(model_type, vocab_size=97, hidden_size=64, **arguments)
        model = AutoModelForCausalLM.from_config(config)
        before = in_force(model)
        model.set_attn_implementation("paged_flash")  # transformers warns, and changes nothing
        assert in_force(model) == before

    @pytest.mark.parametrize("way", ["load", "set"])
    def test_prefixes_are_no_reason_to_refuse(self, way):
        """HRM raises for every name with "flash" in it, as flash-attn has no masks for its prefixes."""
        sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        config = AutoConfig.for_model("hrm_text", **sizes, num_attention_heads=4, head_dim=16, prefix_lm=True)
        if way == "load":
            model = AutoModelForCausalLM.from_config(config, attn_implementation="paged_flash")
        else:
            model = AutoModelForCausalLM.from_config(config)
            model.set_attn_implementation("paged_flash")
        assert set(in_force(model)) == {"paged_flash"}
        eager = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        eager.load_state_dict(model.state_dict())
        input_ids = ragged_batch([9])[0]
        prefix = (torch.arange(9) < 4).long()[None]
        ours, theirs = (one(input_ids, token_type_ids=prefix).logits for one in (model.eval(), eager))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        assert (ours - eager(input_ids).logits).abs().max() > 1e-3  # the prefix sees itself whole

    def test_a_composite_model_takes_it_for_the_parts_that_can(self):
        def load(implementation):
            config = transformers.GotOcr2Config(
                vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32},
                text_config={"model_type": "qwen2", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1}
                | {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32},
            )
            with torch.device("meta"):
                return transformers.GotOcr2ForConditionalGeneration._from_config(
                    config, attn_implementation=implementation
                )

        with pytest.raises(UnsupportedFeatureError, match="GotOcr2VisionEncoder has attention code.*text_config"):
            load("paged_flash")
        model = load({"text_config": "paged_flash"})
        assert model.config.get_text_config()._attn_implementation == "paged_flash"

    def test_paged_prefix_means_continuous_batching_and_is_refused(self, model):
        with pytest.raises(UnsupportedFeatureError, match=r"`generate_batch`.*use `generate\(\)`"):
            model.generate_batch([[2, 3, 4], [5, 6]], generation_config=GenerationConfig(max_new_tokens=3))
        with pytest.raises(UnsupportedFeatureError, match="set_attn_implementation"):
            model.init_continuous_batching()
        assert in_force(model) == ["paged_flash", "paged_flash"]
        assert generate(model, *ragged_batch([5])).sequences.shape == (1, 17)


class TestUndo:
    def test_register_twice_is_once(self):
        before = [getattr(owner, name) for owner, name in TARGETS]
        hf_paged_flash.register()
        assert [getattr(owner, name) for owner, name in TARGETS] == before

    def test_every_patch_says_why_and_was_checked(self):
        for patch in ALL_PATCHES:
            assert patch.reason and "5.17.0" in patch.checked and "5.23.0" in patch.checked
            assert patch.target.endswith("." + patch.name)

    @pytest.mark.slow
    def test_unregister_restores_transformers_exactly(self):
        program = """
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, EncoderDecoderCache, GenerationMixin
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.generation.continuous_batching.continuous_api import ContinuousMixin
from transformers.generation.utils import DeferredStopCheck
from transformers.models.hrm_text import configuration_hrm_text, modeling_hrm_text
from transformers.models.pixtral import modeling_pixtral
owners = [flash_utils, GenerationMixin, PreTrainedModel, ContinuousMixin, masking_utils, modeling_pixtral]
owners += [EncoderDecoderCache, DeferredStopCheck, PreTrainedConfig, configuration_hrm_text, modeling_hrm_text]
def state():
    return [dict(vars(owner)) for owner in owners] + [
        dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
    ]
before = state()
import hf_paged_flash
from tests.tiny_models import tiny_config, tiny_model, ragged_batch
import torch
def changed(a, b):
    return {k for x, y in zip(a, b) for k in x.keys() | y.keys() if x.get(k, 0) is not y.get(k, 0)}
from hf_paged_flash.patches import ALL_PATCHES
assert {patch.owner() for patch in ALL_PATCHES} <= set(owners)
assert {patch.name for patch in ALL_PATCHES} <= changed(before, state())
for _ in range(2):
    model = tiny_model(tiny_config("gpt_oss"), "paged_flash")
    tokens = model.generate(*ragged_batch([5])[:1], max_new_tokens=3, do_sample=False)
    hf_paged_flash.unregister()
    assert changed(before, state()) <= {"_can_set_attn_implementation_cached_value"}, changed(before, state())
    hf_paged_flash.unregister()
    for load in (lambda: tiny_model(tiny_config("llama"), "paged_flash"),
                 lambda: tiny_model(tiny_config("llama"), "eager").set_attn_implementation("paged_flash"),
                 lambda: model(torch.ones(1, 3, dtype=torch.long))):
        try:
            load()
        except (ImportError, ValueError, KeyError) as error:
            assert "paged_flash" in str(error), error
        else:
            raise AssertionError("paged_flash still works")
    eager = tiny_model(tiny_config("llama"), "eager")
    out = eager.generate(*ragged_batch([5])[:1], max_new_tokens=3, return_dict_in_generate=True)
    assert type(out.past_key_values) is transformers.DynamicCache
    hf_paged_flash.register()
    again = model.generate(*ragged_batch([5])[:1], max_new_tokens=3, do_sample=False)
    assert torch.equal(tokens, again)
print("restored")
"""
        result = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
        assert result.stdout.strip() == "restored", result.stderr[-3000:]

    @pytest.mark.parametrize("when", ["before", "registered", "unregistered"])
    def test_a_models_code_is_patched_once_it_is_imported(self, when):
        """And not imported for it: that takes as long as importing this package."""
        program = f"""
import importlib, sys, transformers
when, name = {when!r}, "transformers.models.hrm_text.modeling_hrm_text"
def is_patched():
    return hasattr(sys.modules[name].is_flash_attention_requested, "__wrapped__")
if when == "before":
    transformers.HrmTextModel
import hf_paged_flash
assert (name in sys.modules) is (when == "before")
if when == "registered":
    transformers.HrmTextModel
assert when == "unregistered" or is_patched()
hf_paged_flash.unregister()
transformers.HrmTextModel
assert not is_patched()
hf_paged_flash.register()
assert is_patched()
del sys.modules[name]  # as after an import that failed
importlib.import_module(name)
assert is_patched()
"""
        result = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]

    def test_arguments_of_model_classes_go_on(self):
        class Tagged:
            def __init_subclass__(cls, original=None, **kwargs):
                super().__init_subclass__(**kwargs)
                cls.tag = original

        class Model(LlamaForCausalLM, Tagged, original="a tag"):
            pass

        assert Model.tag == "a tag" and Model.config_class is LlamaForCausalLM.config_class
        with pytest.raises(TypeError, match="__init_subclass__"):
            type("Other", (LlamaForCausalLM,), {}, original="a tag")

    def test_what_others_wrapped_since_stays(self, registered):
        ours = GenerationMixin._prefill

        @wraps(ours)
        def theirs(*args, **kwargs):
            theirs.calls += 1
            return ours(*args, **kwargs)

        theirs.calls = 0
        GenerationMixin._prefill = theirs
        try:
            hf_paged_flash.unregister()
            assert GenerationMixin._prefill is theirs
            model = tiny_model(tiny_config("llama"), "eager")
            generate(model, *ragged_batch([5, 5], None))
            assert theirs.calls == 1
            hf_paged_flash.register()
            ours_again = generate(tiny_model(tiny_config("llama"), "paged_flash"), *ragged_batch([5, 5], None))
            assert theirs.calls == 2
            hf_paged_flash.unregister()
            assert GenerationMixin._prefill is theirs
        finally:
            GenerationMixin._prefill = ours.__wrapped__
        hf_paged_flash.register()
        model = tiny_model(tiny_config("llama"), "paged_flash")
        assert torch.equal(generate(model, *ragged_batch([5, 5], None)).sequences, ours_again.sequences)

    @pytest.mark.parametrize("index", range(len(ALL_PATCHES)), ids=[patch.name for patch in ALL_PATCHES])
    def test_another_signature_is_an_error_that_changes_nothing(self, registered, monkeypatch, index):
        hf_paged_flash.unregister()
        owner, name = TARGETS[index]

        def changed(self, something_else):
            raise AssertionError("never called")

        monkeypatch.setattr(owner, name, changed)
        before = [getattr(owner, name) for owner, name in TARGETS]
        with pytest.raises(IncompatibleTransformersError) as raised:
            hf_paged_flash.register()
        message = str(raised.value)
        assert f"{owner.__name__}.{name} should take" in message
        assert "('self', 'something_else')" in message
        assert transformers.__version__ in message and "5.17.0, 5.23.0" in message
        assert [getattr(owner, name) for owner, name in TARGETS] == before
        assert not any(patch.applied for patch in ALL_PATCHES)
        assert "paged_flash" not in AttentionInterface._global_mapping
        monkeypatch.undo()
        hf_paged_flash.register()
        assert AttentionInterface._global_mapping["paged_flash"] is paged_flash_attention_forward

    def test_a_function_that_is_gone_is_an_error(self, registered, monkeypatch):
        hf_paged_flash.unregister()
        monkeypatch.delattr(GenerationMixin, "_prefill")
        with pytest.raises(IncompatibleTransformersError, match=r"GenerationMixin._prefill should .*but is not there"):
            hf_paged_flash.register()
        assert not any(patch.applied for patch in ALL_PATCHES)

    def test_the_last_flash_functions_are_looked_up_again(self, registered):
        tiny_model(tiny_config("llama"), "paged_flash")
        assert flash_utils._loaded_implementation == "paged_flash"
        assert flash_utils._flash_varlen_fn is hf_paged_flash.flash_attn_varlen_func
        hf_paged_flash.unregister()
        assert flash_utils._loaded_implementation is flash_utils._flash_varlen_fn is None


class TestVersions:
    def test_an_older_transformers_is_named_at_import(self):
        program = """
import transformers, transformers.cache_utils as cache_utils
transformers.__version__ = "5.10.2"
del cache_utils.get_layer_types_and_kwargs  # younger than that
import hf_paged_flash
"""
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert result.returncode == 1
        assert "IncompatibleTransformersError: hf_paged_flash needs transformers 5.17.0 or newer, found 5.10.2" in (
            result.stderr
        )

    def test_a_newer_one_is_warned_of(self, monkeypatch):
        monkeypatch.setattr(versions.transformers, "__version__", "5.99.1")
        with pytest.warns(UserWarning, match=f"up to transformers {versions.NEWEST_TRANSFORMERS}, found 5.99.1"):
            versions.check_transformers()

    @pytest.mark.parametrize("version", ["5.17.0", "5.17.1", "5.23.0"])
    def test_the_range_in_between_is_silent(self, monkeypatch, version):
        monkeypatch.setattr(versions.transformers, "__version__", version)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            versions.check_transformers()


class TestGenerate:
    """What `generate()` does with its many ways under the name, against eager."""

    @pytest.mark.parametrize(
        ("options", "cache"),
        [
            ({}, PagedCache),
            ({"cache_implementation": "dynamic"}, DynamicCache),
            ({"cache_implementation": "static"}, StaticCache),
            ({"use_cache": False}, type(None)),
            ({"num_beams": 3}, PagedCache),
            ({"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5}, PagedCache),
            ({"prefill_chunk_size": 7}, PagedCache),
            ({"repetition_penalty": 1.3}, PagedCache),
        ],
        ids=["default", "dynamic", "static", "no-cache", "beams", "return-beams", "chunked-prefill", "penalty"],
    )
    def test_ways_to_cache_and_search(self, model, eager, options, cache):
        input_ids, mask = ragged_batch([20, 7, 13])
        out = generate(model, input_ids, mask, **options)
        assert type(out.past_key_values) is cache
        assert torch.equal(out.sequences, generate(eager, input_ids, mask, **options).sequences)

    @pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
    def test_a_cache_of_the_users(self, model, eager, cache):
        input_ids, mask = ragged_batch([20, 7, 13])
        kwargs = {"max_cache_len": 40} if cache is StaticCache else {}
        mine = cache(config=model.config, **kwargs)
        out = generate(model, input_ids, mask, past_key_values=mine)
        assert out.past_key_values is mine
        assert torch.equal(out.sequences, generate(eager, input_ids, mask).sequences)

    @pytest.mark.parametrize("name", ["offloaded", "quantized"])
    def test_caches_that_need_more_than_a_cpu_are_left_to_transformers(self, model, eager, name):
        input_ids, mask = ragged_batch([6, 6], None)
        results = []
        for one in (eager, model):
            try:
                results.append(generate(one, input_ids, mask, cache_implementation=name).sequences)
            except Exception as error:  # whatever transformers says where the cache can't be had
                results.append((type(error), str(error)))
        if isinstance(results[0], torch.Tensor):
            assert torch.equal(*results)
        else:
            assert results[0] == results[1]

    def test_several_sequences_a_prompt(self, model, eager):
        results = []
        for one in (model, eager):
            torch.manual_seed(5)
            results.append(generate(one, *ragged_batch([20, 7]), do_sample=True, num_return_sequences=3).sequences)
        assert results[0].shape[0] == 6
        assert torch.equal(*results)

    def test_an_assistant_model(self, model, eager):
        small = tiny_config("llama", num_hidden_layers=2)
        input_ids, mask = ragged_batch([20], None)
        expected = generate(eager, input_ids, mask, max_new_tokens=24).sequences
        for seed in (0, 1):  # seed 0 starts like the model and is right at times, seed 1 is not
            assistant = tiny_model(small, "paged_flash", seed=seed)
            out = generate(model, input_ids, mask, max_new_tokens=24, assistant_model=assistant)
            assert isinstance(out.past_key_values, PagedCache)
            assert torch.equal(out.sequences, expected)

    def test_the_model_as_its_own_assistant_accepts_and_crops(self, model, eager):
        input_ids, mask = ragged_batch([20], None)
        assistant = tiny_model(tiny_config("llama"), "paged_flash")
        out = generate(model, input_ids, mask, max_new_tokens=24, assistant_model=assistant)
        assert torch.equal(out.sequences, generate(eager, input_ids, mask, max_new_tokens=24).sequences)
        assert out.past_key_values.memory().tokens == out.past_key_values.get_seq_length() <= 44

    def test_prompt_lookup(self, model, eager):
        input_ids = torch.tensor([[5, 6, 7, 8, 9] * 5])
        mask = torch.ones_like(input_ids)
        out = generate(model, input_ids, mask, max_new_tokens=24, prompt_lookup_num_tokens=4)
        assert isinstance(out.past_key_values, PagedCache)
        assert torch.equal(out.sequences, generate(eager, input_ids, mask, max_new_tokens=24).sequences)

    def test_a_sliding_model_with_an_assistant(self):
        config = tiny_config("mistral")
        model, eager = tiny_model(config, "paged_flash"), tiny_model(config, "eager")
        input_ids, mask = ragged_batch([30], None)
        out = generate(model, input_ids, mask, assistant_model=tiny_model(config, "paged_flash", seed=1))
        assert torch.equal(out.sequences, generate(eager, input_ids, mask).sequences)

    def test_right_padding_in_chunks_is_refused_where_rows_keep_it(self):
        model = tiny_model(tiny_config("deepseek_v3"), "paged_flash")
        with pytest.raises(UnsupportedFeatureError, match="prefill_chunk_size.*pad on the left"):
            generate(model, *ragged_batch([20, 7], "right"), prefill_chunk_size=8)

    def test_a_row_without_a_token_is_refused(self, model):
        input_ids, mask = ragged_batch([6, 4], "right")
        mask[1] = 0
        with pytest.raises(hf_paged_flash.ArgumentError, match="leaves row 1 without a new token"):
            generate(model, input_ids, mask)

    def test_options_on_the_config_are_refused_as_ever(self, model):
        """Before 5.24 transformers looks for them with a config of defaults, which is built no more without any."""
        config = copy.deepcopy(model.config)
        assert config._get_generation_parameters() == {}
        config.temperature = 0.5
        assert config._get_generation_parameters() == {"temperature": 0.5}
        built = []
        with mock.patch.object(type(config), "__init__", lambda self, *args, **kwargs: built.append(self)):
            assert model.config._get_generation_parameters() == {} and not built

    def test_output_attentions_is_refused(self, model):
        with pytest.raises(UnsupportedFeatureError, match='output_attentions=True.*attn_implementation="eager"'):
            generate(model, *ragged_batch([6]), output_attentions=True)

    def test_scores_and_logits_are_eagers(self, model, eager):
        input_ids, mask = ragged_batch([20, 7])
        ours, theirs = (
            generate(one, input_ids, mask, output_logits=True, output_scores=True) for one in (model, eager)
        )
        torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), rtol=0, atol=1e-4)
