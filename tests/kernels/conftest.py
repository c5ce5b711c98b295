"""Kernels run in Triton's interpreter on CPU tensors, or compiled on a GPU's tensors: never both in one process.

A test that takes `case` runs with each of its module's CASES in the interpreter and each of its GPU_CASES on a GPU.
"""

from __future__ import annotations

import pytest
import torch

from tests.kernels.attention_problem import case_id

_INTERPRETER = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU kernels are compiled, see `-m gpu`")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = [pytest.param(case, "cpu", id=case_id(case), marks=_INTERPRETER) for case in metafunc.module.CASES]
        for case in metafunc.module.GPU_CASES:
            cases.append(pytest.param(case, "cuda", id=f"cuda-{case_id(case)}", marks=pytest.mark.gpu))
        metafunc.parametrize("case, device", cases)
    elif "device" in metafunc.fixturenames:
        devices = [pytest.param("cpu", marks=_INTERPRETER), pytest.param("cuda", marks=pytest.mark.gpu)]
        metafunc.parametrize("device", devices)


@pytest.fixture(autouse=True)
def fresh_buffers_are_nan(monkeypatch):
    """What a kernel forgets to write is NaN, never a zero by luck."""
    new_empty = torch.Tensor.new_empty

    def new_nan(self, *size, **options):
        buffer = new_empty(self, *size, **options)
        return buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer

    monkeypatch.setattr(torch.Tensor, "new_empty", new_nan)


@pytest.fixture
def far_pool(tmp_path):
    """Pools whose last block lies beyond 2^31 elements, in storage that is mostly never touched: call for K and V of
    a one-row problem of two blocks, get k_cache, v_cache and the block table [[last, 0]]."""
    blocks, block_stride = 2200, 1 << 20
    assert (blocks - 1) * block_stride > 1 << 31

    def pool(name, row, block_size):
        elements = (blocks - 1) * block_stride + block_size * row.shape[1] * row.shape[2]
        if row.is_cuda:
            storage = torch.empty(elements, dtype=row.dtype, device=row.device)
        else:
            storage = torch.from_file(str(tmp_path / name), shared=True, size=elements, dtype=row.dtype)
        strides = (block_stride, row.shape[1] * row.shape[2], row.shape[2], 1)
        cache = storage.as_strided((blocks, block_size, *row.shape[1:]), strides)
        cache[-1], cache[0] = row[:block_size], row[block_size:]
        return cache

    def pools(problem, block_size):
        table = torch.tensor([[blocks - 1, 0]], dtype=torch.int32, device=problem.device)
        return pool("k", problem.k[0], block_size), pool("v", problem.v[0], block_size), table

    return pools
