"""What `PagedCache.update()` hands to a model: keys and values that lie in blocks, in the guise of dense tensors.

Our attention function recognises them and reads the blocks. Any other operation on them finds the dense tensor
(B, Hkv, L, D) that `DynamicCache` would have returned, gathered at that moment: correct, counted as `dense_gather` and
logged once an operation. The storage behind the guise is a single NaN, so that whatever slips past is loud.
"""

from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from .. import backend
from ..errors import UnsupportedFeatureError
from .forward_step import ForwardStep

if TYPE_CHECKING:
    from .paged_layer import PagedLayer

logger = logging.get_logger(__name__)

# Answered for the logical tensor, without touching K/V.
_METADATA = {
    torch.Tensor.shape.__get__,
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.ndim.__get__,
    torch.Tensor.ndimension,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.__len__,
    torch.Tensor.dtype.__get__,
    torch.Tensor.device.__get__,
    torch.Tensor.layout.__get__,
    torch.Tensor.is_cuda.__get__,
    torch.Tensor.is_cpu.__get__,
    torch.Tensor.is_meta.__get__,
    torch.Tensor.is_sparse.__get__,
    torch.Tensor.is_quantized.__get__,
    torch.Tensor.is_nested.__get__,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.requires_grad.__get__,
    torch.Tensor.grad_fn.__get__,
    torch.Tensor.is_leaf.__get__,
    torch.Tensor.element_size,
    torch.Tensor.get_device,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}  # fmt: skip
# Would write to the dense tensor and lose it; so would all methods that end in one underscore.
_WRITES = {f"__i{name}__" for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split()}
_WRITES |= {"__setitem__", "__set__"}
# Return the same handle: they change nothing that could be seen.
_IDENTITY = {torch.Tensor.contiguous, torch.Tensor.detach, torch.detach}


class _NoBackward(torch.autograd.Function):
    """Makes a backward pass that reaches gathered keys raise: what the cache stored has no graph."""

    @staticmethod
    def forward(ctx, dense: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return dense.view_as(dense)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        raise UnsupportedFeatureError(
            "gradients can't pass through a PagedCache: call the model with `use_cache=False` to train it, or with "
            "DynamicCache where gradients must reach earlier forwards"
        )


class PagedTensor(torch.Tensor):
    """A layer's keys or values (B, Hkv, L, D), stored in blocks.

    Attributes:
        layer: the `PagedLayer` that stores them.
        kind: "key" or "value".
        step: the forward that returned them; L is its `end`, or packed, B being 1, all tokens of all rows.
        fresh: the forward's own keys or values (B, Hkv, L, D) where nothing had been stored before, else None.
    """

    layer: "PagedLayer"
    kind: str
    step: ForwardStep
    fresh: torch.Tensor | None

    @staticmethod
    def wrap(
        layer: "PagedLayer",
        kind: str,
        step: ForwardStep,
        nan: torch.Tensor,
        size: tuple[int, ...],
        fresh: torch.Tensor | None,
    ) -> "PagedTensor":
        """A handle of logical shape `size` over the one-element tensor `nan`."""
        handle = nan.expand(size).as_subclass(PagedTensor)
        handle.layer, handle.kind, handle.step, handle.fresh = layer, kind, step, fresh
        return handle

    def dense(self, reason: str) -> torch.Tensor:
        """The dense tensor (B, Hkv, L, D); `reason` is counted and logged.

        Zeros in padded columns, and in those that a sliding window has left behind for good.
        """
        prepared = self.layer.groups.prepared
        if prepared is not None and prepared.is_static:
            raise UnsupportedFeatureError(f"`{reason}` needs dense keys and values, which a replay would not find")
        if self.step.is_packed:
            raise UnsupportedFeatureError(
                f"`{reason}` needs dense keys and values where the rows of a batch are packed (`generate()` does so "
                "with padded prompts), which paged_flash took the model not to do: pass "
                "`past_key_values=DynamicCache(config=model.config)`, and report it"
            )
        backend.count("dense_gather", reason)
        logger.warning_once(
            f"paged {self.kind}s were gathered into a dense tensor for `{reason}`: correct, but slower and larger "
            "than attention over the blocks. It happens where a model does more with its cache than attend to it, or "
            'runs another attn_implementation than "paged_flash".'
        )
        dense = self.layer.gather(self.kind, self.step, self.fresh)
        if self.layer.had_grad and torch.is_grad_enabled():
            dense = _NoBackward.apply(dense, torch.zeros((), requires_grad=True))
        return dense

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if func in _IDENTITY or (func is torch.Tensor.to and _to_changes_nothing(args, kwargs)):
            return args[0]
        if func is torch.Tensor.data_ptr:
            raise RuntimeError(
                "paged keys and values lie in blocks, they have no single `data_ptr`; use `.clone()` first"
            )
        if func is torch.Tensor.__repr__:
            self = args[0]
            return f"PagedTensor({self.kind}, size={tuple(self.size())}, dtype={self.dtype}, device='{self.device}')"
        writes = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
        target = args[0] if writes else kwargs.get("out")
        if isinstance(target, PagedTensor):
            raise UnsupportedFeatureError(
                f"`{name}` would write to paged {target.kind}s in place, which only the cache may: work on a "
                "`.clone()`, or use DynamicCache with this model"
            )
        gathered: dict[int, torch.Tensor] = {}

        def unwrap(value):
            if isinstance(value, PagedTensor):
                if id(value) not in gathered:
                    gathered[id(value)] = value.dense(name)
                return gathered[id(value)]
            if isinstance(value, (list, tuple)):
                unwrapped = [unwrap(item) for item in value]
                return type(value)(unwrapped) if type(value) in (list, tuple) else type(value)(*unwrapped)
            return value

        args = tuple(unwrap(arg) for arg in args)
        kwargs = {key: unwrap(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _to_changes_nothing(args: tuple, kwargs: dict) -> bool:
    handle, *targets = args
    targets += [value for key, value in kwargs.items() if key in ("dtype", "device", "other")]
    if kwargs.get("copy"):
        return False
    for target in targets:
        if isinstance(target, torch.Tensor):
            same = target.dtype == handle.dtype and target.device == handle.device
        elif isinstance(target, torch.dtype):
            same = target == handle.dtype
        elif isinstance(target, (str, int, torch.device)) and not isinstance(target, bool):
            same = torch.device(target) in (handle.device, torch.device(handle.device.type))
        else:
            same = target is None or isinstance(target, bool)
        if not same:
            return False
    return True
