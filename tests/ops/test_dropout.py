"""Dropout: Philox as published, the same mask in reference and kernel, the right share, reproducible, unbiased."""

from __future__ import annotations

import pytest
import torch

from hf_paged_flash.ops import dropout, flash_attn_func
from hf_paged_flash.ops.reference import flash_forward

pytestmark = pytest.mark.usefixtures("reference_backend")


def seed(value):
    return torch.tensor([value])


def counters(*values):
    return [torch.tensor([value]) for value in values]


def test_philox_gives_the_published_numbers():
    # Random123's kat_vectors, philox4x32 with 10 rounds
    assert int(dropout.philox(seed(0), *counters(0, 0, 0, 0))) == 0x6627E8D5
    assert int(dropout.philox(seed(-1), *counters(*[0xFFFFFFFF] * 4))) == 0x408F276D
    digits_of_pi = counters(0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert int(dropout.philox(seed(0x299F31D0A4093822), *digits_of_pi)) == 0xD16CFE09


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_is_right_and_neighbours_are_independent(p):
    query, key, head = torch.arange(256)[:, None], torch.arange(256), torch.arange(4)[:, None, None]
    kept = dropout.keep(seed(42), p, query, key, head, torch.tensor(3)).double()
    deviation = (p * (1 - p)) ** 0.5

    def within(value, count):
        return abs(value) < 5 * deviation / count**0.5

    assert within(kept.mean() - (1 - p), kept.numel())
    for axis in range(3):  # rows, columns and heads alike: no line is favoured
        means = kept.mean(tuple(x for x in range(3) if x != axis))
        assert all(within(x - (1 - p), kept.numel() / len(means)) for x in means.tolist())
    centred = (kept - (1 - p)) / deviation
    for axis in range(3):
        a, b = centred.narrow(axis, 0, centred.shape[axis] - 1), centred.narrow(axis, 1, centred.shape[axis] - 1)
        assert abs(float((a * b).mean())) < 5 / a.numel() ** 0.5
    other = dropout.keep(seed(43), p, query, key, head, torch.tensor(3)).double()
    assert abs(float((centred * (other - (1 - p)) / deviation).mean())) < 5 / kept.numel() ** 0.5


def test_outputs_average_to_those_without_dropout():
    q, k, v = torch.randn(1, 8, 2, 16), torch.randn(1, 40, 2, 16), torch.randn(1, 40, 2, 16)
    options = dict(max_seqlen_q=8, max_seqlen_k=40, softmax_scale=0.25, causal=False)
    expected, expected_lse = flash_forward(q, k, v, **options)
    outs = []
    for i in range(400):
        out, lse = flash_forward(q, k, v, dropout_p=0.3, dropout_seed=seed(i), **options)
        assert torch.equal(lse, expected_lse)
        outs.append(out)
    outs = torch.stack(outs)
    error = (outs.mean(0) - expected) / (outs.std(0) / len(outs) ** 0.5)
    assert float(error.abs().max()) < 6 and 0.7 < float(error.std()) < 1.3


def test_public_functions_follow_torch_manual_seed():
    q = torch.randn(1, 16, 2, 16)

    def run(value):
        torch.manual_seed(value)
        return flash_attn_func(q, q, q, dropout_p=0.5), flash_attn_func(q, q, q, dropout_p=0.5)

    first, second = run(1)
    again, _ = run(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, second) and not torch.equal(first, run(2)[0])


def test_the_kernels_mask_does_not_depend_on_tiles():
    pytest.importorskip("triton")
    from hf_paged_flash.kernels.flash_forward import flash_forward as launch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k = torch.zeros(1, 70, 2, 128, device=device), torch.zeros(1, 100, 1, 128, device=device)
    v = torch.eye(128, device=device)[None, :100, None]  # one-hot values: the output is the dropped probabilities
    options = dict(max_seqlen_q=70, max_seqlen_k=100, softmax_scale=1.0, causal=False, dropout_p=0.4)
    out, _ = launch(q, k, v, dropout_seed=seed(5).to(device), **options)
    expected = dropout.keep(
        seed(5), 0.4, torch.arange(70)[:, None, None], torch.arange(100), torch.arange(2)[:, None], torch.tensor(0)
    )
    assert torch.equal(out[0, :, :, :100].cpu() > 0, expected)
