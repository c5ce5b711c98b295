"""Every change that hf_paged_flash makes to transformers at run time, one file each.

A patch replaces one function, says why no public interface serves, compares the function's parameters with those it
was written for before it touches anything, and puts the original back on `undo()`.
"""

from hf_paged_flash.patches.base import Patch
from hf_paged_flash.patches.decode_loops import COMPILE_CRITERIA, DECODE_LOOPS
from hf_paged_flash.patches.default_cache import DEFAULT_CACHE
from hf_paged_flash.patches.deferred_stops import DEFERRED_STOPS
from hf_paged_flash.patches.encoder_decoder_cache import ENCODER_DECODER_CACHE
from hf_paged_flash.patches.flash_functions import FLASH_FUNCTIONS
from hf_paged_flash.patches.flash_implementations import FLASH_IMPLEMENTATIONS
from hf_paged_flash.patches.flash_masks import FLASH_MASKS
from hf_paged_flash.patches.generate_batch import GENERATE_BATCH
from hf_paged_flash.patches.generation_parameters import GENERATION_PARAMETERS, IS_NEEDED
from hf_paged_flash.patches.mask_functions import MASK_FUNCTIONS
from hf_paged_flash.patches.mask_readers import MASK_READERS
from hf_paged_flash.patches.packed_prefill import PACKED_PREFILL
from hf_paged_flash.patches.prefill_logits import PREFILL_LOGITS
from hf_paged_flash.patches.prefix_caching import PREFIX_CACHING
from hf_paged_flash.patches.shared_prompt import SHARED_PROMPT
from hf_paged_flash.patches.unreached_models import UNREACHED_MODELS

ALL_PATCHES: tuple[Patch, ...] = (
    FLASH_FUNCTIONS,
    FLASH_IMPLEMENTATIONS,
    UNREACHED_MODELS,
    MASK_READERS,
    DEFAULT_CACHE,
    ENCODER_DECODER_CACHE,
    PACKED_PREFILL,  # before the next, so that it gets each prompt once
    *PREFIX_CACHING,  # so does this, whose rows the one before goes on from
    *SHARED_PROMPT,  # before the next, which then sees the rows that are decoded
    PREFILL_LOGITS,
    *DECODE_LOOPS,
    COMPILE_CRITERIA,
    DEFERRED_STOPS,
    GENERATE_BATCH,
    *((GENERATION_PARAMETERS,) if IS_NEEDED else ()),
    *MASK_FUNCTIONS,
    *FLASH_MASKS,
)

__all__ = ["ALL_PATCHES", "Patch"]
