"""What is said of rows: ranks whose blocks are models and sparsities, however many seeds there are."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from prunekit.recipe.suite import Suite
from prunekit.report.comparison import DENSE, PACED, Comparison, Row, Rows, write_summary

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


FAST: dict[str, Any] = {
    "prefill_tokens_per_second": 1500.0, "decode_tokens_per_second": 15.0, "prefill_ratio": 1.5,
    "prefill_ratio_interval": (1.4, 1.6), "decode_ratio": 1.02, "decode_ratio_interval": (0.97, 1.07),
    "rounds": 15, "workload": {"batch": 2, "prompt": 8, "new_tokens": 4},
    "timed": "2 × 8 tokens read, 4 made on 1 CPU thread",
}  # fmt: skip


def timed(*without: str) -> Comparison:
    """Two cells with losses, timed but for those that are named."""
    dense = Row("m", DENSE, 0.0, 0, perplexity=10.0, prefill_tokens_per_second=1000.0, decode_tokens_per_second=14.7)
    rows = [
        Row("m", cell, 0.5, 0, losses=(loss,) * 4, perplexity=10 + loss, **({} if cell in without else FAST))
        for cell, loss in (("a", 1.0), ("b", 2.0))
    ]
    return Comparison(Suite(recipes=("fast",)), [dense, *rows])


def test_rows_from_before_they_were_timed_are_read_and_others_come_back_as_they_were(tmp_path: Path) -> None:
    plain = Row("m", "c", 0.5, 0, losses=(1.0,), perplexity=2.0)
    old = {key: value for key, value in asdict(plain).items() if key not in FAST}
    (tmp_path / "rows").write_text(json.dumps(old) + "\n")
    row = replace(plain, seed=1, **FAST)
    Rows(tmp_path / "rows").add(row)
    assert list(Rows(tmp_path / "rows")) == [plain, row]


def test_a_leaderboard_says_how_fast_cells_are_where_they_were_timed_and_noise_is_called_noise() -> None:
    text = timed().table()
    assert "decode, × dense |" in text
    assert text.count("| 1.50 (1.40-1.60) | no difference beyond noise |") == 2
    assert "1,000 tokens/s of prefill, 14.7 of decode" in text
    assert FAST["timed"] in text
    part = timed("b").table()
    assert part.count("| not timed | not timed |") == 1
    assert "Not timed: b." in part
    untimed = timed("a", "b").table()
    assert not [word for word in (*PACED, "timed") if word in untimed]


def test_the_speed_of_a_cell_is_for_programs_too(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    write_summary(timed("b"), tmp_path)
    a, b = json.loads((tmp_path / "summary.json").read_text())["standings"][0]["cells"]
    assert (a["prefill_ratio"], a["prefill_ratio_interval"], a["prefill_ratio_clear"]) == (1.5, [1.4, 1.6], True)
    assert a["decode_ratio_clear"] is False
    assert not [key for key in b if "ratio" in key]
    columns = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [row["decode_ratio_interval"] for row in columns] == [[], [0.97, 1.07], []]
    assert json.loads(columns[1]["workload"]) == FAST["workload"]
