"""The paged key/value cache: `PagedCache` and what it is made of."""

from .cache_memory import CacheMemory
from .encoder_decoder import paged_encoder_decoder_cache
from .forward_step import ForwardStep
from .paged_cache import PagedCache
from .paged_layer import PagedLayer
from .paged_tensor import PagedTensor

__all__ = ["CacheMemory", "ForwardStep", "PagedCache", "PagedLayer", "PagedTensor", "paged_encoder_decoder_cache"]
