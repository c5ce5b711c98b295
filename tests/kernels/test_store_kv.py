"""kernels/store_kv.py: every token's keys and values reach their slot bit by bit, and no other slot changes."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from hf_paged_flash.kernels.store_kv import store_kv  # noqa: E402
from tests.kernels.attention_problem import DTYPES, head_dims, strided  # noqa: E402
from tests.kernels.pairwise import pairwise  # noqa: E402


def _last_dim_strided(x):
    return x.mT.contiguous().mT


SOURCES = {
    "contiguous": torch.Tensor.contiguous,
    "head-major": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "strided": strided,
    "transposed": _last_dim_strided,
    "packed": lambda x: x.flatten(0, 1),
}
CASES = pairwise(
    {
        "dims": (16, 24, 40, 64, 80, 128, 256, (192, 128), (64, 72)),
        "kv_heads": (1, 2, 3, 8),
        "block_size": (16, 32, 64, 128, 256),
        "source": tuple(SOURCES),
        "dtype": ("fp32", "fp16", "bf16"),
        "cache": ("contiguous", "strided"),
        "tokens": ((2, 7), (1, 1), (3, 1), (1, 33)),
    }
)
GPU_CASES = pairwise(
    {
        "dims": (64, 128, (192, 128)),
        "dtype": ("fp32", "fp16", "bf16"),
        "source": ("head-major", "strided", "packed"),
        "cache": ("contiguous", "strided"),
        "kv_heads": (8,),
        "block_size": (16,),
        "tokens": ((4, 300),),
    }
)


def normal(*shape, dtype, device):
    return torch.randn(shape, dtype=torch.float32).to(device, DTYPES[dtype])


def test_stores_into_slots(case, device):
    head_dim, v_head_dim = head_dims(case["dims"])
    batch, seqlen = case["tokens"]
    heads, block_size, dtype = case["kv_heads"], case["block_size"], case["dtype"]
    tokens = batch * seqlen
    num_blocks = -(-tokens // block_size) + 3
    k = normal(batch, seqlen, heads, head_dim, dtype=dtype, device=device)
    v = normal(batch, seqlen, heads, v_head_dim, dtype=dtype, device=device)
    slots = torch.randperm(num_blocks * block_size)[:tokens]
    slots[torch.rand(tokens) < 0.2] = -1
    slots = slots.to(device)
    arrange = strided if case["cache"] == "strided" else torch.Tensor.contiguous
    caches, expected = [], []
    for x in (k, v):
        cache = arrange(x.new_full((num_blocks, block_size, heads, x.shape[-1]), math.nan))
        caches.append(cache)
        expected.append(cache.clone().flatten(0, 1))
        expected[-1][slots[slots >= 0]] = x.flatten(0, 1)[slots >= 0]
    source = SOURCES[case["source"]]
    store_kv(source(k), source(v), *caches, slots)
    for cache, same in zip(caches, expected, strict=True):
        assert torch.equal(bits(cache.flatten(0, 1)), bits(same))


def bits(x):
    """Two NaN of the same bits are equal."""
    return x.contiguous().view(torch.uint8)


def test_nothing_to_store(device):
    cache = torch.zeros(2, 16, 2, 16, device=device)
    for batch in (0, 1):
        new = torch.ones(batch, 5, 2, 16, device=device)
        store_kv(new, new, cache, cache, torch.full((batch * 5,), -1, dtype=torch.int64, device=device))
    assert (cache == 0).all()


def test_a_slot_beyond_2_to_31_elements(far_pool, device):
    from tests.kernels.attention_problem import make_problem

    row = {"dims": 16, "heads": (1, 1), "mask": "causal", "dtype": "fp16", "device": device}
    k_cache, v_cache, table = far_pool(make_problem([(1, 32)], **row), 16)
    new = make_problem([(1, 2)], seed=1, **row)
    last = int(table[0, 0])
    slots = torch.tensor([last * 16 + 5, 3], device=device)
    store_kv(new.k[0], new.v[0], k_cache, v_cache, slots)
    for cache, x in ((k_cache, new.k[0]), (v_cache, new.v[0])):
        assert torch.equal(cache[last, 5], x[0]) and torch.equal(cache[0, 3], x[1])
