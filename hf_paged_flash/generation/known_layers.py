"""Layers whose code is, word for word, one that is known, and what runs in its place: one operator for all of it.

It rounds every product as their own code does; sums may differ in their last bits, the root of a norm's, and the
exponential of a gate.
"""

import ast
import inspect
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..ops import layers
from .looking import has_global_hooks, runs_its_class, stand_in

_ROTARY = "apply_rotary_pos_emb"
_here = threading.local()  # `own`: within `own_layers`, `captured`: within `captured_layers`


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


class _Gemma4Norm:
    def _norm(self, hidden_states):
        mean_squared = hidden_states.pow(2).mean(-1, keepdim=True) + self.eps
        return hidden_states * torch.pow(mean_squared, -0.5)

    def forward(self, hidden_states):
        normed_output = self._norm(hidden_states.float())
        if self.with_scale:
            normed_output = normed_output * self.weight.float()
        return normed_output.type_as(hidden_states)


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


def _gpt_oss_rotary(q, k, cos, sin, unsqueeze_dim=1):
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    q_embed = _apply_rotary_emb(q, cos, sin)
    k_embed = _apply_rotary_emb(k, cos, sin)
    return q_embed, k_embed


def _rotate_half(x):
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def _apply_rotary_emb(x, cos, sin):
    first_half, second_half = torch.chunk(x, 2, dim=-1)
    first_ = first_half * cos - second_half * sin
    second_ = second_half * cos + first_half * sin
    return torch.cat((first_, second_), dim=-1)


class _GatedMlp:
    def forward(self, x):
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj


class _Silu:
    def forward(self, input):
        return nn.functional.silu(input)


class _TorchSilu:
    def forward(self, input):
        return F.silu(input, inplace=self.inplace)


class _Linear:
    def forward(self, input):
        return F.linear(input, self.weight, self.bias)


class _Norm(NamedTuple):
    """What `rms_norm` gets for a class of modules."""

    epsilon: str  # the attribute
    casting_mode: str
    offset: float = 0.0


def own_layers() -> AbstractContextManager:
    """Within it these layers run their own code in this thread, whatever `fused_layers` there are, but linear ones."""
    return _within("own")


def captured_layers() -> AbstractContextManager:
    """Within it linear layers run as their operator, too, in this thread: its launch takes longer than torch's own.

    For forwards that are captured, and for those that warm up for that.
    """
    return _within("captured")


@contextmanager
def _within(name: str) -> Iterator[None]:
    before = getattr(_here, name, False)
    setattr(_here, name, True)
    try:
        yield
    finally:
        setattr(_here, name, before)


def forward_of(module_class: type) -> Callable | None:
    """What modules of a class run in the place of its forward as it is now; None where that is not known.

    Where gradients are asked for, which operators do not have, and for tensors that they do not take, that is their
    own code.
    """
    forward = module_class.forward
    norm = _norms().get(_code_of_norm(module_class))
    if norm is not None:
        return _norm_forward(forward, norm)
    if _code_of(forward) == _code_of(_Linear.forward):
        # libraries put in a function of their own; a parametrized weight is a property of its class
        is_torchs = forward.__globals__.get("F") is F and F.linear is torch._C._nn.linear
        return _linear_forward(forward) if is_torchs and not hasattr(module_class, "weight") else None
    if _code_of(forward) == _code_of(_GatedMlp.forward):
        return _gated_forward(forward)
    innermost = inspect.unwrap(forward)  # transformers' decorators rename arguments
    if not isinstance(innermost, FunctionType) or _ROTARY not in innermost.__code__.co_names:
        return None
    original = innermost.__globals__.get(_ROTARY)
    known = _rotaries().get(_code_of(original))
    if known is None:
        return None
    helper, helpers_code, has_half_angles = known
    if _code_of(original.__globals__.get(helper)) != helpers_code:
        return None
    copy = _with_globals(forward, {_ROTARY: _rotary_of(original, has_half_angles)})
    return None if copy is None else _attention_forward(forward).over(copy)


@cache
def _norms() -> dict[tuple, _Norm]:
    return {
        _code_of_norm(_LlamaNorm): _Norm("variance_epsilon", "llama"),
        _code_of_norm(_OlmoNorm): _Norm("variance_epsilon", "gemma"),
        _code_of_norm(_GemmaNorm): _Norm("eps", "gemma", 1.0),
        _code_of_norm(_Gemma4Norm): _Norm("eps", "gemma"),
    }


@cache
def _silus() -> set[str | None]:
    return {_code_of(_Silu.forward), _code_of(_TorchSilu.forward)}


@cache
def _rotaries() -> dict[str | None, tuple[str, str | None, bool]]:
    """By code: the function that it calls, that one's code, and whether angles are those of half a head."""
    halves = ("rotate_half", _code_of(_rotate_half), False)
    whole = dict.fromkeys(map(_code_of, (_rotary, _partial_rotary, _phi_rotary)), halves)
    return whole | {_code_of(_gpt_oss_rotary): ("_apply_rotary_emb", _code_of(_apply_rotary_emb), True)}


@cache
def _norm_forward(original: Callable, norm: _Norm) -> Callable:
    @stand_in
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return original(self, x)
        weight = getattr(self, "weight", x)  # some Gemma 4 norms have none
        is_known = _are_fused(x, weight) and weight.shape == x.shape[-1:] and weight.is_contiguous()
        if not is_known or len(weight) > layers.WIDEST or (norm.casting_mode == "llama" and weight.dtype != x.dtype):
            return original(self, x)
        epsilon = getattr(self, norm.epsilon)
        return layers.rms_norm(x, weight, epsilon, offset=norm.offset, casting_mode=norm.casting_mode)

    return forward


@cache
def _gated_forward(original: Callable) -> Callable:
    @stand_in
    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or not _is_silu(self.act_fn):
            return original(self, x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        is_known = _are_fused(gate, up) and gate.shape == up.shape and gate.dtype == up.dtype
        return self.down_proj(layers.swiglu(gate, up) if is_known else self.act_fn(gate) * up)

    return forward


def _is_silu(activation: Any) -> bool:
    """Whether it is that and no more: it is not called where its operator runs."""
    is_torchs = getattr(F.silu, "__globals__", None) is vars(F)  # libraries put in functions of their own
    code = _code_of(getattr(type(activation), "forward", None))
    if not is_torchs or code not in _silus() or not runs_its_class(activation):
        return False
    return not (activation._forward_hooks or activation._forward_pre_hooks or has_global_hooks())


@cache
def _linear_forward(original: Callable) -> Callable:
    @stand_in
    def forward(self: nn.Module, input: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or not getattr(_here, "captured", False):
            return original(self, input)
        has_few_rows = 0 < input.numel() <= layers.MOST_ROWS * input.shape[-1]
        if not has_few_rows or not _are_multiplied(input, self.weight, self.bias):
            return original(self, input)
        return layers.linear(input, self.weight, self.bias)

    return forward


class _AttentionForward:
    """The stand-in for an attention's forward `own`, always the same function; code that is compiled calls `own`."""

    def __init__(self, own: Callable) -> None:
        self._copy = own

        @stand_in
        def forward(module: nn.Module, *args, **kwargs):
            if torch.compiler.is_compiling():
                return own(module, *args, **kwargs)
            return self._copy(module, *args, **kwargs)

        self._forward = forward

    def over(self, copy: Callable) -> Callable:
        """The stand-in, which runs `copy` from now on."""
        self._copy = copy
        return self._forward


_attention_forward = cache(_AttentionForward)


def _rotary_of(original: Callable, has_half_angles: bool) -> Callable:
    def fused(q, k, cos, sin, unsqueeze_dim=1):
        if unsqueeze_dim != 1 or not _are_turned(q, k, cos, sin, has_half_angles):
            return original(q, k, cos, sin, unsqueeze_dim)
        if has_half_angles:
            cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        return layers.rotary(q, k, cos, sin)

    return fused


def _with_globals(function: Callable, names: dict[str, Any]) -> FunctionType | None:
    """A copy of `function`, or of the one that it wraps, that finds `names` among its globals.

    None where a wrapper does not hold what it wraps in its closure.
    """
    if not isinstance(function, FunctionType):
        return None
    globals_, closure, wrapped = function.__globals__ | names, function.__closure__, vars(function).get("__wrapped__")
    if wrapped is not None:
        held = [cell for cell in closure or () if _contents(cell) is wrapped]
        inner = _with_globals(wrapped, names)
        if len(held) != 1 or inner is None:
            return None
        globals_ = function.__globals__
        closure = tuple(CellType(inner) if cell is held[0] else cell for cell in closure)
    copy = FunctionType(function.__code__, globals_, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _are_turned(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, has_half_angles: bool
) -> bool:
    if not _are_fused(q, k, cos, sin) or not q.dim() == k.dim() == cos.dim() + 1 == 4 or cos.shape != sin.shape:
        return False
    width, head_dim = cos.shape[-1] * (1 + has_half_angles), q.shape[-1]
    return (
        q.dtype == k.dtype == cos.dtype == sin.dtype
        and q.shape[::2] == k.shape[::2]
        and k.shape[-1] == head_dim
        and (width == head_dim if has_half_angles else width <= head_dim)
        and width % 2 == 0
        and cos.shape[0] in (1, q.shape[0])
        and cos.shape[1] == q.shape[2]
    )


def _are_multiplied(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        _are_known(*tensors)
        and x.dtype.itemsize == 2
        and all(tensor.dtype == x.dtype and tensor.layout is torch.strided for tensor in tensors)
        and type(weight) is nn.Parameter  # nothing that a forward computes: its kernel is read early
        and weight.dim() == 2
        and weight.shape[1] == x.shape[-1]
        and weight.numel() >= layers.LEAST_WEIGHTS
        and weight.stride(1) == 1
        and weight.stride(0) % 16 == weight.data_ptr() % 16 == 0  # what Triton reads 16 bytes at a time
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and not torch.is_autocast_enabled(x.device.type)
    )


def _are_fused(*tensors: torch.Tensor) -> bool:
    return not getattr(_here, "own", False) and _are_known(*tensors)


def _are_known(*tensors: torch.Tensor) -> bool:
    if torch.is_grad_enabled():
        return False
    return all(
        type(x) in (torch.Tensor, nn.Parameter) and x.dtype in layers.DTYPES and x.device == tensors[0].device
        for x in tensors
    )


def _code_of_norm(module_class: type) -> tuple[str | None, ...]:
    return tuple(_code_of(getattr(module_class, name, None)) for name in ("_norm", "forward"))


@cache
def _code_of(function: Any) -> str | None:
    """What a function does, word for word; None for what is no function with code to be read, or wraps one."""
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return None
    try:
        return _words_of(inspect.getsource(function))
    except (OSError, SyntaxError, TypeError):  # typed in at a prompt, or of a file that has changed
        return None


def _words_of(source: str) -> str | None:
    """A function without its name, and what says nothing of what it does: annotations, decorators and docstring."""
    function = next(iter(ast.parse(textwrap.dedent(source)).body), None)
    if not isinstance(function, ast.FunctionDef):  # a lambda's source is all of its statement
        return None
    function.name, function.returns, function.decorator_list = "_", None, []
    for argument in function.args.args:
        argument.annotation = None
    if ast.get_docstring(function) is not None:
        del function.body[0]
    return ast.unparse(function)
