"""Worst weights: limits, duality by brute force, and what the supernet is asked."""

from math import exp, log

import pytest
from hypothesis import given
from hypothesis import strategies as st

import prunekit as pk
from prunekit.testing import toy_supernet, toy_tokens
from prunekit_objectives.divergence import Divergence
from prunekit_objectives.perplexity import Perplexity
from prunekit_objectives.robust import Robust, ball, soft

LOSSES = st.lists(st.floats(-3, 3), min_size=3, max_size=3)
SHARES = st.lists(st.integers(1, 9), min_size=3, max_size=3).map(lambda w: [x / sum(w) for x in w])


def mean(p, x):
    return sum(a * b for a, b in zip(p, x, strict=True))


def divergence(q, p):
    return sum(a * log(a / b) for a, b in zip(q, p, strict=True) if a > 0)


def weights(step=0.02):
    n = round(1 / step)
    return [(i / n, j / n, (n - i - j) / n) for i in range(n + 1) for j in range(n + 1 - i)]


@given(p=SHARES, x=LOSSES)
def test_the_limits_are_the_worst_and_the_mean(p, x):
    assert soft(p, x, 1e-9) == pytest.approx(max(x), abs=1e-7)
    assert soft(p, x, 1e9) == pytest.approx(mean(p, x), abs=1e-6)
    assert ball(p, x, 0.0) == pytest.approx(mean(p, x), abs=1e-6)
    assert ball(p, x, 100.0) == max(x)


@given(p=SHARES, x=LOSSES)
def test_both_lie_between_mean_and_worst_and_rise_on_the_way(p, x):
    ways = [[soft(p, x, t) for t in (10.0, 1.0, 0.1, 0.01)], [ball(p, x, r) for r in (0.01, 0.1, 1.0, 3.0)]]
    for way in ways:
        assert sorted(way) == pytest.approx(way, abs=1e-9)
        assert mean(p, x) <= way[0] + 1e-9 <= way[-1] + 2e-9 <= max(x) + 3e-9


def test_no_weights_are_worse():
    p, x, temperature, radius = (0.5, 0.3, 0.2), (0.4, 1.0, -0.2), 0.7, 0.15
    penalised = max(mean(q, x) - temperature * divergence(q, p) for q in weights())
    within = max(mean(q, x) for q in weights() if divergence(q, p) <= radius)
    assert penalised <= soft(p, x, temperature) == pytest.approx(penalised, abs=2e-3)
    assert within <= ball(p, x, radius) + 1e-9
    assert ball(p, x, radius) == pytest.approx(within, abs=3e-2)


def test_at_the_worst_weights_the_two_are_one_game():
    p, x, temperature = (0.5, 0.3, 0.2), (0.4, 1.0, -0.2), 0.7
    raw = [a * exp(v / temperature) for a, v in zip(p, x, strict=True)]
    q = [w / sum(raw) for w in raw]
    assert ball(p, x, divergence(q, p)) == pytest.approx(mean(q, x))
    assert soft(p, x, temperature) == pytest.approx(mean(q, x) - temperature * divergence(q, p))


@given(p=SHARES, x=LOSSES, worse=st.floats(0, 2))
def test_a_data_set_that_gets_worse_never_makes_it_better(p, x, worse):
    for value in (lambda x: soft(p, x, 0.3), lambda x: ball(p, x, 0.2)):
        assert value([x[0] + worse, *x[1:]]) >= value(x) - 1e-6


def test_the_loss_is_of_the_excess_over_the_dense_model_on_each_data_set():
    net, batch = toy_supernet(), toy_tokens(windows=5, sources=2)
    plan, everything = net.space.uniform(), tuple(site.n_groups for site in net.space.sites)
    parts = list(batch.parts.values())
    assert [len(part) for part in parts] == [3, 2]
    own = [Perplexity().loss(net, plan, part) for part in parts]
    dense = [Perplexity().loss(net, everything, part) for part in parts]  # KeepFirst leaves it as it is
    excess = [a - b for a, b in zip(own, dense, strict=True)]
    assert Robust(Perplexity(), "max").loss(net, plan, batch) == pytest.approx(max(excess))
    assert Robust(Perplexity(), "max", reference=False).loss(net, plan, batch) == pytest.approx(max(own))
    assert Robust(Perplexity(), temperature=2.0).loss(net, plan, batch) == pytest.approx(soft((0.6, 0.4), excess, 2.0))


def test_of_one_data_set_it_is_the_inner_objective():
    net, batch = toy_supernet(), toy_tokens()
    inner = Divergence().loss(net, net.space.uniform(), batch)
    for rule in ("soft", "ball", "max"):
        assert Robust(rule=rule).loss(net, net.space.uniform(), batch) == pytest.approx(inner, abs=1e-6)
    with pytest.raises(pk.WrongInput, match="there is only toy; give several"):
        Robust().check(batch)


def test_the_dense_model_is_asked_once(monkeypatch):
    net, batch, asked = toy_supernet(), toy_tokens(sources=2), []
    plain = Perplexity.loss
    monkeypatch.setattr(Perplexity, "loss", lambda self, net, a, batch: asked.append(a) or plain(self, net, a, batch))
    for plan in [net.space.uniform(), *list(net.space.swaps(net.space.uniform()))[:2]]:
        Robust(Perplexity()).loss(net, plan, batch)
    assert asked.count(()) == 2
    assert len(asked) == 2 + 3 * 2


def test_a_table_look_up_is_the_same_for_every_data_set():
    from prunekit_objectives.expected_error import ExpectedError

    with pytest.raises(ValueError, match="ExpectedError reads no tokens"):
        Robust(ExpectedError())
