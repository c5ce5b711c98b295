"""Tile tables of the backward kernels, as in configs.py, by the largest padded head_dim.

dK/dV keep BLOCK_N keys in registers and walk over queries, dQ the other way round. Two accumulators, S and dP at once
fill the registers long before the shared memory: tests/kernels/test_compile.py holds every row against spills.
"""

import torch

from ..errors import UnsupportedFeatureError
from .configs import Device, Tile

# dK/dV's rows: one tile, or two of launches of their own, dK's and dV's: half the accumulators for Q K^T once more
_DKV = dict[int, tuple[Tile, ...]]
_DQ = dict[int, Tile]

# Hopper, measured
_DKV_HOPPER: _DKV = {
    64: (Tile(64, 64, 4, 3),),
    128: (Tile(64, 128, 8, 3),),
    256: (Tile(32, 128, 8, 2), Tile(32, 128, 8, 3)),
}
_DQ_HOPPER: _DQ = {64: Tile(64, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 3)}
_DQ_HOPPER_MODIFIED: _DQ = {64: Tile(64, 64, 4, 2), 128: Tile(128, 32, 8, 2), 256: Tile(128, 32, 8, 2)}
_DKV_HOPPER_MODIFIED: _DKV = {128: (Tile(32, 128, 8, 2),), 256: (Tile(32, 128, 8, 2),) * 2}
# a bias changes its layout between products, which ptxas would serialise if they were in flight then
_DKV_HOPPER_BIASED: _DKV = {128: (Tile(32, 128, 8, 1),), 256: (Tile(32, 128, 8, 1),) * 2}
_DKV_BLACKWELL: _DKV = {64: (Tile(32, 128, 8, 2),), 128: (Tile(32, 32, 8, 2),), 256: (Tile(32, 32, 8, 1),)}
_DQ_BLACKWELL: _DQ = {64: Tile(128, 128, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2)}
_DKV_AMPERE: _DKV = {64: (Tile(32, 128, 8, 2),), 128: (Tile(32, 64, 8, 2),), 256: (Tile(32, 32, 8, 1),)}
_DQ_AMPERE: _DQ = {64: Tile(128, 64, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 1)}
# no tensor cores: IEEE products of fp32, into which fp16 is brought before Ampere, where its operands would spill
_DKV_FP32: _DKV = {64: (Tile(32, 32, 8, 1),), 128: (Tile(16, 32, 8, 1),), 256: (Tile(16, 16, 8, 1),)}
_DQ_FP32: _DQ = {64: Tile(32, 32, 8, 1), 128: Tile(16, 32, 8, 1), 256: Tile(16, 16, 8, 1)}
_DKV_INTERPRETER: _DKV = {128: (Tile(32, 32, 4, 1),), 512: (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1))}
_DQ_INTERPRETER: _DQ = {512: Tile(32, 32, 4, 1)}


def _tables(dtype: torch.dtype, capability: int) -> tuple[_DKV, _DQ]:
    if capability == 0:
        return _DKV_INTERPRETER, _DQ_INTERPRETER
    if dtype == torch.float32 or capability < 80:
        return _DKV_FP32, _DQ_FP32
    if capability < 90 or capability >= 120:
        return _DKV_AMPERE, _DQ_AMPERE
    return (_DKV_HOPPER, _DQ_HOPPER) if capability < 100 else (_DKV_BLACKWELL, _DQ_BLACKWELL)


def _row(table: dict, block_d: int, block_dv: int):
    return table[min(limit for limit in table if limit >= max(block_d, block_dv))]


def compute_dtype(block_d: int, block_dv: int, dtype: torch.dtype, device: Device) -> torch.dtype:
    """The dtype that the kernels should load.

    Raises:
        UnsupportedFeatureError: the tiles for these head dims do not fit a GPU before Ampere.
    """
    if device.capability == 0 or device.capability >= 80:
        return dtype
    if max(block_d, block_dv) > 128:
        raise UnsupportedFeatureError(
            "hf_paged_flash has no backward kernel for a head_dim above 128 on GPUs before Ampere: train with the "
            "'sdpa' attention, or choose the backend 'reference'"
        )
    return torch.float32


def dkv_launches(
    block_d: int, block_dv: int, dtype: torch.dtype, device: Device, *, biased: bool = False, modified: bool = False
) -> tuple[tuple[Tile, bool, bool], ...]:
    """(tile, with dK, with dV) of each launch of the dK/dV kernel for padded head dims `block_d` (K), `block_dv` (V).

    `biased`: with a bias or ALiBi; `modified`: with dropout or a softcap.
    """
    table = _tables(dtype, device.capability)[0]
    if table is _DKV_HOPPER:
        table = _DKV_HOPPER_BIASED if biased else _DKV_HOPPER_MODIFIED if modified else table
    elif biased or modified:  # they take registers: the tile of heads twice as wide
        block_d, block_dv = (min(2 * block, max(table)) for block in (block_d, block_dv))
    tiles = _row(table, block_d, block_dv)
    if len(tiles) == 1:
        return ((tiles[0], True, True),)
    return (tiles[0], True, False), (tiles[1], False, True)


def dq_tile(block_d: int, block_dv: int, dtype: torch.dtype, device: Device, *, modified: bool = False) -> Tile:
    """The dQ kernel's tile for padded head dims `block_d` (K), `block_dv` (V); `modified`: with biases, too."""
    table = _tables(dtype, device.capability)[1]
    return _row(_DQ_HOPPER_MODIFIED if modified and table is _DQ_HOPPER else table, block_d, block_dv)
