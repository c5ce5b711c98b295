"""Two processes that shard a model train as one process does: FSDP2 by itself, and through transformers' Trainer."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import hf_paged_flash
from tests.test_training import packed, padded
from tests.tiny_models import tiny_config, tiny_model
from tests.trainer_runs import ROWS_PER_STEP, WAYS, losses

STEPS = 5
WORLD = 2
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two CUDA GPUs")


def batch_of(step: int, rank: int) -> dict[str, torch.Tensor]:
    """Padded and packed rows in turn; a step's ranks have as many tokens: the mean of their losses is that of all."""
    return (packed if step % 2 else padded)(seed=10 * step + rank)


def train(model, batches, device: torch.device, mean=lambda loss: loss) -> list[float]:
    """Losses of a run over `batches`, a list of batches a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    history = []
    for step in batches:
        optimizer.zero_grad()
        total = 0.0
        for batch in step:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(**{name: x.to(device) for name, x in batch.items()}).loss / len(step)
            loss.backward()
            total += mean(loss.detach()).item()
        optimizer.step()
        history.append(total)
    return history


def build(attention: str, device: torch.device):
    return tiny_model(tiny_config("llama", use_cache=False), attention).train().to(device)


def start(rank: int, port: int, device_type: str) -> torch.device:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD), "ACCELERATE_USE_CPU": "false"}
    torch.set_num_threads(1)
    if device_type == "cuda":
        torch.cuda.set_device(rank)
        return torch.device("cuda", rank)
    hf_paged_flash.configure(backend="reference")
    return torch.device("cpu")


def end(rank: int, history: list[float], results) -> NoReturn:
    """Ends this process with rank 0's `history` handed over.

    Python is not finalized: a thread of gloo's that drops a tensor meanwhile aborts the process
    (github.com/pytorch/pytorch/pull/179291).
    """
    if rank == 0:
        results.put(history)
    dist.destroy_process_group()
    os._exit(0)


def shard_and_train(rank: int, port: int, device_type: str, results) -> None:
    from torch.distributed.fsdp import fully_shard

    device = start(rank, port, device_type)
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=WORLD, timeout=timedelta(minutes=2))
    model = build("paged_flash", device)
    mesh = dist.init_device_mesh(device_type, (WORLD,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    def mean(loss):
        dist.all_reduce(loss)
        return loss / WORLD

    history = train(model, [[batch_of(step, rank)] for step in range(STEPS)], device, mean)
    end(rank, history, results)


def train_with_trainer(rank: int, port: int, device_type: str, results) -> None:
    start(rank, port, device_type)
    history = losses(
        WAYS["offsets"], "paged_flash", per_device_train_batch_size=ROWS_PER_STEP // WORLD, bf16=True, fsdp=True,
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    )  # fmt: skip
    end(rank, history, results)


def run_processes(worker, device_type: str) -> list[float]:
    """What rank 0 of `worker` put into its queue."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(worker, (port, device_type, results), nprocs=WORLD)
    return results.get()


def on_one_device(attention: str, device: torch.device) -> list[float]:
    batches = [[batch_of(step, rank) for rank in range(WORLD)] for step in range(STEPS)]
    return train(build(attention, device), batches, device)


@pytest.mark.slow
def test_two_processes_on_a_cpu():
    expected = on_one_device("sdpa", torch.device("cpu"))
    assert run_processes(shard_and_train, "cpu") == pytest.approx(expected, rel=1e-4)


@pytest.mark.gpu
@TWO_GPUS
def test_two_gpus():
    expected = on_one_device("sdpa", torch.device("cuda", 0))
    assert run_processes(shard_and_train, "cuda") == pytest.approx(expected, rel=1e-2)


@pytest.mark.gpu
@TWO_GPUS
def test_trainer_on_two_gpus(monkeypatch):
    # one process that sees two GPUs would take both
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    expected = losses(WAYS["offsets"], "sdpa", bf16=True)
    monkeypatch.undo()
    assert run_processes(train_with_trainer, "cuda") == pytest.approx(expected, rel=1e-2)
