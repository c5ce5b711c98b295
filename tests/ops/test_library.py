"""ops/library.py: the operators as torch sees them, their fakes, torch.compile, and autograd."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from hf_paged_flash.errors import UnsupportedFeatureError
from hf_paged_flash.ops import flash_attn_func, flash_attn_with_kvcache, library

Q, K = torch.zeros(2, 3, 4, 16), torch.zeros(2, 5, 2, 16)
PACKED = torch.zeros(6, 4, 16), torch.zeros(10, 2, 16)
CACHE = torch.zeros(8, 16, 2, 16)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


TABLE, LENGTHS = torch.arange(8, dtype=torch.int32).view(2, 4), int32(3, 5)
FORWARD = {"softmax_scale": 0.25, "causal": True}


pytestmark = pytest.mark.usefixtures("reference_backend")


def paged_calls(q, s_aux=None):
    options = dict(block_table=TABLE, s_aux=s_aux, **FORWARD)
    yield library.flash_forward(q, CACHE, CACHE, seqused_k=LENGTHS, max_seqlen_q=3, max_seqlen_k=64, **options)
    yield library.paged_decode_no_backward(q, CACHE, CACHE.clone(), cache_seqlens=LENGTHS, **options)


@pytest.mark.parametrize("sink", [False, True])
def test_paged_keys_run_forward_and_refuse_backward(sink):
    q, s_aux = torch.randn(2, 3, 4, 16, requires_grad=True), torch.zeros(4, requires_grad=True) if sink else None
    with torch.no_grad():
        expected = list(paged_calls(q, s_aux))
    assert not any(x.requires_grad for pair in expected for x in pair)
    for (out, lse), (expected_out, expected_lse) in zip(paged_calls(q, s_aux), expected, strict=True):
        assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)
        for result in (out, lse):
            with pytest.raises(UnsupportedFeatureError, match="no backward pass through paged keys"):
                result.sum().backward(retain_graph=True)
    assert q.grad is None


@pytest.mark.parametrize("dynamic", [False, True])
def test_paged_keys_compile_with_autograd_on(dynamic):
    q = torch.randn(2, 3, 4, 16, requires_grad=True)

    def model(q):
        return sum(out for out, _ in paged_calls(q * 2))

    out = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)(q)
    assert torch.equal(out, model(q))
    with pytest.raises(UnsupportedFeatureError, match="no backward pass through paged keys"):
        out.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_gradients_compile(dynamic):
    shapes = (2, 3, 4, 16), (2, 5, 2, 16), (2, 5, 2, 24)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def model(q, k, v):
        out, lse = library.flash_forward(q * 2, k, v, max_seqlen_q=q.shape[1], max_seqlen_k=k.shape[1], **FORWARD)
        return out.square().sum() + lse.sum()

    expected = torch.autograd.grad(model(*leaves), leaves)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


def test_second_derivatives_are_refused():
    q = torch.randn(1, 3, 2, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(flash_attn_func(q, q, q).square().sum(), q, create_graph=True)
    with pytest.raises(UnsupportedFeatureError, match="second derivatives.*'eager'"):
        gradient.sum().backward()


FORWARD_MODE = "forward-mode derivatives.*'eager'"


def dual(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda f, x: jvp(f, (x,), (x,)), FORWARD_MODE),
        (dual, FORWARD_MODE),
        (lambda f, x: grad(lambda x: f(x).sum())(x), "torch.func's transforms.*'eager'"),
    ],
    ids=["jvp", "forward_ad", "grad"],
)
def test_transforms_of_torch_func_are_refused(transform, message, grad_mode):
    x = torch.randn(1, 3, 2, 16)
    with torch.set_grad_enabled(grad_mode), pytest.raises(UnsupportedFeatureError, match=message):
        transform(lambda q: flash_attn_func(q, x, x), x)


def test_vmap_and_other_tensors_tangents_do_not_matter():
    x = torch.randn(2, 3, 2, 16)
    expected = torch.stack([flash_attn_func(q, x, x) for q in x[:, None].expand(2, 2, 3, 2, 16)])
    torch.testing.assert_close(vmap(lambda q: flash_attn_func(q, x, x))(x[:, None].expand(2, 2, 3, 2, 16)), expected)
    assert torch.equal(dual(lambda other: flash_attn_func(x, x, x), torch.ones(3)), flash_attn_func(x, x, x))


def test_store_kv_keeps_no_history_of_keys_that_require_grad():
    k_cache, v_cache = torch.zeros(2, 16, 2, 16), torch.zeros(2, 16, 2, 16)
    k = torch.randn(1, 2, 2, 16, requires_grad=True) * 2
    library.store_kv(k, k, k_cache, v_cache, torch.tensor([3, 20]))
    assert not k_cache.requires_grad and k_cache.grad_fn is None
    assert torch.equal(k_cache[0, 3], k[0, 0]) and torch.equal(v_cache[1, 4], k[0, 1])


OPERATOR_CALLS = {
    "dense": lambda: (library.flash_forward, (Q, K, K), {"max_seqlen_q": 3, "max_seqlen_k": 5, **FORWARD}),
    "dense fp64": lambda: (
        library.flash_forward,
        (Q.double(), K.double(), K.double()),
        {"max_seqlen_q": 3, "max_seqlen_k": 5, **FORWARD},
    ),
    "packed": lambda: (
        library.flash_forward,
        (PACKED[0], PACKED[1], PACKED[1][..., :8]),
        {"cu_seqlens_q": int32(0, 3, 6), "cu_seqlens_k": int32(0, 5, 10), "max_seqlen_q": 3, "max_seqlen_k": 5}
        | FORWARD,
    ),
    "decode": lambda: (
        library.paged_decode,
        (Q.transpose(1, 2).contiguous().transpose(1, 2), CACHE, CACHE),
        {"cache_seqlens": LENGTHS, "block_table": TABLE, "s_aux": torch.zeros(4), **FORWARD},
    ),
    "store": lambda: (library.store_kv, (K, K, CACHE.clone(), CACHE.clone(), torch.arange(10)), {}),
    "copy": lambda: (library.copy_blocks, ([CACHE.clone(), CACHE.clone()], torch.tensor([[0, 1]])), {}),
}


def leaves(*tensors):
    return tuple(torch.randn_like(x).requires_grad_() for x in tensors)


SEED = torch.tensor([7])
SEGMENTS = library.segment_offsets(int32(0, 0, 1, 1, 1, 2).view(2, 3))
OPERATOR_CALLS |= {
    "dense gradients": lambda: (
        library.flash_forward,
        leaves(Q, K, K[..., :8]),
        {"max_seqlen_q": 3, "max_seqlen_k": 5, "s_aux": leaves(torch.zeros(4))[0], **FORWARD},
    ),
    "packed gradients": lambda: (
        library.flash_forward,
        leaves(PACKED[0], PACKED[1], PACKED[1]),
        {"cu_seqlens_q": int32(0, 3, 6), "cu_seqlens_k": int32(0, 5, 10), "max_seqlen_q": 3, "max_seqlen_k": 5}
        | FORWARD,
    ),
    "bias and dropout gradients": lambda: (
        library.flash_forward,
        leaves(Q, K, K),
        {"bias": leaves(torch.zeros(1, 4, 3, 5))[0], "dropout_p": 0.2, "dropout_seed": SEED, "max_seqlen_q": 3}
        | {"alibi_slopes": torch.ones(1, 4), "max_seqlen_k": 5, **FORWARD},
    ),
    "deterministic gradients": lambda: (
        library.flash_forward,
        leaves(Q, K, K),
        {"max_seqlen_q": 3, "max_seqlen_k": 5, "deterministic": True, **FORWARD},
    ),
    "backward": lambda: (
        library.flash_backward,
        (Q, torch.zeros(2, 4, 3), Q, K, K, Q, torch.zeros(2, 4, 3)),
        {"s_aux": torch.zeros(4), "bias": torch.zeros(1, 1, 3, 5), "bias_needs_grad": True, "max_seqlen_q": 3}
        | {"max_seqlen_k": 5, "deterministic": True, **FORWARD},
    ),
    "offsets of segments": lambda: (library.segment_offsets, (int32(0, 0, 1, 1, 1, 0).view(2, 3),), {}),
    "packed in traced code, gradients": lambda: (
        library.flash_forward,
        leaves(PACKED[0], PACKED[0], PACKED[0]),
        {"cu_seqlens_q": SEGMENTS[0], "cu_seqlens_k": SEGMENTS[0], "packed_lengths": SEGMENTS[1], "max_seqlen_q": 3}
        | {"max_seqlen_k": 3, **FORWARD},
    ),
    "refused backward": lambda: (torch.ops.hf_paged_flash.refuse_backward.default, ("reason", [None], [Q]), {}),
}


@pytest.mark.parametrize("name", OPERATOR_CALLS)
def test_schemas_fakes_and_autograd(name):
    operator, arguments, options = OPERATOR_CALLS[name]()
    if name == "refused backward":  # it raises, so all there is to check is its schema
        torch.library.opcheck(operator, arguments, options, test_utils=["test_autograd_registration"])
    else:
        torch.library.opcheck(operator, arguments, options)


def test_offsets_of_segments():
    assert [x.tolist() for x in SEGMENTS] == [[0, 2, 3, 5, 6, 6, 6], [4, 2]]
    q = torch.randn(6, 4, 16)
    options = {"max_seqlen_q": 3, "max_seqlen_k": 3, **FORWARD}
    expected = library.flash_forward(q, q, q, *[int32(0, 2, 3, 5, 6)] * 2, **options)
    actual = library.flash_forward(q, q, q, *[SEGMENTS[0]] * 2, packed_lengths=SEGMENTS[1], **options)
    assert all(map(torch.equal, actual, expected))


def test_public_functions_compile_in_one_graph():
    def step(q, k, v, k_cache, v_cache, lengths):
        prefill = flash_attn_func(q, k, v, causal=True)
        decode = flash_attn_with_kvcache(
            q[:, :1], k_cache, v_cache, k[:, :1], v[:, :1], cache_seqlens=lengths, block_table=TABLE, causal=True
        )
        return prefill, decode, flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=4, block_table=TABLE)

    q, k, v = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 2, 16), torch.randn(2, 3, 2, 16)
    eager_caches, compiled_caches = ((CACHE.clone(), CACHE.clone()) for _ in range(2))
    expected = step(q, k, v, *eager_caches, LENGTHS)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v, *compiled_caches, LENGTHS)
    for a, b in zip((*expected, *eager_caches), (*actual, *compiled_caches), strict=True):
        torch.testing.assert_close(a, b)
    assert eager_caches[0].any()


class _Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("needs_grad", [False, True])
def test_whoever_watches_sees_operators(needs_grad):
    q = torch.randn(1, 4, 2, 16, requires_grad=needs_grad)
    with _Watch() as watch:
        out = flash_attn_func(q, q, q)
        if needs_grad:
            out.sum().backward()
    assert "hf_paged_flash.flash_forward.default" in watch.seen
    assert ("hf_paged_flash.flash_backward.default" in watch.seen) == needs_grad


def test_a_traced_module_holds_the_operator():
    traced = torch.jit.trace(lambda q: flash_attn_func(q, q, q), torch.randn(1, 4, 2, 16))
    assert "hf_paged_flash::flash_forward" in str(traced.graph)
    q = torch.randn(1, 4, 2, 16)
    torch.testing.assert_close(traced(q), flash_attn_func(q, q, q))


def test_an_eager_step_passes_by_the_dispatcher(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the operator was called")

    monkeypatch.setattr(library, "flash_forward", refuse)
    monkeypatch.setattr(library, "flash_backward", refuse)
    q = torch.randn(1, 4, 2, 16, requires_grad=True)
    flash_attn_func(q, q, q).sum().backward()
    assert q.grad is not None
