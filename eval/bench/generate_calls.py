"""One implementation's generate(), timed: prefill, steps, and memory at its peak."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers import CompileConfig, PreTrainedModel, StoppingCriteria

from hf_paged_flash import CacheFullError
from hf_paged_flash.eval.bench.generate_cases import Case
from hf_paged_flash.eval.device_memory import in_use, in_use_before, release_unused
from hf_paged_flash.eval.report import reason_of
from hf_paged_flash.generation.decode_graph import graphs_of

# {implementation: (what attends, options of generate())}
IMPLEMENTATIONS = {
    "paged_flash": ("paged_flash", {}),
    "dynamic_sdpa": ("sdpa", {}),
    "static_compile": ("sdpa", {"cache_implementation": "static"}),
}
# Steps of a warm-up: peers compile in the first few. Ours runs to the end, as it may capture one graph for each width.
WARM_STEPS = 8
CHECKED_STEPS = 4
REPLAYS = 20
REPEATED_MS = 1000.0  # a prefill is timed again while all its runs stay within this


@dataclass
class Measured:
    """Of one implementation's calls; without numbers where `reason` says why.

    Attributes:
        peak: bytes of the device over the weights; torch_peak: of torch's allocator alone. None on a CPU.
        graph_ms: one replay of the last step's graph by itself; None where steps are no graphs of ours.
        logits: (CHECKED_STEPS, B, vocabulary) fp32, of the first steps; tokens: (CHECKED_STEPS, B), what followed.
    """

    prefill_ms: float | None = None
    decode_ms: float | None = None
    tok_s: float | None = None
    peak: int | None = None
    torch_peak: int | None = None
    graph_ms: float | None = None
    reason: str | None = None
    logits: torch.Tensor | None = field(default=None, repr=False)
    tokens: torch.Tensor | None = field(default=None, repr=False)


class Until(StoppingCriteria):
    """Ends a call at so many columns; `most` bytes of the device were in use after some token. It waits, is not timed.

    Looked at within the call: what a PagedCache has mapped is given back at its end, pages are not torch's.
    """

    def __init__(self, columns: int) -> None:
        self.columns, self.most = columns, 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        if input_ids.is_cuda:
            self.most = max(self.most, in_use(input_ids.device))
        return torch.full(input_ids.shape[:1], input_ids.shape[1] >= self.columns, device=input_ids.device)


class StepClock(StoppingCriteria):
    """Notes when each token was there, on the device's own clock and without waiting for it; ends nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())
        return torch.zeros(input_ids.shape[:1], dtype=torch.bool, device=input_ids.device)

    def step_ms(self) -> list[float]:
        """Milliseconds from each token to the next."""
        wait_for(self.device)
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.device.type == "cuda":
            return [start.elapsed_time(end) for start, end in pairs]
        return [(end - start) * 1e3 for start, end in pairs]


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take(model: PreTrainedModel, impl: str) -> None:
    """Lets go of what a measurement left (graphs, compiled code, the length of a StaticCache) and takes up `impl`."""
    model.set_attn_implementation("eager")
    model.measurements = getattr(model, "measurements", 0) + 1  # graphs of our own go with any value that changes
    for name in ("_previous_max_cache_length", "_compiled_call", "_last_compile_config"):
        vars(model).pop(name, None)
    torch.compiler.reset()
    release_unused(model.device)
    model.set_attn_implementation(IMPLEMENTATIONS[impl][0])


def options_of(impl: str, compiled: str | None) -> dict:
    """What generate() is called with; `compiled` is a mode of torch.compile, or None for what it does by itself."""
    chosen = {} if compiled is None else {"compile_config": CompileConfig(mode=compiled)}
    return IMPLEMENTATIONS[impl][1] | chosen


def timed_ms(call) -> float:
    """Milliseconds of one call, by the clock; it leaves a tensor of tokens, so that the device is known."""
    start = time.perf_counter()
    wait_for(call().device)
    return (time.perf_counter() - start) * 1e3


def measure(model: PreTrainedModel, impl: str, compiled: str | None, case: Case) -> Measured:
    """`impl` on one batch; what does not fit in memory is a `reason`, and what a peer raises."""
    take(model, impl)
    measured = Measured()
    torch._dynamo.utils.counters.clear()
    try:
        _measure(model, impl, options_of(impl, compiled), case, measured)
    except (torch.OutOfMemoryError, CacheFullError):
        measured = Measured(reason="out of memory")
    except Exception as error:  # of whatever kind; that of ours is for whoever runs this
        if impl == "paged_flash":
            raise
        measured = Measured(reason=reason_of(error))
    compiles = compiled is not None or impl == "static_compile"
    if compiles and model.device.type == "cuda" and not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
        measured = Measured(reason=measured.reason or "asked to compile, but nothing was compiled")
    return measured


def _measure(model: PreTrainedModel, impl: str, options: dict, case: Case, measured: Measured) -> None:
    device, (ids, mask) = model.device, case.batch(model)
    generate = partial(model.generate, ids, attention_mask=mask, max_new_tokens=case.new, **options)
    tiny = torch.full((2, 64), 5, device=device)
    model.generate(tiny, attention_mask=torch.ones_like(tiny), max_new_tokens=2)  # workspaces; it captures nothing
    release_unused(device)
    if device.type == "cuda":
        before, weights = in_use_before(device), torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    steps = case.new if impl == "paged_flash" else min(WARM_STEPS, case.new)
    warm_up = Until(ids.shape[1] + steps)
    generate(stopping_criteria=[warm_up])
    shown = generate(return_dict_in_generate=True, output_logits=True,
                     stopping_criteria=[Until(ids.shape[1] + CHECKED_STEPS)])  # fmt: skip
    measured.logits = torch.stack(shown.logits).cpu()
    measured.tokens = shown.sequences[:, ids.shape[1] :].T.cpu()
    del shown
    times = [timed_ms(partial(generate, max_new_tokens=1))]
    while len(times) < 5 and sum(times) + times[0] < REPEATED_MS:
        times.append(timed_ms(partial(generate, max_new_tokens=1)))
    whole = timed_ms(generate)
    measured.prefill_ms = statistics.median(times)
    measured.decode_ms = (whole - measured.prefill_ms) / (case.new - 1)
    measured.tok_s = case.new * len(ids) / whole * 1e3
    if impl == "paged_flash":
        measured.graph_ms = _graph_ms(model, generate)
    if device.type == "cuda":
        # what torch's allocator took for the other calls it has still
        measured.peak = max(warm_up.most, in_use(device)) - before
        measured.torch_peak = torch.cuda.max_memory_allocated(device) - weights


def _graph_ms(model: PreTrainedModel, generate: Callable) -> float | None:
    """The mean of some replays of the last step's graph, one after another."""
    graphs = graphs_of(model)
    held = generate(return_dict_in_generate=True)  # its cache, which they read
    if graphs is None or not graphs.replay_again():
        return None
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    marks[0].record()
    for _ in range(REPLAYS):
        graphs.replay_again()
    marks[1].record()
    wait_for(held.sequences.device)
    return marks[0].elapsed_time(marks[1]) / REPLAYS


def difference(ours: Measured, theirs: Measured) -> float:
    """The largest ||x - y|| / ||y|| of a row's logits in a step that both reached by the same tokens; NaN stays."""
    same = (ours.tokens == theirs.tokens).cummin(0).values
    reached = torch.cat([torch.ones_like(same[:1]), same[:-1]])
    apart = torch.linalg.vector_norm(ours.logits - theirs.logits, dim=-1)
    ratios = apart / torch.linalg.vector_norm(theirs.logits, dim=-1)
    return float(ratios[reached].max())


def step_ms(model: PreTrainedModel, impl: str, compiled: str | None, case: Case) -> list[float]:
    """The time of each step of one long call, after a short one."""
    take(model, impl)
    ids, mask = case.batch(model)
    clock = StepClock(model.device)
    generate = partial(model.generate, ids, attention_mask=mask, max_new_tokens=case.new, **options_of(impl, compiled))
    generate(stopping_criteria=[Until(ids.shape[1] + WARM_STEPS)])
    generate(stopping_criteria=[clock])
    return clock.step_ms()
