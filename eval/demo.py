"""The shipped model on paged_flash with PagedCache, beside eager with DynamicCache: same text, less memory.

    hf-paged-flash demo                        # on the GPU where there is one
    hf-paged-flash demo --device cpu --new-tokens 16

Exit status 1: the texts differ in fp32.
"""

import time
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

import hf_paged_flash
from hf_paged_flash.eval.bench.timing import bench_device
from hf_paged_flash.eval.comparison import Result, evaluate, results_of
from hf_paged_flash.eval.report import console, final_line, launch
from hf_paged_flash.eval.results import device_name, versions
from hf_paged_flash.eval.text import batched, load_text, strided_windows
from hf_paged_flash.eval.ways import OURS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# Seven words to a few hundred tokens: a padded batch pays for its longest row in every row.
PROMPTS = (
    "import os\nimport sys\n\n",
    'def read_config(path):\n    """',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
)
# The longest prompt: so many characters from the start of the held-out text.
LONG_PROMPT = 1200


@dataclass(frozen=True)
class Generated:
    """One implementation's answer: new tokens (rows, new), their texts, the rate, and its cache's K/V bytes."""

    cache: str
    tokens: torch.Tensor
    texts: list[str]
    tokens_per_s: float
    bytes_stored: int
    bytes_reserved: int

    @property
    def waste(self) -> float:
        return 1 - self.bytes_stored / self.bytes_reserved


def kv_bytes(cache: Cache, real_tokens: int) -> tuple[int, int]:
    """K/V bytes stored and reserved. A cache of transformers stores `real_tokens` among the columns of its tensors."""
    if isinstance(cache, hf_paged_flash.PagedCache):
        memory = cache.memory()
        return memory.bytes_stored, memory.bytes_reserved
    reserved = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    rows, _, columns, _ = cache.layers[0].keys.shape
    return reserved * real_tokens // (rows * columns), reserved


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], new_tokens: int
) -> Generated:
    """Greedy continuation of a left-padded batch, `new_tokens` each, on the cache that generate() makes by itself."""
    inputs = tokenizer(prompts, padding=True, return_tensors="pt").to(model.device)
    options = {"do_sample": False, "return_dict_in_generate": True, "pad_token_id": tokenizer.pad_token_id}
    # Every row gets the same number of tokens, so that rates compare.
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    model.generate(**inputs, **options, max_new_tokens=2)  # compiles kernels, where there are any to compile
    start = time.perf_counter()
    output = model.generate(**inputs, **options, **lengths)
    tokens = output.sequences[:, inputs.input_ids.shape[1] :].cpu()  # waits for the device
    seconds = time.perf_counter() - start
    # The last new token is never fed back, so it has no K/V.
    real_tokens = int(inputs.attention_mask.sum()) + len(prompts) * (new_tokens - 1)
    stored, reserved = kv_bytes(output.past_key_values, real_tokens)
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return Generated(type(output.past_key_values).__name__, tokens, texts, tokens.numel() / seconds, stored, reserved)


def perplexities(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> dict[str, Result]:
    """Perplexity of eager and of ours, one token at a time from the cache, on the end of the held-out text."""
    tokens = torch.tensor(tokenizer(load_text(), verbose=False).input_ids[-max_tokens:])
    batches = batched(strided_windows(len(tokens), window=256, stride=128), batch_size=16)
    measured = evaluate(model, tokens, batches, implementations=["eager", OURS], ways=["decode"], chunk=128)
    return {row.implementation: row for row in results_of(measured, model.device)}


def ran_on(counters: hf_paged_flash.Counters, device: torch.device) -> str:
    """Which of ours did the work, from what the counters saw."""
    if counters.kernel_total and not counters.reference_total:
        return f"Triton kernels on {device_name(device) if device.type == 'cuda' else 'the CPU, interpreted'}"
    if counters.reference_total and not counters.kernel_total:
        return (
            f"the torch reference on {device_name(device)}" if device.type == "cuda" else "the CPU (torch reference)"
        )
    return f"{counters.kernel_total} kernel and {counters.reference_total} reference calls"


def _texts(prompts: list[str], eager: Generated, ours: Generated) -> Text:
    text = Text()
    for prompt, theirs, mine, same in zip(
        prompts, eager.texts, ours.texts, (eager.tokens == ours.tokens).all(1).tolist(), strict=True
    ):
        shown = prompt if len(prompt) < 120 else "…" + prompt[-80:]
        text.append(shown, style="dim").append(mine.rstrip(), style="cyan")
        text.append("\n= eager\n\n" if same else f"\n≠ eager: {theirs.rstrip()}\n\n", style="green" if same else "red")
    text.rstrip()
    return text


def _table(eager: Generated, ours: Generated, ppl: dict[str, Result]) -> Table:
    table = Table()
    table.add_column("")
    both = (eager, ours)
    for name, item in zip(("eager", OURS), both, strict=True):
        table.add_column(f"{name}, {item.cache}", justify="right")
    same = int((eager.tokens == ours.tokens).sum())
    table.add_row("tokens equal to eager's", "", f"{same} of {eager.tokens.numel()}")
    table.add_row("tokens/s", *(f"{item.tokens_per_s:,.0f}" for item in both))
    table.add_row("K/V stored, KiB", *(f"{item.bytes_stored / 1024:,.0f}" for item in both))
    table.add_row("K/V reserved, KiB", *(f"{item.bytes_reserved / 1024:,.0f}" for item in both))
    table.add_row("waste", *(f"{item.waste:.1%}" for item in both))
    table.add_row("perplexity", *(f"{ppl[name].ppl:.4f}" for name in ("eager", OURS)))
    table.add_row("difference", "", f"{ppl[OURS].delta_ppl:+.1e}")
    return table


@app.command()
def main(
    new_tokens: Annotated[int, typer.Option(help="tokens to generate for each prompt")] = 48,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    device: Annotated[str | None, typer.Option(help="torch device; default: the GPU where there is one")] = None,
    max_tokens: Annotated[int, typer.Option(help="held-out tokens for the perplexity")] = 2048,
) -> None:
    """Generates and scores with paged_flash and with eager, and shows what is equal and what is saved."""
    from hf_paged_flash.eval import assets

    settled = bench_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = assets.model_path()
    prompts = [*PROMPTS, load_text()[:LONG_PROMPT]]
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def load(implementation: str) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=implementation)
        return model.to(settled).eval()

    eager = generate(load("eager"), tokenizer, prompts, new_tokens)
    hf_paged_flash.reset_counters()
    model = load(OURS)
    ours = generate(model, tokenizer, prompts, new_tokens)
    counters = hf_paged_flash.counters()
    ppl = perplexities(model, tokenizer, max_tokens)

    same = torch.equal(eager.tokens, ours.tokens)
    where = ran_on(counters, settled)
    screen = console()
    lengths = sorted(len(ids) for ids in tokenizer(prompts).input_ids)
    screen.print(Panel(_texts(prompts, eager, ours), title=f"{len(prompts)} prompts of {lengths} tokens, greedy"))
    screen.print(_table(eager, ours, ppl))
    screen.print(f"paged_flash ran on {where}; {dtype}; text {'equal' if same else 'DIFFERENT'}", markup=False)
    summary = {
        "demo": "tiny_python", "device": str(settled), "gpu": device_name(settled), **versions(), "dtype": dtype,
        "ran_on": where, "equal": same, "tokens_per_s": {"eager": eager.tokens_per_s, OURS: ours.tokens_per_s},
        "waste": {"eager": eager.waste, OURS: ours.waste}, "ppl": {name: row.ppl for name, row in ppl.items()},
    }  # fmt: skip
    final_line(summary)
    if not same and dtype == "float32":
        raise typer.Exit(1)


if __name__ == "__main__":
    launch(app)
