"""A model as it was when somebody looked, and whether it still is: so long a captured forward of it holds.

To read a large model's modules takes longer than to launch a graph of its forward; to see that none has changed takes
a tenth of that.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from operator import is_, itemgetter
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .. import backend
from .media import MOVED

Told = TypeVar("Told")

# a forward that collects hidden states leaves hooks, which no graph runs, and a mark that they are there
_NOT_LOOKED_AT = {*vars(nn.Module()), MOVED, "_output_capturing_hooks_installed"}
_HELD = itemgetter("_modules", "_parameters", "_buffers")
_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks")
_MOST_ITEMS = 64
_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))


class Look:
    """What a captured forward of a model takes in for good: addresses of weights, every plain value around them.

    Weights that change in place are none of it, a graph reads them anew. Adapters, their scales and whether they are
    merged or switched off are plain values, and so is the configuration, with the implementations it names. A look
    keeps neither the model nor a weight of it alive.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        modules = list(model.modules())
        self._model, self.model_id = weakref.ref(model), id(model)
        self._settings = _settings()
        self._modules = [_ModuleLook(module) for module in modules]
        self._tensors = [
            (weakref.ref(tensor), _plain(tensor))
            for module in modules
            for tensor in chain(module._parameters.values(), module._buffers.values())
            if tensor is not None
        ]
        self._configs = [(config, _plain(vars(config))) for config in _configs(modules)]
        self._told: dict[Callable, Any] = {}

    def holds(self) -> bool:
        """Whether the model is still so."""
        if self._settings != _settings():
            return False
        try:
            return (
                all([look.holds() for look in self._modules])
                and all([_plain(tensor()) == told for tensor, told in self._tensors])
                and all([_plain(vars(config)) == told for config, told in self._configs])
            )
        except KeyError:  # an attribute is gone
            return False

    def of(self, tell: Callable[[PreTrainedModel], Told]) -> Told:
        """`tell(model)`, which depends on nothing that may change while the look holds."""
        if tell not in self._told:
            self._told[tell] = tell(self._model())
        return self._told[tell]

    @cached_property
    def fingerprint(self) -> tuple:
        """Equal for looks at the same modules in the same state, whatever hooks there are: graphs run none."""
        modules = tuple(look.state for look in self._modules)
        tensors, configs = (tuple(told for _, told in told_of) for told_of in (self._tensors, self._configs))
        return self._settings, modules, tensors, configs


class _ModuleLook:
    """One module: its parts by identity, plain values by what they are."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        values = vars(module)
        own = {name: value for name, value in values.items() if name not in _NOT_LOOKED_AT}
        plain = [name for name, value in own.items() if isinstance(value, _PLAIN)]
        self._length = len(values)
        self._plain = itemgetter("training", "training", *plain)  # of two at least: of one it makes no tuple
        # by identity: functions that somebody may replace, and configurations, which a Look keeps
        parts = [name for name, value in own.items() if callable(value) or isinstance(value, PreTrainedConfig)]
        self._parts = itemgetter(*parts, parts[0]) if parts else None
        self._others = [name for name in own if name not in {*plain, *parts}]
        self._forward = type(module).forward
        self._hooks = _ids(_HOOKS(values))
        self.state = id(module), self._plain(values), self._identities(values), self._rest(values)

    def holds(self) -> bool:
        module = self._module()
        if module is None:
            return False
        values = module.__dict__
        _, plain, identities, rest = self.state
        return (
            len(values) == self._length
            and type(module).forward is self._forward
            and _are_same(self._plain(values), plain)
            and self._identities(values) == identities
            and _ids(_HOOKS(values)) == self._hooks
            and (not self._others or self._rest(values) == rest)
        )

    def _identities(self, values: dict) -> tuple:
        return _ids(_HELD(values)), self._parts and tuple(map(id, self._parts(values)))

    def _rest(self, values: dict) -> tuple:
        return tuple([_plain(values[name]) for name in self._others])


def _are_same(values: tuple, plain: tuple) -> bool:
    """Whether `values` are the `plain` ones; a tensor in the place of one is not compared, which may fail or wait."""
    if all(map(is_, values, plain)):
        return True
    return all([isinstance(value, _PLAIN) for value in values]) and values == plain


def _ids(dicts: tuple[dict, ...]) -> tuple[int, ...]:
    return tuple(map(id, chain.from_iterable(map(dict.values, dicts))))


_looks: "weakref.WeakKeyDictionary[PreTrainedModel, Look]" = weakref.WeakKeyDictionary()
_here = threading.local()  # `once`: looks by model's id, within `looking_once`


def look_at(model: PreTrainedModel) -> Look:
    """The same look as long as it holds."""
    once = getattr(_here, "once", None)
    look = None if once is None else once.get(id(model))
    if look is None:
        look = _looks.get(model)
        if look is None or not look.holds():
            look = _looks[model] = Look(model)
        if once is not None:
            once[id(model)] = look
    return look


@contextmanager
def looking_once(*seen: Look) -> Iterator[None]:
    """Within it, in this thread, models are taken to stay as they were when they were looked at first, or `seen`."""
    around = getattr(_here, "once", None)
    _here.once = {look.model_id: look for look in seen}
    try:
        yield
    finally:
        _here.once = around


def _settings() -> tuple:
    return (
        backend.backend(),
        backend.fuses_layers(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _configs(modules: list[nn.Module]) -> list[PreTrainedConfig]:
    found: dict[int, PreTrainedConfig] = {}

    def collect(values: dict) -> None:
        for value in values.values():
            if isinstance(value, PreTrainedConfig) and id(value) not in found:
                found[id(value)] = value
                collect(vars(value))

    for module in modules:
        collect(vars(module))
    return list(found.values())


def _plain(value):
    """A value that says whether `value` is still the same; None for what does not matter or can't be told."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.Tensor):
        return _address(value), value.dtype, tuple(value.shape)
    if isinstance(value, dict) and len(value) <= _MOST_ITEMS:
        return tuple([(str(key), _plain(item)) for key, item in value.items()])
    if isinstance(value, (list, tuple)) and len(value) <= _MOST_ITEMS:
        return tuple(map(_plain, value))
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(str, value)))
    if callable(value):
        return id(value)  # a forward that somebody has replaced
    return None


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # tensors that are made of others
        return id(tensor)
