"""ops/reference.py against a naive fp64 softmax over explicit loops, every feature alone and combined."""

from __future__ import annotations

import math

import pytest
import torch

from hf_paged_flash.ops import reference, scoring
from hf_paged_flash.ops.reference import flash_forward, paged_decode, store_kv
from tests.ops.naive import cumulative, naive_row, paged

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}

FEATURES = {
    "full": {"causal": False},
    "causal": {"causal": True},
    "left": {"causal": False, "window_left": 5},
    "right": {"causal": False, "window_right": 3},
    "window": {"causal": False, "window_left": 4, "window_right": 2},
    "zero_window": {"causal": False, "window_left": 0, "window_right": 0},
    "sliding": {"causal": True, "window_left": 6},
    "softcap": {"causal": False, "softcap": 2.5},
    "sinks": {"causal": False, "sinks": True},
    "all": {"causal": True, "window_left": 9, "softcap": 1.5, "sinks": True},
}


def arguments(feature, heads, dim):
    settings = {"softmax_scale": dim**-0.5, **FEATURES[feature]}
    if settings.pop("sinks", False):
        settings["s_aux"] = torch.linspace(-2.0, 3.0, heads)
    return settings


def tensors(q_shape, k_shape, value_dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(math.prod(q_shape) + math.prod(k_shape))
    shapes = q_shape, k_shape, (*k_shape[:-1], value_dim)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def assert_close(actual, expected, dtype=torch.float32):
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(
    "seqlen_q, seqlen_k, heads, kv_heads, dim, value_dim",
    [
        pytest.param(17, 17, 4, 4, 16, 16, id="17x17-mha"),
        pytest.param(13, 37, 4, 2, 24, 24, id="13x37-gqa"),
        pytest.param(37, 13, 6, 1, 8, 40, id="37x13-mqa-value40"),
        pytest.param(1, 1, 2, 1, 16, 16, id="1x1"),
    ],
)
def test_dense(feature, seqlen_q, seqlen_k, heads, kv_heads, dim, value_dim):
    q, k, v = tensors((2, seqlen_q, heads, dim), (2, seqlen_k, kv_heads, dim), value_dim)
    settings = arguments(feature, heads, dim)
    out, lse = flash_forward(q, k, v, max_seqlen_q=seqlen_q, max_seqlen_k=seqlen_k, **settings)
    assert out.shape == (2, seqlen_q, heads, value_dim) and out.is_contiguous()
    assert lse.shape == (2, heads, seqlen_q) and lse.is_contiguous() and lse.dtype == torch.float32
    for b in range(2):
        expected_out, expected_lse = naive_row(q[b], k[b], v[b], **settings)
        assert_close(out[b], expected_out)
        assert_close(lse[b], expected_lse)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dtypes(dtype):
    q, k, v = tensors((2, 9, 4, 16), (2, 21, 2, 16), 16, dtype)
    settings = arguments("all", 4, 16)
    out, lse = flash_forward(q, k, v, max_seqlen_q=9, max_seqlen_k=21, **settings)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for b in range(2):
        expected_out, expected_lse = naive_row(q[b], k[b], v[b], **settings)
        assert_close(out[b], expected_out, dtype)
        assert_close(lse[b], expected_lse, torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("padded", [True, False], ids=["one-batch", "row-by-row"])
def test_varlen(feature, padded, monkeypatch):
    # 0 queries, 0 keys, more queries than keys, one token
    q_lengths, k_lengths = [7, 0, 1, 5, 11, 3], [7, 4, 1, 0, 6, 33]
    heads, dim = 4, 16
    if not padded:
        monkeypatch.setattr(reference, "_one_batch", lambda *_: False)
    q, k, v = tensors((sum(q_lengths), heads, dim), (sum(k_lengths), 2, dim), 24)
    settings = arguments(feature, heads, dim)
    cu_q, cu_k = cumulative(q_lengths), cumulative(k_lengths)
    bounds = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 11, "max_seqlen_k": 33}
    out, lse = flash_forward(q, k, v, **bounds, **settings)
    assert out.shape == (sum(q_lengths), heads, 24) and lse.shape == (heads, sum(q_lengths))
    assert out.is_contiguous() and lse.is_contiguous()
    for b in range(len(q_lengths)):
        row_q, row_k = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        expected_out, expected_lse = naive_row(q[row_q], k[row_k], v[row_k], **settings)
        assert_close(out[row_q], expected_out)
        assert_close(lse[:, row_q], expected_lse)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_seqused_k_limits_the_keys(feature, layout):
    room, used = 19, [19, 0, 1, 12, -1]
    lengths = [max(0, n) for n in used]
    rows, heads, dim = len(used), 4, 16
    q, k, v = tensors((rows, 6, heads, dim), (rows, room, 2, dim), 16)
    for b, length in enumerate(lengths):
        k[b, length:] = v[b, length:] = math.nan
    settings = arguments(feature, heads, dim)
    seqused_k = torch.tensor(used, dtype=torch.int32)
    bounds = {"max_seqlen_q": 6, "max_seqlen_k": room}
    if layout == "dense":
        out, lse = flash_forward(q, k, v, seqused_k=seqused_k, **bounds, **settings)
    else:
        cu_q, cu_k = cumulative([6] * rows), cumulative([room] * rows)
        out, lse = flash_forward(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
            seqused_k=seqused_k, **bounds, **settings,
        )  # fmt: skip
        out, lse = out.unflatten(0, (rows, 6)), lse.unflatten(1, (rows, 6)).transpose(0, 1)
    for b, length in enumerate(lengths):
        expected_out, expected_lse = naive_row(q[b], k[b, :length], v[b, :length], **settings)
        assert_close(out[b], expected_out)
        assert_close(lse[b], expected_lse)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("lengths_from", ["seqused_k", "cu_seqlens_k"])
def test_paged_varlen(feature, block_size, lengths_from):
    q_lengths, k_lengths = [7, 0, 1, 5, 9], [39, 4, 1, 0, 16]
    heads, dim = 4, 16
    q, _, _ = tensors((sum(q_lengths), heads, dim), (1, 1, 1, dim), dim)
    _, k, v = tensors((1, 1, 1, dim), (len(k_lengths), max(k_lengths), 2, dim), 24)
    k_cache, v_cache, table = paged(k, v, k_lengths, block_size)
    settings = arguments(feature, heads, dim)
    lengths = {
        "seqused_k": {"seqused_k": torch.tensor(k_lengths, dtype=torch.int32)},
        "cu_seqlens_k": {"cu_seqlens_k": cumulative(k_lengths)},
    }[lengths_from]
    cu_q = cumulative(q_lengths)
    out, lse = flash_forward(
        q, k_cache, v_cache, cu_seqlens_q=cu_q, block_table=table, max_seqlen_q=9, max_seqlen_k=39, **lengths,
        **settings,
    )  # fmt: skip
    for b, length in enumerate(k_lengths):
        row = slice(cu_q[b], cu_q[b + 1])
        expected_out, expected_lse = naive_row(q[row], k[b, :length], v[b, :length], **settings)
        assert_close(out[row], expected_out)
        assert_close(lse[:, row], expected_lse)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("layout", ["paged", "dense"])
@pytest.mark.parametrize("batched", [True, False], ids=["one-batch", "row-by-row"])
def test_paged_decode(feature, seqlen_q, layout, batched, monkeypatch):
    used = [1, 40, -1, 16, 0, 17, 3]
    lengths = [max(0, n) for n in used]
    heads, dim = 6, 16
    if not batched:
        monkeypatch.setattr(reference, "_one_batch", lambda *_: False)
    q, k, v = tensors((len(used), seqlen_q, heads, dim), (len(used), 40, 2, dim), 8)
    settings = arguments(feature, heads, dim)
    k_cache, v_cache, table = paged(k, v, lengths, 16)
    if layout == "dense":
        k_cache, v_cache, table = k.clone(), v.clone(), None
        for b, length in enumerate(lengths):
            k_cache[b, length:] = v_cache[b, length:] = math.nan
    cache_seqlens = torch.tensor(used, dtype=torch.int32)
    out, lse = paged_decode(q, k_cache, v_cache, cache_seqlens=cache_seqlens, block_table=table, **settings)
    assert out.shape == (len(used), seqlen_q, heads, 8) and lse.shape == (len(used), heads, seqlen_q)
    for b, length in enumerate(lengths):
        expected_out, expected_lse = naive_row(q[b], k[b, :length], v[b, :length], **settings)
        assert_close(out[b], expected_out)
        assert_close(lse[b], expected_lse)


def test_blocks_left_of_the_window_may_be_gone():
    lengths = [70, 90]
    q, k, v = tensors((2, 2, 4, 16), (2, 90, 2, 16), 16)
    k_cache, v_cache, table = paged(k, v, lengths, 16)
    settings = {"softmax_scale": 0.25, "causal": True, "window_left": 20}
    for b, length in enumerate(lengths):
        gone = (length - 2 - 20) // 16
        k_cache[table[b, :gone].long()] = v_cache[table[b, :gone].long()] = math.nan
        table[b, :gone] = -1
    seqused_k = torch.tensor(lengths, dtype=torch.int32)
    out, lse = paged_decode(q, k_cache, v_cache, cache_seqlens=seqused_k, block_table=table, **settings)
    assert table.eq(-1).any(1).all()
    for b, length in enumerate(lengths):
        expected_out, expected_lse = naive_row(q[b], k[b, :length], v[b, :length], **settings)
        assert_close(out[b], expected_out)
        assert_close(lse[b], expected_lse)


@pytest.mark.parametrize("layout", ["dense", "packed", "paged"])
@pytest.mark.parametrize("padded", [True, False], ids=["one-batch", "row-by-row"])
def test_keys_left_of_every_window(layout, padded, monkeypatch):
    q_lengths, k_lengths = [2, 1, 3], [40, 51, 47]
    if not padded:
        monkeypatch.setattr(reference, "_one_batch", lambda *_: False)
    settings = {"softmax_scale": 0.25, "causal": True, "window_left": 6}
    q, k, v = tensors((6, 4, 16), (3, 51, 2, 16), 16)
    cu_q = cumulative(q_lengths)
    options = {"seqused_k": torch.tensor(k_lengths, dtype=torch.int32)}
    if layout == "dense":
        k_all, v_all = k, v
    elif layout == "packed":
        k_all, v_all = (torch.cat([x[b, :n] for b, n in enumerate(k_lengths)]) for x in (k, v))
        options = {"cu_seqlens_k": cumulative(k_lengths)}
    else:
        k_all, v_all, options["block_table"] = paged(k, v, k_lengths, 16)
    out, lse = flash_forward(
        q, k_all, v_all, cu_seqlens_q=cu_q, max_seqlen_q=3, max_seqlen_k=51, **options, **settings
    )
    for b, length in enumerate(k_lengths):
        row = slice(cu_q[b], cu_q[b + 1])
        expected_out, expected_lse = naive_row(q[row], k[b, :length], v[b, :length], **settings)
        assert_close(out[row], expected_out)
        assert_close(lse[:, row], expected_lse)


@pytest.mark.parametrize("feature", FEATURES)
def test_chunks_of_queries_change_nothing(feature, monkeypatch):
    q, k, v = tensors((2, 51, 4, 16), (2, 67, 2, 16), 16)
    settings = {"max_seqlen_q": 51, "max_seqlen_k": 67, **arguments(feature, 4, 16)}
    whole_out, whole_lse = flash_forward(q, k, v, **settings)
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(scoring, "MIN_CHUNK", 8)
    out, lse = flash_forward(q, k, v, **settings)
    assert_close(out, whole_out.double())
    assert_close(lse, whole_lse.double())


@pytest.mark.parametrize("s_aux", [None, torch.tensor([1.0, -1.0])], ids=["no-sink", "sink"])
def test_no_visible_key_gives_zero_and_minus_infinity(s_aux):
    q, k, v = tensors((1, 5, 2, 16), (1, 2, 2, 16), 16)
    out, lse = flash_forward(q, k, v, max_seqlen_q=5, max_seqlen_k=2, softmax_scale=1.0, causal=True, s_aux=s_aux)
    assert (out[:, :3] == 0).all() and (lse[:, :, :3] == -math.inf).all()
    assert (out[:, 3:] != 0).all() and lse[:, :, 3:].isfinite().all()


def test_a_sink_far_above_the_scores_neither_overflows_nor_hides_its_lse():
    q, k, v = tensors((1, 3, 2, 16), (1, 5, 2, 16), 16)
    settings = {"softmax_scale": 0.25, "causal": False, "s_aux": torch.tensor([500.0, -500.0])}
    out, lse = flash_forward(q, k, v, max_seqlen_q=3, max_seqlen_k=5, **settings)
    expected_out, expected_lse = naive_row(q[0], k[0], v[0], **settings)
    assert_close(out[0], expected_out)
    assert_close(lse[0], expected_lse)


def test_empty_inputs():
    settings = {"softmax_scale": 1.0, "causal": True}
    q, k, v = tensors((0, 5, 2, 16), (0, 2, 2, 16), 16)
    out, lse = flash_forward(q, k, v, max_seqlen_q=5, max_seqlen_k=2, **settings)
    assert out.shape == (0, 5, 2, 16) and lse.shape == (0, 2, 5)
    q, k, v = tensors((0, 2, 16), (3, 2, 16), 16)
    bounds = {"cu_seqlens_q": cumulative([0, 0]), "cu_seqlens_k": cumulative([1, 2])}
    out, lse = flash_forward(q, k, v, **bounds, max_seqlen_q=0, max_seqlen_k=2, **settings)
    assert out.shape == (0, 2, 16) and lse.shape == (2, 0)


def test_transposed_views_are_read_by_their_strides():
    q, k, v = (x.transpose(1, 2) for x in tensors((2, 4, 9, 16), (2, 2, 21, 16), 16))
    out, _ = flash_forward(q, k, v, max_seqlen_q=9, max_seqlen_k=21, softmax_scale=0.25, causal=True)
    expected, _ = naive_row(q[1], k[1], v[1], softmax_scale=0.25, causal=True)
    assert_close(out[1], expected)
    assert out.is_contiguous()


def test_autocast_does_not_lower_the_precision():
    q, k, v = tensors((1, 9, 2, 16), (1, 9, 2, 16), 16)
    settings = {"max_seqlen_q": 9, "max_seqlen_k": 9, "softmax_scale": 0.25, "causal": True}
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = flash_forward(q, k, v, **settings)
    assert torch.equal(out, flash_forward(q, k, v, **settings)[0])


def test_inputs_are_left_as_they_were():
    q, k, v = tensors((2, 3, 2, 16), (2, 8, 2, 16), 16)
    v[:, 5:] = math.nan
    copies = q.clone(), k.clone(), v.clone()
    used = torch.tensor([5, 2], dtype=torch.int32)
    paged_decode(q, k, v, cache_seqlens=used, softmax_scale=1.0, causal=True, softcap=1.0)
    for tensor, copy in zip((q, k, v), copies, strict=True):
        assert torch.equal(tensor.nan_to_num(7.0), copy.nan_to_num(7.0))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "dense"])
def test_store_kv(packed):
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(2, 3, 5, 16, generator=generator).transpose(1, 2)
    v = torch.randn(2, 5, 3, 24, generator=generator)
    pool = torch.full((4, 16, 3, 40), math.nan)
    # K and V of one buffer: offset views with the strides of the whole
    k_cache, v_cache = pool[..., :16], pool[..., 16:]
    slots = torch.randperm(64, generator=generator)[:10]
    slots[[0, 7]] = -1
    if packed:
        store_kv(k.reshape(10, 3, 16), v.reshape(10, 3, 24), k_cache, v_cache, slots)
    else:
        store_kv(k, v, k_cache, v_cache, slots)
    stored = slots[slots >= 0]
    for cache, new in ((k_cache, k), (v_cache, v)):
        flat = cache.reshape(64, 3, -1)
        assert torch.equal(flat[stored], new.reshape(10, 3, -1)[slots >= 0])
        untouched = torch.ones(64, dtype=torch.bool)
        untouched[stored] = False
        assert flat[untouched].isnan().all()
