"""Three ways to a causal LM's logits: one pass, prefill in chunks, and token by token from the cache."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from hf_paged_flash.errors import ArgumentError, UnsupportedFeatureError

OURS = "paged_flash"
WAYS = ("forward", "chunked", "decode")


def switch_attention(model: PreTrainedModel, implementation: str) -> None:
    """Sets the attention implementation and checks that every part of the model took it.

    Raises:
        UnsupportedFeatureError: some module kept another one (transformers only warns, or says nothing).
    """
    model.set_attn_implementation(implementation)
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        in_force = getattr(config, "_attn_implementation", implementation)
        if in_force != implementation:
            raise UnsupportedFeatureError(
                f"`{implementation}` was asked for, but {name or 'the whole'} of {type(model).__name__} runs "
                f"`{in_force}`: compare implementations that the model can switch to"
            )


def new_cache(model: PreTrainedModel, implementation: str) -> Any:
    """The cache an implementation is meant to run on: PagedCache for ours, DynamicCache for the others."""
    if implementation == OURS:
        from hf_paged_flash import PagedCache

        return PagedCache(model.config)
    return DynamicCache(config=model.config)


@torch.no_grad()
def scored_logits(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    context: int,
    *,
    way: str,
    cache_factory: Callable[[], Any],
    chunk: int,
) -> torch.Tensor:
    """Logits for tokens[:, context:], each from the tokens before it.

    Args:
        tokens: (batch, length) int64, no padding.
        context: Tokens at the start of each row that are not scored; at least 1.
        way: "forward" one pass without a cache; "chunked" prefill in chunks of `chunk` tokens into a new cache;
            "decode" prefill of the context, then one token a step from the cache.
        cache_factory: Makes an empty cache.
        chunk: Chunk length of "chunked".

    Returns:
        (batch, length - context, vocabulary), the model's dtype.
    """
    # The last token predicts nothing that is scored.
    inputs = tokens[:, :-1]
    if way == "forward":
        return model(inputs, use_cache=False).logits[:, context - 1 :]
    if way == "chunked":
        pieces = inputs.split(chunk, dim=1)
    elif way == "decode":
        pieces = (inputs[:, :context], *(inputs[:, at : at + 1] for at in range(context, inputs.shape[1])))
    else:
        raise ArgumentError(f"`way` must be one of {', '.join(WAYS)}, got {way!r}")
    cache = cache_factory()
    logits = []
    position = 0
    for piece in pieces:
        step = model(piece, past_key_values=cache, use_cache=True).logits
        # Context is dropped at once: a long prefill's logits are the largest tensor here.
        first = max(0, context - 1 - position)
        logits.append(step[:, first:].clone() if first else step)
        position += piece.shape[1]
    return torch.cat(logits, dim=1)
