"""Prompts short enough to be replayed as a graph: launching their forward takes longer than computing it.

Rows are padded on the left, up to one of a few lengths, so that there are few graphs; what is padded is computed, for
nothing, and neither stored nor seen.
"""

import numpy as np
from torch.nn import functional

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
    of_columns = input_ids, position_ids.expand(*position_ids.shape[:-2], batch, columns)
    if _are_last(tokens):
        if columns < length:
            of_columns = (functional.pad(values, (length - columns, 0)) for values in of_columns)
        input_ids, position_ids = (values[..., -length:] for values in of_columns)
    else:
        places = to_device(_places(tokens, start, length), input_ids.device)
        chosen = (values.flatten(-2).index_select(-1, places) for values in of_columns)
        input_ids, position_ids = (values.unflatten(-1, (batch, length)) for values in chosen)
    kept = {"logits_to_keep": 1} if "logits_to_keep" in inputs else {}
    return inputs | kept | {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": None}


def _are_last(tokens: PackedTokens) -> bool:
    """Whether the last columns of every row are its new `tokens`, as in most prompts."""
    columns = tokens.real.shape[1]
    return bool((tokens.real == (np.arange(columns) >= columns - tokens.counts[:, None])).all())


def _places(tokens: PackedTokens, start: int, length: int) -> np.ndarray:
    """Where the new `tokens` lie in columns from `start` on of all rows, int64 (rows * length,); 0 for padding."""
    rows, all_columns = tokens.real.shape
    row, column = np.divmod(tokens.indices, all_columns)
    behind = np.cumsum(tokens.counts)[row] - np.arange(len(row))  # columns from a token to the end, its own included
    places = np.zeros((rows, length), np.int64)
    places[row, length - behind] = row * (all_columns - start) + column - start
    return places.reshape(-1)
