"""Tile tables of the backward kernels; see configs.py."""

import torch

from .configs import Device, Tile

# Backward: {largest padded head_dim: tiles}; dK/dV keep BLOCK_N keys and walk over queries, dQ the other way round
_DKV_HOPPER = {
    64: (Tile(64, 128, 8, 2),),
    128: (Tile(64, 128, 8, 2),),
    256: (Tile(32, 64, 8, 2),),
}
_DQ_HOPPER = {
    64: (Tile(128, 128, 8, 2),),
    128: (Tile(128, 128, 8, 1), Tile(128, 64, 8, 2)),
    256: (Tile(128, 32, 8, 2),),
}


def dkv_tile(block_d: int, block_dv: int, dtype: torch.dtype, device: Device) -> Tile:
    """The dK/dV kernel's tile."""
    if device.capability == 0:
        return Tile(32, 32, 4, 1)
    return _DKV_HOPPER[min(limit for limit in _DKV_HOPPER if limit >= max(block_d, block_dv))][0]


def dq_tile(block_d: int, block_dv: int, dtype: torch.dtype, device: Device) -> Tile:
    """The dQ kernel's tile."""
    if device.capability == 0:
        return Tile(32, 32, 4, 1)
    return _DQ_HOPPER[min(limit for limit in _DQ_HOPPER if limit >= max(block_d, block_dv))][0]
