"""The operations as torch sees them: schemas, fakes for tracing, and the choice between kernel and reference.

`flash_forward`, `paged_decode` and `store_kv` are operators of the namespace `hf_paged_flash` with the signatures of
their namesakes in `hf_paged_flash.ops.reference`, where arguments and results are described. They trust their
arguments; `hf_paged_flash.ops.flash_attn` checks them. None of them can be differentiated: where autograd records,
call `flash_forward_no_backward` or `paged_decode_no_backward`.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

import torch
from torch.library import Library, register_fake

from hf_paged_flash.backend import count, use_kernels
from hf_paged_flash.errors import UnsupportedFeatureError
from hf_paged_flash.ops import reference
from hf_paged_flash.ops.validation import NO_BACKWARD, any_requires_grad, check_kernel_limits

_library = Library("hf_paged_flash", "DEF")
for _schema in (
    "flash_forward(Tensor q, Tensor k, Tensor v, *, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_k=None, Tensor? block_table=None, SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, "
    "bool causal, int window_left=-1, int window_right=-1, float softcap=0.0, Tensor? s_aux=None) "
    "-> (Tensor out, Tensor lse)",
    "paged_decode(Tensor q, Tensor k_cache, Tensor v_cache, *, Tensor cache_seqlens, Tensor? block_table=None, "
    "float softmax_scale, bool causal, int window_left=-1, int window_right=-1, float softcap=0.0, "
    "Tensor? s_aux=None, int num_splits=0) -> (Tensor out, Tensor lse)",
    "store_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()",
    "refuse_backward(Tensor grad_out, Tensor grad_lse, Tensor[] inputs) -> Tensor[]",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _flash_forward(q, k, v, **arguments):
    if not use_kernels(q):
        count("reference", "flash_forward")
        return reference.flash_forward(q, k, v, **arguments)
    check_kernel_limits(q, v, None if arguments.get("block_table") is None else k.shape[1])
    result = _launcher("flash_forward")(q, k, v, **arguments)
    count("kernel", "flash_forward")
    return result


def _paged_decode(q, k_cache, v_cache, **arguments):
    if not use_kernels(q):
        count("reference", "paged_decode")
        return reference.paged_decode(q, k_cache, v_cache, **arguments)
    check_kernel_limits(q, v_cache, None if arguments.get("block_table") is None else k_cache.shape[1])
    result = _launcher("paged_decode")(q, k_cache, v_cache, **arguments)
    count("kernel", "paged_decode")
    return result


def _store_kv(k, v, k_cache, v_cache, slot_mapping):
    if not use_kernels(k_cache):
        count("reference", "store_kv")
        return reference.store_kv(k, v, k_cache, v_cache, slot_mapping)
    _launcher("store_kv")(k, v, k_cache, v_cache, slot_mapping)
    count("kernel", "store_kv")


def _refuse_backward(grad_out, grad_lse, inputs):
    raise UnsupportedFeatureError(NO_BACKWARD)


@cache
def _launcher(name: str):
    # Imported at the first launch: importing the package must work, and start nothing, without Triton.
    return getattr(import_module(f"hf_paged_flash.kernels.{name}"), name)


def _flash_forward_fake(q, k, v, *, cu_seqlens_q=None, **_):
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    rows = (q.shape[1], q.shape[0]) if cu_seqlens_q is not None else (q.shape[0], q.shape[2], q.shape[1])
    return out, q.new_empty(rows, dtype=torch.promote_types(q.dtype, torch.float32))


def _paged_decode_fake(q, k_cache, v_cache, **_):
    return _flash_forward_fake(q, k_cache, v_cache)


def _store_kv_fake(k, v, k_cache, v_cache, slot_mapping):
    return None


def _refuse_backward_fake(grad_out, grad_lse, inputs):
    return [torch.empty_like(x) for x in inputs]


for _name, _implementation, _fake in (
    ("flash_forward", _flash_forward, _flash_forward_fake),
    ("paged_decode", _paged_decode, _paged_decode_fake),
    ("store_kv", _store_kv, _store_kv_fake),
    ("refuse_backward", _refuse_backward, _refuse_backward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    register_fake(f"hf_paged_flash::{_name}", _fake, lib=_library)

flash_forward = torch.ops.hf_paged_flash.flash_forward.default
paged_decode = torch.ops.hf_paged_flash.paged_decode.default
store_kv = torch.ops.hf_paged_flash.store_kv.default


class _NoBackward(torch.autograd.Function):
    """Ties out and lse to the inputs, so that a backward pass through them raises instead of finding no gradient.

    The refusal is an operator of its own because torch.compile traces the backward along with the forward: a plain
    `raise` here would refuse to compile an evaluation that never calls backward. It takes the gradients, which it does
    not need, so that the compiler cannot move it into the forward.
    """

    @staticmethod
    def forward(ctx, out, lse, *inputs):
        ctx.save_for_backward(*inputs)
        return out.view_as(out), lse.view_as(lse)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        return None, None, *torch.ops.hf_paged_flash.refuse_backward(grad_out, grad_lse, list(ctx.saved_tensors))


def flash_forward_no_backward(q, k, v, *, s_aux=None, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """`flash_forward` for callers that run with autograd enabled and may never call backward.

    Same arguments and results. If q, k, v or s_aux requires grad and grad mode is on, out and lse do as well.

    Raises:
        UnsupportedFeatureError: when backward reaches out or lse.
    """
    return _without_backward(flash_forward, q, k, v, s_aux, arguments)


def paged_decode_no_backward(q, k_cache, v_cache, *, s_aux=None, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """`paged_decode` as `flash_forward_no_backward` is of `flash_forward`."""
    return _without_backward(paged_decode, q, k_cache, v_cache, s_aux, arguments)


def _without_backward(op, q, k, v, s_aux, arguments):
    if not (torch.is_grad_enabled() and any_requires_grad(q, k, v, s_aux)):
        return op(q, k, v, s_aux=s_aux, **arguments)
    with torch.no_grad():
        out, lse = op(q, k, v, s_aux=s_aux, **arguments)
    inputs = (q, k, v) if s_aux is None else (q, k, v, s_aux)
    return _NoBackward.apply(out, lse, *inputs)
