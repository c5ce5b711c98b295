"""`generate()` prefills a padded batch without its padding.

Why: the prompt's rows are padded to the longest one before they reach the model, which computes embeddings, norms and
MLPs of the padding too. A PagedCache knows each row's tokens, so the model can be called with these alone, as one row;
nothing public lies between the batch and its first forward.
"""

import transformers
from packaging.version import Version
from transformers.generation.utils import GenerationMixin

from hf_paged_flash.errors import UnsupportedFeatureError
from hf_paged_flash.patches.base import Patch, cache_name


def _prefill(original, self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
    from hf_paged_flash.cache import PagedCache
    from hf_paged_flash.generation.decode_loop import prepare_model
    from hf_paged_flash.generation.packed_prefill import packed_prefill

    cache = model_kwargs.get(cache_name(model_kwargs))
    if not isinstance(cache, PagedCache):
        return original(self, input_ids, generation_config, model_kwargs, is_first_iteration)
    outputs = packed_prefill(self, input_ids, cache, generation_config, model_kwargs, is_first_iteration)
    if outputs is not None:
        return outputs
    prepare_model(self, cache)
    mask = model_kwargs.get("attention_mask")
    is_chunked = generation_config.prefill_chunk_size is not None
    if is_chunked and cache.columns and mask is not None and Version(transformers.__version__) < Version("5.24.0"):
        raise UnsupportedFeatureError(
            f"`prefill_chunk_size` can't go on from the {cache.columns} columns that the PagedCache holds: chunks of "
            "transformers before 5.24 begin at the first one. Leave it out for this turn, or install a newer version"
        )
    if is_chunked and mask is not None and not bool(mask[:, -1].all()):
        raise UnsupportedFeatureError(
            "right-padded prompts of this model can't be prefilled in chunks (`prefill_chunk_size`), a row may end in "
            'any of them: pad on the left (`tokenizer.padding_side = "left"`)'
        )
    return original(self, input_ids, generation_config, model_kwargs, is_first_iteration)


PACKED_PREFILL = Patch(
    owner=lambda: GenerationMixin,
    name="_prefill",
    parameters=("self", "input_ids", "generation_config", "model_kwargs", "is_first_iteration"),
    wrapper=_prefill,
    reason="padding is not computed",
    checked=("5.17.0", "5.23.0", "5.24.0"),
)
