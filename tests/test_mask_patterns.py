"""Every pattern of masks that models of text and sound ask for: outputs and gradients equal eager's, or a refusal."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    BertLMHeadModel,
    masking_utils,
)

from hf_paged_flash.errors import UnsupportedFeatureError
from hf_paged_flash.masks import paged_flash_mask
from tests.pattern_models import CONFIGS, assert_equal, build, compare, results
from tests.tiny_models import ragged_batch, randomize, tiny_config, tiny_model

SIDES = [None, "left", "right", "holes"]


pytestmark = pytest.mark.usefixtures("reference_backend")


def batch(side, lengths=(14, 23)):
    """(inputs, mask) of token ids; padding on one side, or on the left and inside a row; None for equal lengths."""
    if side is None:
        lengths = (max(lengths),) * len(lengths)
    input_ids, mask = ragged_batch(lengths, "left" if side == "holes" else side)
    if side == "holes":
        mask[1, 5:8] = 0
    return {"input_ids": input_ids} | ({} if side is None else {"attention_mask": mask}), mask.bool()


def causal(model_type, **changes):
    changes |= dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0) if model_type == "gpt2" else {}
    return lambda attention: tiny_model(tiny_config(model_type, use_cache=False, **changes), attention).train()


def packed_rows():
    """Two batch rows, each of several packed ones."""
    input_ids, _ = ragged_batch((23, 23), None)
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((9, 4, 10), (20, 3))])
    return {"input_ids": input_ids, "position_ids": position_ids}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text", "gpt_oss"])
def test_padding(model_type, side):
    inputs, mask = batch(side)
    compare(causal(model_type), inputs, lambda out: out.logits[mask])


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_packed_rows_in_a_batch(model_type):
    compare(causal(model_type), packed_rows(), lambda out: out.logits)


def test_packed_rows_by_their_offsets():
    packed = {name: x[:1] for name, x in packed_rows().items()}
    offsets = torch.tensor([0, 9, 13, 23], dtype=torch.int32)
    given = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 10, "max_length_k": 10}
    ours = results(causal("gemma3_text")("paged_flash"), packed | given, lambda out: out.logits)
    assert_equal(ours, results(causal("gemma3_text")("eager"), packed, lambda out: out.logits))


@pytest.mark.parametrize("side", SIDES)
def test_chunked_attention(side):
    inputs, mask = batch(side)
    make = lambda attention: build("llama4_text", attention, AutoModelForCausalLM, use_cache=False)  # noqa: E731
    compare(make, inputs, lambda out: out.logits[mask])


def test_chunks_of_packed_rows():
    make = lambda attention: build("llama4_text", attention, AutoModelForCausalLM, use_cache=False)  # noqa: E731
    compare(make, packed_rows(), lambda out: out.logits)


def test_chunks_and_offsets_are_refused():
    model = build("llama4_text", "paged_flash", AutoModelForCausalLM, use_cache=False)
    offsets = torch.tensor([0, 9, 23], dtype=torch.int32)
    with pytest.raises(UnsupportedFeatureError, match="`cu_seq_lens_q` both say who sees whom"):
        model(ragged_batch((23,), None)[0], cu_seq_lens_q=offsets, cu_seq_lens_k=offsets)


@pytest.mark.parametrize("cache", ["dynamic", None])
@pytest.mark.parametrize("side", [None, "left"])
def test_chunked_attention_generates(side, cache):
    inputs, _ = batch(side, (5, 9))  # the first chunk ends in the prompt or while decoding
    options = dict(max_new_tokens=20, do_sample=False, cache_implementation=cache)
    ours, eagers = (
        build("llama4_text", attention, AutoModelForCausalLM).eval().generate(**inputs, **options)
        for attention in ("paged_flash", "eager")
    )
    assert torch.equal(ours, eagers)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_encoders(model_type, side):
    inputs, mask = batch(side)
    compare(lambda attention: build(model_type, attention), inputs, lambda out: out.last_hidden_state[mask])


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text"])
def test_decoders_without_causality(model_type, side):
    inputs, mask = batch(side)
    compare(causal(model_type, is_causal=False), inputs, lambda out: out.logits[mask])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_encoder_decoders(model_type, padded):
    input_ids, mask = ragged_batch((9, 21, 14) if padded else (21, 21, 21), "right")
    labels, label_mask = ragged_batch((12, 5, 7) if padded else (12, 12, 12), "right", seed=1)
    inputs = {"input_ids": input_ids, "labels": labels.masked_fill(label_mask == 0, -100)}
    if padded:
        inputs |= {"attention_mask": mask, "decoder_attention_mask": label_mask}
    seen = label_mask.bool()
    compare(lambda a: build(model_type, a, AutoModelForSeq2SeqLM), inputs, lambda out: out.logits[seen])


def test_a_decoder_over_states_of_an_encoder():
    def make(attention):
        config = AutoConfig.for_model("bert", **CONFIGS["bert"], is_decoder=True, add_cross_attention=True)
        config.use_cache = False
        model = BertLMHeadModel._from_config(config, attn_implementation=attention)
        randomize(model)
        return model.train()

    inputs, mask = batch("right")
    states, state_mask = torch.randn(2, 11, 32), torch.ones(2, 11)
    state_mask[0, 6:] = 0
    inputs |= {"encoder_hidden_states": states, "encoder_attention_mask": state_mask}
    compare(make, inputs, lambda out: out.logits[mask])


def test_whisper():
    labels, _ = ragged_batch((12, 12), None)
    inputs = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": labels}
    compare(lambda a: build("whisper", a), inputs, lambda out: out.last_hidden_state)


@pytest.mark.parametrize("model_type", ["t5", "bart", "whisper"])
def test_encoder_decoders_generate(model_type):
    if model_type == "whisper":
        inputs, auto = {"input_features": torch.randn(2, 8, 40)}, AutoModelForSpeechSeq2Seq
    else:
        input_ids, mask = ragged_batch((9, 21, 14), "left")
        inputs, auto = {"input_ids": input_ids, "attention_mask": mask}, AutoModelForSeq2SeqLM
    tokens = []
    for attention in ("paged_flash", "eager"):
        model = build(model_type, attention, auto).eval()
        tokens.append(model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False))
    assert torch.equal(*tokens)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2", "gpt_oss", "bert"])
def test_a_mask_of_the_users_own(model_type, dtype):
    input_ids, _ = ragged_batch((23, 23), None)
    visible = torch.rand(2, 1, 23, 23, generator=torch.Generator().manual_seed(3)) < 0.5
    visible |= torch.eye(23, dtype=torch.bool)
    added = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
    make = causal(model_type) if model_type != "bert" else lambda attention: build("bert", attention)
    ours = results(
        make("paged_flash"), {"input_ids": input_ids, "attention_mask": visible if dtype == torch.bool else added},
        lambda out: out[0],
    )  # fmt: skip
    inputs = {"input_ids": input_ids, "attention_mask": added}
    assert_equal(ours, results(make("eager"), inputs, lambda out: out[0]))


def test_a_bias_of_the_users_own():
    """A 4-D mask of floats is added as it is, not read as visible or not; one of the heads' own, too."""
    input_ids, _ = ragged_batch((23, 23), None)
    bias = torch.randn(1, 4, 23, 23).masked_fill(~torch.ones(23, 23).tril().bool(), torch.finfo(torch.float32).min)
    compare(causal("llama"), {"input_ids": input_ids, "attention_mask": bias}, lambda out: out.logits)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "llama4_text"])
@pytest.mark.parametrize("kind", ["left", "packed"])
def test_patterns_under_compile(model_type, kind):
    torch._dynamo.reset()
    inputs, mask = batch("left") if kind == "left" else (packed_rows(), torch.ones(2, 23, dtype=torch.bool))
    make = causal(model_type) if model_type != "llama4_text" else (
        lambda attention: build("llama4_text", attention, AutoModelForCausalLM, use_cache=False)
    )  # fmt: skip
    pick = lambda out: out.logits[mask]  # noqa: E731
    expected = results(make("eager"), inputs, pick)
    compiled = torch.compile(make("paged_flash"), fullgraph=True, backend="aot_eager")
    out, gradients = results(compiled, inputs, pick)
    assert_equal((out, {name.removeprefix("_orig_mod."): x for name, x in gradients.items()}), expected)


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("kind", ["left", "packed"])
def test_layers_compiled_one_by_one(model_type, kind):
    """The mask is made by eager code and enters each layer's graph as an input, its window with it."""
    torch._dynamo.reset()
    inputs, mask = batch("left") if kind == "left" else (packed_rows(), torch.ones(2, 23, dtype=torch.bool))

    def make(attention):
        model = causal(model_type)(attention)
        if attention == "paged_flash":
            for layer in model.model.layers:
                layer.compile(fullgraph=True, backend="aot_eager")
        return model

    compare(make, inputs, lambda out: out.logits[mask])


@pytest.mark.parametrize("use_vmap", [False, True])
def test_mask_functions_become_the_matrix_that_transformers_builds(use_vmap):
    def prefix(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx < 5

    function = masking_utils.or_masks(masking_utils.causal_mask_function, prefix)
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[0, :3] = False
    arguments = dict(batch_size=2, q_length=9, kv_length=9, mask_function=function, attention_mask=padding)
    actual = paged_flash_mask(**arguments, use_vmap=use_vmap, allow_is_causal_skip=True)
    expected = masking_utils.sdpa_mask(**arguments, use_vmap=use_vmap, allow_is_causal_skip=False)
    assert actual.dtype == torch.bool and torch.equal(actual, expected)
