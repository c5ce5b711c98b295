"""Addresses that one cache's pools leave to the next one's, so that graphs captured over the former fit the latter.

The first page stays mapped: to map one takes 0.1 ms, which a short prompt would wait for once a layer.
"""

import os
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .elastic_memory import CudaDriver


class KeptAddresses:
    """The largest range of addresses that a layer's pools have had, with one page behind it while nobody uses it.

    It goes back to the device with this object.
    """

    def __init__(self) -> None:
        self._kept: list[tuple] = []  # (driver, address, nbytes, chunks of pages)
        weakref.finalize(self, _free, self._kept).atexit = False

    def take(self, driver: "CudaDriver", nbytes: int) -> tuple[int, int, list]:
        """The first of at least `nbytes` addresses, how many, and the chunks behind them: those kept, or new ones."""
        with suppress(IndexError):  # list operations are atomic, and a garbage collection may call `keep` in between
            kept = self._kept.pop()
            if kept[0] is driver and kept[2] >= nbytes:
                return kept[1:]
            self.keep(*kept)
        return driver.reserve(nbytes), nbytes, []

    def keep(self, driver: "CudaDriver", address: int, nbytes: int, chunks: list) -> None:
        """Takes in addresses, the first with `chunks` of pages behind them, that nobody uses any more."""
        self._kept.append((driver, address, nbytes, chunks))
        self._kept.sort(key=lambda kept: kept[2])
        while len(self._kept) > 1:
            _free([self._kept.pop(0)])

    def __reduce__(self) -> tuple:
        return KeptAddresses, ()  # addresses are this process's


def _free(kept: list[tuple]) -> None:
    for driver, address, nbytes, chunks in kept:
        if os.getpid() == driver.process:
            unmap(driver, address, chunks, 0)
            driver.free(address, nbytes)


def unmap(driver: "CudaDriver", address: int, chunks: list[tuple], keep: int) -> None:
    """Gives the chunks that begin behind the first `keep` bytes back to the device; nothing may be using them."""
    mapped = mapped_bytes(chunks)
    while chunks and mapped - chunks[-1][1] >= keep:
        handle, size = chunks[-1]
        mapped -= size
        driver.unmap(address + mapped, size)
        del chunks[-1]
        driver.release(handle)


def mapped_bytes(chunks: list[tuple]) -> int:
    return sum(size for _, size in chunks)
