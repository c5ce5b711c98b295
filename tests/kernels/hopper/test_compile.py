"""Hopper's kernels compile for sm_90 without a GPU: no spills in its loops, no product that waits for another.

Compiled in a process of its own, as Triton's interpreter may be on in this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def spills_in_key_loops(cubin: bytes) -> int:
    """Accesses to local memory in the loops over keys; a block's loop over its work may keep a few values there."""
    from tests.kernels.compile_kernels import disassembled, loops_of, spills_within

    code = disassembled(cubin)
    loops = loops_of(code)

    def holds(loop, other):
        return loop != other and loop[0] <= other[0] and other[1] <= loop[1]

    innermost = [loop for loop in loops if not any(holds(loop, other) for other in loops)]
    if not any(first <= address <= last and "HGMMA" in text for first, last in innermost for address, text in code):
        raise RuntimeError("no loop with products was found")
    return spills_within(code, innermost)


def launch(case) -> None:
    """Calls the launcher on tensors without storage."""
    import torch

    from hf_paged_flash.kernels import hopper
    from hf_paged_flash.kernels.hopper.flash_backward import flash_backward
    from hf_paged_flash.kernels.hopper.flash_forward import flash_forward

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[case.dtype]
    batch = () if case.packed else (2,)
    q = torch.empty(*batch, 4096, 32, case.head_dim, dtype=dtype, device="meta")
    k, v = (torch.empty(*batch, 4096, 8, case.head_dim, dtype=dtype, device="meta") for _ in "kv")
    bounds = torch.empty(3, dtype=torch.int32, device="meta") if case.packed else None
    arguments = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "causal": case.causal}
    arguments |= {"max_seqlen_q": 4096, "max_seqlen_k": 4096, "softmax_scale": 0.1}
    if case.op == "flash_forward":
        assert hopper.supports(q, k, v, **arguments)
        flash_forward(q, k, v, **arguments)
    else:
        assert hopper.supports_backward(q, q, k, v, deterministic=False, **arguments)
        lse = torch.empty(*batch, 32, 4096, device="meta")
        flash_backward(q, lse, q, k, v, q, lse, **arguments)


def work(cases) -> None:
    """Prints a JSON line a compiled kernel."""
    from tests.kernels import compile_kernels

    compile_kernels._launch = launch
    compile_kernels._spills_in_loops = spills_in_key_loops
    for case in cases:
        for record in compile_kernels.compile_case(compile_kernels.Case(90, **case)):
            print(json.dumps(record), flush=True)


def software_problem():
    """As in the compiling process, which has the interpreter off."""
    code = "from hf_paged_flash.kernels import hopper; print(hopper._software_problem() or '')"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout.strip()


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "PYTHONPATH": os.pathsep.join([str(ROOT), kept.get("PYTHONPATH", "")])}


CASES = [
    {"op": "flash_forward", "head_dim": 128, "dtype": "bf16", "causal": True},
    {"op": "flash_forward", "head_dim": 64, "dtype": "bf16", "causal": True, "packed": True},
    {"op": "flash_forward", "head_dim": 256, "dtype": "fp16", "causal": False},
    {"op": "flash_backward", "head_dim": 128, "dtype": "bf16", "causal": True},
    {"op": "flash_backward", "head_dim": 64, "dtype": "bf16", "causal": True, "packed": True},
    {"op": "flash_backward", "head_dim": 256, "dtype": "fp16", "causal": False},
]
MORE = [
    {"op": op, "head_dim": head_dim, "dtype": "bf16", "causal": causal, "packed": packed}
    for op in ("flash_forward", "flash_backward")
    for head_dim in (64, 128, 256)
    for causal in (True, False)
    for packed in (True, False)
]


@pytest.mark.parametrize(
    "cases", [pytest.param(CASES, id="a few"), pytest.param(MORE, id="all", marks=pytest.mark.slow)]
)
def test_kernels_fit_hopper(cases, tmp_path):
    pytest.importorskip("triton")
    problem = software_problem()
    if problem:
        pytest.skip(problem)
    command = [sys.executable, __file__, json.dumps(cases)]
    run = subprocess.run(
        command, env={**environment(), "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, timeout=280
    )
    assert not run.returncode, run.stderr[-3000:]
    records = [json.loads(line) for line in run.stdout.splitlines()]
    assert not [record["error"] for record in records if "error" in record]
    attention = [record for record in records if record["kernel"].endswith("hopper_kernel")]
    assert len(attention) == len(cases)
    for record in records:
        assert record["loop_spills"] == 0 and record["spills"] <= 128, record
        assert record["shared"] <= 232448, record
    for record in attention:
        assert record["tensor_cores"] and not record["warnings"], record


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
