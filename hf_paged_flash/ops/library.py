"""The operations as torch sees them: schemas, fakes for tracing, autograd, and the choice of kernel or reference.

`flash_forward`, `flash_backward`, `paged_decode`, `store_kv` and `copy_blocks` are operators of the namespace
`hf_paged_flash` with the signatures of their namesakes in `hf_paged_flash.ops.reference`, where arguments and results
are described. The forward takes `deterministic` as well, for the backward, and both take `packed_lengths` of
`segment_offsets`.

They trust their arguments; `hf_paged_flash.ops.flash_attn` checks them. `flash_forward` is differentiable over dense
and packed keys; over paged keys its backward raises, as that of `paged_decode` does, which goes through
`paged_decode_no_backward` where autograd records.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
from torch.autograd import forward_ad
from torch.library import Library, register_autograd, register_fake
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from hf_paged_flash.backend import count, use_kernels
from hf_paged_flash.errors import UnsupportedFeatureError
from hf_paged_flash.ops import reference, reference_backward
from hf_paged_flash.ops.validation import (
    NO_FORWARD_MODE,
    NO_FUNCTORCH,
    NO_PAGED_BACKWARD,
    NO_SECOND_DERIVATIVE,
    any_requires_grad,
    check_blocks_are_words,
    check_kernel_limits,
)

_BACKWARD_TENSOR_NAMES = (
    "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "s_aux", "bias", "alibi_slopes", "dropout_seed", "packed_lengths",
)  # fmt: skip
_TENSOR_NAMES = (*_BACKWARD_TENSOR_NAMES[:3], "block_table", *_BACKWARD_TENSOR_NAMES[3:])
# register_autograd takes no keyword-only tensors, so all tensors come first
_TENSORS = (
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_k=None, {}Tensor? s_aux=None, "
    "Tensor? bias=None, Tensor? alibi_slopes=None, Tensor? dropout_seed=None, Tensor? packed_lengths=None"
)
_OPTIONS = (
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, bool causal, int window_left=-1, "
    "int window_right=-1, float softcap=0.0, float dropout_p=0.0, bool deterministic=False"
)
_library = Library("hf_paged_flash", "DEF")
for _schema in (
    f"flash_forward(Tensor q, Tensor k, Tensor v, {_TENSORS.format('Tensor? block_table=None, ')}, *, {_OPTIONS}) "
    "-> (Tensor out, Tensor lse)",
    f"flash_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_TENSORS.format('')}, *, {_OPTIONS}, bool bias_needs_grad=False) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor ds_aux, Tensor dbias)",
    "paged_decode(Tensor q, Tensor k_cache, Tensor v_cache, *, Tensor cache_seqlens, Tensor? block_table=None, "
    "float softmax_scale, bool causal, int window_left=-1, int window_right=-1, float softcap=0.0, "
    "Tensor? s_aux=None, int num_splits=0) -> (Tensor out, Tensor lse)",
    "segment_offsets(Tensor segments) -> (Tensor cu_seqlens, Tensor packed_lengths)",
    "store_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()",
    "copy_blocks(Tensor(a!)[] caches, Tensor copies) -> ()",
    "refuse_backward(str reason, Tensor?[] grads, Tensor[] inputs) -> Tensor[]",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _without_empty_rows(arguments: dict) -> dict:
    """Options as kernels know them: offsets that end with the last row, where `packed_lengths` tells which it is."""
    packed_lengths = arguments.pop("packed_lengths", None)
    if packed_lengths is None:
        return arguments
    count, longest = packed_lengths.tolist()
    cu_seqlens = arguments["cu_seqlens_q"][: count + 1]
    rows = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": longest, "max_seqlen_k": longest}
    return arguments | rows


def _flash_forward(q, k, v, *tensors, deterministic=False, **arguments):
    # `deterministic` is for the backward, which autograd hands all options to
    arguments = _without_empty_rows(arguments | dict(zip(_TENSOR_NAMES, tensors, strict=False)))
    if not use_kernels(q):
        count("reference", "flash_forward")
        return reference.flash_forward(q, k, v, **arguments)
    block_size = None if arguments.get("block_table") is None else k.shape[1]
    check_kernel_limits(q, v, block_size, arguments.get("cu_seqlens_q"))
    result = launcher("flash_forward")(q, k, v, **arguments)
    count("kernel", "flash_forward")
    return result


def _flash_backward(dout, dlse, q, k, v, out, lse, *tensors, **arguments):
    arguments = _without_empty_rows(arguments | dict(zip(_BACKWARD_TENSOR_NAMES, tensors, strict=False)))
    if not use_kernels(q):
        count("reference", "flash_backward")
        run = reference_backward.flash_backward
    else:
        check_kernel_limits(q, v, None, arguments.get("cu_seqlens_q"), backward=True)
        count("kernel", "flash_backward")
        run = launcher("flash_backward")
    gradients = run(dout, dlse, q, k, v, out, lse, **arguments)
    return tuple(q.new_empty(0) if x is None else x for x in gradients)


def _paged_decode(q, k_cache, v_cache, **arguments):
    if not use_kernels(q):
        count("reference", "paged_decode")
        return reference.paged_decode(q, k_cache, v_cache, **arguments)
    check_kernel_limits(q, v_cache, None if arguments.get("block_table") is None else k_cache.shape[1])
    result = launcher("paged_decode")(q, k_cache, v_cache, **arguments)
    count("kernel", "paged_decode")
    return result


def _store_kv(k, v, k_cache, v_cache, slot_mapping):
    if not use_kernels(k_cache):
        count("reference", "store_kv")
        return reference.store_kv(k, v, k_cache, v_cache, slot_mapping)
    launcher("store_kv")(k, v, k_cache, v_cache, slot_mapping)
    count("kernel", "store_kv")


def _copy_blocks(caches, copies):
    if not use_kernels(copies):
        count("reference", "copy_blocks")
        return reference.copy_blocks(caches, copies)
    check_blocks_are_words(caches)
    launcher("copy_blocks")(caches, copies)
    count("kernel", "copy_blocks")


def _segment_offsets(segments):
    """Where packed rows begin, with shapes that don't depend on how many there are, for code that is traced.

    Args:
        segments: int32 (B, S), ids; a row ends with its batch row, or where the id changes.

    Returns:
        cu_seqlens int32 (B * S + 1,), which ends with empty rows, and packed_lengths int64 (2,) on the CPU: how many
        rows are not empty, and the longest one's length. Waits for the device twice, once for all layers of a forward.
    """
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = torch.nonzero(starts.flatten())[:, 0]
    cu_seqlens = segments.new_full((segments.numel() + 1,), segments.numel(), dtype=torch.int32)
    cu_seqlens[: len(first)] = first
    return cu_seqlens, torch.tensor([len(first), int(cu_seqlens.diff().max())], device="cpu")


def _refuse_backward(reason, grads, inputs):
    raise UnsupportedFeatureError(reason)


def register(library: Library, name: str, implementation: Callable, fake: Callable) -> None:
    """Gives an operator that `library` has defined what it runs on every device, and what it is traced as."""
    library.impl(name, implementation, "CompositeExplicitAutograd")
    register_fake(f"hf_paged_flash::{name}", fake, lib=library)


@cache
def launcher(name: str):
    # Imported at the first launch: importing the package must work, and start nothing, without Triton.
    return getattr(import_module(f"hf_paged_flash.kernels.{name}"), name)


def _flash_forward_fake(q, k, v, cu_seqlens_q=None, *_, **__):
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    rows = (q.shape[1], q.shape[0]) if cu_seqlens_q is not None else (q.shape[0], q.shape[2], q.shape[1])
    return out, q.new_empty(rows, dtype=torch.promote_types(q.dtype, torch.float32))


def _paged_decode_fake(q, k_cache, v_cache, **_):
    return _flash_forward_fake(q, k_cache, v_cache)


def _segment_offsets_fake(segments):
    cu_seqlens = segments.new_empty((segments.numel() + 1,), dtype=torch.int32)
    return cu_seqlens, torch.empty(2, dtype=torch.int64, device="cpu")


def _store_kv_fake(k, v, k_cache, v_cache, slot_mapping):
    return None


def _copy_blocks_fake(caches, copies):
    return None


def _flash_backward_fake(dout, dlse, q, k, v, out, lse, *tensors, bias_needs_grad=False, **arguments):
    arguments |= zip(_BACKWARD_TENSOR_NAMES, tensors, strict=False)
    s_aux, bias = arguments.get("s_aux"), arguments.get("bias") if bias_needs_grad else None
    gradients = [q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
                 for x in (q, k, v, s_aux, bias)]  # fmt: skip
    return tuple(gradients)


def _refuse_backward_fake(reason, grads, inputs):
    return [torch.empty_like(x) for x in inputs]


for _name, _implementation, _fake in (
    ("flash_forward", _flash_forward, _flash_forward_fake),
    ("flash_backward", _flash_backward, _flash_backward_fake),
    ("paged_decode", _paged_decode, _paged_decode_fake),
    ("segment_offsets", _segment_offsets, _segment_offsets_fake),
    ("store_kv", _store_kv, _store_kv_fake),
    ("copy_blocks", _copy_blocks, _copy_blocks_fake),
    ("refuse_backward", _refuse_backward, _refuse_backward_fake),
):
    register(_library, _name, _implementation, _fake)

flash_forward = torch.ops.hf_paged_flash.flash_forward.default
flash_backward = torch.ops.hf_paged_flash.flash_backward.default
paged_decode = torch.ops.hf_paged_flash.paged_decode.default
segment_offsets = torch.ops.hf_paged_flash.segment_offsets.default
store_kv = torch.ops.hf_paged_flash.store_kv.default
copy_blocks = torch.ops.hf_paged_flash.copy_blocks.default
_refuse = torch.ops.hf_paged_flash.refuse_backward.default


def _save_for_backward(ctx, inputs, keyword_only_inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)
    ctx.options = keyword_only_inputs


def _differentiate(ctx, dout, dlse):
    saved = ctx.saved_tensors  # read once: non-reentrant checkpoints allow no more
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, *modifiers, out, lse = saved
    s_aux, bias = modifiers[:2]
    if block_table is not None:
        inputs = [x for x, needed in zip(saved, ctx.needs_input_grad, strict=False) if needed]
        refused = iter(_refuse(NO_PAGED_BACKWARD, [dout, dlse], inputs))
        return tuple(next(refused) if needed else None for needed in ctx.needs_input_grad)
    gradients = [None] * (len(saved) - 2)
    dout = torch.zeros_like(out) if dout is None else dout
    bias_needs_grad = len(ctx.needs_input_grad) > 8 and ctx.needs_input_grad[8]
    # under create_graph only the operator knows that there is no second derivative
    run = _flash_backward if not torch.is_grad_enabled() and _nobody_watches(dout, q) else flash_backward
    dq, dk, dv, ds_aux, dbias = run(
        dout, dlse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_k, *modifiers,
        bias_needs_grad=bias_needs_grad, **ctx.options,
    )  # fmt: skip
    gradients[:3] = dq, dk, dv
    gradients[7] = None if s_aux is None else ds_aux
    gradients[8] = dbias if bias_needs_grad else None
    return tuple(gradients)


def _refuse_second_derivative(ctx, *grads):
    raise UnsupportedFeatureError(NO_SECOND_DERIVATIVE)


register_autograd("hf_paged_flash::flash_forward", _differentiate, setup_context=_save_for_backward, lib=_library)

register_autograd("hf_paged_flash::flash_backward", _refuse_second_derivative, lib=_library)


class _FlashAttention(torch.autograd.Function):
    """`flash_forward`'s autograd once more, without what torch adds for operators in Python.

    One `forward` with a context: beside a `setup_context` torch would inspect the signature in every call.
    """

    @staticmethod
    def forward(ctx, *arguments):
        output = _flash_forward(*arguments[:-1], **arguments[-1])
        _save_for_backward(ctx, arguments[:-1], arguments[-1], output)
        return output

    @staticmethod
    def backward(ctx, dout, dlse):
        gradients = _differentiate(ctx, dout, dlse)
        return *gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients))


def _nobody_watches(*tensors: torch.Tensor) -> bool:
    """Whether a call may pass by torch's dispatcher: nothing traces, counts or transforms it, or has an own one."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not is_in_torch_dispatch_mode()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and all(type(x) in (torch.Tensor, torch.nn.Parameter) for x in tensors)
    )


def _refuse_transforms(tensors: list[torch.Tensor]) -> None:
    """Refuses derivatives that torch would lose without a word, or end in an error that names an internal of torch."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise UnsupportedFeatureError(NO_FORWARD_MODE)
    if torch._C._are_functorch_transforms_active() and torch.is_grad_enabled() and any_requires_grad(*tensors):
        raise UnsupportedFeatureError(NO_FUNCTORCH)


def flash_attention(
    q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, seqused_k=None, block_table=None, s_aux=None, bias=None,
    alibi_slopes=None, dropout_seed=None, packed_lengths=None, deterministic=False, **options,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The operator `flash_forward`, with less work for the host where nobody watches operators.

    Same arguments and results; `torch.use_deterministic_algorithms(True)` makes every call `deterministic`. Looking up
    the operator's defaults alone takes torch as long as a launch, in every layer.
    """
    options["deterministic"] = deterministic or torch.are_deterministic_algorithms_enabled()
    tensors = (
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table, s_aux, bias, alibi_slopes, dropout_seed,
        packed_lengths,
    )  # fmt: skip
    if not _nobody_watches(q, k, v):
        if not torch.compiler.is_compiling():
            _refuse_transforms([x for x in (q, k, v, s_aux, bias) if x is not None])
        return flash_forward(*tensors, **options)
    if not torch.is_grad_enabled() or not any_requires_grad(q, k, v, s_aux, bias):
        return _flash_forward(*tensors, **options)
    return _FlashAttention.apply(*tensors, options)


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
        return None, None, *_refuse(NO_PAGED_BACKWARD, [grad_out, grad_lse], list(ctx.saved_tensors))


def paged_decode_no_backward(q, k_cache, v_cache, *, s_aux=None, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """`paged_decode` for callers that run with autograd enabled and may never call backward.

    Same arguments and results. If q, a cache or s_aux requires grad and grad mode is on, out and lse do as well.

    Raises:
        UnsupportedFeatureError: when backward reaches out or lse.
    """
    if not (torch.is_grad_enabled() and any_requires_grad(q, k_cache, v_cache, s_aux)):
        return paged_decode(q, k_cache, v_cache, s_aux=s_aux, **arguments)
    with torch.no_grad():
        out, lse = paged_decode(q, k_cache, v_cache, s_aux=s_aux, **arguments)
    inputs = (q, k_cache, v_cache) if s_aux is None else (q, k_cache, v_cache, s_aux)
    return _NoBackward.apply(out, lse, *inputs)
