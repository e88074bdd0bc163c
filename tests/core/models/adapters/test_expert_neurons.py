"""Neurons inside experts: as many of every expert of a layer, each its own; what they send on, what they cost."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from prunekit.calibration.fill import answers, by_expert, expert_problems, side_by_side
from prunekit.calibration.flow import BlockFlow, installed
from prunekit.calibration.statistics import statistics_of
from prunekit.export.hf import to_transformers
from prunekit.layer.candidates import Candidate
from prunekit.layer.layouts import layout_of
from prunekit.layer.statistics import Need
from prunekit.models.adapters.experts import MixtureOfExperts
from prunekit.models.adapters.find import adapter_for
from prunekit.models.blocks import entered
from prunekit.models.classes import define
from prunekit.plugins.registry import METRICS, PRUNERS
from prunekit.space.forms import GROUPS
from prunekit.space.sites import Site
from prunekit.testing import toy_tokens
from prunekit.testing.models import EXPERTS, tiny
from prunekit.testing.routers import exact_softmax, mask_experts

TOKENS = toy_tokens(windows=3, seqlen=8)
WIDTH = 24  # neurons of an expert: three groups of eight


class Case:
    """A tiny model of experts of 24 neurons, and its first site of neurons."""

    def __init__(self, model_type: str, **overrides: Any) -> None:
        self.name, self.overrides = model_type, overrides
        self.model = self.made().requires_grad_(False)
        found = adapter_for(model_type)
        assert isinstance(found, MixtureOfExperts)
        self.adapter, self.sites = found, found.sites_of(self.model, GROUPS, experts="neurons")
        self.site = next(site for site in self.sites if site.experts)

    def made(self, **others: Any) -> PreTrainedModel:
        wide = {name: WIDTH for name in ("intermediate_size", "moe_intermediate_size") if name in EXPERTS[self.name]}
        return tiny(self.name, **(wide | {"num_hidden_layers": 2} | self.overrides | others))

    @property
    def block(self) -> Any:
        return self.adapter.blocks(self.model)[self.site.block]

    def weight(self, site: Site) -> Tensor:
        return self.adapter.linear(self.adapter.blocks(self.model)[site.block], site).weight.detach()

    def chosen(self, site: Site, count: int, seed: int = 0, scale: float = 1.0) -> Candidate:
        """Every expert keeps `count` groups of neurons of its own choice; attention its first groups."""
        weight, rng = self.weight(site), random.Random(seed)
        if site.experts:
            width = site.d_in // site.experts
            kept = [e * width + j for e in range(site.experts) for j in sorted(rng.sample(range(width), 8 * count))]
            columns = kept
        else:
            kept = list(range(count))
            columns = site.columns(kept)
        held = torch.zeros_like(weight)
        held[:, columns] = weight[:, columns] * scale
        return Candidate(tuple(kept), held)

    def cut(self, counts: Callable[[Site], int]) -> PreTrainedModel:
        small = copy.deepcopy(self.model)
        for site in self.sites:
            self.adapter.remove(small, site, self.chosen(site, counts(site)))
        return small


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(TOKENS.ids, use_cache=False).logits


LAYOUTS = {"mixtral", "gpt_oss"}  # matrices one way round and the other; the rest are as the first
FAMILIES = [name if name in LAYOUTS else pytest.param(name, marks=pytest.mark.slow) for name in EXPERTS]


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


# -- the map -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_map_makes_of_what_neurons_send_on_what_the_experts_add(case: Case) -> None:
    hidden, calls = entered(case.model, case.adapter, TOKENS.ids)
    plain = calls[0](case.block, hidden)
    total, seen = case.adapter.linear(case.block, case.site), list[Tensor]()
    with total.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        looked = calls[0](case.block, hidden)
    torch.testing.assert_close(looked, plain, rtol=0, atol=1e-12)
    assert seen[0].shape == (TOKENS.ids.numel(), WIDTH, 6)
    assert ((seen[0] != 0).any(1).sum(1) == 2).all(), "a token selects two"
    assert torch.equal(calls[0](case.block, hidden), plain), "while nobody looks the experts run as ever"
    assert case.adapter.linear(case.block, case.site) is total, "one object while it is used"


@torch.no_grad()
def test_masked_neurons_are_cut_neurons_at_exactly_their_price(case: Case) -> None:
    for count in (1, 2, 3):
        chosen = case.chosen(case.site, count, seed=count, scale=1.1)
        small = copy.deepcopy(case.model)
        case.adapter.remove(small, case.site, chosen)
        hidden, calls = entered(case.model, case.adapter, TOKENS.ids)
        with installed(case.adapter.linear(case.block, case.site), case.site, chosen.weight):
            masked = calls[0](case.block, hidden)
        cut = calls[0](case.adapter.blocks(small)[case.site.block], hidden)
        torch.testing.assert_close(cut, masked, rtol=0, atol=1e-12)
        assert (cut - calls[0](case.block, hidden)).abs().max() > 1e-3
        freed = sum(p.numel() for p in case.model.parameters()) - sum(p.numel() for p in small.parameters())
        assert freed == case.site.parameters(3) - case.site.parameters(count)
        assert layout_of(case.site).fault(case.site, count, chosen, lambda groups: torch.empty(0)) == ""
    with pytest.raises(ValueError, match="an expert has one neuron or more"):
        case.adapter.pruned(case.block, case.site, Candidate((), torch.zeros_like(chosen.weight)))


@torch.no_grad()
def test_experts_and_neurons_of_those_that_stay_are_both_masks_in_either_order(case: Case) -> None:
    """A masked router and masked neurons are the model without both; what is left counts as experts times neurons."""
    stays, adapter = [0, 2, 3, 5], case.adapter
    whole = next(site for site in adapter.sites(case.model) if site.kind == "experts")
    experts = Candidate(tuple(stays), torch.ones(1, 6, dtype=torch.float64))
    inside = case.chosen(case.site, 2)
    masked = copy.deepcopy(case.model)
    adapter.remove(masked, case.site, inside)
    mask_experts(adapter.blocks(masked)[whole.block].get_submodule(adapter.experts.router), stays)
    assert inside.kept is not None
    ids = torch.tensor(inside.kept).reshape(6, -1)[stays] - WIDTH * torch.tensor(stays)[:, None]
    moved = (ids + WIDTH * torch.arange(4)[:, None]).flatten().tolist()  # the same neurons, of the experts that stay
    made = list[PreTrainedModel]()
    for neurons_first in (True, False):
        small = copy.deepcopy(case.model)
        if neurons_first:
            adapter.remove(small, case.site, inside)
        adapter.remove(small, whole, experts)
        if not neurons_first:
            left = next(site for site in adapter.sites_of(small, GROUPS, experts="neurons") if site.experts)
            assert (left.experts, left.n_groups, left.params_per_group * 6) == (4, 3, case.site.params_per_group * 4)
            weight = adapter.linear(adapter.blocks(small)[left.block], left).weight.detach()
            before = sum(p.numel() for p in small.parameters())
            adapter.remove(small, left, Candidate(tuple(moved), weight))
            assert before - sum(p.numel() for p in small.parameters()) == left.parameters(3) - left.parameters(2)
        made.append(small)
    with exact_softmax():
        torch.testing.assert_close(logits(made[0]), logits(masked), rtol=0, atol=1e-12)
    for one, other in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_candidate_is_read_as_it_was_written_and_another_number_is_a_fault() -> None:
    case = Case("mixtral")
    chosen, layout = case.chosen(case.site, 2), layout_of(case.site)
    written = layout.encode(case.site, 2, chosen)
    assert {name: (value.dtype, [*value.shape]) for name, value in written.items()} == {
        name: (dtype, [*shape]) for name, (dtype, shape) in layout.stored(case.site, 2, torch.float64).items()
    }
    again = layout.decode(case.site, 2, written.__getitem__)
    assert again.kept == chosen.kept
    assert torch.equal(again.weight, chosen.weight)
    assert chosen.kept is not None
    few = Candidate(chosen.kept[1:], chosen.weight)
    assert "16 neurons of every expert were asked" in layout.fault(case.site, 2, few, lambda _: torch.empty(0))
    wrong = Candidate(chosen.kept, chosen.weight + 1)
    assert "not zero" in layout.fault(case.site, 2, wrong, lambda _: torch.empty(0))


# -- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("equal", [True, False])
def test_attention_and_neurons_are_cut_saved_and_loaded(case: Case, equal: bool, tmp_path: Any) -> None:
    def counts(site: Site) -> int:
        return max(1, site.n_groups - 1 - (0 if equal or site.block or site.n_groups < 3 else 1))

    cut = case.cut(counts)
    small = to_transformers(cut, case.adapter)
    assert torch.equal(logits(small), logits(cut))
    alone = case.name in ("olmoe", "qwen2_moe")  # attention in one piece; one layer with experts and one without
    ours = define(case.adapter.family)[2]
    assert (type(small) is ours) == (not equal if case.name != "qwen2_moe" else type(small) is ours)
    if equal and not alone:
        assert type(small) is type(case.model)
        assert getattr(small.config, case.adapter.experts.width) == 16
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert type(again) is type(small)
    assert torch.equal(logits(again), logits(small))
    paid = sum(site.parameters(site.n_groups) - site.parameters(counts(site)) for site in case.sites)
    assert case.model.num_parameters() - again.num_parameters() == paid
    sites = adapter_for(small.config.model_type).sites_of(again, GROUPS, experts="neurons")
    assert [site.n_groups for site in sites] == [counts(site) for site in case.sites], "it can be pruned again"


# -- problems ----------------------------------------------------------------------------------------------


def problems(case: Case, *needs: Need) -> Any:
    asked = frozenset({"gram", *needs})
    flow = BlockFlow(case.model, case.adapter, TOKENS, dense="cross" in needs)
    moments = flow.received_by_expert(case.site, statistics_of(asked))
    return expert_problems(case.model, case.adapter, case.site, moments, asked, damping=1e-9)


def test_moments_of_an_expert_are_of_its_neurons_times_its_weight_over_all_tokens() -> None:
    case = Case("mixtral")
    seen: list[tuple[Tensor, ...]] = []
    experts = case.block.mlp.experts
    with experts.register_forward_pre_hook(lambda _, args: seen.append(args)):
        logits(case.model)
    hidden, ids, weights = seen[0]
    for e, (problem, reached) in enumerate(problems(case, "cross")):
        gram = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        for x, own, gates in zip(hidden, ids, weights, strict=True):
            for gate in gates[own == e]:
                up = experts.gate_up_proj[e] @ x
                sent = gate * nn.functional.silu(up[:WIDTH]) * up[WIDTH:]
                gram += torch.outer(sent, sent) / len(hidden)
        torch.testing.assert_close(problem.gram, gram, rtol=0, atol=1e-9)
        torch.testing.assert_close(problem.weight, experts.down_proj[e])
        torch.testing.assert_close(problem.cross, problem.weight @ gram, rtol=0, atol=1e-9)
        assert reached == bool((ids == e).any())


def test_where_a_token_selects_one_expert_the_errors_add_up_to_that_of_the_layer() -> None:
    case = Case("mixtral", num_experts_per_tok=1)
    found = problems(case)
    pruner = PRUNERS.build("obs")
    each = [answers(pruner, problem, case.site.one, [8], torch.float64)[0] for problem, _ in found]
    joined = side_by_side(each)
    assert layout_of(case.site).fault(case.site, 1, joined, lambda _: torch.empty(0)) == ""
    share = [problem.power if reached else 0.0 for problem, reached in found]
    error = sum(s * problem.error(c.weight) for s, (problem, _), c in zip(share, found, each, strict=True)) / sum(share)
    total, made = case.adapter.linear(case.block, case.site), list[Tensor]()
    for weight in (None, joined.weight):
        with (
            installed(total, case.site, weight),
            total.register_forward_hook(lambda _, __, y: made.append(torch.as_tensor(y))),
        ):
            logits_of_block(case)
    dense, small = made
    assert error == pytest.approx(float((dense - small).square().sum() / dense.square().sum()), rel=1e-9)
    assert 0 < error < 1


@torch.no_grad()
def logits_of_block(case: Case) -> None:
    hidden, calls = entered(case.model, case.adapter, TOKENS.ids)
    calls[0](case.block, hidden)


@pytest.mark.parametrize("method", ["obs", "wanda", "flap"])
def test_an_expert_that_no_token_selects_goes_by_the_size_of_its_weights_and_keeps_them(method: str) -> None:
    case = Case("mixtral")
    mask_experts(case.block.mlp.gate, [0, 1, 3, 5])
    pruner = PRUNERS.build({"name": method})
    found = problems(case, *[need for need in pruner.needs if need not in ("cross", "drift")])
    assert [reached for _, reached in found][2] is False
    assert [reached for _, reached in found][4] is False
    for e in (2, 4):
        layer = found[e][0]
        one, whole = answers(pruner, layer, case.site.one, [8, WIDTH], torch.float64)
        assert torch.equal(whole.weight, layer.weight)
        if method != "flap":  # what it reads does not vary
            norms = layer.weight.square().sum(0) if method == "obs" else layer.weight.abs().sum(0)
            assert one.kept == tuple(sorted(norms.argsort(descending=True)[:8].tolist()))
            torch.testing.assert_close(one.weight[:, one.kept], layer.weight[:, one.kept])


def test_the_flops_of_neurons_are_those_of_the_experts_that_a_token_selects() -> None:
    case = Case("mixtral")
    assert case.site.parameters(2) == 6 * 16 * 3 * 24
    assert METRICS.build("flops").price(case.site, 2) == 2 * 2 * 16 * 3 * 24
    assert len(by_expert(case.weight(case.site), case.site)) == 6
