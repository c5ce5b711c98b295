"""The one function that every attention layer of a model under "paged_flash" calls."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from .backend import use_kernels
from .cache import PagedTensor
from .errors import ArgumentError, UnsupportedFeatureError
from .masks import as_matrix, masks_nothing, window_of
from .ops import library
from .ops.dropout import draw_seed
from .ops.flash_attn import MAX_DECODE_QUERIES
from .ops.validation import MAX_BACKWARD_HEAD_DIM, NO_WIDE_BACKWARD
from .packing import Packing, pack, unpack

# Arguments that change what attention computes and that no path here applies: {name: what it is}
_REFUSED_ARGUMENTS = {
    "head_mask": "a head mask",
    "indices": "a sparse selection of keys",
    "block_indices": "a sparse selection of key blocks",
}


@dataclass(frozen=True)
class _Options:
    """What a layer asks of attention, in the ops' terms."""

    softmax_scale: float
    causal: bool
    window_left: int
    window_right: int
    softcap: float
    s_aux: torch.Tensor | None
    dropout_p: float


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
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface for "paged_flash".

    Args:
        module: the attention layer.
        query: (B, Hq, Sq, D).
        key, value: (B, Hkv, Sk, D | Dv), or what `PagedCache.update()` returned.
        attention_mask: what `masks.paged_flash_mask` returned, or a mask of the user's own (B | 1, Hq | 1, Sq, Sk),
            bool (True = visible) or added to the scores. It says all: no causal mask or window is put on top.
        dropout: share of the probabilities dropped while the module trains.
        scaling: softmax scale; None = 1 / sqrt(D).
        sliding_window: keys a query sees, itself included, where `attention_mask` does not say it.
        softcap: scores become softcap * tanh(score / softcap).
        is_causal: None = the module's own `is_causal`.
        s_aux: (Hq,), attention sinks.
        position_bias: (B | 1, Hq | 1, Sq | 1, Sk), added to the scores; differentiable.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed rows in a batch of 1.

    Returns:
        (B, Sq, Hq, Dv) contiguous, and None for the attention weights. Its dtype is the one attention ran in:
        autocast's, or the smallest among query's, key's and value's, for a norm or RoPE may upcast some of them.

    Raises:
        UnsupportedFeatureError: something asked for that would change the result and can't be honoured.
    """
    try:
        _refuse(module, query, value, attention_mask, kwargs)
    except UnsupportedFeatureError:
        if isinstance(key, PagedTensor):
            key.layer.group.take_back(key.step)
        raise
    dtype = _target_dtype(query, key, value)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    window = -1 if sliding_window is None else sliding_window - 1
    window_left, window_right = window_of(attention_mask) or (window, window)
    options = _Options(
        softmax_scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        causal=bool(causal),
        window_left=window_left,
        window_right=0 if causal else window_right,
        softcap=softcap or 0.0,
        s_aux=s_aux,
        dropout_p=float(dropout) if module.training else 0.0,
    )
    is_matrix = attention_mask is not None and attention_mask.dim() == 4
    if kwargs.get("cache") is not None:
        raise UnsupportedFeatureError(
            "continuous batching (`generate_batch`) is not built for paged_flash yet: use `generate()`, or "
            'attn_implementation="sdpa" for `generate_batch`'
        )
    if isinstance(key, PagedTensor) and cu_seq_lens_q is not None:
        raise UnsupportedFeatureError(
            "`cu_seq_lens_q` packs rows of a batch, which PagedCache keeps apart by itself: pass `use_cache=False` "
            "with packed rows, or a padded batch with the cache"
        )
    if is_matrix and cu_seq_lens_q is not None:
        raise UnsupportedFeatureError("a 4-D `attention_mask` and `cu_seq_lens_q` both say who sees whom: pass one")
    query = query.to(dtype)
    told = masks_nothing(attention_mask) or (not is_matrix and isinstance(key, PagedTensor) and key.step.knows_mask)
    if _are_paged(key, value) and told and position_bias is None:
        return _paged(query, key, value, options).to(dtype), None  # a cache may store, and attend, in another dtype
    key, value = (_dense_keys(x, query.shape[2]).to(dtype) for x in (key, value))
    # packing reads lengths on the host, which a compiled graph can't
    packs = not (is_matrix or torch.compiler.is_compiling())
    if cu_seq_lens_q is not None and position_bias is None:
        out = _packed(query, key, value, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, options)
    elif masks_nothing(attention_mask) and position_bias is None:
        out = _dense(query, key, value, options)
    elif position_bias is not None or not packs:
        out = _biased(query, key, value, attention_mask, position_bias, options)
    elif attention_mask.dtype == torch.int32:
        out = _segmented(query, key, value, attention_mask, options)
    else:
        out = _padded(query, key, value, attention_mask.bool(), options)
    return out, None


def _dense_keys(x: torch.Tensor, q_length: int) -> torch.Tensor:
    """Keys or values as a dense tensor (B, Hkv, Sk, D)."""
    if not isinstance(x, PagedTensor):
        return x
    return x.fresh if x.fresh is not None and q_length == x.step.end else x.dense("attention")


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
    if module.training and torch.is_grad_enabled() and use_kernels(query):
        if max(query.shape[-1], value.shape[-1]) > MAX_BACKWARD_HEAD_DIM:
            raise UnsupportedFeatureError(NO_WIDE_BACKWARD)
    if attention_mask is not None and attention_mask.dim() != 4:
        if attention_mask.dim() != 2 or attention_mask.is_floating_point():
            raise UnsupportedFeatureError(
                "`attention_mask` must be 2-D (batch, columns), bool or integer, or 4-D under paged_flash, got "
                f"{tuple(attention_mask.shape)} of {attention_mask.dtype}"
            )


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


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: _Options, **lengths
) -> torch.Tensor:
    seed = draw_seed(query.device) if options.dropout_p > 0.0 else None
    return library.flash_forward(query, key, value, dropout_seed=seed, **vars(options), **lengths)[0]


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: _Options) -> torch.Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return _forward(query, key, value, options, max_seqlen_q=query.shape[1], max_seqlen_k=key.shape[1])


def _biased(query, key, value, mask, position_bias, options: _Options) -> torch.Tensor:
    """Dense keys under a bias, or a mask that lengths can't say: a matrix (B | 1, Hq | 1, Sq | 1, Sk)."""
    mask = None if masks_nothing(mask) else mask
    if mask is not None and mask.dim() == 4:
        options = replace(options, causal=False, window_left=-1, window_right=-1)
    room = key.shape[2]
    columns = room if mask is None or mask.dim() == 4 else mask.shape[1]
    key, value = key[:, :, :columns], value[:, :, :columns]  # a static cache holds more columns than it has filled
    bias = as_matrix(mask)
    if position_bias is not None:
        if position_bias.shape[-1] == room:
            position_bias = position_bias[..., :columns]
        if bias is None:
            bias = position_bias
        elif bias.dtype == torch.bool:
            bias = position_bias.masked_fill(~bias, float("-inf"))
        else:
            bias = position_bias + bias
    sizes = (*query.shape[:3], key.shape[2])
    if bias.dim() != 4 or any(got not in (1, size) for got, size in zip(bias.shape, sizes, strict=True)):
        raise ArgumentError(
            f"`attention_mask` and `position_bias` must have shape {sizes}, (batch, heads, queries, keys), or 1 where "
            f"all are alike, got {tuple(bias.shape)}"
        )
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return _forward(query, key, value, options, bias=bias, max_seqlen_q=query.shape[1], max_seqlen_k=key.shape[1])


def _paged(query: torch.Tensor, key: PagedTensor, value: PagedTensor, options: _Options) -> torch.Tensor:
    step = key.step.to(query.device)
    batch, _, q_length, _ = query.shape
    if key.fresh is not None and q_length == step.end:
        # nothing was stored before: the forward's own keys are all there is, and they lie dense
        k, v = key.fresh.to(query.dtype), value.fresh.to(query.dtype)
        if step.indices is None:
            return _dense(query, k, v, options)
        q, k, v = (pack(x, step.indices) for x in (query, k, v))
        lengths = {"cu_seqlens_q": step.cu_seqlens_q, "cu_seqlens_k": step.cu_seqlens_q}
        lengths |= {"max_seqlen_q": step.max_seqlen_q, "max_seqlen_k": step.max_seqlen_q}
        return unpack(_forward(q, k, v, options, **lengths), step.indices, batch, q_length)
    pool = key.layer.pool
    q = query.to(pool.key.dtype)
    if q_length <= MAX_DECODE_QUERIES and step.indices is None and options.dropout_p == 0.0:
        scoring = {name: value for name, value in vars(options).items() if name != "dropout_p"}
        return library.paged_decode_no_backward(
            q.transpose(1, 2), pool.key, pool.value, cache_seqlens=step.cache_seqlens, block_table=step.block_table,
            **scoring,
        )[0]  # fmt: skip
    keys = {"seqused_k": step.cache_seqlens, "block_table": step.block_table, "max_seqlen_k": step.max_seqlen_k}
    if step.indices is None:
        return _forward(q.transpose(1, 2), pool.key, pool.value, options, max_seqlen_q=q_length, **keys)
    rows = {"cu_seqlens_q": step.cu_seqlens_q, "max_seqlen_q": step.max_seqlen_q}
    out = _forward(pack(q, step.indices), pool.key, pool.value, options, **rows, **keys)
    return unpack(out, step.indices, batch, q_length)


def _packed(
    query, key, value, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, options: _Options
) -> torch.Tensor:
    """Rows packed one after another in a batch of 1, offsets given by the caller."""
    if query.shape[0] != 1:
        raise ArgumentError(f"`cu_seq_lens_q` describes packed rows in a batch of 1, got a batch of {query.shape[0]}")
    cu_seqlens_q = cu_seq_lens_q.to(torch.int32)
    cu_seqlens_k = cu_seqlens_q if cu_seq_lens_k is None else cu_seq_lens_k.to(torch.int32)
    if max_length_q is None:
        max_length_q = int(cu_seqlens_q.diff().max())
    if max_length_k is None:
        max_length_k = max_length_q if cu_seq_lens_k is None else int(cu_seqlens_k.diff().max())
    q, k, v = (x.transpose(1, 2)[0] for x in (query, key, value))
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    lengths |= {"max_seqlen_q": int(max_length_q), "max_seqlen_k": int(max_length_k)}
    return _forward(q, k, v, options, **lengths)[None]


def _padded(query, key, value, mask: torch.Tensor, options: _Options) -> torch.Tensor:
    """Dense keys, some of them padding: packed, attended to, spread out again; padded queries give 0."""
    batch, _, q_length, _ = query.shape
    columns = mask.shape[1]
    # The mask speaks of keys. Where positions count, queries are the last of them; else (an encoder, cross-attention)
    # every query sees every key that is a token.
    positional = options.causal or options.window_left >= 0
    if columns > key.shape[2] or (positional and q_length > columns):
        raise ArgumentError(
            f"`attention_mask` has {columns} columns, which does not fit {q_length} new tokens and {key.shape[2]} keys"
        )
    # every layer of a forward gets the same mask object: find its tokens once
    known, keys, queries = getattr(mask, "_paged_flash_packings", (None, None, None))
    if known != (q_length, positional):
        keys = Packing.of(mask)
        if not positional:
            queries = Packing.of(mask.new_ones(batch, q_length))
        else:
            queries = keys if q_length == columns else Packing.of(mask[:, columns - q_length :])
        mask._paged_flash_packings = (q_length, positional), keys, queries
    key, value = key[:, :, :columns], value[:, :, :columns]  # a static cache holds more columns than it has filled
    out = _forward(
        pack(query, queries.indices), pack(key, keys.indices), pack(value, keys.indices), options,
        cu_seqlens_q=queries.cu_seqlens, cu_seqlens_k=keys.cu_seqlens,
        max_seqlen_q=queries.max_seqlen, max_seqlen_k=keys.max_seqlen,
    )  # fmt: skip
    return unpack(out, queries.indices, batch, q_length)


def _segmented(query, key, value, segments: torch.Tensor, options: _Options) -> torch.Tensor:
    """Rows packed with ids (B, S) that count up inside each batch row: a segment ends where the id changes."""
    batch, _, q_length, _ = query.shape
    if key.shape[2] != q_length:
        raise ArgumentError(f"packed rows need as many keys as queries, got {key.shape[2]} and {q_length}")
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = torch.nonzero(starts.flatten())[:, 0]
    cu_seqlens = torch.cat([first, first.new_tensor([batch * q_length])]).to(torch.int32)
    longest = int(cu_seqlens.diff().max())
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    lengths = {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }
    return _forward(q, k, v, options, **lengths).unflatten(0, (batch, q_length))

