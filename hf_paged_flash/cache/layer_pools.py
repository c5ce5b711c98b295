"""The block pools of a group's layers: one cap for all of them, and growth that all take part in."""

import numpy as np
import torch

from .. import ops
from ..errors import CacheFullError
from .block_pool import BlockPool
from .forward_step import to_device


class LayerPools:
    """Pools of the layers that have stored something; each has room for every block of the group.

    Args:
        num_layers: layers of the group, most of which have no pool before the first forward.
        num_blocks, max_memory: the cap in blocks and in bytes; None for none.
    """

    def __init__(self, num_layers: int, num_blocks: int | None, max_memory: int | None) -> None:
        self.num_layers = num_layers
        self.num_blocks = num_blocks
        self.max_memory = max_memory
        self._pools: dict[int, BlockPool] = {}  # by layer index

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers; layers that have not stored yet count as the mean of those that have."""
        return self.stored_block_bytes * self.num_layers // max(len(self._pools), 1)

    @property
    def stored_block_bytes(self) -> int:
        """Bytes of one block over the layers that have stored."""
        return sum(pool.block_bytes for pool in self._pools.values())

    @property
    def bytes_reserved(self) -> int:
        return sum(pool.bytes_reserved for pool in self._pools.values())

    @property
    def room(self) -> int:
        """Blocks that every pool has room for."""
        return min((pool.num_blocks for pool in self._pools.values()), default=0)

    @property
    def cap(self) -> int | None:
        """The cap in blocks, the lower one of two; None for none, or while a block's size is not known."""
        caps = [] if self.num_blocks is None else [self.num_blocks]
        if self.max_memory is not None and self._pools:
            caps.append(self.max_memory // self.block_bytes)
        return min(caps, default=None)

    def get(self, layer_idx: int) -> BlockPool | None:
        return self._pools.get(layer_idx)

    def add(self, layer_idx: int, pool: BlockPool) -> None:
        self._pools[layer_idx] = pool

    def clear(self) -> None:
        self._pools.clear()

    def release(self) -> None:
        """Gives the memory back; the layers keep their pools, empty."""
        for pool in self._pools.values():
            pool.release()

    def copy_blocks(self, copies: np.ndarray) -> None:
        """Copies block `copies[:, 0]` to block `copies[:, 1]`, int64 (n, 2), in every pool: one launch a device."""
        for device in {pool.key.device: None for pool in self._pools.values()}:
            pools = [pool for pool in self._pools.values() if pool.key.device == device]
            ops.copy_blocks([x for pool in pools for x in (pool.key, pool.value)], to_device(copies, device))

    def grow(self, num_blocks: int) -> None:
        """Makes room for `num_blocks` blocks in every pool.

        Raises:
            torch.OutOfMemoryError: the device has no room; some pools may have more blocks than others.
        """
        freed = sum(pool.grow(num_blocks) for pool in self._pools.values())
        if freed > 32 * 2**20 and any(pool.key.is_cuda for pool in self._pools.values()):
            torch.cuda.empty_cache()  # the old pools' memory fits no later request: growth is rare, hand it back


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
