"""Prefills of padded prompts run packed, `[1, tokens]`, and give what eager gives; what can't be keeps its rows."""

import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from transformers.generation.utils import GenerationMixin

from hf_paged_flash import CacheFullError, PagedCache, UnsupportedFeatureError, backend
from hf_paged_flash.generation import packed_prefill
from tests.generation.runs import LENGTHS, TOKENS, batch, generate, models, shapes_of, unpadded
from tests.integration.models import attentive_config
from tests.tiny_models import ragged_batch, tiny_config, tiny_model

MODEL_TYPES = ("llama", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_oss", "gpt2", "mixtral")
pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.fixture(params=MODEL_TYPES)
def pair(request):
    return models(request.param)


class TestEqualsEager:
    @pytest.mark.parametrize("side", ["left", "right", "holes"])
    def test_one_call_with_real_tokens_alone(self, pair, side):
        paged, eager = pair
        input_ids, mask = batch(side)
        with shapes_of(paged) as shapes:
            tokens = generate(paged, input_ids, mask)
        assert shapes[0] == (1, int(mask.sum())) and set(shapes[1:]) == {(4, 1)}
        assert torch.equal(tokens, unpadded(eager, input_ids, mask))

    def test_logits(self, pair):
        input_ids, mask = batch("left")
        ours, theirs = (
            model.generate(
                input_ids, attention_mask=mask, max_new_tokens=4, return_dict_in_generate=True, output_logits=True
            ).logits
            for model in pair
        )
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=5e-5)

    @pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
    @pytest.mark.parametrize(
        "options",
        [
            {"num_beams": 3},
            {"num_beams": 4, "num_return_sequences": 2},
            {"num_return_sequences": 3, "do_sample": True},
        ],
        ids=["beams", "returned-beams", "samples"],
    )
    def test_repeated_rows_are_packed_once(self, model_type, options):
        input_ids, mask = batch("left")
        tokens = []
        for model in models(model_type):
            torch.manual_seed(3)
            with shapes_of(model) as shapes:
                tokens.append(generate(model, input_ids, mask, **options))
            assert shapes[0][0] == (1 if model is models(model_type)[0] else 4 * options.get("num_beams", 3))
        assert torch.equal(*tokens)

    @pytest.mark.parametrize("side", ["left", "right", "holes"])
    @pytest.mark.parametrize("chunk", [1, 7, 16, 64])
    @pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_oss"])
    def test_chunks(self, model_type, chunk, side):
        paged, eager = models(model_type)
        input_ids, mask = batch(side)
        with shapes_of(paged) as shapes:
            tokens = generate(paged, input_ids, mask, prefill_chunk_size=chunk)
        prefill = [length for rows, length in shapes if rows == 1]
        expected = [int(part.sum()) for part in mask.split(chunk, 1)]
        assert prefill == [count for count in expected if count]
        assert max(prefill) <= chunk * len(LENGTHS)
        assert torch.equal(tokens, unpadded(eager, input_ids, mask))

    @pytest.mark.parametrize("chunk", [7, 16, 64])
    def test_chunks_of_padding_alone(self, chunk):
        paged, eager = models("llama")
        input_ids, mask = (torch.nn.functional.pad(x, (0, 20)) for x in batch("right"))
        assert torch.equal(
            generate(paged, input_ids, mask, prefill_chunk_size=chunk), unpadded(eager, input_ids, mask)
        )

    @pytest.mark.parametrize("chunk", [None, 5])
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
    def test_turns_on_one_cache(self, model_type, side, chunk):
        paged, eager = models(model_type)
        cache = PagedCache(paged.config)
        input_ids, mask = batch(side)
        for turn in range(3):
            with shapes_of(paged) as shapes:
                tokens = generate(paged, input_ids, mask, past_key_values=cache, prefill_chunk_size=chunk)
            assert torch.equal(tokens, unpadded(eager, input_ids, mask))
            assert shapes[0][0] == 1
            stored = cache.groups[0].manager.lengths
            assert stored.tolist() == (mask.sum(1) + tokens.shape[1] - 1).tolist()
            said, said_mask = ragged_batch((4, 9, 1, 6), side, seed=turn + 1)
            input_ids = torch.cat([input_ids, tokens, said], 1)
            mask = torch.cat([mask, torch.ones_like(tokens), said_mask], 1)

    @pytest.mark.parametrize("rows", [1, 2])
    @pytest.mark.parametrize("given", ["all", "new"])
    def test_turns_in_chunks_without_padding(self, rows, given):
        paged, eager = models("llama")
        cache = PagedCache(paged.config)
        input_ids, mask = ragged_batch((20,) * rows)
        for turn in range(3):
            start = cache.get_seq_length() if given == "new" else 0
            tokens = generate(paged, input_ids[:, start:], mask, past_key_values=cache, prefill_chunk_size=8)
            assert torch.equal(tokens, unpadded(eager, input_ids, mask))
            said, said_mask = ragged_batch((9,) * rows, seed=turn + 1)
            input_ids = torch.cat([input_ids, tokens, said], 1)
            mask = torch.cat([mask, torch.ones_like(tokens), said_mask], 1)

    def test_turns_in_chunks_of_a_model_that_is_not_packed(self):
        """transformers goes on from them since 5.24; before, it would begin anew."""
        paged, eager = models("llama")
        hook = paged.model.layers[0].register_forward_hook(lambda *args: None)
        cache = PagedCache(paged.config)
        input_ids, mask = ragged_batch((20,))
        try:
            tokens = generate(paged, input_ids, mask, past_key_values=cache, prefill_chunk_size=8)
            input_ids, mask = torch.cat([input_ids, tokens], 1), torch.cat([mask, torch.ones_like(tokens)], 1)
            chunked = {"prefill_chunk_size": 8}
            if Version(transformers.__version__) < Version("5.24.0"):
                with pytest.raises(UnsupportedFeatureError, match="can't go on from the 31 columns"):
                    generate(paged, input_ids, mask, past_key_values=cache, **chunked)
                chunked = {}
            tokens = generate(paged, input_ids, mask, past_key_values=cache, **chunked)
        finally:
            hook.remove()
        assert torch.equal(tokens, unpadded(eager, input_ids, mask))

    @pytest.mark.parametrize("how", ["assistant", "lookup"])
    def test_assisted(self, how):
        paged, eager = models("llama")
        input_ids, mask = ragged_batch((20,))
        input_ids, mask = (torch.nn.functional.pad(x, (4, 0)) for x in (input_ids, mask))
        options = {"prompt_lookup_num_tokens": 3} if how == "lookup" else {"assistant_model": paged}
        tokens = generate(paged, input_ids, mask, **options)
        assert torch.equal(tokens, generate(eager, input_ids, mask))

    def test_positions_of_the_users(self):
        paged, eager = models("gpt2")
        input_ids, mask = batch("left")
        positions = (mask.cumsum(1) - 1).clamp(min=0) + torch.tensor([[0], [5], [40], [3]])
        tokens = [generate(model, input_ids, mask, position_ids=positions) for model in (paged, eager)]
        assert torch.equal(*tokens)
        assert not torch.equal(tokens[0], generate(paged, input_ids, mask))


class TestCache:
    @pytest.mark.parametrize(("model_type", "chunk"), [("gemma3_text", None), ("llama", None), ("llama", 8)])
    def test_a_full_cache_is_as_before_and_usable(self, model_type, chunk):
        paged, eager = models(model_type)
        cache = PagedCache(paged.config, num_blocks=7)
        input_ids, mask = ragged_batch((10, 3))
        tokens = generate(paged, input_ids, mask, past_key_values=cache, max_new_tokens=2)
        said, said_mask = ragged_batch((60, 41), seed=1)
        whole = torch.cat([input_ids, tokens, said], 1)
        whole_mask = torch.cat([mask, torch.ones_like(tokens), said_mask], 1)
        with pytest.raises(CacheFullError):
            generate(paged, whole, whole_mask, past_key_values=cache, prefill_chunk_size=chunk)
        assert (cache.get_seq_length() > 11) == (chunk is not None)
        if chunk is not None:
            cache.crop(11)  # the chunks that had room go
        assert cache.groups[-1].manager.lengths.tolist() == [11, 4]
        again, again_mask = torch.cat([input_ids, tokens], 1), torch.cat([mask, torch.ones_like(tokens)], 1)
        continued = generate(paged, again, again_mask, past_key_values=cache)
        assert torch.equal(continued, generate(eager, again, again_mask))

    @pytest.mark.parametrize("chunk", [None, 12])
    @pytest.mark.parametrize("pad", [None, "left", "right"])
    def test_prefixes_that_rows_hold_are_not_computed(self, pad, chunk):
        """Blocks in the rows of a cache without columns, as a prefix index gives them."""
        paged, eager = models("llama")
        lengths = (40, 40, 40) if pad is None else (40, 20, 33)
        input_ids, mask = ragged_batch(lengths, pad)
        cache = PagedCache(paged.config)
        generate(paged, input_ids, mask, past_key_values=cache, max_new_tokens=2)
        held = torch.tensor([32, 0, 16])
        cache.group.manager.truncate(held.numpy())
        cache.group.columns, cache.group.layer_columns, cache.group._mask = 0, {}, None
        with shapes_of(paged) as shapes:
            tokens = generate(paged, input_ids, mask, past_key_values=cache, prefill_chunk_size=chunk)
        assert sum(length for rows, length in shapes if rows == 1) == sum(lengths) - 48
        assert torch.equal(tokens, unpadded(eager, input_ids, mask))
        assert cache.get_seq_length() == input_ids.shape[1] + 11
        assert cache.group.manager.lengths.tolist() == [length + 11 for length in lengths]

    def test_a_forward_that_fails_is_taken_back(self, monkeypatch):
        paged, eager = models("llama")
        cache = PagedCache(paged.config)
        input_ids, mask = batch("left")

        def fail(hidden_states):
            raise RuntimeError("half way")

        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="half way"):
            patched.setattr(paged.model.layers[1].mlp, "forward", fail)
            generate(paged, input_ids, mask, past_key_values=cache)
        assert cache.get_seq_length() == 0 and cache.memory().blocks_used == 0
        assert torch.equal(generate(paged, input_ids, mask, past_key_values=cache), generate(eager, input_ids, mask))

    def test_the_users_mask_is_not_kept(self):
        paged, eager = models("llama")
        cache = PagedCache(paged.config)
        input_ids, mask = batch("left")
        mask = mask.bool()
        tokens = generate(paged, input_ids, mask, past_key_values=cache)
        whole, whole_mask = torch.cat([input_ids, tokens], 1), torch.cat([mask, torch.ones_like(tokens).bool()], 1)
        mask.fill_(True)
        assert torch.equal(
            generate(paged, whole, whole_mask, past_key_values=cache), generate(eager, whole, whole_mask)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("side", ["left", "right"])
def test_waits_for_the_device_once(monkeypatch, side):
    """To read the mask, however many look at it."""
    backend.configure(backend="auto")
    model = tiny_model(tiny_config("llama"), "paged_flash", dtype=torch.bfloat16).cuda()
    input_ids, mask = (x.cuda() for x in batch(side))
    seen = []

    def prefill(self, *args, **kwargs):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                return original(self, *args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            seen.append([str(one.message) for one in caught if "synchroniz" in str(one.message)])

    original = GenerationMixin._prefill
    with shapes_of(model) as shapes:
        generate(model, input_ids, mask, max_new_tokens=2)  # pools and kernels are there, and the model's hook
        monkeypatch.setattr(GenerationMixin, "_prefill", prefill)
        del shapes[:]
        generate(model, input_ids, mask.clone(), max_new_tokens=2)
    assert shapes[0] == (1, TOKENS)
    assert len(seen) == 1 and len(seen[0]) == 1, seen


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_oss"])
def test_kernels_give_what_padded_rows_give(model_type, monkeypatch):
    backend.configure(backend="auto")
    model = tiny_model(attentive_config(model_type), "paged_flash", dtype=torch.bfloat16).cuda()
    input_ids, mask = (x.cuda() for x in ragged_batch((300, 70, 190, 1)))
    logits = []
    for reason in (None, "a test"):
        monkeypatch.setattr(packed_prefill, "why_padded", lambda *args, reason=reason: reason)
        out = model.generate(
            input_ids, attention_mask=mask, max_new_tokens=1, return_dict_in_generate=True, output_logits=True
        )
        logits.append(out.logits[0])
    torch.testing.assert_close(*logits, rtol=0, atol=0.02 * logits[1].abs().max().item())
