"""Forwards whose tokens the cache is told before the model is called: packed rows, and steps planned ahead."""

from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

from hf_paged_flash import (
    ArgumentError,
    CacheFullError,
    PagedCache,
    PagedFlashError,
    UnsupportedFeatureError,
    backend,
    masks,
)
from hf_paged_flash.cache.prepared_forward import packed_forward, static_forward
from hf_paged_flash.cache.step_buffers import StepBuffers
from tests.tiny_models import ragged_batch, tiny_config, tiny_model

LENGTHS = (30, 7, 19, 1)
pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt_oss"])
def model(request) -> PreTrainedModel:
    return tiny_model(tiny_config(request.param), "paged_flash")


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def padded(model, ids: torch.Tensor, mask: torch.Tensor, cache: PagedCache) -> torch.Tensor:
    """Logits of the new columns' tokens, (tokens, V)."""
    new = slice(cache.get_seq_length(), None)
    logits = model(
        ids[:, new], attention_mask=mask, position_ids=positions(mask)[:, new], past_key_values=cache
    ).logits
    return logits[mask[:, new].bool()]


def packed(model, ids: torch.Tensor, mask: torch.Tensor, cache: PagedCache, position_ids=None) -> torch.Tensor:
    """The same from one packed forward."""
    position_ids = positions(mask) if position_ids is None else position_ids
    with packed_forward(cache.groups, mask) as tokens:
        flat = [x.flatten()[torch.from_numpy(tokens.indices)][None] for x in (ids, position_ids)]
        return model(flat[0], position_ids=flat[1], past_key_values=cache).logits[0]


def assert_alike(cache: PagedCache, other: PagedCache) -> None:
    """All that both hold, as the model's next forward finds it."""
    assert cache.get_seq_length() == other.get_seq_length()
    for group, expected in zip(cache.groups, other.groups, strict=True):
        assert group.manager.lengths.tolist() == expected.manager.lengths.tolist()
        assert group.manager.first.tolist() == expected.manager.first.tolist()
        assert group.cache_seqlens.tolist() == expected.cache_seqlens.tolist()
        assert group.keeps_to_window == expected.keeps_to_window
        real, expected_real = group.real_columns(), expected.real_columns()
        assert (real is None) == (expected_real is None) and (real is None or (real == expected_real).all())
    for layer, expected in zip(cache.layers, other.layers, strict=True):
        torch.testing.assert_close(torch.clone(layer.keys), torch.clone(expected.keys))
        torch.testing.assert_close(torch.clone(layer.values), torch.clone(expected.values))


def turns(side: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ids and mask of two turns, each padded on `side`, and the columns of the first."""
    (first, first_mask), (second, second_mask) = (ragged_batch(LENGTHS, pad=side, seed=seed) for seed in (0, 1))
    return torch.cat([first, second], 1), torch.cat([first_mask, second_mask], 1), first.shape[1]


class TestPacked:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_turns_equal_padded_ones(self, model, side):
        ids, mask, first = turns(side)
        mask[0, 3:9] = 0  # a hole
        caches = PagedCache(model.config), PagedCache(model.config)
        with torch.no_grad():
            for end in (first, ids.shape[1]):
                expected = padded(model, ids[:, :end], mask[:, :end], caches[0])
                logits = packed(model, ids[:, :end], mask[:, :end], caches[1])
                torch.testing.assert_close(logits, expected)
                assert_alike(*reversed(caches))
            for _ in range(3):  # decode steps
                ids = torch.cat([ids, torch.full((len(ids), 1), 5)], 1)
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                expected = padded(model, ids, mask, caches[0])
                torch.testing.assert_close(padded(model, ids, mask, caches[1]), expected)
        assert_alike(*reversed(caches))
        backend_gathers = backend.counters().dense_gather
        assert set(backend_gathers) <= {"clone"}  # by this test alone

    def test_rows_that_hold_tokens_already(self, model):
        """As a prefix index gives them: blocks in a row's table before its first column."""
        ids, mask = ragged_batch((40, 20, 33), pad="left")
        prefix = PagedCache(model.config)
        full, cache = PagedCache(model.config), PagedCache(model.config)
        for group in prefix.groups:
            group.record_past = True
        with torch.no_grad():
            expected = padded(model, ids, mask, full)
            packed(model, ids, mask, prefix)
            prefix.crop(-8)
            cache = prefix.fork()
            for group in cache.groups:  # what an index would do
                group.record_past = False
                group.manager.truncate(group.manager.lengths // 16 * 16)
                group.columns, group.layer_columns, group._mask = 0, {}, None
            stored = cache.groups[0].manager.lengths.copy()
            logits = packed(model, ids, mask, cache)
        assert stored.tolist() == [32, 0, 16]
        rows = [row[count:] for row, count in zip(expected.split([40, 20, 33]), stored, strict=True)]
        torch.testing.assert_close(logits, torch.cat(rows))
        assert cache.get_seq_length() == ids.shape[1] and cache.groups[0].manager.lengths.tolist() == [40, 20, 33]
        step = torch.full((3, 1), 5)
        args = torch.cat([ids, step], 1), torch.cat([mask, torch.ones_like(step)], 1)
        with torch.no_grad():
            torch.testing.assert_close(padded(model, *args, cache), padded(model, *args, full))

    def test_a_padded_forward_forgets_tokens_without_columns(self, model):
        ids, mask = ragged_batch((20, 9), pad="left")
        cache, other = PagedCache(model.config), PagedCache(model.config)
        with torch.no_grad():
            padded(model, ids, mask, cache)
            for group in cache.groups:
                group.columns, group.layer_columns, group._mask = 0, {}, None
            torch.testing.assert_close(padded(model, ids, mask, cache), padded(model, ids, mask, other))
        assert_alike(cache, other)

    @pytest.mark.parametrize("turn", [0, 1])
    def test_a_full_cache_is_as_before(self, model, turn):
        ids, mask, first = turns("left")
        blocks = 3 if turn == 0 else 6
        cache, other = PagedCache(model.config, num_blocks=blocks), PagedCache(model.config)
        with torch.no_grad():
            if turn:
                for each in (cache, other):
                    packed(model, ids[:, :first], mask[:, :first], each)
            with pytest.raises(CacheFullError):
                packed(model, ids, mask, cache)
            if turn:
                assert_alike(cache, other)
            else:
                assert cache.get_seq_length() == 0 and cache.memory().bytes_reserved == 0
                row = ids[1:2, -7:]
                assert packed(model, row, torch.ones_like(row), cache).shape[0] == 7

    @pytest.mark.parametrize("turn", [0, 1])
    def test_a_forward_that_fails_is_taken_back(self, model, turn):
        ids, mask, first = turns("right")
        cache, other = PagedCache(model.config), PagedCache(model.config)

        def fail(module, args):
            raise RuntimeError("half way")

        with torch.no_grad():
            if turn:
                for each in (cache, other):
                    packed(model, ids[:, :first], mask[:, :first], each)
            layer = model.model.layers[-1]
            handle = layer.mlp.register_forward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="half way"):
                packed(model, ids, mask, cache)
            handle.remove()
            for each in (cache, other):
                packed(model, ids, mask, each)
        assert_alike(cache, other)

    def test_a_model_without_tokens_leaves_it_alone(self, model):
        ids, mask = ragged_batch(LENGTHS, pad="left")
        cache, other = PagedCache(model.config), PagedCache(model.config)
        with pytest.raises(RuntimeError), packed_forward(cache.groups, mask):
            raise RuntimeError
        with torch.no_grad():
            padded(model, ids, mask, cache)
            padded(model, ids, mask, other)
        assert_alike(cache, other)

    def test_masks_that_do_not_continue_are_refused(self, model):
        ids, mask, first = turns("left")
        cache = PagedCache(model.config)
        with torch.no_grad():
            packed(model, ids[:, :first], mask[:, :first], cache)
            for wrong, message in (
                (mask[:, :first], "more than the 30 stored columns"),
                (1 - mask, "changes columns"),
                (mask[:2], "holds 4 rows"),
            ):
                with pytest.raises(ArgumentError, match=message):
                    packed(model, ids, wrong, cache)
            assert cache.get_seq_length() == first
            packed(model, ids, mask, cache)

    def test_other_tokens_are_refused(self, model):
        ids, mask = ragged_batch(LENGTHS, pad="left")
        cache = PagedCache(model.config)
        with pytest.raises(PagedFlashError, match=r"got keys of \(batch, length\) \(4, 30\)"):
            with torch.no_grad(), packed_forward(cache.groups, mask):
                model(ids, past_key_values=cache)
        assert cache.get_seq_length() == 0

    def test_what_needs_dense_keys_is_refused(self):
        model = tiny_model(tiny_config("deepseek_v3"), "paged_flash")
        ids, mask = ragged_batch(LENGTHS, pad="left")
        cache = PagedCache(model.config)
        with torch.no_grad(), pytest.raises(UnsupportedFeatureError, match="needs dense keys"):
            packed(model, ids, mask, cache)
        assert cache.get_seq_length() == 0

    def test_what_needs_a_matrix_is_refused(self, monkeypatch):
        model = tiny_model(tiny_config("llama"), "paged_flash")
        monkeypatch.setattr(masks, "MATRIX_CONFIGS", {type(model.config)})
        ids, mask = ragged_batch(LENGTHS, pad="left")
        cache = PagedCache(model.config)
        with torch.no_grad(), pytest.raises(UnsupportedFeatureError, match="says more than padding"):
            packed(model, ids, mask, cache)


def static(cache, q_length):
    def buffers():
        widths = [int(group.manager.row_blocks().max()) + 3 for group in cache.groups]
        return StepBuffers(cache.batch_size, q_length, widths, torch.device("cpu"))

    return static_forward(cache.groups, q_length, buffers)


class TestStatic:
    @pytest.mark.parametrize("q_length", [1, 3])
    def test_equals_a_forward_with_a_mask(self, model, q_length):
        ids, mask, first = turns("left")
        caches = PagedCache(model.config), PagedCache(model.config)
        with torch.no_grad():
            for cache in caches:
                packed(model, ids[:, :first], mask[:, :first], cache)
            for step in range(3):
                end = first + q_length * (step + 1)
                mask[:, end - q_length : end] = 1
                expected = padded(model, ids[:, :end], mask[:, :end], caches[0])
                where = positions(mask)[:, end - q_length : end]
                with static(caches[1], q_length):
                    assert caches[1].groups[0].step.end == end
                    logits = model(ids[:, end - q_length : end], position_ids=where, past_key_values=caches[1]).logits
                torch.testing.assert_close(logits.flatten(0, 1), expected)
                assert_alike(*reversed(caches))

    def test_a_mask_is_not_asked(self, model):
        ids, mask = ragged_batch(LENGTHS, pad="left")
        caches = PagedCache(model.config), PagedCache(model.config)
        with torch.no_grad():
            for cache in caches:
                packed(model, ids, mask, cache)
            where = mask.sum(1, keepdim=True)
            call = partial(model, ids[:, :1], position_ids=where)
            wider = torch.cat([mask, torch.zeros_like(mask[:, :1])], 1)
            with static(caches[0], 1):
                logits = call(past_key_values=caches[0], attention_mask=wider).logits
            wider[:, -1] = 1
            torch.testing.assert_close(logits, call(past_key_values=caches[1], attention_mask=wider).logits)

    def test_failures_are_taken_back(self, model):
        ids, mask = ragged_batch(LENGTHS, pad="left")
        cache, other = PagedCache(model.config, num_blocks=8), PagedCache(model.config)
        with torch.no_grad():
            for each in (cache, other):
                packed(model, ids, mask, each)
            with pytest.raises(CacheFullError), static(cache, 300):
                pytest.fail("planned")
            assert_alike(cache, other)
            with pytest.raises(RuntimeError), static(cache, 2):
                raise RuntimeError
            assert_alike(cache, other)
