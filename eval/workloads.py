"""What people generate: each workload feeds K/V caches step by step, and does the same through generate().

`feed` drives `FedCaches`; `generate` calls a model with a cache that it is given. `scale` multiplies lengths, turns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from transformers import Cache, LogitsProcessor, PreTrainedConfig, PreTrainedModel, StaticCache

from hf_paged_flash.eval.fed_caches import FedCaches, llama_8b, mistral_7b


@dataclass(frozen=True)
class Workload:
    """A way of using a cache.

    Attributes:
        name: as results have it, with its numbers.
        title: in words.
        config: from a number of layers to the model's configuration.
        rows, columns: a StaticCache's size.
        feed: feeds caches as generate() would.
        generate: calls a model's generate() with a cache.
    """

    name: str
    title: str
    config: Callable[[int], PreTrainedConfig]
    rows: int
    columns: int
    feed: Callable[[FedCaches], None]
    generate: Callable[[PreTrainedModel, Cache], None]


def log_uniform(count: int, shortest: int, longest: int, seed: int = 0) -> torch.Tensor:
    """Lengths (count,) int64."""
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.log(torch.tensor(float(shortest))), torch.log(torch.tensor(float(longest)))
    return torch.exp(torch.rand(count, generator=generator) * (high - low) + low).long()


def left_padded(lengths: torch.Tensor) -> torch.Tensor:
    """The mask int64 (rows, longest)."""
    return (torch.arange(int(lengths.max()))[None] >= lengths.max() - lengths[:, None]).long()


def _some(count: int, scale: float) -> int:
    return max(2, round(count * scale))


def _ids(mask: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Random tokens from 3 on, 0 in padding."""
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(3, 30000, mask.shape, generator=generator) * mask).to(device)


def _generate(model: PreTrainedModel, cache: Cache, ids: torch.Tensor, mask: torch.Tensor, **options) -> torch.Tensor:
    torch.manual_seed(0)
    # compiling a StaticCache's steps takes minutes, and room of its own
    options = {"do_sample": False, "disable_compile": isinstance(cache, StaticCache)} | options
    return model.generate(ids, attention_mask=mask.to(ids.device), past_key_values=cache, **options)


def ragged(scale: float = 1.0) -> Workload:
    """Prompts of very different lengths in one batch; unscaled 23,545 tokens, 104,192 once padded to the longest."""
    longest, new = _some(4096, scale), _some(256, scale)
    lengths = log_uniform(32, min(32, longest // 2), longest)
    mask = left_padded(lengths)

    def feed(caches: FedCaches) -> None:
        caches.forward(mask)
        for _ in range(new):
            caches.forward(mask.new_ones(32, 1))

    def generate(model: PreTrainedModel, cache: Cache) -> None:
        _generate(model, cache, _ids(mask, model.device), mask, max_new_tokens=new + 1)

    title = f"32 prompts of {int(lengths.min())} to {int(lengths.max())} tokens, {new} new"
    return Workload(f"ragged-32x{longest}", title, llama_8b, 32, mask.shape[1] + new, feed, generate)


def samples(scale: float = 1.0) -> Workload:
    """Samples of one prompt."""
    prompt, new = _some(2048, scale), _some(256, scale)
    mask = torch.ones(1, prompt, dtype=torch.long)

    def feed(caches: FedCaches) -> None:
        caches.prompt(prompt, 16)
        for _ in range(new):
            caches.forward(mask.new_ones(16, 1))

    def generate(model: PreTrainedModel, cache: Cache) -> None:
        options = {"do_sample": True, "num_return_sequences": 16, "max_new_tokens": new + 1}
        _generate(model, cache, _ids(mask, model.device), mask, **options)

    title = f"16 samples of a prompt of {prompt} tokens, {new} new"
    return Workload(f"samples-16x{prompt}", title, llama_8b, 16, prompt + new, feed, generate)


def beams(scale: float = 1.0) -> Workload:
    """Beam search; fed, half of the beams lose their place in every eighth step."""
    prompt, new = _some(2048, scale), _some(256, scale)
    mask = torch.ones(1, prompt, dtype=torch.long)

    def feed(caches: FedCaches) -> None:
        generator = torch.Generator().manual_seed(0)
        caches.prompt(prompt, 8)
        for step in range(new):
            caches.forward(mask.new_ones(8, 1))
            rows = torch.arange(8)
            if step % 8 == 7:
                rows = torch.randperm(8, generator=generator)[:4].repeat(2).sort().values
            caches.reorder(rows)

    def generate(model: PreTrainedModel, cache: Cache) -> None:
        _generate(model, cache, _ids(mask, model.device), mask, num_beams=8, max_new_tokens=new + 1)

    title = f"8 beams of a prompt of {prompt} tokens, {new} new"
    return Workload(f"beams-8x{prompt}", title, llama_8b, 8, prompt + new, feed, generate)


def chats(scale: float = 1.0) -> Workload:
    """Chats of several turns on one cache: questions and answers of different lengths, padded to the longest.

    generate() can't end one row's answer and go on with others': there all answers of a turn are of one length.
    """
    turns, longest, answer = _some(10, scale), _some(256, scale), _some(128, scale)
    questions = [log_uniform(16, min(16, longest // 2), longest, seed=turn) for turn in range(turns)]
    answers = [log_uniform(16, min(16, answer // 2), answer, seed=100 + turn) for turn in range(turns)]

    def feed(caches: FedCaches) -> None:
        for question, answered in zip(questions, answers, strict=True):
            caches.forward(left_padded(question))
            for step in range(int(answered.max())):
                caches.forward((answered > step).long()[:, None])

    def generate(model: PreTrainedModel, cache: Cache) -> None:
        ids = mask = torch.zeros(16, 0, dtype=torch.long)
        for question, answered in zip(questions, answers, strict=True):
            turn = left_padded(question)
            ids = torch.cat([ids.to(model.device), _ids(turn, model.device)], 1)
            mask, new = torch.cat([mask, turn], 1), int(answered.max())
            ids = _generate(model, cache, ids, mask, max_new_tokens=new)
            mask = torch.cat([mask, mask.new_ones(16, new)], 1)

    columns = sum(int(length.max()) for length in (*questions, *answers))
    title = f"16 chats of {turns} turns, questions and answers up to {longest} and {answer} tokens"
    return Workload(f"chats-16x{turns}", title, llama_8b, 16, columns, feed, generate)


def window(scale: float = 1.0) -> Workload:
    """Long prompts, fed in chunks, where every layer sees a window alone."""
    size, prompt, new = _some(4096, scale), _some(16384, scale), _some(256, scale)
    chunk = max(1, prompt // 16)
    mask = torch.ones(4, prompt, dtype=torch.long)

    def feed(caches: FedCaches) -> None:
        for part in mask.split(chunk, 1):
            caches.forward(part)
        for _ in range(new):
            caches.forward(mask.new_ones(4, 1))

    def generate(model: PreTrainedModel, cache: Cache) -> None:
        options = {"prefill_chunk_size": chunk, "max_new_tokens": new + 1}
        _generate(model, cache, _ids(mask, model.device), mask, **options)

    title = f"4 prompts of {prompt} tokens under a window of {size}, {new} new"
    return Workload(f"window-{size}", title, partial(mistral_7b, window=size), 4, prompt + new, feed, generate)


class _EndsAt(LogitsProcessor):
    """Row i ends after `lengths[i]` new tokens, with token 2, and not before."""

    def __init__(self, prompt: int, lengths: torch.Tensor) -> None:
        self.prompt, self.lengths = prompt, lengths

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        ends = (self.lengths <= input_ids.shape[1] - self.prompt).to(scores.device)
        scores[:, 2] = torch.where(ends, torch.inf, -torch.inf)
        return scores


def early_finish(scale: float = 1.0) -> Workload:
    """Answers of very different lengths; fed, a row leaves when it is done, in generate() it stays to the end."""
    prompt, longest = _some(1024, scale), _some(1024, scale)
    mask = torch.ones(32, prompt, dtype=torch.long)
    lengths = log_uniform(32, min(32, longest // 2), longest)

    def feed(caches: FedCaches) -> None:
        left = lengths
        caches.forward(mask)
        for step in range(int(lengths.max())):
            if bool((left <= step).any()):
                rows = torch.nonzero(left > step)[:, 0]
                caches.keep(rows)
                left = left[rows]
            caches.forward(mask.new_ones(len(left), 1))

    def generate(model: PreTrainedModel, cache: Cache) -> None:
        options = {"eos_token_id": 2, "logits_processor": [_EndsAt(prompt, lengths)]}
        _generate(model, cache, _ids(mask, model.device), mask, max_new_tokens=int(lengths.max()) + 1, **options)

    title = f"32 prompts of {prompt} tokens, answers of {int(lengths.min())} to {int(lengths.max())}"
    return Workload(f"early-finish-32x{prompt}", title, llama_8b, 32, prompt + int(lengths.max()), feed, generate)


WORKLOADS = {made.__name__.replace("_", "-"): made for made in (ragged, samples, beams, chats, window, early_finish)}
