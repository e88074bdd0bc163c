"""The loop is AdamW with a cosine, keeps the best it met, and goes on after an interruption bit for bit."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from prunekit import TokenBatch, WrongInput
from prunekit.system.checkpoints import Checkpoints
from prunekit.system.progress import Progress, Stage
from prunekit.testing import tiny, toy_tokens
from prunekit_strategies.finishers import training
from prunekit_strategies.finishers.shares import Shares, weighed
from prunekit_strategies.finishers.training import (
    LanguageLoss,
    TextTraining,
    Training,
    gained,
    held_out,
    in_vain,
    told,
    undone,
)
from prunekit_strategies.learners.domains import worst

TARGETS = torch.tensor([[1.0, -2.0], [3.0, 0.5], [-1.0, 4.0]], dtype=torch.float64)


def fitted(regime, held, *, checkpoints=None, start=0.0, seen=None, tries=0):
    theta = nn.Parameter(torch.full((2,), start, dtype=torch.float64))

    def loss(i):
        if seen is not None:
            seen.append(i)
        return 0.01 * (theta - TARGETS[i]).square().sum()  # gradients below the norm at which they are clipped

    course = regime.fit(
        [theta], loss, 3, lambda: float(held(theta.detach())),
        seed=0, checkpoints=checkpoints or Checkpoints(), name="toy", stage=Stage(), tries=tries,
    )  # fmt: skip
    return theta.detach(), course.losses


def test_one_step_is_adamws():
    regime = Training(rate=0.1, epochs=1)
    theta, _ = fitted(regime, lambda t: -t.abs().sum())
    twin = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    adam = torch.optim.AdamW([twin], betas=(0.9, 0.95), weight_decay=0.0)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(0))
    for step, i in enumerate(order):
        share = (step + 0.5) / 3
        adam.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * (share - 0.05) / 0.95))
        adam.zero_grad()
        (0.01 * (twin - TARGETS[i]).square().sum()).backward()
        adam.step()
    torch.testing.assert_close(theta, twin.detach())


def test_a_single_step_changes_something():
    theta, _ = fitted(Training(rate=0.1, epochs=1, steps=1), lambda t: -t.abs().sum())
    assert theta.all()


def test_gradients_are_clipped():
    twins = [nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2)]
    for twin, scale in zip(twins, (1.0, 1e6), strict=True):
        Training(rate=0.1, epochs=1).fit(
            [twin], lambda i, t=twin, s=scale: -s * t.sum() * (i + 1), 2, lambda t=twin: -float(t.detach().sum()),
            seed=0, checkpoints=Checkpoints(), name="toy", stage=Stage(),
        )  # fmt: skip
    torch.testing.assert_close(*twins)
    assert twins[0].all()


def test_it_converges_where_the_held_out_loss_is_that_of_training():
    mean = TARGETS.mean(0)
    theta, history = fitted(Training(rate=0.2, epochs=60, patience=60), lambda t: (t - mean).square().sum())
    torch.testing.assert_close(theta, mean, atol=0.1, rtol=0)
    assert min(history) < 0.01 * history[0]


@pytest.mark.parametrize("worse", [lambda t: t.square().sum(), lambda t: math.nan if t.any() else 5.0])
def test_what_only_gets_worse_ends_where_it_began(worse):
    theta, history = fitted(Training(rate=0.2, epochs=9, patience=3), worse)
    assert not theta.any()
    assert len(history) == 1 + 3  # patience


def near(theta):
    """Falls for a little way and rises beyond: a bold rate is worse than none."""
    far = float(theta.abs().max())
    return torch.tensor(-far if far < 0.3 else far)


def test_a_rate_that_is_too_bold_is_divided_until_the_first_epoch_gains_and_the_cosine_is_whole():
    bold = Training(rate=8.1, epochs=4, patience=3)
    stuck, history = fitted(bold, near)
    assert not stuck.any()
    assert len(history) == 1 + 3
    theta, history = fitted(bold, near, tries=4)
    assert in_vain(history) == 4  # 8.1, 2.7, 0.9, 0.3
    assert min(history) < history[0]
    modest, straight = fitted(Training(rate=0.1, epochs=4, patience=3), near)  # what follows is a run of its own
    torch.testing.assert_close(theta, modest)
    assert history[5:] == pytest.approx(straight[1:])


def test_looking_for_a_rate_ends_and_an_interruption_changes_nothing(tmp_path, killed_at):
    bold = Training(rate=8.1, epochs=4, patience=3)
    _, history = fitted(bold, lambda t: t.abs().sum(), tries=3)
    assert len(history) == 1 + 3 + 3  # three looked, three were in vain
    whole, history = fitted(bold, near, tries=4)
    for epoch in (2, 6):
        place = Checkpoints(tmp_path / str(epoch))
        with killed_at(training, "_number", epoch + 1):
            fitted(bold, near, checkpoints=place, tries=4)
        again, resumed = fitted(bold, near, checkpoints=place, tries=4)
        assert torch.equal(again, whole)
        assert resumed == history


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (7, 1), (15, 1), (16, 2), (31, 3), (33, 4), (99, 4)])
def test_every_step_is_made_and_every_epoch_has_eight_of_a_given_number(steps, epochs):
    seen, losses = [], iter(range(9, 0, -1))
    regime = Training(rate=0.1, epochs=4, patience=1, steps=steps)
    _, history = fitted(regime, lambda _: next(losses), seen=seen)
    assert len(seen) == steps
    assert len(history) == 1 + epochs
    assert len(set(seen[:3])) == min(3, steps)  # all batches before one comes again


def test_the_best_epoch_is_kept_not_the_last():
    calls, met = iter([5.0, 3.0, 4.0, 4.5]), []

    def held(t):
        met.append(t.clone())
        return next(calls)

    theta, history = fitted(Training(rate=0.2, epochs=5, patience=2), held)
    assert history == [5.0, 3.0, 4.0, 4.5]
    assert torch.equal(theta, met[1])


def test_an_epoch_that_lowers_nothing_is_undone_and_the_next_is_less_bold():
    """A rate far above what the loss bears: without going back it never gets below the start."""

    def held(t):
        return (t - TARGETS.mean(0)).square().sum()

    bold = Training(rate=300.0, epochs=12, patience=12)
    theta, history = fitted(bold, held)
    lowest = history.index(min(history))
    assert history[1] > history[0]  # far too bold
    assert history[lowest] < 0.5 * history[0]
    assert held(theta) == history[lowest]


def test_what_was_undone_is_forgotten():
    """After an epoch that was undone, training is that of a third of the rate from the start, AdamW anew."""
    losses, met = iter([1.0, 2.0, 0.5]), []

    def held(t):
        met.append(t.clone())
        return next(losses)

    theta, _ = fitted(Training(rate=0.3, epochs=2), held)
    twin = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    adam = torch.optim.AdamW([twin], betas=(0.9, 0.95), weight_decay=0.0)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(1))  # of the second epoch
    for step, i in enumerate(order, 3):
        adam.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * ((step + 0.5) / 6 - 0.05) / 0.95))
        adam.zero_grad()
        (0.01 * (twin - TARGETS[i]).square().sum()).backward()
        adam.step()
    torch.testing.assert_close(theta, twin.detach())
    assert not torch.equal(met[1], theta)


@pytest.mark.parametrize(
    ("history", "count", "said"),
    [
        ([2.0], 0, "none of 0 epochs lowered"),
        ([2.0, 3.0, math.inf], 2, "none of 2 epochs lowered the held-out loss of 2, so nothing was changed"),
        ([2.0, 1.5, 1.5, 1.0], 1, "fell from 2 to 1; 2 of 3 epochs lowered it"),
    ],
)
def test_what_was_gained_is_said(history, count, said):
    assert undone(history) == count
    assert said in told("toy", history)


def test_every_epoch_meets_every_batch_in_its_own_order():
    seen = []
    fitted(Training(rate=0.1, epochs=4, patience=9), lambda t: 1.0, seen=seen)
    epochs = [tuple(seen[i : i + 3]) for i in range(0, 12, 3)]
    assert all(sorted(epoch) == [0, 1, 2] for epoch in epochs)
    assert len(set(epochs)) > 1


@pytest.mark.parametrize("rate", [0.2, 300.0])  # the second goes back at first
@pytest.mark.parametrize("saves", range(1, 6))
def test_a_killed_run_ends_in_the_same_bits_and_a_finished_one_does_nothing(tmp_path, saves, rate, killed_at):
    def held(t):
        return (t - TARGETS.mean(0)).square().sum()

    regime = Training(rate=rate, epochs=5, patience=9)
    expected = fitted(regime, held)
    with killed_at(Checkpoints, "save", saves, after=True):
        fitted(regime, held, checkpoints=Checkpoints(tmp_path))
    seen = []
    theta, history = fitted(regime, held, checkpoints=Checkpoints(tmp_path), seen=seen, start=77.0)
    assert torch.equal(theta, expected[0])
    assert history == expected[1]
    assert len(seen) == 3 * (5 - saves)


def test_windows_are_held_out_from_the_end():
    train, judge = held_out(toy_tokens(windows=8), 0.25)
    assert (len(train), len(judge)) == (6, 2)
    assert torch.equal(torch.cat([train.ids, judge.ids]), toy_tokens(windows=8).ids)
    assert [len(part) for part in held_out(toy_tokens(windows=2), 0.9)] == [1, 1]
    with pytest.raises(WrongInput, match="two windows"):
        held_out(TokenBatch(torch.ones(1, 4, dtype=torch.long), "one"), 0.5)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
@pytest.mark.parametrize("rows", [3, 1 << 20])
def test_the_language_loss_is_that_of_whole_logits_gradients_too(family, rows, monkeypatch):
    small, dense, ids = tiny(family, seed=1), tiny(family), toy_tokens().ids
    monkeypatch.setattr(training, "LOGITS_AT_ONCE", rows * 61)
    loss = LanguageLoss(small, dense, truth=0.3, teacher=0.7, temperature=2.0)
    z, t = (m(ids, use_cache=False).logits[:, :-1].flatten(0, 1) for m in (small, dense))
    truth = nn.functional.cross_entropy(z, ids[:, 1:].flatten())
    p = (t.detach() / 2).softmax(-1)
    teacher = 4 * (p * (p.log() - (z / 2).log_softmax(-1))).sum(-1).mean()
    expected = 0.3 * truth + 0.7 * teacher
    torch.testing.assert_close(loss(ids), expected)
    torch.testing.assert_close(torch.tensor(loss.mean(ids.split(3)), dtype=torch.float64), expected.detach())
    parameters = list(small.parameters())  # of the head, and of what is tied to it, too
    for one, two in zip(
        torch.autograd.grad(loss(ids), parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("values", [(0.0, 1), (1e-3, 0), (float("nan"), 1)])
def test_nonsense_is_refused(values):
    with pytest.raises(ValueError, match="rate > 0"):
        Training(*values)


def clocked(monkeypatch, regime, ends, *, a_step, checkpoints=None):
    """A training on a clock on which step i, from 0, takes `a_step(i)`, and nothing else takes any time."""
    now, steps = [0.0], [0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    theta = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def loss(_):
        now[0] += a_step(steps[0])
        steps[0] += 1
        return theta.square().sum()

    course = regime.fit(
        [theta], loss, 8, lambda: theta.detach().square().sum().item(),
        seed=0, checkpoints=checkpoints or Checkpoints(), name="x", stage=Stage(), ends=ends,
    )  # fmt: skip
    return course, theta.detach(), now[0]


@pytest.mark.parametrize(
    ("a_step", "steps", "ended"),
    [
        (lambda _: 1.0, (10, 10, 10, 10), 40.0),  # as it was foreseen
        (lambda _: 2.0, (10, 3, 3, 4), 40.0),  # twice as slow
        (lambda _: 0.5, (10, 23, 23, 24), 40.0),  # twice as fast
        (lambda i: 1.0 if i < 20 else 4.0, (10, 10, 10), 60.0),  # another program came
    ],
)
def test_what_is_left_of_a_time_is_dealt_out_anew_after_every_epoch(monkeypatch, a_step, steps, ended):
    regime = Training(rate=0.01, epochs=4, steps=40)
    course, theta, now = clocked(monkeypatch, regime, 40.0, a_step=a_step)
    again, same, _ = clocked(monkeypatch, replace(regime, steps=course.steps), math.inf, a_step=a_step)
    assert (course.steps, now) == (steps, ended)
    assert again == course
    assert torch.equal(theta, same)


def test_steps_of_every_epoch_are_the_first_of_all_epochs():
    with pytest.raises(ValueError, match="of each epoch ≥ 1 steps, for at most 2 epochs"):
        Training(rate=0.1, epochs=2, steps=(4, 4, 4))
    with pytest.raises(ValueError, match="of each epoch ≥ 1 steps"):
        Training(rate=0.1, epochs=2, steps=(4, 0))


def test_text_goes_on_with_the_shares_of_its_data_sets():
    tokens = toy_tokens(windows=8, sources=2)  # toy-1 and toy-2 take turns
    found = weighed(tokens, {"toy-1": 0.75, "toy-2": 0.25})
    assert len(found) == 8
    assert found.origins.count("toy-1") == 6
    rows = [next(i for i in range(8) if torch.equal(tokens.ids[i], ids)) for ids in found.ids]
    assert sorted(rows) == [0, 0, 1, 2, 2, 3, 4, 6], "each has its turn, then the first come again"
    assert {*found.origins[:4]} == {"toy-1", "toy-2"}, "and they are mixed"
    assert torch.equal(weighed(tokens, {"toy-1": 3.0, "toy-2": 1.0}).ids, found.ids), "shares are relative"
    for same in ({}, {"toy-1": 1.0}, {"toy-1": 0.0, "toy-2": 0.0}):
        assert weighed(tokens, same) is tokens
    plain = toy_tokens()
    assert weighed(plain, {"toy": 1.0}) is plain
    rounded = weighed(tokens, {"toy-1": 0.3, "toy-2": 0.7})
    assert (rounded.origins.count("toy-1"), len(rounded)) == (2, 8)


LOST = ({"toy-1": 3.0, "toy-2": 2.0}, {"toy-1": 2.5, "toy-2": 2.0}, {"toy-1": 1.0, "toy-2": 2.0})


def sharing(rule, checkpoints=None, begin=None):
    """Shares of two data sets, and means of their losses at one judging after the other."""
    tokens = toy_tokens(windows=12, sources=2)
    some, rest = held_out(tokens, 1 / 3)
    return Shares(some, rest, begin or {}, rule, 4, len(tokens.ids[0]), checkpoints or Checkpoints(), "toy"), rest


def judged(shares, rest, losses):
    first = {name: part.ids[0] for name, part in rest.parts.items()}

    def mean(batches):
        (name,) = [name for name, ids in first.items() if torch.equal(ids, batches[0][0])]
        return losses[name]

    return shares.judge(mean)


@pytest.mark.parametrize("rule", ["dynamic", "robust"])
def test_shares_move_to_the_data_set_that_is_farther_above_the_dense_model(rule):
    shares, rest = sharing(rule)
    shares.resume(lambda _: 1.0)
    assert shares.now == {"toy-1": 0.5, "toy-2": 0.5}, "those of the text"
    assert judged(shares, rest, LOST[0]) == 2.5, "and all windows count alike in what is judged"
    if rule == "dynamic":  # softmax(log w + loss - reference), the reference is the same for both
        raised = math.e / (1 + math.e)
        assert shares.now["toy-1"] == pytest.approx((1 - 1e-4) * raised + 1e-4 / 2)
    else:
        assert shares.now["toy-1"] == pytest.approx(worst([0.5, 0.5], [2.0, 1.0], 0.1, 0.2)[0])
    assert shares.now["toy-1"] > 0.6
    dealt = torch.cat(shares.batches)
    own = {tuple(ids.tolist()) for ids in shares.learned.parts["toy-1"].ids}
    assert sum(tuple(ids.tolist()) in own for ids in dealt) == round(8 * shares.now["toy-1"])
    assert len(dealt) == 8, "as many windows as before"


def test_shares_stay_where_they_are_told_to_or_there_is_one_data_set():
    shares, _ = sharing("fixed", begin={"toy-1": 3.0, "toy-2": 1.0})
    shares.resume(lambda _: 1.0)
    shares.judge(lambda _: 2.0)
    assert shares.now == {"toy-1": 0.75, "toy-2": 0.25}
    alone = Shares(toy_tokens(), toy_tokens(), {}, "dynamic", 4, 8, Checkpoints(), "toy")
    alone.resume(lambda _: 1.0)
    assert alone.judge(lambda _: 2.0) == 2.0
    assert alone.now == {}


@pytest.mark.parametrize("rule", ["dynamic", "robust"])
def test_shares_move_by_a_single_window_or_stay_where_none_is_of_them(rule):
    tokens = toy_tokens(windows=12, sources=2)
    some, rest = held_out(tokens, 1 / 12)
    shares = Shares(some, rest, {}, rule, 4, len(tokens.ids[0]), Checkpoints(), "toy")
    shares.resume(lambda _: 1.0)
    before = shares.now
    assert shares.judge(lambda _: 2.0) == 2.0
    assert shares.now == pytest.approx(before, abs=1e-3), "the other has the mean of what is known"
    other = Shares(some, toy_tokens(windows=1), {}, rule, 4, len(tokens.ids[0]), Checkpoints(), "toy")
    other.resume(lambda _: 1.0)
    assert other.judge(lambda _: 2.0) == 2.0
    assert other.now == {}


def test_shares_go_on_after_an_interruption_where_they_were(tmp_path):
    checkpoints, ways = Checkpoints(tmp_path), []
    shares, rest = sharing("dynamic", checkpoints)
    shares.resume(lambda _: 1.0)
    for losses in LOST:
        judged(shares, rest, losses)
        ways.append(shares.now)
    # killed behind the third judging, before the state of the second epoch was written: it is made again
    checkpoints.save("toy", {"history": torch.zeros(2)})
    again, rest = sharing("dynamic", checkpoints)
    again.resume(lambda _: pytest.fail("the dense model is heard once"))
    assert again.now == ways[1]
    judged(again, rest, LOST[2])
    assert again.now == ways[2]


def test_a_training_moves_its_shares_and_reports_them(tmp_path):
    dense = tiny("llama")
    small, tokens = copy.deepcopy(dense), toy_tokens(windows=12, sources=2)
    torch.manual_seed(0)
    for parameter in small.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    piece: Any = SimpleNamespace(
        tokens=tokens, domains={}, checkpoints=Checkpoints(tmp_path), seed=0, seconds=None, progress=Progress(),
    )  # fmt: skip
    regime = TextTraining(rate=1e-3, epochs=2, batch_tokens=8, held_out=1 / 3, loading="dynamic")
    loss = LanguageLoss(small, dense, truth=1.0, teacher=1.0)
    course = regime.learn(piece, loss, list(small.parameters()), "model", Stage(), math.inf)
    assert min(course.losses) < course.losses[0]
    assert sum(course.shares.values()) == pytest.approx(1)
    assert course.shares["toy-1"] != 0.5
    assert gained(piece, "toy", regime, course)["shares"] == course.shares


def test_what_is_held_out_is_the_text_as_it_is():
    some, rest = held_out(toy_tokens(windows=8, sources=2), 0.25)
    assert (some.origins, rest.origins) == (("toy-1", "toy-2") * 3, ("toy-1", "toy-2"))
