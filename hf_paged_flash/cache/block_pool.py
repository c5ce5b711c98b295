"""Where one layer's blocks live on its device."""

import torch

from .. import ops
from . import elastic_memory
from .elastic_memory import ElasticMemory


class BlockPool:
    """One layer's keys (num_blocks, block_size, Hkv, D) and values (num_blocks, block_size, Hkv, Dv).

    A block's keys and values lie behind one another in one memory, `block_bytes` in all: `key` and `value` are views
    of it with gaps between the blocks. Unwritten room holds whatever was there before; every reader masks it.

    Attributes:
        address: where the keys begin; values lie at a fixed distance.
        memory: what the blocks lie in where it grows in place; None for an ordinary tensor, copied when it grows.
    """

    def __init__(self, block_size: int, key: torch.Tensor, value: torch.Tensor, dtype: torch.dtype | None) -> None:
        """Heads, head dims and device are those of key, value (B, Hkv, S, D | Dv).

        `dtype` None takes theirs, the smaller one where they differ (a norm or RoPE in fp32 may upcast keys alone).
        """
        if dtype is None:
            dtype = min(key.dtype, value.dtype, key=lambda candidate: candidate.itemsize)
        self._shapes = [torch.Size((block_size, x.shape[1], x.shape[3])) for x in (key, value)]
        self.memory: ElasticMemory | None = None
        self._lay_out(key.new_empty(0, dtype=dtype))

    def _lay_out(self, elements: torch.Tensor) -> None:
        """Makes `key` and `value` views of a flat tensor, of as many blocks as fit into it."""
        key, value = self._shapes
        width = key.numel() + value.numel()
        # `as_strided`: the strides of one block are those of many, a graph goes by them when the pool has grown
        self.key, self.value = (
            elements.as_strided((len(elements) // width, *shape), (width, *_strides(shape)), first)
            for shape, first in ((key, 0), (value, key.numel()))
        )
        self.address = self.key.data_ptr()

    @property
    def num_blocks(self) -> int:
        return self.key.shape[0]

    @property
    def bytes_reserved(self) -> int:
        """Bytes taken from the device, whole pages where memory is taken in pages."""
        return self.num_blocks * self.block_bytes if self.memory is None else self.memory.mapped

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, keys and values."""
        return sum(shape.numel() for shape in self._shapes) * self.key.element_size()

    def bytes_for(self, num_blocks: int) -> int:
        """Bytes that `num_blocks` blocks take from the device."""
        nbytes = num_blocks * self.block_bytes
        return nbytes if self.memory is None else self.memory.rounded(nbytes)

    def grow(self, num_blocks: int) -> int:
        """Makes room for `num_blocks` blocks at least. Returns the bytes of an ordinary tensor that was replaced.

        Raises:
            torch.OutOfMemoryError: the device has no room; the pool is as it was.
        """
        if num_blocks <= self.num_blocks:
            return 0
        # tensors made in inference mode could not be written to outside it, and a pool lives longer than a mode
        with torch.inference_mode(False), torch.no_grad():
            if self.memory is not None:
                self.memory.grow(num_blocks * self.block_bytes)
                self._lay_out_memory()
                return 0
            freed, old = self.bytes_reserved, self._elements()
            elements = old.new_empty(num_blocks * self.block_bytes // old.element_size())
            elements[: len(old)].copy_(old)
            self._lay_out(elements)
            return freed

    def spare_bytes(self, num_blocks: int) -> int:
        """What `shrink(num_blocks)` would give back."""
        memory = self.memory
        return 0 if memory is None else memory.mapped - memory.after_shrink(num_blocks * self.block_bytes)

    def shrink(self, num_blocks: int) -> None:
        """Gives back the pages behind the first `num_blocks` blocks, which nothing may use. Waits for the device.

        All but the rest of a chunk that was mapped as one; an ordinary tensor stays as it is.
        """
        if self.spare_bytes(num_blocks):
            with torch.inference_mode(False):
                self.memory.shrink(num_blocks * self.block_bytes)
                self._lay_out_memory()

    def release(self) -> None:
        """Gives the memory back; the pool is as new."""
        self._lay_out(self.key.new_empty(0))
        if self.memory is not None:
            self.memory.release()

    def _lay_out_memory(self) -> None:
        self._lay_out(self.memory.tensor()[: self.memory.mapped].view(self.key.dtype))

    def _elements(self) -> torch.Tensor:
        """All blocks as one flat tensor, keys and values."""
        width = sum(shape.numel() for shape in self._shapes)
        return self.key.as_strided((self.num_blocks * width,), (1,))

    def __getstate__(self) -> dict:
        state = {name: value for name, value in vars(self).items() if name not in ("key", "value")}
        state["memory"] = None if self.memory is None else self.memory.reserve
        return state | {"elements": self._elements().clone()}

    def __setstate__(self, state: dict) -> None:
        reserve, elements = state.pop("memory"), state.pop("elements")
        vars(self).update(state)
        driver = None if reserve is None else elastic_memory.driver_of(elements.device)
        self.memory = None if driver is None else ElasticMemory(driver, reserve)
        self._lay_out(elements if driver is None else elements[:0])
        if driver is not None:
            self.grow(len(elements) * elements.element_size() // self.block_bytes)
            self._elements()[: len(elements)].copy_(elements)

    def store(self, key: torch.Tensor, value: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Writes key, value (B, S, Hkv, D | Dv), any strides and dtype, into slots (B * S,); slot -1 is skipped."""
        ops.store_kv(key.to(self.key.dtype), value.to(self.value.dtype), self.key, self.value, slot_mapping)

    def gather(self, slots: torch.Tensor, kind: str) -> torch.Tensor:
        """Keys or values (`kind`) at `slots` (B, L) as (B, Hkv, L, D | Dv) contiguous; slot -1 reads as 0."""
        pool = self.key if kind == "key" else self.value
        slots_or_0 = slots.clamp(min=0)
        tokens = pool[slots_or_0 // pool.shape[1], slots_or_0 % pool.shape[1]]
        return tokens.masked_fill_((slots < 0)[:, :, None, None], 0).transpose(1, 2).contiguous()


def _strides(shape: torch.Size) -> tuple[int, ...]:
    _, heads, dim = shape
    return heads * dim, dim, 1
