"""Prompts short enough to be replayed as a graph: launching their forward takes longer than computing it.

Rows are padded on the left, up to one of a few lengths, so that there are few graphs; what is padded is computed, for
nothing, and neither stored nor seen.
"""

import numpy as np

from ..cache.forward_step import to_device
from ..cache.prepared_forward import PackedTokens

LENGTHS = (16, 32, 64, 128, 256, 384, 512)
# Columns of all rows, for which a forward reads its weights at least as long as it computes, on GPUs of today; more of
# them where half are tokens: what is computed for nothing takes less than launching does.
FREE_COLUMNS, MOST_COLUMNS = 256, 1024


def length_of(counts: np.ndarray) -> int | None:
    """Columns a row for rows of `counts[b]` new tokens; None where they are not worth a replay, or one has none."""
    length = next((length for length in LENGTHS if length >= counts.max(initial=0)), None)
    if length is None or not counts.all():
        return None
    columns = length * len(counts)
    return length if columns <= max(FREE_COLUMNS, min(2 * int(counts.sum()), MOST_COLUMNS)) else None


def last_columns(inputs: dict, tokens: PackedTokens, start: int, length: int) -> dict:
    """`inputs` of rows whose first column is `start`, with their new `tokens` as the last ones of `length` columns."""
    input_ids, position_ids = inputs["input_ids"], inputs["position_ids"]
    batch, columns = input_ids.shape
    row, column = np.divmod(tokens.indices, tokens.real.shape[1])
    behind = np.cumsum(tokens.counts)[row] - np.arange(len(row))  # columns from a token to the end, its own included
    places = np.zeros((batch, length), np.int64)
    places[row, length - behind] = row * columns + column - start
    places = to_device(places.reshape(-1), input_ids.device)
    position_ids = position_ids.expand(*position_ids.shape[:-2], batch, columns).flatten(-2)
    kept = {"logits_to_keep": 1} if "logits_to_keep" in inputs else {}
    return inputs | kept | {
        "input_ids": input_ids.flatten().index_select(0, places).view(batch, length),
        "position_ids": position_ids.index_select(-1, places).unflatten(-1, (batch, length)),
        "attention_mask": None,
    }
