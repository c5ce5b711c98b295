"""K/V memory by workload: the bytes are those of the caches, and PagedCache's waste is what the README claims."""

import json

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, StaticCache
from typer.testing import CliRunner

from hf_paged_flash import PagedCache
from hf_paged_flash.eval import memory
from hf_paged_flash.eval.fed_caches import FedCaches, Sample, llama_8b, mistral_7b
from hf_paged_flash.eval.generate_memory import DeviceWatch, Peak, cache_of, peaks_of
from hf_paged_flash.eval.workloads import WORKLOADS, left_padded, log_uniform, ragged

TOKEN = 2 * 8 * 128 * 2  # bytes of one layer
PAGE = 2 * 2**20


def fed(config, columns=200, block_sizes=(16,)):
    return FedCaches(config, columns, list(block_sizes))


def last(caches) -> dict:
    return {key: samples[-1] for key, samples in caches.samples.items()}


def test_ragged_workload_is_the_peers():
    lengths = log_uniform(32, 32, 4096)
    assert (int(lengths.sum()), 32 * int(lengths.max())) == (23545, 104192)
    assert ragged().name == "ragged-32x4096"


def test_token_of_the_8b_shape():
    assert 32 * TOKEN == 128 * 1024
    for config in (llama_8b(32), mistral_7b(32, 4096)):
        assert 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 == 128 * 1024


class TestFedCaches:
    def test_padded_rows(self):
        lengths = torch.tensor([1, 16, 17, 100])
        caches = fed(llama_8b(2), block_sizes=(16, 64))
        caches.forward(left_padded(lengths))
        held = last(caches)
        assert held["dynamic", None].reserved == 2 * 4 * 100 * TOKEN
        assert held["static", None].reserved == 2 * 4 * 200 * TOKEN
        assert held["paged", 16].reserved == 2 * PAGE  # 11 blocks of 64 KiB in a page each
        assert held["paged", 64].reserved == 2 * PAGE  # 5 blocks of 256 KiB
        assert {sample.needed for sample in held.values()} == {2 * 134 * TOKEN}
        cache = caches.caches["paged", 16]
        assert cache.memory().bytes_stored == 2 * 134 * TOKEN
        assert cache.memory().blocks_used == 1 + 1 + 2 + 7
        caches.forward(torch.ones(4, 1, dtype=torch.long))
        assert last(caches)["dynamic", None] == Sample(2 * 4 * 101 * TOKEN, 2 * 138 * TOKEN)

    def test_a_shared_prompt_is_needed_once(self):
        caches = fed(llama_8b(2))
        caches.prompt(100, 4)
        held = last(caches)
        assert held["dynamic", None] == Sample(2 * 4 * 100 * TOKEN, 2 * 100 * TOKEN)
        assert caches.caches["paged", 16].memory().bytes_stored == 2 * 100 * TOKEN
        caches.forward(torch.ones(4, 1, dtype=torch.long))
        assert last(caches)["paged", 16].needed == 2 * 104 * TOKEN
        assert caches.caches["paged", 16].memory().blocks_used == 6 + 4
        caches.reorder(torch.tensor([2, 2, 2, 0]))
        caches.forward(torch.ones(4, 1, dtype=torch.long))
        assert last(caches)["dynamic", None].needed == 2 * (100 + 2 + 4) * TOKEN

    def test_rows_that_leave(self):
        caches = fed(llama_8b(2))
        caches.forward(torch.ones(4, 100, dtype=torch.long))
        caches.keep(torch.tensor([1, 3]))
        caches.forward(torch.ones(2, 1, dtype=torch.long))
        held = last(caches)
        assert held["dynamic", None] == Sample(2 * 2 * 101 * TOKEN, 2 * 202 * TOKEN)
        assert held["static", None].reserved == 2 * 4 * 200 * TOKEN
        assert caches.caches["paged", 16].memory().bytes_stored == 2 * 202 * TOKEN

    def test_a_window_needs_its_tokens_alone(self):
        caches = fed(mistral_7b(2, 50))
        caches.forward(left_padded(torch.tensor([30, 120])))
        held = last(caches)
        assert held["dynamic", None] == Sample(2 * 2 * 49 * TOKEN, 2 * (30 + 49) * TOKEN)
        assert held["static", None].reserved == 2 * 2 * 50 * TOKEN
        # of the longer row the blocks from token 64 on: the next token sees 71 and those after it
        assert caches.caches["paged", 16].memory().blocks_used == 2 + (8 - 71 // 16)


def test_ragged_waste_with_whole_pages():
    """At most 4 % of what the pools have mapped holds no token; four layers waste what 32 do."""
    held = memory.count(ragged(), 4, [16])
    assert held["paged", 16][0].needed == 4 * 23545 * TOKEN
    assert held["paged", 16][0].reserved % PAGE == 0
    assert memory.waste(held["paged", 16]) <= 0.04
    assert max(1 - sample.needed / sample.reserved for sample in held["paged", 16]) <= 0.04
    assert memory.waste(held["dynamic", None]) > 0.7


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads(name):
    """Each feeds all three kinds to its end, and none holds less than what is needed."""
    workload = WORKLOADS[name](0.02)
    held = memory.count(workload, 1, [16])
    assert len(held) == 3
    for samples in held.values():
        assert len(samples) > 2
        assert all(sample.reserved >= sample.needed > 0 for sample in samples)
    static = held["static", None][-1].reserved
    columns = min(workload.columns, getattr(workload.config(1), "sliding_window", None) or workload.columns)
    assert static == workload.rows * columns * TOKEN


def tiny(workload):
    """A model of the workload's kind that a CPU runs."""
    sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    sizes |= dict(num_hidden_layers=1, vocab_size=30000, eos_token_id=None, bos_token_id=None, pad_token_id=0)
    window = getattr(workload.config(1), "sliding_window", None)
    if window is not None:
        return MistralForCausalLM(MistralConfig(sliding_window=window, **sizes)).eval()
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


@pytest.mark.parametrize("kind", ["dynamic", "static", "paged"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_generate_of_workloads(name, kind):
    """Through generate() a cache comes to hold as many columns as the workload feeds."""
    workload = WORKLOADS[name](0.01)
    model = tiny(workload)
    model.set_attn_implementation("paged_flash" if kind == "paged" else "sdpa")
    cache = cache_of(kind, workload, model.config)
    assert type(cache) is {"dynamic": DynamicCache, "static": StaticCache, "paged": PagedCache}[kind]
    workload.generate(model, cache)
    columns = int(cache.get_seq_length())
    if name == "chats":  # a turn's last token is not stored before the next turn
        assert columns == workload.columns - 1
    elif name == "early-finish":
        assert 0 <= workload.columns - columns <= 1
    else:
        assert columns == workload.columns


def test_series_keeps_both_ends():
    samples = [Sample(2 * memory.GIB * (index + 1), memory.GIB) for index in range(1000)]
    points = memory.over_time(samples)
    assert len(points) == memory.POINTS
    assert (points[0], points[-1]) == ([0, 2.0, 1.0], [999, 2000.0, 1.0])
    assert memory.over_time(samples[:1]) == [[0, 2.0, 1.0]]


def test_more_than_dynamic():
    small, large = Peak(1, 1), Peak(2, 2)
    assert memory.takes_more({"dynamic": small, "paged": large})
    assert memory.takes_more({"dynamic": small, "paged": None})
    assert not memory.takes_more({"dynamic": large, "paged": small})
    assert not memory.takes_more({"dynamic": None, "paged": large})
    assert not memory.takes_more({"static": small, "paged": large})


def test_command(tmp_path):
    arguments = ["--workloads", "ragged,samples", "--scale", "0.05", "--layers", "2", "--block-sizes", "16,32"]
    arguments += ["--tolerance", "60", "--out", str(tmp_path)]
    result = CliRunner().invoke(memory.app, arguments)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    of = [(row["case"]["workload"], row["impl"], row["case"].get("block_size")) for row in rows]
    assert list(dict.fromkeys(of)) == [
        ("ragged-32x205", "dynamic", None), ("ragged-32x205", "static", None),
        ("ragged-32x205", "paged", 16), ("ragged-32x205", "paged", 32),
        ("samples-16x102", "dynamic", None), ("samples-16x102", "static", None), ("samples-16x102", "paged", 16),
    ]  # fmt: skip
    series = [row for row in rows if row["metric"] == "gib_over_time"]
    assert len(series) == 6
    for row in series:
        same = {r["metric"]: r["value"] for r in rows if (r["case"], r["impl"]) == (row["case"], row["impl"])}
        assert max(reserved for _, reserved, _ in row["value"]) == same["reserved_gib"]
        assert max(needed for _, _, needed in row["value"]) == same["stored_gib"]
    assert CliRunner().invoke(memory.app, [*arguments, "--tolerance", "0"]).exit_code == 1


@pytest.mark.gpu
def test_peaks_on_a_gpu():
    workload = WORKLOADS["ragged"](0.25)
    peaks = peaks_of(workload, ["dynamic", "paged"], 2, "cuda")
    held = memory.count(workload, 2, [16])
    for kind, peak in peaks.items():
        assert peak.device >= max(sample.needed for sample in held["paged", 16]), kind
    assert peaks["dynamic"].torch >= max(sample.reserved for sample in held["dynamic", None])
    assert peaks["paged"].device >= held["paged", 16][-1].reserved
    assert peaks["paged"].torch < peaks["dynamic"].torch


@pytest.mark.gpu
def test_watch_sees_what_has_come_and_gone():
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    with DeviceWatch("cuda") as watch:
        block = torch.empty(2**30, dtype=torch.uint8, device="cuda")
        torch.cuda._sleep(100_000_000)
        torch.cuda.synchronize()
        del block
        torch.cuda.empty_cache()
    assert watch.most - (total - free) >= 0.9 * 2**30


@pytest.mark.gpu
def test_command_on_a_gpu(tmp_path):
    arguments = ["--workloads", "samples", "--scale", "0.05", "--layers", "1", "--device", "cuda"]
    result = CliRunner().invoke(memory.app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    assert {(row["impl"], row["metric"]) for row in rows} == {
        (impl, metric) for impl in memory.CACHES for metric in ("device_gib", "peak_gib", "stored_gib")
    }
    assert all(row["gpu"] != "cpu" for row in rows)
