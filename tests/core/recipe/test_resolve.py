"""Plug-ins are built once and checked against each other; what does not go together is one sentence."""

from collections import Counter
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import prunekit
from prunekit.data.spec import DataSpec
from prunekit.errors import WrongInput
from prunekit.plugins.pruner import LocalPruner
from prunekit.plugins.registry import ALLOCATORS, FINISHERS, OBJECTIVES, PRUNERS, Entry
from prunekit.recipe.presets import presets
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.testing.spaces import sites_of, timed
from prunekit_corner import Descent, LeaveOneOut, Volume, WorstSite
from prunekit_strategies.metrics.latency import Latency

CORNER = {"pruner": "leave-one-out", "allocator": "descent", "objective": "worst-site", "finisher": "volume"}
SMALL: dict[str, Any] = {
    "data__dataset": "python-docs",
    "data__calibration_tokens": 256,
    "data__search_tokens": 256,
    "data__evaluation_tokens": 256,
    "data__seqlen": 32,
    "verify": False,
    "quiet": True,
}


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_names_parts_that_exist(name: str) -> None:
    assert resolve(Recipe.load(name)).recipe.pruner["name"]


@pytest.mark.parametrize(
    ("name", "of_32"), [("lora-prune", (3, 1)), ("llm-pruner", (4, 2)), ("shortened-llama", (4, 2))]
)
def test_presets_spare_the_share_of_blocks_that_their_papers_do(name: str, of_32: tuple[int, int]) -> None:
    spare = Recipe.load(name).spare
    assert spare.of(32) == of_32
    assert sum(spare.of(8)) <= 2, "a small model has most of its blocks to prune"


def test_the_digest_is_of_what_makes_the_weights(recipe: Recipe) -> None:
    same = recipe.with_overrides({"device": "cuda", "verify": False, "code": "bundled"})
    other = recipe.with_overrides({"damping": 0.02})
    complete = resolve(recipe).recipe
    assert resolve(recipe).digest == resolve(complete).digest == resolve(same).digest != resolve(other).digest


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"sparsty": 0.5}, "no recipe key 'sparsty'; did you mean 'sparsity'?"),
        ({"data.seqln": 8}, "no recipe key 'data.seqln'; did you mean 'data.seqlen'?"),
        ({"data.seqlen.more": 8}, "no recipe key 'seqlen.more'"),
        ({"data": {"seqln": 8}}, "no recipe key 'data.seqln'; did you mean 'data.seqlen'?"),
        ({"data": 3}, "data: "),
        ({"pruner": "obz"}, "no pruner 'obz'; did you mean 'obs'? there are "),
        ({"pruner": ["obs"]}, "pruner: "),
        ({"pruner": {"aim": "dense"}}, "a pruner is given by its name"),
        ({"pruner": {"name": "obs", "aime": "dense"}}, "no option of pruner 'obs' 'aime'; did you mean 'aim'?"),
        ({"pruner.aime": "dense"}, "no option of pruner 'obs' 'aime'; did you mean 'aim'?"),
        (
            {"pruner.aim.more": "dense"},
            "pruner 'obs': no aim {'name': 'stream', 'more': 'dense'}; there are own, dense, stream",
        ),
        ({"pruner": Recipe}, "pruner: input should be a valid dictionary"),
        (
            {"allocator": "tyr", "allocator.inner.generation": 3},
            "no option of allocator 'evolution' 'generation'; did you mean",
        ),
        ({"allocator": "tyr", "allocator.inner": "evolutoin"}, "no allocator 'evolutoin'; did you mean 'evolution'?"),
        ({"finishers": ["biass"]}, "no finisher 'biass'; did you mean 'bias'"),
        ({"sparsity": 0}, "sparsity is the share that is removed, more than 0 and less than 1, not 0"),
        ({"sparsity": 1.0}, "more than 0 and less than 1, not 1.0"),
        ({"sparsity": -0.5}, "more than 0 and less than 1, not -0.5"),
        ({"sparsity": "half"}, "sparsity: input should be a valid number"),
        ({"structure": "rows"}, "no structure 'rows'; there are groups, weights, low-rank, and patterns N:M that"),
        ({"structure": "4:2"}, "no structure '4:2'; there are groups, weights, low-rank, and patterns N:M"),
        ({"structure": "weights"}, "pruner 'obs' does not know structure weights; it knows groups"),
        ({"structure": "2:4"}, "pruner 'obs' does not know structure n:m; it knows groups"),
        ({"carry": "dens"}, "carry is one of 'dense', 'centre' or 'expected', not 'dens'"),
        ({"metric": "joules"}, "no metric 'joules'; there are bytes, flops"),
        ({"data.calibration_tokens": 0}, "data.calibration_tokens: input should be greater than 0, not 0"),
        ({"data.dataset": "gone.txt"}, "no file 'gone.txt'"),
        ({"data.evaluation_dataset": "gone.jsonl"}, "no file 'gone.jsonl'"),
        ({"data.dataset": "wikitext-2"}, "did you mean 'wikitext2'?"),
        ({"version": 2}, "version is one of 1, not 2"),
        (
            {"data.dataset": [{"dataset": "c4", "wieght": 2}]},
            "no recipe key 'data.dataset.0.wieght'; did you mean 'data.dataset.0.weight'?",
        ),
        ({"data.dataset": ["c4", {"dataset": "wikitext2", "weight": 0}]}, "data.dataset.1.weight: input should be"),
        ({"data.dataset": []}, "data.dataset: "),
        ({"data.dataset": ["c4", "gone.txt"]}, "no file 'gone.txt'"),
        ({"finishers.bias.inputs": "dense"}, "no finisher of this recipe 'bias'; there are none"),
        (
            {"finishers": "bias", "finishers.bias.input": 1},
            "no option of finisher 'bias' 'input'; did you mean 'inputs'",
        ),
        ({"pruner": "wanda", "structure": "2:4", "sparsity": 0.6}, "structure 2:4 removes 0.5 of the weights"),
        ({"pruner": "wanda", "structure": "2:4", "of": "model"}, "leave sparsity and of away"),
        ({"pruner": "wanda", "structure": "weights", "apart": True}, "it goes with structure groups"),
        (
            {"pruner": "wanda", "structure": "weights", "allocator": "block-influence"},
            "signal 'influence' is of whole sub-layers",
        ),
        (
            {"finishers": ["linear-patch", "least-squares"]},
            "'linear-patch' puts linear maps beside MLPs, at which 'least-squares' behind it does not look; let it",
        ),
        (
            {"finishers": ["linear-patch"], "metric": "latency"},
            "what finisher 'linear-patch' adds has no price in latency, which is measured on the dense model",
        ),
        (
            {"finishers": ["linear-patch"], "exporters": ["gguf"]},
            "exporter 'gguf' cannot write the linear maps of low rank that finisher 'linear-patch' puts beside MLPs",
        ),
        (
            {"pruner": "wanda", "structure": "weights", "finishers": ["lora"]},
            "finisher 'lora' does not know structure weights",
        ),
        ({"target": "latency=0.6", "structure": "weights", "pruner": "wanda"}, "latency goes with structure groups"),
    ],
)
def test_wrong_values_are_one_sentence(recipe: Recipe, overrides: dict[str, object], sentence: str) -> None:
    with pytest.raises(WrongInput) as caught:
        resolve(recipe.with_overrides(overrides))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scores_are_asked_of_pruners_that_have_them(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    ranked = recipe.with_overrides({"allocator": "global-rank"})
    resolve(ranked)
    monkeypatch.setattr(type(PRUNERS.build("obs")), "scores", LocalPruner.scores)
    with pytest.raises(WrongInput, match="'global-rank' ranks groups by the pruner's scores, and pruner 'obs'"):
        resolve(ranked)


def test_the_workload_has_no_say_where_nothing_is_timed() -> None:
    plain = Recipe.load()
    assert resolve(plain.with_overrides({"latency.prompt": 8})).digest == resolve(plain).digest
    table = timed(sites_of(2, attention=(4, 10), mlp=(16, 3))).as_dict()
    assert resolve(plain.with_overrides({"latency.prices": table})).recipe.latency.prices is None
    fast = plain.with_overrides({"target": "latency=0.5"})
    assert resolve(fast).digest != resolve(fast.with_overrides({"latency.prompt": 8})).digest


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each plug-in of the package in tests/plugin was built, which is registered for the test."""
    counts = Counter[str]()
    plugins = [(PRUNERS, LeaveOneOut), (ALLOCATORS, Descent), (OBJECTIVES, WorstSite), (FINISHERS, Volume)]
    for registry, found in plugins:
        name = CORNER[registry.kind]
        point = EntryPoint(name, f"prunekit_corner:{found.__name__}", registry.group)
        monkeypatch.setitem(registry._entries, name, Entry(registry.kind, name, "prunekit", point))

        def counted(self: object, *args: object, init=found.__init__, name: str = name, **options: object) -> None:
            counts[name] += 1
            init(self, *args, **options)

        monkeypatch.setattr(found, "__init__", counted)
    return counts


@pytest.mark.parametrize("sparsity", [0.5, [0.3, 0.5]], ids=["alone", "family"])
def test_a_run_builds_every_plugin_once(
    built: Counter[str], saved_tiny: Callable[..., Path], tmp_path: Path, sparsity: float | list[float]
) -> None:
    corner: dict[str, Any] = {key: value for key, value in CORNER.items() if key != "finisher"}
    options = {"allocator": {"name": "descent", "steps": 1}, "finishers": ["volume"], "sparsity": sparsity}
    prunekit.prune(saved_tiny(), output=tmp_path / "out", **corner | options | SMALL)
    assert built == dict.fromkeys(CORNER.values(), 1)


def test_parts_are_what_the_complete_recipe_names(built: Counter[str], recipe: Recipe) -> None:
    options = {"pruner": {"name": "leave-one-out", "refit": False}, "allocator": "descent", "finishers": "volume"}
    parts = resolve(recipe.with_overrides(options))
    assert parts.recipe.pruner == {"name": "leave-one-out", "refit": False}
    assert parts.recipe.allocator == {"name": "descent", "steps": 100}  # written out
    assert (parts.pruner, parts.allocator) == (LeaveOneOut(refit=False), Descent())
    assert (parts.finishers, parts.needs) == ((Volume(),), LeaveOneOut().needs)
    family = resolve(recipe.with_overrides({"sparsity": 0.2, "family": [0.2, 0.4]}))
    assert [member.recipe.sparsity for member in family.members] == [0.2, 0.4]
    assert all(member.pruner is family.pruner for member in family.members)


def test_what_the_sensitivity_metrics_read_is_needed(recipe: Recipe) -> None:
    parts = resolve(recipe.with_overrides({"allocator": "owl", "pruner": "wanda"}))
    assert [type(signal).__name__ for signal in parts.signals] == ["Outliers"]
    assert parts.needs == parts.pruner.needs | parts.signals[0].needs


def test_text_and_prices_are_written_into_the_recipe(recipe: Recipe) -> None:
    drawn = resolve(recipe).with_text("a/model", DataSpec(seqlen=64))
    assert (drawn.recipe.model, drawn.recipe.data.seqlen) == ("a/model", 64)
    assert drawn.digest != resolve(recipe).digest
    table = timed(sites_of(2, attention=(4, 10), mlp=(16, 3)))
    measured = resolve(recipe.with_overrides({"target": "latency=0.5"})).with_metric(Latency(prices=table.as_dict()))
    assert measured.recipe.latency.prices == table.as_dict()
    assert measured.recipe.latency.prompt == table.workload.prompt


def test_a_plugin_object_is_as_good_as_its_name(saved_tiny: Callable[..., Path]) -> None:
    plain: dict[str, Any] = {
        "allocator": "uniform",
        "objective": "expected-error",
        "finishers": ["bias"],
        "rebuild": False,
    }
    objects = plain | {"allocator": ALLOCATORS.build("uniform"), "finishers": [FINISHERS.build("bias")]}
    model = saved_tiny()
    one = prunekit.prune(model, pruner="wanda", **plain | SMALL)
    other = prunekit.prune(model, pruner=PRUNERS.build("wanda"), **objects | SMALL)
    assert one.recipe == other.recipe
