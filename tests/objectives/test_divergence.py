"""What the algebra of top-k divergences promises."""

import pytest
import torch

from prunekit.testing import toy_supernet, toy_tokens
from prunekit_objectives.divergence import Divergence


@pytest.fixture(scope="module")
def net():
    return toy_supernet()


@pytest.fixture(scope="module")
def allocation(net):
    return net.space.uniform()


def full(net, allocation, batch):
    """KL(p‖q) over the whole vocabulary, by hand."""
    total = 0.0
    for (_, dense), (_, pruned) in zip(net.dense_logits(batch), net.logits(allocation, batch), strict=True):
        log_p, log_q = dense.double().log_softmax(-1), pruned.double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / batch.n_tokens


def test_the_whole_vocabulary_gives_the_full_divergence(net, allocation):
    batch = toy_tokens()
    expected = pytest.approx(full(net, allocation, batch), rel=1e-4)
    assert Divergence(top_k=61).loss(net, allocation, batch) == expected
    assert Divergence(top_k=10_000, rest=False).loss(net, allocation, batch) == expected


@pytest.mark.parametrize("k", [1, 4, 16, 40])
def test_the_rest_as_one_event_lies_between_the_renormalised_and_the_full(net, allocation, k):
    batch = toy_tokens()
    with_rest = Divergence(top_k=k).loss(net, allocation, batch)
    assert with_rest <= full(net, allocation, batch) * (1 + 1e-5)
    mass = min(float(dense.log_probs.exp().sum(-1).min()) for dense in net.dense_top(batch, k))
    assert mass * Divergence(top_k=k, rest=False).loss(net, allocation, batch) <= with_rest * (1 + 1e-5)


def test_more_tokens_are_a_finer_look(net, allocation):
    batch = toy_tokens()
    losses = [Divergence(top_k=k).loss(net, allocation, batch) for k in (1, 4, 16, 61)]
    assert losses == sorted(losses)


def test_the_dense_model_is_at_no_distance_from_itself(net):
    everything = tuple(site.n_groups for site in net.space.sites)
    assert Divergence().loss(net, everything, toy_tokens()) == pytest.approx(0, abs=1e-6)


def test_stages_add_up(net, allocation):
    batch = toy_tokens(windows=4)
    parts = [type(batch)(part, "part") for part in batch.ids.split(1)]
    mean = sum(Divergence().loss(net, allocation, part) for part in parts) / len(parts)
    assert Divergence().loss(net, allocation, batch) == pytest.approx(mean, rel=1e-5)


def test_a_number_of_tokens_is_positive():
    with pytest.raises(ValueError, match="at least 1"):
        Divergence(top_k=0)


def test_probability_that_leaks_out_of_the_top_is_seen():
    from prunekit_objectives.divergence import _with_rest

    p = torch.tensor([[0.5, 0.3]]).log()
    assert _with_rest(p).exp().sum() == pytest.approx(1)
