"""Several shares of the residual width: each is the run that has it alone, the objective decides, a kill makes no
difference."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunekit
from prunekit import WrongInput
from prunekit.models.adapters.find import adapter_for
from prunekit.models.opening import skeleton
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.run.session import make_plan
from prunekit.run.spaces import share_spaces, whole_space
from prunekit.search.ledger import Ledger
from prunekit.testing import tiny

SHARES = (0.0, 0.5, 1.0)
FILES = ("model.safetensors", "config.json", "recipe.yaml", "ledger.jsonl")


@pytest.fixture(scope="module")
def pruned(quick, folder):
    """A run at 50 %, with a search."""

    def run(output: Any = None, share: Any = SHARES, **changes: Any) -> Any:
        width = None if share == 0 else {"name": "minitron", "step": 2, "share": share}
        settings = {
            "width": width, "allocator": {"name": "evolution", "generations": 1, "offspring": 3}, "carry": "dense",
            "data__dataset": str(folder / "text.txt"), "sparsity": 0.5, "verify": False,
        }  # fmt: skip
        return prunekit.prune(folder, output=output, **quick(**settings | changes))

    return run


@pytest.fixture(scope="module")
def chosen(pruned, tmp_path_factory):
    """An uninterrupted run of all shares."""
    output = tmp_path_factory.mktemp("chosen") / "out"
    pruned(output)
    return output


@pytest.fixture(scope="module")
def alone(pruned):
    """The same shares, each in a run of its own."""
    return {share: pruned(share=share) for share in SHARES}


def test_every_share_has_the_loss_of_a_run_with_it_alone_and_the_least_wins(chosen, alone):
    report = json.loads((chosen / "report.json").read_text())
    found = {each["share"]: each for each in report["width"]["shares"]}
    assert [*found] == [*SHARES]
    assert {share: each["loss"] for share, each in found.items()} == {
        share: result.report["losses"]["objective"] for share, result in alone.items()
    }
    assert [each["channels"] for each in found.values()] == [24, 18, 12]
    best = min(SHARES, key=lambda share: found[share]["loss"])
    assert report["width"]["share"] == best
    assert report["losses"]["objective"] == found[best]["loss"]
    for share, each in found.items():
        told = alone[share].report["search"]
        assert (each["questions"], each["token_forwards"]) == (told["questions"], told["token_forwards"])
    assert report["search"]["token_forwards"] == sum(each["token_forwards"] + each["judged"] for each in found.values())
    assert {each["judged"] for each in found.values()} == {512}


def test_the_result_is_that_of_the_run_with_the_best_share_alone(chosen, alone):
    report, model = json.loads((chosen / "report.json").read_text()), AutoModelForCausalLM.from_pretrained(chosen)
    other = alone[report["width"]["share"]]
    state, theirs = model.state_dict(), other.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in state.items())
    for key in ("sites", "pruned", "budget", "dense"):
        assert report[key] == other.report[key], key


@pytest.mark.slow
def test_the_ledger_says_what_each_share_had_and_then_how_the_best_was_found(chosen, alone):
    lines = [json.loads(line) for line in (chosen / "ledger.jsonl").read_text().splitlines()]
    report = json.loads((chosen / "report.json").read_text())
    assert [line["share"] for line in lines[:3]] == [*SHARES]
    assert {line["kind"] for line in lines[:3]} == {"share"}
    theirs = [json.loads(line) for line in alone[report["width"]["share"]].ledger.splitlines()]
    plain = [[{**line, "check": None} for line in some] for some in (lines[3:], theirs)]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("last", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (6, 11))])
def test_an_interrupted_run_goes_on_to_the_same_bytes(chosen, pruned, tmp_path, killed_at, last):
    """In the first search, in the last, and when the width was chosen and its records are taken over."""
    place = (Ledger, "answer", last) if last < 11 else (Ledger, "note", 11)
    with killed_at(*place):
        pruned(tmp_path / "out")
    pruned(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing of the work is left"
    for file in FILES:
        assert (tmp_path / "out" / file).read_bytes() == (chosen / file).read_bytes(), file


def test_reports_and_cards_say_which_share_won(chosen):
    report = json.loads((chosen / "report.json").read_text())
    card = (chosen / "README.md").read_text()
    assert "| share of the width | channels | loss | token-forwards |" in card
    for each in report["width"]["shares"]:
        mark = " (taken)" if each["share"] == report["width"]["share"] else ""
        assert f"| {each['share']:g}{mark} | {each['channels']} |" in card


# -- integers -------------------------------------------------------------------------------------------


def parts_of(share: Any, **changes: Any):
    settings = {"width": {"name": "minitron", "step": 2, "share": share}, "objective": "divergence", **changes}
    return resolve(Recipe.load("default").with_overrides(settings))


@pytest.mark.parametrize("of", ["blocks", "model"])
def test_all_shares_have_the_budget_of_the_dense_model(of):
    model, adapter = tiny("mistral", tie_word_embeddings=True), adapter_for("mistral")
    parts = parts_of([0, 0.25, 0.5, 1], sparsity=0.4, of=of)
    plain = whole_space(parts.with_share(0), model, adapter, torch.float64)
    found = share_spaces(parts, model, adapter, torch.float64)
    assert found[0].space == plain == whole_space(parts, model, adapter, torch.float64)
    for each in found:
        budget = each.space.budget
        assert budget.limit + budget.outside == plain.budget.limit + plain.budget.outside
        assert budget.dense == plain.budget.dense
    assert sorted((each.width for each in found), reverse=True) == [each.width for each in found]


def test_two_shares_of_one_width_are_searched_once_and_auto_leaves_out_what_cannot_be():
    model, adapter = tiny("mistral"), adapter_for("mistral")
    found = share_spaces(parts_of([0, 0.01, 0.02, 1], sparsity=0.4), model, adapter, torch.float64)
    assert [each.share for each in found] == [0, 0.01, 1], "a step of channels is more than 2 % of what goes"
    hard = {"sparsity": 0.95}  # 2 of 24 channels leave a twelfth
    left = share_spaces(parts_of("auto", **hard), model, adapter, torch.float64)
    assert 1 not in [each.share for each in left]
    with pytest.raises(WrongInput, match="cannot be met by the residual width"):
        share_spaces(parts_of([0, 1], **hard), model, adapter, torch.float64)


def test_the_limit_of_the_search_is_divided():
    parts = parts_of([0, 0.5, 1], search_budget=1000)
    assert parts.with_share(0.5, 3).recipe.search_budget == 333
    assert parts.with_share(0, 3).width is parts.with_share(0, 3).recipe.width is None


def test_a_plan_counts_every_search_and_one_result(folder):
    def planned(share: Any):
        over = {"model": str(folder), "allocator": {"name": "evolution", "generations": 2, "offspring": 4}}
        return make_plan(resolve(parts_of(share, **over).recipe), *skeleton(str(folder)), None, rehearse=True)

    both, single = planned([0.5, 1]), {share: planned(share) for share in (0.5, 1)}
    stages = {stage.name: stage for stage in both.stages}
    for share, plan in single.items():
        for stage in plan.stages:
            if stage.name.startswith(("search", "prune")):
                assert stages[f"{stage.name} at share {share:g}"].flops == stage.flops
    assert {"judge share 0.5", "judge share 1"} <= stages.keys()
    assert [stage.name for stage in both.stages].count("export") == 1
    assert both.least == max(plan.least for plan in single.values())


# -- sentences ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "expected-error"}, "reads no text, so that it cannot compare models of several widths"),
        ({"time": "1h"}, "time is shared out to one search"),
        ({"share": [0.5]}, "several shares are two or more, ascending"),
        ({"share": [0.5, 0.25]}, "several shares are two or more, ascending"),
        ({"share": [0.5, 2]}, "several shares are two or more, ascending"),
        ({"share": "some"}, "share"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(pruned, tmp_path, changes, message):
    with pytest.raises(WrongInput, match=message):
        pruned(tmp_path / "out", **changes)
    assert not list(tmp_path.iterdir())


def test_a_recipe_says_several_shares_as_it_reads_them(chosen):
    recipe = Recipe.load(chosen)
    assert recipe.width == {"name": "minitron", "step": 2, "share": [0.0, 0.5, 1.0]}
    assert resolve(recipe).shares == SHARES
    assert Path(chosen / "recipe.yaml").read_text() == recipe.to_yaml()
