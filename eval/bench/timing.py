"""How benchmarks time a kernel: medians, on CUDA by events or by replaying a graph, on a CPU by the clock."""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from hf_paged_flash.errors import ArgumentError


def bench_device(name: str) -> torch.device:
    """The device to measure; raises ArgumentError for CUDA where there is none."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(
            f"`device` is {name!r}, but torch finds no GPU: `--device cpu` shows that the command works"
        )
    return device


def shapes_of(given: str | None, default: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """Shapes written as "1,2;3,4", each as long as those of `default`; None gives `default`."""
    if given is None:
        return default
    try:
        shapes = tuple(tuple(int(number) for number in shape.split(",")) for shape in given.split(";"))
    except ValueError:
        shapes = ((),)
    if any(len(shape) != len(default[0]) or min(shape) < 1 for shape in shapes):
        example = ",".join(map(str, default[0]))
        raise ArgumentError(f"`shapes` must be numbers as in {example!r}, separated by semicolons, got {given!r}")
    return shapes


# Rounds in which every implementation takes its turn, and what one turn costs the GPU.
ROUNDS, TURN_MS, MIN_RUNS, MAX_RUNS = 5, 20.0, 3, 12
# Well above the L2 of any GPU of today, as in triton's `do_bench`.
FLUSHED_BYTES = 256 * 2**20
# Data of all sets together: several times the L2 of any GPU of today.
ROTATED_BYTES = 512 * 2**20
# What a graph is replayed for before it is timed: a GPU that has waited for the host is slow for some milliseconds.
WARM_UP_MS = 20.0
# The GPU waits so long (in cycles, about 4 ms) before a turn that the host, which launches, is ahead of it.
HEAD_START = 8_000_000


def interleaved_ms(
    calls: dict[str, Callable[[], object]],
    device: torch.device,
    around: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
) -> dict[str, float]:
    """Median milliseconds on the GPU of each call; all take turns, so that drifting clocks hit them alike.

    Each of `ROUNDS` rounds starts with another call. L2 is flushed before every run, and the launch cost of Python is
    left out. A call's figure is the median of its rounds' medians. On a CPU: the clock, call by call.

    Args:
        calls: {name: function of no arguments}, all of which have run before.
        around: the context that a call runs in, entered once a turn.
    """
    if device.type != "cuda":
        return {name: _clocked(call, around(name)) for name, call in calls.items()}
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
    medians: dict[str, list[float]] = {name: [] for name in calls}
    runs = {}
    for name, call in calls.items():
        once = _turn(call, around(name), MIN_RUNS, flushed)  # warms up, too
        runs[name] = min(max(round(TURN_MS / once), MIN_RUNS), MAX_RUNS)
    names = list(calls)
    for first in range(ROUNDS):
        for name in names[first % len(names) :] + names[: first % len(names)]:
            medians[name].append(_turn(calls[name], around(name), runs[name], flushed))
    return {name: statistics.median(values) for name, values in medians.items()}


def _turn(call: Callable[[], object], context: AbstractContextManager, runs: int, flushed: torch.Tensor) -> float:
    """Median milliseconds of `runs` runs, one after the other without a sync."""
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(runs)] for _ in range(2))
    with context:
        torch.cuda._sleep(HEAD_START)
        for start, end in zip(starts, ends, strict=True):
            flushed.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(flushed.device)
    return statistics.median(start.elapsed_time(end) for start, end in zip(starts, ends, strict=True))


def _clocked(call: Callable[[], object], context: AbstractContextManager) -> float:
    with context:
        return _median_ms_by_clock(call)


def rotated_sets(nbytes: int, device: torch.device) -> int:
    """How many sets of `nbytes` to rotate: at least two, and on a CPU, where no rate is meant, no more."""
    return max(2, math.ceil(ROTATED_BYTES / nbytes)) if device.type == "cuda" else 2


def replayed_us(calls: list[Callable[[], object]], device: torch.device, replays: int = 20) -> float:
    """Median microseconds of one call, of a CUDA graph that holds all `calls` once, one after the other.

    A graph leaves the launch cost of Python out, as a captured decode step does. The calls should work on different
    data, together well above L2, so that no call finds its own data there. On a CPU: the clock, call by call.
    """
    if not calls:
        raise ArgumentError("`calls` must hold at least one function, got none")
    if device.type != "cuda":
        return statistics.median(_median_ms_by_clock(call) for call in calls) * 1e3
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin = time.perf_counter()
    while time.perf_counter() - begin < WARM_UP_MS / 1e3:
        graph.replay()
        torch.cuda.synchronize(device)
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(replays)] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize(device)
    times = [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]
    return statistics.median(times) / len(calls) * 1e3


def _median_ms_by_clock(call: Callable[[], object], runs: int = 5) -> float:
    call()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3
