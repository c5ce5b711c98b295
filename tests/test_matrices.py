"""What layers add to a mask of queries by keys, against attention written out."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_paged_flash import UnsupportedFeatureError
from hf_paged_flash.attention import paged_flash_attention_forward
from hf_paged_flash.matrices import select_keys

B, H, HK, Q, K, D = 2, 4, 2, 5, 9, 16


def layer(block_size=4):
    module = nn.Module().eval()
    module.indexer = SimpleNamespace(block_size=block_size)
    return module


def tensors():
    return torch.randn(B, H, Q, D), torch.randn(B, HK, K, D), torch.randn(B, HK, K, D)


def naive(query, key, value, scores_plus, sinks=None):
    """softmax(QK^T / sqrt(D) + scores_plus) V in fp64, with one more column of `sinks` whose value is 0."""
    query, key, value = (x.double() for x in (query, *(x.repeat_interleave(H // HK, 1) for x in (key, value))))
    scores = query @ key.mT * D**-0.5 + scores_plus
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().expand(B, H, Q, 1)], -1)
    return (scores.softmax(-1)[..., :K] @ value).transpose(1, 2)


def causal(dtype=torch.bool):
    visible = torch.ones(Q, K, dtype=torch.bool).tril(K - Q).expand(B, 1, Q, K)
    return visible if dtype == torch.bool else torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(dtype).min)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("kind", ["indices", "block_indices"])
def test_selected_keys_alone_are_seen(kind, dtype):
    query, key, value = tensors()
    chosen = {
        # -1: fewer than there is room for; the row's own key is always among them
        "indices": torch.stack([torch.arange(Q) + K - Q, torch.randint(0, 4, (Q,)), torch.full((Q,), -1)], -1).expand(
            B, Q, 3
        ),
        "block_indices": torch.tensor([[0, -1], [1, 2]])[None, :, None].expand(B, 2, Q, 2),
    }[kind]
    visible = torch.zeros(B, H, Q, K, dtype=torch.bool)
    for b in range(B):
        for h in range(H):
            for q in range(Q):
                if kind == "indices":
                    seen = [i for i in chosen[b, q].tolist() if i >= 0]
                else:
                    blocks = chosen[b, h // 2, q].tolist()
                    seen = [i for i in range(K) if i // 4 in blocks]
                visible[b, h, q, seen] = True
    visible &= causal()
    assert visible.any(-1).all() and not torch.equal(visible, causal().expand_as(visible))
    out, _ = paged_flash_attention_forward(layer(), query, key, value, causal(dtype), **{kind: chosen})
    expected = naive(query, key, value, torch.zeros(visible.shape).masked_fill(~visible, float("-inf")))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


def test_a_row_that_sees_nothing_is_the_mean_of_what_it_selects():
    """Under eager's matrix a padded query sees all keys alike; an indexer may look at what comes of it."""
    query, key, value = tensors()
    mask = torch.full((B, 1, Q, K), torch.finfo(torch.float32).min)
    out, _ = paged_flash_attention_forward(
        layer(), query, key, value, mask, indices=torch.zeros(B, Q, 1, dtype=torch.int32)
    )
    mean = value.mean(2, keepdim=True).repeat_interleave(H // HK, 1).expand(B, H, Q, D)
    torch.testing.assert_close(out, mean.transpose(1, 2), rtol=0, atol=1e-5)


def test_nothing_selected_changes_nothing():
    mask = causal()
    assert select_keys(layer(), mask, K, H, None, None) is mask
    assert select_keys(layer(), None, K, H, None, None) is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
def test_a_sink_for_each_query(biased, dtype):
    query, key, value = tensors()
    sinks = torch.randn(B, H, Q, 1)
    bias = torch.randn(1, H, Q, K) if biased else None
    out, _ = paged_flash_attention_forward(layer(), query, key, value, causal(dtype), position_bias=bias, sinks=sinks)
    plus = torch.zeros(B, 1, Q, K).masked_fill(~causal(), float("-inf")) + (0 if bias is None else bias)
    torch.testing.assert_close(out.double(), naive(query, key, value, plus, sinks), rtol=0, atol=1e-5)
    without, _ = paged_flash_attention_forward(layer(), query, key, value, causal(dtype), position_bias=bias)
    assert (out - without).abs().max() > 0.1


@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks"])
def test_without_a_matrix_they_are_refused(name):
    query, key, value = tensors()
    given = torch.zeros(B, 1, Q, 1, dtype=torch.float32 if name == "sinks" else torch.int64)
    with pytest.raises(UnsupportedFeatureError, match=f"Module passes `{name}`.*mask of queries by keys"):
        paged_flash_attention_forward(layer(), query, key, value, None, **{name: given})
