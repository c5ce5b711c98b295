"""Norms, rotary embeddings, gates of MLPs and small matrix products as one kernel each, while `generate()` runs.

A model writes the first three out operator by operator, some 25 a layer. In a decode step each takes longer to start
than to run, of a long prompt each moves the hidden states through memory once more. For a single row torch's matrix
products read their weights as fast as the memory allows only where these are large.
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

    def put_in(self, references: list[weakref.ref]) -> None:
        modules = [module for reference in references if (module := reference()) is not None]
        forwards = _forwards_of(modules)  # anew each time: somebody may have replaced the code of a class
        for module in filter(runs_its_class, modules):
            if type(module) in forwards:
                self.forwards.append(MethodType(forwards[type(module)], module))
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
    known = _forwards_of(modules)
    return [weakref.ref(module) for module in modules if type(module) in known]


def _forwards_of(modules: list[nn.Module]) -> dict[type, Callable]:
    """By class of `modules`, what runs instead, of those that are known."""
    forwards = {module_class: forward_of(module_class) for module_class in set(map(type, modules))}
    return {module_class: forward for module_class, forward in forwards.items() if forward is not None}


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")
