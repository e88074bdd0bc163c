"""The table objective is the sum of the table."""

from prunekit.testing import toy_supernet, toy_tokens
from prunekit_objectives.expected_error import ExpectedError


def test_the_loss_is_the_sum_of_the_chosen_errors():
    net = toy_supernet()
    plan = net.space.uniform()
    by_hand = sum(row[ladder.index(k)] for row, ladder, k in zip(net.errors, net.space.ladders, plan, strict=True))
    assert ExpectedError().loss(net, plan, toy_tokens()) == by_hand
    assert not ExpectedError().reads(3).tokens
