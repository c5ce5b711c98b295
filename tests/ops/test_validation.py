"""What the public functions refuse, and how: the argument's name, what it must be, what it was, and the way out."""

from __future__ import annotations

import pytest
import torch

from hf_paged_flash import backend
from hf_paged_flash.errors import ArgumentError, BackendError, UnsupportedFeatureError
from hf_paged_flash.ops import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from hf_paged_flash.ops import validation as check


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


Q, K = torch.zeros(2, 3, 4, 16), torch.zeros(2, 5, 2, 16)
PACKED = torch.zeros(6, 4, 16), torch.zeros(10, 2, 16)
CACHE = torch.zeros(8, 16, 2, 16)
TABLE, LENGTHS = torch.arange(8, dtype=torch.int32).view(2, 4), int32(3, 5)
LATE = int32(12, 3)


pytestmark = pytest.mark.usefixtures("reference_backend")


def func(q=Q, k=K, v=K, **options):
    return flash_attn_func(q, k, v, **options)


def varlen(q=PACKED[0], k=PACKED[1], v=PACKED[1], cu_q=int32(0, 3, 6), cu_k=int32(0, 5, 10), **options):  # noqa: B008
    return flash_attn_varlen_func(q, k, v, cu_q, cu_k, 3, 5, **options)


def kvcache(q=Q, k_cache=CACHE, v_cache=CACHE, k=None, v=None, cache_seqlens=LENGTHS, block_table=TABLE, **options):
    return flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, block_table=block_table, **options
    )


BAD_ARGUMENTS = {
    "q dims": (func, {"q": Q[0]}, r"`q` must have shape \(batch, seqlen_q, num_heads, head_dim\), got \(3, 4, 16\)"),
    "q dtype": (func, {"q": Q.int()}, r"`q` must be bfloat16, .* got torch.int32"),
    "k dims": (func, {"k": K[0]}, r"`k` must have shape \(batch, seqlen_k, .*\), got \(5, 2, 16\)"),
    "v dtype": (func, {"v": K.half()}, r"`v` must have the dtype of `q`, torch.float32, got torch.float16"),
    "k device": (func, {"k": K.to("meta")}, r"`k` must be on the device of `q`, cpu, got meta"),
    "k head_dim": (func, {"k": K[..., :8]}, r"`k` must have the head_dim of `q`, 16, got 8"),
    "v seqlen": (func, {"v": K[:, :4]}, r"`v` must have the shape of `k` .*\(2, 5, 2\), got \(2, 4, 2\)"),
    "batch": (func, {"k": K[:1], "v": K[:1]}, r"`k` must have batch size 2, as `q`, got 1"),
    "heads": (func, {"q": Q[:, :, :3]}, r"`q` must have a number of heads .* num_kv_heads, 2, got 3"),
    "softcap": (func, {"softcap": -1.0}, r"`softcap` must be positive, or 0.0 for none, got -1.0"),
    "dropout_p": (func, {"dropout_p": 1.0}, r"`dropout_p` must be from 0 up to, but not including, 1, got 1.0"),
    "slopes": (func, {"alibi_slopes": torch.zeros(3)}, r"`alibi_slopes` must have .*\(4,\) or .*\(2, 4\), got \(3,\)"),
    "slopes dtype": (varlen, {"alibi_slopes": TABLE[0]}, r"`alibi_slopes` must be float32, got torch.int32"),
    "window": (func, {"window_size": (1, 2, 3)}, r"`window_size` must be \(left, right\), .* got \(1, 2, 3\)"),
    "s_aux shape": (func, {"s_aux": torch.zeros(2)}, r"`s_aux` must have shape \(num_heads,\) = \(4,\), got \(2,\)"),
    "s_aux dtype": (func, {"s_aux": int32(1, 2, 3, 4)}, r"`s_aux` must have a floating-point dtype, got torch.int32"),
    "packed q": (varlen, {"q": Q}, r"`q` must have shape \(total_q, num_heads, head_dim\), got \(2, 3, 4, 16\)"),
    "cu_seqlens_q": (varlen, {"cu_q": TABLE}, r"`cu_seqlens_q` must have shape \(batch \+ 1,\), got \(2, 4\)"),
    "cu dtype": (varlen, {"cu_q": torch.tensor([0, 3, 6])}, r"`cu_seqlens_q` must be int32, got torch.int64"),
    "cu_seqlens_k": (varlen, {"cu_k": int32(0, 5)}, r"`cu_seqlens_k` must have shape .* = \(3,\), got \(2,\)"),
    "no cu_seqlens_k": (varlen, {"cu_k": None}, r"`cu_seqlens_k` must be given unless both .*, got None"),
    "seqused_k": (varlen, {"seqused_k": int32(1)}, r"`seqused_k` must have shape \(batch,\) = \(2,\), got \(1,\)"),
    "unpaged k": (varlen, {"block_table": TABLE}, r"`k` must have shape \(num_blocks, .*, got \(10, 2, 16\)"),
    "table dims": (kvcache, {"block_table": LENGTHS}, r"`block_table` must have shape \(batch, max_b.* got \(2,\)"),
    "table rows": (kvcache, {"block_table": TABLE[:1]}, r"`block_table` .* with batch 2, got \(1, 4\)"),
    "table dtype": (kvcache, {"block_table": TABLE.long()}, r"`block_table` must be int32, got torch.int64"),
    "lengths": (kvcache, {"cache_seqlens": int32(3)}, r"`cache_seqlens` must have shape .* = \(2,\), got \(1,\)"),
    "int length": (kvcache, {"cache_seqlens": 65}, r"`cache_seqlens` must be from 0 to 64, .* got 65"),
    "long rows": (kvcache, {"cache_seqlens": int32(65, 3)}, r"`cache_seqlens` must be at most 64, .* got \[65, 3\]"),
    "k_cache stride": (kvcache, {"k_cache": CACHE.mT.contiguous().mT}, r"`k_cache` must have a contiguous last dim"),
    "k_cache dtype": (kvcache, {"k_cache": CACHE.half()}, r"`k_cache` must have the dtype of `q`"),
    "k alone": (kvcache, {"k": K}, r"`v` must be given together with `k`, got None"),
    "v alone": (kvcache, {"v": K}, r"`k` must be given together with `v`, got None"),
    "new heads": (kvcache, {"k": K[:, :, :1], "v": K}, r"`k` must have .* of `k_cache`, \(2, 16\), got \(1, 16\)"),
    "new lengths": (kvcache, {"k": K, "v": K[:, :4]}, r"`v` must have as many new tokens as `k`, 5, got 4"),
    "append to?": (kvcache, {"k": K, "v": K, "cache_seqlens": None}, r"`cache_seqlens` must be given when `k`"),
    "no room, int": (kvcache, {"k": K, "v": K, "cache_seqlens": 60}, r"`cache_seqlens` must leave room for 5 new"),
    "no block": (kvcache, {"k": K, "v": K, "cache_seqlens": int32(62, 3)}, r"`block_table` must name a block for 5"),
    "no room": (
        kvcache,
        {"k": K, "v": K, "k_cache": CACHE[:2], "v_cache": CACHE[:2], "block_table": None, "cache_seqlens": LATE},
        r"`k_cache` must have room for 5 new tokens of every row, got cache_seqlens \[12, 3\]",
    ),
    "dense batch": (kvcache, {"block_table": None}, r"`k_cache` must have batch size 2, as `q`, got 8"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_a_bad_argument_is_named(case):
    function, options, message = BAD_ARGUMENTS[case]
    with pytest.raises(ArgumentError, match=message):
        function(**options)
    assert backend.counters() == backend.Counters()


@pytest.mark.parametrize("function", [func, varlen, kvcache])
def test_the_calls_that_the_bad_arguments_break_are_good(function):
    function()


@pytest.mark.parametrize(
    "function, options",
    [
        (kvcache, {"alibi_slopes": torch.zeros(4)}),
        (kvcache, {"rotary_cos": torch.zeros(8, 8)}),
        (kvcache, {"rotary_sin": torch.zeros(8, 8)}),
        (kvcache, {"cache_batch_idx": int32(1, 0)}),
        (kvcache, {"cache_leftpad": int32(0, 1)}),
    ],
    ids=lambda x: x.__name__ if callable(x) else next(iter(x)),
)
def test_what_is_not_built_is_refused_by_name(function, options):
    with pytest.raises(UnsupportedFeatureError, match=f"`{next(iter(options))}`.* is not supported: "):
        function(**options)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda x: x.double(), ArgumentError, r"`q` must be bfloat16, float16 or float32 .*'reference' takes it"),
        (lambda x: x[..., :8], ArgumentError, r"`q` must have a head_dim from 16 to 512 in steps of 8 .* got 8"),
        (lambda x: x.repeat_interleave(33, -1), ArgumentError, r"`q` must have a head_dim .* got 528"),
    ],
    ids=["fp64", "head_dim 8", "head_dim 528"],
)
def test_what_the_kernels_do_not_take_runs_on_the_reference_only(change, error, message):
    pytest.importorskip("triton")
    func(change(Q), change(K), change(K))
    backend.configure(backend="triton")
    with pytest.raises(error, match=message):
        func(change(Q), change(K), change(K))


def test_a_head_dim_of_512_has_no_backward_kernel_and_says_so_early(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    wide = torch.zeros(1, 3, 2, 512)
    func(wide, wide, wide.requires_grad_())
    backend.configure(backend="triton")
    for q, v in ((wide, wide), (wide[..., :64], wide)):
        with pytest.raises(UnsupportedFeatureError, match="no backward kernel for a head_dim above 256"):
            func(q, q, v)
    with torch.no_grad():
        func(wide, wide, wide)


def test_block_sizes_of_the_kernels(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cache = torch.zeros(8, 24, 2, 16)
    kvcache(k_cache=cache, v_cache=cache)
    backend.configure(backend="triton")
    with pytest.raises(ArgumentError, match=r"`block_size` must be one of \(16, 32, 64, 128, 256\).*, got 24"):
        kvcache(k_cache=cache, v_cache=cache)


def test_bfloat16_is_refused_in_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backend.configure(backend="triton")
    with pytest.raises(BackendError, match="interpreter computes wrong results in bfloat16"):
        func(Q.bfloat16(), K.bfloat16(), K.bfloat16())


@pytest.mark.parametrize("packed", [False, True])
def test_more_rows_than_a_grid_has(packed):
    q = torch.empty(65536, *(() if packed else (1,)), 1, 16, dtype=torch.float16)
    bounds = torch.arange(65537, dtype=torch.int32) if packed else None
    check.check_kernel_limits(q[1:], q[1:], None, None if bounds is None else bounds[1:])
    with pytest.raises(ArgumentError, match="`cu_seqlens_q`" if packed else "`q`"):
        check.check_kernel_limits(q, q, None, bounds)


def test_windows_and_offsets_of_another_kind():
    q = torch.zeros(4, 2, 16)
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ArgumentError, match="`window_size` must be .left, right."):
        flash_attn_varlen_func(q, q, q, bounds, bounds, 4, 4, window_size=8)
    with pytest.raises(ArgumentError, match="`cu_seqlens_q` must be an int32 tensor"):
        flash_attn_varlen_func(q, q, q, [0, 4], bounds, 4, 4)


@pytest.mark.parametrize(
    ("cu_q", "cu_k", "longest", "message"),
    [
        ((0, 3, 8), (0, 3, 7), (5, 5), r"`cu_seqlens_q` must rise from 0 to at most 7, .* got \[0, 3, 8\]"),
        ((0, 3, 7), (0, 5, 3), (5, 5), r"`cu_seqlens_k` must rise from 0 to at most 7"),
        ((-1, 3, 7), (0, 3, 7), (5, 5), r"`cu_seqlens_q` must rise from 0"),
        ((0, 3, 7), (0, 3, 7), (3, 5), r"`max_seqlen_q` must be at least 4, the longest row of `cu_seqlens_q`, got 3"),
        ((0, 3, 7), (0, 3, 7), (5, 1), r"`max_seqlen_k` must be at least 4"),
    ],
)
def test_rows_outside_of_packed_tensors_are_refused(cu_q, cu_k, longest, message):
    q = torch.zeros(7, 2, 16)
    with pytest.raises(ArgumentError, match=message):
        flash_attn_varlen_func(q, q, q, int32(*cu_q), int32(*cu_k), *longest)
