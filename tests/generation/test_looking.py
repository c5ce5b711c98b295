"""generation/looking.py: what of a model is noticed, and that nothing is read twice for nothing."""

import gc
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import MethodType

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_paged_flash import configure
from hf_paged_flash.generation.fused_layers import fused_layers
from hf_paged_flash.generation.looking import Look, ModelChanged, confirm, glance_at, look_at, looking_once
from tests.tiny_models import tiny_config


@pytest.fixture
def model():
    model = LlamaForCausalLM(tiny_config("llama")).eval()
    model.model.layers[0].scales = {"adapter": 1.0}
    model.model.layers[0].mlp.__class__ = _Mlp
    model.model.layers[0].act = partial(print, 0)
    for number in range(80):  # as some configurations have
        setattr(model.config, f"number_{number}", number)
    return model


def _replace_layer(model):
    model.model.layers[1] = type(model.model.layers[1])(model.config, 1)


def _replace_weight(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def _move_weight(model):
    model.lm_head.weight.data = model.lm_head.weight.data.clone()


def _rename(model):
    layer = model.model.layers[0]
    layer.sizes = vars(layer).pop("scales")


def _wrap_forward(model):
    """Of a class of this model's alone."""
    forward = _Mlp.forward
    _Mlp.forward = lambda self, x: forward(self, x)


def _replace_twice(model):
    model.model.layers[0].act = partial(print, 1)
    model.model.layers[0].act = partial(print, 2)


def _swap_names(model):
    parts = model.model.layers[1].mlp._modules
    for name, part in {"up_proj": parts["gate_proj"], "gate_proj": parts["up_proj"]}.items():
        parts[name] = part
    names = list(parts)
    values = [parts.pop(name) for name in names]
    parts.update(zip(reversed(names), values, strict=True))


class _Mlp(LlamaMLP):
    pass


def _scripted(module):
    return torch.jit.script(nn.Linear(4, 4))


MATMUL = torch.backends.cuda.matmul
CHANGES = {
    "a layer": _replace_layer,
    "a class": lambda model: setattr(model.model.norm, "__class__", type("Norm", (type(model.model.norm),), {})),
    "an attribute's name": _rename,
    "a class' forward": _wrap_forward,
    "a weight": _replace_weight,
    "a weight's memory": _move_weight,
    "a dtype": lambda model: model.half(),
    "training": lambda model: model.model.layers[1].mlp.train(),
    "a number": lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.5),
    "a tensor for a number": lambda model: setattr(model.model.layers[0].self_attn, "scaling", torch.ones(2)),
    "within a dict": lambda model: model.model.layers[0].scales.update(adapter=2.0),
    "a new attribute": lambda model: setattr(model.model, "merged", False),
    "no attribute": lambda model: delattr(model.model.layers[0], "scales"),
    "a forward": lambda model: setattr(
        model.lm_head, "forward", MethodType(lambda self, x: nn.Linear.forward(self, x), model.lm_head)
    ),
    "a function at another's address": _replace_twice,
    "names of parts": _swap_names,
    "within a large configuration": lambda model: setattr(model.config, "rms_norm_eps", 0.5),
    "the configuration": lambda model: setattr(model.config, "_attn_implementation", "eager"),
    "the matmul precision": lambda model: torch.set_float32_matmul_precision("high"),
    "torch's newer setting of it": lambda model: setattr(torch.backends, "fp32_precision", "tf32"),
    "how cuBLAS sums": lambda model: setattr(MATMUL, "allow_bf16_reduced_precision_reduction", False),
    "the backend": lambda model: configure(backend="reference"),
}


@pytest.mark.usefixtures("precision_of_fp32")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_noticed(model, change):
    look = look_at(model)
    try:
        assert look_at(model) is look
        change(model)
        other = look_at(model)
        assert other is not look and other.fingerprint != look.fingerprint
    finally:
        MATMUL.allow_bf16_reduced_precision_reduction = True
        configure(backend="auto")


@pytest.mark.parametrize("wrap", [lambda x: torch.compile(x, backend="eager"), _scripted])
def test_modules_of_other_kinds(model, wrap):
    model.model.layers[1].mlp = wrap(model.model.layers[1].mlp)
    look = look_at(model)
    assert look_at(model) is look
    model.lm_head.train()
    assert look_at(model) is not look


def test_values_of_weights_do_not_count(model):
    look = look_at(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert look_at(model) is look


@pytest.mark.parametrize("changes_in_forwards", [False, True])
def test_hooks_are_noticed_and_no_graph_depends_on_them(model, changes_in_forwards):
    if changes_in_forwards:
        model.lm_head.rope_deltas = None
    look = look_at(model)
    if changes_in_forwards:
        model.lm_head.rope_deltas = torch.zeros(1)
        assert look_at(model) is look
    hook = model.lm_head.register_forward_hook(lambda *args: None)
    hooked = look_at(model)
    assert hooked is not look and hooked.fingerprint == look.fingerprint
    hook.remove()
    assert look_at(model) is not hooked


def test_what_was_told_lasts_as_long_as_the_look(model):
    asked = []

    def tell(model):
        asked.append(model)
        return len(asked)

    assert [look_at(model).of(tell) for _ in range(2)] == [1, 1]
    model.lm_head.train()
    assert look_at(model).of(tell) == 2


def test_a_glance_is_confirmed_once(model):
    look = look_at(model)
    assert glance_at(model) is look
    model.model.layers[0].self_attn.scaling = 0.5
    assert glance_at(model) is look and not look.holds()
    with looking_once(look, confirmed=False):
        with pytest.raises(ModelChanged):
            confirm(model)
        confirm(model)  # by now it is known
    with looking_once(look):
        confirm(model)
    assert look_at(model) is not look


@pytest.mark.parametrize("change", ["a weight", "a weight's memory", "a dtype"])
def test_a_glance_sees_what_a_graph_reads(model, change):
    look = look_at(model)
    CHANGES[change](model)
    assert glance_at(model) is not look


def test_what_stands_in_is_no_change(model):
    """As put in by another thread; hooks are one."""
    look = look_at(model)
    with looking_once(look, confirmed=False), fused_layers(model):
        confirm(model)
    look = look_at(model)
    model.model.norm.register_forward_hook(lambda module, args, output: output)
    with looking_once(look, confirmed=False), pytest.raises(ModelChanged):
        confirm(model)


def test_other_threads_may_fuse_layers_meanwhile(model):
    interval, ends = sys.getswitchinterval(), time.monotonic() + 1

    def repeat(call):
        while time.monotonic() < ends:
            call(model)

    def fuse(model):
        with fused_layers(model):
            pass

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor() as threads:
            runs = [threads.submit(repeat, call) for call in (fuse, fuse, Look, Look)]
        for run in runs:
            run.result()
    finally:
        sys.setswitchinterval(interval)


def test_looking_once(model):
    with looking_once():
        look = look_at(model)
        model.lm_head.train()
        assert look_at(model) is look
        with looking_once():  # an assistant's loop, within
            assert look_at(model) is not look
        assert look_at(model) is look
    assert look_at(model) is not look


def test_models_are_not_kept():
    model = LlamaForCausalLM(tiny_config("llama"))  # fixtures are kept by pytest
    look, reference, weight = look_at(model), weakref.ref(model), weakref.ref(model.lm_head.weight)
    model.layers_of_mine = [model.model]
    look_at(model)
    del model
    gc.collect()
    assert reference() is None and weight() is None and not look.holds()
