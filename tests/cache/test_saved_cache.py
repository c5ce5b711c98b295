"""PagedCache.save and PagedCache.load: the same tokens afterwards, the same blocks, and files that are refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

from hf_paged_flash import ArgumentError, CacheFullError, PagedCache, PagedFlashError, UnsupportedFeatureError
from hf_paged_flash.cache.block_pool import BlockPool
from tests.integration.models import attentive_config
from tests.tiny_models import MODEL_TYPES, ragged_batch, tiny_config, tiny_model

LENGTHS = (30, 7, 19)


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config("llama"), "paged_flash")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.safetensors"


@torch.no_grad()
def extend(model, cache, input_ids, attention_mask=None):
    return model(input_ids, attention_mask=attention_mask, past_key_values=cache).logits


def filled(model, **options):
    input_ids, mask = ragged_batch(LENGTHS)
    cache = PagedCache(model.config, **options)
    extend(model, cache, input_ids, mask)
    return cache, input_ids, mask


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_generation_goes_on_token_for_token(model_type, path):
    model = tiny_model(attentive_config(model_type), "paged_flash")
    eager = tiny_model(attentive_config(model_type), "eager")
    input_ids, mask = ragged_batch(LENGTHS)
    options = {"do_sample": False, "max_new_tokens": 8}
    cache = PagedCache(model.config)
    first = model.generate(input_ids, attention_mask=mask, past_key_values=cache, **options)
    cache.save(path)
    memory = cache.memory()
    del cache
    loaded = PagedCache.load(path, model.config)
    assert (loaded.get_seq_length(), loaded.batch_size) == (37, 3)
    assert (loaded.memory().tokens, loaded.memory().blocks_used) == (memory.tokens, memory.blocks_used)
    longer = torch.cat([mask, mask.new_ones(3, 8)], 1)
    ours = model.generate(first, attention_mask=longer, past_key_values=loaded, **options)
    assert torch.equal(ours, eager.generate(input_ids, attention_mask=mask, do_sample=False, max_new_tokens=16))


def _with_linear_attention():
    return AutoConfig.for_model(
        "qwen3_next",
        **{"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4},
        **{"linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
        **{"pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1},
        layer_types=["linear_attention", "full_attention"],
    )


@pytest.mark.parametrize(
    "make",
    [_with_linear_attention, lambda: tiny_config("nemotron_h")],
    ids=["linear attention", "layers without a state beside those with one"],
)
def test_a_hybrid_goes_on(path, make):
    config = make()
    hybrid = tiny_model(config, "paged_flash")
    input_ids, _ = ragged_batch([12, 12], None)
    cache = PagedCache(config)
    extend(hybrid, cache, input_ids)
    cache.save(path)
    loaded = PagedCache.load(path, config)
    for token in (5, 6):
        more = torch.full((2, 1), token)
        assert torch.equal(extend(hybrid, loaded, more), extend(hybrid, cache, more))


def test_shared_blocks_are_saved_once(model, path):
    cache, _, _ = filled(model)
    cache.batch_repeat_interleave(4)
    cache.save(path)
    with safe_open(path, "pt") as file:
        assert file.get_tensor("layers.0.key").shape == (5, 16, 2, 16)
        assert file.get_tensor("groups.0.table").shape == (12, 2)
    loaded = PagedCache.load(path, model.config)
    for cache_memory in ("tokens", "blocks_used", "blocks_shared"):
        assert getattr(loaded.memory(), cache_memory) == getattr(cache.memory(), cache_memory)
    more = torch.arange(5, 17)[:, None]
    assert torch.equal(extend(model, loaded, more), extend(model, cache, more))
    assert loaded.memory().tokens == cache.memory().tokens


def test_only_this_caches_rows_are_saved(model, path):
    cache, _, _ = filled(model)
    fork = cache.fork(1)
    fork.save(path)
    loaded = PagedCache.load(path, model.config)
    assert (loaded.memory().tokens, loaded.memory().blocks_used, loaded.batch_size) == (7, 1, 1)
    assert torch.equal(extend(model, loaded, torch.tensor([[5]])), extend(model, fork, torch.tensor([[5]])))


def test_what_no_token_fills_is_zero(model, path):
    cache, _, _ = filled(model)
    for layer in cache.layers:
        layer.pool.key.masked_fill_(torch.arange(16)[:, None, None] >= 14, float("nan"))  # row 0 fills 14 of its last
    cache.crop(-16)  # row 0 to 14 tokens
    cache.save(path)
    with safe_open(path, "pt") as file:
        key = file.get_tensor("layers.1.key")
        assert not key.isnan().any()
        assert not key[0, 14:].any() and key[0, :14].all()


def test_an_empty_cache(model, path):
    PagedCache(model.config, 32, num_blocks=3).save(path)
    loaded = PagedCache.load(path, model.config)
    assert (loaded.get_seq_length(), loaded.memory().bytes_reserved, loaded.memory().block_size) == (0, 0, 32)
    with pytest.raises(CacheFullError):
        extend(model, loaded, ragged_batch([97], None)[0])


@pytest.mark.parametrize("options", [{"num_blocks": 5}, {"max_memory": 5 * 16 * 768}, {"dtype": torch.bfloat16}])
def test_options_are_kept(model, path, options):
    cache, _, mask = filled(model, **options)
    cache.save(path)
    loaded = PagedCache.load(path, model.config)
    assert loaded.layers[0].pool.key.dtype == options.get("dtype", torch.float32)
    more = torch.full((3, 20), 7)
    longer = torch.cat([mask, mask.new_ones(3, 20)], 1)
    if "dtype" in options:
        assert torch.equal(extend(model, loaded, more, longer), extend(model, cache, more, longer))
    else:
        with pytest.raises(CacheFullError):
            extend(model, loaded, more, longer)
        assert loaded.memory() == cache.memory()


def test_forks_of_a_loaded_cache_share_its_pool(model, path):
    cache, _, _ = filled(model)
    cache.save(path)
    loaded = PagedCache.load(path, model.config)
    fork = loaded.fork([2, 0])
    token = torch.full((3, 1), 7)
    assert torch.equal(extend(model, fork, token[:2]), extend(model, cache.fork([2, 0]), token[:2]))
    assert torch.equal(extend(model, loaded, token), extend(model, cache, token))
    assert all(a.pool is b.pool for a, b in zip(loaded.layers, fork.layers, strict=True))


def test_a_loaded_cache_can_be_changed_and_saved_before_it_is_used(model, path):
    cache, input_ids, mask = filled(model)
    cache.save(path)
    loaded = PagedCache.load(path, model.config)
    for one in (cache, loaded):
        one.crop(-5)
        one.reorder_cache(torch.tensor([2, 0, 2]))
    loaded.save(path)
    again = PagedCache.load(path, model.config)
    more = torch.arange(5, 8)[:, None]
    expected = extend(model, cache, more)
    assert torch.equal(extend(model, loaded, more), expected)
    assert torch.equal(extend(model, again, more), expected)


def test_half_a_forward_is_not_saved(model, path, monkeypatch):
    cache, _, _ = filled(model)
    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        extend(model, cache, torch.full((3, 2), 7))
    with pytest.raises(PagedFlashError, match=r"layer 1 holds 30 columns .* others 32.*`crop\(-2\)` before `save"):
        cache.save(path)
    cache.crop(-2)
    cache.save(path)
    assert PagedCache.load(path, model.config).get_seq_length() == 30


def test_a_state_elsewhere_is_not_saved(path):
    model = tiny_model(tiny_config("recurrent_gemma"), "paged_flash")
    cache = PagedCache(model.config)
    extend(model, cache, ragged_batch([12, 12], None)[0])
    with pytest.raises(UnsupportedFeatureError, match="layer 0 has stored nothing .* its state in its modules"):
        cache.save(path)
    assert cache.get_seq_length() and not path.exists()


@pytest.mark.parametrize("failing", [False, True])
def test_blocks_move_to_the_models_device(model, path, monkeypatch, failing):
    """On CPU tensors: the pool that was loaded says that it lies elsewhere."""
    cache, _, _ = filled(model)
    cache.save(path)
    loaded = PagedCache.load(path, model.config)
    elsewhere = [layer.pool for layer in loaded.layers]

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

    for pool in elsewhere:
        pool.key = pool.key.as_subclass(Elsewhere)
    more = torch.full((3, 1), 7)
    if failing:
        with monkeypatch.context() as patch:
            patch.setattr(BlockPool, "grow", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("simulated")))
            with pytest.raises(CacheFullError, match="no memory for 5 more blocks"):
                extend(model, loaded, more)
        assert [loaded.groups[0].pools.get(layer) for layer in range(3)] == elsewhere
        assert loaded.get_seq_length() == 30
    assert torch.equal(extend(model, loaded, more), extend(model, cache, more))
    assert not {id(layer.pool) for layer in loaded.layers} & {id(pool) for pool in elsewhere}
    assert type(loaded.layers[0].pool.key) is torch.Tensor


def test_sizes_that_differ_by_layer(path):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97, "hidden_size_per_layer_input": 0}
    kinds = {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2}
    config = AutoConfig.for_model("gemma4_text", **shape, **kinds, global_head_dim=16, sliding_window=8)
    assert config.is_heterogeneous
    model = tiny_model(config, "paged_flash")
    cache, _, _ = filled(model)
    cache.save(path)
    loaded, more = PagedCache.load(path, config), torch.arange(5, 8)[:, None]
    assert torch.equal(extend(model, loaded, more), extend(model, cache, more))
    other = AutoConfig.for_model("gemma4_text", **shape, **kinds, global_head_dim=32, sliding_window=8)
    for wrong in (other, tiny_config("llama")):
        with pytest.raises(ArgumentError, match="whose `.*` is"):
            PagedCache.load(path, wrong)


class TestRefused:
    def rewrite(self, path, tensors=None, about=None, drop=()):
        with safe_open(path, "pt") as file:
            saved = {name: file.get_tensor(name) for name in file.keys() if name not in drop}
            metadata = json.loads(file.metadata()["hf_paged_flash.cache"])
        metadata = {"hf_paged_flash.cache": json.dumps(metadata | (about or {}))}
        save_file(saved | (tensors or {}), path, metadata=metadata)

    def test_another_models_cache(self, model, path):
        filled(model)[0].save(path)
        with pytest.raises(ArgumentError, match="whose `num_key_value_heads` is 2, `config` says 4"):
            PagedCache.load(path, tiny_config("llama", num_key_value_heads=4))
        with pytest.raises(ArgumentError, match="whose `model_type` is llama, `config` says qwen3"):
            PagedCache.load(path, tiny_config("qwen3"))

    def test_another_window(self, path):
        config = attentive_config("mistral", sliding_window=8)
        cache = PagedCache(config)
        extend(tiny_model(config, "paged_flash"), cache, ragged_batch((64,))[0])
        assert cache.groups[0].has_given_back
        cache.save(path)
        assert PagedCache.load(path, config).groups[0].window == 8
        for window in (40, None):
            with pytest.raises(ArgumentError, match="whose `layers` is .*PagedLayer of window 8"):
                PagedCache.load(path, attentive_config("mistral", sliding_window=window))

    def test_another_file(self, model, path):
        save_file({"x": torch.zeros(1)}, path)
        with pytest.raises(ArgumentError, match="must be a file that `PagedCache.save` wrote, .* is another one"):
            PagedCache.load(path, model.config)
        path.write_bytes(b"no safetensors")
        with pytest.raises(ArgumentError, match="must be a file that `PagedCache.save` wrote"):
            PagedCache.load(path, model.config)
        with pytest.raises(FileNotFoundError):
            PagedCache.load(path.with_name("nowhere"), model.config)

    def test_a_folder_that_is_not_there(self, model, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
            PagedCache(model.config).save(tmp_path / "nowhere" / "cache.safetensors")

    def test_half_a_file(self, model, path):
        filled(model)[0].save(path)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ArgumentError, match="must be a file that `PagedCache.save` wrote"):
            PagedCache.load(path, model.config)

    def test_another_version(self, model, path):
        filled(model)[0].save(path)
        self.rewrite(path, about={"version": 7})
        with pytest.raises(ArgumentError, match="saved in version 7 of the format, this hf_paged_flash reads 1"):
            PagedCache.load(path, model.config)

    @pytest.mark.parametrize(
        ("tensors", "drop", "match"),
        [
            ({}, ("layers.1.value",), "has no tensor `layers.1.value`"),
            ({"layers.1.key": torch.zeros(4, 16, 2, 16)}, (), r"must hold `layers.1.key` of shape \(5, 16, None"),
            ({"layers.1.key": torch.zeros(5, 16, 2, 16).int()}, (), "floating, and holds .* of torch.int32"),
            ({"layers.0.value": torch.zeros(5, 16, 3, 16)}, (), "must hold `layers.0.value` of shape"),
            ({"groups.0.lengths": torch.tensor([30, 7, 18])}, (), "has lengths that differ from its columns"),
            ({"groups.0.lengths": torch.tensor([30, 7, 40])}, (), "has tables that fit no lengths"),
            ({"groups.0.mask": torch.ones(3, 31, dtype=torch.bool)}, (), r"`groups.0.mask` of shape \(3, 30\)"),
            ({"groups.0.table": torch.zeros(3, 2, dtype=torch.int32)}, (), "has tables that fit no lengths"),
            ({"groups.0.table": torch.tensor([[0, 9999], [1, -1], [2, 3]]).int()}, (), "name blocks it can't hold"),
            ({"groups.0.first": torch.tensor([0, 0, -1])}, (), "has given back what its windows reach"),
            ({"groups.0.first": torch.tensor([1, 0, 0])}, (), "has given back what its windows reach"),
            ({"layers.7.key": torch.zeros(1)}, (), r"holds tensors that belong nowhere, \['layers.7.key'\]"),
        ],
    )
    def test_a_damaged_one(self, model, path, tensors, drop, match):
        filled(model)[0].save(path)
        self.rewrite(path, tensors, drop=drop)
        with pytest.raises(ArgumentError, match=match):
            PagedCache.load(path, model.config)

    def test_keys_of_other_heads_than_the_model_makes(self, model, path):
        filled(model)[0].save(path)
        swap = {f"layers.2.{kind}": torch.zeros(5, 16, 4, 16) for kind in ("key", "value")}
        self.rewrite(path, swap)
        cache = PagedCache.load(path, model.config)
        with pytest.raises(ArgumentError, match=r"layer 2 .*\(heads, head_dim\) \(4, 16\), the model makes"):
            extend(model, cache, torch.full((3, 1), 7))
