"""Kernels compiled in many processes at once, before anything is timed: Triton keeps what they compile on disk."""

import multiprocessing
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from hf_paged_flash.eval.bench.attention_calls import OURS, call_of, setting, why_not
from hf_paged_flash.eval.bench.attention_cases import Case, inputs_of
from hf_paged_flash.eval.report import reason_of

# A process holds its own CUDA context, about half a GiB of the GPU.
MAX_PROCESSES = 14


def _run_once(impl: str, cases: list[Case], device: torch.device) -> None:
    # of inductor's own, which would be as many again in every process
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    for case in cases:
        with torch.no_grad(), setting(impl):
            call_of(impl, case, inputs_of(case, device))()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _groups(cases: list[Case], implementations: list[str], device: torch.device) -> list[tuple[str, list[Case]]]:
    """Calls that share their kernels, to be run by one process; those of FlexAttention share none."""
    groups = defaultdict(list)
    for impl in (name for name in ("flex", *OURS) if name in implementations):  # the slowest first
        for case in cases:
            if why_not(impl, case, device) is None:
                shared = (case.d, case.h // case.hk, case.causal, bool(case.lengths))
                groups[impl, shared if impl in OURS else case].append(case)
    return [(impl, grouped) for (impl, _), grouped in groups.items()]


def compile_ahead(
    cases: list[Case],
    implementations_of: Callable[[Case], list[str]],
    device: torch.device,
    processes: int | None = None,
) -> None:
    """Runs every call that compiles something once; a failure is printed, and left to the run that is timed.

    Args:
        implementations_of: what is measured of a case.
        processes: how many at once; 0: none, nothing is compiled ahead; None: one for each CPU core and at most
            `MAX_PROCESSES` where there are kernels to compile, none on a CPU.
    """
    if processes is None:
        processes = min(os.cpu_count() or 1, MAX_PROCESSES) if device.type == "cuda" else 0
    if processes < 1:
        return
    names = list(dict.fromkeys(name for case in cases for name in implementations_of(case)))
    groups = [
        (impl, chosen)
        for impl, grouped in _groups(cases, names, device)
        if (chosen := [case for case in grouped if impl in implementations_of(case)])
    ]
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(min(processes, len(groups) or 1), mp_context=context) as pool:
        futures = {pool.submit(_run_once, impl, grouped, device): impl for impl, grouped in groups}
        for future in as_completed(futures):
            if error := future.exception():
                print(f"compiling {futures[future]} ahead: {reason_of(error)}", file=sys.stderr)
