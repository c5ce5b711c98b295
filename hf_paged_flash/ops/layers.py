"""Layers beside attention as torch sees them: `rms_norm`, `rotary`, `swiglu` and `linear` of the namespace
`hf_paged_flash`.

Arguments and results as in `hf_paged_flash.ops.reference_layers`. Without gradients.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.library import Library

from hf_paged_flash.backend import count, use_kernels
from hf_paged_flash.ops import reference_layers
from hf_paged_flash.ops.library import launcher, register

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 32768  # row that a norm's program holds
MOST_ROWS = 2  # of a linear layer; compiled steps of no more keep all these layers
LEAST_WEIGHTS = 2**20  # of one: fewer are read within what a launch takes

_library = Library("hf_paged_flash", "FRAGMENT")
for _schema in (
    'rms_norm(Tensor x, Tensor weight, float eps, *, float offset=0.0, str casting_mode="llama") -> Tensor',
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor q_embed, Tensor k_embed)",
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    "linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _run(name: str, first: torch.Tensor, *arguments, **options):
    uses_kernels = use_kernels(first)
    run = launcher(name) if uses_kernels else getattr(reference_layers, name)
    result = run(first, *arguments, **options)
    count("kernel" if uses_kernels else "reference", name)
    return result


def _rms_norm_fake(x, weight, eps, **_):
    return x.new_empty(x.shape)


def _rotary_fake(q, k, cos, sin):
    return torch.empty_like(q), torch.empty_like(k)


def _swiglu_fake(gate, up):
    return gate.new_empty(gate.shape)


def _linear_fake(x, weight, bias=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


register(_library, "rms_norm", partial(_run, "rms_norm"), _rms_norm_fake)
register(_library, "rotary", partial(_run, "rotary"), _rotary_fake)
register(_library, "swiglu", partial(_run, "swiglu"), _swiglu_fake)
register(_library, "linear", partial(_run, "linear"), _linear_fake)

rms_norm = torch.ops.hf_paged_flash.rms_norm.default
rotary = torch.ops.hf_paged_flash.rotary.default
swiglu = torch.ops.hf_paged_flash.swiglu.default
linear = torch.ops.hf_paged_flash.linear.default
