"""The layers of a model's PagedCache, and the groups of those that share block tables."""

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)

from ..errors import UnsupportedFeatureError
from .cache_memory import check_cap
from .linear_states import PagedHybridLayer
from .page_group import PageGroup
from .page_groups import PageGroups
from .page_store import PageStore
from .paged_layer import PagedLayer

# {layer type: whether its `sliding_window` bounds what a query sees}; "hybrid" layers have another state beside
_PAGED_LAYER_TYPES = {
    "full_attention": False,
    "sliding_attention": True,
    "chunked_attention": False,  # a chunk's tokens reach back as far as its first one
    "hybrid": False,
    "hybrid_sliding": True,
}


def make_layers(
    config: PreTrainedConfig,
    block_size: int,
    num_blocks: int | None,
    max_memory: int | None,
    dtype: torch.dtype | None,
) -> tuple[PageGroups, list[CacheLayerMixin]]:
    """A group for each window and one for all layers without, and every layer; arguments as in `PagedCache`.

    Raises:
        ArgumentError: `max_memory` is less than one block of the model takes.
        UnsupportedFeatureError: a layer whose state cannot be paged, or none with keys and values.
    """
    decoder = config.get_text_config(decoder=True)
    layer_types, layer_kwargs = get_layer_types_and_kwargs(decoder)
    if isinstance(layer_kwargs, dict):  # one for all layers before transformers 5.18, then one a layer
        layer_kwargs = [layer_kwargs] * len(layer_types)
    windows = [
        kwargs.get("sliding_window") if _PAGED_LAYER_TYPES.get(kind) else None
        for kind, kwargs in zip(layer_types, layer_kwargs, strict=True)
    ]
    used = [window for kind, window in zip(layer_types, windows, strict=True) if kind in _PAGED_LAYER_TYPES]
    check_cap(max_memory, decoder, len(used), block_size, dtype)
    by_window = {
        window: PageGroup(PageStore(block_size, used.count(window), num_blocks, max_memory), window)
        for window in dict.fromkeys(used)
    }
    groups = PageGroups(list(by_window.values()), max_memory)
    layers: list[CacheLayerMixin] = []
    for idx, (kind, kwargs) in enumerate(zip(layer_types, layer_kwargs, strict=True)):
        if kind in _PAGED_LAYER_TYPES:
            options = {"is_sliding": kind not in ("full_attention", "hybrid"), "dtype": dtype}
            if kind.startswith("hybrid"):
                options["number_of_states"] = kwargs.get("number_of_states", 1)
            layer_class = PagedHybridLayer if kind.startswith("hybrid") else PagedLayer
            layers.append(layer_class(idx, by_window[windows[idx]], groups, **options))
        elif kind == "dummy" or DYNAMIC_LAYER_TYPE_MAPPING.get(kind) is LinearAttentionLayer:
            layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs))  # a dummy reads another layer's keys
        else:
            raise UnsupportedFeatureError(
                f"layer {idx} of {type(config).__name__} is of type `{kind}`, whose state PagedCache can't page: "
                "use `past_key_values=DynamicCache(config=model.config)`, which works under paged_flash too"
            )
    if not used:
        raise UnsupportedFeatureError(
            f"no layer of {type(config).__name__} has keys and values, PagedCache has nothing to page: use "
            "`DynamicCache(config=model.config)`"
        )
    return groups, layers
