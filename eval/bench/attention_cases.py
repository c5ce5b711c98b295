"""What the attention benchmark measures: dense batches of one length, and packed rows of many lengths."""

import math
from dataclasses import dataclass, replace

import torch

# batch, query heads, key/value heads, sequence length, head_dim: the same 16,384 tokens at every length, for pictures
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
SWEEP = tuple((max(LENGTHS) // s, 32, 8, s, d) for d in (128, 64) for s in LENGTHS)
OTHER_HEADS = ((4, 32, 32, 4096, 128), (2, 16, 8, 4096, 256))
FULL_LENGTHS = {128: (1024, 4096, 16384), 64: (4096, 16384), 256: (4096,)}
SHAPES = (*SWEEP, *OTHER_HEADS)
# FlexAttention compiles some seconds for each shape.
FLEX_SHAPES = ((4, 32, 8, 4096, 128), (1, 32, 8, 16384, 128))
# Packed rows: about so many tokens, lengths log-uniform between these.
PACKED_TOKENS, SHORTEST, LONGEST = 65536, 256, 16384


@dataclass(frozen=True)
class Case:
    """One measurement's shape: batch, query heads, key/value heads, length, head_dim.

    Attributes:
        direction: "fwd" or "bwd".
        lengths: for packed rows each one's length; `b` is then how many there are, and `s` the longest.
    """

    direction: str
    b: int
    h: int
    hk: int
    s: int
    d: int
    causal: bool
    lengths: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(self.lengths) if self.lengths else self.b * self.s

    @property
    def flops(self) -> float:
        """4·H·D·ΣS² of the two products, half of that under a causal mask; 2.5 times as much backward (5 products)."""
        squares = sum(n * n for n in self.lengths) if self.lengths else self.b * self.s**2
        return 4 * self.h * self.d * squares * (0.5 if self.causal else 1) * (2.5 if self.direction == "bwd" else 1)

    @property
    def dense(self) -> "Case":
        """The dense batch that packed rows are compared with: as many tokens, and as many FLOPs, within a few percent.

        Rows of ΣS²/ΣS tokens, to the next 128, need the FLOPs of the packed ones.
        """
        length = sum(n * n for n in self.lengths) / self.tokens
        batch = max(1, round(self.tokens / length))
        return replace(self, b=batch, s=128 * max(1, round(self.tokens / batch / 128)), lengths=())

    @property
    def row(self) -> dict:
        """The `case` of a row of results."""
        row = {"pass": self.direction, "b": self.b, "h": self.h, "hk": self.hk, "s": self.s, "d": self.d}
        row["causal"] = self.causal
        if self.lengths:
            row["packed"] = {"tokens": self.tokens, "shortest": min(self.lengths), "dense_b": self.dense.b,
                             "dense_s": self.dense.s}  # fmt: skip
        return row


def log_uniform_lengths(tokens: int, shortest: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    """Log-uniform lengths that sum to `tokens`; what is left for the last row may be less than `shortest`."""
    generator = torch.Generator().manual_seed(seed)
    low, high = math.log(shortest), math.log(longest)
    lengths: list[int] = []
    while (room := tokens - sum(lengths)) > 0:
        drawn = math.exp(torch.rand((), generator=generator).item() * (high - low) + low)
        lengths.append(min(round(drawn), room))
    return tuple(lengths)


def packed_case(direction: str, tokens: int, h: int, hk: int, d: int) -> Case:
    """Causal packed rows of about `tokens` tokens, see `log_uniform_lengths`."""
    lengths = log_uniform_lengths(tokens, min(SHORTEST, tokens), min(LONGEST, tokens))
    return Case(direction, len(lengths), h, hk, max(lengths), d, True, lengths)


def default_cases(directions: list[str], causals: list[bool]) -> list[Case]:
    """Every shape causal; full where FULL_LENGTHS says."""
    return [
        Case(direction, *shape, causal)
        for direction in directions
        for shape in SHAPES
        for causal in causals
        if causal or shape[3] in FULL_LENGTHS[shape[4]]
    ]


def packed_cases(directions: list[str], tokens: int = PACKED_TOKENS) -> list[Case]:
    """Packed rows of head_dim 128 and 64, each followed by the dense batch it is compared with."""
    packed = [packed_case(direction, tokens, 32, 8, d) for direction in directions for d in (128, 64)]
    return [case for pair in packed for case in (pair, pair.dense)]


def inputs_of(case: Case, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Standard normal q, k, v and dout in bf16, (B, S, H | Hkv, D) or packed (T, H | Hkv, D), the same every time."""
    generator = torch.Generator(device).manual_seed(0)
    places = (case.tokens,) if case.lengths else (case.b, case.s)
    shapes = ((*places, heads, case.d) for heads in (case.h, case.hk, case.hk, case.h))
    return tuple(torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for shape in shapes)
