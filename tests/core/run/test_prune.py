"""The whole flow on a tiny model: it prunes, resumes, refuses, and what it saves loads."""

import copy
import json
import os
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunekit
from prunekit.models.opening import fingerprint
from prunekit.recipe.schema import Recipe
from prunekit.run import results, workplace
from prunekit.run.workplace import LOCK
from prunekit.search.ledger import Ledger
from prunekit.search.store import CandidateStore
from prunekit.system.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def folder(saved_tiny):
    return saved_tiny()


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory, quick):
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "out"
    prunekit.prune(folder, output=output, **quick())
    return output


def test_what_is_saved_loads_and_meets_its_budget(whole, folder):
    report = json.loads((whole / "report.json").read_text())
    small, dense = (AutoModelForCausalLM.from_pretrained(path) for path in (whole, folder))
    count = {name: sum(p.numel() for p in m.parameters()) for name, m in (("small", small), ("dense", dense))}
    blocks = sum(p.numel() for p in dense.model.layers.parameters())
    kept = sum(p.numel() for p in small.model.layers.parameters())
    assert kept <= blocks // 2
    assert report["pruned"] == {
        "parameters": count["small"],
        "block_parameters": kept,
        "sparsity_of_blocks": (blocks - kept) / blocks,
        "sparsity_of_model": (count["dense"] - count["small"]) / count["dense"],
    }
    assert report["budget"]["spent"] <= report["budget"]["limit"]
    assert not whole.with_name("out.partial").exists()
    assert {"recipe.yaml", "report.json", "ledger.jsonl", "README.md", "config.json"} <= {
        p.name for p in whole.iterdir()
    }


def test_the_recipe_beside_a_result_runs_again_to_the_same_bytes(whole, tmp_path, content):
    prunekit.prune(recipe=whole / "recipe.yaml", output=tmp_path / "again", quiet=True)
    assert content(tmp_path / "again") == content(whole)


@pytest.mark.parametrize(
    "when", ["save", *(pytest.param(w, marks=pytest.mark.slow) for w in ("walk", "search", "rebuild"))]
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(folder, whole, tmp_path, killed_at, when, quick, content):
    place, name, last = {
        "walk": (CandidateStore, "put", 4),
        "search": (Ledger, "answer", 5),
        "rebuild": (CandidateStore, "put", 9),
        "save": (results, "prove", 1),
    }[when]
    with killed_at(place, name, last):
        prunekit.prune(folder, output=tmp_path / "out", **quick())
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists()
    prunekit.prune(folder, output=tmp_path / "out", **quick())
    assert content(tmp_path / "out") == content(whole)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", ["gradients", "fisher"])
def test_a_backward_pass_that_is_interrupted_goes_on_to_the_same_bytes(
    folder, tmp_path, killed_at, quick, content, name
):
    pruner, table = ("gradient", "errors") if name == "gradients" else ("obs", "fisher")
    objective = {"name": "expected-error", "table": table}
    settings = quick(pruner=pruner, allocator={"name": "table", "table": table}, objective=objective, verify=False)
    prunekit.prune(folder, output=tmp_path / "whole", **settings)
    with killed_at(Checkpoints, "save", 2):
        prunekit.prune(folder, output=tmp_path / "out", **settings)
    left = sorted((tmp_path / "out.partial").glob(f"{name}-*/*"))
    assert [p.name for p in left] == ["block-2.json", "block-2.safetensors"]
    flipped = bytearray(left[1].read_bytes())
    flipped[-1] ^= 1
    left[1].write_bytes(flipped)  # it is made anew
    prunekit.prune(folder, output=tmp_path / "out", **settings)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_second_data_set_reaches_the_pruner_and_the_report(folder, tmp_path, quick):
    second = tmp_path / "second.txt"
    second.write_text("A quiet text that says one thing again and again. " * 500, encoding="utf-8")
    plain = {"allocator": "uniform", "objective": "expected-error", "verify": False}
    settings = {"pruner": "safety-potential", **plain}
    with pytest.raises(
        prunekit.WrongInput, match=r"'safety-potential' compares two data sets.*data\.contrast_dataset="
    ):
        prunekit.prune(folder, **quick(**settings))
    result = prunekit.prune(folder, **quick(**settings, data__contrast_dataset=str(second)))
    assert result.report["data"]["contrast"]["tokens"] == 512
    state, other = (
        result.model.state_dict(),
        prunekit.prune(folder, **quick(**plain, pruner="wanda")).model.state_dict(),
    )
    assert any(not torch.equal(state[name], other[name]) for name in state)


def test_another_recipe_does_not_go_on_with_an_unfinished_run(folder, tmp_path, killed_at, quick):
    with killed_at(Ledger, "answer", 1):
        prunekit.prune(folder, output=tmp_path / "out", **quick())
    with pytest.raises(prunekit.WrongInput, match=r"unfinished run \(another seed\)"):
        prunekit.prune(folder, output=tmp_path / "out", **quick(seed=1))
    prunekit.prune(folder, output=tmp_path / "out", overwrite=True, **quick(seed=1))


def test_a_run_that_was_stopped_while_it_tidied_up_is_not_made_again(folder, tmp_path, quick, killed_at):
    with killed_at(workplace, "_clear", 2):  # the first makes the place
        prunekit.prune(folder, output=tmp_path / "out", **quick(allocator="uniform", rebuild=False))
    written = (tmp_path / "out/report.json").read_bytes()
    found = prunekit.prune(folder, output=tmp_path / "out", **quick(allocator="uniform", rebuild=False))
    assert found.directory == tmp_path / "out"
    assert (tmp_path / "out/report.json").read_bytes() == written
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(prunekit.WrongInput, match="not empty"):
        prunekit.prune(folder, output=tmp_path / "out", **quick(allocator="uniform", rebuild=False))


def test_two_runs_do_not_share_an_output(folder, tmp_path, quick):
    (tmp_path / "out.partial").mkdir()
    with FileLock(tmp_path / "out.partial" / LOCK), pytest.raises(prunekit.WrongInput, match="another process"):
        prunekit.prune(folder, output=tmp_path / "out", **quick())


def test_a_model_in_memory_stays_as_it_is(folder, tmp_path, whole, quick):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    before = fingerprint(model)
    result = prunekit.prune(model, tokenizer, **quick())
    assert fingerprint(model) == before
    assert result.directory is None
    saved = result.save(tmp_path / "saved")
    assert (saved / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    with pytest.raises(prunekit.WrongInput, match="not empty"):
        result.save(tmp_path / "saved")


def test_a_pruned_model_can_be_pruned_again(whole, tmp_path, quick):
    result = prunekit.prune(whole, output=tmp_path / "twice", **quick(allocator="uniform", sparsity=0.2))
    ids = torch.randint(3, 2000, (1, 8))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    torch.testing.assert_close(again(ids).logits, result.model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"allocator": "uniform", "heads": "query"},
        {"allocator": "uniform", "rebuild": False},
        {"allocator": "softmax", "objective": "expected-error", "carry": "dense"},
        {"allocator": "softmax", "objective": "perplexity", "carry": "centre", "rebuild": False},
        {"allocator": "uniform", "metric": "flops"},
        {"allocator": "uniform", "metric": "bytes", "apart": True},
        {"allocator": "uniform", "of": "model", "sparsity": 0.05},
        {"allocator": "uniform", "pruner": {"name": "obs", "aim": "stream"}},
        {"allocator": "uniform", "pruner": "magnitude", "sparsity": 0.9},
    ],
    ids=str,
)
def test_every_choice_runs_and_verifies(folder, settings, quick):
    result = prunekit.prune(folder, **quick(**settings))
    assert result.report["budget"]["spent"] <= result.report["budget"]["limit"]
    ids = torch.randint(3, 2000, (2, 8))
    assert torch.isfinite(result.model(ids).logits).all()


@pytest.mark.slow
def test_several_data_sets_are_judged_robustly_and_reported_apart(folder, tmp_path, quick):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name} by {name} and so on, " * 400)
    texts = [str(tmp_path / "one.txt"), {"dataset": str(tmp_path / "two.txt"), "weight": 2}]
    settings = quick(data__dataset=texts, objective="robust", allocator={"name": "evolution", "generations": 1})
    result = prunekit.prune(folder, output=tmp_path / "out", **settings)
    assert result.report["losses"]["pruned"]["label"].startswith("ppl/one+two/")
    apart = result.report["losses"]["nll_by_source"]
    assert set(apart) == {"one", "two"}
    whole = result.report["losses"]["pruned"]["nll"]
    assert min(a["pruned"] for a in apart.values()) <= whole <= max(a["pruned"] for a in apart.values())
    assert {"calibration/one", "search/two"} < (result.recipe.data.digests or {}).keys()
    again = prunekit.prune(recipe=Recipe.load(tmp_path / "out" / "recipe.yaml"), quiet=True)
    assert again.ledger == result.ledger


def test_questions_judge_allocations(folder, tmp_path, quick):
    rows = [{"prompt": f"{i} and {i} is", "choices": [f"{2 * i}", f"{i}", "nothing"], "answer": 0} for i in range(20)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    there = {"data__search_dataset": str(tmp_path / "sums.jsonl")}
    with pytest.raises(prunekit.WrongInput, match="judges on running text"):
        prunekit.prune(folder, **quick(**there))
    result = prunekit.prune(folder, **quick(**there, objective="task"))
    ledger = [json.loads(line) for line in result.ledger.splitlines()]
    assert {q["loss"] > 0 for q in ledger if q["kind"] == "question"} == {True}
    assert result.report["data"]["search"]["source"] == "sums"


def test_weights_that_are_not_finite_are_refused(folder, tmp_path, quick):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(prunekit.WrongInput, match=r"layers\.1\.mlp\.up_proj\.weight holds values that are not finite"):
        prunekit.prune(model, AutoTokenizer.from_pretrained(folder), **quick())


def test_a_budget_that_cannot_be_met_says_what_can(folder, quick):
    with pytest.raises(prunekit.WrongInput, match="reachable is 0 to 0"):
        prunekit.prune(folder, **quick(of="model", sparsity=0.9))


def test_the_seed_is_all_the_randomness_there_is(folder, whole):
    recipe = Recipe.load(whole / "recipe.yaml")
    torch.manual_seed(123)
    again = prunekit.prune(recipe=copy.deepcopy(recipe), quiet=True)
    assert again.ledger == (whole / "ledger.jsonl").read_text()


@pytest.mark.parametrize(
    ("pruner", "allocator", "record"),
    [
        ("magnitude", {"name": "tyr", "inner": "owl", "last_stride": 0.125}, "signals"),
        ("magnitude", "global-rank", "scores"),
    ],
    ids=["a signal inside tyr", "scores"],
)
def test_what_an_allocator_asks_for_is_measured_recorded_and_resumed(
    folder, tmp_path, monkeypatch, pruner, allocator, record, quick
):
    options = quick(pruner=pruner, allocator=allocator, objective="expected-error", verify=False)
    first = prunekit.prune(folder, **options)
    spaces = [line for line in map(json.loads, first.ledger.splitlines()) if line["kind"] == "space"]
    assert all(space[record] for space in spaces)
    if record == "signals":
        assert all(len(row) == len(space["sites"]) for space in spaces for row in space["signals"])

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "answer", killed)
        with pytest.raises(KeyboardInterrupt):
            prunekit.prune(folder, output=tmp_path / "out", **options)
    assert prunekit.prune(folder, output=tmp_path / "out", **options).ledger == first.ledger


def test_a_result_that_stays_in_memory_is_compared_with_what_was_judged(folder, monkeypatch, quick):
    made = results.hf.to_transformers

    def lossy(*args: Any) -> Any:
        small = made(*args)
        small.lm_head.weight = torch.nn.Parameter(small.lm_head.weight + 1, requires_grad=False)
        return small

    monkeypatch.setattr(results.hf, "to_transformers", lossy)
    settings = quick(pruner="magnitude", allocator="uniform", objective="expected-error")
    with pytest.raises(prunekit.errors.CannotGoOn, match=r"logits differ by .* from those of the network"):
        prunekit.prune(folder, **settings)


def test_what_is_written_has_the_permissions_of_the_user_and_the_tokenizer_model(saved_tiny, tmp_path, quick):
    source = saved_tiny()
    (source / "tokenizer.model").write_bytes(b"pieces")
    settings = quick(pruner="magnitude", allocator="uniform", objective="expected-error")
    old = os.umask(0o027)
    try:
        prunekit.prune(source, output=tmp_path / "out", **settings)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()} == {0o640}
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"
