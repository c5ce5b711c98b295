"""The script that makes the shipped model runs on a CPU, and what is shipped is what its card says."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_paged_flash.eval import train_tiny
from hf_paged_flash.eval.assets import heldout_path, model_path

EVAL = Path(train_tiny.__file__).parent


def read_training(folder: Path) -> dict:
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("tiny")
    for command in (["train_tiny.py", "--output", output, "--smoke"], ["tiny_card.py", output / "tiny_python"]):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        script = [sys.executable, EVAL / command[0], *command[1:]]
        subprocess.run(script, check=True, env=environment, cwd=output, timeout=200)
    return output


@pytest.mark.slow
def test_smoke_run_learns_and_writes_a_loadable_model(smoke_run):
    training = read_training(smoke_run / "tiny_python")
    held_out = [log["eval_loss"] for log in training["losses"] if "eval_loss" in log]
    assert held_out[-1] < held_out[0] < math.log(training["options"]["vocab_size"])

    model = AutoModelForCausalLM.from_pretrained(smoke_run / "tiny_python", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smoke_run / "tiny_python")
    ids = torch.tensor(tokenizer((smoke_run / "heldout.txt").read_text(encoding="utf-8"))["input_ids"])
    loss = train_tiny.heldout_loss(model.eval(), ids, training["options"]["context"])
    assert loss == pytest.approx(training["heldout"]["loss"], rel=1e-4)
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (smoke_run / "LICENSE-PSF.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_model_card_tells_the_recorded_numbers(smoke_run):
    card = (smoke_run / "tiny_python" / "README.md").read_text(encoding="utf-8")
    training = read_training(smoke_run / "tiny_python")
    assert f"{training['heldout']['perplexity_per_token']:.3f} per token" in card
    assert f"| {training['options']['steps']} |" in card
    assert card.count("```python\n") == 2 * len(train_tiny.SAMPLE_PROMPTS)


def test_held_out_modules_and_their_tests_are_not_trained_on(tmp_path):
    for name in (
        "ast.py",
        "heapq.py",
        "test/test_heapq.py",
        "test/test_ast.py",
        "email/tests/a.py",
        "encodings/cp1.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def names(include_tests):
        return [path.relative_to(tmp_path).as_posix() for path in train_tiny.training_files(tmp_path, include_tests)]

    assert names(include_tests=False) == ["ast.py"]
    assert names(include_tests=True) == ["ast.py", "test/test_ast.py"]


def test_held_out_loss_counts_every_token_but_the_first_once():
    class Uniform(torch.nn.Module):
        """Logits (1, tokens, 8) that favour no token, so every scored token costs log 8."""

        device = torch.device("cpu")
        scored = 0

        def forward(self, ids, use_cache):
            self.scored += ids.shape[1] - 1
            return type("Output", (), {"logits": torch.zeros(*ids.shape, 8)})

    for length in (2, 15, 16, 17, 31, 32, 46):
        model = Uniform()
        loss = train_tiny.heldout_loss(model, torch.arange(length) % 8, context=16)
        assert model.scored == length - 1
        assert loss == pytest.approx(math.log(8))


def test_shipped_model_is_small_and_ready_for_batches():
    assert (model_path() / "model.safetensors").stat().st_size <= 16e6
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path())
    config, special = model.config, (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert 3e6 <= model.num_parameters() <= 8e6
    assert config.head_dim == 64 and config.num_key_value_heads < config.num_attention_heads and config.use_cache
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert special == (config.bos_token_id, config.eos_token_id, config.pad_token_id)
    generation = model.generation_config
    assert special == (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id)


def test_shipped_texts_are_those_of_the_card():
    heldout = read_training(model_path())["heldout"]
    text = heldout_path().read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    ids = tokenizer(text, verbose=False)["input_ids"]
    assert (len(text.encode()), len(ids)) == (heldout["bytes"], heldout["tokens"])
    assert tokenizer.decode(ids) == text
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (heldout_path().parent / "LICENSE-PSF.txt").read_text(
        encoding="utf-8"
    )


@pytest.mark.slow
def test_shipped_model_has_the_perplexity_of_its_card():
    training = read_training(model_path())
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32, attn_implementation="sdpa")
    ids = torch.tensor(tokenizer(heldout_path().read_text(encoding="utf-8"), verbose=False)["input_ids"])
    loss = train_tiny.heldout_loss(model.eval(), ids, training["options"]["context"])
    assert math.exp(loss) == pytest.approx(training["heldout"]["perplexity_per_token"], rel=2e-3)
    assert f"{training['heldout']['perplexity_per_token']:.3f} per token" in (model_path() / "README.md").read_text(
        "utf-8"
    )
