"""FlashAttention and PagedAttention for Hugging Face Transformers.

Importing the package registers the attention implementation "paged_flash":

    import hf_paged_flash
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="paged_flash")
    model.generate(**tokenizer(prompts, padding=True, return_tensors="pt"))
"""

from . import checkout, versions  # noqa: F401  first: the rest imports what an older transformers lacks
from .backend import Counters, configure, counters, reset_counters
from .cache import CacheMemory, PagedCache
from .errors import (
    ArgumentError,
    BackendError,
    CacheFullError,
    IncompatibleTransformersError,
    PagedFlashError,
    UnsupportedFeatureError,
)
from .generation.prefix_caching import disable_prefix_caching, enable_prefix_caching
from .ops import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, merge_states
from .registration import register, unregister

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "BackendError",
    "CacheFullError",
    "CacheMemory",
    "Counters",
    "IncompatibleTransformersError",
    "PagedCache",
    "PagedFlashError",
    "UnsupportedFeatureError",
    "configure",
    "counters",
    "disable_prefix_caching",
    "enable_prefix_caching",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "merge_states",
    "register",
    "reset_counters",
    "unregister",
]

register()
