"""What the forks of a group share: one pool a layer, and the blocks in them."""

import os
import weakref
from functools import cache as cached
from typing import TYPE_CHECKING

import numpy as np
import torch

from .blocks import Blocks
from .layer_pools import LayerPools
from .prefix_index import PrefixIndex

if TYPE_CHECKING:
    from .page_group import PageGroup

KEPT_SHARE = 1 / 8


class PageStore:
    """Pools, blocks and the groups whose rows use them; lives as long as one of these does.

    Attributes:
        pools: of the group's layers; they grow for all forks at once, under one cap.
        blocks: which of the pools' blocks are free.
        groups: a group and its forks, weakly.
        loaded: layers whose pool came from a file and has met no model yet.
        kept_memory: bytes that blocks of the index of prefixes alone take at most; None for as many as there is room
            for under the cap or, without one, `KEPT_SHARE` of the device's memory.
    """

    def __init__(self, block_size: int, num_layers: int, num_blocks: int | None, max_memory: int | None) -> None:
        self.pools = LayerPools(num_layers, num_blocks, max_memory)
        self.blocks = Blocks(block_size, num_blocks)
        self.loaded: set[int] = set()
        self.kept_memory: int | None = None
        self.groups: weakref.WeakSet[PageGroup] = weakref.WeakSet()

    def give_back(self) -> bool:
        """Gives the memory back if no block is used; whether it did. The layers keep their pools, empty."""
        self.blocks.collect()
        if self.blocks.blocks_used:
            return False
        self.pools.release()
        self.blocks.clear()
        return True

    def keep_prefixes(self, kept_memory: int | None) -> None:
        """Makes an index of prefixes over the blocks; see `kept_memory`."""
        self.blocks.index = PrefixIndex()
        self.kept_memory = kept_memory

    def set_cap(self, max_blocks: int | None) -> None:
        """From now on there are at most `max_blocks` blocks; None for no cap."""
        self.blocks.max_blocks = max_blocks
        if self.blocks.index is None or not self.pools.block_bytes:
            return
        size = self.kept_memory
        if size is None and max_blocks is None:
            size = int(_memory_of(self.pools.device) * KEPT_SHARE)
        self.blocks.max_kept = None if size is None else size // self.pools.block_bytes

    def forget_kept(self) -> bool:
        """Frees the blocks that are kept for prompts to come; whether there were any."""
        kept = self.blocks.blocks_kept
        self.blocks.forget(kept)
        return kept > 0

    def use_room(self) -> None:
        """Lets rows have what the pools hold beyond what was asked for: the rest of their last pages."""
        if self.pools.is_complete:
            room, cap = self.pools.room, self.pools.cap
            self.blocks.resize(max(self.blocks.num_blocks, room if cap is None else min(room, cap)))

    def shrink(self) -> None:
        """Gives free blocks back to the device if they are many: blocks at the end move to free ones before them.

        Between forwards only. The device is waited for then, and no fork's last step can be taken back any more.
        """
        blocks = self.blocks
        groups = list(self.groups)  # held, so that no table is dropped half way and misses the moves
        blocks.collect()
        blocks.forget_surplus()
        if blocks.blocks_free < blocks.num_blocks // 8:
            return
        if self.pools.room < blocks.blocks_spanned:
            return  # a forward has stopped before a layer's pool grew
        keep = blocks.blocks_used + blocks.blocks_used // 16 + 1  # what grows again a little need not ask for it
        if not self.pools.is_worth_shrinking(keep):
            return
        place = np.arange(blocks.num_blocks)
        if blocks.blocks_spanned > keep:
            moves = blocks.moves_to_front()
            try:
                self.pools.copy_blocks(moves)
            except torch.OutOfMemoryError:
                return  # no room to move anything: all is as it was
            blocks.move(moves)
            place[moves[:, 0]] = moves[:, 1]
        for group in groups:
            group.move(place)
        keep = min(max(keep, blocks.blocks_spanned), blocks.num_blocks)
        blocks.resize(keep)
        self.pools.shrink(keep)
        self.use_room()

    def stored_tokens(self) -> int:
        """Tokens that the blocks hold, a shared block's tokens once, those of all forks. Waits for the device."""
        filled = np.zeros(self.blocks.num_blocks, np.int64)
        if self.blocks.index is not None:
            filled[self.blocks.index.used_at >= 0] = self.blocks.block_size
        for group in list(self.groups):
            group.sync_lengths()
            np.maximum(filled, group.manager.filled(), out=filled)
        return int(filled.sum())

    def __getstate__(self) -> dict:
        return vars(self) | {"groups": None}  # groups that come back add themselves

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, groups=weakref.WeakSet())


@cached
def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
