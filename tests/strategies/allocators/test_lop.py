"""LOP: the tree goes where (1) says, the network sees nothing behind it, and what it answers spends every budget."""

import json
import math
import random

import pytest
import torch

from prunekit import Allocator, Searched, WrongInput
from prunekit.testing import best_allocation, converse
from prunekit.testing.spaces import additive, convex_table, problem, small_llama
from prunekit_strategies import budget_network
from prunekit_strategies.allocators.lop import LOP, Node, Range, bound, leaf
from prunekit_strategies.allocators.uniform import Uniform
from prunekit_strategies.budget_network import Predictor, load, taught

SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
UNSEEN = (0.35, 0.45, 0.55, 0.65, 0.75)
QUICK = {"pairs": 1, "width": 32, "epochs": 300, "rate": 3e-3}


def tree(*children):
    """A root with children of (visits, mean loss)."""
    root = Node([0.5], (1,), visits=sum(n for n, _ in children))
    for n, mean in children:
        root.children.append(Node([0.5], (1,), 1, root, visits=n, total=n * mean))
    return root


def test_the_child_of_largest_bound_is_taken_and_the_unvisited_first():
    seen, root = Range(1.0, 3.0), tree((4, 2.0), (2, 2.5), (3, 1.5))
    by_hand = [(3 - mean) / 2 + 1.414 * math.sqrt(math.log(9) / n) for n, mean in ((4, 2.0), (2, 2.5), (3, 1.5))]
    assert [bound(child, seen, 1.414) for child in root.children] == pytest.approx(by_hand)
    assert leaf(root, seen, 1.414) is root.children[by_hand.index(max(by_hand))]
    assert leaf(root, seen, 0.0) is root.children[2]
    fresh = tree((4, 0.0), (0, 0.0))
    assert leaf(fresh, seen, 1.414) is fresh.children[1]


def test_a_loss_counts_in_all_above_and_a_failure_as_the_worst():
    space = LOP().first_space(small_llama())
    root = Node.at(space, [0.5] * 16)
    root.grow(space, random.Random(0), 4, 0.1, 0.1)
    root.children[1].record(2.0)
    root.children[1].record(4.0)
    assert (root.visits, root.total, root.children[1].visits, root.children[0].visits) == (2, 6.0, 2, 0)
    seen = Range()
    assert [seen.bounded(x) for x in (math.inf, 2.0, 5.0, math.inf)] == [0.0, 2.0, 5.0, 5.0]


def test_every_node_spends_the_budget_and_moves_less_the_deeper_it_is():
    space, node = LOP().first_space(small_llama()), None
    node = Node.at(space, [0.5] * 16)
    for depth in range(5):
        node.grow(space, random.Random(depth), 4, 0.1, 0.1)
        child = node.children[0]
        assert space.is_feasible(child.allocation)
        assert space.nearest([float(k) for k in child.allocation]) == child.allocation
        most = max(abs(a - b) for a, b in zip(child.shares, node.shares, strict=True))
        assert most <= 0.1 * 0.9**depth
        node = child


def test_the_search_asks_at_most_once_a_simulation_and_gains():
    toy = problem(LOP().first_space(small_llama()))
    loss = additive(toy.errors, toy.space)
    talk = converse(LOP(simulations=200), toy)
    optimum = best_allocation(toy.space, toy.errors)[1]
    assert len(talk.asks) <= 201
    assert loss(talk.answer) - optimum < 0.8 * (loss(toy.start) - optimum)


def test_a_tree_of_few_sites_comes_to_the_optimum():
    from prunekit.testing.spaces import ZOO

    toy = ZOO["one site"]()
    assert converse(LOP(simulations=5), toy).answer == best_allocation(toy.space, toy.errors)[0]
    toy = ZOO["even"]()
    loss = additive(toy.errors, toy.space)
    answer = converse(LOP(simulations=400, step=0.6, least=0.0), toy).answer
    assert loss(answer) == pytest.approx(best_allocation(toy.space, toy.errors)[1])


def test_a_share_depends_on_no_later_one():
    torch.manual_seed(0)
    net, budgets, shares = Predictor(6, 16, 2, 2).eval(), torch.tensor([0.5]), torch.rand(1, 6)
    before = net(budgets, shares)
    for i in range(6):
        other = shares.clone()
        other[0, i] = 0.0
        after = net(budgets, other)
        assert torch.equal(after[0, : i + 1], before[0, : i + 1])
        assert i == 5 or not torch.equal(after[0, i + 1 :], before[0, i + 1 :])
    assert not torch.equal(net(torch.tensor([0.6]), shares), before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What was learnt from the exact optima of seven budgets."""
    searches = []
    for share in SHARES:
        whole = small_llama(share)
        space = LOP().first_space(whole)
        best, loss = best_allocation(space, convex_table(space))
        searches.append(Searched(whole, ((best, loss),)))
    path = tmp_path_factory.mktemp("learnt")
    state = torch.get_rng_state()
    LOP(**QUICK).learn(searches, path)
    assert torch.equal(torch.get_rng_state(), state)
    return path


@pytest.mark.parametrize("share", UNSEEN)
def test_budgets_it_never_saw_are_answered_nearly_as_by_a_search_and_spent(folder, share):
    whole = small_llama(share)
    lop = LOP(model=str(folder))
    space = lop.first_space(whole)
    toy = problem(space)
    talk = converse(lop, toy)
    assert talk.asks == ()
    assert 0 <= whole.budget.limit - whole.cost(talk.answer) < 768
    assert lop.last_space(whole, talk.answer).ladders == tuple((kept,) for kept in talk.answer)

    def loss(allocation):  # between the rungs of the table too
        every = convex_table(whole)
        return sum(row[kept] for row, kept in zip(every, allocation, strict=True))

    coarse = LOP().first_space(whole)
    searched = loss(best_allocation(coarse, convex_table(coarse))[0])
    assert loss(talk.answer) < searched + 0.1 * (loss(whole.uniform()) - searched)


def test_the_same_pairs_teach_the_same_network(folder, tmp_path):
    shares = [[0.2, 0.4], [0.3, 0.5], [0.4, 0.6]]
    one, two = (taught([0.3, 0.4, 0.5], shares, steps=5, batch=2, rate=1e-3, seed=1, width=16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    net, facts = load(folder / "learnt.json")
    assert facts["groups"] == [4, 768] * 8
    assert net.answer(0.5) == load(folder)[0].answer(0.5)


def test_another_model_another_metric_and_damaged_files_are_refused(folder, tmp_path):
    lop = LOP(model=str(folder))
    whole = small_llama()
    with pytest.raises(WrongInput, match="other sites"):
        lop.first_space(type(whole).whole(whole.sites[:4], type(whole.budget).keeping(0.5, whole.sites[:4])))
    with pytest.raises(WrongInput, match="learn-budgets"):
        LOP(model=str(tmp_path / "nowhere")).ready()
    facts = json.loads((folder / "learnt.json").read_text())
    (tmp_path / "learnt.json").write_text(json.dumps(facts | {"version": 99}))
    with pytest.raises(WrongInput, match="version 99"):
        LOP(model=str(tmp_path)).ready()
    (tmp_path / "learnt.json").write_text(json.dumps(facts))
    (tmp_path / "learnt.safetensors").write_bytes(b"no tensors")
    with pytest.raises(WrongInput, match="learn-budgets"):
        LOP(model=str(tmp_path)).ready()


def test_the_pairs_are_of_a_table_fitted_to_all_that_was_judged_or_what_each_search_judged_best(tmp_path, monkeypatch):
    searches, taught_by = [], dict[int, list[float]]()
    for share in (0.3, 0.5, 0.7):
        toy = problem(LOP().first_space(small_llama(share)), tokens=0)
        loss, rng = additive(toy.errors, toy.space), random.Random(0)
        drawn = {Node.at(toy.space, [rng.random() for _ in toy.start]).allocation: None for _ in range(16)}
        judged = sorted(((a, loss(a)) for a in drawn), key=lambda pair: pair[1])
        searches.append(Searched(small_llama(share), tuple(judged), (), toy))
    optimum = best_allocation(toy.space, toy.errors)[1]

    def seen(budgets, shares, **_):
        counts = tuple(round(r * site.n_groups) for r, site in zip(shares[-1], toy.space.sites, strict=True))
        taught_by[len(budgets)] = [budgets[-1], loss(toy.space.nearest(counts)) / optimum]
        return Predictor(16, 16, 1, 2)

    monkeypatch.setattr(budget_network, "taught", seen)
    for allocator in (LOP(grid=5), LOP(grid=0), LOP(grid=0, pairs=2)):
        allocator.learn(searches, tmp_path)
        assert json.loads((tmp_path / "learnt.json").read_text())["pairs"] in taught_by
    assert list(taught_by) == [5, 3, 6]
    assert {budget for budget, _ in taught_by.values()} == {budget_network.share_of(searches[-1].whole)}
    assert taught_by[5][1] < 1.05
    assert taught_by[3][1] == pytest.approx(judged[0][1] / optimum)
    assert taught_by[3][1] > 1.5


def test_two_budgets_are_too_few_and_others_do_not_learn(tmp_path):
    some = [Searched(small_llama(share), ((small_llama(share).uniform(), 1.0),)) for share in (0.3, 0.5)]
    with pytest.raises(WrongInput, match="too few"):
        LOP().learn(some, tmp_path)
    other: Allocator = Uniform()
    with pytest.raises(WrongInput, match="Uniform does not learn"):
        other.learn(some, tmp_path)


def test_another_search_may_make_the_pairs():
    toy = problem(LOP(inner=Uniform()).first_space(small_llama()))
    assert converse(LOP(inner=Uniform()), toy).answer == toy.start
