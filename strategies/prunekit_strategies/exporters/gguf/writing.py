"""From a checkpoint to a file, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType as Mostly

from prunekit.errors import WrongInput
from prunekit_strategies.exporters.gguf.carriers import GRAPHS, Layout, rope
from prunekit_strategies.exporters.gguf.reading import ABSENT, TIED
from prunekit_strategies.exporters.gguf.tensors import (
    Entry,
    Read,
    fold_factors,
    make_values,
    rope_factors,
    written_sizes,
)
from prunekit_strategies.exporters.gguf.vocabulary import Vocabulary

OWN: Mapping[str, tuple[Type, Mostly]] = {  # what the gguf package writes itself
    "f32": (Type.F32, Mostly.ALL_F32),
    "f16": (Type.F16, Mostly.MOSTLY_F16),
    "bf16": (Type.BF16, Mostly.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, Mostly.MOSTLY_Q8_0),
}
VERSION = 2  # of quantized types
ROUTER = ".ffn_gate_inp"  # names begin so in a block, of what decides on experts: a rounded one may decide otherwise


def write_file(
    path: Path,
    layout: Layout,
    architecture: str,
    entries: Sequence[Entry],
    read: Read,
    vocabulary: Vocabulary,
    dtype: str,
) -> None:
    """Write a file.

    Args:
        path: where; what is there is overwritten.
        layout: sizes of the model.
        architecture: that carries it.
        entries: its tensors.
        read: tensors of the checkpoint.
        vocabulary: its tokenizer.
        dtype: a key of `OWN`.

    Raises:
        WrongInput: a value is not finite, or too large for the dtype.
    """
    writer = gguf.GGUFWriter(path, architecture)
    try:
        _add_sizes(writer, layout, architecture)
        _add_vocabulary(writer, vocabulary)
        kind, mostly = OWN[dtype]
        writer.add_file_type(mostly)
        if dtype == "q8_0":
            writer.add_quantization_version(VERSION)
        freqs = rope_factors(layout) if GRAPHS[architecture].frequencies else None
        if freqs is not None:
            writer.add_tensor_info("rope_freqs.weight", freqs.shape, freqs.dtype, freqs.nbytes)
        for entry in entries:
            own = type_of(entry, kind)
            bytes_ = gguf.quant_shape_to_byte_shape(entry.shape, own)
            writer.add_tensor_info(entry.name, bytes_, np.dtype(np.uint8), int(np.prod(bytes_)), raw_dtype=own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if freqs is not None:
            writer.write_tensor_data(freqs)
        for entry in entries:
            writer.write_tensor_data(_encoded(entry, read, kind))
        writer.flush()
    finally:
        writer.close()


def type_of(entry: Entry, kind: Type) -> Type:
    """The type of a tensor in a file of a kind: vectors, biases and routers are float32, rows that are no whole blocks
    float16."""
    if len(shape := entry.shape) < 2 or entry.name.endswith(".bias") or ROUTER in entry.name:
        return Type.F32
    return kind if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Type.F16


def _encoded(entry: Entry, read: Read, kind: Type) -> np.ndarray:
    values, own = np.ascontiguousarray(make_values(entry, read).cpu().numpy()), type_of(entry, kind)
    if values.shape != entry.shape:
        raise WrongInput(f"gguf cannot write {entry.name}: it has shape {values.shape}, and its config {entry.shape}")
    if not np.isfinite(values).all():
        raise WrongInput(f"gguf does not write {entry.pieces[0].source}: it holds values that are not finite")
    if own is Type.F16 and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise WrongInput(
            f"gguf cannot write {entry.pieces[0].source} in float16: it holds {np.abs(values).max():.3g}; "
            "give exporters.gguf.dtype bf16 or f32"
        )
    return gguf.quantize(values, own).view(np.uint8)


def _add_sizes(writer: gguf.GGUFWriter, layout: Layout, architecture: str) -> None:
    graph, config, sizes = GRAPHS[architecture], layout.config, written_sizes(layout, architecture)
    settings = rope(config)
    columns: list[Any] = [[getattr(layer, each) for layer in sizes] for each in ("query", "kv", "width")]
    query, kv, width = columns if graph.unequal else [column[0] for column in columns]
    # beyond a sliding window the graph would see more than the model does
    window = (not graph.windows and getattr(config, "sliding_window", None)) or config.max_position_embeddings
    writer.add_context_length(min(config.max_position_embeddings, window))
    writer.add_embedding_length(layout.hidden)
    writer.add_block_count(len(sizes))
    writer.add_head_count(query)
    writer.add_head_count_kv(kv)
    writer.add_feed_forward_length(width)
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(layout.head_dim)
    writer.add_rope_freq_base(float(settings.get("rope_theta", 1e4)))
    if settings.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(settings["factor"]))
    if settings.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(settings["factor"]))
        writer.add_rope_scaling_orig_ctx_len(settings["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(float(settings.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(settings.get("beta_slow") or 1))
    writer.add_vocab_size(layout.vocabulary)
    if graph.windows:
        writer.add_sliding_window(config.sliding_window)
    if (mixture := graph.mixture) is not None and (first := layout.layers[0]).experts:
        writer.add_expert_count(first.experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if mixture.width == "expert_feed_forward_length":
            writer.add_expert_feed_forward_length(first.width)
        if mixture.shared:
            writer.add_expert_shared_feed_forward_length(first.shared)
    if graph.scales:
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    for part, name in (("query", "attn"), ("width", "ffn")):
        pairs = enumerate(zip(layout.layers, sizes, strict=True))
        absent = [index for index, (own, there) in pairs if getattr(there, part) and not getattr(own, part)]
        writer.add_array(ABSENT.format(name), absent)
    writer.add_bool(TIED, layout.tied)
    if fold_factors(layout, architecture):
        writer.add_bool("prunekit.folded", True)


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.model == "no_vocab":
        return
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_token_scores(vocabulary.scores)
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("eot", writer.add_eot_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if (value := (vocabulary.special or {}).get(name)) is not None:
            add(int(value))
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.model == "llama":
        writer.add_add_space_prefix(vocabulary.add_space)
    if vocabulary.template:
        writer.add_chat_template(vocabulary.template)
