"""Every registered finisher, with options a user may set, keeps what all finishers promise."""

from collections.abc import Iterator
from typing import Any

from prunekit.plugins.registry import FINISHERS
from prunekit.testing import FinisherSuite

SHORT: dict[str, Any] = {"epochs": 2, "batch_tokens": 12}
LITTLE: dict[str, Any] = {"steps": 10, "interval": 2, "batch_tokens": 12}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "bias": [{}, {"inputs": "pruned"}],
    "distillation": [SHORT, SHORT | {"scope": "cut", "truth": 0.5, "temperature": 2.0}],
    "dsnot": [{}, {"skip_mlp": False, "guard": False, "threshold": 0.0}],
    "elsa": [LITTLE, LITTLE | {"start": "dense", "coupled": True, "settle": 0.0}],
    "elsa-l": [LITTLE],
    "least-squares": [{}, {"aim": "own", "bias": True}],
    "lora": [SHORT | {"rank": 2, "teacher": 0.5}],
    "reconstruction": [SHORT, SHORT | {"aim": "own"}],
    "sparsellm": [{"rounds": 2, "newton": 3}, {"pruner": "wanda", "aim": "stream"}],
}


def suites() -> Iterator[type[FinisherSuite]]:
    for name in FINISHERS:
        for options in VARIANTS.get(name, [{}]):
            label = "_".join([name, *(f"{k}_{v}" for k, v in options.items())])
            yield type(f"Test_{label}", (FinisherSuite,), {"plugin": FINISHERS.build({"name": name} | options)})


globals().update({suite.__name__: suite for suite in suites()})


def test_every_variant_is_of_a_registered_finisher() -> None:
    assert set(VARIANTS) <= set(FINISHERS)
