"""Lower bounds of lengths that only the device knows, read back without waiting for it."""

import numpy as np
import torch


class LengthFloor:
    """No row is shorter than `lengths[b]`, int64 (batch,).

    The bounds lag: a copy of the lengths is sent to the host now and then and used once it has arrived.
    """

    def __init__(self) -> None:
        self.lengths = np.zeros(0, np.int64)
        self._copy: torch.Tensor | None = None  # on its way to the host
        self._arrived: torch.cuda.Event | None = None

    def restart(self, lengths: np.ndarray) -> None:
        """Begins anew at `lengths`, which the host knows."""
        self.lengths = lengths.copy()
        self._copy = self._arrived = None

    def refresh(self, cache_seqlens: torch.Tensor) -> None:
        """Takes in a copy that has arrived, and sends for the next one."""
        if self._copy is not None and (self._arrived is None or self._arrived.query()):
            self.lengths = np.maximum(self.lengths, self._copy.numpy())
            self._copy = self._arrived = None
        if self._copy is not None:
            return
        if not cache_seqlens.is_cuda:
            self._copy = cache_seqlens.clone()
            return
        self._copy = torch.empty(cache_seqlens.shape, dtype=cache_seqlens.dtype, device="cpu", pin_memory=True)
        with torch.cuda.device_of(cache_seqlens):
            self._copy.copy_(cache_seqlens, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def __getstate__(self) -> dict:
        return {"lengths": self.lengths, "_copy": None, "_arrived": None}
