"""Whole models through the Triton kernels on CPU tensors, in Triton's interpreter."""

import os

import pytest
import torch

from hf_paged_flash import PagedCache, configure, counters
from tests.integration.models import attentive_config, load_pair, new_tokens
from tests.tiny_models import ragged_batch

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels are compiled for the GPU here"
)

WINDOW = 8
LENGTHS = (19, 3)  # past the window and into a second block; padding beyond a decode step's 16 queries


@pytest.fixture(scope="module", params=["llama", "gpt_oss"])
def pair(request, tmp_path_factory):
    changes = {"num_hidden_layers": 2}
    if request.param == "gpt_oss":
        changes |= {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
    return load_pair(attentive_config(request.param, **changes), tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(
    "pad, options",
    [("left", {}), ("right", {}), ("left", {"prefill_chunk_size": 18})],
    ids=["left padding", "right padding", "chunked prefill"],
)
def test_generate_through_the_kernels(pair, pad, options):
    expected = new_tokens(pair.eager, *ragged_batch(LENGTHS, "left"), max_new_tokens=4)
    configure(backend="triton")
    cache = PagedCache(pair.paged.config)
    input_ids, mask = ragged_batch(LENGTHS, pad)
    tokens = new_tokens(pair.paged, input_ids, mask, past_key_values=cache, max_new_tokens=4, **options)
    assert torch.equal(tokens, expected)
    ran = counters()
    layers, decode_steps = 2, 3
    prefills = 2 if options else 1  # packed, and so is the second chunk, of one column
    assert ran.kernel == {
        "store_kv": layers * (prefills + decode_steps),
        "flash_forward": layers * prefills,
        "paged_decode": layers * decode_steps,
    }
    assert ran.reference_total == ran.dense_gather_total == 0
    assert cache.memory().tokens == sum(LENGTHS) + 2 * 3


def test_every_way_to_read_keys_gives_eagers_logits(pair):
    """Dense keys, packed rows, blocks with and without padding, and a few or many new tokens over a stored past."""
    input_ids, mask = ragged_batch((40, 25), "left")
    expected = pair.eager(input_ids, attention_mask=mask).logits[mask.bool()]
    configure(backend="triton")
    with torch.no_grad():
        whole = pair.paged(input_ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(whole[mask.bool()], expected, rtol=0.0, atol=5e-5)
        alone = pair.paged(input_ids[:1], use_cache=False).logits
        torch.testing.assert_close(alone[0], expected[:40], rtol=0.0, atol=5e-5)
        cache = PagedCache(pair.paged.config)
        # row 1 begins in the second chunk; 17 columns without padding are a prefill, 3 and 1 a decode step
        ends = [10, 19, 36, 39, 40]
        chunks = [
            pair.paged(input_ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits
            for start, end in zip([0, *ends], ends, strict=False)
        ]
    torch.testing.assert_close(torch.cat(chunks, 1)[mask.bool()], expected, rtol=0.0, atol=5e-5)
    ran = counters()
    assert ran.kernel == {"flash_forward": 2 * (2 + 3), "store_kv": 2 * 5, "paged_decode": 2 * 2}
    assert ran.reference_total == ran.dense_gather_total == 0


def test_samples_share_the_prompt_through_the_kernels(pair):
    """The samples' first step copies the prompt's last block, all layers of a group in one launch."""
    input_ids, _ = ragged_batch((19,), None)
    options = {"do_sample": True, "top_k": 0, "num_return_sequences": 3, "max_new_tokens": 4}
    torch.manual_seed(0)
    expected = pair.eager.generate(input_ids, **options)
    configure(backend="triton")
    cache = PagedCache(pair.paged.config)
    torch.manual_seed(0)
    assert torch.equal(pair.paged.generate(input_ids, past_key_values=cache, **options), expected)
    groups = len(cache.groups)
    assert counters().kernel == {"store_kv": 2 * 4, "flash_forward": 2, "paged_decode": 2 * 3, "copy_blocks": groups}
    assert counters().reference_total == 0
    assert (cache.memory().blocks_used, cache.memory().tokens) == (groups * (1 + 3), 16 + 3 * 6)
