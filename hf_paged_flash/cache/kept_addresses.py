"""Addresses that one cache's pools leave to the next one's, so that graphs captured over the former fit the latter."""

import os
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .elastic_memory import CudaDriver


class KeptAddresses:
    """At most one range of addresses of a layer's pool, with no memory behind it while nobody uses it.

    It goes back to the device with this object.
    """

    def __init__(self) -> None:
        self._kept: list[tuple] = []  # (driver, address, nbytes)
        weakref.finalize(self, _free, self._kept).atexit = False

    def take(self, driver: "CudaDriver", nbytes: int) -> int:
        """The first of `nbytes` addresses: those that were kept if they are as many, or else new ones."""
        while self._kept:
            kept = self._kept.pop()
            if kept[0] is driver and kept[2] == nbytes:
                return kept[1]
            _free([kept])
        return driver.reserve(nbytes)

    def keep(self, driver: "CudaDriver", address: int, nbytes: int) -> bool:
        """Takes in addresses that nobody uses any more; not if there are some already."""
        if not self._kept:
            self._kept.append((driver, address, nbytes))
            return True
        return False

    def __reduce__(self) -> tuple:
        return KeptAddresses, ()  # addresses are this process's


def _free(kept: list[tuple]) -> None:
    for driver, address, nbytes in kept:
        if os.getpid() == driver.process:
            driver.free(address, nbytes)
