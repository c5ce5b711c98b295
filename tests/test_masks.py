"""The mask function: padding, packed rows and windows without an S x S matrix, anything else as one."""

import copy

import pytest
import torch
from transformers import AutoConfig, DynamicCache, StaticCache, masking_utils
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from hf_paged_flash import PagedCache
from hf_paged_flash.masks import are_chunks, as_matrix, masks_nothing, paged_flash_mask, window_of
from tests.tiny_models import WINDOW, ragged_batch, tiny_config, tiny_model

LENGTHS = (20, 7, 13)


@pytest.fixture
def config():
    config = tiny_config("mistral")
    config._attn_implementation = "paged_flash"
    return config


def chunked(size):
    config = AutoConfig.for_model("llama4_text", hidden_size=64, num_hidden_layers=2, attention_chunk_size=size)
    config._attn_implementation = "paged_flash"
    return config


def arguments(config, mask, columns=20, cache=None, **more):
    embeds = torch.zeros(3, columns, 64)
    return dict(config=config, inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, **more)


class TestWhatIsHandedOver:
    @pytest.mark.parametrize("create", [create_causal_mask, create_bidirectional_mask])
    def test_nothing_where_nothing_is_padded(self, config, create):
        assert create(**arguments(config, None)) is None
        assert create(**arguments(config, torch.ones(3, 20, dtype=torch.long))) is None

    @pytest.mark.parametrize("create", [create_causal_mask, create_bidirectional_mask])
    @pytest.mark.parametrize("pad", ["left", "right"])
    def test_the_padding(self, config, create, pad):
        _, mask = ragged_batch(LENGTHS, pad)
        handed = create(**arguments(config, mask))
        assert handed.dtype == torch.bool
        assert torch.equal(handed, mask.bool())
        assert not masks_nothing(handed) and window_of(handed) is None

    def test_it_is_not_the_users_tensor(self, config):
        mask = ragged_batch(LENGTHS)[1].bool()
        handed = create_causal_mask(**arguments(config, mask))
        handed.zero_()
        assert torch.equal(mask, ragged_batch(LENGTHS)[1].bool())

    def test_packed_rows_as_segments(self, config):
        position_ids = torch.cat([torch.arange(9), torch.arange(4), torch.arange(7)]).expand(3, -1)
        handed = create_causal_mask(**arguments(config, None, position_ids=position_ids))
        assert handed.dtype == torch.int32
        assert handed.shape == (3, 20)
        assert handed[1].diff().nonzero()[:, 0].tolist() == [8, 12]

    def test_one_row_of_plain_positions_is_not_packed(self, config):
        position_ids = torch.arange(20).expand(3, -1)
        assert create_causal_mask(**arguments(config, None, position_ids=position_ids)) is None

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize(
        ("create", "window"),
        [
            (create_sliding_window_causal_mask, (WINDOW - 1, 0)),
            (create_bidirectional_sliding_window_mask, (WINDOW, WINDOW)),
        ],
    )
    def test_windows_ride_on_the_mask(self, config, create, window, padded):
        mask = ragged_batch(LENGTHS)[1] if padded else None
        handed = create(**arguments(config, mask))
        assert window_of(handed) == window
        assert handed.shape == (3, 20)
        assert masks_nothing(handed) is not padded
        if padded:
            assert torch.equal(handed, mask.bool())
        else:
            assert handed.untyped_storage().nbytes() == 1  # it is there for the window alone

    @pytest.mark.parametrize("pad", ["left", "right", None])
    def test_chunks_as_segments(self, pad):
        mask = ragged_batch(LENGTHS, pad)[1] if pad else torch.ones(3, 20, dtype=torch.long)
        handed = create_chunked_causal_mask(**arguments(chunked(8), mask if pad else None))
        assert handed.dtype == torch.int32
        for ids, tokens in zip(handed, mask.bool(), strict=True):
            assert ids[tokens].tolist() == [place // 8 for place in range(int(tokens.sum()))]
            assert not set(ids[: tokens.int().argmax()].tolist()) & set(ids[tokens].tolist())  # padding on the left

    def test_chunks_of_packed_rows(self):
        position_ids = torch.cat([torch.arange(9), torch.arange(11)]).expand(3, -1)
        given = arguments(chunked(8), None, position_ids=position_ids)
        handed = create_chunked_causal_mask(**given)
        assert handed.dtype == torch.int32 and are_chunks(handed) and are_chunks(handed.to("meta"))
        causal = torch.ones(20, 20, dtype=torch.bool).tril()
        matrix = create_chunked_causal_mask(**given | {"config": as_sdpa(chunked(8))})
        assert torch.equal(as_matrix(handed) & causal, matrix)

    def test_a_whole_chunk_is_no_mask(self):
        assert create_chunked_causal_mask(**arguments(chunked(20), None)) is None
        mask = ragged_batch(LENGTHS)[1]
        assert torch.equal(create_chunked_causal_mask(**arguments(chunked(20), mask)), mask.bool())

    def test_packed_rows_of_the_users(self, config):
        ids = torch.arange(20).expand(3, -1) // 6
        packed = masking_utils.packed_sequence_mask_function(ids)
        handed = create_causal_mask(**arguments(config, None, and_mask_function=packed))
        assert handed.dtype == torch.int32 and torch.equal(handed, ids.int())

    def test_makers_of_mask_functions_called_by_keyword(self, config):
        ids = torch.arange(20).expand(3, -1) // 6
        packed = masking_utils.packed_sequence_mask_function(packed_sequence_mask=ids)
        window = masking_utils.sliding_window_overlay(sliding_window=4)
        both = masking_utils.and_masks(packed, window)
        handed = create_causal_mask(**arguments(config, None, and_mask_function=both))
        assert torch.equal(handed, ids.int()) and window_of(handed) == (3, 0)

    def test_windows_of_packed_rows(self, config):
        position_ids = torch.cat([torch.arange(9), torch.arange(11)]).expand(3, -1)
        handed = create_sliding_window_causal_mask(**arguments(config, None, position_ids=position_ids))
        assert handed.dtype == torch.int32
        assert window_of(handed) == (WINDOW - 1, 0)

    def test_a_static_cache_is_longer_than_what_it_holds(self):
        config = tiny_config("llama")
        config._attn_implementation = "paged_flash"
        cache = StaticCache(config=config, max_cache_len=64)
        keys = torch.zeros(3, 2, 5, 16)
        handed = create_causal_mask(**arguments(config, None, columns=5, cache=cache))
        assert handed.tolist() == [[True] * 5] * 3
        for layer in range(3):
            cache.update(keys, keys, layer)
        handed = create_causal_mask(**arguments(config, None, columns=2, cache=cache))
        assert handed.shape == (3, 7) and bool(handed.all())
        padding = torch.ones(3, 7, dtype=torch.long)
        padding[1, :3] = 0
        handed = create_causal_mask(**arguments(config, padding, columns=2, cache=cache))
        assert torch.equal(handed, padding.bool())
        as_long_as_the_cache = torch.nn.functional.pad(padding, (0, 57))
        handed = create_causal_mask(**arguments(config, as_long_as_the_cache, columns=2, cache=cache))
        assert torch.equal(handed, padding.bool())

    def test_a_dynamic_sliding_cache_gets_the_columns_it_still_has(self, config):
        cache = DynamicCache(config=config)
        keys = torch.zeros(3, 2, 20, 16)
        for layer in range(3):
            cache.update(keys, keys, layer)
        mask = torch.cat([ragged_batch(LENGTHS)[1], torch.ones(3, 1, dtype=torch.long)], 1)
        handed = create_sliding_window_causal_mask(**arguments(config, mask, columns=1, cache=cache))
        assert torch.equal(handed, mask[:, -WINDOW:].bool())

    @pytest.mark.parametrize("padded", [False, True])
    def test_copies_keep_the_window(self, config, padded):
        mask = ragged_batch(LENGTHS)[1] if padded else None
        handed = create_sliding_window_causal_mask(**arguments(config, mask))
        for copy_of_it in (handed.to("meta"), handed.detach(), handed.clone(), handed.to(handed.device)):
            assert window_of(copy_of_it) == (WINDOW - 1, 0) and masks_nothing(copy_of_it) is not padded
        assert window_of(handed[:, 1:]) is window_of(~handed) is None

    def test_never_a_matrix(self, monkeypatch):
        """No tensor of S x S elements is made anywhere in a forward's masks."""
        model, seen = tiny_model(tiny_config("gemma3_text"), "paged_flash"), []

        class Watch(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                if isinstance(result, torch.Tensor):
                    seen.append(tuple(result.shape))
                return result

        input_ids, mask = ragged_batch([53, 31])
        original = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["paged_flash"]
        handed = []

        def watched(*args, **kwargs):
            with Watch():
                handed.append(original(*args, **kwargs))
            return handed[-1]

        monkeypatch.setitem(masking_utils.AttentionMaskInterface._global_mapping, "paged_flash", watched)
        with torch.no_grad():
            model(input_ids, attention_mask=mask, use_cache=False)
        assert len(handed) == 2 and seen
        assert max(torch.Size(shape).numel() for shape in seen) <= mask.numel()


class TestTheCache:
    def test_the_group_that_was_asked_gets_the_mask(self, config):
        first, second = PagedCache(config), PagedCache(config)
        _, mask = ragged_batch(LENGTHS)
        handed = create_causal_mask(**arguments(config, mask, cache=first))
        assert torch.equal(first.groups[0].pending_mask, mask.bool()) and torch.equal(handed, mask.bool())
        assert second.groups[0].pending_mask is None

    def test_both_masks_of_a_mixed_model_reach_it(self):
        config = tiny_config("gemma3_text")
        config._attn_implementation = "paged_flash"
        cache = PagedCache(config)
        _, mask = ragged_batch(LENGTHS)
        full = create_causal_mask(**arguments(config, mask, cache=cache))
        sliding = create_sliding_window_causal_mask(**arguments(config, mask, cache=cache))
        assert (window_of(full), window_of(sliding)) == (None, (WINDOW - 1, 0))
        assert torch.equal(cache.groups[0].pending_mask, mask.bool())

    def test_sizes_asked_for_in_vain_are_forgotten(self, config):
        cache = PagedCache(config)
        cache.get_mask_sizes(20, 0)
        assert paged_flash_mask(3, 19, 19, attention_mask=torch.ones(3, 19, dtype=torch.bool)) is None
        assert cache.groups[0].pending_mask is None
        assert paged_flash_mask(3, 20, 20, attention_mask=torch.ones(3, 20, dtype=torch.bool)) is None
        assert cache.groups[0].pending_mask is None

    def test_a_dropped_cache_is_not_waited_for(self, config):
        cache = PagedCache(config)
        cache.get_mask_sizes(20, 0)
        del cache
        assert paged_flash_mask(3, 20, 20) is None


def as_sdpa(config):
    """The configuration of a model whose masks transformers builds as matrices."""
    other = copy.deepcopy(config)
    other._attn_implementation = "sdpa"
    return other


class TestWhatBecomesAMatrix:
    """What lengths can't say is the matrix that transformers' own mask functions build for sdpa."""

    def check(self, create, config, mask, **more):
        matrix = create(**arguments(config, mask, **more))
        assert matrix.dtype == torch.bool and matrix.shape == (3, 1, 20, 20) and window_of(matrix) is None
        assert torch.equal(matrix, create(**arguments(as_sdpa(config), mask, **more)))

    @pytest.mark.parametrize("pad", ["left", "right", None])
    def test_blocks_that_see_each_other(self, config, pad):
        blocks = torch.full((3, 20), -1)
        blocks[:, 3:9] = 0
        mask = ragged_batch(LENGTHS, pad)[1] if pad else None
        self.check(create_causal_mask, config, mask, block_sequence_ids=blocks)

    @pytest.mark.parametrize("create", [create_causal_mask, create_sliding_window_causal_mask])
    @pytest.mark.parametrize("kind", ["or_mask_function", "and_mask_function"])
    def test_mask_functions_of_the_users(self, config, create, kind):
        def mine(batch_idx, head_idx, q_idx, kv_idx):
            return kv_idx % 2 == 0

        self.check(create, config, None, **{kind: mine})

    def test_a_function_that_only_looks_like_ours(self):
        def sliding_window_overlay(batch_idx, head_idx, q_idx, kv_idx):
            return q_idx == kv_idx

        matrix = paged_flash_mask(1, 4, 4, mask_function=sliding_window_overlay)
        assert torch.equal(matrix, torch.eye(4, dtype=torch.bool)[None, None])

    def test_packed_rows_with_padding_or_twice(self, config):
        packed = masking_utils.packed_sequence_mask_function(torch.arange(20).expand(3, -1) // 6)
        self.check(create_causal_mask, config, ragged_batch(LENGTHS)[1], and_mask_function=packed)
        position_ids = torch.cat([torch.arange(9), torch.arange(11)]).expand(3, -1)
        self.check(create_causal_mask, config, None, and_mask_function=packed, position_ids=position_ids)

    def test_packed_rows_that_come_back(self, config):
        packed = masking_utils.packed_sequence_mask_function(torch.arange(20).expand(3, -1) // 6 % 2)
        self.check(create_causal_mask, config, None, and_mask_function=packed)

    def test_windows_over_a_hole(self, config):
        mask = ragged_batch(LENGTHS)[1]
        mask[0, 5:8] = 0
        self.check(create_sliding_window_causal_mask, config, mask)
        self.check(create_bidirectional_sliding_window_mask, config, mask)

    def test_two_sided_windows_over_keys_of_another_length(self, config):
        given = arguments(config, None, encoder_hidden_states=torch.zeros(3, 31, 64))
        del given["past_key_values"]
        matrix = create_bidirectional_sliding_window_mask(**given)
        assert matrix.shape == (3, 1, 20, 31)
        assert torch.equal(matrix, create_bidirectional_sliding_window_mask(**given | {"config": as_sdpa(config)}))

    def test_chunks_over_a_hole(self):
        mask = ragged_batch(LENGTHS)[1]
        mask[0, 5:8] = 0
        self.check(create_chunked_causal_mask, chunked(8), mask)

    def test_gemma3_with_bidirectional_attention(self):
        config, input_ids = tiny_config("gemma3_text", use_bidirectional_attention=True), ragged_batch([15])[0]
        with torch.no_grad():
            ours, theirs = (tiny_model(config, name)(input_ids).logits for name in ("paged_flash", "eager"))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
    @pytest.mark.parametrize("cache", [None, DynamicCache, PagedCache])
    def test_a_matrix_of_the_users(self, dtype, cache):
        visible = torch.rand(1, 1, 9, 9, generator=torch.Generator().manual_seed(1)) < 0.5
        visible |= torch.eye(9, dtype=torch.bool)
        added = torch.zeros(1, 1, 9, 9).masked_fill_(~visible, torch.finfo(torch.float32).min)
        config, input_ids = tiny_config("llama"), ragged_batch([9])[0]
        past = None if cache is None else cache(config=config)
        with torch.no_grad():
            mask = visible if dtype == torch.bool else added
            out = tiny_model(config, "paged_flash")(
                input_ids, attention_mask=mask, past_key_values=past, use_cache=cache is not None
            )
            expected = tiny_model(config, "eager")(input_ids, attention_mask=added).logits
        torch.testing.assert_close(out.logits, expected, rtol=1e-4, atol=1e-4)
