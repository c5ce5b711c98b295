"""Tiny random models of every pattern of masks, and the comparison of their outputs and gradients with eager's."""

from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

import hf_paged_flash
from tests.tiny_models import ragged_batch, randomize

SMALL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=128, pad_token_id=0,
)  # fmt: skip
NO_DROPOUT = dict(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
IMAGE_TOKEN = 90  # and the two after it for a video and for where an image begins
# Head dims are 16 and more, which the kernels take
_TEXT = SMALL | dict(hidden_size=64, num_key_value_heads=2, head_dim=16, bos_token_id=1, eos_token_id=None)
_VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
)
_QWEN_TEXT = _TEXT | dict(
    num_hidden_layers=2, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
)
_QWEN = dict(image_token_id=IMAGE_TOKEN, video_token_id=IMAGE_TOKEN + 1, vision_start_token_id=IMAGE_TOKEN + 2)
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
    # chunks of 8 on the first, second and third layer of four
    "llama4_text": _TEXT | dict(
        num_hidden_layers=4, intermediate_size_mlp=48, attention_chunk_size=8, num_local_experts=2,
        num_experts_per_tok=1, interleave_moe_layer_step=2, attn_temperature_tuning=True, floor_scale=4,
    ),
    "gemma3": dict(
        text_config=_TEXT | dict(
            sliding_window=6, query_pre_attn_scalar=16,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        vision_config=_VISION, mm_tokens_per_image=4, image_token_index=IMAGE_TOKEN, boi_token_index=IMAGE_TOKEN + 2,
        eoi_token_index=IMAGE_TOKEN + 3,
    ),
    "paligemma": dict(
        text_config=_TEXT | dict(model_type="gemma"), vision_config=_VISION | dict(num_image_tokens=16),
        image_token_index=IMAGE_TOKEN, projection_dim=64,
    ),
    "llava": dict(
        text_config=_TEXT | dict(model_type="llama"), vision_config=_VISION | dict(model_type="clip_vision_model"),
        image_token_index=IMAGE_TOKEN, vision_feature_layer=-1, projection_dim=64,
    ),
    "pixtral": _VISION,
    "qwen2_vl": _QWEN | dict(
        text_config=_QWEN_TEXT,
        vision_config=dict(depth=2, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=2, patch_size=4),
    ),
    "qwen2_5_vl": _QWEN | dict(
        text_config=_QWEN_TEXT,
        vision_config=dict(
            depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, patch_size=4,
            window_size=16, fullatt_block_indexes=[1],
        ),
    ),
    "qwen3_vl": _QWEN | dict(
        text_config=_QWEN_TEXT,
        vision_config=dict(
            depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, patch_size=4,
            num_position_embeddings=64, deepstack_visual_indexes=[0],
        ),
    ),
}  # fmt: skip


def build(model_type: str, attention: str, auto=AutoModel, **changes) -> PreTrainedModel:
    """A model in training mode; the same weights under every `attention`."""
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type] | changes)
    model = auto.from_config(config, attn_implementation=attention)
    randomize(model)
    return model.train()


def image_inputs(model_type: str, side: str | None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What a model of images and text takes, two rows of different length unless `side` is None, and its mask."""
    input_ids, mask = ragged_batch((25, 25) if side is None else (18, 25), side)
    generator = torch.Generator().manual_seed(7)
    input_ids.clamp_(max=IMAGE_TOKEN - 1)
    inputs = {"attention_mask": mask}
    begins = mask.int().argmax(1)
    if model_type.startswith("qwen"):
        # patches of 4 x 4, merged by two: images of 6 x 4 and 4 x 8 patches, 6 and 8 tokens
        grid = torch.tensor([[1, 6, 4], [1, 4, 8]])
        tokens = [6, 8]
        inputs |= {"image_grid_thw": grid, "pixel_values": torch.randn(56, 3 * 2 * 16, generator=generator)}
    else:
        tokens = [4, 4] if model_type == "gemma3" else [16, 16]
        inputs["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
    for row, (begin, count) in enumerate(zip(begins.tolist(), tokens, strict=True)):
        place = begin + (0 if model_type == "paligemma" else 2)
        if model_type != "paligemma":
            input_ids[row, place - 1] = IMAGE_TOKEN + 2
        input_ids[row, place : place + count] = IMAGE_TOKEN
    inputs["input_ids"] = input_ids
    is_image = (input_ids == IMAGE_TOKEN).long()
    if model_type.startswith("qwen"):
        inputs["mm_token_type_ids"] = is_image
    elif model_type == "gemma3":
        inputs["token_type_ids"] = is_image
    return inputs, mask


def results(model: torch.nn.Module, inputs: dict, pick: Callable) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What `pick` chooses of the output, and the gradients of its weighted sum."""
    out = pick(model(**inputs))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    (out * weights.to(out.device)).sum().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(actual: tuple, expected: tuple) -> None:
    scale = float(expected[0].abs().max())
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=2e-5 * scale)
    assert actual[1].keys() == expected[1].keys()
    # a key's bias shifts all scores of a query alike: its gradient is 0 but for rounding
    floor = 1e-2 * max(gradient.abs().max() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        error = (actual[1][name] - gradient).abs().max() / gradient.abs().max().clamp(min=floor)
        assert error < 1e-4, f"{name}: {error}"


def compare(make: Callable[[str], torch.nn.Module], inputs: dict, pick: Callable) -> None:
    """`make("paged_flash")` runs here, forward and backward, and equals `make("eager")`."""
    hf_paged_flash.reset_counters()
    actual = results(make("paged_flash"), inputs, pick)
    counted = hf_paged_flash.counters().reference
    assert counted["flash_forward"] == counted["flash_backward"] > 0
    assert_equal(actual, results(make("eager"), inputs, pick))
