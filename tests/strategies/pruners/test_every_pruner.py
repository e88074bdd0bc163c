"""Every registered pruner, with every option a user may set, keeps what all pruners promise.

Those that iterate long are given little time, which is no part of the promises.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from prunekit.plugins.registry import PRUNERS
from prunekit.testing import PrunerSuite
from prunekit.testing.layers import sparse_layer

QUICK: dict[str, dict[str, Any]] = {
    "distilled": {"inner": "magnitude", "steps": 2, "every": 1},
    "fista": {"rounds": 15, "trials": 4},
}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "admm": [{"iterations": 5, "start": "relaxed"}],
    "alps": [{"per": "row", "rounds": 0, "exact": 0}, {"aim": "stream"}],
    "apt": [
        {"variant": "SM", "width": 3, "exact": 0},
        {"variant": "MS", "width": 1},
        {"mask": "wanda"},
        {"aim": "stream", "mask": {"name": "sparsegpt", "aim": "dense"}},
    ],
    "fista": [
        {"start": "sparsegpt", "rounds": 15, "trials": 3},
        {"scaled": False, "per": "layer", "aim": "dense", "rounds": 15, "trials": 3},
    ],
    "gradient": [
        {"order": "second", "reduce": "max"},
        {"order": "mix", "grain": "coarse", "reduce": "prod"},
        {"refit": True, "reduce": "first"},
    ],
    "asvd": [{"alpha": 0}, {"alpha": 1}],
    "olica": [{"truncate": "optimal"}],
    "magnitude": [{"refit": True}],
    "optishear": [
        {"weights": "log", "weight_share": "row", "inputs": "sqrt"},
        {"weights": "exp", "weight_share": "row+column", "inputs": "softmax", "per": "layer"},
        {"weights": "softmax", "weight_share": "frobenius", "inputs": "square", "input_share": "sum", "refit": True},
    ],
    "obs": [
        {"aim": "dense"},
        {"aim": "stream"},
        {"aim": "stream", "correction": 0.7},
        {"search": "score"},
        {"search": "swap", "refit": False},
        {"score": "masked"},
        {"score": "wanda", "step": [2, 4], "head_step": 2},
        {"first_order": "signed"},
    ],
    "score": [{"scope": "coupled", "reduce": "max"}, {"weight_power": 0.5, "activation_power": 2.0}],
    "second-moment": [{"heads": "likeness"}, {"refit": False}],
    "sparsegpt": [{"per": "row", "width": 3}, {"mask": "magnitude", "aim": "stream"}],
    "wanda": [{"refit": True}],
}


ALWAYS = ("obs", "sparsegpt")  # others lean on them, so that their variants are not left to the slow tests


def suites() -> Iterator[type[PrunerSuite]]:
    for name in PRUNERS:
        for number, options in enumerate((QUICK.get(name, {}), *VARIANTS.get(name, ()))):
            label = "_".join([name, *(f"{k}_{v}" for k, v in options.items())])
            plugin = PRUNERS.build({"name": name} | options)
            late = {"pytestmark": pytest.mark.slow} if number and name not in ALWAYS else {}
            yield type(f"Test_{label}", (PrunerSuite,), {"plugin": plugin} | late)


globals().update({suite.__name__: suite for suite in suites()})


def test_every_variant_is_of_a_registered_pruner() -> None:
    assert set(VARIANTS) <= set(PRUNERS)


ROWS: list[dict[str, Any]] = [
    *({"name": "apt", "variant": variant} for variant in ("SS", "SM", "MS", "MM")),
    *({"name": name, "per": "row"} for name in ("alps", "fista", "sparsegpt")),
]


@pytest.mark.parametrize("spec", ROWS, ids=str)
def test_every_row_keeps_its_count_and_loses_a_dead_column_first(spec: dict[str, Any]) -> None:
    layer = sparse_layer(quirk="dead")
    half, all_others = PRUNERS.build(spec).prune(layer, [6, 11])
    for keep, found in ((6, half), (11, all_others)):
        assert ((found.weight != 0).sum(1) == keep).all()
        assert not found.weight[:, 0].any()
    assert layer.error(all_others.weight) < 1e-12
