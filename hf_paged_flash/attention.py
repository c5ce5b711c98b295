"""The one function that every attention layer of a model under "paged_flash" calls."""

import os
from collections.abc import Callable
from functools import wraps

import torch
from torch import nn

from . import rows
from .backend import use_kernels
from .cache import PagedTensor
from .errors import PagedFlashError, UnsupportedFeatureError
from .masks import are_chunks, is_causal_by_itself, masks_nothing, window_of
from .matrices import select_keys, sink_column
from .ops.validation import MAX_BACKWARD_HEAD_DIM, NO_WIDE_BACKWARD, check_dropout

# Arguments that change what attention computes and that no path here applies: {name: what it is}
_REFUSED_ARGUMENTS = {"head_mask": "a head mask"}


def _leaves_the_cache(attend: Callable) -> Callable:
    """A forward that is refused half way takes back what it has told the cache."""

    @wraps(attend)
    def guarded(module, query, key, *arguments, **options):
        if torch.compiler.is_compiling():
            return attend(module, query, key, *arguments, **options)
        try:
            return attend(module, query, key, *arguments, **options)
        except PagedFlashError:
            if isinstance(key, PagedTensor):
                key.layer.groups.take_back(key.step)
            raise

    return guarded


@_leaves_the_cache
def paged_flash_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    block_indices: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    deterministic: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface for "paged_flash".

    Args:
        module: the attention layer.
        query: (B, Hq, Sq, D).
        key, value: (B, Hkv, Sk, D | Dv), or what `PagedCache.update()` returned.
        attention_mask: what `masks.paged_flash_mask` returned, or a mask of the user's own (B | 1, Hq | 1, Sq, Sk),
            bool (True = visible) or added to the scores. It says all: no causal mask or window is put on top.
        dropout: share of the probabilities dropped while the module trains, below 1.
        scaling: softmax scale; None = 1 / sqrt(D).
        sliding_window: keys a query sees, itself included, where `attention_mask` does not say it.
        softcap: scores become softcap * tanh(score / softcap).
        is_causal: None = the module's own `is_causal`.
        s_aux: (Hq,), attention sinks.
        position_bias: (B | 1, Hq | 1, Sq | 1, Sk), added to the scores; differentiable.
        indices, block_indices: (B, Sq, n) and (B, groups, Sq, n), the keys or blocks of keys that a query may see of
            those that a 4-D `attention_mask` shows it, see `matrices.select_keys`.
        sinks: (B | 1, Hq | 1, Sq, 1), a sink for each query, see `matrices.sink_column`.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed rows in a batch of 1.
        deterministic: gradients that are the same in every run, as in `flash_attn_func`; None = whether the
            environment has FLASH_ATTENTION_DETERMINISTIC=1, as transformers asks. True wherever
            `torch.use_deterministic_algorithms(True)` is in force.

    Returns:
        (B, Sq, Hq, Dv) contiguous, and None for the attention weights. Its dtype is the one attention ran in:
        autocast's, or the smallest among query's, key's and value's, for a norm or RoPE may upcast some of them.

    Raises:
        UnsupportedFeatureError: something asked for that would change the result and can't be honoured.
        ArgumentError: a mask, a bias or offsets that do not fit the queries and keys; a dropout that drops all.
        A PagedCache is then as it was before the forward.
    """
    _refuse(module, query, value, attention_mask, kwargs)
    if cu_seq_lens_q is not None:
        _refuse_beside_offsets(key, attention_mask, position_bias)
    attention_mask = select_keys(module, attention_mask, key.shape[2], query.shape[1], indices, block_indices)
    # a matrix says all: no causal mask or window comes on top
    is_matrix = attention_mask is not None and attention_mask.dim() == 4
    causal = bool(is_causal if is_causal is not None else getattr(module, "is_causal", True))
    causal = not is_matrix and (causal or is_causal_by_itself(attention_mask))
    window = -1 if sliding_window is None else sliding_window - 1
    window_left, window_right = (-1, -1) if is_matrix else window_of(attention_mask) or (window, window)
    if isinstance(key, PagedTensor) and window_left < 0 and not is_matrix:
        window_left = _window_of_cache(key, query.shape[2])
    dropout = float(dropout) if module.training else 0.0
    check_dropout("dropout", dropout)
    scoring = rows.Scoring(
        softmax_scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        causal=causal,
        window_left=window_left,
        window_right=0 if causal else window_right,
        softcap=softcap or 0.0,
        s_aux=s_aux,
        dropout_p=dropout,
        deterministic=is_deterministic(deterministic),
    )
    dtype = _target_dtype(query, key, value)
    query = query.to(dtype)
    is_padding = attention_mask is not None and attention_mask.dim() == 2 and attention_mask.dtype != torch.int32
    told = masks_nothing(attention_mask) or (is_padding and isinstance(key, PagedTensor) and key.step.knows_mask)
    if isinstance(key, PagedTensor) and key.layer.groups.is_cross:
        told = _is_told_of_encoder(key, attention_mask, is_padding)
    if _are_paged(key, value) and told and position_bias is None and sinks is None:
        # a cache may store, and attend, in another dtype
        return rows.paged(query, key, value, scoring).to(dtype), None
    key, value = (_dense_keys(x, query.shape[2]).to(dtype) for x in (key, value))
    if sinks is not None:
        key, value, attention_mask, position_bias = sink_column(
            module, key, value, attention_mask, position_bias, sinks.to(dtype)
        )
    if cu_seq_lens_q is not None:
        offsets = cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
        is_replica = getattr(module, "_is_replica", False)  # of nn.DataParallel
        return rows.packed(query, key, value, *offsets, scoring, is_replica=is_replica), None
    return _attend(query, key, value, attention_mask, position_bias, scoring), None


def _attend(query, key, value, mask: torch.Tensor | None, position_bias, scoring: rows.Scoring) -> torch.Tensor:
    if position_bias is None and masks_nothing(mask):
        return rows.dense(query, key, value, scoring)
    if position_bias is None and mask.dim() == 2 and mask.dtype == torch.int32:
        return rows.segmented(query, key, value, mask, scoring)
    # packing a padded batch reads lengths on the host, which a compiled graph can't
    if position_bias is not None or mask.dim() == 4 or torch.compiler.is_compiling():
        return rows.biased(query, key, value, mask, position_bias, scoring)
    return rows.padded(query, key, value, mask.bool(), scoring)


def _is_told_of_encoder(key: PagedTensor, attention_mask: torch.Tensor | None, is_padding: bool) -> bool:
    """Whether a cross-attention cache has stored no key that the mask would hide."""
    if not key.step.knows_mask:
        return masks_nothing(attention_mask)
    if not is_padding and key.layer.group.has_padding:
        raise UnsupportedFeatureError(
            "the encoder's padding was left out of the paged cross-attention cache, and now a layer has another mask: "
            "pass `past_key_values=EncoderDecoderCache(DynamicCache(config=...), DynamicCache(config=...))`"
        )
    return is_padding or masks_nothing(attention_mask)


def _dense_keys(x: torch.Tensor, q_length: int) -> torch.Tensor:
    """Keys or values as a dense tensor (B, Hkv, Sk, D)."""
    if not isinstance(x, PagedTensor):
        return x
    is_whole = x.fresh is not None and not x.step.is_packed and q_length == x.step.end
    return x.fresh if is_whole else x.dense("attention")


def _window_of_cache(key: PagedTensor, q_length: int) -> int:
    """Keys to the left of a query's own that DynamicCache keeps, where neither layer nor mask tells a window (Moshi).

    A first forward sees all of its tokens there. -1 for no window.
    """
    window = key.layer.group.window
    if window is None or (not key.step.has_past and q_length == key.step.size[1]):
        return -1
    if q_length > 1:
        raise UnsupportedFeatureError(
            f"layer {key.layer.layer_idx} has a window of {window} tokens which only its cache knows of, so that "
            f"{q_length} new tokens after cached ones have none of their own: continue by one token at a time, or use "
            "`past_key_values=DynamicCache(config=model.config)`"
        )
    return window - 1


def _refuse(module: nn.Module, query, value, attention_mask: torch.Tensor | None, kwargs: dict) -> None:
    if kwargs.get("output_attentions"):
        raise UnsupportedFeatureError(
            "`output_attentions=True` needs the attention weights, which paged_flash never forms: load the model with "
            'attn_implementation="eager"'
        )
    for name, meaning in _REFUSED_ARGUMENTS.items():
        if kwargs.get(name) is not None:
            raise UnsupportedFeatureError(
                f"{type(module).__name__} passes `{name}`, {meaning}, which paged_flash can't apply: load the "
                'model with attn_implementation="sdpa" or "eager"'
            )
    if kwargs.get("cache") is not None:
        raise UnsupportedFeatureError(
            "continuous batching (`generate_batch`) is not built for paged_flash yet: use `generate()`, or "
            'attn_implementation="sdpa" for `generate_batch`'
        )
    if max(query.shape[-1], value.shape[-1]) > MAX_BACKWARD_HEAD_DIM:
        if module.training and torch.is_grad_enabled() and use_kernels(query):
            raise UnsupportedFeatureError(NO_WIDE_BACKWARD)
    if attention_mask is not None and attention_mask.dim() != 4:
        if attention_mask.dim() != 2 or attention_mask.is_floating_point():
            raise UnsupportedFeatureError(
                "`attention_mask` must be 2-D (batch, columns), bool or integer, or 4-D under paged_flash, got "
                f"{tuple(attention_mask.shape)} of {attention_mask.dtype}"
            )


def _refuse_beside_offsets(key, attention_mask: torch.Tensor | None, position_bias) -> None:
    if isinstance(key, PagedTensor):
        raise UnsupportedFeatureError(
            "`cu_seq_lens_q` packs rows of a batch, which PagedCache keeps apart by itself: pass `use_cache=False` "
            "with packed rows, or a padded batch with the cache"
        )
    if position_bias is not None:
        raise UnsupportedFeatureError(
            "`position_bias` over rows that `cu_seq_lens_q` packs is not supported: pass a padded batch"
        )
    # segment ids, int32, are the same rows told by position_ids
    is_mask = not masks_nothing(attention_mask)
    if is_mask and (attention_mask.dtype != torch.int32 or are_chunks(attention_mask)):
        raise UnsupportedFeatureError(
            f"an `attention_mask` of shape {tuple(attention_mask.shape)} and `cu_seq_lens_q` both say who sees whom: "
            "pass one"
        )


def is_deterministic(asked: bool | None) -> bool:
    """Whether gradients must be the same in every run: as asked for, or by the environment."""
    if asked is None:
        return os.environ.get("FLASH_ATTENTION_DETERMINISTIC", "0") == "1"
    return asked


def _target_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else the smallest among the tensors' (PEFT and RoPE may upcast some)."""
    device_type = tensors[0].device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    target = tensors[0].dtype
    for tensor in tensors[1:]:
        target = tensor.dtype if tensor.dtype.itemsize < target.itemsize else target
    return target


def _are_paged(key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether they are one layer's, as the cache holds them now: a step's table is of no use once rows have moved."""
    return (
        isinstance(key, PagedTensor)
        and isinstance(value, PagedTensor)
        and key.layer is value.layer
        and (key.kind, value.kind) == ("key", "value")
        and key.step is key.layer.group.step
    )
