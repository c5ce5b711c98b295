"""Tiny configurations of any model type: the type's own defaults, every size shrunk, one layer of each kind kept.

What is not a size stays as the type has it by default: norms, rotary embeddings, windows (shorter), softcaps, sinks,
routing. A type whose sizes depend on each other in a way of their own has an entry in `_OVERRIDES`.
"""

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 128
FIRST_TOKEN, LAST_TOKEN = 8, 90  # ordinary tokens of prompts; special ones lie above
WINDOW = 7
MAX_LAYERS = 6

_LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "decoder_layers"}
_LAYERS |= {"encoder_layers", "num_encoder_layers", "num_blocks", "depth", "num_layers_per_stack", "num_global_layers"}
_HEADS = {"num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "swa_num_attention_heads"}
_HEADS |= {"decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads", "index_n_heads"}
_HEADS |= {"num_encoder_attention_heads", "linear_num_heads", "linear_num_value_heads", "linear_num_key_heads"}
_KV_HEADS = {"num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"}
# {size: names}; a name here has this value unless it is None or below it
_SIZES = {
    64: "hidden_size d_model n_embd emb_dim embedding_dim embedding_size d_inner word_embed_proj_dim input_size "
    "attention_hidden_size intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff dim_ff mlp_dim "
    "ffn_hidden_size expert_ffn_hidden_size feed_forward_size dense_intermediate_size intermediate_size_mlp "
    "moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size lru_width router_hidden_size "
    "moe_shared_expert_intermediate_size hidden_size_global backbone_hidden_size input_embedding_size "
    "output_embedding_size vision_output_dim projector_input_dim projector_output_dim out_hidden_size",
    32: "kv_lora_rank q_lora_rank o_lora_rank hidden_size_per_layer_input laurel_rank adapter_rank mamba_dt_rank "
    "time_step_rank hc_lowrank chunk_size mamba_chunk_size",
    16: "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim kv_channels attention_head_dim global_head_dim "
    "dim_head d_head swa_head_dim index_head_dim attention_head_size linear_head_dim linear_key_head_dim "
    "linear_value_head_dim state_size mamba_d_state ssm_state_size rel_extent rotary_dim",
    4: "num_experts num_local_experts n_routed_experts moe_num_experts num_centroids",
    2: "num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k n_shared_experts num_shared_experts "
    "index_topk_blocks",
    1: "n_group topk_group num_expert_group first_k_dense_replace num_dense_layers o_groups",
    8: "query_pre_attn_scalar",  # a scale other than head_dim ** -0.5
    WINDOW: "sliding_window sliding_window_size attention_window_size local_attention keep_window_size "
    "window_size attention_chunk_size index_topk index_block_size",
    512: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions model_max_length",
}
_SIZE_OF = {name: size for size, names in _SIZES.items() for name in names.split()}
_VOCABULARIES = {"vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "audio_vocab_size"}
_VOCABULARIES |= {"unpadded_vocab_size"}
_ALWAYS = {
    "eos_token_id": None,
    "forced_eos_token_id": None,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "tie_word_embeddings": False,  # else a random model repeats its last token, whatever attention says
    "pad_token_id": 0,
    "bos_token_id": 1,
    "decoder_start_token_id": 1,
}
_ASKED_FOR = {"head_dim": 16, "num_key_value_heads": 2}  # None in a default configuration, given in every real one
# what the rules above get wrong, by type: arguments of its configuration
_HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_hidden_layers": 3}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_MAYBE_SHARED = ["sliding_attention", "full_attention"] * 3
_WIDE_GLOBALS = {"num_hidden_layers": 6, "layer_types": _MAYBE_SHARED}
_WIDE_GLOBALS |= {"per_layer_config": {layer: {"head_dim": 32} for layer in (1, 3, 5)}}
_BOTH = ["full_attention", "sliding_attention"]
_AXIAL = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
_QSA = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8}
_QSA |= {"indexer_compress_ratio": 4}
_DRAFTER = {"model_type": "gemma4_text", "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 64}
_DRAFTER |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_DRAFTER |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_NO_DEFAULTS = {"gemma4_assistant"}  # whose default configuration is none that is allowed
_OVERRIDES: dict[str, dict] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {kind: _AXIAL for kind in _BOTH}, "layer_types": _BOTH},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "num_hidden_layers": 4, "layer_types": _BOTH * 2},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128},
    "gemma3n_text": {"layer_types": _MAYBE_SHARED, "num_kv_shared_layers": 2, "intermediate_size": [64] * 6}
    | {"activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0], "num_hidden_layers": 6},
    "gemma4_assistant": {"text_config": _DRAFTER, "backbone_hidden_size": 64},
    "gemma4_unified_assistant": {"text_config": _DRAFTER, "backbone_hidden_size": 64},
    "gemma4_text": _WIDE_GLOBALS | {"num_kv_shared_layers": 2},
    "gemma4_unified_text": _WIDE_GLOBALS,
    "granitemoehybrid": _HYBRID | _MAMBA,
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_block_size": 4},
    "musicgen_decoder": {"pad_token_id": VOCAB_SIZE, "bos_token_id": VOCAB_SIZE},
    "musicgen_melody_decoder": {"pad_token_id": VOCAB_SIZE, "bos_token_id": VOCAB_SIZE},
    "qwen4_exp_text": _QSA,
    "reformer": {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (16, 32)},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xlstm": {"num_hidden_layers": 2, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
}


def model_class_of(model_type: str) -> type[PreTrainedModel]:
    """The causal language model that transformers has for `model_type`."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The configuration of a tiny causal language model of `model_type`, fit for greedy generation without an end."""
    config_class = model_class_of(model_type).config_class  # of a composite model perhaps its text part's
    given = _OVERRIDES[config_class.model_type] if config_class.model_type in _NO_DEFAULTS else {}
    return config_class(**_tiny_arguments(config_class(**given)))


def _tiny_arguments(config: PreTrainedConfig) -> dict:
    """What to give the class of `config`, a default one, for a tiny one."""
    kept = _kept_layers(config)
    arguments = {}
    for name, value in config.to_dict().items():
        sub_config = vars(config).get(name)
        if isinstance(sub_config, PreTrainedConfig):
            arguments[name] = {"model_type": sub_config.model_type} | _tiny_arguments(sub_config)
        elif name in _ALWAYS:
            arguments[name] = _ALWAYS[name]
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int):
            arguments[name] = LAST_TOKEN + 2 + sum(map(ord, name)) % (VOCAB_SIZE - LAST_TOKEN - 2)
        elif (tiny := _tiny_value(name, value, config, kept)) != value:
            arguments[name] = tiny
    return arguments | _OVERRIDES.get(config.model_type, {})


def _tiny_value(name: str, value, config: PreTrainedConfig, kept: list[int]):
    if name in _VOCABULARIES:
        return VOCAB_SIZE
    if isinstance(value, list | tuple):
        return _tiny_list(name, list(value), config, kept)
    if value is None and name in _ASKED_FOR:
        return _ASKED_FOR[name]
    if name == "attn_logit_softcapping" and value is not None:
        return 2.0  # the scores of a tiny model never come near the usual 50
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name in _LAYERS:
        return min(value, len(kept))
    if name in _HEADS:
        return min(value, 4)
    if name in _KV_HEADS:
        is_grouped = value < config.to_dict().get("num_attention_heads", value)
        return min(value, 2 if is_grouped else 4)
    return min(value, _SIZE_OF.get(name, value))


def _tiny_list(name: str, values: list, config: PreTrainedConfig, kept: list[int]):
    layers = getattr(config, "num_hidden_layers", None)
    if layers is not None and len(values) == layers:
        return [values[layer] for layer in kept]
    if name.endswith(("_idxs", "_ids", "_indices", "_layers")) and all(isinstance(x, int) for x in values):
        return [kept.index(layer) for layer in values if layer in kept]
    return values


def _kept_layers(config: PreTrainedConfig) -> list[int]:
    """Two layers or more, in order: the first of each kind there is, counting all that lists say about a layer."""
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        return [0, 1]
    lists = [value for value in vars(config).values() if isinstance(value, list | tuple) and len(value) == count]
    kinds: dict[str, int] = {}
    for layer in range(count):
        kinds.setdefault(repr([value[layer] for value in lists]), layer)
    kept = sorted(kinds.values())[:MAX_LAYERS]
    return kept if len(kept) > 1 else list(range(min(count, 2)))
