"""Budgets in measured time, with a clock that is made up: it reads the shapes of the model it is given."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

import prunekit
from prunekit import Budget, Space
from prunekit.demo import MODEL
from prunekit.errors import CannotGoOn
from prunekit.measure import latency
from prunekit.measure.latency import cut, hardware, nanoseconds, prices, realised, sampled, typical, workload
from prunekit.models.adapters.find import adapter_for
from prunekit.models.adapters.transformer import Transformer
from prunekit.plugins.dense import Dense
from prunekit.plugins.registry import METRICS
from prunekit.space.prices import Prices, Workload
from prunekit.system.progress import Progress
from prunekit.testing import tiny
from prunekit_strategies.metrics.latency import Latency

WIDTH, KV_HEADS, TILE = 64, 4, 16  # of the model; the made-up hardware works on TILE neurons at a time
ATTENTION, MLP, PART, OUTSIDE = 30_000, 25_000, 40_000, 500_000  # ns: a head, a tile, any sub-layer, the rest
WORK = Workload(1, 16, 0)


def family_of(model: PreTrainedModel) -> Transformer:
    adapter = adapter_for(model.config.model_type)
    assert isinstance(adapter, Transformer)
    return adapter


def made_up(model: PreTrainedModel, work: Workload) -> int:
    """An additive time in tiles, as long as the prompt asks."""
    adapter, total = family_of(model), OUTSIDE
    for block in adapter.blocks(model):
        dropped = adapter.dropped(block)
        if "attention" not in dropped:
            total += PART + ATTENTION * adapter.heads(block)[1]
        if "mlp" not in dropped:
            total += PART + MLP * -(-block.get_submodule("mlp.down_proj").in_features // TILE)  # type: ignore[operator]
    return total * (work.prompt + work.new_tokens) // 16


def model() -> PreTrainedModel:
    return tiny("llama", vocab_size=2048, num_attention_heads=8, num_key_value_heads=KV_HEADS, head_dim=4,
                intermediate_size=WIDTH).float()  # fmt: skip


@pytest.fixture(autouse=True)
def _once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is made up tells the same every time."""
    for name, value in {"FEWEST": 1, "SECONDS": 0.0, "TURN": 1}.items():
        monkeypatch.setattr(latency, name, value)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[Workload]:
    """The made-up hardware in place of this one; what it was asked."""
    asked: list[Workload] = []

    def ask(net: PreTrainedModel, work: Workload) -> int:
        asked.append(work)
        return made_up(net, work)

    monkeypatch.setattr(latency, "nanoseconds", ask)
    return asked


@pytest.fixture(scope="module")
def dense() -> Dense:
    return Dense(model(), None, adapter_for("llama"), torch.float32, "tiny", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("tiny") / "model"
    model().save_pretrained(path)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(path)
    text = path.parent / "text.txt"
    text.write_text("".join(f"Line {i} says that {i * i % 97} is not {i * 7 % 89}.\n" for i in range(400)))
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(QUICK, "data__dataset", str(text))
    yield path
    monkeypatch.undo()


# -- the table ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("clock")
def test_the_table_is_what_the_hardware_takes(dense: Dense) -> None:
    sites = dense.adapter.sites(dense.model)
    table = prices(dense, sites, WORK, Progress())
    assert table.dense == made_up(dense.model, WORK)
    assert table.outside == OUTSIDE
    assert table.noise == 0
    attention, mlp = (table.curves[site.shape] for site in sites[:2])
    assert attention.counts == (0, 1, 2, 3, 4)
    assert attention.prices == (0, *(PART + ATTENTION * k for k in range(1, 5)))
    assert mlp.counts == (0, 16, 32, 48, 64)  # whole tiles
    assert mlp.prices == (0, *(PART + MLP * k for k in range(1, 5)))
    assert attention.sites == mlp.sites == 3
    assert table.hardware == hardware(dense.model)


@pytest.mark.usefixtures("clock")
def test_every_allocation_takes_what_it_costs(dense: Dense) -> None:
    sites = dense.adapter.sites(dense.model)
    table = prices(dense, sites, WORK, Progress())
    space = Space.whole(sites, Budget.keeping(0.6, sites, metric=Latency(prices=table.as_dict())))
    for wish in ([3, 0, 2, 16, 1, 64], [0, 64] * 3, [2, 30] * 3):
        plan = space.nearest(wish)
        small = cut(dense, dict(zip(sites, plan, strict=True)))
        assert made_up(small, WORK) == table.outside + space.cost(plan) <= 0.6 * table.dense


def test_what_is_saved_together_but_not_alone_is_in_the_prices(dense: Dense, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made_up(dense.model, WORK)

    def shy(net: PreTrainedModel, work: Workload) -> int:
        """Attention and MLP that are cut at once save a tenth less than one by one."""
        sizes = [family_of(net).layer_config(block) for block in dense.adapter.blocks(net)]
        both = sizes[0]["num_key_value_heads"] < KV_HEADS and sizes[0].get("intermediate_size", 0) < WIDTH
        saved = whole - made_up(net, work)
        return whole - (saved * 9 // 10 if both and "skip" not in sizes[0] else saved)

    monkeypatch.setattr(latency, "nanoseconds", shy)
    sites = dense.adapter.sites(dense.model)
    table = prices(dense, sites, WORK, Progress())
    assert table.curves[sites[0].shape].price(4) == pytest.approx(0.9 * (PART + 4 * ATTENTION), abs=2)
    plan = (2, 32) * 3
    cost = sum(table.curves[site.shape].price(kept) for site, kept in zip(sites, plan, strict=True))
    small = cut(dense, dict(zip(sites, plan, strict=True)))
    assert shy(small, WORK) == pytest.approx(table.outside + cost, rel=1e-5)


def test_times_that_contradict_each_other_are_refused(dense: Dense, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(net: PreTrainedModel, work: Workload) -> int:
        """Whichever kind is dropped, nothing is left of the time."""
        return 1 if any(family_of(net).dropped(block) for block in dense.adapter.blocks(net)) else made_up(net, work)

    monkeypatch.setattr(latency, "nanoseconds", ask)
    with pytest.raises(CannotGoOn, match="the machine is too busy"):
        prices(dense, dense.adapter.sites(dense.model), WORK, Progress())


def test_every_model_has_its_turns_and_the_first_has_more(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(latency, "SECONDS", 60.0)
    monkeypatch.setattr(latency, "TURN", 20)
    monkeypatch.setattr(latency, "nanoseconds", lambda net, work: seen.append(net) or 10)
    samples = sampled({i: lambda i=i: i for i in range(9)}, WORK, Progress(), "x", rounds=4)  # type: ignore[misc]
    assert {key: len(times) for key, times in samples.items()} == {0: 16, **dict.fromkeys(range(1, 9), 8)}
    turns = [seen[i : i + 3] for i in range(2, len(seen), 3)]  # a run that does not count, and two that do
    assert all(len(set(turn)) == 1 for turn in turns)
    rounds = [tuple(turn[0] for turn in turns[i : i + 10]) for i in range(0, len(turns), 10)]
    assert len(set(rounds)) == 4  # each in an order of its own


def test_no_further_round_begins_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "nanoseconds", lambda net, work: 10)
    monkeypatch.setattr(latency, "FEWEST", 3)
    samples = sampled({"a": lambda: None}, WORK, Progress(), "x")  # type: ignore[arg-type, return-value]
    assert len(samples["a"]) == 3


def test_the_typical_time_is_the_median_and_noise_half_of_the_times() -> None:
    assert typical({"a": [90, 100, 110, 500, 98]}) == ({"a": 100}, 0.1)


# -- real time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_the_workload_runs_on_whole_and_cut_models(family: str) -> None:
    net = tiny(family)
    dense = Dense(net, None, adapter_for(family), torch.float64, "tiny", "")
    sites = dense.adapter.sites(net)
    for keeps in ({}, dict.fromkeys(sites, 1), dict.fromkeys(sites[::2], 0)):
        assert nanoseconds(cut(dense, keeps), Workload(2, 8, 3)) > 0
    assert not any(family_of(net).dropped(block) for block in dense.adapter.blocks(net))  # as it was


def test_the_prompt_is_as_long_as_the_model_takes(dense: Dense) -> None:
    assert workload(1, None, 0, dense.model) == Workload(1, 64, 0)
    assert workload(3, None, 10, dense.model) == Workload(3, 54, 10)
    with pytest.raises(prunekit.WrongInput, match=r"latency\.prompt \+ latency\.new_tokens is 70, .* takes 64 tokens"):
        workload(1, 60, 10, dense.model)


# -- a run --------------------------------------------------------------------------------------------

QUICK: dict[str, Any] = {
    "pruner": "magnitude",
    "allocator": {"name": "evolution", "generations": 2, "offspring": 4},
    "objective": "expected-error",
    "target": "latency=0.6",
    "latency": {"prompt": 16},
    "data__calibration_tokens": 256,
    "data__search_tokens": 256,
    "data__evaluation_tokens": 256,
    "data__seqlen": 32,
    "verify": False,
    "device": "cpu",
    "quiet": True,
}
FILES = ("model.safetensors", "config.json", "recipe.yaml", "ledger.jsonl", "prices.json")


def content(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in FILES}


def test_a_run_promises_and_tells_what_came_of_it(folder: Path, tmp_path: Path, clock: list[Workload]) -> None:
    result = prunekit.prune(folder, output=tmp_path / "out", **QUICK)
    told = json.loads((tmp_path / "out" / "report.json").read_text())["latency"]
    table = Prices.load(tmp_path / "out")
    assert told["target"] == 0.6
    assert told["promised"] <= 0.6
    assert told["realised"] == pytest.approx(told["promised"], rel=1e-9)  # this hardware is additive
    assert told["kept"]
    assert told["milliseconds"]["dense"] == table.dense / 1e6
    assert result.report["budget"]["metric"] == "latency"
    assert set(clock) == {WORK}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| milliseconds |" in card
    assert "1 × 16 tokens read" in card
    assert all(site["kept"] % TILE == 0 for site in result.report["sites"] if site["kind"] == "mlp")


@pytest.mark.slow
def test_the_same_table_makes_the_same_bytes(folder: Path, tmp_path: Path, clock: list[Workload], monkeypatch) -> None:
    prunekit.prune(folder, output=tmp_path / "out", **QUICK)
    # other hardware, which would make another table
    monkeypatch.setattr(latency, "nanoseconds", lambda net, work: 200_000 + made_up(net, work) // 2)
    prunekit.prune(recipe=tmp_path / "out" / "recipe.yaml", output=tmp_path / "again", quiet=True)
    assert content(tmp_path / "again") == content(tmp_path / "out")
    told = json.loads((tmp_path / "again" / "report.json").read_text())["latency"]
    assert not told["kept"]  # it is other hardware, and that is said
    assert told["miss"] > 0.05
    prunekit.prune(folder, output=tmp_path / "given", **QUICK, latency__prices=str(tmp_path / "out"))
    assert content(tmp_path / "given") == content(tmp_path / "out")
    other = prunekit.prune(recipe=tmp_path / "out" / "recipe.yaml", quiet=True, latency__prices=None)
    assert other.recipe.latency.prices != json.loads(content(tmp_path / "out")["prices.json"])


def test_an_interrupted_run_goes_on_with_its_table(folder: Path, tmp_path: Path, clock: Any, monkeypatch) -> None:
    prunekit.prune(folder, output=tmp_path / "whole", **QUICK)
    with monkeypatch.context() as patch:

        def killed(*_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt

        patch.setattr("prunekit.run.stages.converse", killed)
        with pytest.raises(KeyboardInterrupt):
            prunekit.prune(folder, output=tmp_path / "out", **QUICK)
    table = tmp_path / "out.partial" / "prices.json"
    text = table.read_text()
    table.write_text(text.replace('"dense": ', '"dense": 1', 1))  # no table says how long a model takes by itself
    with pytest.raises(prunekit.WrongInput, match=r"is not what was written; begin again with --no-resume --overwrite"):
        prunekit.prune(folder, output=tmp_path / "out", **QUICK)
    table.write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr(latency, "prices", None)  # nothing is measured again
        prunekit.prune(folder, output=tmp_path / "out", **QUICK)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.usefixtures("clock")
def test_a_target_out_of_reach_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        prunekit.WrongInput, match=r"latency=0.1 cannot be met: reachable is 0\.3572 to 1, because 0\.5 of"
    ):
        prunekit.prune(folder, output=tmp_path / "out", **{**QUICK, "target": "latency=0.1"})
    assert list(tmp_path.iterdir()) == []


def test_a_study_measures_once_and_its_recipes_have_the_table(folder: Path, tmp_path: Path, clock: Any) -> None:
    study = {**QUICK, "allocator": "uniform"}
    space = {"pruner": ["magnitude", "wanda"]}
    prunekit.tune(folder, space=space, trials=1, output=tmp_path / "study", **study)
    asked = len(clock)
    table = Prices.load(tmp_path / "study")
    best = prunekit.Recipe.load(tmp_path / "study" / "best.yaml")
    assert METRICS.build(best.metric_spec) == Latency(prices=table.as_dict())
    tuned = prunekit.tune(folder, space=space, trials=2, output=tmp_path / "study", **study)
    assert len(clock) == asked
    assert tuned.best.latency.prices == table.as_dict()


@pytest.mark.usefixtures("clock")
def test_attention_and_mlp_may_be_kept_apart(folder: Path) -> None:
    told = prunekit.prune(folder, apart=True, **QUICK).report
    assert told["latency"]["promised"] <= 0.6
    assert told["budget"]["spent"] <= told["budget"]["limit"]


def test_a_table_from_elsewhere_is_said_to_be(dense: Dense, clock: Any) -> None:
    said: list[str] = []

    class Heard(Progress):
        def say(self, line: str) -> None:
            said.append(line)

    sites = dense.adapter.sites(dense.model)
    table = prices(dense, sites, WORK, Progress()).as_dict()
    table["hardware"]["threads"] = 999
    heard = Heard()
    found = Latency(prompt=16, prices=table).measured(dense, sites, None, heard).table
    assert found is not None
    assert found == Prices.of(table)
    (line,) = said
    assert line.startswith("warning: the price table was measured elsewhere (threads 999, here ")
    told = realised(dense.model, dense.model, found, 0.6, 0.5, heard)
    assert not told["kept"]
    assert told["miss"] == pytest.approx(1.0, rel=1e-4)
