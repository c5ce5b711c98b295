"""Models that work on their mask themselves are given it as a matrix of queries by keys, as under eager.

Why: our mask function answers with the padding alone, but some attention layers read more from their mask than they
pass on: which keys an indexer may select (DeepSeek-V3.2 and its kin), what a dynamic mask may keep (Doge), where
compressed keys begin. Others (BigBird-Pegasus, DeepSeek-V4) were written for eager alone, whose masks are added to the
scores and say what is causal. No flag tells the former, so their source is asked; the latter declare neither flash nor
sdpa. Eager's matrix serves both, and gives padded rows what eager gives them, which an indexer may look at.
"""

import functools
import re

from transformers import PreTrainedModel

from hf_paged_flash.masks import MATRIX_CONFIGS
from hf_paged_flash.model_source import parts
from hf_paged_flash.patches.base import Patch

_READS_MASK = re.compile(r"\battention_mask(\.\w|\[)")


@functools.cache
def needs_matrix(model_class: type) -> bool:
    """Whether attention layers of `model_class` read their mask, or have known none but eager's."""
    if not (model_class._supports_flash_attn or model_class._supports_sdpa):
        return True
    for name, source in parts(model_class).items():
        reaches = "Attention" in name and "ALL_ATTENTION_FUNCTIONS" in source
        if (reaches or "Indexer" in name) and _READS_MASK.search(source):
            return True
    return False


def _check_and_adjust(original, self, attn_implementation, *args, **kwargs):
    if attn_implementation == "paged_flash" and needs_matrix(type(self)):
        MATRIX_CONFIGS.add(type(self.config))
    return original(self, attn_implementation, *args, **kwargs)


MASK_READERS = Patch(
    owner=lambda: PreTrainedModel,
    name="_check_and_adjust_attn_implementation",
    parameters=("self", "attn_implementation", "is_init_check", "allow_all_kernels"),
    wrapper=_check_and_adjust,
    reason="models that work on their mask are given a matrix",
    checked=("5.17.0", "5.23.0", "5.24.0"),
)
