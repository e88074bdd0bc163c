"""What every local pruner promises."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch

from prunekit.calibration.statistics import statistics_of
from prunekit.layer.candidates import Candidate, is_sparse, narrow_product, product
from prunekit.layer.problem import LayerProblem
from prunekit.plugins.pruner import LocalPruner, Within
from prunekit.space.forms import RANKS, Values
from prunekit.testing.layers import (
    STRUCTURES,
    MapAlone,
    Quirk,
    Zoo,
    counts_of,
    other_order,
    permuted,
    tensors_of,
    toy_layer,
)
from prunekit.testing.shapes import on_any_shape


def supplied(layer: LayerProblem, pruner: LocalPruner) -> LayerProblem:
    """The layer as calibration on dense inputs hands it to this pruner: what it needs, nothing more."""
    layer = layer.restricted_to(pruner.needs)
    if "sub-layer" in pruner.needs:
        layer = replace(layer, sublayer=MapAlone(layer))
    if "cross" not in pruner.needs:
        return layer
    weight, gram = layer.weight.double(), layer.gram.double()
    return replace(layer, cross=(weight @ gram).to(layer.gram), energy=float(((weight @ gram) * weight).sum()))


def checked(pruner: LocalPruner, layer: LayerProblem, keeps: Sequence[int]) -> list[Candidate]:
    """Prune, and check what holds for every answer."""
    if layer.sublayer is not None:  # of this very layer
        layer = replace(layer, sublayer=MapAlone(layer))
    candidates = list(pruner.prune(layer, keeps))
    assert len(candidates) == len(keeps), "one candidate for every count"
    for keep, candidate in zip(keeps, candidates, strict=True):
        kept, weight = candidate.kept, candidate.weight
        of_layer = layer.weight
        assert (weight.shape, weight.dtype, weight.device) == (of_layer.shape, of_layer.dtype, of_layer.device)
        assert bool(torch.isfinite(weight).all())
        if layer.structure in ("low-rank", "values"):
            assert kept is None
            checked_factors(layer, keep, candidate)
            continue
        if layer.structure != "groups":
            assert kept is None
            assert is_sparse(weight, keep, layer.m), "exact zeros, as many as were asked for where they were asked"
            continue
        assert kept is not None
        assert len(kept) == keep, "the count that was asked for, in the order asked"
        assert list(kept) == sorted(set(kept)), "ids ascend, each once"
        assert set(kept) <= set(range(layer.n_groups))
        assert all(type(g) is int for g in kept)
        gone = layer.columns(sorted(set(range(layer.n_groups)) - set(kept)))
        assert bool((weight[:, gone] == 0).all()), "exact zeros outside the kept groups"
    return candidates


def checked_factors(layer: LayerProblem, keep: int, candidate: Candidate) -> None:
    """A candidate of low rank, or of narrower values, is two factors of its count, and their product; all there is,
    the weight, no factors."""
    if keep == layer.most:
        assert candidate.factors is None, "all there is stays one map"
        return
    assert candidate.factors is not None
    (d_out, d_in), (left, right) = layer.weight.shape, candidate.factors
    shapes, made = ((d_out, keep), (keep, d_in)), product
    if isinstance(form := layer.form, Values):
        shapes = (d_out, form.heads * keep), (form.kv_heads * keep, layer.most)
        made = partial(narrow_product, heads=form.heads)
    assert (tuple(left.shape), tuple(right.shape)) == shapes, "the count that was asked for"
    for factor in (left, right):
        assert (factor.dtype, factor.device) == (layer.weight.dtype, layer.weight.device)
        assert bool(torch.isfinite(factor).all())
    assert torch.equal(candidate.weight, layer.rounded(made(left, right))), "the weight is the product"


PLAIN: dict[str, Zoo] = {
    "groups": {"columns": partial(toy_layer, 12), "blocks": partial(toy_layer, 6, 4)},
    "weights": {"weights": partial(toy_layer, 12, block=0)},
    "n:m": {"fours": partial(toy_layer, 12, block=4)},
    "low-rank": {"wide": partial(toy_layer, 12, 1, 9, form=RANKS), "tall": partial(toy_layer, 6, 1, 15, form=RANKS)},
    "values": {
        "shared": partial(toy_layer, 12, 1, 9, form=Values(4, 2)),
        "own": partial(toy_layer, 8, 1, 9, form=Values(2, 2)),
    },
}
SHARED = {
    structure: {name: made for name, made in zoo.items() if name.startswith(("plain", "dead", "bf", "float"))}
    for structure, zoo in STRUCTURES.items()
}
"""Layers that differ in what an answer could share with its layer, which are dtypes, and in whether there are ties."""


class PrunerSuite:
    """Subclass it, name it Test..., and set `plugin`. Every structure that it declares is tested.

    A promise is one test per structure, and every layer it is tried on is a subtest, so that a failure names the layer.
    """

    plugin: LocalPruner

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """The structures that the pruner knows; what is said of groups meets groups only."""
        known = sorted(self.plugin.structures)
        kinds = {"groups": ["groups"], "single": ["weights", "n:m"], "ranks": ["low-rank"]}
        kinds |= {
            "structure": known,
            "by_row": ["weights", "n:m", "low-rank", "values"],
            "priced": ["groups", "low-rank"],
        }
        for name, some in kinds.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, [structure for structure in some if structure in known])

    def test_is_a_frozen_dataclass_that_needs_known_fields(self) -> None:
        assert dataclasses.is_dataclass(self.plugin)
        assert self.plugin.within in get_args(Within)
        assert hash(self.plugin) == hash(replace(self.plugin))  # type: ignore[type-var]
        statistics_of(self.plugin.needs)  # refuses what there is not

    def test_answers_every_count_and_keeping_all_loses_nothing(self, structure: str, subtests: pytest.Subtests) -> None:
        for name, layer in self._layers(STRUCTURES[structure]):
            with subtests.test(name):
                *_, whole = checked(self.plugin, layer, counts_of(layer))
                checked(self.plugin, layer, [counts_of(layer)[0]])
                (alone,) = checked(self.plugin, layer, [layer.most])
                for candidate in (whole, alone):
                    assert layer.error(candidate.weight) == pytest.approx(0, abs=1e-5)

    def test_counts_may_come_in_any_order_and_alone(self, structure: str, subtests: pytest.Subtests) -> None:
        for name, layer in self._layers(PLAIN[structure]):
            with subtests.test(name):
                counts = list(counts_of(layer))
                first = dict(zip(counts, checked(self.plugin, layer, counts), strict=True))
                assert checked(self.plugin, layer, []) == []
                for keeps in (counts[::-1], counts[1::3] + counts[::3]):
                    for keep, candidate in zip(keeps, checked(self.plugin, layer, keeps), strict=True):
                        assert candidate.kept == first[keep].kept
                        torch.testing.assert_close(candidate.weight, first[keep].weight)
                for keep in counts:
                    checked(self.plugin, layer, [keep])

    def test_gives_groups_that_are_chosen_the_weights_of_its_own(self, groups: str, subtests: pytest.Subtests) -> None:
        for name, layer in self._layers(PLAIN[groups]):
            with subtests.test(name):
                for candidate in checked(self.plugin, layer, [0, layer.n_groups // 2, layer.n_groups]):
                    found = self.plugin.keep(layer, candidate.kept or ())
                    assert found.kept == candidate.kept
                    if type(self.plugin).keep is not LocalPruner.keep:  # else weights stay as they are
                        torch.testing.assert_close(found.weight, candidate.weight)
                odd = tuple(range(0, layer.n_groups, 2))
                found = self.plugin.keep(layer, odd)
                assert found.kept == odd
                gone = layer.columns(range(1, layer.n_groups, 2))
                assert bool((found.weight[:, gone] == 0).all()), "exact zeros outside the chosen groups"
                halves = torch.full((len(odd),), 0.5, dtype=torch.float64)
                scaled = self.plugin.keep(layer, odd, halves)
                if self.plugin.keeps_scales and "sub-layer" in self.plugin.needs:  # it trains from there
                    assert not torch.equal(scaled.weight, found.weight)
                    continue
                as_it_says = found.weight / 2 if self.plugin.keeps_scales else found.weight
                torch.testing.assert_close(scaled.weight, as_it_says, msg="keeps_scales is the truth")

    def test_gives_the_same_answer_twice_and_leaves_its_input_alone(
        self, structure: str, subtests: pytest.Subtests
    ) -> None:
        for name, layer in self._layers(SHARED[structure]):
            with subtests.test(name):
                before, state = [tensor.clone() for tensor in tensors_of(layer)], torch.get_rng_state()
                answers = [checked(self.plugin, replace(layer), counts_of(layer)) for _ in range(2)]
                assert torch.equal(state, torch.get_rng_state()), "the global random state is the caller's"
                for one, two in zip(*answers, strict=True):
                    assert one.kept == two.kept
                    assert torch.equal(one.weight, two.weight)
                for candidate in (candidate for answer in answers for candidate in answer):
                    candidate.weight.fill_(7)  # an answer is the caller's own
                assert all(torch.equal(one, two) for one, two in zip(before, tensors_of(layer), strict=True))

    def test_wastes_no_weight(self, single: str) -> None:
        for _, layer in self._layers(PLAIN[single]):
            for keep, candidate in zip(counts_of(layer), checked(self.plugin, layer, counts_of(layer)), strict=True):
                assert int(candidate.weight.count_nonzero()) == keep * len(layer.weight)

    def test_follows_its_rows_when_they_change_places(self, by_row: str) -> None:
        for _, layer in self._layers(PLAIN[by_row]):
            order = torch.arange(len(layer.weight)).roll(1)  # none stays
            of_rows = {"weight": layer.weight, "cross": layer.cross, "drift": layer.drift}
            rows: dict[str, Any] = {name: values[order] for name, values in of_rows.items() if values is not None}
            rows["statistics"] = {key: v[order] if v.ndim == 2 else v for key, v in layer.statistics.items()}
            if (fisher := layer.statistics.get("output-fisher")) is not None:
                rows["statistics"]["output-fisher"] = fisher[order][:, order]
            here = checked(self.plugin, layer, counts_of(layer))
            there = checked(self.plugin, replace(layer, **rows), counts_of(layer))
            for one, two in zip(here, there, strict=True):
                torch.testing.assert_close(two.weight, one.weight[order], rtol=1e-3, atol=1e-5)

    def test_follows_its_groups_when_they_change_places(self, groups: str, subtests: pytest.Subtests) -> None:
        for name, layer in self._layers(PLAIN[groups]):
            with subtests.test(name):
                counts = range(layer.n_groups + 1)
                order = other_order(layer)
                here = checked(self.plugin, layer, counts)
                there = checked(self.plugin, permuted(layer, order), counts)
                for one, two in zip(here, there, strict=True):
                    assert two.kept is not None
                    assert one.kept == tuple(sorted(order[g] for g in two.kept))
                    torch.testing.assert_close(two.weight, one.weight[:, layer.columns(order)], rtol=1e-3, atol=1e-5)

    def test_its_nested_refits_if_any_are_what_it_answers(self, priced: str, subtests: pytest.Subtests) -> None:
        for name, layer in self._layers(PLAIN[priced]):
            with subtests.test(name):
                nested, counts = self.plugin.nested(layer), counts_of(layer)
                if nested is None:
                    continue
                plain = checked(self.plugin, layer, counts)
                for one, two in zip(plain, nested.candidates(counts), strict=True):
                    assert one.kept == two.kept
                    torch.testing.assert_close(two.weight, one.weight, rtol=1e-3, atol=1e-5)

    def test_more_rank_never_loses_more_and_its_price_is_what_it_loses(
        self, ranks: str, subtests: pytest.Subtests
    ) -> None:
        for name, layer in self._layers(STRUCTURES[ranks]):
            with subtests.test(name):
                counts, nested = counts_of(layer), self.plugin.nested(layer)
                lost = [layer.error(found.weight) for found in checked(self.plugin, layer, counts)]
                close = 1e-2 if layer.weight.dtype in (torch.bfloat16, torch.float16) else 1e-5
                assert all(more <= less + close for less, more in pairwise(lost))
                if nested is not None:
                    assert layer.errors(nested)[list(counts)].tolist() == pytest.approx(lost, rel=close, abs=close)

    def test_its_scores_if_any_are_one_finite_number_per_group(self, groups: str, subtests: pytest.Subtests) -> None:
        for name, layer in self._layers(STRUCTURES[groups]):
            with subtests.test(name):
                scores = self.plugin.scores(layer)
                if scores is not None:
                    assert scores.shape == (layer.n_groups,)
                    assert bool(torch.isfinite(scores).all())

    def test_its_scores_follow_the_groups(self, groups: str, subtests: pytest.Subtests) -> None:
        for name, layer in self._layers(PLAIN[groups]):
            with subtests.test(name):
                order = other_order(layer)
                here, there = self.plugin.scores(layer), self.plugin.scores(permuted(layer, order))
                assert (here is None) == (there is None)
                if here is not None and there is not None:
                    torch.testing.assert_close(there, here[order], rtol=1e-3, atol=1e-7)

    def test_chooses_the_same_in_other_units(self, structure: str, subtests: pytest.Subtests) -> None:
        powers = {"weight": 1, "cross": 1, "drift": 1, "energy": 2}
        learnt = {"relative": -2, "gradient": -1, "fisher": -2, "output-fisher": -2}

        def scaled(part: Any, scale: float) -> Any:
            values = {name: v for name in powers if (v := getattr(part, name, None)) is not None}
            statistics = {name: scale ** learnt.get(name, 0) * v for name, v in part.statistics.items()}
            return replace(
                part, **{name: scale ** powers[name] * v for name, v in values.items()}, statistics=statistics
            )

        for name, layer in self._layers(PLAIN[structure]):
            plain = checked(self.plugin, layer, counts_of(layer))
            for scale in (2.0**-6, 2.0**6):
                with subtests.test(name, scale=scale):
                    producers = tuple(scaled(producer, scale) for producer in layer.producers)
                    louder = checked(self.plugin, replace(scaled(layer, scale), producers=producers), counts_of(layer))
                    for one, two in zip(plain, louder, strict=True):
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
            elif structure == "low-rank":
                d_in, options = n_groups * group_size, {"quirk": quirk, "seed": seed, "needs": self.plugin.needs}
                layer = toy_layer(d_in, 1, d_out, form=RANKS, **options)
            elif structure == "values":
                form = Values(group_size, group_size if seed % 2 else 1)
                layer = toy_layer(
                    n_groups * group_size, 1, d_out, form=form, quirk=quirk, seed=seed, needs=self.plugin.needs
                )
            else:
                d_in, block = n_groups * (group_size + 1), group_size + 1 if structure == "n:m" else 0
                layer = toy_layer(d_in, 1, d_out, quirk=quirk, seed=seed, block=block, needs=self.plugin.needs)
            layer = supplied(replace(layer, damping=damping), self.plugin)
            checked(self.plugin, layer, counts_of(layer))

    def _layers(self, zoo: Zoo) -> Iterator[tuple[str, LayerProblem]]:
        """The layers of a zoo, each as calibration hands it to this pruner."""
        return ((name, supplied(made(needs=self.plugin.needs), self.plugin)) for name, made in zoo.items())
