"""Norms and rotary embeddings as one kernel each, while `generate()` runs.

A model writes them out operator by operator, some 25 a layer. In a decode step each takes longer to start than to run,
in all a fifth of the time of an 8B model; of a long prompt each moves the hidden states through memory once more.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType

from torch import nn
from transformers import PreTrainedModel

from .. import backend
from .known_layers import forward_of
from .looking import look_at, runs_its_class


@dataclass
class _Fused:
    """What a model's modules run for now, and how many `fused_layers` there are of it."""

    count: int = 0
    forwards: list[MethodType] = field(default_factory=list)

    def put_in(self, modules: list[weakref.ref]) -> None:
        by_class: dict[type, Callable | None] = {}  # known anew each time: somebody may have replaced their code
        for module in [reference() for reference in modules]:
            if module is None or not runs_its_class(module):
                continue
            if type(module) not in by_class:
                by_class[type(module)] = forward_of(type(module))
            forward = by_class[type(module)]
            if forward is not None:
                self.forwards.append(MethodType(forward, module))
                vars(module)["forward"] = self.forwards[-1]

    def take_out(self) -> None:
        while self.forwards:
            method = self.forwards.pop()
            attributes = vars(method.__self__)
            if attributes.get("forward") is method:  # nobody has put in another
                del attributes["forward"]


_lock = threading.Lock()
_models: "weakref.WeakKeyDictionary[PreTrainedModel, _Fused]" = weakref.WeakKeyDictionary()


@contextmanager
def fused_layers(model: PreTrainedModel) -> Iterator[None]:
    """Within it modules of `model` that are known run as one operator each, unless `configure` has switched that off.

    In all threads, but where gradients are asked for, which these operators do not have.
    """
    modules = look_at(model).of(_known_modules) if backend.fuses_layers() else []
    with _lock:
        fused = _models.setdefault(model, _Fused())
        fused.count += 1
    try:
        with _lock:
            if not fused.forwards:
                fused.put_in(modules)
        yield
    finally:
        with _lock:
            fused.count -= 1
            if fused.count == 0:
                fused.take_out()


def _known_modules(model: PreTrainedModel) -> list[weakref.ref]:
    """Those with something to run instead; none of a model that is compiled, as it would be anew."""
    modules = list(model.modules())
    if any(map(_is_compiled, modules)):
        return []
    return [weakref.ref(module) for module in modules if runs_its_class(module) and forward_of(type(module))]


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")
