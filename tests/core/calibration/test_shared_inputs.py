"""Linear maps as sites: moments are taken once for an input that several share, behind all that is in front of it."""

import pytest
import torch

from prunekit.calibration.flow import BlockFlow
from prunekit.calibration.moments import Moments
from prunekit.calibration.statistics import statistics_of
from prunekit.models import blocks as blocks_of
from prunekit.models.adapters.experts import MixtureOfExperts
from prunekit.models.adapters.find import adapter_for
from prunekit.plugins.registry import ADAPTERS
from prunekit.space.forms import WEIGHTS
from prunekit.testing import tiny, toy_tokens

# of experts no single weights are removed
FAMILIES = [name for name in ADAPTERS if not isinstance(adapter_for(name), MixtureOfExperts)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(blocks_of, "TOKENS_AT_ONCE", 24)  # two windows: several chunks per batch


def opened(family):
    """A tiny model of a family, as it is pruned, and its adapter."""
    model = adapter_for(family).opened(tiny(family))
    return model, adapter_for(model.config.model_type)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("catch", [True, False], ids=["caught", "resumed"])
def test_an_input_is_measured_behind_all_weights_that_are_carried(family, catch, inputs_of):
    model, adapter, tokens = *opened(family), toy_tokens()
    sites = adapter.linear_sites(model, WEIGHTS)
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for site in sites:
        own = adapter.linear(adapter.blocks(model)[site.block], site).weight.detach()
        weights[site] = own * (torch.rand(own.shape, generator=generator) < 0.5)
    weights[sites[1]] = torch.zeros_like(weights[sites[1]])  # a map of zeros keeps its bias
    expected, dense = (
        inputs_of(opened(family)[0], adapter, sites, tokens, weights),
        inputs_of(model, adapter, sites, tokens),
    )
    stream = BlockFlow(model, adapter, tokens, dense=True)
    for index in range(len(adapter.blocks(model))):
        for site in (site for site in sites if site.block == index):
            if catch or index == 2:
                moments = stream.received(site, statistics_of({"cross", "drift"}))
                assert moments.tokens == tokens.n_tokens
                torch.testing.assert_close(moments.gram, expected[site].T @ expected[site] / tokens.n_tokens)
                own = adapter.linear(adapter.blocks(model)[site.block], site).weight.detach()
                made, values = dense[site] @ own.T, moments.values(own)
                torch.testing.assert_close(values["cross"], made.T @ expected[site] / tokens.n_tokens)
                torch.testing.assert_close(values["energy"], made.square().sum() / tokens.n_tokens)
                joins = adapter.adds_up(adapter.blocks(model)[index]) and adapter.part(site) is not None
                assert ("drift" in values) == joins
            stream.carry(site, weights[site])
        stream.advance(index)
    with torch.no_grad():
        other, _ = opened(family)
        inputs_of(other, adapter, sites, tokens, weights)
        hidden = torch.cat([*stream.stream.hidden])
        torch.testing.assert_close(adapter.logits(model, hidden), other(tokens.ids).logits)


def test_moments_of_a_shared_input_are_collected_once(monkeypatch):
    model, adapter, tokens = tiny("llama"), adapter_for("llama"), toy_tokens()
    added = []
    add = Moments.add
    monkeypatch.setattr(Moments, "add", lambda self, seen: (added.append(len(seen.inputs)), add(self, seen)))
    stream = BlockFlow(model, adapter, tokens, dense=False)
    for site in adapter.linear_sites(model, WEIGHTS)[:7]:
        stream.received(site)
        stream.carry(site, None)
    assert sum(added) == 4 * tokens.n_tokens  # q k v, o, gate up, down


@pytest.mark.parametrize("family", FAMILIES)
def test_an_input_relative_to_the_output_is_of_every_map_its_own(family, inputs_of):
    model, adapter, tokens = *opened(family), toy_tokens()
    sites, stream = adapter.linear_sites(model, WEIGHTS), BlockFlow(model, adapter, tokens, dense=False)
    expected = inputs_of(model, adapter, sites, tokens)
    for index in range(len(adapter.blocks(model))):
        for site in (site for site in sites if site.block == index):
            x, linear = expected[site], adapter.linear(adapter.blocks(model)[index], site)
            ratio = (x.square() / linear(x).square().sum(-1, keepdim=True)).mean(0)
            found = stream.received(site, statistics_of({"relative"})).values(linear.weight)["relative"]
            torch.testing.assert_close(found, ratio.detach())
            stream.carry(site, None)
        stream.advance(index)
