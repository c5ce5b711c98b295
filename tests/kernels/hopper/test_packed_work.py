"""The list of query tiles of packed rows: every tile once, none beyond, those with most keys first."""

import pytest
import torch

pytest.importorskip("triton")

from hf_paged_flash.kernels.hopper.packed_work import plan_packed  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = 128


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)




@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 1)],
        [(300, 300), (1, 1000), (0, 17), (128, 128), (5000, 5003), (64, 0), (129, 700), (700, 33), (700, 33)],
        [(128, 128)] * 5,
        [(0, 4), (0, 4)],
        [((37 * i) % 400, (53 * i) % 600) for i in range(70)],
    ],
    ids=["one", "mixed", "alike", "none", "more than a block"],
)
def test_every_tile_once_longest_first(lengths, causal):
    total_q = sum(q for q, _ in lengths)
    work = plan_packed(
        bounds([q for q, _ in lengths]), bounds([k for _, k in lengths]), total_q, rows=ROWS, causal=causal
    ).tolist()
    expected = {(row, tile) for row, (q, _) in enumerate(lengths) for tile in range(-(-q // ROWS))}
    assert work[:2] == [0, len(expected)]
    listed = list(zip(work[2 : 2 + 2 * len(expected) : 2], work[3 : 3 + 2 * len(expected) : 2], strict=True))
    assert set(listed) == expected
    # keys that a tile sees; by the diagonal alone where causal, as if its last tile were whole
    keys = [lengths[row][1] - causal * (lengths[row][0] - (tile + 1) * ROWS) for row, tile in listed]
    assert keys == sorted(keys, reverse=True)
