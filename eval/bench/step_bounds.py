"""What a decode step of a model can't be faster than: its bytes over the device's bandwidth, and its bare forward."""

from functools import partial

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hf_paged_flash.eval.bench.generate_cases import Case
from hf_paged_flash.eval.bench.timing import replayed_us

COPIED_BYTES = {"cuda": 2**31, "cpu": 2**24}


def copy_gbps(device: torch.device) -> float:
    """Bytes that a kernel reads and writes in the device's memory, in GB/s; `copy_`, the driver's, is slower."""
    source, target = (torch.zeros(COPIED_BYTES[device.type] // 4, device=device) for _ in range(2))
    return 2 * source.nbytes / replayed_us([partial(torch.mul, source, 1.0, out=target)], device) / 1e3


class _FullLayer(DynamicLayer):
    """Keys and values (B, Hkv, L, D) that stay where they are: each new token takes the place of the last."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1


def full_cache(model: PreTrainedModel, rows: int, columns: int) -> Cache | None:
    """Dense keys and values of `columns` random tokens a row; None where a layer is not one of full attention."""
    cache = DynamicCache(config=model.config)
    model(torch.ones(1, 1, dtype=torch.long, device=model.device), past_key_values=cache)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None

    def filled(one: torch.Tensor) -> torch.Tensor:
        return torch.randn(rows, one.shape[1], columns, one.shape[3], dtype=one.dtype, device=one.device)

    return Cache(layers=[_FullLayer(filled(layer.keys), filled(layer.values)) for layer in cache.layers])


@torch.no_grad()
def replay_ms(model: PreTrainedModel, case: Case) -> float | None:
    """One replay of a CUDA graph of a decode step over dense keys and values, under sdpa; by the clock on a CPU.

    They are as long as in the middle of the case. None where there is no such step: ragged rows, other layers.
    """
    if case.kind == "ragged":
        return None
    model.set_attn_implementation("sdpa")
    rows, columns = len(case.lengths), case.lengths[0] + case.new // 2
    cache = full_cache(model, rows, columns)
    if cache is None:
        return None
    token = torch.full((rows, 1), 5, device=model.device)
    position = torch.full((rows, 1), columns - 1, device=model.device)
    return replayed_us([partial(model, token, position_ids=position, past_key_values=cache)], model.device) / 1e3


def weight_bytes(model: PreTrainedModel) -> int:
    """What a step reads of the weights: all but the table of embeddings, which it looks up, unless the head has it."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    return total - (0 if head is not None and head.weight is table.weight else table.weight.nbytes)


@torch.no_grad()
def kv_bytes(model: PreTrainedModel, case: Case) -> int:
    """What a step reads of keys and values, the mean over the steps; of a layer with a window what that can see."""
    cache = DynamicCache(config=model.config)
    model(torch.ones(1, 1, dtype=torch.long, device=model.device), past_key_values=cache)
    total = 0
    for layer in cache.layers:
        if getattr(layer, "keys", None) is None:  # a recurrent state
            continue
        token = layer.keys.nbytes + layer.values.nbytes
        window = getattr(layer, "sliding_window", None) or float("inf")
        total += sum(token * min(length + case.new // 2, window) for length in case.lengths)
    return int(total)


def floor_ms(model: PreTrainedModel, case: Case, gbps: float) -> float:
    """The time that a decode step's bytes take at `gbps`."""
    return (weight_bytes(model) + kv_bytes(model, case)) / gbps / 1e6
