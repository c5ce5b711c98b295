"""Perplexity and logits of attention implementations against eager, through three ways of running the model.

    hf-paged-flash perplexity                                            # the shipped model and held-out text
    hf-paged-flash perplexity meta-llama/Llama-3.1-8B --data wikitext --name wikitext-2-raw-v1 --dtype bfloat16
    accelerate launch -m hf_paged_flash.eval.perplexity my-model --data text.jsonl --implementations sdpa,paged_flash

The first implementation is the baseline: the others are compared with it window by window, on the same way's logits.
Exit status 1: some relative difference in perplexity is beyond `--tolerance`.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from hf_paged_flash.errors import ArgumentError, BackendError
from hf_paged_flash.eval.comparison import Result, beyond, evaluate, results_of
from hf_paged_flash.eval.report import console, final_line, finite, launch, names_of
from hf_paged_flash.eval.results import Recorder, device_name, results_folder, versions
from hf_paged_flash.eval.text import batched, load_text, strided_windows
from hf_paged_flash.eval.ways import OURS, WAYS

DTYPES = ("auto", "float32", "bfloat16", "float16")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _settle_device(device: str) -> torch.device:
    """The process's device: accelerate's choice for "auto" (one GPU a process under `accelerate launch`)."""
    from accelerate import PartialState

    if device == "cpu":
        return PartialState(cpu=True).device
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ArgumentError(f"`device` is {device!r}, but torch finds no GPU: leave it at auto, or pass cpu")
    return PartialState().device if device == "auto" else torch.device(device)


def _load(model: str | None, implementations: list[str], dtype: str, device: torch.device):
    """The model under the first implementation, which can run under all of them, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hf_paged_flash  # noqa: F401 (registers paged_flash)

    if model is None:
        from hf_paged_flash.eval import assets

        model = str(assets.model_path())
    implementation = implementations[0]
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=implementation)
        for implementation in reversed(implementations):  # the first one stays
            loaded.set_attn_implementation(implementation)
    except (OSError, ValueError) as error:  # what transformers raises for names that it doesn't know
        raise ArgumentError(f"{model} can't be loaded with {implementation!r}: {error}") from error
    return loaded.to(device).eval(), tokenizer


def _table(results: list[Result], baseline: str, tolerance: float) -> Table:
    table = Table(title=f"perplexity against {baseline}", caption=f"tolerance {tolerance:g}; bytes above the weights")
    for heading in ("way", "attention"):
        table.add_column(heading)
    for heading in ("ppl", "Δppl", "max|Δlogit|", "mean|Δ|", "KL", "top-1", "tokens/s", "peak MiB", "device MiB"):
        table.add_column(heading, justify="right")
    for row in results:
        mib = ["–" if b is None else f"{b / 2**20:,.0f}" for b in (row.peak_bytes, row.device_bytes)]
        delta = f"{row.delta_ppl:+.1e}" if row.implementation != baseline else ""
        colour = "red" if row in beyond([row], tolerance) else ("green" if row.implementation == OURS else "")
        table.add_row(
            row.way, row.implementation, f"{row.ppl:.4f}", delta, f"{row.max_abs_dlogit:.1e}",
            f"{row.mean_abs_dlogit:.1e}", f"{row.kl:.1e}", f"{row.top1:.2%}", f"{row.tokens_per_s:,.0f}", *mib,
            style=colour,
        )  # fmt: skip
    return table


@app.command()
def main(
    model: Annotated[str | None, typer.Argument(help="path or hub name; default: the shipped small model")] = None,
    data: Annotated[
        str | None, typer.Option(help="hub data set, or a .txt, .jsonl, .json or .parquet file; default: shipped text")
    ] = None,
    name: Annotated[str | None, typer.Option(help="configuration of a hub data set")] = None,
    split: Annotated[str, typer.Option(help="split of a hub data set")] = "test",
    column: Annotated[str, typer.Option(help="column that holds the text")] = "text",
    implementations: Annotated[str, typer.Option(help="what to compare, baseline first")] = f"eager,sdpa,{OURS}",
    ways: Annotated[str, typer.Option(help="ways through the model")] = ",".join(WAYS),
    window: Annotated[int, typer.Option(help="tokens a window; capped by the model's positions")] = 1024,
    stride: Annotated[int | None, typer.Option(help="tokens between windows; default: half a window")] = None,
    batch_size: Annotated[int, typer.Option(help="windows a batch")] = 8,
    chunk: Annotated[int, typer.Option(help="tokens a chunk, on the way `chunked`")] = 256,
    max_tokens: Annotated[int | None, typer.Option(help="use only so many tokens of the text")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: the checkpoint's")] = "auto",
    device: Annotated[str, typer.Option(help="torch device, or auto: accelerate's choice")] = "auto",
    tolerance: Annotated[
        float | None, typer.Option(help="largest relative Δppl; default: 1e-4 in float32, 1e-3 in other dtypes")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the report to this file")] = None,
    record: Annotated[bool, typer.Option(help="append rows to eval/results/perplexity.jsonl")] = False,
    out: Annotated[Path | None, typer.Option(help="append rows in this folder instead")] = None,
) -> None:
    """Perplexity, logits and cost of attention implementations against the first one."""
    import hf_paged_flash

    names = names_of(implementations, None, "implementations")
    if dtype not in DTYPES:
        raise ArgumentError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}")
    chosen_ways = names_of(ways, WAYS, "ways")
    settled = _settle_device(device)
    recorder = Recorder("perplexity", device=str(settled), folder=results_folder(record, out))
    loaded, tokenizer = _load(model, names, dtype, settled)
    window = min(window, getattr(loaded.config, "max_position_embeddings", None) or window)
    text = load_text(data, name=name, split=split, column=column)
    tokens = torch.tensor(tokenizer(text, verbose=False).input_ids[:max_tokens])
    batches = batched(strided_windows(len(tokens), window, window // 2 if stride is None else stride), batch_size)

    hf_paged_flash.reset_counters()
    results = _evaluate_share(loaded, tokens, batches, names, chosen_ways, chunk, settled)
    ran = asdict(hf_paged_flash.counters())
    in_dtype = str(loaded.dtype).removeprefix("torch.")
    tolerance = (1e-4 if loaded.dtype == torch.float32 else 1e-3) if tolerance is None else tolerance
    case = {"model": Path(model).name if model else "tiny_python", "dtype": in_dtype}
    report = {
        **case, "data": data or "held-out text", "window": window, "tolerance": tolerance, "gpu": device_name(settled),
        **versions(), "counters": ran, "results": [asdict(row) for row in results],
        "passed": not beyond(results, tolerance),
    }  # fmt: skip
    if _is_main_process():
        console().print(_table(results, names[0], tolerance))
        if json_file is not None:
            json_file.write_text(json.dumps(finite(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        _record(results, case, recorder)
        final_line(report)
    if not report["passed"]:
        raise typer.Exit(1)


def _evaluate_share(model, tokens, batches, names, ways, chunk, device) -> list[Result]:
    """This process's share of the batches, evaluated and reduced with the others'."""
    from accelerate import PartialState
    from tqdm import tqdm

    import hf_paged_flash

    state = PartialState()
    if not batches:
        raise ArgumentError(f"the text must have at least 2 tokens, got {len(tokens)}")
    share = batches[state.process_index :: state.num_processes]
    total = sum(window.scored for batch in share for window in batch) * len(ways) * len(names)
    with tqdm(total=total, unit="tok", disable=not state.is_main_process) as bar:
        measured = evaluate(model, tokens, share, implementations=names, ways=ways, chunk=chunk, progress=bar.update)
    ran = hf_paged_flash.counters()
    if share and OURS in names and not ran.kernel_total + ran.reference_total:
        raise BackendError(f"`{OURS}` was asked for but none of its operations ran: this report would compare nothing")
    return results_of(measured, device)


def _is_main_process() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process


def _record(results: list[Result], case: dict, recorder: Recorder) -> None:
    for row in results:
        for metric in ("ppl", "max_abs_dlogit"):
            recorder.add({**case, "way": row.way}, row.implementation, metric, getattr(row, metric))
    recorder.write()


if __name__ == "__main__":
    launch(app)
