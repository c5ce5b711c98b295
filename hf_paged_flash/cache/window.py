"""What a sliding window leaves behind: which blocks no later query can reach, and who may not ask for them again."""

import numpy as np

from ..errors import ArgumentError, UnsupportedFeatureError


def first_in_reach(lengths: np.ndarray, window: int, block_size: int) -> np.ndarray:
    """The first block of each row that the query after `lengths[b]` tokens, or a later one, sees; int64 (batch,)."""
    return np.maximum(lengths - (window - 1), 0) // block_size


def check_reach(window_left: int, window: int) -> None:
    """Raises UnsupportedFeatureError where queries see further back than the window (-1: to the start)."""
    if not 0 <= window_left < window:
        reach = "all tokens" if window_left < 0 else f"{window_left + 1} tokens"
        raise UnsupportedFeatureError(
            f"a layer attends to {reach}, of which the paged cache has kept the last {window}, as earlier forwards "
            "said: keep to one attention pattern, or start a new cache"
        )


def check_truncate(lengths: np.ndarray, first: np.ndarray, window: int, block_size: int) -> None:
    """Raises ArgumentError where rows cut to `lengths` would see, or go on in, blocks before block `first[b]`."""
    missing = np.maximum(lengths - (window - 1), 0) < np.minimum(first * block_size, lengths)
    missing |= (lengths % block_size > 0) & (lengths // block_size < first)
    if missing.any():
        row = int(np.flatnonzero(missing)[0])
        raise ArgumentError(
            f"the paged cache can't be cropped that far: row {row} would be {int(lengths[row])} tokens long, and its "
            f"layers with a sliding window of {window} have given back tokens from there on. Call "
            "`activate_past_recording()` on the cache before the forwards that a crop may take back, or start a new "
            "cache. This one is as it was"
        )
