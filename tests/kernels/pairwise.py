"""A small set of parameter combinations in which every pair of values of two factors occurs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

_CANDIDATES = 40


def pairwise(
    factors: dict[str, Sequence], *, seed: int = 0, allowed: Callable[[dict], bool] = lambda case: True
) -> list[dict]:
    """Combinations {factor: value} that cover every allowed pair of values; the same for the same seed.

    Greedy (as AETG, Cohen et al. 1997): each next combination holds one pair not yet seen and, of some random ways to
    fill in the rest, the one with most other unseen pairs. A pair for which none is found that is allowed is dropped.
    """
    rng = random.Random(seed)
    names = list(factors)
    unseen = {
        ((a, i), (b, j)): None
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    chosen = []
    while unseen:
        pair = next(iter(unseen))
        best, best_pairs = None, set()
        for _ in range(_CANDIDATES):
            indices = {name: rng.randrange(len(factors[name])) for name in names} | dict(pair)
            if not allowed({name: factors[name][index] for name, index in indices.items()}):
                continue
            pairs = {p for p in itertools.combinations(indices.items(), 2) if p in unseen}
            if len(pairs) > len(best_pairs):
                best, best_pairs = indices, pairs
        for p in best_pairs or {pair}:
            del unseen[p]
        if best:
            chosen.append({name: factors[name][index] for name, index in best.items()})
    return chosen
