"""Memory over the weights at the peak of generate(), of the device and of torch's allocator."""

import threading
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, StaticCache

from hf_paged_flash import CacheFullError, PagedCache
from hf_paged_flash.eval.device_memory import in_use, in_use_before, release_unused
from hf_paged_flash.eval.workloads import Workload


@dataclass(frozen=True)
class Peak:
    """Bytes over the weights: of the device, and of torch's allocator alone."""

    device: int
    torch: int


class DeviceWatch:
    """Looks at the device's memory every millisecond: `most` is the most that was in use, in bytes.

    What comes and goes between two looks is missed; torch's allocator keeps what it took, so that little does.
    """

    def __init__(self, device: str) -> None:
        self.most = 0
        self._device = torch.device(device)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _look(self) -> None:
        self.most = max(self.most, in_use(self._device))

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self._look()

    def __enter__(self) -> "DeviceWatch":
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        torch.cuda.synchronize(self._device)
        self._look()
        self._stop.set()
        self._thread.join()


def random_model(config: PreTrainedConfig, device: str) -> PreTrainedModel:
    """A model with random weights, made on `device`."""
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval()


def cache_of(kind: str, workload: Workload, config: PreTrainedConfig) -> Cache:
    """An empty cache as generate() would make it."""
    if kind == "static":
        return StaticCache(config=config, max_cache_len=workload.columns + 1)
    return DynamicCache(config=config) if kind == "dynamic" else PagedCache(config)


def peaks_of(workload: Workload, kinds: list[str], layers: int, device: str) -> dict[str, Peak | None]:
    """The peak of a workload's generate() on each kind of cache; None where memory ran out.

    The peers run on sdpa, PagedCache on paged_flash, over the same random weights.
    """
    release_unused(device)  # weights that shared memory with what was before would keep the rest of it from the device
    model = random_model(workload.config(layers), device)
    peaks = {}
    for kind in kinds:
        model.set_attn_implementation("paged_flash" if kind == "paged" else "sdpa")
        peaks[kind] = _peak(model, workload, kind, device)
    return peaks


def _peak(model: PreTrainedModel, workload: Workload, kind: str, device: str) -> Peak | None:
    warm_up = torch.full((2, 64), 5, device=device)
    model.generate(warm_up, attention_mask=torch.ones_like(warm_up), max_new_tokens=4)  # workspaces and kernels
    release_unused(device)
    before, weights = in_use_before(device), torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with DeviceWatch(device) as watch:
            workload.generate(model, cache_of(kind, workload, model.config))
    except (torch.OutOfMemoryError, CacheFullError):
        return None
    return Peak(watch.most - before, torch.cuda.max_memory_allocated(device) - weights)
