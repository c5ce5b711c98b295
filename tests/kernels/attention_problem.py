"""Rows of queries, keys and values, laid out in every way that the attention kernels take, and what they must give."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from tests.naive import attention

MASKS = {
    "causal": {"causal": True},
    "full": {"causal": False},
    "sliding": {"causal": True, "window_left": 20},
    "window": {"causal": False, "window_left": 13, "window_right": 7},
    "left": {"causal": False, "window_left": 40},
    "right": {"causal": False, "window_right": 5},
    "diagonal": {"causal": False, "window_left": 0, "window_right": 0},
}
EXTRAS = ("plain", "softcap", "sinks", "softcap-sinks")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# lse is fp32 from exact products whatever the inputs' dtype
LSE_TOLERANCE = {"cpu": 2e-5, "cuda": 1e-4}


def head_dims(dims) -> tuple[int, int]:
    return dims if isinstance(dims, tuple) else (dims, dims)


def case_id(case: dict) -> str:
    """`D192v128-4x2-causal-paged16-...`: a case's values in the order of its factors."""
    parts = []
    for name, value in case.items():
        if name == "dims":
            value = f"D{value}" if isinstance(value, int) else "D{}v{}".format(*value)
        elif name == "heads":
            value = "{}x{}".format(*value)
        elif isinstance(value, int):
            value = f"{name}{value}"
        parts.append(str(value))
    return "-".join(parts)


@dataclass
class Problem:
    """Rows b of q (Sq_b, Hq, D), k (Sk_b, Hkv, D), v (Sk_b, Hkv, Dv), and the scoring arguments of the launchers."""

    q: list[torch.Tensor]
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    scoring: dict
    block_order: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))

    @property
    def device(self) -> torch.device:
        return self.q[0].device

    def lengths(self, rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.tensor([len(x) for x in rows], dtype=torch.int32, device=self.device)

    def solve(self, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Each row's out (Sq, Hq, Dv) and lse (Hq, Sq), computed in `dtype`."""
        rows = zip(self.q, self.k, self.v, strict=True)
        solved = [attention(*row, dtype=dtype, **self.scoring) for row in rows]
        return [out for out, _ in solved], [lse for _, lse in solved]


def make_problem(
    rows, *, dims, heads, mask, extras="plain", dtype="fp32", device="cpu", scale=None, seed=0, **_
) -> Problem:
    """Normal random `rows` [(Sq, Sk), ...]; `dims` D or (D, Dv), `heads` (Hq, Hkv)."""
    generator = torch.Generator().manual_seed(seed)
    head_dim, v_head_dim = head_dims(dims)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, DTYPES[dtype])

    q = [normal(seqlen_q, heads[0], head_dim) for seqlen_q, _ in rows]
    k = [normal(seqlen_k, heads[1], head_dim) for _, seqlen_k in rows]
    v = [normal(seqlen_k, heads[1], v_head_dim) for _, seqlen_k in rows]
    scoring = {"softmax_scale": head_dim**-0.5 if scale is None else scale, **MASKS[mask]}
    if "softcap" in extras:
        scoring["softcap"] = 1.5
    if "sinks" in extras:
        scoring["s_aux"] = torch.linspace(-2.0, 3.0, heads[0], device=device).to(DTYPES[dtype])
    return Problem(q, k, v, scoring)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values inside a larger tensor full of NaN, heads before rows: no dim but the last is contiguous."""
    outer = x.new_full((*x.shape[:-3], x.shape[-2] + 1, x.shape[-3] + 2, x.shape[-1] + 8), math.nan)
    view = outer[..., : x.shape[-2], 1 : x.shape[-3] + 1, : x.shape[-1]].transpose(-3, -2)
    view.copy_(x)
    return view


def packed(rows: list[torch.Tensor], capacity: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """One after the other (T, H, D), each padded with NaN to its capacity, and cu_seqlens (B + 1,)."""
    capacity = capacity or [len(x) for x in rows]
    padded = [x.new_full((room, *x.shape[1:]), math.nan) for x, room in zip(rows, capacity, strict=True)]
    for row, x in zip(padded, rows, strict=True):
        row[: len(x)] = x
    bounds = torch.tensor([0, *capacity]).cumsum(0).to(rows[0].device, torch.int32)
    return torch.cat(padded), bounds


def dense(rows: list[torch.Tensor], seqlen: int) -> torch.Tensor:
    """(B, seqlen, H, D), NaN past each row's end."""
    return packed(rows, [seqlen] * len(rows))[0].unflatten(0, (len(rows), seqlen))


def paged(problem: Problem, block_size: int, spare: int = 3):
    """k_cache, v_cache (num_blocks, block_size, Hkv, D | Dv) and block_table (B, max_blocks) int32.

    Blocks lie in random order; unused blocks and the rest of each last one are NaN, table entries without a block -1.
    Blocks that a left window has left behind are not there.
    """
    needed = [-(-len(k) // block_size) for k in problem.k]
    left = problem.scoring.get("window_left", -1)
    first = [
        max(len(k) - len(q) - left, 0) // block_size if left >= 0 else 0
        for q, k in zip(problem.q, problem.k, strict=True)
    ]
    order = torch.randperm(sum(needed) + spare, generator=problem.block_order).tolist()
    table = torch.full((len(needed), max(needed) + 1), -1, dtype=torch.int32)
    pools = []
    for rows in (problem.k, problem.v):
        pool, free = rows[0].new_full((len(order), block_size, *rows[0].shape[1:]), math.nan), iter(order)
        for b, row in enumerate(rows):
            for n, tokens in enumerate(row.split(block_size) if len(row) else ()):
                if n < first[b]:
                    continue
                table[b, n] = next(free)
                pool[table[b, n], : len(tokens)] = tokens
        pools.append(pool)
    return *pools, table.to(problem.device)


def check(problem: Problem, outs: list[torch.Tensor], lses: list[torch.Tensor]) -> None:
    """Each row's out (Sq, Hq, Dv) and lse (Hq, Sq) against fp64, with twice eager's own error as the budget."""
    dtype = problem.q[0].dtype
    exact_outs, exact_lses = problem.solve(torch.float64)
    eager_outs, _ = problem.solve(dtype)
    eps = torch.finfo(dtype).eps
    for b, exact in enumerate(exact_outs):
        assert outs[b].shape == exact.shape and outs[b].dtype == dtype
        assert torch.isfinite(outs[b]).all(), f"row {b}: out is not finite"
        if not exact.numel():
            continue
        # rows with few keys leave eager without an error: rounding the result once is what the dtype costs anyone, and
        # in fp32 rounding the scores: a score s is off by eps * s, and its probability by that share
        scores = exact_lses[b][exact_lses[b].isfinite()].abs().max().item() if exact_lses[b].isfinite().any() else 0.0
        floor = max(4.0, scores) * eps if dtype == torch.float32 else eps
        error = (outs[b].double() - exact).abs().max().item()
        eager_error = (eager_outs[b] - exact).abs().max().item()
        budget = 2 * eager_error + floor * max(1.0, exact.abs().max().item())
        assert error <= budget, f"row {b}: out is off by {error:.3g}, eager by {eager_error:.3g}"
        assert lses[b].dtype == torch.float32 and lses[b].shape == exact_lses[b].shape
        tolerance = LSE_TOLERANCE[problem.device.type]
        torch.testing.assert_close(lses[b].double(), exact_lses[b], rtol=tolerance, atol=tolerance)
