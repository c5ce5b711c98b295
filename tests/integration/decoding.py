"""Every way of decoding: what it generated, with the logits that it chose from, and those of the same tokens alone."""

import copy
from dataclasses import dataclass

import torch
from transformers import GenerationMixin, PreTrainedModel

from hf_paged_flash import PagedCache
from tests.tiny_models import ragged_batch

# top_k, 50 if nothing is said, would turn the last bit of a logit at its edge into -inf
SAMPLE = {"do_sample": True, "top_k": 0}
BEAMS = {
    f"{beams} beams, {'stop' if early else 'go on'}": {"num_beams": beams, "early_stopping": early}
    for beams in (2, 4, 8)
    for early in (True, False)
}
METHODS = {
    "greedy": {},
    "sample": SAMPLE,
    "3 samples": SAMPLE | {"num_return_sequences": 3},
    **BEAMS,
    "4 beams, 3 returned": {"num_beams": 4, "num_return_sequences": 3},
    "beam sample": SAMPLE | {"num_beams": 4},
    "chunks": {"prefill_chunk_size": 7},
    "turns": {},
    "assistant": {},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}
DRAFTS = ("assistant", "prompt lookup")  # of one row
NEW = 16


@dataclass(frozen=True)
class Path:
    """One sequence that was generated.

    Attributes:
        row: of the batch that it goes on from.
        tokens: (n,) what was generated; logits: (n, vocabulary) what each was chosen from.
        score: of a beam, as generate() gives it.
    """

    row: int
    tokens: torch.Tensor
    logits: torch.Tensor
    score: float | None = None


def generate(model: PreTrainedModel, inputs: dict, **options):
    """A dictionary with logits, from transformers' own generate(): Whisper's drops beams that it does not return."""
    torch.manual_seed(3)
    options = {"do_sample": False, "max_new_tokens": NEW} | options
    options |= {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    return GenerationMixin.generate(model, **inputs, **options)


def paths(out, rows: int, prompt: int) -> list[Path]:
    """The sequences of an output of `generate` on `rows` prompts of `prompt` columns."""
    logits = torch.stack(out.logits)  # (steps, rows or beams, vocabulary)
    new = out.sequences[:, prompt:]
    found = []
    beams = out.get("beam_indices")
    for index, tokens in enumerate(new):
        if beams is None:
            taken = logits[: len(tokens), index]
        else:
            came_from = beams[index][beams[index] >= 0]
            tokens = tokens[: len(came_from)]
            taken = logits[torch.arange(len(came_from), device=logits.device), came_from]
        score = None if beams is None else float(out.sequences_scores[index])
        found.append(Path(index * rows // len(new), tokens, taken, score))
    return found


@torch.no_grad()
def forced(model: PreTrainedModel, inputs: dict, path: Path) -> torch.Tensor:
    """(n, vocabulary): the logits of `path` in one forward without a cache, of its row alone and without padding."""
    row = {name: value[path.row : path.row + 1] for name, value in inputs.items()}
    mask = row.pop("attention_mask", None)
    if mask is not None:
        row["input_ids"] = row["input_ids"][mask.bool()][None]
    if model.config.is_encoder_decoder:
        start = path.tokens.new_full((1,), model.config.decoder_start_token_id)
        row = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in row.items()}
        return model(**row, decoder_input_ids=torch.cat([start, path.tokens[:-1]])[None], use_cache=False).logits[0]
    whole = torch.cat([row["input_ids"][0], path.tokens[:-1]])
    return model(whole[None], use_cache=False).logits[0, -len(path.tokens) :]


def score(path: Path, logits: torch.Tensor) -> float:
    """A beam's score if it had been chosen from `logits`: the mean log-probability of its tokens."""
    return float(logits.log_softmax(-1).gather(1, path.tokens[:, None]).mean())


def batch(method: str, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A left-padded batch; for drafts one row, with something to look up."""
    if method in DRAFTS:
        input_ids = ragged_batch(lengths[:1], None)[0].repeat(1, 3)
        return input_ids, torch.ones_like(input_ids)
    return ragged_batch(lengths)


def turns(model: PreTrainedModel, inputs: dict, lengths: tuple[int, ...]) -> tuple[dict, list[Path]]:
    """A second turn of `lengths` tokens on the cache of the first: its inputs in full, and what it was answered."""
    cache = PagedCache(model.config)
    input_ids, mask = inputs["input_ids"], inputs["attention_mask"]
    answer = generate(model, inputs, past_key_values=cache).sequences
    said, said_mask = (x.to(answer.device) for x in ragged_batch(lengths, "left", seed=1))
    mask = torch.cat([mask, mask.new_ones(len(mask), answer.shape[1] - input_ids.shape[1]), said_mask], 1)
    inputs = {"input_ids": torch.cat([answer, said], 1), "attention_mask": mask}
    out = generate(model, inputs, past_key_values=cache)
    return inputs, paths(out, len(mask), mask.shape[1])


def perturbed(model: PreTrainedModel) -> PreTrainedModel:
    """An assistant that is right now and then: the model, a little off."""
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.02 * parameter.abs().mean() * parameter.sign())
    return assistant
