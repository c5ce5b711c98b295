"""Which models' forwards can be captured as a graph."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from .looking import has_global_hooks, look_at

_aten = torch.ops.aten
# the host needs what they compute
_WAITING = {
    _aten._local_scalar_dense.default,
    _aten.bincount.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
    _aten.item.default,
    _aten.masked_select.default,
    _aten.nonzero.default,
    _aten.repeat_interleave.Tensor,
    _aten._unique2.default,
}
_WRITES = {_aten.index_put.default, _aten.index_put_.default}
_INERT_HOOKS = ("transformers.utils.output_capturing",)  # they collect what nobody has asked for
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


class NotCapturable(Exception):
    """Says why a forward can't be captured, to follow "because"."""


def obstacle(model: PreTrainedModel, generation_config) -> str | None:
    """Why the forwards of `model` can't be captured, to follow "because"; None where nothing is known to hinder it."""
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if model.training:
        return "it is in training mode: call `model.eval()`"
    if torch.is_grad_enabled():
        return "gradients are asked for"
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(generation_config, name) or getattr(model.config, name, False):
            return f"`{name}` is asked for"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast keeps copies of the weights that do not outlive it: load the model in the dtype to run in"
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not getattr(quantizer, "is_compileable", False):
        return f"{type(quantizer).__name__} can't be compiled, nor captured"
    if has_global_hooks():
        return "there are hooks on the forwards of all modules"
    return look_at(model).of(_obstacle_in)


def _obstacle_in(model: PreTrainedModel) -> str | None:
    devices, hooked = set(), None
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                devices.add(parameter.device)
                if hasattr(parameter, "device_mesh"):
                    return "its weights are spread over several processes"
        hooked = hooked or _hook_on(name or type(module).__name__, module)
    return f"its weights are on {len(devices)} devices" if len(devices) > 1 else hooked


def _hook_on(name: str, module: nn.Module) -> str | None:
    if hasattr(module, "_hf_hook"):
        return f"accelerate runs the forward of `{name}`, to move tensors between devices"
    if not (module._forward_pre_hooks or module._forward_hooks):
        return None
    for kind in _HOOKS:
        if any(hook.__module__ not in _INERT_HOOKS for hook in getattr(module, kind).values()):
            return f"`{name}` has a forward hook, which a graph would not run"
    return None


class NoWaiting(TorchDispatchMode):
    """Within it what waits for the device raises: a capture would fail there, and leave torch in disorder."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        waits = func in _WAITING
        if func is _aten.index.Tensor:
            waits = _are_masks(args[1])
        elif func in _WRITES:
            waits = args[2].numel() > 1 and _are_masks(args[1])  # a single value is filled in
        elif func is _aten.copy_.default:
            waits = _moves(args[0].device, args[1].device)
        elif func is _aten._to_copy.default:
            waits = _moves(args[0].device, kwargs.get("device") or args[0].device)
        if waits:
            raise RuntimeError(f"`{func}` waits for the device")
        return func(*args, **kwargs)


def _are_masks(indices: list[torch.Tensor | None]) -> bool:
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)


def _moves(source: torch.device, target: torch.device) -> bool:
    return (source.type == "cpu") != (target.type == "cpu")
