"""Time to the first token of generate(): in a new process, again, and after a prompt that a cache knows already."""

import inspect
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from transformers import PreTrainedModel

from hf_paged_flash import PagedCache, PagedFlashError
from hf_paged_flash.eval.bench.generate_calls import options_of, take, timed_ms
from hf_paged_flash.eval.bench.generate_cases import Case, load

RUNS = 3
BLOCK_SIZE = 16
WARM_UPS = 4  # one computes the prefix, one warms up the prompt's graph, one captures it


def in_this_process(
    impl: str, name: str, case: Case, device: torch.device, kernels: str | None
) -> tuple[float, float]:
    """Milliseconds of the first call on a model of `load`, and of a later one.

    Args:
        kernels: a folder where Triton looks for compiled kernels, and leaves them; None: its own.
    """
    if kernels is not None:
        os.environ["TRITON_CACHE_DIR"] = kernels
    model = load(name, device)
    take(model, impl)
    ids, mask = case.batch(model)
    call = partial(model.generate, ids, attention_mask=mask, max_new_tokens=1, **options_of(impl, None))
    first, *later = (timed_ms(call) for _ in range(1 + RUNS))
    return first, min(later)


def in_new_processes(impl: str, name: str, case: Case, device: torch.device) -> dict[str, float]:
    """{metric: milliseconds}; ours once with no compiled kernel on disk, and once more with those of that time."""
    context = multiprocessing.get_context("spawn")

    def measured(kernels: str | None) -> tuple[float, float]:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(in_this_process, impl, name, case, device, kernels).result()

    if impl != "paged_flash":
        process, warm = measured(None)
        return {"ttft_process_ms": process, "ttft_ms": warm}
    with tempfile.TemporaryDirectory() as kernels:
        cold, _ = measured(kernels)
        process, warm = measured(kernels)
    return {"ttft_cold_ms": cold, "ttft_process_ms": process, "ttft_ms": warm}


def knows_prefixes() -> bool:
    """Whether this version's PagedCache keeps prefixes."""
    return "prefix_caching" in inspect.signature(PagedCache).parameters


def with_and_without_prefix(model: PreTrainedModel, compiled: str | None, case: Case) -> dict[int, float]:
    """{tokens that the cache knows before: milliseconds to the first token}, the least of RUNS, all warm.

    Raises:
        PagedFlashError: the prefix was computed again.
    """
    take(model, "paged_flash")
    ids, mask = case.batch(model)
    cache = PagedCache(model.config, BLOCK_SIZE, prefix_caching=True)

    def ask(seed: int, **options) -> float:
        """Another end of the prompt each time."""
        asked = ids.clone()
        asked[:, case.prefix :] = torch.roll(asked[:, case.prefix :], seed, 1)
        call = partial(model.generate, asked, attention_mask=mask, max_new_tokens=1, **options)
        return timed_ms(partial(call, **options_of("paged_flash", compiled)))

    times = {0: min([ask(seed) for seed in range(1 + RUNS)][1:])}
    for seed in range(WARM_UPS):
        ask(seed, past_key_values=cache)
    known = cache.memory().prefix_tokens_hit
    times[case.prefix] = min(ask(seed, past_key_values=cache) for seed in range(WARM_UPS, WARM_UPS + RUNS))
    found, blocks = cache.memory().prefix_tokens_hit - known, case.prefix // BLOCK_SIZE
    if found < RUNS * blocks * BLOCK_SIZE:
        raise PagedFlashError(f"a prefix of {case.prefix} tokens was cached, but {found} were found in {RUNS} prompts")
    return times
