"""What one type of causal language model does under "paged_flash", tiny and random, beside itself under eager.

Both continue a ragged, left-padded batch and a single row greedily, then the batch with beams.
"""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

import hf_paged_flash
from hf_paged_flash.errors import PagedFlashError
from hf_paged_flash.eval.report import reason_of
from hf_paged_flash.eval.tiny_configs import FIRST_TOKEN, LAST_TOKEN, model_class_of, tiny_config

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
    """Left-padded `input_ids` and `attention_mask` (rows, longest)."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.arange(max(lengths))
    mask = (columns >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    tokens = torch.randint(FIRST_TOKEN, LAST_TOKEN, mask.shape, generator=generator) * mask
    if _is_musicgen(model):  # a row of tokens a codebook, of which its prefill takes the last column alone
        return {"input_ids": tokens[:, -1:].repeat_interleave(model.num_codebooks, 0), "attention_mask": mask[:, -1:]}
    return {"input_ids": tokens, "attention_mask": mask}


def _is_musicgen(model: PreTrainedModel) -> bool:
    return type(model).__name__.startswith("Musicgen")


def run(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **options) -> Run:
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "num_return_sequences": 1} | options
    if _is_musicgen(model):
        options["decoder_start_token_id"] = model.config.bos_token_id
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
        return Finding(model_type, BROKEN, reason=place(error))
    try:
        references = [(inputs := prompts(eager, lengths), run(eager, inputs)) for lengths in (LENGTHS, LENGTHS[:1])]
    except Exception as error:
        return Finding(model_type, BROKEN, reason=place(error))
    if not _is_musicgen(eager) and not looks_back(eager, *references[0]):
        return Finding(model_type, FAILS, reason="the tiny model hardly looks at its prompt: nothing is shown")
    found, model = _load(model_type)
    if model is None:
        return found
    found = _compared(found, model, references)
    if found.verdict not in GOOD:
        return found
    return replace(found, beams=_beams(eager, model, references[0][0]))


def _load(model_type: str) -> tuple[Finding, PreTrainedModel | None]:
    try:
        return Finding(model_type, WORKS), build(model_type, "paged_flash")
    except PagedFlashError as error:
        refused = Finding(model_type, REFUSES, reason=str(error))
    except Exception as error:
        return Finding(model_type, FAILS, reason=place(error)), None
    if "text_config" not in model_class_of(model_type).config_class.sub_configs:
        return refused, None
    try:
        return Finding(model_type, WORKS, text_part_only=True), build(model_type, {"text_config": "paged_flash"})
    except PagedFlashError:
        return refused, None
    except Exception as error:
        return Finding(model_type, FAILS, reason=place(error)), None


def _compared(found: Finding, model, references: list[tuple[dict, Run]]) -> Finding:
    hf_paged_flash.reset_counters()
    try:
        runs = [run(model, inputs) for inputs, _ in references]
    except PagedFlashError as error:
        return replace(found, verdict=REFUSES, reason=str(error))
    except Exception as error:
        return replace(found, verdict=FAILS, reason=place(error))
    counters = hf_paged_flash.counters()
    errors = [difference(ours, reference) for ours, (_, reference) in zip(runs, references, strict=True)]
    cache, dense = runs[0].cache, tuple(sorted(counters.dense_gather))
    found = replace(found, cache=cache, error=max(errors), dense=dense)
    if not max(errors) <= TOLERANCE:
        shares = ", ".join(f"{error:.1e}" for error in errors)
        return replace(found, verdict=WRONG, reason=f"logits are apart from eager's by {shares} of the largest")
    if counters.kernel_total + counters.reference_total == 0:
        return replace(found, verdict=NO_ATTENTION)
    if cache != "PagedCache":
        return replace(found, verdict=OWN_CACHE)
    return replace(found, verdict=DENSE if dense else WORKS)


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


def place(error: Exception) -> str:
    """An error in one line, with the function that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{reason_of(error)} ({Path(frame.filename).name}, {frame.name})"
