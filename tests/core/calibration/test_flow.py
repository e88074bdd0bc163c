"""Blocks run one at a time give what the model gives."""

from functools import partial
from typing import Any

import pytest
import torch

from prunekit.calibration.flow import BlockFlow
from prunekit.calibration.statistics import statistics_of
from prunekit.models import blocks as blocks_of
from prunekit.models.adapters.find import adapter_for
from prunekit.testing import tiny, toy_tokens

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "opt", "gpt_neox"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(blocks_of, "TOKENS_AT_ONCE", 24)  # two windows: several chunks per batch


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_of_the_dense_stream_are_those_of_one_forward(family, inputs_of):
    model, adapter, tokens = tiny(family), adapter_for(family), toy_tokens()
    expected = inputs_of(model, adapter, adapter.sites(model), tokens)
    stream = BlockFlow(model, adapter, tokens, dense=False)
    for site in adapter.sites(model):
        moments = stream.received(site, statistics_of({"mean", "variance"}))
        x, values = expected[site], moments.values(adapter.linear(adapter.blocks(model)[site.block], site).weight)
        assert moments.tokens == tokens.n_tokens
        torch.testing.assert_close(moments.gram, x.T @ x / len(x))
        torch.testing.assert_close(values["mean"], x.mean(0))
        torch.testing.assert_close(values["variance"], x.var(0, correction=0))
        stream.carry(site, None)
        if site.kind == "mlp":
            stream.advance(site.block)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_costs_more_is_added_up_where_it_is_needed(family, inputs_of):
    model, adapter, tokens = tiny(family), adapter_for(family), toy_tokens()
    fed, handles = {}, []
    for site in adapter.sites(model):
        block = adapter.blocks(model)[site.block]
        for cut in adapter.cuts(block, site)[:-1]:
            hook = partial(lambda key, _, x: fed.__setitem__(key, x[0].flatten(0, -2)), (site, cut.path))
            handles.append(block.get_submodule(cut.path).register_forward_pre_hook(hook))
    own = inputs_of(model, adapter, adapter.sites(model), tokens)
    for handle in handles:
        handle.remove()
    stream = BlockFlow(model, adapter, tokens, dense=False)
    for site in adapter.sites(model):
        moments = stream.received(site, statistics_of({"absolute", "power"}))
        block = adapter.blocks(model)[site.block]
        values = moments.values(adapter.linear(block, site).weight)
        windows = own[site].unflatten(0, tuple(tokens.ids.shape))
        torch.testing.assert_close(values["absolute"], windows.abs().mean(1).square().mean(0).sqrt())
        assert set(values) == {"absolute"}
        for path in (path for at, path in fed if at == site):
            of_producer = moments.values(block.get_parameter(f"{path}.weight"), path)
            torch.testing.assert_close(of_producer, {"power": fed[site, path].square().mean(0)})
        stream.carry(site, None)
        if site.kind == "mlp":
            stream.advance(site.block)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("catch", [True, False], ids=["caught", "resumed"])
def test_carried_weights_reach_everything_behind_them(family, catch, inputs_of):
    model, adapter, tokens = tiny(family), adapter_for(family), toy_tokens()
    sites = adapter.sites(model)
    weights = {s: adapter.linear(adapter.blocks(model)[s.block], s).weight.detach() * 0.5 for s in sites}
    expected = inputs_of(tiny(family), adapter, sites, tokens, weights)
    dense = inputs_of(model, adapter, sites, tokens)
    stream = BlockFlow(model, adapter, tokens, dense=True)
    for site in sites:
        if catch or site is sites[-1]:  # a site that was pruned by an earlier run is not caught again
            moments = stream.received(site, statistics_of({"cross"}))
            torch.testing.assert_close(moments.gram, expected[site].T @ expected[site] / tokens.n_tokens)
            own = adapter.linear(adapter.blocks(model)[site.block], site).weight.detach()
            made, values = dense[site] @ own.T, moments.values(own)
            torch.testing.assert_close(values["cross"], made.T @ expected[site] / tokens.n_tokens)
            torch.testing.assert_close(values["energy"], made.square().sum() / tokens.n_tokens)
        stream.carry(site, weights[site])
        if site.kind == "mlp":
            stream.advance(site.block)


def test_catching_and_resuming_end_in_the_same_bits():
    model, adapter, tokens = tiny("llama"), adapter_for("llama"), toy_tokens()
    ends = []
    for catch in (True, False):
        stream = BlockFlow(model, adapter, tokens, dense=False)
        for site in adapter.sites(model):
            if catch:
                stream.received(site)
            stream.carry(site, adapter.linear(adapter.blocks(model)[site.block], site).weight * 0.7)
            if site.kind == "mlp":
                stream.advance(site.block)
        ends.append(torch.cat([*stream.stream.hidden]))
    assert torch.equal(*ends)


def test_the_drift_is_what_the_residual_stream_has_lost(inputs_of):
    model, adapter, tokens = tiny("llama"), adapter_for("llama"), toy_tokens()
    stream = BlockFlow(model, adapter, tokens, dense=True)

    def residuals(net):  # what every sub-layer is added to
        found = []
        block: Any
        for block in adapter.blocks(net):
            block.input_layernorm.register_forward_pre_hook(lambda _, x: found.append(x[0].flatten(0, 1)))
            block.post_attention_layernorm.register_forward_pre_hook(lambda _, x: found.append(x[0].flatten(0, 1)))
        with torch.no_grad():
            net(tokens.ids)
        return found

    carried, sites = tiny("llama"), adapter.sites(model)
    halves = {s: adapter.linear(adapter.blocks(model)[s.block], s).weight.detach() * 0.5 for s in sites}
    inputs = inputs_of(carried, adapter, sites, tokens, halves)
    sums = list(zip(adapter.sites(model), residuals(tiny("llama")), residuals(carried), strict=True))
    for site, dense, pruned in sums:
        moments = stream.received(site, statistics_of({"drift"}))
        torch.testing.assert_close(
            moments.values(halves[site])["drift"], (dense - pruned).T @ inputs[site] / tokens.n_tokens
        )
        stream.carry(site, halves[site])
        if site.kind == "mlp":
            stream.advance(site.block)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_influence_is_the_turn_of_the_residual_stream_by_hand(family):
    model, adapter, tokens = tiny(family), adapter_for(family), toy_tokens()
    hidden = list(model(tokens.ids, output_hidden_states=True).hidden_states[:-1])  # before every block
    added: dict[Any, torch.Tensor] = {}
    sites = adapter.sites(model)
    for site in sites:
        linear = adapter.linear(adapter.blocks(model)[site.block], site)

        def heard(_: Any, __: Any, out: Any, site: Any = site) -> None:
            added[site] = out.reshape(*tokens.ids.shape, -1)

        linear.register_forward_hook(heard)
    with torch.no_grad():
        model(tokens.ids)
    expected = []
    for site in sites:
        before = hidden[site.block] + (added[sites[2 * site.block]] if site.kind == "mlp" else 0)
        expected.append(1 - torch.cosine_similarity(before, before + added[site], dim=-1).mean().item())
    stream = BlockFlow(tiny(family), adapter, tokens, dense=False)
    for site, by_hand in zip(sites, expected, strict=True):
        moments = stream.received(site, statistics_of({"influence"}))
        weight = adapter.linear(adapter.blocks(model)[site.block], site).weight
        assert float(moments.values(weight)["influence"]) == pytest.approx(by_hand)
        stream.carry(site, None)
        if site.kind == "mlp":
            stream.advance(site.block)


def test_a_dropped_sub_layer_takes_its_bias_along():
    model, adapter, tokens = tiny("opt"), adapter_for("opt"), toy_tokens()
    attention, *_ = adapter.sites(model)
    stream = BlockFlow(model, adapter, tokens, dense=False)
    stream.received(attention)
    linear = adapter.linear(adapter.blocks(model)[0], attention)
    stream.carry(attention, torch.zeros_like(linear.weight))
    assert not torch.cat([*stream.stream.outputs[attention]]).any()
    assert linear.bias.any()
