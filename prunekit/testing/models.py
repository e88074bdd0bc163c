"""Tiny random models of every family, for tests of adapters and of whole runs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, set_seed

from prunekit.models.configs import auto_class

COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
HEADS: dict[str, Any] = {"num_attention_heads": 6, "max_position_embeddings": 64}
GROUPED: dict[str, Any] = HEADS | {"num_key_value_heads": 3, "intermediate_size": 17, "initializer_range": 0.3}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

SIZES: dict[str, dict[str, Any]] = {  # by config.model_type; head_dim is not hidden_size / heads where it may differ
    "llama": GROUPED,
    "mistral": GROUPED | {"head_dim": 6, "sliding_window": None},
    "qwen2": GROUPED | {"tie_word_embeddings": True},
    "qwen3": GROUPED | {"head_dim": 8},
    "smollm3": GROUPED | {"no_rope_layer_interval": 2},  # tied
    "granite": GROUPED | {"residual_multiplier": 0.5, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "olmo2": GROUPED,
    "gemma2": GROUPED | {"head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 4},  # tied
    "gemma3_text": GROUPED | {"head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 4, "layer_types": MIXED},
    "cohere": GROUPED | {"logit_scale": 0.5},  # tied
    "stablelm": GROUPED | {"use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "starcoder2": GROUPED,  # tied, biased
    "phi3": GROUPED | {"head_dim": 6},
    "falcon": HEADS
    | {"new_decoder_architecture": True, "num_kv_heads": 3, "ffn_hidden_size": 17, "bias": True}
    | {"initializer_range": 0.3},  # tied
    "opt": HEADS | {"ffn_dim": 17, "init_std": 0.3, "dropout": 0.0},
    "gpt_neox": HEADS | {"intermediate_size": 17, "initializer_range": 0.3, "rotary_pct": 0.5},
}
OPENED: dict[str, dict[str, Any]] = {  # families that are pruned as another
    "gpt2": HEADS | {"n_inner": 17, "initializer_range": 0.3, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
}
ROUTED: dict[str, Any] = GROUPED | {
    "num_experts_per_tok": 2,
    "intermediate_size": 16,
}  # kernels ask for rows of 16 bytes
EXPERTS: dict[str, dict[str, Any]] = {  # families of experts: six, of which a token selects two
    "mixtral": ROUTED | {"num_local_experts": 6, "head_dim": 6},
    "olmoe": ROUTED | {"num_experts": 6},
    "qwen2_moe": ROUTED
    | {"num_experts": 6, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 7, "mlp_only_layers": [1]},
    "qwen3_moe": ROUTED | {"num_experts": 6, "moe_intermediate_size": 8, "head_dim": 6, "norm_topk_prob": True},
    "gpt_oss": ROUTED
    | {
        "num_local_experts": 6,
        "head_dim": 6,
        "sliding_window": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}
HYBRIDS: dict[str, dict[str, Any]] = {  # families in which some blocks have another mixer than attention
    "lfm2": GROUPED
    | {"head_dim": 6, "layer_types": ["conv", "full_attention", "conv"], "conv_bias": True}
    | {"block_multiple_of": 1, "intermediate_size": 25},  # tied; MLPs of two thirds of that
    "qwen3_next": ROUTED
    | {"num_experts": 6, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 7, "head_dim": 6}
    | {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "mlp_only_layers": [2]}
    | {"linear_num_key_heads": 3, "linear_num_value_heads": 6, "linear_key_head_dim": 5, "linear_value_head_dim": 4}
    | {"partial_rotary_factor": 0.34},
}
STATES: dict[str, Any] = {"state_size": 5, "use_bias": True, "initializer_range": 0.3}
MIXERS: dict[str, dict[str, Any]] = {  # families without groups
    "mamba": STATES | {"time_step_rank": 4},  # tied
    "mamba2": STATES | {"num_heads": 4, "head_dim": 12, "n_groups": 2, "chunk_size": 8},
}

INSIDE: dict[str, dict[str, Any]] = {  # the language model of families that take images
    "llava": GROUPED | {"model_type": "llama"},
    "qwen2_5_vl": GROUPED
    | {"hidden_size": 36, "rope_parameters": {"rope_type": "default", "rope_theta": 1e2, "mrope_section": [1, 1, 1]}},
}
SEEING: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 10, "hidden_act": "gelu", "patch_size": 4}
IMAGES: dict[str, dict[str, Any]] = {  # and what stands around it: four tokens for an image, whose id is 60
    "llava": {
        "image_token_index": 60,
        "image_seq_length": 4,
        "vision_config": SEEING
        | {"model_type": "clip_vision_model", "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8}
        | {"initializer_range": 0.3},
    },
    "qwen2_5_vl": {
        "image_token_id": 60,
        "video_token_id": 59,
        "vision_start_token_id": 58,
        "vision_end_token_id": 57,
        "vision_config": SEEING
        | {"depth": 2, "num_heads": 2, "out_hidden_size": 36, "window_size": 16, "fullatt_block_indexes": [1]}
        | {"initializer_range": 0.3},
    },
}


def tiny(model_type: str, /, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float64 causal LM of a few thousand parameters, biases and norms random too.

    Families without an entry in `SIZES` get the sizes of a Llama. Where a family takes images, it is one of images and
    text, and `overrides` are of its language model.
    """
    set_seed(seed)
    values = COMMON | (SIZES | OPENED | EXPERTS | HYBRIDS | MIXERS | INSIDE).get(model_type, GROUPED) | overrides
    around = IMAGES.get(model_type)
    config = AutoConfig.for_model(model_type, **(values if around is None else {"text_config": values} | around))
    model: PreTrainedModel = auto_class(config).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "norm" in name or "ln_" in name:
                parameter.uniform_(0.5, 1.5)
    if model_type in EXPERTS or "num_experts_per_tok" in values:
        model.config._experts_implementation = "eager"  # others have no float64
    return model.double().eval()
