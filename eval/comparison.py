"""How far attention implementations are from the first of them: pure metrics, and the loop that takes them.

`compare` is the metric, `evaluate` runs it window by window, `results_of` makes the rows of a report.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from transformers import PreTrainedModel

from hf_paged_flash.eval.device_memory import in_use, in_use_before, release_unused
from hf_paged_flash.eval.text import Window
from hf_paged_flash.eval.ways import new_cache, scored_logits, switch_attention


@dataclass(frozen=True)
class Comparison:
    """Sums over scored tokens, in fp64; addable over windows and processes (`max_abs_dlogit` by maximum)."""

    tokens: float = 0.0
    nll: float = 0.0
    kl: float = 0.0
    top1: float = 0.0
    abs_dlogit: float = 0.0
    logits: float = 0.0
    max_abs_dlogit: float = 0.0

    def __add__(self, other: "Comparison") -> "Comparison":
        summed = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Comparison(**summed | {"max_abs_dlogit": _largest(self.max_abs_dlogit, other.max_abs_dlogit)})


def _largest(a: float, b: float) -> float:
    """max() that keeps a NaN wherever it stands."""
    return a if math.isnan(a) or a > b else b


def compare(logits: torch.Tensor, baseline: torch.Tensor, targets: torch.Tensor) -> Comparison:
    """Negative log-likelihood of `targets` under `logits`, and how far `logits` are from `baseline`.

    Args:
        logits, baseline: (batch, tokens, vocabulary), any floating dtype; compared in fp64.
        targets: (batch, tokens) int64.

    Returns:
        Sums over all tokens: nll in nats; KL(baseline || logits) in nats; tokens whose most likely next token agrees;
        |difference| of logits, over `logits` entries.
    """
    total = Comparison()
    # 256 positions at a time: in fp64 a long window's logits over a large vocabulary would not fit.
    rows = zip(
        logits.flatten(0, 1).split(256), baseline.flatten(0, 1).split(256), targets.flatten().split(256), strict=True
    )
    for ours, theirs, target in rows:
        ours, theirs = ours.double(), theirs.double()
        log_q, log_p = ours.log_softmax(-1), theirs.log_softmax(-1)
        difference = (ours - theirs).abs()
        total += Comparison(
            tokens=target.numel(),
            nll=-log_q.gather(-1, target[:, None]).sum().item(),
            kl=(log_p.exp() * (log_p - log_q)).sum().item(),
            top1=(ours.argmax(-1) == theirs.argmax(-1)).sum().item(),
            abs_dlogit=difference.sum().item(),
            logits=difference.numel(),
            max_abs_dlogit=difference.max().item(),
        )
    return total


@dataclass
class Measured:
    """What one implementation did on one way: its comparison, and the cost of its runs."""

    comparison: Comparison = field(default_factory=Comparison)
    rates: list[float] = field(default_factory=list)
    peak_bytes: float = 0.0
    device_bytes: float = 0.0
    warm: bool = False


@dataclass(frozen=True)
class Result:
    """One row of the report. Bytes are above the weights, None off CUDA; `tokens_per_s` counts scored tokens."""

    way: str
    implementation: str
    tokens: int
    ppl: float
    delta_ppl: float
    max_abs_dlogit: float
    mean_abs_dlogit: float
    kl: float
    top1: float
    tokens_per_s: float
    peak_bytes: int | None
    device_bytes: int | None


def _run(measured: Measured, logits_of: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
    """Runs `logits_of` once more than needed the first time on CUDA (compilation, autotuning), then timed."""
    on_cuda = device.type == "cuda"
    first = not measured.warm
    if on_cuda:
        if first:
            logits_of()
            release_unused(device)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held, used = torch.cuda.memory_allocated(device), in_use_before(device)
    start = time.perf_counter()
    logits = logits_of()
    if on_cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    if on_cuda:
        measured.peak_bytes = max(measured.peak_bytes, torch.cuda.max_memory_allocated(device) - held)
        if first:
            measured.device_bytes = in_use(device) - used
    measured.warm = True
    measured.rates.append(logits.shape[0] * logits.shape[1] / seconds)
    return logits


def evaluate(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    batches: list[list[Window]],
    *,
    implementations: list[str],
    ways: list[str],
    chunk: int,
    progress: Callable[[int], None] = lambda scored: None,
) -> dict[tuple[str, str], Measured]:
    """Runs every implementation over every way of every window; the first one is the baseline.

    Only one batch of logits of the baseline and one of another implementation are held at a time.

    Args:
        model: A causal LM in eval mode, on its device.
        tokens: (num_tokens,) int64, the text, on the CPU.
        batches: Windows of equal length and context, from `batched`.
        chunk: Chunk length of the way "chunked".
        progress: Called with the number of tokens scored after each run.

    Returns:
        {(way, implementation): Measured}
    """
    measured = {(way, name): Measured() for way in ways for name in implementations}
    device = model.device
    for batch in batches:
        rows = torch.stack([tokens[window.begin : window.end] for window in batch]).to(device)
        context = batch[0].context
        for way in ways:
            baseline = None
            for name in implementations:
                switch_attention(model, name)

                def logits_of(way=way, name=name, rows=rows, context=context):
                    return scored_logits(
                        model, rows, context, way=way, cache_factory=lambda: new_cache(model, name), chunk=chunk
                    )

                logits = _run(measured[way, name], logits_of, device)
                baseline = logits if baseline is None else baseline
                measured[way, name].comparison += compare(logits, baseline, rows[:, context:])
                progress(rows.shape[0] * (rows.shape[1] - context))
                del logits
    return measured


def results_of(measured: dict[tuple[str, str], Measured], device: torch.device) -> list[Result]:
    """The rows of a report, of sums and maxima over all of accelerate's processes; the same list on every process."""
    from accelerate.utils import gather

    results: list[Result] = []
    baselines: dict[str, float] = {}
    for (way, name), item in measured.items():
        c = item.comparison
        rate = statistics.median(item.rates) if item.rates else 0.0
        sums = [c.tokens, c.nll, c.kl, c.top1, c.abs_dlogit, c.logits, rate]
        maxima = [c.max_abs_dlogit, item.peak_bytes, item.device_bytes]
        # (processes, 10); fp64 on the process's own device, which is what its communication backend can move.
        everyone = gather(torch.tensor([sums + maxima], dtype=torch.float64, device=device)).cpu()
        tokens, nll, kl, top1, abs_dlogit, logits, rate = everyone[:, : len(sums)].sum(0).tolist()
        max_abs_dlogit, peak, device_use = everyone[:, len(sums) :].amax(0).tolist()
        # torch's exp overflows to inf, Python's raises.
        ppl = torch.tensor(nll / tokens, dtype=torch.float64).exp().item()
        baseline = baselines.setdefault(way, ppl)
        on_cuda = device.type == "cuda"
        results.append(
            Result(
                way=way,
                implementation=name,
                tokens=int(tokens),
                ppl=ppl,
                delta_ppl=ppl / baseline - 1,
                max_abs_dlogit=max_abs_dlogit,
                mean_abs_dlogit=abs_dlogit / logits,
                kl=kl / tokens,
                top1=top1 / tokens,
                tokens_per_s=rate,
                peak_bytes=int(peak) if on_cuda else None,
                device_bytes=int(device_use) if on_cuda else None,
            )
        )
    return results


def beyond(results: list[Result], tolerance: float) -> list[Result]:
    """The rows whose relative difference in perplexity is more than `tolerance`, or not a number."""
    return [row for row in results if not abs(row.delta_ppl) <= tolerance]
