"""The public functions of ops/flash_attn.py: flash-attn's semantics, on the reference and through the kernels."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch.utils._pytree import tree_map_only

from hf_paged_flash import backend
from hf_paged_flash.ops import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from tests.ops.naive import cumulative, naive_row, paged

TOLERANCE = 5e-6

FEATURES = {
    "causal": {"causal": True},
    "window": {"window_size": (5, 2)},
    "all": {"causal": True, "window_size": (9, -1), "softcap": 1.5, "s_aux": torch.tensor([-1.0, 0.0, 1.0, 2.0])},
}


@pytest.fixture(params=["reference", "triton"])
def call(request):
    """Calls a public function on one of the backends; "triton" is Triton's interpreter where there is no GPU."""
    if request.param == "triton":
        pytest.importorskip("triton")
    before = backend.backend()
    backend.configure(backend=request.param)
    backend.reset_counters()
    yield _call_on_gpu if request.param == "triton" and torch.cuda.is_available() else _call
    backend.configure(backend=before)
    unused = {"reference": "kernel", "triton": "reference"}[request.param]
    assert getattr(backend.counters(), unused) == {}


def _call(function, *arguments, **options):
    return function(*arguments, **options)


def _call_on_gpu(function, *arguments, **options):
    moved, moved_options = tree_map_only(torch.Tensor, lambda x: x.cuda(), (arguments, options))
    result = function(*moved, **moved_options)
    for tensor, after in zip(arguments, moved, strict=True):
        if isinstance(tensor, torch.Tensor):
            tensor.copy_(after)
    return tree_map_only(torch.Tensor, lambda x: x.cpu(), result)


def expected_row(q, k, v, *, softmax_scale=None, window_size=(-1, -1), causal=False, **options):
    """`naive_row` with the options of the public functions."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    left, right = window_size
    return naive_row(q, k, v, softmax_scale=scale, causal=causal, window_left=left, window_right=right, **options)


def assert_close(actual, expected):
    torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def drawing(text):
    return torch.tensor([[int(x) for x in line.split()] for line in text.strip().splitlines()], dtype=torch.bool)


DRAWINGS = {
    "2x5 causal": ({"causal": True}, "1 1 1 1 0\n1 1 1 1 1"),
    "5x2 causal": ({"causal": True}, "0 0\n0 0\n0 0\n1 0\n1 1"),
    "3x5 window 1 0": ({"window_size": (1, 0)}, "0 1 1 0 0\n0 0 1 1 0\n0 0 0 1 1"),
    "3x5 window 1 1": ({"window_size": (1, 1)}, "0 1 1 1 0\n0 0 1 1 1\n0 0 0 1 1"),
    "3x5 causal window 1 9": ({"causal": True, "window_size": (1, 9)}, "0 1 1 0 0\n0 0 1 1 0\n0 0 0 1 1"),
    "3x5 right 0": ({"window_size": (-1, 0)}, "1 1 1 0 0\n1 1 1 1 0\n1 1 1 1 1"),
}


@pytest.mark.parametrize("name", DRAWINGS)
@pytest.mark.parametrize("function", ["func", "varlen", "kvcache"])
def test_masks_as_drawn(call, name, function):
    options, text = DRAWINGS[name]
    visible = drawing(text)
    seqlen_q, seqlen_k = visible.shape
    # Equal scores and one-hot values: the output is visible / count.
    q = torch.zeros(1, seqlen_q, 1, 16)
    k = torch.randn(1, seqlen_k, 1, 16)
    v = torch.eye(16)[None, :seqlen_k, None]
    if function == "func":
        out = call(flash_attn_func, q, k, v, **options)[0]
    elif function == "kvcache":
        out = call(flash_attn_with_kvcache, q, k, v, cache_seqlens=int32(seqlen_k), **options)[0]
    else:
        bounds = cumulative([seqlen_q]), cumulative([seqlen_k]), seqlen_q, seqlen_k
        out = call(flash_attn_varlen_func, q[0], k[0], v[0], *bounds, **options)
    expected = visible / visible.sum(1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(out[:, 0, :seqlen_k], expected)
    assert (out[:, 0, seqlen_k:] == 0).all()


@pytest.mark.parametrize("feature", FEATURES)
def test_func(call, feature):
    q, k, v = torch.randn(2, 9, 4, 16), torch.randn(2, 21, 2, 16), torch.randn(2, 21, 2, 24)
    out, lse, probabilities = call(flash_attn_func, q, k, v, return_attn_probs=True, **FEATURES[feature])
    assert probabilities is None
    assert torch.equal(out, call(flash_attn_func, q, k, v, **FEATURES[feature]))
    for b in range(2):
        expected_out, expected_lse = expected_row(q[b], k[b], v[b], **FEATURES[feature])
        assert_close(out[b], expected_out)
        assert_close(lse[b], expected_lse)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("keys", ["packed", "packed+seqused_k", "paged", "paged+seqused_k"])
def test_varlen(call, feature, keys):
    q_lengths, k_lengths = [7, 1, 5], [7, 19, 2]
    used = [5, 19, 0] if "seqused_k" in keys else k_lengths
    q = torch.randn(sum(q_lengths), 4, 16)
    k, v = torch.randn(3, 19, 2, 16), torch.randn(3, 19, 2, 24)
    cu_q, cu_k, table = cumulative(q_lengths), cumulative(k_lengths), None
    seqused_k = int32(*used) if "seqused_k" in keys else None
    if "paged" in keys:
        k_all, v_all, table = paged(k, v, used, 16)
        cu_k = None if seqused_k is not None else cu_k
    else:
        k_all, v_all = (torch.cat([x[b, :n] for b, n in enumerate(k_lengths)]) for x in (k, v))
    out, lse, _ = call(flash_attn_varlen_func,
        q, k_all, v_all, cu_q, cu_k, 7, 19, return_attn_probs=True, block_table=table, seqused_k=seqused_k,
        softmax_scale=0.3, **FEATURES[feature],
    )  # fmt: skip
    for b, length in enumerate(used):
        row = slice(cu_q[b], cu_q[b + 1])
        expected = expected_row(q[row], k[b, :length], v[b, :length], softmax_scale=0.3, **FEATURES[feature])
        assert_close(out[row], expected[0])
        assert_close(lse[:, row], expected[1])


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("layout", ["paged", "dense"])
@pytest.mark.parametrize("new", [1, 3, 17])
def test_kvcache_appends_in_place(call, feature, layout, new):
    before = [0, 15, 30, 1]
    after = [n + new for n in before]
    q = torch.randn(4, new, 4, 16)
    k_full, v_full = torch.randn(4, 47, 2, 16), torch.randn(4, 47, 2, 24)
    k_cache, v_cache, table = paged(k_full, v_full, after, 16)
    if layout == "dense":
        k_cache, v_cache, table = k_full.clone(), v_full.clone(), None
    # What is to be appended is not there yet.
    for cache in (k_cache, v_cache):
        for b in range(4):
            for position in range(before[b], after[b]):
                block, offset = (b, position) if table is None else (int(table[b, position // 16]), position % 16)
                cache[block, offset] = math.nan
        if table is None:
            for b in range(4):
                cache[b, after[b] :] = math.nan
    kept = k_cache.clone(), v_cache.clone()
    k, v = (torch.stack([x[b, before[b] : after[b]] for b in range(4)]) for x in (k_full, v_full))
    cache_seqlens = int32(*before)
    out, lse = call(flash_attn_with_kvcache,
        q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, block_table=table, return_softmax_lse=True,
        **FEATURES[feature],
    )  # fmt: skip
    assert cache_seqlens.tolist() == before
    for b, length in enumerate(after):
        expected_out, expected_lse = expected_row(q[b], k_full[b, :length], v_full[b, :length], **FEATURES[feature])
        assert_close(out[b], expected_out)
        assert_close(lse[b], expected_lse)
    for cache, old, tokens in ((k_cache, kept[0], k), (v_cache, kept[1], v)):
        written = cache.isnan() != old.isnan()
        assert int(written.sum()) == tokens.numel()
        assert torch.equal(cache[~written].nan_to_num(7.0), old[~written].nan_to_num(7.0))
    counts = backend.counters()
    attention = "paged_decode" if new <= 16 else "flash_forward"
    assert {**counts.kernel, **counts.reference} == {"store_kv": 1, attention: 1}


def test_kvcache_with_an_int_length(call):
    q, k, v = torch.randn(2, 1, 4, 16), torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2, 16)
    caches = torch.randn(2, 24, 2, 16), torch.randn(2, 24, 2, 16)
    as_int, as_tensor = [x.clone() for x in caches], [x.clone() for x in caches]
    out = call(flash_attn_with_kvcache, q, *as_int, k, v, cache_seqlens=11)
    assert torch.equal(out, call(flash_attn_with_kvcache, q, *as_tensor, k, v, cache_seqlens=int32(11, 11)))
    for cache, other, old, tokens in zip(as_int, as_tensor, caches, (k, v), strict=True):
        assert torch.equal(cache, other)
        assert torch.equal(cache[:, 11:12], tokens)
        assert torch.equal(cache[:, 12:], old[:, 12:]) and torch.equal(cache[:, :11], old[:, :11])


def test_kvcache_without_lengths_uses_the_whole_cache(call):
    q, k_cache, v_cache = torch.randn(2, 1, 4, 16), torch.randn(2, 24, 2, 16), torch.randn(2, 24, 2, 16)
    out = call(flash_attn_with_kvcache, q, k_cache, v_cache)
    for b in range(2):
        assert_close(out[b], expected_row(q[b], k_cache[b], v_cache[b])[0])


@pytest.mark.parametrize("new", [1, 3])
def test_kvcache_row_without_a_sequence(call, new):
    """transformers pads its graph batches with length -1 and a table of -1."""
    k_full, v_full = torch.randn(2, 20, 2, 16), torch.randn(2, 20, 2, 16)
    k_cache, v_cache, table = paged(k_full, v_full, [20, 0], 16)
    pool = k_cache.clone(), v_cache.clone()
    q, k, v = torch.randn(2, new, 4, 16), k_full[:, 20 - new :], v_full[:, 20 - new :]
    out, lse = call(flash_attn_with_kvcache,
        q, k_cache, v_cache, k, v, cache_seqlens=int32(20 - new, -1), block_table=table, causal=True,
        return_softmax_lse=True,
    )  # fmt: skip
    assert_close(out[0], expected_row(q[0], k_full[0], v_full[0], causal=True)[0])
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all()
    for cache, old in zip((k_cache, v_cache), pool, strict=True):
        assert torch.equal(cache.nan_to_num(7.0), old.nan_to_num(7.0))


def test_strided_inputs(call):
    q, k, v = (torch.randn(2, heads, 16, 9).transpose(2, 3).transpose(1, 2) for heads in (4, 2, 2))
    assert q.stride(-1) != 1
    out = call(flash_attn_func, q, k, v, causal=True)
    torch.testing.assert_close(out, call(flash_attn_func, q.contiguous(), k.contiguous(), v.contiguous(), causal=True))
    # K and V of one buffer, as transformers' own paged cache has them
    pool = torch.randn(2, 3, 16, 2, 16)
    arguments = {"cache_seqlens": int32(17, 9), "block_table": int32(2, 0, 1, -1).view(2, 2)}
    out = call(flash_attn_with_kvcache, q[:, :1], pool[0], pool[1], **arguments)
    copies = pool[0].clone(), pool[1].clone()
    assert torch.equal(out, call(flash_attn_with_kvcache, q[:, :1].contiguous(), *copies, **arguments))


@pytest.mark.parametrize(
    "function, names",
    [
        (
            flash_attn_func,
            "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs",
        ),
        (
            flash_attn_varlen_func,
            "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal window_size "
            "softcap alibi_slopes deterministic return_attn_probs block_table",
        ),
        (
            flash_attn_with_kvcache,
            "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad block_table "
            "softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits return_softmax_lse",
        ),
    ],
    ids=["func", "varlen", "kvcache"],
)
def test_argument_order_is_that_of_flash_attn(function, names):
    parameters = inspect.signature(function).parameters.values()
    assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == names.split()
