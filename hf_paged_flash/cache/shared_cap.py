"""One cap in bytes for all groups of a cache: what the others leave of it to each."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .page_group import PageGroup
    from .page_groups import PageGroups


def cap_of(groups: "PageGroups", group: "PageGroup", to_come: list[int] | None = None) -> int | None:
    """The cap of `group` in blocks: its own, and what the others leave of `max_memory`; None for none.

    `to_come`: blocks that each group is about to add, for which `group` leaves room.
    """
    if len(groups) == 1 or groups.max_memory is None:
        return group.pools.cap
    taken = sum(
        _bytes_for(groups, other, other.store.blocks.num_blocks + more)
        for other, more in zip(groups, to_come or [0] * len(groups), strict=True)
        if other is not group
    )
    caps = [] if group.pools.num_blocks is None else [group.pools.num_blocks]
    left = max(groups.max_memory - taken, 0)
    if group.pools.block_bytes:
        caps.append(group.pools.blocks_within(left))
    elif block_bytes := _bytes_for(groups, group, 1):
        caps.append(left // block_bytes)
    return min(caps, default=None)


def _bytes_for(groups: "PageGroups", group: "PageGroup", blocks: int) -> int:
    """Bytes of `blocks` blocks of `group`; before its layers store, as if they were like the other groups'."""
    if group.pools.block_bytes:
        return group.pools.bytes_for(blocks)
    known = [other.pools for other in groups if other.pools.block_bytes]
    layers = sum(pools.num_layers for pools in known)
    return blocks * (sum(pools.block_bytes for pools in known) * group.pools.num_layers // max(layers, 1))
