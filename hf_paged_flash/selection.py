"""Sparse selections of keys (DeepSeek's lightning indexer and its kin), put into the mask of queries by keys.

The kernels read all keys of such a layer and drop what is not selected: right, and no faster than full attention.
"""

import torch
from torch import nn

from .errors import UnsupportedFeatureError


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
        UnsupportedFeatureError: the mask is no matrix, so that the layer selects from what it has not seen.
    """
    name, chosen = ("indices", indices) if indices is not None else ("block_indices", block_indices)
    if chosen is None:
        return mask
    block_size = 1 if indices is not None else getattr(getattr(module, "indexer", None), "block_size", None)
    if mask is None or mask.dim() != 4 or block_size is None:
        raise UnsupportedFeatureError(
            f"{type(module).__name__} passes `{name}`, a sparse selection of keys, without a mask of queries by keys"
            f"{'' if block_size else ' and a block size'}: paged_flash can't apply it. Load the model with "
            'attn_implementation="sdpa" or "eager"'
        )
    chosen = chosen[:, None] if indices is not None else chosen
    blocks = -(-key_length // block_size)
    visible = torch.zeros(*chosen.shape[:3], blocks + 1, dtype=torch.bool, device=chosen.device)
    visible.scatter_(-1, chosen.long().masked_fill(chosen < 0, blocks), True)
    visible = visible[..., :blocks].repeat_interleave(block_size, -1)[..., :key_length]
    if visible.shape[1] > 1:
        visible = visible.repeat_interleave(num_heads // visible.shape[1], 1)
    mask = mask[..., :key_length]
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, torch.finfo(mask.dtype).min)
