"""TensorBoard and MLflow behind one interface."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

FOLDER = ".trackers"  # in the study's folder; hidden, because it is no part of what a study records
MLFLOW_ENV = {  # no telemetry, and no minutes of retries against a server that is down
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
}
METRICS_PER_CALL = 1000  # MLflow's own limit


@dataclass(frozen=True)
class Run:
    run_id: str
    group: str  # the study, or the folder of a single run
    settings: dict[str, Any]


Row = tuple[int, dict[str, float]]  # step, figures measured there


class Tracker(Protocol):
    """What shows a run. A call may raise any exception; another instance may then repeat it."""

    def log(self, run: Run, rows: Sequence[Row]) -> None: ...

    def end(self, run: Run, outcome: str, figures: Mapping[str, float]) -> None: ...

    def flush(self, run: Run) -> None: ...


class TensorBoard:
    """Event files in `folder/tensorboard/<study>/<run>`, one writer for each run in progress."""

    def __init__(self, folder: Path, uri: str | None = None):
        from torch.utils.tensorboard import SummaryWriter

        self.root = folder / "tensorboard"
        self.make = SummaryWriter
        self.writers: dict[str, Any] = {}

    def _writer(self, run: Run) -> Any:
        if run.run_id not in self.writers:
            self.writers[run.run_id] = self.make(str(self.root / run.group / run.run_id))
        return self.writers[run.run_id]

    def log(self, run: Run, rows: Sequence[Row]) -> None:
        writer = self._writer(run)
        for step, figures in rows:
            for name, value in figures.items():
                writer.add_scalar(name, value, step)

    def end(self, run: Run, outcome: str, figures: Mapping[str, float]) -> None:
        from torch.utils.tensorboard.summary import hparams

        self.log(run, [(0, dict(figures))])
        writer = self._writer(run)
        writer.add_text("outcome", outcome)
        settings = {**run.settings, "outcome": outcome}
        for summary in hparams(settings, dict(figures)):  # type: ignore[no-untyped-call]
            writer.file_writer.add_summary(summary)
        self.writers.pop(run.run_id).close()

    def flush(self, run: Run) -> None:
        if run.run_id in self.writers:
            self.writers[run.run_id].flush()


class MLflow:
    """One MLflow run for each run, in an experiment named after the study; in a sqlite file in `folder`
    without a `uri`."""

    def __init__(self, folder: Path, uri: str | None = None):
        if uri and uri.startswith("file:"):
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # which MLflow only maintains, and asks for
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient(tracking_uri=uri or f"sqlite:///{folder / 'mlflow.db'}")
        self.artifacts = None if uri else (folder / "mlflow_artifacts").as_uri()
        self.ids: dict[str, str] = {}

    def _id(self, run: Run) -> str:
        """MLflow's id of a run, which is created if there is none yet."""
        if run.run_id not in self.ids:
            experiment = self._experiment(run.group)
            found = self.client.search_runs([experiment], f"tags.ebc_lab_run = '{run.run_id}'", max_results=1)
            tags = {"ebc_lab_run": run.run_id}
            own = found[0] if found else self.client.create_run(experiment, tags=tags, run_name=run.run_id)
            self._log_batch(own.info.run_id, params=run.settings)
            self.ids[run.run_id] = own.info.run_id
        return self.ids[run.run_id]

    def _experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found:
            return str(found.experiment_id)
        return str(self.client.create_experiment(name, artifact_location=self.artifacts))

    def _log_batch(self, own: str, rows: Sequence[Row] = (), params: Mapping[str, Any] | None = None) -> None:
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        metrics = [Metric(name, x, now, step) for step, figures in rows for name, x in figures.items()]
        if params:
            self.client.log_batch(own, params=[Param(k, str(v)) for k, v in params.items()])
        for at in range(0, len(metrics), METRICS_PER_CALL):
            self.client.log_batch(own, metrics=metrics[at : at + METRICS_PER_CALL])

    def log(self, run: Run, rows: Sequence[Row]) -> None:
        self._log_batch(self._id(run), rows)

    def end(self, run: Run, outcome: str, figures: Mapping[str, float]) -> None:
        own = self._id(run)
        self._log_batch(own, [(0, dict(figures))])
        self.client.set_tag(own, "outcome", outcome)
        self.client.set_terminated(own, "FINISHED" if outcome in ("completed", "diverged") else "FAILED")

    def flush(self, run: Run) -> None:
        """Nothing to do: every call has arrived when it returns."""


TRACKERS: dict[str, Callable[[Path, str | None], Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow}
