"""Weights and patterns through a whole run: exact counts, the same bytes after a kill, what is saved loads."""

import json
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint

import pytest
import torch

import prunekit
from prunekit import Candidate, WrongInput
from prunekit.calibration.fill import build
from prunekit.calibration.gradients import Gradients
from prunekit.measure.speed import zeros
from prunekit.plugins.registry import PRUNERS, Entry
from prunekit.run.finish import check_finished, shapes
from prunekit.search.ledger import Ledger
from prunekit.search.store import CandidateStore
from prunekit.system.memory import Shares
from prunekit.system.progress import Progress
from prunekit.testing import KeepLargest, toy_supernet, toy_tokens, toy_workpiece

FILES = ("model.safetensors", "config.json", "recipe.yaml", "ledger.jsonl")


def register(patch):
    """The toy pruner under a name."""
    point = EntryPoint("keep-largest", "prunekit.testing.supernets:KeepLargest", "prunekit.pruners")
    patch.setitem(PRUNERS._entries, "keep-largest", Entry("pruner", "keep-largest", "prunekit", point))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    register(monkeypatch)


@pytest.fixture(scope="module")
def folder(saved_tiny, numbers):
    path = saved_tiny(intermediate_size=32)
    (path / "text.txt").write_text(numbers(4000))
    return path


@pytest.fixture(scope="module")
def pruned(quick):
    """A run."""

    def run(folder, output, structure, **changes):
        settings = {"pruner": "keep-largest", "data__dataset": str(folder / "text.txt"), "structure": structure}
        return prunekit.prune(folder, output=output, **quick(**settings | changes))

    return run


@pytest.mark.parametrize("structure", ["2:4", "1:4", "2:8"])
def test_uniform_is_the_pattern_everywhere(folder, tmp_path, structure, linears, pruned, monkeypatch):
    monkeypatch.setattr("prunekit.report.document.SPARSE_UNIT", (32, 8))  # maps of the toy are narrow
    n, m = map(int, structure.split(":"))
    out = tmp_path / "out"
    pruned(folder, out, structure, allocator="uniform", verify=False)
    for weight in linears(out).values():
        assert torch.equal(
            weight.unflatten(1, (-1, m)).count_nonzero(-1), torch.full((len(weight), weight.shape[1] // m), n)
        )
    report = json.loads((out / "report.json").read_text())
    assert report["weights"]["sparsity"] == 1 - n / m == report["budget"]["sparsity_asked"]
    assert report["budget"]["spent"] == report["budget"]["limit"]
    assert report["weights"]["patterns"] == {structure: 21}
    fitting = [w for w in linears(out).values() if w.shape[0] % 32 == 0 and w.shape[1] % 8 == 0]
    assert 0 < len(fitting) < 21
    assert report["weights"]["fit"] == (len(fitting) if structure in ("2:4", "1:4") else 0)
    assert f"{report['weights']['fit']} of 21 maps fit" in " ".join((out / "README.md").read_text().split())


@pytest.fixture(scope="module")
def searched(folder, tmp_path_factory, pruned):
    """Uninterrupted runs that search."""
    outputs = {}
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        for structure in ("weights", "2:4"):
            outputs[structure] = tmp_path_factory.mktemp("whole") / "out"
            pruned(folder, outputs[structure], structure)  # verified
    return outputs


@pytest.mark.parametrize("structure", ["weights", "2:4"])
def test_counts_are_exact_and_what_is_saved_is_a_stock_model(folder, searched, structure, linears):
    out = searched[structure]
    report, dense = json.loads((out / "report.json").read_text()), linears(folder)
    kept = 0
    for site in report["sites"]:
        name = site["name"].removeprefix("model.layers.")
        weight = linears(out)[name]
        assert torch.equal(weight[weight != 0], dense[name][weight != 0])
        assert weight.count_nonzero() == site["kept"] * len(weight) == site["parameters"]
        if structure == "2:4":
            counts = weight.unflatten(1, (-1, 4)).count_nonzero(-1)
            assert site["keeps"] == f"{int(counts[0, 0])}:4"
            assert bool((counts == counts[0, 0]).all())
        kept += site["parameters"]
    total = sum(weight.numel() for weight in dense.values())
    assert kept == report["weights"]["not_zero"] == report["budget"]["spent"] <= report["budget"]["limit"] == total // 2
    assert len({site["kept"] / site["groups"] for site in report["sites"]}) > 1, "the search moved something"
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert report["pruned"]["parameters"] == report["dense"]["parameters"]
    card = (out / "README.md").read_text()
    assert f"{1 - kept / total:.1%} of the weights in the blocks' linear maps are zero" in card
    assert "zeros are stored and multiplied like other numbers" in card


@pytest.mark.parametrize("structure", [pytest.param("weights", marks=pytest.mark.slow), "2:4"])
@pytest.mark.parametrize("when", ["search", *(pytest.param(w, marks=pytest.mark.slow) for w in ("walk", "rebuild"))])
def test_an_interrupted_run_goes_on_to_the_same_bytes(folder, searched, tmp_path, killed_at, structure, when, pruned):
    # between two maps with one input, on a question, in the second walk
    place, name, last = {
        "walk": (CandidateStore, "put", 9),
        "search": (Ledger, "answer", 5),
        "rebuild": (CandidateStore, "put", 30),
    }[when]
    with killed_at(place, name, last):
        pruned(folder, tmp_path / "out", structure, verify=False)
    pruned(folder, tmp_path / "out", structure, verify=False)
    for file in FILES:
        mine, theirs = ((where / file).read_bytes() for where in (tmp_path / "out", searched[structure]))
        assert mine.replace(b"verify: false", b"verify: true") == theirs, file


def test_rows_that_are_no_whole_blocks_are_one_sentence(folder, tmp_path, pruned):
    with pytest.raises(WrongInput, match="has rows of 24 weights, which are no whole blocks of 16"):
        pruned(folder, tmp_path / "out", "2:16")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("structure", "broken", "message"),
    [
        ("weights", lambda w, k: Candidate(None, w), "12 of 24 weights per row were asked"),
        ("2:4", lambda w, k: Candidate(None, w * (torch.arange(24) < 12)), "2:4 weights per row were asked"),
        ("weights", lambda w, k: Candidate((0,), 0 * w), "without groups was asked"),
        ("weights", lambda w, k: Candidate(None, w[:, :-1]), r"shape \(24, 23\), and \(24, 24\) was asked"),
        ("weights", lambda w, k: Candidate(None, w * torch.nan), "not finite"),
    ],
    ids=["too many", "not in every block", "groups", "shape", "nan"],
)
def test_a_pruner_that_breaks_its_promise_is_named(tmp_path, structure, broken, message):
    class Broken(KeepLargest):
        def prune(self, layer, keeps):
            return [broken(layer.weight, keep) for keep in keeps]

    net = toy_supernet(structure=structure, intermediate_size=16)
    space = net.space.zoomed(net.space.uniform(), reach=0)
    space = replace(space, ladders=((12,), *space.ladders[1:]))
    store = CandidateStore(tmp_path, {})
    with pytest.raises(prunekit.PluginError, match=f"Broken on model.layers.0.self_attn.q_proj: .*{message}"):
        build(net.model, net.adapter, space, space.uniform(), Broken(), toy_tokens(), store, progress=Progress())


def test_a_finisher_that_fills_zeros_is_named():
    piece = toy_workpiece(toy_supernet(structure="weights"))
    weight = piece.adapter.linear(piece.adapter.blocks(piece.model)[1], piece.sites[9]).weight
    assert weight.count_nonzero() == piece.plan[9] * len(weight)
    check_finished(piece, Forgetful(), shapes(piece.model))
    weight.data[weight == 0] = 1
    with pytest.raises(prunekit.PluginError, match=r"left more than .* of 24 weights per row of model\.layers\.1"):
        check_finished(piece, Forgetful(), shapes(piece.model))


@dataclass(frozen=True)
class Forgetful(prunekit.Finisher):
    """Does nothing."""

    def finish(self, piece):
        return {}


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt_neox", "mamba", "mamba2"])
def test_the_supernet_answers_as_the_assembled_model_whatever_it_keeps_in_memory(model_type, monkeypatch):
    net, tokens = toy_supernet(model_type, structure="weights"), toy_tokens()
    monkeypatch.setattr(net, "shares", Shares(parts=0))
    start = net.space.uniform()
    others = [net.space.nearest([k + (i % 3 - 1) for i, k in enumerate(start)]), start]
    net.prefetch([start, *others], [tokens])
    for plan in (start, *others):
        logits = torch.cat([part for _, part in net.logits(plan, tokens)])
        with torch.no_grad():
            expected = net.assemble(plan)(tokens.ids, use_cache=False).logits.float()
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)
    assert len(net._parts) == len(net.space.sites)


def test_evaluation_counts_the_zeros_of_linear_maps():
    net = toy_supernet(structure="weights")
    plan = net.space.uniform()
    kept, total = net.space.cost(plan), sum(s.parameters(s.n_groups) for s in net.space.sites)
    assert zeros(net.assemble(plan)) == pytest.approx(1 - kept / total)
    assert zeros(net.model) == 0


def test_statistics_are_those_of_the_map(tmp_path):
    seen = {}

    @dataclass(frozen=True)
    class Curious(KeepLargest):
        @property
        def needs(self):
            return frozenset({"gram", "cross", "drift", "gradient", "absolute", "variance", "contrast"})

        def prune(self, layer, keeps):
            seen[layer.name] = layer
            return super().prune(layer, keeps)

    net = toy_supernet(structure="weights")
    gradients = Gradients.collected(net.model, net.adapter, toy_tokens(), tmp_path / "gradients", Progress())
    space = net.space.zoomed(net.space.uniform(), reach=0)
    build(
        net.model, net.adapter, space, space.uniform(), Curious(), toy_tokens(), CandidateStore(tmp_path / "walk", {}),
        gradients=gradients, contrast=toy_tokens(seed=1), progress=Progress(), dtype=torch.float64,
    )  # fmt: skip
    assert list(seen) == [site.name for site in space.sites]
    q, k, o = (seen[f"model.layers.1.self_attn.{name}_proj"] for name in "qko")
    for name in ("gram", "absolute", "contrast"):
        assert torch.equal(q.require(name), k.require(name))
    assert q.cross.shape == q.weight.shape
    assert q.energy != k.energy
    for site in space.sites:
        layer, linear = seen[site.name], net.adapter.linear(net.blocks[site.block], site)
        assert torch.equal(layer.weight, linear.weight)
        gradient, _ = gradients.read(site.block, net.adapter.path(site), torch.device("cpu"))
        assert torch.equal(layer.require("gradient"), gradient)
        assert (layer.structure, layer.producers, layer.n_groups) == ("weights", (), linear.in_features)
        assert (layer.drift is not None) == site.name.endswith(("o_proj", "down_proj"))
    dense = torch.cat([*entered_inputs(net)])
    torch.testing.assert_close(o.energy, float((dense @ o.weight.T).square().sum() / len(dense)), rtol=1e-6, atol=0)


@torch.no_grad()
def entered_inputs(net):
    """What o of the second block receives in the dense model."""
    caught = []
    handle = net.blocks[1].self_attn.o_proj.register_forward_pre_hook(lambda _, x: caught.append(x[0].flatten(0, 1)))
    net.model(toy_tokens().ids, use_cache=False)
    handle.remove()
    return caught
