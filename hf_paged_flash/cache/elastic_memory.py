"""Device memory that grows and shrinks in place: addresses reserved once, physical pages mapped on demand.

CUDA's virtual memory API, through cuda-bindings, which torch's CUDA wheels bring. Growth copies nothing, pointers stay
valid for captured graphs, and what is not mapped is left to others. These pages are not in torch's allocator: look at
`torch.cuda.mem_get_info`.

Pages come and go in chunks: what one costs to take, map and give back does not depend on its size.
"""

import os
import weakref
from functools import cache
from itertools import accumulate

import torch

from ..errors import PagedFlashError
from .kept_addresses import KeptAddresses, mapped_bytes, unmap

CHUNK_PAGES = 4  # of a chunk that is not the first or a rest, at least; and an eighth of the memory there is then


class CudaDriver:
    """The calls that `ElasticMemory` makes, on one GPU; tests put a driver of their own in its place.

    Attributes:
        granularity: bytes of a page.
        total_memory: bytes of the device.
        abandoned: ranges that could not be freed when they were dropped, see `ElasticMemory`.
        process: the process that may use it; a forked child must not.
    """

    def __init__(self, device: torch.device) -> None:
        from cuda.bindings import driver

        self._cu = driver
        self._device = device
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties.location.id = device.index
        self._access = driver.CUmemAccessDesc()
        self._access.location = self._properties.location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self.granularity: int = self._call(
            "cuMemGetAllocationGranularity",
            self._properties,
            driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM,
        )
        self.total_memory: int = torch.cuda.get_device_properties(device).total_memory
        self.abandoned: list[tuple] = []
        self.process = os.getpid()

    def _call(self, name: str, *arguments):
        error, *values = getattr(self._cu, name)(*arguments)
        if error != self._cu.CUresult.CUDA_SUCCESS:
            out_of_memory = error == self._cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY
            kind = torch.OutOfMemoryError if out_of_memory else PagedFlashError
            raise kind(f"{name} failed on {self._device}: {getattr(error, 'name', error)}")
        return values[0] if values else None

    def reserve(self, nbytes: int) -> int:
        """Reserves addresses without memory behind them; returns the first."""
        return int(self._call("cuMemAddressReserve", nbytes, 0, 0, 0))

    def free(self, address: int, nbytes: int) -> None:
        self._call("cuMemAddressFree", address, nbytes)

    def create(self, nbytes: int):
        """Takes whole pages from the device, not yet mapped anywhere; returns their handle."""
        return self._call("cuMemCreate", nbytes, self._properties, 0)

    def retain(self, address: int):
        """One more handle of the pages that are mapped at `address`."""
        return self._call("cuMemRetainAllocationHandle", address)

    def release(self, handle) -> None:
        """Drops a handle; its pages go back to the device with the last one and their last mapping."""
        self._call("cuMemRelease", handle)

    def map(self, address: int, handle, nbytes: int) -> None:
        """Maps the `nbytes` behind a handle, all of them."""
        self._call("cuMemMap", address, nbytes, 0, handle, 0)

    def unmap(self, address: int, nbytes: int) -> None:
        """Undoes a `map`."""
        self._call("cuMemUnmap", address, nbytes)

    def allow(self, address: int, nbytes: int) -> None:
        """Lets the device read and write freshly mapped pages."""
        self._call("cuMemSetAccess", address, nbytes, [self._access], 1)

    def tensor(self, owner: object, address: int, nbytes: int) -> torch.Tensor:
        """A uint8 tensor over the range, whose first page is mapped; `owner` lives as long as its storage."""
        return torch.as_tensor(_Array(owner, address, nbytes), device=self._device)

    def wait(self) -> None:
        """Returns when all work on the device is done."""
        torch.cuda.synchronize(self._device)

    def is_capturing(self) -> bool:
        """Whether waiting would break a CUDA graph that is being captured."""
        return torch.cuda.is_current_stream_capturing()

    def empty_cache(self) -> None:
        """Gives freed memory that torch keeps back to the device."""
        torch.cuda.empty_cache()


class MetaDriver:
    """`CudaDriver`'s calls on the meta device: pages are counted as on a GPU, and nothing is behind them.

    So a cache of meta tensors tells what it would take from a device.
    """

    granularity = 2 * 2**20
    total_memory = 2**40

    def __init__(self) -> None:
        self.abandoned: list[tuple] = []
        self.process = os.getpid()

    def tensor(self, owner: object, address: int, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="meta")

    def is_capturing(self) -> bool:
        return False

    def _nothing(self, *arguments) -> int:
        return 0

    reserve = free = create = retain = release = map = unmap = allow = wait = empty_cache = _nothing


class _Array:
    """What torch reads a tensor's place from, and keeps as long as its storage."""

    def __init__(self, owner: object, address: int, nbytes: int) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


@cache
def unavailable(device: torch.device) -> str | None:
    """Why pools on `device`, with its index, can't grow in place; None where they can."""
    if device.type == "meta":
        return None
    if device.type != "cuda" or torch.version.hip:
        return "only CUDA has the virtual memory API"
    try:
        from cuda.bindings import driver
    except ImportError as error:
        return f"cuda-bindings can't be imported ({error})"
    supported = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    torch.cuda.init()
    error, ordinal = driver.cuDeviceGet(device.index)
    if error == driver.CUresult.CUDA_SUCCESS:
        error, value = driver.cuDeviceGetAttribute(supported, ordinal)
    if error != driver.CUresult.CUDA_SUCCESS or not value:
        return "the device or its driver does not support virtual memory management"
    return None


@cache
def driver_of(device: torch.device) -> CudaDriver | MetaDriver | None:
    """The driver of `device`, with its index; None where memory can't grow in place."""
    if unavailable(device) is not None:
        return None
    return MetaDriver() if device.type == "meta" else CudaDriver(device)


class ElasticMemory:
    """A range of addresses whose first bytes have memory, in whole pages.

    Tensors over it keep the range: it goes back to the device when the memory is released or dropped and the last
    tensor is gone, or, when that happens while a graph is being captured, when the next memory changes its size.

    Args:
        driver: of the device.
        reserve: bytes of addresses to reserve at first. Growth beyond them maps the same pages at other addresses.
        addresses: where they come from and go back to; None: the driver.
    """

    def __init__(self, driver: CudaDriver | MetaDriver, reserve: int, addresses: KeptAddresses | None = None) -> None:
        self._driver = driver
        self._addresses = addresses
        self.reserve = reserve
        self._range: _Range | None = None

    @property
    def page(self) -> int:
        """Bytes of a page."""
        return self._driver.granularity

    @property
    def mapped(self) -> int:
        """Bytes taken from the device."""
        return 0 if self._range is None else mapped_bytes(self._range.chunks)

    @property
    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured."""
        return self._driver.is_capturing()

    def rounded(self, nbytes: int) -> int:
        """`nbytes` in whole pages."""
        return -(-nbytes // self._driver.granularity) * self._driver.granularity

    def after_shrink(self, nbytes: int) -> int:
        """What `shrink(nbytes)` leaves: whole chunks."""
        chunks = [] if self._range is None else self._range.chunks
        ends = accumulate(size for _, size in chunks)
        return next((end for end in ends if end >= nbytes), self.mapped)

    def tensor(self) -> torch.Tensor:
        """uint8 over the whole range; only its first `mapped` bytes may be touched."""
        return self._driver.tensor(self._range, self._range.address, self._range.nbytes)

    def grow(self, nbytes: int) -> None:
        """Maps pages until there are `nbytes`.

        Raises:
            torch.OutOfMemoryError: the device has no room, also without what torch keeps; nothing has changed.
        """
        _free_abandoned(self._driver)
        try:
            self._grow(self.rounded(nbytes))
        except torch.OutOfMemoryError:
            if self._driver.is_capturing():
                raise
            self._driver.empty_cache()
            self._grow(self.rounded(nbytes))

    def _grow(self, nbytes: int) -> None:
        target = self._range
        if target is None or nbytes > target.nbytes:
            size = self.rounded(self.reserve if nbytes <= self.reserve else 2 * nbytes)
            target = _Range(self._driver, size, self._addresses)
            if self._range is not None:
                target.share(self._range)
        target.extend(nbytes)
        self._range = target

    def shrink(self, nbytes: int) -> None:
        """Unmaps all chunks behind the first `nbytes`, at least one page stays. Waits for the device."""
        if self.after_shrink(nbytes) < self.mapped:
            self._driver.wait()
            _free_abandoned(self._driver)
            self._range.cut(max(nbytes, 1))

    def release(self) -> None:
        """Gives everything back once no tensor is left."""
        self._range = None


class _Range:
    """Reserved addresses, and the chunks of pages mapped to the first of them: handles, and bytes behind each."""

    def __init__(self, driver: CudaDriver, nbytes: int, addresses: KeptAddresses | None) -> None:
        self._driver = driver
        self.address, self.nbytes, self.chunks = (
            (driver.reserve(nbytes), nbytes, []) if addresses is None else addresses.take(driver, nbytes)
        )
        self._end(addresses)

    def _end(self, addresses: KeptAddresses | None) -> None:
        """What becomes of it, once nobody uses it."""
        self._finalizer = weakref.finalize(
            self, _free, self._driver, self.address, self.nbytes, self.chunks, addresses
        )
        # at exit the process takes all of it along, and the driver may be gone before us
        self._finalizer.atexit = False

    def extend(self, nbytes: int) -> None:
        """Maps new pages behind the others until there are `nbytes`, whole pages; the first is a chunk of its own."""
        page, before = self._driver.granularity, mapped_bytes(self.chunks)
        largest = max(CHUNK_PAGES, nbytes // page // 8) * page
        mapped = before
        try:
            while mapped < nbytes:
                size = min(largest, nbytes - mapped) if mapped else page
                self._map(mapped, self._driver.create(size), size)
                mapped += size
            if mapped > before:
                self._driver.allow(self.address + before, mapped - before)
        except BaseException:
            self.cut(before)  # nothing has touched them
            raise

    def share(self, other: "_Range") -> None:
        """Maps the pages of `other` here as well, and no others; `other` keeps none for whoever comes after it."""
        other._finalizer.detach()
        other._end(None)
        self.cut(0)
        mapped = 0
        for _, size in other.chunks:
            self._map(mapped, self._driver.retain(other.address + mapped), size)
            mapped += size
        self._driver.allow(self.address, mapped)

    def _map(self, place: int, handle, size: int) -> None:
        try:
            self._driver.map(self.address + place, handle, size)
        except BaseException:
            self._driver.release(handle)
            raise
        self.chunks.append((handle, size))

    def cut(self, nbytes: int) -> None:
        """Unmaps the chunks that begin behind the first `nbytes`, which nothing may be using."""
        unmap(self._driver, self.address, self.chunks, nbytes)


def _free(driver: CudaDriver, address: int, nbytes: int, chunks: list, addresses: KeptAddresses | None) -> None:
    """Gives a range back, or leaves it to the next memory that changes its size if the device can't be waited for."""
    if os.getpid() != driver.process:
        return
    if driver.is_capturing():
        driver.abandoned.append((address, nbytes, chunks, addresses))
        return
    if chunks:
        driver.wait()  # kernels may still read them
    unmap(driver, address, chunks, 0 if addresses is None else driver.granularity)
    if addresses is None:
        driver.free(address, nbytes)
    else:
        addresses.keep(driver, address, nbytes, chunks)


def _free_abandoned(driver: CudaDriver) -> None:
    waiting, driver.abandoned = driver.abandoned, []
    for leftover in waiting:
        _free(driver, *leftover)
