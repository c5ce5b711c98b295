"""Which causal language models of the installed transformers generate under "paged_flash" what they do under eager.

    hf-paged-flash coverage                          # every type: two to four minutes on one core
    hf-paged-flash coverage --types llama,bloom      # some of them
    hf-paged-flash coverage --record                 # write eval/results/coverage-<version of transformers>.jsonl

Each type is a tiny random model in fp32, built once under each name with the same weights: tokens must be the same and
logits close (`finding.py`). Each has a process of its own, forked from one that has imported everything.
Exit status 1: a type gives something else, fails otherwise than by a refusal that explains itself, or does less than
the recorded table of this version says (in a checkout).
"""

import gc
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated

import torch
import typer
from packaging.version import Version
from rich.table import Table
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_paged_flash.errors import ArgumentError
from hf_paged_flash.eval.finding import BAD, DENSE, FAILS, GOOD, OWN_CACHE, VERDICTS, WORKS, Finding, examine, place
from hf_paged_flash.eval.report import console, final_line, launch, names_of
from hf_paged_flash.eval.results import origin, results_folder, versions

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

MODEL_TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
RESULTS = Path(__file__).resolve().parent / "results"


def _examine_apart(model_type: str, answer: Connection) -> None:
    with open(os.devnull, "w") as nowhere:  # what transformers has to say of so many models hides the table
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    torch.set_num_threads(1)
    try:
        answer.send(examine(model_type))
    except Exception as error:
        answer.send(Finding(model_type, FAILS, reason=place(error)))


def findings(model_types: Sequence[str], workers: int = 1, time_limit: float = 60.0) -> Iterator[Finding]:
    """What each type does, as they come to an end; each in a process forked from this one, `workers` at a time."""
    list(MODEL_FOR_CAUSAL_LM_MAPPING.keys())  # configurations, imported once for all
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(model_types)), {}
    gc.freeze()  # else a collection in a child would copy every page
    while waiting or running:
        while waiting and len(running) < workers:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_examine_apart, args=(waiting[-1], sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = waiting.pop(), process, time.monotonic() + time_limit
        ready = wait(list(running), timeout=max(0.0, min(end for *_, end in running.values()) - time.monotonic()))
        late = [receiver for receiver, (*_, end) in running.items() if end <= time.monotonic()]
        for receiver in {*ready, *late}:
            model_type, process, _ = running.pop(receiver)
            try:
                finding = receiver.recv() if receiver.poll() else None
                died = f"no end after {time_limit:.0f} s"
            except EOFError:
                process.join()
                finding, died = None, f"the process ended with exit code {process.exitcode}"
            receiver.close()
            process.kill()
            process.join()
            yield finding or Finding(model_type, FAILS, reason=died)


def results_file(folder: Path, version: str) -> Path:
    """The recorded table of a version of transformers."""
    return folder / f"coverage-{version}.jsonl"


def recorded(path: Path) -> tuple[dict, dict[str, Finding]]:
    """Where a recorded table comes from, and its findings by type."""
    first, *rest = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return first, {row["model_type"]: Finding(**row | {"dense": tuple(row.get("dense", ()))}) for row in rest}


def recorded_versions(folder: Path) -> list[str]:
    """The versions of transformers that have a table, oldest first."""
    names = (path.stem.removeprefix("coverage-") for path in folder.glob("coverage-*.jsonl"))
    return sorted(names, key=Version)


def _said(finding: Finding) -> dict:
    return {key: value for key, value in asdict(finding).items() if value}


def write(found: Sequence[Finding], folder: Path) -> Path:
    """Puts the findings of a whole run in the place of the last one's for this version of transformers."""
    path = results_file(folder, versions()["transformers"])
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"bench": "coverage", **origin("cpu")}, *(_said(replace(one, error=None)) for one in found)]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def _rank(verdict: str | None) -> int:
    if verdict == WORKS:
        return 0
    return 1 if verdict in (DENSE, OWN_CACHE) else 2 if verdict in GOOD else 3


def shortfalls(found: Iterable[Finding], table: dict[str, Finding]) -> list[str]:
    """What is wrong, or less than the recorded `table` says: a line for each type that is."""
    lines = []
    for one in found:
        before = table.get(one.model_type, one)
        for what, now, then in (("greedy", one.verdict, before.verdict), ("beams", one.beams, before.beams)):
            if now in BAD or _rank(now) > _rank(then):
                lines.append(f"{one.model_type}, {what}: {now}, recorded: {then}. {one.reason}")
    return lines


def _table(found: Sequence[Finding]) -> Table:
    table = Table(title=f"causal language models of transformers {versions()['transformers']} under paged_flash")
    for heading in ("type", "greedy", "beams", "cache", "reason"):
        table.add_column(heading, no_wrap=heading == "type")
    for one in found:
        style = "red" if one.verdict in BAD or one.beams in BAD else "green" if one.verdict == WORKS else "yellow"
        reason = ", ".join(filter(None, ["text part only" * one.text_part_only, one.reason, *one.dense]))
        table.add_row(one.model_type, one.verdict, one.beams or "–", one.cache or "–", reason, style=style)
    return table


@app.command()
def main(
    types: Annotated[str, typer.Option(help="model types, separated by commas; default: all there are")] = "",
    workers: Annotated[int, typer.Option(help="types examined at a time")] = 1,
    time_limit: Annotated[float, typer.Option(help="seconds that a type may take")] = 60.0,
    record: Annotated[bool, typer.Option(help="write eval/results/coverage-<version>.jsonl; all types only")] = False,
    out: Annotated[Path | None, typer.Option(help="write it in this folder instead")] = None,
) -> None:
    """Every causal language model of the installed transformers, tiny and random, under paged_flash and eager."""
    folder = results_folder(record, out)
    chosen = names_of(types, MODEL_TYPES, "types") if types else list(MODEL_TYPES)
    if folder is not None and types:
        raise ArgumentError("`--record` and `--out` write a table of all types: leave `--types` out")
    screen, found = console(), {}
    for finding in findings(chosen, workers, time_limit):
        found[finding.model_type] = finding
        screen.print(f"{len(found):3} of {len(chosen)}  {finding.model_type}: {finding.verdict}", style="dim")
    in_order = [found[name] for name in chosen]
    screen.print(_table(in_order))
    path = results_file(RESULTS, versions()["transformers"])
    short = shortfalls(in_order, recorded(path)[1] if path.is_file() and folder is None else {})
    for line in short:
        screen.print(line, style="red", markup=False)
    if folder is not None:
        write(in_order, folder)
    counts = Counter(finding.verdict for finding in in_order)
    ordered = {verdict: counts[verdict] for verdict in VERDICTS if counts[verdict]}
    summary = {"counts": ordered, "passed": not short, "shortfalls": short, "types": [_said(one) for one in in_order]}
    final_line({"bench": "coverage", **versions(), **summary})
    if short:
        raise typer.Exit(1)


if __name__ == "__main__":
    launch(app)
