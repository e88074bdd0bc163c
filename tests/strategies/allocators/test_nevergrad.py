import pytest

from prunekit.testing import converse
from prunekit.testing.spaces import ZOO, additive

pytest.importorskip("nevergrad")
from prunekit_strategies.allocators.nevergrad import NevergradSearch


@pytest.mark.parametrize("optimizer", ["CMA", "NGOpt", "OnePlusOne", "TwoPointsDE"])
def test_any_optimizer_may_search(optimizer: str) -> None:
    toy = ZOO["uneven"]()
    loss = additive(toy.errors, toy.space)
    assert loss(converse(NevergradSearch(optimizer=optimizer, trials=20), toy).answer) < loss(toy.start)
