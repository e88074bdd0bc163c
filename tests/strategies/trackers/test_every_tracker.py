"""Every registered tracker keeps what all trackers promise, and what is read back from its store is what was told."""

import importlib
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from prunekit import Track, WrongInput
from prunekit.testing import TrackerSuite
from prunekit.testing.trackers import SETTINGS, Kept, points


def found(name: str) -> Any:
    """The module of a tracker, where what it needs is installed."""
    pytest.importorskip(name)
    return importlib.import_module(f"prunekit_strategies.trackers.{name}")


class TestTensorBoard(TrackerSuite):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def built(cls) -> None:
        cls.plugin = found("tensorboard").TensorBoard()

    def kept(self, track: Track) -> Kept:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        place = track.place  # type: ignore[attr-defined]
        events = EventAccumulator(str(place), size_guidance={"scalars": 0})
        events.Reload()
        return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    def test_a_folder_that_cannot_be_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(WrongInput, match=r"file is no folder that can be written to; name another with --set"):
            found("tensorboard").TensorBoard("file/runs").check()

    def test_the_recipe_is_there_as_text(self) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        track = self.plugin.open("half", None)
        track.describe(SETTINGS)
        track.close(done=True)
        events = EventAccumulator("runs/half")
        events.Reload()
        assert "recipe/text_summary" in events.Tags()["tensors"]


@pytest.mark.slow
class TestMLflow(TrackerSuite):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def built(cls) -> None:
        pytest.importorskip("alembic")
        cls.plugin = found("mlflow").MLflow()

    def kept(self, track: Any) -> Kept:
        names = track.client.get_run(track.run).data.metrics
        histories = {name: track.client.get_metric_history(track.run, name) for name in names}
        largest = sys.float_info.max  # as which its database keeps what is infinite
        return {  # it tells them by time, and the clock of these points begins again
            name: [
                (m.step, math.inf if m.value >= largest else m.value)
                for m in sorted(found, key=lambda m: (m.step, m.timestamp))
            ]
            for name, found in histories.items()
        }

    def test_the_recipe_is_its_parameters_and_a_part_is_a_child(self) -> None:
        track: Any = self.plugin.open("half", None)
        track.describe(SETTINGS)
        part: Any = self.plugin.open("trial-1", track)
        part.close(done=False)
        track.close(done=True)
        assert track.client.get_run(track.run).data.params == {key: str(value) for key, value in SETTINGS.items()}
        child = track.client.get_run(part.run)
        assert (child.data.tags["mlflow.parentRunId"], child.info.status) == (track.run, "KILLED")

    def test_a_folder_is_refused_where_mlflow_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
        module = found("mlflow")
        try:
            module.MlflowClient(tracking_uri="./mlruns")
        except module.MlflowException:
            with pytest.raises(WrongInput, match=r"tracker mlflow cannot use ./mlruns: .*; give a database or a"):
                module.MLflow("./mlruns").check()


@pytest.mark.slow
class TestWandb(TrackerSuite):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def built(cls) -> None:
        cls.plugin = found("wandb").WeightsAndBiases()

    def test_a_run_lies_in_a_folder_until_it_is_sent(self, tmp_path: Path) -> None:
        track = self.plugin.open("half", None)
        track.describe(SETTINGS)
        track.log(points())
        track.close(done=True)
        (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
        until = time.monotonic() + 60
        while b"search_1/loss" not in file.read_bytes() and time.monotonic() < until:
            time.sleep(0.1)  # its own process writes it, after the run has ended here
        assert b"search_1/loss" in file.read_bytes()
        assert b"pruner.name" in file.read_bytes()
