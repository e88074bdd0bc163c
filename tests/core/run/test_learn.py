"""Runs in which a learner takes the place of an allocator."""

import dataclasses
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import prunekit
from prunekit.cli.main import app
from prunekit.errors import PluginError, WrongInput
from prunekit.plugins.learner import Decision, GateProblem, GateQuery, GateReply, Learner
from prunekit.plugins.registry import LEARNERS
from prunekit.search import lessons
from prunekit.search.gated import GatedModel
from prunekit.system.progress import Progress
from prunekit.testing import tiny
from prunekit.testing.learners import Surface, lesson, mask_of, noisy, space_of
from prunekit_strategies.finishers.distillation import Distillation

GRASP = {"name": "grasprune", "steps": 4, "batch_tokens": 32}
SCALED = GRASP | {"scale_steps": 2}
SHEARED = {"name": "sheared-llama", "steps": 6, "batch_tokens": 32, "rate": 0.01}


@pytest.fixture(scope="module")
def learning(quick: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Arguments of a run with a learner, with changes."""

    def settings(**changes: Any) -> dict[str, Any]:
        base = quick(verify=False) | {"learner": GRASP} | changes
        return {key: value for key, value in base.items() if key != "allocator"}

    return settings


@pytest.fixture(scope="module")
def folder(saved_tiny: Any) -> Path:
    return saved_tiny()


def kept_of(result: Any) -> list[int]:
    return [site["kept"] for site in result.report["sites"]]


def test_a_run_that_was_stopped_while_it_learned_ends_in_the_same_bytes(
    folder: Path, tmp_path: Path, learning: Any, content: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = learning(pruner={"name": "obs", "aim": "stream"})
    whole = prunekit.prune(folder, output=tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        stopped(2, patch)
        with pytest.raises(KeyboardInterrupt):
            prunekit.prune(folder, output=tmp_path / "stopped", **settings)
    prunekit.prune(folder, output=tmp_path / "stopped", **settings)
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")
    report = whole.report
    assert report["learner"]["queries"] == 4
    assert report["learner"]["tokens_forward_and_back"] == 4 * 32
    assert report["search"] == {"questions": 4, "token_forwards": 3 * 4 * 32}
    assert "un-refitted weights" in report["learner"]["masks"]
    assert report["budget"]["spent"] <= report["budget"]["limit"]
    again = prunekit.prune(recipe=tmp_path / "whole", quiet=True)
    assert again.report["learner"] == report["learner"]
    assert kept_of(again) == kept_of(whole)


def test_scales_are_folded_where_the_pruner_keeps_the_weights(folder: Path, learning: Any) -> None:
    plain, folded = (
        prunekit.prune(folder, **learning(pruner="magnitude", learner=learner, carry="dense"))
        for learner in (GRASP, SCALED)
    )
    assert kept_of(plain) == kept_of(folded)
    ratio = [
        (two / one)[one != 0]
        for (name, one), two in zip(plain.model.state_dict().items(), folded.model.state_dict().values(), strict=True)
        if "down_proj" in name
    ]
    assert any(float((r - 1).abs().max()) > 1e-4 for r in ratio)
    assert all(float(r.min()) >= 0.5 and float(r.max()) <= 1.5 for r in ratio)


def test_the_pruner_may_choose_the_groups_of_what_was_learned(folder: Path, learning: Any) -> None:
    own, chosen = (prunekit.prune(folder, **learning(learned=learned)) for learned in ("groups", "counts"))
    assert kept_of(own) == kept_of(chosen)
    assert own.report["losses"]["pruned"] != chosen.report["losses"]["pruned"]


@pytest.mark.parametrize("learner", [GRASP, SHEARED])
def test_a_run_on_two_workers_ends_where_one_does(folder: Path, learning: Any, learner: dict[str, Any]) -> None:
    one, two = (
        prunekit.prune(folder, device=device, dtype="float64", **learning(learner=learner)).report
        for device in ("cpu", "cpu,cpu")
    )
    assert [site["kept"] for site in one["sites"]] == [site["kept"] for site in two["sites"]]
    assert one["losses"]["pruned"]["nll"] == pytest.approx(two["losses"]["pruned"]["nll"], rel=1e-8)
    assert one["learner"] == two["learner"], "the lesson is held by one"
    assert one["search"] == two["search"]


def test_a_learner_that_nests_is_asked_once_for_a_family(folder: Path, tmp_path: Path, learning: Any) -> None:
    gisp = {"name": "gisp", "steps": 3, "tokens": 128}
    found = prunekit.prune(folder, output=tmp_path / "out", sparsity=[0.3, 0.6], **learning(learner=gisp))
    small = [json.loads((tmp_path / "out" / name / "report.json").read_text()) for name in ("0.3", "0.6")]
    assert [report["search"]["questions"] for report in small] == [4, 0]
    assert [report["learner"]["queries"] for report in small] == [4, 4]
    counts = [[site["kept"] for site in report["sites"]] for report in small]
    assert all(large >= less for large, less in zip(*counts, strict=True))
    assert [row["folder"] for row in found.rows] == ["0.3", "0.6"]


def test_any_other_learns_every_budget_by_itself_and_says_so(folder: Path, learning: Any) -> None:
    lines: list[str] = []

    class Said(Progress):
        def say(self, line: str) -> None:
            lines.append(line)

    settings = {key: value for key, value in learning().items() if key != "quiet"}
    family = prunekit.prune(folder, sparsity=[0.3, 0.6], progress=Said(), **settings)
    assert any("one budget at a time: 2 are learned in turn" in line for line in lines)
    assert [member.report["search"]["questions"] for member in family.members] == [4, 4]


def stopped(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the model answers so many questions, then the user stops the run."""
    asked, real = list[GateQuery](), GatedModel.answer

    def answer(self: GatedModel, query: GateQuery, number: int = 0) -> GateReply:
        if len(asked) == after:
            raise KeyboardInterrupt
        asked.append(query)
        return real(self, query, number)

    monkeypatch.setattr(GatedModel, "answer", answer)


def test_a_run_that_was_stopped_while_it_trained_weights_ends_in_the_same_bytes(
    folder: Path, tmp_path: Path, learning: Any, content: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = learning(pruner={"name": "obs", "aim": "stream"}, learner=SHEARED)
    whole = prunekit.prune(folder, output=tmp_path / "whole", **settings)
    monkeypatch.setattr(lessons, "SAVED", 2)
    with monkeypatch.context() as patch:
        stopped(5, patch)
        with pytest.raises(KeyboardInterrupt):
            prunekit.prune(folder, output=tmp_path / "stopped", **settings)
    prunekit.prune(folder, output=tmp_path / "stopped", **settings)
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")
    assert whole.report["learner"]["steps_of_weights"] == 6
    assert "trained along and pruned" in whole.report["learner"]["masks"]
    assert whole.report["budget"]["spent"] <= whole.report["budget"]["limit"]


def test_a_pruner_that_keeps_weights_keeps_the_trained_ones_and_a_refit_goes_back_to_the_dense_outputs(
    folder: Path, learning: Any
) -> None:
    runs = {
        name: prunekit.prune(folder, **learning(pruner=pruner, learner=SHEARED, learned=learned, carry="centre"))
        for name, pruner, learned in (
            ("kept", "magnitude", "weights"),
            ("own", {"name": "obs", "aim": "own"}, "weights"),
            ("stream", {"name": "obs", "aim": "stream"}, "weights"),
            ("none", {"name": "obs", "aim": "stream", "correction": 0.0}, "weights"),
            ("dense", "magnitude", "groups"),
        )
    }
    losses = {name: run.report["losses"]["pruned"]["nll"] for name, run in runs.items()}
    # the gates are part of the weights: what is refitted to its own outputs, or not at all, is as it was
    assert losses["own"] == pytest.approx(losses["kept"], rel=1e-4)
    assert losses["none"] == pytest.approx(losses["kept"], rel=1e-4)
    assert abs(losses["stream"] - losses["kept"]) > 1e-4
    assert abs(losses["dense"] - losses["kept"]) > 1e-4
    norm = {name: run.model.get_parameter("model.layers.0.input_layernorm.weight") for name, run in runs.items()}
    assert not torch.equal(norm["kept"], norm["dense"]), "all of the blocks is trained"
    assert torch.equal(norm["kept"], norm["stream"])
    assert kept_of(runs["kept"]) == kept_of(runs["dense"])
    assert runs["kept"].report["losses"]["dense"] == runs["dense"].report["losses"]["dense"]


def test_patterns_are_learned_with_weights(saved_tiny: Any, learning: Any) -> None:
    model = saved_tiny(intermediate_size=16)
    sls = {"name": "sls", "steps": 12, "batch_tokens": 32, "score_rate": 0.3, "patience": 1, "penalty": 1.0}
    found = prunekit.prune(model, **learning(learner=sls, structure="2:4", pruner="magnitude", sparsity=0.5))
    kept = [site["kept"] / site["groups"] for site in found.report["sites"]]
    assert found.report["budget"]["spent"] == found.report["budget"]["limit"]
    assert min(kept) >= 0.25
    assert all(share * 4 == round(share * 4) for share in kept)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"time": "10m"}, "time limits searches"),
        ({"search_budget": 1000}, "search_budget limits searches"),
        ({"structure": "2:4", "pruner": "sparsegpt"}, "does not know structure n:m"),
        ({"allocator": "uniform"}, "give one of them"),
        ({"learner": "grasp"}, "grasprune"),
        (
            {"learner": None, "allocator": "uniform", "learned": "groups"},
            "an allocator decides here; leave learned away",
        ),
        ({"learned": "weights"}, "learner 'grasprune' trains no weights; give groups or counts"),
        ({"learner": {**SHEARED, "rate": 0.0}, "learned": "weights"}, "trains no weights"),
        ({"learner": SCALED}, "pruner 'obs' replaces .* give --set learner.scale_steps=0, or a pruner"),
        ({"learner": SCALED, "pruner": {"name": "wanda", "refit": True}}, "pruner 'wanda' replaces scaled weights"),
        ({"learner": SCALED, "pruner": "magnitude", "learned": "counts"}, "learned counts leaves groups and scales"),
    ],
)
def test_what_does_not_go_with_a_learner_is_refused(learning: Any, changes: dict[str, Any], sentence: str) -> None:
    given = learning() | changes
    keys = {key.replace("__", "."): value for key, value in given.items() if key not in ("quiet",)}
    with pytest.raises(WrongInput, match=sentence):
        prunekit.resolve(prunekit.Recipe.load().with_overrides(keys))


def test_what_is_taken_over_follows_from_the_learner_unless_it_is_said(tmp_path: Path) -> None:
    def taken(**keys: Any) -> str | None:
        return prunekit.resolve(prunekit.Recipe.load().with_overrides(keys)).recipe.learned

    assert (taken(), taken(learner="gisp"), taken(learner="lora-prune")) == (None, "groups", "weights")
    assert taken(learner="lora-prune", learned="counts") == "counts"
    assert taken(learner=SCALED, pruner={"name": "obs", "refit": False}) == "groups"
    # a complete recipe, as beside a result, in which another learner or an allocator takes the place
    (tmp_path / "recipe.yaml").write_text(prunekit.resolve(prunekit.Recipe.load("lora-prune")).recipe.to_yaml())
    beside = prunekit.Recipe.load(tmp_path)
    assert beside.learned == "weights"
    for keys, learned in (({"learner": "gisp"}, "groups"), ({"allocator": "uniform"}, None)):
        assert prunekit.resolve(beside.with_overrides(keys)).recipe.learned == learned


@pytest.mark.parametrize("learner", [{"name": "sheared-llama", "loading": "dynamic"}, "dr-pruning"])
def test_weighing_one_data_set_is_refused_before_anything_is_read(folder: Path, learning: Any, learner: Any) -> None:
    with pytest.raises(WrongInput, match=r"weighs data sets, and all text is of .* give several in data"):
        prunekit.prune(folder, **learning(learner=learner))


def test_one_takes_the_place_of_the_other() -> None:
    base = prunekit.Recipe.load()
    learned = base.with_overrides({"learner": "gisp"})
    assert (learned.allocator, learned.learner) == (None, {"name": "gisp"})
    back = learned.with_overrides({"allocator": "uniform"})
    assert (back.allocator, back.learner) == ({"name": "uniform"}, None)
    assert "learner" not in base.to_yaml()
    assert prunekit.Recipe.load("grasprune").allocator is None


def test_the_command_line_plans_and_lists_it(folder: Path) -> None:
    run = CliRunner().invoke(app, ["plan", str(folder), "--learner", "gisp", "--dataset", "python-docs", "--json"])
    assert run.exit_code == 0, run.output
    stages = {stage["name"]: stage for stage in json.loads(run.stdout)["stages"]}
    assert stages["learn"]["flops"] > 0
    assert stages["learn"]["disk"] > 0
    assert "grasprune" in CliRunner().invoke(app, ["list", "--kind", "learner"]).output


def broken(what: str) -> Learner:
    """A learner that breaks its contract."""

    @dataclasses.dataclass(frozen=True)
    class Broken(Learner):
        def learn(self, problem: Any) -> Any:
            gates = torch.ones(problem.groups)
            if what == "shape":
                yield GateQuery(gates[1:])
            if what == "nan":
                yield GateQuery(gates * float("nan"))
            if what == "windows":
                yield GateQuery(gates, (problem.windows,))
            yield GateQuery(gates)
            kept = tuple(tuple(range(site.n_groups)) for site in problem.space.sites)
            return [Decision(kept)] if what == "budget" else [Decision(kept[1:])]

        def effort(self, windows: int, seqlen: int, budgets: int = 1) -> Any:
            return prunekit.Effort(1, windows * seqlen)

    return Broken()


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("shape", "finite gates are asked with"),
        ("nan", "finite gates are asked with"),
        ("windows", "there are 0 to"),
        ("budget", "not feasible under the budget"),
        ("sites", "is no Decision about 2 sites"),
    ],
)
def test_a_broken_learner_is_told(what: str, sentence: str) -> None:
    problem = GateProblem((space_of([3, 6], [2, 1], 0.5),), 4, 8)
    with pytest.raises(PluginError, match=sentence):
        lesson(broken(what), problem, lambda query: GateReply(1.0))


def test_decisions_of_a_family_nest(folder: Path, learning: Any) -> None:
    spaces = tuple(space_of([3, 6], [2, 1], share) for share in (0.8, 0.5, 0.3))
    surface = Surface(noisy(9, 3)[0].abs() + 0.01, noise=noisy(9, 4))
    learned = lesson(LEARNERS.build("gisp"), GateProblem(spaces, 64, 8), surface.answer)
    masks = [mask_of(decision, [3, 6]) for decision in learned.decisions]
    assert all(bool((less <= more).all()) for more, less in pairwise(masks))


@pytest.mark.slow
def test_a_plan_counts_the_copy_that_is_trained_and_its_states(folder: Path) -> None:
    def planned(learner: str, *more: str) -> dict[str, Any]:
        asked = ["plan", str(folder), "--learner", learner, "--dataset", "python-docs", "--json", *more]
        run = CliRunner().invoke(app, asked)
        assert run.exit_code == 0, run.output
        return {stage["name"]: stage for stage in json.loads(run.stdout)["stages"]}

    gates, weights = planned("grasprune", "--set", "learner.steps=256"), planned("sheared-llama")
    adapters = planned("lora-prune", "--set", "learner.rank=1")
    blocks = sum(p.numel() for b in tiny("llama").model.layers for p in b.parameters())
    more = weights["learn"]["memory"] - gates["learn"]["memory"]
    assert more >= (4 + 16) * blocks, "a copy; slopes twice and two moments in float32"
    assert weights["learn"]["disk"] - gates["learn"]["disk"] >= 2 * 3 * 4 * blocks
    assert adapters["learn"]["disk"] < weights["learn"]["disk"]


def test_recovery_goes_on_with_the_shares_of_data_sets_that_the_learner_has_come_to(
    folder: Path, learning: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: Any
) -> None:
    given = list[Any]()
    finish = Distillation.finish
    monkeypatch.setattr(Distillation, "finish", lambda self, piece: given.append(piece) or finish(self, piece))
    second = tmp_path / "numbers.txt"
    second.write_text(numbers(4000))
    learner = {"name": "dr-pruning", "steps": 8, "batch_tokens": 64, "interval": 0.25, "fit": False, "rho": 1.0}
    settings = learning(
        learner=learner, pruner="magnitude", objective="expected-error", carry="dense", rebuild=False,
        finishers={"name": "distillation", "steps": 1}, data__recovery_tokens=512,
    )  # fmt: skip
    settings["data__dataset"] = [settings["data__dataset"], str(second)]
    result = prunekit.prune(folder, output=tmp_path / "out", **settings)
    (piece,) = given
    shares = result.report["learner"]["domains"]
    assert piece.domains == shares
    assert shares.keys() == {*piece.tokens.origins}
    assert sum(shares.values()) == pytest.approx(1)
    assert len({round(share, 3) for share in shares.values()}) == 2, "they have moved apart"
