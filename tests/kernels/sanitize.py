"""Runs every kernel on small shapes under NVIDIA's compute-sanitizer: out-of-bounds accesses and shared-memory races.

    python -m tests.kernels.sanitize                          all kernels, both tools; needs a GPU and the CUDA toolkit
    python -m tests.kernels.sanitize --match hopper --jobs 4  those whose name contains a string
    python -m tests.kernels.sanitize --record                 and a row each in eval/results/sanitize.jsonl

Each kernel and tool is a process of its own, which also compares the results with the reference's. torch's caching
allocator is off there, so that an access behind a tensor leaves its allocation.

racecheck follows barriers of threads, but neither mbarriers nor the barriers with which Triton hands a kernel's
arguments to its warp groups: of Hopper's kernels it reports what these order. `hopper_handover`, a kernel that does
nothing but hand one number over in both ways, shows it; what such pairs of lines explain is counted as `explained`.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from hf_paged_flash.eval.results import Recorder, results_folder
from hf_paged_flash.kernels import hopper
from hf_paged_flash.ops import reference, reference_backward, reference_layers

TOOLS = ("memcheck", "racecheck")
SUMMARY = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: (\d+) hazard"),
}
RACE = re.compile(r"(?:Race reported between|    and) (?:Read|Write) access at (\w+)\+0x\w+ in (\w+\.py):(\d+)")
# {functions that both accesses lie in: why that is no race}
EXPLAINED = {
    frozenset({"flash_forward_hopper_kernel"}): "arguments handed to the warp groups by Triton's barriers",
    frozenset({"flash_backward_hopper_kernel"}): "arguments handed to the warp groups by Triton's barriers",
    frozenset({"handover_kernel"}): "arguments handed to the warp groups by Triton's barriers",
    frozenset({"_draw", "_consume"}): "the next item of work, handed over by mbarriers",
    frozenset({"_hand_over", "_take_over"}): "a number, handed over by mbarriers",
    frozenset({"_zero_tail"}): "every consumer writes the same zeros, and the other values back as they were",
}
DTYPE = torch.bfloat16
# rows that end within a tile, one without queries' tiles to spare, one with fewer keys than queries
LENGTHS = ((130, 130), (1, 77), (67, 200), (90, 33))


def _random(*shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.randn(shape).to(dtype or DTYPE)


def _packed(head_dim: int, heads: int = 4, kv_heads: int = 2) -> tuple[list[torch.Tensor], dict]:
    """q, k, v of LENGTHS one after another, and the launchers' options."""
    total_q, total_k = (sum(x) for x in zip(*LENGTHS, strict=True))
    tensors = [_random(total_q, heads, head_dim), *(_random(total_k, kv_heads, head_dim) for _ in range(2))]
    bounds = [torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in zip(*LENGTHS, strict=True)]
    options = {"cu_seqlens_q": bounds[0], "cu_seqlens_k": bounds[1], "max_seqlen_q": 130, "max_seqlen_k": 200}
    return tensors, {**options, "softmax_scale": head_dim**-0.5}


def _dense(head_dim: int, seqlen: int = 197, heads: int = 4, kv_heads: int = 2) -> tuple[list[torch.Tensor], dict]:
    tensors = [_random(2, seqlen, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    return tensors, {"max_seqlen_q": seqlen, "max_seqlen_k": seqlen, "softmax_scale": head_dim**-0.5}


def _moved(x, device: str):
    return x.to(device) if isinstance(x, torch.Tensor) else x


def _compare(launcher: Callable, plain: Callable, device: str, tensors: list, options: dict) -> None:
    """Launches on copies, so that no other kernel has made the inputs, and compares all results."""
    moved = {name: _moved(x, device) for name, x in options.items()}
    actual = launcher(*(_moved(x, device) for x in tensors), **moved)
    expected = plain(*tensors, **options)
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        if y is not None:
            error = f"result {i} of {launcher.__module__}"
            torch.testing.assert_close(
                x.cpu().float(), y.float(), rtol=0.05, atol=0.05, msg=lambda m, e=error: f"{e}: {m}"
            )


def _portable(call: Callable) -> None:
    before = hopper.unavailable
    hopper.unavailable = lambda device: "the portable kernels are checked"
    try:
        call()
    finally:
        hopper.unavailable = before


def _check_backward(launcher: Callable, device: str, tensors: list, options: dict) -> None:
    out, lse = reference.flash_forward(*tensors, **options)
    dout = _random(*out.shape)
    wants_bias = {"bias_needs_grad": True} if options.get("bias") is not None else {}
    arguments = [dout, torch.randn(lse.shape).masked_fill(lse == -float("inf"), 0.0), *tensors, out, lse]
    _compare(launcher, reference_backward.flash_backward, device, arguments, {**options, **wants_bias})


EVERYTHING = {"causal": True, "window_left": 50, "softcap": 5.0}


def forward(device: str) -> None:
    from hf_paged_flash.kernels.flash_forward import flash_forward

    for head_dim in (64, 128, 256):
        for make, options in ((_dense, {"causal": True}), (_packed, EVERYTHING | {"s_aux": _random(4)})):
            tensors, shared = make(head_dim)
            _compare(flash_forward, reference.flash_forward, device, tensors, shared | options)
    tensors, shared = _dense(64)
    modifiers = {"bias": _random(1, 4, 197, 197), "dropout_p": 0.2, "dropout_seed": torch.tensor([7])}
    _compare(flash_forward, reference.flash_forward, device, tensors, shared | {"causal": False} | modifiers)


def _paged(block_size: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """k_cache, v_cache in scattered blocks and their table."""
    blocks = -(-200 // block_size)
    table = torch.randperm(3 * blocks).to(torch.int32).view(3, blocks)
    pools = [_random(3 * blocks, block_size, 2, head_dim) for _ in range(2)]
    return *pools, {"block_table": table}


def paged_forward(device: str) -> None:
    from hf_paged_flash.kernels.flash_forward import flash_forward

    for block_size, head_dim in ((16, 128), (64, 64), (128, 256)):
        k, v, options = _paged(block_size, head_dim)
        options |= {"seqused_k": torch.tensor([200, 149, 1000], dtype=torch.int32), "softmax_scale": head_dim**-0.5}
        options |= {"max_seqlen_q": 70, "max_seqlen_k": 200, "causal": True}
        _compare(flash_forward, reference.flash_forward, device, [_random(3, 70, 4, head_dim), k, v], options)


def paged_decode(device: str) -> None:
    from hf_paged_flash.kernels.paged_decode import paged_decode as launcher

    for block_size, head_dim, splits in ((16, 128, 3), (64, 64, 1), (32, 256, 2)):
        k, v, options = _paged(block_size, head_dim)
        options |= {"cache_seqlens": torch.tensor([200, 149, 1], dtype=torch.int32), "softmax_scale": head_dim**-0.5}
        options |= {"causal": True, "num_splits": splits, "s_aux": _random(4)}
        _compare(launcher, reference.paged_decode, device, [_random(3, 2, 4, head_dim), k, v], options)


def store_kv(device: str) -> None:
    from hf_paged_flash.kernels.store_kv import store_kv as launcher

    k, v, slots = _random(2, 33, 3, 72), _random(2, 33, 3, 40), torch.randperm(80)[:66]
    slots[5] = -1
    caches = [_random(5, 16, 3, x.shape[-1]) for x in (k, v)]
    moved = [x.to(device) for x in caches]
    launcher(k.to(device), v.to(device), *moved, slots.to(device))
    reference.store_kv(k, v, *caches, slots)
    assert all(torch.equal(x.cpu(), y) for x, y in zip(moved, caches, strict=True))


def rms_norm(device: str) -> None:
    from hf_paged_flash.kernels.rms_norm import rms_norm as launcher

    for width in (72, 128, 4096):
        x, weight = _random(3, 2, width), _random(width)
        out = launcher(x.to(device), weight.to(device), 1e-6)
        torch.testing.assert_close(out.cpu(), reference_layers.rms_norm(x, weight, 1e-6), rtol=1e-2, atol=1e-2)


def swiglu(device: str) -> None:
    from hf_paged_flash.kernels.swiglu import swiglu as launcher

    for rows, width in ((3, 72), (1, 1024), (2, 3000)):
        gate, up = _random(rows, width), _random(rows, width)
        out = launcher(gate.to(device), up.to(device))
        torch.testing.assert_close(out.cpu(), reference_layers.swiglu(gate, up), rtol=1e-2, atol=1e-2)


def linear(device: str) -> None:
    from hf_paged_flash.kernels.linear import linear as launcher

    for rows, n, k in ((1, 7, 72), (2, 33, 2056), (1, 16, 4096)):
        x, weight, bias = _random(rows, k), _random(n, k), _random(n)
        out = launcher(x.to(device), weight.to(device), bias.to(device))
        torch.testing.assert_close(out.cpu(), reference_layers.linear(x, weight, bias), rtol=1e-2, atol=0.5)


def rotary(device: str) -> None:
    from hf_paged_flash.kernels.rotary import rotary as launcher

    for head_dim, rotary_dim in ((128, 128), (72, 24)):
        q, k = _random(2, 6, 3, head_dim), _random(2, 3, 3, head_dim)
        angles = [_random(2, 3, rotary_dim) for _ in range(2)]
        outs = launcher(*(x.to(device) for x in (q, k, *angles)))
        for out, expected in zip(outs, reference_layers.rotary(q, k, *angles), strict=True):
            torch.testing.assert_close(out.cpu(), expected, rtol=1e-2, atol=1e-2)


def copy_blocks(device: str) -> None:
    from hf_paged_flash.kernels.copy_blocks import copy_blocks as launcher

    caches, copies = [_random(5, 16, 3, head_dim) for head_dim in (72, 40)], torch.tensor([[4, 0], [4, 3], [1, 2]])
    moved = [x.to(device) for x in caches]
    launcher(moved, copies.to(device))
    reference.copy_blocks(caches, copies)
    assert all(torch.equal(x.cpu(), y) for x, y in zip(moved, caches, strict=True))


def backward(device: str) -> None:
    from hf_paged_flash.kernels.flash_backward import flash_backward

    for head_dim in (64, 128, 256):
        for make, options in ((_dense, {"causal": True}), (_packed, EVERYTHING | {"s_aux": _random(4)})):
            tensors, shared = make(head_dim)
            _check_backward(flash_backward, device, tensors, shared | options)


def modified_backward(device: str) -> None:
    """Biases and their gradient, ALiBi, dropout."""
    from hf_paged_flash.kernels.flash_backward import flash_backward

    for head_dim in (64, 256):
        tensors, shared = _packed(head_dim)
        modifiers = {"bias": _random(1, 4, 130, 200, dtype=torch.float32), "alibi_slopes": torch.rand(1, 4)}
        modifiers |= {"dropout_p": 0.2, "dropout_seed": torch.tensor([7]), "causal": True}
        _check_backward(flash_backward, device, tensors, shared | modifiers)


def hopper_forward(device: str) -> None:
    from hf_paged_flash.kernels.hopper.flash_forward import flash_forward

    for head_dim in hopper.HEAD_DIMS:
        for make, causal in ((_dense, True), (_dense, False), (_packed, True)):
            tensors, options = make(head_dim)
            _compare(flash_forward, reference.flash_forward, device, tensors, options | {"causal": causal})


def hopper_backward(device: str) -> None:
    from hf_paged_flash.kernels.hopper.flash_backward import flash_backward

    def first_three(*tensors, **options):
        return (*flash_backward(*tensors, **options)[:3], None, None)

    for head_dim in hopper.HEAD_DIMS:
        for make, causal in ((_dense, True), (_dense, False), (_packed, True)):
            tensors, options = make(head_dim)
            _check_backward(first_three, device, tensors, options | {"causal": causal})


def hopper_handover(device: str) -> None:
    """A control: what racecheck reports of two warp groups that only hand a number over."""
    from tests.kernels.hopper.handover import handover

    assert handover(device) == 7


PORTABLE = (
    forward, paged_forward, paged_decode, store_kv, copy_blocks, rms_norm, rotary, swiglu, linear,
    backward, modified_backward,
)  # fmt: skip
CASES = {case.__name__: case for case in (*PORTABLE, hopper_forward, hopper_backward, hopper_handover)}


def run_case(name: str, device: str) -> None:
    """One case in this process, without a sanitizer unless the process runs under one."""
    torch.manual_seed(0)
    case = CASES[name]
    if case in PORTABLE:
        _portable(lambda: case(device))
    else:
        case(device)


def errors_found(tool: str, log: str) -> int:
    """The number that the sanitizer's summary tells.

    Raises:
        RuntimeError: the log has no summary.
    """
    found = SUMMARY[tool].findall(log)
    if not found:
        raise RuntimeError(f"compute-sanitizer printed no summary of {tool}: {log[-2000:]}")
    return max(map(int, found))


def explained_races(log: str) -> int:
    """How many of racecheck's reports only pair accesses of functions in `EXPLAINED`."""
    explained = 0
    for report in log.split("Error: Race reported between")[1:]:
        sides = RACE.findall("Race reported between" + report.partition("\n========= \n")[0])
        first, *others = [_function_at(file, int(line)) for _, file, line in sides]
        explained += bool(others) and all(frozenset({first, other}) in EXPLAINED for other in others)
    return explained


@cache
def _functions(file: str) -> list[tuple[int, int, str]]:
    """(first line, last line, name) of the functions of a file of Hopper's kernels or of their tests."""
    for folder in (Path(hopper.__file__).parent, Path(__file__).parent / "hopper"):
        if (folder / file).exists():
            nodes = ast.walk(ast.parse((folder / file).read_text()))
            found = [node for node in nodes if isinstance(node, ast.FunctionDef)]
            return [(node.lineno, node.end_lineno, node.name) for node in found]
    return []


def _function_at(file: str, line: int) -> str:
    return next((name for first, last, name in _functions(file) if first <= line <= last), f"{file}:{line}")


def sanitize(name: str, tool: str, logs: Path | None) -> tuple[int, int]:
    """(errors that `tool` finds in a case, reports that are explained).

    Raises:
        RuntimeError: the case failed, or the sanitizer did.
    """
    sanitizer = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--print-limit", "1000"]
    command = [*sanitizer, sys.executable, "-m", "tests.kernels.sanitize", "--case", name]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    log = done.stdout + done.stderr
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
        (logs / f"{name}-{tool}.log").write_text(log)
    errors = errors_found(tool, log)
    if done.returncode and errors == 0:
        raise RuntimeError(f"{name} under {tool} ended with exit status {done.returncode}: {log[-2000:]}")
    explained = explained_races(log) if tool == "racecheck" else 0
    return errors - explained, explained


def _sanitizer_version() -> str:
    printed = subprocess.run(["compute-sanitizer", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"[Vv]ersion (\S+)", printed)[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", default="")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--logs", type=Path, help="a folder for the sanitizer's output")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        run_case(options.case, "cuda")
        return 0
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer is not on PATH: it comes with the CUDA toolkit")
    recorder = Recorder("sanitize", folder=results_folder(options.record, options.out))
    version = _sanitizer_version()
    pairs = [(name, tool) for tool in reversed(TOOLS) for name in CASES if options.match in name]
    found = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        started = {pair: pool.submit(sanitize, *pair, options.logs) for pair in pairs}
        for (name, tool), future in started.items():
            try:
                found[name, tool], explained = future.result()
            except RuntimeError as error:
                print(error)
                found[name, tool] = -1
                continue
            print(f"{name:20} {tool:10} {found[name, tool]:4} errors, {explained} explained", flush=True)
            case = {"kernel": name, "tool": tool, "sanitizer": version}
            recorder.add(case, "hf_paged_flash", "errors", found[name, tool])
            if tool == "racecheck":
                recorder.add(case, "hf_paged_flash", "explained", explained)
    recorder.write()
    print(json.dumps({f"{name}-{tool}": count for (name, tool), count in found.items()}))
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
