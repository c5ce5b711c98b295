"""Training steps of a Llama-1B-shaped model with random weights: tokens a second and peak memory, by length.

    hf-paged-flash bench training                                # 4,096, 16,384 and 65,536 tokens, on the GPU
    hf-paged-flash bench training --lengths 65536 --implementations paged_flash,sdpa

Llama-3.2-1B's layers (16 of width 2048, 32 query and 8 key/value heads of width 64) over a vocabulary of 32,000, in
bf16; one row of random tokens, AdamW. From 32,768 tokens on every implementation checkpoints its gradients, below none
does. What does not fit is recorded as out of memory. All start from the same weights and see the same tokens: losses
that differ are exit status 1, and no row.
"""

import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import hf_paged_flash  # noqa: F401  registers "paged_flash"
from hf_paged_flash.eval.bench.timing import bench_device, shapes_of
from hf_paged_flash.eval.device_memory import in_use, release_unused
from hf_paged_flash.eval.report import console, final_line, launch, names_of
from hf_paged_flash.eval.results import Recorder, device_name, results_folder, versions

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

IMPLEMENTATIONS = ("paged_flash", "sdpa", "eager")
LENGTHS = (4096, 16384, 65536)
CHECKPOINTED_FROM = 32768
# Losses in bf16 may differ by so much, relative to the first implementation's.
TOLERANCE = 5e-3
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One row of `s` tokens through `layers` layers of width `hidden_size`, with or without gradient checkpointing."""

    s: int
    layers: int = 16
    hidden_size: int = 2048

    @property
    def checkpointing(self) -> bool:
        return self.s >= CHECKPOINTED_FROM

    @property
    def row(self) -> dict:
        return {"model": "llama-1b", "b": 1, **asdict(self), "checkpointing": self.checkpointing}


@dataclass
class Measured:
    """What the steps of one implementation gave; no numbers where they ran out of memory.

    Attributes:
        peak: bytes torch's allocator held at most; device: bytes of the device in use after the steps, the context
            and everything else that runs there included. None on a CPU.
        losses: of every step, the first included.
    """

    tokens_per_s: float | None = None
    peak: int | None = None
    device: int | None = None
    losses: list[float] = field(default_factory=list)
    out_of_memory: bool = False


def config_of(case: Case) -> LlamaConfig:
    """Llama-3.2-1B's proportions: heads of width 64, four to a key/value head, an MLP four times as wide."""
    heads = case.hidden_size // 64
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=case.hidden_size,
        intermediate_size=4 * case.hidden_size,
        num_hidden_layers=case.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=64,
        max_position_embeddings=case.s,
        tie_word_embeddings=True,
        use_cache=False,
    )


def model_of(impl: str, case: Case, device: torch.device) -> PreTrainedModel:
    """The model to train, in bf16; the same weights for every implementation."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config_of(case), attn_implementation=impl, dtype=torch.bfloat16)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _train(impl: str, case: Case, steps: int, device: torch.device, measured: Measured) -> None:
    model = model_of(impl, case, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    generator = torch.Generator(device).manual_seed(1)
    tokens = torch.randint(model.config.vocab_size, (1, case.s), generator=generator, device=device)
    times = []
    for _ in range(1 + steps):  # the first compiles, and makes the optimizer's state
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        measured.losses.append(loss.item())  # waits for the device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    measured.tokens_per_s = case.s / statistics.median(times[1:])


def measure(impl: str, case: Case, steps: int, device: torch.device) -> Measured:
    """One untimed step and `steps` timed ones of a new model."""
    measured = Measured()
    release_unused(device)  # the model before holds itself in cycles
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        _train(impl, case, steps, device, measured)
    except torch.OutOfMemoryError:
        return Measured(out_of_memory=True)
    if device.type == "cuda":
        measured.peak, measured.device = torch.cuda.max_memory_allocated(device), in_use(device)
    return measured


def loss_difference(found: dict[str, Measured]) -> float | None:
    """The largest relative difference between any step's losses; None with fewer than two to compare."""
    ran = [item.losses for item in found.values() if item.losses]
    if len(ran) < 2:
        return None
    differences = [
        abs(loss - first) / abs(first) for losses in ran[1:] for loss, first in zip(losses, ran[0], strict=True)
    ]
    return max(differences, key=lambda x: float("inf") if x != x else x)


def _table(measured: list[tuple[Case, dict[str, Measured]]], implementations: list[str], device: str) -> Table:
    what = "tokens/s, peak GiB (in use on the device)"
    table = Table(title=f"training steps of a Llama of 1B, bf16, {device_name(device)}: {what}")
    for heading in ("tokens", "checkpointing", *implementations, "losses differ by"):
        table.add_column(heading, justify="right")
    for case, found in measured:
        cells = []
        for impl in implementations:
            item = found[impl]
            if item.out_of_memory:
                cells.append("out of memory")
                continue
            memory = "" if item.peak is None else f", {item.peak / GIB:.1f} ({item.device / GIB:.1f})"
            cells.append(f"{item.tokens_per_s:,.0f}{memory}")
        apart = loss_difference(found)
        table.add_row(f"{case.s:,}", "yes" if case.checkpointing else "no", *cells,
                      "–" if apart is None else f"{apart:.1e}")  # fmt: skip
    return table


def _record(recorder: Recorder, case: Case, found: dict[str, Measured]) -> None:
    for impl, item in found.items():
        if item.out_of_memory:
            recorder.add(case.row, impl, "out_of_memory", 1)
            continue
        recorder.add(case.row, impl, "tokens_per_s", item.tokens_per_s)
        recorder.add(case.row, impl, "first_loss", item.losses[0])
        recorder.add(case.row, impl, "last_loss", item.losses[-1])
        if item.peak is not None:
            recorder.add(case.row, impl, "peak_gib", item.peak / GIB)
            recorder.add(case.row, impl, "device_gib", item.device / GIB)


@app.command()
def main(
    lengths: Annotated[str, typer.Option(help="tokens of the row")] = ",".join(map(str, LENGTHS)),
    steps: Annotated[int, typer.Option(help="timed steps, after one that is not", min=1)] = 2,
    layers: Annotated[int, typer.Option(help="of the model", min=1)] = 16,
    hidden_size: Annotated[int, typer.Option(help="of the model, a multiple of 256", min=256)] = 2048,
    implementations: Annotated[str, typer.Option(help="what to train with")] = ",".join(IMPLEMENTATIONS),
    device: Annotated[str, typer.Option(help="torch device; a CPU only shows that the command works")] = "cuda",
    record: Annotated[bool, typer.Option(help="append rows to eval/results/training.jsonl")] = False,
    out: Annotated[Path | None, typer.Option(help="append rows in this folder instead")] = None,
) -> None:
    """Training steps of a Llama-1B-shaped model: paged_flash against sdpa and eager."""
    names = names_of(implementations, IMPLEMENTATIONS, "implementations")
    sizes = [size for (size,) in shapes_of(lengths.replace(",", ";"), ((4096,),))]
    settled = bench_device(device)
    recorder = Recorder("training", device=device, folder=results_folder(record, out))
    measured = []
    for size in sizes:
        case = Case(size, layers, hidden_size)
        measured.append((case, {impl: measure(impl, case, steps, settled) for impl in names}))
        _record(recorder, *measured[-1])
    console().print(_table(measured, names, device))
    wrong = []
    for case, found in measured:
        apart = loss_difference(found)
        if apart is not None and not apart <= TOLERANCE:
            wrong.append({**case.row, "losses": {impl: item.losses for impl, item in found.items()}})
    rows = [{key: row[key] for key in ("case", "impl", "metric", "value")} for row in recorder.rows]
    if not wrong:
        recorder.write()
    summary = {"bench": "training", "run": recorder.run, "gpu": device_name(device), **versions()}
    final_line({**summary, "rows": rows, "wrong": wrong})
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    launch(app)
