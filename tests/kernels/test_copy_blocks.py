"""kernels/copy_blocks.py: each target block becomes its source bit by bit in every tensor, and no other changes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from hf_paged_flash import ArgumentError, backend, counters, ops  # noqa: E402
from hf_paged_flash.kernels.copy_blocks import copy_blocks  # noqa: E402
from hf_paged_flash.ops import reference  # noqa: E402

BLOCKS = 11


def pools(device: str) -> list[torch.Tensor]:
    """Keys and values of layers that differ in heads, dims and dtype, one with room between its blocks."""
    shapes = [(16, 2, 64), (16, 2, 16), (32, 1, 24), (16, 8, 40)]
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    made = [
        torch.randn(BLOCKS, *shape, device=device).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    return [*made, torch.randn(BLOCKS, 3, 16, 2, 64, device=device)[:, 1]]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("copies", [[(3, 7)], [(0, 10), (0, 2), (9, 1), (5, 4)]], ids=["one", "four"])
def test_blocks_are_copied(copies, device):
    copies = torch.tensor(copies, device=device)
    ours, expected = pools(device), None
    ours[0][0] = float("nan")  # bits, not numbers
    expected = [x.clone() for x in ours]
    reference.copy_blocks(expected, copies)
    assert not torch.equal(bits(expected[0]), bits(ours[0]))
    copy_blocks(ours, copies)
    for x, y in zip(ours, expected, strict=True):
        assert torch.equal(bits(x), bits(y))


def test_reference_copies_what_was_there():
    caches = [torch.arange(BLOCKS * 4.0).view(BLOCKS, 4), torch.arange(BLOCKS).view(BLOCKS, 1)]
    reference.copy_blocks(caches, torch.tensor([[2, 5], [2, 0]]))
    assert caches[1][:, 0].tolist() == [2, 1, 2, 3, 4, 2, 6, 7, 8, 9, 10]
    assert caches[0][5].tolist() == caches[0][0].tolist() == [8.0, 9.0, 10.0, 11.0]


def test_nothing_to_copy(device):
    caches = pools(device)
    before = [x.clone() for x in caches]
    copy_blocks(caches, torch.zeros((0, 2), dtype=torch.int64, device=device))
    copy_blocks([], torch.tensor([[0, 1]], device=device))
    assert all(torch.equal(bits(x), bits(y)) for x, y in zip(caches, before, strict=True))


@pytest.mark.parametrize(
    "cache", [torch.zeros(4, 16, 3, 4).transpose(1, 2), torch.zeros(4, 3, dtype=torch.int16)], ids=["gaps", "words"]
)
def test_blocks_the_kernel_cannot_take_are_refused(cache, device):
    before = backend.backend()
    backend.configure(backend="triton")
    try:
        with pytest.raises(ArgumentError, match="`caches` must hold contiguous blocks of whole words of 8 bytes"):
            ops.copy_blocks([cache.to(device)], torch.tensor([[0, 1]], device=device))
    finally:
        backend.configure(backend=before)


def test_the_op_runs_the_kernel_and_counts_it(device):
    before = backend.backend()
    backend.configure(backend="triton")
    backend.reset_counters()
    try:
        caches = pools(device)
        ops.copy_blocks(caches, torch.tensor([[1, 2]], device=device))
        assert counters().kernel == {"copy_blocks": 1}
        assert torch.equal(bits(caches[0][1]), bits(caches[0][2]))
    finally:
        backend.configure(backend=before)
        backend.reset_counters()
