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
    """What the choice depends on: compute capability (90 for 9.0), shared memory of a block, SM count, L2 bytes."""

    capability: int
    shared_memory: int
    num_sms: int
    l2_cache: int = 1 << 25


# A CPU under Triton's interpreter: small tiles and cache, so that tests reach every loop's edges with short sequences.
INTERPRETER = Device(capability=0, shared_memory=1 << 30, num_sms=4, l2_cache=1 << 14)


@lru_cache
def _cuda_device(index: int) -> Device:
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(index)
    major, minor = torch.cuda.get_device_capability(index)
    l2_cache = torch.cuda.get_device_properties(index).L2_cache_size
    return Device(major * 10 + minor, properties["max_shared_mem"], properties["multiprocessor_count"], l2_cache)


def device_of(tensor: torch.Tensor) -> Device:
    """The `Device` a kernel on `tensor` runs on."""
    if tensor.device.type != "cuda":
        return INTERPRETER
    index = tensor.device.index
    return _cuda_device(torch.cuda.current_device() if index is None else index)


# {largest padded head_dim: tiles}; tests/kernels/test_compile.py holds each against registers and shared memory.
# Hopper, measured: two or three blocks on an SM, so that one's softmax runs while another multiplies
_FORWARD_HOPPER = {
    64: (Tile(64, 128, 4, 2),),
    128: (Tile(64, 64, 4, 3),),
    256: (Tile(128, 64, 8, 2),),
    512: (Tile(64, 16, 8, 2),),
}
# an address for every key costs a warp more than the overlap brings, so that many warps share it
_FORWARD_HOPPER_SMALL_PAGES = {**_FORWARD_HOPPER, 128: (Tile(128, 128, 8, 2),)}
_FORWARD_BLACKWELL = {
    64: (Tile(128, 128, 8, 2),),
    128: (Tile(128, 128, 8, 2),),
    256: (Tile(128, 32, 8, 2),),
    512: (Tile(64, 16, 8, 2),),
}
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


def _forward_table(dtype: torch.dtype, capability: int, page_size: int) -> dict[int, tuple[Tile, ...]]:
    if capability == 0:
        return _FORWARD_INTERPRETER
    if dtype == torch.float32 or capability < 80:
        return _FORWARD_NO_TENSOR_CORES
    if capability < 90:
        return _FORWARD_AMPERE
    if capability < 100:
        return _FORWARD_HOPPER_SMALL_PAGES if 0 < page_size < 64 else _FORWARD_HOPPER
    return _FORWARD_BLACKWELL if capability < 120 else _FORWARD_GEFORCE_BLACKWELL


# biases and dropout take registers of their own
_FORWARD_MODIFIED = {
    64: (Tile(128, 64, 8, 2),),
    128: (Tile(64, 32, 8, 2),),
    256: (Tile(64, 32, 8, 2),),
    512: (Tile(32, 16, 8, 2),),
}


def forward_tile(
    block_d: int, block_dv: int, page_size: int, dtype: torch.dtype, device: Device, modified: bool = False
) -> Tile:
    """The forward kernel's tile for padded head dims `block_d` (K) and `block_dv` (V).

    `page_size` 0 = not paged; `modified`: with biases or dropout.
    """
    table = _forward_table(dtype, device.capability, page_size)
    if modified and dtype.itemsize == 2 and device.capability >= 80:
        table = _FORWARD_MODIFIED
    widest = max(block_d, block_dv)
    candidates = table[min(limit for limit in table if limit >= widest)]
    for tile in candidates:
        if _shared_memory(tile, block_d, block_dv, dtype.itemsize) <= device.shared_memory:
            return tile
    return candidates[-1]


def has_descriptors(dtype: torch.dtype, device: Device) -> bool:
    """Whether tiles of K and V are loaded by the copy engine (TMA, from Hopper on); small fp32 tiles are not."""
    return device.capability >= 90 and dtype.itemsize == 2


def head_sections(num_kv_heads: int, kv_bytes: int, device: Device) -> int:
    """Into how many sections, one after another, a row's heads are cut: K and V of each fit half the L2 cache.

    `kv_bytes` is what one KV head's keys and values take.
    """
    sections = 1
    while num_kv_heads % (2 * sections) == 0 and num_kv_heads // sections * kv_bytes > device.l2_cache // 2:
        sections *= 2
    return sections


def decode_tile(block_d: int, block_dv: int, rows: int, dtype: torch.dtype, device: Device) -> Tile:
    """The decode kernel's tile; `rows` is query tokens times the GQA group, packed into one tile of BLOCK_M rows."""
    widest = max(block_d, block_dv)
    block_m = min(64 if widest <= 256 else 32, max(16, 1 << (rows - 1).bit_length()))
    if device.capability == 0:
        return Tile(block_m, 32, 4, 1)
    if dtype == torch.float32 or device.capability < 80:
        block_m = min(block_m, 32)
        block_m = block_m if widest <= 256 else 16
        return Tile(block_m, 32, 4, 1) if widest <= 64 else Tile(block_m, 16, 8, 1)
    block_n = 64 if widest <= 128 else 32 if widest <= 256 else 16
    num_warps = 8 if (block_m == 64 and widest > 128) or widest > 256 else 4
    for num_stages in (3, 2, 1):
        tile = Tile(block_m, block_n, num_warps, num_stages)
        if _shared_memory(tile, block_d, block_dv, dtype.itemsize) <= device.shared_memory:
            return tile
    return Tile(16, 16, 4, 1)


# Hopper and Blackwell, for up to 16 query rows: {largest padded head_dim: programs of `decode_tile` that an SM runs at
# once, and other tiles with programs of those}, by their registers and shared memory
_DECODE_ROUNDS = {
    64: (5, ((4, Tile(16, 128, 4, 2)),)),
    128: (3, ((4, Tile(16, 32, 2, 4)), (2, Tile(16, 64, 4, 4)))),
    256: (3, ((1, Tile(16, 64, 4, 3)),)),
}
_LEAST_GAIN = 1.03  # in rounds, for which one of the others is taken


def decode_plan(
    row_heads: int, block_d: int, block_dv: int, rows: int, dtype: torch.dtype, device: Device
) -> tuple[Tile, int]:
    """The decode kernel's tile, and how many programs share a row's keys, at most.

    From sizes known without asking the device: `row_heads`, batch size times KV heads, and `rows` as in `decode_tile`.
    Two programs an SM keep the memory busy, or one of many rows: a row's keys are split until one round of so many is
    full, and no further. More programs run in rounds; the tile is the one that leaves less of its last round empty, if
    that is worth it: rounds of short rows run into each other. Fitted to times on an H100 and an H200: of 36 shapes of
    more than one round, with head_dim 128, all within 3 % of the best of up to ten tiles.
    """
    tile = decode_tile(block_d, block_dv, rows, dtype, device)
    programs = row_heads * -(-rows // tile.block_m)
    one_round = (1 if tile.block_m >= 64 else 2) * device.num_sms
    most_splits = max(1, min(128, one_round // programs))
    widest = max(block_d, block_dv)
    if tile.block_m > 16 or dtype.itemsize != 2 or not 90 <= device.capability < 120 or widest > 256:
        return tile, most_splits
    at_once, others = _DECODE_ROUNDS[min(limit for limit in _DECODE_ROUNDS if limit >= widest)]
    if programs > one_round:
        rounds = {each: _rounds(programs, n * device.num_sms) for n, each in ((at_once, tile), *others)}
        other = min((each for _, each in others), key=rounds.get)
        return (other if _LEAST_GAIN * rounds[other] < rounds[tile] else tile), 1
    if others[0][0] == 1:  # as many keys in flight as in two programs of the narrow tile
        for splits in range(1, min(most_splits, 2) + 1):
            if _rounds(programs * splits, device.num_sms) < 1.05:
                return others[0][1], splits
    return tile, most_splits


def _rounds(programs: int, at_once: int) -> float:
    """Time of the rounds in which `programs` run, over that of full ones."""
    full, rest = divmod(programs, at_once)
    rounds = full + (0.25 + 0.75 * rest / at_once if rest else 0)  # a last round loads less at a time
    return rounds * at_once / programs


def reduce_tile(splits: int, block_dv: int) -> tuple[int, int]:
    """How many splits' partial results the reduce kernel reads at once, and its warps."""
    block_s = max(16, min(16384 // block_dv, 1 << (splits - 1).bit_length()))
    return block_s, 2 if block_s * block_dv <= 2048 else 4
