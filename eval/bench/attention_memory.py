"""Peak memory of attention beyond its inputs, outputs and gradients, by sequence length: paged_flash, SDPA and eager.

    hf-paged-flash bench attention-memory                        # 4,096 to 131,072 tokens, causal, bf16, on the GPU
    hf-paged-flash bench attention-memory --lengths 65536 --implementations paged_flash

One row of 32 query and 8 key/value heads, head_dim 128. Forward alone, and forward with backward; what torch's
allocator held at most, less what was there before and what comes out. Eager is transformers' own function, its mask
counted as its own. What does not fit is recorded as out of memory. Outputs and gradients must agree with SDPA's: exit
status 1 where they don't.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import eager_attention_forward

from hf_paged_flash import flash_attn_func
from hf_paged_flash.eval.bench.timing import bench_device, shapes_of
from hf_paged_flash.eval.device_memory import release_unused
from hf_paged_flash.eval.report import console, final_line, launch, names_of
from hf_paged_flash.eval.results import Recorder, device_name, results_folder, versions

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# SDPA first: the others are compared with it.
IMPLEMENTATIONS = ("sdpa", "paged_flash", "eager")
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
PASSES = ("fwd", "fwd+bwd")
# ||ours - SDPA's|| / ||SDPA's||: rounding to bf16 alone is some thousandths.
TOLERANCE = 0.02
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One row of `s` tokens, `h` query and `hk` key/value heads of width `d`, causal; `direction` of PASSES."""

    direction: str
    s: int
    h: int = 32
    hk: int = 8
    d: int = 128

    @property
    def row(self) -> dict:
        shape = asdict(self)
        return {"pass": shape.pop("direction"), "b": 1, **shape, "causal": True}


@dataclass
class Measured:
    """Bytes and milliseconds of one implementation; None on a CPU, which torch does not count, or out of memory.

    Attributes:
        difference: the largest relative difference from SDPA's output or gradients; None where SDPA did not run.
    """

    extra: int | None = None
    ms: float | None = None
    out_of_memory: bool = False
    difference: float | None = None
    results: tuple[torch.Tensor, ...] = field(default=(), repr=False)


def _paged_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flash_attn_func(q, k, v, causal=True).transpose(1, 2)


def _eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    length = q.shape[2]
    mask = torch.full((1, 1, length, length), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device).triu_(1)
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
    return eager_attention_forward(module, q, k, v, mask, scaling=q.shape[-1] ** -0.5)[0].transpose(1, 2)


CALLS: dict[str, Callable[..., torch.Tensor]] = {
    "sdpa": partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True),
    "paged_flash": _paged_flash,
    "eager": _eager,
}


def inputs_of(case: Case, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Standard normal q, k, v, dout in bf16, (1, H | Hkv, S, D) as transformers has them: views of (1, S, H, D)."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((1, case.s, heads, case.d) for heads in (case.h, case.hk, case.hk, case.h))
    made = (torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for shape in shapes)
    return tuple(x.transpose(1, 2) for x in made)


def _run(impl: str, case: Case, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The output, and in a backward pass the gradients of q, k and v."""
    if case.direction == "fwd":
        with torch.no_grad():
            return (CALLS[impl](*inputs[:3]),)
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = CALLS[impl](*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, inputs[3])


def measure(impl: str, case: Case, inputs: tuple[torch.Tensor, ...], device: torch.device) -> Measured:
    """Runs `impl` twice, the second time counted and timed: the first makes the workspaces that stay."""
    measured = Measured()
    try:
        if device.type != "cuda":
            measured.results = _run(impl, case, inputs)
            return measured
        _run(impl, case, inputs)
        release_unused(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        results = _run(impl, case, inputs)
        end.record()
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        measured.out_of_memory = True
        return measured
    kept = sum(x.nbytes for x in results)
    measured.extra = max(0, torch.cuda.max_memory_allocated(device) - before - kept)
    measured.ms, measured.results = start.elapsed_time(end), results
    return measured


def difference(results: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """The largest ||x - y|| / ||y|| of the pairs; NaN where there is one."""
    ratios = [
        torch.linalg.vector_norm(x - y, dtype=torch.float32) / torch.linalg.vector_norm(y, dtype=torch.float32)
        for x, y in zip(results, expected, strict=True)
    ]
    return float(torch.stack(ratios).max())


def measure_all(case: Case, implementations: list[str], device: torch.device) -> dict[str, Measured]:
    """Every implementation on the same inputs, in the order of IMPLEMENTATIONS."""
    inputs = inputs_of(case, device)
    found, expected = {}, None
    for impl in sorted(implementations, key=IMPLEMENTATIONS.index):
        release_unused(device)
        found[impl] = measure(impl, case, inputs, device)
        results, found[impl].results = found[impl].results, ()
        if impl == "sdpa":
            expected = results or None
        elif expected and results:
            found[impl].difference = difference(results, expected)
    return found


def _table(measured: list[tuple[Case, dict[str, Measured]]], implementations: list[str], device: str) -> Table:
    table = Table(title=f"memory beyond inputs, outputs and gradients, MiB (time in ms), {device_name(device)}")
    for heading in ("pass", "S", *implementations, "difference from SDPA"):
        table.add_column(heading, justify="right")
    for case, found in measured:
        cells = []
        for impl in implementations:
            item = found[impl]
            known = "–" if item.extra is None else f"{item.extra / 2**20:,.1f} ({item.ms:,.1f})"
            cells.append("out of memory" if item.out_of_memory else known)
        worst = [item.difference for item in found.values() if item.difference is not None]
        table.add_row(case.direction, f"{case.s:,}", *cells, f"{max(worst):.1e}" if worst else "–")
    return table


@app.command()
def main(
    lengths: Annotated[str, typer.Option(help="tokens of the row")] = ",".join(map(str, LENGTHS)),
    heads: Annotated[str, typer.Option(help="query heads, key/value heads, head_dim")] = "32,8,128",
    passes: Annotated[str, typer.Option(help="which of fwd and fwd+bwd")] = ",".join(PASSES),
    implementations: Annotated[str, typer.Option(help="what to measure")] = ",".join(IMPLEMENTATIONS),
    device: Annotated[str, typer.Option(help="torch device; a CPU only shows that the command works")] = "cuda",
    record: Annotated[bool, typer.Option(help="append rows to eval/results/attention_memory.jsonl")] = False,
    out: Annotated[Path | None, typer.Option(help="append rows in this folder instead")] = None,
) -> None:
    """Peak memory of attention, forward and backward, by sequence length: paged_flash, SDPA and eager."""
    names = names_of(implementations, IMPLEMENTATIONS, "implementations")
    (shape,) = shapes_of(heads, ((32, 8, 128),))
    sizes = [size for (size,) in shapes_of(lengths.replace(",", ";"), ((4096,),))]
    settled = bench_device(device)
    recorder = Recorder("attention_memory", device=device, folder=results_folder(record, out))
    measured = []
    for direction in names_of(passes, PASSES, "passes"):
        for size in sizes:
            case = Case(direction, size, *shape)
            measured.append((case, measure_all(case, names, settled)))
    wrong = []
    for case, found in measured:
        for impl, item in found.items():
            if item.difference is not None and not item.difference <= TOLERANCE:
                wrong.append({**case.row, "impl": impl, "difference": item.difference})
                continue
            if item.out_of_memory:
                recorder.add(case.row, impl, "out_of_memory", 1)
            if item.extra is not None:
                recorder.add(case.row, impl, "extra_gib", item.extra / GIB)
                recorder.add(case.row, impl, "ms", item.ms)
    console().print(_table(measured, names, device))
    rows = [{key: row[key] for key in ("case", "impl", "metric", "value")} for row in recorder.rows]
    recorder.write()
    summary = {"bench": "attention_memory", "run": recorder.run, "gpu": device_name(device), **versions()}
    final_line({**summary, "rows": rows, "wrong": wrong})
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    launch(app)
