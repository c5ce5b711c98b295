"""What the generation benchmark runs: models with random weights, and batches of prompts."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel

from hf_paged_flash.errors import ArgumentError
from hf_paged_flash.eval.workloads import left_padded, log_uniform

# Llama-3.1-8B, Llama-3.2-1B, and one to try the command with
MODELS = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
    "tiny": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16},
}
_HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
_TINY_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 512}
SHORTEST = 32  # of ragged prompts, where the longest is longer
FORMS = {
    "batch": "8x2048: 8 prompts of 2048 tokens",
    "ragged": "ragged:32x4096: 32 prompts of 32 to 4096 tokens, log-uniform",
    "prefix": "prefix:2000+50: a prompt of 50 tokens after 2000 that a cache knows",
    "cold": "cold:512: the first token of a process, after a prompt of 512",
    "flat": "flat:512x8192: the time of each of 8192 steps",
}
_FORM = re.compile(
    r"(?:(?P<kind>ragged|prefix|cold|flat):)?(?P<first>[1-9]\d*)(?:(?P<mark>[x+])(?P<second>[1-9]\d*))?"
)
_MARKS = {"batch": "x", "ragged": "x", "prefix": "+", "cold": None, "flat": "x"}


@dataclass(frozen=True)
class Case:
    """Prompts of `lengths` tokens, and `new` tokens after them.

    Attributes:
        kind: of FORMS: what is measured.
        prefix: so many of the first tokens a cache knows already.
    """

    kind: str
    lengths: tuple[int, ...]
    new: int
    prefix: int = 0

    def row(self, model: str, compiled: str | None = None) -> dict:
        """The `case` of a row of results."""
        prompt = "ragged" if self.kind == "ragged" else self.lengths[0]
        row = {"model": model, "b": len(self.lengths), "prompt": prompt, "new": self.new, "compile": compiled}
        return row | ({"tokens": sum(self.lengths)} if self.kind == "ragged" else {})

    def batch(self, model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded random tokens and their mask, int64 (B, longest), the same every time."""
        mask = left_padded(torch.tensor(self.lengths))
        generator = torch.Generator().manual_seed(1)
        vocab_size = model.config.get_text_config().vocab_size
        ids = torch.randint(3, vocab_size, mask.shape, generator=generator) * mask
        return ids.to(model.device), mask.to(model.device)


def case_of(name: str, new: int) -> Case:
    """The case that `name` writes in one of FORMS; raises ArgumentError where it writes none."""
    match = _FORM.fullmatch(name)
    kind = (match["kind"] or "batch") if match else None
    if match is None or match["mark"] != _MARKS[kind]:
        raise ArgumentError(f"`cases` must be of the forms {'; '.join(FORMS.values())}; got {name!r}")
    first, second = int(match["first"]), int(match["second"] or 0)
    if kind == "ragged":
        lengths = log_uniform(first, min(SHORTEST, second // 2), second)
        return Case(kind, tuple(lengths.tolist()), new)
    if kind == "prefix":
        return Case(kind, (first + second,), 1, prefix=first)
    if kind == "cold":
        return Case(kind, (first,), 1)
    return Case(kind, (first,), second) if kind == "flat" else Case(kind, (second,) * first, new)


def model_name(name: str) -> str:
    """As results have it: `name` is of MODELS, or a model's path."""
    return f"llama-{name}" if name in MODELS else Path(name).name


def load(name: str, device: torch.device) -> PreTrainedModel:
    """A model of MODELS with random weights in bf16, the same every time; or the one at a path, in its own dtype.

    It generates greedily and without an end.
    """
    if name in MODELS:
        heads = _TINY_HEADS if name == "tiny" else _HEADS
        config = LlamaConfig(**MODELS[name], **heads, rope_theta=5e5, tie_word_embeddings=name == "1b")
        with torch.device(device), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    else:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", attn_implementation="eager").to(device)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    return model.eval()
