"""What is said of rows: ranks whose blocks are models and sparsities, however many seeds there are."""

from collections.abc import Mapping, Sequence

import pytest

from prunekit.recipe.suite import Suite
from prunekit.report.comparison import DENSE, Comparison, Row

STEADY = {name: 20.0 + i for i, name in enumerate(("a", "b", "c", "d", "e"))}


def compared(places: Mapping[tuple[str, float], Mapping[str, Sequence[float]]]) -> Comparison:
    """Rows of cells with these perplexities, one a seed, at (model, sparsity)."""
    rows = [Row(model, DENSE, 0.0, 0, perplexity=10.0) for model in dict.fromkeys(model for model, _ in places)]
    for (model, sparsity), cells in places.items():
        for cell, perplexities in cells.items():
            rows += [Row(model, cell, sparsity, seed, perplexity=value) for seed, value in enumerate(perplexities)]
    return Comparison(Suite(recipes=("fast",)), rows)


def test_seeds_of_methods_without_chance_are_no_evidence() -> None:
    one = {("m", 0.5): {cell: [value] * 3 for cell, value in STEADY.items()}}
    assert compared(one).ranks() is None  # one model at one sparsity, run three times, is one block
    places = [("m", 0.3), ("m", 0.5), ("n", 0.3)]
    often, once = (
        compared({place: {cell: [value] * seeds for cell, value in STEADY.items()} for place in places}).ranks()
        for seeds in (3, 1)
    )
    assert often == once
    assert often is not None
    assert often.blocks == len(places)


def test_ranks_are_of_the_mean_loss_over_seeds() -> None:
    cells = {"steady": [20.0, 20.0], "shaky": [18.0, 23.0], "worst": [30.0, 30.0]}  # means of logs: 20, 20.35, 30
    found = compared({("m", 0.3): cells, ("m", 0.5): cells}).ranks()
    assert found is not None
    assert found.mean == pytest.approx({"steady": 1, "shaky": 2, "worst": 3})


def test_a_seed_without_a_finite_perplexity_is_last() -> None:
    rows = compared({("m", s): {"a": [20.0, 20.0], "b": [21.0, 21.0], "c": [10.0]} for s in (0.3, 0.5)}).rows
    broken = [Row("m", "c", s, 1, perplexity=None) for s in (0.3, 0.5)]
    found = Comparison(Suite(recipes=("fast",)), [*rows, *broken]).ranks()
    assert found is not None
    assert found.mean == pytest.approx({"a": 1, "b": 2, "c": 3})
