"""A metric and an exporter of a third party go through the whole flow, and what they break is not kept."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest

import prunekit as pk
from prunekit.errors import CannotGoOn
from prunekit.models.opening import skeleton
from prunekit.plugins.registry import EXPORTERS, METRICS, Entry
from prunekit.recipe.resolve import Parts, resolve
from prunekit.run.session import make_plan
from prunekit.system.progress import Progress
from prunekit_corner import Table, WeightedParameters

QUICK: dict[str, Any] = {
    "pruner": "magnitude",
    "allocator": "uniform",
    "objective": "expected-error",
    "data__dataset": "python-docs",
    "data__calibration_tokens": 128,
    "data__search_tokens": 128,
    "data__evaluation_tokens": 128,
    "data__seqlen": 32,
    "verify": False,
    "device": "cpu",
    "quiet": True,
}


@dataclass(frozen=True)
class Energy(pk.MeasuredMetric):
    """Made-up joules: what a meter says of a group."""

    unit: ClassVar[str] = "joules"

    prices: dict[str, Any] | str | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.prices, str):
            path = Path(self.prices)
            text = (path / "prices.json" if path.is_dir() else path).read_text()
            object.__setattr__(self, "prices", json.loads(text))

    def price(self, site: pk.Site, kept: int) -> int:
        assert isinstance(self.prices, dict)
        return self.prices["group"] * kept

    def outside(self, sites: Sequence[pk.Site], parameters: int) -> int:
        return 10

    def measured(self, dense: pk.Dense, sites: Sequence[pk.Site], past: Path | None, progress: Progress) -> Energy:
        if self.prices is not None:
            return self
        return replace(self, prices=str(past) if past is not None and past.exists() else {"group": METER[0]})

    def stand_in(self) -> pk.Metric:
        return WeightedParameters()

    def runs_before(self, model: Any, sites: Sequence[pk.Site]) -> pk.Runs:
        return pk.Runs(1, 8, 8)

    def runs_after(self, model: Any) -> pk.Runs:
        return pk.Runs(2, 8, 8)

    def realised(self, dense: Any, small: Any, target: float, promised: float, progress: Any) -> Mapping[str, Any]:
        shares = {"target": target, "promised": promised, "realised": promised * 1.1, "miss": 0.1}
        return {**shares, "kept": False, "noise": {"result": 0.02}}


METER = [3]


@dataclass(frozen=True)
class Clumsy(Table):
    """Writes beside its place."""

    def write(self, product: pk.Product, path: Path) -> None:
        super().write(product, path)
        (path.parent / "config.json").write_text("{}")


@dataclass(frozen=True)
class Lossy(Table):
    """Forgets the last row of a tensor."""

    def write(self, product: pk.Product, path: Path) -> None:
        super().write(product, path)
        lines = path.read_text().splitlines()
        path.write_text("\n".join(lines[1:]))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry, name, plugin in (
        (METRICS, "weighted-parameters", WeightedParameters),
        (METRICS, "energy", Energy),
        (EXPORTERS, "table", Table),
        (EXPORTERS, "clumsy", Clumsy),
        (EXPORTERS, "lossy", Lossy),
    ):
        point = EntryPoint(name, f"{plugin.__module__}:{plugin.__name__}", registry.group)
        entry = Entry(registry.kind, name, "prunekit", point)
        monkeypatch.setitem(registry._entries, name, entry)


def test_a_budget_in_units_of_ones_own(saved_tiny: Any, tmp_path: Path) -> None:
    metric = {"name": "weighted-parameters", "attention": 5}
    result = pk.prune(saved_tiny(), metric=metric, sparsity=0.4, output=tmp_path / "out", exporters="table", **QUICK)
    budget = result.report["budget"]
    assert budget["metric"] == "weighted-parameters"
    assert budget["spent"] <= budget["limit"]
    assert budget["removed"] >= 0.4
    assert result.recipe.metric == metric
    (space, *_) = [r for r in map(json.loads, result.ledger.splitlines()) if r["kind"] == "space"]
    assert (space["metric"], space["limit"]) == ("weighted-parameters", budget["limit"])
    with (tmp_path / "out" / "tensors.csv").open() as file:
        rows = {name: text for _, name, text in csv.reader(file)}
    assert rows.keys() >= {name for name, _ in result.model.named_parameters()}
    for site in result.report["sites"]:
        assert rows[site["name"]] == f"{site['kept']} of {site['groups']}"
    again = pk.prune(recipe=tmp_path / "out", output=tmp_path / "again", quiet=True)
    assert (tmp_path / "again" / "tensors.csv").read_bytes() == (tmp_path / "out" / "tensors.csv").read_bytes()
    assert again.report["budget"] == budget


def test_a_family_is_judged_in_its_own_metric(saved_tiny: Any) -> None:
    found = pk.prune(saved_tiny(), sparsity=[0.2, 0.4], metric="weighted-parameters", **QUICK)
    assert [row["realised"] for row in found.rows] == [m.report["budget"]["removed"] for m in found.members]
    assert found.document["metric"] == "weighted-parameters"


def test_what_was_measured_is_kept_and_given_again(saved_tiny: Any, tmp_path: Path) -> None:
    model = saved_tiny()
    result = pk.prune(model, target="energy=0.6", output=tmp_path / "out", **QUICK)
    assert json.loads((tmp_path / "out" / "prices.json").read_text()) == {"group": 3}
    assert "prices: prices.json" in (tmp_path / "out" / "recipe.yaml").read_text()
    assert result.report["energy"]["promised"] <= 0.6
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Energy: 0." in card
    assert "of the dense model's was promised (0.6 asked)" in card
    assert "milliseconds" not in card
    METER[0] = 7
    try:
        again = pk.prune(recipe=tmp_path / "out", output=tmp_path / "again", quiet=True)
        other = pk.prune(recipe=tmp_path / "out", quiet=True, heads="query")
    finally:
        METER[0] = 3
    assert again.recipe.metric == result.recipe.metric == {"name": "energy", "prices": {"group": 3}}
    assert again.ledger == result.ledger
    assert other.recipe.metric == {"name": "energy", "prices": {"group": 7}}  # of other groups, so it is measured anew
    names = [s.name for s in make_plan(resolve(again.recipe), *skeletons(model), None).stages]
    assert "time the result" in names
    assert "time sub-layers" not in names
    assert "time sub-layers" in [s.name for s in make_plan(unmeasured(again.recipe), *skeletons(model), None).stages]


def skeletons(model: Path) -> Any:
    return skeleton(str(model), trust_remote_code=False)


def unmeasured(recipe: pk.Recipe) -> Parts:
    return resolve(recipe.with_overrides({"metric.prices": None}))


def test_a_plan_counts_every_exporter(saved_tiny: Any, tmp_path: Path) -> None:
    model = saved_tiny()
    disks = []
    for asked in (["hf"], ["hf", "table"]):
        recipe = resolve(pk.Recipe.load("fast").with_overrides({"exporters": asked}))
        *_, export = make_plan(recipe, *skeletons(model), tmp_path).stages
        disks.append(export.disk)
    assert disks[1] - disks[0] == Table().size(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("exporter", "error", "sentence"),
    [
        ("clumsy", pk.PluginError, r"Clumsy touched config\.json, which it does not call its own"),
        ("lossy", CannotGoOn, r"the result was not kept: .*tensors\.csv has .* parameters, not"),
    ],
)
def test_what_an_exporter_breaks_is_not_kept(
    exporter: str, error: type[Exception], sentence: str, saved_tiny: Any, tmp_path: Path
) -> None:
    with pytest.raises(error, match=sentence):
        pk.prune(saved_tiny(), output=tmp_path / "out", exporters=exporter, **QUICK | {"verify": exporter == "lossy"})
    assert not (tmp_path / "out").exists()
