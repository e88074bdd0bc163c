"""The search driver checks, counts, remembers and stops."""

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from prunekit import Allocator, Objective, PluginError, Problem, Query, Reads
from prunekit.search.conversation import Judgement, best, converse
from prunekit.search.ledger import Ledger
from prunekit.search.probing import Spent
from prunekit.search.supernet import Supernet
from prunekit.system.progress import Progress
from prunekit.testing import toy_supernet, toy_tokens


@dataclass
class Counting(Objective):
    """The largest error, and how often it was asked."""

    calls: int = 0

    def loss(self, net, allocation, batch):
        self.calls += 1
        return max(net.site_errors(allocation))


class Free(Counting):
    def reads(self, depth):
        return Reads(tokens=False)


@dataclass(frozen=True)
class Script(Allocator):
    """Asks what it was told to ask."""

    told: tuple
    answer: Any = None

    @property
    def asks(self):
        return bool(self.told)

    def search(self, problem):
        for ask in self.told:
            yield [Query(a or problem.start, t, *probe) for a, t, *probe in ask]
        return problem.start if self.answer is None else self.answer


class Told(Allocator):
    """Says that it does not ask, and asks."""

    asks = False  # type: ignore[assignment]

    def search(self, problem):
        yield [Query(problem.start)]
        return problem.start


class Silent(Allocator):
    """Says nothing, and does not ask."""

    def search(self, problem):
        return problem.start
        yield


@pytest.fixture(scope="module")
def net():
    return toy_supernet()


def held(net, allocator, objective, path, limit=None, known=None, progress=None):
    problem = Problem(net.space, net.errors, net.space.uniform(), tokens=toy_tokens().n_tokens)
    ledger = Ledger(path)
    outcome = converse(
        allocator, problem, net, objective, toy_tokens(), ledger,
        pass_number=0, limit=limit, known=known, progress=progress or Progress(),
    )  # fmt: skip
    return outcome, ledger


def test_nothing_is_judged_twice(net, tmp_path):
    objective = Counting()
    _, ledger = held(net, Script((((None, 12), (None, 12)), ((None, 12),), ((None, None),))), objective, tmp_path / "l")
    assert objective.calls == 2
    assert ledger.tokens == 12 + 48


def test_more_tokens_than_there_are_are_all_there_are(net, tmp_path):
    _, ledger = held(net, Script((((None, 10**6),), ((None, None),))), Counting(), tmp_path / "l")
    assert ledger.tokens == 48


def test_a_table_objective_is_free(net, tmp_path):
    _, ledger = held(net, Script((((None, 12),),)), Free(), tmp_path / "l")
    assert ledger.tokens == 0


def test_a_second_run_asks_the_ledger_and_not_the_objective(net, tmp_path):
    script = Script((((None, 12),), ((None, None),)))
    first, _ = held(net, script, Counting(), tmp_path / "l")
    objective = Counting()
    second, _ = held(net, script, objective, tmp_path / "l")
    assert objective.calls == 0
    assert second == first


def test_the_limit_ends_a_search_with_the_best_so_far(net, tmp_path):
    others = list(net.space.swaps(net.space.uniform()))[:5]
    script = Script(tuple(((a, 24),) for a in others))
    outcome, ledger = held(net, script, Counting(), tmp_path / "l", limit=24 * 3)
    assert ledger.tokens == 24 * 3
    assert max(net.site_errors(outcome.answer)) == min(max(net.site_errors(a)) for a in others[:3])


def test_the_limit_is_never_passed_and_the_start_is_an_answer(net, tmp_path):
    outcome, ledger = held(net, Script((((None, 24),),)), Counting(), tmp_path / "l", limit=23)
    assert ledger.tokens == 0
    assert outcome.answer == net.space.uniform()


def test_what_another_conversation_has_learnt_is_free_and_passes_no_limit(net, tmp_path):
    script, objective, known = Script((((None, 12),), ((None, 24),))), Counting(), {}
    first, _ = held(net, script, objective, tmp_path / "l", known=known)
    second, ledger = held(net, script, objective, tmp_path / "m", limit=0, known=known)
    assert second == first
    assert (objective.calls, ledger.tokens, ledger.questions) == (2, 0, 2)


def test_a_limit_that_probes_use_up_is_warned_of_and_on_record_and_one_with_room_is_only_on_record(net, tmp_path):
    start, said = net.space.uniform(), list[str]()

    class Heard(Progress):
        def say(self, line):
            said.append(line)

    def ended(*asks, limit):
        said.clear()
        _, ledger = held(
            net, Script(asks), Counting(), tmp_path / f"l{limit}-{len(asks)}", limit=limit, progress=Heard()
        )
        return Spent.of_record(json.loads(ledger.text().splitlines()[-1]))

    probe, question = ((dense(net), 24, True),), ((start, 24),)
    assert ended(probe, question, limit=47) == Spent(47, probes=24, others=0, asked=24)
    assert "warning: probes take 24 of the 47 token-forwards of search_budget" in said[-1]
    assert ended(question, limit=23) == Spent(23, probes=0, others=0, asked=24)
    assert "nothing is asked" in said[-1]
    spent = ended(probe, question, ((start, 36),), limit=80)
    assert (spent, spent.by_probes, spent.words) == (Spent(80, probes=24, others=1, asked=36), False, "")
    assert "warning" not in said[-1]


def test_the_best_is_found_among_those_that_were_judged_on_most() -> None:
    judged = {((1,), 12): 0.1, ((2,), 48): 0.5, ((3,), 48): 0.4, ((4,), 48): 0.4}
    assert best(judged) == Judgement((3,), 48, 0.4)


def dense(net):
    return tuple(site.n_groups for site in net.space.sites)


def test_a_probe_is_paid_for_and_recorded_but_cannot_win(net, tmp_path):
    start = net.space.uniform()
    script = Script((((start, 12),), ((dense(net), 24, True),), ((start, 48),)))
    outcome, ledger = held(net, script, Counting(), tmp_path / "l", limit=12 + 24)
    assert ledger.tokens == 12 + 24
    assert outcome.answer == start  # although the dense allocation was judged better, and on more tokens
    *asked, ended = map(json.loads, ledger.text().splitlines())
    assert [record.get("probe") for record in asked] == [None, True]
    assert Spent.of_record(ended) == Spent(limit=36, probes=24, others=1, asked=48)
    assert held(net, script, Counting(), tmp_path / "l", limit=12 + 24)[0] == outcome


def test_a_search_that_only_probed_ends_with_the_start(net, tmp_path):
    script = Script((((dense(net), 12, True),), ((None, 24),)))
    assert held(net, script, Counting(), tmp_path / "l", limit=12)[0].answer == net.space.uniform()


def test_a_probe_has_rungs_or_all_groups(net, tmp_path):
    few = Supernet(net.model, net.adapter, net.space.zoomed(net.space.uniform(), reach=0), net.errors, net.store)
    _, ledger = held(few, Script((((dense(net), 12, True),),)), Counting(), tmp_path / "l")
    assert json.loads(ledger.text())["loss"] == 0  # no rung: the dense sub-layers themselves
    with pytest.raises(PluginError, match="nor a probe"):
        held(few, Script((((tuple(1 for _ in dense(net)), 12, True),),)), Counting(), tmp_path / "m")


def test_a_probe_cannot_be_the_answer(net, tmp_path):
    with pytest.raises(PluginError, match="not a feasible allocation"):
        held(net, Script((((dense(net), 12, True),),), answer=dense(net)), Counting(), tmp_path / "l")


def test_a_nan_loss_is_infinite(net, tmp_path):
    class Broken(Counting):
        def loss(self, net, allocation, batch):
            return math.nan if allocation == start else 1.0

    start = net.space.nearest(net.space.uniform())
    other = next(iter(net.space.swaps(start)))
    outcome, _ = held(net, Script((((start, 12), (other, 12)),), answer=start), Broken(), tmp_path / "l")
    assert outcome.judgement is not None
    assert outcome.judgement.loss == math.inf


@pytest.mark.parametrize("loss", [math.nan, -math.inf, math.inf])
def test_an_objective_without_a_finite_loss_is_an_error(loss, net, tmp_path):
    class Broken(Counting):
        def loss(self, net, allocation, batch):
            return loss

    with pytest.raises(PluginError, match="Broken has no finite loss for any of 1 allocations"):
        held(net, Script((((None, 12),),)), Broken(), tmp_path / "l")


@pytest.mark.parametrize("loss", [None, "0.5", [1.0], torch.zeros(2), 1j])
def test_an_objective_answers_with_one_number(loss, net, tmp_path):
    class Broken(Counting):
        def loss(self, net, allocation, batch):
            return loss

    with pytest.raises(PluginError, match=r"Broken: its loss is .*, and one number was asked"):
        held(net, Script((((None, 12),),)), Broken(), tmp_path / "l")


def test_an_objective_that_writes_into_the_model_is_named(net, tmp_path):
    class Writing(Counting):
        def loss(self, net, allocation, batch):
            with torch.no_grad():
                next(net.model.parameters()).mul_(1.0)
            return 1.0

    with pytest.raises(PluginError, match=r"Writing changed model\.\S+, which it was given only to be read"):
        held(net, Script((((None, 12),),)), Writing(), tmp_path / "l")


def test_a_question_repeated_for_ever_ends(net, tmp_path, monkeypatch):
    class Stuck(Allocator):
        def search(self, problem):
            while True:
                yield [Query(problem.start, 12)]

    monkeypatch.setattr("prunekit.search.conversation.MOST_IDLE", 100)
    with pytest.raises(PluginError, match="Stuck asks without end: 1 questions, and 101 asks without a new one"):
        held(net, Stuck(), Counting(), tmp_path / "l")


@pytest.mark.parametrize("search", [None, [], 7])
def test_a_search_is_a_conversation(search, net, tmp_path):
    class Silent(Allocator):
        def search(self, problem):
            return search

    with pytest.raises(PluginError, match=r"Silent: its search is .*, and Generator was asked"):
        held(net, Silent(), Counting(), tmp_path / "l")


WRONG: list[Any] = [[1, 2], None, (None,)]  # allocations


@pytest.mark.parametrize("queries", [None, 7, {1, 2}, [None], [7], *([Query(wrong)] for wrong in WRONG)])
def test_questions_are_lists_of_queries(queries, net, tmp_path):
    class Confused(Allocator):
        def search(self, problem):
            yield queries
            return problem.start

    with pytest.raises(PluginError, match="Confused"):
        held(net, Confused(), Counting(), tmp_path / "l")


def test_an_allocator_may_learn_from_elsewhere_and_a_second_run_replays_it(net, tmp_path):
    class Curious(Allocator):
        """Does what another program says."""

        def search(self, problem):
            nth = problem.journal.once({"which": "neighbour"}, lambda: next(said))
            problem.journal.note("heard")
            here = list(problem.space.swaps(problem.start))[nth]
            yield [Query(here, 12)]
            return here

    class Said(Progress):
        def say(self, line):
            lines.append(line)

    said, lines = iter([3]), []
    problem = Problem(net.space, net.errors, net.space.uniform(), tokens=48)
    outcomes = [
        converse(
            Curious(), problem, net, Counting(), toy_tokens(), Ledger(tmp_path / "l"), pass_number=0, progress=Said()
        )
        for _ in range(2)
    ]
    assert outcomes[0] == outcomes[1]
    assert lines == ["heard", "heard"]
    assert [line.partition(',"check"')[0] for line in (tmp_path / "l").read_text().splitlines()[:2]] == [
        '{"kind":"note","walk":0,"which":"neighbour","answer":3',
        '{"kind":"note","walk":0,"note":"heard"',
    ]


def test_who_does_not_ask_answers_at_once(net, tmp_path):
    outcome, _ = held(net, Script(()), Counting(), tmp_path / "l")
    assert net.space.is_feasible(outcome.answer)
    assert (outcome.questions, outcome.judgement) == (0, None)


@pytest.mark.parametrize(
    ("allocator", "message"),
    [
        (Silent(), "without a question"),
        (Script(((),)), "without a question"),
        (Told(), "says that it does not ask, and asked"),
        (Script((((None, 12),),), answer=(1, 2)), "not a feasible allocation"),
        (Script(((((10**6,) * 6, 12),),)), "not a feasible allocation"),
    ],
)
def test_a_broken_promise_names_the_plug_in(net, tmp_path, allocator, message):
    with pytest.raises(PluginError, match=f"(Script|Told|Silent).*{message}"):
        held(net, allocator, Counting(), tmp_path / "l")
