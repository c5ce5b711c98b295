"""PagedCache: the cache that transformers' models and `generate()` work with."""

import copy
import operator
from collections.abc import Hashable, Sequence
from os import PathLike

import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from ..errors import ArgumentError, PagedFlashError
from . import saved_cache
from .cache_memory import CacheMemory, bytes_of, memory_of
from .linear_states import check_crop_states, crop_states, reset_states, select_states
from .model_layers import make_layers
from .page_group import PageGroup
from .page_groups import PageGroups
from .paged_layer import PagedLayer
from .prefixes import Prefixes
from .prompt_row import PromptRow

BLOCK_SIZES = (16, 32, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class PagedCache(Cache):
    """A cache whose keys and values lie in blocks found through a block table (PagedAttention, Kwon et al. 2023).

    Only real tokens are stored, padding never; a row wastes at most the rest of its last block. Blocks are taken when
    tokens arrive and freed by `crop()` for later ones; `reset()` and dropping the cache give the memory back. Rows
    that share a past (beams, repeated rows) share its blocks until one of them writes, and so do caches: `fork()`,
    which `copy.copy` and `copy.deepcopy` are too. Layers with a sliding window have blocks of their own, and give back
    those that it has left behind.

    On CUDA the pools grow and shrink in place, by pages of 2 MiB a layer, and many free blocks at their end go back to
    the device at once. Elsewhere, in layers too narrow for pages and under the smallest caps, growth copies what is
    stored and takes a fortieth more than it needs. Pages are not in torch's allocator: `memory()` and
    `torch.cuda.mem_get_info` count them, `torch.cuda.memory_allocated` does not.

    Args:
        config: the model's configuration; a composite model's text decoder is found in it.
        block_size: tokens a block: 16, 32, 64, 128 or 256.
        num_blocks: cap in blocks, for each group of layers; None for no cap.
        max_memory: cap on the K/V memory taken from the device, in bytes, or as "4GiB"; None for no cap.
        dtype: dtype to store in; None for that of what the model computes first, until `reset()`.
        prefix_caching: keep full blocks after their rows have gone, so that each `generate()` call computes of its
            prompts only what no earlier one has. A call begins new rows: pass whole prompts. Kept blocks give way to
            rows that need them, the least recently used first. They take what the cap allows or, without a cap, an
            eighth of the device's memory; bytes, or "4GiB", for a bound of their own.

    Raises:
        ArgumentError: `block_size`, `num_blocks`, `max_memory`, `dtype` or `prefix_caching` is none of these, or
            `max_memory` is less than one block of the model takes.
        UnsupportedFeatureError: the model has layers whose state cannot be paged, or none with keys and values; or,
            with `prefix_caching`, layers that do not keep all keys, or keys that depend on what comes later.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        block_size: int = 16,
        *,
        num_blocks: int | None = None,
        max_memory: int | str | None = None,
        dtype: torch.dtype | None = None,
        prefix_caching: bool | int | str | None = False,
    ) -> None:
        if not isinstance(config, PreTrainedConfig):
            raise ArgumentError(
                f"`config` must be a model's configuration (model.config), got {type(config).__name__}"
            )
        if type(block_size) is not int or block_size not in BLOCK_SIZES:
            raise ArgumentError(f"`block_size` must be one of {BLOCK_SIZES}, got {block_size!r}")
        if num_blocks is not None and (type(num_blocks) is not int or num_blocks < 1):
            raise ArgumentError(f"`num_blocks` must be an integer from 1, or None for no cap, got {num_blocks!r}")
        if dtype is not None and dtype not in DTYPES:
            raise ArgumentError(f"`dtype` must be one of {DTYPES}, or None for the model's, got {dtype!r}")
        max_memory = bytes_of(max_memory, "max_memory", "None for no cap")
        kept_memory = None if type(prefix_caching) is bool else prefix_caching
        kept_memory = bytes_of(kept_memory, "prefix_caching", "True or False")
        self.groups, layers = make_layers(config, block_size, num_blocks, max_memory, dtype)
        self.config, self.dtype = config, dtype
        self.prefixes: Prefixes | None = None
        # the rows that a `generate()` call has begun, and their root in the index of prefixes
        self.prompts: tuple[Hashable, list[PromptRow]] | None = None
        super().__init__(layers=layers)
        if prefix_caching not in (False, None):
            self.prefixes = Prefixes(self.groups, config)
            self.group.store.keep_prefixes(kept_memory)

    @property
    def group(self) -> PageGroup:
        """The first of `groups`, for models whose layers are all alike."""
        return self.groups[0]

    @property
    def columns(self) -> int:
        """Columns stored, padding included, as transformers counts."""
        return self.groups.columns

    @property
    def batch_size(self) -> int:
        """Rows, -1 while nothing is stored."""
        return self.groups.batch if self.columns else -1

    @property
    def is_capped(self) -> bool:
        """Whether it may refuse tokens that the device has room for."""
        return self.groups.max_memory is not None or any(group.pools.num_blocks is not None for group in self.groups)

    def memory(self) -> CacheMemory:
        """What is reserved, stored and wasted now. Forks share what they report. Waits for the device."""
        return memory_of(self.groups, self.prefixes)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As in `Cache`, which every forward asks before its first layer, and some layers ask again.

        Raises:
            PagedFlashError: layers with another state than keys have taken in a forward that was refused later on.
        """
        if self.groups.states_ahead:
            if self.groups.columns > 0:
                raise PagedFlashError(
                    "layers with linear attention or a convolution have taken in tokens of a forward that the cache "
                    "refused: empty it with `reset()` and begin with the whole prompt"
                )
            reset_states(self.layers)
        self.groups.states_ahead = False
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        is_under_way = isinstance(layer, PagedLayer) and layer.is_under_way(query_length)
        self.groups.states_changed &= is_under_way or any(group.is_announced for group in self.groups)
        return super().get_mask_sizes(query_length, layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """As in `Cache`: where the queries of a forward begin, which a mask function is told."""
        layer = self.layers[layer_idx]
        return layer.columns if isinstance(layer, PagedLayer) else super().get_query_offset(layer_idx)

    def update_conv_state(self, *args, **kwargs) -> torch.Tensor:
        self.groups.states_changed = True
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args, **kwargs) -> torch.Tensor:
        self.groups.states_changed = True
        return super().update_recurrent_state(*args, **kwargs)

    @property
    def is_linear(self) -> list[bool]:
        """Which layers have no keys and values but another state."""
        paged = [isinstance(layer, PagedLayer) for layer in self.layers]
        return [linear and not has_keys for linear, has_keys in zip(super().is_linear, paged, strict=True)]

    def reset(self) -> None:
        """Forgets every token, those kept for later prompts too; the cap stays.

        The memory is given back as soon as no fork holds a token either.
        """
        self.groups.clear()
        super().reset()
        reset_states(self.layers)

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the last columns and gives their blocks back.

        What sliding windows and convolutions have left behind can't come back: call `activate_past_recording()` before
        the forwards that a crop may take back, as `generate()` does for assisted decoding. Such a cache gives it back
        with each `crop`, of 0 columns too.

        Args:
            tokens_to_remove: 0 or negative: minus the number of columns to drop, as transformers passes it. Positive:
                the number of columns to keep, transformers' convention before 5.18.

        Raises:
            ArgumentError: no integer, more columns than there are, or further back than layers with a sliding window
                have kept.
            UnsupportedFeatureError: a recurrent state, or a convolution that has kept no past.
            The cache is then as it was.
        """
        columns, tokens_to_remove = self.columns, _integer("tokens_to_remove", tokens_to_remove)
        keep = tokens_to_remove if tokens_to_remove > 0 else columns + tokens_to_remove
        if keep < 0:
            raise ArgumentError(f"`tokens_to_remove` is {tokens_to_remove}, the cache holds {columns} columns")
        if keep < columns:
            check_crop_states(self.layers)
            self.groups.truncate(keep)
        crop_states(self.layers, columns - min(keep, columns))
        self.groups.give_back()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes what row `beam_idx[i]` was; tables move, K/V stays. Nothing while nothing is stored.

        Raises:
            ArgumentError: a row that is not there, or none.
        """
        if self.columns:
            self._select(self._some_rows("beam_idx", beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times; the copies share the row's blocks.

        Raises:
            ArgumentError: `repeats` is no integer from 1 on.
        """
        if _integer("repeats", repeats) < 1:
            raise ArgumentError(f"`repeats` must be at least 1, got {repeats}")
        self._select(np.repeat(np.arange(self.groups.batch), repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps rows `indices`, long or bool; the others' blocks are given back. Nothing while nothing is stored.

        Raises:
            ArgumentError: a row that is not there, or none: `release` drops all.
        """
        if self.columns:
            self._select(self._some_rows("indices", indices))

    def release(self, rows: int | Sequence[int] | torch.Tensor) -> None:
        """Drops `rows`; their blocks are free, unless others share them. The rows left move up.

        Args:
            rows: one index, several, or bool (batch,).

        Raises:
            ArgumentError: a row that is not there.
        """
        kept = np.setdiff1d(np.arange(self.groups.batch), self._rows(rows))
        if len(kept):
            self._select(kept)
            return
        self.groups.truncate(0)
        reset_states(self.layers)

    def fork(self, rows: int | Sequence[int] | torch.Tensor | None = None) -> "PagedCache":
        """A new cache that begins with what `rows` hold, and shares their blocks until one of the two writes.

        Both, and their forks, live in one pool: it grows for all, the cap counts all of it, and `memory()` is of the
        pool. Dropping a cache frees the blocks that no other one uses. Forks belong to one thread at a time.

        Args:
            rows: one index, several (a row may come twice, in any order), or bool (batch,); None for all.

        Raises:
            ArgumentError: a row that is not there, or none.
        """
        chosen = np.arange(self.groups.batch) if rows is None else self._rows(rows)
        if rows is not None and not len(chosen):
            raise ArgumentError("`rows` must name a row at least: `PagedCache(config)` makes a cache without any")
        fork = self._over(self.groups.fork(chosen))
        if rows is not None:
            select_states(fork.layers, chosen)
        return fork

    def _over(self, groups: PageGroups) -> "PagedCache":
        """This cache with `groups`, a fork of its own, in their place."""
        fork = type(self).__new__(type(self))
        fork.__dict__.update(self.__dict__)
        fork.groups = groups
        forks = {id(group): fork_of for group, fork_of in zip(self.groups, fork.groups, strict=True)}
        fork.layers = []
        for layer in self.layers:
            if isinstance(layer, PagedLayer):
                fork.layers.append(layer.fork(forks[id(layer.group)], fork.groups))
            else:
                fork.layers.append(copy.deepcopy(layer))
        return fork

    def save(self, path: str | PathLike) -> None:
        """Writes the cache to a safetensors file: its rows' blocks, shared ones once; tables and lengths; no code.

        What `prefix_caching` keeps is not among them, and the cache that is loaded is without it.

        Raises:
            PagedFlashError: a forward stopped half way.
            UnsupportedFeatureError: some of the state lies in the model (RecurrentGemma), or is of another kind.
            FileNotFoundError: the folder of `path` is not there.
        """
        saved_cache.save(self, path)

    @classmethod
    def load(cls, path: str | PathLike, config: PreTrainedConfig, device: torch.device | str = "cpu") -> "PagedCache":
        """A cache that goes on where the one that was saved stood, with its caps.

        Args:
            path: what `save` wrote.
            config: of the model that filled the cache.
            device: where its tensors are put. K/V move to their layer's device in the first forward, states of linear
                attention stay.

        Raises:
            ArgumentError: another model's cache, or no file of `save`.
        """
        return saved_cache.load(cls, path, config, device)

    def __copy__(self) -> "PagedCache":
        return self.fork()  # a shallow copy would write into the same blocks

    def __deepcopy__(self, memo: dict) -> "PagedCache":
        return self._over(copy.deepcopy(self.groups, memo))

    def _select(self, rows: np.ndarray) -> None:
        self.groups.select(rows)
        select_states(self.layers, rows)

    def _some_rows(self, name: str, rows: torch.Tensor) -> np.ndarray:
        indices = self._rows(rows)
        if not len(indices):
            raise ArgumentError(f"`{name}` must name a row at least: `release` drops rows, `reset()` all of them")
        return indices

    def _rows(self, rows: int | Sequence[int] | torch.Tensor) -> np.ndarray:
        """`rows` as int64 indices. Waits for the device if they lie there."""
        batch = self.groups.batch
        indices = rows.cpu().numpy() if isinstance(rows, torch.Tensor) else np.asarray(rows)
        if indices.dtype == bool and indices.shape == (batch,):
            return np.flatnonzero(indices)
        indices = np.atleast_1d(indices)
        is_whole = indices.ndim == 1 and (np.issubdtype(indices.dtype, np.integer) or not indices.size)
        if not is_whole or ((indices < -batch) | (indices >= batch)).any():
            raise ArgumentError(f"rows must be indices of the cache's {batch} rows, or bool ({batch},), got {rows}")
        return indices.astype(np.int64) % max(batch, 1)


def _integer(name: str, value: object) -> int:
    """`value` as an int, tensors of one integer too; neither a bool nor what would have to be rounded."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ArgumentError(f"`{name}` must be an integer, got {value!r}") from None
