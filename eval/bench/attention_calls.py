"""The implementations that the attention benchmark compares, each in the layout it is made for."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hf_paged_flash import flash_attn_func, flash_attn_varlen_func
from hf_paged_flash.eval.bench.attention_cases import Case

OURS = ("paged_flash", "paged_flash_portable")
SDPA_BACKENDS = {"sdpa_fa2": SDPBackend.FLASH_ATTENTION, "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION}
IMPLEMENTATIONS = (*OURS, *SDPA_BACKENDS, "flex")


def setting(impl: str) -> AbstractContextManager:
    """What must be in force while `impl` runs: SDPA's back end; for the portable kernels, no others."""
    if impl in SDPA_BACKENDS:
        return sdpa_kernel(SDPA_BACKENDS[impl])
    if impl == "paged_flash_portable":
        from hf_paged_flash.kernels import hopper

        return hopper.disabled()
    return nullcontext()


def why_not(impl: str, case: Case, device: torch.device) -> str | None:
    """Why there is nothing to measure for `impl`, or None."""
    if case.lengths and impl not in OURS:
        return "packed rows are compared with the dense batch of as many tokens"
    if impl == "paged_flash_portable":
        from hf_paged_flash.kernels import hopper

        reason = hopper.unavailable(device)
        return reason and f"paged_flash runs the portable kernels here: {reason}"
    return None


def _attention(impl: str, case: Case, device: torch.device) -> Callable[..., torch.Tensor]:
    """`impl` as a function of q, k and v in its own layout, see `_native`."""
    if impl in OURS and case.lengths:
        ends = torch.tensor(case.lengths, device=device).cumsum(0)
        bounds = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
        return partial(
            flash_attn_varlen_func, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=case.s,
            max_seqlen_k=case.s, causal=case.causal,
        )  # fmt: skip
    if impl in OURS:
        return partial(flash_attn_func, causal=case.causal)
    gqa = case.h != case.hk
    if impl == "flex":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        # one compilation a shape would soon reach Dynamo's limit, beyond which FlexAttention runs unfused
        torch.compiler.reset()
        mask = None
        if case.causal:
            mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, case.s, case.s, device=device.type)
        return partial(torch.compile(flex_attention, dynamic=False), block_mask=mask, enable_gqa=gqa)
    return partial(scaled_dot_product_attention, is_causal=case.causal, enable_gqa=gqa)


def _native(impl: str, x: torch.Tensor) -> torch.Tensor:
    """(B, S, H, D), or packed (T, H, D), as ours take them; (B, H, S, D) contiguous for torch's own."""
    return x if impl in OURS else x.transpose(1, 2).contiguous()


def forward_call(
    impl: str, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """A function of no arguments that runs `impl` once; inputs of `inputs_of`, output in the layout of `_native`."""
    return partial(_attention(impl, case, q.device), *(_native(impl, x) for x in (q, k, v)))


def backward_call(
    impl: str, case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor
) -> Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Runs the forward once; each call of what it returns runs the backward alone, through autograd, to dQ, dK, dV."""
    leaves = [_native(impl, x).detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        out = _attention(impl, case, q.device)(*leaves)
    return partial(torch.autograd.grad, out, leaves, _native(impl, dout), retain_graph=True)


def call_of(impl: str, case: Case, inputs: tuple[torch.Tensor, ...]) -> Callable:
    """`forward_call` or `backward_call`, as the case says; `inputs` as of `inputs_of`. For use inside `setting`."""
    return backward_call(impl, case, *inputs) if case.direction == "bwd" else forward_call(impl, case, *inputs[:3])
