"""Forward attention against torch's own: FlashAttention-2 and cuDNN through SDPA, and FlexAttention, in TFLOP/s.

    hf-paged-flash bench flash-attention                       # every shape, causal and full, bf16 on the GPU
    hf-paged-flash bench flash-attention --shapes 1,32,8,16384,128 --masks causal

Every implementation gets the layout it is made for. Ours is checked against fp64 before it is timed; exit status 1
where it is wrong. Causal attention counts half of the products.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hf_paged_flash.eval.bench.correctness import MAX_ERROR_RATIO, error_ratio
from hf_paged_flash.eval.bench.timing import bench_device, median_ms, shapes_of
from hf_paged_flash.eval.report import console, final_line, launch, names_of, print_failures, reason_of
from hf_paged_flash.eval.results import Recorder, device_name, results_folder, versions

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

IMPLEMENTATIONS = ("paged_flash", "sdpa_fa2", "sdpa_cudnn", "flex")
SDPA_BACKENDS = {"sdpa_fa2": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}
# batch, query heads, key/value heads, sequence length, head_dim
SHAPES = (
    (16, 32, 8, 1024, 128),
    (4, 32, 8, 4096, 128),
    (1, 32, 8, 16384, 128),
    (4, 32, 32, 4096, 128),
    (4, 32, 8, 4096, 64),
    (1, 32, 8, 16384, 64),
    (2, 16, 8, 4096, 256),
)


@dataclass(frozen=True)
class Case:
    """One measurement's shape; `b`, `h`, `hk`, `s`, `d`: batch, query heads, key/value heads, length, head_dim."""

    b: int
    h: int
    hk: int
    s: int
    d: int
    causal: bool

    @property
    def flops(self) -> float:
        """4·B·H·S²·D of the two products, half of that under a causal mask."""
        return 4 * self.b * self.h * self.s**2 * self.d * (0.5 if self.causal else 1)

    @property
    def row(self) -> dict:
        return {"pass": "fwd", **asdict(self)}


def inputs_of(case: Case, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Standard normal q (B, S, H, D) and k, v (B, S, Hkv, D) in bf16, the same for a case every time."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((case.b, case.s, heads, case.d) for heads in (case.h, case.hk, case.hk))
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for shape in shapes)
    return q, k, v


def forward_call(
    impl: str, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """A function of no arguments that runs `impl` once; inputs as of `inputs_of`. Output (B, S, H, D), or (B, H, S, D)
    of torch's own implementations, which work on contiguous copies in that layout."""
    if impl == "paged_flash":
        from hf_paged_flash import flash_attn_func

        return partial(flash_attn_func, q, k, v, causal=case.causal)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    gqa = case.h != case.hk
    if impl == "flex":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = None
        if case.causal:
            mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, case.s, case.s, device=q.device.type)
        return partial(torch.compile(flex_attention, dynamic=False), q, k, v, block_mask=mask, enable_gqa=gqa)

    return partial(scaled_dot_product_attention, q, k, v, is_causal=case.causal, enable_gqa=gqa)


@torch.no_grad()
def measure(
    case: Case, implementations: list[str], device: torch.device
) -> tuple[dict[str, float], dict[str, str], float | None]:
    """TFLOP/s of each implementation that runs, why each other one does not, and our `error_ratio` (None if not run).

    A peer's failure is reported and the others go on; ours raises.
    """
    q, k, v = inputs_of(case, device)
    speeds, failures, ratio = {}, {}, None
    for impl in implementations:
        try:
            call = forward_call(impl, case, q, k, v)
            if impl == "paged_flash":
                ratio = error_ratio(call(), q, k, v, causal=case.causal)
            # SDPA's back end is chosen around the timing: the choice costs host time.
            with sdpa_kernel(SDPA_BACKENDS[impl]) if impl in SDPA_BACKENDS else nullcontext():
                speeds[impl] = case.flops / median_ms(call, device) / 1e9
        except Exception as error:
            # Peers raise whatever they like (RuntimeError, compiler errors) for shapes that they do not support.
            if impl == "paged_flash":
                raise
            failures[impl] = reason_of(error)
    return speeds, failures, ratio


def _table(measured: list[tuple[Case, dict, dict, float | None]], implementations: list[str], device: str) -> Table:
    table = Table(title=f"attention forward, TFLOP/s, {device_name(device)} (in brackets: ours over the peer)")
    for heading in ("B", "H", "Hkv", "S", "D", "mask", *implementations, "error / eager's"):
        table.add_column(heading, justify="right")
    for case, speeds, failures, ratio in measured:
        ours = speeds.get("paged_flash")
        cells = []
        for impl in implementations:
            if impl in failures:
                cells.append("–")
            elif impl == "paged_flash" or ours is None:
                cells.append(f"[bold]{speeds[impl]:,.1f}[/bold]")
            else:
                cells.append(f"{speeds[impl]:,.1f} ({ours / speeds[impl]:.2f}×)")
        shape = [str(n) for n in (case.b, case.h, case.hk, case.s, case.d)]
        table.add_row(*shape, "causal" if case.causal else "full", *cells, "–" if ratio is None else f"{ratio:.2f}")
    return table


@app.command()
def main(
    shapes: Annotated[str | None, typer.Option(help="B,H,Hkv,S,D;…; default: the seven shapes")] = None,
    masks: Annotated[str, typer.Option(help="which of causal and full")] = "causal,full",
    implementations: Annotated[str, typer.Option(help="what to time")] = ",".join(IMPLEMENTATIONS),
    device: Annotated[str, typer.Option(help="torch device; a CPU only shows that the command works")] = "cuda",
    record: Annotated[bool, typer.Option(help="append rows to eval/results/flash_attention.jsonl")] = False,
    out: Annotated[Path | None, typer.Option(help="append rows in this folder instead")] = None,
) -> None:
    """Forward attention: paged_flash against SDPA (FlashAttention-2, cuDNN) and FlexAttention."""
    from tqdm import tqdm

    names = names_of(implementations, IMPLEMENTATIONS, "implementations")
    causals = [name == "causal" for name in names_of(masks, ("causal", "full"), "masks")]
    chosen, settled = shapes_of(shapes, SHAPES), bench_device(device)
    recorder = Recorder("flash_attention", device=device, folder=results_folder(record, out))
    measured = []
    for case in tqdm([Case(*shape, causal) for shape in chosen for causal in causals], unit="case"):
        speeds, failures, ratio = measure(case, names, settled)
        measured.append((case, speeds, failures, ratio))
        for impl, tflops in speeds.items():
            recorder.add(case.row, impl, "tflops", tflops)
    screen = console()
    screen.print(_table(measured, names, device))
    print_failures(screen, [failures for _, _, failures, _ in measured])
    wrong = [case.row for case, _, _, ratio in measured if ratio is not None and not ratio <= MAX_ERROR_RATIO]
    if not wrong:
        recorder.write()
    rows = [{**case.row, "tflops": speeds, "error_ratio": ratio} for case, speeds, _, ratio in measured]
    summary = {"bench": "flash_attention", "run": recorder.run, "gpu": device_name(device), **versions()}
    final_line({**summary, "rows": rows, "wrong": wrong})
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    launch(app)
