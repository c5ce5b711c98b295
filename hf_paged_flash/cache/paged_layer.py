"""One layer of a PagedCache, as transformers sees it."""

from copy import copy
from operator import attrgetter

import torch
from transformers.cache_utils import CacheLayerMixin

from ..errors import ArgumentError, PagedFlashError, UnsupportedFeatureError
from .block_pool import BlockPool
from .forward_step import ForwardStep
from .layer_pools import growth_error
from .mask_handoff import expect_cross_mask
from .page_group import PageGroup
from .page_groups import PageGroups
from .paged_tensor import PagedTensor


class PagedLayer(CacheLayerMixin):
    """Keys and values of one attention layer in the blocks of its `PageGroup`.

    A sliding-window layer keeps what its window can reach, see `PageGroup`; attention reads only that.
    """

    _layer_type = None  # must not register itself as transformers' class for a layer type
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        layer_idx: int,
        group: PageGroup,
        groups: PageGroups,
        *,
        is_sliding: bool,
        dtype: torch.dtype | None,
    ) -> None:
        # CacheLayerMixin.__init__ assigns `keys` and `values`, which are properties here
        self.layer_idx = layer_idx
        self.group = group
        self.groups = groups  # the cache's, `group` among them
        self.is_sliding = is_sliding
        self._dtype = dtype
        self.reset()

    def reset(self) -> None:
        self.pool: BlockPool | None = None
        self._step: ForwardStep | None = None
        self.is_initialized = False
        self.had_grad = False  # something was stored whose gradient was asked for

    def __deepcopy__(self, memo: dict) -> "PagedLayer":
        """One more layer of the group, empty: models that run layers in loops (Dory) make theirs so."""
        if self.is_initialized:
            raise UnsupportedFeatureError("one layer can't be copied, its blocks are shared: work on the PagedCache")
        layer = copy(self)
        layer.layer_idx = 1000 + self.group.pools.num_layers  # beyond those of the model's own layers
        self.group.pools.num_layers += 1
        return layer

    @property
    def columns(self) -> int:
        """Columns stored by this layer: fewer than the group's where a forward has not come so far."""
        return self.group.layer_columns.get(self.layer_idx, 0)

    @property
    def keys(self) -> torch.Tensor | None:
        return self._reread("key")

    @property
    def values(self) -> torch.Tensor | None:
        return self._reread("value")

    def _reread(self, kind: str) -> torch.Tensor | None:
        # cross-attention reads its keys here after the first step, in whatever order the rows are by now
        if self.is_initialized and self.columns == self.group.columns > 0:
            self._step = self.group.current_step(self.device)
        return self._handle(kind, None) if self._step is not None else None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._check(key_states, value_states)
        self.pool = self._pool_for(key_states, value_states)
        self.device = key_states.device
        self._follow_dtype(key_states, value_states)
        self.is_initialized = True

    def _follow_dtype(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes over the dtype that attention and the model see: the pool may store in another one.

        It is each forward's own, autocast may be on in some.
        """
        self.dtype = min(key_states.dtype, value_states.dtype, key=attrgetter("itemsize"))
        self._nan = self.group.pools.nan(self.dtype, self.device)

    def _pool_for(self, key: torch.Tensor, value: torch.Tensor) -> BlockPool:
        """This layer's pool: the one that forks share, one that was loaded, or else a new one."""
        group, pool = self.group, self.group.pools.get(self.layer_idx)
        if pool is not None and self.layer_idx not in group.store.loaded:
            return pool
        if pool is None or pool.key.device != key.device:
            pool = self._new_pool(pool, key, value)
        group.store.loaded.discard(self.layer_idx)
        return pool

    def _new_pool(self, old: BlockPool | None, key: torch.Tensor, value: torch.Tensor) -> BlockPool:
        """A pool on the device of `key`, with the blocks of `old`."""
        pools = self.group.pools
        pool = BlockPool(self.group.block_size, key, value, self._dtype if old is None else old.key.dtype)
        pools.add(self.layer_idx, pool)
        if old is None:
            return pool
        try:
            pool.grow(old.num_blocks)
        except BaseException as error:
            pools.add(self.layer_idx, old)
            raise growth_error(error, old.num_blocks, 0) from error
        pool.key[: old.num_blocks].copy_(old.key)
        pool.value[: old.num_blocks].copy_(old.value)
        return pool

    def restore(self, pool: BlockPool) -> None:
        """Takes over a pool that was saved; it goes to the model's device in the first forward."""
        self.pool = pool
        self.group.pools.add(self.layer_idx, pool)
        self.group.store.loaded.add(self.layer_idx)
        self.group.layer_columns[self.layer_idx] = self.group.columns

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new keys and values (B, Hkv, S, D | Dv) and returns handles on all of them, see `PagedTensor`.

        Raises:
            ArgumentError: keys or values of another shape than those that are stored, or that don't belong together.
            CacheFullError: no room. Whatever is raised, what was stored before this forward is intact in every layer.
            UnsupportedFeatureError: the call is traced as one graph (`torch.compile(fullgraph=True)`, `torch.export`).
        """
        if torch.compiler.is_compiling():
            raise UnsupportedFeatureError(
                "PagedCache can't be traced by torch.compile or torch.export yet: call the model as it is, or pass "
                "`past_key_values=DynamicCache(config=model.config)` to the compiled one"
            )
        step = self.group.step if self.columns < self.group.columns else None  # under way in other layers
        try:
            # before the step: a cap in bytes needs to know a block's
            if not self.is_initialized or self.group.pools.get(self.layer_idx) is not self.pool:
                self.lazy_initialization(key_states, value_states)
            else:
                self._check(key_states, value_states)
                self._follow_dtype(key_states, value_states)
        except BaseException:
            if step is not None:
                self.groups.take_back(step)
            raise
        step = self._join_step(key_states)
        try:
            self._store(key_states, value_states, step)
            self.group.layer_columns[self.layer_idx] = step.end
            self._step = step
            fresh = (None, None) if step.has_past else (key_states, value_states)
            handles = self._handle("key", fresh[0]), self._handle("value", fresh[1])
        except BaseException:
            self.groups.take_back(step)  # does nothing where the group itself has done so
            raise
        self.had_grad |= torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        return handles

    def own_tensors(self) -> None:
        """Leaves the tensors of a static step to the next one; see `PageGroup.own_tensors`."""
        self._step = None

    def _check(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Kernels take for granted what is checked here."""
        if key.dim() != 4 or not key.is_floating_point():
            raise ArgumentError(
                f"`key_states` must be (batch, heads, tokens, head_dim) in a floating dtype, got {_said(key)}"
            )
        if value.shape[:-1] != key.shape[:-1] or not value.is_floating_point() or value.device != key.device:
            raise ArgumentError(
                f"`value_states` must be as `key_states` but for the head_dim, {_said(key)}, got {_said(value)}"
            )
        pool = self.group.pools.get(self.layer_idx)
        if pool is None:
            return
        for kind, new, stored in (("keys", key, pool.key), ("values", value, pool.value)):
            sizes, expected = (new.shape[1], new.shape[3]), stored.shape[2:]
            if sizes != expected:
                raise ArgumentError(
                    f"layer {self.layer_idx} of the cache holds {kind} of (heads, head_dim) {tuple(expected)}, the "
                    f"model makes {sizes}: only the model that filled a cache can go on with it"
                )

    @torch.no_grad()
    def _store(self, key_states: torch.Tensor, value_states: torch.Tensor, step: ForwardStep) -> None:
        if self.pool.num_blocks < step.num_blocks:
            self.groups.join_pool(self.group, self.pool, step)
        self.pool.store(key_states.transpose(1, 2), value_states.transpose(1, 2), step.to(self.device).slot_mapping)

    def _join_step(self, key_states: torch.Tensor) -> ForwardStep:
        group = self.group
        batch, _, q_length, _ = key_states.shape
        if self.groups.prepared is not None:
            return self.groups.prepared.join(group, self.columns, (batch, q_length), key_states.device)
        if self.columns == group.columns:
            self.groups.begin(batch, q_length, key_states.device)
            return group.step
        if self.is_under_way(q_length) and group.step.batch == batch:
            return group.step
        raise PagedFlashError(
            f"layer {self.layer_idx} holds {self.columns} columns of the paged cache and gets {q_length} more, others "
            f"hold {group.columns}: an earlier forward stopped half way. Take it back with "
            f"`crop({self.columns - group.columns})`, or empty the cache with `reset()`"
        )

    def is_under_way(self, q_length: int) -> bool:
        """Whether other layers of the group have begun a step of `q_length` columns that this one has yet to store."""
        step, columns = self.group.step, (self.columns, self.columns + q_length)
        return step is not None and self.columns < self.group.columns and (step.start, step.end) == columns

    def _handle(self, kind: str, fresh: torch.Tensor | None) -> PagedTensor:
        pool = self.pool.key if kind == "key" else self.pool.value
        size = (self.group.batch, pool.shape[2], self.columns, pool.shape[3])
        if self._step.is_packed:  # a row's tokens after another's
            size = (1, pool.shape[2], int(self.group.manager.lengths.sum()), pool.shape[3])
        return PagedTensor.wrap(self, kind, self._step, self._nan, size, fresh)

    def gather(self, kind: str, step: ForwardStep, fresh: torch.Tensor | None = None) -> torch.Tensor:
        """Dense keys or values (B, Hkv, columns, D | Dv) up to the end of `step`.

        Zeros in padded columns, and in those that the group has given back. `fresh`: as in `PagedTensor`.
        """
        columns = min(step.end, self.columns)
        if fresh is not None and self.group.has_given_back and step is self.group.step:
            # what no later forward can reach was never stored, but this one's own code may look at it
            real = self.group.real_columns()
            stored = fresh.detach().to(self.pool.key.dtype).to(self.dtype)
            if real is None:
                return stored.clone()
            padding = torch.from_numpy(~real[:, :columns]).to(fresh.device)
            return stored.masked_fill(padding[:, None, :, None], 0)
        slots = self.group.column_slots(columns, self.device)
        return self.pool.gather(slots, kind).to(self.dtype)

    def fork(self, group: PageGroup, groups: PageGroups) -> "PagedLayer":
        """This layer over the rows of `group`, one of `groups`: a fork of its own."""
        fork = copy(self)
        fork.group, fork.groups = group, groups
        return fork

    def get_seq_length(self) -> int:
        """Columns stored.

        Raises:
            UnsupportedFeatureError: within a forward that is to be replayed, which would go on with this number.
        """
        if self.groups.prepared is not None and self.groups.prepared.is_static:
            raise UnsupportedFeatureError("the model's forward asks how long its cache is: a replay can't ask")
        return self.columns

    def get_max_length(self) -> int:
        return -1

    @property
    def record_past(self) -> bool:
        """Whether a sliding window leaves nothing behind before the next `crop`."""
        return self.group.record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.group.record_past = value

    def activate_past_recording(self) -> None:
        """Keeps every token from here to the next `crop`, which may then go back to any of them."""
        self.group.record_past = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.groups.prepared is not None:
            return self.groups.prepared.mask_sizes(self.group, query_length)
        if self.is_under_way(query_length):  # the layer itself asks, for a bias of its own (Inkling)
            return self.group.step.end, 0
        sizes = self.group.mask_sizes(query_length)
        if self.groups.cross is not None:
            expect_cross_mask(self.groups.cross)
        return sizes

    def crop(self, tokens_to_remove: int) -> None:
        raise UnsupportedFeatureError("one layer can't be cropped, its blocks are shared: call `PagedCache.crop`")

    def offload(self) -> None:
        raise UnsupportedFeatureError(
            'PagedCache does not offload K/V to the CPU: pass `cache_implementation="offloaded"` for a cache that does'
        )

    prefetch = offload


def _said(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
