"""The likelihood of answers is the one computed directly on the assembled model."""

import math
from dataclasses import replace

import pytest
import torch

import prunekit as pk
from prunekit.testing import toy_questions, toy_supernet, toy_tokens
from prunekit_objectives.divergence import Divergence
from prunekit_objectives.task import Task


@pytest.fixture(scope="module")
def net():
    return toy_supernet()


def asked(batch):
    assert batch.answers is not None
    return batch.answers


def scores(net, plan, batch, normalised=True):
    """One forward per window, without padding, in float64: [question][choice], and which is right."""
    small, found = net.assemble(plan), {}
    answers = asked(batch)
    for i, ids in enumerate(batch.ids):
        first, last = int(answers.first[i]), int(answers.last[i])
        with torch.no_grad():
            log_q = small(ids[None, :last]).logits[0].double().log_softmax(-1)
        nats = [float(log_q[t - 1, ids[t]]) for t in range(first, last)]
        score = sum(nats) / (len(nats) if normalised else 1)
        found.setdefault(int(answers.question[i]), []).append((score, bool(answers.right[i])))
    return list(found.values())


def direct(measure, questions):
    losses = []
    for choices in questions:
        (right,) = (score for score, is_right in choices if is_right)
        wrong = [score for score, is_right in choices if not is_right]
        losses.append(
            {
                "cross-entropy": math.log(sum(math.exp(score) for score, _ in choices)) - right,
                "margin": max(wrong) - right,
                "likelihood": -right,
                "accuracy": float(right <= max(wrong)),
            }[measure]
        )
    return sum(losses) / len(losses)


@pytest.mark.parametrize("measure", ["cross-entropy", "margin", "likelihood", "accuracy"])
@pytest.mark.parametrize("normalised", [True, False])
def test_the_loss_is_that_of_the_assembled_model(net, measure, normalised):
    batch, plan = toy_questions(questions=6), net.space.uniform()
    expected = direct(measure, scores(net, plan, batch, normalised))
    assert Task(measure, normalised).loss(net, plan, batch) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_padding_changes_nothing(net):
    batch, plan = toy_questions(), net.space.uniform()
    filled = torch.where(torch.arange(batch.seqlen) >= asked(batch).last[:, None], 7, batch.ids)
    other = pk.TokenBatch(filled, "padded otherwise", answers=batch.answers)
    assert Task().loss(net, plan, other) == pytest.approx(Task().loss(net, plan, batch), rel=1e-9)


def test_a_prefix_holds_whole_questions(net):
    batch = toy_questions(questions=4, choices=3, seqlen=12)
    for tokens, questions in [(1, 1), (36, 1), (71, 1), (72, 2), (143, 3), (144, 4)]:
        first = batch.first(tokens)
        assert (len(first), int(asked(first).question.max()) + 1) == (3 * questions, questions)
        assert math.isfinite(Task().loss(net, net.space.uniform(), first))


def test_text_is_refused_by_the_task_and_questions_by_the_others():
    with pytest.raises(pk.WrongInput, match=r"needs questions, and toy is running text.*data\.search_dataset"):
        Task().check(toy_tokens())
    with pytest.raises(pk.WrongInput, match="Divergence judges on running text, and questions holds questions"):
        Divergence().check(toy_questions())


def test_only_the_likelihood_does_without_wrong_choices():
    alone = toy_questions(choices=1)
    Task("likelihood").check(alone)
    with pytest.raises(pk.WrongInput, match="without a wrong choice, which margin needs"):
        Task("margin").check(alone)


def test_the_digest_is_of_the_right_answers_too():
    batch = toy_questions()
    other = replace(asked(batch), right=~asked(batch).right)
    assert batch.digest == toy_questions().digest != pk.TokenBatch(batch.ids, "other", answers=other).digest
