"""K/V memory by workload: what DynamicCache, StaticCache and PagedCache reserve, and what of it is waste.

    hf-paged-flash memory                                       # counted: minutes on a CPU, no GPU needed
    hf-paged-flash memory --workloads ragged --block-sizes 16,64,256
    hf-paged-flash memory --device cuda                         # measured: generate() with random weights on a GPU

Counted, caches of Llama-3.1-8B's shape are fed on the meta device as a model feeds them (`eval/fed_caches.py`), and
asked after every forward; PagedCache counts whole pages of 2 MiB, as on a GPU. Needed is the K/V of each token that a
later step may attend to, once; waste is what is reserved beyond that, over all forwards.
Measured is memory over the weights at its peak: of the device (torch.cuda.mem_get_info, pages of PagedCache included)
and of torch's allocator. Exit status 1: PagedCache wastes more than `--tolerance` percent of the ragged batch at the
smallest block size, or its device memory exceeds DynamicCache's where that holds 1 GiB of K/V or more.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from hf_paged_flash.eval.bench.timing import bench_device
from hf_paged_flash.eval.fed_caches import FedCaches, Sample
from hf_paged_flash.eval.generate_memory import Peak, peaks_of
from hf_paged_flash.eval.report import console, final_line, launch, names_of
from hf_paged_flash.eval.results import Recorder, device_name, results_folder, versions
from hf_paged_flash.eval.workloads import WORKLOADS, Workload

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

CACHES = {"dynamic": "DynamicCache", "static": "StaticCache", "paged": "PagedCache"}
BLOCK_SIZES = (16, 32, 64, 128, 256)
GIB = 2**30
POINTS = 60  # of a workload's forwards, in the results and in the picture

Held = dict[tuple[str, int | None], list[Sample]]


def count(workload: Workload, layers: int, block_sizes: list[int]) -> Held:
    """What each cache held after each forward of a workload."""
    caches = FedCaches(workload.config(layers), workload.columns, block_sizes)
    workload.feed(caches)
    return caches.samples


def waste(samples: list[Sample]) -> float:
    """The share of what was reserved that was not needed, over all forwards."""
    return 1 - sum(sample.needed for sample in samples) / sum(sample.reserved for sample in samples)


def over_time(samples: list[Sample]) -> list[list[float]]:
    """[forward, GiB reserved, GiB needed] of the first and the last forward, and of POINTS at most in all."""
    last = len(samples) - 1
    chosen = sorted({round(index * last / (POINTS - 1)) for index in range(POINTS)})
    return [[index, samples[index].reserved / GIB, samples[index].needed / GIB] for index in chosen]


def _counted(chosen: list[str], scale: float, layers: int, block_sizes: list[int], recorder: Recorder) -> dict:
    """Counts, prints and records; returns {workload: {(cache, block size): waste}}."""
    wasted = {}
    for name in chosen:
        workload = WORKLOADS[name](scale)
        held = count(workload, layers, block_sizes if name == "ragged" else block_sizes[:1])
        table = Table(title=workload.title, caption=f"K/V of {layers} layers of Llama-3.1-8B's shape in bf16")
        table.add_column("cache")
        for heading in ("block size", "most reserved, GiB", "most needed, GiB", "waste"):
            table.add_column(heading, justify="right")
        for (kind, block_size), samples in held.items():
            reserved, needed = (max(getattr(s, what) for s in samples) / GIB for what in ("reserved", "needed"))
            share = waste(samples)
            row = (str(block_size or "–"), f"{reserved:.2f}", f"{needed:.2f}", f"{share:.1%}")
            table.add_row(CACHES[kind], *row, style="green" if kind == "paged" else "")
            case = {"workload": workload.name, "title": workload.title, "layers": layers}
            if block_size is not None:
                case["block_size"] = block_size
            recorder.add(case, kind, "reserved_gib", reserved)
            recorder.add(case, kind, "stored_gib", needed)
            recorder.add(case, kind, "waste_pct", share * 100)
            if block_size in (None, block_sizes[0]):
                recorder.add(case, kind, "gib_over_time", over_time(samples))
        console().print(table)
        wasted[name] = {key: waste(samples) for key, samples in held.items()}
    return wasted


def _measured(
    chosen: list[str], kinds: list[str], scale: float, layers: int, device: str, recorder: Recorder
) -> list[str]:
    """Measures, prints and records; returns the workloads in which PagedCache takes more than DynamicCache."""
    table = Table(title=f"memory over the weights at its peak, GiB: the device's (torch's), {device_name(device)}")
    for heading in ("generate() with", "K/V needed", *(CACHES[kind] for kind in kinds)):
        table.add_column(heading)
    above = []
    for name in chosen:
        workload = WORKLOADS[name](scale)
        held = count(workload, layers, [16])
        needed = max(sample.needed for sample in held["paged", 16]) / GIB
        case = {"workload": workload.name, "title": workload.title, "layers": layers}
        peaks = peaks_of(workload, kinds, layers, device)
        cells = []
        for kind, peak in peaks.items():
            if peak is None:
                recorder.add(case, kind, "out_of_memory", 1)
                cells.append("out of memory")
                continue
            recorder.add(case, kind, "device_gib", peak.device / GIB)
            recorder.add(case, kind, "peak_gib", peak.torch / GIB)
            recorder.add(case, kind, "stored_gib", needed)
            cells.append(f"{peak.device / GIB:.2f} ({peak.torch / GIB:.2f})")
        table.add_row(workload.title, f"{needed:.2f}", *cells)
        if max(sample.reserved for sample in held["dynamic", None]) >= GIB and takes_more(peaks):
            above.append(name)
    console().print(table)
    return above


def takes_more(peaks: dict[str, Peak | None]) -> bool:
    """Whether the device holds more at the peak under PagedCache than under DynamicCache."""
    if peaks.get("dynamic") is None or "paged" not in peaks:
        return False
    return peaks["paged"] is None or peaks["paged"].device > peaks["dynamic"].device


@app.command()
def main(
    workloads: Annotated[str, typer.Option(help="which, of " + ", ".join(WORKLOADS))] = ",".join(WORKLOADS),
    device: Annotated[str, typer.Option(help="cpu: count; cuda: measure generate()")] = "cpu",
    caches: Annotated[str, typer.Option(help="which are measured, with --device cuda")] = ",".join(CACHES),
    layers: Annotated[int, typer.Option(help="of the 8B shape's 32")] = 32,
    scale: Annotated[float, typer.Option(help="multiplies lengths and turns")] = 1.0,
    block_sizes: Annotated[str, typer.Option(help="tokens a block, counted on the ragged batch")] = ",".join(
        map(str, BLOCK_SIZES)
    ),
    tolerance: Annotated[float, typer.Option(help="largest waste in % on the ragged batch")] = 4.0,
    record: Annotated[bool, typer.Option(help="append rows to eval/results/memory.jsonl")] = False,
    out: Annotated[Path | None, typer.Option(help="append rows in this folder instead")] = None,
) -> None:
    """K/V memory of DynamicCache, StaticCache and PagedCache by workload: reserved, needed, wasted; or measured."""
    bench_device(device)
    recorder = Recorder("memory", device=device, folder=results_folder(record, out))
    chosen = names_of(workloads, tuple(WORKLOADS), "workloads")
    if device == "cpu":
        sizes = sorted(int(size) for size in names_of(block_sizes, tuple(map(str, BLOCK_SIZES)), "block_sizes"))
        wasted = _counted(chosen, scale, layers, sizes, recorder)
        passed = "ragged" not in wasted or wasted["ragged"]["paged", sizes[0]] * 100 <= tolerance
    else:
        kinds = names_of(caches, tuple(CACHES), "caches")
        passed = not _measured(chosen, kinds, scale, layers, device, recorder)
    # a series is for the picture
    rows = [
        {key: row[key] for key in ("case", "impl", "metric", "value")}
        for row in recorder.rows
        if row["metric"] != "gib_over_time"
    ]
    recorder.write()
    final_line({"bench": "memory", "run": recorder.run, **versions(), "passed": passed, "rows": rows})
    if not passed:
        raise typer.Exit(1)


if __name__ == "__main__":
    launch(app)
