"""A right-padded prompt is continued from its last token, not from the padding behind it.

Why: `generate()` samples a row's first new token from the last column, and counts the positions of the next ones from
there; in a right-padded row that is padding. A PagedCache never stores padding, so the prefill's logits and that last
position are all that has to be mended, and no public hook lies between them and the sampler.
"""

import torch
from transformers.generation.utils import GenerationMixin

from hf_paged_flash.errors import ArgumentError
from hf_paged_flash.patches.base import Patch, cache_name


def _prefill(original, self, input_ids, generation_config, model_kwargs, *args, **kwargs):
    from hf_paged_flash.cache import PagedCache
    from hf_paged_flash.cache.forward_step import reading_once

    cache, mask = model_kwargs.get(cache_name(model_kwargs)), model_kwargs.get("attention_mask")
    if isinstance(cache, PagedCache):
        _check_fits(input_ids, model_kwargs)
    if not isinstance(cache, PagedCache) or mask is None or mask.dim() != 2:
        return original(self, input_ids, generation_config, model_kwargs, *args, **kwargs)
    with reading_once(mask) as on_host:  # waits for the device, this once
        new = on_host[:, cache.get_seq_length() :]
        if bool(new[:, -1:].all()):
            return original(self, input_ids, generation_config, model_kwargs, *args, **kwargs)
        return _from_last_tokens(original, new, self, input_ids, generation_config, model_kwargs, *args, **kwargs)


def _from_last_tokens(original, new: torch.Tensor, self, input_ids, generation_config, model_kwargs, *args, **kwargs):
    """`original`'s outputs for the last token of each row of `new`, bool (B, columns) on the host."""
    from hf_paged_flash.cache.forward_step import to_device
    from hf_paged_flash.generation.packed_prefill import check_new_tokens

    check_new_tokens(new)
    device = model_kwargs["attention_mask"].device
    last = (torch.arange(new.shape[1], device=new.device) * new).argmax(1)  # each row's last token
    kept, index = torch.unique(last, return_inverse=True)
    last, kept, index = (to_device(x.numpy(), device) for x in (last, kept, index))
    logits_to_keep = model_kwargs.get("logits_to_keep")
    if logits_to_keep is not None:
        model_kwargs["logits_to_keep"] = kept
    outputs = original(self, input_ids, generation_config, model_kwargs, *args, **kwargs)
    if logits_to_keep is not None:
        model_kwargs["logits_to_keep"] = logits_to_keep
    if (position_ids := model_kwargs.get("position_ids")) is not None:
        column = position_ids.shape[-1] - new.shape[1] + last  # of each row's last token, for 2-D and 3-D positions
        position_ids = position_ids.clone()
        position_ids[..., -1] = position_ids.gather(-1, column.expand(position_ids.shape[:-1])[..., None])[..., 0]
        model_kwargs["position_ids"] = position_ids
    if outputs.logits.shape[1] > 1:  # else each row's last token is all there is: they were packed, or end together
        index = index if outputs.logits.shape[1] == len(kept) else last
        rows = torch.arange(len(last), device=outputs.logits.device)
        outputs.logits = outputs.logits[rows, index.to(rows.device)][:, None]
    return outputs


def _check_fits(input_ids: torch.Tensor, model_kwargs: dict) -> None:
    """Raises ArgumentError where a mask is not of these rows, which the model would only find in the middle.

    transformers 5.24 leaves out a mask of ones, once it has counted positions by it.
    """
    mask, position_ids = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    told = mask if mask is not None else position_ids
    if told is None or told.dim() != 2 or input_ids.dim() != 2 or model_kwargs.get("inputs_embeds") is not None:
        return
    # fewer rows than ids: codebooks of one row; more columns: the new turn alone
    if told.shape[0] > input_ids.shape[0] or told.shape[1] < input_ids.shape[1]:
        name, expected = "attention_mask" if mask is not None else "position_ids", tuple(input_ids.shape)
        raise ArgumentError(f"`{name}` must have the shape of `input_ids`, {expected}, got {tuple(told.shape)}")


PREFILL_LOGITS = Patch(
    owner=lambda: GenerationMixin,
    name="_prefill",
    parameters=("self", "input_ids", "generation_config", "model_kwargs", "is_first_iteration"),
    wrapper=_prefill,
    reason="a right-padded row gives what it gives unpadded",
    checked=("5.17.0", "5.23.0", "5.24.0"),
)
