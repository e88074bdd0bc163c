"""Layer problems on several devices at once: what overlaps, in which order it ends, and that bytes are those of one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Barrier, Event, Lock, get_ident
from time import sleep
from typing import Any

import pytest
import torch

from prunekit import LayerProblem, LocalPruner, PluginError, Signal
from prunekit.calibration import fill
from prunekit.calibration.fill import Carry, build
from prunekit.calibration.gradients import OutputFisher
from prunekit.calibration.pool import Pool
from prunekit.models.adapters.find import adapter_for
from prunekit.plugins.pruner import Within
from prunekit.plugins.registry import PRUNERS
from prunekit.search.store import CandidateStore
from prunekit.space.budgets import Budget
from prunekit.space.forms import parse_form
from prunekit.space.ladders import Space
from prunekit.system.progress import Progress
from prunekit.testing import tiny, toy_tokens
from prunekit.testing.devices import pretended_devices
from prunekit.testing.supernets import KeepSpectrum

CPU = torch.device("cpu")
SOON = 60.0  # seconds until what does not come is given up


def met(event: Event) -> None:
    assert event.wait(SOON), "nobody was at work meanwhile"


# -- the pool ------------------------------------------------------------------------------------------


def test_as_many_tasks_as_devices_are_at_work_and_no_device_has_two():
    places = [torch.device("cpu", i) for i in range(3)]
    together, lock, at_work, most = Barrier(3), Lock(), list[torch.device](), list[int]()

    def work(number: int, device: Any) -> Any:
        with lock:
            assert device not in at_work
            at_work.append(device)
            most.append(len(at_work))
        if number < 3:
            together.wait(SOON)  # all three at once, or never
        with lock:
            at_work.remove(device)
        return number, lambda: number

    with Pool(places) as pool:
        tasks = [pool.begin(partial(work, number)) for number in range(12)]
        assert [task.rest.result() for task in tasks] == list(range(12))
    assert max(most) == 3


def test_who_begins_goes_on_with_one_half_while_the_other_is_at_work():
    gone_on = Event()

    def rest() -> str:
        met(gone_on)
        return "rest"

    with Pool([CPU]) as pool:
        task = pool.begin(lambda _: ("made", rest))
        assert task.made.result(SOON) == "made"
        gone_on.set()
        assert task.rest.result(SOON) == "rest"


def test_ends_come_in_the_order_of_their_calls():
    ended, second = list[int](), Event()

    def work(number: int, _: Any) -> Any:
        (met(second) if number == 0 else second.set())  # the first is there after the second
        return number, lambda: number

    with Pool([CPU] * 2) as pool:
        for number in range(2):
            task = pool.begin(partial(work, number))
            pool.end(lambda task=task: ended.append(task.rest.result()))
    assert ended == [0, 1]


def test_what_waits_for_its_end_is_bounded():
    begun, may_end, over = list[int](), Event(), list[int]()

    def close(number: int) -> None:
        met(may_end)
        over.append(number)

    def work(number: int, _: Any) -> Any:
        begun.append(number)
        if len(begun) == 4:  # of two devices: nothing more is begun before an end is over
            may_end.set()
        assert number - len(over) <= 4
        return number, lambda: number

    with Pool([CPU] * 2) as pool:
        for number in range(9):
            task = pool.begin(partial(work, number))
            pool.end(partial(close, number))
            assert task.made.result() == number
    assert over == list(range(9))


@pytest.mark.parametrize("half", ["made", "rest"])
def test_the_first_error_in_order_is_raised_and_nothing_ends_behind_it(half):
    later, ended = Event(), list[int]()

    def work(number: int, _: Any) -> Any:
        def fails() -> None:
            if number == 2:
                later.set()  # it fails before the first one does
            elif number == 1:
                met(later)
            if number:
                raise ValueError(f"task {number}")

        if half == "made":
            fails()
        return number, fails

    def close(number: int, task: Any) -> None:
        task.rest.result()
        ended.append(number)

    def pass_on() -> None:
        with Pool([CPU] * 3) as pool:
            for number in range(3):
                pool.end(partial(close, number, pool.begin(partial(work, number))))

    with pytest.raises(ValueError, match="task 1"):
        pass_on()
    assert ended == [0]


def test_an_error_of_the_caller_waits_for_those_that_come_before_it():
    raised, ended = Event(), list[int]()

    def work(_: Any) -> Any:
        met(raised)
        return 0, lambda: None

    def pass_on() -> None:
        with Pool([CPU]) as pool:
            task = pool.begin(work)
            pool.end(lambda: ended.append(task.made.result()))
            raised.set()
            raise ValueError("of the caller")

    with pytest.raises(ValueError, match="of the caller"):
        pass_on()
    assert ended == [0]


def test_who_interrupts_waits_for_no_more_than_is_at_work():
    pool, begun, ended, tasks = Pool([CPU]), Event(), list[int](), list[Any]()

    def work(_: Any) -> Any:
        begun.set()
        while not pool._over:  # the other half is not begun then
            sleep(0.001)
        return 0, lambda: ended.append(1)

    def interrupted() -> None:
        with pool:
            tasks.append(pool.begin(work))
            pool.end(lambda: ended.append(tasks[0].rest.result()))
            met(begun)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert tasks[0].made.result() == 0
    assert isinstance(tasks[0].rest.exception(), CancelledError)
    assert not ended


def test_without_devices_the_caller_does_it_all_one_after_the_other():
    done = list[tuple[str, int]]()

    def work(device: torch.device | None) -> Any:
        assert device is None
        done.append(("made", get_ident()))
        return 1, lambda: done.append(("rest", get_ident()))

    with Pool() as pool:
        pool.begin(work)
        pool.end(lambda: done.append(("end", get_ident())))
        assert done == [(each, get_ident()) for each in ("made", "rest", "end")]
        with pytest.raises(ZeroDivisionError):
            pool.begin(lambda _: 1 / 0)  # type: ignore[arg-type, return-value]


def test_what_torch_keeps_by_thread_is_as_it_is_with_the_caller():
    def work(_: Any) -> Any:
        return (torch.is_grad_enabled(), torch.get_num_threads()), lambda: None

    for grad in (True, False):
        with torch.set_grad_enabled(grad), Pool([CPU]) as pool:
            assert pool.begin(work).made.result() == (grad, torch.get_num_threads())


# -- a calibration pass --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refit(LocalPruner):
    """Least squares on the first groups, as the dense stream aims; `meet` is called with the name of every layer."""

    within: Within = "map"
    structures = frozenset({"groups", "weights"})
    meet: Callable[[str], object] = field(default=lambda name: None, compare=False, repr=False)

    @property
    def needs(self):
        return frozenset({"gram", "cross", "drift"})

    def prune(self, layer, keeps):
        self.meet(layer.name)
        if layer.structure == "groups":
            return [layer.refitted(range(keep)) for keep in keeps]
        columns = torch.arange(layer.d_in) < torch.tensor(keeps)[:, None]
        return [layer.refitted_rows(row.expand_as(layer.weight)) for row in columns]


@dataclass(frozen=True)
class Told(Signal):
    """Calls `meet` with the name of every layer, and measures its power."""

    meet: Callable[[str], object] = field(default=lambda name: None, compare=False, repr=False)

    def measure(self, layer: LayerProblem) -> float:
        self.meet(layer.name)
        return layer.power


class Case:
    """A tiny model, and a ladder of a few rungs for every site."""

    def __init__(self, family: str = "llama", structure: str = "groups", **options: Any) -> None:
        wide = {"moe_intermediate_size": 24, "intermediate_size": 24} if "experts" in options else {}
        self.model, self.adapter = tiny(family, num_hidden_layers=2, **wide).requires_grad_(False), adapter_for(family)
        sites = self.adapter.sites_of(self.model, parse_form(structure), **options)
        whole = Space.whole(sites, Budget.keeping(0.5, sites))
        self.space = whole.zoomed(whole.uniform(), stride=0.5, reach=1)
        self.sites = sites

    def build(
        self, folder: Path, devices: Sequence[torch.device] = (), pruner: LocalPruner | None = None, **options: Any
    ) -> dict[str, bytes]:
        """The files of the store, by name."""
        options = {"carry": "expected", "dtype": torch.float64, "progress": Progress()} | options
        if options.pop("nats", False):
            options["fisher"] = OutputFisher.collected(
                self.model, self.adapter, self.sites, toy_tokens(), 0, folder.parent / "fisher", Progress()
            )
        centre = self.space.nearest(self.space.uniform())
        store = CandidateStore(folder, {})
        build(
            self.model, self.adapter, self.space, centre, pruner or Refit(), toy_tokens(), store,
            devices=devices, **options,
        )  # fmt: skip
        return files(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


OBS = PRUNERS.build("obs")
CASES: dict[str, tuple[Callable[[], Case], dict[str, Any]]] = {
    "what is carried": (Case, {"carry": "expected", "nats": True, "signals": (Told(),)}),
    "priced at once": (Case, {"pruner": OBS, "carry": "centre", "nats": True, "sparse": True}),
    "priced one by one": (Case, {"carry": "centre", "sparse": True}),
    "nothing is carried": (Case, {"carry": "dense"}),
    "behind the block": (Case, {"pruner": Refit(within="block")}),
    "single weights": (partial(Case, structure="weights"), {}),
    "low rank": (partial(Case, structure="low-rank"), {"pruner": KeepSpectrum(), "dtype": torch.bfloat16}),
    "neurons of experts": (partial(Case, "mixtral", experts="neurons"), {"pruner": OBS, "nats": True}),
    "groups that are not side by side": (partial(Case, "gpt_neox"), {"carry": "centre"}),
}


@pytest.mark.parametrize("name", CASES)
def test_candidates_of_several_devices_are_those_of_one_to_the_bit(name, tmp_path):
    made, options = CASES[name]
    case = made()
    assert case.build(tmp_path / "three", [CPU] * 3, **options) == case.build(tmp_path / "one", **options)


def test_a_layer_problem_takes_everything_to_its_device(tmp_path):
    case, signal = Case(), PRUNERS.build("obs")
    alone = case.build(tmp_path / "alone", pruner=signal, nats=True)
    with pretended_devices():
        places = [torch.device("cpu", 0), torch.device("cpu", 1)]
        assert case.build(tmp_path / "apart", places, pruner=signal, nats=True) == alone


ALL = [f"{block}.{map_}" for block in range(2) for map_ in ("self_attn.o_proj", "mlp.down_proj")]
EXPERTS = [f"1.mlp.experts.down_proj of expert {expert}" for expert in (2, 3)]


@pytest.mark.parametrize(
    ("made", "carry", "places", "together"),
    [
        (Case, "dense", 4, ALL),
        (partial(Case, structure="weights"), "expected", 3, [f"1.self_attn.{name}_proj" for name in "qkv"]),
        (partial(Case, structure="weights"), "centre", 2, ["0.mlp.gate_proj", "0.mlp.up_proj"]),
        (partial(Case, "mixtral", experts="neurons"), "expected", 2, EXPERTS),
    ],
    ids=["nothing is carried", "query, key and value", "gate and up", "experts"],
)
def test_layers_that_do_not_wait_for_each_other_are_pruned_at_once(made, carry: Carry, places, together, tmp_path):
    barrier, met_by = Barrier(len(together)), list[str]()

    def meet(name: str) -> None:
        if (short := name.removeprefix("model.layers.")) in together:
            barrier.wait(SOON)  # all of them are at work, or it breaks
            met_by.append(short)

    made().build(tmp_path / "store", [CPU] * places, Refit(meet=meet), carry=carry)
    assert sorted(met_by) == sorted(together)


def test_within_a_dense_block_layers_are_pruned_at_once_and_the_next_block_waits(tmp_path):
    barrier, at_work, case = Barrier(2), list[str](), Case()

    def meet(name: str) -> None:
        at_work.append(name)
        barrier.wait(SOON)

    case.build(tmp_path / "store", [CPU] * 4, Refit(within="block", meet=meet))
    assert sorted(at_work[:2]) == sorted(site.name for site in case.sites[:2])


def test_what_is_carried_is_waited_for_and_its_prices_are_not(tmp_path):
    case, second = Case(), Event()
    first, following = (site.name for site in case.sites[:2])
    order = list[str]()

    def meet(name: str) -> None:
        order.append(f"pruned {name}")
        if name == following:
            second.set()

    def measured(name: str) -> None:
        if name == first:
            met(second)  # the next site has received its tokens, and its pruner is at work
        order.append(f"measured {name}")

    options: Any = {"signals": (Told(meet=measured),)}
    found = case.build(tmp_path / "two", [CPU] * 2, Refit(meet=meet), **options)
    assert order[:2] == [f"pruned {first}", f"pruned {following}"]
    assert found == case.build(tmp_path / "one", signals=(Told(),))


@pytest.mark.parametrize("carry", ["dense", "expected"])
def test_no_more_problems_are_in_memory_than_devices_and_the_next(carry: Carry, tmp_path, monkeypatch):
    there, most, states, third = weakref.WeakSet[LayerProblem](), list[int](), fill.layer_problem, Event()

    def stated(*args: Any, **kwargs: Any) -> LayerProblem:
        problem = states(*args, **kwargs)
        there.add(problem)
        most.append(len(there))
        if len(most) == 3:
            third.set()
        return problem

    monkeypatch.setattr(fill, "layer_problem", stated)
    pruner = Refit(meet=lambda _: met(third))  # both devices are at work when it is stated
    Case(structure="weights").build(tmp_path / "store", [CPU] * 2, pruner, carry=carry)
    assert len(most) == 14
    assert max(most) == 3


def test_an_error_is_that_of_one_device_and_leaves_what_that_leaves(tmp_path):
    def meet(name: str) -> None:
        if name == "model.layers.1.self_attn.o_proj":
            raise PluginError(f"not {name}")

    for carry in ("dense", "expected"):
        left = list[dict[str, bytes]]()
        for places in (0, 3):
            folder = tmp_path / carry / str(places)
            folder.parent.mkdir(exist_ok=True)
            with pytest.raises(PluginError, match=r"not model.layers.1.self_attn"):
                Case().build(folder, [CPU] * places, Refit(meet=meet), carry=carry)
            left.append(files(folder))
        assert left[0].keys() == {"manifest.json", *(f"{site.name}.safetensors" for site in Case().sites[:2])}
        assert left[0] == left[1]


@pytest.mark.parametrize(("place", "call", "carry"), [("prune", 3, "dense"), ("put", 2, "expected")])
def test_a_pass_that_was_killed_ends_in_the_same_bytes(place, call, carry: Carry, tmp_path, killed_at):
    case = Case()
    with killed_at(Refit if place == "prune" else CandidateStore, place, call):
        case.build(tmp_path / "killed", [CPU] * 2, carry=carry)
    assert case.build(tmp_path / "killed", [CPU] * 2, carry=carry) == case.build(tmp_path / "whole", carry=carry)
