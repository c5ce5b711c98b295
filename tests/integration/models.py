"""Pairs of one tiny model under eager and under paged_flash, loaded from disk as a user loads them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_paged_flash import PagedCache
from tests.tiny_models import ragged_batch, tiny_config, tiny_model

LENGTHS = (30, 7, 19, 1)  # past the sliding windows of 12, and a prompt of one token
NEW_TOKENS = 24

# What makes attention show in the tokens. Tied embeddings make gemma and gpt2 repeat the last token whatever attention
# says; at the default softcap of 50 a tiny model caps nothing; a scale other than head_dim ** -0.5 has to
# be passed on.
_CHANGES = {
    "gemma2": {"tie_word_embeddings": False, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"tie_word_embeddings": False},
    "gpt2": {"tie_word_embeddings": False},
}
# Models that do more with their cached keys than attend to them: they take the dense way.
DENSE = ("deepseek_v3",)


def attentive_config(model_type: str, **changes) -> PreTrainedConfig:
    """`tiny_config` of a model whose tokens depend on what it attends to."""
    return tiny_config(model_type, **_CHANGES.get(model_type, {}) | changes)


@dataclass(frozen=True, eq=False)
class Pair:
    """The same weights under both implementations."""

    eager: PreTrainedModel
    paged: PreTrainedModel

    @property
    def is_dense(self) -> bool:
        return self.paged.config.model_type in DENSE


def load_pair(config: PreTrainedConfig, directory: Path) -> Pair:
    """Saves a random fp32 model of `config` in `directory` and loads it once under each name."""
    tiny_model(config, "eager").save_pretrained(directory)
    models = [
        AutoModelForCausalLM.from_pretrained(directory, attn_implementation=name) for name in ("eager", "paged_flash")
    ]
    return Pair(*models)


def loaded_pairs(config_of: Callable[[str], PreTrainedConfig], folders) -> Callable[[str], Pair]:
    """Gives a model type's `Pair`, each loaded once from a folder of `folders`, pytest's `tmp_path_factory`."""
    return cache(lambda model_type: load_pair(config_of(model_type), folders.mktemp(model_type)))


def new_tokens(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, **options
) -> torch.Tensor:
    """What greedy `generate()` adds, (B, new); NEW_TOKENS unless `options` say otherwise."""
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS} | options
    return model.generate(input_ids, attention_mask=attention_mask, **options)[:, input_ids.shape[1] :]


@lru_cache
def unpadded_runs(
    model: PreTrainedModel, lengths: tuple[int, ...] = LENGTHS, new: int = NEW_TOKENS, seed: int = 0
) -> torch.Tensor:
    """(rows, new): what `model` adds to each row of `ragged_batch(lengths)` alone and without padding."""
    input_ids, mask = ragged_batch(lengths, "left", seed=seed)
    rows = [
        new_tokens(model, row[keep.bool()][None], None, max_new_tokens=new)
        for row, keep in zip(input_ids, mask, strict=True)
    ]
    return torch.cat(rows)


def held(cache: PagedCache, lengths: Sequence[int]) -> tuple[int, int]:
    """(tokens, blocks) that `cache` should hold of rows of `lengths` tokens, the last of which came by itself.

    A group with a sliding window holds the blocks that this last token could reach.
    """
    size, tokens, blocks = cache.group.block_size, [], 0
    for group in cache.groups:
        window = group.window or max(lengths)
        first = [max(length - window, 0) // size for length in lengths]
        tokens.append(sum(length - size * skipped for length, skipped in zip(lengths, first, strict=True)))
        blocks += sum(-(-length // size) - skipped for length, skipped in zip(lengths, first, strict=True))
    return max(tokens), blocks


def pairs_of(make: Callable) -> Callable:
    """Gives a model type's (eager, paged_flash) models, each made once by `make(model_type, implementation)`."""
    return cache(lambda model_type: (make(model_type, "eager"), make(model_type, "paged_flash")))
