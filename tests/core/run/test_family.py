"""A family is several results for one model opened, one text drawn and one walk a round; alone each is as ordinary."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import prunekit
from prunekit.cli.main import app
from prunekit.errors import CannotGoOn
from prunekit.plugins.registry import OBJECTIVES
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.run import family, session, stages, workplace
from prunekit.search.ledger import Ledger
from prunekit.search.store import CandidateStore

SHARES = [0.4, 0.2]  # in any order
NAMES = ("0.2", "0.4")
FILES = ("model.safetensors", "config.json", "recipe.yaml", "ledger.jsonl", "tokenizer.json")


@pytest.fixture(scope="module")
def searched(quick: Callable[..., Any]) -> dict[str, Any]:
    """A search in two rounds."""
    return quick(last_stride=0.0625, verify=False)


@pytest.fixture(scope="module")
def plain(searched: dict[str, Any]) -> dict[str, Any]:
    """No search."""
    return searched | {"pruner": "magnitude", "allocator": "uniform", "objective": "expected-error"}


@pytest.fixture(scope="module")
def folder(saved_tiny: Any) -> Path:
    return saved_tiny()


@pytest.fixture(scope="module")
def made(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, searched: dict[str, Any]
) -> tuple[Path, prunekit.Family, Counter[str]]:
    """An uninterrupted run, and how often a walk was begun by what it was for."""
    output, walks, build = tmp_path_factory.mktemp("whole") / "out", Counter[str](), stages.build

    def counted(*args: Any, label: str, **kwargs: Any) -> Any:
        walks[label] += 1
        return build(*args, label=label, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "build", counted)
        found = prunekit.prune(folder, output=output, sparsity=SHARES, **searched)
    return output, found, walks


@pytest.fixture(scope="module")
def made_plain(folder: Path, tmp_path_factory: pytest.TempPathFactory, plain: dict[str, Any]) -> Path:
    """An uninterrupted run without a search."""
    output = tmp_path_factory.mktemp("plain") / "out"
    prunekit.prune(folder, output=output, sparsity=SHARES, **plain)
    return output


def content(directory: Path) -> dict[str, bytes]:
    return {f"{name}/{file}": (directory / name / file).read_bytes() for name in NAMES for file in FILES}


def asked(ledger: str) -> list[dict[str, Any]]:
    return [record for record in map(json.loads, ledger.splitlines()) if record["kind"] == "question"]


# -- what comes out -----------------------------------------------------------------------------------


def test_every_member_is_an_ordinary_result_that_loads_alone_and_keeps_its_budget(made, folder):
    output, found, _ = made
    assert sorted(p.name for p in output.iterdir()) == [*NAMES, "files.json", "pareto.json"]
    assert not output.with_name("out.partial").exists()
    dense = AutoModelForCausalLM.from_pretrained(folder)
    blocks = sum(p.numel() for p in dense.model.layers.parameters())
    for name, member in zip(NAMES, found.members, strict=True):
        alone = AutoModelForCausalLM.from_pretrained(output / name).state_dict()
        state = member.model.state_dict()
        assert alone.keys() == state.keys()
        assert all(torch.equal(alone[key], state[key]) for key in state)
        assert sum(p.numel() for p in member.model.model.layers.parameters()) <= blocks * (1 - float(name))
        assert member.report["budget"]["spent"] <= member.report["budget"]["limit"]
        assert {"README.md", "report.json", *FILES} <= {p.name for p in (output / name).iterdir()}


def test_pareto_json_says_what_the_members_say(made):
    output, found, _ = made
    document = json.loads((output / "pareto.json").read_text())
    assert document == found.document
    assert document["schema"] == 1
    for row, member in zip(document["members"], found.members, strict=True):
        report = member.report
        assert (row["folder"], row["sparsity"]) == (str(member.recipe.sparsity), member.recipe.sparsity)
        assert row["sparsity"] <= row["realised"] == report["pruned"]["sparsity_of_blocks"]
        assert row["parameters"] == sum(p.numel() for p in member.model.parameters())
        assert row["perplexity"] == report["losses"]["pruned"]["perplexity"]
        assert row["token_forwards"] == sum(q["tokens"] for q in asked(member.ledger) if "shared" not in q)
        assert 0 < row["seconds"] < sum(report["seconds"].values())
        assert document["label"] == report["losses"]["pruned"]["label"]
    assert document["token_forwards"] == sum(row["token_forwards"] for row in document["members"])
    assert document["seconds"] > sum(row["seconds"] for row in document["members"])


def test_the_front_is_of_members_that_no_other_beats():
    def report(parameters: int, perplexity: float) -> dict[str, Any]:
        losses = {"dense": {"perplexity": 1.0}, "pruned": {"perplexity": perplexity, "label": "ppl"}, "objective": 0.0}
        return {
            "model": "m", "dense": {"parameters": 10}, "losses": losses,
            "seconds": {"a": 2.0}, "seconds_shared": {"a": 1.5},
            "pruned": {"parameters": parameters, "sparsity_of_blocks": 0.5}, "search": {"token_forwards": 3},
            "budget": {"metric": "parameters", "of": "blocks", "sparsity_asked": 0.5, "removed": 0.5},
        }  # fmt: skip

    reports = {"a": report(8, 2.0), "b": report(6, 3.0), "c": report(4, 2.5), "d": report(2, float("inf"))}
    reports["e"] = reports["a"]  # who is as good does not beat
    found = prunekit.Family(family.make_pareto(reports))
    assert [row["folder"] for row in found.front] == ["a", "c", "e"]
    assert (found.document["seconds"], found.document["token_forwards"]) == (5 * 0.5 + 1.5, 15)


# -- what it costs ------------------------------------------------------------------------------------


def test_every_round_is_walked_once_and_every_member_rebuilt_once(made):
    rounds = {"prune 1": 1, "prune 2": 1}
    assert made[2] == rounds | {f"rebuild for {name}": 1 for name in NAMES}


def test_conversations_are_on_their_own_ladders_and_budgets(made):
    spaces = [[r for r in map(json.loads, m.ledger.splitlines()) if r["kind"] == "space"] for m in made[1].members]
    assert [space["walk"] for space in spaces[0]] == [space["walk"] for space in spaces[1]] == [0, 1]
    for small, large in zip(*spaces, strict=True):
        assert small["limit"] > large["limit"]
        assert small["ladders"] != large["ladders"]
        assert [len(row) for row in small["errors"]] == [len(ladder) for ladder in small["ladders"]]


def test_what_one_member_has_learnt_no_other_pays_for(folder, monkeypatch, searched):
    calls, objective = [], type(OBJECTIVES.build({"name": "divergence"}))
    loss = objective.loss

    def counted(self: Any, net: Any, allocation: Any, batch: Any) -> float:
        calls.append((id(net), allocation, batch.n_tokens))
        return loss(self, net, allocation, batch)

    monkeypatch.setattr(objective, "loss", counted)
    around = {"name": "table", "around": "dense", "stride": 0.25, "candidates": 2}
    found = prunekit.prune(folder, sparsity=SHARES, **searched | {"allocator": around})
    first, second = (asked(member.ledger) for member in found.members)
    paid = [q for q in (*first, *second) if "shared" not in q]
    known = {(*q["allocation"], q["tokens"]): q["loss"] for q in first}
    shared = [q for q in second if "shared" in q]
    assert len(shared) >= 1 + 6  # the dense model, and a change of each of its sites
    assert all(known[*q["allocation"], q["tokens"]] == q["loss"] for q in shared)
    assert len({(*q["allocation"], q["tokens"]) for q in paid}) == len(paid)
    assert len(set(calls)) == len(calls) == len(paid) + len(SHARES)  # and each at the end, for its report
    assert found.document["token_forwards"] == sum(q["tokens"] for q in paid)


# -- again, and after an interruption -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("when", ["walk", "second conversation", "second member"])
def test_an_interrupted_family_goes_on_to_the_same_bytes(
    folder, made, tmp_path, killed_at, monkeypatch, when, searched
):
    output, first = tmp_path / "out", asked(made[1].members[0].ledger)
    place, name, last = {
        "walk": (CandidateStore, "put", 6),
        "second conversation": (Ledger, "answer", len([q for q in first if q["walk"] == 0]) + 3),
        "second member": (family, "write_result", 2),
    }[when]
    with killed_at(place, name, last, after=when == "second member"):
        prunekit.prune(folder, output=output, sparsity=SHARES, **searched)
    assert not output.exists()
    written, write = [], family.write_result
    monkeypatch.setattr(family, "write_result", lambda *args: (written.append(args[0].recipe.sparsity), write(*args)))
    again = prunekit.prune(folder, output=output, sparsity=SHARES, **searched)
    assert content(output) == content(made[0])
    assert written == ([0.4] if when == "second member" else [0.2, 0.4])
    assert [row["parameters"] for row in again.rows] == [row["parameters"] for row in made[1].rows]
    assert not output.with_name("out.partial").exists()


@pytest.mark.slow
def test_the_recipe_of_a_member_makes_it_again_to_the_same_bytes(made, tmp_path):
    prunekit.prune(recipe=made[0] / "0.2", output=tmp_path / "again", quiet=True)
    assert {f"0.2/{f}": (tmp_path / "again" / f).read_bytes() for f in FILES}.items() <= content(made[0]).items()


def test_a_family_of_one_is_a_single_run(folder, tmp_path, plain):
    prunekit.prune(folder, output=tmp_path / "single", sparsity=0.4, **plain)
    prunekit.prune(folder, output=tmp_path / "one", sparsity=[0.4], **plain)
    for file in (*FILES, "README.md"):
        assert (tmp_path / "one" / "0.4" / file).read_bytes() == (tmp_path / "single" / file).read_bytes()
    assert "family" not in (tmp_path / "single" / "recipe.yaml").read_text()


def test_a_family_in_memory_is_saved_as_one_with_an_output(folder, tmp_path, plain, made_plain):
    held = prunekit.prune(folder, sparsity=SHARES, **plain)
    saved = held.save(tmp_path / "saved")
    assert content(saved) == content(made_plain)
    there = prunekit.Family(json.loads((saved / "pareto.json").read_text()), saved)
    assert content(there.save(tmp_path / "copy")) == content(saved)
    (saved / "0.2" / "notes.txt").write_text("mine")  # is not copied
    assert content(there.save(tmp_path / "again")) == content(tmp_path / "copy")
    with (saved / "0.2" / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CannotGoOn, match=r"0\.2/model\.safetensors is not what was written when"):
        there.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    (saved / "0.2" / "notes.txt").unlink()
    with pytest.raises(prunekit.WrongInput, match="not empty"):
        held.save(tmp_path / "saved")
    held.save(tmp_path / "saved", overwrite=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"carry": "centre", "rebuild": False},
        {"structure": "weights", "pruner": "wanda", "rebuild": False},
        {"metric": "kv-cache"},
        {"of": "model", "sparsity": [0.02, 0.05]},
        {"apart": True, "finishers": "bias"},
    ],
    ids=str,
)
def test_every_choice_goes_with_a_family(folder, settings, plain):
    found = prunekit.prune(folder, **{"sparsity": SHARES, **plain, **settings})
    rows = found.rows
    assert rows[0]["realised"] < rows[1]["realised"]
    for row, member in zip(rows, found.members, strict=True):
        assert row["sparsity"] <= row["realised"] + 1e-9
        assert member.report["budget"]["spent"] <= member.report["budget"]["limit"]


# -- what is asked for --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"sparsity": [0.3, 0.2, 0.3]}, "sparsity 0.3 is given twice"),
        ({"sparsity": [0.3, 1.2]}, "more than 0 and less than 1, not 1.2"),
        ({"sparsity": []}, "sparsity has no value"),
        ({"sparsity": [0.3, 0.5], "structure": "2:4"}, "structure 2:4 says its own sparsity"),
        ({"sparsity": [0.02, 0.9], "of": "model"}, r"sparsity 0.9 of parameters cannot be met: reachable is 0 to 0"),
        ({"target": "parameters=0.5,0.5"}, "sparsity 0.5 is given twice"),
        ({"target": "parameters=0.5,2"}, "more than 0 and less than 1, not '2'"),
        ({"target": "parameters=0.5,0.7", "sparsity": [0.5]}, "sparsity cannot be given too"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_any_work(folder, monkeypatch, settings, sentence, plain):
    monkeypatch.setattr(session, "opened", None)
    with pytest.raises(prunekit.WrongInput, match=sentence):
        prunekit.prune(folder, **plain | {"pruner": "magnitude"} | settings)


def test_a_recipe_with_another_sparsity_lets_go_of_its_family():
    first = Recipe.load().spread({"target": "flops=0.7,0.6"})
    assert first is not None
    assert (first.sparsity, first.family, first.metric) == (0.3, (0.3, 0.4), "flops")
    assert [member.sparsity for member in first.members] == [0.3, 0.4]
    assert first.with_overrides({"seed": 1}).family == first.family
    assert first.with_overrides({"sparsity": 0.4}).family == ()
    assert resolve(first).digest != resolve(first.with_overrides({"sparsity": 0.3})).digest
    with pytest.raises(prunekit.WrongInput, match=r"this recipe's 0.3 too, ascending, not \[0.4, 0.5\]"):
        resolve(first.with_overrides({"family": [0.4, 0.5]}))


@pytest.mark.parametrize(
    "flags", [("--sparsity", "0.4,0.2"), ("--target", "parameters=0.6,0.8"), ("--set", "sparsity=[0.4, 0.2]")]
)
def test_the_command_prints_the_family(made, monkeypatch, flags):
    asked_for = []

    def fake(recipe: Recipe, _: Any) -> prunekit.Family:
        asked_for.append(recipe)
        return made[1]

    monkeypatch.setattr(family, "family", fake)
    result = CliRunner().invoke(app, ["prune", "m", "-o", "out", *flags])
    assert result.exit_code == 0, result.output
    assert asked_for[0].family == (0.2, 0.4)
    assert all(f"{row['perplexity']:,.2f}" in result.stdout for row in made[1].rows)


def test_only_a_family_of_ours_is_replaced(made, folder, tmp_path, plain):
    shutil.copytree(made[0], tmp_path / "out")
    with pytest.raises(prunekit.WrongInput, match="--overwrite"):
        prunekit.prune(folder, output=tmp_path / "out", sparsity=SHARES, **plain)
    prunekit.prune(folder, output=tmp_path / "out", sparsity=[0.3, 0.4], overwrite=True, **plain)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0.3", "0.4", "files.json", "pareto.json"]


@pytest.mark.parametrize("damage", ["short", "bit", "gone", "list"])
def test_a_member_that_was_damaged_before_the_command_goes_on_is_made_anew(
    folder, tmp_path, plain, made_plain, damage, killed_at
):
    output = tmp_path / "out"
    with killed_at(family, "make_result", 2):
        prunekit.prune(folder, output=output, sparsity=SHARES, **plain)
    member = tmp_path / "out.partial/result/0.2"
    file = member / ("files.json" if damage == "list" else "model.safetensors")
    weights = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "short":
        file.write_bytes(weights[:1000])
    else:
        weights[len(weights) // 2] ^= 1
        file.write_bytes(weights)
    prunekit.prune(folder, output=output, sparsity=SHARES, **plain)
    assert content(output) == content(made_plain)


def test_a_family_that_was_stopped_while_it_tidied_up_is_not_made_again(folder, tmp_path, plain, killed_at):
    with killed_at(workplace, "_clear", 2):  # the first makes the place
        prunekit.prune(folder, output=tmp_path / "out", sparsity=SHARES, **plain)
    assert (tmp_path / "out.partial").exists()
    before = content(tmp_path / "out")
    found = prunekit.prune(folder, output=tmp_path / "out", sparsity=SHARES, **plain)
    assert [row["folder"] for row in found.rows] == ["0.2", "0.4"]
    assert len(found.members) == 2
    assert content(tmp_path / "out") == before
    assert not (tmp_path / "out.partial").exists()
