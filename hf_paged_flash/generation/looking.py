"""A model as it was when somebody looked, and whether it still is: so long a captured forward of it holds.

To read a large model's modules takes longer than to launch a graph of its forward; to see that none has changed takes
a tenth of that, as it is to be seen in every call. Even so it takes as long as a good part of a short prompt: there
what could harm a graph is looked at before its launch, and all of it while it runs (`glance_at`, `confirm`).
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, islice, repeat
from operator import attrgetter, is_, itemgetter, methodcaller
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .. import backend
from .media import MOVED

Told = TypeVar("Told")

# a forward that collects hidden states leaves hooks, which no graph runs, and a mark that they are there
_OF_MODULES = tuple(vars(nn.Module()))
_NOT_LOOKED_AT = {*_OF_MODULES, MOVED, "_output_capturing_hooks_installed"}
_DICTS = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
_DICTS_OF, _HELD, _HOOKS = itemgetter(*_DICTS), itemgetter(*_DICTS[:3]), itemgetter(*_DICTS[3:])
_TRAINING = methodcaller("get", "training")
_MOST_ITEMS = 256  # layers have fewer, labels have more
_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))


class Look:
    """What a captured forward of a model takes in for good: addresses of weights, every plain value around them.

    Weights that change in place are none of it, a graph reads them anew. Adapters, their scales and whether they are
    merged or switched off are plain values, and so is the configuration, with the implementations it names. A look
    keeps neither the model nor a weight of it alive.

    Attributes:
        tensors: weights and buffers.
        places: theirs, see `places_of`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        modules = [module for module in model.modules() if _is_read(module)]
        self._model, self.model_id = weakref.ref(model), id(model)
        self._settings = _settings()
        self._looks = [_ModuleLook(module) for module in modules]
        self._forwards = {type(module): type(module).forward for module in modules}
        # what is compared by identity is all compared at once: a call for each of some 400 modules takes much longer
        self._modules, self._skipped = [weakref.ref(module) for module in modules], list(map(_not_own, modules))
        self._identities = _identities(modules, self._skipped)
        self._others = [look for look in self._looks if look.has_more]
        tensors = [*model.parameters(), *model.buffers()]
        self.tensors, self.places = list(map(weakref.ref, tensors)), places_of(tensors)
        self._parts = list({id(part): part for look in self._looks for part in look.parts}.values())
        self._configs = [(config, _attributes(config)) for config in _configs(modules)]
        self._hooks = [id(hook) for module in modules for hooks in _HOOKS(vars(module)) for hook in hooks.values()]
        self._told: dict[Callable, Any] = {}

    def holds(self) -> bool:
        """Whether nothing was replaced since, not even by its equal: then a new look has the same fingerprint."""
        return self.is_there() and self.is_unchanged()

    def is_there(self) -> bool:
        """Whether all that it saw exists and lies where it lay: what was captured then finds what it reads."""
        referred = self._modules, self.tensors, self._parts
        modules, tensors, parts = ([reference() for reference in references] for references in referred)
        return (
            self._settings == _settings()
            # otherwise another may lie where one lay
            and not any(map(is_, chain(modules, tensors, parts), repeat(None)))
            and places_of(tensors) == self.places
            and all([look.holds() for look in self._others])
        )

    def is_unchanged(self) -> bool:
        """Whether the model, which `is_there`, is still made of that and has the same plain values."""
        modules = [reference() for reference in self._modules]
        return (
            None not in modules
            and _identities(modules, self._skipped) == self._identities
            and all([of.forward is forward for of, forward in self._forwards.items()])
            and all([_attributes(config) == told for config, told in self._configs])
        )

    def is_like(self, other: "Look") -> bool:
        """Whether forwards compute the same by both: what stands in for a forward for a while is no difference."""
        return self.fingerprint == other.fingerprint and self._hooks == other._hooks

    def of(self, tell: Callable[[PreTrainedModel], Told]) -> Told:
        """`tell(model)`, which depends on nothing that may change while the look holds."""
        if tell not in self._told:
            self._told[tell] = tell(self._model())
        return self._told[tell]

    @cached_property
    def fingerprint(self) -> tuple:
        """Equal for looks at the same modules in the same state, whatever hooks there are: graphs run none."""
        modules = tuple(look.state for look in self._looks)
        return self._settings, modules, self.places, tuple(told for _, told in self._configs)


class ModuleState(NamedTuple):
    """What is compared of a module; `held` are ids of its parts and weights, `own` its other attributes."""

    module: int
    type: type
    forward: Callable
    training: bool
    held: tuple
    own: tuple


class _ModuleLook:
    """One module: its parts by identity, plain values by what they are.

    Attributes:
        state: all of it.
        parts: what else it refers to by identity: functions, mostly.
        has_more: whether there is more than `_identities` sees.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._names = names_of(module)
        self.state = self._read(vars(module))
        self.parts = [part for _, part in self.state.own if isinstance(part, weakref.ref)]
        plain_or_part = (*_PLAIN, PreTrainedConfig)
        self.has_more = MOVED in vars(module) or not all(
            isinstance(vars(module)[name], plain_or_part) or callable(vars(module)[name]) for name in self._names
        )

    def holds(self) -> bool:
        module = self._module()
        if module is None:
            return False
        return names_of(module) == self._names and self._read(vars(module)) == self.state

    def _read(self, values: dict) -> ModuleState:
        module, own = self._module(), tuple([(name, _part(values[name])) for name in self._names])
        held = tuple([(name, id(value)) for items in _HELD(values) for name, value in items.items()])
        return ModuleState(id(module), type(module), type(module).forward, values.get("training"), held, own)


def names_of(module: nn.Module) -> list[str]:
    """Attributes of `module` that a look compares, beside what all modules have."""
    names = [name for name in tuple(vars(module)) if name not in _NOT_LOOKED_AT]
    return [name for name in names if name != "forward"] if runs_its_class(module) else names


def stand_in(forward: Callable) -> Callable:
    """Marks what modules run for a while in the place of their class' forward, and with its results."""
    forward.stands_in = True
    return forward


def runs_its_class(module: nn.Module) -> bool:
    """Whether `module` runs its class' forward, or what stands in for it."""
    forward = vars(module).get("forward")
    if forward is None or getattr(forward, "stands_in", None) is True:
        return True
    return getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module


def has_global_hooks() -> bool:
    """Whether there are hooks on the forwards of all modules."""
    of_all = nn.modules.module
    return bool(of_all._global_forward_hooks or of_all._global_forward_pre_hooks)


def _is_read(module: nn.Module) -> bool:
    """Whether it is made of what modules are made of; those of torch.jit are not."""
    values = vars(module)
    return all([isinstance(values.get(name), dict) for name in _DICTS])


def _attributes(config: PreTrainedConfig) -> tuple:
    return tuple([(name, _plain(value)) for name, value in vars(config).items()])


def _part(value):
    if isinstance(value, PreTrainedConfig):
        return id(value)  # a Look keeps them
    return _reference(value) if callable(value) else _plain(value)


def _reference(value):
    """What is equal for the same `value` alone, and does not keep it."""
    try:
        return weakref.ref(value)
    except TypeError:
        return value


def _not_own(module: nn.Module) -> int:
    """How many attributes of `module` come before its own; all of them where these change in forwards."""
    if MOVED in vars(module):
        return len(vars(module))
    return len(_OF_MODULES) if tuple(vars(module))[: len(_OF_MODULES)] == _OF_MODULES else 0


def _identities(modules: list[nn.Module], skipped: list[int]) -> tuple:
    """What modules are made of, by identity and by name. As long as a `_ModuleLook` keeps their plain values."""
    values = list(map(vars, modules))
    dicts = list(chain.from_iterable(map(_DICTS_OF, values)))
    filled = list(filter(None, dicts))
    own = [chain.from_iterable(map(islice, of, skipped, repeat(None))) for of in (values, map(dict.values, values))]
    names = list(chain(own[0], chain.from_iterable(filled)))
    ids = list(map(id, chain(own[1], chain.from_iterable(map(dict.values, filled)))))
    return list(map(type, modules)), list(map(len, chain(values, dicts))), names, list(map(_TRAINING, values)), ids


def places_of(tensors: list[torch.Tensor]) -> tuple:
    """Where tensors lie, and what they are."""
    try:
        addresses = tuple(map(torch.Tensor.data_ptr, tensors))
    except RuntimeError:  # there are tensors that are made of others
        addresses = tuple(map(_address, tensors))
    return addresses, tuple(map(attrgetter("dtype", "shape"), tensors))


class ModelChanged(Exception):
    """A model is not what it was taken for at a glance: what was begun must begin anew."""


_looks: "weakref.WeakKeyDictionary[PreTrainedModel, Look]" = weakref.WeakKeyDictionary()
# `once`: looks by model's id, within `looking_once`; `unconfirmed`: those of them that `confirm` has yet to see
_here = threading.local()


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


def glance_at(model: PreTrainedModel) -> Look:
    """The last look if all is there that it saw, for whoever can begin anew if it does not hold; else a new one."""
    look = _looks.get(model)
    if look is None or not look.is_there():
        look = _looks[model] = Look(model)
    return look


@contextmanager
def looking_once(*seen: Look, confirmed: bool = True) -> Iterator[None]:
    """Within it, in this thread, models are taken to stay as they were when they were looked at first, or `seen`.

    Those `seen` at a glance are not `confirmed`; whoever relies on them calls `confirm`.
    """
    around = getattr(_here, "once", None), getattr(_here, "unconfirmed", None)
    _here.once = {look.model_id: look for look in seen}
    _here.unconfirmed = {} if confirmed else dict(_here.once)
    try:
        yield
    finally:
        _here.once, _here.unconfirmed = around


def confirm(model: PreTrainedModel) -> None:
    """Raises ModelChanged unless `model` is what `looking_once` has taken it for; it asks once."""
    look = (getattr(_here, "unconfirmed", None) or {}).pop(id(model), None)
    if look is None or look.holds():
        return
    now = _looks[model] = Look(model)
    if not now.is_like(look):
        raise ModelChanged


def _settings() -> tuple:
    matmul = torch.backends.cuda.matmul
    return (
        backend.backend(),
        backend.fuses_layers(),
        matmul.fp32_precision,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_fp16_accumulation,
        torch.are_deterministic_algorithms_enabled(),
    )


def _configs(modules: list[nn.Module]) -> list[PreTrainedConfig]:
    found: dict[int, PreTrainedConfig] = {}

    def collect(values: dict) -> None:
        for value in tuple(values.values()):
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
        return _reference(value)  # a forward that somebody has replaced
    return None


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # tensors that are made of others
        return id(tensor)
