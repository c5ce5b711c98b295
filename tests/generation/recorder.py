"""A stand-in for CUDA graphs on the CPU: it records the operators of a forward, and a replay runs these and no Python.

As of a graph, nothing else comes of a replay: what the Python code around the operators would have done by then, with
lengths, tables or masks, is missing. Inputs are read, and results written, where they lay during the capture.
"""

import ctypes
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers.utils import ModelOutput

from hf_paged_flash.generation.compiled_forward import CompiledForward

_aten = torch.ops.aten
# they would make the host wait, which CUDA refuses while it captures
_WAITING = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
    _aten.item.default,
    _aten.masked_select.default,
    _aten.nonzero.default,
    _aten._unique2.default,
}
_POOLED = {"store_kv": ("k_cache", "v_cache"), "paged_decode": ("k_cache", "v_cache"), "flash_forward": ("k", "v")}


class Recorder(TorchDispatchMode):
    """Records operators while it is entered.

    Args:
        elastic: pools are known by their addresses alone, up to the end of what is reserved for them, as to kernels.
    """

    def __init__(self, elastic: bool) -> None:
        super().__init__()
        self._elastic = elastic
        self._calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _WAITING or (func is _aten.index.Tensor and any(_is_mask(x) for x in args[1])):
            raise RuntimeError(f"{func} waits for the device while a graph is captured")
        # `.detach()`: whoever gives a tensor other storage from now on is not followed
        inputs = tree_map_only(torch.Tensor, _alias, (args, kwargs or {}))
        if self._elastic and func.namespace == "hf_paged_flash":
            inputs = _by_address(func, *inputs)
        results = func(*args, **kwargs or {})
        if any(isinstance(x, FakeTensor) for x in tree_flatten((inputs, results))[0]):
            return results  # shapes that somebody traces
        outputs = [x for x in tree_flatten(results)[0] if isinstance(x, torch.Tensor)]
        self._calls.append((func, *inputs, [_alias(x) for x in outputs]))
        return results

    def poison(self) -> None:
        """Overwrites what the forward computed: a capture computes nothing."""
        for func, _, _, outputs in self._calls:
            for output in outputs:
                if output.is_floating_point() and not _is_view(func):
                    output.fill_(float("nan"))

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outputs in self._calls:
            results = func(*args, **kwargs)
            results = [x for x in tree_flatten(results)[0] if isinstance(x, torch.Tensor)]
            for result, output in zip(results, outputs, strict=True):
                if result.data_ptr() != output.data_ptr():
                    output.copy_(result)


def _alias(x: torch.Tensor) -> torch.Tensor:
    with torch._C._DisableTorchDispatch():
        return x.detach()


def _is_mask(x) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)


def _is_view(func) -> bool:
    return any(result.alias_info is not None for result in func._schema.returns)


def _by_address(func, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    pooled = _POOLED.get(func._schema.name.partition("::")[2], ())
    names = [argument.name for argument in func._schema.arguments]
    args = tuple(_raw(x) if name in pooled else x for name, x in zip(names, args, strict=False))
    return args, {name: _raw(x) if name in pooled else x for name, x in kwargs.items()}


def _raw(pool: torch.Tensor) -> torch.Tensor:
    """The blocks of a pool by their address, those too that it has no memory for yet."""
    storage = pool.untyped_storage()
    nbytes = storage.nbytes() - pool.storage_offset() * pool.element_size()
    buffer = (ctypes.c_byte * nbytes).from_address(pool.data_ptr())
    elements = torch.frombuffer(buffer, dtype=pool.dtype)
    blocks = (len(elements) - pool[0].numel()) // pool.stride(0) + 1
    return elements.as_strided((blocks, *pool.shape[1:]), pool.stride())


class Recorders:
    """In the place of `CudaGraphs`.

    Attributes:
        captured, replayed: how often, over all that were made.
        elastic: as in `Recorder`.
        failing: what a capture raises, or None.
    """

    captured = replayed = 0
    elastic = False
    failing: Exception | None = None

    def __init__(self, device: torch.device) -> None:
        pass

    def capture(self, run: Callable[[], ModelOutput]) -> tuple[ModelOutput, Callable[[], None]]:
        if Recorders.failing is not None:
            raise Recorders.failing
        Recorders.captured += 1
        if isinstance(run, partial) and isinstance(run.func.__self__, CompiledForward):
            return self._compiled(run)
        recorder = Recorder(Recorders.elastic)
        outputs = self._recorded(recorder, run)
        return outputs, lambda: self._replay(recorder)

    def rehearse(self, run: Callable):
        return self._recorded(Recorder(Recorders.elastic), run)

    def _recorded(self, recorder: Recorder, run: Callable):
        # transformers asks, and leaves out checks that would wait
        with recorder, mock.patch("torch.cuda.is_current_stream_capturing", return_value=True):
            outputs = run()
        recorder.poison()
        return outputs

    def _compiled(self, run: partial) -> tuple[ModelOutput, Callable[[], None]]:
        """Compiled code calls few operators, and no Python of the model's: a replay is one more run."""
        outputs = run()
        logits = outputs.logits = torch.full_like(outputs.logits, float("nan"))

        @torch.no_grad()
        def replay() -> None:
            Recorders.replayed += 1
            logits.copy_(run().logits)

        return outputs, replay

    def _replay(self, recorder: Recorder) -> None:
        Recorders.replayed += 1
        recorder.replay()
