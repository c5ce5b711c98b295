"""Where one layer's blocks live on its device."""

import torch

from .. import ops


class BlockPool:
    """One layer's keys (num_blocks, block_size, Hkv, D) and values (num_blocks, block_size, Hkv, Dv).

    Unwritten room holds whatever the allocator left there; every reader masks it.
    """

    def __init__(self, block_size: int, key: torch.Tensor, value: torch.Tensor, dtype: torch.dtype | None) -> None:
        """Heads, head dims and device are those of key, value (B, Hkv, S, D | Dv).

        `dtype` None takes theirs, the smaller one where they differ (a norm or RoPE in fp32 may upcast keys alone).
        """
        if dtype is None:
            dtype = min(key.dtype, value.dtype, key=lambda candidate: candidate.itemsize)
        self.key = key.new_empty((0, block_size, key.shape[1], key.shape[3]), dtype=dtype)
        self.value = value.new_empty((0, block_size, value.shape[1], value.shape[3]), dtype=dtype)

    @property
    def num_blocks(self) -> int:
        return self.key.shape[0]

    @property
    def bytes_reserved(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, keys and values."""
        return (self.key.shape[1:].numel() + self.value.shape[1:].numel()) * self.key.element_size()

    def grow(self, num_blocks: int) -> int:
        """Makes room for `num_blocks` blocks in all; stored blocks are copied once. Returns the bytes given back.

        Raises:
            torch.OutOfMemoryError: the device has no room; the pool is as it was.
        """
        if num_blocks <= self.num_blocks:
            return 0
        freed = self.bytes_reserved
        # tensors made in inference mode could not be written to outside it, and a pool lives longer than a mode
        with torch.inference_mode(False), torch.no_grad():
            key = self.key.new_empty((num_blocks, *self.key.shape[1:]))
            value = self.value.new_empty((num_blocks, *self.value.shape[1:]))
            key[: self.num_blocks].copy_(self.key)
            value[: self.num_blocks].copy_(self.value)
        self.key, self.value = key, value
        return freed

    def release(self) -> None:
        """Gives the memory back; the pool is as new."""
        self.key, self.value = (x.new_empty((0, *x.shape[1:])) for x in (self.key, self.value))

    def store(self, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Writes key, value (B, S, Hkv, D | Dv), any strides and dtype, into slots (B * S,); slot -1 is skipped."""
        ops.store_kv(key.to(self.key.dtype), value.to(self.value.dtype), self.key, self.value, slot_mapping)

    def gather(self, slots: torch.Tensor, kind: str) -> torch.Tensor:
        """Keys or values (`kind`) at `slots` (B, L) as (B, Hkv, L, D | Dv) contiguous; slot -1 reads as 0."""
        pool = self.key if kind == "key" else self.value
        tokens = pool.flatten(0, 1)[slots.clamp(min=0)]
        return tokens.masked_fill_((slots < 0)[:, :, None, None], 0).transpose(1, 2).contiguous()
