"""Small layer problems: correlated inputs, and everything that makes real moments awkward."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch

from prunekit.layer.problem import Feeder, LayerProblem
from prunekit.space.forms import GROUPS, WEIGHTS, Pattern

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
) -> LayerProblem:
    """A layer with correlated inputs and every field a pruner may need, but no cross moment.

    quirk: dead (the first group receives nothing), duplicate (the second receives what the first does), constant
    (the first column is 1), low rank (two directions in all), loud (the last column is 1000 times the others),
    zero weight (the first group has none), silent (no group receives anything). With a block, single weights are
    removed: 0 for structure weights, m for n:m; then nothing in front of the layer goes with them.
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
    return LayerProblem(
        weight=weight.to(dtype),
        gram=(x.T @ x / len(x)).to(moments),
        group_size=group_size,
        mean=x.mean(0).to(moments),
        variance=x.var(0, correction=0).to(moments),
        absolute=x.abs().mean(0).to(moments),
        relative=torch.where(loud > 0, x.square() / torch.where(loud > 0, loud, 1), 0).mean(0).to(moments),
        contrast=(x.square().mean(0) * normal(d_in).tanh().square()).to(moments),  # less than on the first data set
        gradient=normal(d_out, d_in).to(moments),
        fisher=normal(d_out, d_in).square().to(moments),
        form=GROUPS if block is None else Pattern(1, block) if block else WEIGHTS,
        feeders=()
        if block is not None
        else tuple(
            Feeder(
                name,
                normal(n_groups * rows, 3).to(dtype),
                power=normal(3).square().to(moments),
                gradient=normal(n_groups * rows, 3).to(moments),
                fisher=normal(n_groups * rows, 3).square().to(moments),
            )
            for name, rows in (("wide", group_size), ("narrow", 1))  # as queries, and keys that several of them share
        ),
        influence=float(normal(1).square()),
        name=f"{quirk} toy",
    )


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


def permuted(layer: LayerProblem, order: Sequence[int]) -> LayerProblem:
    """The same layer with its groups in another order: group g of the result is group order[g]."""
    columns = layer.columns(order)

    def moved(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[..., columns]

    def fed(feeder: Feeder) -> Feeder:
        def blocks(values: torch.Tensor) -> torch.Tensor:
            return values.unflatten(0, (layer.n_groups, -1))[list(order)].flatten(0, 1)

        learnt = {name: None if (v := getattr(feeder, name)) is None else blocks(v) for name in ("gradient", "fisher")}
        return replace(feeder, weight=blocks(feeder.weight), **learnt)

    vectors = ("mean", "variance", "absolute", "relative", "contrast", "gradient", "fisher", "cross", "drift")
    return replace(
        layer,
        weight=layer.weight[:, columns],
        gram=layer.gram[columns][:, columns],
        feeders=tuple(fed(feeder) for feeder in layer.feeders),
        **{name: moved(getattr(layer, name)) for name in vectors},
    )


def counts_of(layer: LayerProblem) -> range:
    """All counts that may be asked of a layer, 0 and all included; of a pattern, whole weights of every block."""
    return range(0, layer.n_groups + 1, layer.d_in // layer.m if layer.m else 1)


LAYERS: dict[str, Callable[[], LayerProblem]] = {
    **{f"{quirk} columns": partial(toy_layer, quirk=quirk) for quirk in QUIRKS},
    **{f"{quirk} blocks": partial(toy_layer, 4, 3, quirk=quirk) for quirk in QUIRKS},
    "one group": partial(toy_layer, 1, 4),
    "one column": partial(toy_layer, 1, 1),
    "one output": partial(toy_layer, d_out=1),
    "bfloat16 weights": partial(toy_layer, dtype=torch.bfloat16),
    "float16 weights": partial(toy_layer, 4, 3, dtype=torch.float16),
    "float64 moments": partial(toy_layer, moments=torch.float64),
}


def _sparse(block: int) -> dict[str, Callable[[], LayerProblem]]:
    return {
        **{f"{quirk} rows": partial(toy_layer, 8, quirk=quirk, block=block) for quirk in QUIRKS},
        "one block": partial(toy_layer, 4, block=block),
        "one output": partial(toy_layer, 8, d_out=1, block=block),
        "bfloat16 weights": partial(toy_layer, 8, dtype=torch.bfloat16, block=block),
        "float16 weights": partial(toy_layer, 8, dtype=torch.float16, block=block),
        "float64 moments": partial(toy_layer, 8, moments=torch.float64, block=block),
    }


STRUCTURES: dict[str, dict[str, Callable[[], LayerProblem]]] = {
    "groups": LAYERS,
    "weights": _sparse(0) | {"one weight": partial(toy_layer, 1, block=0)},
    "n:m": _sparse(4) | {"pairs": partial(toy_layer, 6, block=2)},
}
"""Layers for every structure, by its name."""
