"""Attention forward and backward against torch's own: FlashAttention-2 and cuDNN through SDPA, and FlexAttention.

    hf-paged-flash bench flash-attention                       # every shape, causal and full, packed rows; on the GPU
    hf-paged-flash bench flash-attention --shapes 1,32,8,16384,128 --masks causal --passes bwd

TFLOP/s in bf16. Every implementation gets the layout it is made for, and all take turns in one run. `paged_flash` is
what a user gets, `paged_flash_portable` the Triton kernels for every GPU, on Hopper too. Causal attention counts half
of the products; a backward pass, timed by itself, 2.5 times its forward. Packed rows (lengths log-uniform in 256 to
16384, 65,536 tokens) stand beside a dense batch of as many tokens and FLOPs.

Ours are checked against fp64 before they are timed: a wrong result is exit status 1, and no row.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from hf_paged_flash.eval.bench.attention_calls import IMPLEMENTATIONS, OURS, call_of, setting, why_not
from hf_paged_flash.eval.bench.attention_cases import (
    FLEX_SHAPES,
    PACKED_TOKENS,
    SHAPES,
    Case,
    default_cases,
    inputs_of,
    packed_cases,
)
from hf_paged_flash.eval.bench.compile_ahead import compile_ahead
from hf_paged_flash.eval.bench.correctness import MAX_ERROR_RATIO, error_ratio, gradient_error_ratios
from hf_paged_flash.eval.bench.timing import bench_device, interleaved_ms, shapes_of
from hf_paged_flash.eval.report import console, final_line, launch, names_of, print_failures, reason_of
from hf_paged_flash.eval.results import Recorder, device_name, results_folder, versions

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Measured:
    """What one case gave: TFLOP/s of what ran, why others did not, and ours' errors as multiples of eager's."""

    case: Case
    speeds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)

    @property
    def wrong(self) -> list[str]:
        """The implementations whose error is too large, or NaN."""
        return [impl for impl, ratio in self.ratios.items() if not ratio <= MAX_ERROR_RATIO]


def error_ratios(case: Case, inputs: tuple[torch.Tensor, ...], results: dict) -> dict[str, float]:
    """Errors of outputs, or of gradients, over eager's own; of packed rows the first and the longest are looked at.

    Args:
        inputs: q, k, v, dout as of `inputs_of`.
        results: {implementation: out, or (dq, dk, dv)}, of the shapes of q, or of q, k and v.
    """
    places = [slice(None)]
    if case.lengths:
        ends = torch.tensor(case.lengths).cumsum(0).tolist()
        chosen = {0, case.lengths.index(case.s)}
        places = [slice(ends[row] - case.lengths[row], ends[row]) for row in chosen]

    def rows(x: torch.Tensor, place: slice) -> torch.Tensor:
        return x[place][None] if case.lengths else x

    ratios = dict.fromkeys(results, 0.0)
    for place in places:
        q, k, v, dout = (rows(x, place) for x in inputs)
        if case.direction == "bwd":
            gradients = {impl: tuple(rows(x, place) for x in result) for impl, result in results.items()}
            found = gradient_error_ratios(gradients, q, k, v, dout, causal=case.causal)
        else:
            found = {impl: error_ratio(rows(out, place), q, k, v, causal=case.causal) for impl, out in results.items()}
        # a NaN stays: max() keeps its first argument where a comparison fails
        ratios = {impl: max(found[impl], ratio) if ratio == ratio else ratio for impl, ratio in ratios.items()}
    return ratios


@torch.no_grad()
def measure(case: Case, implementations: list[str], device: torch.device) -> Measured:
    """Checks and times one case. A peer's failure is reported and the others go on; ours raises."""
    measured = Measured(case)
    inputs = inputs_of(case, device)
    calls, results = {}, {}
    for impl in implementations:
        if reason := why_not(impl, case, device):
            measured.failures[impl] = reason
            continue
        try:
            with setting(impl):
                call = call_of(impl, case, inputs)
                result = call()
        except Exception as error:
            # Peers raise whatever they like (RuntimeError, compiler errors) for shapes that they do not support.
            if impl in OURS:
                raise
            measured.failures[impl] = reason_of(error)
            continue
        calls[impl] = call
        if impl in OURS:
            results[impl] = result
    measured.ratios = error_ratios(case, inputs, results)
    del results
    times = interleaved_ms(calls, device, setting)
    measured.speeds = {impl: case.flops / ms / 1e9 for impl, ms in times.items()}
    return measured


def _table(measured: list[Measured], implementations: list[str], device: str) -> Table:
    title = "in brackets paged_flash over the other; errors of ours as multiples of eager's"
    table = Table(title=f"attention, TFLOP/s, {device_name(device)} ({title})")
    for heading in ("pass", "batch", "heads", "mask", *implementations, "errors"):
        table.add_column(heading, justify="right", overflow="fold")
    for item in measured:
        case, ours = item.case, item.speeds.get("paged_flash")
        cells = []
        for impl in implementations:
            if impl not in item.speeds:
                cells.append("–")
            elif impl == "paged_flash" or ours is None:
                cells.append(f"[bold]{item.speeds[impl]:,.0f}[/bold]")
            else:
                cells.append(f"{item.speeds[impl]:,.0f} ({ours / item.speeds[impl]:.2f}×)")
        batch = f"B{case.b} S{'≤' if case.lengths else ''}{case.s}"
        shape = [case.direction, batch, f"{case.h}/{case.hk} D{case.d}", "causal" if case.causal else "full"]
        table.add_row(*shape, *cells, " ".join(f"{ratio:.2f}" for ratio in item.ratios.values()) or "–")
    return table


def _cases(shapes: str | None, directions: list[str], causals: list[bool], packed: int) -> list[Case]:
    if shapes is not None:
        chosen = shapes_of(shapes, SHAPES)
        return [Case(direction, *shape, causal) for direction in directions for shape in chosen for causal in causals]
    with_packed = packed > 0 and True in causals
    return default_cases(directions, causals) + (packed_cases(directions, packed) if with_packed else [])


@app.command()
def main(
    shapes: Annotated[str | None, typer.Option(help="B,H,Hkv,S,D;…; default: fourteen, and packed rows")] = None,
    masks: Annotated[str, typer.Option(help="which of causal and full")] = "causal,full",
    passes: Annotated[str, typer.Option(help="which of fwd and bwd")] = "fwd,bwd",
    packed_tokens: Annotated[int, typer.Option(help="tokens of the packed rows; 0: none")] = PACKED_TOKENS,
    implementations: Annotated[str, typer.Option(help="what to time")] = ",".join(IMPLEMENTATIONS),
    compile_processes: Annotated[int | None, typer.Option(help="that compile ahead; default: by CPU cores")] = None,
    device: Annotated[str, typer.Option(help="torch device; a CPU only shows that the command works")] = "cuda",
    record: Annotated[bool, typer.Option(help="append rows to eval/results/flash_attention.jsonl")] = False,
    out: Annotated[Path | None, typer.Option(help="append rows in this folder instead")] = None,
) -> None:
    """Attention forward and backward: paged_flash against SDPA (FlashAttention-2, cuDNN) and FlexAttention."""
    from tqdm import tqdm

    names = names_of(implementations, IMPLEMENTATIONS, "implementations")
    causals = [name == "causal" for name in names_of(masks, ("causal", "full"), "masks")]
    settled = bench_device(device)
    cases = _cases(shapes, names_of(passes, ("fwd", "bwd"), "passes"), causals, packed_tokens)

    def named(case: Case) -> list[str]:
        """FlexAttention, slow to compile, only at some of the default shapes."""
        slow = shapes is None and not (case.causal and (case.b, case.h, case.hk, case.s, case.d) in FLEX_SHAPES)
        return [name for name in names if not (name == "flex" and slow)]

    recorder = Recorder("flash_attention", device=device, folder=results_folder(record, out))
    compile_ahead(cases, named, settled, compile_processes)
    measured = [measure(case, named(case), settled) for case in tqdm(cases, unit="case")]
    for item in measured:
        for impl, tflops in item.speeds.items():
            if impl not in item.wrong:
                recorder.add(item.case.row, impl, "tflops", tflops)
    screen = console()
    screen.print(_table(measured, names, device))
    print_failures(screen, [item.failures for item in measured])
    recorder.write()
    rows = [{**item.case.row, "tflops": item.speeds, "error_ratio": item.ratios} for item in measured]
    wrong = [{**item.case.row, "wrong": item.wrong} for item in measured if item.wrong]
    summary = {"bench": "flash_attention", "run": recorder.run, "gpu": device_name(device), **versions()}
    final_line({**summary, "rows": rows, "wrong": wrong})
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    launch(app)
