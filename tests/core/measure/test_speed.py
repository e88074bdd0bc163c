"""Speed, on a machine that is made up: a pass takes some time for calls, and some for every token."""

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from prunekit.measure import speed as module
from prunekit.measure.ratios import Spread
from prunekit.measure.speed import BATCH, PROMPT, READ, Speed, compared, speeds, workload
from prunekit.space.prices import Workload
from prunekit.testing import tiny

CALLS = 4_000_000  # ns a pass


class Made(nn.Linear):
    """A model that takes so many nanoseconds per token beside its calls."""

    def __init__(self, per_token: int, **config: Any) -> None:
        super().__init__(1, 1)
        self.per_token, self.config = per_token, SimpleNamespace(vocab_size=7, **config)


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What every time is multiplied with, one after the other, before those there are run out; 1 then."""
    noise: list[float] = []

    def timed(model: Made, work: Workload) -> tuple[int, int]:
        factor = noise.pop() if noise else 1.0
        read = CALLS + model.per_token * work.batch * work.prompt
        return round(factor * read), round(factor * work.new_tokens * (CALLS + model.per_token * work.batch))

    monkeypatch.setattr(module, "timed", timed)
    return noise


@pytest.mark.usefixtures("noise")
def test_a_small_model_has_a_batch_that_outweighs_the_calls() -> None:
    assert workload(Made(500_000)) == Workload(32, READ // 32, 12)  # a step takes 20 ms, a turn 250
    assert workload(Made(1)) == Workload(BATCH, READ // BATCH, 32)  # nothing does
    assert workload(Made(10**8)) == Workload(1, PROMPT, 4)  # one sequence does; no fewer than 4 steps
    assert workload(Made(10**8, max_position_embeddings=64)) == Workload(1, 48, 4)
    assert workload(Made(1, max_position_embeddings=2)) == Workload(BATCH, 1, 1)


@pytest.mark.usefixtures("noise")
def test_rates_are_tokens_by_time() -> None:
    (found,) = speeds({"x": Made(10**6)}, work=Workload(2, 50, 4), rounds=3, fewest=1).values()
    assert found.prefill == pytest.approx([100 / 0.104] * 3)
    assert found.decode == pytest.approx([8 / (4 * 0.006)] * 3)
    told = found.as_dict()
    assert told["decode_tokens_per_second"] == pytest.approx(2 / 0.006)
    assert told["decode_tokens_per_second_middle_half"] == pytest.approx([2 / 0.006] * 2)
    assert told["workload"] == {"batch": 2, "prompt": 50, "new_tokens": 4}
    assert told["rounds"] == 3


def test_half_of_a_model_is_not_called_slower_for_noise(noise: list[float]) -> None:
    """A machine on which every third turn takes 2 to 6 times as long, in a hundred runs."""
    rng, said = random.Random(0), set[str]()
    work = Workload(8, 16, 8)
    for _ in range(100):
        noise[:] = [rng.choice([1.0, 1.0, rng.uniform(2, 6)]) for _ in range(60)]
        found = speeds({"dense": Made(1_000_000), "pruned": Made(500_000)}, work=work)
        said |= {row[-1] for row in compared(found["dense"], found["pruned"])}
    assert "no difference beyond noise" in said
    assert all(float(cell.split()[0]) > 1 for cell in said - {"no difference beyond noise"})
    assert len(said) > 1


def test_rows_name_rates_with_their_spread() -> None:
    work = Workload(1, 8, 4)
    dense = Speed((1000.0,) * 6, (10.0,) * 6, work, "cpu", 1, True)
    pruned = Speed((1500.0,) * 6, (9.0, 11.0) * 3, work, "cpu", 1, True)
    assert compared(dense, pruned) == [
        ("prefill tokens/s", "1,000 ±0.0%", "1,500 ±0.0%", "1.50 (1.50-1.50)"),
        ("decode tokens/s", "10.0 ±0.0%", "10.0 ±10.0%", "no difference beyond noise"),
    ]
    assert str(dense).startswith("1 × 8 tokens read, 4 made on 1 CPU thread, its own time; medians of 6 rounds")
    assert "2 CPU threads;" in str(Speed((1.0,), (1.0,), work, "cpu", 2, False))
    assert "on cuda:0;" in str(Speed((1.0,), (1.0,), work, "cuda:0", 2, False))


def test_a_real_model_reads_and_decodes() -> None:
    model = tiny("llama").train()
    found = speeds({0: model}, work=Workload(2, 8, 3), rounds=2, fewest=1)[0]
    assert all(0 < rate < math.inf for rate in found.prefill + found.decode)
    assert Spread.of(found.decode).low <= Spread.of(found.decode).high
    assert model.training  # as it was
