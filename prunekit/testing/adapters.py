"""What every adapter promises, as a test class: subclass it and set `plugin`."""

from __future__ import annotations

import copy
import random
from contextlib import ExitStack
from itertools import groupby
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.export.hf import to_transformers
from prunekit.layer.candidates import Candidate
from prunekit.models.blocks import entered
from prunekit.plugins.adapter import Heads, ModelAdapter, UnsupportedModel
from prunekit.plugins.registry import ADAPTERS
from prunekit.space.forms import WEIGHTS
from prunekit.space.sites import Site
from prunekit.testing.models import tiny
from prunekit.testing.supernets import toy_tokens

Plan = dict[Site, Candidate]


class AdapterSuite:
    """A cut model computes what the masked dense model computes, at exactly the price that was named.

    What is asked of groups is skipped for a family that says it has none.
    """

    plugin: ClassVar[ModelAdapter]

    def test_blocks_one_by_one_are_the_model(self) -> None:
        model = self._model()
        hidden, calls = entered(model, self.plugin, toy_tokens().ids)
        with torch.no_grad():
            for call, block in zip(calls, self.plugin.blocks(model), strict=True):
                hidden = call(block, hidden)
            torch.testing.assert_close(self.plugin.logits(model, hidden), _logits(model))

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("heads", ["kv", "query"])
    def test_cut_equals_masked(self, seed: int, heads: Heads) -> None:
        model, rng = self._model(), random.Random(seed)
        plan: Plan = {}
        for site in self._groups(model, heads):
            groups = rng.sample(range(site.n_groups), rng.randint(0, site.n_groups))
            plan[site] = self._candidate(model, site, groups)
        small = self._cut(model, plan)
        torch.testing.assert_close(_logits(small), self._masked(model, plan), rtol=0, atol=1e-10)
        exported = to_transformers(small, self.plugin)
        torch.testing.assert_close(_logits(exported), _logits(small), rtol=0, atol=1e-10)

    def test_keeping_everything_changes_nothing(self) -> None:
        model = self._model()
        plan = {s: self._candidate(model, s, range(s.n_groups)) for s in self._groups(model)}
        torch.testing.assert_close(_logits(self._cut(model, plan)), _logits(model), rtol=0, atol=1e-10)

    @pytest.mark.parametrize("heads", ["kv", "query"])
    def test_prices_are_parameter_counts(self, heads: Heads) -> None:
        model = self._model()
        for site in self._groups(model, heads):
            for kept in {0, 1, site.n_groups // 2, site.n_groups}:
                small = self._cut(model, {site: self._candidate(model, site, range(kept))})
                freed = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
                assert freed == site.parameters(site.n_groups) - site.parameters(kept)

    def test_a_cut_model_generates_with_a_cache_what_it_generates_without(self) -> None:
        model = self._model()
        sites = self._groups(model)
        plan = {s: self._candidate(model, s, range(0 if i == 0 else 1)) for i, s in enumerate(sites)}
        self._assert_generates(self._cut(model, plan))

    def test_a_model_with_zeros_generates_with_a_cache_what_it_generates_without(self) -> None:
        model = self._model()
        sites = self.plugin.linear_sites(model, WEIGHTS)
        self._assert_generates(self._cut(model, {s: Candidate(None, _halved(model, s)) for s in sites}))

    def _assert_generates(self, model: PreTrainedModel) -> None:
        small, ids = to_transformers(model, self.plugin), toy_tokens(windows=2).ids
        options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        cached, plain = (small.generate(ids, use_cache=use, **options) for use in (True, False))  # type: ignore[operator]
        assert torch.equal(cached, plain)

    def test_linear_sites_are_all_linear_maps_of_the_blocks(self) -> None:
        model = self._model()
        blocks = self.plugin.blocks(model)
        maps = {id(module) for module in blocks.modules() if isinstance(module, nn.Linear)}
        sites = self.plugin.linear_sites(model, WEIGHTS)
        assert [id(model.get_submodule(s.name)) for s in sites] == [
            id(self.plugin.linear(blocks[s.block], s)) for s in sites
        ]
        assert {id(self.plugin.linear(blocks[s.block], s)) for s in sites} == maps
        assert len(sites) == len(maps)
        for site in sites:
            linear = self.plugin.linear(blocks[site.block], site)
            assert (site.d_in, site.parameters(1)) == (linear.in_features, linear.out_features)

    def test_linear_sites_come_in_order_and_say_who_shares_an_input(self) -> None:
        model = self._model()
        seen: list[tuple[str, Tensor]] = []
        sites = self.plugin.linear_sites(model, WEIGHTS)
        with ExitStack() as stack:
            for site in sites:

                def listen(_: nn.Module, args: tuple[Tensor, ...], name: str = site.name) -> None:
                    seen.append((name, args[0].flatten(0, -2)))

                stack.enter_context(model.get_submodule(site.name).register_forward_pre_hook(listen))
            for block in self.plugin.blocks(model):
                stack.enter_context(self.plugin.exposed(block))
            _logits(model)
        shared = {site.name: site.input_group or site.name for site in sites}
        stages = [name for name, _ in groupby(shared[name] for name, _ in seen)]
        assert stages == [name for name, _ in groupby(shared.values())], "an input is whole before it is asked for"
        inputs = dict(seen)
        for site in sites:
            assert torch.equal(inputs[site.name], inputs[shared[site.name]])

    def test_linear_maps_are_exposed_for_a_while_and_nothing_else_changes(self) -> None:
        model = self._model().train()
        modules, logits = dict(model.named_modules()), _logits(model)
        with ExitStack() as stack:
            for block in self.plugin.blocks(model):
                stack.enter_context(self.plugin.exposed(block))
            assert torch.equal(_logits(model), logits)
        assert dict(model.named_modules()) == modules
        assert all(module.training and "forward" not in vars(module) for module in modules.values())

    @pytest.mark.parametrize("seed", range(2))
    def test_zeros_in_linear_maps_are_zeros_in_the_model(self, seed: int) -> None:
        model, generator = self._model(), torch.Generator().manual_seed(seed)
        masked, small = copy.deepcopy(model), copy.deepcopy(model)
        for i, site in enumerate(self.plugin.linear_sites(model, WEIGHTS)):
            own = self.plugin.linear(self.plugin.blocks(model)[site.block], site).weight
            mask = torch.rand(own.shape, generator=generator) < (0.0 if i == 0 else 0.7)
            self.plugin.linear(self.plugin.blocks(masked)[site.block], site).weight.data *= mask
            self.plugin.remove(small, site, Candidate(None, own * mask))
        torch.testing.assert_close(_logits(small), _logits(masked), rtol=0, atol=0)
        exported = to_transformers(small, self.plugin)
        assert type(exported) is type(model), "shapes are as before, so the stock class holds them"
        torch.testing.assert_close(_logits(exported), _logits(small), rtol=0, atol=1e-10)
        assert exported.num_parameters() == model.num_parameters()

    def test_the_dense_model_is_left_alone(self) -> None:
        model = self._model()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        try:
            groups = self.plugin.sites(model)
        except UnsupportedModel:
            groups = ()
        for site in groups:
            self.plugin.pruned(self.plugin.blocks(model)[site.block], site, self._candidate(model, site, [0]))
        for site in self.plugin.linear_sites(model, WEIGHTS):
            block = self.plugin.blocks(model)[site.block]
            weight = torch.zeros_like(self.plugin.linear(block, site).weight)
            self.plugin.pruned(block, site, Candidate(None, weight))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def _model(self) -> PreTrainedModel:
        return tiny(ADAPTERS.name_of(self.plugin) or "").requires_grad_(False)

    def _groups(self, model: PreTrainedModel, heads: Heads = "kv") -> tuple[Site, ...]:
        try:
            return self.plugin.sites(model, heads=heads)
        except UnsupportedModel as error:
            pytest.skip(str(error))

    def _candidate(self, model: PreTrainedModel, site: Site, groups: range | list[int]) -> Candidate:
        own = self.plugin.linear(self.plugin.blocks(model)[site.block], site).weight.detach()
        weight, columns = torch.zeros_like(own), site.columns(sorted(groups))
        weight[:, columns] = own[:, columns]
        return Candidate(tuple(sorted(groups)), weight)

    def _cut(self, model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
        small = copy.deepcopy(model)
        for site, candidate in plan.items():
            self.plugin.remove(small, site, candidate)
        return small

    def _masked(self, model: PreTrainedModel, plan: Plan) -> Tensor:
        twin = copy.deepcopy(model)
        for site, candidate in plan.items():
            linear = self.plugin.linear(self.plugin.blocks(twin)[site.block], site)
            linear.weight.data.copy_(candidate.weight)
            if not candidate.kept and linear.bias is not None:
                linear.bias.data.zero_()
        return _logits(twin)


def _halved(model: PreTrainedModel, site: Site) -> Tensor:
    """The weight of the site's linear map with every other column zero."""
    weight = model.get_submodule(site.name).get_parameter("weight").detach().clone()
    weight[:, 1::2] = 0
    return weight


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    return model(toy_tokens().ids, use_cache=False).logits
