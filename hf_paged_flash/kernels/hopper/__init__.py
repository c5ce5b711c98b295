"""Kernels in Triton's Gluon for Hopper (sm_90), beside the portable ones: where they run, and why not elsewhere.

Gluon promises no stability, so its kernels run only on Triton versions that they were seen to work on, and Gluon is
imported only where they may run. Everything else is the portable kernels' work.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

# From the first version to before the second: from 3.9 on Gluon's copies have another interface.
TRITON_VERSIONS = ((3, 6), (3, 9))
HEAD_DIMS = (64, 128, 256)

_lock = threading.Lock()
_switched_off = 0  # how many `disabled()` are open


def _version_problem(version: str) -> str | None:
    first, end = TRITON_VERSIONS
    if first <= tuple(int(part) for part in version.split(".")[:2]) < end:
        return None
    known = f"{first[0]}.{first[1]} to {end[0]}.{end[1] - 1}"
    return f"Triton {version} is none of those whose Gluon they were seen to work with ({known})"


@lru_cache
def _software_problem() -> str | None:
    if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"):
        return "Triton's interpreter does not run Gluon"
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    problem = _version_problem(triton.__version__)
    if problem:
        return problem
    try:
        for name in ("flash_forward", "flash_backward"):
            importlib.import_module(f"{__name__}.{name}")
    except Exception as error:  # whatever an interface without promises raises, the portable kernels remain
        return f"Gluon of Triton {triton.__version__}: {type(error).__name__}: {error}"
    return None


@lru_cache
def _hardware_problem(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    return None if (major, minor) == (9, 0) else f"they need sm_90, the GPU is sm_{major}{minor}"


def unavailable(device: torch.device) -> str | None:
    """Why Hopper's kernels do not run on `device`, in words for people, or None where they do."""
    if _switched_off:
        return "they are switched off (hopper.disabled())"
    if device.type != "cuda":
        return f"they need a CUDA device, got {device.type}"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _hardware_problem(index) or _software_problem()


@contextmanager
def disabled() -> Iterator[None]:
    """The portable kernels do all the work inside, in every thread: autograd runs backward passes in its own."""
    global _switched_off
    with _lock:
        _switched_off += 1
    try:
        yield
    finally:
        with _lock:
            _switched_off -= 1


def tensor_strides(x: torch.Tensor) -> list[int]:
    """Strides of x (B, S, H, D); where a size is 1, and torch keeps any stride, one that the copy engine takes."""
    strides = list(x.stride())
    for dim in range(3):
        if x.shape[dim] == 1:
            strides[dim] = x.shape[3]
    return strides


def copyable(x: torch.Tensor) -> bool:
    """Whether the copy engine (TMA) can read x: a contiguous last dimension, 16-byte steps in the others."""
    x = x[None] if x.dim() == 3 else x
    steps = tensor_strides(x)
    aligned = all(step > 0 and step * x.element_size() % 16 == 0 for step in steps[:3])
    return x.numel() > 0 and steps[3] == 1 and aligned and x.data_ptr() % 16 == 0


def supports(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    causal: bool,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    s_aux: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    softmax_scale: float = 1.0,
) -> bool:
    """Whether Hopper's kernels compute this call of `kernels.flash_forward`, where `unavailable` is None.

    bf16 and fp16, head_dim of K and V alike and in HEAD_DIMS, dense or packed on both sides; no window, softcap, sink,
    bias, dropout, page or limit to the used keys; any length and scale.
    """
    plain = all(x is None for x in (block_table, seqused_k, s_aux, bias, alibi_slopes)) and softcap == dropout_p == 0.0
    dense_or_packed = (cu_seqlens_q is None) == (cu_seqlens_k is None) and q.dim() == k.dim() == v.dim()
    return (
        plain
        and window_left < 0
        and (causal or window_right < 0)
        and dense_or_packed
        and q.dtype == k.dtype == v.dtype
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] == k.shape[-1] == v.shape[-1]
        and q.shape[-1] in HEAD_DIMS
        and all(copyable(x) for x in (q, k, v))
    )


def supports_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, deterministic: bool, **call
) -> bool:
    """Whether `hopper.flash_backward` computes this call of `kernels.flash_backward`, where `unavailable` is None.

    What `supports` takes, but not `deterministic`: it sums dQ in no fixed order.
    """
    return not deterministic and dout.dtype == q.dtype and supports(q, k, v, **call)
