import pytest

from prunekit import Budget, Space
from prunekit.testing import converse
from prunekit.testing.spaces import additive, problem, rough_table, sites_of, small_llama
from prunekit_strategies.allocators.two_stage import TwoStage

PAPER = TwoStage(compete=False)


def llama_2_7b(sparsity):
    sites = sites_of(32, attention=(32, 4 * 4096 * 128), mlp=(11_008, 3 * 4096))
    return Space.whole(sites, Budget.keeping(1 - sparsity, sites))


@pytest.mark.parametrize(("sparsity", "removed"), [(0.25, 5), (0.375, 9), (0.5, 13)])
def test_the_counts_of_the_paper(sparsity, removed):
    assert PAPER.count(llama_2_7b(sparsity)) == removed


def talk_of(space, seed=0, allocator=PAPER):
    return converse(allocator, toy := problem(space, rough_table(space, seed)), additive(toy.errors, space)), toy


@pytest.mark.parametrize("share", [0.3, 0.5, 0.77])
def test_attention_goes_whole_and_all_mlps_have_one_width_that_spends_the_budget(share):
    whole = small_llama(share)
    space = PAPER.first_space(whole)
    talk, _ = talk_of(space)
    removed = PAPER.count(whole)
    attention, mlp = talk.answer[::2], talk.answer[1::2]
    assert sorted(attention) == [0] * removed + [4] * (8 - removed)
    assert max(mlp) - min(mlp) <= 1
    assert 0 <= whole.budget.limit - whole.cost(talk.answer) < 768
    assert PAPER.last_space(whole, talk.answer).ladders == tuple((kept,) for kept in talk.answer)
    assert [len(ask) for ask in talk.asks] == [*range(8, 8 - removed, -1), 1]


def test_every_removal_is_the_best_on_narrow_mlps():
    space = PAPER.first_space(small_llama(0.4))
    talk, toy = talk_of(space)
    loss, before = additive(toy.errors, space), ()
    for ask in talk.asks[:-1]:
        assert {q.allocation[1::2] for q in ask} == {talk.answer[1::2]}
        best = min((q.allocation for q in ask), key=loss)
        gone = tuple(i for i, kept in enumerate(best) if kept == 0)
        assert set(gone) > set(before)
        before = gone
    assert before == tuple(i for i, kept in enumerate(talk.answer) if kept == 0)


def test_where_mlps_cannot_pay_more_attention_goes():
    whole = small_llama(0.3)  # MLPs are three quarters: to the last neuron they leave nothing of 0.3
    space = TwoStage(removed=0).first_space(small_llama(0.2))
    assert space.lowest([[0.0] * len(ladder) for ladder in space.ladders])
    assert all(len(ladder) == 1 for ladder in TwoStage(removed=0).first_space(whole).ladders[1::2])
    answer = talk_of(space, allocator=TwoStage(removed=0, compete=False))[0].answer
    assert answer[::2].count(0) == 2  # 0.2 of the whole: six of eight attention sub-layers are 0.1875


def test_where_fewer_do_fewer_go():
    whole = small_llama(0.95)  # a fifth of the attention sub-layers
    answer = talk_of(TwoStage(removed=8).first_space(whole), allocator=TwoStage(removed=8, compete=False))[0].answer
    assert answer[::2].count(0) == 2
    assert set(answer[1::2]) == {768}


def test_a_formula_has_its_limits():
    with pytest.raises(ValueError, match="alpha"):
        TwoStage(alpha=0)
    with pytest.raises(ValueError, match="tokens"):
        TwoStage(tokens=0)
