"""The distance of hidden states: by hand on the assembled model, zero for the dense one, together as alone."""

import pytest
import torch

from prunekit.models import blocks as blocks_of
from prunekit.system.memory import Shares
from prunekit.testing import toy_supernet, toy_tokens
from prunekit_objectives.divergence import Divergence
from prunekit_objectives.hidden_state import HiddenState


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(blocks_of, "TOKENS_AT_ONCE", 24)


@pytest.fixture(scope="module")
def net():
    return toy_supernet()


def by_hand(net, plan, batch, blocks):
    """(1) from the residual streams that transformers itself reports; those of the last block are before its norm."""

    def streams(model):
        seen = []
        hooks = [b.register_forward_hook(lambda m, i, o: seen.append(o)) for b in net.adapter.blocks(model)]
        model(batch.ids)
        for hook in hooks:
            hook.remove()
        return [seen[b - 1] if torch.is_tensor(seen[b - 1]) else seen[b - 1][0] for b in blocks]

    with torch.no_grad():
        pairs = list(zip(streams(net.assemble(plan)), streams(net.model), strict=True))
    quotients = [(h - h0).square().sum(-1) / h0.square().sum(-1) for h, h0 in pairs]
    return float(torch.stack(quotients).mean())


def test_the_dense_allocation_is_at_distance_zero(net):
    everything = tuple(site.n_groups for site in net.space.sites)
    assert HiddenState(beside=None).loss(net, everything, toy_tokens()) == 0


@pytest.mark.parametrize(("at", "blocks"), [((0.0, 0.5, 1.0), [1, 2, 3]), ((0.5,), [2]), ((1.0, 0.9, 0.0), [1, 3])])
def test_the_distance_is_that_of_the_assembled_model(net, at, blocks):
    plan, batch = net.space.uniform(), toy_tokens()
    objective = HiddenState(at=at, beside=None)
    assert list(objective.reads(3).depths) == blocks
    assert objective.loss(net, plan, batch) == pytest.approx(by_hand(net, plan, batch, blocks), rel=1e-6)


def test_what_stands_beside_it_is_added(net):
    plan, batch = net.space.uniform(), toy_tokens()
    alone, other = HiddenState(beside=None).loss(net, plan, batch), Divergence(top_k=7).loss(net, plan, batch)
    both = HiddenState(weight=3.0, beside=Divergence(top_k=7))
    assert both.loss(net, plan, batch) == pytest.approx(3 * alone + other)


def test_stages_add_up(net):
    plan, batch, objective = net.space.uniform(), toy_tokens(windows=4), HiddenState(beside=None)
    mean = sum(objective.loss(net, plan, type(batch)(part, "part")) for part in batch.ids.split(1)) / 4
    assert objective.loss(net, plan, batch) == pytest.approx(mean, rel=1e-6)


def test_after_a_prefetch_no_block_runs_for_an_allocation(net, monkeypatch):
    batch, objective = toy_tokens(seed=5), HiddenState()
    plans = [net.space.uniform(), *list(net.space.swaps(net.space.uniform()))[:3]]
    alone = [objective.loss(net, plan, batch) for plan in plans]
    assert net.prefetch(plans, objective.reads(3).parts(batch), objective.reads(3).depths) == plans
    monkeypatch.setattr(type(net), "_run", lambda *_: pytest.fail("ran again"))
    assert [objective.loss(net, plan, batch) for plan in plans] == alone


def test_dense_states_beyond_the_bound_are_made_anew_and_are_the_same(monkeypatch):
    net, batch, objective = toy_supernet(), toy_tokens(), HiddenState(beside=None)
    monkeypatch.setattr(net, "shares", Shares(dense=0))
    first = objective.loss(net, net.space.uniform(), batch)
    assert not net._hidden
    monkeypatch.undo()
    assert objective.loss(net, net.space.uniform(), batch) == pytest.approx(first, rel=1e-12)
    assert {depth for _, _, depth in net._hidden} == {1, 2, 3}
