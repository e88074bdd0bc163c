"""Small layer problems: correlated inputs, and everything that makes real moments awkward."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch

from prunekit.calibration.moments import Moments, collected
from prunekit.layer.candidates import Candidate
from prunekit.layer.problem import LayerProblem, Producer
from prunekit.layer.statistics import MapShape, Need, Received, Statistic
from prunekit.layer.sublayer import CutSubLayer, SubLayer
from prunekit.space.forms import GROUPS, RANKS, WEIGHTS, Form, Pattern, Values

Quirk = Literal["plain", "dead", "duplicate", "constant", "low rank", "loud", "zero weight", "silent"]
QUIRKS: tuple[Quirk, ...] = get_args(Quirk)


def toy_layer(
    n_groups: int = 6,
    group_size: int = 1,
    d_out: int = 5,
    *,
    quirk: Quirk = "plain",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    moments: torch.dtype = torch.float32,
    block: int | None = None,
    form: Form | None = None,
    needs: Iterable[Need] = (),
) -> LayerProblem:
    """A layer with correlated inputs and all that a pruner may need by name, but no cross moment.

    quirk: dead (the first group receives nothing), duplicate (the second receives what the first does), constant
    (the first column is 1), low rank (two directions in all), loud (the last column is 1000 times the others),
    zero weight (the first group has none), silent (no group receives anything). With a block, single weights are
    removed: 0 for structure weights, m for n:m, or what `form` says; then nothing in front of the layer goes with them.
    Statistics that are objects in `needs` are taken of the layer's tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    d_in = n_groups * group_size
    weight = normal(d_out, d_in)
    x = normal(8 * d_in, d_in) @ normal(d_in, d_in) + 0.5 * normal(d_in)  # (tokens, d_in)
    first, second = slice(0, group_size), slice(group_size, 2 * group_size)
    if quirk == "dead":
        x[:, first] = 0
    elif quirk == "duplicate" and n_groups > 1:
        x[:, second], weight[:, second] = x[:, first], weight[:, first]
    elif quirk == "constant":
        x[:, 0] = 1
    elif quirk == "low rank":
        x = x[:, :2] @ normal(min(2, d_in), d_in)
    elif quirk == "loud":
        x[:, -1] *= 1000
    elif quirk == "zero weight":
        weight[:, first] = 0
    elif quirk == "silent":
        x = 0 * x
    loud = (x @ weight.T).square().sum(1, keepdim=True)
    statistics = {
        "mean": x.mean(0),
        "variance": x.var(0, correction=0),
        "absolute": x.abs().mean(0),
        "relative": torch.where(loud > 0, x.square() / torch.where(loud > 0, loud, 1), 0).mean(0),
        "contrast": x.square().mean(0) * normal(d_in).tanh().square(),  # less than on the first data set
        "gradient": normal(d_out, d_in),
        "fisher": normal(d_out, d_in).square(),
    }
    if form is None:
        form = GROUPS if block is None else Pattern(1, block) if block else WEIGHTS
    fed, learnt = {}, {}
    front = (("wide", d_in), ("narrow", n_groups)) if form.coupled else ()  # as queries, and shared keys
    if isinstance(form, Values):
        front = (("values", form.kv_heads * form.most(d_in, d_in, d_out)),)
    for name, rows in front:
        fed[name], size = normal(rows, 3), (rows, 3)
        learnt[name] = {"power": normal(3).square(), "gradient": normal(*size), "fisher": normal(*size).square()}
    statistics |= {name: normal(1).square()[0] for name in ("influence", "turn")}
    own = added_up(needs, x, weight, fed, seed)
    if "output-fisher" in needs:
        slope = torch.randn(2 * d_out, d_out, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        statistics["output-fisher"] = slope.T @ slope / len(slope)
    return LayerProblem(
        weight=weight.to(dtype),
        gram=(x.T @ x / len(x)).to(moments),
        group_size=group_size,
        form=form,
        statistics={name: value.to(moments) for name, value in (statistics | own[""]).items()},
        producers=tuple(
            Producer(name, w.to(dtype), {key: value.to(moments) for key, value in (learnt[name] | own[name]).items()})
            for name, w in fed.items()
        ),
        name=f"{quirk} toy",
    )


@torch.no_grad()
def added_up(
    needs: Iterable[Need], x: torch.Tensor, weight: torch.Tensor, fed: Mapping[str, torch.Tensor], seed: int = 0
) -> dict[str, dict[str, torch.Tensor]]:
    """Values of the statistics that are objects in `needs`, by producer layer, "" for the layer itself, and by name.

    `x`: (tokens, d_in), eight to a window, of the dense model and of this one.
    """
    generator, n = torch.Generator().manual_seed(seed), len(x)
    own = tuple(need for need in needs if isinstance(need, Statistic))
    shape, layers = MapShape(x.shape[1], len(weight)), {name: MapShape(w.shape[1], len(w)) for name, w in fed.items()}
    moments = Moments.empty(collected(own, residual=True), shape, x.device, layers)
    linear = torch.nn.Linear(x.shape[1], len(weight), bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    residual = torch.randn(n, len(weight), generator=generator, dtype=x.dtype)
    dense = Received(lambda: x, linear, 8, lambda: residual, entered=lambda: residual)
    moments.add(Received(lambda: x, linear, 8, lambda: residual, dense, entered=lambda: residual))
    for name, layer in layers.items():
        inputs = torch.randn(n, layer.d_in, generator=generator, dtype=x.dtype)
        moments.add_producer(name, Received(lambda inputs=inputs: inputs, length=8))
    return {"": moments.values(weight), **{name: moments.values(w, name) for name, w in fed.items()}}


class MapAlone(SubLayer):
    """A sub-layer without producer layers, the layer itself on inputs of which only the moments are known.

    Its loss is tr (W* - Ŵ)(H + λI)(W* - Ŵ)ᵀ relative to that of zeros, of which the refit is the minimum; both of its
    two windows have all of it.
    """

    def __init__(self, layer: LayerProblem) -> None:
        self.layer, self.power = layer, damped_loss(layer, torch.zeros_like(layer.weight)) or 1.0

    @property
    def chunks(self) -> Sequence[int]:
        return [2]

    def shapes(self, kept: int) -> list[tuple[int, int]]:
        return []

    def cut(self, candidate: Candidate) -> CutSubLayer:
        return CutMapAlone(self, candidate)


class CutMapAlone(CutSubLayer):
    """`MapAlone` with the columns of some groups."""

    def __init__(self, whole: MapAlone, candidate: Candidate) -> None:
        self.whole, self.groups = whole, list(candidate.kept or ())
        self.columns = whole.layer.columns(self.groups)
        self.weights = [candidate.weight[:, self.columns].double().clone().requires_grad_(True)]

    def losses(self, chunk: int) -> torch.Tensor:
        layer = self.whole.layer
        lost = layer.target.index_copy(1, self.columns, layer.target[:, self.columns] - self.weights[0])
        return ((lost @ layer.hessian) * lost).sum().expand(2) / self.whole.power

    def candidate(self) -> Candidate:
        return self.whole.layer._placed(self.groups, self.weights[0].detach())


def sparse_layer(d_in: int = 12, d_out: int = 7, block: int = 0, seed: int = 0, **options: Any) -> LayerProblem:
    """A toy layer of single weights, all of it in float64, for what holds exactly."""
    return toy_layer(d_in, 1, d_out, block=block, seed=seed, dtype=torch.float64, moments=torch.float64, **options)


def correlated_layer(seed: int = 0, block: int = 0) -> LayerProblem:
    """Single weights on 96 inputs of very different size, of which 24 would nearly do: compensation pays."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, 24, generator=generator) @ torch.randn(24, 96, generator=generator)
    x = (x + torch.randn(500, 96, generator=generator)) * torch.randn(96, generator=generator).exp()
    weight = torch.randn(32, 96, generator=generator)
    return LayerProblem(weight, x.T @ x / 500, form=Pattern(1, block) if block else WEIGHTS)


def damped_loss(layer: LayerProblem, weight: torch.Tensor) -> float:
    """tr (W* - Ŵ) (H + λI) (W* - Ŵ)ᵀ, of which the least-squares weights on a support are the minimum."""
    lost = layer.target - weight.double()
    return float(((lost @ layer.hessian) * lost).sum())


def tensors_of(layer: LayerProblem) -> list[torch.Tensor]:
    """All that a layer and its producer layers hold."""
    owners = (layer, *layer.producers)
    parts = (part for owner in owners for part in (*vars(owner).values(), *owner.statistics.values()))
    return [part for part in parts if isinstance(part, torch.Tensor)]


def other_order(layer: LayerProblem) -> list[int]:
    """The groups of a layer in an order in which none stays where it was."""
    return [(5 * g + 1) % layer.n_groups for g in range(layer.n_groups)]


def permuted(layer: LayerProblem, order: Sequence[int]) -> LayerProblem:
    """The same layer with its groups in another order: group g of the result is group order[g]."""
    columns = layer.columns(order)

    def moved(values: torch.Tensor) -> torch.Tensor:
        return values[..., columns] if values.ndim else values

    def fed(producer: Producer) -> Producer:
        def blocks(values: torch.Tensor) -> torch.Tensor:
            return values.unflatten(0, (layer.n_groups, -1))[list(order)].flatten(0, 1)

        statistics = {
            key: blocks(v) if v.shape == producer.weight.shape else v for key, v in producer.statistics.items()
        }
        return replace(producer, weight=blocks(producer.weight), statistics=statistics)

    return replace(
        layer,
        weight=layer.weight[:, columns],
        gram=layer.gram[columns][:, columns],
        producers=tuple(fed(producer) for producer in layer.producers),
        cross=None if layer.cross is None else moved(layer.cross),
        drift=None if layer.drift is None else moved(layer.drift),
        statistics={k: v if k == "output-fisher" else moved(v) for k, v in layer.statistics.items()},
    )


def with_statistics(layer: LayerProblem, **statistics: torch.Tensor) -> LayerProblem:
    """The same layer with other values of some statistics."""
    return replace(layer, statistics={**layer.statistics, **statistics})


def counts_of(layer: LayerProblem) -> range:
    """All counts that may be asked of a layer, 0, or rank or width 1, to all; of a pattern, whole weights of every
    block."""
    return range(
        int(layer.structure in ("low-rank", "values")), layer.most + 1, layer.d_in // layer.m if layer.m else 1
    )


def few_tokens(
    d_in: int, d_out: int, tokens: int, *, needs: Iterable[Need] = (), dtype: torch.dtype = torch.float32
) -> LayerProblem:
    """A layer of low rank whose moments are of fewer tokens than it has inputs."""
    layer = toy_layer(d_in, 1, d_out, form=RANKS, needs=needs, dtype=dtype)
    x = torch.randn(tokens, d_in, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return replace(layer, gram=(x.T @ x / tokens).to(layer.gram))


Zoo = dict[str, Callable[..., LayerProblem]]


def _zoo(n: int, what: str, **options: Any) -> Zoo:
    """Layers of n groups or weights per row with every quirk, and in every dtype."""
    layer = partial(toy_layer, n, **options)
    return {
        **{f"{quirk} {what}": partial(layer, quirk=quirk) for quirk in QUIRKS},
        "one output": partial(layer, d_out=1),
        "bfloat16 weights": partial(layer, dtype=torch.bfloat16),
        "float16 weights": partial(layer, dtype=torch.float16),
        "float64 moments": partial(layer, moments=torch.float64),
    }


LAYERS: Zoo = {
    **_zoo(6, "columns"),
    **{f"{quirk} blocks": partial(toy_layer, 4, 3, quirk=quirk) for quirk in QUIRKS},
    "float16 blocks": partial(toy_layer, 4, 3, dtype=torch.float16),
    "one group": partial(toy_layer, 1, 4),
    "one column": partial(toy_layer, 1, 1),
}
STRUCTURES: dict[str, Zoo] = {
    "groups": LAYERS,
    "weights": _zoo(8, "rows", block=0) | {"one weight": partial(toy_layer, 1, block=0)},
    "n:m": _zoo(8, "rows", block=4)
    | {"one block": partial(toy_layer, 4, block=4), "pairs": partial(toy_layer, 6, block=2)},
    "low-rank": _zoo(8, "rows", form=RANKS)
    | {
        "one column": partial(toy_layer, 1, form=RANKS),
        "tall": partial(toy_layer, 6, 1, 20, form=RANKS),
        "few tokens": partial(few_tokens, 8, 5, 3),
    },
    "values": _zoo(12, "rows", form=Values(4, 2))
    | {
        "one value": partial(toy_layer, 3, form=Values(3, 1)),
        "one head": partial(toy_layer, 4, 1, 9, form=Values(1, 1)),
    },
}
"""Layers for every structure, by its name."""
