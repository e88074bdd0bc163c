"""Whole runs on mixtures of experts: pruned, saved, proved in a fresh process, reported; and what is refused."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunekit
from prunekit.demo import MODEL
from prunekit.errors import WrongInput
from prunekit.models.adapters.find import adapter_for
from prunekit.models.opening import skeleton
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.run.plan.plan import Plan
from prunekit.run.session import make_plan
from prunekit.run.stages import Run
from prunekit.search.store import CandidateStore
from prunekit.space.forms import GROUPS
from prunekit.testing.models import EXPERTS, tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model of eight experts with the tokenizer of the demo, by family, in folders of their own."""
    made = {}

    def save(family):
        if family not in made:
            made[family] = path = tmp_path_factory.mktemp(family) / "model"
            count = next(name for name in EXPERTS[family] if name in ("num_experts", "num_local_experts"))
            wide = {name: 32 for name in ("intermediate_size", "moe_intermediate_size") if name in EXPERTS[family]}
            model = tiny(family, vocab_size=2048, initializer_range=0.1, **{count: 8} | wide)
            model.float().save_pretrained(path)
            AutoTokenizer.from_pretrained(MODEL).save_pretrained(path)
        return made[family]

    return save


@pytest.fixture(scope="module")
def short(quick):
    """Arguments of a run on little text, with changes; the method is that of the recipe."""

    def settings(**changes):
        method = {"pruner", "allocator", "objective"}
        return {key: value for key, value in quick().items() if key not in method} | changes

    return settings


def sums_of_experts(report):
    """The sites of a report whose groups are experts."""
    return [site for site in report["sites"] if site["kind"] == "experts"]


def experts_of(path):
    """The model in a folder, and how many experts each of its layers has; a plain MLP has none."""
    model = AutoModelForCausalLM.from_pretrained(path)
    mlps = [layer.mlp for layer in model.model.layers]
    return model, [mlp.experts.num_experts for mlp in mlps if hasattr(mlp, "experts")]


@pytest.mark.parametrize("family", EXPERTS)
def test_a_quarter_of_the_experts_goes_and_the_stock_class_loads_the_rest(family, saved, tmp_path, short):
    prunekit.prune(saved(family), output=tmp_path / "out", **short(recipe="reap", sparsity=0.25))  # and is verified
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {(site["groups"], site["kept"]) for site in sums_of_experts(report)} == {(8, 6)}
    assert all(site["kept"] == site["groups"] for site in report["sites"] if site["kind"] == "attention"), "is spared"
    assert report["budget"]["spent"] == report["budget"]["limit"], "three quarters, exactly"
    (small, kept), (dense, _) = experts_of(tmp_path / "out"), experts_of(saved(family))
    assert type(small) is type(dense)
    assert {*kept} == {6}
    freed = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in small.parameters())
    paid = sum(site["parameters"] for site in sums_of_experts(report))
    assert 3 * freed == paid, "experts and their rows of the router"
    assert "experts, % removed" in (tmp_path / "out" / "sparsity.svg").read_text()
    assert "6 of 8" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_layers_of_different_numbers_are_of_our_class(family, saved, tmp_path, quick):
    options = quick(sparsity=0.25, apart=True, spare__first=1, spare__kinds=["attention"])
    prunekit.prune(saved(family), output=tmp_path / "out", **options)  # and is verified, in a fresh process
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    small, kept = experts_of(tmp_path / "out")
    assert (kept[0], sum(kept)) == (8, 18)
    assert min(kept) >= 2
    assert [site["kept"] for site in sums_of_experts(report)] == kept
    assert report["budget"]["spent"] == report["budget"]["limit"]
    assert small.config.model_type == f"prunekit_{family}"


def test_the_default_recipe_prunes_experts(saved, tmp_path, short):
    prunekit.prune(saved("olmoe"), output=tmp_path / "out", **short(sparsity=0.3))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    _, kept = experts_of(tmp_path / "out")
    sites = sums_of_experts(report)
    assert [site["kept"] for site in sites] == kept
    assert report["budget"]["limit"] - report["budget"]["spent"] < sites[0]["parameters"] / kept[0]
    assert all(0 < site["error"] < 1 for site in sites if site["kept"] < 8)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gpt_oss", "qwen2_moe")]


@pytest.mark.parametrize("family", ["mixtral", *SLOW])
def test_attention_goes_beside_experts_under_one_budget(family, saved, tmp_path, quick):
    options = quick(sparsity=0.6, allocator="uniform", pruner="wanda")
    prunekit.prune(saved(family), output=tmp_path / "out", **options)  # and is verified, in a fresh process
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    lost = {site["kind"] for site in report["sites"] if site["kept"] < site["groups"]}
    assert lost == {"attention", "experts", *(["mlp"] if family == "qwen2_moe" else [])}, "a shared expert, a plain MLP"
    budget, (dense, _), (small, kept) = report["budget"], experts_of(saved(family)), experts_of(tmp_path / "out")
    assert [site["kept"] for site in sums_of_experts(report)] == kept
    assert budget["spent"] <= budget["limit"]
    freed = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in small.parameters())
    whole = sum(site.parameters(site.n_groups) for site in adapter_for(family).sites(dense))
    assert whole - freed == budget["spent"], "what is left costs what was said"
    blocks = sum(p.numel() for p in dense.model.layers.parameters())
    assert budget["limit"] == blocks * 2 // 5 - (blocks - whole), "of all parameters of the blocks"


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", {"pruner": "wanda", "allocator": {"name": "uniform", "equal": True}}),
        pytest.param("gpt_oss", {"spare__first": 1}, marks=pytest.mark.slow),
        pytest.param("qwen2_moe", {"objective": "expected-error", "allocator": "table"}, marks=pytest.mark.slow),
    ],
    ids=["mixtral", "gpt_oss", "qwen2_moe"],
)
def test_neurons_of_every_expert_go_beside_attention(family, options, saved, tmp_path, quick):
    path, out = saved(family), tmp_path / "out"
    prunekit.prune(path, output=out, **quick(experts="neurons", sparsity=0.4) | options)  # and is verified
    report = json.loads((out / "report.json").read_text())
    (dense, _), (small, kept) = experts_of(path), experts_of(out)
    sites = adapter_for(family).sites_of(dense, GROUPS, experts="neurons")
    assert {*kept} == {8}, "no expert is gone"
    assert [site["groups"] for site in report["sites"]] == [site.n_groups for site in sites]
    assert any(site["kept"] < site["groups"] and 0 < site["error"] < 1 for site in report["sites"])
    freed = sum(p.numel() for p in dense.parameters()) - sum(p.numel() for p in small.parameters())
    whole = sum(site.parameters(site.n_groups) for site in sites)
    assert whole - freed == report["budget"]["spent"] <= report["budget"]["limit"]
    if family == "mixtral":
        assert type(small) is type(dense)
        assert small.config.intermediate_size == 16, "of 32, in steps of eight"
    if family == "gpt_oss":
        assert all(site["kept"] == site["groups"] for site in report["sites"] if site["block"] == 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"experts": "neurons", "pruner": "magnitude"}, "the statistic producers is not taken of single experts yet"),
        (
            {"experts": "neurons", "allocator": "global-rank", "pruner": "wanda"},
            "which neurons of experts have not yet",
        ),
        ({"experts": "neurons", "finishers": "bias"}, "recovery step bias does not reach experts yet"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(key for key in value if key != "experts"),
)
def test_what_does_not_reach_neurons_is_refused_before_any_work(saved, quick, options, said):
    with pytest.raises(WrongInput, match=said):
        prunekit.prune(saved("mixtral"), **quick(**options))


@pytest.mark.parametrize("family", ["mixtral", pytest.param("qwen2_moe", marks=pytest.mark.slow)])
def test_whole_experts_and_neurons_of_those_that_stay_go_under_one_exact_budget(family, saved, tmp_path, quick):
    path, out = saved(family), tmp_path / "out"
    options = {"pruner": "wanda", "allocator": "uniform"} if family == "mixtral" else {"allocator": "table"}
    options |= {"objective": "expected-error"}
    options |= {"verify": family != "mixtral"}  # in a fresh process
    prunekit.prune(path, output=out, **quick(experts="both", sparsity=0.5, experts_share=0.6) | options)
    report = json.loads((out / "report.json").read_text())
    (dense, _), (small, kept) = experts_of(path), experts_of(out)
    whole = adapter_for(family).sites(dense)
    price = sum(site.params_per_group for site in whole if site.kind == "experts")  # of one expert of every layer
    blocks = [sum(p.numel() for p in model.model.layers.parameters()) for model in (dense, small)]
    asked = blocks[0] - blocks[0] // 2
    fewer = int(0.6 * asked) // price  # as many as fit into that share
    assert {*kept} == {8 - fewer}
    assert 0 < fewer < 6
    assert [(each["kept"], each["of"]) for each in report["experts"]] == [(8 - fewer, 8)] * len(kept)
    budget = report["budget"]
    assert blocks[1] == budget["spent"] + (blocks[0] // 2 - budget["limit"]), "what is left costs what was said"
    rungs = [site["parameters"] // site["kept"] for site in report["sites"] if 0 < site["kept"] < site["groups"]]
    assert 0 <= budget["limit"] - budget["spent"] < max(rungs), "and all of the budget that a group can take"
    inside = [site for site in report["sites"] if site["name"].endswith("experts.down_proj")]
    assert any(site["kept"] < site["groups"] for site in inside), "neurons go as well"
    assert f"| experts | {8 * len(kept)} | {sum(kept)} |" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"experts_share": 0.01}, "experts_share 0.01 of what sparsity 0.25 asks for is"),
        ({"apart": True}, "whole experts have experts_share of all"),
        ({"sparsity": [0.2, 0.4]}, "makes another model for every sparsity"),
        ({"metric": "flops"}, "a token goes through as many experts as before"),
        ({"spare__kinds": ["experts"]}, "one expert of every layer that may lose one has 0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_both_kinds_cannot_do_is_refused_before_any_work(saved, quick, options, said):
    with pytest.raises(WrongInput, match=said):
        prunekit.prune(saved("mixtral"), **quick(experts="both", sparsity=0.25) | options)


def test_both_kinds_are_refused_where_the_model_does_not_fit(saved, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(Plan, "paged", property(lambda self: True))
    with pytest.raises(WrongInput, match=r"experts: both prunes a second model .* experts: whole or neurons"):
        prunekit.prune(saved("mixtral"), output=tmp_path / "out", **quick(experts="both", sparsity=0.25))


def test_neurons_of_experts_are_refused_where_there_are_no_experts(quick):
    with pytest.raises(WrongInput, match="experts: neurons is of a mixture of experts, and the model has none"):
        prunekit.prune(MODEL, **quick(experts="neurons"))


def test_a_run_on_experts_is_repeated_to_the_same_bytes(saved, tmp_path, short, content):
    for name in ("one", "two"):
        options = short(recipe="reap", sparsity=0.5, verify=False)
        prunekit.prune(saved("qwen3_moe"), output=tmp_path / name, **options)
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.slow
def test_a_run_on_both_that_was_stopped_in_either_step_ends_in_the_same_bytes(
    saved, tmp_path, quick, content, killed_at
):
    path, options = saved("qwen3_moe"), quick(experts="both", sparsity=0.5, verify=False)
    prunekit.prune(path, output=tmp_path / "whole", **options)
    with killed_at(CandidateStore, "put", 4):  # of the sites of attention and of experts, there are six
        prunekit.prune(path, output=tmp_path / "out", **options)
    with killed_at(Run, "ask_allocator", 1):
        prunekit.prune(path, output=tmp_path / "out", **options)
    prunekit.prune(path, output=tmp_path / "out", **options)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    plan = make_plan(resolve(Recipe.load(str(tmp_path / "out"))), *skeleton(str(path)), None)
    assert [stage.name for stage in plan.stages][:2] == ["open", "experts"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sparsity": 0.8}, "cannot be met: reachable is 0 to 0.75, because"),
        ({"finishers": "bias"}, "recovery step bias does not reach experts yet"),
        ({"pruner": "llm-pruner"}, "the statistic gradient is not taken of single experts yet"),
        ({"metric": "flops"}, "a token goes through as many experts as before"),
        ({"metric": "latency"}, "times of layers without experts cannot be measured"),
        ({"metric": "kv-cache"}, "no site has a price in kv-cache"),
        ({"structure": "2:4", "pruner": "wanda", "apart": False}, "single weights of experts cannot be removed yet"),
        ({"allocator": None, "learner": "grasprune"}, "a learner cannot keep as many experts as a token selects yet"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_does_not_reach_experts_is_refused_before_any_work(saved, short, options, said):
    with pytest.raises(WrongInput, match=said):
        prunekit.prune(saved("mixtral"), **short(recipe="reap", **options))
