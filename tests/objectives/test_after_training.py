"""What is learnt before a judgement: nothing at 0 tokens, what AdamW teaches a copy, and no trace of it afterwards."""

from dataclasses import replace
from typing import cast

import pytest
import torch
from torch.nn.functional import cross_entropy

from prunekit import Answers
from prunekit.models.opening import fingerprint
from prunekit.testing import toy_supernet, toy_tokens
from prunekit_objectives.after_training import AfterTraining
from prunekit_objectives.divergence import Divergence
from prunekit_objectives.perplexity import Perplexity
from prunekit_objectives.robust import Robust


@pytest.fixture(scope="module")
def net():
    return toy_supernet()


def test_without_a_token_it_is_the_inner_objective(net):
    plan, batch = net.space.uniform(), toy_tokens()
    assert AfterTraining(tokens=0).loss(net, plan, batch) == Divergence().loss(net, plan, batch)
    assert AfterTraining(tokens=0).training(1000) == 0


def test_it_is_the_inner_loss_of_a_model_that_was_trained_by_hand(net):
    plan, batch = net.space.uniform(), toy_tokens()
    small = toy_supernet().assemble(plan)  # of a model of its own
    assert batch.lessons is not None
    small.requires_grad_(True)
    adam = torch.optim.AdamW(small.parameters(), lr=3e-3)
    for window in batch.lessons.ids[:2]:
        logits = small(window[None]).logits
        adam.zero_grad()
        cross_entropy(logits[0, :-1], window[1:]).backward()
        adam.step()
    with torch.no_grad():
        logits = small(batch.ids).logits[:, :-1]
        by_hand = cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten())
    taught = AfterTraining(Perplexity(), tokens=2 * batch.seqlen, rate=3e-3)
    before, after = (objective.loss(net, plan, batch) for objective in (Perplexity(), taught))
    nll = after if after < 20 else float(torch.tensor(after).log())
    assert nll == pytest.approx(float(by_hand), rel=1e-4)
    assert after != pytest.approx(before, rel=1e-3)


def test_nothing_is_left_of_it(net):
    plan, batch, objective = net.space.uniform(), toy_tokens(), AfterTraining(rate=1e-2)
    before, untrained = fingerprint(net.model), Divergence().loss(net, plan, batch)
    first, second = (objective.loss(net, plan, batch) for _ in range(2))
    assert first == second != untrained
    assert Divergence().loss(net, plan, batch) == untrained
    assert fingerprint(net.model) == before
    assert not any(p.requires_grad and p.grad is not None for p in net.model.parameters())


def test_weights_that_were_removed_stay_at_zero(monkeypatch):
    net, seen = toy_supernet(structure="weights"), []
    plan, batch = net.space.uniform(), toy_tokens()
    monkeypatch.setattr("prunekit.search.supernet.Trained", lambda before, a, after: seen.append(after) or before)
    AfterTraining(rate=1e-2).loss(net, plan, batch)
    (after,) = seen
    dense, pruned = dict(net.assemble(plan).named_parameters()), dict(after.model.named_parameters())
    for site in net.space.sites:
        name = f"{site.name}.weight"
        gone = dense[name] == 0
        assert bool(gone.any())
        assert not pruned[name][gone].any()
        assert not torch.equal(pruned[name], dense[name])


def test_sub_layers_that_were_dropped_stay_away_and_probes_are_whole(net):
    plan = tuple(0 if i == 1 else site.n_groups for i, site in enumerate(net.space.sites))
    assert AfterTraining(rate=1e-2).loss(net, plan, toy_tokens()) > 0


def test_all_learn_from_the_same_windows_in_the_same_order(net):
    """Two allocations that make one model have one loss: nothing is drawn."""
    batch, objective = toy_tokens(), AfterTraining(rate=1e-2)
    dense = tuple(site.n_groups for site in net.space.sites)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    first = objective.loss(net, dense, batch)
    torch.manual_seed(8)
    assert objective.loss(net, dense, batch) == first
    torch.set_rng_state(state)


def test_what_is_learnt_follows_what_is_judged_on():
    objective = AfterTraining(tokens=200_000, per_token=24)
    assert [objective.training(n) for n in (1_024, 8_192, 100_000)] == [24_576, 196_608, 200_000]
    assert AfterTraining(tokens=77).training(1) == 77


def test_it_goes_outside():
    with pytest.raises(ValueError, match="wrap robust"):
        Robust(inner=AfterTraining())
    with pytest.raises(ValueError, match="trains already"):
        AfterTraining(AfterTraining())
    AfterTraining(Robust())


def test_others_are_answered_untrained(net):
    batch, plan = toy_tokens(), net.space.uniform()
    other = next(net.space.swaps(plan))
    taught = cast("Answers", net.trained(plan, batch, 24, 1e-2))
    assert Divergence().loss(taught, other, batch) == Divergence().loss(net, other, batch)
    assert taught.site_errors(plan) == net.site_errors(plan)


def test_text_to_learn_from_goes_with_every_part_of_a_batch():
    batch = toy_tokens(sources=2)
    assert batch.first(12).lessons is batch.lessons
    assert all(part.lessons is batch.lessons for part in batch.parts.values())
    assert replace(batch, ids=batch.ids).digest == batch.digest
