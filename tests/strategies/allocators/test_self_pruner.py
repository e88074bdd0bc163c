"""A language model breeds as well as it can; what it cannot do its twin does, and no question is asked twice."""

import json
import math
import random
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from prunekit import Budget, Journal, Space, WrongInput
from prunekit.cli.main import app
from prunekit.search.conversation import Recorded
from prunekit.search.ledger import Ledger
from prunekit.system.progress import Progress
from prunekit.testing import best_allocation, converse
from prunekit.testing.spaces import ZOO, additive, convex_table, problem, sites_of, small_llama
from prunekit_strategies.allocators.self_pruner import GIVE_UP, Rates, SelfPruner, _items
from prunekit_strategies.allocators.tyr import CoarseToFine

KEY = "sk-test-0123456789abcdef"
SMALL: dict[str, Any] = {"population": 6, "iterations": 4, "offspring": 3}


class Notebook(Journal):
    """Keeps what is written into it."""

    def __init__(self):
        self.questions, self.answers, self.notes = [], [], []

    def once(self, question, answer):
        self.questions.append(dict(question))
        self.answers.append(answer())
        return self.answers[-1]

    def note(self, line):
        self.notes.append(line)


def toy(seed=0) -> Any:
    return replace(problem(SelfPruner().first_space(small_llama()), seed=seed), journal=Notebook())


def advised(server, **changes):
    return SelfPruner(backend="openai", model="some-model", base_url=server.url, **{**SMALL, "retries": 1, **changes})


# -- the twin -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_asks_thirty_and_twenty_times_twenty_and_none_twice(seed):
    asks = converse(SelfPruner(), toy(seed)).asks
    assert [len(ask) for ask in asks] == [30] + 20 * [20]
    assert len({q.allocation for ask in asks for q in ask}) == 430


def test_the_best_is_never_lost():
    world = toy()
    hidden = additive(convex_table(world.space, seed=1), world.space)
    talk = converse(SelfPruner(), world, hidden)
    lowest = [min(hidden(q.allocation) for ask in talk.asks[: n + 1] for q in ask) for n in range(len(talk.asks))]
    assert hidden(talk.answer) == lowest[-1] < lowest[0]


@pytest.mark.parametrize("seed", range(3))
def test_finds_what_the_table_does_not_know(seed):
    world = toy(seed)
    hidden = convex_table(world.space, seed=seed + 10)
    loss, optimum = additive(hidden, world.space), best_allocation(world.space, hidden)[1]
    for plugin in (SelfPruner(), SelfPruner(warm_start=False)):
        assert loss(converse(plugin, world, loss).answer) - optimum < 0.3 * (loss(world.start) - optimum)


def test_a_space_that_is_used_up_ends_the_search():
    world = problem(Space(ZOO["even"]().space.sites, ((1, 3), (1, 3), (2,), (2,)), Budget(8)))
    assert {q.allocation for ask in converse(SelfPruner(), world).asks for q in ask} == {(1, 3, 2, 2), (3, 1, 2, 2)}


def test_a_key_in_place_of_its_name_is_refused_and_not_repeated():
    with pytest.raises(ValueError, match="never the key itself") as refused:
        SelfPruner(key_variable=KEY)
    assert KEY not in str(refused.value)


# -- vectors of rates -----------------------------------------------------------------------------------

WIDE = sites_of(80, attention=(8, 5 * 64), mlp=(64, 100))
SPACES = {
    "coarse": SelfPruner().first_space(small_llama()),
    "fine": small_llama().zoomed(small_llama().uniform(), stride=1 / 64, reach=4),
    "apart": SelfPruner().first_space(ZOO["apart"]().space),
    "80 blocks": SelfPruner().first_space(Space.whole(WIDE, Budget.keeping(0.6, WIDE))),
}


@pytest.mark.parametrize("name", SPACES)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=8)
def test_repair_spends_the_budget_and_repairs_nothing_twice(name, seed):
    space = SPACES[name]
    rates, rng = Rates(space, space.uniform()), random.Random(seed)
    low, high = rates.range
    child = rates.decode([rng.uniform(low, high) for _ in rates.members], space.uniform())
    assert space.is_feasible(child)
    assert space.nearest(child) == child
    assert rates.decode(rates.of(child), child) == child


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("seed", range(3))
def test_two_decimals_are_enough_to_say_an_allocation(name, seed):
    space, rng = SPACES[name], random.Random(seed)
    rates, start = Rates(space, space.uniform()), space.uniform()
    some = space.nearest([k + rng.uniform(-0.2, 0.2) * s.n_groups for k, s in zip(start, space.sites, strict=True)])
    heard = rates.decode(json.loads(rates.shown(some)), some)
    off = [abs(a - b) / s.n_groups for a, b, s in zip(heard, some, space.sites, strict=True)]
    assert max(off) <= space.stride + 1e-9  # a rung, where rounding tips the balance
    assert sum(x > 0 for x in off) <= 2


def test_rates_are_removed_shares_within_the_range_that_is_told():
    space = SPACES["coarse"]
    rates = Rates(space, space.uniform())
    assert rates.mean == pytest.approx(0.5, abs=0.01)
    assert rates.range == (0, 1)
    assert rates.of(tuple(s.n_groups for s in space.sites)) == [0.0] * 16
    text = rates.told("Some-7B")
    assert "Some-7B with 8 decoder blocks" in text
    assert "0 attention, 0 mlp, 1 attention" in text


# -- a language model that knows its trade ----------------------------------------------------------------


def test_a_good_model_does_it_all(server, breeder):
    server.script, world = breeder, toy()
    talk = converse(advised(server), world)
    assert [q["operator"] for q in world.journal.questions] == ["init", *(["select", "cross", "mutate"] * 4)]
    assert world.journal.notes == []
    assert server.prompts == [q["prompt"] for q in world.journal.questions]
    rates = Rates(world.space, world.start)
    told = [v for a in world.journal.answers for v in re.findall(r"\[[\d., ]+\]", a["reply"]) if v.count(",") == 15]
    asked = {q.allocation for ask in talk.asks for q in ask[2 if ask is talk.asks[0] else 0 :]}
    assert asked <= {rates.decode(json.loads(v), world.start) for v in told}
    assert [len(ask) for ask in talk.asks] == [6] + 4 * [6]


def test_twin_and_model_have_the_same_evaluations(server, breeder):
    server.script = breeder
    talk = converse(advised(server, population=30, iterations=20, offspring=10), toy())
    assert [len(ask) for ask in talk.asks] == [30] + 20 * [20]
    assert len(talk.asked) == 430


def test_parents_are_those_the_model_chose(server, breeder):
    """It always chooses the best two, and crosses by copying the first: the child is refused as no new plan."""
    world = toy()

    def script(prompt, n):
        if "Choose" in prompt:
            return '{"pairs": [[0, 1], [0, 1], [1, 0]]}'
        return breeder(prompt, n)

    server.script = script
    converse(advised(server, iterations=1), world)
    rates = Rates(world.space, world.start)
    first = [a for ask in converse(advised(server, iterations=0), world).asks for a in (q.allocation for q in ask)]
    ranked = sorted(first, key=additive(world.errors, world.space))
    cross = next(q["prompt"] for q in world.journal.questions if q["operator"] == "cross")
    zero, one = rates.shown(ranked[0]), rates.shown(ranked[1])
    assert f"0: {zero} and {one}\n1: {zero} and {one}\n2: {one} and {zero}\n" in cross
    mutate = next(q["prompt"] for q in world.journal.questions if q["operator"] == "mutate")
    assert f"0: {zero}\n1: {zero}\n2: {zero}\n" in mutate  # the better of each pair


def test_what_is_missing_is_asked_for_with_the_reason_then_left_to_the_twin(server, breeder):
    world, bad = toy(), {"some": 2}

    def script(prompt, n):
        reply = breeder(prompt, n)
        if "Propose" not in prompt:
            return reply
        vectors = json.loads(reply[reply.index("{") : reply.rindex("}") + 1])["population"]
        return json.dumps({"population": [*vectors[: -bad["some"]], *([[0.5]] * bad["some"])]})

    server.script = script
    talk = converse(advised(server, iterations=0), world)
    first, second = (q["prompt"] for q in world.journal.questions)
    assert "Propose 4 plans" in first
    assert "could not be used" not in first
    assert "Propose 2 plans" in second
    assert "could not be used: a vector has 16 numbers, not 1." in second
    assert world.journal.notes == [
        "warning: init: 2 of 4 by the classical twin, because a vector has 16 numbers, not 1"
    ]
    assert len(talk.asked) == 6


def test_a_model_may_think_aloud_and_change_its_mind():
    reply = (
        'Say {"children": [1]} or {x}. No: <think>{"children": [2]}</think>```{"children": [3]}``` as {"children": 4}'
    )
    assert _items(reply + ' {"loss": 5}', "children") == [3]


def test_of_eighty_blocks_the_model_sees_means_and_the_ten_best(server, breeder):
    server.script, space = breeder, SPACES["80 blocks"]
    world: Any = replace(problem(space), journal=Notebook())
    talk = converse(advised(server, population=14, iterations=1), world)
    assert world.journal.notes == []
    assert all(space.is_feasible(a) for a in talk.asked)
    init, select, *_ = server.prompts
    assert "a vector of 80 pruning rates, one per block" in init
    assert re.findall(r"^(\d+): loss", select, re.MULTILINE) == [str(i) for i in range(10)]


# -- and all the others ---------------------------------------------------------------------------------


def every(value: str) -> Any:
    """Answer each operator with as many of one vector, and pairs of no use."""

    def script(prompt, n):
        (count,) = map(int, re.findall(r"(?:Propose|Choose|each of these) (\d+)", prompt))
        key = "pairs" if "Choose" in prompt else "population" if "Propose" in prompt else "children"
        return f'{{"{key}": [{", ".join([value] * count)}]}}'

    return script


USELESS = {
    "garbage": lambda *_: "As a language model, I cannot {prune} [myself].",
    "nothing": lambda *_: "",
    "half a reply": lambda *_: '{"population": [[0.5, 0.5',
    "another object": lambda *_: '{"answer": [[0.5]]}',
    "no list": every("7"),
    "empty": lambda *_: '{"population": [], "pairs": [], "children": []}',
    "too short": every("[0.5]"),
    "too long": every(json.dumps([0.5] * 17)),
    "percent": every(json.dumps([50] * 16)),
    "nan": every(json.dumps([0.5] * 15 + [math.nan])),
    "infinite": every("[" + "0.5," * 15 + "1e999]"),
    "null": every(json.dumps([0.5] * 15 + [None])),
    "words": every(json.dumps(["0.5"] * 16)),
    "booleans": every(json.dumps([True, False] * 8)),
    "an endless number": every("[" + "9" * 5000 + "]"),
    "deep": lambda *_: '{"population": ' + "[" * 100_000,
    "duplicates": every(json.dumps([0.5] * 16)),  # that is the start
}


@pytest.mark.parametrize("name", USELESS)
def test_a_model_of_no_use_is_its_twin_and_is_left_alone_after_a_while(server, name):
    server.script, world = USELESS[name], toy()
    talk = converse(advised(server), world)
    assert talk == converse(SelfPruner(**SMALL), toy())
    assert len(server.requests) == GIVE_UP * 2  # once and one retry
    assert len(world.journal.notes) == GIVE_UP + 1
    assert all("by the classical twin, because" in note for note in world.journal.notes[:-1])


@pytest.mark.parametrize("trouble", ["status", "refusal", "silence", "hanging up"])
def test_an_endpoint_that_fails_in_the_middle_leaves_its_work_to_the_twin(server, breeder, trouble):
    answers = {"status": (500, "no"), "refusal": (401, "no"), "hanging up": None}

    def script(prompt, n):
        if n == 0:
            return breeder(prompt, n)
        return server.sleep() if trouble == "silence" else answers[trouble]

    server.script, world = script, toy()
    talk = converse(advised(server, retries=0, timeout=0.3), world)
    assert [len(ask) for ask in talk.asks] == [6] + 4 * [6]
    assert len(server.requests) == 1 + GIVE_UP
    assert "select: 3 of 3 by the classical twin, because 'some-model' at http" in world.journal.notes[0]
    assert sum("failed" in answer for answer in world.journal.answers) == GIVE_UP


def test_an_endpoint_that_comes_back_is_used_again(server, breeder):
    server.script, world = (lambda prompt, n: breeder(prompt, n) if n % 2 == 0 else (400, "no")), toy()
    converse(advised(server, retries=0), world)
    assert len(server.requests) == 1 + 3 * 4
    assert len(world.journal.notes) == 6


def test_an_endpoint_that_never_answered_is_for_the_user_to_mend(server):
    server.script = lambda *_: (404, '{"error": {"message": "no model some-model"}}')
    with pytest.raises(WrongInput, match=r"HTTP 404 .*no model some-model; .*goes on from here"):
        converse(advised(server), toy())
    with pytest.raises(WrongInput, match="HTTP 404"):
        CoarseToFine(inner=advised(server)).ready()
    with pytest.raises(WrongInput, match="needs a model"):
        SelfPruner(backend="openai").ready()
    SelfPruner().ready()


def test_a_local_model_that_babbles_is_its_twin(saved_tiny):
    folder = saved_tiny(max_position_embeddings=4096)
    local = SelfPruner(backend="transformers", model=str(folder), reply_tokens=8, retries=1, **SMALL)
    local.ready()
    world = toy()
    assert converse(local, world) == converse(SelfPruner(**SMALL), toy())
    assert len(world.journal.questions) == GIVE_UP * 2
    again = toy()
    converse(local, again)
    assert again.journal.answers == world.journal.answers  # the same seed, the same babble


# -- resuming -------------------------------------------------------------------------------------------


def held(plugin, path, die_after=None):
    """A conversation whose journal and losses are on record, as a run holds it."""
    ledger, world = Ledger(path), toy()
    loss, count = additive(world.errors, world.space), 0
    search = plugin.search(replace(world, journal=Recorded(ledger, 0, Progress())))
    queries = next(search)
    while True:
        losses = []
        for query in queries:
            question = {"kind": "question", "allocation": list(query.allocation), "tokens": 0}
            if (known := ledger.recall(question)) is None:
                if count == die_after:
                    raise KeyboardInterrupt
                known, count = loss(query.allocation), count + 1
                ledger.answer(question, known)
            losses.append(known)
        try:
            queries = search.send(losses)
        except StopIteration as stop:
            return stop.value


def test_a_resumed_run_asks_nothing_twice_and_ends_in_the_same_bytes(server, breeder, tmp_path):
    def script(prompt, n):  # a model that never says the same twice, and is of no use every third time
        return breeder(prompt, n) if n % 3 else "I would rather not."

    server.script = script
    whole = held(advised(server), tmp_path / "whole")
    asked = server.prompts
    server.requests.clear()
    for _ in range(100):
        try:
            assert held(advised(server), tmp_path / "killed", die_after=4) == whole
            break
        except KeyboardInterrupt:
            continue
    assert server.prompts == asked
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
    server.requests.clear()
    server.script = lambda *_: (500, "gone")
    assert held(advised(server), tmp_path / "whole") == whole
    assert server.requests == []


@pytest.fixture(scope="module")
def folder(saved_tiny):
    return saved_tiny()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "code.txt"
    file.write_text("\n".join(f"def f{i}(x): return x + {i * i}" for i in range(500)))
    return file


@pytest.fixture
def pruned(folder, text, server):
    """`prunekit prune` with the recipe and the scripted server, into a folder."""

    def run(output):
        sizes = {"population": 4, "iterations": 2, "offspring": 2, "retries": 0}
        tokens = {"calibration_tokens": 256, "search_tokens": 128, "evaluation_tokens": 128, "seqlen": 32}
        sets = {f"allocator.{k}": v for k, v in {**sizes, "model": "some-model", "base_url": server.url}.items()}
        sets |= {f"data.{k}": v for k, v in tokens.items()} | {"verify": "false"}
        command = ["prune", str(folder), "--recipe", "self-pruner", "--dataset", str(text), "--output", str(output)]
        return CliRunner().invoke(app, [*command, *(word for k, v in sets.items() for word in ("--set", f"{k}={v}"))])

    return run


@pytest.mark.slow
def test_a_killed_run_asks_no_more_than_a_whole_one_and_neither_tells_the_key(
    pruned, server, breeder, tmp_path, killed_at
):
    server.script = lambda prompt, n: breeder(prompt, len(prompt)) if "plan" in prompt else "here"
    done = pruned(tmp_path / "whole")
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in (tmp_path / "whole" / "ledger.jsonl").read_text().splitlines()]
    told = [r for r in records if "prompt" in r]
    assert [r["prompt"] for r in told] == server.prompts[1:]  # the first was whether it is there
    assert all(r["kind"] == "note" and r["answer"]["reply"] for r in told)

    count = len(server.requests)
    with killed_at(Ledger, "answer", 10):
        pruned(tmp_path / "killed")
    again = pruned(tmp_path / "killed")
    assert again.exit_code == 0, again.output
    assert len(server.requests) == 2 * count
    for name in ("ledger.jsonl", "recipe.yaml", "model.safetensors", "config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name

    files = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert KEY.encode() not in files + (done.output + again.output).encode()
    assert b"OPENAI_API_KEY" in files


def test_what_is_missing_is_said_before_any_work(pruned, server, tmp_path, monkeypatch):
    server.script = lambda *_: (401, '{"error": {"message": "wrong key"}}')
    done = pruned(tmp_path / "out")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "HTTP 401 Unauthorized: wrong key" in done.stderr
    monkeypatch.delenv("OPENAI_API_KEY")
    done = pruned(tmp_path / "out")
    assert done.exit_code == 2
    assert "OPENAI_API_KEY, which is to hold the key for http://127.0.0.1" in done.stderr
    assert list(tmp_path.iterdir()) == []  # nothing in the way of a better command
