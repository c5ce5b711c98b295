"""Tiny random models, one a feature of attention: what a test of a whole model needs, built in milliseconds."""

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 97
WINDOW = 12  # of the models with sliding windows: shorter than most test prompts

_COMMON = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
_MIXED_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
_CONFIGS = {
    "llama": _COMMON,
    "qwen3": _COMMON | dict(head_dim=32),
    "mistral": _COMMON | dict(sliding_window=WINDOW),
    "gemma2": _COMMON | dict(head_dim=32, sliding_window=WINDOW, query_pre_attn_scalar=32),
    "gemma3_text": _COMMON | dict(head_dim=32, sliding_window=WINDOW, layer_types=_MIXED_WINDOWS),
    "phi3": _COMMON,
    "gpt_oss": _COMMON
    | dict(
        head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW, layer_types=_MIXED_WINDOWS
    ),
    "gpt2": dict(
        vocab_size=VOCAB_SIZE,
        n_embd=64,
        n_layer=3,
        n_head=4,
        n_positions=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    ),
    "deepseek_v3": _COMMON
    | dict(
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=32,
    ),
}
MODEL_TYPES = tuple(_CONFIGS)


def tiny_config(model_type: str, **changes) -> PreTrainedConfig:
    """The configuration of a tiny `model_type` with `changes`; its sizes, if it is not of MODEL_TYPES, are llama's."""
    return AutoConfig.for_model(model_type, **_CONFIGS.get(model_type, _COMMON) | changes)


def tiny_model(
    config: PreTrainedConfig, attn_implementation: str, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model in eval mode; one seed gives the same weights under every `attn_implementation`.

    The weights are large enough for attention to matter: with the usual 0.02 a tiny model hardly looks at its past.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = copy.deepcopy(config)  # a model writes the implementation into its config
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation, dtype=dtype)
    randomize(model, seed)
    return model.eval()


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Normal weights, std 0.12 for matrices and 1 for attention sinks; other vectors stay as they were made."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        std = 0.12 if parameter.dim() > 1 else 1.0 if "sinks" in name else None
        if std is not None:
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def ragged_batch(
    lengths: Sequence[int], pad: Literal["left", "right"] | None = "left", *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask), both int64 (len(lengths), max(lengths)); rows padded with 0 on side `pad`.

    The tokens of a row depend on its index and `seed` alone, not on the padding. `pad=None` takes equal lengths.
    """
    if pad is None and len(set(lengths)) > 1:
        raise ValueError(f"`lengths` must be equal without padding, got {list(lengths)}")
    columns = max(lengths)
    input_ids = torch.zeros(len(lengths), columns, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(1000 * seed + row)
        tokens = torch.randint(2, VOCAB_SIZE, (length,), generator=generator)
        place = slice(0, length) if pad == "right" else slice(columns - length, columns)
        input_ids[row, place] = tokens
        attention_mask[row, place] = 1
    return input_ids, attention_mask
