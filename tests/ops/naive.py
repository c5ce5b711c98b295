"""K/V in the layouts that the operations take, and one row's attention; for tests."""

from __future__ import annotations

import math

import torch

from tests.naive import attention as naive_row  # noqa: F401


def paged(k, v, lengths, block_size, *, spare=3):
    """Dense k, v (B, S, H, D) in scattered blocks, and the table (B, max_blocks).

    Unused slots are NaN, and so is block 0, where an entry of -1 would read if it were taken as an address.
    """
    needed = [-(-n // block_size) for n in lengths]
    order = 1 + torch.randperm(sum(needed) + spare, generator=torch.Generator().manual_seed(sum(lengths)))
    table = torch.full((len(lengths), max(needed) + 1), -1, dtype=torch.int32)
    blocks = 1 + len(order)
    k_cache, v_cache = (torch.full((blocks, block_size, *x.shape[2:]), math.nan, dtype=x.dtype) for x in (k, v))
    for b, length in enumerate(lengths):
        for n in range(needed[b]):
            block, order = int(order[0]), order[1:]
            table[b, n] = block
            used = min(block_size, length - n * block_size)
            k_cache[block, :used] = k[b, n * block_size : n * block_size + used]
            v_cache[block, :used] = v[b, n * block_size : n * block_size + used]
    return k_cache, v_cache, table


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
