"""What a cache and its forks know of the prompts that were computed in them."""

import weakref
from collections.abc import Hashable, Sequence

import numpy as np
from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from ..errors import UnsupportedFeatureError
from .page_groups import PageGroups
from .prefix_index import shared_in_batch
from .prompt_row import PromptRow

# RoPE whose frequencies follow the longest row of a forward: a token's key depends on what comes after it
_ROPE_OF_LENGTHS = ("dynamic", "longrope")


class Prefixes:
    """The index over the blocks of a cache's one group, and how much it has saved.

    Attributes:
        tokens_asked: tokens of prompts that were looked up.
        tokens_hit: those of them that were not computed, as they were known or shared in the batch.
        weights: of the model that computed what is known, and the state they were in; others make other keys.
    """

    def __init__(self, groups: PageGroups, config: PreTrainedConfig) -> None:
        reason = _why_not(groups, config.get_text_config(decoder=True))
        if reason is not None:
            raise UnsupportedFeatureError(
                f"`prefix_caching` needs a model whose layers all keep the keys of all tokens, and {reason} in "
                f"{type(config).__name__}: leave it out"
            )
        self.tokens_asked = self.tokens_hit = 0
        self.weights: tuple[list[weakref.ref], tuple] = [], ()

    def __getstate__(self) -> dict:
        return vars(self) | {"weights": ([], ())}  # nothing that was kept comes along, nor does the model

    def start_rows(
        self, groups: PageGroups, root: Hashable, rows: Sequence[PromptRow], *, shares: bool
    ) -> np.ndarray:
        """Begins rows for prompts with the blocks that are known of them, but for the last token.

        The forward that comes computes the rest. What rows have in common it computes in one of them, if it `shares`.
        Returns the blocks that are known, int64, once for each row.
        """
        index, size = groups[0].store.blocks.index, groups[0].block_size
        full = [row.full_blocks(size, -1) for row in rows]
        found = [index.find(root, tokens) for tokens in full]
        found = [known[: row.usable(len(known) * size) // size] for known, row in zip(found, rows, strict=True)]
        groups.start_from(found)
        if shares and len(rows) > 1:
            source, shared = shared_in_batch(full)
            if (shared > [len(known) for known in found]).any():
                groups.sharing = source, shared
        return np.concatenate(found)

    def count(self, groups: PageGroups, rows: Sequence[PromptRow], known: np.ndarray) -> None:
        """Counts prompts whose prefill is over, and what it took from the `known` blocks or shared."""
        table = groups[0].manager.table
        blocks = table[table >= 0]
        computed = np.setdiff1d(blocks, known)
        self.tokens_asked += sum(map(len, rows))
        self.tokens_hit += (len(blocks) - len(computed)) * groups[0].block_size

    def add(self, groups: PageGroups, root: Hashable, rows: Sequence[PromptRow]) -> None:
        """Keeps the full blocks of the cache's rows, which hold these tokens, or the first of them."""
        groups.sync_lengths()
        manager, blocks = groups[0].manager, groups[0].store.blocks
        for row, length, table in zip(rows, manager.lengths.tolist(), manager.table, strict=True):
            full = row.full_blocks(groups[0].block_size, length)
            blocks.keep(root, full, table[: len(full)])


def _why_not(groups: PageGroups, config: PreTrainedConfig) -> str | None:
    if any(group.window is not None for group in groups):
        return "there are layers with a sliding window"
    layer_types, _ = get_layer_types_and_kwargs(config)
    others = [kind for kind in layer_types if kind not in ("full_attention", "chunked_attention", "dummy")]
    if others:
        return f"there are layers of type `{others[0]}`"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if found := kinds.intersection(_ROPE_OF_LENGTHS):
        return f"keys depend on the length of the whole row (`rope_type` {found.pop()!r})"
    return None
