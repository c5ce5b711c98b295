"""Decode steps that are compiled before they are captured, over a recorder on the CPU."""

from unittest import mock

import pytest
import torch
from transformers import CompileConfig

from hf_paged_flash import PagedCache, backend, configure
from hf_paged_flash.errors import ArgumentError, UnsupportedFeatureError
from hf_paged_flash.generation import compiled_forward, decode_graph
from tests.generation.runs import batch, generate, models

EAGER = CompileConfig(backend="eager", mode=None)
MODELS = ("llama", "gemma3_text", "gpt2", "qwen3")


@pytest.fixture(autouse=True)
def steps_alone(monkeypatch):
    """Prompts are not replayed."""
    monkeypatch.setattr("hf_paged_flash.generation.decode_loop.length_of", lambda counts: None)


@pytest.fixture
def compiled(recorders, monkeypatch):
    """The graphs of operators that are handed to torch.compile."""
    seen = []
    original = compiled_forward.CompileSettings.compile

    def note(self, module):
        seen.append(module)
        return original(self, module)

    monkeypatch.setattr(compiled_forward.CompileSettings, "compile", note)
    return seen


@pytest.mark.parametrize("model_type", MODELS)
def test_tokens_are_eager_ones(model_type, recorders, compiled, monkeypatch):
    """Pools move, tables grow: each time it is captured anew, and compiled once."""
    monkeypatch.setattr(decode_graph, "MIN_WIDTH", 1)
    paged, eager = models(model_type)
    expected = generate(eager, *batch("left"), max_new_tokens=50)
    for _ in range(2):
        assert torch.equal(generate(paged, *batch("left"), max_new_tokens=50, compile_config=EAGER), expected)
    assert recorders.captured > 2 and recorders.replayed == 2 * 49 - 1
    assert len(compiled) == 1
    assert not any("cache" in str(node.target) for node in compiled[0].graph.nodes)


def test_inductor(recorders, compiled):
    paged, eager = models("llama")
    config = CompileConfig(mode="default")
    expected = generate(eager, *batch("left"))
    assert torch.equal(generate(paged, *batch("left"), compile_config=config), expected)
    assert recorders.replayed == 10 and len(compiled) == 1


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_layers_of_few_rows_stay_ours(rows, recorders, compiled):
    paged, eager = models("llama")
    given = [x[:rows] for x in batch("left")]
    expected = generate(eager, *given)
    assert torch.equal(generate(paged, *given, compile_config=EAGER), expected)
    targets = [str(node.target).split(".") for node in compiled[0].graph.nodes]
    called = {target[1] for target in targets if target[0] == "hf_paged_flash"}
    assert called == {"step_store", "step_decode"} | ({"rms_norm", "rotary", "swiglu"} if rows <= 2 else set())


def test_beams_and_verify_steps(recorders, compiled):
    paged, eager = models("llama")
    input_ids, mask = batch("left")
    for options in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
        rows = slice(0, 1) if "prompt_lookup_num_tokens" in options else slice(None)
        given = input_ids[rows], mask[rows]
        expected = generate(eager, *given, **options)
        assert torch.equal(generate(paged, *given, compile_config=EAGER, **options), expected)
    assert len(compiled) >= 2


def test_weights_that_change_in_place(recorders, compiled):
    """Nothing that comes of weights alone is kept."""
    paged, eager = models("gemma3_text")  # its norms add 1 to their weights
    generate(paged, *batch("left"), compile_config=EAGER)
    changed = [model.model.layers[0].input_layernorm.weight for model in (paged, eager)]
    before = [weight.clone() for weight in changed]
    try:
        with torch.no_grad():
            for weight in changed:
                weight.add_(3.0)
        expected = generate(eager, *batch("left"))
        assert torch.equal(generate(paged, *batch("left"), compile_config=EAGER), expected)
        assert len(compiled) == 1
    finally:
        with torch.no_grad():
            for weight, value in zip(changed, before, strict=True):
                weight.copy_(value)


def test_configure(recorders, compiled):
    paged, eager = models("llama")
    expected = generate(eager, *batch("left"))
    try:
        configure(compile="reduce-overhead")
        with mock.patch("torch.compile", side_effect=lambda module, **options: module) as compiler:
            assert torch.equal(generate(paged, *batch("left")), expected)
        assert compiler.call_args.kwargs["mode"] == "default", "torch's own graphs within ours"
        configure(compile=False)
        assert torch.equal(generate(paged, *batch("left")), expected)
        assert len(compiled) == 1
    finally:
        configure(compile=False)
    with pytest.raises(ArgumentError, match="`compile` must be one of 'default'.* got 'fast'"):
        configure(compile="fast")
    assert backend.compile_mode() is None


def test_settings():
    settings = compiled_forward.CompileSettings.of
    assert settings(CompileConfig()).mode == "default"
    assert settings(CompileConfig(mode="max-autotune")).mode == "max-autotune-no-cudagraphs"
    with_options = settings(CompileConfig(options={"max_autotune": True, "triton.cudagraphs": True}))
    assert with_options.mode is None
    assert dict(with_options.options) == {"max_autotune": True, "triton.cudagraphs": False}


def test_what_was_asked_for_raises_where_it_does_not_happen(recorders, compiled, monkeypatch):
    paged, _ = models("llama")
    handle = paged.model.layers[0].register_forward_hook(lambda *_: None)
    try:
        with pytest.raises(UnsupportedFeatureError, match="`compile_config`.*has a forward hook"):
            generate(paged, *batch("left"), compile_config=EAGER)
        generate(paged, *batch("left"), compile_config=EAGER, disable_compile=True)
    finally:
        handle.remove()
    monkeypatch.setattr(backend, "_graphs", False)
    with pytest.raises(UnsupportedFeatureError, match=r"configure\(graphs=False\)"):
        generate(paged, *batch("left"), compile_config=EAGER)
    assert compiled == []


def test_a_compiler_that_fails(recorders, compiled):
    """The cache is as before the step, and steps that are not to be compiled go on as graphs."""
    paged, eager = models("llama")
    decode_graph._of_models.clear()
    cache = PagedCache(paged.config)
    with mock.patch("torch.compile", side_effect=RuntimeError("no compiler here")):
        for columns in (31, 30):  # the prompt and the step that ran as it is; known, it is told before that
            with pytest.raises(UnsupportedFeatureError, match="no compiler here"):
                generate(paged, *batch("left"), past_key_values=cache, compile_config=EAGER)
            assert cache.get_seq_length() == columns
            cache.reset()
    expected = generate(eager, *batch("left"))
    assert torch.equal(generate(paged, *batch("left"), past_key_values=cache), expected)
    assert recorders.replayed > 0


def test_a_model_that_was_refused_before(recorders, compiled, monkeypatch):
    """What nobody asked for was a warning, and is an error now."""
    paged, _ = models("llama")
    decode_graph._of_models.clear()
    monkeypatch.setattr(recorders, "failing", RuntimeError("not this one"))
    generate(paged, *batch("left"))
    monkeypatch.setattr(recorders, "failing", None)
    with pytest.raises(UnsupportedFeatureError, match="not this one"):
        generate(paged, *batch("left"), compile_config=EAGER)
