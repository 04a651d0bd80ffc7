"""MLflow: one run of an experiment, in a database in the run folder or on a tracking server."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from evomerge.config import TrackerSpec

_LONGEST = 6000
"""Characters of a value that every kind of MLflow store accepts."""


class Mlflow:
    """Logs to an MLflow run; its id is stored, so that a resumed run continues it.

    Uses a separate client, so mlflow's global state is not changed.
    """

    def __init__(self, spec: TrackerSpec, folder: Path, state: dict[str, Any]) -> None:
        # A server that does not answer must not delay the run: by default mlflow retries for many minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
        uri = spec.uri or f"sqlite:///{folder.absolute() / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=uri)
        if "id" in state:
            self._client.update_run(state["id"], status="RUNNING")
        else:
            existing = self._client.get_experiment_by_name(spec.project)
            experiment = (
                self._client.create_experiment(
                    spec.project,
                    artifact_location=None if spec.uri else (folder / "mlflow").absolute().as_uri(),
                )
                if existing is None
                else existing.experiment_id
            )
            state["id"] = self._client.create_run(experiment, run_name=folder.name).info.run_id
        self._id = state["id"]

    def config(self, values: Mapping[str, Any]) -> None:
        """Log the settings as parameters."""
        params = [Param(name, str(value)[:_LONGEST]) for name, value in values.items()]
        for start in range(0, len(params), 100):  # the limit of one request
            self._client.log_batch(self._id, params=params[start : start + 100])

    def step(self, generation: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a generation as one step."""
        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, generation) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def result(self, generation: int, values: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """Log metrics at the last generation, and texts as tags."""
        self.step(generation, values)
        for name, text in texts.items():
            self._client.set_tag(self._id, name, text[:_LONGEST])

    def close(self, *, finished: bool) -> None:
        """Set the status of the MLflow run; the next session sets one that was killed to running again."""
        self._client.set_terminated(self._id, status="FINISHED" if finished else "KILLED")
