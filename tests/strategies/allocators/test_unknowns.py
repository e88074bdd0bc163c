import random

import pytest

from prunekit.testing.spaces import small_llama
from prunekit_strategies.allocators.unknowns import Unknowns

SPACE = small_llama().zoomed((2, 384) * 8, stride=1 / 16, reach=16)
CENTRE = SPACE.uniform()


@pytest.mark.parametrize(("waves", "size"), [(None, 16), (0, 2), (3, 8)])
def test_zero_is_the_centre_and_all_else_is_feasible(waves: int | None, size: int) -> None:
    unknowns, rng = Unknowns(SPACE, CENTRE, 0.5, waves), random.Random(0)
    assert unknowns.size == size
    assert unknowns.decode([0.0] * size) == CENTRE
    assert all(SPACE.is_feasible(unknowns.decode([rng.uniform(-1, 1) for _ in range(size)])) for _ in range(50))


def test_wave_zero_trades_one_kind_for_the_other() -> None:
    more_attention = Unknowns(SPACE, CENTRE, 0.25, waves=0).decode([1.0, -1.0])
    assert all(a >= c for a, c in zip(more_attention[::2], CENTRE[::2], strict=True))
    assert all(m < c for m, c in zip(more_attention[1::2], CENTRE[1::2], strict=True))


def test_wave_one_tilts_over_the_depth() -> None:
    mlp = Unknowns(SPACE, CENTRE, 0.25, waves=1).decode([0, 0, 0, 1])[1::2]
    assert list(mlp) == sorted(mlp, reverse=True)
    assert mlp[0] > mlp[-1]
