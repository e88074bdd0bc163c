"""What every adapter promises, as a test class: subclass it and set `plugin`."""

from __future__ import annotations

import copy
import random
from contextlib import ExitStack, nullcontext, suppress
from itertools import groupby
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.export.hf import to_transformers
from prunekit.layer.candidates import Candidate, product
from prunekit.models.blocks import entered
from prunekit.plugins.adapter import Heads, ModelAdapter, UnsupportedModel
from prunekit.plugins.registry import ADAPTERS
from prunekit.space.forms import RANKS, WEIGHTS
from prunekit.space.sites import Site
from prunekit.testing.models import tiny
from prunekit.testing.routers import exact_softmax, mask_experts
from prunekit.testing.supernets import toy_tokens

Plan = dict[Site, Candidate]


class AdapterSuite:
    """A cut model computes what the masked dense model computes, at exactly the price that was named.

    Of experts, masked is the router: it gives those that are gone a score of -∞. What is asked of groups is skipped for
    a family that says it has none, and so is what is asked of single weights.
    """

    plugin: ClassVar[ModelAdapter]

    @pytest.fixture
    def model(self) -> PreTrainedModel:
        return self.plugin.opened(tiny(ADAPTERS.name_of(self.plugin) or "")).requires_grad_(False)

    def test_blocks_one_by_one_are_the_model(self, model: PreTrainedModel) -> None:
        hidden, calls = entered(model, self.plugin, toy_tokens().ids)
        with torch.no_grad():
            for call, block in zip(calls, self.plugin.blocks(model), strict=True):
                hidden = call(block, hidden)
            torch.testing.assert_close(self.plugin.logits(model, hidden), _logits(model))

    @torch.no_grad()
    def test_a_block_is_the_sum_that_its_adapter_says_it_is(self, model: PreTrainedModel) -> None:
        hidden, calls = entered(model, self.plugin, toy_tokens().ids)
        ends = [site for site in self._weights(model) if self.plugin.part(site) is not None]
        for index, (call, block) in enumerate(zip(calls, self.plugin.blocks(model), strict=True)):
            total, before = hidden.clone(), hidden

            def add(*made: Any, total: Tensor = total) -> None:
                total += made[-1].reshape(total.shape)

            with ExitStack() as stack:
                for site in (site for site in ends if site.block == index):
                    stack.enter_context(self._linear(model, site).register_forward_hook(add))
                hidden = call(block, before)
            # state spaces add in float32
            assert torch.allclose(hidden, total.to(hidden), rtol=0, atol=1e-4) == self.plugin.adds_up(block)

    @pytest.mark.parametrize("seed", range(2))
    @pytest.mark.parametrize("heads", ["kv", "query"])
    def test_cut_equals_masked(self, model: PreTrainedModel, seed: int, heads: Heads) -> None:
        rng = random.Random(seed)
        plan: Plan = {}
        for site in self._groups(model, heads):
            groups = rng.sample(range(site.n_groups), rng.randint(site.least, site.n_groups))
            plan[site] = self._candidate(model, site, groups)
        small, routed = self._cut(model, plan), any(site.kind == "experts" for site in plan)
        with exact_softmax() if routed else nullcontext():  # in float32 a sum depends on how many terms there are
            torch.testing.assert_close(_logits(small), self._masked(model, plan), rtol=0, atol=1e-10)
        exported = to_transformers(small, self.plugin)
        torch.testing.assert_close(_logits(exported), _logits(small), rtol=0, atol=1e-10)

    def test_keeping_everything_changes_nothing(self, model: PreTrainedModel) -> None:
        plan = {s: self._candidate(model, s, range(s.n_groups)) for s in self._groups(model)}
        torch.testing.assert_close(_logits(self._cut(model, plan)), _logits(model), rtol=0, atol=1e-10)

    @pytest.mark.parametrize("heads", ["kv", "query"])
    def test_prices_are_parameter_counts(self, model: PreTrainedModel, heads: Heads) -> None:
        for site in self._groups(model, heads):
            for kept in {max(kept, site.least) for kept in (0, 1, site.n_groups // 2, site.n_groups)}:
                small = self._cut(model, {site: self._candidate(model, site, range(kept))})
                freed = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
                assert freed == site.parameters(site.n_groups) - site.parameters(kept)

    def test_a_cut_model_generates_with_a_cache_what_it_generates_without(self, model: PreTrainedModel) -> None:
        sites = self._groups(model)
        plan = {s: self._candidate(model, s, range(max(s.least, 0 if i == 0 else 1))) for i, s in enumerate(sites)}
        self._assert_generates(self._cut(model, plan))

    def test_a_model_with_zeros_generates_with_a_cache_what_it_generates_without(self, model: PreTrainedModel) -> None:
        sites = self._weights(model)
        half = {s: self._linear(model, s).weight * (torch.arange(s.d_in) % 2 == 0) for s in sites}
        self._assert_generates(self._cut(model, {s: Candidate(None, weight) for s, weight in half.items()}))

    def _assert_generates(self, model: PreTrainedModel) -> None:
        small, ids = to_transformers(model, self.plugin), toy_tokens(windows=2).ids
        options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        cached, plain = (small.generate(ids, use_cache=use, **options) for use in (True, False))  # type: ignore[operator]
        assert torch.equal(cached, plain)

    def test_linear_sites_are_all_linear_maps_of_the_blocks(self, model: PreTrainedModel) -> None:
        maps = [module for module in self.plugin.blocks(model).modules() if isinstance(module, nn.Linear)]
        sites = self._weights(model)
        assert sorted(map(id, maps)) == sorted(id(self._linear(model, site)) for site in sites), "each once"
        for site in sites:
            linear = self._linear(model, site)
            assert model.get_submodule(site.name) is linear
            assert (site.d_in, site.parameters(1)) == (linear.in_features, linear.out_features)

    def test_linear_sites_come_in_order_and_say_who_shares_an_input(self, model: PreTrainedModel) -> None:
        seen: list[tuple[str, Tensor]] = []
        sites = self._weights(model)
        with ExitStack() as stack:
            for site in sites:

                def listen(_: nn.Module, args: tuple[Tensor, ...], name: str = site.name) -> None:
                    seen.append((name, args[0].flatten(0, -2)))

                stack.enter_context(model.get_submodule(site.name).register_forward_pre_hook(listen))
            self._expose(model, stack)
            _logits(model)
        shared = {site.name: site.input_group or site.name for site in sites}
        stages = [name for name, _ in groupby(shared[name] for name, _ in seen)]
        assert stages == [name for name, _ in groupby(shared.values())], "an input is whole before it is asked for"
        inputs = dict(seen)
        for site in sites:
            assert torch.equal(inputs[site.name], inputs[shared[site.name]])

    def test_linear_maps_are_exposed_for_a_while_and_nothing_else_changes(self, model: PreTrainedModel) -> None:
        modules, logits = dict(model.train().named_modules()), _logits(model)
        with ExitStack() as stack:
            self._expose(model, stack)
            assert torch.equal(_logits(model), logits)
        assert dict(model.named_modules()) == modules
        assert all(module.training and "forward" not in vars(module) for module in modules.values())

    @pytest.mark.parametrize("seed", range(2))
    def test_zeros_in_linear_maps_are_zeros_in_the_model(self, model: PreTrainedModel, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        masked, small = copy.deepcopy(model), copy.deepcopy(model)
        for i, site in enumerate(self._weights(model)):
            own = self._linear(model, site).weight
            mask = torch.rand(own.shape, generator=generator) < (0.0 if i == 0 else 0.7)
            self._linear(masked, site).weight.data *= mask
            self.plugin.remove(small, site, Candidate(None, own * mask))
        torch.testing.assert_close(_logits(small), _logits(masked), rtol=0, atol=0)
        exported = to_transformers(small, self.plugin)
        assert type(exported) is type(model), "shapes are as before, so the stock class holds them"
        torch.testing.assert_close(_logits(exported), _logits(small), rtol=0, atol=1e-10)
        assert exported.num_parameters() == model.num_parameters()

    @pytest.mark.parametrize("seed", range(2))
    def test_a_map_of_low_rank_is_the_product_of_its_factors_at_exactly_its_price(
        self, model: PreTrainedModel, seed: int
    ) -> None:
        try:
            sites = self.plugin.sites_of(model, RANKS)
        except UnsupportedModel as error:
            pytest.skip(str(error))
        generator, rng, plan = torch.Generator().manual_seed(seed), random.Random(seed), Plan()
        twin, freed = copy.deepcopy(model), 0
        for site in sites:
            kept, own = rng.randint(1, site.n_groups), self._linear(twin, site).weight
            pair = torch.randn(site.d_out, kept, generator=generator), torch.randn(kept, site.d_in, generator=generator)
            factors = pair[0].to(own), pair[1].to(own)
            whole = kept == site.n_groups
            plan[site] = Candidate(None, own.detach().clone()) if whole else Candidate(None, product(*factors), factors)
            own.data.copy_(plan[site].weight)
            freed += site.parameters(site.n_groups) - site.parameters(kept)
        small = self._cut(model, plan)
        torch.testing.assert_close(_logits(small), _logits(twin), rtol=1e-9, atol=1e-8)
        exported = to_transformers(small, self.plugin)
        torch.testing.assert_close(_logits(exported), _logits(small), rtol=0, atol=1e-10)
        assert exported.num_parameters() == model.num_parameters() - freed
        self._assert_generates(self._cut(model, plan))

    def test_no_fewer_groups_can_be_kept_than_a_site_says(self, model: PreTrainedModel) -> None:
        for site in self._groups(model):
            assert 0 <= site.least <= site.n_groups
            if site.least:
                few = self._candidate(model, site, range(site.least - 1))
                with pytest.raises(ValueError, match="keeps"):
                    self.plugin.pruned(self.plugin.blocks(model)[site.block], site, few)

    def test_the_dense_model_is_left_alone(self, model: PreTrainedModel) -> None:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with suppress(UnsupportedModel):
            for site in self.plugin.sites(model):
                few = self._candidate(model, site, range(max(1, site.least)))
                self.plugin.pruned(self.plugin.blocks(model)[site.block], site, few)
        with suppress(UnsupportedModel):
            for site in self.plugin.linear_sites(model, WEIGHTS):
                nothing = Candidate(None, torch.zeros_like(self._linear(model, site).weight))
                self.plugin.pruned(self.plugin.blocks(model)[site.block], site, nothing)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def _groups(self, model: PreTrainedModel, heads: Heads = "kv") -> tuple[Site, ...]:
        try:
            return self.plugin.sites(model, heads=heads)
        except UnsupportedModel as error:
            pytest.skip(str(error))

    def _weights(self, model: PreTrainedModel) -> tuple[Site, ...]:
        try:
            return self.plugin.linear_sites(model, WEIGHTS)
        except UnsupportedModel as error:
            pytest.skip(str(error))

    def _expose(self, model: PreTrainedModel, stack: ExitStack) -> None:
        for block in self.plugin.blocks(model):
            stack.enter_context(self.plugin.exposed(block))

    def _linear(self, model: PreTrainedModel, site: Site) -> nn.Linear:
        return self.plugin.linear(self.plugin.blocks(model)[site.block], site)

    def _candidate(self, model: PreTrainedModel, site: Site, groups: range | list[int]) -> Candidate:
        own = self._linear(model, site).weight.detach()
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
            if site.kind == "experts":
                assert candidate.kept is not None
                block = self.plugin.blocks(twin)[site.block]
                mask_experts(block.get_submodule(self.plugin.cuts(block, site)[0].path), candidate.kept)
                continue
            linear = self._linear(twin, site)
            linear.weight.data.copy_(candidate.weight)
            if not candidate.kept and linear.bias is not None:
                linear.bias.data.zero_()
        return _logits(twin)


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    return model(toy_tokens().ids, use_cache=False).logits
