"""What the forks of a group share: one pool a layer, and the blocks in them."""

import weakref
from typing import TYPE_CHECKING

import numpy as np
import torch

from .blocks import Blocks
from .layer_pools import LayerPools

if TYPE_CHECKING:
    from .page_group import PageGroup


class PageStore:
    """Pools, blocks and the groups whose rows use them; lives as long as one of these does.

    Attributes:
        pools: of the group's layers; they grow for all forks at once, under one cap.
        blocks: which of the pools' blocks are free.
        groups: a group and its forks, weakly.
        loaded: layers whose pool came from a file and has met no model yet.
    """

    def __init__(self, block_size: int, num_layers: int, num_blocks: int | None, max_memory: int | None) -> None:
        self.pools = LayerPools(num_layers, num_blocks, max_memory)
        self.blocks = Blocks(block_size, num_blocks)
        self.loaded: set[int] = set()
        self.groups: weakref.WeakSet[PageGroup] = weakref.WeakSet()

    def give_back(self) -> bool:
        """Gives the memory back if no block is used; whether it did. The layers keep their pools, empty."""
        self.blocks.collect()
        if self.blocks.blocks_used:
            return False
        self.pools.release()
        self.blocks.clear()
        return True

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
        if blocks.blocks_free < blocks.num_blocks // 8:
            return
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
        for group in list(self.groups):
            group.sync_lengths()
            np.maximum(filled, group.manager.filled(), out=filled)
        return int(filled.sum())

    def __getstate__(self) -> dict:
        return vars(self) | {"groups": None}  # groups that come back add themselves

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, groups=weakref.WeakSet())
