"""What is learnt from searches of a few budgets is saved, gone on with when it was killed, and prunes at any other."""

import json

import pytest
from typer.testing import CliRunner

import prunekit
from prunekit.cli.main import app
from prunekit.errors import WrongInput
from prunekit.recipe.schema import Recipe
from prunekit.run import learn_budgets as learning
from prunekit.run.family import Family
from prunekit.run.family import family as make_family
from prunekit.run.session import Job
from prunekit.system.files import changed
from prunekit.system.progress import Progress

SHARES = [0.2, 0.4, 0.6]
FILES = ("learnt.json", "learnt.safetensors", "searches.json")
LOP = {"name": "lop", "simulations": 4, "tokens": 64, "epochs": 3, "width": 16, "layers": 1, "heads": 2, "grid": 5}


@pytest.fixture(scope="module")
def recipe(saved_tiny):
    tokens = {f"data.{part}_tokens": 512 for part in ("calibration", "search", "evaluation")}
    changes = {"model": str(saved_tiny()), "sparsity": SHARES, "allocator": LOP, "data.seqlen": 32, **tokens}
    return Recipe.load("lop").spread(changes)


@pytest.fixture(scope="module")
def learnt(recipe, tmp_path_factory):
    return learning.learn_budgets(recipe, Job(output=tmp_path_factory.mktemp("learn") / "budgets"))


def test_a_folder_holds_what_was_learnt_and_from_what(learnt, recipe):
    assert sorted(path.name for path in learnt.iterdir()) == sorted([*FILES, "files.json"])
    said = json.loads((learnt / "searches.json").read_text())
    assert said["sparsity"] == SHARES
    assert said["token_forwards"] > 0
    limits = [each["limit"] for each in said["best"]]
    assert limits == sorted(limits)
    facts = json.loads((learnt / "learnt.json").read_text())
    assert len(facts["budgets"]) == 3
    assert facts["pairs"] == 5  # a table was fitted: searches say what they were given


@pytest.mark.slow
def test_a_budget_that_was_never_searched_costs_no_question(learnt, recipe):
    changes = {"sparsity": 0.5, "family": [], "allocator": {"name": "lop", "model": str(learnt)}, "verify": False}
    result = prunekit.prune(recipe=recipe.with_overrides(changes), quiet=True)
    assert result.report["search"]["questions"] == 0
    assert result.report["pruned"]["block_parameters"] <= 0.5 * result.report["dense"]["block_parameters"]


def test_a_killed_run_ends_in_the_same_bytes(learnt, recipe, tmp_path, monkeypatch):
    job = Job(output=tmp_path / "budgets")
    with monkeypatch.context() as patch:
        patch.setattr(learning, "publish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            learning.learn_budgets(recipe, job)
    assert not (tmp_path / "budgets").exists()
    learning.learn_budgets(recipe, job)
    for name in FILES:
        assert (tmp_path / "budgets" / name).read_bytes() == (learnt / name).read_bytes()


def test_what_cannot_learn_says_so_before_any_work(recipe, tmp_path):
    with pytest.raises(WrongInput, match="does not learn"):
        learning.learn_budgets(recipe.with_overrides({"allocator": "uniform"}), Job(output=tmp_path / "b"))
    assert not list(tmp_path.iterdir())
    learner = recipe.with_overrides({"learner": "gisp"})
    with pytest.raises(WrongInput, match="the recipe has a learner; give an allocator"):
        learning.learn_budgets(learner, Job(output=tmp_path / "out"))


def test_one_budget_and_no_folder_are_refused_on_the_command_line(recipe):
    for arguments, said in (["-o", "x", "--sparsity", "0.5"], "several by comma"), ([], "no --output"):
        done = CliRunner().invoke(app, ["learn-budgets", str(recipe.model), *arguments])
        assert done.exit_code == 2
        assert said in done.stderr


@pytest.fixture(scope="module")
def family(recipe, tmp_path_factory):
    """A family whose allocator learns, on the command line."""
    output = tmp_path_factory.mktemp("family") / "family"
    options = [f"--set={key}={value}" for key, value in {
        **{f"allocator.{key}": value for key, value in LOP.items() if key != "name"},
        **{f"data.{part}_tokens": 512 for part in ("calibration", "search", "evaluation")},
        "data.seqlen": 32, "verify": False,
    }.items()]  # fmt: skip
    arguments = ["--recipe", "lop", "--sparsity", "0.2,0.4,0.6", "-o", str(output), "--no-page", *options]
    done = CliRunner().invoke(app, ["prune", str(recipe.model), *arguments])
    assert done.exit_code == 0, done.stderr
    return output, done.stdout


@pytest.mark.slow
def test_a_family_whose_allocator_learns_has_beside_it_what_answers_any_other_target(family, learnt, recipe):
    output, said = family
    assert f"--set allocator.model={output / 'budgets'}" in said
    assert json.loads((output / "pareto.json").read_text())["budgets"] == "budgets"
    for name in ("learnt.json", "learnt.safetensors"):  # the same searches, and the same bytes
        assert (output / "budgets" / name).read_bytes() == (learnt / name).read_bytes()
    changes = {"sparsity": 0.5, "family": [], "allocator": {"name": "lop", "model": str(output / "budgets")}}
    result = prunekit.prune(recipe=recipe.with_overrides(changes | {"verify": False}), quiet=True)
    assert result.report["search"]["questions"] == 0


def test_a_copy_of_a_family_has_what_was_learnt(family, tmp_path):
    output, _ = family
    assert not changed(output)
    copied = Family(json.loads((output / "pareto.json").read_text()), output).save(tmp_path / "copy")
    assert (copied / "budgets" / "learnt.json").read_bytes() == (output / "budgets" / "learnt.json").read_bytes()


@pytest.mark.slow
def test_a_family_of_two_is_made_and_says_that_it_teaches_nothing(recipe, tmp_path):
    lines = []

    class Heard(Progress):
        def say(self, line):
            lines.append(line)

    two = recipe.spread({"sparsity": [0.2, 0.4], "verify": False})
    made = make_family(two, Job(output=tmp_path / "two", progress=Heard()))
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["0.2", "0.4", "files.json", "pareto.json"]
    assert "budgets" not in made.document
    assert any("too few to learn from" in line for line in lines)
