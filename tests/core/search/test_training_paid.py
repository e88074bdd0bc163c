"""What a model learns before a judgement is paid for, on record, within limits, and foreseen."""

import pytest

from prunekit import Problem
from prunekit.run.plan.rehearsal import rehearsed
from prunekit.search.conversation import converse
from prunekit.search.ledger import Ledger
from prunekit.system.progress import Progress
from prunekit.testing import toy_supernet, toy_tokens
from prunekit_objectives.after_training import AfterTraining
from prunekit_objectives.divergence import Divergence
from prunekit_strategies.allocators.random_draws import RandomDraws

DRAWS = 3


@pytest.fixture(scope="module")
def net():
    return toy_supernet()


def held(net, path, objective, limit=None, batch=None):
    problem = Problem(net.space, net.errors, net.space.uniform(), tokens=48)
    ledger = Ledger(path)
    outcome = converse(
        RandomDraws(draws=DRAWS), problem, net, objective, batch or toy_tokens(), ledger,
        pass_number=0, limit=limit, progress=Progress(),
    )  # fmt: skip
    return outcome, ledger


def test_a_question_costs_three_times_what_is_learnt_beside_what_is_judged_on(net, tmp_path):
    outcome, ledger = held(net, tmp_path / "ledger", AfterTraining(tokens=24))
    assert ledger.tokens == outcome.questions * (48 + 3 * 24)
    plain, other = held(net, tmp_path / "plain", Divergence())
    assert other.tokens == plain.questions * 48
    assert "training" not in other.text()


def test_no_more_is_paid_than_there_is_text(net, tmp_path):
    outcome, ledger = held(net, tmp_path / "ledger", AfterTraining(tokens=10_000))
    assert ledger.tokens == outcome.questions * (48 + 3 * 48)


def test_a_second_run_pays_the_same_from_the_record(net, tmp_path):
    first, ledger = held(net, tmp_path / "ledger", AfterTraining(tokens=24, rate=1e-2))
    second, again = held(net, tmp_path / "ledger", AfterTraining(tokens=24, rate=1e-2))
    assert (first, ledger.tokens, ledger.text()) == (second, again.tokens, again.text())


def test_a_limit_counts_the_training(net, tmp_path):
    outcome, ledger = held(net, tmp_path / "ledger", AfterTraining(tokens=24), limit=48)
    assert (outcome.questions, ledger.tokens) == (0, 0)


def test_a_plan_foresees_it(net):
    question = (RandomDraws(draws=DRAWS), net.space, 48, 12)
    plain, taught = rehearsed(*question), rehearsed(*question, training=lambda count: 3 * 24)
    assert plain.forwards
    assert taught.forwards == plain.forwards // 48 * (48 + 72)
