"""GPT-2: opened as the OPT model that computes the same."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel

from prunekit.models.adapters.opt import OPT
from prunekit.plugins.adapter import UnsupportedModel

EPS = 1e-5  # of the norms of OPT, which no config changes
SAME = {
    "ln_1": "self_attn_layer_norm",
    "ln_2": "final_layer_norm",
    "attn.c_proj": "self_attn.out_proj",
    "mlp.c_fc": "fc1",
    "mlp.c_proj": "fc2",
}


@dataclass(frozen=True)
class GPT2(OPT):
    """Its maps are stored transposed, with queries, keys and values in one, and no class of it can have fewer heads.

    OPT computes the same of the same weights: learned positions, norms before sub-layers, biases, any activation. What
    is pruned and written is that model, which transformers and its users know.
    """

    def opened(self, model: PreTrainedModel) -> PreTrainedModel:
        """The OPT model of a GPT-2 model; another is as it is.

        Raises:
            UnsupportedModel: there is none, because of a setting that it names.
        """
        config: Any = model.config
        if config.model_type != "gpt2":
            return model
        wanted = {"layer_norm_epsilon": EPS, "add_cross_attention": False}
        if strange := [name for name, value in wanted.items() if getattr(config, name) != value]:
            raise UnsupportedModel(
                f"GPT-2 is pruned as the OPT model that computes the same, and there is none with {strange[0]} "
                f"{getattr(config, strange[0])}; it must be {wanted[strange[0]]}"
            )
        with torch.device("meta"):
            found = OPTForCausalLM(_config(config))
        found.load_state_dict(_state(model), assign=True)
        found.tie_weights()
        found.config._attn_implementation = config._attn_implementation
        found.config.name_or_path, found.config.dtype = config.name_or_path, model.dtype
        found.generation_config = copy.deepcopy(model.generation_config)
        return found.requires_grad_(next(model.parameters()).requires_grad).train(model.training)


def _config(config: Any) -> OPTConfig:
    return OPTConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        word_embed_proj_dim=config.n_embd,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        ffn_dim=config.n_inner or 4 * config.n_embd,
        max_position_embeddings=config.n_positions,
        activation_function=config.activation_function,
        dropout=config.resid_pdrop,
        attention_dropout=config.attn_pdrop,
        init_std=config.initializer_range,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=None,  # GPT-2 has none: every embedding learns
    )


def _state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of a GPT-2 model under the names of OPT."""
    config: Any = model.config
    old = {name.removeprefix("transformer."): value.detach() for name, value in model.state_dict().items()}
    words, positions = old["wte.weight"], old["wpe.weight"]
    new = {
        "embed_tokens.weight": words,
        "embed_positions.weight": torch.cat([positions.new_zeros(2, positions.shape[1]), positions]),  # from 2 on
        "final_layer_norm.weight": old["ln_f.weight"],
        "final_layer_norm.bias": old["ln_f.bias"],
    }
    for index in range(config.n_layer):
        scale = 1.0 if config.scale_attn_weights else (config.n_embd // config.n_head) ** 0.5
        scale /= index + 1 if config.scale_attn_by_inverse_layer_idx else 1
        for kind in ("weight", "bias"):
            q, k, v = _rows(old[f"h.{index}.attn.c_attn.{kind}"]).chunk(3)
            parts = {"q": q * scale, "k": k.clone(), "v": v.clone()}
            new |= {f"layers.{index}.self_attn.{name}_proj.{kind}": value for name, value in parts.items()}
            for theirs, ours in SAME.items():
                new[f"layers.{index}.{ours}.{kind}"] = _rows(old[f"h.{index}.{theirs}.{kind}"])
    head = words if config.tie_word_embeddings else old["lm_head.weight"]
    return {f"model.decoder.{name}": value for name, value in new.items()} | {"lm_head.weight": head}


def _rows(value: Tensor) -> Tensor:
    """A weight with outputs first; biases and norms are as they are."""
    return value.T.contiguous() if value.ndim == 2 else value
