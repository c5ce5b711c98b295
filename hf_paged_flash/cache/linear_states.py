"""Layers whose state is not keys and values: linear attention, Mamba and short convolutions.

They keep transformers' own classes, beside the paged layers or, where a layer has both kinds of state, in one of them.
"""

import copy

import numpy as np
import torch
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

from ..errors import UnsupportedFeatureError
from .page_group import PageGroup
from .page_groups import PageGroups
from .paged_layer import PagedLayer


class PagedHybridLayer(LinearAttentionLayer, PagedLayer):
    """A layer with a linear-attention state and paged keys and values (Falcon-H1, Zamba2)."""

    _layer_type = None
    is_compileable = False

    def __init__(
        self,
        layer_idx: int,
        group: PageGroup,
        groups: PageGroups,
        *,
        is_sliding: bool,
        dtype: torch.dtype | None,
        number_of_states: int,
    ) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        PagedLayer.__init__(self, layer_idx, group, groups, is_sliding=is_sliding, dtype=dtype)

    def lazy_initialization(self, *args, **kwargs) -> None:
        # keys and values come as positional arguments, states by name, as in transformers' hybrid layers
        (PagedLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    @property
    def record_past(self) -> bool:
        """Whether nothing is left behind before the next `crop`: neither by a window nor by a convolution."""
        return self._records_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self._records_past = value
        if hasattr(self, "group"):  # not while the state's own class is made
            self.group.record_past = value

    def activate_past_recording(self) -> None:
        self.record_past = True

    def reset(self) -> None:
        PagedLayer.reset(self)

    def fork(self, group: PageGroup, groups: PageGroups) -> "PagedHybridLayer":
        """This layer over the rows of `group`, with states of its own."""
        fork = PagedLayer.fork(self, group, groups)
        for name in ("conv_states", "recurrent_states"):
            states = getattr(self, name)
            setattr(fork, name, {index: None if x is None else x.clone() for index, x in states.items()})
        for name in ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state"):
            setattr(fork, name, copy.copy(getattr(self, name)))
        return fork

    # of both states at once, as `PagedCache` does it
    get_max_length, offload, prefetch, crop = (
        PagedLayer.get_max_length, PagedLayer.offload, PagedLayer.prefetch, PagedLayer.crop,
    )  # fmt: skip


def states_of(layers: list) -> list[LinearAttentionCacheLayerMixin]:
    """The layers that have such a state."""
    return [layer for layer in layers if isinstance(layer, LinearAttentionCacheLayerMixin)]


def select_states(layers: list, rows: np.ndarray) -> None:
    """Row i becomes what row `rows[i]` was."""
    rows = torch.from_numpy(rows)
    for layer in states_of(layers):
        for states in (layer.conv_states, layer.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = state.index_select(0, rows.to(state.device))


def reset_states(layers: list) -> None:
    """Forgets every state; another batch size may follow."""
    for layer in states_of(layers):
        count = layer.number_of_states
        layer.conv_states, layer.recurrent_states = dict.fromkeys(range(count)), dict.fromkeys(range(count))
        layer.is_conv_states_initialized = dict.fromkeys(range(count), False)
        layer.is_recurrent_states_initialized = dict.fromkeys(range(count), False)
        layer.has_previous_state = dict.fromkeys(range(count), False)


def check_crop_states(layers: list) -> None:
    """Raises UnsupportedFeatureError where a state can't go back to what it was some tokens before."""
    for index, layer in enumerate(layers):
        if not isinstance(layer, LinearAttentionCacheLayerMixin):
            continue
        if any(layer.is_recurrent_states_initialized.values()):
            raise UnsupportedFeatureError(
                f"layer {index} has a recurrent state, which can't be taken back: the cache can't be cropped. Start a "
                "new one (`reset()` empties this one)"
            )
        if any(layer.is_conv_states_initialized.values()) and not layer.record_past:
            raise UnsupportedFeatureError(
                f"layer {index} is a convolution and has kept what its kernel needs alone: call "
                "`activate_past_recording()` on the cache before the forwards that a crop may take back"
            )


def crop_states(layers: list, columns: int) -> None:
    """Drops the last `columns` columns' share of each state; 0: what was kept for a crop alone.

    Only after `check_crop_states`, for `columns` above 0.
    """
    for layer in states_of(layers):
        if layer.record_past and any(layer.is_conv_states_initialized.values()):
            LinearAttentionCacheLayerMixin.crop(layer, -columns)
