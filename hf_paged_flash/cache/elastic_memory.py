"""Device memory that grows and shrinks in place: addresses reserved once, physical pages mapped on demand.

CUDA's virtual memory API, through cuda-bindings, which torch's CUDA wheels bring. Growth copies nothing, pointers stay
valid for captured graphs, and what is not mapped is left to others. These pages are not in torch's allocator: look at
`torch.cuda.mem_get_info`.
"""

import os
import weakref
from functools import cache

import torch

from ..errors import PagedFlashError
from .kept_addresses import KeptAddresses, unmap


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

    def create(self):
        """Takes a page from the device, not yet mapped anywhere; returns its handle."""
        return self._call("cuMemCreate", self.granularity, self._properties, 0)

    def retain(self, address: int):
        """One more handle of the page that is mapped at `address`."""
        return self._call("cuMemRetainAllocationHandle", address)

    def release(self, page) -> None:
        """Drops a handle; the page goes back to the device with its last handle and mapping."""
        self._call("cuMemRelease", page)

    def map(self, address: int, page) -> None:
        self._call("cuMemMap", address, self.granularity, 0, page, 0)

    def unmap(self, address: int) -> None:
        self._call("cuMemUnmap", address, self.granularity)

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
        return 0 if self._range is None else len(self._range.pages) * self._driver.granularity

    @property
    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured."""
        return self._driver.is_capturing()

    def rounded(self, nbytes: int) -> int:
        """`nbytes` in whole pages."""
        return -(-nbytes // self._driver.granularity) * self._driver.granularity

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
        target.extend(nbytes // self._driver.granularity - len(target.pages))
        self._range = target

    def shrink(self, nbytes: int) -> None:
        """Unmaps all pages behind the first `nbytes`, at least one page stays. Waits for the device."""
        pages = max(self.rounded(nbytes) // self._driver.granularity, 1)
        if self._range is not None and pages < len(self._range.pages):
            self._driver.wait()
            _free_abandoned(self._driver)
            self._range.cut(pages)

    def release(self) -> None:
        """Gives everything back once no tensor is left."""
        self._range = None


class _Range:
    """Reserved addresses, and the handles of the pages mapped to the first of them."""

    def __init__(self, driver: CudaDriver, nbytes: int, addresses: KeptAddresses | None) -> None:
        self._driver = driver
        self.address, self.nbytes, self.pages = (
            (driver.reserve(nbytes), nbytes, []) if addresses is None else addresses.take(driver, nbytes)
        )
        # at exit the process takes all of it along, and the driver may be gone before us
        weakref.finalize(self, _free, driver, self.address, self.nbytes, self.pages, addresses).atexit = False

    def extend(self, count: int) -> None:
        """Maps `count` new pages behind the others, or none."""
        driver, mapped = self._driver, len(self.pages)
        try:
            for _ in range(count):
                page = driver.create()
                try:
                    driver.map(self._page_address(len(self.pages)), page)
                except BaseException:
                    driver.release(page)
                    raise
                self.pages.append(page)
            if count > 0:
                driver.allow(self._page_address(mapped), count * driver.granularity)
        except BaseException:
            self.cut(mapped)  # nothing has touched them
            raise

    def share(self, other: "_Range") -> None:
        """Maps the pages of `other` here as well, and no others."""
        driver = self._driver
        self.cut(0)
        for index in range(len(other.pages)):
            page = driver.retain(other._page_address(index))
            try:
                driver.map(self._page_address(index), page)
            except BaseException:
                driver.release(page)
                raise
            self.pages.append(page)
        driver.allow(self.address, len(self.pages) * driver.granularity)

    def cut(self, count: int) -> None:
        """Unmaps all but the first `count` pages, which nothing may be using."""
        unmap(self._driver, self.address, self.pages, count)

    def _page_address(self, index: int) -> int:
        return self.address + index * self._driver.granularity


def _free(driver: CudaDriver, address: int, nbytes: int, pages: list, addresses: KeptAddresses | None) -> None:
    """Gives a range back, or leaves it to the next memory that changes its size if the device can't be waited for."""
    if os.getpid() != driver.process:
        return
    if driver.is_capturing():
        driver.abandoned.append((address, nbytes, pages, addresses))
        return
    if pages:
        driver.wait()  # kernels may still read them
    unmap(driver, address, pages, 0 if addresses is None else addresses.pages)
    if addresses is None:
        driver.free(address, nbytes)
    else:
        addresses.keep(driver, address, nbytes, pages)


def _free_abandoned(driver: CudaDriver) -> None:
    waiting, driver.abandoned = driver.abandoned, []
    for leftover in waiting:
        _free(driver, *leftover)
