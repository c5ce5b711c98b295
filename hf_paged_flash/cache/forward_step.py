"""What one forward adds to the cache: computed once, read by every layer."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """`array` as a tensor on `device`; to CUDA through pinned memory, so that the host does not wait."""
    tensor = torch.tensor(array, device="cpu")  # a copy: the host goes on writing into its arrays
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


_here = threading.local()  # `read`: the mask within `reading_once`, and what it is on the host


@contextmanager
def reading_once(mask: torch.Tensor) -> Iterator[torch.Tensor]:
    """`mask` as bool on the host, which `on_host` gives back within; a prefill looks at its mask in several places."""
    around = getattr(_here, "read", None)
    _here.read = mask, on_host(mask)
    try:
        yield _here.read[1]
    finally:
        _here.read = around


def on_host(mask: torch.Tensor) -> torch.Tensor:
    """`mask` as bool on the host, to read. Waits for the device, but within `reading_once`."""
    known, read = getattr(_here, "read", None) or (None, None)
    return read if known is mask else mask.cpu().bool()


@dataclass(frozen=True)
class NewTokens:
    """What a forward's mask says about its new columns, for all groups alike.

    Attributes:
        real: bool (batch, q_length), which of them are tokens; None where the device alone knows.
        counts: int64 (batch,), how many tokens a row gets; upper bounds where the device alone knows.
        floor: int64 (batch,), no row has fewer tokens stored.
        cache_seqlens: int32 (batch,), each row's tokens after the forward, on its device; None for a static step.
        indices, cu_seqlens_q: as in `ForwardStep`.
        repeats: each so many rows are alike: one of them is stored, the others share its blocks.
        is_packed: the forward has the new tokens alone, and `real` is bool (batch, columns) among all columns so far.
        sharing: (source, blocks), what rows begin with that others store, as in `BlockManager.append_sharing`.
    """

    real: np.ndarray | None
    counts: np.ndarray
    floor: np.ndarray
    cache_seqlens: torch.Tensor | None
    indices: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    repeats: int = 1
    is_packed: bool = False
    sharing: tuple[np.ndarray, np.ndarray] | None = None


@dataclass
class ForwardStep:
    """Columns `start .. end` of a batch, and where their tokens go.

    "Columns" are transformers' sequence positions, padding included; "tokens" are what is stored.

    Attributes:
        start, end: columns before and after this forward.
        batch: rows.
        slot_mapping: int64 (batch * length,), block * block_size + offset of each new token, -1 for padding; when
            packed int64 (new tokens,).
        block_table: int32 (batch, max_blocks), -1 where a row has no block.
        cache_seqlens: int32 (batch,), tokens of each row with this forward's.
        max_seqlen_k: no row has more tokens, int.
        indices: int64 (new tokens,), places of the new tokens among batch * (end - start); None where all are.
        cu_seqlens_q: int32 (batch + 1,), offsets of the rows' new tokens when packed; None without padding.
        max_seqlen_q: no row adds more tokens, int.
        num_blocks: blocks that a layer's pool must have, int.
        knows_mask: the mask function told which columns are padding; else a mask that attention gets says more.
        is_packed: queries and keys come as (1, new tokens), a row's after another's, see `packed_forward`.
        has_past: tokens were stored before.
    """

    start: int
    end: int
    batch: int
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor
    max_seqlen_k: int
    max_seqlen_q: int
    num_blocks: int
    indices: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    knows_mask: bool = False
    is_packed: bool = False
    has_past: bool = False
    _on_device: dict[torch.device, "ForwardStep"] = field(default_factory=dict, repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """(batch, length) of the forward's own keys."""
        tokens = self.slot_mapping.shape[0]
        return (1, tokens) if self.is_packed else (self.batch, tokens // self.batch)

    def to(self, device: torch.device) -> "ForwardStep":
        """This step with its tensors on `device`; copied once a device, for models spread over several."""
        if self.slot_mapping.device == device:
            return self
        if device not in self._on_device:
            tensors = {
                name: value.to(device, non_blocking=device.type == "cuda")
                for name, value in vars(self).items()
                if isinstance(value, torch.Tensor)
            }
            self._on_device[device] = replace(self, **tensors)
        return self._on_device[device]
