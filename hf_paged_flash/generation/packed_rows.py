"""Forwards of rows without their padding: the tokens that are not stored, one row's after another's."""

from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..cache import PagedCache
from ..cache.forward_step import on_host, to_device
from ..cache.prepared_forward import PackedTokens, packed_forward
from .media import of_tokens


def run_packed(
    model: PreTrainedModel, inputs: dict, cache: PagedCache, mask: torch.Tensor, chunk_size: int | None
) -> ModelOutput:
    """`model(**inputs)` of what is not stored of rows, with logits (B, 1, V) of each row's last token.

    Args:
        mask: bool (B, columns) on the host, all columns so far.
        chunk_size: columns of a forward; None for all.
    """
    start, columns = cache.get_seq_length(), mask.shape[1]
    last = columns - 1 - mask.flip(1).int().argmax(1).numpy()  # each row's last token
    rows, logits = [], []
    for end in _ends(start, columns, int(last.max()) + 1, chunk_size):
        with packed_forward(cache.groups, mask[:, :end]) as tokens:
            if not len(tokens.indices):
                continue  # all of them are padding, or stored
            ending = np.flatnonzero(tokens.real[np.arange(len(mask)), np.minimum(last, end - 1)] & (last < end))
            kept = np.cumsum(tokens.counts)[ending] - 1
            outputs = model(**_packed(inputs, tokens, start, kept), return_dict=True)
        if len(ending):
            of_rows = outputs.logits[0]
            if len(of_rows) != len(kept):  # the model took no `logits_to_keep`
                of_rows = of_rows.index_select(0, to_device(kept, of_rows.device))
            rows.append(ending)
            logits.append(of_rows)
    order = np.argsort(np.concatenate(rows))
    outputs.logits = torch.cat(logits).index_select(0, to_device(order, logits[0].device))[:, None]
    return outputs


def packed_draft(model: PreTrainedModel, inputs: dict, cache: PagedCache, last: int) -> ModelOutput:
    """`model(**inputs)` of what is not stored of one row's tokens, with logits (1, last, V) of the `last` ones."""
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    with packed_forward(cache.groups, on_host(mask)) as tokens:
        kept = np.arange(len(tokens.indices) - last, len(tokens.indices))
        outputs = model(**_packed(of_tokens(inputs), tokens, 0, kept), return_dict=True)
    outputs.logits = outputs.logits[:, -last:]
    return outputs


def _ends(start: int, columns: int, end: int, chunk_size: int | None) -> Iterator[int]:
    """The columns up to which each forward goes, where none is a token from `end` on."""
    if chunk_size is not None:
        yield from range(start + chunk_size, end, chunk_size)
    yield columns


def _packed(inputs: dict, tokens: PackedTokens, start: int, kept: np.ndarray) -> dict:
    """`inputs` of rows whose first column is `start`, with the `tokens` alone and logits of the `kept` ones."""
    input_ids, position_ids = inputs["input_ids"], inputs["position_ids"]
    batch, length = input_ids.shape
    row, column = np.divmod(tokens.indices, tokens.real.shape[1])
    places = to_device(row * length + column - start, input_ids.device)
    position_ids = position_ids.expand(*position_ids.shape[:-2], batch, length).flatten(-2)
    packed = inputs | {
        "input_ids": input_ids.flatten().index_select(0, places)[None],
        "position_ids": position_ids.index_select(-1, places)[..., None, :],
        "attention_mask": None,
    }
    if "logits_to_keep" in inputs:  # one at least
        packed["logits_to_keep"] = to_device(kept if len(kept) else np.zeros(1, np.int64), input_ids.device)
    return packed
