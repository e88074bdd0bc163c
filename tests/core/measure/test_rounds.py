"""Rounds, with clocks that are made up."""

import pytest
import torch

from prunekit.measure import rounds
from prunekit.measure.rounds import elapsed, interleaved, one_thread, own_time
from prunekit.system.progress import Progress

CPU = torch.device("cpu")


def test_every_round_has_every_turn_in_an_order_of_its_own() -> None:
    seen: list[str] = []
    turns = {key: lambda key=key: seen.append(key) or len(seen) for key in "ab"}
    found = interleaved(turns, Progress(), "x", rounds=12, fewest=1, seconds=60, more_of_first=1)
    each = [tuple(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert len(each) == 12
    assert all(sorted(order) == ["a", "a", "b"] for order in each)
    assert len(set(each)) > 1
    assert found == {key: [i + 1 for i, other in enumerate(seen) if other == key] for key in "ab"}


@pytest.mark.parametrize(("fewest", "seconds", "expected"), [(2, 2.0, 4), (6, 0.5, 6), (2, 99.0, 9)])
def test_no_further_round_begins_when_time_is_up(
    fewest: int, seconds: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(100))  # a second later whenever it is asked
    monkeypatch.setattr(rounds.time, "monotonic", lambda: float(next(now)))
    found = interleaved({"a": lambda: 1}, Progress(), "x", rounds=9, fewest=fewest, seconds=seconds)
    assert len(found["a"]) == expected


def test_one_thread_has_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, step in (("thread_time_ns", 7), ("perf_counter_ns", 1000)):
        clock = iter(range(0, 10 * step, step))
        monkeypatch.setattr(rounds.time, name, lambda clock=clock: next(clock))
    threads, ran = torch.get_num_threads(), list[int]()
    torch.set_num_threads(2)
    try:
        assert elapsed(lambda: ran.append(torch.get_num_threads()), CPU) == 1000
        with one_thread():
            assert own_time(CPU)
            assert elapsed(lambda: ran.append(torch.get_num_threads()), CPU) == 7
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert ran == [2, 1]
    assert not own_time(torch.device("cuda"))
