"""A step's tensors at addresses that stay: a CUDA graph that was captured over them is replayed for the next step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from .page_group import PageGroup

_ALIGNMENT = 256  # bytes; kernels are compiled for the alignment of what they get


class StepBuffers:
    """What a forward reads of its step, written anew before each run of it, by one copy to the device.

    Whole tables are sent: 4 bytes for each block that attention reads are little beside the block.

    Args:
        batch, q_length: rows, and new tokens of each.
        widths: columns of each group's table, at least as many as its rows have blocks.

    Attributes:
        slot_mapping: int64 (batch * q_length,), block_table: int32 (batch, width), of each group.
        cache_seqlens: int32 (batch,).
    """

    def __init__(self, batch: int, q_length: int, widths: Sequence[int], device: torch.device) -> None:
        shapes = [(np.int64, (batch * q_length,)) for _ in widths] + [(np.int32, (batch,))]
        shapes += [(np.int32, (batch, width)) for width in widths]
        sizes = [np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in shapes]
        ends = np.cumsum([-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes])
        self._host = np.zeros(ends[-1], np.uint8)
        self._device = torch.zeros(int(ends[-1]), dtype=torch.uint8, device=device)
        on_host, on_device = [], []
        for (dtype, shape), size, end in zip(shapes, sizes, [0, *ends], strict=False):
            span = slice(int(end), int(end) + size)
            on_host.append(self._host[span].view(dtype).reshape(shape))
            torch_dtype = torch.int64 if dtype is np.int64 else torch.int32
            on_device.append(self._device[span].view(torch_dtype).view(shape))
        groups = len(widths)
        self._slots, self._lengths, self._tables = on_host[:groups], on_host[groups], on_host[groups + 1 :]
        self.slot_mapping, self.cache_seqlens = on_device[:groups], on_device[groups]
        self.block_table = on_device[groups + 1 :]

    def write(self, groups: Sequence["PageGroup"], counts: np.ndarray) -> None:
        """Writes the step of `groups` whose rows have got room for `counts[b]` new tokens, the last ones they hold.

        They are the last of the row's columns; those before are padding.
        """
        lengths = groups[0].manager.lengths
        self._lengths[:] = lengths
        q_length = len(self._slots[0]) // len(lengths)
        positions = lengths[:, None] + np.arange(-q_length, 0)
        positions[positions < (lengths - counts)[:, None]] = -1
        for group, slots, table in zip(groups, self._slots, self._tables, strict=True):
            slots[:] = group.slots(positions).reshape(-1)
            used = min(group.manager.table.shape[1], table.shape[1])
            table[:, :used] = group.manager.table[:, :used]
            table[:, used:] = -1
        host = torch.from_numpy(self._host)
        if self._device.is_cuda:
            host = host.pin_memory()  # a copy, which torch keeps until the device has read it
        self._device.copy_(host, non_blocking=True)
