"""How benchmarks time a kernel: medians, on CUDA by events or by replaying a graph, on a CPU by the clock."""

import statistics
import time
from collections.abc import Callable

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


def median_ms(call: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds of `call`, warmed up, with L2 flushed before each run on CUDA (triton's `do_bench`)."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(call, warmup=50, rep=200, return_mode="median")
    return _median_ms_by_clock(call)


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
    for _ in range(3):
        graph.replay()
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
