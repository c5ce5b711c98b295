"""Train the small language model that the repository ships, on the sources of the Python standard library.

    python eval/train_tiny.py --output eval/assets           # a few minutes on one GPU
    python eval/train_tiny.py --output /tmp/tiny --smoke     # a few steps on a CPU, to see that it runs

Writes OUTPUT/tiny_python/ (weights, configuration, tokenizer, training.json), OUTPUT/heldout.txt and
OUTPUT/LICENSE-PSF.txt. Needs hf_paged_flash with accelerate; no network and no `datasets`.
The model card is made from training.json: python eval/tiny_card.py OUTPUT/tiny_python
"""

import json
import math
import platform
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
HELDOUT_MODULES = "bisect calendar cmd colorsys fnmatch graphlib heapq sched shlex textwrap".split()
# Not library text: other tests, other packages, character tables, and documentation stored as escaped strings.
SKIPPED_FOLDERS = {"tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
SKIPPED_FILES = {"html/entities.py", "stringprep.py"}
SAMPLE_PROMPTS = [
    'def read_config(path):\n    """',
    "class Queue:\n    def __init__(self, maxsize=0):\n",
    "import os\nimport sys\n\n",
    "    try:\n        with open(filename) as f:\n",
]


@dataclass
class TinyTraining:
    """Options of the command line."""

    output: Path = field(metadata={"help": "folder to write tiny_python/, heldout.txt and LICENSE-PSF.txt into"})
    stdlib: Path = field(
        default=Path(sysconfig.get_paths()["stdlib"]),
        metadata={"help": "standard library to train on (default: the running interpreter's)"},
    )
    include_tests: bool = field(default=True, metadata={"help": "train on the library's own test/ folder as well"})
    attn_implementation: str = field(
        default="paged_flash", metadata={"help": "attention used in training and evaluation"}
    )
    steps: int = 3600
    batch_size: int = field(default=16, metadata={"help": "sequences a step"})
    context: int = field(default=2048, metadata={"help": "tokens a sequence"})
    vocab_size: int = 4096
    hidden_size: int = field(default=256, metadata={"help": "a multiple of 128: heads are 64 wide, two to a KV head"})
    layers: int = 6
    learning_rate: float = 2e-3
    weight_decay: float = 0.3
    dropout: float = field(default=0.1, metadata={"help": "on the output of every attention and MLP block"})
    evaluations: int = field(default=12, metadata={"help": "held-out evaluations; the best one's weights are kept"})
    seed: int = 0
    smoke: bool = field(default=False, metadata={"help": "a few steps of a far smaller model on a CPU"})

    def __post_init__(self):
        if self.hidden_size % 128:
            raise ValueError(f"`hidden_size` must be a multiple of 128, got {self.hidden_size}")
        if not (self.stdlib / "textwrap.py").is_file():
            raise ValueError(f"`stdlib` must be a folder of Python's library sources, got {self.stdlib}")
        if self.smoke:
            self.steps, self.batch_size, self.context, self.evaluations = 6, 4, 128, 2
            self.vocab_size, self.hidden_size, self.layers = 512, 128, 2


def training_files(stdlib: Path, include_tests: bool) -> list[Path]:
    """The sources to train on: neither a held-out module nor a test of one."""
    skipped_folders = SKIPPED_FOLDERS | (set() if include_tests else {"test"})
    heldout = {f"{name}.py" for name in HELDOUT_MODULES} | {f"test/test_{name}.py" for name in HELDOUT_MODULES}

    def wanted(relative: Path) -> bool:
        name = relative.as_posix()
        generated = name.startswith("_sysconfigdata")
        return not (skipped_folders & set(relative.parts) or name in heldout | SKIPPED_FILES or generated)

    return [path for path in sorted(stdlib.rglob("*.py")) if wanted(path.relative_to(stdlib))]


def heldout_text(stdlib: Path) -> str:
    """The held-out modules, one after the other."""
    return "\n".join((stdlib / f"{name}.py").read_text(encoding="utf-8") for name in HELDOUT_MODULES)


def train_tokenizer(texts: list[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text is representable, and decoding gives it back exactly."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT, PAD], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


class RandomWindows(Dataset):
    """`length` windows of `context` tokens of a stream (tokens,), each at a place that its index and `seed` fix."""

    def __init__(self, stream: torch.Tensor, context: int, length: int, seed: int):
        self.stream, self.context = stream, context
        self.starts = torch.randint(len(stream) - context, (length,), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = self.starts[index]
        window = self.stream[start : start + self.context].long()
        return {"input_ids": window, "labels": window}


def build_model(options: TinyTraining, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        intermediate_size=3 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        num_key_value_heads=options.hidden_size // 128,
        head_dim=64,
        max_position_embeddings=options.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=options.attn_implementation)


def add_residual_dropout(model: LlamaForCausalLM, probability: float) -> None:
    """Llama has no dropout of its own but in attention; many epochs of a small text need some on the residual."""

    def drop(module, _inputs, output):
        return F.dropout(output, probability, training=module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def train(
    options: TinyTraining, model, train_set: Dataset, heldout_set: list[dict], logging_steps: int | None = None
) -> list[dict[str, float]]:
    """Train `model` in place, put back the weights of the best held-out evaluation, return the log of losses.

    A logged loss is the mean of `logging_steps` steps; None = four logs an evaluation.
    """
    cuda = torch.cuda.is_available() and not options.smoke
    interval = max(1, options.steps // options.evaluations)
    add_residual_dropout(model, options.dropout)
    with tempfile.TemporaryDirectory() as checkpoints:
        arguments = transformers.TrainingArguments(
            output_dir=checkpoints,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, options.steps // 20),
            weight_decay=options.weight_decay,
            adam_beta2=0.95,
            optim="adamw_torch_fused" if cuda else "adamw_torch",
            bf16=cuda,
            use_cpu=not cuda,
            logging_steps=logging_steps or max(1, interval // 4),
            logging_nan_inf_filter=False,
            eval_strategy="steps",
            eval_steps=interval,
            prediction_loss_only=True,
            save_steps=interval,
            save_total_limit=1,
            save_only_model=True,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            report_to="none",
            disable_tqdm=True,
            seed=options.seed,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=train_set, eval_dataset=heldout_set)
        trainer.train()
    kept = ("step", "loss", "eval_loss", "learning_rate")
    return [{k: log[k] for k in kept if k in log} for log in trainer.state.log_history if "train_loss" not in log]


@torch.no_grad()
def heldout_loss(model, ids: torch.Tensor, context: int) -> float:
    """Mean negative log-likelihood in nats of ids (tokens,) but the first, in windows that share one token."""
    total = 0.0
    for start in range(0, len(ids) - 1, context - 1):
        window = ids[start : start + context].to(model.device)
        logits = model(window[None], use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    return total / (len(ids) - 1)


def sample_continuations(model, tokenizer, new_tokens: int, seed: int) -> list[dict[str, str]]:
    """Greedy and sampled (temperature 0.8, top-p 0.95) continuations of `SAMPLE_PROMPTS`, prompt included."""
    samples = []
    for prompt in SAMPLE_PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        for way, choice in {"greedy": {}, "sampled": {"do_sample": True, "temperature": 0.8, "top_p": 0.95}}.items():
            transformers.set_seed(seed)
            ids = model.generate(**inputs, **choice, max_new_tokens=new_tokens)[0]
            samples.append({"way": way, "text": tokenizer.decode(ids, skip_special_tokens=True)})
    return samples


def evaluate(options: TinyTraining, folder: Path, heldout: torch.Tensor, device) -> tuple[dict, list[dict[str, str]]]:
    """Losses on the ids of the held-out text (tokens,), and samples, of the model as it was saved, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=options.attn_implementation
    ).to(device)
    loss, size = heldout_loss(model.eval(), heldout, options.context), len(tokenizer.decode(heldout).encode())
    per_byte = loss * (len(heldout) - 1) / size
    result = {
        "modules": HELDOUT_MODULES,
        "tokens": len(heldout),
        "bytes": size,
        "loss": loss,
        "perplexity_per_token": math.exp(loss),
        "perplexity_per_byte": math.exp(per_byte),
        "bits_per_byte": per_byte / math.log(2),
    }
    return result, sample_continuations(model, tokenizer, 16 if options.smoke else 160, options.seed)


def read_texts(options: TinyTraining) -> tuple[list[str], str]:
    """The texts to train on, one a file, and the held-out text; a few of each for a smoke run."""
    files = training_files(options.stdlib, options.include_tests)[:: 16 if options.smoke else 1]
    heldout = heldout_text(options.stdlib)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    return texts, heldout[: 3000 if options.smoke else None]


def main(options: TinyTraining) -> None:
    if options.attn_implementation == "paged_flash":
        import hf_paged_flash  # noqa: F401  registers the implementation

    started = time.monotonic()
    licence = (Path(__file__).parent / "assets" / "LICENSE-PSF.txt").read_bytes()
    transformers.set_seed(options.seed)
    texts, heldout = read_texts(options)
    tokenizer = train_tokenizer(texts, options.vocab_size, options.context)
    tokens = [i for ids in tokenizer(texts, verbose=False)["input_ids"] for i in (*ids, tokenizer.eos_token_id)]
    heldout_ids = torch.tensor(tokenizer(heldout, verbose=False)["input_ids"])
    windows = [ids for ids in heldout_ids.split(options.context) if len(ids) == options.context]
    model = build_model(options, tokenizer)
    print(f"{len(texts)} files, {len(tokens)} tokens, {model.num_parameters()} parameters", flush=True)

    stream = torch.tensor(tokens, dtype=torch.int32)
    train_set = RandomWindows(stream, options.context, options.steps * options.batch_size, options.seed)
    losses = train(options, model, train_set, [{"input_ids": ids, "labels": ids} for ids in windows])
    folder, device = options.output / "tiny_python", model.device
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = transformers.GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=pad)
    model.config.use_cache = True  # the Trainer turned it off
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (options.output / "heldout.txt").write_text(heldout, encoding="utf-8")
    (options.output / "LICENSE-PSF.txt").write_bytes(licence)

    result, samples = evaluate(options, folder, heldout_ids, device)
    summary = {
        "options": {key: value for key, value in asdict(options).items() if key not in ("output", "stdlib")},
        "parameters": model.num_parameters(),
        "data": {
            "python": options.stdlib.name.removeprefix("python"),
            "files": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
            "tokens": len(tokens),
        },
        "heldout": result,
        "seconds": time.monotonic() - started,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"a CPU ({platform.machine()})",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "losses": losses,
        "samples": samples,
    }
    (folder / "training.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print("\n".join(f"--- {sample['way']}\n{sample['text']}" for sample in samples))
    print(json.dumps(result | {"seconds": summary["seconds"]}), flush=True)


if __name__ == "__main__":
    main(*transformers.HfArgumentParser(TinyTraining).parse_args_into_dataclasses())
