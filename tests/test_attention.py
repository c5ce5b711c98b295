"""The attention function inside models: every way that keys and masks reach it, against eager."""

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, DynamicCache, EncoderDecoderCache, StaticCache

from hf_paged_flash import (
    ArgumentError,
    PagedCache,
    UnsupportedFeatureError,
    counters,
    flash_attn_func,
    flash_attn_varlen_func,
    reset_counters,
)
from hf_paged_flash.attention import paged_flash_attention_forward
from hf_paged_flash.ops import library
from tests.integration.models import held
from tests.tiny_models import MODEL_TYPES, VOCAB_SIZE, ragged_batch, randomize, tiny_config, tiny_model

# fp32 in another order of operations
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


def pair(model_type, **changes):
    config = tiny_config(model_type, **changes)
    return tiny_model(config, "eager"), tiny_model(config, "paged_flash")


def seq2seq(model_class, config_class, **sizes):
    """The same random weights under eager and paged_flash."""
    models = []
    for name in ("eager", "paged_flash"):
        model = model_class._from_config(config_class(**sizes), attn_implementation=name)
        randomize(model)
        models.append(model.eval())
    return models


class TestPlainForwards:
    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    @pytest.mark.parametrize("pad", ["left", "right", None])
    @pytest.mark.parametrize("use_cache", [False, True])
    def test_equals_eager(self, model_type, pad, use_cache):
        eager, model = pair(model_type)
        input_ids, mask = ragged_batch([20, 20, 20] if pad is None else [20, 7, 1], pad)
        with torch.no_grad():
            theirs, ours = (one(input_ids, attention_mask=mask, use_cache=use_cache).logits for one in (eager, model))
        torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], **TOLERANCE)

    @pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text", "gpt_oss"])
    def test_holes_in_the_middle(self, model_type):
        """Nobody sees them; windows count columns, theirs too, as eager's do."""
        eager, model = pair(model_type)
        input_ids, mask = ragged_batch([20, 20], None)
        mask[0, 4:9] = mask[1, 12] = 0
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "use_cache": False}
        with torch.no_grad():
            theirs, ours = (one(input_ids, **inputs).logits for one in (eager, model))
        torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], **TOLERANCE)

    def test_a_row_of_padding_alone(self):
        eager, model = pair("llama")
        input_ids, mask = ragged_batch([9, 4])
        mask[1] = 0
        with torch.no_grad():
            ours = model(input_ids, attention_mask=mask, use_cache=False).logits
            theirs = eager(input_ids[:1], use_cache=False).logits
        torch.testing.assert_close(ours[:1], theirs, **TOLERANCE)
        assert ours.isfinite().all()

    @pytest.mark.parametrize("columns", [17, 23])
    @pytest.mark.parametrize("padded", [False, True])
    def test_a_mask_of_another_width_is_refused(self, columns, padded):
        _, model = pair("llama")
        mask = torch.ones(2, columns, dtype=torch.long)
        if padded:
            mask[1, :3] = 0
        with torch.no_grad(), pytest.raises(ArgumentError, match=f"has {columns} columns, which does not fit 20 new"):
            model(ragged_batch([20, 20], None)[0], attention_mask=mask, use_cache=False)

    @pytest.mark.parametrize("model_type", ["llama", "mistral"])
    def test_a_causal_model_run_in_both_directions(self, model_type):
        eager, model = pair(model_type, is_causal=False)
        input_ids, mask = ragged_batch([30, 7, 19])
        with torch.no_grad():
            theirs, ours = (one(input_ids, attention_mask=mask, use_cache=False).logits for one in (eager, model))
            causal = tiny_model(tiny_config(model_type), "eager")(input_ids, attention_mask=mask).logits
        torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], **TOLERANCE)
        assert (causal - theirs)[mask.bool()].abs().max() > 0.1

    @pytest.mark.parametrize("model_type", ["qwen2_moe", "phimoe"])
    def test_layers_that_do_not_pass_their_window(self, model_type):
        sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 6, "pad_token_id": 0}
        sizes |= {"bos_token_id": 1, "eos_token_id": None}
        experts = {"num_local_experts": 4}
        if model_type == "qwen2_moe":
            experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
            experts |= {"shared_expert_intermediate_size": 32, "use_sliding_window": True, "max_window_layers": 0}
        config = AutoConfig.for_model(model_type, **sizes, **experts)
        eager, model = tiny_model(config, "eager"), tiny_model(config, "paged_flash")
        for input_ids, mask in (ragged_batch([20, 7]), ragged_batch([20, 20], None)):
            options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
            expected = eager.generate(input_ids, **options)
            assert torch.equal(model.generate(input_ids, **options), expected)
            dynamic = DynamicCache(config=model.config)
            assert torch.equal(model.generate(input_ids, past_key_values=dynamic, **options), expected)


class TestPackedRows:
    @pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2"])
    def test_position_ids_that_start_again(self, model_type):
        eager, model = pair(model_type)
        input_ids, _ = ragged_batch([34, 34], None)
        position_ids = torch.stack(
            [
                torch.cat([torch.arange(n) for n in (15, 1, 18)]),
                torch.cat([torch.arange(n) for n in (2, 20, 12)]),
            ]
        )
        reset_counters()
        with torch.no_grad():
            theirs, ours = (
                one(input_ids, position_ids=position_ids, use_cache=False).logits for one in (eager, model)
            )
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
        with torch.no_grad():
            alone = model(input_ids[:1, 16:], use_cache=False).logits
        torch.testing.assert_close(ours[:1, 16:], alone, **TOLERANCE)

    @pytest.mark.parametrize("with_maximum", [False, True])
    def test_offsets_of_the_users(self, with_maximum):
        _, model = pair("llama")
        input_ids, _ = ragged_batch([30], None)
        lengths = [11, 1, 18]
        offsets = torch.tensor([0, 11, 12, 30])
        position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
        packed = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
        if with_maximum:
            packed |= {"max_length_q": 18, "max_length_k": 18}
        with torch.no_grad():
            ours = model(input_ids, position_ids=position_ids, use_cache=False, **packed).logits
            alone = [model(part, use_cache=False).logits for part in input_ids.split(lengths, 1)]
        torch.testing.assert_close(ours, torch.cat(alone, 1), **TOLERANCE)

    def test_offsets_need_a_batch_of_one(self):
        _, model = pair("llama")
        offsets = torch.tensor([0, 5])
        with torch.no_grad(), pytest.raises(ArgumentError, match="a batch of 1, got a batch of 2"):
            model(ragged_batch([5, 5], None)[0], cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, use_cache=False)

    def test_offsets_and_a_paged_cache_are_refused(self):
        _, model = pair("llama")
        offsets = torch.tensor([0, 2, 5])
        with torch.no_grad(), pytest.raises(UnsupportedFeatureError, match="`cu_seq_lens_q`.*`use_cache=False`"):
            model(ragged_batch([5], None)[0], past_key_values=PagedCache(model.config), cu_seq_lens_q=offsets)


class TestOtherCaches:
    @pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gemma3_text", "gpt_oss"])
    @pytest.mark.parametrize("pad", ["left", None])
    def test_a_dynamic_cache_beyond_the_window(self, model_type, pad):
        eager, model = pair(model_type)
        input_ids, mask = ragged_batch([20, 7, 1] if pad else [20, 20, 20], pad)
        options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
        cache = DynamicCache(config=model.config)
        ours = model.generate(input_ids, past_key_values=cache, **options)
        assert torch.equal(ours, eager.generate(input_ids, **options))
        assert type(cache) is DynamicCache and cache.get_seq_length() == 39

    @pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text"])
    @pytest.mark.parametrize("pad", ["left", None])
    def test_a_static_cache_longer_than_its_content(self, model_type, pad):
        eager, model = pair(model_type)
        input_ids, mask = ragged_batch([20, 7] if pad else [20, 20], pad)
        mask = mask if pad else None
        logits = []
        for one in (eager, model):
            cache, parts = StaticCache(config=one.config, max_cache_len=50), []
            with torch.no_grad():
                for start, end in ((0, 9), (9, 19), (19, 20)):
                    part = mask[:, :end] if pad else None
                    parts.append(one(input_ids[:, start:end], attention_mask=part, past_key_values=cache).logits)
            logits.append(torch.cat(parts, 1))
        real = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(logits[1][real], logits[0][real], **TOLERANCE)

    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    @pytest.mark.parametrize("cache", [DynamicCache, PagedCache])
    def test_chunks_of_a_prompt(self, model_type, cache):
        eager, model = pair(model_type)
        input_ids, mask = ragged_batch([40, 21, 3])
        ours, theirs = cache(config=model.config), DynamicCache(config=eager.config)
        with torch.no_grad():
            for start, end in ((0, 1), (1, 18), (18, 30), (30, 38), (38, 40)):
                part = dict(attention_mask=mask[:, :end])
                expected = eager(input_ids[:, start:end], past_key_values=theirs, **part).logits
                logits = model(input_ids[:, start:end], past_key_values=ours, **part).logits
                real = mask[:, start:end].bool()
                torch.testing.assert_close(logits[real], expected[real], **TOLERANCE)


class TestMasksThatTheCacheWasNotTold:
    """A model with mask code of its own gives attention a 2-D mask, and the cache stores padding as tokens."""

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
    @pytest.mark.parametrize("cached", [True, False])
    def test_they_are_honoured(self, dtype, cached):
        layer = nn.Module().eval()
        mask = ragged_batch([20, 7])[1]
        q, k, v = torch.randn(2, 4, 20, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 16)
        cache, parts = PagedCache(tiny_config("llama")), []
        for start, end in ((0, 17), (17, 19), (19, 20)) if cached else ((0, 20),):
            new = k[:, :, start:end], v[:, :, start:end]
            keys, values = cache.update(*new, 0) if cached else (k, v)
            parts.append(
                paged_flash_attention_forward(layer, q[:, :, start:end], keys, values, mask[:, :end].to(dtype))[0]
            )
        out = torch.cat(parts, 1).transpose(1, 2)
        allowed = mask.bool()[:, None, None, :] & torch.ones(20, 20, dtype=torch.bool).tril()
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        real = mask.bool()[:, None, :, None].expand_as(out)
        torch.testing.assert_close(out[real], expected[real], rtol=0, atol=1e-5)

    def test_rows_that_have_moved_since_the_last_update(self):
        """As cross-attention reads its cache in every step after the first."""
        layer = nn.Module().eval()
        q, k, v = torch.randn(3, 4, 1, 16), torch.randn(3, 2, 40, 16), torch.randn(3, 2, 40, 16)
        cache = PagedCache(tiny_config("llama"))
        cache.update(k, v, 0)
        for rows in ([2, 0, 1], [1, 1, 0]):
            cache.reorder_cache(torch.tensor(rows))
            k, v = k[rows], v[rows]
            handles = cache.layers[0].keys, cache.layers[0].values
            out, _ = paged_flash_attention_forward(layer, q, *handles, is_causal=False)
            expected, _ = paged_flash_attention_forward(layer, q, k, v, is_causal=False)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)

    def test_numbers_to_add_are_refused(self):
        x = torch.randn(1, 2, 4, 16)
        with pytest.raises(UnsupportedFeatureError, match=r"bool or integer.* got \(1, 4\) of torch.float32"):
            paged_flash_attention_forward(nn.Module().eval(), x, x, x, torch.zeros(1, 4))


class TestChats:
    @pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text", "gpt_oss", "gpt2", "deepseek_v3"])
    @pytest.mark.parametrize("pads", [["left"] * 3, ["left", "right", "left"], ["right"] * 3])
    def test_turns_on_one_cache_equal_each_rows_own_chat(self, model_type, pads):
        """Three turns of different lengths, padded in between, six new tokens after each."""
        _, model = pair(model_type)
        turns = [ragged_batch(lengths, pad, seed=seed) for seed, (lengths, pad) in enumerate(
            zip(([14, 3, 9], [2, 8, 5], [6, 1, 10]), pads, strict=True)
        )]  # fmt: skip
        options = {"max_new_tokens": 6, "do_sample": False}
        cache = PagedCache(model.config)
        text = torch.zeros(3, 0, dtype=torch.long)
        mask = torch.zeros(3, 0, dtype=torch.long)
        for input_ids, turn_mask in turns:
            text = torch.cat([text, input_ids], 1)
            mask = torch.cat([mask, turn_mask], 1)
            text = model.generate(text, attention_mask=mask, past_key_values=cache, **options)
            mask = torch.cat([mask, mask.new_ones(3, 6)], 1)
        assert cache.memory().tokens == held(cache, mask[:, :-1].sum(1).tolist())[0]
        for row in range(3):
            alone = torch.zeros(1, 0, dtype=torch.long)
            for input_ids, turn_mask in turns:
                alone = torch.cat([alone, input_ids[row][turn_mask[row].bool()][None]], 1)
                alone = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
            assert text[row][mask[row].bool()].tolist() == alone[0].tolist()


class TestEncodersAndCrossAttention:
    @pytest.mark.parametrize("pad", ["left", "right", None])
    def test_bert(self, pad):
        eager, model = seq2seq(
            transformers.BertModel, transformers.BertConfig, vocab_size=VOCAB_SIZE, hidden_size=64,
            num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        )  # fmt: skip
        input_ids, mask = ragged_batch([12, 12] if pad is None else [12, 5], pad)
        reset_counters()
        with torch.no_grad():
            theirs, ours = (one(input_ids, attention_mask=mask).last_hidden_state for one in (eager, model))
        torch.testing.assert_close(ours, theirs, **TOLERANCE)  # in padded places as well: they see every token
        assert counters().reference == {"flash_forward": 2}

    @pytest.mark.parametrize("pad", ["left", "right", None])
    def test_modernbert_with_two_sided_windows(self, pad):
        eager, model = seq2seq(
            transformers.ModernBertModel, transformers.ModernBertConfig, vocab_size=VOCAB_SIZE, hidden_size=64,
            num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, local_attention=6, pad_token_id=0,
        )  # fmt: skip
        input_ids, mask = ragged_batch([24, 24] if pad is None else [24, 15], pad)
        with torch.no_grad():
            theirs, ours = (one(input_ids, attention_mask=mask).last_hidden_state for one in (eager, model))
        torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], **TOLERANCE)

    @pytest.mark.parametrize("decoder_columns", [12, 7, 1])
    @pytest.mark.parametrize("pad", ["left", "right"])
    def test_bart_whose_cross_attention_masks_keys_alone(self, decoder_columns, pad):
        eager, model = seq2seq(
            transformers.BartForConditionalGeneration, transformers.BartConfig, vocab_size=VOCAB_SIZE, d_model=64,
            encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        )  # fmt: skip
        input_ids, mask = ragged_batch([12, 5], pad)
        decoder_input_ids, _ = ragged_batch([decoder_columns] * 2, None, seed=3)
        with torch.no_grad():
            theirs, ours = (
                one(input_ids, attention_mask=mask, decoder_input_ids=decoder_input_ids).logits
                for one in (eager, model)
            )
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
        options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(input_ids, **options), eager.generate(input_ids, **options))
        beams = options | {"num_beams": 3}
        assert torch.equal(model.generate(input_ids, **beams), eager.generate(input_ids, **beams))

    @pytest.mark.parametrize("pad", ["left", "right", None])
    @pytest.mark.parametrize("num_beams", [1, 3])
    def test_bart_on_paged_caches_of_the_users(self, num_beams, pad):
        """The cross-attention's cache is told of no mask, and read again when rows have moved."""
        eager, model = seq2seq(
            transformers.BartForConditionalGeneration, transformers.BartConfig, vocab_size=VOCAB_SIZE, d_model=64,
            encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
        )  # fmt: skip
        input_ids, mask = ragged_batch([12, 12] if pad is None else [12, 5], pad)
        options = {"attention_mask": mask, "max_new_tokens": 12, "num_beams": num_beams, "do_sample": False}
        cache = EncoderDecoderCache(PagedCache(model.config), PagedCache(model.config))
        ours = model.generate(input_ids, past_key_values=cache, **options)
        assert torch.equal(ours, eager.generate(input_ids, **options))

    def test_t5gemma_with_windows_in_the_encoder(self):
        sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 6}
        eager, model = seq2seq(
            transformers.T5GemmaForConditionalGeneration, transformers.T5GemmaConfig,
            encoder=dict(sizes), decoder=dict(sizes), vocab_size=VOCAB_SIZE,
        )  # fmt: skip
        input_ids, mask = ragged_batch([30, 7, 19])
        decoder_input_ids, _ = ragged_batch([17] * 3, None, seed=3)
        with torch.no_grad():
            theirs, ours = (
                one(input_ids=input_ids, attention_mask=mask, decoder_input_ids=decoder_input_ids).logits
                for one in (eager, model)
            )
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


class TestWhatIsRefused:
    @pytest.fixture
    def model(self):
        return tiny_model(tiny_config("llama"), "paged_flash")

    @pytest.mark.parametrize("use_cache", [False, True])
    def test_attention_weights(self, model, use_cache):
        with torch.no_grad(), pytest.raises(UnsupportedFeatureError, match='output_attentions=True.*"eager"'):
            model(ragged_batch([5])[0], output_attentions=True, use_cache=use_cache)

    def test_backward_through_a_decode_step(self, model):
        cache = PagedCache(model.config)
        with torch.no_grad():
            model(ragged_batch([9])[0], past_key_values=cache)
        loss = model(torch.tensor([[5]]), past_key_values=cache).logits.sum()
        with pytest.raises(UnsupportedFeatureError, match="no backward"):
            loss.backward()

    def test_backward_through_the_dense_way(self):
        model = tiny_model(tiny_config("deepseek_v3"), "paged_flash")
        loss = model(ragged_batch([9])[0], past_key_values=PagedCache(model.config)).logits.sum()
        with pytest.raises(UnsupportedFeatureError, match="gradients can't pass through a PagedCache"):
            loss.backward()

    @pytest.mark.parametrize("shape", [(1,), (1, 2, 3, 4), (1, 2, 4, 5)], ids=str)
    def test_biases_that_do_not_fit(self, shape):
        x = torch.randn(1, 2, 4, 16)
        with pytest.raises(ArgumentError, match=r"must have shape \(1, 2, 4, 4\), .* got"):
            paged_flash_attention_forward(nn.Module().eval(), x, x, x, position_bias=torch.zeros(shape))

    @pytest.mark.parametrize("name", ["attention_mask", "position_bias"])
    def test_what_offsets_of_packed_rows_do_not_go_with(self, name):
        x = torch.randn(1, 2, 4, 16)
        offsets = torch.tensor([0, 1, 4])
        wrong = {"attention_mask": torch.tensor([[1, 1, 1, 0]]), "position_bias": torch.zeros(1, 1, 4, 4)}
        with pytest.raises(UnsupportedFeatureError, match=f"`{name}`.*`cu_seq_lens_q`"):
            paged_flash_attention_forward(nn.Module().eval(), x, x, x, cu_seq_lens_q=offsets, **{name: wrong[name]})

    @pytest.mark.parametrize("offsets", [[0, 2], [2, 4]], ids=str)
    @pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seq_lens_k"])
    def test_offsets_that_leave_tokens_out(self, name, offsets):
        x = torch.randn(1, 2, 4, 16)
        whole = torch.tensor([0, 1, 4])
        given = {"cu_seq_lens_q": whole, "cu_seq_lens_k": whole} | {name: torch.tensor(offsets)}
        message = f"`{name}` must rise from 0 to 4, .* got {offsets[0]} to {offsets[1]}"
        with pytest.raises(ArgumentError, match=message + "$"):
            paged_flash_attention_forward(nn.Module().eval(), x, x, x, **given)
        replica = nn.Module().eval()._replicate_for_data_parallel()
        with pytest.raises(ArgumentError, match=message + ".*DataParallel.*torchrun"):
            paged_flash_attention_forward(replica, x, x, x, **given)
        paged_flash_attention_forward(replica, x, x, x, cu_seq_lens_q=whole)

    def test_offsets_of_a_padded_batch(self):
        x = torch.randn(2, 2, 4, 16)
        with pytest.raises(ArgumentError, match="packed rows in a batch of 1, got a batch of 2"):
            paged_flash_attention_forward(nn.Module().eval(), x, x, x, cu_seq_lens_q=torch.tensor([0, 4, 8]))

    @pytest.mark.parametrize("name", ["head_mask", "indices", "block_indices"])
    def test_arguments_that_no_path_applies(self, name):
        layer = nn.Module().eval()
        x = torch.randn(1, 2, 4, 16)
        with pytest.raises(UnsupportedFeatureError, match=f"Module passes `{name}`.*sdpa"):
            paged_flash_attention_forward(layer, x, x, x, **{name: torch.zeros(1)})
        paged_flash_attention_forward(layer, x, x, x, **{name: None})

    def test_dropout_of_everything(self, model):
        query = torch.randn(1, 4, 5, 16)
        attention = model.model.layers[0].self_attn
        with pytest.raises(ArgumentError, match="`dropout` must be from 0 up to, but not including, 1, got 1.0"):
            paged_flash_attention_forward(attention.train(), query, query, query, None, dropout=1.0)
        out, _ = paged_flash_attention_forward(attention.eval(), query, query, query, None, dropout=1.0)
        assert out.isfinite().all()

    def test_continuous_batching(self):
        x = torch.randn(1, 2, 4, 16)
        with pytest.raises(UnsupportedFeatureError, match="generate_batch"):
            paged_flash_attention_forward(nn.Module().eval(), x, x, x, cache=object())


class TestDtypes:
    """Queries, keys and values that differ, because a norm or RoPE in fp32 upcast some of them."""

    @pytest.mark.parametrize("upcast", [(0, 1), (0,), (1,), (1, 2), (0, 1, 2), ()])
    def test_the_smallest_dtype_is_the_models(self, upcast):
        tensors = [torch.randn(2, 2, 5, 16, dtype=torch.bfloat16) for _ in range(3)]
        mixed = [x.float() if index in upcast else x for index, x in enumerate(tensors)]
        layer = nn.Module().eval()
        out, weights = paged_flash_attention_forward(layer, *mixed)
        assert weights is None
        assert out.shape == (2, 5, 2, 16) and out.is_contiguous()
        expected, _ = paged_flash_attention_forward(layer, *tensors)
        assert out.dtype == (torch.float32 if len(upcast) == 3 else torch.bfloat16)
        torch.testing.assert_close(out.float(), expected.float(), rtol=0, atol=0.02)

    @pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
    @pytest.mark.parametrize("cache", [DynamicCache, PagedCache])
    def test_autocast(self, model_type, cache):
        eager, model = pair(model_type)
        input_ids, mask = ragged_batch([20, 7])
        with torch.no_grad():
            exact = eager(input_ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        logits = []
        for one, its_cache in ((eager, DynamicCache), (model, cache)):
            past = its_cache(config=one.config)
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                parts = [
                    one(input_ids[:, s:e], attention_mask=mask[:, :e], past_key_values=past).logits
                    for s, e in ((0, 17), (17, 19), (19, 20))
                ]
            logits.append(torch.cat(parts, 1)[mask.bool()])
        errors = [(x.float() - exact).abs().max() for x in logits]
        assert errors[1] <= 2 * errors[0]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_layers_with_upcast_queries_and_keys(self, dtype, monkeypatch):
        """A model whose q and k leave RoPE in fp32, as PEFT's and some norms do, runs and returns its own dtype."""
        from transformers.models.llama import modeling_llama

        plain = modeling_llama.apply_rotary_pos_emb
        monkeypatch.setattr(
            modeling_llama, "apply_rotary_pos_emb", lambda q, k, *args, **kw: plain(q.float(), k.float(), *args, **kw)
        )
        model = tiny_model(tiny_config("llama"), "paged_flash", dtype=dtype)
        input_ids, mask = ragged_batch([20, 7])
        reset_counters()
        out = model.generate(
            input_ids, attention_mask=mask, max_new_tokens=5, return_dict_in_generate=True, output_logits=True
        )
        assert out.logits[0].dtype in (dtype, torch.float32)  # generate() itself may raise logits to fp32
        cache = out.past_key_values
        assert {layer.pool.key.dtype for layer in cache.layers} == {dtype}
        assert counters().dense_gather_total == 0

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_is_as_near_as_eagers(self, dtype):
        config = tiny_config("llama")
        input_ids, mask = ragged_batch([20, 7])
        with torch.no_grad():
            exact = tiny_model(config, "eager")(input_ids, attention_mask=mask).logits[mask.bool()]
            errors = [
                (tiny_model(config, name, dtype=dtype)(input_ids, attention_mask=mask).logits[mask.bool()] - exact)
                .abs()
                .max()
                for name in ("eager", "paged_flash")
            ]
        assert errors[1] <= 2 * errors[0]


class TestDeterminism:
    """The flag reaches the backward operator, whatever asks for it."""

    @pytest.fixture
    def asked(self, monkeypatch):
        flags, run = [], library.reference_backward.flash_backward

        def recording(*arguments, deterministic=False, **options):
            flags.append(deterministic)
            return run(*arguments, deterministic=deterministic, **options)

        monkeypatch.setattr(library.reference_backward, "flash_backward", recording)
        return flags

    @staticmethod
    def run(**options):
        x = torch.randn(1, 2, 4, 16, requires_grad=True)
        paged_flash_attention_forward(nn.Module().eval(), x, x, x, **options)[0].sum().backward()
        flash_attn_func(x, x, x, **options).sum().backward()
        offsets = torch.tensor([0, 2], dtype=torch.int32)
        flash_attn_varlen_func(x[0], x[0], x[0], offsets, offsets, 2, 2, **options).sum().backward()

    def test_by_argument(self, asked):
        self.run(deterministic=True)
        self.run(deterministic=False)
        assert asked == [True] * 3 + [False] * 3

    def test_by_torchs_flag(self, asked):
        torch.use_deterministic_algorithms(True)
        try:
            self.run(deterministic=False)
        finally:
            torch.use_deterministic_algorithms(False)
        assert asked == [True] * 3

    @pytest.mark.parametrize("value", ["0", "1"])
    def test_by_the_environment_as_in_transformers(self, asked, value, monkeypatch):
        monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", value)
        self.run()
        assert asked == [value == "1", False, False]


class TestCounters:
    def test_which_operations_a_generation_runs(self):
        model = tiny_model(tiny_config("llama"), "paged_flash")
        input_ids, mask = ragged_batch([20, 7])
        reset_counters()
        model.generate(input_ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
        assert counters().reference == {"flash_forward": 3, "paged_decode": 12, "store_kv": 15}
        assert counters().dense_gather == {}

    def test_a_chunk_of_up_to_sixteen_tokens_is_a_decode_step(self):
        model = tiny_model(tiny_config("llama"), "paged_flash")
        cache = PagedCache(model.config)
        input_ids, _ = ragged_batch([60], None)
        with torch.no_grad():
            model(input_ids[:, :20], past_key_values=cache)
            reset_counters()
            model(input_ids[:, 20:36], past_key_values=cache)
            assert counters().reference == {"paged_decode": 3, "store_kv": 3}
            model(input_ids[:, 36:53], past_key_values=cache)
            assert counters().reference == {"paged_decode": 3, "flash_forward": 3, "store_kv": 6}


REFUSED = {
    "output_attentions": (UnsupportedFeatureError, {"output_attentions": True}),
    "a 4-D mask that does not fit": (ArgumentError, {"attention_mask": torch.ones(1, 1, 2, 3, dtype=torch.bool)}),
    "a 3-D mask": (UnsupportedFeatureError, {"attention_mask": torch.zeros(1, 2, 2)}),
    "offsets": (UnsupportedFeatureError, {"cu_seq_lens_q": torch.tensor([0, 2])}),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_a_refused_forward_leaves_the_cache_as_it_was(refused):
    model = tiny_model(tiny_config("llama"), "paged_flash")
    input_ids, _ = ragged_batch([9], None)
    cache = PagedCache(model.config)
    error, wrong = REFUSED[refused]
    with torch.no_grad():
        expected = model(input_ids).logits
        for columns in (0, 4):
            cache.reset()
            if columns:
                model(input_ids[:, :columns], past_key_values=cache)
            if refused == "a 3-D mask":  # transformers itself stumbles over it before attention does
                mask = wrong["attention_mask"]
                key, value = cache.update(torch.zeros(1, 2, 2, 16), torch.zeros(1, 2, 2, 16), 0)
                with pytest.raises(error):
                    paged_flash_attention_forward(model.model.layers[0], torch.zeros(1, 4, 2, 16), key, value, mask)
            else:
                with pytest.raises(error):
                    model(input_ids[:, columns : columns + 2], past_key_values=cache, **wrong)
            assert cache.get_seq_length() == columns
            out = model(input_ids[:, columns:], past_key_values=cache).logits
            torch.testing.assert_close(out, expected[:, columns:])


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("cache", [DynamicCache, PagedCache])
def test_a_4d_mask_over_a_cache_says_all(model_type, cache):
    eager, model = pair(model_type)
    input_ids, _ = ragged_batch([20, 20], None)
    seen = torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(1)) < 0.6
    seen |= torch.eye(20, dtype=torch.bool)
    ours, theirs = cache(config=model.config), DynamicCache()
    with torch.no_grad():
        for start, end in ((0, 11), (11, 19), (19, 20)):
            mask = seen[:, :, start:end, :end]
            added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            expected = eager(input_ids[:, start:end], attention_mask=added, past_key_values=theirs).logits
            logits = model(input_ids[:, start:end], attention_mask=mask, past_key_values=ours).logits
            torch.testing.assert_close(logits, expected, **TOLERANCE)
