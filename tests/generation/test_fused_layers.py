"""Norms, rotary embeddings, gates and linear layers as one operator each, in generate(), where their code is known."""

import copy
import functools
import io
from collections import Counter
from types import MethodType, SimpleNamespace

import pytest
import torch
from transformers import CompileConfig
from transformers.models.llama import modeling_llama

from hf_paged_flash import configure, counters, reset_counters
from hf_paged_flash.eval.finding import build
from hf_paged_flash.generation.fused_layers import fused_layers
from hf_paged_flash.generation.known_layers import captured_layers, forward_of, own_layers
from hf_paged_flash.generation.looking import Look, looking_once
from hf_paged_flash.ops import layers
from tests.integration.models import LENGTHS, new_tokens, unpadded_runs
from tests.tiny_models import ragged_batch, tiny_config, tiny_model

INPUT_IDS = torch.arange(3, 21).view(2, 9)
# calls of each operator in a forward of three layers
FUSED = {
    "llama": {"rms_norm": 7, "rotary": 3, "swiglu": 3},
    "mistral": {"rms_norm": 7, "rotary": 3, "swiglu": 3},
    "deepseek_v3": {"rms_norm": 10, "swiglu": 3},  # pairs beside each other are turned, not halves
    "qwen3": {"rms_norm": 13, "rotary": 3, "swiglu": 3},
    "gemma2": {"rms_norm": 13, "rotary": 3},
    "gemma3_text": {"rms_norm": 19, "rotary": 3},
    "phi3": {"rms_norm": 7, "rotary": 3},
    "gpt_oss": {"rms_norm": 7, "rotary": 3},
    "gpt2": {},
}
# code of their own in one of both, part of a head turned, angles in fp32, layers that share their keys
OTHERS = ("cohere2", "exaone4", "glm4", "gpt_neox", "granite", "mixtral", "olmo2", "phi", "smollm3", "stablelm")


@pytest.fixture
def llama():
    return tiny_model(tiny_config("llama"), "paged_flash").eval()


@pytest.fixture(autouse=True)
def count_anew():
    reset_counters()
    yield
    configure(fused_layers=True)
    reset_counters()


def calls() -> dict[str, int]:
    counted = Counter(counters().reference) + Counter(counters().kernel)
    return {name: counted[name] for name in ("rms_norm", "rotary", "swiglu", "linear") if counted[name]}


@torch.no_grad()
def both(model, input_ids: torch.Tensor = INPUT_IDS) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the model's own code, and of what is fused."""
    own = model(input_ids=input_ids).logits
    assert calls() == {}
    with fused_layers(model):
        return own, model(input_ids=input_ids).logits


@pytest.mark.parametrize("model_type", FUSED)
def test_tiny_models(model_type):
    own, fused = both(tiny_model(tiny_config(model_type), "paged_flash").eval())
    assert torch.equal(fused, own)
    assert calls() == FUSED[model_type]


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_types(model_type):
    own, fused = both(build(model_type, "paged_flash"))
    torch.testing.assert_close(fused, own, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    own, fused = both(tiny_model(tiny_config("gemma3_text"), "paged_flash").eval().to(dtype))
    assert torch.equal(fused, own)
    assert calls() == FUSED["gemma3_text"]


def test_modules_are_put_back(llama):
    before = [list(vars(module)) for module in llama.modules()]
    with pytest.raises(RuntimeError, match="within"), fused_layers(llama):
        assert [list(vars(module)) for module in llama.modules()] != before
        raise RuntimeError("within")
    assert [list(vars(module)) for module in llama.modules()] == before


def test_one_within_another(llama):
    """As in several threads, of which each may be the last."""
    first, second = fused_layers(llama), fused_layers(llama)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with torch.no_grad():
        llama(input_ids=INPUT_IDS)
    assert calls() == FUSED["llama"]
    second.__exit__(None, None, None)
    assert not any("forward" in vars(module) for module in llama.modules())


def test_own_layers_within(llama):
    with fused_layers(llama), own_layers(), torch.no_grad():
        llama(input_ids=INPUT_IDS)
    assert calls() == {}


def test_a_look_does_not_see_them(llama):
    look = Look(llama)
    with fused_layers(llama):
        assert Look(llama).fingerprint == look.fingerprint
    assert look.holds()


@pytest.mark.parametrize("how", ["module.compile()", "a forward"])
def test_models_that_are_compiled_are_left_alone(llama, how):
    """Code that was compiled would be compiled anew."""
    if how == "a forward":
        llama.forward = torch.compile(llama.forward, backend="eager")
    else:
        llama.model.layers[1].compile(backend="eager")
    with fused_layers(llama):
        assert "forward" not in vars(llama.model.norm)


def test_what_somebody_puts_in_meanwhile_stays(llama):
    norm = llama.model.norm
    with fused_layers(llama):
        norm.forward = own = MethodType(lambda self, x: x, norm)
    assert norm.forward is own
    assert [module for module in llama.modules() if "forward" in vars(module)] == [norm]


@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_copies_made_meanwhile(llama, how):
    """They are models like any other."""
    with fused_layers(llama):
        if how == "deepcopy":
            other = copy.deepcopy(llama)
        else:
            file = io.BytesIO()
            torch.save(llama, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
    assert not any("forward" in vars(module) for module in llama.modules())
    own, fused = both(llama)
    reset_counters()
    with torch.no_grad(), fused_layers(other):
        assert torch.equal(other(input_ids=INPUT_IDS).logits, fused)
    assert calls() == FUSED["llama"]


@torch.no_grad()
def test_code_that_others_have_compiled(llama):
    """Runs what it was compiled from, and is not compiled anew in each call."""
    attention, compiled = llama.model.layers[1].self_attn, []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    inputs = torch.randn(1, 3, 64), llama.model.rotary_emb(torch.randn(1, 3, 64), torch.arange(3)[None])
    run = torch.compile(lambda x, angles: llama.model.norm(x) + attention.q_proj(x), backend=backend)
    whole = torch.compile(lambda x, angles: attention(x, angles, None)[0], backend=backend)
    llama.set_attn_implementation("eager")
    for call in (run, whole):
        expected = call(*inputs)
        for _ in range(3):
            with fused_layers(llama):
                assert torch.equal(call(*inputs), expected)
    assert calls() == {} and len(compiled) <= 4


def test_modules_that_are_gone(llama):
    with looking_once():
        with fused_layers(llama):
            pass
        llama.model.norm = torch.nn.Identity()
        with fused_layers(llama), torch.no_grad():
            llama(input_ids=INPUT_IDS)
    assert calls() == FUSED["llama"] | {"rms_norm": 6}
    assert not any("forward" in vars(module) for module in llama.modules())


def test_switched_off(llama):
    configure(fused_layers=False)
    own, fused = both(llama)
    assert torch.equal(own, fused) and calls() == {}


def test_gradients_come_from_their_own_code(llama):
    with fused_layers(llama):
        llama(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert calls() == {} and llama.model.norm.weight.grad is not None


class TestSwiglu:
    @staticmethod
    def mlp(model) -> torch.nn.Module:
        return model.model.layers[1].mlp

    def test_torchs_own_module(self, llama):
        for layer in llama.model.layers:
            layer.mlp.act_fn = torch.nn.SiLU(inplace=True)
        own, fused = both(llama)
        assert torch.equal(own, fused) and calls() == FUSED["llama"]

    @pytest.mark.parametrize("what", ["another function", "another class", "a hook", "a hook before", "a forward"])
    def test_other_activations(self, llama, what):
        activation = self.mlp(llama).act_fn
        if what == "another function":
            self.mlp(llama).act_fn = torch.nn.GELU()
        elif what == "another class":
            activation.__class__ = type("Twice", (type(activation),), {"forward": lambda self, x: 2 * x})
        elif what == "a hook":
            activation.register_forward_hook(lambda module, args, output: 2 * output)
        elif what == "a hook before":
            activation.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        else:
            activation.forward = lambda x: 2 * x
        own, fused = both(llama)
        assert torch.equal(own, fused) and calls() == FUSED["llama"] | {"swiglu": 2}

    @pytest.mark.parametrize("own", [True, False], ids=["torch's", "transformers'"])
    def test_a_class_that_others_have_changed(self, llama, monkeypatch, own):
        if own:
            for layer in llama.model.layers:
                layer.mlp.act_fn = torch.nn.SiLU()
        activation = type(self.mlp(llama).act_fn)
        monkeypatch.setattr(activation, "forward", lambda self, input: 2 * input)
        fused = both(llama)
        assert torch.equal(*fused) and "swiglu" not in calls()

    def test_another_function_in_torch(self, llama, monkeypatch):
        silu = torch.nn.functional.silu
        monkeypatch.setattr(torch.nn.functional, "silu", functools.wraps(silu)(lambda x, inplace=False: 2 * silu(x)))
        fused = both(llama)
        assert torch.equal(*fused) and "swiglu" not in calls()

    def test_hooks_of_all_modules(self, llama):
        def twice(module, args, output):
            return 2 * output if module is self.mlp(llama).act_fn else None

        handle = torch.nn.modules.module.register_module_forward_hook(twice)
        try:
            own, fused = both(llama)
        finally:
            handle.remove()
        assert torch.equal(own, fused) and "swiglu" not in calls()

    def test_hooks_of_its_linear_layers(self, llama):
        """They are called as ever, so that these may be of any kind."""
        self.mlp(llama).gate_proj.register_forward_hook(lambda module, args, output: 2 * output)
        own, fused = both(llama)
        assert torch.equal(own, fused) and calls() == FUSED["llama"]

    def test_factors_of_other_dtypes(self, llama):
        self.mlp(llama).up_proj.register_forward_hook(lambda module, args, output: output.double())
        self.mlp(llama).down_proj.double().register_forward_hook(lambda module, args, output: output.float())
        own, fused = both(llama)
        assert torch.equal(own, fused) and calls() == FUSED["llama"] | {"swiglu": 2}


class TestLinear:
    """Of one row or two in half precision, where it is captured."""

    LAYERS = 3 * 7 + 1

    @pytest.fixture(autouse=True)
    def small_weights(self, monkeypatch):
        monkeypatch.setattr(layers, "LEAST_WEIGHTS", 32 * 64)

    @pytest.fixture
    def layer(self) -> torch.nn.Linear:
        return torch.nn.Linear(64, 32, dtype=torch.float16)

    @staticmethod
    @torch.no_grad()
    def runs(layer: torch.nn.Linear, shape: tuple[int, ...] = (1, 1, 64), dtype: torch.dtype = torch.float16) -> bool:
        """Whether the operator runs, with torch's result, which it has on a CPU."""
        x = torch.randn(shape).to(dtype)
        with captured_layers():
            assert torch.equal(forward_of(type(layer))(layer, x), layer(x))
        return calls() == {"linear": 1}

    @pytest.mark.parametrize("model_type, count", [("llama", LAYERS), ("gemma3_text", LAYERS), ("gpt_oss", 3 * 4 + 1)])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_models(self, model_type, count, dtype):
        """With a head that is the table of embeddings, and with biases; gpt-oss' experts are no such layers."""
        model = tiny_model(tiny_config(model_type), "paged_flash", dtype=dtype)
        with captured_layers():
            own, fused = both(model, torch.tensor([[3, 4]]))
        assert torch.equal(own, fused) and calls()["linear"] == count

    @torch.no_grad()
    def test_eager_forwards_are_left_to_torch(self, llama):
        own, fused = both(llama.half(), torch.tensor([[3, 4]]))
        assert torch.equal(own, fused) and "linear" not in calls()

    @pytest.mark.parametrize("shape, few", [((64,), True), ((1, 2, 64), True), ((2, 1, 64), True), ((3, 64), False),
                                            ((1, 3, 64), False), ((0, 64), False)])  # fmt: skip
    def test_rows(self, layer, shape, few):
        assert self.runs(layer, shape) == few

    @pytest.mark.parametrize("has_bias", [True, False])
    def test_bias(self, layer, has_bias):
        layer.bias = layer.bias if has_bias else None
        assert self.runs(layer)

    @pytest.mark.parametrize("bias", [torch.ones(()), torch.ones(1), torch.randn(2, 32), torch.randn(64).half()[::2]],
                             ids=["of no dim", "of one", "of each row", "strided"])  # fmt: skip
    def test_biases_that_are_left_to_torch(self, layer, bias):
        layer.bias = torch.nn.Parameter(bias.half())
        assert not self.runs(layer, (2, 64))

    WEIGHTS = {
        "fp32": (torch.float32, lambda weight: weight.float()),
        "small": (torch.float16, lambda weight: weight[1:]),
        "by columns": (torch.float16, lambda weight: weight.mT.contiguous().mT),
        "every second column": (torch.float16, lambda weight: torch.cat([weight, weight], 1)[:, ::2]),
        "rows of 72": (torch.float16, lambda weight: torch.cat([weight, weight], 1)[:, :72].contiguous()[:, :64]),
        "not aligned": (torch.float16, lambda weight: torch.cat([weight, weight]).flatten()[4:2052].view(32, 64)),
        "a subclass of tensors": (torch.float16, lambda weight: weight.as_subclass(_Tensor)),
    }

    @pytest.mark.parametrize("how", WEIGHTS)
    def test_weights_that_are_left_to_torch(self, layer, how):
        dtype, change = self.WEIGHTS[how]
        layer.weight, layer.bias = torch.nn.Parameter(change(layer.weight.detach())), None
        assert not self.runs(layer, dtype=dtype)

    def test_a_parametrized_weight(self, layer):
        torch.nn.utils.parametrizations.weight_norm(layer)
        assert forward_of(type(layer)) is None

    def test_autocast(self, layer):
        with torch.autocast("cpu", torch.bfloat16):
            assert not self.runs(layer)

    def test_another_linear(self, layer, monkeypatch):
        """As libraries put in, of which some are imported earlier than this one."""
        original = torch.nn.functional.linear
        monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: 2 * original(*args))
        assert forward_of(type(layer)) is None

    def test_other_functions(self, layer, monkeypatch):
        functions = SimpleNamespace(linear=torch.nn.functional.linear)
        monkeypatch.setitem(torch.nn.Linear.forward.__globals__, "F", functions)
        assert forward_of(type(layer)) is None

    @pytest.mark.parametrize("what", ["another dtype", "another width"])
    def test_errors_are_torchs(self, layer, what):
        x = torch.ones(1, 64) if what == "another dtype" else torch.ones(1, 72, dtype=torch.float16)
        with torch.no_grad(), captured_layers(), pytest.raises(RuntimeError, match="mat1 and mat2|same dtype"):
            forward_of(type(layer))(layer, x)
        assert calls() == {}


class TestWhatIsNotKnown:
    def test_a_norm_that_does_more(self, llama):
        class Doubled(modeling_llama.LlamaRMSNorm):
            def forward(self, hidden_states):
                return 2 * super().forward(hidden_states)

        llama.model.norm.__class__ = Doubled
        own, fused = both(llama)
        assert torch.equal(own, fused) and calls()["rms_norm"] == 6

    def test_a_forward_of_the_users_own(self, llama):
        norm = llama.model.norm
        norm.forward = MethodType(lambda self, x: 2 * type(self).forward(self, x), norm)
        own, fused = both(llama)
        assert torch.equal(own, fused) and calls()["rms_norm"] == 6
        assert "forward" in vars(norm)

    def test_lambdas(self, llama, monkeypatch):
        """The source of one is all of its statement."""
        original = modeling_llama.LlamaRMSNorm.forward
        monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", lambda self, x: 2 * original(self, x))
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *angles: (q, k))
        own, fused = both(llama)
        assert torch.equal(own, fused) and not {"rms_norm", "rotary"} & calls().keys()

    def test_a_norm_that_is_wrapped(self, llama, monkeypatch):
        """Its source is that of what it wraps."""
        original = modeling_llama.LlamaRMSNorm.forward

        @functools.wraps(original)
        def doubled(self, hidden_states):
            return 2 * original(self, hidden_states)

        both(llama)
        reset_counters()
        monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", doubled)
        own, fused = both(llama)
        assert torch.equal(own, fused) and "rms_norm" not in calls()

    @pytest.mark.parametrize("holds", [True, False])
    def test_an_attention_that_is_wrapped(self, llama, monkeypatch, holds):
        """As by transformers itself, from 5.24 on: the wrapper stays around it."""
        original, wrapped = modeling_llama.LlamaAttention.forward, []

        @functools.wraps(original)
        def counted(self, *args, **kwargs):
            wrapped.append(self)
            return (original if holds else counted.__wrapped__)(self, *args, **kwargs)

        if not holds:
            original = None
        monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", counted)
        own, fused = both(llama)
        assert torch.equal(own, fused) and calls().get("rotary", 0) == (3 if holds else 0)
        assert wrapped == [layer.self_attn for layer in llama.model.layers] * 2

    def test_another_rotary_embedding(self, llama, monkeypatch):
        """As libraries with kernels of their own put into transformers."""
        original = modeling_llama.apply_rotary_pos_emb

        def turned_back(q, k, cos, sin, unsqueeze_dim=1):
            return original(q, k, cos, -sin, unsqueeze_dim)

        before, _ = both(llama)
        reset_counters()
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", turned_back)
        own, fused = both(llama)
        assert torch.equal(own, fused) and "rotary" not in calls() and not torch.equal(own, before)

    def test_weights_of_another_dtype(self, llama):
        norm, x = llama.model.norm, torch.randn(2, 64, dtype=torch.float16)
        with torch.no_grad():
            own = norm(x)
            with fused_layers(llama):
                assert torch.equal(norm(x), own)
        assert own.dtype == torch.float32 and calls() == {}

    def test_fp64(self, llama):
        own, fused = both(llama.to(torch.float64))
        assert torch.equal(own, fused) and calls() == {}

    def test_rows_wider_than_a_program_holds(self, llama, monkeypatch):
        monkeypatch.setattr(layers, "WIDEST", 63)
        own, fused = both(llama)
        assert torch.equal(own, fused) and "rms_norm" not in calls()

    def test_weights_that_are_no_plain_tensors(self, llama):
        for module in llama.modules():
            if isinstance(module, modeling_llama.LlamaRMSNorm):
                module.weight = torch.nn.Parameter(module.weight.detach().as_subclass(_Tensor))
        own, fused = both(llama)
        assert torch.equal(own, fused) and "rms_norm" not in calls()


class _Tensor(torch.Tensor):
    pass


class TestGenerate:
    @pytest.fixture(autouse=True)
    def steps_alone(self, monkeypatch):
        """Prompts are not replayed."""
        monkeypatch.setattr("hf_paged_flash.generation.decode_loop.length_of", lambda counts: None)

    @pytest.fixture
    def pair(self, load):
        return load("llama")

    @staticmethod
    def forwards(count: int) -> dict[str, int]:
        return {name: count * calls for name, calls in FUSED["llama"].items()}

    def test_every_forward(self, pair, recorders, elastic):
        """The prefill, a step that warms up, one that is captured, and all replays."""
        tokens = new_tokens(pair.paged, *ragged_batch(LENGTHS))
        assert torch.equal(tokens, unpadded_runs(pair.eager))
        assert calls() == self.forwards(3 + recorders.replayed)
        assert not any("forward" in vars(module) for module in pair.paged.modules())

    def test_without_graphs(self, pair, recorders):
        tokens = new_tokens(pair.paged, *ragged_batch(LENGTHS), disable_compile=True)
        assert torch.equal(tokens, unpadded_runs(pair.eager))
        assert calls() == self.forwards(tokens.shape[1]) and not recorders.captured

    def test_switching_captures_anew(self, pair, recorders, elastic):
        new_tokens(pair.paged, *ragged_batch(LENGTHS))
        captured = recorders.captured
        configure(fused_layers=False)
        reset_counters()
        assert torch.equal(new_tokens(pair.paged, *ragged_batch(LENGTHS)), unpadded_runs(pair.eager))
        assert recorders.captured > captured and calls() == {}

    def test_compiled_steps_are_left_to_the_compiler(self, pair, recorders):
        config = CompileConfig(backend="eager", mode=None)
        tokens = new_tokens(pair.paged, *ragged_batch(LENGTHS), compile_config=config)
        assert torch.equal(tokens, unpadded_runs(pair.eager))
        assert recorders.replayed and calls() == self.forwards(1)

    @pytest.mark.parametrize("how, forwards", [("raw", 2), ("compiled", 4)])
    def test_linear_layers_of_one_row(self, recorders, elastic, monkeypatch, how, forwards):
        """In the step that warms up, in what is traced and captured, and in replays; prompts leave them to torch."""
        monkeypatch.setattr(layers, "LEAST_WEIGHTS", 1)
        config = None if how == "raw" else CompileConfig(backend="eager", mode=None)
        model = tiny_model(tiny_config("llama"), "paged_flash", dtype=torch.float16)
        inputs = torch.arange(3, 12)[None], torch.ones(1, 9, dtype=torch.long)
        expected = new_tokens(model, *inputs, disable_compile=True)
        assert "linear" not in calls()
        assert torch.equal(new_tokens(model, *inputs, compile_config=config), expected)
        assert recorders.replayed
        assert calls()["linear"] == TestLinear.LAYERS * (forwards + recorders.replayed)

    def test_where_nothing_is_captured(self, pair):
        """On a CPU, where fewer operators bring nothing."""
        new_tokens(pair.paged, *ragged_batch(LENGTHS))
        assert calls() == {}
