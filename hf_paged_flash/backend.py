"""Which implementation runs, Triton kernels or the torch reference, and how often each did.

The choice comes from the environment variable HF_PAGED_FLASH_BACKEND, read at import, or from `configure`:

- ``auto``: kernels for CUDA tensors, the reference for all others, and where triton is not installed.
- ``triton``: kernels, or an error. CPU tensors run in Triton's interpreter (TRITON_INTERPRET=1).
- ``reference``: the torch reference on every device.

Whether `generate()` replays its decode steps as CUDA graphs is said here too: HF_PAGED_FLASH_GRAPHS, or `configure`.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

from hf_paged_flash.errors import ArgumentError, BackendError

if TYPE_CHECKING:
    import torch

BackendName = Literal["auto", "triton", "reference"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
CountKind = Literal["kernel", "reference", "dense_gather"]


@dataclass(frozen=True)
class Counters:
    """How often each operation ran since the last `reset_counters`, by name.

    Attributes:
        kernel: calls that launched a Triton kernel ("flash_forward", "store_kv", ...).
        reference: calls that ran the torch reference, same names.
        dense_gather: times that paged K/V were gathered into a dense tensor, by the operation that asked for it.

    A captured CUDA graph counts once, when it is captured; its replays run no Python.
    """

    kernel: dict[str, int] = field(default_factory=dict)
    reference: dict[str, int] = field(default_factory=dict)
    dense_gather: dict[str, int] = field(default_factory=dict)

    @property
    def kernel_total(self) -> int:
        return sum(self.kernel.values())

    @property
    def reference_total(self) -> int:
        return sum(self.reference.values())

    @property
    def dense_gather_total(self) -> int:
        return sum(self.dense_gather.values())


def _checked(name: str, argument: str) -> BackendName:
    if name not in get_args(BackendName):
        allowed = ", ".join(repr(choice) for choice in get_args(BackendName))
        raise ArgumentError(f"`{argument}` must be one of {allowed}, got {name!r}")
    return name


def _checked_flag(value: str, argument: str) -> bool:
    if value not in ("0", "1"):
        raise ArgumentError(f"`{argument}` must be 0 or 1, got {value!r}")
    return value == "1"


_backend: BackendName = _checked(os.environ.get("HF_PAGED_FLASH_BACKEND") or "auto", "HF_PAGED_FLASH_BACKEND")
_graphs = _checked_flag(os.environ.get("HF_PAGED_FLASH_GRAPHS") or "1", "HF_PAGED_FLASH_GRAPHS")
_compile_mode: CompileMode | None = None
_fused_layers = True
_lock = threading.Lock()
_counts: dict[CountKind, Counter[str]] = {kind: Counter() for kind in get_args(CountKind)}


def configure(
    *,
    backend: BackendName | None = None,
    graphs: bool | None = None,
    compile: CompileMode | Literal[False] | None = None,
    fused_layers: bool | None = None,
) -> None:
    """Set what holds for the whole process; None leaves it as it is.

    Args:
        backend: "auto", "triton" or "reference".
        graphs: whether `generate()` replays a decode step on CUDA as one graph, and short prompts, where it can; see
            `hf_paged_flash.generation`. On unless it is switched off, and without effect on other devices.
        compile: the mode of torch.compile in which these steps are compiled, "default" or
            "max-autotune-no-cudagraphs" for instance; False, as in the beginning, for as they are. A call's
            `generation_config.compile_config` comes before it.
        fused_layers: whether norms, rotary embeddings and gates run as one kernel each while `generate()` runs on
            CUDA, but in compiled steps of more than two tokens, and linear layers of one or two in half precision in
            steps that are replayed. On unless it is switched off.

    Raises:
        ArgumentError: something is none of these; nothing has changed.
    """
    global _backend, _graphs, _compile_mode, _fused_layers
    for name, flag in (("graphs", graphs), ("fused_layers", fused_layers)):
        if flag is not None and not isinstance(flag, bool):
            raise ArgumentError(f"`{name}` must be True, False or None, got {flag!r}")
    if compile is not None and compile is not False and compile not in get_args(CompileMode):
        allowed = ", ".join(repr(choice) for choice in get_args(CompileMode))
        raise ArgumentError(f"`compile` must be one of {allowed}, False or None, got {compile!r}")
    if backend is not None:
        _backend = _checked(backend, "backend")
    if graphs is not None:
        _graphs = graphs
    if compile is not None:
        _compile_mode = compile or None
    if fused_layers is not None:
        _fused_layers = fused_layers


def backend() -> BackendName:
    """The backend in force: "auto", "triton" or "reference"."""
    return _backend


def graphs() -> bool:
    """Whether decode graphs are switched on."""
    return _graphs


def compile_mode() -> CompileMode | None:
    """The mode in which decode steps are compiled; None for as they are."""
    return _compile_mode


def fuses_layers() -> bool:
    """Whether layers beside attention run as one kernel each in `generate()`."""
    return _fused_layers


def use_kernels(tensor: torch.Tensor) -> bool:
    """Whether an operation on `tensor` runs Triton kernels (True) or the torch reference (False).

    Raises:
        BackendError: the backend is "triton" and kernels cannot run on this tensor here.
    """
    if _backend == "reference":
        return False
    if _backend == "auto":
        return tensor.is_cuda and (_triton_importable() or _warn_without_triton())
    if not _triton_importable():
        raise BackendError(
            "backend 'triton' needs the package triton, which cannot be imported: install triton, "
            "or choose the backend 'auto' or 'reference'"
        )
    if tensor.is_cuda or (tensor.device.type == "cpu" and _interpreting()):
        return True
    raise BackendError(
        f"backend 'triton' cannot run on a tensor on {tensor.device}: move the model to a CUDA device, set "
        "TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's interpreter on CPU tensors, "
        "or choose the backend 'auto' or 'reference'"
    )


def count(kind: CountKind, name: str) -> None:
    """Add one to the counter `name` of `kind` ("kernel", "reference" or "dense_gather")."""
    with _lock:
        _counts[kind][name] += 1


def counters() -> Counters:
    """A snapshot of the counters; see `Counters`."""
    with _lock:
        return Counters(**{kind: dict(counts) for kind, counts in _counts.items()})


def reset_counters() -> None:
    """Set every counter to zero."""
    with _lock:
        for counts in _counts.values():
            counts.clear()


@cache
def _triton_importable() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _interpreting() -> bool:
    # The values that triton.knobs takes as true.
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@cache
def _warn_without_triton() -> bool:
    warnings.warn(
        "triton cannot be imported: hf_paged_flash runs its torch reference on CUDA tensors, correct but slow. "
        "Install triton to run the kernels.",
        stacklevel=3,
    )
    return False
