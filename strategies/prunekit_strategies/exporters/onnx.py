"""One ONNX graph with a cache, which onnxruntime and others run.

Inputs: `input_ids` (batch, new), `attention_mask` (batch, past + new; 0 where there is padding, on the left), and for
every layer that has attention `past.I.key` and `past.I.value` (batch, KV heads, past, head dimension). Outputs:
`logits` (batch, new, vocabulary) and `present.I.key`, `present.I.value`, which are the next step's past. A text is read
with a past of length 0. Layers differ in KV heads; layers without attention have no cache.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import prunekit as pk

OPSET = 18
LARGEST = 1_800_000_000  # bytes of weights in the graph's own file: protobuf ends at 2 GiB
MODEL, WEIGHTS = "model.onnx", "model.onnx.data"
STORED = "prunekit.stored"  # key of the dtype in the file's metadata
HALF_ALLOWED = 0.1  # nats, as for any format that stores 11 bits of a weight
GROWING = ("dynamic", "longrope")  # rotary tables that follow the length of the text, which no fixed graph has
AT_ONCE = 4  # windows that are read together


@dataclass(frozen=True)
class ONNX(pk.Exporter):
    """A graph for onnxruntime with KV cache, proved by its logits and greedy tokens in a fresh process.

    The model that transformers runs is traced once, by `torch.onnx.export`, with batch, new tokens and past tokens of
    any number; prefill and decoding are the same graph. Of a mixture every expert reads the tokens that select it, one
    expert after the other, in one node `Scan` for every layer, so a graph is as large for hundreds of experts as for
    two. It computes in float32. Weights are stored once, tied ones too; in float16 they are stored in half the bytes
    and widened when the file is loaded.
    """

    engine: ClassVar[str] = "onnxruntime"
    asks_engine: ClassVar[bool] = True
    modules: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    install: ClassVar[str] = "prunekit[onnx]"

    dtype: Literal["auto", "float32", "float16"] = "auto"  # of stored weights; auto: float32

    def __post_init__(self) -> None:
        pk.check_choices(self)

    @property
    def place(self) -> str:
        return "onnx"

    def check(self, order: pk.Order) -> None:
        family = getattr(order.adapter, "family", None)
        if family is None:
            raise pk.WrongInput(f"format 'onnx' writes models with attention, not {type(order.adapter).__name__}")
        if family.mixer is not None:
            raise pk.WrongInput(
                "format 'onnx' writes a cache of keys and values alone, and some blocks of this model have a mixer "
                "with a state of its own; take format 'hf'"
            )
        if order.adapter.images:
            raise pk.WrongInput(
                "format 'onnx' writes language models, and this one takes images, too; take format 'hf'"
            )
        if order.config is None:
            return
        rope = getattr(order.config, "rope_parameters", None) or {}
        kinds = [rope, *rope.values()] if isinstance(rope, Mapping) else []
        kinds = [kind.get("rope_type") for kind in kinds if isinstance(kind, Mapping)]
        if grows := [kind for kind in kinds if kind in GROWING]:
            raise pk.WrongInput(
                f"format 'onnx' cannot hold {grows[0]} rotary tables, which change with the length of the text"
            )
        if getattr(order.config, "alibi", False):
            raise pk.WrongInput("format 'onnx' cannot hold ALiBi, whose biases are made from the mask of a whole text")

    def write(self, product: pk.Product, path: Path) -> None:
        import onnx

        from prunekit.models.paging import pager_of

        if pager_of(product.model) is not None:
            raise pk.WrongInput("format 'onnx' needs the whole model in memory, in float32 twice")
        if path.exists() and any(path.iterdir()):
            raise FileExistsError(f"{path} already holds a model; choose another directory or empty it")
        graph = _traced(product.model)
        _name_dimensions(graph)
        if self.dtype == "float16":
            _halve(graph)
        _describe(graph, {STORED: "float16" if self.dtype == "float16" else "float32"})
        path.mkdir(exist_ok=True)
        large = sum(len(each.raw_data) for each in graph.graph.initializer) > LARGEST
        onnx.save_model(graph, path / MODEL, save_as_external_data=large, location=WEIGHTS)

    def verify(self, path: Path, probe: pk.Probe) -> None:
        import torch

        none = torch.zeros(0, dtype=torch.long)
        inquiry = pk.Inquiry(probe.ids, probe.logits.topk(min(8, probe.logits.shape[-1]), -1).indices, none, 0)
        wanted, _ = pk.Response.read(probe.logits, inquiry)
        found = self.answers(path, inquiry)
        if found.parameters != probe.parameters:
            raise pk.NotVerified(f"{path} has {found.parameters:,} parameters, not {probe.parameters:,}")
        difference, allowed = float((found.logprobs - wanted).abs().max()), self.tolerance(path)
        if not difference <= allowed:
            raise pk.NotVerified(f"log-probabilities of {path} differ by {difference:.3g}; {allowed:.3g} is allowed")

    def answers(self, path: Path, inquiry: pk.Inquiry) -> pk.Response:
        from prunekit.export.fresh import Failed, ask_fresh

        asked = {"ids": inquiry.ids, "tokens": inquiry.tokens, "prompt": inquiry.prompt}
        try:
            told, found = ask_fresh(__file__, asked, [path.resolve(), inquiry.new_tokens])
        except Failed as error:
            raise pk.NotVerified(f"{path} does not load in a fresh process:\n{error}") from error
        return pk.Response(**found, parameters=told["parameters"], tensors=told["tensors"])  # type: ignore[arg-type]

    def tolerance(self, path: Path, dtype: Any = None) -> float:
        import torch

        exact = dtype == torch.float16 or _stored(path) != "float16"
        return super().tolerance(path, dtype) if exact else HALF_ALLOWED

    def timer(self, path: Path) -> Callable[[Any], tuple[int, int]]:
        import numpy as np
        import torch

        session = _opened(path, threads=torch.get_num_threads())

        def run(work: Any) -> tuple[int, int]:
            for new_tokens in (1, work.new_tokens):  # the first run does not count
                ids = np.tile(np.arange(work.prompt) % 1000, (work.batch, 1))
                started = time.perf_counter_ns()
                logits, past = session.step(ids, session.empty(work.batch))
                read = time.perf_counter_ns()
                for _ in range(new_tokens):
                    logits, past = session.step(logits[:, -1:].argmax(-1), past)
                made = time.perf_counter_ns()
            return read - started, made - read

        return run

    def size(self, order: pk.Order) -> int:
        return order.parameters * (2 if self.dtype == "float16" else 4)


# -- writing -------------------------------------------------------------------------------------------


def _traced(model: Any) -> Any:
    """The graph of a model, as an ONNX model in memory."""
    import torch

    if model.dtype != torch.float32:
        model = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
    shapes = _cache_shapes(model)
    names = [
        f"{which}.{index}.{what}" for which in ("past", "present") for index in shapes for what in ("key", "value")
    ]
    past, present = names[: len(names) // 2], names[len(names) // 2 :]
    batch, new, before, free = 2, 3, 5, torch.export.Dim.DYNAMIC
    given = [torch.zeros(batch, heads, before, width) for pair in shapes.values() for heads, width in pair]
    ids, mask = torch.ones(batch, new, dtype=torch.long), torch.ones(batch, before + new, dtype=torch.long)
    dynamic = ({0: free, 1: free}, {0: free, 1: free}, [{0: free, 2: free}] * len(given))
    with _eager(model), _scanned(model), _quietly(), torch.no_grad():
        program = torch.onnx.export(
            _step(model, list(shapes)), (ids, mask, given), dynamo=True, dynamic_shapes=dynamic, opset_version=OPSET,
            input_names=["input_ids", "attention_mask", *past], output_names=["logits", *present],
            optimize=False, verbose=False,  # folding would store transposed copies of tied weights
        )  # fmt: skip
    assert program is not None
    graph = program.model_proto
    _leave_weights(graph, {f"model.{name}" for name, _ in model.named_parameters(remove_duplicate=False)})
    return graph


def _cache_shapes(model: Any) -> dict[int, tuple[tuple[int, int], tuple[int, int]]]:
    """(KV heads, dimension) of keys and of values, by the layers that have attention."""
    import torch

    from prunekit.models.classes import SkippedMixer

    cache, ids = _cache({}, 0), torch.ones(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad(), _eager(model):
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    lost = {module.layer_idx for module in model.modules() if isinstance(module, SkippedMixer)}
    return {
        index: tuple((part.shape[1], part.shape[3]) for part in pair)  # type: ignore[misc]
        for index, pair in sorted(cache.now.items())
        if index not in lost
    }


def _cache(past: Mapping[int, Any], length: Any) -> Any:
    """A cache of transformers over tensors that are given, for a graph that hands them in and out."""
    import torch
    from transformers import DynamicCache

    class Given(DynamicCache):
        def __init__(self) -> None:
            super().__init__()
            self.now: dict[int, tuple[Any, Any]] = {}

        def update(self, key_states: Any, value_states: Any, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
            pair = key_states, value_states
            if layer_idx in past:
                keys, values = past[layer_idx]
                pair = torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)
            self.now[layer_idx] = pair
            return pair

        def get_seq_length(self, layer_idx: int = 0) -> Any:
            return length

    return Given()


def _step(model: Any, layers: Sequence[int]) -> Any:
    """A module that reads new tokens behind a past, with tensors alone going in and out."""
    import torch
    from torch import nn

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, past: Any) -> tuple[Any, ...]:
            new, total = input_ids.shape[1], attention_mask.shape[1]
            before = total - new
            pairs = {index: (past[2 * n], past[2 * n + 1]) for n, index in enumerate(layers)}
            cache = _cache(pairs, before)
            positions = (attention_mask.cumsum(1) - 1).clamp_min(0)[:, before:]  # padding stands on the left
            here, there = torch.arange(new)[:, None] + before, torch.arange(total)[None]
            seen = (there <= here)[None, None] & (attention_mask[:, None, None, :] > 0)
            out = self.model(
                input_ids=input_ids, attention_mask=_masks(model.config, seen, here, there), position_ids=positions,
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            return (out.logits, *(part for index in layers for part in cache.now[index]))

    return Step().eval()


def _masks(config: Any, seen: Any, here: Any, there: Any) -> Any:
    """What attention adds to its scores, in four dimensions, which transformers takes as it is; by kind of layer."""
    import torch

    def added(which: Any) -> Any:
        return torch.where(which, 0.0, torch.finfo(torch.float32).min).to(torch.float32)

    window = getattr(config, "sliding_window", None)
    near = seen & (there > here - window)[None, None] if window else seen
    if getattr(config, "layer_types", None):
        return {"full_attention": added(seen), "sliding_attention": added(near)}
    return added(near)


def _leave_weights(graph: Any, weights: Collection[str]) -> None:
    """Make the initialisers those of the weights alone: buffers and numbers in the code become constants.

    The tracer makes an initialiser of every tensor: of the frequencies of positions, of the factor by which Gemma's
    embeddings are multiplied, and of what Falcon's attention divides by, which is made of a number anew in every layer.
    """
    from onnx import helper

    parts = graph.graph
    others = [place for place, each in enumerate(parts.initializer) if each.name not in weights]
    found = [parts.initializer[place] for place in others]
    nodes = [helper.make_node("Constant", [], [each.name], name=each.name, value=each) for each in found]
    nodes += parts.node
    del parts.node[:]
    parts.node.extend(nodes)
    for place in reversed(others):
        del parts.initializer[place]


def _name_dimensions(graph: Any) -> None:
    """Call dimensions by what they are, and leave out what the tracer notes of its sources."""
    known = {"input_ids": ("batch", "new"), "attention_mask": ("batch", "total"), "logits": ("batch", "new", "")}
    for value in (*graph.graph.input, *graph.graph.output):
        length = "past" if value.name.startswith("past.") else "total"
        names = known.get(value.name, ("batch", "", length, ""))
        for dim, name in zip(value.type.tensor_type.shape.dim, names, strict=True):
            if name:
                dim.dim_param = name
    del graph.graph.value_info[:]
    inside = graph.graph
    nodes = [node for part in (inside, *graph.functions) for node in _nodes(part)]
    for each in (graph, inside, *nodes, *inside.initializer, *inside.input, *inside.output):
        del each.metadata_props[:]
        each.doc_string = ""


def _nodes(part: Any) -> Iterator[Any]:
    """The nodes of a graph or a function, and of the graphs inside them."""
    for node in part.node:
        yield node
        for each in node.attribute:
            if each.HasField("g"):
                yield from _nodes(each.g)


def _halve(graph: Any) -> None:
    """Store matrices in float16, and widen each where it enters the graph."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    widened = list[Any]()
    for each in graph.graph.initializer:
        if each.data_type == TensorProto.FLOAT and len(each.dims) > 1:
            values, name = numpy_helper.to_array(each), each.name
            if float(np.abs(values).max(initial=0)) > float(np.finfo(np.float16).max):
                raise pk.WrongInput(f"{name} holds values that float16 cannot; take --dtype float32")
            each.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.half"))
            widened.append(helper.make_node("Cast", [each.name], [name], to=TensorProto.FLOAT, name=f"widen {name}"))
    nodes = [*widened, *graph.graph.node]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


def _describe(graph: Any, facts: Mapping[str, str]) -> None:
    from onnx import helper

    graph.producer_name, graph.producer_version = "prunekit", ""
    helper.set_model_props(graph, dict(facts))


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """Attention written out, which every runtime knows, as long as it is traced."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _scanned(model: Any) -> Iterator[None]:
    """Experts one after the other, each with the tokens that select it, as long as it is traced.

    Which these are depends on values, so a graph has to say it: where the router selects an expert, at most once for a
    token, is looked up; its rows are computed, and added to the others' in their places. That is said once in a layer,
    however many experts it has: `scan` hands their matrices in one after the other, as slices that are not copied.
    Same as the loop that transformers runs, over all experts and not over those alone that are selected.
    """
    from prunekit.models.classes import FAMILIES

    family = FAMILIES[model.config.model_type.removeprefix("prunekit_")]
    blocks = model.base_model.get_submodule(family.layers).children() if family.experts is not None else ()
    found = [b.get_submodule(family.experts.path) for b in blocks if family.experts and family.experts.there(b)]
    for module in found:
        module.forward = _added_up(module)
    try:
        yield
    finally:
        for module in found:
            del module.forward


def _added_up(module: Any) -> Callable[..., Any]:
    """The forward method of a module with the matrices of all experts, as a graph can hold it."""
    import torch

    def times(x: Any, matrix: Any, bias: Any = 0.0) -> Any:
        return x @ (matrix if module.is_transposed else matrix.T) + bias

    def run(hidden: Any, ids: Any, weights: Any) -> Any:
        def add(total: Any, each: Sequence[Any]) -> tuple[Any, Any]:
            expert, (first, *first_bias), (last, *last_bias) = each[0], each[1::2], each[2::2]
            tokens, place = (ids == expert).nonzero(as_tuple=True)
            made = times(module._apply_gate(times(hidden[tokens], first, *first_bias)), last, *last_bias)
            made = made * weights[tokens, place, None].to(made.dtype)
            return total.index_add(0, tokens, made), total.new_zeros(())  # nothing is made besides

        names = ["gate_up_proj", "down_proj", *(["gate_up_proj_bias", "down_proj_bias"] if module.has_bias else [])]
        stacks = torch.arange(module.num_experts), *(getattr(module, name) for name in names)
        return _scan(add, torch.zeros_like(hidden), stacks)

    return run


def _scan(step: Callable[[Any, Sequence[Any]], tuple[Any, Any]], start: Any, stacks: Sequence[Any]) -> Any:
    """What is carried from slice to slice of tensors that are as long as each other, at the end."""
    from torch._higher_order_ops.scan import scan  # not public yet; the exporter of torch knows it

    return scan(step, start, tuple(stacks))[0]


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what the tracer says of itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


# -- running -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Session:
    """A file in onnxruntime."""

    session: Any
    past: tuple[tuple[str, int, int], ...]  # name, KV heads, dimension

    def empty(self, batch: int) -> list[Any]:
        import numpy as np

        return [np.zeros((batch, heads, 0, width), np.float32) for _, heads, width in self.past]

    def step(self, ids: Any, past: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Read new tokens behind a past: (logits, the past of the next step)."""
        import numpy as np

        before = past[0].shape[2] if past else 0
        mask = np.ones((ids.shape[0], before + ids.shape[1]), np.int64)
        given = {"input_ids": ids.astype(np.int64), "attention_mask": mask}
        given |= {name: each for (name, _, _), each in zip(self.past, past, strict=True)}
        names = {each.name for each in self.session.get_inputs()}
        logits, *present = self.session.run(None, {name: each for name, each in given.items() if name in names})
        return logits, present


def _opened(path: Path, threads: int = 1) -> _Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(str(path / MODEL), options, providers=["CPUExecutionProvider"])
    past = tuple((i.name, i.shape[1], i.shape[3]) for i in session.get_inputs() if i.name.startswith("past."))
    return _Session(session, past)


def _stored(path: Path) -> str | None:
    """The dtype that a file says its weights are stored in; None: it cannot be read."""
    import onnx

    try:
        found = onnx.load(str(path / MODEL), load_external_data=False)
    except Exception:  # of protobuf, on what may be anything
        return None
    return next((each.value for each in found.metadata_props if each.key == STORED), None)


def answer(
    asked: Mapping[str, Any], path: str, new_tokens: str
) -> tuple[dict[str, Any], dict[str, Any]]:  # called by a fresh process
    """What onnxruntime says of windows, and how it continues a prompt from the cache."""
    import numpy as np
    import torch

    session, rows = _opened(Path(path)), list[Any]()
    for ids, tokens in zip(asked["ids"].split(AT_ONCE), asked["tokens"].split(AT_ONCE), strict=True):
        logits = torch.from_numpy(session.step(ids.numpy(), session.empty(len(ids)))[0])
        chosen = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
        rows.append((chosen, logits.argmax(-1)))
    text, made, past = asked["prompt"].numpy()[None], list[Any](), session.empty(1)
    for _ in range(int(new_tokens)):
        logits, past = session.step(text, past)
        text = np.argmax(logits[:, -1:], -1)
        made.append(int(text[0, 0]))
    parameters, tensors = _counted(Path(path))
    found = {
        "logprobs": torch.cat([row for row, _ in rows]),
        "likeliest": torch.cat([row for _, row in rows]),
        "continuation": torch.tensor(made, dtype=torch.long),
    }
    return {"parameters": parameters, "tensors": tensors}, found


def _counted(path: Path) -> tuple[int, int]:
    """(numbers in the weights, which are the initialisers; how many these are); all of them are used by a node."""
    import math

    import onnx

    graph = onnx.load(str(path / MODEL), load_external_data=False).graph
    used = {name for node in graph.node for name in node.input}
    if idle := [each.name for each in graph.initializer if each.name not in used]:
        raise SystemExit(f"the graph holds {idle[0]} and does not use it")
    return sum(math.prod(each.dims) for each in graph.initializer), len(graph.initializer)
