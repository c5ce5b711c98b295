"""Models whose layers keep other states beside keys and values: linear attention, Mamba, short convolutions."""

import pytest
import torch

from hf_paged_flash import CacheFullError, PagedCache, PagedFlashError, UnsupportedFeatureError, counters
from tests.integration.models import loaded_pairs, new_tokens
from tests.tiny_models import ragged_batch, tiny_config

_MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=16)
_STATE, _KEYS, _BOTH = "LinearAttentionLayer", "PagedLayer", "PagedHybridLayer"
# {model type: (its arguments, its layers in the cache)}
_MODELS = {
    "qwen3_next": (
        dict(
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            layer_types=["linear_attention", "full_attention"] * 2,
        ),
        [_STATE, _KEYS] * 2,
    ),
    "jamba": (
        dict(
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=2,
            num_experts_per_tok=1,
            use_mamba_kernels=False,
            mamba_d_state=8,
            mamba_dt_rank=4,
        ),
        [_STATE, _KEYS] * 2,
    ),
    "zamba2": (
        dict(
            num_key_value_heads=4,
            attention_head_dim=32,
            mamba_d_state=8,
            n_mamba_heads=8,
            mamba_headdim=16,
            mamba_ngroups=1,
            chunk_size=16,
            layers_block_type=["mamba", "hybrid"] * 2,
            num_mem_blocks=1,
            adapter_rank=4,
        ),
        [_STATE, _BOTH] * 2,
    ),
    "bamba": (dict(attn_layer_indices=[1, 3], **_MAMBA2), [_STATE, _KEYS] * 2),
    "falcon_h1": (dict(mamba_d_ssm=128, head_dim=16, **_MAMBA2), [_BOTH] * 4),
    "nemotron_h": (
        dict(
            layers_block_type=["linear_attention", "full_attention", "linear_attention", "mlp"],
            mamba_num_heads=8,
            mamba_head_dim=16,
            n_groups=1,
            ssm_state_size=8,
            chunk_size=16,
            head_dim=16,
        ),
        [_STATE, _KEYS, _STATE, "..."],
    ),
    "lfm2": (
        dict(block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"] * 2),
        [_STATE, _KEYS] * 2,
    ),
    "inkling_text": (
        dict(
            head_dim=16,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=2,
            swa_head_dim=16,
            sliding_window_size=7,
            d_rel=16,
            rel_extent=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            logits_mup_width_multiplier=1.0,
            layer_types=["hybrid_sliding", "hybrid"] * 2,
            mlp_layer_types=["dense", "sparse"] * 2,
        ),
        [_BOTH] * 4,
    ),
}
DENSE = ("inkling_text",)  # scores have a bias, which depends on the token
# Each decoding method of those that have a state which can't be taken back, on one of them in full
METHODS = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 0},
    "beams2": {"num_beams": 2},
    "beams4": {"num_beams": 4, "early_stopping": True},
    "beams8": {"num_beams": 8, "num_return_sequences": 3},
    "samples": {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
    "chunks": {"prefill_chunk_size": 7},
}
NEW = 24


def hybrid_config(model_type, **changes):
    return tiny_config(model_type, **{"num_hidden_layers": 4} | _MODELS[model_type][0] | changes)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return loaded_pairs(hybrid_config, tmp_path_factory)


def both(pair, input_ids, mask, **options):
    outputs = []
    for model in (pair.eager, pair.paged):
        torch.manual_seed(5)
        outputs.append(new_tokens(model, input_ids, mask, max_new_tokens=NEW, **options))
    return outputs


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_decoding_methods(pairs, method):
    pair = pairs("qwen3_next")
    lengths = (20, 20, 20) if "prefill_chunk_size" in method else (20, 7, 13)
    expected, paged = both(pair, *ragged_batch(lengths), **method)
    assert torch.equal(paged, expected)


@pytest.mark.parametrize("model_type", _MODELS)
@pytest.mark.parametrize("method", ["greedy", "beams4"])
def test_models(pairs, model_type, method):
    pair = pairs(model_type)
    input_ids, mask = ragged_batch((20, 7, 13))
    expected, paged = both(pair, input_ids, mask, **METHODS[method])
    assert torch.equal(paged, expected)
    assert bool(counters().dense_gather_total) == (model_type in DENSE)
    layers = [type(layer).__name__ for layer in PagedCache(pair.paged.config).layers]
    assert all(name in (wanted, "DummyLayer", _STATE) if wanted == "..." else name == wanted
               for name, wanted in zip(layers, _MODELS[model_type][1], strict=True))  # fmt: skip


@pytest.mark.parametrize("model_type", ["qwen3_next", "falcon_h1", "lfm2"])
def test_rows_move_with_their_states(pairs, model_type):
    model = pairs(model_type).paged
    input_ids, mask = ragged_batch([20, 20, 20], None)
    changes = {
        "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        "mask": (lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
        "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    }
    for change, rows in changes.values():
        cache = PagedCache(model.config)
        token = torch.arange(5, 5 + len(rows))[:, None]
        with torch.no_grad():
            model(input_ids, past_key_values=cache)
            change(cache)
            logits = model(token, past_key_values=cache).logits
            whole = model(torch.cat([input_ids[rows], token], 1), use_cache=False).logits[:, -1:]
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-4)


def test_another_batch_after_reset(pairs):
    model = pairs("qwen3_next").paged
    cache = PagedCache(model.config)
    for batch in (3, 1, 2):
        input_ids, _ = ragged_batch([14] * batch, None)
        ours = new_tokens(model, input_ids, None, past_key_values=cache, max_new_tokens=6)
        assert torch.equal(ours, new_tokens(model, input_ids, None, max_new_tokens=6))
        cache.reset()


def test_a_recurrent_state_can_not_be_cropped(pairs):
    for model_type in ("qwen3_next", "falcon_h1"):
        model = pairs(model_type).paged
        cache = PagedCache(model.config)
        input_ids, _ = ragged_batch([20], None)
        with torch.no_grad():
            model(input_ids[:, :15], past_key_values=cache)
            memory = cache.memory()
            with pytest.raises(UnsupportedFeatureError, match="recurrent state, which can't be taken back"):
                cache.crop(-3)
            cache.crop(0)
            assert cache.memory() == memory and cache.get_seq_length() == 15
            logits = model(input_ids[:, 15:], past_key_values=cache).logits
            whole = model(input_ids, use_cache=False).logits[:, 15:]
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-4)


class TestConvolutions:
    def test_prompt_lookup(self, pairs):
        pair = pairs("lfm2")
        input_ids = ragged_batch([9], None)[0].repeat(1, 4)
        mask = torch.ones_like(input_ids)
        paged = new_tokens(pair.paged, input_ids, mask, prompt_lookup_num_tokens=4, max_new_tokens=NEW)
        assert torch.equal(paged, new_tokens(pair.eager, input_ids, mask, max_new_tokens=NEW))

    def test_crop_where_the_past_was_recorded(self, pairs):
        model = pairs("lfm2").paged
        cache = PagedCache(model.config)
        cache.activate_past_recording()
        input_ids, _ = ragged_batch([20], None)
        with torch.no_grad():
            model(input_ids[:, :15], past_key_values=cache)
            cache.crop(-4)
            logits = model(input_ids[:, 11:], past_key_values=cache).logits
            whole = model(input_ids, use_cache=False).logits[:, 11:]
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-4)

    def test_crop_without_it_is_refused_and_changes_nothing(self, pairs):
        model = pairs("lfm2").paged
        cache = PagedCache(model.config)
        input_ids, _ = ragged_batch([20], None)
        with torch.no_grad():
            model(input_ids[:, :15], past_key_values=cache)
            with pytest.raises(UnsupportedFeatureError, match="convolution .* `activate_past_recording"):
                cache.crop(-4)
            assert cache.get_seq_length() == 15
            logits = model(input_ids[:, 15:], past_key_values=cache).logits
            whole = model(input_ids, use_cache=False).logits[:, 15:]
        torch.testing.assert_close(logits, whole, rtol=0, atol=1e-4)


class TestAForwardThatIsRefused:
    """A state runs ahead of the keys when a later layer finds no room."""

    def test_of_a_prompt(self, pairs):
        model = pairs("qwen3_next").paged
        cache = PagedCache(model.config, num_blocks=2)
        with torch.no_grad():
            with pytest.raises(CacheFullError):
                model(ragged_batch([40], None)[0], past_key_values=cache)
            for batch in (1, 2):
                input_ids, _ = ragged_batch([16] * batch, None)
                logits = model(input_ids, past_key_values=cache).logits
                torch.testing.assert_close(logits, model(input_ids, use_cache=False).logits, rtol=0, atol=1e-5)
                cache.reset()

    def test_later_on(self, pairs):
        model = pairs("qwen3_next").paged
        cache = PagedCache(model.config, num_blocks=2)
        input_ids, _ = ragged_batch([40], None)
        with torch.no_grad():
            model(input_ids[:, :30], past_key_values=cache)
            with pytest.raises(CacheFullError):
                model(input_ids[:, 30:], past_key_values=cache)
            with pytest.raises(PagedFlashError, match=r"have taken in tokens .* `reset\(\)`"):
                model(input_ids[:, 30:31], past_key_values=cache)
            cache.reset()
            logits = model(input_ids[:, :30], past_key_values=cache).logits
            torch.testing.assert_close(logits, model(input_ids[:, :30], use_cache=False).logits, rtol=0, atol=1e-5)

    def test_where_layers_ask_for_their_sizes(self, pairs):
        """Inkling's do in each forward, with a convolution before the first question."""
        model = pairs("inkling_text").paged
        cache = PagedCache(model.config, num_blocks=2)
        input_ids, mask = ragged_batch([40], None)[0], torch.ones(1, 30, dtype=torch.long)
        mask[:, :9] = 0
        with torch.no_grad():
            model(input_ids[:, :30], attention_mask=mask, past_key_values=cache)
            assert cache.memory().tokens == 21  # the mask was not forgotten
            with pytest.raises(CacheFullError):
                model(input_ids, past_key_values=cache)
            with pytest.raises(PagedFlashError, match=r"have taken in tokens .* `reset\(\)`"):
                model(input_ids[:, 30:31], past_key_values=cache)
