"""The exporter: refuse, write, verify."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gguf
import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor

import prunekit as pk
from prunekit.models.classes import FAMILIES
from prunekit.models.opening import without_bars
from prunekit.models.paging import real, shapes_of
from prunekit.models.shards import Shards
from prunekit.space.prices import Workload
from prunekit.system.files import settle, settle_folder, temporary_of
from prunekit_strategies.exporters.gguf import engine as runner
from prunekit_strategies.exporters.gguf.carriers import (
    ELSEWHERE,
    Layout,
    carrier,
    check_config,
    check_heads,
    family_of,
    has_rounded_ramp,
)
from prunekit_strategies.exporters.gguf.reading import File, compute
from prunekit_strategies.exporters.gguf.tensors import Read, find_biases, make_entries, rows_of, sources_of
from prunekit_strategies.exporters.gguf.vocabulary import (
    find_difference,
    make_tokenizer,
    make_vocabulary,
    probes_of,
)
from prunekit_strategies.exporters.gguf.writing import OWN, write_file

ENGINES = {  # what the engine's own quantizer writes, and the bytes of a weight then
    "q2_k": 0.42, "q3_k_s": 0.44, "q3_k_m": 0.49, "q3_k_l": 0.53, "q4_0": 0.57, "q4_k_s": 0.58, "q4_k_m": 0.61,
    "q5_0": 0.69, "q5_k_s": 0.7, "q5_k_m": 0.72, "q6_k": 0.83,
}  # fmt: skip
NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}  # as torch calls them
BYTES = {name: bytes_ / weights for name, (kind, _) in OWN.items() for weights, bytes_ in [gguf.GGML_QUANT_SIZES[kind]]}
EXACT = 1e-3  # of a log-probability: what float32 computed in another order may be apart
BESIDE = 5e-3  # the same, of an engine
DIVERGED = {"f16": 0.05, "bf16": 0.2, "q8_0": 1.0}  # nats per token, at most, on any text: rounding alone stays below
FAR = 5.0  # the same, of other dtypes: no other model is so near
ROUNDED = {"f32": BESIDE, "f16": 0.25, "bf16": 0.8, "q8_0": 2.0}  # of a log-probability of likely tokens, by rounding


@dataclass(frozen=True)
class Parity:
    """What a file computes beside what was promised."""

    apart: float  # largest difference of a log-probability
    divergence: float  # KL, nats per token, of the file from the promise
    agree: float  # share of positions with the same likeliest token
    positions: int

    def __str__(self) -> str:
        return (
            f"|Δ log p| ≤ {self.apart:.2g}, KL {self.divergence:.2g} nats per token, the same likeliest token at "
            f"{self.agree:.1%} of {self.positions:,} positions"
        )


@dataclass(frozen=True)
class GGUF(pk.Exporter):
    """One GGUF file for llama.cpp and what is built on it, with per-layer sizes, the tokenizer and the chat template.

    Layers of unequal sizes are written for an architecture whose graph reads sizes layer by layer (`carriers`), by the
    gguf package; K-quants by the quantizer of the engine, where it is installed. The file is read back: its structure,
    its values beside those of the folder it lies in, and the logits that follow from it alone; where llama-cpp-python
    is installed, also those that the engine computes, and its tokens.
    """

    engine: ClassVar[str] = "llama.cpp"
    asks_engine: ClassVar[bool] = True
    engine_modules: ClassVar[tuple[str, ...]] = (runner.PACKAGE,)
    install: ClassVar[str] = "prunekit[llama-cpp]"

    dtype: str = "f16"  # f32, f16, bf16, q8_0; or, by the engine, q4_k_m and others
    equal: bool = False  # a promise that all layers will keep the same sizes, as with allocator uniform
    pre: str = ""  # the name that llama.cpp has for the tokenizer's rules; "": found

    def __post_init__(self) -> None:
        if self.kind not in (known := {**OWN, **ENGINES}):
            raise ValueError(f"dtype is one of {', '.join(known)}, not {self.dtype!r}")

    @property
    def kind(self) -> str:
        """The dtype as names of files have it."""
        return NAMES.get(self.dtype, self.dtype)

    @property
    def place(self) -> str:
        return f"model-{self.kind}.gguf"

    def check(self, order: pk.Order) -> None:
        if self.kind not in OWN and not runner.installed():
            raise pk.WrongInput(
                f"exporters.gguf.dtype {self.kind} is written by llama.cpp's own quantizer, which is not installed: "
                f"{runner.INSTALL}; without it there are {', '.join(OWN)}"
            )
        if order.config is None:
            return
        check_config(order.config, unequal=False)
        check_heads(
            order.config, fewer=not order.settled and order.units == "groups" and "attention" not in order.spared
        )
        if self.kind == "f32" and has_rounded_ramp(order.config):
            raise pk.WrongInput(
                f"gguf cannot carry this {family_of(order.config)} exactly: llama.cpp rounds where the ramp of YaRN "
                f"begins and ends; give exporters.gguf.dtype f16 or bf16, or {ELSEWHERE}"
            )
        if order.units == "groups" and not self.equal and _may_differ(order):
            check_config(order.config, unequal=True)
        if order.tokenizer is not None:
            make_vocabulary(order.tokenizer, order.config.vocab_size, pre=self.pre)

    def write(self, product: pk.Product, path: Path) -> None:
        if path.exists():
            raise FileExistsError(f"{path} is there already; move it away")
        model: Any = product.model
        config = model.config
        check_config(config, unequal=False)
        with shapes_of(model):
            names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        layout, biases = Layout.of(config), find_biases(names)
        architecture = carrier(layout, biases)
        vocabulary = make_vocabulary(product.tokenizer, layout.vocabulary, _ends(model), self.pre)
        entries = make_entries(layout, architecture, names)
        whole, source = temporary_of(path), _source_of(path)

        def read(name: str) -> Tensor:
            return real(model.get_parameter(name))

        try:
            if self.kind in OWN:
                write_file(whole, layout, architecture, entries, read, vocabulary, self.kind)
            else:
                stored = "bf16" if model.dtype == torch.bfloat16 else "f32"
                write_file(source, layout, architecture, entries, read, vocabulary, stored)
                try:
                    runner.quantize(source, whole, self.kind)
                except runner.EngineFailed as error:
                    raise pk.NotVerified(str(error)) from error
            settle(whole)
            if path.exists():
                raise FileExistsError(f"{path} is there already; move it away")
            whole.rename(path)
            settle_folder(path.parent)
        finally:
            for file in (whole, source):
                file.unlink(missing_ok=True)

    def verify(self, path: Path, probe: pk.Probe) -> None:
        file = File.opened(path)
        file.check()
        if (found := file.parameters()) != probe.parameters:
            raise pk.NotVerified(f"{path} has {found:,} parameters, not {probe.parameters:,}")
        if self.kind == "f32":
            _check_values(file, path.parent)
        self._check_near(compare(compute(file, probe.ids), probe.logits), path, EXACT)
        if file.vocabulary().model != "no_vocab":
            _check_tokens(file, path.parent / "tokenizer.json")
        if runner.installed():
            try:
                logits = runner.compute_logits(path, probe.ids)
            except runner.EngineFailed as error:
                raise pk.NotVerified(str(error)) from error
            self._check_near(compare(logits, probe.logits), path, BESIDE)

    def answers(self, path: Path, inquiry: pk.Inquiry) -> pk.Response:
        file = File.opened(path)
        try:
            logits = runner.compute_logits(path, inquiry.ids)
            new = runner.generate(path, inquiry.prompt.tolist(), inquiry.new_tokens) if inquiry.new_tokens else []
        except runner.EngineFailed as error:
            raise pk.NotVerified(str(error)) from error
        found = pk.Response.read(logits, inquiry)
        return pk.Response(*found, torch.tensor(new, dtype=torch.long), file.parameters(), len(file.tensors))

    def tolerance(self, path: Path, dtype: torch.dtype | None = None) -> float:
        return ROUNDED.get(self.kind, FAR)

    def timer(self, path: Path) -> Callable[[Workload], tuple[int, int]] | None:
        if not runner.installed():
            return None
        try:
            run = runner.open_timer(path, torch.get_num_threads())
        except runner.EngineFailed as error:
            raise pk.NotVerified(str(error)) from error
        return lambda work: run(work.batch, work.prompt, work.new_tokens)

    def size(self, order: pk.Order) -> int:
        return int(order.parameters * (BYTES | ENGINES)[self.kind])

    def files(self, folder: Path) -> list[Path]:
        path = folder / self.place
        return [each for each in (path, temporary_of(path), _source_of(path)) if each.is_file()]

    def _check_near(self, parity: Parity, path: Path, bar: float) -> None:
        far = parity.apart > bar if self.kind == "f32" else parity.divergence > DIVERGED.get(self.kind, FAR)
        if far or not parity.apart < float("inf"):  # NaN is not
            raise pk.NotVerified(f"{path} computes something else than the model that was judged: {parity}")


def compare(logits: Float[Tensor, "... vocabulary"], wanted: Float[Tensor, "... vocabulary"]) -> Parity:
    """Logits of a file beside those that were promised."""
    if logits.shape != wanted.shape:
        raise pk.NotVerified(f"logits have shape {tuple(logits.shape)}, not {tuple(wanted.shape)}")
    ours, theirs = (each.detach().float().flatten(0, -2).log_softmax(-1) for each in (logits, wanted))
    divergence = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    agree = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    return Parity(float((ours - theirs).abs().max()), divergence, agree, len(ours))


def _check_values(file: File, folder: Path) -> None:
    """Compare values with those of a checkpoint in the folder of a result, bit for bit, if there is one.

    Raises:
        NotVerified: names the first tensor that differs.
    """
    config = _config_in(folder)
    if config is None:
        return
    names, read = _checkpoint(folder, config)
    entries = make_entries(Layout.of(config), file.architecture, names)
    if apart := {entry.name for entry in entries} ^ (file.tensors.keys() - {"rope_freqs.weight"}):
        raise pk.NotVerified(f"{file.path} and {folder} do not agree in {', '.join(sorted(apart)[:5])}")
    for entry in entries:
        for piece, values in sources_of(entry, file.values(entry.name)):
            wanted = torch.zeros(()) if not piece.source else rows_of(piece, read(piece.source)).float()
            if not bool((values == (wanted if piece.factor == 1 else wanted * piece.factor)).all()):
                raise pk.NotVerified(f"{entry.name} of {file.path} is not {piece.source or 'zero'} of {folder}")


def _checkpoint(folder: Path, config: Any) -> tuple[Collection[str], Read]:
    """The names of the tensors in a folder, and how to read one; transformers merges those of experts."""
    if FAMILIES[family_of(config)].experts is None:
        shards = Shards.of(str(folder))
        return shards.tensors.keys(), shards.read
    from transformers import AutoModelForCausalLM

    with without_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}, model.get_parameter


def _config_in(folder: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        return None
    return AutoConfig.from_pretrained(folder)


def _check_tokens(file: File, beside: Path) -> None:
    """Compare the tokenizer of a file, as it is read here and by the engine, with the one beside it, if there is one.

    Raises:
        NotVerified: a text becomes other ids.
    """
    vocabulary = file.vocabulary()
    encode, apart = make_tokenizer(vocabulary), None
    if beside.is_file():
        tokenizer = Tokenizer.from_file(str(beside))
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
        apart = find_difference(vocabulary, encode)
    if apart is None and runner.installed():
        texts = probes_of(vocabulary)
        found = runner.tokenize(file.path, texts)
        pairs = zip(texts, map(encode, texts), found, strict=True)
        apart = next(((text, theirs, ours) for text, theirs, ours in pairs if theirs != ours), None)
    if apart is not None:
        text, theirs, ours = apart
        raise pk.NotVerified(f"{file.path} makes {ours[:8]} of {text!r}, not {theirs[:8]}")


def _may_differ(order: pk.Order) -> bool:
    """Whether the layers of a result may differ in size: where it is not there yet, they may."""
    return not order.settled or not Layout.of(order.config).equal


def _ends(model: Any) -> Sequence[int]:
    """Ids that end an answer."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]


def _source_of(path: Path) -> Path:
    """What the engine's quantizer reads."""
    return temporary_of(path.with_name(f"{path.name}.source"))


def describe(path: Path) -> Mapping[str, Any]:
    """What a file says of itself: architecture, sizes of layers, types of tensors."""
    file = File.opened(path)
    return {
        "architecture": file.architecture,
        "layers": [(layer.query, layer.kv, layer.width) for layer in file.layers],
        "types": sorted({stored.kind.name for stored in file.tensors.values()}),
        "parameters": file.parameters(),
    }
