"""Norms and rotary embeddings as one kernel each, in forwards that are captured.

A model writes them out operator by operator, some 25 a layer, each of which takes longer to start than to run: a fifth
of a decode step of an 8B model. Where a class' code is, word for word, one that is known, its modules run the operator
that stands for it while a forward is captured, and their own code otherwise. Every product is rounded as theirs; only
the order in which a norm sums differs.
"""

import ast
import inspect
import textwrap
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import backend
from ..ops import layers
from .looking import look_at

_ROTARY, _ROTATE_HALF = "apply_rotary_pos_emb", "rotate_half"


class _LlamaNorm:
    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class _OlmoNorm:
    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return (self.weight * hidden_states).to(input_dtype)


class _GemmaNorm:
    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        output = self._norm(x.float())
        output = output * (1.0 + self.weight.float())
        return output.type_as(x)


def _rotary(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = (q * cos) + (rotate_half(q) * sin)  # noqa: F821
    k_embed = (k * cos) + (rotate_half(k) * sin)  # noqa: F821
    return q_embed, k_embed


def _partial_rotary(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    rotary_dim = cos.shape[-1]
    q_rot, q_pass = q[..., :rotary_dim], q[..., rotary_dim:]
    k_rot, k_pass = k[..., :rotary_dim], k[..., rotary_dim:]
    q_embed = (q_rot * cos) + (rotate_half(q_rot) * sin)  # noqa: F821
    k_embed = (k_rot * cos) + (rotate_half(k_rot) * sin)  # noqa: F821
    q_embed = torch.cat([q_embed, q_pass], dim=-1)
    k_embed = torch.cat([k_embed, k_pass], dim=-1)
    return q_embed, k_embed


def _phi_rotary(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    rotary_dim = cos.shape[-1]
    q_rot, q_pass = q[..., :rotary_dim], q[..., rotary_dim:]
    k_rot, k_pass = k[..., :rotary_dim], k[..., rotary_dim:]
    q_embed = torch.cat([(q_rot * cos) + (rotate_half(q_rot) * sin), q_pass], dim=-1)  # noqa: F821
    k_embed = torch.cat([(k_rot * cos) + (rotate_half(k_rot) * sin), k_pass], dim=-1)  # noqa: F821
    return q_embed, k_embed


def _rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


class _Norm(NamedTuple):
    """What `rms_norm` gets for a class of modules."""

    epsilon: str  # the attribute
    casting_mode: str
    offset: float = 0.0


@contextmanager
def fused_layers(model: PreTrainedModel) -> Iterator[None]:
    """Within it modules of `model` that are known run as one operator each, unless `configure` has switched that off.

    They go on running their own code where gradients are asked for, which these operators do not have.
    """
    changed = []
    try:
        for reference, forward in look_at(model).of(_forwards) if backend.fuses_layers() else ():
            module = reference()
            vars(module)["forward"] = MethodType(forward, module)
            changed.append(module)
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]


def _forwards(model: PreTrainedModel) -> list[tuple[weakref.ref, Callable]]:
    """The modules that are known, and what they run."""
    found = ((module, _forward_of(type(module))) for module in model.modules() if "forward" not in vars(module))
    return [(weakref.ref(module), forward) for module, forward in found if forward is not None]


@cache
def _forward_of(module_class: type) -> Callable | None:
    norms = {
        _code_of(_LlamaNorm): _Norm("variance_epsilon", "llama"),
        _code_of(_OlmoNorm): _Norm("variance_epsilon", "gemma"),
        _code_of(_GemmaNorm): _Norm("eps", "gemma", 1.0),
    }
    norm = norms.get(_code_of(module_class))
    return _with_rotary(module_class) if norm is None else _norm_forward(module_class, norm)


def _norm_forward(module_class: type, norm: _Norm) -> Callable:
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        is_known = _are_known(x, weight) and weight.shape == x.shape[-1:] and len(weight) <= layers.WIDEST
        if not is_known or (norm.casting_mode == "llama" and weight.dtype != x.dtype):
            return module_class.forward(self, x)
        epsilon = getattr(self, norm.epsilon)
        return layers.rms_norm(x, weight, epsilon, offset=norm.offset, casting_mode=norm.casting_mode)

    return forward


def _with_rotary(module_class: type) -> Callable | None:
    """The forward of a class that calls `apply_rotary_pos_emb`, as it is but for that."""
    forward = module_class.forward
    if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
        return None
    original = forward.__globals__.get(_ROTARY)
    rotate_half = getattr(original, "__globals__", {}).get(_ROTATE_HALF)
    known = {_code_of(function) for function in (_rotary, _partial_rotary, _phi_rotary)}
    if _code_of(original) not in known or _code_of(rotate_half) != _code_of(_rotate_half):
        return None

    def fused(q, k, cos, sin, unsqueeze_dim=1):
        shapes = q.dim() == k.dim() == 4 and cos.dim() == 3 and cos.shape == sin.shape
        if not shapes or unsqueeze_dim != 1 or not _are_turned(q, k, cos, sin):
            return original(q, k, cos, sin, unsqueeze_dim)
        return layers.rotary(q, k, cos, sin)

    names = forward.__globals__ | {_ROTARY: fused}
    copy = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _are_turned(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    return (
        _are_known(q, k, cos, sin)
        and q.dtype == k.dtype == cos.dtype == sin.dtype
        and q.shape[::2] == k.shape[::2]
        and q.shape[-1] == k.shape[-1] >= cos.shape[-1]
        and cos.shape[-1] % 2 == 0
        and cos.shape[0] in (1, q.shape[0])
        and cos.shape[1] == q.shape[2]
    )


def _are_known(*tensors: torch.Tensor) -> bool:
    return not torch.is_grad_enabled() and all(
        type(x) in (torch.Tensor, nn.Parameter) and x.dtype in layers.DTYPES and x.device == tensors[0].device
        for x in tensors
    )


@cache
def _code_of(what: Any) -> str | None:
    """What a function, or a norm's class, does, word for word; None for what has no code of its own."""
    functions = [what]
    if isinstance(what, type):
        functions = [getattr(what, name) for name in ("_norm", "forward") if hasattr(what, name)]
    if not functions or not all(isinstance(function, FunctionType) for function in functions):
        return None
    try:
        return "\n".join(_words_of(inspect.getsource(function)) for function in functions)
    except (OSError, SyntaxError, TypeError):  # typed in at a prompt
        return None


def _words_of(source: str) -> str:
    """A function without its name, and what says nothing of what it does: annotations, decorators and docstring."""
    function = ast.parse(textwrap.dedent(source)).body[0]
    function.name, function.returns, function.decorator_list = "_", None, []
    for argument in function.args.args:
        argument.annotation = None
    if ast.get_docstring(function) is not None:
        del function.body[0]
    return ast.unparse(function)
