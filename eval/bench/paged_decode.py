"""One decode step over a scrambled block table, against dense K/V through SDPA and paged K/V through FlashInfer.

    hf-paged-flash bench paged-decode                          # eight shapes, block size 16, bf16 on the GPU
    hf-paged-flash bench paged-decode --block-sizes 16,64,256 --shapes "64,4096;16,32768" --implementations paged_flash

Time of one call inside a CUDA graph; K/V sets are rotated, so that L2 does not serve repeats. GB/s counts the bytes of
the K/V that are read. Ours is checked against fp64 before it is timed; exit status 1 where it is wrong.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hf_paged_flash.eval.bench.attention_calls import SDPA_BACKENDS
from hf_paged_flash.eval.bench.correctness import MAX_ERROR_RATIO, error_ratio
from hf_paged_flash.eval.bench.timing import bench_device, replayed_us, rotated_sets, shapes_of
from hf_paged_flash.eval.report import console, final_line, launch, names_of, print_failures, reason_of
from hf_paged_flash.eval.results import Recorder, device_name, results_folder, versions

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

IMPLEMENTATIONS = ("paged_flash", "flashinfer", "sdpa_cudnn", "sdpa_fa2")
# batch, tokens of context in each row
SHAPES = ((1, 2048), (1, 32768), (8, 4096), (32, 2048), (64, 4096), (128, 1024), (1, 131072), (16, 32768))


@dataclass(frozen=True)
class Case:
    """`b` rows of `ctx` tokens in blocks of `block_size`; `h` query heads, `hk` key/value heads of width `d`; bf16."""

    b: int
    ctx: int
    block_size: int
    h: int = 32
    hk: int = 8
    d: int = 128

    @property
    def kv_bytes(self) -> int:
        return 2 * 2 * self.b * self.ctx * self.hk * self.d


@dataclass(frozen=True)
class PagedSet:
    """`k`, `v` (num_blocks, block_size, Hkv, D) bf16; `block_table` (B, blocks) int32, each row's blocks in order."""

    k: torch.Tensor
    v: torch.Tensor
    block_table: torch.Tensor

    def dense(self, ctx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same K/V as (B, ctx, Hkv, D)."""
        k, v = (x[self.block_table.long()].flatten(1, 2)[:, :ctx] for x in (self.k, self.v))
        return k, v


def paged_sets(case: Case, device: torch.device) -> list[PagedSet]:
    """Standard normal K/V in blocks that are handed out in random order, the same for a case every time."""
    generator = torch.Generator(device).manual_seed(0)
    blocks = math.ceil(case.ctx / case.block_size)
    shape = (case.b * blocks, case.block_size, case.hk, case.d)
    sets = []
    for _ in range(rotated_sets(case.kv_bytes, device)):
        k, v = (torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(2))
        order = torch.randperm(case.b * blocks, generator=generator, device=device).to(torch.int32)
        sets.append(PagedSet(k, v, order.view(case.b, blocks)))
    return sets


def decode_calls(impl: str, case: Case, q: torch.Tensor, sets: list[PagedSet]) -> list[Callable[[], torch.Tensor]]:
    """One function of no arguments for each K/V set, each running `impl` for one token a row, q (B, 1, H, D)."""
    if impl == "paged_flash":
        from hf_paged_flash import flash_attn_with_kvcache

        lengths = torch.full((case.b,), case.ctx, dtype=torch.int32, device=q.device)
        return [
            partial(
                flash_attn_with_kvcache, q, s.k, s.v, cache_seqlens=lengths, block_table=s.block_table, causal=True
            )
            for s in sets
        ]
    if impl == "flashinfer":
        return _flashinfer_calls(case, q, sets)
    q = q.transpose(1, 2)
    dense = [[x.transpose(1, 2).contiguous() for x in s.dense(case.ctx)] for s in sets]
    return [partial(scaled_dot_product_attention, q, k, v, enable_gqa=True) for k, v in dense]


def _flashinfer_calls(case: Case, q: torch.Tensor, sets: list[PagedSet]) -> list[Callable[[], torch.Tensor]]:
    import flashinfer

    calls = []
    for s in sets:
        # A plan belongs to its block table, and a workspace to its plan.
        workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device=q.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        blocks = s.block_table.shape[1]
        indptr = torch.arange(case.b + 1, dtype=torch.int32, device=q.device) * blocks
        last = torch.full((case.b,), case.ctx - (blocks - 1) * case.block_size, dtype=torch.int32, device=q.device)
        wrapper.plan(
            indptr, s.block_table.flatten(), last, case.h, case.hk, case.d, case.block_size,
            q_data_type=q.dtype, kv_data_type=s.k.dtype,
        )  # fmt: skip
        calls.append(partial(wrapper.run, q[:, 0], (s.k, s.v)))
    return calls


@torch.no_grad()
def measure(
    case: Case, implementations: list[str], device: torch.device
) -> tuple[dict[str, float], dict[str, str], float | None]:
    """Microseconds of each implementation that runs, why others do not, and our `error_ratio` (None if not run).

    A peer's failure is reported and the others go on; ours raises.
    """
    sets = paged_sets(case, device)
    q = torch.randn(case.b, 1, case.h, case.d, device=device, dtype=torch.bfloat16)
    times, failures, ratio = {}, {}, None
    for impl in implementations:
        try:
            calls = decode_calls(impl, case, q, sets)
            if impl == "paged_flash":
                ratio = error_ratio(calls[0](), q, *sets[0].dense(case.ctx), causal=True)
            with sdpa_kernel(SDPA_BACKENDS[impl]) if impl in SDPA_BACKENDS else nullcontext():
                times[impl] = replayed_us(calls, device)
        except Exception as error:
            # Peers raise whatever they like (ImportError, RuntimeError) where they are absent or refuse a shape.
            if impl == "paged_flash":
                raise
            failures[impl] = reason_of(error)
        calls = None
    return times, failures, ratio


def _table(measured: list[tuple[Case, dict, dict, float | None]], implementations: list[str], device: str) -> Table:
    table = Table(title=f"decode step, µs (GB/s of K/V), {device_name(device)} (×: ours over the peer's GB/s)")
    for heading in ("B", "context", "block", *implementations, "error / eager's"):
        table.add_column(heading, justify="right")
    for case, times, failures, ratio in measured:
        ours = times.get("paged_flash")
        cells = []
        for impl in implementations:
            if impl in failures:
                cells.append("–")
                continue
            cell = f"{times[impl]:,.1f} ({case.kv_bytes / times[impl] / 1e3:,.0f})"
            cells.append(f"[bold]{cell}[/bold]" if impl == "paged_flash" else cell)
            if ours is not None and impl != "paged_flash":
                cells[-1] += f" {times[impl] / ours:.2f}×"
        table.add_row(
            str(case.b), str(case.ctx), str(case.block_size), *cells, "–" if ratio is None else f"{ratio:.2f}"
        )
    return table


@app.command()
def main(
    shapes: Annotated[str | None, typer.Option(help="B,context;…; default: the eight shapes")] = None,
    block_sizes: Annotated[str, typer.Option(help="tokens a block, each 16 to 256")] = "16",
    implementations: Annotated[str, typer.Option(help="what to time")] = ",".join(IMPLEMENTATIONS),
    device: Annotated[str, typer.Option(help="torch device; a CPU only shows that the command works")] = "cuda",
    record: Annotated[bool, typer.Option(help="append rows to eval/results/paged_decode.jsonl")] = False,
    out: Annotated[Path | None, typer.Option(help="append rows in this folder instead")] = None,
) -> None:
    """One decode step: paged_flash against FlashInfer (paged) and SDPA (dense; cuDNN, FlashAttention-2)."""
    from tqdm import tqdm

    names = names_of(implementations, IMPLEMENTATIONS, "implementations")
    chosen, settled = shapes_of(shapes, SHAPES), bench_device(device)
    sizes = [int(size) for size in names_of(block_sizes, ("16", "32", "64", "128", "256"), "block_sizes")]
    recorder = Recorder("paged_decode", device=device, folder=results_folder(record, out))
    measured = []
    for case in tqdm([Case(*shape, size) for shape in chosen for size in sizes], unit="case"):
        times, failures, ratio = measure(case, names, settled)
        measured.append((case, times, failures, ratio))
        for impl, us in times.items():
            recorder.add(asdict(case), impl, "us", us)
            recorder.add(asdict(case), impl, "gbps", case.kv_bytes / us / 1e3)
    screen = console()
    screen.print(_table(measured, names, device))
    print_failures(screen, [failures for _, _, failures, _ in measured])
    wrong = [asdict(case) for case, _, _, ratio in measured if ratio is not None and not ratio <= MAX_ERROR_RATIO]
    if not wrong:
        recorder.write()
    rows = [{**asdict(case), "us": times, "error_ratio": ratio} for case, times, _, ratio in measured]
    summary = {"bench": "paged_decode", "run": recorder.run, "gpu": device_name(device), **versions()}
    final_line({**summary, "rows": rows, "wrong": wrong})
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    launch(app)
