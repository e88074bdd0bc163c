"""Every registered finisher, with options a user may set, keeps what all finishers promise."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prunekit.plugins.registry import FINISHERS
from prunekit.testing import FinisherSuite, toy_supernet, toy_tokens, toy_workpiece

SHORT: dict[str, Any] = {"epochs": 2, "batch_tokens": 12}
LITTLE: dict[str, Any] = {"steps": 10, "interval": 2, "batch_tokens": 12}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "alternating": [{"rounds": 1, "conjugate": 2, "descent": 1}],
    "bias": [{}, {"inputs": "pruned"}],
    "distillation": [SHORT, SHORT | {"scope": "cut", "truth": 0.5, "temperature": 2.0}],
    "dsnot": [{}, {"skip_mlp": False, "guard": False, "threshold": 0.0}],
    "elsa": [LITTLE, LITTLE | {"start": "dense", "coupled": True, "settle": 0.0}],
    "elsa-l": [LITTLE],
    "least-squares": [{}, {"aim": "own", "bias": True}],
    "linear-patch": [{"layers": 2}, {"layers": 1, "truncate": "released", "rank": 0.2, "aim": "stream"}],
    "lora": [SHORT | {"rank": 2, "teacher": 0.5}],
    "reconstruction": [SHORT, SHORT | {"aim": "own"}],
    "sparsellm": [{"rounds": 2, "newton": 3}, {"pruner": "wanda", "aim": "stream"}],
}


INTERRUPTED = ("bias",)  # at every save; others are among the slow tests
interrupted = FinisherSuite.test_a_work_interrupted_at_any_save_ends_in_the_same_bits


@pytest.mark.slow
def of_others(suite: FinisherSuite, tmp_path: Path, subtests: pytest.Subtests) -> None:
    interrupted(suite, tmp_path, subtests)


def suites() -> Iterator[type[FinisherSuite]]:
    for name in FINISHERS:
        for number, options in enumerate(VARIANTS.get(name, [{}])):
            label = "_".join([name, *(f"{k}_{v}" for k, v in options.items())])
            late: dict[str, Any] = {"pytestmark": pytest.mark.slow} if number else {}
            if name not in INTERRUPTED:
                late[interrupted.__name__] = of_others
            yield type(f"Test_{label}", (FinisherSuite,), {"plugin": FINISHERS.build({"name": name} | options)} | late)


globals().update({suite.__name__: suite for suite in suites()})


def test_every_variant_is_of_a_registered_finisher() -> None:
    assert set(VARIANTS) <= set(FINISHERS)


@pytest.mark.parametrize(
    ("spec", "family", "structure", "off"),
    [
        ({"name": "least-squares"}, "llama", "groups", 1e-10),
        *(({"name": name}, f, "weights", 1e-9) for name in ("least-squares", "sparsellm") for f in ("llama", "opt")),
        *(
            ({"name": "reconstruction", "aim": aim} | SHORT, "llama", "groups", 1e-6)
            for aim in ("own", "dense", "stream")
        ),
        ({"name": "distillation"} | SHORT, "llama", "groups", 1e-6),
    ],
)
def test_a_whole_model_stays_what_it_is(spec: dict[str, Any], family: str, structure: str, off: float) -> None:
    net = toy_supernet(family, structure=structure)
    piece = toy_workpiece(net, plan=tuple(s.n_groups for s in net.space.sites), tokens=toy_tokens(windows=16))
    assert FINISHERS.build(spec).finish(piece)
    for (name, one), two in zip(piece.dense.named_parameters(), piece.model.parameters(), strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=off, msg=name)
