"""Checks of the public functions' arguments: shapes, dtypes, devices and options, never tensor data.

They run on the host for every call of every layer, so they read metadata only and build a message only to raise it.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch

from hf_paged_flash.backend import use_kernels
from hf_paged_flash.errors import ArgumentError, BackendError, UnsupportedFeatureError

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
KERNEL_BLOCK_SIZES = (16, 32, 64, 128, 256)
MAX_HEAD_DIM = 512
MAX_ROWS = 65535  # of a CUDA grid's second and third dimension
MAX_BACKWARD_HEAD_DIM = 256


class Layout(NamedTuple):
    """A tensor's axes, as error messages write them, and how many there are."""

    text: str
    dims: int


DENSE_Q = Layout("(batch, seqlen_q, num_heads, head_dim)", 4)
DENSE_K = Layout("(batch, seqlen_k, num_kv_heads, head_dim)", 4)
PACKED_Q = Layout("(total_q, num_heads, head_dim)", 3)
PACKED_K = Layout("(total_k, num_kv_heads, head_dim)", 3)
PAGED_K = Layout("(num_blocks, block_size, num_kv_heads, head_dim)", 4)
NEW_K = Layout("(batch, seqlen_new, num_kv_heads, head_dim)", 4)


def fail(name: str, must: str, got: object) -> NoReturn:
    raise ArgumentError(f"`{name}` must {must}, got {got}")


def check_qkv(q, k, v, q_layout: Layout, k_layout: Layout, k_name: str = "k", v_name: str = "v") -> None:
    """q, k and v fit together: axes, dtype, device, head counts, head_dim; the value's head_dim is free."""
    if q.dim() != q_layout.dims:
        fail("q", f"have shape {q_layout.text}", tuple(q.shape))
    if q.dtype not in DTYPES:
        fail("q", "be bfloat16, float16, float32 or float64", q.dtype)
    _check_like(k_name, k, q, k_layout)
    _check_like(v_name, v, q, k_layout)
    num_heads, head_dim = q.shape[-2:]
    num_kv_heads = k.shape[-2]
    if k.shape[-1] != head_dim:
        fail(k_name, f"have the head_dim of `q`, {head_dim}", k.shape[-1])
    if v.shape[:-1] != k.shape[:-1]:
        fail(v_name, f"have the shape of `{k_name}` up to head_dim, {tuple(k.shape[:-1])}", tuple(v.shape[:-1]))
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        fail("q", f"have a number of heads that is a multiple of num_kv_heads, {num_kv_heads}", num_heads)


def _check_like(name: str, tensor, q, layout: Layout) -> None:
    if tensor.dim() != layout.dims:
        fail(name, f"have shape {layout.text}", tuple(tensor.shape))
    if tensor.dtype != q.dtype:
        fail(name, f"have the dtype of `q`, {q.dtype}", tensor.dtype)
    if tensor.device != q.device:
        fail(name, f"be on the device of `q`, {q.device}", tensor.device)


def check_batch(name: str, tensor, batch: int) -> None:
    if tensor.shape[0] != batch:
        fail(name, f"have batch size {batch}, as `q`", tensor.shape[0])


def check_lengths(name: str, tensor, q, size: int, text: str) -> torch.Tensor:
    """int32 tensor (size,) beside `q`, returned contiguous; `text` is the shape in words."""
    if tensor.dim() != 1 or tensor.shape[0] != size:
        fail(name, f"have shape {text} = ({size},)", tuple(tensor.shape))
    return _check_int32(name, tensor, q)


def check_cu_seqlens(name: str, tensor, q) -> torch.Tensor:
    """int32 tensor (batch + 1,) beside `q`, returned contiguous."""
    if not isinstance(tensor, torch.Tensor):
        fail(name, "be an int32 tensor of shape (batch + 1,)", type(tensor).__name__)
    if tensor.dim() != 1 or tensor.shape[0] == 0:
        fail(name, "have shape (batch + 1,)", tuple(tensor.shape))
    return _check_int32(name, tensor, q)


def has_values(tensor: torch.Tensor) -> bool:
    """Whether there is something to read, if need be from a GPU: nothing traces it."""
    return type(tensor) is torch.Tensor and not torch.compiler.is_compiling()


def check_rows(side: str, cu_seqlens: torch.Tensor, tokens: int, max_seqlen: int) -> None:
    """Refuses offsets (batch + 1,) of `side` "q" or "k" that leave its `tokens`, or rows longer than `max_seqlen`.

    On a CPU only: a GPU would have to be waited for, and a graph that is traced has no values.
    """
    if cu_seqlens.device.type != "cpu" or not has_values(cu_seqlens):
        return
    lengths = cu_seqlens.diff()
    if cu_seqlens[0] < 0 or cu_seqlens[-1] > tokens or (lengths < 0).any():
        fail(f"cu_seqlens_{side}", f"rise from 0 to at most {tokens}, the tokens of `{side}`", cu_seqlens.tolist())
    if lengths.numel() and (longest := int(lengths.max())) > max_seqlen:
        fail(f"max_seqlen_{side}", f"be at least {longest}, the longest row of `cu_seqlens_{side}`", max_seqlen)


def check_block_table(block_table, q, batch: int) -> torch.Tensor:
    """int32 tensor (batch, max_blocks) beside `q`, returned with contiguous rows."""
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        fail("block_table", f"have shape (batch, max_blocks) with batch {batch}", tuple(block_table.shape))
    return _check_int32("block_table", block_table, q)


def _check_int32(name: str, tensor, q) -> torch.Tensor:
    if tensor.dtype != torch.int32:
        fail(name, "be int32", tensor.dtype)
    if tensor.device != q.device:
        fail(name, f"be on the device of `q`, {q.device}", tensor.device)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def check_cache_strides(name: str, cache) -> None:
    # The kernels write into it, so a contiguous copy would not do.
    if cache.stride(-1) != 1:
        fail(name, "have a contiguous last dimension (stride 1)", f"stride {cache.stride(-1)}")


def check_new_kv(k, v, k_cache, v_cache, batch: int) -> None:
    """New keys and values fit the cache that they are appended to."""
    if k is None or v is None:
        missing, given = ("k", "v") if k is None else ("v", "k")
        fail(missing, f"be given together with `{given}`", None)
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        _check_like(name, new, cache, NEW_K)
        check_batch(name, new, batch)
        if new.shape[-2:] != cache.shape[-2:]:
            expected = tuple(cache.shape[-2:])
            fail(name, f"have (num_kv_heads, head_dim) of `{name}_cache`, {expected}", tuple(new.shape[-2:]))
    if v.shape[1] != k.shape[1]:
        fail("v", f"have as many new tokens as `k`, {k.shape[1]}", v.shape[1])


def check_options(q, window_size, softcap: float, s_aux) -> tuple[int, int]:
    """Checks the softcap and the sinks; returns (window_left, window_right), -1 = unbounded."""
    if softcap < 0.0:
        fail("softcap", "be positive, or 0.0 for none", softcap)
    if s_aux is not None:
        if s_aux.dim() != 1 or s_aux.shape[0] != q.shape[-2]:
            fail("s_aux", f"have shape (num_heads,) = ({q.shape[-2]},)", tuple(s_aux.shape))
        if not s_aux.is_floating_point():
            fail("s_aux", "have a floating-point dtype", s_aux.dtype)
        if s_aux.device != q.device:
            fail("s_aux", f"be on the device of `q`, {q.device}", s_aux.device)
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        fail("window_size", "be (left, right), -1 = unbounded", window_size)
    left, right = window_size
    return max(left, -1), max(right, -1)


def check_dropout(name: str, dropout_p: float) -> None:
    if not 0.0 <= dropout_p < 1.0:
        fail(name, "be from 0 up to, but not including, 1", dropout_p)


def check_alibi_slopes(alibi_slopes, q, batch: int) -> torch.Tensor | None:
    """fp32 (num_heads,) or (batch, num_heads) beside `q`; returned as (batch | 1, num_heads)."""
    if alibi_slopes is None:
        return None
    num_heads = q.shape[-2]
    if tuple(alibi_slopes.shape) not in ((num_heads,), (batch, num_heads)):
        must = f"have shape (num_heads,) = ({num_heads},) or (batch, num_heads) = ({batch}, {num_heads})"
        fail("alibi_slopes", must, tuple(alibi_slopes.shape))
    if alibi_slopes.dtype != torch.float32:
        fail("alibi_slopes", "be float32", alibi_slopes.dtype)
    if alibi_slopes.device != q.device:
        fail("alibi_slopes", f"be on the device of `q`, {q.device}", alibi_slopes.device)
    if alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise UnsupportedFeatureError(
            "`alibi_slopes` gets no gradient: detach them, or pass slope * distance as an additive mask to `eager`"
        )
    return alibi_slopes.view(-1, num_heads).contiguous()


def refuse_gradients(reason: str, *tensors: torch.Tensor | None) -> None:
    """Raises UnsupportedFeatureError with `reason` if autograd would record a call on these tensors."""
    if torch.is_grad_enabled() and any_requires_grad(*tensors):
        raise UnsupportedFeatureError(reason)


def check_backward(q, k, v, s_aux, block_table) -> None:
    """Refuses, before anything runs, a call that autograd would record and whose backward does not exist."""
    if not (torch.is_grad_enabled() and any_requires_grad(q, k, v, s_aux)):
        return
    if block_table is not None:
        raise UnsupportedFeatureError(NO_PAGED_BACKWARD)
    if max(q.shape[-1], v.shape[-1]) > MAX_BACKWARD_HEAD_DIM and use_kernels(q):
        raise UnsupportedFeatureError(NO_WIDE_BACKWARD)


def any_requires_grad(*tensors: torch.Tensor | None) -> bool:
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def check_blocks_are_words(caches) -> None:
    """What the kernel `copy_blocks` takes: blocks that lie contiguous, in words of 8 bytes."""
    for cache in caches:
        sizes = (cache[0].numel() * cache.element_size(), cache.stride(0) * cache.element_size())
        if not cache[0].is_contiguous() or any(size % 8 for size in sizes):
            got = f"shape {tuple(cache.shape)}, strides {cache.stride()}"
            fail("caches", "hold contiguous blocks of whole words of 8 bytes", got)


NO_PAGED_BACKWARD = (
    "hf_paged_flash has no backward pass through paged keys and a K/V cache: call it under torch.no_grad() or "
    "torch.inference_mode(), or train without a cache (`use_cache=False`)"
)
NO_SECOND_DERIVATIVE = (
    "hf_paged_flash has no second derivatives (`create_graph=True`): use the 'eager' attention where gradients are "
    "differentiated again"
)
NO_FORWARD_MODE = (
    "hf_paged_flash has no forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad): use the 'eager' "
    "attention, or gradients by backward()"
)
NO_FUNCTORCH = (
    "hf_paged_flash does not differentiate within torch.func's transforms (grad, vjp, jacrev ...): use backward() or "
    "torch.autograd.grad, or the 'eager' attention"
)
NO_WIDE_BACKWARD = (
    "hf_paged_flash has no backward kernel for a head_dim above 256: train with the 'sdpa' attention, call it under "
    "torch.no_grad(), or choose the backend 'reference'"
)


def check_kernel_limits(q, v, block_size: int | None, cu_seqlens_q=None, backward: bool = False) -> None:
    """What the Triton kernels take beyond the public functions' checks; `block_size` None = the keys are not paged."""
    head_dim, v_head_dim = q.shape[-1], v.shape[-1]
    way_out = " on the Triton kernels; the backend 'reference' takes it"
    if q.dtype == torch.bfloat16 and not q.is_cuda:
        raise BackendError(
            "Triton's interpreter computes wrong results in bfloat16: use float16, float32 or the backend 'reference'"
        )
    if q.dtype == torch.float64:
        fail("q", f"be bfloat16, float16 or float32{way_out}", q.dtype)
    for name, size in (("q", head_dim), ("v", v_head_dim)):
        if not 16 <= size <= MAX_HEAD_DIM or size % 8:
            fail(name, f"have a head_dim from 16 to {MAX_HEAD_DIM} in steps of 8{way_out}", size)
    if backward and max(head_dim, v_head_dim) > MAX_BACKWARD_HEAD_DIM:
        raise UnsupportedFeatureError(NO_WIDE_BACKWARD)
    rows = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    if rows > MAX_ROWS:
        name = "q" if cu_seqlens_q is None else "cu_seqlens_q"
        fail(name, f"have at most {MAX_ROWS} rows in one call{way_out}", rows)
    if block_size is not None and block_size not in KERNEL_BLOCK_SIZES:
        fail("block_size", f"be one of {KERNEL_BLOCK_SIZES}{way_out}", block_size)
