"""The moments of the last states: by hand on the assembled model, zero for the dense one, and what they cannot see."""

from typing import cast

import pytest
import torch

from prunekit import Answers
from prunekit.testing import toy_supernet, toy_tokens
from prunekit_objectives.latent_stats import LatentStats


@pytest.fixture(scope="module")
def net():
    return toy_supernet()


def last_states(net, model, batch):
    seen = []
    hook = net.adapter.blocks(model)[-1].register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad():
        model(batch.ids)
    hook.remove()
    return (seen[0] if torch.is_tensor(seen[0]) else seen[0][0]).flatten(0, 1).double()


def test_it_is_the_change_of_means_and_of_spreads_of_the_assembled_model(net):
    plan, batch = net.space.uniform(), toy_tokens()
    h, h0 = last_states(net, net.assemble(plan), batch), last_states(net, net.model, batch)
    mean, spread = h.mean(0) - h0.mean(0), h.std(0, correction=0) - h0.std(0, correction=0)
    by_hand = float(mean.square().sum().sqrt() + spread.square().sum().sqrt())
    assert by_hand > 0
    assert LatentStats().loss(net, plan, batch) == pytest.approx(by_hand, rel=1e-5)


def test_the_dense_allocation_changes_nothing(net):
    assert LatentStats().loss(net, tuple(site.n_groups for site in net.space.sites), toy_tokens()) == 0


class States:
    """Answers that are given, in pieces."""

    depth = 3

    def __init__(self, dense, pruned):
        self._dense, self._pruned = dense, pruned

    def hidden(self, allocation, batch, depths):
        return ((piece,) for piece in self._pruned.split(1))

    def dense_hidden(self, batch, depths):
        return ((piece,) for piece in self._dense.split(1))


def given(dense, pruned):
    return cast("Answers", States(dense, pruned))


def states(seed=0):
    return torch.randn(4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_it_is_blind_to_the_order_of_tokens():
    dense, batch = states(), toy_tokens(4, 6)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    shuffled = dense.flatten(0, 1)[order].view_as(dense)
    assert not torch.equal(shuffled, dense)
    assert LatentStats().loss(given(dense, shuffled), (), batch) < 1e-12


@pytest.mark.parametrize("offset", [0.0, 1e4], ids=["small", "a massive channel"])
def test_a_shift_and_a_stretch_are_what_they_are(offset):
    dense, batch = states(), toy_tokens(4, 6)
    dense[..., 0] += offset
    shifted = dense + torch.tensor([0.0, 3.0, 0, 4.0, 0])
    assert LatentStats().loss(given(dense, shifted), (), batch) == pytest.approx(5)
    mean = dense.mean((0, 1))
    stretched = mean + 2 * (dense - mean)
    spread = dense.std((0, 1), correction=0).norm()
    assert LatentStats().loss(given(dense, stretched), (), batch) == pytest.approx(float(spread), rel=1e-6)
