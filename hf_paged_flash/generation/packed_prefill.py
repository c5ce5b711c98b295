"""The prefill of `generate()` without padding: the tokens of all rows one after another, `[1, tokens]`.

Attention runs over each row by itself (`packed_forward`); everything else in the model sees tokens alone and computes
none for nothing. The logits are those of each row's last token. A prefix that is stored already is not computed again.
"""

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..cache import PagedCache
from ..cache.forward_step import on_host
from ..errors import ArgumentError
from .decode_loop import loop_of, prepare_model
from .media import has_contents, of_tokens
from .packable import NotPacked, why_not_these, why_padded
from .packed_rows import run_packed
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

    They do where there is none and nothing is ragged or in chunks, and where `why_padded` or `why_not_these` knows a
    reason. Short prompts, padded or not, are replayed as a graph within a decode loop that captures its steps.
    Waits for the device once, to read the mask.

    Raises:
        ArgumentError: a row without a new token.
        NotPacked: rows have to keep their padding, but begin with tokens that are stored.
    """
    attention_mask = model_kwargs.get("attention_mask")
    if input_ids.dim() != 2 or (attention_mask is not None and attention_mask.dim() != 2):
        return None
    columns, chunk_size = cache.get_seq_length(), generation_config.prefill_chunk_size
    begins_known = not columns and (cache.group.holds_tokens or cache.groups.sharing is not None)
    # chunks of transformers' own begin at the first column before 5.24, which leaves out a mask of ones; and they cut
    # positions of several axes along the wrong one
    is_chunked = chunk_size is not None and (not columns or attention_mask is not None)
    is_ragged = begins_known or is_chunked
    loop = loop_of(model, cache) if chunk_size is None else None
    all_columns = (input_ids if attention_mask is None else attention_mask).shape[1]
    if not is_ragged and all_columns - columns > LENGTHS[-1]:
        loop = None  # some row is too long
    if (attention_mask is None and not is_ragged and loop is None) or why_padded(
        model, cache, generation_config, model_kwargs
    ):
        return None
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    mask = on_host(mask)
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
        if begins_known:
            raise NotPacked
        return None
    check_new_tokens(new)
    inputs = of_tokens(inputs)
    outputs = None if loop is None or has_images else loop.prefill(inputs, mask)
    if outputs is not None or not is_padded:
        return outputs
    prepare_model(model, cache)
    return run_packed(model, inputs, cache, mask, chunk_size)


def check_new_tokens(new: torch.Tensor) -> None:
    """Raises ArgumentError where a row of `new`, bool (B, new columns) on the host, has no token."""
    without = ~new.any(1)
    if without.any():
        raise ArgumentError(
            f"`attention_mask` leaves row {int(without.nonzero()[0])} without a new token: every row needs one to "
            "continue from"
        )
