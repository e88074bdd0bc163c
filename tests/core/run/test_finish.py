"""Finishers at the end of a run: what they add is paid for, what they made is saved, a killed run goes on."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunekit
from prunekit.data.draws import draw
from prunekit.data.tokens import overlap
from prunekit.measure.perplexity import perplexity
from prunekit.plugins.registry import FINISHERS
from prunekit.run.verify import verify_result
from prunekit.system.checkpoints import Checkpoints
from prunekit.system.progress import Progress

TRAINED = [{"name": "reconstruction", "epochs": 2}, {"name": "distillation", "epochs": 2}]
QUICK: dict[str, Any] = {
    "pruner": "wanda",
    "allocator": "uniform",
    "objective": "expected-error",
    "data__dataset": "python-docs",
    "data__calibration_tokens": 1024,
    "data__search_tokens": 512,
    "data__evaluation_tokens": 512,
    "data__recovery_tokens": 1024,  # else as many as training is worth
    "data__seqlen": 32,
    "verify": False,
    "quiet": True,
}


@pytest.fixture(scope="module")
def folder(saved_tiny):
    return saved_tiny(torch.bfloat16)


def in_blocks(model):
    return sum(p.numel() for p in model.model.layers.parameters())


@pytest.mark.parametrize("code", ["import", "bundled"])
def test_biases_are_within_the_budget_and_in_the_model_that_loads(folder, tmp_path, code):
    out = tmp_path / "out"
    prunekit.prune(folder, output=out, code=code, finishers=["bias"], **QUICK | {"verify": code == "import"})
    report = json.loads((out / "report.json").read_text())
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=code == "bundled")
    dense = AutoModelForCausalLM.from_pretrained(folder)
    biases = [p for name, p in loaded.named_parameters() if name.endswith("bias")]
    assert len(biases) == sum(site["kept"] > 0 for site in report["sites"]) > 0
    assert all(p.any() for p in biases)
    assert report["finishers"] == [{"name": "bias", "parameters_added": sum(p.numel() for p in biases)}]
    assert report["budget"]["spent"] <= report["budget"]["limit"]
    assert in_blocks(loaded) == report["pruned"]["block_parameters"] <= in_blocks(dense) // 2
    assert in_blocks(loaded) == sum(site["parameters"] for site in report["sites"])  # priced with their biases
    ids = torch.tensor([[5, 6, 7, 8]])
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    cached, plain = (loaded.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("code", ["import", "bundled"])
def test_maps_beside_mlps_are_within_the_budget_and_in_the_model_that_loads(folder, tmp_path, code):
    out = tmp_path / "out"
    spec = {"name": "linear-patch", "rank": 0.13, "damping": 1e-3}
    prunekit.prune(folder, output=out, code=code, finishers=[spec], **QUICK | {"verify": code == "import"})
    report = json.loads((out / "report.json").read_text())
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=code == "bundled")
    dense = AutoModelForCausalLM.from_pretrained(folder)
    patches = [p for name, p in loaded.named_parameters() if ".mlp.patch." in name]
    added = sum(p.numel() for p in patches)
    assert report["finishers"][0]["parameters_added"] == added == 2 * 2 * 3 * 24
    assert in_blocks(loaded) == report["pruned"]["block_parameters"] <= in_blocks(dense) // 2
    assert in_blocks(loaded) == sum(site["parameters"] for site in report["sites"]) + added
    assert report["budget"]["spent"] <= report["budget"]["limit"]
    assert report["budget"]["limit"] + added == in_blocks(dense) // 2  # what sites may take, and what was set aside
    if code == "import":
        assert verify_result(str(out)).agrees
    ids = torch.tensor([[5, 6, 7, 8]])
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    cached, plain = (loaded.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


def test_a_bias_costs_groups_not_budget(folder):
    plain, biased = (prunekit.prune(folder, finishers=f, **QUICK).report for f in ([], ["bias"]))
    assert plain["budget"]["limit"] == biased["budget"]["limit"]
    assert sum(s["kept"] for s in biased["sites"]) < sum(s["kept"] for s in plain["sites"])


def test_finishers_work_in_turn_in_float32_and_what_is_measured_is_what_is_saved(folder, tmp_path):
    seen = []

    def spied(spec, build=FINISHERS.build):
        finisher = build(spec)
        finish = finisher.finish

        def spy(piece):
            seen.append((spec["name"], next(piece.model.parameters()).dtype))
            return finish(piece)

        object.__setattr__(finisher, "finish", spy)
        return finisher

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FINISHERS, "build", spied)
        out = tmp_path / "out"
        result = prunekit.prune(folder, output=out, finishers=["least-squares", *TRAINED], **QUICK)
    assert seen[-3:] == [(name, torch.float32) for name in ("least-squares", "reconstruction", "distillation")]
    assert [said["name"] for said in result.report["finishers"]] == ["least-squares", "reconstruction", "distillation"]
    losses = result.report["losses"]
    assert losses["pruned"]["perplexity"] != losses["unfinished"]["perplexity"]
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    recipe = prunekit.Recipe.load(out / "recipe.yaml")  # draws the same tokens again
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokens = draw(tokenizer, recipe.data, Progress(), seed=recipe.seed, max_seqlen=64, vocab_size=2048)
    again = perplexity(loaded.float(), tokens.evaluation).value
    assert again == pytest.approx(losses["pruned"]["perplexity"], rel=1e-5)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An uninterrupted run with finishers that train."""
    output = tmp_path_factory.mktemp("whole") / "out"
    prunekit.prune(folder, output=output, finishers=TRAINED, **QUICK)
    return output


@pytest.mark.parametrize(
    "saves",
    [pytest.param(5, id="between sub-layers"), pytest.param(13, id="in the second", marks=pytest.mark.slow)],
)
def test_a_run_killed_while_it_trains_goes_on_to_the_same_bytes(folder, whole, tmp_path, killed_at, saves):
    out = tmp_path / "out"
    with killed_at(Checkpoints, "save", saves, after=True):
        prunekit.prune(folder, output=out, finishers=TRAINED, **QUICK)
    assert any(out.with_name("out.partial").glob("finisher-*/*.safetensors"))
    prunekit.prune(folder, output=out, finishers=TRAINED, **QUICK)
    for name in ("model.safetensors", "recipe.yaml", "config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    one, two = (json.loads((path / "report.json").read_text())["finishers"] for path in (out, whole))
    assert one == two


def test_who_trains_reads_text_that_the_pruner_has_not_seen(folder, tmp_path):
    seen = {}

    def spied(spec, build=FINISHERS.build):
        finisher = build(spec)
        finish = finisher.finish

        def spy(piece):
            seen[spec["name"]] = piece.tokens
            return finish(piece)

        object.__setattr__(finisher, "finish", spy)
        return finisher

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FINISHERS, "build", spied)
        asked = {"finishers": ["bias", *TRAINED], "data__recovery_tokens": 256}
        report = prunekit.prune(folder, output=tmp_path / "out", **QUICK | asked).report
    found = report["data"]
    assert seen["bias"].digest == found["calibration"]["sha256"]
    for name in ("reconstruction", "distillation"):
        assert seen[name].digest == found["recovery"]["sha256"]
        assert seen[name].n_tokens == found["recovery"]["tokens"] == 256
        assert overlap(seen[name], seen["bias"]) == 0


@dataclass(frozen=True)
class Forgetful(prunekit.Finisher):
    """Leave a weight that is no number."""

    def finish(self, piece):
        next(piece.model.parameters()).data[0, 0] = torch.nan
        return {}


def test_a_finisher_that_breaks_its_promise_ends_the_run(folder, monkeypatch):
    monkeypatch.setattr(FINISHERS, "build", lambda _: Forgetful())
    monkeypatch.setattr(FINISHERS, "spec", lambda _: {"name": "least-squares"})
    with pytest.raises(prunekit.PluginError, match="Forgetful left values"):
        prunekit.prune(folder, finishers=["least-squares"], **QUICK)


@dataclass(frozen=True)
class Spoiling(prunekit.Finisher):
    """Does to the dense model, and answers, what it was told."""

    hidden: bool = False

    def finish(self, piece: Any) -> Any:
        weight = next(piece.dense.parameters())
        (weight.data if self.hidden else weight).mul_(2)
        return {}


@dataclass(frozen=True)
class Mute(prunekit.Finisher):
    """Reports nothing, or what no report can hold."""

    said: Any = None

    def finish(self, piece: Any) -> Any:
        return {"tensor": torch.zeros(1)} if self.said is True else self.said


@pytest.mark.parametrize(
    ("finisher", "sentence"),
    [
        (Spoiling(), r"Spoiling changed dense\.\S+, which it was given only to be read"),
        (Spoiling(hidden=True), r"Spoiling changed dense\.\S+, which it was given only to be read"),
        (Mute(), r"Mute: what it reports is None .*, and dict was asked"),
        (Mute(said=True), "Mute: what it reports is not JSON"),
        (Mute(said={"options": 3}), "Mute: the options it reports is 3"),
        (Mute(said={"options": {"epochs": 3}}), "Mute reports options that it does not take: .*'epochs'"),
    ],
)
def test_a_finisher_that_changes_the_dense_model_or_says_nonsense_is_named(finisher, sentence, folder, monkeypatch):
    spec = {"name": "bias"}
    monkeypatch.setattr(type(FINISHERS), "build", lambda self, given: finisher if given == spec else BUILD(self, given))
    monkeypatch.setattr(
        type(FINISHERS), "spec", lambda self, plugin: spec if plugin is finisher else SPEC(self, plugin)
    )
    with pytest.raises(prunekit.PluginError, match=sentence):
        prunekit.prune(folder, finishers=[spec], **QUICK)


BUILD, SPEC = type(FINISHERS).build, type(FINISHERS).spec
