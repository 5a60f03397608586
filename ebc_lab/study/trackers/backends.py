"""TensorBoard and MLflow behind one interface."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

PLACE = ".trackers"  # beside the runs, hidden: no part of what a study records
QUIET = {  # for MLflow: no word to its makers, and no minutes of retries against a server that is down
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
}
METRICS_A_CALL = 1000  # MLflow's own limit


# -- the tracker's side ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    run_id: str
    group: str  # the study, or the folder of a single run
    settings: dict[str, Any]


Row = tuple[int, dict[str, float]]  # step, figures measured there


class Tracker(Protocol):
    """What shows a run. Each call may raise anything, and may be made again afterwards by another instance."""

    def log(self, run: Run, rows: Sequence[Row]) -> None: ...

    def end(self, run: Run, outcome: str, figures: Mapping[str, float]) -> None: ...

    def flush(self, run: Run) -> None: ...


class TensorBoard:
    """Event files in `folder/tensorboard/<study>/<run>`, one writer for each run under way."""

    def __init__(self, folder: Path, uri: str | None = None):
        from torch.utils.tensorboard import SummaryWriter

        self.root, self.make = folder / "tensorboard", SummaryWriter
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

        writer = self._writer(run)
        for name, value in figures.items():
            writer.add_scalar(name, value, 0)
        writer.add_text("outcome", outcome)
        for summary in hparams({**run.settings, "outcome": outcome}, dict(figures)):  # type: ignore[no-untyped-call]
            writer.file_writer.add_summary(summary)
        writer.flush()
        self.writers.pop(run.run_id).close()

    def flush(self, run: Run) -> None:
        if run.run_id in self.writers:
            self.writers[run.run_id].flush()


class MLflow:
    """One MLflow run for each run, in an experiment named after the study; a sqlite file in `folder` unless
    `uri` says else."""

    def __init__(self, folder: Path, uri: str | None = None):
        if uri and uri.startswith("file:"):
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = (
                "true"  # MLflow's own way to ask for it: it is in maintenance there
            )
        from mlflow.tracking import MlflowClient

        self.folder = folder
        self.client = MlflowClient(tracking_uri=uri or f"sqlite:///{folder / 'mlflow.db'}")
        self.local = uri is None
        self.ids: dict[str, str] = {}

    def _id(self, run: Run) -> str:
        """MLflow's own id of a run, which is made where there is none yet."""
        if run.run_id not in self.ids:
            known = self.client.get_experiment_by_name(run.group)
            place = (self.folder / "mlflow_artifacts").as_uri() if self.local else None
            experiment = (
                known.experiment_id
                if known
                else self.client.create_experiment(run.group, artifact_location=place)
            )
            found = self.client.search_runs([experiment], f"tags.ebc_lab_run = '{run.run_id}'", max_results=1)
            own = (
                found[0]
                if found
                else self.client.create_run(experiment, tags={"ebc_lab_run": run.run_id}, run_name=run.run_id)
            )
            self._batch(own.info.run_id, params=run.settings)
            self.ids[run.run_id] = own.info.run_id
        return self.ids[run.run_id]

    def _batch(self, run: str, rows: Sequence[Row] = (), params: Mapping[str, Any] | None = None) -> None:
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        metrics = [
            Metric(name, value, now, step) for step, figures in rows for name, value in figures.items()
        ]
        given = [Param(k, str(v)) for k, v in (params or {}).items()]
        for at in range(0, max(len(metrics), 1), METRICS_A_CALL):
            self.client.log_batch(
                run, metrics=metrics[at : at + METRICS_A_CALL], params=given if at == 0 else []
            )

    def log(self, run: Run, rows: Sequence[Row]) -> None:
        self._batch(self._id(run), rows)

    def end(self, run: Run, outcome: str, figures: Mapping[str, float]) -> None:
        own = self._id(run)
        self._batch(own, [(0, dict(figures))])
        self.client.set_tag(own, "outcome", outcome)
        self.client.set_terminated(own, "FINISHED" if outcome in ("completed", "diverged") else "FAILED")

    def flush(self, run: Run) -> None:
        """Every call has arrived when it returns."""


TRACKERS: dict[str, Callable[[Path, str | None], Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow}
