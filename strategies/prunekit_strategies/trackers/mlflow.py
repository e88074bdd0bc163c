"""Runs of an MLflow experiment, in a file on this machine or on a server."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from prunekit import Point, Setting, Track, Tracker, WrongInput

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # else an import alone would tell its makers of it

from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]  # an extra
from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]
from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]

MOST_METRICS, MOST_PARAMS = 1000, 100  # in one call, as MLflow allows
HERE = "sqlite:///mlflow.db"


@dataclass(frozen=True)
class MLflow(Tracker):
    """A run of an MLflow experiment, the recipe as its parameters, losses and results as metrics, parts as child runs.

    `mlflow ui --backend-store-uri sqlite:///mlflow.db` shows them. Nothing leaves this machine unless the address is
    that of a server, and MLflow's telemetry is off where its variable says nothing else.

    Source: Zaharia et al. 2018, Accelerating the Machine Learning Lifecycle with MLflow, IEEE Data Eng. Bull. 41 (4).
    """

    address: str = ""  # of the store: sqlite:///FILE, or http://HOST:PORT; "": MLFLOW_TRACKING_URI, or mlflow.db here
    experiment: str = "prunekit"

    def check(self) -> None:
        try:
            self._client()
        except MlflowException as error:
            raise WrongInput(
                f"tracker mlflow cannot use {self._where}: {str(error).partition('. ')[0]}; give a database or a "
                "server with --set tracker.mlflow.address=sqlite:///FILE"
            ) from error

    def open(self, name: str, parent: Track | None) -> Track:
        with without_noise():
            client = self._client()
            found = client.get_experiment_by_name(self.experiment)
            number = client.create_experiment(self.experiment) if found is None else found.experiment_id
            tags = {"mlflow.parentRunId": parent.run} if isinstance(parent, MLflowRun) else {}
            return MLflowRun(client, client.create_run(number, run_name=name, tags=tags).info.run_id)

    @property
    def _where(self) -> str:
        return self.address or os.environ.get("MLFLOW_TRACKING_URI") or HERE

    def _client(self) -> MlflowClient:
        with without_noise():
            return MlflowClient(tracking_uri=self._where)


@dataclass
class MLflowRun(Track):
    """One run there."""

    client: MlflowClient
    run: str  # its id

    def describe(self, settings: Mapping[str, Setting]) -> None:
        params = [Param(key, str(value)) for key, value in settings.items()]
        with without_noise():
            for i in range(0, len(params), MOST_PARAMS):
                self.client.log_batch(self.run, params=params[i : i + MOST_PARAMS])

    def log(self, points: Sequence[Point]) -> None:
        metrics = [Metric(point.name, point.value, round(point.at * 1000), point.step) for point in points]
        with without_noise():
            for i in range(0, len(metrics), MOST_METRICS):
                self.client.log_batch(self.run, metrics=metrics[i : i + MOST_METRICS])

    def close(self, *, done: bool) -> None:
        with without_noise():
            self.client.set_terminated(self.run, status="FINISHED" if done else "KILLED")


@contextmanager
def without_noise() -> Iterator[None]:
    """Without what MLflow and its database say of themselves; what they raise is raised."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
