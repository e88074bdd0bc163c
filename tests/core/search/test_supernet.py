"""What the supernet says of an allocation is what the assembled model does."""

import pytest
import torch

from prunekit.models import blocks as blocks_of
from prunekit.models.opening import fingerprint
from prunekit.search.supernet import Supernet
from prunekit.system.memory import Shares
from prunekit.testing import toy_supernet, toy_tokens

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "opt", "gpt_neox"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(blocks_of, "TOKENS_AT_ONCE", 24)


def logits(net, allocation, batch):
    return torch.cat([part for _, part in net.logits(allocation, batch)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("heads", ["kv", "query"])
def test_cut_out_candidates_are_the_assembled_model(family, heads):
    net, batch = toy_supernet(family, heads=heads), toy_tokens()
    for plan in (net.space.uniform(), tuple(0 for _ in net.space.sites), tuple(s.n_groups for s in net.space.sites)):
        seen = logits(net, plan, batch)
        with torch.no_grad():
            torch.testing.assert_close(seen, net.assemble(plan)(batch.ids).logits.float())


def test_all_groups_without_a_rung_are_the_dense_sub_layer():
    net, batch = toy_supernet(), toy_tokens()
    few = Supernet(net.model, net.adapter, net.space.zoomed(net.space.uniform(), reach=0), net.errors, net.store)
    dense = tuple(site.n_groups for site in net.space.sites)
    assert torch.equal(logits(few, dense, batch), net.model(batch.ids).logits.float())
    assert few.site_errors(dense) == [0.0] * len(dense)
    one = (net.space.uniform()[0], *dense[1:])
    torch.testing.assert_close(logits(few, one, batch), logits(net, one, batch))


def test_prefixes_are_shared_and_change_nothing():
    net, batch = toy_supernet(), toy_tokens()
    plans = [net.space.uniform(), *list(net.space.swaps(net.space.uniform()))[:6]]
    alone = [logits(net, plan, batch) for plan in plans]
    net.prefetch(plans, [batch])
    for plan, expected in zip(plans, alone, strict=True):
        assert torch.equal(logits(net, plan, batch), expected)


def test_no_more_is_kept_ready_than_there_is_room_for(monkeypatch):
    net, one, other = toy_supernet(), toy_tokens(), toy_tokens(seed=1)
    each = one.n_tokens * 24 * 8  # bytes of the hidden states of an allocation at one depth
    monkeypatch.setattr(net, "shares", Shares(hidden=3 * each - 1, dense=2 * each - 1))
    plans = [net.space.uniform(), *list(net.space.swaps(net.space.uniform()))[:3]]
    assert net.prefetch(plans, [one]) == plans[:2]
    for batch in (one, other, one):
        list(net.dense_hidden(batch, [1]))
    assert {digest for allocation, digest, _ in net._hidden if allocation is None} == {one.digest}


def test_assembling_leaves_the_dense_model_as_it_was():
    net = toy_supernet()
    before = fingerprint(net.model)
    small = net.assemble(net.space.uniform())
    assert fingerprint(net.model) == before
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.model.parameters())


def test_parts_are_let_go_when_they_take_too_much_room(monkeypatch):
    net, batch = toy_supernet(), toy_tokens()
    monkeypatch.setattr(net, "shares", Shares(parts=1))
    first = logits(net, net.space.uniform(), batch)
    for plan in net.space.swaps(net.space.uniform()):
        logits(net, plan, batch)
    assert len(net._parts) <= len(net.space.sites)
    assert torch.equal(logits(net, net.space.uniform(), batch), first)


def test_a_net_at_rest_keeps_nothing_and_says_the_same():
    net, batch = toy_supernet(), toy_tokens()
    plan = net.space.uniform()
    first, dense = (
        logits(net, plan, batch),
        [torch.cat(row) for row in zip(*net.dense_hidden(batch, [1, 2]), strict=True)],
    )
    assert net._parts
    assert net._hidden
    net.rest()
    assert (len(net._parts), net._parts_bytes, len(net._hidden), net._dense_bytes) == (0, 0, 0, 0)
    assert torch.equal(logits(net, plan, batch), first)
    again = [torch.cat(row) for row in zip(*net.dense_hidden(batch, [1, 2]), strict=True)]
    assert all(map(torch.equal, again, dense))
