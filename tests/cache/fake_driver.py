"""A driver for `ElasticMemory` on the CPU: pages are counted, mapped and lost as a GPU's are, and calls can fail."""

import os

import numpy as np
import torch


class _Chunk:
    def __init__(self, nbytes: int) -> None:
        self.data = np.full(nbytes, 0xFF, np.uint8)  # NaN in every floating dtype
        self.handles = 1
        self.addresses: list[int] = []


class _Array:
    """Keeps `owner` as long as the tensor made from it."""

    def __init__(self, owner: object, array: np.ndarray) -> None:
        self.owner = owner
        self.array = array
        self.__array_interface__ = array.__array_interface__


class FakeDriver:
    """`CudaDriver`'s calls over host memory; what is not mapped reads as NaN.

    Args:
        granularity: bytes of a page.
        total_memory: bytes of the device; a page beyond them is out of memory.
    """

    def __init__(self, granularity: int = 16384, total_memory: int = 2**22) -> None:
        self.granularity = granularity
        self.total_memory = total_memory
        self.abandoned: list[tuple] = []
        self.process = os.getpid()
        self.ranges: dict[int, np.ndarray] = {}  # by address
        self.mapped: dict[int, _Chunk] = {}  # by address
        self.handles = 0
        self.kept_by_torch = 0  # bytes that `empty_cache` frees
        self.capturing = False
        self.calls: list[str] = []
        self.failing: int | None = None  # the call that is out of memory, counted from 0
        self.in_use: set[int] = set()  # addresses of pages that kernels may be reading

    def _count(self, name: str) -> None:
        call, self.failing = self.failing, None if self.failing is None else self.failing - 1
        self.calls.append(name)
        if call == 0:
            raise torch.OutOfMemoryError(f"simulated in {name}")

    @property
    def pages(self) -> int:
        """Pages that are taken from the device."""
        chunks = {id(chunk): chunk for chunk in self.mapped.values()}
        return sum(len(chunk.data) for chunk in chunks.values()) // self.granularity

    def _place(self, address: int, nbytes: int) -> np.ndarray:
        base = max(base for base in self.ranges if base <= address)
        offset = address - base
        assert offset + nbytes <= len(self.ranges[base]), "pages outside their range"
        assert offset % self.granularity == 0
        return self.ranges[base][offset : offset + nbytes]

    def use(self) -> None:
        """From now on kernels run that may read any of the mapped pages."""
        self.in_use = set(self.mapped)

    def reserve(self, nbytes: int) -> int:
        self._count("reserve")
        assert nbytes % self.granularity == 0
        array = np.full(nbytes, 0xFF, np.uint8)
        self.ranges[array.ctypes.data] = array
        return array.ctypes.data

    def free(self, address: int, nbytes: int) -> None:
        assert len(self.ranges[address]) == nbytes
        inside = range(address, address + nbytes)
        assert not any(place in inside for place in self.mapped), "addresses freed under mapped pages"
        del self.ranges[address]

    def create(self, nbytes: int) -> _Chunk:
        self._count("create")
        assert nbytes > 0 and nbytes % self.granularity == 0
        if self.pages * self.granularity + nbytes + self.kept_by_torch > self.total_memory:
            raise torch.OutOfMemoryError("no page left")
        self.handles += 1
        return _Chunk(nbytes)

    def retain(self, address: int) -> _Chunk:
        self._count("retain")
        chunk = self.mapped[address]
        chunk.handles += 1
        self.handles += 1
        return chunk

    def release(self, chunk: _Chunk) -> None:
        assert chunk.handles > 0
        chunk.handles -= 1
        self.handles -= 1

    def map(self, address: int, chunk: _Chunk, nbytes: int) -> None:
        self._count("map")
        assert nbytes == len(chunk.data)
        taken = [range(place, place + len(other.data)) for place, other in self.mapped.items()]
        assert not any(address in other or other.start in range(address, address + nbytes) for other in taken)
        place = self._place(address, nbytes)
        place[:] = self._place(chunk.addresses[-1], nbytes) if chunk.addresses else chunk.data
        chunk.addresses.append(address)
        self.mapped[address] = chunk

    def unmap(self, address: int, nbytes: int) -> None:
        assert address not in self.in_use, "unmapped under kernels that may read it"
        chunk, place = self.mapped.pop(address), self._place(address, nbytes)
        assert nbytes == len(chunk.data), "a mapping goes as it came"
        chunk.data = place.copy()
        chunk.addresses.remove(address)
        place[:] = 0xFF

    def unmap_all(self) -> None:
        """As if the process had ended."""
        for address, chunk in list(self.mapped.items()):
            self.unmap(address, len(chunk.data))
        self.ranges.clear()
        self.handles = 0

    def allow(self, address: int, nbytes: int) -> None:
        self._count("allow")
        places = {page for place, chunk in self.mapped.items() for page in self._pages(place, len(chunk.data))}
        assert places.issuperset(self._pages(address, nbytes))

    def _pages(self, address: int, nbytes: int) -> range:
        return range(address, address + nbytes, self.granularity)

    def tensor(self, owner: object, address: int, nbytes: int) -> torch.Tensor:
        assert address in self.mapped, "CUDA looks at the first page to learn where a pointer lies"
        return torch.from_numpy(np.asarray(_Array(owner, self.ranges[address][:nbytes])))

    def wait(self) -> None:
        assert not self.capturing
        self.in_use.clear()

    def is_capturing(self) -> bool:
        return self.capturing

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")
        self.kept_by_torch = 0
