"""The tensors of a file: of which rows of a checkpoint they are made, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from prunekit.models.classes import FAMILIES
from prunekit_strategies.exporters.gguf.carriers import GRAPHS, Layer, Layout, rope

STUB_WIDTH = 32  # neurons of an MLP that adds nothing: a whole block of every simple quantized type

Read = Callable[[str], Tensor]
"""A tensor of a checkpoint by its name."""

MAPS = {  # of the checkpoint: of the file
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FUSED = {  # maps whose rows lie below each other in the checkpoint
    "self_attn.qkv_proj": ("attn_q", "attn_k", "attn_v"),
    "mlp.gate_up_proj": ("ffn_gate", "ffn_up"),
}


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor of the checkpoint, as they are written."""

    source: str  # name in the checkpoint; "": zeros
    rows: tuple[int, int]  # from, to
    heads: int = 0  # whose rows are reordered; 0: none are
    factor: float = 1.0
    within: tuple[int, int, int] | None = None  # of a tensor of experts: from, to, step along the rows of each
    transposed: bool = False  # it has the matrices of experts as (in, out)


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: pieces below each other."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    copy: bool = False  # of a tensor that is in the file already


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows, so that rotating neighbours computes what rotating halves computed.

    In every head of d rows, row j of the first half goes to 2j and row j of the second to 2j + 1: transformers rotates
    the pair (j, j + d/2), llama.cpp the pair (2j, 2j + 1), both by the angle of j.

    Args:
        rows: weight (heads·d, d_in) or bias (heads·d,).
        heads: how many there are.
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halved(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved`."""
    return torch.cat([rows.unflatten(0, (heads, -1))[:, start::2] for start in (0, 1)], dim=1).flatten(0, 1)


def written_sizes(layout: Layout, architecture: str) -> tuple[Layer, ...]:
    """The sizes that a file tells: what is absent may need a stand-in that adds nothing.

    `deci` takes the width of its heads from layer 0, and drops a whole layer where it has no MLP; `openelm` knows no
    absent part.
    """
    sizes = []
    for index, layer in enumerate(layout.layers):
        if not layer.query and (index == 0 or architecture != "deci"):
            layer = replace(layer, query=1, kv=1)  # noqa: PLW2901
        sizes.append(replace(layer, width=layer.width or STUB_WIDTH))
    return tuple(sizes)


def find_biases(names: Collection[str]) -> frozenset[str]:
    """The linear maps with a bias anywhere, as the file names them."""
    found = set[str]()
    for name in names:
        path, _, kind = name.rpartition(".")
        inside = ".".join(path.split(".")[-2:])
        if kind == "bias":
            found |= {*FUSED.get(inside, ()), *([MAPS[inside]] if inside in MAPS else [])}
    return frozenset(found)


def make_entries(layout: Layout, architecture: str, names: Collection[str]) -> list[Entry]:
    """All tensors of a file that come from a checkpoint, in the order in which they are written.

    Args:
        layout: sizes of the model.
        architecture: of llama.cpp, that carries it.
        names: of the tensors of the checkpoint.
    """
    factors = fold_factors(layout, architecture)
    hidden, words = layout.hidden, layout.vocabulary
    head = "model.embed_tokens.weight" if layout.tied else "lm_head.weight"
    entries = [_plain("token_embd.weight", "model.embed_tokens.weight", (words, hidden), factors.get("token_embd", 1))]
    for index, (layer, written) in enumerate(zip(layout.layers, written_sizes(layout, architecture), strict=True)):
        entries += _attention(layout, architecture, names, index, layer, written)
        entries += (
            _experts(layout, architecture, names, index, layer)
            if layer.experts
            else (_mlp(layout, names, index, layer, written))
        )
    entries.append(_plain("output_norm.weight", "model.norm.weight", (hidden,)))
    if not layout.tied or factors or not GRAPHS[architecture].tieable:
        output = _plain("output.weight", head, (words, hidden), factors.get("output", 1))
        entries.append(replace(output, copy=layout.tied))
    return [
        replace(each, pieces=tuple(_scaled(piece, each.name, factors) for piece in each.pieces)) for each in entries
    ]


def fold_factors(layout: Layout, architecture: str) -> Mapping[str, float]:
    """What the outputs of a map are multiplied by in a family with factors, where the graph has none: (derived)

        x0 = E m_e,  scores = a q k,  x += m_r f(x),  logits = W x / s

    is the plain graph with E m_e, W / s, q a √d, and the last map of every sub-layer times m_r.
    """
    if layout.family != "granite" or GRAPHS[architecture].scales:
        return {}
    config = layout.config
    return {
        "token_embd": config.embedding_multiplier,
        "output": 1 / config.logits_scaling,
        "attn_q": config.attention_multiplier * math.sqrt(layout.head_dim),
        "attn_output": config.residual_multiplier,
        "ffn_down": config.residual_multiplier,
    }


def rope_factors(layout: Layout) -> Float[np.ndarray, " half"] | None:
    """What rotary frequencies are divided by, for positions of type llama3; None: nothing.

    With λ_j = 2π θ^(2j/d) tokens per turn and n = original positions / λ_j turns in the original length,

        factor_j = 1 / ((1 - b) / factor + b),  b = clip((n - low) / (high - low), 0, 1)
    """
    settings = rope(layout.config)
    if settings.get("rope_type") != "llama3":
        return None
    wave = 2 * np.pi * settings["rope_theta"] ** (np.arange(0, layout.head_dim, 2) / layout.head_dim)
    turns = settings["original_max_position_embeddings"] / wave
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - blend) / settings["factor"] + blend)).astype(np.float32)


def make_values(entry: Entry, read: Read) -> Float[Tensor, " *shape"]:
    """The values of a tensor of the file, in float32."""
    parts = []
    for piece in entry.pieces:
        if not piece.source:
            parts.append(torch.zeros(piece.rows[1] - piece.rows[0], *entry.shape[1:]))
            continue
        part = rows_of(piece, read(piece.source).detach()).to(torch.float32)
        part = interleaved(part, piece.heads) if piece.heads else part
        parts.append(part if piece.factor == 1 else part * piece.factor)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def rows_of(piece: Piece, tensor: Tensor) -> Tensor:
    """The values of a piece, of the tensor of the checkpoint that has them."""
    part = tensor[slice(*piece.rows)]
    part = part.transpose(1, 2) if piece.transposed and part.ndim > 2 else part
    return part if piece.within is None else part[:, slice(*piece.within)]


def sources_of(entry: Entry, values: Tensor) -> Iterator[tuple[Piece, Tensor]]:
    """The way back: what the rows of the checkpoint were, by the values of a tensor of the file."""
    ends = [0]
    for piece in entry.pieces:
        ends.append(ends[-1] + piece.rows[1] - piece.rows[0])
    for piece, (start, stop) in zip(entry.pieces, pairwise(ends), strict=True):
        part = values[start:stop]
        yield piece, halved(part, piece.heads) if piece.heads else part


def _attention(
    layout: Layout, architecture: str, names: Collection[str], index: int, layer: Layer, written: Layer
) -> Iterator[Entry]:
    graph, block, theirs, width = GRAPHS[architecture], f"blk.{index}.", f"model.layers.{index}.", layout.head_dim
    if not written.query:
        return
    there = bool(layer.query)
    yield _plain(f"{block}attn_norm.weight", f"{theirs}input_layernorm.weight" if there else "", (layout.hidden,))
    rows = {"attn_q": written.query * width, "attn_k": written.kv * width, "attn_v": written.kv * width}
    turned = {"attn_q": written.query, "attn_k": written.kv} if graph.neighbours and there else {}
    kinds = [kind for kind in ("weight", "bias") if _has(names, theirs, "attn_q", kind)] if there else ["weight"]
    for kind in kinds:
        rest = (layout.hidden,) if kind == "weight" else ()
        pieces = {
            name: replace(_piece(names, theirs, name, kind, rows) if there else Piece("", (0, count)),
                          heads=turned.get(name, 0))
            for name, count in rows.items()
        }  # fmt: skip
        if graph.fused:
            yield Entry(f"{block}attn_qkv.{kind}", (sum(rows.values()), *rest), (*pieces.values(),))
        else:
            yield from (Entry(f"{block}{n}.{kind}", (rows[n], *rest), (piece,)) for n, piece in pieces.items())
    if graph.head_norms or graph.whole_norms:
        for name, heads in (("q_norm", written.query), ("k_norm", written.kv)):
            source = f"{theirs}self_attn.{name}.weight" if there else ""
            yield _plain(f"{block}attn_{name}.weight", source, (heads * width if graph.whole_norms else width,))
    if graph.sinks:
        yield _plain(f"{block}attn_sinks.weight", f"{theirs}self_attn.sinks", (written.query,))
    yield from _last(layout, names, index, "attn_output", "self_attn.o_proj", rows["attn_q"], there=there)


def _mlp(layout: Layout, names: Collection[str], index: int, layer: Layer, written: Layer) -> Iterator[Entry]:
    block, theirs, there = f"blk.{index}.", f"model.layers.{index}.", bool(layer.width)
    source = f"{theirs}post_attention_layernorm.weight" if there else ""
    yield _plain(f"{block}ffn_norm.weight", source, (layout.hidden,))
    rows = {"ffn_gate": written.width, "ffn_up": written.width}
    kinds = [kind for kind in ("weight", "bias") if _has(names, theirs, "ffn_gate", kind)] if there else ["weight"]
    for kind in kinds:
        rest = (layout.hidden,) if kind == "weight" else ()
        for name, count in rows.items():
            piece = _piece(names, theirs, name, kind, rows) if there else Piece("", (0, count))
            yield Entry(f"{block}{name}.{kind}", (count, *rest), (piece,))
    yield from _last(layout, names, index, "ffn_down", "mlp.down_proj", written.width, there=there)


def _experts(layout: Layout, architecture: str, names: Collection[str], index: int, layer: Layer) -> Iterator[Entry]:
    """The matrices of all experts one behind the other, their router, and the expert that reads every token."""
    experts, theirs, block = FAMILIES[layout.family].experts, f"model.layers.{index}.", f"blk.{index}."
    assert experts is not None
    hidden, count, width = layout.hidden, layer.experts, layer.width
    yield _plain(
        f"{block}{GRAPHS[architecture].ffn_norm}.weight", f"{theirs}post_attention_layernorm.weight", (hidden,)
    )
    yield _plain(f"{block}ffn_gate_inp.weight", f"{theirs}{experts.router}.weight", (count, hidden))
    if (bias := f"{theirs}{experts.router}.bias") in names:
        yield _plain(f"{block}ffn_gate_inp.bias", bias, (count,))
    pairs = ((0, 2 * width, 2), (1, 2 * width, 2)) if experts.transposed else ((0, width, 1), (width, 2 * width, 1))
    for number, kind in enumerate(("weight", "bias")[: len(experts.outputs)]):
        first, last = (f"{theirs}{experts.path}.{each[number]}" for each in (experts.inputs, experts.outputs))
        rest = (hidden,) if kind == "weight" else ()
        for name, within in zip(("ffn_gate_exps", "ffn_up_exps"), pairs, strict=True):
            piece = Piece(first, (0, count), within=within, transposed=experts.transposed)
            yield Entry(f"{block}{name}.{kind}", (count, width, *rest), (piece,))
        piece = Piece(last, (0, count), transposed=experts.transposed)
        yield Entry(f"{block}ffn_down_exps.{kind}", (count, hidden, *((width,) if rest else ())), (piece,))
    if experts.shared is not None:
        yield _plain(f"{block}ffn_gate_inp_shexp.weight", f"{theirs}{experts.shared}_gate.weight", (1, hidden))
        shapes = {"gate": (layer.shared, hidden), "up": (layer.shared, hidden), "down": (hidden, layer.shared)}
        for name, shape in shapes.items():
            yield _plain(f"{block}ffn_{name}_shexp.weight", f"{theirs}{experts.shared}.{name}_proj.weight", shape)


def _last(
    layout: Layout, names: Collection[str], index: int, name: str, path: str, width: int, *, there: bool
) -> Iterator[Entry]:
    """The map behind, whose output is that of the sub-layer."""
    source = f"model.layers.{index}.{path}"
    yield _plain(f"blk.{index}.{name}.weight", f"{source}.weight" if there else "", (layout.hidden, width))
    if there and f"{source}.bias" in names:
        yield _plain(f"blk.{index}.{name}.bias", f"{source}.bias", (layout.hidden,))


def _plain(name: str, source: str, shape: tuple[int, ...], factor: float = 1) -> Entry:
    return Entry(name, shape, (Piece(source, (0, shape[0]), factor=factor),))


def _piece(names: Collection[str], theirs: str, name: str, kind: str, rows: Mapping[str, int]) -> Piece:
    """Where a map in front is in the checkpoint: alone, or in one with others."""
    for path, others in FUSED.items():
        if name in others and f"{theirs}{path}.{kind}" in names:
            start = sum(rows[other] for other in others[: others.index(name)])
            return Piece(f"{theirs}{path}.{kind}", (start, start + rows[name]))
    path = next(path for path, ours in MAPS.items() if ours == name)
    return Piece(f"{theirs}{path}.{kind}", (0, rows[name]))


def _has(names: Collection[str], theirs: str, name: str, kind: str) -> bool:
    paths = [path for path, ours in MAPS.items() if ours == name] + [p for p, all_ in FUSED.items() if name in all_]
    return any(f"{theirs}{path}.{kind}" in names for path in paths)


def _scaled(piece: Piece, name: str, factors: Mapping[str, float]) -> Piece:
    path = name.split(".")[-2]
    return replace(piece, factor=factors.get(path, 1)) if piece.source and path.startswith(("attn", "ffn")) else piece
