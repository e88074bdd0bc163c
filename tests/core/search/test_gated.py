"""The gated model: its losses, slopes and importances are those of the model with gates, and it is left as it was."""

import pytest
import torch

from prunekit.layer.candidates import Candidate
from prunekit.models.adapters.find import adapter_for
from prunekit.plugins.learner import GateQuery
from prunekit.search.gated import GatedModel
from prunekit.system.memory import Shares
from prunekit.testing import tiny, toy_tokens

FAMILIES = [("llama", "kv"), ("llama", "query"), ("opt", "kv"), ("gpt_neox", "kv"), ("qwen3", "kv")]


def gated(model_type: str, heads: str = "kv", **more: object) -> GatedModel:
    model, adapter = tiny(model_type, num_hidden_layers=2).requires_grad_(False), adapter_for(model_type)
    return GatedModel(model, adapter, adapter.sites(model, heads), toy_tokens(windows=3), **more)  # type: ignore[arg-type]


def ones(net: GatedModel) -> torch.Tensor:
    return torch.ones(net.groups, dtype=torch.float64)


@pytest.mark.parametrize(("model_type", "heads"), FAMILIES)
def test_open_gates_give_the_dense_loss_and_closed_ones_a_dropped_site(model_type: str, heads: str) -> None:
    net = gated(model_type, heads)
    dense = GatedModel(net.model, net.adapter, (), net.text).answer(GateQuery(torch.zeros(0)))
    assert net.answer(GateQuery(ones(net))).loss == dense.loss  # bit for bit
    own = net.model(net.text.ids, labels=net.text.ids, use_cache=False).loss
    assert dense.loss == pytest.approx(float(own), rel=1e-6)
    gates = ones(net)
    gates[: net.sites[0].n_groups] = 0
    site = net.sites[0]
    weight = torch.zeros_like(net.adapter.linear(net.adapter.blocks(net.model)[0], site).weight)
    small = tiny(model_type, num_hidden_layers=2).requires_grad_(False)
    net.adapter.remove(small, site, Candidate((), weight))
    cut = GatedModel(small, net.adapter, (), net.text).answer(GateQuery(torch.zeros(0)))
    assert net.answer(GateQuery(gates)).loss == pytest.approx(cut.loss, rel=1e-9)


@pytest.mark.parametrize(("model_type", "heads"), FAMILIES)
def test_slopes_are_central_differences(model_type: str, heads: str) -> None:
    net = gated(model_type, heads)
    gates = torch.rand(net.groups, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    query = GateQuery(gates, (0, 2), frozenset({"gradient"}), text=1.0, dense=2.0)
    slope = net.answer(query).gradient
    assert slope is not None
    for g in range(0, net.groups, 7):
        step = torch.zeros_like(gates).index_fill_(0, torch.tensor([g]), 4e-3)  # norms round to float32
        up, down = (net.answer(GateQuery(gates + s, (0, 2), dense=2.0)).loss for s in (step, -step))
        assert float(slope[g]) == pytest.approx((up - down) / 8e-3, rel=1e-3, abs=1e-4)


def test_a_gate_hears_what_its_weights_would_and_run_again_is_the_same() -> None:
    net, again = gated("llama"), gated("llama", shares=Shares(hidden=0))
    query = GateQuery(ones(net), None, frozenset({"gradient", "taylor", "power"}))
    one, two = net.answer(query), again.answer(query)
    for name in ("gradient", "taylor", "power"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name))
    model, site = net.model, net.sites[1]  # an MLP
    own = net.adapter.maps(net.adapter.blocks(model)[0], site)
    for linear in own:
        linear.weight.requires_grad_(True)
    loss = model(net.text.ids, labels=net.text.ids, use_cache=False).loss
    gate, up, down = torch.autograd.grad(loss, [linear.weight for linear in own])
    part = slice(net.sites[0].n_groups, net.sites[0].n_groups + site.n_groups)
    assert one.gradient is not None
    assert one.taylor is not None
    # Σ over a column of w ∂L/∂w, signed; Σ |w ∂L/∂w| over all of a group
    torch.testing.assert_close(one.gradient[part], (own[2].weight * down).sum(0).detach(), rtol=1e-6, atol=1e-9)
    rows = (own[0].weight * gate).abs().sum(1) + (own[1].weight * up).abs().sum(1)
    torch.testing.assert_close(
        one.taylor[part], (rows + (own[2].weight * down).abs().sum(0)).detach(), rtol=1e-6, atol=1e-9
    )


def test_leaves_the_model_as_it_was() -> None:
    net = gated("opt")
    before = {name: p.clone() for name, p in net.model.named_parameters()}
    net.answer(GateQuery(ones(net) / 2, None, frozenset({"gradient", "taylor", "power"})))
    assert not any(p.requires_grad for p in net.model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in net.model.named_parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.model.modules())
