"""Threads of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from prunekit.calibration.shared import SharedFlow
from prunekit.plugins.dense import Dense
from prunekit.plugins.engine import Opening
from prunekit.plugins.registry import ENGINES
from prunekit.search.supernet import Supernet
from prunekit.testing import EngineSuite, toy_supernet, toy_tokens
from prunekit.testing.engines import filled

CPU = torch.device("cpu")


class TestLocal(EngineSuite):
    plugin = ENGINES.build("local")


class TestLocalMany(EngineSuite):
    plugin = ENGINES.build("local")
    devices = ("cpu",) * 7  # more than there are windows


def opened(count: int, net: Supernet) -> Any:
    dense = Dense(net.model, None, net.adapter, torch.float64, "toy", "")
    return ENGINES.build("local").team(dense, Opening(net.model), [CPU] * count)


def test_one_device_needs_nobody() -> None:
    with opened(1, toy_supernet()) as team:
        assert team is None


def test_the_first_worker_has_the_model_itself_and_the_others_copies() -> None:
    net = toy_supernet()
    with opened(3, net) as team:
        models = [worker.dense.model for worker in team.workers]
        assert models[0] is net.model
        pointers = {next(model.parameters()).data_ptr() for model in models}
        assert len(pointers) == 3


def test_its_devices_work_on_layers_too_and_bytes_are_those_of_the_first_alone(tmp_path: Path) -> None:
    with opened(3, toy_supernet()) as team:
        assert list(team.devices) == [CPU] * 3
        filled(tmp_path / "three", team)
        team.devices = ()
        filled(tmp_path / "first", team)
    three, first = (
        {file.name: file.read_bytes() for file in tmp_path.glob(f"{name}/*")} for name in ("three", "first")
    )
    assert three == first


def test_threads_end_with_the_run() -> None:
    with opened(2, toy_supernet()) as team:
        SharedFlow(team, toy_tokens(), CPU, dense=False)
    with pytest.raises(RuntimeError, match="shutdown"):
        team.ask("advance", [(0,), (0,)])
