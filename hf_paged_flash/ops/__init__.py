"""Public attention functions with flash-attn's signatures, their registration in torch, and the torch reference."""

from hf_paged_flash.ops.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from hf_paged_flash.ops.library import copy_blocks, store_kv
from hf_paged_flash.ops.merge_states import merge_states

__all__ = [
    "copy_blocks",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "merge_states",
    "store_kv",
]
