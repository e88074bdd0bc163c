"""Residual width through whole runs: the width that the budget says, the same bytes after a kill, a stock class."""

import json
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import prunekit
from prunekit import PluginError, WrongInput
from prunekit.calibration.stream import collect_stream
from prunekit.data.tokens import TokenBatch
from prunekit.models.adapters.find import adapter_for
from prunekit.models.width import check_narrow, narrow_shape, norms, widths
from prunekit.plugins.exporter import Order
from prunekit.plugins.registry import WIDTHS
from prunekit.plugins.width import Width
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.run.plan.make import planned
from prunekit.run.spaces import narrow_space
from prunekit.run.width import checked
from prunekit.search.store import CandidateStore
from prunekit.system.checkpoints import Checkpoints
from prunekit.system.progress import Progress
from prunekit.testing import tiny, toy_tokens

FILES = ("model.safetensors", "config.json", "recipe.yaml", "ledger.jsonl")
NAMES = ("slicegpt", "minitron")


@pytest.fixture(scope="module")
def pruned(quick):
    """A run."""

    def run(folder, output, width="slicegpt", **changes):
        settings = {"pruner": "wanda", "allocator": "uniform", "objective": "expected-error", "rebuild": False}
        spec = {"name": width, "step": 2} if isinstance(width, str) else width
        text = {"data__dataset": str(Path(folder) / "text.txt")} if not hasattr(folder, "config") else {}
        settings |= {"width": spec, "carry": "dense", **text}
        return prunekit.prune(folder, output=output, **quick(**settings | changes))

    return run


@pytest.fixture(scope="module")
def sliced(folder, tmp_path_factory, pruned):
    """An uninterrupted run of width alone at 50 %, verified."""
    output = tmp_path_factory.mktemp("whole") / "out"
    pruned(folder, output, sparsity=0.5)
    return output


@pytest.fixture(scope="module")
def shared(folder, tmp_path_factory, pruned):
    """An uninterrupted run of width and groups at 50 %, which searches for what is the dense model's, verified."""
    output = tmp_path_factory.mktemp("whole") / "out"
    inner = {"name": "evolution", "generations": 2, "offspring": 4}
    width = {"name": "minitron", "step": 2, "share": 0.5}
    pruned(folder, output, width, sparsity=0.5, pruner="obs", allocator=inner, objective="divergence")
    return output


# -- integers -------------------------------------------------------------------------------------------


def parts_of(width: Any = "slicegpt", **changes: Any):
    spec = {"name": width, "step": 2} if isinstance(width, str) else width
    return resolve(Recipe.load("slicegpt").with_overrides({"width": spec, **changes}))


def counted(model, blocks_alone):
    module = model.model.layers if blocks_alone else model
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("of", ["blocks", "model"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_the_width_is_the_largest_that_frees_its_share_and_the_budget_is_that_of_the_dense_model(
    family, tied, of, name
):
    model, adapter = tiny(family, tie_word_embeddings=tied), adapter_for(family)
    own, blocks, turns = counted(model, of == "blocks"), of == "blocks", WIDTHS.build(name).turns
    prices = {
        width: counted(narrow_shape(model, check_narrow(model, adapter), width, rotated=turns), blocks)
        for width in widths(model, check_narrow(model, adapter), 2)
    }
    for sparsity, share in ((0.3, 1.0), (0.5, 1.0), (0.5, 0.5), (0.4, 0.125), (0.77, 0.9)):
        parts = parts_of({"name": name, "step": 2, "share": share}, sparsity=sparsity, of=of)
        limit = int(own * (1 - Fraction(str(sparsity))))
        most = own - Fraction(str(share)) * (own - limit)
        fitting = [width for width, price in prices.items() if price <= most]
        if not fitting:
            with pytest.raises(WrongInput, match=r"residual width, which is at least 2 here .* lower width\.share"):
                narrow_space(parts, model, adapter, torch.float64)
            continue
        width, space = narrow_space(parts, model, adapter, torch.float64)
        assert width == max(fitting)
        assert space.budget.dense == own
        assert space.budget.limit + space.budget.outside == limit
        everything = tuple(site.n_groups for site in space.sites)
        assert space.budget.outside + space.cost(everything) == prices[width]
        plan = space.uniform()
        assert space.cost(plan) <= space.budget.limit
        if share == 1:
            assert plan == everything, "there is nothing left to remove"
        else:
            assert any(kept < site.n_groups for site, kept in zip(space.sites, plan, strict=True))
            assert space.nearest(plan) == plan, "tight"


@pytest.mark.parametrize(("metric", "factor"), [("bytes", 8), ("flops", 2)])
def test_metrics_that_follow_from_parameters_count_a_width_by_them(metric, factor):
    model, adapter = tiny("mistral"), adapter_for("mistral")
    plain, other = (
        narrow_space(parts_of(sparsity=0.4, metric=each), model, adapter, torch.float64)
        for each in ("parameters", metric)
    )
    assert other[0] == plain[0]
    assert other[1].budget.dense == factor * plain[1].budget.dense


def test_what_groups_cannot_make_up_is_refused():
    model, adapter = tiny("mistral"), adapter_for("mistral")
    parts = parts_of({"name": "minitron", "step": 2, "share": 0.001}, sparsity=0.99, of="model")
    with pytest.raises(WrongInput, match=r"cannot be met: reachable is 0 to 0\."):
        narrow_space(parts, model, adapter, torch.float64)


# -- statistics -----------------------------------------------------------------------------------------


def test_statistics_are_of_what_norms_receive_and_make_window_by_window(tmp_path):
    model, adapter, tokens = tiny("llama"), adapter_for("llama"), toy_tokens()
    narrow = check_narrow(model, adapter)
    found = collect_stream(model, narrow, tokens, tmp_path, Progress(), gram=True)
    gram, squares = torch.zeros(24, 24, dtype=torch.float64), torch.zeros(7, 24, dtype=torch.float64)
    for window in tokens.ids:
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def note(_, x, y, seen=seen):
            seen.append((x[0][0], y[0]))

        hooks = [norm.register_forward_hook(note) for norm in norms(model, narrow)]
        with torch.no_grad():
            model(window[None])
        for hook in hooks:
            hook.remove()
        for place, (x, y) in enumerate(seen):
            squares[place] += y.abs().mean(0) ** 2
            for token in x:
                gram += token.outer(token) / token.square().mean() / tokens.n_tokens
    assert found.gram is not None
    torch.testing.assert_close(found.absolute, (squares / len(tokens)).sqrt())
    torch.testing.assert_close(found.gram, gram)
    again = collect_stream(None, narrow, tokens, tmp_path, Progress(), gram=True)
    assert again.gram is not None
    assert torch.equal(again.gram, found.gram), "read, not made again"


def test_a_token_of_zeros_counts_nothing(tmp_path):
    model, adapter = tiny("llama"), adapter_for("llama")
    model.model.embed_tokens.weight.detach()[5] = 0
    tokens = TokenBatch(torch.full((1, 4), 5), "zeros")
    found = collect_stream(model, check_narrow(model, adapter), tokens, tmp_path, Progress(), gram=True)
    assert found.gram is not None
    assert bool(torch.isfinite(found.gram).all())


# -- whole runs -----------------------------------------------------------------------------------------


def test_width_alone_gives_a_stock_class_whose_parameters_are_those_of_the_report(folder, sliced):
    report, config = (json.loads((sliced / name).read_text()) for name in ("report.json", "config.json"))
    model, dense = (AutoModelForCausalLM.from_pretrained(path) for path in (sliced, folder))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["head_dim"], config["num_attention_heads"]) == (12, 4, 6)
    assert report["width"] == {"name": "slicegpt", "channels": 12, "of": 24, "untied": True}
    assert report["pruned"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["pruned"]["block_parameters"] == counted(model, True)
    assert report["dense"]["block_parameters"] == counted(dense, True)
    assert report["pruned"]["sparsity_of_blocks"] == 1 - counted(model, True) / counted(dense, True)
    assert report["budget"]["removed"] == report["pruned"]["sparsity_of_blocks"] == 0.5
    assert all(site["kept"] == site["groups"] and site["error"] == 0 for site in report["sites"])
    assert "Mean over blocks: attention 50.0%; MLP 50.0%" in (sliced / "sparsity.svg").read_text()
    card = (sliced / "README.md").read_text()
    assert "with width `slicegpt`, pruner" in card
    assert "| residual width | 24 | 12 |" in card
    assert "Embedding and head are two matrices now" in card


def test_width_and_groups_together_spend_the_budget_to_the_last_group(folder, shared):
    report = json.loads((shared / "report.json").read_text())
    model: Any = AutoModelForCausalLM.from_pretrained(shared)
    dense = AutoModelForCausalLM.from_pretrained(folder)
    blocks, left = counted(dense, True), counted(model, True)
    assert report["width"] == {"name": "minitron", "channels": 18, "of": 24, "untied": False}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert left == report["pruned"]["block_parameters"] == report["budget"]["spent"]
    assert blocks // 2 - 3 * 18 < left <= blocks // 2, "one neuron more would be too many"
    assert "Embedding and head" not in (shared / "README.md").read_text()
    assert report["losses"]["objective"] > 0.01, "it is the divergence from the dense model, and not from the narrower"


def test_the_dense_model_is_that_of_the_folder(folder, shared, quick):
    report, settings = json.loads((shared / "report.json").read_text()), quick(data__dataset=str(folder / "text.txt"))
    plain = prunekit.prune(folder, **settings | {"sparsity": 0.5, "allocator": "uniform", "verify": False})
    assert plain.report["losses"]["dense"] == report["losses"]["dense"]
    assert plain.report["dense"] == report["dense"]


@pytest.mark.parametrize("when", ["statistics", "pass"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(folder, sliced, tmp_path, killed_at, when, pruned):
    place, name, last = {"statistics": (Checkpoints, "save", 1), "pass": (CandidateStore, "put", 3)}[when]
    with killed_at(place, name, last, after=when == "statistics"):
        pruned(folder, tmp_path / "out", sparsity=0.5, verify=False)
    pruned(folder, tmp_path / "out", sparsity=0.5, verify=False)
    assert not list(tmp_path.glob("*/stream-*")), "nothing of the work is left"
    for file in FILES:
        mine, theirs = ((where / file).read_bytes() for where in (tmp_path / "out", sliced))
        assert mine.replace(b"verify: false", b"verify: true") == theirs, file


def test_a_recipe_beside_a_result_makes_it_again(sliced, tmp_path):
    prunekit.prune(recipe=sliced, output=tmp_path / "again", quiet=True)
    one, two = ((path / "model.safetensors").read_bytes() for path in (sliced, tmp_path / "again"))
    assert one == two


def test_what_is_narrow_and_uneven_can_be_narrowed_and_pruned_again(folder, shared, tmp_path, pruned):
    (shared / "text.txt").write_text((folder / "text.txt").read_text())
    report = pruned(shared, tmp_path / "out", sparsity=0.3).report
    (shared / "text.txt").unlink()
    assert report["width"]["of"] == 18
    assert report["width"]["channels"] == 12
    assert report["pruned"]["sparsity_of_blocks"] >= 0.3


def test_a_model_in_memory_stays_as_it_was_and_learns_from_what_it_was(folder, pruned):
    from transformers import AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recovery = [{"name": "distillation", "epochs": 2, "rate": 1e-2}, {"name": "lora", "epochs": 1, "teacher": 1.0}]
    result = pruned(
        model, None, "minitron", tokenizer=tokenizer, sparsity=0.5, finishers=recovery, data__recovery_tokens=512,
        data__dataset=str(folder / "text.txt"),
    )  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    losses = result.report["losses"]
    assert losses["pruned"]["nll"] < losses["unfinished"]["nll"], "it has learnt from a wider model"
    assert result.model.config.hidden_size == 12


def test_both_are_presets():
    for name in NAMES:
        recipe = resolve(Recipe.load(name)).recipe
        assert recipe.width is not None
        assert recipe.width["name"] == name


def test_a_plan_counts_the_narrower_model_and_its_statistics(folder):
    from prunekit.models.opening import skeleton
    from prunekit.run.session import make_plan

    plans = {}
    for width in (None, {"name": "slicegpt", "step": 2}):
        recipe = Recipe.load("slicegpt").with_overrides({"model": str(folder), "width": width})
        plans[width is not None] = make_plan(resolve(recipe), *skeleton(str(folder)), None)
    stages = {width: {stage.name: stage for stage in plan.stages} for width, plan in plans.items()}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert stages[True].keys() - stages[False].keys() == {"width"}
    assert stages[True]["width"].flops > 0
    more = stages[True]["evaluate"].memory - stages[False]["evaluate"].memory
    assert more >= 4 * sum(p.numel() for p in model.parameters()) * 0.4


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_counts_the_head_that_a_basis_unties(name):
    """A vocabulary so large that the narrower model is the larger one."""
    model = tiny("llama", vocab_size=2000, tie_word_embeddings=True).float()
    adapter, parts = adapter_for("llama"), parts_of(name, sparsity=0.2)
    width, space = narrow_space(parts, model, adapter, torch.float32)
    turns = WIDTHS.build(name).turns
    small = counted(narrow_shape(model, check_narrow(model, adapter), width, rotated=turns), False)
    assert (small > counted(model, False)) == turns
    export = planned(parts, model, adapter, [space], None).stages[-1]
    assert export.name == "export"
    weights = sum(each.size(Order(adapter, "groups", parts.recipe.code, small, 4)) for each in parts.exporters)
    assert export.disk == weights


# -- learners and depth ---------------------------------------------------------------------------------


def test_a_learner_inside_a_narrower_model_diverges_from_the_dense_one():
    """The mean of KL(dense ‖ narrow) over positions, by hand; without a teacher it is that from itself."""
    from prunekit.models.width import narrowed
    from prunekit.plugins.learner import GateQuery
    from prunekit.search.gated import GatedModel

    model, adapter, tokens = tiny("llama"), adapter_for("llama"), toy_tokens()
    small = narrowed(model, check_narrow(model, adapter), torch.arange(24), 12, torch.float64)
    sites = tuple(adapter.sites(small))
    query = GateQuery(torch.ones(sum(s.n_groups for s in sites), dtype=torch.float64), text=0.0, dense=1.0)
    with torch.no_grad():
        wanted, found = (each(tokens.ids).logits[:, :-1].log_softmax(-1) for each in (model, small))
    by_hand = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert by_hand > 0.01
    assert GatedModel(small, adapter, sites, tokens, teacher=model).answer(query).loss == pytest.approx(by_hand)
    assert GatedModel(small, adapter, sites, tokens).answer(query).loss == pytest.approx(0, abs=1e-12)


def test_a_learner_decides_what_the_width_has_left_to_remove(folder, pruned):
    width = {"name": "minitron", "step": 2, "share": 0.5}
    report = pruned(folder, None, width, sparsity=0.5, learner="gisp", allocator=None, verify=False).report
    blocks = report["dense"]["block_parameters"]
    assert report["width"]["channels"] == 18
    assert blocks // 2 - 3 * 18 < report["pruned"]["block_parameters"] <= blocks // 2
    assert report["learner"]


def test_depth_and_width_go_together_and_a_stock_class_holds_the_result(folder, tmp_path, quick):
    """Recipe `minitron-depth` with one share of each: fewer channels, fewer blocks, fewer neurons in all alike."""
    settings = quick(data__dataset=str(folder / "text.txt"), sparsity=0.6, data__recovery_tokens=512, verify=False)
    own = ("pruner", "allocator", "objective")
    settings = {key: value for key, value in settings.items() if key not in own}
    over = {"width__share": 0.3, "width__step": 2, "allocator__depth": 1.0}
    prunekit.prune(folder, recipe="minitron-depth", output=tmp_path / "out", **settings, **over)
    report, config = (json.loads((tmp_path / "out" / name).read_text()) for name in ("report.json", "config.json"))
    model, dense = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", folder))
    assert config["architectures"][0] in ("LlamaForCausalLM", "MistralForCausalLM"), (
        "the same layers under another name"
    )
    assert (config["num_hidden_layers"], config["hidden_size"]) == (2, 18)
    assert report["pruned"]["block_parameters"] == counted(model, True) <= 0.4 * counted(dense, True)
    assert config["intermediate_size"] < 32
    assert "teacher_held_out_loss" in report["finishers"][0]


# -- sentences ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structure": "weights"}, "width 'slicegpt' goes with structure groups, not weights"),
        ({"sparsity": [0.3, 0.5]}, "width 'slicegpt' makes another model for every sparsity"),
        ({"apart": True}, "apart gives attention and MLP each their share"),
        ({"spare": {"first": 1}}, "spare keeps some of them whole"),
        ({"metric": "kv-cache"}, "cannot be counted in kv-cache; choose metric parameters, bytes or flops"),
        ({"metric": "latency"}, "cannot be counted in "),
        ({"finishers": "least-squares"}, "finisher 'least-squares' compares the residual streams of both models"),
        ({"objective": "hidden-state"}, "objective 'hidden-state' compares the residual streams of both models"),
        ({"objective": "latent-stats"}, "objective 'latent-stats' compares the residual streams of both models"),
        ({"width": "slice"}, "no width 'slice'"),
        ({"width": {"name": "slicegpt", "share": 2}}, "share is more than 0 and at most 1, not 2"),
        ({"width": {"name": "slicegpt", "step": 0}}, "step is a number of channels, 1 or more"),
        ({"width": {"name": "slicegpt", "step": 8}}, "residual width, which is at least 24 here"),
        ({"sparsity": 0.9}, "residual width, which is at least 6 here and then leaves 3,060"),
    ],
)
def test_what_does_not_go_with_a_width_is_refused_before_any_work(folder, tmp_path, pruned, changes, message):
    with pytest.raises(WrongInput, match=message):
        pruned(folder, tmp_path / "out", **{"sparsity": 0.5} | changes)
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_fit_is_refused(folder, tmp_path, pruned, monkeypatch):
    from prunekit.run.plan.plan import Plan

    monkeypatch.setattr(Plan, "paged", property(lambda self: True))
    with pytest.raises(WrongInput, match=r"width 'slicegpt' narrows all weights in memory, .* give more --memory"):
        pruned(folder, tmp_path / "out", sparsity=0.5)


@dataclass(frozen=True)
class Clumsy(Width):
    """It answers with whatever it is told to."""

    def directions(self, stream):
        raise NotImplementedError


@dataclass(frozen=True)
class Turning(Clumsy):
    """It would turn."""

    turns = True


@pytest.mark.parametrize(
    ("plugin", "found", "message"),
    [
        (Clumsy(), [0, 1, 2], "its directions is .* Tensor was asked"),
        (Clumsy(), torch.tensor([0, 1, 1]), "an order names each of 3 channels once"),
        (Clumsy(), torch.tensor([0.0, 1.0, 2.0]), "an order names each of 3 channels once, in int64"),
        (Clumsy(), torch.eye(3, dtype=torch.int64), "an order names each of 3 channels once"),
        (Turning(), torch.eye(3), r"a basis is \(3, 3\) in float64, not \(3, 3\) in torch.float32"),
        (Turning(), torch.eye(3, dtype=torch.float64)[:2], r"a basis is \(3, 3\)"),
        (Turning(), 2 * torch.eye(3, dtype=torch.float64), "not orthonormal, products of directions are off by 3"),
        (Turning(), torch.nan * torch.eye(3, dtype=torch.float64), "not orthonormal"),
    ],
)
def test_a_width_that_breaks_its_promise_is_named(plugin, found, message):
    with pytest.raises(PluginError, match=f"{type(plugin).__name__}: .*{message}"):
        checked(plugin, found, 3)


def test_other_shares_are_other_models_and_share_their_statistics():
    one, two = (parts_of({"name": "minitron", "step": 2, "share": share}) for share in (0.5, 0.25))
    assert one.digest != two.digest
    assert replace(one, recipe=two.recipe).digest == two.digest
