"""The kernels' cases cover every pair of values that a case may hold."""

import itertools

from tests.kernels.pairwise import pairwise

FACTORS = {"a": (1, 2, 3, 4), "b": ("x", "y", "z"), "c": (True, False), "d": tuple(range(5))}


def pairs(cases):
    return {((m, case[m]), (n, case[n])) for case in cases for m, n in itertools.combinations(FACTORS, 2)}


def test_every_pair_occurs():
    cases = pairwise(FACTORS)
    product = [dict(zip(FACTORS, values, strict=True)) for values in itertools.product(*FACTORS.values())]
    assert pairs(cases) == pairs(product)
    assert len(cases) < len(product) / 3
    assert cases == pairwise(FACTORS) != pairwise(FACTORS, seed=1)


def test_what_is_not_allowed_does_not_occur():
    cases = pairwise(FACTORS, allowed=lambda case: not (case["a"] == 2 and case["c"]))
    missing = pairs(pairwise(FACTORS)) - pairs(cases)
    assert missing == {(("a", 2), ("c", True))}
