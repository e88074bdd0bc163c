"""What tests of recipes start from."""

import pytest

from prunekit.recipe.schema import Recipe
from prunekit.space.prices import Prices
from prunekit.testing.spaces import sites_of, timed


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.load()


@pytest.fixture
def table() -> Prices:
    return timed(sites_of(2, attention=(4, 10), mlp=(16, 3)))
