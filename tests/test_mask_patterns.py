"""Every pattern of masks that transformers' models ask for: outputs and gradients equal eager's, or a refusal."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, masking_utils

import hf_paged_flash
from hf_paged_flash.masks import paged_flash_mask
from tests.tiny_models import ragged_batch, randomize, tiny_config, tiny_model

SMALL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=128, pad_token_id=0,
)  # fmt: skip
NO_DROPOUT = dict(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
CONFIGS = {
    "bert": SMALL | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "modernbert": SMALL | dict(local_attention=8, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2),
    "vit": SMALL | dict(image_size=16, patch_size=4, hidden_dropout_prob=0.0),
    "t5": dict(
        vocab_size=97, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, dropout_rate=0.0,
        relative_attention_num_buckets=8, relative_attention_max_distance=16, decoder_start_token_id=0,
    ),
    "bart": NO_DROPOUT | dict(
        vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=128,
    ),
    "whisper": NO_DROPOUT | dict(
        vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, num_mel_bins=8,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20,
        max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def reference_backend():
    hf_paged_flash.configure(backend="reference")
    yield
    hf_paged_flash.configure(backend="auto")


def build(model_type, attention, auto=AutoModel):
    model = auto.from_config(AutoConfig.for_model(model_type, **CONFIGS[model_type]), attn_implementation=attention)
    randomize(model)
    return model.train()


def results(model, inputs, pick):
    """What `pick` chooses of the output, and the gradients of its weighted sum."""
    out = pick(model(**inputs))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    (out * weights).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-5)
    assert actual[1].keys() == expected[1].keys()
    # a key's bias shifts all scores of a query alike: its gradient is 0 but for rounding
    floor = 1e-2 * max(gradient.abs().max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        error = (actual[1][name] - gradient).abs().max() / gradient.abs().max().clamp(min=floor)
        assert error < 1e-4, f"{name}: {error}"


def compare(make, inputs, pick):
    hf_paged_flash.reset_counters()
    actual = results(make("paged_flash"), inputs, pick)
    counted = hf_paged_flash.counters().reference
    assert counted["flash_forward"] == counted["flash_backward"] > 0
    assert_equal(actual, results(make("eager"), inputs, pick))


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_encoders(model_type, side):
    input_ids, mask = ragged_batch((21, 21, 21) if side is None else (9, 21, 14), side)
    inputs = {"input_ids": input_ids} if side is None else {"input_ids": input_ids, "attention_mask": mask}
    compare(lambda a: build(model_type, a), inputs, lambda out: out.last_hidden_state[mask.bool()])


def test_vision_transformer():
    compare(lambda a: build("vit", a), {"pixel_values": torch.randn(2, 3, 16, 16)}, lambda out: out.last_hidden_state)


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


def test_whisper():
    labels, _ = ragged_batch((12, 12), None)
    inputs = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": labels}
    compare(lambda a: build("whisper", a), inputs, lambda out: out.last_hidden_state)


@pytest.mark.parametrize("model_type", ["t5", "bart", "whisper"])
def test_encoder_decoders_generate(model_type):
    from transformers import AutoModelForSpeechSeq2Seq

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
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2", "gpt_oss"])
def test_a_mask_of_the_users_own(model_type, dtype):
    input_ids, _ = ragged_batch((23, 23), None)
    visible = torch.rand(2, 1, 23, 23, generator=torch.Generator().manual_seed(3)) < 0.5
    visible |= torch.eye(23, dtype=torch.bool)
    added = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
    changes = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0) if model_type == "gpt2" else {}

    def make(attention):
        return tiny_model(tiny_config(model_type, use_cache=False, **changes), attention).train()

    ours = results(
        make("paged_flash"), {"input_ids": input_ids, "attention_mask": added if dtype != torch.bool else visible},
        lambda out: out.logits,
    )  # fmt: skip
    inputs = {"input_ids": input_ids, "attention_mask": added}
    assert_equal(ours, results(make("eager"), inputs, lambda out: out.logits))


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_blocks_of_image_tokens(side):
    """Gemma3 lets the tokens of one image see each other, over causal and sliding layers."""
    from transformers.models.gemma3 import modeling_gemma3

    lengths = (23, 23) if side is None else (14, 23)
    input_ids, mask = ragged_batch(lengths, side)
    blocks = torch.full(input_ids.shape, -1)
    blocks[:, 11:16] = 0
    blocks[:, 18:21] = 1

    def make(attention):
        model = tiny_model(tiny_config("gemma3_text", use_cache=False), attention).train()
        inner = modeling_gemma3.Gemma3TextModel.forward

        def forward(input_ids, attention_mask):
            embeds = model.model.embed_tokens(input_ids)
            asked = {"config": model.config, "inputs_embeds": embeds, "attention_mask": attention_mask}
            asked |= {"past_key_values": None, "position_ids": None, "block_sequence_ids": blocks}
            masks = {
                "full_attention": masking_utils.create_causal_mask(**asked),
                "sliding_attention": masking_utils.create_sliding_window_causal_mask(**asked),
            }
            return inner(model.model, inputs_embeds=embeds, attention_mask=masks)

        model.forward = forward
        return model

    inputs = {"input_ids": input_ids, "attention_mask": mask if side else None}
    compare(make, inputs, lambda out: out.last_hidden_state[mask.bool()])


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


def test_chunked_attention_is_refused_by_transformers_itself():
    config = AutoConfig.for_model(
        "llama4_text", **SMALL | dict(num_key_value_heads=2, head_dim=8, attention_chunk_size=8, num_local_experts=2),
        intermediate_size_mlp=48,
    )  # fmt: skip
    embeds = torch.zeros(1, 20, 32)
    config._attn_implementation = "paged_flash"
    with pytest.raises(ValueError, match="[Ff]lash attention"):
        masking_utils.create_chunked_causal_mask(
            config=config, inputs_embeds=embeds, attention_mask=None, past_key_values=None, position_ids=None
        )
