"""Which probabilities attention's dropout keeps: Philox numbers by seed and place, the same in kernels and reference.

Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the seed as its key and
(query, key, head, batch row) as its counter; of the four results the first is used. A probability is dropped if the
upper 24 bits are below p * 2^24. So the mask depends on no tile size and no layout, and backward makes it anew.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_ROUNDS = 10


def draw_seed(device: torch.device) -> torch.Tensor:
    """(1,) int64 from torch's generator of `device`: reproducible by torch.manual_seed, without a device sync."""
    return torch.randint(0, 1 << 62, (1,), dtype=torch.int64, device=device)


def threshold(dropout_p: float) -> int:
    """The smallest upper 24 bits that are kept."""
    return min(int(dropout_p * (1 << 24)), 1 << 24)


def keep(seed: torch.Tensor, dropout_p: float, query, key, head, row) -> torch.Tensor:
    """bool, True where a probability stays; int64 indices that broadcast against each other."""
    return (philox(seed, query, key, head, row) >> 8) >= threshold(dropout_p)


def philox(seed: torch.Tensor, c0, c1, c2, c3) -> torch.Tensor:
    """The first of Philox 4x32-10's four results, as int64 in [0, 2^32); `seed` int64 (1,), counters int64 tensors."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        high_b, low_b = _multiply(0xCD9E8D57, c2)
        high_a, low_a = _multiply(0xD2511F53, c0)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0


def _multiply(constant: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper and lower 32 bits of a product of 32-bit numbers, which int64 can't hold at once."""
    low, high = constant & 0xFFFF, constant >> 16
    by_low, by_high = x * low, x * high
    upper = (by_high + (by_low >> 16)) >> 16
    return upper, (by_low + ((by_high & 0xFFFF) << 16)) & _MASK
