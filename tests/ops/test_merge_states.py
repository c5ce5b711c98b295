"""merge_states: attention over two halves of the keys equals attention over all, forward and gradients."""

from __future__ import annotations

import pytest
import torch

from hf_paged_flash import merge_states
from hf_paged_flash.errors import ArgumentError
from hf_paged_flash.ops import flash_attn_func, flash_attn_varlen_func

pytestmark = pytest.mark.usefixtures("reference_backend")


@pytest.mark.parametrize("cut", [0, 1, 9, 16])
def test_halves_merge_to_the_whole(cut):
    shapes = (2, 7, 4, 16), (2, 16, 2, 16), (2, 16, 2, 16)
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)

    def whole():
        return flash_attn_func(q, k, v, return_attn_probs=True)[:2]

    def merged():
        first = flash_attn_func(q, k[:, :cut], v[:, :cut], return_attn_probs=True)[:2]
        return merge_states(*first, *flash_attn_func(q, k[:, cut:], v[:, cut:], return_attn_probs=True)[:2])

    weights = torch.randn(2, 7, 4, 16, dtype=torch.float64), torch.randn(2, 4, 7, dtype=torch.float64)
    results = []
    for attend in (whole, merged):
        out, lse = attend()
        loss = (out * weights[0]).sum() + (lse * weights[1]).sum()
        results.append((out, lse, *torch.autograd.grad(loss, (q, k, v))))
    torch.testing.assert_close(results[1], results[0])


def test_packed_rows_and_dtypes():
    q, k = torch.randn(5, 2, 16).half(), torch.randn(8, 2, 16).half()
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([0, 3, 8], dtype=torch.int32)
    out, lse, _ = flash_attn_varlen_func(q, k, k, *bounds, 3, 5, return_attn_probs=True)
    nothing = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for merged in (merge_states(out, lse, *nothing), merge_states(*nothing, out, lse)):
        assert merged[0].dtype == torch.float16 and merged[1].dtype == torch.float32
        torch.testing.assert_close(merged, (out, lse))


def test_two_empty_states_stay_empty_and_have_finite_gradients():
    out, lse = torch.zeros(1, 2, 3, 4, requires_grad=True), torch.full((1, 3, 2), -torch.inf, requires_grad=True)
    merged_out, merged_lse = merge_states(out, lse, out.detach(), lse.detach())
    assert not merged_out.any() and (merged_lse == -torch.inf).all()
    gradients = torch.autograd.grad((merged_out.sum(), merged_lse.sum()), (out, lse))
    assert all(torch.isfinite(x).all() for x in gradients)


def test_far_apart_states_do_not_overflow():
    out, lse = torch.randn(1, 2, 3, 4), torch.zeros(1, 3, 2)
    merged_out, merged_lse = merge_states(out, lse + 1e4, -out, lse - 1e4)
    torch.testing.assert_close((merged_out, merged_lse), (out, lse + 1e4))


def test_shapes_are_checked():
    out, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 2)
    with pytest.raises(ArgumentError, match=r"`o1` must have shape"):
        merge_states(out[0, 0], lse, out, lse)
    with pytest.raises(ArgumentError, match=r"`o2` must have the shape of `o1`"):
        merge_states(out, lse, out[:, :1], lse)
    with pytest.raises(ArgumentError, match=r"`lse2` must have shape \(1, 3, 2\), got \(1, 2, 3\)"):
        merge_states(out, lse, out, lse.mT)
