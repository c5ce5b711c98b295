"""Gradients of the reference and of the kernels against autograd through a plain softmax in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_paged_flash.errors import UnsupportedFeatureError
from hf_paged_flash.ops import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, library
from hf_paged_flash.ops.reference import flash_forward as reference_forward
from hf_paged_flash.ops.reference_backward import flash_backward as reference_backward
from tests.ops.naive_gradients import FEATURES, Problem

RAGGED = ((37, 37), (1, 1), (33, 69), (0, 5), (5, 0), (36, 20))
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2e-3}


def kernel(name):
    pytest.importorskip("triton")
    if name == "flash_forward":
        from hf_paged_flash.kernels.flash_forward import flash_forward as launcher
    else:
        from hf_paged_flash.kernels.flash_backward import flash_backward as launcher
    if not torch.cuda.is_available():
        return launcher

    def on_gpu(*arguments, **options):
        def move(x):
            return x.cuda() if isinstance(x, torch.Tensor) else x

        results = launcher(*map(move, arguments), **{name: move(x) for name, x in options.items()})
        return tuple(None if x is None else x.cpu() for x in results)

    return on_gpu


@pytest.fixture(params=["reference", "kernel"])
def backward(request):
    return reference_backward if request.param == "reference" else kernel("flash_backward")


@pytest.fixture(params=["reference", "kernel"])
def forward(request):
    return reference_forward if request.param == "reference" else kernel("flash_forward")


def assert_close(actual, expected, dtype):
    for name, x, y in zip(("dq", "dk", "dv", "ds_aux", "dbias"), actual, expected, strict=True):
        assert (x is None) == (y is None), name
        if x is not None and y.numel():
            error = float((x.double() - y).abs().max()) / max(1.0, float(y.abs().max()))
            assert error <= TOLERANCE[dtype], f"{name}: {error}"


def check(backward, problem):
    out, lse, *expected = problem.expected()
    lse_dtype = torch.promote_types(problem.dtype, torch.float32)
    wants_bias = problem.bias_tensor is not None and problem.bias_tensor.dtype != torch.bool
    dlse = None if problem.dlse is None else problem.lse_layout(problem.dlse)
    actual = backward(
        *(problem.layout(problem.dout), dlse, *map(problem.layout, (problem.q, problem.k, problem.v))),
        problem.layout(out.to(problem.dtype)), problem.lse_layout(lse.to(lse_dtype)),
        bias_needs_grad=wants_bias, **problem.arguments(),
    )  # fmt: skip
    actual = [x.flatten(0, 1) if x is not None and x.dim() == 4 and i < 3 else x for i, x in enumerate(actual)]
    for x in actual:
        assert x is None or (x.is_contiguous() and torch.isfinite(x).all())
    assert_close(actual, expected, problem.dtype)
    return actual


SETS = [(), *((name,) for name in FEATURES), *itertools.combinations(FEATURES, 2), tuple(FEATURES)]


@pytest.mark.parametrize("features", SETS, ids=lambda names: "+".join(names) or "plain")
def test_features_alone_and_in_pairs(backward, features):
    options = {key: value for name in features for key, value in FEATURES[name].items()}
    check(backward, Problem(RAGGED, **options))


@pytest.mark.parametrize("features", SETS[::3], ids=lambda names: "+".join(names) or "plain")
def test_forward_has_the_features_that_backward_has(forward, features):
    options = {key: value for name in features for key, value in FEATURES[name].items()}
    problem = Problem(RAGGED, **options)
    out, lse = problem.expected()[:2]
    actual_out, actual_lse = forward(problem.q, problem.k, problem.v, **problem.arguments())
    torch.testing.assert_close(actual_out.double(), out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual_lse.double(), lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, v_head_dim",
    [(4, 4, 16, 16), (6, 1, 24, 40), (2, 2, 64, 32), (4, 2, 96, 96)],
    ids=["mha", "mqa-24-40", "64-32", "gqa-96"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_shapes(backward, heads, kv_heads, head_dim, v_head_dim, dtype):
    shape = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, v_head_dim=v_head_dim, dtype=dtype)
    check(backward, Problem(((40, 40), (17, 55)), causal=True, **shape))


@pytest.mark.parametrize("head_dim, v_head_dim", [(512, 512), (64, 320), (448, 64)], ids=str)
def test_wide_heads_run_forward(forward, head_dim, v_head_dim):
    problem = Problem(((17, 40),), heads=2, kv_heads=1, head_dim=head_dim, v_head_dim=v_head_dim, causal=True)
    out, lse = problem.expected()[:2]
    actual_out, actual_lse = forward(problem.q, problem.k, problem.v, **problem.arguments())
    torch.testing.assert_close(actual_out.double(), out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual_lse.double(), lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("features", [("causal",), ("window", "softcap"), ("bias", "dropout", "sinks", "dlse")])
@pytest.mark.parametrize("lengths", [((37, 37),) * 3, ((1, 63),) * 2, ((63, 1),) * 2, ((65, 20),)], ids=str)
def test_dense(backward, features, lengths):
    options = {key: value for name in features for key, value in FEATURES[name].items()}
    check(backward, Problem(lengths, packed=False, **options))


BIASES = list(itertools.product((1, "batch"), (1, "heads"), (1, "q"), (1, "k")))


@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_biases_of_every_broadcast(backward, shape):
    check(backward, Problem(((37, 45),) * 2, packed=False, bias=shape, causal=True))


@pytest.mark.parametrize("shape", BIASES[1::4], ids=str)
def test_boolean_masks(forward, backward, shape):
    problem = Problem(((37, 45),) * 2, packed=False, bias=shape, bias_dtype=torch.bool)
    out, lse = problem.expected()[:2]
    actual = forward(*map(problem.layout, (problem.q, problem.k, problem.v)), **problem.arguments())
    torch.testing.assert_close(actual[0].flatten(0, 1).double(), out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual[1].double(), problem.lse_layout(lse), rtol=1e-5, atol=1e-5)
    check(backward, problem)


@pytest.mark.parametrize("packed", [False, True])
def test_unused_keys_get_zero_and_may_be_nan(backward, packed):
    problem = Problem(((20, 45),) * 4, packed=packed, used=(45, 0, 13, -1), causal=True)
    for b, _, row_k in problem.rows():
        for x in (problem.k, problem.v):
            x[row_k.start + max(0, problem.used[b]) : row_k.stop] = float("nan")
    _, dk, dv, _, _ = check(backward, problem)
    for b, _, row_k in problem.rows():
        unused = slice(row_k.start + max(0, problem.used[b]), row_k.stop)
        assert not dk[unused].any() and not dv[unused].any()


@pytest.mark.parametrize("packed", [False, True])
def test_more_used_keys_than_there_are_count_as_all(backward, forward, packed):
    problem = Problem(((20, 45),) * 3, packed=packed, used=(46, 45, 5000), bias=(1, 1, "q", "k"))
    out = problem.expected()[0]
    actual, _ = forward(*map(problem.layout, (problem.q, problem.k, problem.v)), **problem.arguments())
    torch.testing.assert_close(actual.reshape(out.shape).double(), out, rtol=1e-5, atol=1e-5)
    check(backward, problem)


def test_rows_that_see_no_key_give_zero_gradients(backward):
    problem = Problem(((50, 20),), causal=True, sinks=True, with_dlse=True)
    dq = check(backward, problem)[0]
    assert not dq[:30].any() and dq[30:].any()


def test_tokens_outside_every_row_get_zero(backward):
    problem = Problem(((20, 20), (11, 11)), causal=True, sinks=True)
    out, lse, *expected = problem.expected()
    nan = float("nan")

    def longer(x, axis=0):
        shape = list(x.shape)
        shape[axis] = 5
        return torch.cat([x, torch.full(shape, nan)], axis)

    actual = backward(
        longer(problem.dout), None, longer(problem.q), longer(problem.k), longer(problem.v), longer(out.float()),
        longer(lse.float(), 1), **problem.arguments(),
    )  # fmt: skip
    for x in actual[:3]:
        assert not x[31:].any()
    assert_close([*(x[:31] for x in actual[:3]), *actual[3:]], expected, torch.float32)


def test_gradients_are_the_same_every_time(backward):
    problem = Problem(RAGGED, causal=True, sinks=True, bias=(1, "heads", "q", "k"), with_dlse=True)
    first, second = check(backward, problem), check(backward, problem)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_long_inputs_are_chunked(monkeypatch):
    from hf_paged_flash.ops import scoring

    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", 1)
    check(reference_backward, Problem(RAGGED, causal=True, window_left=20, softcap=2.0, bias=("batch", 1, "q", "k")))


@pytest.mark.parametrize("features", [(), *((name,) for name in FEATURES), tuple(FEATURES)], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(reference_backend, features, packed):
    options = {key: value for name in features if name != "dlse" for key, value in FEATURES[name].items()}
    lengths = ((5, 7), (3, 2)) if packed else ((5, 7),) * 2
    problem = Problem(lengths, dtype=torch.float64, head_dim=8, v_head_dim=4, packed=packed, **options)
    arguments = problem.arguments()
    inputs = [problem.layout(x).requires_grad_() for x in (problem.q, problem.k, problem.v)]
    if problem.s_aux is not None:
        inputs.append(problem.s_aux.double().requires_grad_())
    if problem.bias_tensor is not None:
        inputs.append(problem.bias_tensor.double().requires_grad_())

    def attention(q, k, v, *others):
        others = iter(others)
        s_aux = None if problem.s_aux is None else next(others)
        bias = None if problem.bias_tensor is None else next(others)
        out, lse = library.flash_forward(q, k, v, **arguments | {"s_aux": s_aux, "bias": bias})
        return out, torch.where(lse == -float("inf"), 0.0, lse)

    assert torch.autograd.gradcheck(attention, inputs)


@pytest.mark.parametrize("name", ["q", "k", "v", "s_aux"])
def test_public_functions_differentiate(reference_backend, name):
    problem = Problem(((9, 12), (4, 4)), causal=True, sinks=True)
    tensors = {"q": problem.q, "k": problem.k, "v": problem.v, "s_aux": problem.s_aux}
    tensors[name].requires_grad_()
    q, k, v, s_aux = tensors.values()
    options = {"causal": True, "s_aux": s_aux, "deterministic": True}
    out = flash_attn_varlen_func(q, k, v, problem.cu_q, problem.cu_k, 9, 12, **options)
    (gradient,) = torch.autograd.grad(out, tensors[name], problem.dout)
    _, _, *expected = problem.expected()
    torch.testing.assert_close(gradient.double(), expected[list(tensors).index(name)], rtol=1e-5, atol=1e-5)


def test_lse_has_gradients(reference_backend):
    q, k = torch.randn(1, 5, 2, 16, requires_grad=True), torch.randn(1, 7, 2, 16)
    _, lse, _ = flash_attn_func(q, k, k, return_attn_probs=True)
    (actual,) = torch.autograd.grad(lse.sum(), q)
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) / 4
    (expected,) = torch.autograd.grad(torch.logsumexp(scores, -1).sum(), q)
    torch.testing.assert_close(actual, expected)


def test_what_has_no_backward_is_refused_early(reference_backend):
    q, k = torch.randn(1, 3, 2, 16, requires_grad=True), torch.randn(1, 16, 2, 16)
    table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    used = torch.tensor([9], dtype=torch.int32)
    calls = [
        lambda: flash_attn_varlen_func(q[0], k, k, lengths, None, 3, 16, block_table=table, seqused_k=used),
        lambda: flash_attn_with_kvcache(q, k, k, cache_seqlens=used, block_table=table),
    ]
    for call in calls:
        with pytest.raises(UnsupportedFeatureError, match="no backward pass through paged keys"):
            call()
        with torch.no_grad():
            call()
    slopes = torch.ones(2, requires_grad=True)
    with pytest.raises(UnsupportedFeatureError, match="`alibi_slopes` gets no gradient"):
        flash_attn_func(q, k, k, alibi_slopes=slopes)


@pytest.mark.parametrize("op", ["flash_forward", "paged_decode"])
def test_backward_over_paged_keys_raises_when_it_is_reached(reference_backend, op):
    q, k = torch.randn(1, 3, 2, 16, requires_grad=True), torch.randn(1, 16, 2, 16)
    table, used = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([9], dtype=torch.int32)
    if op == "flash_forward":
        lengths = {"seqused_k": used, "max_seqlen_q": 3, "max_seqlen_k": 16}
        out = library.flash_forward(q, k, k, block_table=table, softmax_scale=0.25, causal=True, **lengths)[0]
    else:
        out = library.paged_decode_no_backward(
            q, k, k, cache_seqlens=used, block_table=table, softmax_scale=0.25, causal=True
        )[0]
    with pytest.raises(UnsupportedFeatureError, match="no backward pass through paged keys"):
        out.sum().backward()
