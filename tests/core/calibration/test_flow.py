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


def along(stream, sites, weights=None):
    """Every site in turn; behind it the stream carries its weight of these, or what the model has."""
    for site in sites:
        yield site
        stream.carry(site, None if weights is None else weights[site])
        if site.kind == "mlp":
            stream.advance(site.block)


def own(model, adapter, sites, scale=1.0):
    return {s: adapter.linear(adapter.blocks(model)[s.block], s).weight.detach() * scale for s in sites}


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_of_the_dense_stream_are_those_of_one_forward(family, inputs_of):
    model, adapter, tokens = tiny(family), adapter_for(family), toy_tokens()
    fed, handles, sites = {}, [], adapter.sites(model)
    for site in sites:
        block = adapter.blocks(model)[site.block]
        for cut in adapter.cuts(block, site)[:-1]:
            hook = partial(lambda key, _, x: fed.__setitem__(key, x[0].flatten(0, -2)), (site, cut.path))
            handles.append(block.get_submodule(cut.path).register_forward_pre_hook(hook))
    expected, weights = inputs_of(model, adapter, sites, tokens), own(model, adapter, sites)
    for handle in handles:
        handle.remove()
    stream = BlockFlow(model, adapter, tokens, dense=False)
    for site in along(stream, sites):
        moments = stream.received(site, statistics_of({"mean", "variance", "absolute", "power"}))
        x, values = expected[site], moments.values(weights[site])
        assert moments.tokens == tokens.n_tokens
        torch.testing.assert_close(moments.gram, x.T @ x / len(x))
        absolute = x.unflatten(0, tuple(tokens.ids.shape)).abs().mean(1).square().mean(0).sqrt()
        by_hand = {"mean": x.mean(0), "variance": x.var(0, correction=0), "absolute": absolute}
        torch.testing.assert_close(dict(values), by_hand)
        for path in (path for at, path in fed if at == site):
            of_producer = moments.values(adapter.blocks(model)[site.block].get_parameter(f"{path}.weight"), path)
            torch.testing.assert_close(of_producer, {"power": fed[site, path].square().mean(0)})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("catch", [True, False], ids=["caught", "resumed"])
def test_carried_weights_reach_everything_behind_them(family, catch, inputs_of):
    model, adapter, tokens = tiny(family), adapter_for(family), toy_tokens()
    sites = adapter.sites(model)
    weights, dense_weights = own(model, adapter, sites, 0.5), own(model, adapter, sites)
    expected = inputs_of(tiny(family), adapter, sites, tokens, weights)
    dense = inputs_of(model, adapter, sites, tokens)
    stream = BlockFlow(model, adapter, tokens, dense=True)
    for site in along(stream, sites, weights):
        if catch or site is sites[-1]:  # a site that was pruned by an earlier run is not caught again
            moments = stream.received(site, statistics_of({"cross"}))
            torch.testing.assert_close(moments.gram, expected[site].T @ expected[site] / tokens.n_tokens)
            made, values = dense[site] @ dense_weights[site].T, moments.values(dense_weights[site])
            torch.testing.assert_close(values["cross"], made.T @ expected[site] / tokens.n_tokens)
            torch.testing.assert_close(values["energy"], made.square().sum() / tokens.n_tokens)


def test_catching_and_resuming_end_in_the_same_bits():
    model, adapter, tokens = tiny("llama"), adapter_for("llama"), toy_tokens()
    ends, sites = [], adapter.sites(model)
    for catch in (True, False):
        stream = BlockFlow(model, adapter, tokens, dense=False)
        for site in along(stream, sites, own(model, adapter, sites, 0.7)):
            if catch:
                stream.received(site)
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
    halves = own(model, adapter, sites, 0.5)
    inputs = inputs_of(carried, adapter, sites, tokens, halves)
    sums = zip(along(stream, sites, halves), residuals(tiny("llama")), residuals(carried), strict=True)
    for site, dense, pruned in sums:
        moments = stream.received(site, statistics_of({"drift"}))
        torch.testing.assert_close(
            moments.values(halves[site])["drift"], (dense - pruned).T @ inputs[site] / tokens.n_tokens
        )


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
        since = [
            1 - torch.cosine_similarity(x, before + added[site], dim=-1).mean() for x in (before, hidden[site.block])
        ]
        expected.append([each.item() for each in since])
    hidden.append(hidden[-1] + added[sites[-2]] + added[sites[-1]])  # behind all blocks, in front of the last norm
    stream = BlockFlow(tiny(family), adapter, tokens, dense=False)
    weights = own(model, adapter, sites)
    for site, by_hand in zip(along(stream, sites), expected, strict=True):
        moments = stream.received(site, statistics_of({"influence", "turn"}))
        values = moments.values(weights[site])
        assert [float(values["influence"]), float(values["turn"])] == pytest.approx(by_hand)
        if site.kind == "mlp":  # what enters and what leaves the block: block influence
            ends = hidden[site.block : site.block + 2]
            assert float(values["turn"]) == pytest.approx(1 - torch.cosine_similarity(*ends, dim=-1).mean().item())


def test_a_dropped_sub_layer_takes_its_bias_along():
    model, adapter, tokens = tiny("opt"), adapter_for("opt"), toy_tokens()
    attention, *_ = adapter.sites(model)
    stream = BlockFlow(model, adapter, tokens, dense=False)
    stream.received(attention)
    linear = adapter.linear(adapter.blocks(model)[0], attention)
    stream.carry(attention, torch.zeros_like(linear.weight))
    assert not torch.cat([*stream.stream.outputs[attention]]).any()
    assert linear.bias.any()
