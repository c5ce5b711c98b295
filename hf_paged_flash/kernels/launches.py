"""Programmatic dependent launch (Hopper and later): a kernel starts while the one before it ends.

Its programs take the places of those that have ended, and wait for the rest once they need what these have written. A
decode step is some 400 kernels, most of them of a few microseconds: a part of each start, and of each last wave of
programs, is saved (CUDA programming guide, "Programmatic Dependent Launch and Synchronization"). Needs no Triton.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

LEAST_CAPABILITY = (9, 0)

_here = threading.local()  # `overlaps`: within `overlapping_launches`


@contextmanager
def overlapping_launches() -> Iterator[None]:
    """Within it kernels of this thread start early, where the GPU can, as those of a model's forward may.

    A linear layer's begins to read its weights before it waits: no kernel may write to them right before.
    """
    before = getattr(_here, "overlaps", False)
    _here.overlaps = True
    try:
        yield
    finally:
        _here.overlaps = before


def overlap(x: torch.Tensor) -> dict[str, bool]:
    """Arguments of a launch on the device of `x`, of a kernel that calls `let_next_start` and `wait_for_previous`."""
    overlaps = getattr(_here, "overlaps", False) and can_overlap(x.device)
    return {"PDL": True, "launch_pdl": True} if overlaps else {"PDL": False}


@cache
def can_overlap(device: torch.device) -> bool:
    """Whether the GPU has programmatic dependent launch."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
