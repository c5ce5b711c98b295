"""K/V caches of Llama-3.1-8B's shape that are fed as a model and generate() feed them, without a model or a gigabyte.

They are driven through their own methods with keys and values on the meta device: shapes and bytes are real, memory is
not taken. After every forward each is asked what it has reserved, beside what a perfect cache would hold: the K/V of
every token that a later step may attend to, once.
"""

from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache, LlamaConfig, MistralConfig, PreTrainedConfig, StaticCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from hf_paged_flash import PagedCache

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 131072,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "dtype": torch.bfloat16,
}


def llama_8b(layers: int) -> LlamaConfig:
    """Llama-3.1-8B's shape: with 32 layers 128 KiB of K/V a token, in bf16."""
    return LlamaConfig(num_hidden_layers=layers, **SHAPE)


def mistral_7b(layers: int, window: int) -> MistralConfig:
    """Mistral-7B's shape, as much K/V a token; every layer has a sliding window."""
    return MistralConfig(num_hidden_layers=layers, sliding_window=window, **SHAPE)


@dataclass(frozen=True)
class Sample:
    """Bytes that a cache has reserved after a forward, and those of a perfect cache."""

    reserved: int
    needed: int


class FedCaches:
    """Caches under one workload, side by side.

    Args:
        config: the model's.
        columns: the most that the workload feeds: what a StaticCache is made for.
        block_sizes: of a PagedCache each.

    Attributes:
        samples: {(implementation, block size or None): what it held after each forward}.
    """

    def __init__(self, config: PreTrainedConfig, columns: int, block_sizes: list[int]) -> None:
        self.config = config
        config._attn_implementation = "paged_flash"  # its mask function tells a PagedCache what is padding
        self.caches: dict[tuple[str, int | None], Cache] = {
            ("dynamic", None): DynamicCache(config=config),
            ("static", None): StaticCache(config=config, max_cache_len=columns),
            **{("paged", size): PagedCache(config, block_size=size) for size in block_sizes},
        }
        self.samples: dict[tuple[str, int | None], list[Sample]] = {key: [] for key in self.caches}
        self.rows = 0
        self.mask: torch.Tensor | None = None
        self.tokens = torch.zeros(0, 0, dtype=torch.long)  # (rows, columns), one number for the same token
        self._next_token = 0

    def forward(self, new: torch.Tensor) -> None:
        """Every row's next columns, `new` (rows, columns): 1 where there is a token, 0 for padding."""
        if self.mask is None:
            self.mask = self.tokens = new.new_zeros(len(new), 0)
            self.rows = len(new)
        self.mask = torch.cat([self.mask, new], 1)
        self.tokens = torch.cat([self.tokens, self._numbers(new.shape)], 1)
        for (kind, _), cache in self.caches.items():
            self._feed(cache, kind, self.rows if kind == "static" else len(new), new.shape[1], self.mask)
        self._sample()

    def prompt(self, length: int, repeats: int) -> None:
        """One prompt that `repeats` rows start with: a cache that can share it is fed once, others `repeats` times."""
        self.rows = repeats
        self.mask = torch.ones(repeats, length, dtype=torch.long)
        self.tokens = self._numbers((1, length)).repeat(repeats, 1)
        for (kind, _), cache in self.caches.items():
            if kind == "paged":
                self._feed(cache, kind, 1, length, self.mask[:1])
                cache.batch_repeat_interleave(repeats)
            else:
                self._feed(cache, kind, repeats, length, self.mask)
        self._sample()

    def reorder(self, rows: torch.Tensor) -> None:
        """Row i becomes what row `rows[i]` was; a StaticCache's rows move in place."""
        for (kind, _), cache in self.caches.items():
            if kind != "static":
                cache.reorder_cache(rows if kind == "paged" else rows.to("meta"))
        self.mask, self.tokens = self.mask[rows], self.tokens[rows]

    def keep(self, rows: torch.Tensor) -> None:
        """All rows but `rows` are done and leave; a StaticCache's batch can't change."""
        for (kind, _), cache in self.caches.items():
            if kind != "static":
                cache.batch_select_indices(rows if kind == "paged" else rows.to("meta"))
        self.mask, self.tokens = self.mask[rows], self.tokens[rows]

    def _feed(self, cache: Cache, kind: str, rows: int, columns: int, mask: torch.Tensor) -> None:
        if kind == "paged":
            embeds = torch.empty(rows, columns, 1)
            has_window = getattr(self.config, "sliding_window", None) is not None
            make_mask = create_sliding_window_causal_mask if has_window else create_causal_mask
            make_mask(config=self.config, inputs_embeds=embeds, attention_mask=mask, past_key_values=cache)
        shape = (rows, self.config.num_key_value_heads, columns, self.config.head_dim)
        keys = torch.empty(shape, dtype=self.config.dtype, device="meta")
        for layer in range(self.config.num_hidden_layers):
            cache.update(keys, keys, layer)

    def _numbers(self, shape: tuple[int, int]) -> torch.Tensor:
        first, self._next_token = self._next_token, self._next_token + shape[0] * shape[1]
        return torch.arange(first, self._next_token).view(shape)

    def _sample(self) -> None:
        config = self.config
        token_bytes = 2 * config.num_key_value_heads * config.head_dim * config.dtype.itemsize
        needed = self._needed() * token_bytes * config.num_hidden_layers
        for key, cache in self.caches.items():
            if key[0] == "paged":
                reserved = cache.memory().bytes_reserved
            else:
                reserved = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
            self.samples[key].append(Sample(reserved, needed))

    def _needed(self) -> int:
        real = self.mask.bool()
        window = getattr(self.config, "sliding_window", None)
        if window is not None:  # the next query sees itself and as many before it
            real = real & (real.flip(1).cumsum(1).flip(1) < window)
        return len(torch.unique(self.tokens[real]))
