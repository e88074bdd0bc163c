"""A step that a GPU may replay: on the CPU a graph stands in that is as blind as a real one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import local
from time import sleep
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from prunekit.layer import replay
from prunekit.layer.replay import Replayed
from prunekit_strategies.pruners.obs import removal

CPU = torch.device("cpu")
_aten = torch.ops.aten
WAITS = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.equal.default, _aten.masked_select.default}


class Recorder(TorchDispatchMode):
    """Operations and the very tensors they were called with; one that waits for the device is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Any, Any]] = {}  # memory that was there, as it was
        self.made: set[int] = set()  # memory of what was made inside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        kwargs = kwargs or {}
        for value in _tensors((args, kwargs)):
            memory = value.untyped_storage()
            if memory._cdata not in self.made and memory._cdata not in self.before:
                self.before[memory._cdata] = memory, memory.clone()
        out = func(*args, **kwargs)
        for value in _tensors(out):
            memory = value.untyped_storage()._cdata
            if memory not in self.before:
                self.made.add(memory)
        self.calls.append((func, args, kwargs, out))
        return out


class Graph:
    """What a CUDA graph is: the same kernels on the same memory, and nothing of Python."""

    captured = 0

    def __init__(self, step: Callable[[], object], device: torch.device) -> None:
        recorder = Recorder()
        try:
            with recorder:
                step()
        finally:
            for memory, was in recorder.before.values():  # a capture computes nothing
                memory.copy_(was)
        self.calls, self.made = recorder.calls, recorder.made
        Graph.captured += 1

    def replay(self) -> None:
        for *_, out in self.calls:
            for value in _tensors(out):
                if value.untyped_storage()._cdata in self.made and value.is_floating_point():
                    value.fill_(torch.nan)  # who reads what an earlier replay has left reads this
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(out), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(value: Any) -> Iterator[Tensor]:
    yield from (each for each in tree_flatten(value)[0] if isinstance(each, Tensor))


@pytest.fixture
def graphs(monkeypatch) -> None:
    monkeypatch.setitem(replay.CAPTURES, "cpu", Graph)
    monkeypatch.setattr(Graph, "captured", 0)


def test_on_a_cpu_a_step_is_called():
    called: list[int] = []
    step = Replayed(lambda: called.append(1), CPU)
    step()
    step()
    assert called == [1, 1]


def test_the_second_call_is_captured_and_what_follows_is_replayed(graphs):
    called, total, change = list[int](), torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])

    def add() -> None:
        called.append(1)
        total.add_(change.square() * len(called))  # what Python computes stays as it was when it was captured

    step, seen = Replayed(add, CPU), []
    for _ in range(4):
        step()
        seen.append(total.tolist())
        change += 1  # what is in the tensors does not
    assert (Graph.captured, called) == (1, [1, 1])
    assert [row[0] for row in seen] == [1, 1 + 2 * 4, 9 + 2 * 9, 27 + 2 * 16]


@pytest.mark.parametrize("waits", [lambda x: float(x[0]), lambda x: bool((x > 0).any()), lambda x: x.nonzero()])
def test_a_step_that_cannot_be_captured_is_called_and_that_is_said(waits, graphs, monkeypatch):
    total = torch.zeros(3)

    def add() -> None:
        total.add_(1)
        waits(total)

    step, said = Replayed(add, CPU), list[str]()
    monkeypatch.setattr(replay, "warn_once", said.append)
    for count in (1, 2, 3):
        step()
        assert total.tolist() == [count] * 3  # the capture that failed has computed nothing
    assert len(said) == 1
    assert "launched kernel by kernel, which is slow: no graph of them (operation not permitted" in said[0]


@pytest.mark.parametrize("picks", [7, 60, 100])
def test_replayed_removals_are_the_same(picks, graphs, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(200, 100, generator=rng, dtype=torch.float64)
    weight = torch.randn(20, 100, generator=rng, dtype=torch.float64)
    hessian = x.T @ x / 200
    monkeypatch.setattr(removal, "_PENDING", 4)
    found = removal.remove_columns(hessian, weight, picks)
    monkeypatch.delitem(replay.CAPTURES, "cpu")
    assert (Graph.captured > 0) == (picks > 8)
    assert found == removal.remove_columns(hessian, weight, picks)
    assert len({*found}) == picks


class Capturing:
    """What `torch.cuda.graph` is asked, and how many at once."""

    def __init__(self) -> None:
        self.device, self.at_once, self.most = local(), 0, list[int]()
        self.asked = list[tuple[Any, Any, Any]]()

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        self.device.index = device.index
        yield

    @contextmanager
    def graph(self, graph: Any, *, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.at_once += 1
        self.most.append(self.at_once)
        sleep(0.001)  # others have their turn
        yield
        self.asked.append((self.device.index, stream, capture_error_mode))
        self.at_once -= 1


def test_threads_capture_one_at_a_time_each_on_a_stream_of_its_own_device(monkeypatch):
    capturing = Capturing()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "device", capturing.on)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: device.index)
    monkeypatch.setattr(torch.cuda, "graph", capturing.graph)
    devices = [torch.device("cuda", index % 4) for index in range(12)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda device: replay.cuda_graph(lambda: None, device), devices))
    assert capturing.most == [1] * 12
    assert sorted(capturing.asked) == sorted((each.index, each.index, "thread_local") for each in devices)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n", [700, 2048])
def test_removals_are_captured_on_cuda_and_are_those_that_are_launched_one_by_one(n, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2 * n, n, generator=rng, dtype=torch.float64).cuda()
    weight = torch.randn(64, n, generator=rng, dtype=torch.float64).cuda()
    hessian, captured, said = x.T @ x / len(x), list[int](), list[str]()
    monkeypatch.setattr(replay, "warn_once", said.append)
    monkeypatch.setitem(replay.CAPTURES, "cuda", lambda *of: captured.append(1) or replay.cuda_graph(*of))
    replayed = removal.remove_columns(hessian, weight, n)
    monkeypatch.delitem(replay.CAPTURES, "cuda")
    assert replayed == removal.remove_columns(hessian, weight, n)
    assert captured
    assert not said


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_removals_on_two_cuda_devices_at_once_are_those_of_one_after_the_other():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1400, 700, generator=rng, dtype=torch.float64)
    weight, places = torch.randn(64, 700, generator=rng, dtype=torch.float64), [torch.device("cuda", i) for i in (0, 1)]

    def removed(device: torch.device) -> list[int]:
        return removal.remove_columns((x.T @ x / len(x)).to(device), weight.to(device), 700)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(removed, places)) == [removed(device) for device in places]
