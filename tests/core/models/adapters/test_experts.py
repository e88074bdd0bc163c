"""Whole experts as groups: what the sum over them is, what is removed with them, and what comes in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from prunekit.calibration.fill import layer_problem
from prunekit.calibration.flow import BlockFlow, ExpertRow, installed
from prunekit.calibration.statistics import statistics_of
from prunekit.export.hf import to_transformers
from prunekit.layer.candidates import Candidate
from prunekit.layer.problem import LayerProblem
from prunekit.layer.statistics import Need
from prunekit.models import checkpoint
from prunekit.models.adapters.experts import MixtureOfExperts, SumOfExperts
from prunekit.models.adapters.find import adapter_for
from prunekit.models.blocks import entered
from prunekit.models.classes import define
from prunekit.models.opening import loaded, stored_as
from prunekit.plugins.adapter import ModelAdapter, UnsupportedModel
from prunekit.plugins.pruner import LocalPruner
from prunekit.plugins.registry import PRUNERS, SIGNALS
from prunekit.space.forms import WEIGHTS
from prunekit.space.sites import Site
from prunekit.system.memory import Room
from prunekit.testing import toy_tokens
from prunekit.testing.models import EXPERTS, tiny
from prunekit.testing.routers import exact_softmax, mask_experts

TOKENS = toy_tokens(windows=3, seqlen=8)
IDS = TOKENS.ids


class Case:
    """A tiny model of experts and what each of them adds to every token, worked out one by one."""

    def __init__(self, model_type: str, **overrides: Any) -> None:
        self.model = tiny(model_type, num_hidden_layers=2, **overrides).requires_grad_(False)
        found = adapter_for(model_type)
        assert isinstance(found, MixtureOfExperts)
        self.adapter, self.site = found, sums_of_experts(found, self.model)[0]

    @property
    def block(self) -> Any:
        return self.adapter.blocks(self.model)[self.site.block]

    @property
    def experts(self) -> Any:
        return self.block.get_submodule(self.adapter.experts.path)

    @property
    def router(self) -> Any:
        return self.block.get_submodule(self.adapter.experts.router)

    def routed(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the experts of the first such block are called with: (tokens, d), and (tokens, selected) twice."""
        seen: list[tuple[Tensor, ...]] = []
        with self.experts.register_forward_pre_hook(lambda _, args: seen.append(args)):
            logits(self.model)
        hidden, ids, weights = seen[0]
        return hidden, ids, weights

    def added(self) -> Tensor:
        """g_e f_e, (tokens, experts, d), token by token."""
        hidden, ids, weights = self.routed()
        found = hidden.new_zeros(len(hidden), self.site.n_groups, hidden.shape[1])
        for t, (own, gates) in enumerate(zip(ids, weights, strict=True)):
            for e, gate in zip(own.tolist(), gates, strict=True):
                one = torch.tensor([[e]])
                found[t, e] = gate * self.experts(hidden[t : t + 1], one, torch.ones(1, 1, dtype=hidden.dtype))[0]
        return found

    def layer(self, needs: Sequence[Need] = ()) -> LayerProblem:
        """The layer problem of the first site."""
        asked = frozenset({"gram", *needs})
        moments = self.flow().received(self.site, statistics_of(asked))
        return layer_problem(self.model, self.adapter, self.site, moments, asked, damping=1e-9)

    def flow(self) -> BlockFlow:
        """A calibration pass that has come to the first site of experts."""
        flow = BlockFlow(self.model, self.adapter, TOKENS, dense=False)
        for site in self.adapter.sites(self.model):
            if site == self.site:
                break
            flow.received(site)
            flow.carry(site, None)
        return flow

    def stream(self) -> Tensor:
        """The sum that the experts of the first such block are added to: (tokens, d)."""
        seen: list[Tensor] = []
        with self.block.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
            logits(self.model)
        total, mlp = seen[0].flatten(0, 1), self.block.mlp
        if hasattr(mlp, "shared_expert"):
            x = self.block.post_attention_layernorm(total)
            total = total + torch.sigmoid(mlp.shared_expert_gate(x)) * mlp.shared_expert(x)
        return total

    def cut(self, kept: Sequence[int], scale: float = 1.0) -> PreTrainedModel:
        """The model with so many experts in its first such block."""
        small = copy.deepcopy(self.model)
        self.adapter.remove(small, self.site, candidate(self.site, kept, scale))
        return small


def sums_of_experts(adapter: ModelAdapter, model: Any) -> list[Site]:
    """The sites whose groups are experts."""
    return [site for site in adapter.sites(model) if site.kind == "experts"]


def candidate(site: Site, kept: Sequence[int], scale: float = 1.0) -> Candidate:
    """Keeps experts; each a tenth larger than the one before where `scale` is not 1."""
    weight = torch.zeros(1, site.n_groups, dtype=torch.float64)
    weight[0, list(kept)] = torch.tensor([scale ** (i + 1) for i in range(len(kept))], dtype=torch.float64)
    return Candidate(tuple(kept), weight)


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with exact_softmax():
        return model(ids, use_cache=False).logits


def pruner(name: str, **options: Any) -> LocalPruner:
    return PRUNERS.build({"name": name, **options})


@pytest.fixture(params=EXPERTS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


# -- the sum over experts --------------------------------------------------------------------------------


def test_the_site_receives_what_every_expert_adds_to_every_channel(case: Case) -> None:
    flow = BlockFlow(case.model, case.adapter, TOKENS, dense=False)
    flow.received(case.site)
    inputs = flow.stream.inputs[0]  # (windows, length, channels, experts)
    assert inputs.shape == (*IDS.shape, 24, 6)
    expected = case.added()
    torch.testing.assert_close(inputs.flatten(0, 1).transpose(1, 2), expected, rtol=0, atol=1e-6)  # float32 routers
    assert ((expected != 0).any(-1).sum(1) == 2).all(), "a token selects two"
    total = case.adapter.linear(case.block, case.site)
    assert isinstance(total, SumOfExperts)
    assert torch.equal(total.weight, torch.ones(1, 6, dtype=torch.float64))
    assert not any(total.weight is p for p in case.model.parameters())


def test_the_sum_is_the_same_object_as_long_as_the_block_is_and_every_copy_has_its_own(case: Case) -> None:
    total = case.adapter.linear(case.block, case.site)
    assert case.adapter.linear(case.block, case.site) is total
    twin = copy.deepcopy(case.model)
    assert case.adapter.linear(case.adapter.blocks(twin)[case.site.block], case.site) is not total
    stored_as(case.model, torch.float32)
    assert case.adapter.linear(case.block, case.site).weight.dtype == torch.float32
    assert len(case.adapter.linear(case.adapter.blocks(case.cut([0, 1, 4]))[0], case.site).weight[0]) == 3


@torch.no_grad()
def test_a_block_is_the_stream_before_its_experts_and_what_they_and_a_shared_expert_add(case: Case) -> None:
    hidden, calls = entered(case.model, case.adapter, IDS)
    added = list[Tensor]()
    total = case.adapter.linear(case.block, case.site)
    with total.register_forward_hook(lambda _, __, out: added.append(torch.as_tensor(out))):
        out = calls[case.site.block](case.block, hidden)
    whole = (case.stream() + added[0]).reshape(out.shape)
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-6)


@torch.no_grad()
def test_while_nobody_looks_the_experts_run_as_ever(case: Case) -> None:
    hidden, calls = entered(case.model, case.adapter, IDS)
    plain = case.block(hidden, *calls[0].args, **calls[0].kwargs)
    assert torch.equal(calls[0](case.block, hidden), plain if isinstance(plain, Tensor) else plain[0])
    with case.adapter.exposed(case.block):
        assert "forward" not in vars(case.experts)
    total = case.adapter.linear(case.block, case.site)
    with installed(total, case.site, candidate(case.site, [0, 1, 2]).weight), case.adapter.exposed(case.block):
        assert "forward" in vars(case.experts)
    assert "forward" not in vars(case.experts)


@pytest.mark.parametrize("bound", [None, 0])
def test_what_reaches_the_sum_is_kept_without_its_zeros_bit_for_bit(bound: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 7, 11, generator=generator)  # (windows, length, channels, experts)
    x[:, :, 0] = 0.0  # of whole channels, too
    x *= torch.rand(3, 5, 1, 11, generator=generator) < 0.2
    row = ExpertRow(room := Room(bound))
    for part in x.split(1):
        row.append(part)
    assert all(torch.equal(kept, part) for kept, part in zip(row, x.split(1), strict=True))
    assert room.held + room.spilled < x.nbytes * 0.6
    row.clear()
    assert (len(row), room.held, room.spilled) == (0, 0, 0)


# -- removal -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [[0, 2, 3, 5], [1, 4]], ids=["four", "as many as a token selects"])
def test_a_cut_layer_is_the_dense_one_whose_router_never_selects_what_is_gone(case: Case, kept: list[int]) -> None:
    masked = copy.deepcopy(case.model)
    block = case.adapter.blocks(masked)[case.site.block]
    mask_experts(block.get_submodule(case.adapter.experts.router), kept)
    small = case.cut(kept)
    torch.testing.assert_close(logits(small), logits(masked), rtol=0, atol=1e-12)
    assert (logits(small) - logits(case.model)).abs().max() > 1e-3  # the comparison can fail
    freed = sum(p.numel() for p in case.model.parameters()) - sum(p.numel() for p in small.parameters())
    assert freed == case.site.parameters(6) - case.site.parameters(len(kept))


def test_a_factor_of_an_expert_goes_into_its_output(case: Case) -> None:
    kept, masked = [0, 2, 5], copy.deepcopy(case.model)
    block = case.adapter.blocks(masked)[case.site.block]
    mask_experts(block.get_submodule(case.adapter.experts.router), kept)
    chosen = candidate(case.site, kept, scale=1.1)
    total, (hidden, calls) = case.adapter.linear(block, case.site), entered(masked, case.adapter, IDS)
    small = case.cut(kept, scale=1.1)
    with torch.no_grad(), exact_softmax(), installed(total, case.site, chosen.weight):
        expected = calls[0](block, hidden)
        found = calls[0](case.adapter.blocks(small)[0], hidden)
        plain = calls[0](case.adapter.blocks(case.cut(kept))[0], hidden)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (found - plain).abs().max() > 1e-3


def test_removal_of_experts_that_nobody_selects_changes_nothing() -> None:
    for name in ("mixtral", "gpt_oss"):  # weights normalised over the selected: of a softmax over all they would rise
        case = Case(name)
        mask_experts(case.router, [0, 2, 3, 5])
        layer = case.layer([*pruner("reap").needs, *pruner("expert-frequency").needs])
        for method in ("reap", "expert-frequency"):
            scores = pruner(method).scores(layer)
            assert scores is not None
            assert (scores == 0).nonzero().flatten().tolist() == [1, 4]
        (kept,) = pruner("reap").prune(layer, [4])
        assert kept.kept == (0, 2, 3, 5)
        assert layer.error(kept.weight) == 0
        dense = logits(case.model)
        del case.router.forward
        small = case.cut([0, 2, 3, 5])
        torch.testing.assert_close(logits(small), dense, rtol=0, atol=1e-12)


def test_one_expert_of_each_token_and_all_of_them() -> None:
    for selected in (1, 6):
        case = Case("mixtral", num_experts_per_tok=selected)
        assert case.site.least == selected
        assert ((case.added() != 0).any(-1).sum(1) == selected).all()
        masked = copy.deepcopy(case.model)
        mask_experts(case.adapter.blocks(masked)[0].get_submodule("mlp.gate"), kept := list(range(selected)))
        torch.testing.assert_close(logits(case.cut(kept)), logits(masked), rtol=0, atol=1e-12)


def test_fewer_experts_than_a_token_selects_are_refused(case: Case) -> None:
    for few in ([], [3]):
        with pytest.raises(ValueError, match=r"a token selects 2 experts, and the candidate keeps \("):
            case.adapter.pruned(case.block, case.site, candidate(case.site, few))


def test_where_experts_go_what_is_no_routed_expert_stays() -> None:
    case = Case("qwen2_moe")
    assert [site.block for site in sums_of_experts(case.adapter, case.model)] == [0], "the other has a plain MLP"
    small, before = case.cut([0, 1, 2]), dict(case.model.named_parameters())
    for name, value in small.named_parameters():
        routed = name.startswith("model.layers.0.mlp.") and "shared" not in name
        assert (value.shape[0] == 3) if routed else torch.equal(value, before[name])
    assert type(to_transformers(small, case.adapter)).__name__ == "Qwen2MoeForCausalLM"


def test_single_weights_of_experts_are_refused(case: Case) -> None:
    with pytest.raises(UnsupportedModel, match="single weights of experts cannot be removed yet"):
        case.adapter.linear_sites(case.model, WEIGHTS)


# -- errors and scores ---------------------------------------------------------------------------------------


def test_the_error_of_a_removed_set_is_the_sum_of_its_gram(case: Case) -> None:
    """1_Sᵀ G 1_S / 1ᵀ G 1 is what masks at the dense routing lose, worked out by running the experts without S."""
    layer, (hidden, ids, weights) = case.layer(), case.routed()
    dense = case.experts(hidden, ids, weights)
    for removed in [*combinations(range(6), 1), *combinations(range(6), 2), *combinations(range(6), 4)]:
        gone = torch.isin(ids, torch.tensor(removed))
        lost = dense - case.experts(hidden, ids, weights.masked_fill(gone, 0.0))
        ones = torch.zeros(6, dtype=torch.float64)
        ones[list(removed)] = 1.0
        assert float(ones @ layer.gram @ ones) == pytest.approx(float(lost.square().mean()), rel=1e-5, abs=1e-12)
        stays = [e for e in range(6) if e not in removed]
        expected = float(lost.square().sum() / dense.square().sum())
        assert layer.error(layer.masked(stays).weight) == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_a_refit_is_the_least_squares_factor_of_every_expert(case: Case) -> None:
    layer, added = case.layer(), case.added()
    samples = added.transpose(1, 2).reshape(-1, 6)  # channels of tokens
    kept = [0, 1, 3, 4]
    best = torch.linalg.pinv(samples[:, kept]) @ samples.sum(1)
    found = layer.refitted(kept).weight[0, kept]  # an expert that nobody selects may have any
    torch.testing.assert_close(samples[:, kept] @ found, samples[:, kept] @ best, rtol=0, atol=1e-4)


def test_reap_is_the_mean_over_its_tokens_of_gate_times_norm(case: Case) -> None:
    hidden, ids, weights = case.routed()
    expected = []
    for e in range(6):
        norms = []
        for t, (own, gates) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
            if e in own:
                f = case.experts(hidden[t : t + 1], torch.tensor([[e]]), torch.ones(1, 1, dtype=torch.float64))[0]
                norms.append(gates[own.index(e)] * float(f.norm()))
        expected.append(sum(norms) / len(norms) if norms else 0.0)
    reap = pruner("reap")
    scores = reap.scores(layer := case.layer([*reap.needs]))
    assert scores is not None
    assert scores.tolist() == pytest.approx(expected, rel=1e-5)
    (kept,) = reap.prune(layer, [4])
    assert kept.kept == tuple(sorted(sorted(range(6), key=lambda e: (-expected[e], e))[:4]))
    assert set(kept.weight[0].tolist()) == {0.0, 1.0}, "weights stay"


def test_frequency_is_the_share_of_tokens_that_select_an_expert(case: Case) -> None:
    _, ids, _ = case.routed()
    frequency = pruner("expert-frequency")
    scores = frequency.scores(case.layer([*frequency.needs]))
    assert scores is not None
    assert scores.tolist() == pytest.approx([int((ids == e).sum()) / len(ids) for e in range(6)])


def test_on_a_tie_the_lower_id_stays() -> None:
    case = Case("mixtral")
    for value in (*case.experts.parameters(), case.router.weight):
        value.data[:] = value.data[:1]  # six times the same expert, of which every token selects the same two
    selected = {*case.routed()[1][0].tolist()}
    lowest = min({*range(6)} - selected)
    for method in ("reap", "expert-frequency", "wanda"):
        chosen = pruner(method)
        (found,) = chosen.prune(case.layer([*chosen.needs]), [3])
        assert found.kept == tuple(sorted({*selected, lowest})), method
    (found,) = pruner("magnitude").prune(case.layer(["producers"]), [3])
    assert found.kept == (0, 1, 2)


def test_magnitude_counts_everything_that_goes_with_an_expert(case: Case) -> None:
    scores = pruner("magnitude").scores(case.layer(["producers"]))
    every = [*case.experts.parameters(), *case.router.parameters()]
    expected = [1.0 + sum(float(value[e].square().sum()) for value in every) for e in range(6)]  # 1: of the map of ones
    assert scores is not None
    assert scores.tolist() == pytest.approx(expected)


def test_statistics_of_outputs_are_of_whole_tokens(case: Case) -> None:
    added = case.added()
    y = added.sum(1)
    layer = case.layer(["relative", "mean"])
    shares = added.square().sum(-1) / y.square().sum(-1, keepdim=True)
    torch.testing.assert_close(layer.require("relative"), shares.mean(0), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(layer.require("mean"), added.mean((0, 2)), rtol=1e-5, atol=1e-8)
    x = case.stream()
    expected = 1 - torch.nn.functional.cosine_similarity(x, x + y, dim=-1).mean()
    influence = SIGNALS.build("influence")
    assert influence.measure(case.layer([*influence.needs])) == pytest.approx(float(expected), rel=1e-4)


PLAIN = ["wanda", "obs", "admm", "minitron", "channel", "fasp", "flap", "osscar", "ziplm", "slimgpt", "second-moment"]


@pytest.mark.parametrize("method", PLAIN)
def test_pruners_of_groups_prune_experts(method: str) -> None:
    case, chosen = Case("mixtral"), pruner(method)
    layer = case.layer([*chosen.needs]) if not {"cross", "drift"} & {*chosen.needs} else case.layer()
    found = chosen.prune(layer, [2, 4, 6])
    assert [len(each.kept or ()) for each in found] == [2, 4, 6]
    assert layer.error(found[0].weight) >= layer.error(found[1].weight) - 1e-12 >= layer.error(found[2].weight) - 1e-6
    small = copy.deepcopy(case.model)
    case.adapter.remove(small, case.site, found[1])
    assert bool(logits(small).isfinite().all())


# -- files -------------------------------------------------------------------------------------------------


@pytest.fixture(params=EXPERTS)
def saved(request: pytest.FixtureRequest, tmp_path: Any) -> tuple[str, str, PreTrainedModel]:
    model = tiny(request.param, num_hidden_layers=2)
    model.save_pretrained(tmp_path)
    return request.param, str(tmp_path), model


def test_every_tensor_of_a_checkpoint_of_experts_is_known(saved: tuple[str, str, PreTrainedModel]) -> None:
    _, path, model = saved
    assert checkpoint.unused(path, model) == set()
    assert checkpoint.converted(path, model, torch.float64) == {}
    assert checkpoint.converted(path, model, torch.float32)["float64"] > 20
    again = loaded(path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_layers_with_different_numbers_of_experts_are_saved_and_loaded(case: Case, tmp_path: Any) -> None:
    model = tiny(name := case.model.config.model_type)  # three blocks
    plan: Mapping[Site, Sequence[int]] = {
        site: [0, 2, 3, 5] if site.block == 0 else [1, 4] for site in sums_of_experts(case.adapter, model)
    }
    for site, kept in plan.items():
        case.adapter.remove(model, site, candidate(site, kept))
    small = to_transformers(model, case.adapter)
    config_class, _, causal = define(case.adapter.family)
    assert (type(small), small.config.model_type) == (causal, f"prunekit_{name}")
    assert isinstance(small.config, config_class)
    counts = [getattr(layer, case.adapter.experts.count) for layer in small.config.per_layer_config]
    assert [counts[site.block] for site in plan] == [len(kept) for kept in plan.values()]
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert type(again) is causal
    assert torch.equal(logits(again), logits(small))
    assert torch.equal(logits(small), logits(model))
    first = sums_of_experts(adapter_for(small.config.model_type), again)[0]
    assert first.n_groups == 4, "it can be pruned again"


def cut_beside(case: Case, counts: Callable[[Site], int]) -> tuple[PreTrainedModel, int]:
    """A model whose attention and experts keep their last groups, and how many parameters that should have freed."""
    model, freed = tiny(case.model.config.model_type).requires_grad_(False), 0
    for site in case.adapter.sites(model):
        last = range(site.n_groups - counts(site), site.n_groups)
        weight = case.adapter.linear(case.adapter.blocks(model)[site.block], site).weight.detach()
        case.adapter.remove(model, site, Candidate(tuple(last), weight))
        freed += site.parameters(site.n_groups) - site.parameters(counts(site))
    return to_transformers(model, case.adapter), freed


def test_attention_and_experts_of_one_size_are_of_the_stock_class(case: Case, tmp_path: Any) -> None:
    # KV groups; attention of OLMoE, which is one group; experts; neurons of a shared expert, of a plain MLP
    counts = {3: 2, 1: 1, 6: 4, 7: 5, 16: 9}
    small, freed = cut_beside(case, lambda site: counts[site.n_groups])
    dense = tiny(case.model.config.model_type)
    assert type(small) is type(dense)
    assert small.config.num_attention_heads == (6 if case.adapter.heads_apart(case.block) is False else 4)
    assert dense.num_parameters() - small.num_parameters() == freed > 0
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert type(again) is type(dense)
    assert torch.equal(logits(again), logits(small))


def test_layers_of_unequal_attention_and_experts_are_saved_loaded_and_generate(case: Case, tmp_path: Any) -> None:
    kept = {(0, "attention"): 0, (1, "attention"): 1, (0, "experts"): 4, (1, "experts"): 2}
    small, freed = cut_beside(case, lambda site: kept.get((site.block, site.kind), site.n_groups))
    assert tiny(case.model.config.model_type).num_parameters() - small.num_parameters() == freed
    assert type(small) is define(case.adapter.family)[2]
    assert small.config.per_layer_config[0].skip == ["attention"]
    small.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    assert torch.equal(logits(again), logits(small))
    sites = adapter_for(small.config.model_type).sites(again)
    assert (0, "attention") not in [(site.block, site.kind) for site in sites], "it can be pruned again"
    again.float()  # no cache of zeros holds a mask of float64
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS), "pad_token_id": 0}
    plain = again.generate(IDS, use_cache=False, **options)
    assert torch.equal(plain, again.generate(IDS, **options))
    assert torch.equal(plain, again.generate(IDS, cache_implementation="static", **options))


def test_experts_see_what_pruned_attention_carries(case: Case) -> None:
    """Moments of the sum over experts behind attention that keeps one group are those of a model so cut."""
    attention = next(site for site in case.adapter.sites(case.model) if site.kind == "attention")
    weight = case.adapter.linear(case.block, attention).weight.detach().clone()
    weight[:, attention.columns(range(1, attention.n_groups))] = 0
    flow = BlockFlow(case.model, case.adapter, TOKENS, dense=False)
    flow.received(attention)
    flow.carry(attention, weight)
    found = flow.received(case.site).gram
    small = copy.deepcopy(case.model)
    case.adapter.remove(small, attention, Candidate((0,), weight))
    expected = BlockFlow(small, case.adapter, TOKENS, dense=False).received(case.site).gram
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    dense = BlockFlow(case.model, case.adapter, TOKENS, dense=False).received(case.site).gram
    assert (attention.n_groups == 1) == bool(torch.allclose(found, dense, rtol=1e-9, atol=0))


def test_a_sink_goes_with_its_query_head() -> None:
    case = Case("gpt_oss")
    site = next(site for site in case.adapter.sites(case.model) if site.kind == "attention")
    weight = case.adapter.linear(case.block, site).weight.detach()
    before = case.block.self_attn.sinks.detach().clone()
    (whole,) = case.adapter.pruned(case.block, site, Candidate((0, 2), weight)).values()
    assert torch.equal(whole.get_parameter("sinks"), before[[0, 1, 4, 5]])  # two query heads share a KV head
    assert torch.equal(case.block.self_attn.sinks, before), "the block stays as it is"


def test_a_model_with_unequal_experts_made_from_its_config_is_initialised(case: Case) -> None:
    model = tiny(case.model.config.model_type)
    for site in sums_of_experts(case.adapter, model):
        case.adapter.remove(model, site, candidate(site, [0, 1, 2] if site.block == 0 else [0, 1]))
    config, made = to_transformers(model, case.adapter).config, []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(AutoModelForCausalLM.from_config(config))
    for (name, one), (_, other) in zip(made[0].named_parameters(), made[1].named_parameters(), strict=True):
        assert torch.equal(one, other), name
        assert bool(one.isfinite().all())


def test_a_config_with_fewer_experts_than_a_token_selects_is_refused(case: Case) -> None:
    model = tiny(case.model.config.model_type)
    for site in sums_of_experts(case.adapter, model):
        case.adapter.remove(model, site, candidate(site, [0, 1, 2] if site.block == 0 else [0, 1]))
    values = to_transformers(model, case.adapter).config.to_dict()
    layers = {int(index): dict(entry) for index, entry in values.pop("per_layer_config").items()}
    layers[0][case.adapter.experts.count] = 1
    with pytest.raises(Exception, match="layer 0: 1 experts, and a token selects 2"):
        define(case.adapter.family)[0](**values, per_layer_config=layers)
