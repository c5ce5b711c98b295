"""kernels/launches.py: kernels that start while the one before ends compute what they compute one after another."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from hf_paged_flash.kernels import launches  # noqa: E402
from hf_paged_flash.kernels.linear import linear  # noqa: E402
from hf_paged_flash.kernels.paged_decode import paged_decode  # noqa: E402
from hf_paged_flash.kernels.rms_norm import rms_norm  # noqa: E402
from hf_paged_flash.kernels.rotary import rotary  # noqa: E402
from hf_paged_flash.kernels.store_kv import store_kv  # noqa: E402
from hf_paged_flash.kernels.swiglu import swiglu  # noqa: E402

HIDDEN, HEADS, HEAD_DIM, LAYERS = 1024, 8, 128, 6
INNER = 3 * HIDDEN


def test_only_where_it_is_asked_for():
    x = torch.ones(1)
    with launches.overlapping_launches():
        assert launches.overlap(x) == {"PDL": False}, "on a CPU"


def test_it_ends_with_the_block(monkeypatch):
    monkeypatch.setattr(launches, "can_overlap", lambda device: True)
    x = torch.ones(1)
    with launches.overlapping_launches():
        with pytest.raises(RuntimeError, match="within"), launches.overlapping_launches():
            raise RuntimeError("within")
        assert launches.overlap(x)["PDL"]
    assert not launches.overlap(x)["PDL"]


@pytest.mark.gpu
def test_a_chain_of_layers(monkeypatch):
    """Each kernel reads what the one before has written, and writes over what others have read."""
    monkeypatch.undo()  # buffers are not filled in between
    device = torch.device("cuda")
    if not launches.can_overlap(device):
        pytest.skip("needs programmatic dependent launch")

    def normal(*shape):
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    weights = [
        {name: normal(n, k) / k**0.5 for name, n, k in (
            ("qkv", 3 * HIDDEN, HIDDEN), ("o", HIDDEN, HIDDEN), ("gate", INNER, HIDDEN), ("up", INNER, HIDDEN),
            ("down", HIDDEN, INNER))}
        for _ in range(LAYERS)
    ]  # fmt: skip
    norm, cos, sin = normal(HIDDEN) + 1, normal(1, 1, HEAD_DIM), normal(1, 1, HEAD_DIM)
    slots, lengths = torch.tensor([700], device=device), torch.tensor([701], device=device, dtype=torch.int32)
    table = torch.arange(44, device=device, dtype=torch.int32)[None]
    x = normal(1, 1, HIDDEN)
    stored = [normal(2, 44, 16, HEADS, HEAD_DIM) for _ in range(LAYERS)]

    def chain() -> torch.Tensor:
        hidden = x
        for weight, (keys, values) in zip(weights, stored, strict=True):
            q, k, v = linear(rms_norm(hidden, norm, 1e-6), weight["qkv"]).view(1, 1, 3, HEADS, HEAD_DIM).unbind(2)
            q, k = (y.transpose(1, 2) for y in rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin))
            store_kv(k, v, keys, values, slots)
            out, _ = paged_decode(
                q, keys, values, cache_seqlens=lengths, block_table=table, softmax_scale=HEAD_DIM**-0.5, causal=True
            )
            hidden = linear(out.view(1, 1, HIDDEN), weight["o"])
            normed = rms_norm(hidden, norm, 1e-6)
            hidden = linear(swiglu(linear(normed, weight["gate"]), linear(normed, weight["up"])), weight["down"])
        return hidden

    with launches.overlapping_launches():
        chain()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = chain()
    for _ in range(30):
        x.copy_(normal(1, 1, HIDDEN))
        expected = chain()
        for _ in range(5):
            graph.replay()
        assert torch.equal(replayed, expected) and expected.isfinite().all()
        with launches.overlapping_launches():
            assert torch.equal(chain(), expected)
