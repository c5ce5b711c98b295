"""A PagedCache as a safetensors file: blocks in use, tables, lengths, and in its metadata what they belong to."""

import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig
from transformers.cache_utils import LinearAttentionLayer

from ..errors import ArgumentError, PagedFlashError, UnsupportedFeatureError
from .block_pool import BlockPool
from .page_group import PageGroup
from .paged_layer import PagedLayer
from .window import first_in_reach

if TYPE_CHECKING:
    from .paged_cache import PagedCache

_KEY = "hf_paged_flash.cache"  # of the metadata
_VERSION = 1
_ABOUT = {"version", "model", "layers", "block_size", "num_blocks", "max_memory", "dtype", "columns", "states"}
# what a model must agree in to continue a cache
_IDENTITY = (
    "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"
)  # fmt: skip


def save(cache: "PagedCache", path: str | PathLike) -> None:
    """See `PagedCache.save`."""
    if not (folder := Path(path).absolute().parent).is_dir():
        raise FileNotFoundError(f"`path` is {str(path)!r}, but there is no folder {folder}")
    tensors: dict[str, torch.Tensor] = {}
    for number, group in enumerate(cache.groups):
        tensors |= _of_group(cache, number, group)
    states = {}
    for idx, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionLayer):
            states[idx] = [bool(known) for known in layer.has_previous_state.values()]
            for kind in ("conv_states", "recurrent_states"):
                held = {f"layers.{idx}.{kind}.{i}": x for i, x in getattr(layer, kind).items() if x is not None}
                tensors |= {name: x.contiguous() for name, x in held.items()}
        elif not isinstance(layer, PagedLayer) and vars(layer).get("keys") is not None:
            raise UnsupportedFeatureError(f"layer {idx} is a {type(layer).__name__}, whose state can't be saved yet")
    if cache.columns and states and not any(map(any, states.values())):  # some alone are of layers without one
        raise _state_elsewhere(min(states))
    store = cache.groups[0].store
    about = {
        "version": _VERSION,
        "model": _identity(cache.config),
        "layers": _layers(cache),
        "block_size": store.blocks.block_size,
        "num_blocks": store.pools.num_blocks,
        "max_memory": store.pools.max_memory,
        "dtype": None if cache.dtype is None else str(cache.dtype).removeprefix("torch."),
        "columns": cache.columns,
        "states": states,
    }
    save_file(tensors, path, metadata={_KEY: json.dumps(about)})


def _of_group(cache: "PagedCache", number: int, group: PageGroup) -> dict[str, torch.Tensor]:
    """Tables over blocks that are numbered anew, and those blocks of every layer, with zeros behind the last token."""
    group.sync_lengths()
    if not group.columns:
        return {}
    table = group.manager.table[:, : int(group.manager.row_blocks().max(initial=0))]
    used = table >= 0
    blocks, renumbered = np.unique(table[used], return_inverse=True)
    compact = np.full(table.shape, -1, np.int32)
    compact[used] = renumbered
    tensors = {
        f"groups.{number}.lengths": torch.from_numpy(group.manager.lengths),
        f"groups.{number}.table": torch.from_numpy(compact),
        f"groups.{number}.first": torch.from_numpy(group.manager.first),
    }
    real = group.real_columns()
    if real is not None:
        tensors[f"groups.{number}.mask"] = torch.from_numpy(real)
    unfilled = np.arange(group.block_size)[None, :] >= group.manager.filled()[blocks][:, None]
    for idx, layer in enumerate(cache.layers):
        if isinstance(layer, PagedLayer) and layer.group is group:
            if layer.columns != group.columns:
                if not layer.columns and any(other.columns for other in cache.layers[idx + 1 :]):
                    raise _state_elsewhere(idx)
                raise PagedFlashError(
                    f"layer {idx} holds {layer.columns} columns of the paged cache, others {group.columns}: a forward "
                    f"stopped half way. Take it back with `crop({layer.columns - group.columns})` before `save()`"
                )
            for kind, pool in (("key", layer.pool.key), ("value", layer.pool.value)):
                kept = pool[torch.from_numpy(blocks).to(pool.device)]
                kept[torch.from_numpy(unfilled).to(pool.device)] = 0
                tensors[f"layers.{idx}.{kind}"] = kept.cpu()  # layer by layer: the device may have no room for a copy
    return tensors


def _state_elsewhere(idx: int) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"layer {idx} has stored nothing in the cache: the model keeps its state in its modules, which can't be saved"
    )


def load(
    cache_class: type["PagedCache"], path: str | PathLike, config: PreTrainedConfig, device: torch.device | str
) -> "PagedCache":
    """See `PagedCache.load`."""
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            about = (file.metadata() or {}).get(_KEY)
            about = None if about is None else json.loads(about)
            if type(about) is not dict or not _ABOUT <= set(about):
                raise ArgumentError(f"`path` must be a file that `PagedCache.save` wrote, {path} is another one")
            cache = _empty(cache_class, about, config)
            _restore(cache, about, _Saved(file, path))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ArgumentError(f"`path` must be a file that `PagedCache.save` wrote: {path}: {error}") from error
    return cache


class _Saved:
    """The tensors of a file, each read once and checked: one after another, the device need not hold all twice."""

    def __init__(self, file: safe_open, path: str | PathLike) -> None:
        self.file = file
        self.names = set(file.keys())
        self.path = path

    def read(self, name: str) -> torch.Tensor | None:
        """Tensor `name`; None if there is none, or it was read before."""
        if name not in self.names:
            return None
        self.names.remove(name)
        return self.file.get_tensor(name)

    def take(self, name: str, shape: tuple[int | None, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """Tensor `name`; None in `shape` takes any size, `dtype` None any floating one."""
        tensor = self.read(name)
        self.require(tensor is not None, f"has no tensor `{name}`")
        fits = tensor.dim() == len(shape) and all(n in (None, got) for n, got in zip(shape, tensor.shape, strict=True))
        fits = fits and (tensor.is_floating_point() if dtype is None else tensor.dtype == dtype)
        kind = "floating" if dtype is None else dtype
        got = f"{tuple(tensor.shape)} of {tensor.dtype}"
        self.require(fits, f"must hold `{name}` of shape {shape} (None: any), {kind}, and holds {got}")
        return tensor

    def require(self, condition: bool, otherwise: str) -> None:
        if not condition:
            raise ArgumentError(f"the saved cache {self.path} {otherwise}: it is damaged, or was changed")

    def check_empty(self) -> None:
        self.require(not self.names, f"holds tensors that belong nowhere, {sorted(self.names)[:3]}")


def _identity(config: PreTrainedConfig) -> dict:
    config = config.get_text_config(decoder=True)
    if not getattr(config, "is_heterogeneous", False):
        return {name: getattr(config, name, None) for name in _IDENTITY}
    layers = list(config.per_layer_config)  # to ask for a size that differs by layer (Gemma 4) is an error
    return {name: [getattr(layer, name, None) for layer in layers] for name in _IDENTITY}


def _layers(cache: "PagedCache") -> list[str]:
    """What each layer keeps: of another kind, or of another window, it could not go on."""
    windows = [layer.group.window if isinstance(layer, PagedLayer) else None for layer in cache.layers]
    return [
        type(layer).__name__ + ("" if window is None else f" of window {window}")
        for layer, window in zip(cache.layers, windows, strict=True)
    ]


def _empty(cache_class: type["PagedCache"], about: dict, config: PreTrainedConfig) -> "PagedCache":
    """The cache that was saved, without its tokens."""
    if about.get("version") != _VERSION:
        raise ArgumentError(
            f"`path` was saved in version {about.get('version')} of the format, this hf_paged_flash reads {_VERSION}"
        )
    dtype = about["dtype"] and getattr(torch, about["dtype"], about["dtype"])
    cache = cache_class(
        config,
        about["block_size"],
        num_blocks=about["num_blocks"],
        max_memory=about["max_memory"],
        dtype=dtype,
    )
    ours = _identity(config) | {"layers": _layers(cache)}
    for name, saved in (about["model"] | {"layers": about["layers"]}).items():
        if saved != ours[name]:
            raise ArgumentError(
                f"the cache was saved by a model whose `{name}` is {saved}, `config` says {ours[name]}: load it with "
                "the configuration of the model that made it"
            )
    return cache


def _restore(cache: "PagedCache", about: dict, saved: _Saved) -> None:
    if about["columns"]:
        for number, group in enumerate(cache.groups):
            _restore_group(cache, number, group, about["columns"], saved)
    for idx, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionLayer):
            _restore_states(idx, layer, about["states"].get(str(idx), []), saved)
    saved.check_empty()


def _restore_group(cache: "PagedCache", number: int, group: PageGroup, columns: int, saved: _Saved) -> None:
    lengths = saved.take(f"groups.{number}.lengths", (None,), torch.int64).cpu().numpy()
    batch, size = len(lengths), group.block_size
    table = saved.take(f"groups.{number}.table", (batch, None), torch.int32).cpu().numpy()
    needed, columns_of_table = -(-lengths // size), np.arange(table.shape[1])[None, :]
    first = saved.take(f"groups.{number}.first", (batch,), torch.int64).cpu().numpy()
    reach = 0 if group.window is None else first_in_reach(lengths, group.window, size)
    saved.require(((first >= 0) & (first <= reach)).all(), "has given back what its windows reach")
    held = (columns_of_table >= first[:, None]) & (columns_of_table < needed[:, None])
    saved.require(((table >= 0) == held).all() and (needed <= table.shape[1]).all(), "has tables that fit no lengths")
    num_blocks = int(table.max(initial=-1)) + 1
    saved.require(num_blocks <= table.size, "has tables that name blocks it can't hold")
    mask = None
    if f"groups.{number}.mask" in saved.names:
        mask = saved.take(f"groups.{number}.mask", (batch, columns), torch.bool)
        counted = mask.sum(1).cpu().numpy()
    else:
        counted = np.full(batch, columns)
    saved.require(np.array_equal(counted, lengths), "has lengths that differ from its columns")
    group.restore(table, lengths, first, columns, mask)
    for idx, layer in enumerate(cache.layers):
        if isinstance(layer, PagedLayer) and layer.group is group:
            key = saved.take(f"layers.{idx}.key", (num_blocks, size, None, None))
            value = saved.take(f"layers.{idx}.value", (num_blocks, size, key.shape[2], None), key.dtype)
            pool = BlockPool(size, *(x[:1].transpose(1, 2) for x in (key, value)), None)
            layer.restore(pool)
            pool.grow(num_blocks)
            pool.key[:num_blocks].copy_(key)
            pool.value[:num_blocks].copy_(value)


def _restore_states(idx: int, layer: LinearAttentionLayer, known: list[bool], saved: _Saved) -> None:
    saved.require(len(known) == layer.number_of_states, f"has another number of states in layer {idx}")
    for state, has_previous in enumerate(known):
        for kind in ("conv_states", "recurrent_states"):
            tensor = saved.read(f"layers.{idx}.{kind}.{state}")
            if tensor is not None:
                layer.lazy_initialization(**{kind: tensor, "state_idx": state})
                getattr(layer, kind)[state].copy_(tensor)
        layer.has_previous_state[state] = has_previous
