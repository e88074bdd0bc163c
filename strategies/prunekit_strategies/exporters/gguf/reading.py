"""A file as an engine reads it: by what it says of itself, with nothing from prunekit, and what it computes then."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from prunekit.errors import NotVerified, one_line
from prunekit_strategies.exporters.gguf.carriers import GRAPHS, OPENAI, Graph, Layer, Mixture
from prunekit_strategies.exporters.gguf.vocabulary import Vocabulary

ABSENT = "prunekit.absent.{}"  # layers whose attention or MLP is a stand-in that adds nothing
TIED = "prunekit.tied"  # the output is a copy of the embeddings


AT_ONCE = 1 << 14  # rows of the output that are in memory together
VERSIONS = (2, 3)
STRING, ARRAY = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY
SCALARS = dict(zip(gguf.GGUFValueType, "BbHhIif?  Qqd", strict=False))  # letters of struct, by type


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, unread."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int  # byte in the file
    size: int  # bytes


@dataclass
class _Header:
    """What stands in front of the tensors; the reader of the gguf package takes minutes for a large vocabulary."""

    data: mmap.mmap
    at: int = 0

    def take(self, letters: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{letters}", self.data, self.at)
        self.at += struct.calcsize(f"<{letters}")
        return found

    def text(self) -> str:
        (length,) = self.take("Q")
        self.at += length
        if self.at > len(self.data):
            raise ValueError("a text is longer than the file")
        return self.data[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.take(SCALARS[gguf.GGUFValueType(kind)])[0]
        inside, count = self.take("IQ")
        if inside in (STRING, ARRAY):
            return [self.value(inside) for _ in range(count)]
        return list(self.take(f"{count}{SCALARS[gguf.GGUFValueType(inside)]}"))

    def read(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        magic, version, tensors, values = self.take("4sIQQ")
        if magic != b"GGUF" or version not in VERSIONS:
            raise ValueError(f"it begins with {magic!r}, version {version}, and not with b'GGUF', version 3")
        fields = {self.text(): self.value(*self.take("I")) for _ in range(values)}
        places = []
        for _ in range(tensors):
            name, (rank,) = self.text(), self.take("I")
            places.append((name, self.take(f"{rank}Q")[::-1], *self.take("IQ")))
        start = -(-self.at // (align := fields.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT))) * align
        stored = {}
        for name, shape, number, offset in places:
            weights, size = gguf.GGML_QUANT_SIZES[kind := gguf.GGMLQuantizationType(number)]
            stored[name] = Stored(shape, kind, start + offset, math.prod(shape) // weights * size)
        return fields, stored


@dataclass(frozen=True, eq=False)
class File:
    """A GGUF file, its tensors unread."""

    path: Path
    fields: Mapping[str, Any]  # all it says
    tensors: Mapping[str, Stored]  # by name

    @classmethod
    def opened(cls, path: Path) -> File:
        """The file at `path`.

        Raises:
            NotVerified: it is no GGUF file, or of an architecture that is not read here.
        """
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                found = cls(path, *_Header(data).read())
        except (OSError, ValueError, KeyError, struct.error, OverflowError, MemoryError) as error:
            raise NotVerified(f"{path} cannot be read: {one_line(error)}") from error
        if found.fields.get("general.architecture") not in GRAPHS:
            raise NotVerified(f"{path} has the architecture {found.fields.get('general.architecture')!r}")
        return found

    @property
    def architecture(self) -> str:
        return self.fields["general.architecture"]

    @property
    def graph(self) -> Graph:
        return GRAPHS[self.architecture]

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the architecture."""
        return self.fields.get(f"{self.architecture}.{key}", default)

    @cached_property
    def layers(self) -> list[Layer]:
        """Sizes of the layers; a graph that reads one entry takes it for all.

        Raises:
            NotVerified: there are none, or too few.
        """
        mixture = self.mixture
        neurons = "feed_forward_length" if mixture is None else mixture.width
        keys = "attention.head_count", "attention.head_count_kv", neurons
        blocks, columns = self.get("block_count", 0), list[list[int]]()
        for key in keys:
            value = self.get(key)
            column = list(value) if isinstance(value, list) else [value] * blocks
            columns.append(column if self.graph.unequal else column[:1] * blocks)
        if not blocks or any(len(column) != blocks or None in column for column in columns):
            raise NotVerified(f"{self.path} does not tell the sizes of its layers")
        shared = self.get("expert_shared_feed_forward_length", 0) if mixture is not None and mixture.shared else 0
        experts = self.get("expert_count", 0)
        return [Layer(query, kv, width, experts, shared) for query, kv, width in zip(*columns, strict=True)]

    @property
    def mixture(self) -> Mixture | None:
        """What the graph does with experts; None: it has none."""
        return self.graph.mixture if self.get("expert_count") else None

    @property
    def head_dim(self) -> int:
        return self.get("attention.key_length")

    def values(self, name: str, start: int = 0, stop: int | None = None) -> Float[Tensor, " *shape"]:
        """The values of a tensor, in float32, or of the rows of a matrix from `start` to `stop`."""
        stored = self.tensors[name]
        stop = stored.shape[0] if stop is None else min(stop, stored.shape[0])
        width = stored.size // stored.shape[0]  # bytes of a row; of a vector, of a number
        with self.path.open("rb") as file:
            raw = np.fromfile(file, np.uint8, (stop - start) * width, offset=stored.start + start * width)
        found = gguf.dequantize(raw.reshape(-1, width) if len(stored.shape) > 1 else raw, stored.kind)
        return torch.from_numpy(np.ascontiguousarray(found)).reshape(stop - start, *stored.shape[1:])

    def vocabulary(self) -> Vocabulary:
        """What it tells of its tokenizer."""

        def get(key: str, default: Any = None) -> Any:
            return self.fields.get(f"tokenizer.ggml.{key}", default)

        names = {"bos": "bos", "eos": "eos", "eot": "eot", "unk": "unknown", "pad": "padding"}
        special = {ours: get(f"{theirs}_token_id") for ours, theirs in names.items()}
        return Vocabulary(
            get("model", ""),
            get("pre", ""),
            tuple(get("tokens", ())),
            tuple(get("token_type", ())),
            tuple(get("merges", ())),
            tuple(get("scores", ())),
            {name: value for name, value in special.items() if value is not None},
            bool(get("add_bos_token")),
            bool(get("add_eos_token")),
            bool(get("add_space_prefix")),
            self.fields.get("tokenizer.chat_template"),
        )

    def check(self) -> None:
        """Compare its tensors with those that its architecture asks for.

        Raises:
            NotVerified: one is missing, of another shape, unknown, or outside the file.
        """
        there = {name: stored.shape for name, stored in self.tensors.items()}
        wanted, optional = dict(self._wanted()), dict(self._optional())
        for name, shape in there.items():
            known = (wanted | optional).get(name)
            if known != shape:
                what = "which its architecture does not have" if known is None else f"and its sizes ask for {known}"
                raise NotVerified(f"{self.path} holds {name} of shape {shape}, {what}")
        if missing := sorted(wanted.keys() - there.keys()):
            raise NotVerified(f"{self.path} lacks {', '.join(missing[:5])}")
        size = self.path.stat().st_size
        if late := [name for name, stored in self.tensors.items() if stored.start + stored.size > size]:
            raise NotVerified(f"{self.path} ends before {late[0]} does")

    def parameters(self) -> int:
        """How many parameters the model has: tied ones once, stand-ins not at all."""
        absent = {part: set(self.fields.get(ABSENT.format(part), ())) for part in ("attn", "ffn")}
        count = 0
        for name, stored in self.tensors.items():
            block, _, rest = name.removeprefix("blk.").partition(".")
            stand_in = block.isdecimal() and int(block) in absent.get(rest[: rest.find("_")], ())
            copy = name == "output.weight" and self.fields.get(TIED, False)
            if not (stand_in or copy or name == "rope_freqs.weight"):
                count += math.prod(stored.shape)
        return count

    def _wanted(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden, words, width = self.get("embedding_length"), self.get("vocab_size"), self.head_dim
        yield "token_embd.weight", (words, hidden)
        yield "output_norm.weight", (hidden,)
        if not self.graph.tieable:
            yield "output.weight", (words, hidden)
        for index, layer in enumerate(self.layers):
            block, query, kv = f"blk.{index}.", layer.query * width, layer.kv * width
            if layer.query:
                yield f"{block}attn_norm.weight", (hidden,)
                if self.graph.fused:
                    yield f"{block}attn_qkv.weight", (query + 2 * kv, hidden)
                else:
                    for name, rows in (("attn_q", query), ("attn_k", kv), ("attn_v", kv)):
                        yield f"{block}{name}.weight", (rows, hidden)
                if self.graph.head_norms:
                    yield f"{block}attn_q_norm.weight", (width,)
                    yield f"{block}attn_k_norm.weight", (width,)
                if self.graph.whole_norms:
                    yield f"{block}attn_q_norm.weight", (query,)
                    yield f"{block}attn_k_norm.weight", (kv,)
                if self.graph.sinks:
                    yield f"{block}attn_sinks.weight", (layer.query,)
                yield f"{block}attn_output.weight", (hidden, query)
            yield f"{block}{self.graph.ffn_norm}.weight", (hidden,)
            if self.mixture is not None:
                yield from self._experts(block, layer, self.mixture)
                continue
            for name in ("ffn_gate", "ffn_up"):
                yield f"{block}{name}.weight", (layer.width, hidden)
            yield f"{block}ffn_down.weight", (hidden, layer.width)

    def _experts(self, block: str, layer: Layer, mixture: Mixture) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden, count, width = self.get("embedding_length"), layer.experts, layer.width
        matrices = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        yield f"{block}ffn_gate_inp.weight", (count, hidden)
        for name, shape in matrices.items():
            yield f"{block}ffn_{name}_exps.weight", (count, *shape)
            if mixture.bounded:
                yield f"{block}ffn_{name}_exps.bias", (count, shape[0])
        if mixture.bounded:
            yield f"{block}ffn_gate_inp.bias", (count,)
        if mixture.shared:
            yield f"{block}ffn_gate_inp_shexp.weight", (1, hidden)
            for name in ("gate", "up"):
                yield f"{block}ffn_{name}_shexp.weight", (layer.shared, hidden)
            yield f"{block}ffn_down_shexp.weight", (hidden, layer.shared)

    def _optional(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        if self.graph.untied:
            yield "output.weight", (self.get("vocab_size"), self.get("embedding_length"))
        if self.graph.frequencies:
            yield "rope_freqs.weight", (self.head_dim // 2,)
        for name, shape in [*self._wanted()]:
            path = name.removesuffix(".weight")
            if path.rpartition(".")[2] in self.graph.biases:
                yield f"{path}.bias", shape[:1]


@torch.no_grad()
def compute(file: File, ids: Int64[Tensor, "windows length"]) -> Float[Tensor, "windows length vocabulary"]:
    """The logits of a file, in float32, one layer in memory at a time.

    Args:
        file: whose structure was checked.
        ids: of tokens.
    """
    eps = file.get("attention.layer_norm_rms_epsilon")
    used, places = ids.unique(return_inverse=True)
    table = torch.cat([file.values("token_embd.weight", row, row + 1) for row in used.tolist()])
    x = table[places] * (file.get("embedding_scale") or 1)  # (windows, length, hidden)
    turn = _angles(file, ids.shape[1])
    scale = file.get("residual_scale") or 1
    for index, layer in enumerate(file.layers):
        if layer.query:
            x = x + scale * _attend(file, index, layer, _norm(file, f"blk.{index}.attn_norm", x, eps), turn, eps)
        y = _norm(file, f"blk.{index}.{file.graph.ffn_norm}", x, eps)
        mixture = file.mixture
        made = _mlp(file, f"blk.{index}.ffn_{{}}", y) if mixture is None else _mix(file, index, mixture, y)
        x = x + scale * made
    x = _norm(file, "output_norm", x, eps)
    output = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
    starts = range(0, file.tensors[output].shape[0], AT_ONCE)
    logits = torch.cat([x @ file.values(output, start, start + AT_ONCE).T for start in starts], dim=-1)
    return logits / (file.get("logit_scale") or 1)


def _attend(file: File, index: int, layer: Layer, x: Tensor, turn: tuple[Tensor, Tensor], eps: float) -> Tensor:
    block, width = f"blk.{index}.", file.head_dim
    if file.graph.fused:
        counts = [layer.query * width, layer.kv * width, layer.kv * width]
        q, k, v = _apply(file, f"{block}attn_qkv", x).split(counts, dim=-1)
    else:
        q, k, v = (_apply(file, f"{block}attn_{each}", x) for each in "qkv")
    if file.graph.whole_norms:
        q, k = (_norm(file, f"{block}attn_{name}_norm", each, eps) for name, each in (("q", q), ("k", k)))
    q, k, v = (each.unflatten(-1, (-1, width)).transpose(1, 2) for each in (q, k, v))  # (windows, heads, length, width)
    if file.graph.head_norms:
        q, k = (_norm(file, f"{block}attn_{name}_norm", each, eps) for name, each in (("q", q), ("k", k)))
    if not file.graph.still or (index + 1) % file.graph.still:
        q, k = (rotate(each, *turn, neighbours=file.graph.neighbours) for each in (q, k))
    scores = file.get("attention.scale") or 1 / math.sqrt(width)
    if file.graph.sinks:
        window = file.get("attention.sliding_window") if (index + 1) % file.graph.windows else x.shape[1]
        y = _look_back(q, k, v, file.values(f"{block}attn_sinks.weight"), window, scores)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scores, enable_gqa=layer.query > layer.kv)
    return _apply(file, f"{block}attn_output", y.transpose(1, 2).flatten(2))


def _look_back(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int, scale: float) -> Tensor:
    """Attention to the last `window` tokens, and to nothing with the score of the head's sink."""
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
    scores = scale * q @ k.transpose(-1, -2)  # (windows, heads, length, length)
    back = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    scores = scores.masked_fill((back < 0) | (back >= window), -math.inf)
    nothing = sinks[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, nothing], dim=-1).softmax(-1)[..., :-1] @ v


def _mlp(file: File, name: str, x: Tensor) -> Tensor:
    """Of maps whose names are `name` with gate, up and down."""
    made = F.silu(_apply(file, name.format("gate"), x)) * _apply(file, name.format("up"), x)
    return _apply(file, name.format("down"), made)


def _mix(file: File, index: int, mixture: Mixture, x: Tensor) -> Tensor:
    """What the experts that a token selects add to it, with the weights that their router gives them."""
    block, flat = f"blk.{index}.", x.flatten(0, -2)  # (tokens, hidden)
    scores, few = _apply(file, f"{block}ffn_gate_inp", flat), file.get("expert_used_count")
    weights, ids = (scores if mixture.bounded else scores.softmax(-1)).topk(few)
    if mixture.bounded:
        weights = weights.softmax(-1)
    elif mixture.normed:
        weights = weights / weights.sum(-1, keepdim=True)
    total = torch.zeros_like(flat)
    for expert in ids.unique().tolist():
        tokens, place = (ids == expert).nonzero(as_tuple=True)
        gate, up = (_apply_one(file, f"{block}ffn_{each}_exps", expert, flat[tokens]) for each in ("gate", "up"))
        if mixture.bounded:
            alpha, bound = OPENAI
            gate, up = gate.clamp(max=bound), up.clamp(-bound, bound)
            made = gate * torch.sigmoid(alpha * gate) * (up + 1)
        else:
            made = F.silu(gate) * up
        one = _apply_one(file, f"{block}ffn_down_exps", expert, made)
        total.index_add_(0, tokens, one * weights[tokens, place, None])
    if mixture.shared:
        gate = torch.sigmoid(_apply(file, f"{block}ffn_gate_inp_shexp", flat))
        total = total + gate * _mlp(file, f"{block}ffn_{{}}_shexp", flat)
    return total.reshape(x.shape)


def rotate(
    x: Float[Tensor, "*more length width"],
    cos: Float[Tensor, "length half"],
    sin: Float[Tensor, "length half"],
    *,
    neighbours: bool,
) -> Float[Tensor, "*more length width"]:
    """Turn pairs of a head by their angles: rows 2j and 2j + 1 with `neighbours`, else j and j + width / 2."""
    a, b = (x[..., ::2], x[..., 1::2]) if neighbours else x.chunk(2, dim=-1)
    one, other = a * cos - b * sin, b * cos + a * sin
    return torch.stack([one, other], dim=-1).flatten(-2) if neighbours else torch.cat([one, other], dim=-1)


def _angles(file: File, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles, by position and pair: (length, width / 2)."""
    width, base = file.head_dim, file.get("rope.freq_base")
    turns = 1 / base ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    if "rope_freqs.weight" in file.tensors:
        turns = turns / file.values("rope_freqs.weight")
    factor, size = file.get("rope.scaling.factor") or 1, 1.0
    if file.get("rope.scaling.type") == "yarn":
        turns, size = _blend(file, turns, factor), 1 + 0.1 * math.log(factor)
    else:
        turns = turns / factor
    angles = torch.arange(length, dtype=torch.float64)[:, None] * turns
    return (size * angles.cos()).float(), (size * angles.sin()).float()


def _blend(file: File, turns: Tensor, factor: float) -> Tensor:
    """YaRN as the engine has it: fast pairs stay, slow ones are divided by the factor, those between are both."""
    width, base = file.head_dim, file.get("rope.freq_base")
    length, betas = file.get("rope.scaling.original_context_length"), ("fast", "slow")
    first, last = (
        width * math.log(length / (2 * math.pi * file.get(f"rope.scaling.yarn_beta_{beta}"))) / (2 * math.log(base))
        for beta in betas
    )
    first, last = max(0, math.floor(first)), min(width - 1, math.ceil(last))
    ramp = ((torch.arange(width // 2, dtype=torch.float64) - first) / max(0.001, last - first)).clamp(0, 1)
    return turns * (1 - ramp) + turns / factor * ramp


def _apply(file: File, name: str, x: Tensor) -> Tensor:
    bias = file.values(f"{name}.bias") if f"{name}.bias" in file.tensors else None
    return F.linear(x, file.values(f"{name}.weight"), bias)


def _apply_one(file: File, name: str, expert: int, x: Tensor) -> Tensor:
    one = slice(expert, expert + 1)
    bias = file.values(f"{name}.bias", one.start, one.stop)[0] if f"{name}.bias" in file.tensors else None
    return F.linear(x, file.values(f"{name}.weight", one.start, one.stop)[0], bias)


def _norm(file: File, name: str, x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * file.values(f"{name}.weight")
