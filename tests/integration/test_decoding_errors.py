"""Every way of decoding on every kind of model: as near to the exact logits as eager along the same tokens.

Tokens can't be compared in bf16, where a last bit decides between near ties. So each sequence that came out is put
through eager, in the same dtype and in fp64, and the logits that it was chosen from are held against those.
"""

import copy

import pytest
import torch
from transformers import PreTrainedModel

from hf_paged_flash import counters
from tests.integration import decoding
from tests.integration.decoding import BEAMS, DRAFTS, METHODS, Path
from tests.integration.models import attentive_config
from tests.integration.test_encoder_decoder import inputs_for, make
from tests.integration.test_hybrid_models import hybrid_config
from tests.tiny_models import tiny_model

# Every expert for every token: which two are chosen may hang on a last bit, in eager as in ours, and then changes all.
EVERY_EXPERT = {"num_experts_per_tok": 4, "experts_implementation": "batched_mm"}
EXPERTS = ("gpt_oss", "deepseek_v3", "qwen3_next")
HYBRID, ENCODER_DECODER = ("qwen3_next",), ("t5", "whisper")
MODELS = ("llama", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt_oss", "gpt2", "deepseek_v3")
MODELS += HYBRID + ENCODER_DECODER
LENGTHS = {"cpu": (30, 7, 19), "cuda": (140, 38, 75)}


def applies(model_type: str, method: str) -> bool:
    """A recurrent state can't take drafts back; an encoder-decoder model has no prompt to go on with."""
    if model_type in HYBRID:
        return method not in DRAFTS
    return model_type not in ENCODER_DECODER or method not in ("chunks", "turns", "prompt lookup")


CASES = [(model, method) for model in MODELS for method in METHODS if applies(model, method)]


def model_of(model_type: str, implementation: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    if model_type in ENCODER_DECODER:
        return make(model_type, implementation).to(device, dtype)
    changes = EVERY_EXPERT if model_type in EXPERTS else {}
    config = hybrid_config(model_type, **changes) if model_type in HYBRID else attentive_config(model_type, **changes)
    return tiny_model(config, implementation, dtype=dtype).to(device)


def inputs_of(model_type: str, method: str, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    if model_type in ENCODER_DECODER:
        inputs = inputs_for(model_type)
        if method in DRAFTS:
            inputs = {name: value[:1] for name, value in inputs.items()}
        return {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in inputs.items()}
    lengths = LENGTHS[device]
    if model_type in HYBRID and method in ("chunks", "turns"):  # states take in padding after the first forward
        lengths = lengths[:1] * 3
    return dict(zip(("input_ids", "attention_mask"), (x.to(device) for x in decoding.batch(method, lengths)),
                    strict=True))  # fmt: skip


def decoded(model: PreTrainedModel, method: str, inputs: dict) -> tuple[dict, list[Path]]:
    """What `method` generates on PagedCache, and the inputs that it goes on from."""
    if method == "turns":
        return decoding.turns(model, inputs, (9, 9, 9) if model.config.model_type in HYBRID else (5, 9, 2))
    options = dict(METHODS[method])
    if method in BEAMS:  # an end that is reached, else it is all one when they stop
        options["eos_token_id"] = int(decoding.generate(model, inputs, max_new_tokens=4).sequences[0, -1])
    if method in DRAFTS:  # of one row
        options["max_new_tokens"] = 3 * decoding.NEW
    if method == "assistant":
        options["assistant_model"] = decoding.perturbed(model)
    out = decoding.generate(model, inputs, **options)
    first = next(iter(inputs.values()))
    prompt = 1 if model.config.is_encoder_decoder else first.shape[1]
    return inputs, decoding.paths(out, len(first), prompt)


def check(model_type: str, method: str, dtype: torch.dtype, device: str) -> None:
    """The error of the logits, and of beams' scores, is at most twice eager's along the same tokens."""
    eager, paged = (model_of(model_type, name, dtype, device) for name in ("eager", "paged_flash"))
    inputs, paths = decoded(paged, method, inputs_of(model_type, method, dtype, device))
    double = copy.deepcopy(eager).double()
    exact, near = ([decoding.forced(model, inputs, path) for path in paths] for model in (double, eager))
    ours = torch.cat([path.logits for path in paths])
    expected = torch.cat(exact)
    error, budget = (ours - expected).abs(), (torch.cat(near) - expected).abs()
    # below a few units of fp32's last place, which of two errors is larger says nothing
    floor = 4 * torch.finfo(torch.float32).eps * max(1.0, float(expected.abs().max()))
    for measure in (torch.max, torch.mean):
        assert measure(error) <= 2 * measure(budget) + floor, measure.__name__
    if paths[0].score is not None:
        errors = [abs(path.score - decoding.score(path, logits)) for path, logits in zip(paths, exact, strict=True)]
        assert max(errors) <= 2 * float(budget.mean()) + floor


@pytest.mark.gpu
@pytest.mark.parametrize(("model_type", "method"), CASES)
def test_bf16_is_within_twice_eagers_error(model_type, method):
    check(model_type, method, torch.bfloat16, "cuda")
    assert counters().reference_total == 0


@pytest.mark.parametrize(("model_type", "method"), [case for case in CASES if case[0] in ("llama", "whisper")])
def test_fp32_on_the_cpu(model_type, method):
    check(model_type, method, torch.float32, "cpu")
