"""What every local pruner promises."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from prunekit.calibration.statistics import statistics_of
from prunekit.layer.candidates import Candidate, is_sparse
from prunekit.layer.problem import LayerProblem
from prunekit.plugins.pruner import LocalPruner
from prunekit.testing.layers import STRUCTURES, Quirk, counts_of, permuted, toy_layer
from prunekit.testing.shapes import on_any_shape


def supplied(layer: LayerProblem, pruner: LocalPruner) -> LayerProblem:
    """The layer as calibration on dense inputs hands it to this pruner: what it needs, nothing more."""
    layer = layer.knowing(pruner.needs)
    if "cross" not in pruner.needs:
        return layer
    weight, gram = layer.weight.double(), layer.gram.double()
    return replace(layer, cross=(weight @ gram).to(layer.gram), energy=float(((weight @ gram) * weight).sum()))


def checked(pruner: LocalPruner, layer: LayerProblem, keeps: Sequence[int]) -> list[Candidate]:
    """Prune, and check what holds for every answer."""
    candidates = list(pruner.prune(layer, keeps))
    assert len(candidates) == len(keeps), "one candidate for every count"
    for keep, candidate in zip(keeps, candidates, strict=True):
        kept, weight = candidate.kept, candidate.weight
        assert (weight.shape, weight.dtype, weight.device) == (
            layer.weight.shape,
            layer.weight.dtype,
            layer.weight.device,
        )
        assert bool(torch.isfinite(weight).all())
        if layer.structure != "groups":
            assert kept is None
            assert is_sparse(weight, keep, layer.block), "exact zeros, as many as were asked for where they were asked"
            continue
        assert kept is not None
        assert len(kept) == keep, "the count that was asked for, in the order asked"
        assert list(kept) == sorted(set(kept)), "ids ascend, each once"
        assert set(kept) <= set(range(layer.n_groups))
        assert all(type(g) is int for g in kept)
        gone = layer.columns(sorted(set(range(layer.n_groups)) - set(kept)))
        assert bool((weight[:, gone] == 0).all()), "exact zeros outside the kept groups"
    return candidates


PLAIN: dict[str, dict[str, Callable[..., LayerProblem]]] = {
    "groups": {"columns": partial(toy_layer, 12), "blocks": partial(toy_layer, 6, 4)},
    "weights": {"weights": partial(toy_layer, 12, block=0)},
    "n:m": {"fours": partial(toy_layer, 12, block=4)},
}


class PrunerSuite:
    """Subclass it, name it Test..., and set `plugin`. Every structure that it declares is tested."""

    plugin: LocalPruner

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Layers of the structures that the pruner knows; what is said of groups meets groups only."""
        known = sorted(self.plugin.structures)
        for name, zoo, some in (
            ("layer", STRUCTURES, known),
            ("plain", PLAIN, known),
            ("grouped", STRUCTURES, ["groups"]),
            ("groups", PLAIN, ["groups"]),
            ("single", PLAIN, ["weights", "n:m"]),
        ):
            if name in metafunc.fixturenames:
                cases = {
                    f"{structure}-{case}" if structure != "groups" else case: made
                    for structure in some
                    if structure in known
                    for case, made in zoo[structure].items()
                }
                metafunc.parametrize(name, list(cases.values()), ids=list(cases), indirect=True)

    @pytest.fixture
    def layer(self, request: pytest.FixtureRequest) -> LayerProblem:
        return supplied(request.param(needs=self.plugin.needs), self.plugin)

    plain = grouped = groups = single = layer

    def test_is_a_frozen_dataclass_that_needs_known_fields(self) -> None:
        assert dataclasses.is_dataclass(self.plugin)
        assert hash(self.plugin) == hash(replace(self.plugin))  # type: ignore[type-var]
        statistics_of(self.plugin.needs)  # refuses what there is not

    def test_answers_every_count(self, layer: LayerProblem) -> None:
        checked(self.plugin, layer, counts_of(layer))

    def test_keeping_all_loses_nothing(self, layer: LayerProblem) -> None:
        candidates = checked(self.plugin, layer, counts_of(layer))
        errors = [layer.error(c.weight) for c in candidates]
        assert errors[-1] == pytest.approx(0, abs=1e-5)
        assert errors[-1] <= min(errors) + 1e-5

    def test_keeping_none_is_zero(self, layer: LayerProblem) -> None:
        (candidate,) = checked(self.plugin, layer, [0])
        assert not candidate.kept
        assert not candidate.weight.any()

    def test_counts_may_come_in_any_order_and_alone(self, plain: LayerProblem) -> None:
        counts = list(counts_of(plain))
        first = dict(zip(counts, checked(self.plugin, plain, counts), strict=True))
        assert checked(self.plugin, plain, []) == []
        for keeps in (counts[::-1], counts[1::3] + counts[::3]):
            for keep, candidate in zip(keeps, checked(self.plugin, plain, keeps), strict=True):
                assert candidate.kept == first[keep].kept
                torch.testing.assert_close(candidate.weight, first[keep].weight)
        for keep in counts:
            checked(self.plugin, plain, [keep])

    def test_gives_the_same_answer_twice(self, layer: LayerProblem) -> None:
        counts = counts_of(layer)
        first = checked(self.plugin, layer, counts)
        state = torch.get_rng_state()
        second = checked(self.plugin, replace(layer), counts)
        assert torch.equal(state, torch.get_rng_state()), "the global random state is the caller's"
        for one, two in zip(first, second, strict=True):
            assert one.kept == two.kept
            assert torch.equal(one.weight, two.weight)

    def test_leaves_its_input_alone(self, layer: LayerProblem) -> None:
        parts = [{**vars(owner), **owner.statistics} for owner in (layer, *layer.feeders)]
        tensors = [value for part in parts for value in part.values() if isinstance(value, torch.Tensor)]
        before = [tensor.clone() for tensor in tensors]
        for candidate in checked(self.plugin, layer, counts_of(layer)):
            candidate.weight.fill_(7)  # an answer is the caller's own
        assert all(torch.equal(one, two) for one, two in zip(before, tensors, strict=True))

    def test_wastes_no_weight(self, single: LayerProblem) -> None:
        for keep, candidate in zip(counts_of(single), checked(self.plugin, single, counts_of(single)), strict=True):
            assert int(candidate.weight.count_nonzero()) == keep * len(single.weight)

    def test_follows_its_rows_when_they_change_places(self, single: LayerProblem) -> None:
        order = torch.randperm(len(single.weight), generator=torch.Generator().manual_seed(1))
        of_rows = {"weight": single.weight, "cross": single.cross, "drift": single.drift}
        rows: dict[str, Any] = {name: values[order] for name, values in of_rows.items() if values is not None}
        rows["statistics"] = {key: v[order] if v.ndim == 2 else v for key, v in single.statistics.items()}
        here = checked(self.plugin, single, counts_of(single))
        there = checked(self.plugin, replace(single, **rows), counts_of(single))
        for one, two in zip(here, there, strict=True):
            torch.testing.assert_close(two.weight, one.weight[order], rtol=1e-3, atol=1e-5)

    def test_follows_its_groups_when_they_change_places(self, groups: LayerProblem) -> None:
        counts = range(groups.n_groups + 1)
        order = torch.randperm(groups.n_groups, generator=torch.Generator().manual_seed(1)).tolist()
        here = checked(self.plugin, groups, counts)
        there = checked(self.plugin, permuted(groups, order), counts)
        for one, two in zip(here, there, strict=True):
            assert two.kept is not None
            assert one.kept == tuple(sorted(order[g] for g in two.kept))
            torch.testing.assert_close(two.weight, one.weight[:, groups.columns(order)], rtol=1e-3, atol=1e-5)

    def test_its_scores_if_any_are_one_finite_number_per_group(self, grouped: LayerProblem) -> None:
        scores = self.plugin.scores(grouped)
        if scores is not None:
            assert scores.shape == (grouped.n_groups,)
            assert bool(torch.isfinite(scores).all())

    def test_its_scores_follow_the_groups(self, groups: LayerProblem) -> None:
        order = torch.randperm(groups.n_groups, generator=torch.Generator().manual_seed(1)).tolist()
        here, there = self.plugin.scores(groups), self.plugin.scores(permuted(groups, order))
        if here is not None and there is not None:
            torch.testing.assert_close(there, here[order], rtol=1e-3, atol=1e-7)

    @pytest.mark.parametrize("scale", [2.0**-6, 2.0**6])
    def test_chooses_the_same_in_other_units(self, plain: LayerProblem, scale: float) -> None:
        counts = counts_of(plain)

        def scaled(part: Any) -> Any:
            powers = {"weight": 1, "cross": 1, "drift": 1, "energy": 2}
            values = {
                name: scale**power * v for name, power in powers.items() if (v := getattr(part, name, None)) is not None
            }
            learnt = {"relative": -2, "gradient": -1, "fisher": -2}
            statistics = {name: scale ** learnt.get(name, 0) * v for name, v in part.statistics.items()}
            return replace(part, **values, statistics=statistics)

        louder = replace(scaled(plain), feeders=tuple(scaled(feeder) for feeder in plain.feeders))
        for one, two in zip(checked(self.plugin, plain, counts), checked(self.plugin, louder, counts), strict=True):
            assert one.kept == two.kept
            assert torch.equal(one.weight != 0, two.weight != 0)
            torch.testing.assert_close(two.weight, scale * one.weight, rtol=1e-3, atol=1e-5 * scale)

    @on_any_shape
    def test_holds_its_promises_on_any_shape(
        self, *, n_groups: int, group_size: int, d_out: int, quirk: Quirk, seed: int, damping: float
    ) -> None:
        for structure in sorted(self.plugin.structures):
            if structure == "groups":
                layer = toy_layer(n_groups, group_size, d_out, quirk=quirk, seed=seed, needs=self.plugin.needs)
            else:
                block = group_size + 1
                layer = toy_layer(
                    n_groups * block, 1, d_out, quirk=quirk, seed=seed, block=block if structure == "n:m" else 0,
                    needs=self.plugin.needs,
                )  # fmt: skip
            layer = supplied(replace(layer, damping=damping), self.plugin)
            checked(self.plugin, layer, counts_of(layer))
