"""Tile tables: what each kernel launches with, by head_dim, dtype and the GPU's shared memory.

Tables, never an autotune: a user's first step must not time candidates, and a result must not depend on what ran
before. Rows are ordered by preference; the first whose tiles fit the GPU's shared memory is taken.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Tile:
    """BLOCK_M query rows times BLOCK_N keys a step, with Triton's num_warps and num_stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Device:
    """What the choice depends on: compute capability (90 for 9.0), shared memory a block may use, SM count."""

    capability: int
    shared_memory: int
    num_sms: int


# A CPU under Triton's interpreter: small tiles, so that tests reach the loops' edges with short sequences.
INTERPRETER = Device(capability=0, shared_memory=1 << 30, num_sms=4)


@lru_cache
def _cuda_device(index: int) -> Device:
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(index)
    major, minor = torch.cuda.get_device_capability(index)
    return Device(major * 10 + minor, properties["max_shared_mem"], properties["multiprocessor_count"])


def device_of(tensor: torch.Tensor) -> Device:
    """The `Device` a kernel on `tensor` runs on."""
    if tensor.device.type != "cuda":
        return INTERPRETER
    index = tensor.device.index
    return _cuda_device(torch.cuda.current_device() if index is None else index)


# {largest padded head_dim: tiles}; tests/kernels/test_compile.py holds each against registers and shared memory
_FORWARD_HOPPER = {
    64: (Tile(128, 128, 8, 2),),
    128: (Tile(128, 128, 8, 2),),
    256: (Tile(128, 64, 8, 2),),
    512: (Tile(64, 16, 8, 2),),
}
_FORWARD_BLACKWELL = {**_FORWARD_HOPPER, 256: (Tile(128, 32, 8, 2),)}
_FORWARD_AMPERE = {
    64: (Tile(128, 64, 4, 3),),
    128: (Tile(128, 32, 8, 3),),
    256: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
    512: (Tile(32, 32, 8, 1), Tile(32, 16, 8, 1)),
}
_FORWARD_GEFORCE_BLACKWELL = {**_FORWARD_AMPERE, 64: (Tile(128, 64, 8, 3),)}
# fp32 keeps IEEE products, and Triton has no tensor cores before Ampere (since 3.3): operands fill the registers
_FORWARD_NO_TENSOR_CORES = {
    64: (Tile(64, 32, 8, 1),),
    128: (Tile(32, 32, 8, 1),),
    256: (Tile(32, 16, 8, 1),),
    512: (Tile(16, 16, 8, 1),),
}
_FORWARD_INTERPRETER = {512: (Tile(32, 32, 4, 1),)}


def _shared_memory(tile: Tile, block_d: int, block_dv: int, element_size: int) -> int:
    # the query tile and num_stages tiles of K and V
    return element_size * (tile.block_m * block_d + tile.num_stages * tile.block_n * (block_d + block_dv))


def _forward_table(dtype: torch.dtype, capability: int) -> dict[int, tuple[Tile, ...]]:
    if capability == 0:
        return _FORWARD_INTERPRETER
    if dtype == torch.float32 or capability < 80:
        return _FORWARD_NO_TENSOR_CORES
    if capability < 90:
        return _FORWARD_AMPERE
    if capability < 100:
        return _FORWARD_HOPPER
    return _FORWARD_BLACKWELL if capability < 120 else _FORWARD_GEFORCE_BLACKWELL


def forward_tile(block_d: int, block_dv: int, dtype: torch.dtype, device: Device) -> Tile:
    """The forward kernel's tile for padded head dims `block_d` (K) and `block_dv` (V)."""
    table = _forward_table(dtype, device.capability)
    widest = max(block_d, block_dv)
    candidates = table[min(limit for limit in table if limit >= widest)]
    for tile in candidates:
        if _shared_memory(tile, block_d, block_dv, dtype.itemsize) <= device.shared_memory:
            return tile
    return candidates[-1]


def has_descriptors(dtype: torch.dtype, device: Device) -> bool:
    """Whether tiles of K and V are loaded by the copy engine (TMA, from Hopper on); fp32 tiles are small and are not."""
    return device.capability >= 90 and dtype.itemsize == 2


def decode_tile(block_d: int, block_dv: int, rows: int, dtype: torch.dtype, device: Device) -> Tile:
    """The decode kernel's tile; `rows` is query tokens times the GQA group, packed into one tile of BLOCK_M rows."""
    widest = max(block_d, block_dv)
    block_m = min(64 if widest <= 256 else 32, max(16, 1 << (rows - 1).bit_length()))
    if device.capability == 0:
        return Tile(block_m, 32, 4, 1)
    if dtype == torch.float32 or device.capability < 80:
        block_m = min(block_m, 32)
        block_m = block_m if widest <= 256 else 16
        return Tile(block_m, 32, 4, 1) if widest <= 64 else Tile(block_m, 16, block_m // 4, 1)
    block_n = 64 if widest <= 128 else 32 if widest <= 256 else 16
    num_warps = 8 if (block_m == 64 and widest > 128) or widest > 256 else 4
    for num_stages in (3, 2, 1):
        tile = Tile(block_m, block_n, num_warps, num_stages)
        if _shared_memory(tile, block_d, block_dv, dtype.itemsize) <= device.shared_memory:
            return tile
    return Tile(16, 16, 4, 1)


def decode_splits(num_programs: int, device: Device) -> int:
    """How many programs share one row's keys, from sizes known without asking the device; `num_programs` without splits."""
    return max(1, min(-(-4 * device.num_sms // num_programs), 128))


REDUCE_WARPS = 8


def reduce_block(splits: int) -> int:
    """How many splits' partial results the reduce kernel reads at once."""
    return max(16, min(128, 1 << (splits - 1).bit_length()))
