"""How much memory a PagedCache may take, and what it has taken."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from ..errors import ArgumentError
from .page_groups import PageGroups
from .prefixes import Prefixes


def bytes_of(size: int | str | None, name: str, otherwise: str) -> int | None:
    """A size in bytes, the argument `name`; ArgumentError where it is none. `otherwise`: what it may also be."""
    given = size
    if isinstance(size, str):
        from accelerate.utils import convert_file_size_to_int  # slow to import, rarely needed

        try:
            size = convert_file_size_to_int(size)
        except ValueError:
            size = 0
    if size is not None and (type(size) is not int or size < 1):
        raise ArgumentError(
            f'`{name}` must be bytes above 0 as an integer, or like "4GiB", or {otherwise}, got {given!r}'
        )
    return size


def check_cap(
    max_memory: int | None, config: PreTrainedConfig, layers: int, block_size: int, dtype: torch.dtype | None
) -> None:
    """Refuses a cap below one block of `layers` layers; where `config` tells too little, the first forward does."""
    if max_memory is None or hasattr(config, "kv_lora_rank") or getattr(config, "is_heterogeneous", False):
        return  # to ask for a size that differs by layer (Gemma 4) is an error
    heads, head_dim = getattr(config, "num_key_value_heads", None), getattr(config, "head_dim", None)
    if head_dim is None and hasattr(config, "hidden_size") and hasattr(config, "num_attention_heads"):
        head_dim = config.hidden_size // config.num_attention_heads
    dtype = dtype or config.dtype
    told = type(heads) is int and type(head_dim) is int and isinstance(dtype, torch.dtype)
    if not told:
        return
    block = layers * block_size * heads * 2 * head_dim * dtype.itemsize
    if max_memory < block:
        raise ArgumentError(
            f"`max_memory` must be at least {block} bytes, one block of {block_size} tokens in {layers} layers of "
            f"{dtype}, got {max_memory}"
        )


@dataclass(frozen=True)
class CacheMemory:
    """What a PagedCache and its forks hold; a block is `block_size` tokens of all attention layers of one group.

    Layers with the same attention pattern are a group: full attention, or a sliding window of one size.

    Attributes:
        bytes_reserved: K/V memory taken from the device, used or free, in whole pages where it is taken in pages.
        bytes_stored: K/V of stored tokens, those in shared blocks once.
        bytes_wasted: reserved and holding no token: room behind each row's last token, and free blocks.
        tokens: tokens stored, those in shared blocks once; of several groups, the one that stores most of them.
        block_size: tokens a block.
        blocks_used: blocks that hold tokens.
        blocks_free: reserved blocks that hold none.
        blocks_shared: blocks that more than one row uses, of this cache or of a fork.
        blocks_kept: of the `blocks_used`, those that no row uses: they wait for a prompt that begins alike, and are
            taken when there is no other room.
        prefix_tokens: tokens of prompts that were looked up under `prefix_caching`.
        prefix_tokens_hit: those of them that were not computed, as blocks held them or another row of the batch had
            them too.
    """

    bytes_reserved: int
    bytes_stored: int
    bytes_wasted: int
    tokens: int
    block_size: int
    blocks_used: int
    blocks_free: int
    blocks_shared: int
    blocks_kept: int = 0
    prefix_tokens: int = 0
    prefix_tokens_hit: int = 0

    @property
    def prefix_hit_rate(self) -> float:
        """The share of prompt tokens that were not computed; 0 where none were looked up."""
        return self.prefix_tokens_hit / max(self.prefix_tokens, 1)


def memory_of(groups: PageGroups, prefixes: Prefixes | None) -> CacheMemory:
    """What the groups of a cache, and their forks, hold. Waits for the device."""
    stores = [group.store for group in groups]
    tokens = [store.stored_tokens() for store in stores]
    for store in stores:
        store.blocks.collect()
    reserved = sum(store.pools.bytes_reserved for store in stores)
    stored = sum(
        count * (store.pools.stored_block_bytes // store.blocks.block_size)
        for count, store in zip(tokens, stores, strict=True)
    )
    return CacheMemory(
        bytes_reserved=reserved,
        bytes_stored=stored,
        bytes_wasted=reserved - stored,
        tokens=max(tokens),
        block_size=stores[0].blocks.block_size,
        blocks_used=sum(store.blocks.blocks_used for store in stores),
        blocks_free=sum(store.blocks.blocks_free for store in stores),
        blocks_shared=sum(store.blocks.blocks_shared for store in stores),
        blocks_kept=sum(store.blocks.blocks_kept for store in stores),
        prefix_tokens=0 if prefixes is None else prefixes.tokens_asked,
        prefix_tokens_hit=0 if prefixes is None else prefixes.tokens_hit,
    )
