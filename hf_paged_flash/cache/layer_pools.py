"""The block pools of a group's layers: one cap for all of them, and growth that all take part in."""

from bisect import bisect_right
from collections.abc import Iterator

import numpy as np
import torch

from .. import ops
from ..errors import CacheFullError
from . import elastic_memory
from .block_pool import BlockPool
from .elastic_memory import ElasticMemory
from .forward_step import to_device
from .kept_addresses import KeptAddresses

# Layers so narrow that a page of memory holds more blocks than this, and caps of fewer pages a layer than this, would
# waste most of what they map: they get ordinary tensors.
MAX_BLOCKS_A_PAGE = 256
MIN_PAGES = 4


class LayerPools:
    """Pools of the layers that have stored something; each has room for every block of the group.

    Args:
        num_layers: layers of the group, most of which have no pool before the first forward.
        num_blocks, max_memory: the cap in blocks and in bytes; None for none.

    Attributes:
        is_elastic: whether growth copies nothing in any layer; False before the first.
        addresses: by layer, where memory that grows in place takes its addresses from; None: from the device.
    """

    def __init__(self, num_layers: int, num_blocks: int | None, max_memory: int | None) -> None:
        self.num_layers = num_layers
        self.num_blocks = num_blocks
        self.max_memory = max_memory
        self._pools: dict[int, BlockPool] = {}  # by layer index
        self._bytes_cap: int | None = None  # `max_memory` in blocks
        self.is_elastic = False
        self.addresses: dict[int, KeptAddresses] | None = None
        self._nans: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers; layers that have not stored yet count as the mean of those that have."""
        return self.stored_block_bytes * self.num_layers // max(len(self._pools), 1)

    @property
    def stored_block_bytes(self) -> int:
        """Bytes of one block over the layers that have stored."""
        return sum(pool.block_bytes for pool in self._pools.values())

    @property
    def device(self) -> torch.device:
        """Of the first layer that has stored."""
        return next(iter(self._pools.values())).key.device

    @property
    def bytes_reserved(self) -> int:
        return sum(pool.bytes_reserved for pool in self._pools.values())

    @property
    def room(self) -> int:
        """Blocks that every pool has room for."""
        return min((pool.num_blocks for pool in self._pools.values()), default=0)

    @property
    def is_complete(self) -> bool:
        """Whether every layer has stored, so that `room` is that of all."""
        return len(self._pools) == self.num_layers

    @property
    def cap(self) -> int | None:
        """The cap in blocks, the lower one of two; None for none, or while a block's size is not known.

        Bytes are those taken from the device, whole pages where memory is taken in pages.
        """
        caps = [] if self.num_blocks is None else [self.num_blocks]
        if self._bytes_cap is not None:
            caps.append(self._bytes_cap)
        return min(caps, default=None)

    def __iter__(self) -> Iterator[BlockPool]:
        return iter(self._pools.values())

    def get(self, layer_idx: int) -> BlockPool | None:
        return self._pools.get(layer_idx)

    def add(self, layer_idx: int, pool: BlockPool) -> None:
        """Takes in the pool of a layer, in place of the one it had."""
        self._pools[layer_idx] = pool
        exact = None if self.max_memory is None else self.max_memory // self.block_bytes
        if not pool.num_blocks:
            caps = [cap for cap in (self.num_blocks, exact) if cap is not None]
            pool.memory = self._memory_for(layer_idx, pool, min(caps, default=None))
        self.is_elastic = len(self._elastic) == len(self._pools)
        if exact is not None:
            self._bytes_cap = self.blocks_within(self.max_memory)

    def blocks_within(self, size: int) -> int:
        """Blocks that take at most `size` bytes over all layers."""
        # a layer's last page holds at most a page more than its blocks
        page = max(item.memory.page if item.memory else 0 for item in self._pools.values())
        least = max(size - page * self.num_layers, 0) // self.block_bytes
        return bisect_right(range(size // self.block_bytes + 1), size, lo=least, key=self.bytes_for) - 1

    def _memory_for(self, layer_idx: int, pool: BlockPool, cap: int | None) -> ElasticMemory | None:
        driver = elastic_memory.driver_of(pool.key.device)
        if driver is None:
            return None
        most = driver.total_memory if cap is None else min(driver.total_memory, cap * pool.block_bytes)
        if pool.block_bytes * MAX_BLOCKS_A_PAGE < driver.granularity or most < MIN_PAGES * driver.granularity:
            return None
        # a layer's share of the device; more than that where layers differ in size or lie on several devices
        addresses = None if self.addresses is None else self.addresses[layer_idx]
        return ElasticMemory(driver, min(most, 4 * driver.total_memory // self.num_layers), addresses)

    def bytes_for(self, num_blocks: int) -> int:
        """Bytes that `num_blocks` blocks take over all layers, counted as in `block_bytes`."""
        return sum(pool.bytes_for(num_blocks) for pool in self._pools.values()) * self.num_layers // len(self._pools)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What each pool stores in."""
        return tuple(pool.key.dtype for pool in self._pools.values())

    def addresses_in_use(self) -> tuple[int, ...]:
        """Where each pool lies."""
        return tuple(pool.address for pool in self._pools.values())

    def nan(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """NaN (1, 1, 1, 1), of which the handles on keys and values are views, in all layers and all forks."""
        if (dtype, device) not in self._nans:
            with torch.inference_mode(False):
                self._nans[dtype, device] = torch.full((1, 1, 1, 1), float("nan"), dtype=dtype, device=device)
        return self._nans[dtype, device]

    def clear(self) -> None:
        self._pools.clear()
        self._bytes_cap, self.is_elastic = None, False

    def release(self) -> None:
        """Gives the memory back; the layers keep their pools, empty."""
        for pool in self._pools.values():
            pool.release()

    def grow(self, num_blocks: int) -> None:
        """Makes room for `num_blocks` blocks in every pool.

        Raises:
            torch.OutOfMemoryError: the device has no room. Memory that grows in place is as it was; of ordinary
                tensors some may have more blocks than others.
        """
        before = [pool.num_blocks for pool in self._pools.values()]
        try:
            freed = sum(pool.grow(num_blocks) for pool in self._pools.values())
        except BaseException:
            for pool, blocks in zip(self._pools.values(), before, strict=True):
                pool.shrink(blocks)
            raise
        if freed > 32 * 2**20 and any(pool.key.is_cuda for pool in self._pools.values()):
            torch.cuda.empty_cache()  # the old pools' memory fits no later request: growth is rare, hand it back

    def is_worth_shrinking(self, num_blocks: int) -> bool:
        """Whether `shrink` would give back an eighth of the memory, and `MIN_PAGES` a layer: pages cost time."""
        pools = self._elastic
        if any(pool.memory.is_capturing for pool in pools):
            return False  # a graph can neither move blocks for good nor wait for the device
        spare = [pool.spare_bytes(num_blocks) for pool in pools]
        enough = MIN_PAGES * sum(pool.memory.page for pool in pools)
        return bool(pools) and sum(spare) >= max(enough, sum(pool.bytes_reserved for pool in pools) // 8)

    def shrink(self, num_blocks: int) -> None:
        """Gives back what lies behind the first `num_blocks` blocks in memory that shrinks in place."""
        for pool in self._elastic:
            pool.shrink(num_blocks)

    def copy_blocks(self, copies: np.ndarray) -> None:
        """Copies block `copies[:, 0]` to block `copies[:, 1]`, int64 (n, 2), in every layer: one launch a device."""
        for device in {pool.key.device: None for pool in self._pools.values()}:
            pools = [pool for pool in self._pools.values() if pool.key.device == device]
            ops.copy_blocks([x for pool in pools for x in (pool.key, pool.value)], to_device(copies, device))

    @property
    def _elastic(self) -> list[BlockPool]:
        return [pool for pool in self._pools.values() if pool.memory is not None]


def growth_error(error: BaseException, blocks_needed: int, blocks_free: int) -> BaseException:
    """What to raise where a pool could not grow because of `error`: CacheFullError for want of memory."""
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        return error
    return CacheFullError(
        f"the device has no memory for {blocks_needed} more blocks of the paged cache, {blocks_free} are free. The "
        "tokens stored before this forward are intact: shorten or split the batch, or free memory",
        blocks_needed=blocks_needed,
        blocks_free=blocks_free,
    )
