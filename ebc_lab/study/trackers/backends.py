"""TensorBoard, MLflow, W&B and Trackio behind one interface."""

from __future__ import annotations

import hashlib
import os
import shlex
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebc_lab.records.figures import FINISHED

FOLDER = ".trackers"  # in the study's folder; hidden, because it is no part of what a study records
MLFLOW_ENV = {  # no telemetry, and no minutes of retries against a server that is down
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
}
METRICS_PER_CALL = 1000  # MLflow's own limit
WANDB_SETTINGS: dict[str, Any] = {  # nothing of the tracker's own process, which is not the run
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "init_timeout": 20.0,  # s; its own 90 are longer than a driver waits
    "silent": True,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
}
TRACKIO_SETTINGS: dict[str, Any] = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}  # the same
TRACKIO_ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")  # set by a user who wants the runs there, too


@dataclass(frozen=True)
class Run:
    """A run as a tracker shows it."""

    directory: Path
    run_id: str
    group: str  # the study, or the folder of a single run
    settings: dict[str, Any]  # those that distinguish it from the others
    identity: dict[str, Any]  # all that can change its numbers


@dataclass(frozen=True)
class Place:
    """Where a tracker shows runs."""

    folder: Path
    mlflow_uri: str | None = None
    wandb_project: str | None = None
    wandb_mode: str = "auto"
    note: Callable[[str], None] = lambda text: None  # for what a user wants to know once


Row = tuple[int, dict[str, float]]  # step, figures measured there


class Tracker:
    """What shows a run. A call may raise any exception; another instance may then repeat it."""

    def __init__(self, place: Place):
        self.place = place
        self.noted = False

    def note(self, text: str) -> None:
        """Tell the user something, once."""
        if not self.noted:
            self.noted = True
            self.place.note(text)

    def log(self, run: Run, rows: Sequence[Row]) -> None:
        """Show these rows; they have been handed over when this returns."""
        raise NotImplementedError

    def end(self, run: Run, outcome: str, figures: Mapping[str, float]) -> None:
        """Show how a run ended."""
        raise NotImplementedError

    def close(self) -> None:
        """Release what this instance holds open. Nothing more comes from it, even if runs are in progress."""


class TensorBoard(Tracker):
    """Event files in `folder/tensorboard/<study>/<run>`, one writer for each run in progress."""

    def __init__(self, place: Place):
        super().__init__(place)
        from torch.utils.tensorboard import SummaryWriter

        self.root = place.folder / "tensorboard"
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
        writer.flush()

    def end(self, run: Run, outcome: str, figures: Mapping[str, float]) -> None:
        from torch.utils.tensorboard.summary import hparams

        self.log(run, [(0, dict(figures))])
        writer = self._writer(run)
        writer.add_text("outcome", outcome)
        settings = {**run.settings, "outcome": outcome}
        for summary in hparams(settings, dict(figures)):
            writer.file_writer.add_summary(summary)
        self.writers.pop(run.run_id).close()

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class MLflow(Tracker):
    """One MLflow run for each run, in an experiment named after the study; in a sqlite file in the folder
    without a `mlflow_uri`."""

    def __init__(self, place: Place):
        super().__init__(place)
        uri, folder = place.mlflow_uri, place.folder
        if uri and uri.startswith("file:"):
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # which MLflow only maintains, and asks for
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient(tracking_uri=uri or f"sqlite:///{folder / 'mlflow.db'}")
        self.artifacts = None if uri else (folder / "mlflow_artifacts").as_uri()
        self.ids: dict[str, str] = {}

    def _id(self, run: Run) -> str:
        """Return MLflow's id of a run, which is created if there is none yet."""
        from mlflow.entities import Param

        if run.run_id not in self.ids:
            known = self.client.get_experiment_by_name(run.group)
            experiment = (
                known.experiment_id
                if known
                else self.client.create_experiment(run.group, artifact_location=self.artifacts)
            )
            matches = self.client.search_runs(
                [experiment], f"tags.ebc_lab_run = '{run.run_id}'", max_results=1
            )
            tags = {"ebc_lab_run": run.run_id}
            tracked = (
                matches[0] if matches else self.client.create_run(experiment, tags=tags, run_name=run.run_id)
            )
            params = [Param(k, str(v)) for k, v in run.settings.items()]
            self.client.log_batch(tracked.info.run_id, params=params)
            self.ids[run.run_id] = tracked.info.run_id
        return self.ids[run.run_id]

    def _log_batch(self, run_id: str, rows: Sequence[Row]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, x, now, step) for step, figures in rows for name, x in figures.items()]
        for first in range(0, len(metrics), METRICS_PER_CALL):
            self.client.log_batch(run_id, metrics=metrics[first : first + METRICS_PER_CALL])

    def log(self, run: Run, rows: Sequence[Row]) -> None:
        self._log_batch(self._id(run), rows)

    def end(self, run: Run, outcome: str, figures: Mapping[str, float]) -> None:
        mlflow_id = self._id(run)
        self._log_batch(mlflow_id, [(0, dict(figures))])
        self.client.set_tag(mlflow_id, "outcome", outcome)
        self.client.set_terminated(mlflow_id, "FINISHED" if outcome in FINISHED else "FAILED")


class WandB(Tracker):
    """One W&B run for each run, in a group named after the study; their files are in `folder/wandb`.

    A run's id at W&B is made of its place and name, so that whoever shows it later continues it there.
    """

    def __init__(self, place: Place):
        super().__init__(place)
        import wandb

        self.wandb = wandb
        self.mode: Any = None if place.wandb_mode == "auto" else place.wandb_mode  # None: W&B's own choice
        self.runs: dict[str, Any] = {}

    def _run(self, run: Run) -> Any:
        """Return W&B's object for a run in progress."""
        if run.run_id not in self.runs:
            try:
                self.runs[run.run_id] = self._begun(run)
            except self.wandb.errors.UsageError:  # nobody is logged in
                if self.mode is not None:
                    raise
                self.mode = "offline"
                self.runs[run.run_id] = self._begun(run)
            if self.runs[run.run_id].offline:
                files = f"{shlex.quote(str(self.place.folder / 'wandb'))}/offline-run-*"
                self.note(f"offline; once you are logged in, this uploads the runs: wandb sync {files}")
        return self.runs[run.run_id]

    def _begun(self, run: Run) -> Any:
        place = f"{self.place.folder} {run.directory} {run.run_id}"
        begun = self.wandb.init(
            project=self.place.wandb_project or os.environ.get("WANDB_PROJECT") or "ebc-lab",
            dir=self.place.folder,
            id=hashlib.sha256(place.encode()).hexdigest()[:16],
            name=run.run_id,
            group=run.group,
            config={**run.settings, **run.identity},
            resume="allow",
            reinit="create_new",  # several are in progress at once
            mode=self.mode,
            save_code=False,
            settings=WANDB_SETTINGS,
        )
        begun.define_metric("*", step_metric="step")  # evaluations come after later steps
        return begun

    def log(self, run: Run, rows: Sequence[Row]) -> None:
        shown = self._run(run)
        for step, figures in rows:
            shown.log({"step": step, **figures})

    def end(self, run: Run, outcome: str, figures: Mapping[str, float]) -> None:
        shown = self._run(run)
        shown.summary.update({"outcome": outcome, **figures})
        shown.finish(exit_code=0 if outcome in FINISHED else 1)
        del self.runs[run.run_id]

    def close(self) -> None:
        for shown in self.runs.values():
            shown.finish(exit_code=1)  # it goes on when the run does
        self.runs.clear()
        self.wandb.teardown()


class Trackio(Tracker):
    """One Trackio run for each run, in a project named after the study; a database each in `folder/trackio`.

    Trackio has one run in progress, so each call opens its run, or continues it, and closes it again.
    """

    def __init__(self, place: Place):
        super().__init__(place)
        os.environ["TRACKIO_DIR"] = str(place.folder / "trackio")  # read when it is imported
        if not any(os.environ.get(name) for name in TRACKIO_ELSEWHERE):
            os.environ["HF_HUB_OFFLINE"] = "1"  # it would ask a server for the name of a user who has a token
        import trackio

        self.trackio: Any = trackio

    def _log(self, run: Run, rows: Sequence[Row], **more: str) -> None:
        """Write rows, and settings with `more`. Raises OSError where Trackio, which only warns, could not."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = {**run.settings, **run.identity, **more}
            shown = self.trackio.init(
                run.group, run.run_id, resume="allow", config=config, **TRACKIO_SETTINGS
            )
            for step, figures in rows:
                shown.log(figures, step=step)
            shown.finish()
        failed = [str(w.message) for w in caught if str(w.message).startswith("trackio failed")]
        if failed:
            raise OSError(failed[0])
        show = f"TRACKIO_DIR={shlex.quote(os.environ['TRACKIO_DIR'])} trackio show --project"
        self.note(f"this shows the runs: {show} {shlex.quote(run.group)}")

    def log(self, run: Run, rows: Sequence[Row]) -> None:
        if rows:
            self._log(run, rows)

    def end(self, run: Run, outcome: str, figures: Mapping[str, float]) -> None:
        self._log(run, [(0, dict(figures))], outcome=outcome)


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
    "trackio": Trackio,
}
