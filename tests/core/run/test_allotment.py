"""A time is shared out; what the clock decides goes on record, and the recipe beside a result needs no clock."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import prunekit
from prunekit import WrongInput
from prunekit.cli.main import app
from prunekit.data.windows import JUDGED, LEAST
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.run.allotment import AROUND, CALIBRATING, FIRST, JUDGING, WELL, WORK, Allotment, share_text
from prunekit.run.plan.plan import Plan, Stage
from prunekit.system.rates import Rates
from prunekit_strategies.finishers.training import Training, _State

RATES = Rates(flops=1e9, doubles=1e9, read=1e9, write=1e9)
FORWARD = 10_000  # FLOPs of a token
TRAINED = [{"name": "distillation", "epochs": 2, "batch_tokens": 128}]


@pytest.fixture(autouse=True)
def _steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan knows this machine, and nobody measures it."""
    monkeypatch.setattr(Rates, "measured", classmethod(lambda *_: Rates(2e9, 2e9, 1e9, 1e9)))


def plan_of(data: Any) -> Plan:
    """Passes and judging that cost in proportion to their tokens."""
    stages = (
        Stage("open", 0),
        Stage("prune 1", 0, flops=40 * FORWARD * data.calibration_tokens),
        Stage("search 1", 0, flops=None),
        Stage("rebuild", 0, flops=20 * FORWARD * data.calibration_tokens),
        Stage("finish", 0, flops=None),
        Stage("evaluate", 0, flops=2 * FORWARD * data.evaluation_tokens),
        Stage("export", 0, flops=int(RATES.flops)),
    )
    return Plan(stages, 0, None, None, 0, 0, None, None, None, FORWARD)  # type: ignore[arg-type]


def parts_of(time: float, recipe: str = "default", **data: int) -> Any:
    return resolve(Recipe.load(recipe).with_overrides({"time": time, **{f"data.{k}": v for k, v in data.items()}}))


@given(st.floats(20, 20_000), st.sampled_from(["default", "search", "default-recover"]), st.sampled_from([32, 512]))
def test_as_much_text_as_the_time_allows_and_no_window_more(time: float, recipe: str, seqlen: int) -> None:
    parts = parts_of(time, recipe)
    found = share_text(parts, seqlen, plan_of, RATES)
    share = CALIBRATING[recipe == "search", recipe == "default-recover"] * time

    def seconds(calibration: int) -> float:
        passes = WORK * (60 * FORWARD * calibration + 2 * FORWARD * found["evaluation"])
        return AROUND + 1 + passes / RATES.flops

    assert all(tokens % seqlen == 0 and tokens >= LEAST for tokens in found.values())
    limit = share
    if recipe == "default-recover" and seconds(WELL) > share:  # what gains more than training comes first
        limit = max(share, seconds(LEAST) + FIRST * (time - seconds(LEAST)))
    assert seconds(found["calibration"]) <= limit or found["calibration"] == LEAST
    enough = WELL if limit > share else 1 << 20
    assert seconds(found["calibration"] + seqlen) > limit or found["calibration"] > enough - seqlen
    assert 2 * FORWARD * found["evaluation"] / RATES.flops <= JUDGING * time or found["evaluation"] == LEAST


def test_what_only_judges_the_answer_takes_a_share_and_no_more() -> None:
    def also_heard(data: Any) -> Plan:
        plan = plan_of(data)
        heard = Stage("dense model", 0, flops=20 * FORWARD * data.search_tokens)
        return replace(plan, stages=(*plan.stages, heard))

    def judging(found: Mapping[str, int]) -> float:
        return FORWARD * (2 * found["evaluation"] + 20 * found["search"]) / RATES.flops

    short, long = (share_text(parts_of(time), 32, also_heard, RATES) for time in (20.0, 20_000.0))
    assert short["search"] < JUDGED == long["search"]
    assert judging(short) <= 1.5 * JUDGING * 20 < judging(short) + 20 * 32 * FORWARD / RATES.flops
    assert share_text(parts_of(60.0, "search"), 32, also_heard, RATES)["search"] == JUDGED  # it is asked about


def test_what_was_said_is_kept() -> None:
    found = share_text(parts_of(600, calibration_tokens=4096), 32, plan_of, RATES)
    more = share_text(parts_of(6000, calibration_tokens=4096), 32, plan_of, RATES)
    assert found["evaluation"] <= more["evaluation"]
    asked = parts_of(600, calibration_tokens=4096, evaluation_tokens=128).recipe.data
    seen = []
    share_text(
        parts_of(600, calibration_tokens=4096, evaluation_tokens=128),
        32, lambda data: seen.append((data.calibration_tokens, data.evaluation_tokens)) or plan_of(data), RATES,
    )  # fmt: skip
    assert set(seen) == {(asked.calibration_tokens, asked.evaluation_tokens)}


def test_a_time_that_is_too_short_says_what_it_takes() -> None:
    with pytest.raises(
        WrongInput, match=r"5\.0 s are too short: recipe and model take about 15\.1 s here at the least"
    ):
        share_text(parts_of(5), 32, plan_of, RATES)
    share_text(parts_of(14.9), 32, plan_of, RATES)  # nearly enough
    with pytest.raises(WrongInput, match="here at the least"):
        share_text(parts_of(14.9), 32, plan_of, RATES, planning=4.0)


def test_search_and_training_get_what_is_left_at_the_pace_so_far() -> None:
    data = parts_of(100, calibration_tokens=10_000, evaluation_tokens=1000).recipe.data
    allotment = Allotment(100, plan_of(data), RATES, trains=False, text={})
    spent = {"open": 2.0, "prune": 8.0}  # twice the 4 s that were planned
    left = 100 - AROUND - 10 - 2 * (2 + 0.02 + 1)
    assert allotment.search_tokens(spent) == round(left / 2 * RATES.flops / FORWARD)
    half = Allotment(100, plan_of(data), RATES, trains=True, text={})
    assert half.search_tokens(spent) == pytest.approx(allotment.search_tokens(spent) / 2, abs=1)
    assert half.search_tokens({"prune": 500.0}) == 1
    spent = {"open": 2.0, "prune": 12.0, "search": 20.0, "evaluate": 4.0}
    assert half.training_seconds(spent, 1) == pytest.approx(100 - AROUND - 38 - 4 / 3 - 1)
    assert half.training_seconds(spent, 2) == pytest.approx((100 - AROUND - 38 - 4 / 3 - 1) / 2)
    assert half.training_seconds({"prune": 500.0}, 1) == 0


def test_the_plan_shows_what_a_time_buys(saved_tiny: Any) -> None:
    few = ["--dataset", "python-docs", "--seqlen", "32", "--recipe", "default-recover"]
    told = CliRunner().invoke(app, ["plan", str(saved_tiny()), "--time", "30s", *few])
    assert told.exit_code == 0
    assert "in 30.0 s: calibration on up to " in told.output
    assert "and what is left for recovery" in told.output
    told = CliRunner().invoke(app, ["plan", str(saved_tiny()), "--time", "soon", *few])
    assert told.exit_code == 2
    assert "time: no time 'soon'; give it as 45m, 1h30m or 90s\n" in told.output


@pytest.fixture
def timed(saved_tiny: Any, quick: Any) -> dict[str, Any]:
    """Arguments of a run that trains for as long as the time allows."""
    settings = quick(recipe="fast", finishers=TRAINED, time="90s", verify=False)
    return {key: value for key, value in settings.items() if key not in ("pruner", "allocator", "objective")} | {
        "model": saved_tiny(),
        "data__recovery_tokens": 1024,
    }


@pytest.mark.slow
def test_the_recipe_beside_the_result_makes_it_again_without_a_clock(timed: dict[str, Any], tmp_path: Path) -> None:
    said = prunekit.prune(output=tmp_path / "one", **timed).report["finishers"][0]
    recipe = Recipe.load(tmp_path / "one")
    assert recipe.time is None
    assert recipe.finishers[0]["steps"] == said["options"]["steps"] != 0
    prunekit.prune(recipe=recipe, output=tmp_path / "two", quiet=True)
    for name in ("model.safetensors", "recipe.yaml"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.slow
def test_a_killed_run_keeps_what_was_chosen_and_what_the_clock_has_said(
    timed: dict[str, Any], tmp_path: Path, killed_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with killed_at(Training, "fit", 1):  # it knows how many steps there are, and has made none
        prunekit.prune(output=out, **timed)
    monkeypatch.setattr(Rates, "measured", classmethod(lambda *_: Rates(1e3, 1e3, 1e3, 1e3)))  # too slow to begin with
    (pace,) = out.with_name("out.partial").glob("finisher-0/*pace.safetensors")
    said = pace.read_bytes()
    with killed_at(_State, "save", 1, after=True):
        prunekit.prune(output=out, **timed)
    assert pace.read_bytes() == said
    with pytest.raises(WrongInput, match="too short"):
        prunekit.prune(output=tmp_path / "new", **timed)
    prunekit.prune(output=out, **timed)
    prunekit.prune(recipe=Recipe.load(out), output=tmp_path / "again", quiet=True)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_a_search_ends_by_the_clock_and_its_recipe_by_tokens(saved_tiny: Any, quick: Any, tmp_path: Path) -> None:
    asked = quick(time="20s", verify=False, allocator={"name": "evolution", "generations": 3, "offspring": 4})
    report = prunekit.prune(saved_tiny(), output=tmp_path / "one", **asked).report
    recipe = Recipe.load(tmp_path / "one")
    assert recipe.time is None
    assert recipe.search_budget is not None
    assert recipe.search_budget >= report["search"]["token_forwards"]
    records = [json.loads(line) for line in (tmp_path / "one" / "ledger.jsonl").read_text().splitlines()]
    assert [r["answer"] for r in records if r["kind"] == "time"] == [recipe.search_budget]
    prunekit.prune(recipe=recipe, output=tmp_path / "two", quiet=True)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_a_time_is_of_one_result(timed: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match="a time is of one result"):
        prunekit.prune(output=tmp_path / "out", sparsity=[0.3, 0.5], **timed)
    with pytest.raises(WrongInput, match="a time is of one run"):
        prunekit.tune(output=tmp_path / "study", trials=1, space={"damping": [0.1, 0.2]}, **timed)
