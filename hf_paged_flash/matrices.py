"""What some layers add to a mask of queries by keys: a selection of keys, a sink for each query.

Only models that get their mask as a matrix do so (`masks.MATRIX_CONFIGS`). The kernels read all keys and drop what is
not selected: right, and no faster than full attention.
"""

import torch
from torch import nn

from .errors import UnsupportedFeatureError


def _refuse_without_matrix(module: nn.Module, mask: torch.Tensor | None, name: str, meaning: str) -> None:
    if mask is None or mask.dim() != 4:
        raise UnsupportedFeatureError(
            f"{type(module).__name__} passes `{name}`, {meaning}, without a mask of queries by keys, shape (batch, 1, "
            'queries, keys): paged_flash can\'t apply it. Load the model with attn_implementation="sdpa" or "eager"'
        )


def select_keys(
    module: nn.Module,
    mask: torch.Tensor | None,
    key_length: int,
    num_heads: int,
    indices: torch.Tensor | None,
    block_indices: torch.Tensor | None,
) -> torch.Tensor | None:
    """`mask` without the keys that an indexer has left out.

    Args:
        module: the attention layer; `block_indices` count blocks of its `indexer.block_size` keys.
        mask: (B | 1, 1, Sq, key_length), bool (True = visible) or added to the scores.
        key_length: keys there are.
        num_heads: query heads.
        indices: (B, Sq, n), the keys that a query may see; -1 for none.
        block_indices: (B, groups of heads, Sq, n), the blocks of keys that it may see; -1 for none.

    Raises:
        UnsupportedFeatureError: the mask is no matrix.
    """
    name, chosen = ("indices", indices) if indices is not None else ("block_indices", block_indices)
    if chosen is None:
        return mask
    _refuse_without_matrix(module, mask, name, "a sparse selection of keys")
    block_size = 1 if indices is not None else module.indexer.block_size
    chosen = chosen[:, None] if indices is not None else chosen
    blocks = -(-key_length // block_size)
    visible = torch.zeros(*chosen.shape[:3], blocks + 1, dtype=torch.bool, device=chosen.device)
    visible.scatter_(-1, chosen.long().masked_fill(chosen < 0, blocks), True)
    visible = visible[..., :blocks].repeat_interleave(block_size, -1)[..., :key_length]
    if visible.shape[1] > 1:
        visible = visible.repeat_interleave(num_heads // visible.shape[1], 1)
    mask = mask[..., :key_length]
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, torch.finfo(mask.dtype).min)


def sink_column(
    module: nn.Module,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    sinks: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(key, value, mask, position_bias) with one more key, of zeros, whose score is `sinks` and whose value is 0.

    Args:
        module: the attention layer.
        key, value: (B, Hkv, Sk, D | Dv).
        mask: (B | 1, 1, Sq, Sk), bool (True = visible) or added to the scores.
        position_bias: (B | 1, Hq | 1, Sq | 1, Sk) or None.
        sinks: (B | 1, Hq | 1, Sq, 1), a logit for each query that takes its share of the probabilities.

    Raises:
        UnsupportedFeatureError: the mask is no matrix.
    """
    _refuse_without_matrix(module, mask, "sinks", "a sink for each query")
    if position_bias is None:
        position_bias = sinks.new_zeros(1, 1, 1, key.shape[2])
    sizes = [max(*pair) for pair in zip(position_bias.shape[:3], sinks.shape[:3], strict=True)]
    position_bias = torch.cat([position_bias.expand(*sizes, -1), sinks.expand(*sizes, -1)], -1)
    key, value = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (key, value))
    return key, value, torch.nn.functional.pad(mask, (0, 1), value=mask.dtype == torch.bool), position_bias
