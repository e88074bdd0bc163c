"""What every metric promises, as a test class: subclass it and set `plugin`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, get_args

import pytest
import torch
from transformers import PreTrainedModel

from prunekit.errors import WrongInput
from prunekit.measure import latency
from prunekit.models.adapters.find import adapter_for
from prunekit.models.opening import fingerprint
from prunekit.plugins.dense import Dense
from prunekit.plugins.metric import MeasuredMetric
from prunekit.space.budgets import Budget
from prunekit.space.forms import Units, parse_form
from prunekit.space.ladders import Space
from prunekit.space.metrics import Metric
from prunekit.space.prices import Workload
from prunekit.space.sites import Site
from prunekit.system.progress import Progress
from prunekit.testing.models import tiny

STRUCTURES = {"groups": "groups", "weights": "weights", "n:m": "2:4", "low-rank": "low-rank"}
OUTSIDE = 1_000  # parameters


@cache
def _dense() -> Dense:
    return Dense(tiny("llama", intermediate_size=16), None, adapter_for("llama"), torch.float64, "tiny", "")


@cache
def _sites(units: str) -> tuple[Site, ...]:
    return _dense().adapter.sites_of(_dense().model, parse_form(STRUCTURES[units]))


@cache
def _resolved(metric: Metric) -> Metric:
    """With its state: of a checkpoint of half floats, measured where it is to be."""
    metric = metric.for_checkpoint(2)
    if isinstance(metric, MeasuredMetric):
        return metric.measured(_dense(), _sites("groups"), None, Progress())
    return metric


class MetricSuite:
    """Prices are whole numbers that never fall, budgets are met, and what was measured outlives its process."""

    plugin: ClassVar[Metric]

    @pytest.fixture(autouse=True, scope="class")
    @staticmethod
    def _clock() -> Iterator[None]:
        """Time is made up, of parameters and tokens, so that a busy machine fails no suite."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"FEWEST": 1, "SECONDS": 0.0, "TURN": 1, "nanoseconds": _made_up}.items():
                patch.setattr(latency, name, value)
            yield

    @property
    def metric(self) -> Metric:
        return _resolved(self.plugin)

    @property
    def worlds(self) -> list[tuple[Site, ...]]:
        """Sites of every structure the metric counts."""
        return [_sites(units) for units in STRUCTURES if units in self.plugin.structures]

    def test_is_a_frozen_dataclass_that_says_what_it_counts(self) -> None:
        assert dataclasses.is_dataclass(self.plugin)
        for metric in (self.plugin, self.metric):
            same = dataclasses.replace(metric)  # type: ignore[type-var]
            assert (metric, hash(metric)) == (same, hash(same))
        assert self.plugin.unit.strip()
        assert frozenset(get_args(Units)) >= self.plugin.structures > frozenset()

    def test_prices_are_whole_numbers_that_never_fall(self) -> None:
        for site in self._every_site():
            prices = [self.metric.price(site, kept) for kept in _all(site)]
            assert all(type(price) is int for price in prices)
            assert prices == sorted(prices)
            assert prices[0] >= 0

    def test_a_price_is_the_sites_own(self) -> None:
        for site in self._every_site():
            here, there = ([self.metric.price(s, k) for k in _all(s)] for s in (site, dataclasses.replace(site)))
            assert here == there

    def test_counts_ascend_to_all_there_is_and_others_are_raised_to_the_next(self) -> None:
        for site in self._every_site():
            counts = list(self.metric.counts(site))
            assert all(low < high for low, high in pairwise(counts))
            assert site.least <= counts[0] <= counts[-1] == site.n_groups
            for kept in _all(site):
                raised = next(count for count in counts if count >= kept)
                assert self.metric.price(site, kept) == self.metric.price(site, raised)

    def test_keeping_all_is_the_dense_model(self) -> None:
        for sites in self.worlds:
            outside = self.metric.outside(sites, OUTSIDE)
            assert type(outside) is int
            assert outside >= 0
            space = Space.whole(sites, self._budget(1, sites))
            all_ = tuple(site.n_groups for site in sites)
            assert space.uniform() == all_
            assert outside + space.cost(all_) == space.budget.dense == outside + space.budget.limit

    def test_budgets_are_met_to_the_last_rung_that_fits(self) -> None:
        for sites in self.worlds:
            lowest = self._lowest(sites)
            space = Space.whole(sites, self._budget((1 + lowest) / 2, sites))
            plan = space.uniform()
            assert space.is_feasible(plan)
            spare = space.budget.limit - space.cost(plan)
            for row, rung in zip(space.prices, space.rungs(plan), strict=True):
                assert rung + 1 == len(row) or row[rung + 1] - row[rung] > spare

    def test_a_share_that_cannot_be_met_is_refused_in_a_sentence(self) -> None:
        for sites in self.worlds:
            lowest = self._lowest(sites)
            self._budget(lowest, sites)
            if lowest == 0:  # nothing stays
                continue
            with pytest.raises(WrongInput) as refused:
                self._budget(lowest * Fraction(9, 10), sites)
            assert self.plugin.unit in str(refused.value)
            assert "\n" not in str(refused.value)

    def test_structures_it_does_not_count_are_refused(self) -> None:
        for units in get_args(Units):
            with nullcontext() if units in self.plugin.structures else pytest.raises(WrongInput):
                self.plugin.check(units)

    def test_its_options_are_json(self) -> None:
        for metric in (self.plugin, self.metric):
            options = {f.name: getattr(metric, f.name) for f in dataclasses.fields(metric) if f.init}  # type: ignore[arg-type]
            assert type(metric)(**json.loads(json.dumps(options))) == metric

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """What is measured, of the metrics that are."""
        if "measured" in metafunc.fixturenames:
            metafunc.parametrize("measured", [_resolved] if isinstance(self.plugin, MeasuredMetric) else [])

    def test_what_was_measured_is_not_measured_again(self, measured: object, tmp_path: Path) -> None:
        metric, plugin, before = self.metric, self.plugin, fingerprint(_dense().model)
        assert isinstance(metric, MeasuredMetric)
        assert isinstance(plugin, MeasuredMetric)
        (tmp_path / "prices.json").write_text(json.dumps(metric.prices))
        assert metric.measured(_dense(), _sites("groups"), None, Progress()) == metric
        assert plugin.measured(_dense(), _sites("groups"), tmp_path / "prices.json", Progress()) == metric
        assert dataclasses.replace(plugin, prices=str(tmp_path)) == metric  # type: ignore[type-var]
        assert fingerprint(_dense().model) == before

    def test_plans_can_count_what_measuring_takes(self, measured: object) -> None:
        assert isinstance(self.plugin, MeasuredMetric)
        model = _dense().model
        for runs in (self.plugin.runs_before(model, _sites("groups")), self.plugin.runs_after(model)):
            assert min(runs.count, runs.tokens, runs.seqlen) > 0
        stand_in = self.plugin.stand_in()
        assert not isinstance(stand_in, MeasuredMetric)
        assert Budget.keeping(0.5, _sites("groups"), metric=stand_in).limit > 0

    def test_what_was_promised_is_compared_with_what_came(self, measured: object) -> None:
        assert isinstance(self.metric, MeasuredMetric)
        found = dict(self.metric.realised(_dense().model, _dense().model, 0.5, 0.5, Progress()))
        assert found.keys() >= {"target", "promised", "realised", "miss", "kept", "noise"}
        assert (found["target"], found["promised"], found["kept"]) == (0.5, 0.5, False)  # nothing was removed
        assert found["miss"] == pytest.approx(found["realised"] / 0.5 - 1)
        json.dumps(found)

    def _every_site(self) -> list[Site]:
        return [site for sites in self.worlds for site in sites]

    def _budget(self, share: Fraction | int, sites: Sequence[Site]) -> Budget:
        return Budget.keeping(Fraction(share), sites, metric=self.metric, outside=OUTSIDE)

    def _lowest(self, sites: Sequence[Site]) -> Fraction:
        """The smallest share that can be kept."""
        stays = self.metric.outside(sites, OUTSIDE) + sum(self.metric.price(site, site.least) for site in sites)
        return Fraction(stays, self._budget(1, sites).dense)


def _made_up(model: PreTrainedModel, work: Workload) -> int:
    return sum(p.numel() for p in model.parameters()) * work.batch * (work.prompt + work.new_tokens)


def _all(site: Site) -> range:
    return range(site.least, site.n_groups + 1, site.step)
