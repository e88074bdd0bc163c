"""How long a pruner works is measured on layers that stand in for those of the model."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from prunekit import Candidate, LayerProblem, LocalPruner
from prunekit.calibration.fill import PRICED_AT_ONCE
from prunekit.calibration.moments import Moments, collected
from prunekit.calibration.statistics import statistics_of
from prunekit.layer.problem import Nested
from prunekit.layer.statistics import MapShape, Received, Statistic, Sums
from prunekit.models.adapters.find import adapter_for
from prunekit.models.blocks import TOKENS_AT_ONCE
from prunekit.plugins.registry import PRUNERS
from prunekit.run.plan import trial
from prunekit.run.plan.trial import ENOUGH, FIRST, Trials, forward_seconds
from prunekit.space.forms import GROUPS, RANKS, WEIGHTS, Pattern
from prunekit.space.sites import Site
from prunekit.testing import tiny


@dataclass(frozen=True)
class Slow(LocalPruner):
    """Keeps the first groups, in as many seconds as the layer has columns to the third power, times `pace`."""

    clock: list[float] = field(default_factory=lambda: [0.0])
    pace: float = 0.0
    nests: bool = False
    asked: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)

    def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
        self.clock[0] += self.pace * layer.d_in**3
        self.asked.append((layer.d_in, tuple(keeps)))
        return [layer.masked(range(keep)) for keep in keeps]

    def nested(self, layer: LayerProblem) -> Nested | None:
        self.clock[0] += self.pace * layer.d_in**3
        return layer.nested(range(layer.n_groups)) if self.nests else None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(trial.time, "perf_counter", lambda: now[0])
    return now


def site(n_groups: int, size: int = 1, form: Any = GROUPS, d_out: int = 6) -> Site:
    most, kind = form.most(n_groups, n_groups * size, d_out), "mlp" if form.coupled else "linear"
    inputs = 0 if form.coupled else n_groups
    return Site("layer", 0, kind, most, size, 3 * d_out, d_out=d_out, form=form, inputs=inputs)


def trials(pruner: LocalPruner, stored: torch.dtype = torch.float32) -> Trials:
    return Trials(pruner, pruner.needs, 0.1, torch.device("cpu"), stored)


def test_what_is_quick_is_tried_at_its_full_width_and_once(clock: list[float]) -> None:
    tried, wide = trials(pruner := Slow(clock, 1e-12)), site(3 * FIRST)
    ladder = [3 * FIRST, FIRST, 0]
    assert tried.seconds(wide, {}, ladder, None) == pytest.approx(1e-12 * (3 * FIRST) ** 3)
    assert pruner.asked == [
        (width, (0, round(width / 3), width)) for width in (FIRST, 2 * FIRST, 3 * FIRST)
    ]  # the same shares
    tried.seconds(replace(wide, name="another"), {}, ladder, None)
    assert len(pruner.asked) == 3


def test_what_is_slow_is_carried_on_from_a_narrow_layer(clock: list[float]) -> None:
    pace = 2 * ENOUGH / FIRST**3
    found = trials(pruner := Slow(clock, pace)).seconds(site(64 * FIRST), {}, [FIRST], None)
    assert found == pytest.approx(pace * (64 * FIRST) ** 3)
    assert [width for width, _ in pruner.asked] == [FIRST]


@pytest.mark.parametrize("nests", [True, False])
def test_counts_that_are_only_priced_take_one_factor_or_batches_of_all(clock: list[float], nests: bool) -> None:
    ladder, pace = range(2 * PRICED_AT_ONCE + 1), 1e-9
    found = trials(pruner := Slow(clock, pace, nests)).seconds(site(60), {}, ladder, [30])
    asked = [keeps for _, keeps in pruner.asked]
    assert asked == ([] if nests else [tuple(range(PRICED_AT_ONCE))])
    assert found == pytest.approx(pace * 60**3 * (1 if nests else 2 * 3))  # without, both are asked


def test_a_trial_leaves_the_global_random_state_alone() -> None:
    class Dice(Slow):
        def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
            torch.rand(3)
            return super().prune(layer, keeps)

    before = torch.get_rng_state()
    assert trials(Dice()).seconds(site(8), {}, [4], None) is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pruner_that_refuses_the_layer_is_not_known() -> None:
    class Choosy(Slow):
        def prune(self, layer: LayerProblem, keeps: Sequence[int]) -> Sequence[Candidate]:
            raise ValueError("not this layer")

    assert trials(Choosy()).seconds(site(8), {}, [4], None) is None


NEEDS = statistics_of(("drift", "power"))
MAPS = {"up": MapShape(8, 24)}


def test_statistics_are_added_up_at_a_pace_that_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(trial.time, "perf_counter", lambda: float(next(ticks)))  # each time takes a second
    statistics, tried = collected(NEEDS, residual=True), trials(Slow())
    before = torch.get_rng_state()
    found = tried.adding(statistics, MapShape(24, 8), MAPS, torch.float32)
    assert found == Moments.flops(statistics, MapShape(24, 8), MAPS, TOKENS_AT_ONCE)
    asked = next(ticks)
    assert tried.adding(statistics, MapShape(24, 8), MAPS, torch.float32) == found
    assert next(ticks) == asked + 1
    assert torch.equal(torch.get_rng_state(), before)


def test_the_pace_of_a_wide_map_is_that_of_a_narrower_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "WIDEST", 16)
    sizes: list[MapShape] = []
    empty = Moments.empty
    monkeypatch.setattr(Moments, "empty", lambda *args: sizes.append(args[1]) or empty(*args))
    assert trials(Slow()).adding(collected((), residual=False), MapShape(64, 8), {}, torch.bfloat16)
    assert sizes == [MapShape(16, 8)]


def test_statistics_that_refuse_what_is_made_up_have_no_pace() -> None:
    @dataclass(frozen=True)
    class Choosy(Statistic):
        name = "choosy"

        def add(self, sums: Sums, received: Received) -> None:
            raise ValueError("not these tokens")

    assert trials(Slow()).adding((Choosy(),), MapShape(8, 8), {}, torch.float32) is None


FORMS = {"groups": GROUPS, "weights": WEIGHTS, "n:m": Pattern(2, 4), "low-rank": RANKS}
BUILT = {name: PRUNERS.build({"name": name}) for name in PRUNERS}
ALONE = {name for name, pruner in BUILT.items() if "sub-layer" not in pruner.needs}  # others need more than a layer
KNOWN = [(name, units) for name in BUILT if name in ALONE for units in FORMS if units in BUILT[name].structures]


@pytest.mark.parametrize(("name", "units"), KNOWN)
def test_every_built_in_pruner_works_on_a_stand_in(name: str, units: str) -> None:
    pruner, form = PRUNERS.build({"name": name}), FORMS[units]
    fed = {"up": MapShape(5, 24), "gate": MapShape(5, 24)} if form.coupled else {}
    layer = site(24, form=form)
    half, quarter = layer.n_groups // 2, layer.n_groups // 4
    for stored in (torch.float32, torch.bfloat16):
        found = trials(pruner, stored).seconds(layer, fed, [half, quarter], None)
        assert found is not None
        assert found > 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "phi3", "mamba", "falcon"])
def test_a_block_is_timed_of_a_model_and_of_its_skeleton(family):
    model = tiny(family)
    adapter = adapter_for(model.config.model_type)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.device("meta"):
        bones = type(model)(model.config)
    state = torch.random.get_rng_state()
    for each in (model, bones):
        found = forward_seconds(each, adapter, 8, torch.device("cpu"), torch.float32)
        assert found is not None
        assert found[0] > 0
        assert found[1] == TOKENS_AT_ONCE
    assert torch.equal(torch.random.get_rng_state(), state)  # a run is the same whether it was planned or not
    assert all(p.is_meta for p in bones.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_block_that_cannot_be_run_is_not_timed():
    model = tiny("llama")
    with patch.object(type(model), "forward", side_effect=TypeError("reads what a skeleton has not")):
        found = forward_seconds(model, adapter_for("llama"), 8, torch.device("cpu"), torch.float32)
    assert found is None
