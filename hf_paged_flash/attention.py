"""The one function that every attention layer of a model under "paged_flash" calls."""

from dataclasses import dataclass

import torch
from torch import nn

from .cache import PagedTensor
from .errors import ArgumentError, UnsupportedFeatureError
from .ops import library
from .ops.flash_attn import MAX_DECODE_QUERIES

# Arguments that change what attention computes and that no path here applies: {name: what it is}
_REFUSED_ARGUMENTS = {
    "position_bias": "an additive position bias",
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
        attention_mask: what `masks.paged_flash_mask` returned.
        dropout: must be 0 (training is not built yet).
        scaling: softmax scale; None = 1 / sqrt(D).
        sliding_window: keys a query sees, itself included; both ways for a bidirectional layer.
        softcap: scores become softcap * tanh(score / softcap).
        is_causal: None = the module's own `is_causal`.
        s_aux: (Hq,), attention sinks.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: packed rows in a batch of 1.

    Returns:
        (B, Sq, Hq, Dv) contiguous, and None for the attention weights. Its dtype is the one attention ran in:
        autocast's, or the smallest among query's, key's and value's, for a norm or RoPE may upcast some of them.

    Raises:
        UnsupportedFeatureError: something asked for that would change the result and can't be honoured.
    """
    _refuse(module, dropout, attention_mask, kwargs)
    dtype = _target_dtype(query, key, value)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    window = -1 if sliding_window is None else sliding_window - 1
    options = _Options(
        softmax_scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        causal=bool(causal),
        window_left=window,
        window_right=0 if causal else window,
        softcap=softcap or 0.0,
        s_aux=s_aux,
    )
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
    query = query.to(dtype)
    if _are_paged(key, value):
        out = _paged(query, key, value, options)
    else:
        key, value = (x.dense("attention") if isinstance(x, PagedTensor) else x for x in (key, value))
        key, value = key.to(dtype), value.to(dtype)
        if cu_seq_lens_q is not None:
            out = _packed(query, key, value, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, options)
        elif attention_mask is None:
            out = _dense(query, key, value, options)
        elif attention_mask.dtype == torch.bool:
            out = _padded(query, key, value, attention_mask, options)
        else:
            out = _segmented(query, key, value, attention_mask, options)
    return out.to(dtype), None  # a cache may store, and attention then run, in another dtype


def _refuse(module: nn.Module, dropout: float, attention_mask: torch.Tensor | None, kwargs: dict) -> None:
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
    if attention_mask is not None and attention_mask.dim() != 2:
        raise UnsupportedFeatureError(
            f"`attention_mask` must be 2-D (batch, columns) under paged_flash, got {tuple(attention_mask.shape)}: "
            'for a mask of your own load the model with attn_implementation="sdpa" or "eager"'
        )
    if dropout or (module.training and torch.is_grad_enabled()):
        raise UnsupportedFeatureError(
            f"paged_flash has no backward pass and no dropout yet (`dropout` is {dropout}): call `model.eval()` for "
            'inference, or train with attn_implementation="sdpa"'
        )


def _target_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else the smallest among the tensors' (PEFT and RoPE may upcast some)."""
    device_type = tensors[0].device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return min((x.dtype for x in tensors), key=lambda dtype: dtype.itemsize)


def _are_paged(key: torch.Tensor, value: torch.Tensor) -> bool:
    return (
        isinstance(key, PagedTensor)
        and isinstance(value, PagedTensor)
        and key.layer is value.layer
        and (key.kind, value.kind) == ("key", "value")
    )


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: _Options, **lengths
) -> torch.Tensor:
    return library.flash_forward_no_backward(query, key, value, **vars(options), **lengths)[0]


def _dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: _Options) -> torch.Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return _forward(query, key, value, options, max_seqlen_q=query.shape[1], max_seqlen_k=key.shape[1])


def _paged(query: torch.Tensor, key: PagedTensor, value: PagedTensor, options: _Options) -> torch.Tensor:
    step = key.step.to(query.device)
    batch, _, q_length, _ = query.shape
    if key.fresh is not None and q_length == step.end:
        # nothing was stored before: the forward's own keys are all there is, and they lie dense
        k, v = key.fresh.to(query.dtype), value.fresh.to(query.dtype)
        if step.indices is None:
            return _dense(query, k, v, options)
        q, k, v = (_pack(x, step.indices) for x in (query, k, v))
        lengths = {"cu_seqlens_q": step.cu_seqlens_q, "cu_seqlens_k": step.cu_seqlens_q}
        lengths |= {"max_seqlen_q": step.max_seqlen_q, "max_seqlen_k": step.max_seqlen_q}
        return _unpack(_forward(q, k, v, options, **lengths), step.indices, batch, q_length)
    pool = key.layer.pool
    q = query.to(pool.key.dtype)
    if q_length <= MAX_DECODE_QUERIES and step.indices is None:
        return library.paged_decode_no_backward(
            q.transpose(1, 2), pool.key, pool.value, cache_seqlens=step.cache_seqlens, block_table=step.block_table,
            **vars(options),
        )[0]  # fmt: skip
    keys = {"seqused_k": step.cache_seqlens, "block_table": step.block_table, "max_seqlen_k": step.max_seqlen_k}
    if step.indices is None:
        return _forward(q.transpose(1, 2), pool.key, pool.value, options, max_seqlen_q=q_length, **keys)
    rows = {"cu_seqlens_q": step.cu_seqlens_q, "max_seqlen_q": step.max_seqlen_q}
    out = _forward(_pack(q, step.indices), pool.key, pool.value, options, **rows, **keys)
    return _unpack(out, step.indices, batch, q_length)


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


@dataclass(frozen=True)
class _Packing:
    """Where the tokens of a padded batch are, and where each row begins once packed."""

    indices: torch.Tensor  # int64 (tokens,), places among B * S
    cu_seqlens: torch.Tensor  # int32 (B + 1,)
    max_seqlen: int

    @staticmethod
    def of(mask: torch.Tensor) -> "_Packing":
        lengths = mask.sum(1, dtype=torch.int32)
        cu_seqlens = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return _Packing(torch.nonzero(mask.flatten())[:, 0], cu_seqlens, int(lengths.max()))


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
    packings = mask.__dict__.setdefault("_paged_flash_packings", {})
    if (q_length, positional) not in packings:
        keys = _Packing.of(mask)
        if not positional:
            queries = _Packing.of(mask.new_ones(batch, q_length))
        else:
            queries = keys if q_length == columns else _Packing.of(mask[:, columns - q_length :])
        packings[q_length, positional] = keys, queries
    keys, queries = packings[q_length, positional]
    key, value = key[:, :, :columns], value[:, :, :columns]  # a static cache holds more columns than it has filled
    out = _forward(
        _pack(query, queries.indices), _pack(key, keys.indices), _pack(value, keys.indices), options,
        cu_seqlens_q=queries.cu_seqlens, cu_seqlens_k=keys.cu_seqlens,
        max_seqlen_q=queries.max_seqlen, max_seqlen_k=keys.max_seqlen,
    )  # fmt: skip
    return _unpack(out, queries.indices, batch, q_length)


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


def _pack(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """(B, H, S, D) to the tokens at `indices` (T,) of B * S, as (T, H, D)."""
    return x.transpose(1, 2).flatten(0, 1)[indices]


def _unpack(x: torch.Tensor, indices: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    """The reverse for (T, H, D), to (B, S, H, D); places not in `indices` are 0."""
    out = x.new_zeros(batch * length, *x.shape[1:])
    return out.index_copy(0, indices, x).unflatten(0, (batch, length))
