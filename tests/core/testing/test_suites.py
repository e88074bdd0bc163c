"""The suites themselves: they pass what keeps its promises and fail what does not."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import count
from operator import itemgetter

import pytest
import torch

from prunekit import Candidate, Finisher, LocalPruner, PluginError, best_groups, best_weights
from prunekit.testing import FinisherSuite, KeepLargest, PrunerSuite


class TestKeepLargest(PrunerSuite):
    plugin = KeepLargest()


@dataclass(frozen=True)
class Heaviest(LocalPruner):
    """Keep the groups, or the single weights, of largest size: what the broken ones below would be without a fault."""

    fault: str = ""
    structures = frozenset({"groups", "weights", "n:m"})

    @property
    def needs(self):
        return frozenset({"no such"} if self.fault == "needs what is not" else {"gram", "producers"})

    def prune(self, layer, keeps):
        if layer.structure == "groups":
            candidates = [layer.masked(kept) for kept in best_groups(self.scores(layer), keeps)]
        else:
            candidates = [layer.sparse(mask) for mask in best_weights(layer.weight.abs(), keeps, m=layer.m)]
        return FAULTS[self.fault](layer, keeps, candidates) if self.fault in FAULTS else candidates

    def scores(self, layer):
        scores = layer.group_sum(layer.weight.double().square())
        return SCORES.get(self.fault, lambda layer, scores: scores)(layer, scores)


class TestHeaviest(PrunerSuite):
    plugin = Heaviest()


def changed(weight=lambda layer, w: w, kept=lambda layer, k: k, when=lambda layer, keep: True):
    """A fault in some candidates."""

    def fault(layer, keeps, candidates):
        return [
            Candidate(kept(layer, c.kept), weight(layer, c.weight)) if when(layer, keep) else c
            for keep, c in zip(keeps, candidates, strict=True)
        ]

    return fault


def whole(layer, keep):
    return keep == layer.n_groups


SCORES = {
    "scores in pairs": lambda layer, scores: scores.repeat(2) if layer.n_groups > 1 else scores,
    "scores are no number where nothing comes in": lambda layer, s: s / layer.group_sum(layer.gram.diagonal()),
    "scores by place": lambda layer, scores: torch.arange(layer.n_groups),
    "scores in a unit of their own": lambda layer, scores: scores.round(),
    "scores drawn from the global generator": lambda layer, scores: scores * torch.rand(len(scores)),
    "scores for some units only": lambda layer, s: None if s.argmax() % 2 else s,
}
CALLS = count()


def after(act):
    """A fault beside the candidates, which are as they were."""
    return lambda layer, keeps, candidates: (act(layer, keeps), candidates)[1]


FAULTS = {
    "one too few": lambda layer, keeps, cs: cs[:-1],
    "in another order": lambda layer, keeps, cs: [c for _, c in sorted(zip(keeps, cs, strict=True), key=itemgetter(0))],
    "one count for all": lambda layer, keeps, cs: [cs[-1]] * len(cs),
    "nothing asked is an error": after(lambda layer, keeps: max(keeps)),
    "zero alone is an error": after(lambda layer, keeps: 1 / max(keeps, default=1)),
    "what else is asked counts": lambda layer, keeps, cs: changed(lambda _, w: w * (9 + len(keeps)))(layer, keeps, cs),
    "another answer every time": changed(lambda layer, w: w * (1 + next(CALLS) / 1e9)),
    "ids fall": changed(kept=lambda layer, k: k and k[::-1]),
    "ids twice": changed(kept=lambda layer, k: k and (k[0], *k[:-1])),
    "ids from one": changed(kept=lambda layer, k: k and tuple(g + 1 for g in k)),
    "ids are tensors": changed(kept=lambda layer, k: k and tuple(torch.tensor(k))),
    "ids where there are no groups": changed(kept=lambda layer, k: k or ()),
    "float64 whatever came in": changed(lambda layer, w: w.double()),
    "transposed": changed(lambda layer, w: w.T),
    "the weight itself": changed(lambda layer, w: layer.weight, when=whole),
    "the weight itself in half precision": changed(
        lambda layer, w: layer.weight, when=lambda layer, k: whole(layer, k) and layer.weight.dtype == torch.bfloat16
    ),
    "a little everywhere": changed(lambda layer, w: w + 1e-6 * (w == 0)),
    "all of it loses something": changed(lambda layer, w: w * 0.99, when=whole),
    "something is left of nothing": changed(lambda layer, w: w + 1e-3, when=lambda layer, k: k == 0),
    "half precision overflows": changed(lambda layer, w: w * 1e5 if w.dtype == torch.float16 else w),
    "no number where nothing comes in": changed(lambda layer, w: w / (layer.gram.diagonal() > 0), when=whole),
    "wastes a weight": changed(lambda layer, w: w * (w.abs() > w[w != 0].abs().min()) if w.any() else w),
    "one too many": changed(lambda layer, w: torch.where(w.cumsum(1) == 0, layer.weight, w), when=lambda _, k: k > 0),
    "a row of its own": changed(lambda layer, w: torch.cat([w[:1] * 0.5, w[1:]])),
    "writes on the weight": after(lambda layer, keeps: layer.weight.mul_(0.5)),
    "writes on a gram in double": after(lambda layer, keeps: layer.gram.double().diagonal().add_(1e-3)),
    "writes on a producer": after(lambda layer, keeps: [producer.weight.mul_(0.5) for producer in layer.producers]),
}
PROMISES = {  # faults by the test that finds them
    "frozen_dataclass": ["needs what is not"],
    "answers_every_count": [
        *("one too few", "one count for all", "zero alone is an error", "ids fall", "ids twice", "ids from one"),
        *("ids are tensors", "ids where there are no groups", "float64 whatever came in", "transposed", "one too many"),
        *("a little everywhere", "all of it loses something", "something is left of nothing", "scores in pairs"),
        *(
            "half precision overflows",
            "no number where nothing comes in",
            "scores are no number where nothing comes in",
        ),
    ],
    "any_order_and_alone": ["in another order", "nothing asked is an error", "what else is asked counts"],
    "same_answer_twice": [
        *("another answer every time", "the weight itself", "the weight itself in half precision"),
        *("writes on the weight", "writes on a gram in double", "writes on a producer"),
        "scores drawn from the global generator",
    ],
    "wastes_no_weight": ["wastes a weight"],
    "follows_its_rows": ["a row of its own"],
    "follows_its_groups": ["scores by place"],
    "scores_if_any": ["scores in pairs", "scores are no number where nothing comes in"],
    "scores_follow": ["scores by place", "scores for some units only"],
    "other_units": ["scores in a unit of their own"],
}


class Subtests:
    """Those of a test that is called by hand: the first that fails ends it."""

    def test(self, *_, **__):
        return nullcontext()


@pytest.mark.parametrize(("promise", "fault"), [(p, fault) for p, faults in PROMISES.items() for fault in faults])
def test_a_pruner_that_breaks_a_promise_fails(promise, fault):
    (test,) = (getattr(PrunerSuite, name) for name in dir(PrunerSuite) if promise in name)
    suite = type("Suite", (PrunerSuite,), {"plugin": Heaviest(fault)})()
    kinds = {"structure": ["groups", "weights", "n:m"], "groups": ["groups"], "single": ["weights", "n:m"]}
    asked = signature(test).parameters
    rest = {"subtests": Subtests()} if "subtests" in asked else {}
    calls = [{name: kind} | rest for name in kinds if name in asked for kind in kinds[name]] or [{}]
    assert not all(map(partial(holds, partial(test, suite)), calls))


def holds(test, options):
    try:
        test(**options)
    except Exception:  # of any kind: a broken plug-in may raise what it will
        return False
    return True


@dataclass(frozen=True)
class Scale(Finisher):
    """Halve every norm."""

    def finish(self, piece):
        with torch.no_grad():
            for name, parameter in piece.model.named_parameters():
                if "norm" in name:
                    parameter.mul_(0.5)
        return {}


class TestScale(FinisherSuite):
    plugin = Scale()


@dataclass(frozen=True)
class Break(Finisher):
    """Leave something that is not a number, another shape, or a bias nobody was told of."""

    how: str

    def finish(self, piece):
        linear = piece.adapter.linear(piece.adapter.blocks(piece.model)[0], piece.sites[0])
        if self.how == "nan":
            linear.weight.data.fill_(torch.nan)
        elif self.how == "shape":
            linear.weight = torch.nn.Parameter(linear.weight[:, :4].detach(), requires_grad=False)
        else:
            linear.bias = torch.nn.Parameter(torch.zeros(24), requires_grad=False)
        return {}


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("nan", r"left values in model\.layers\.0\.self_attn\.o_proj\.weight that are not finite"),
        ("shape", r"changed .*o_proj\.weight from \(24, 16\) to \(24, 4\); every shape must stay"),
        ("bias", r"changed .*o_proj\.bias from nothing to \(24,\)"),
    ],
)
def test_a_finisher_that_breaks_the_model_fails(how, sentence):
    suite = FinisherSuite()
    type(suite).plugin = Break(how)
    with pytest.raises(PluginError, match=sentence):
        suite.test_the_same_work_has_the_same_result()


@dataclass(frozen=True)
class Meddle(Finisher):
    """Change the dense model."""

    def finish(self, piece):
        next(piece.dense.parameters()).data += 1
        return {}


def test_a_finisher_that_changes_the_dense_model_fails():
    suite = FinisherSuite()
    type(suite).plugin = Meddle()
    with pytest.raises(AssertionError):
        suite.test_all_it_needs_is_in_the_piece_and_the_rest_is_left_alone()
