"""generate() of Llama-shaped models with random weights: prefill, decode steps, memory, time to the first token.

    hf-paged-flash bench generate                          # 8B and 1B, on the GPU
    hf-paged-flash bench generate --model path/to/model    # your own
    hf-paged-flash bench generate --models 8b --cases 1x512,32x1024 --compile none,max-autotune-no-cudagraphs
    hf-paged-flash bench generate --models 8b --cases flat:512x8192 --implementations paged_flash

Beside each batch: the floor, which is the bytes of weights and K/V over the copy bandwidth measured in the same run,
and one replay of a CUDA graph of the same step over dense K/V under sdpa; beside ours one replay of its own graph by
itself. Prefill is a call of one new token, a step what each of
the others adds, tokens/s are of the whole call. Memory is the device's, over the weights. The logits of the first
steps must agree between the implementations: exit status 1 where they don't, and no row of that batch.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from transformers import PreTrainedModel

import hf_paged_flash  # noqa: F401  registers "paged_flash"
from hf_paged_flash.eval.bench.first_token import in_new_processes, knows_prefixes, with_and_without_prefix
from hf_paged_flash.eval.bench.generate_calls import IMPLEMENTATIONS, Measured, difference, measure, step_ms
from hf_paged_flash.eval.bench.generate_cases import FORMS, MODELS, Case, case_of, load, model_name
from hf_paged_flash.eval.bench.step_bounds import COPIED_BYTES, copy_gbps, floor_ms, replay_ms
from hf_paged_flash.eval.bench.timing import bench_device
from hf_paged_flash.eval.device_memory import release_unused
from hf_paged_flash.eval.report import console, final_line, launch, names_of, reason_of
from hf_paged_flash.eval.results import Recorder, device_name, results_folder, versions

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

CASES = "1x512,1x16384,8x2048,32x1024,ragged:32x4096,prefix:2000+50,cold:512"
STATIC_CASES = "1x512,32x1024"
MODES = ("none", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# ||x - y|| / ||y|| of logits in bf16, after tens of layers
TOLERANCE = 0.1
POINTS = 128  # of a series of steps
GIB = 2**30


@dataclass
class Run:
    """What a call of the command measures with, and where it puts it."""

    implementations: list[str]
    modes: list[str | None]
    static_cases: list[str]
    recorder: Recorder
    gbps: float
    wrong: list[dict] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)

    def write(self, wrong_before: int) -> None:
        """Writes what a case recorded, so that it stays whatever comes after; nothing where it was wrong."""
        if len(self.wrong) > wrong_before:
            self.recorder.rows.clear()
        self.rows += [
            {key: row[key] for key in ("case", "impl", "metric", "value")}
            for row in self.recorder.rows
            if row["metric"] != "step_ms"
        ]
        self.recorder.write()
        self.recorder.rows.clear()  # kept where there is no folder

    def variants(self, written: str) -> list[tuple[str, str | None]]:
        """(implementation, mode of torch.compile) for the case that is written so; peers compile as they do."""
        return [
            (impl, mode)
            for impl in self.implementations
            for mode in (self.modes if impl == "paged_flash" else [None])
            if impl != "static_compile" or written in self.static_cases
        ]


def _batch(model: PreTrainedModel, name: str, written: str, case: Case, run: Run) -> Table:
    """Prefill, steps and memory of one batch on every implementation."""
    floor = floor_ms(model, case, run.gbps)
    try:
        replay = replay_ms(model, case)
    except RuntimeError as error:  # what can't be captured, out of memory too
        console().print(f"– {written}, no replay: {reason_of(error)}", style="yellow", markup=False)
        replay = None
    table = Table(title=f"{name}, {written}, {case.new} new; a step's floor {floor:.2f} ms"
                  + ("" if replay is None else f", bare replay {replay:.2f} ms"))  # fmt: skip
    for heading in ("generate() with", "prefill, ms", "step, ms", "× floor", "× graph", "tokens/s",
                    "GiB over weights (torch's)", "logits differ by"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "generate() with" else "right")
    first: Measured | None = None
    for impl, mode in run.variants(written):
        found = measure(model, impl, mode, case)
        label = impl if mode is None else f"{impl}, {mode}"
        row = case.row(name, mode)
        if found.reason is not None:
            if found.reason == "out of memory":
                run.recorder.add(row, impl, "out_of_memory", 1)
            table.add_row(label, found.reason)
            continue
        apart = None if first is None else difference(found, first)
        first = first or found
        found.logits = found.logits if found is first else None
        if apart is not None and not apart <= TOLERANCE:
            run.wrong.append({**row, "impl": impl, "logits differ by": apart})
        table.add_row(label, *_numbers(found, floor), "–" if apart is None else f"{apart:.1e}")
        _record(run.recorder, row, impl, found, floor, replay)
    return table


def _numbers(found: Measured, floor: float) -> list[str]:
    numbers = [f"{found.prefill_ms:,.1f}", f"{found.decode_ms:.2f}", f"{found.decode_ms / floor:.2f}"]
    numbers.append("–" if found.graph_ms is None else f"{found.decode_ms / found.graph_ms:.2f}")
    memory = "–" if found.peak is None else f"{found.peak / GIB:.2f} ({found.torch_peak / GIB:.2f})"
    return [*numbers, f"{found.tok_s:,.0f}", memory]


def _record(recorder: Recorder, row: dict, impl: str, found: Measured, floor: float, replay: float | None) -> None:
    values = {"prefill_ms": found.prefill_ms, "decode_ms": found.decode_ms, "tok_s": found.tok_s, "read_ms": floor}
    if replay is not None:
        values["replay_ms"] = replay
    if found.graph_ms is not None:
        values["graph_ms"] = found.graph_ms
    if found.peak is not None:
        values |= {"peak_gib": found.peak / GIB, "torch_peak_gib": found.torch_peak / GIB}
    for metric, value in values.items():
        recorder.add(row, impl, metric, value)


def _prefix(model: PreTrainedModel, name: str, written: str, case: Case, run: Run) -> Table | str:
    """Time to the first token with and without a cached prefix."""
    if "paged_flash" not in run.implementations:
        return f"– {written}: for paged_flash alone"
    if not knows_prefixes():
        return f"– {written}: PagedCache has no `prefix_caching` in this version"
    table = Table(title=f"{name}, {written}: time to the first token, warm")
    for heading in ("paged_flash", "without, ms", "with, ms", "×"):
        table.add_column(heading, justify="left" if heading == "paged_flash" else "right")
    for mode in run.modes:
        times = with_and_without_prefix(model, mode, case)
        for prefix, ms in times.items():
            run.recorder.add(case.row(name, mode) | {"prefix": prefix}, "paged_flash", "ttft_ms", ms)
        without, cached = times[0], times[case.prefix]
        table.add_row(mode or "not compiled", f"{without:,.1f}", f"{cached:,.1f}", f"{cached / without:.2f}")
    return table


def _cold(source: str, name: str, written: str, case: Case, run: Run, device: torch.device) -> Table:
    """Time to the first token of a process."""
    table = Table(title=f"{name}, {written}: time to the first token of a new process, ms")
    for heading in ("generate() with", "no kernel compiled before", "kernels on disk", "again"):
        table.add_column(heading, justify="left" if heading == "generate() with" else "right")
    for impl in (one for one in run.implementations if one != "static_compile"):  # its prefill is dynamic_sdpa's
        times = in_new_processes(impl, source, case, device)
        for metric, ms in times.items():
            run.recorder.add(case.row(name), impl, metric, ms)
        cells = (times.get(metric) for metric in ("ttft_cold_ms", "ttft_process_ms", "ttft_ms"))
        table.add_row(impl, *("–" if ms is None else f"{ms:,.0f}" for ms in cells))
    return table


def _flat(model: PreTrainedModel, name: str, written: str, case: Case, run: Run) -> Table:
    """Time of every step of a long call, as means of up to POINTS stretches."""
    table = Table(title=f"{name}, {written}: ms a step")
    for heading in ("generate() with", "first tenth", "last tenth"):
        table.add_column(heading, justify="left" if heading == "generate() with" else "right")
    for impl, mode in run.variants(written):
        times = step_ms(model, impl, mode, case)
        stretches = torch.tensor(times).chunk(POINTS)
        ends = torch.tensor([len(stretch) for stretch in stretches]).cumsum(0).tolist()
        series = [[end, float(stretch.mean())] for end, stretch in zip(ends, stretches, strict=True)]
        run.recorder.add(case.row(name, mode), impl, "step_ms", series)
        tenth = max(1, len(times) // 10)
        ends = (sum(part) / tenth for part in (times[:tenth], times[-tenth:]))
        table.add_row(impl if mode is None else f"{impl}, {mode}", *(f"{ms:.2f}" for ms in ends))
    return table


def _model(source: str, written: dict[str, Case], run: Run, device: torch.device) -> None:
    """Every case on one model; prints each when it is there, and what it took."""
    name = model_name(source)
    start = time.perf_counter()
    release_unused(device)  # weights that shared memory with what was before would keep the rest of it from the device
    model = load(source, device)
    console().print(f"{name}: loaded in {time.perf_counter() - start:.0f} s")
    for text, case in written.items():
        start, wrong = time.perf_counter(), len(run.wrong)
        if case.kind == "cold":
            shown = _cold(source, name, text, case, run, device)
        else:
            kinds = {"prefix": _prefix, "flat": _flat}
            shown = kinds.get(case.kind, _batch)(model, name, text, case, run)
        run.write(wrong)
        console().print(shown)
        console().print(f"{name}, {text}: {time.perf_counter() - start:.0f} s\n")


@app.command()
def main(
    models: Annotated[str, typer.Option(help=f"with random weights, some of {', '.join(MODELS)}")] = "8b,1b",
    model: Annotated[str | None, typer.Option(help="a model's path, instead of those")] = None,
    cases: Annotated[str, typer.Option(help="; ".join(FORMS.values()))] = CASES,
    implementations: Annotated[str, typer.Option(help="what to run")] = ",".join(IMPLEMENTATIONS),
    static_cases: Annotated[str, typer.Option(help="the cases of static_compile, which takes minutes")] = STATIC_CASES,
    compile: Annotated[str, typer.Option(help=f"modes of torch.compile for paged_flash: {', '.join(MODES)}")] = "none",
    new: Annotated[int, typer.Option(help="new tokens", min=4)] = 128,
    device: Annotated[str, typer.Option(help="torch device; a CPU only shows that the command works")] = "cuda",
    record: Annotated[bool, typer.Option(help="append rows to eval/results/generate.jsonl")] = False,
    out: Annotated[Path | None, typer.Option(help="append rows in this folder instead")] = None,
) -> None:
    """generate() with paged_flash against DynamicCache + sdpa and StaticCache + compile."""
    sources = [model] if model is not None else names_of(models, tuple(MODELS), "models")
    written = {name: case_of(name, new) for name in names_of(cases, None, "cases")}
    modes = [None if mode == "none" else mode for mode in names_of(compile, MODES, "compile")]
    names, settled = names_of(implementations, tuple(IMPLEMENTATIONS), "implementations"), bench_device(device)
    recorder = Recorder("generate", device=device, folder=results_folder(record, out))
    gbps = copy_gbps(settled)
    recorder.add({"bytes": COPIED_BYTES[settled.type]}, "copy", "gbps", gbps)
    console().print(f"{device_name(device)}: copies at {gbps:,.0f} GB/s")
    run = Run(names, modes, names_of(static_cases, None, "static_cases"), recorder, gbps)
    for source in sources:
        _model(source, written, run, settled)
    summary = {"bench": "generate", "run": recorder.run, "gpu": device_name(device), **versions()}
    final_line({**summary, "rows": run.rows, "wrong": run.wrong})
    if run.wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    launch(app)
