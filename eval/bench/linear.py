"""A linear layer of one row or two, as in a decode step: ours against torch's.

    hf-paged-flash bench linear                         # the weights of an 8B model, in bf16 on the GPU
    hf-paged-flash bench linear --shapes "1,8192,2048"  # rows, N, K

Time of one call inside a CUDA graph; weights are rotated, so that L2 does not serve repeats. GB/s counts the bytes of
the weights. Ours is checked against fp64 before it is timed; exit status 1 where it is wrong.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch.nn import functional as F

from hf_paged_flash.eval.bench.timing import bench_device, replayed_us, rotated_sets, shapes_of
from hf_paged_flash.eval.report import console, final_line, launch, names_of
from hf_paged_flash.eval.results import Recorder, device_name, results_folder, versions
from hf_paged_flash.ops import layers

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

IMPLEMENTATIONS: dict[str, Callable] = {"paged_flash": layers.linear, "torch": F.linear}
# rows, N, K: Llama-3.1-8B's queries and output, keys or values, gate or up, down, and head
SHAPES = tuple(
    (rows, *weight)
    for rows in range(1, layers.MOST_ROWS + 1)
    for weight in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096))
)
# of ||y - exact|| / ||exact||: a rounding to bf16 is off by at most 2^-9 of each value
MOST_ERROR = 2.0**-9


@dataclass(frozen=True)
class Case:
    """`rows` (K,) times weights (`n`, `k`) in bf16."""

    rows: int
    n: int
    k: int

    @property
    def weight_bytes(self) -> int:
        return 2 * self.n * self.k


@torch.no_grad()
def measure(case: Case, implementations: list[str], device: torch.device) -> tuple[dict[str, float], float | None]:
    """Microseconds of each implementation, and the relative error of ours (None if not run)."""
    shape, options = (case.n, case.k), {"device": device, "dtype": torch.bfloat16}
    weights = [torch.randn(shape, **options) * case.k**-0.5 for _ in range(rotated_sets(case.weight_bytes, device))]
    x = torch.randn(case.rows, case.k, **options)
    error = None
    if "paged_flash" in implementations:
        exact = x.double() @ weights[0].double().mT
        error = float((layers.linear(x, weights[0]) - exact).norm() / exact.norm())
    calls = {name: [partial(IMPLEMENTATIONS[name], x, weight) for weight in weights] for name in implementations}
    return {name: replayed_us(call, device) for name, call in calls.items()}, error


def _table(measured: list[tuple[Case, dict[str, float], float | None]], names: list[str], device: str) -> Table:
    table = Table(title=f"linear layer, µs (GB/s of weights), {device_name(device)}")
    for heading in ("rows", "N", "K", *names, "error"):
        table.add_column(heading, justify="right")
    for case, times, error in measured:
        cells = [f"{us:,.1f} ({case.weight_bytes / us / 1e3:,.0f})" for us in times.values()]
        cells.append("–" if error is None else f"{error:.1e}")
        table.add_row(*map(str, (case.rows, case.n, case.k)), *cells)
    return table


@app.command()
def main(
    shapes: Annotated[str | None, typer.Option(help="rows,N,K;…; default: one row and two of an 8B model")] = None,
    implementations: Annotated[str, typer.Option(help="what to time")] = ",".join(IMPLEMENTATIONS),
    device: Annotated[str, typer.Option(help="torch device; a CPU only shows that the command works")] = "cuda",
    record: Annotated[bool, typer.Option(help="append rows to eval/results/linear.jsonl")] = False,
    out: Annotated[Path | None, typer.Option(help="append rows in this folder instead")] = None,
) -> None:
    """A linear layer of one row or two: ours against torch's."""
    names = names_of(implementations, tuple(IMPLEMENTATIONS), "implementations")
    cases, settled = [Case(*shape) for shape in shapes_of(shapes, SHAPES)], bench_device(device)
    recorder = Recorder("linear", device=device, folder=results_folder(record, out))
    measured = []
    for case in cases:
        times, error = measure(case, names, settled)
        measured.append((case, times, error))
        for name, us in times.items():
            recorder.add(asdict(case), name, "us", us)
            recorder.add(asdict(case), name, "gbps", case.weight_bytes / us / 1e3)
    console().print(_table(measured, names, device))
    wrong = [asdict(case) for case, _, error in measured if error is not None and not error <= MOST_ERROR]
    if not wrong:
        recorder.write()
    rows = [{**asdict(case), "us": times, "error": error} for case, times, error in measured]
    summary = {"bench": "linear", "run": recorder.run, "gpu": device_name(device), **versions()}
    final_line({**summary, "rows": rows, "wrong": wrong})
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    launch(app)
