"""K/V memory of a ragged batch: DynamicCache pads it, StaticCache reserves the maximum, PagedCache stores its tokens.

    hf-paged-flash memory                                  # 32 prompts of 32 to 4096 tokens, log-uniform
    hf-paged-flash memory --block-sizes 16,64 --max-length 8192

The caches are really filled, with the K/V of a small model, and asked what they hold; the table scales these bytes to
Llama-3.1-8B's 128 KiB a token (32 layers, 8 key/value heads, head_dim 128, bf16), as all of them are proportional to
the bytes of one token. PagedCache is filled by a prefill of the left-padded batch.
Exit status 1: more than `--tolerance` percent of what PagedCache reserves is waste at the smallest block size.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from transformers import AutoModel, DynamicCache, LlamaConfig, StaticCache

from hf_paged_flash.eval.report import console, final_line, launch, names_of
from hf_paged_flash.eval.results import Recorder, results_folder, versions

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

LLAMA_8B_TOKEN_BYTES = 2 * 32 * 8 * 128 * 2
BLOCK_SIZES = (16, 32, 64, 128, 256)
GIB = 2**30


@dataclass(frozen=True)
class Held:
    """Bytes of K/V that a cache reserved, and those that real tokens fill."""

    cache: str
    block_size: int | None
    reserved: float
    stored: float

    @property
    def waste(self) -> float:
        """The share of what is reserved that no token fills."""
        return 1 - self.stored / self.reserved

    def scaled(self, factor: float) -> "Held":
        return Held(self.cache, self.block_size, self.reserved * factor, self.stored * factor)


def ragged_lengths(prompts: int = 32, shortest: int = 32, longest: int = 4096, seed: int = 0) -> torch.Tensor:
    """Log-uniform prompt lengths, (prompts,) int64; with the defaults 23,545 tokens, 104,192 once padded."""
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.log(torch.tensor(float(shortest))), torch.log(torch.tensor(float(longest)))
    return torch.exp(torch.rand(prompts, generator=generator) * (high - low) + low).long()


def small_config(longest: int) -> LlamaConfig:
    """A Llama of two layers, with one key/value head of width 16: 256 bytes of K/V a token in fp32."""
    return LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=longest,
    )


def token_bytes(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of one token's K and V over all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


def padded_cache(cache: DynamicCache | StaticCache, name: str, config: LlamaConfig, lengths: torch.Tensor) -> Held:
    """Fills a cache of transformers with the padded batch, as generate() does, and counts the bytes of its tensors."""
    shape = (len(lengths), config.num_key_value_heads, int(lengths.max()), config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.zeros(shape), torch.zeros(shape), layer)
    reserved = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    stored = int(lengths.sum()) * token_bytes(config)
    return Held(name, None, reserved, stored)


@torch.no_grad()
def paged_cache(block_size: int, config: LlamaConfig, lengths: torch.Tensor) -> Held:
    """Fills a PagedCache by a prefill of the left-padded batch and asks it for its bytes."""
    from hf_paged_flash import PagedCache

    model = AutoModel.from_config(config, attn_implementation="paged_flash").eval()
    columns = torch.arange(int(lengths.max()))
    mask = (columns[None] >= (lengths.max() - lengths)[:, None]).long()
    cache = PagedCache(config, block_size=block_size)
    model(input_ids=torch.zeros_like(mask), attention_mask=mask, past_key_values=cache, use_cache=True)
    memory = cache.memory()
    return Held("paged", block_size, memory.bytes_reserved, memory.bytes_stored)


def measure(lengths: torch.Tensor, block_sizes: list[int], max_length: int) -> list[Held]:
    """All caches on one batch, in bytes of Llama-3.1-8B's K/V; `lengths` (rows,) int64."""
    config = small_config(max(max_length, int(lengths.max())))
    held = [
        padded_cache(DynamicCache(config=config), "dynamic", config, lengths),
        padded_cache(StaticCache(config=config, max_cache_len=max_length), "static", config, lengths),
        *(paged_cache(size, config, lengths) for size in block_sizes),
    ]
    return [item.scaled(LLAMA_8B_TOKEN_BYTES / token_bytes(config)) for item in held]


def _table(held: list[Held], lengths: torch.Tensor, max_length: int) -> Table:
    names = {
        "dynamic": "DynamicCache, padded",
        "static": f"StaticCache, {max_length} tokens a row",
        "paged": "PagedCache",
    }
    span = f"{int(lengths.min())} to {int(lengths.max())} tokens, {int(lengths.sum())} in all"
    table = Table(
        title=f"K/V of {len(lengths)} prompts, {span}",
        caption="bytes as of Llama-3.1-8B in bf16; waste: reserved room that no token fills",
    )
    table.add_column("cache")
    for heading in ("block size", "reserved GiB", "stored GiB", "waste"):
        table.add_column(heading, justify="right")
    for item in held:
        row = (f"{item.reserved / GIB:.2f}", f"{item.stored / GIB:.2f}", f"{item.waste:.1%}")
        style = "green" if item.cache == "paged" else ""
        table.add_row(names[item.cache], str(item.block_size or "–"), *row, style=style)
    return table


@app.command()
def main(
    prompts: Annotated[int, typer.Option(help="rows of the batch")] = 32,
    longest: Annotated[int, typer.Option(help="longest prompt; lengths are log-uniform from 32")] = 4096,
    max_length: Annotated[
        int | None, typer.Option(help="StaticCache's length; default: the longest prompt allowed")
    ] = None,
    block_sizes: Annotated[str, typer.Option(help="tokens a block")] = ",".join(map(str, BLOCK_SIZES)),
    tolerance: Annotated[float, typer.Option(help="largest waste in %% at the smallest block size")] = 4.0,
    record: Annotated[bool, typer.Option(help="append rows to eval/results/memory.jsonl")] = False,
    out: Annotated[Path | None, typer.Option(help="append rows in this folder instead")] = None,
) -> None:
    """K/V bytes reserved, stored and wasted by DynamicCache, StaticCache and PagedCache on a ragged batch."""
    recorder = Recorder("memory", device="cpu", folder=results_folder(record, out))
    lengths = ragged_lengths(prompts, longest=longest)
    sizes = sorted(int(size) for size in names_of(block_sizes, tuple(map(str, BLOCK_SIZES)), "block_sizes"))
    held = measure(lengths, sizes, max_length or longest)
    console().print(_table(held, lengths, max_length or longest))
    for item in held:
        case = {"workload": f"ragged-{prompts}x{longest}"}
        if item.block_size is not None:
            case["block_size"] = item.block_size
        recorder.add(case, item.cache, "reserved_gib", item.reserved / GIB)
        recorder.add(case, item.cache, "stored_gib", item.stored / GIB)
        recorder.add(case, item.cache, "waste_pct", item.waste * 100)
    rows = [{key: row[key] for key in ("case", "impl", "metric", "value")} for row in recorder.rows]
    smallest = next(item for item in held if item.block_size == sizes[0])
    passed = smallest.waste * 100 <= tolerance
    recorder.write()
    final_line({"bench": "memory", "run": recorder.run, **versions(), "passed": passed, "rows": rows})
    if not passed:
        raise typer.Exit(1)


if __name__ == "__main__":
    launch(app)
