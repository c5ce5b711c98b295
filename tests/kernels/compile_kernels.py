"""Compiles the kernels, as their launchers would launch them, for GPUs that are not there, and measures the result.

    python tests/kernels/compile_kernels.py                 the representative cases, two at a time, as a table
    python tests/kernels/compile_kernels.py --sweep         every architecture, dtype, tile and feature: 20 minutes
    python tests/kernels/compile_kernels.py --match sm_90   those whose id contains a string
    python tests/kernels/compile_kernels.py --json FILE     one JSON line a compiled kernel

The launchers themselves run, on tensors without storage and under a Triton driver that has a target but no GPU: every
signature, constexpr and specialisation is what a user's call would compile. Triton must not be interpreting, so tests
start this file in a process of its own.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

# capability: bytes of shared memory one block may ask for (CUDA programming guide, technical specifications)
SHARED_MEMORY = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
# bytes that ptxas may park around the loops
SPILLED_OUTSIDE_LOOPS = 128
NUM_SMS = {75: 40, 80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}


@dataclass(frozen=True)
class Case:
    """One call of a launcher on one GPU architecture."""

    arch: int
    op: str
    dtype: str
    head_dim: int
    v_head_dim: int = 0
    page_size: int = 0
    group: int = 4
    seqlen_q: int = 4096
    causal: bool = True
    window_left: int = -1
    softcap: float = 0.0
    sinks: bool = False
    packed: bool = False
    bias: bool = False
    alibi: bool = False
    dropout_p: float = 0.0
    batch: int = 2

    @property
    def id(self) -> str:
        dims = f"D{self.head_dim}" + (f"v{self.v_head_dim}" if self.v_head_dim else "")
        parts = [f"sm_{self.arch}", self.op, self.dtype, dims, f"page{self.page_size}" if self.page_size else "dense"]
        if self.op in ("flash_forward", "flash_backward"):
            parts.append("causal" if self.causal else "full")
        elif self.op == "paged_decode":
            parts += [f"group{self.group}", f"q{self.seqlen_q}"]
        if self.op == "linear" or self.batch > 2:
            parts.append(f"rows{self.batch}")
        parts += ["window"] if self.window_left >= 0 else []
        parts += ["softcap"] if self.softcap > 0 else []
        parts += ["bias"] * self.bias + ["alibi"] * self.alibi + ["dropout"] * (self.dropout_p > 0.0)
        return "-".join(parts + ["sinks"] * self.sinks + ["packed"] * self.packed)


def _forward(arch: int, dtype: str, head_dim: int, **features) -> Case:
    return Case(arch, "flash_forward", dtype, head_dim, **features)


def _backward(arch: int, dtype: str, head_dim: int, **features) -> Case:
    return Case(arch, "flash_backward", dtype, head_dim, **features)


def _decode(arch: int, dtype: str, head_dim: int, **features) -> Case:
    return Case(arch, "paged_decode", dtype, head_dim, **{"page_size": 16, "seqlen_q": 1, **features})


# every row of the tile tables; 192/128 is DeepSeek's
HEAD_DIMS = ((64, 0), (128, 0), (256, 0), (192, 128))
EVERYTHING = {"window_left": 512, "softcap": 30.0, "sinks": True}
MODIFIERS = ({"bias": True}, {"alibi": True}, {"dropout_p": 0.1})


def representative() -> list[Case]:
    """Each tile of the tables dense and paged, what users launch most, and the features together."""
    cases = []
    for arch, (d, dv) in itertools.product((75, 80, 90, 100), HEAD_DIMS):
        dtype = "fp16" if arch < 80 else "bf16"
        cases += [_forward(arch, dtype, d, v_head_dim=dv, page_size=page_size) for page_size in (0, 16)]
        cases += [_decode(arch, dtype, d)] if not dv else []
    for d, _ in HEAD_DIMS[:3]:
        cases += [_forward(90, "fp32", d, page_size=16), _decode(90, "fp32", d)]
        cases += [_decode(90, "bf16", d, group=8, seqlen_q=16, **EVERYTHING)]
        cases += [_forward(arch, "bf16", d, packed=True) for arch in (86, 120)]
    cases += [_forward(75, "fp32", 256, page_size=16), _decode(75, "fp32", 256), _decode(90, "bf16", 128, group=1)]
    for arch, (d, _), page_size in itertools.product((90, 100), HEAD_DIMS[:3], (16, 256)):
        cases += [_decode(arch, "bf16", d, batch=64, page_size=page_size)]
    cases += [_decode(90, "bf16", 128, batch=64, group=8, seqlen_q=2, **EVERYTHING)]
    cases += [_decode(arch, "bf16", 128, batch=160, page_size=16) for arch in (90, 100)]
    cases += [_forward(90, "fp16", 128, page_size=64, packed=True, **EVERYTHING)]
    cases += [_forward(90, "bf16", 128, causal=False)]
    cases += [Case(arch, op, "fp16", 128, page_size=16) for arch in (75, 90) for op in ("store_kv", "copy_blocks")]
    cases += [Case(arch, op, "bf16", 128) for arch in (80, 90, 100) for op in ("rms_norm", "rotary", "swiglu")]
    cases += [Case(arch, "linear", "bf16", 128, batch=rows) for arch in (80, 90, 100) for rows in (1, 2)]
    return cases + representative_backward()


def representative_backward() -> list[Case]:
    """Each tile of the backward's tables, and the features together."""
    cases = []
    for arch, (d, dv) in itertools.product((80, 90, 100), HEAD_DIMS):
        cases += [_backward(arch, "bf16", d, v_head_dim=dv)]
    cases += [_backward(75, "fp16", d) for d in (64, 128)]
    for arch in (80, 86, 90, 100):
        cases += [_forward(arch, "bf16", 512, page_size=16), _decode(arch, "bf16", 512, group=8, seqlen_q=16)]
    for d, _ in HEAD_DIMS[:3]:
        cases += [_backward(arch, "bf16", d) for arch in (86, 120)] + [_backward(90, "fp32", d)]
    cases += [_backward(90, "bf16", 64, causal=False, packed=True), _backward(90, "bf16", 128, **EVERYTHING)]
    cases += [make(90, "bf16", 128, **modifier) for make in (_forward, _backward) for modifier in MODIFIERS]
    cases += [_forward(arch, "bf16", d, bias=True) for arch in (80, 100) for d in (64, 128, 256)]
    return cases


def sweep() -> list[Case]:
    """Every architecture, dtype and row of the tile tables, each way to read keys, features alone and together."""
    cases = []
    for arch, (d, dv) in itertools.product(SHARED_MEMORY, HEAD_DIMS):
        for dtype in ("fp16", "fp32") if arch < 80 else ("bf16", "fp16", "fp32"):
            shape = {"v_head_dim": dv}
            cases += [_forward(arch, dtype, d, page_size=page_size, **shape) for page_size in (0, 16, 64, 256)]
            cases += [_forward(arch, dtype, d, packed=True, causal=causal, **shape) for causal in (True, False)]
            cases += [_forward(arch, dtype, d, window_left=512, **shape)]
            cases += [_forward(arch, dtype, d, packed=True, page_size=64, **shape, **EVERYTHING)]
            if arch >= 80 or d <= 128:
                cases += [_backward(arch, dtype, d, causal=causal, **shape) for causal in (True, False)]
                for features in (EVERYTHING, *MODIFIERS):
                    cases += [_backward(arch, dtype, d, packed=True, **shape, **features)]
            cases += [_forward(arch, dtype, d, **features, **shape) for features in MODIFIERS]
            cases += [_decode(arch, dtype, d, group=group, **shape) for group in (1, 4, 8)]
            cases += [_decode(arch, dtype, d, page_size=page_size, **shape) for page_size in (0, 64, 256)]
            cases += [_decode(arch, dtype, d, batch=64, group=group, **shape) for group in (1, 4, 8)]
            cases += [_decode(arch, dtype, d, batch=64, group=8, seqlen_q=2, **shape, **EVERYTHING)]
            cases += [_decode(arch, dtype, d, group=group, seqlen_q=16, **shape, **EVERYTHING) for group in (1, 2, 8)]
            cases += [Case(arch, "store_kv", dtype, d, page_size=16, **shape)]
            cases += [Case(arch, op, dtype, d) for op in ("rms_norm", "rotary", "swiglu") if not dv]
            if dtype != "fp32" and not dv:
                cases += [Case(arch, "linear", dtype, d, batch=rows) for rows in (1, 2)]
    return cases


def _launch(case: Case) -> None:
    """Calls the launcher on tensors without storage, as within a decode graph."""
    from hf_paged_flash.kernels import launches

    launches.can_overlap = lambda device: case.arch >= 10 * launches.LEAST_CAPABILITY[0]
    with launches.overlapping_launches():
        _call(case)


def _call(case: Case) -> None:
    import torch

    from hf_paged_flash.kernels.copy_blocks import copy_blocks
    from hf_paged_flash.kernels.flash_backward import flash_backward
    from hf_paged_flash.kernels.flash_forward import flash_forward
    from hf_paged_flash.kernels.linear import linear
    from hf_paged_flash.kernels.paged_decode import paged_decode
    from hf_paged_flash.kernels.rms_norm import rms_norm
    from hf_paged_flash.kernels.rotary import rotary
    from hf_paged_flash.kernels.store_kv import store_kv
    from hf_paged_flash.kernels.swiglu import swiglu

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[case.dtype]
    batch, kv_heads, context = case.batch, 8, 8192

    def tensor(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    v_head_dim = case.v_head_dim or case.head_dim
    heads = kv_heads * case.group
    lengths = tensor(batch, dtype=torch.int32)
    blocks = (batch * context // case.page_size, case.page_size) if case.page_size else (batch, context)
    k, v = tensor(*blocks, kv_heads, case.head_dim), tensor(*blocks, kv_heads, v_head_dim)
    table = tensor(batch, context // case.page_size, dtype=torch.int32) if case.page_size else None
    scoring = dict(
        softmax_scale=0.1,
        causal=case.causal,
        window_left=case.window_left,
        softcap=case.softcap,
        s_aux=tensor(heads) if case.sinks else None,
    )
    if case.op == "store_kv":
        new_k, new_v = tensor(batch, 512, kv_heads, case.head_dim), tensor(batch, 512, kv_heads, v_head_dim)
        store_kv(new_k, new_v, k, v, tensor(batch * 512, dtype=torch.int64))
    elif case.op == "rms_norm":
        hidden = kv_heads * case.group * case.head_dim
        rms_norm(tensor(batch, 1, hidden), tensor(hidden), 1e-6)
        rms_norm(tensor(batch, 1, heads, case.head_dim), tensor(case.head_dim), 1e-6, offset=1.0, casting_mode="gemma")
    elif case.op == "swiglu":
        swiglu(tensor(batch, 1, 3 * case.head_dim), tensor(batch, 1, 3 * case.head_dim))
    elif case.op == "linear":
        hidden = kv_heads * case.group * case.head_dim
        linear(tensor(case.batch, 1, hidden), tensor(3 * hidden, hidden), tensor(3 * hidden))
    elif case.op == "rotary":
        q, k = (tensor(batch, 1, n, case.head_dim).transpose(1, 2) for n in (heads, kv_heads))
        for rotary_dim in (case.head_dim, case.head_dim // 2):
            rotary(q, k, tensor(batch, 1, rotary_dim), tensor(batch, 1, rotary_dim))
    elif case.op == "copy_blocks":
        copy_blocks([k, v], tensor(15, 2, dtype=torch.int64))
    elif case.op == "paged_decode":
        q = tensor(batch, case.seqlen_q, heads, case.head_dim)
        paged_decode(q, k, v, cache_seqlens=lengths, block_table=table, **scoring)
    else:
        scoring |= dict(
            bias=tensor(1, heads, case.seqlen_q, context) if case.bias else None,
            alibi_slopes=tensor(1, heads, dtype=torch.float32) if case.alibi else None,
            dropout_p=case.dropout_p,
            dropout_seed=tensor(1, dtype=torch.int64) if case.dropout_p else None,
            max_seqlen_q=case.seqlen_q,
            max_seqlen_k=context,
        )
        q, lse = tensor(batch, case.seqlen_q, heads, case.head_dim), tensor(batch, heads, case.seqlen_q)
        if case.packed:
            bounds = tensor(batch + 1, dtype=torch.int32)
            scoring |= {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
            q, lse = q.flatten(0, 1), tensor(heads, batch * case.seqlen_q)
            k, v = (k, v) if case.page_size else (k.flatten(0, 1), v.flatten(0, 1))
        elif case.page_size:
            scoring["seqused_k"] = lengths
        if case.op == "flash_forward":
            flash_forward(q, k, v, block_table=table, **scoring)
        else:
            out = q.new_empty(*q.shape[:-1], v_head_dim)
            flash_backward(out, None, q, k, v, out, lse.float(), bias_needs_grad=case.bias, **scoring)


class _NoGPU:
    """A Triton driver for compiling alone: it names a target and has no device to launch on."""

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return self._target.arch

    def get_current_stream(self, device):
        return 0


def disassembled(cubin: bytes) -> list[tuple[int, str]]:
    """(address, instruction) of a compiled kernel."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run([cuobjdump, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    code = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +(\S.*?);", sass)]
    if not code:
        raise RuntimeError(f"cuobjdump printed no instructions: {sass[:200]!r}")
    return code


def loops_of(code: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """(first, last) addresses between the target of each backward branch and the branch."""
    branches = [(address, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for address, text in code]
    return [(int(target[1], 16), address) for address, target in branches if target and int(target[1], 16) < address]


def spills_within(code: list[tuple[int, str]], loops: list[tuple[int, int]]) -> int:
    """Loads from and stores to local memory inside `loops`."""
    local = [address for address, text in code if re.search(r"\b(STL|LDL)\b", text)]
    return sum(any(first <= address <= last for first, last in loops) for address in local)


def _spills_in_loops(cubin: bytes) -> int:
    code = disassembled(cubin)
    return spills_within(code, loops_of(code))


def _measure(kernel, log: str) -> dict:
    registers = re.search(r"Used (\d+) registers", log)
    if not registers:
        raise RuntimeError(f"ptxas printed no register count: {log[:200]!r}")
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    return {
        "registers": int(registers[1]),
        "spills": spills,
        "loop_spills": _spills_in_loops(kernel.asm["cubin"]) if spills else 0,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "stages": kernel.metadata.num_stages,
        "tensor_cores": bool(re.search(r"wgmma|tcgen05\.mma|mma\.sync", kernel.asm["ptx"])),
        "warnings": sorted(set(re.findall(r".*\bC75\d\d\b.*", log))),
    }


def compile_case(case: Case) -> list[dict]:
    """Compiles what `case` launches: a record for each kernel."""
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from hf_paged_flash.kernels import configs

    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET must be unset where kernels are compiled")
    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.always_compile = True
    driver.set_active(_NoGPU(case.arch))
    configs.device_of = lambda tensor: configs.Device(case.arch, SHARED_MEMORY[case.arch], NUM_SMS[case.arch])
    records = []
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        self.device_caches.clear()  # a kernel that an earlier case compiled would come without its log
        log, start = io.StringIO(), time.monotonic()
        with redirect_stdout(log):
            kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        tile = "x".join(str(kwargs[name]) for name in ("BLOCK_M", "BLOCK_N") if name in kwargs)
        record = {"case": case.id, "arch": case.arch, "kernel": self.__name__.strip("_"), "tile": tile}
        record.update(_measure(kernel, log.getvalue()))
        records.append({**record, "seconds": round(time.monotonic() - start, 1)})

    JITFunction.run = compile_only
    try:
        _launch(case)
    except Exception as error:  # reported with the case, so that the others still run
        records.append({"case": case.id, "arch": case.arch, "error": f"{type(error).__name__}: {error}"[-2000:]})
    finally:
        JITFunction.run = launch
    return records


def problems(record: dict) -> list[str]:
    """What is wrong with a compiled kernel; empty if it is fit to launch.

    A register or two that ptxas parks in local memory before the loops and takes back behind them costs nothing; any
    access to local memory inside a loop does.
    """
    if "error" in record:
        return [record["error"]]
    found = list(record["warnings"])
    if record.get("registers", 255) < 16 and record["kernel"] != "store_kv_kernel":
        found.append(f"uses {record['registers']} registers: what did not fit was compiled to a trap")
    if record["loop_spills"]:
        found.append(f"{record['loop_spills']} accesses to local memory inside loops")
    if record["spills"] > SPILLED_OUTSIDE_LOOPS:
        found.append(f"spills {record['spills']} bytes")
    limit = SHARED_MEMORY[record["arch"]]
    if record["shared"] > limit:
        found.append(f"needs {record['shared']} bytes of shared memory, sm_{record['arch']} has {limit}")
    return found


def compile_cases(cases: list[Case], jobs: int) -> list[dict]:
    """Compiles in `jobs` processes of their own, without Triton's interpreter; records in the order of `cases`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    names = [case.id for case in cases]
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        workers = []
        for job in range(jobs):
            command = [sys.executable, __file__, "--worker", *names[job::jobs]]
            workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        outputs = [worker.communicate()[0] for worker in workers]
    for worker in workers:
        if worker.returncode:
            raise RuntimeError(f"compiling failed with exit status {worker.returncode}")
    records = [json.loads(line) for output in outputs for line in output.splitlines()]
    return sorted(records, key=lambda record: names.index(record["case"]))


def table(records: list[dict]) -> str:
    """One line a kernel: what was compiled, what it takes, and what is wrong with it."""
    columns = f"{'tile':>7} {'warps':>5} {'stages':>6} {'regs':>4} {'spills':>6} {'shared':>6} mma"
    lines = [f"{'case':66} {'kernel':20} {columns}"]
    for r in records:
        if "error" in r:
            lines.append(f"{r['case']:66} {r['error']}")
            continue
        mma = "yes" if r["tensor_cores"] else " no"
        lines.append(
            f"{r['case']:66} {r['kernel']:20} {r['tile']:>7} {r['warps']:5} {r['stages']:6} {r['registers']:4} "
            f"{r['spills']:6} {r['shared']:6} {mma} {'; '.join(problems(r))}".rstrip()
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--match", default="")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    every = {case.id: case for case in representative() + sweep()}
    if options.worker is not None:
        for name in options.worker:
            for record in compile_case(every[name]):
                print(json.dumps(record), flush=True)
        return 0
    cases = [case for case in (sweep() if options.sweep else representative()) if options.match in case.id]
    records = compile_cases(cases, options.jobs)
    print(table(records))
    if options.json:
        options.json.write_text("".join(json.dumps(record) + "\n" for record in records))
    return int(any(problems(record) for record in records))


if __name__ == "__main__":
    sys.exit(main())
