"""Which causal language models of the installed transformers generate under "paged_flash" what they do under eager.

    hf-paged-flash coverage                          # every type, about four minutes on one core
    hf-paged-flash coverage --types llama,bloom      # some of them
    hf-paged-flash coverage --record                 # write eval/results/coverage-<version of transformers>.jsonl

Each type is a tiny random model in fp32 (`tiny_configs.py`), built once under each name with the same weights. Both
continue a ragged, left-padded batch greedily, then with beams; tokens must be the same and logits close. The types run
one after another, each forked from a process that has imported everything, so that none can harm the next.
Exit status 1: a type gives something else, or fails otherwise than by a refusal that explains itself.
"""

import gc
import json
import multiprocessing
import os
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import hf_paged_flash
from hf_paged_flash.errors import PagedFlashError
from hf_paged_flash.eval.report import console, final_line, launch, names_of, reason_of
from hf_paged_flash.eval.results import origin, results_folder, versions
from hf_paged_flash.eval.tiny_configs import FIRST_TOKEN, LAST_TOKEN, model_class_of, tiny_config

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
WORKS = "works"
DENSE = "works through the slow dense path"
OWN_CACHE = "works with transformers' own cache"
NO_ATTENTION = "has no attention"
REFUSES = "refuses"
BROKEN = "broken upstream"
NOT_TRIED = "not tried"
WRONG = "wrong"
FAILS = "fails"
VERDICTS = (WORKS, DENSE, OWN_CACHE, NO_ATTENTION, REFUSES, BROKEN, NOT_TRIED, WRONG, FAILS)
GOOD = (WORKS, DENSE, OWN_CACHE, NO_ATTENTION)
BAD = (WRONG, FAILS)

LENGTHS = (19, 6, 1)  # beyond the windows, beyond a block once continued, and a prompt of one token
NEW_TOKENS, BEAM_TOKENS, BEAMS = 12, 6, 3
TOLERANCE = 1e-4  # of the largest logit


@dataclass(frozen=True)
class Finding:
    """What one type does.

    Attributes:
        model_type: as transformers calls it.
        verdict: of greedy search, one of VERDICTS.
        beams: of beam search, one of VERDICTS; None where greedy search did not come to an end.
        reason: why it does not work, or what is to be known where it does.
        cache: the class of the cache that `generate()` worked with.
        dense: operations that gathered the dense K/V.
        text_part_only: loaded with `{"text_config": "paged_flash"}`, as the whole model refuses.
        error: largest difference of a logit, as a share of the largest one.
    """

    model_type: str
    verdict: str
    beams: str | None = None
    reason: str = ""
    cache: str | None = None
    dense: tuple[str, ...] = ()
    text_part_only: bool = False
    error: float | None = None


@dataclass(frozen=True)
class Run:
    """What one `generate()` gave: new tokens (rows, n), logits (n, rows or beams, vocabulary), its cache's class."""

    tokens: torch.Tensor
    logits: torch.Tensor
    cache: str


def build(model_type: str, implementation: str | dict) -> PreTrainedModel:
    """A tiny random model in fp32; the same weights under every `implementation`."""
    torch.manual_seed(0)
    model = model_class_of(model_type)._from_config(
        tiny_config(model_type), attn_implementation=implementation, dtype=torch.float32
    )
    randomize(model)
    return model.eval()


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Weights large enough for a tiny model to look at its past: std 0.12 for matrices, 1 for attention sinks."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        std = 0.12 if parameter.dim() > 1 else 1.0 if "sink" in name else None
        if std is not None:
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def prompts(model: PreTrainedModel, lengths: Sequence[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded `input_ids` and `attention_mask` (rows, longest); for MusicGen a row of tokens a codebook."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.arange(max(lengths))
    mask = (columns >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    codebooks = getattr(model, "num_codebooks", 1) if type(model).__name__.startswith("Musicgen") else 1
    shape = (len(lengths), codebooks, max(lengths))
    tokens = torch.randint(FIRST_TOKEN, LAST_TOKEN, shape, generator=generator) * mask[:, None]
    return {"input_ids": tokens.flatten(0, 1), "attention_mask": mask}


def run(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **options) -> Run:
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "num_return_sequences": 1} | options
    if type(model).__name__.startswith("Musicgen"):
        options["decoder_start_token_id"] = 1
    out = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)
    cache = getattr(out, "past_key_values", None)
    return Run(out.sequences[..., inputs["input_ids"].shape[1] :], torch.stack(out.logits), type(cache).__name__)


def difference(ours: Run, theirs: Run) -> float:
    """Largest difference of a logit as a share of the largest one; infinite where tokens differ."""
    if not torch.equal(ours.tokens, theirs.tokens) or ours.logits.shape != theirs.logits.shape:
        return float("inf")
    finite = theirs.logits.isfinite()
    if not torch.equal(ours.logits.isfinite(), finite):
        return float("inf")
    apart = (ours.logits - theirs.logits)[finite].abs().max()
    return float(apart / theirs.logits[finite].abs().max())


def row_by_row(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Run:
    """Each row by itself, without its padding."""
    runs = []
    for tokens, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        runs.append(run(model, {"input_ids": tokens[mask][None], "attention_mask": mask[mask][None].long()}))
    return Run(torch.cat([r.tokens for r in runs]), torch.cat([r.logits for r in runs], 1), runs[0].cache)


def looks_back(model: PreTrainedModel, inputs: dict[str, torch.Tensor], reference: Run) -> bool:
    """Whether other tokens before the last one change the logits by far more than what is tolerated."""
    other = prompts(model, inputs["attention_mask"].sum(1).tolist(), seed=1)
    other["input_ids"][:, -1] = inputs["input_ids"][:, -1]
    change = (run(model, other, max_new_tokens=1).logits - reference.logits[:1])[0].abs().max()
    return bool(change > 100 * TOLERANCE * reference.logits.abs().max())


def examine(model_type: str) -> Finding:
    """Compares a type under both names; see the module's docstring."""
    try:
        eager = build(model_type, "eager")
    except ImportError as error:
        return Finding(model_type, NOT_TRIED, reason=reason_of(error))
    except Exception as error:
        return Finding(model_type, BROKEN, reason=_place(error))
    lengths, note = LENGTHS, ""
    try:
        inputs = prompts(eager, lengths)
        reference = run(eager, inputs)
    except Exception as error:
        lengths, note = (max(LENGTHS),) * len(LENGTHS), f"eager fails with padding: {reason_of(error)}"
        try:
            inputs = prompts(eager, lengths)
            reference = run(eager, inputs)
        except Exception as error:
            return Finding(model_type, BROKEN, reason=_place(error))
    if not note and not looks_back(eager, inputs, reference):
        return Finding(model_type, FAILS, reason="the tiny model hardly looks at its prompt: nothing is shown")
    found, model = _load(model_type)
    if model is None:
        return found
    found = _compared(replace(found, reason=note or found.reason), eager, model, inputs, reference)
    if found.verdict not in GOOD:
        return found
    return replace(found, beams=_beams(eager, model, inputs))


def _load(model_type: str) -> tuple[Finding, PreTrainedModel | None]:
    try:
        return Finding(model_type, WORKS), build(model_type, "paged_flash")
    except PagedFlashError as error:
        refused = Finding(model_type, REFUSES, reason=str(error))
    except Exception as error:
        return Finding(model_type, FAILS, reason=_place(error)), None
    if "text_config" not in model_class_of(model_type).config_class.sub_configs:
        return refused, None
    try:
        return Finding(model_type, WORKS, text_part_only=True), build(model_type, {"text_config": "paged_flash"})
    except PagedFlashError:
        return refused, None
    except Exception as error:
        return Finding(model_type, FAILS, reason=_place(error)), None


def _compared(found: Finding, eager, model, inputs, reference: Run) -> Finding:
    hf_paged_flash.reset_counters()
    try:
        ours = run(model, inputs)
    except PagedFlashError as error:
        return replace(found, verdict=REFUSES, reason=str(error))
    except Exception as error:
        return replace(found, verdict=FAILS, reason=_place(error))
    counters = hf_paged_flash.counters()
    error = difference(ours, reference)
    if not error <= TOLERANCE and "attention_mask" in inputs:
        alone = difference(ours, row_by_row(eager, inputs))
        if alone <= TOLERANCE:
            error, found = alone, replace(found, reason="eager's rows change with their padding, these do not")
    found = replace(found, cache=ours.cache, error=error, dense=tuple(sorted(counters.dense_gather)))
    if not error <= TOLERANCE:
        same = "the same tokens" if torch.equal(ours.tokens, reference.tokens) else "other tokens"
        return replace(found, verdict=WRONG, reason=f"{same} as eager's, logits {error:.1e} apart")
    if counters.kernel_total + counters.reference_total == 0:
        return replace(found, verdict=NO_ATTENTION)
    if ours.cache != "PagedCache":
        return replace(found, verdict=OWN_CACHE)
    return replace(found, verdict=DENSE if counters.dense_gather else WORKS)


def _beams(eager, model, inputs) -> str:
    options = {"num_beams": BEAMS, "max_new_tokens": BEAM_TOKENS}
    try:
        reference = run(eager, inputs, **options)
    except Exception:
        return BROKEN
    try:
        ours = run(model, inputs, **options)
    except PagedFlashError:
        return REFUSES
    except Exception:
        return FAILS
    return WORKS if torch.equal(ours.tokens, reference.tokens) else WRONG


def _place(error: Exception) -> str:
    """An error in one line, with the function that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{reason_of(error)} ({Path(frame.filename).name}, {frame.name})"


def _examine_apart(model_type: str, answer: Connection) -> None:
    with open(os.devnull, "w") as nowhere:  # what transformers has to say of so many models hides the table
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    torch.set_num_threads(1)
    answer.send(examine(model_type))


def findings(model_types: Sequence[str], workers: int = 1, time_limit: float = 60.0) -> Iterator[Finding]:
    """What each type does, as they come to an end; each in a process forked from this one, `workers` at a time."""
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
    return folder / f"coverage-{version}.jsonl"


def recorded(path: Path) -> tuple[dict, dict[str, Finding]]:
    """Where a recorded table comes from, and its findings by type."""
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in rest]
    return json.loads(first), {row["model_type"]: Finding(**row | {"dense": tuple(row["dense"])}) for row in rows}


def write(found: Sequence[Finding], folder: Path) -> Path:
    """Puts the findings of a whole run in the place of the last one's for this version of transformers."""
    path = results_file(folder, versions()["transformers"])
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"bench": "coverage", **origin("cpu")}, *(asdict(replace(one, error=None)) for one in found)]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def _table(found: Sequence[Finding]) -> Table:
    table = Table(title=f"causal language models of transformers {versions()['transformers']} under paged_flash")
    for heading in ("type", "greedy", "beams", "cache", "reason"):
        table.add_column(heading, no_wrap=heading == "type")
    for one in found:
        style = "red" if _is_bad(one) else "green" if one.verdict == WORKS else "yellow"
        reason = ", ".join(filter(None, ["text part only" * one.text_part_only, one.reason, *one.dense]))
        table.add_row(one.model_type, one.verdict, one.beams or "–", one.cache or "–", reason, style=style)
    return table


def _is_bad(finding: Finding) -> bool:
    return finding.verdict in BAD or finding.beams in BAD


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
        raise hf_paged_flash.ArgumentError("`--record` and `--out` write a table of all types: leave `--types` out")
    list(MODEL_FOR_CAUSAL_LM_MAPPING.keys())  # configurations, imported once for all
    screen, found = console(), {}
    for finding in findings(chosen, workers, time_limit):
        found[finding.model_type] = finding
        screen.print(f"{len(found):3} of {len(chosen)}  {finding.model_type}: {finding.verdict}", style="dim")
    in_order = [found[name] for name in chosen]
    screen.print(_table(in_order))
    counts = Counter(finding.verdict for finding in in_order)
    if folder is not None:
        write(in_order, folder)
    bad = [finding.model_type for finding in in_order if _is_bad(finding)]
    rows = [{key: value for key, value in asdict(one).items() if value} for one in in_order]
    ordered = {verdict: counts[verdict] for verdict in VERDICTS if counts[verdict]}
    final_line({"bench": "coverage", **versions(), "counts": ordered, "passed": not bad, "bad": bad, "types": rows})
    if bad:
        raise typer.Exit(1)


if __name__ == "__main__":
    launch(app)
