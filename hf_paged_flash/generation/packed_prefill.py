"""The prefill of `generate()` without padding: the tokens of all rows one after another, `[1, tokens]`.

Attention runs over each row by itself (`packed_forward`); everything else in the model sees tokens alone and computes
none for nothing. The logits are those of each row's last token. A prefix that is stored already is not computed again.
"""

from collections.abc import Iterator

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..cache import PagedCache
from ..cache.forward_step import to_device
from ..cache.prepared_forward import PackedTokens, packed_forward
from ..errors import ArgumentError
from .decode_loop import loop_of
from .media import has_contents, of_tokens
from .packable import why_not_these, why_padded
from .short_prompt import LENGTHS


def packed_prefill(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    cache: PagedCache,
    generation_config: GenerationConfig,
    model_kwargs: dict,
    is_first_iteration: bool,
) -> ModelOutput | None:
    """What `_prefill` returns, with logits (B, 1, V) of each row's last token; None where rows keep their padding.

    They do where there is none and nothing is ragged, and where `why_padded` or `why_not_these` knows a reason. Short
    prompts, padded or not, are replayed as a graph within a decode loop that captures its steps.
    Waits for the device once, to read the mask.

    Raises:
        ArgumentError: a row without a new token.
    """
    attention_mask = model_kwargs.get("attention_mask")
    if input_ids.dim() != 2 or (attention_mask is not None and attention_mask.dim() != 2):
        return None
    columns, chunk_size = cache.get_seq_length(), generation_config.prefill_chunk_size
    is_ragged = not columns and (cache.group.holds_tokens or cache.groups.sharing is not None)  # known prefixes
    # chunks of transformers' own begin at the first column before 5.24, which leaves out a mask of ones
    is_ragged |= attention_mask is not None and columns > 0 and chunk_size is not None
    loop = loop_of(model, cache) if chunk_size is None else None
    all_columns = (input_ids if attention_mask is None else attention_mask).shape[1]
    if not is_ragged and all_columns - columns > LENGTHS[-1]:
        loop = None  # some row is too long
    if (attention_mask is None and not is_ragged and loop is None) or why_padded(
        model, cache, generation_config, model_kwargs
    ):
        return None
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    mask = mask.bool().cpu()
    new = mask[:, columns:]
    is_padded = is_ragged or not new.all()
    if not new.shape[1] or not (is_padded or loop):
        return None
    # all of them, or those that were passed without the ones before
    length = new.shape[1] if input_ids.shape[1] == mask.shape[1] else None
    inputs = model.prepare_inputs_for_generation(
        input_ids, next_sequence_length=length, is_first_iteration=is_first_iteration, **model_kwargs
    )
    has_images = has_contents(inputs)
    if why_not_these(inputs, cache) or inputs["input_ids"].shape != new.shape or (has_images and chunk_size):
        if is_ragged and not columns:  # what is known of them is of no use
            cache.groups.start_from([])
            cache.groups.sharing = None
        return None
    check_new_tokens(new)
    inputs = of_tokens(inputs)
    outputs = None if loop is None or has_images else loop.prefill(inputs, mask)
    if outputs is not None or not is_padded:
        return outputs
    return _run(model, inputs, cache, mask, chunk_size)


def check_new_tokens(new: torch.Tensor) -> None:
    """Raises ArgumentError where a row of `new`, bool (B, new columns) on the host, has no token."""
    without = ~new.any(1)
    if without.any():
        raise ArgumentError(
            f"`attention_mask` leaves row {int(without.nonzero()[0])} without a new token: every row needs one to "
            "continue from"
        )


def _run(
    model: PreTrainedModel, inputs: dict, cache: PagedCache, mask: torch.Tensor, chunk_size: int | None
) -> ModelOutput:
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
