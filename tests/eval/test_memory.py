"""K/V memory of ragged batches: what each cache holds, counted by hand."""

import json

import pytest
import torch
from transformers import DynamicCache, StaticCache
from typer.testing import CliRunner

from hf_paged_flash.eval import memory

LENGTHS = torch.tensor([1, 16, 17, 100])


def test_workload_is_the_peers():
    lengths = memory.ragged_lengths()
    assert (len(lengths), int(lengths.sum()), 32 * int(lengths.max())) == (32, 23545, 104192)
    assert lengths.min() >= 32 and lengths.max() <= 4096


@pytest.mark.parametrize(("cache", "columns"), [(DynamicCache, 100), (StaticCache, 128)])
def test_caches_of_transformers_reserve_columns(cache, columns):
    config = memory.small_config(128)
    made = cache(config=config) if cache is DynamicCache else cache(config=config, max_cache_len=128)
    held = memory.padded_cache(made, "it", config, LENGTHS)
    assert held.reserved == 4 * columns * memory.token_bytes(config)
    assert held.stored == 134 * memory.token_bytes(config)
    assert held.waste == pytest.approx(1 - 134 / (4 * columns))


@pytest.mark.parametrize("block_size", [16, 64])
def test_paged_cache_wastes_last_blocks_alone(block_size):
    config = memory.small_config(128)
    held = memory.paged_cache(block_size, config, LENGTHS)
    room = int(((LENGTHS + block_size - 1) // block_size * block_size).sum())
    assert held.stored == 134 * memory.token_bytes(config)
    assert held.waste == pytest.approx(1 - 134 / room)
    assert held.reserved >= room * memory.token_bytes(config)


def test_command(tmp_path):
    arguments = [
        "--prompts",
        "3",
        "--longest",
        "64",
        "--block-sizes",
        "16,32",
        "--tolerance",
        "50",
        "--out",
        str(tmp_path),
    ]
    result = CliRunner().invoke(memory.app, arguments)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    assert [(row["impl"], row["case"].get("block_size")) for row in rows[::3]] == [
        ("dynamic", None), ("static", None), ("paged", 16), ("paged", 32),
    ]  # fmt: skip
    value = {(row["impl"], row["metric"], row["case"].get("block_size")): row["value"] for row in rows}
    # Every cache stores the same tokens, of 128 KiB each.
    tokens = int(memory.ragged_lengths(3, longest=64).sum())
    stored = [v for (_, metric, _), v in value.items() if metric == "stored_gib"]
    assert stored == pytest.approx([tokens * 131072 / 2**30] * 4)
    assert CliRunner().invoke(memory.app, [*arguments, "--tolerance", "0"]).exit_code == 1
