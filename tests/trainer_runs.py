"""Runs of transformers' Trainer on a tiny model, one a way of training, for tests to compare losses of."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments

from hf_paged_flash.eval.assets import model_path
from tests.tiny_models import VOCAB_SIZE, tiny_config, tiny_model

STEPS = 6
ROWS_PER_STEP = 4


def padding():
    tokenizer = AutoTokenizer.from_pretrained(model_path(), padding_side="right")
    return DataCollatorForSeq2Seq(tokenizer)


def flattening():
    return DataCollatorWithFlattening()


def flattening_with_offsets():
    return DataCollatorWithFlattening(return_flash_attn_kwargs=True)


@dataclass(frozen=True)
class Way:
    """How a model is trained.

    Attributes:
        collator: makes the collator.
        arguments: of TrainingArguments.
        wrap: what the model becomes before it is trained, e.g. with adapters.
    """

    collator: Callable = padding
    arguments: dict = field(default_factory=dict)
    wrap: Callable = lambda model: model


def with_lora(model):
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


WAYS = {
    "padding": Way(),
    "position_ids": Way(flattening),
    "offsets": Way(flattening_with_offsets),
    "checkpointing": Way(arguments={"gradient_checkpointing": True}),
    "checkpointing, reentrant, packed": Way(
        flattening, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    ),
    "checkpointing, cache left on": Way(arguments={"gradient_checkpointing": True, "use_cache": True}),
    "cache left on": Way(arguments={"use_cache": True}),
    "accumulation": Way(flattening, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "lora": Way(wrap=with_lora),
    "lora, packed, checkpointing": Way(flattening_with_offsets, {"gradient_checkpointing": True}, wrap=with_lora),
}


def ragged_rows(count: int) -> list[dict[str, list[int]]]:
    """Rows of 5 to 40 tokens, each a run of numbers that counts up: there is something to learn."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for _ in range(count):
        length, first, step = (
            int(torch.randint(a, b, (), generator=generator)) for a, b in ((5, 41), (0, VOCAB_SIZE), (1, 4))
        )
        rows.append([2 + (first + step * i) % (VOCAB_SIZE - 2) for i in range(length)])
    return [{"input_ids": row, "labels": row} for row in rows]


def losses(way: Way, attention: str, *, model_type: str = "llama", **arguments) -> list[float]:
    """The loss of every step of a training run under `attention`; the same seed, weights and batches for each.

    `arguments` are further ones of TrainingArguments, e.g. `use_cpu`.
    """
    model = way.wrap(tiny_model(tiny_config(model_type), attention).train())
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=ROWS_PER_STEP, learning_rate=3e-3,
            lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            seed=0, dataloader_pin_memory=False,
        ) | way.arguments | arguments  # fmt: skip
        trainer = Trainer(
            model, TrainingArguments(**settings), train_dataset=ragged_rows(STEPS * ROWS_PER_STEP),
            data_collator=way.collator(),
        )  # fmt: skip
        trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]
