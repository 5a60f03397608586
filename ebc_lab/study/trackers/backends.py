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

from ebc_lab.config.schema import TrackerConfig
from ebc_lab.records.figures import FINISHED

FOLDER = ".trackers"  # in the study's folder; hidden, because it is no part of what a study records
MLFLOW_ENV = {  # no telemetry, and no minutes of retries against a server that is down
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
}
METRICS_PER_CALL = 1000  # MLflow's own limit
# W&B is to record nothing of the tracker's own process, which does not train the run
WANDB_SETTINGS: dict[str, Any] = {"console": "off", "disable_code": True, "disable_git": True, "silent": True}
WANDB_SETTINGS |= {"x_disable_machine_info": True, "x_disable_meta": True, "x_disable_stats": True}
WANDB_SETTINGS["init_timeout"] = 20.0  # s; its own 90 are longer than a driver waits
TRACKIO_SETTINGS: dict[str, Any] = {"resume": "allow", "embed": False}
TRACKIO_SETTINGS |= {"auto_log_cpu": False, "auto_log_gpu": False}  # the same for Trackio


@dataclass(frozen=True)
class Run:
    """A run as a tracker shows it."""

    directory: Path
    run_id: str
    group: str  # the study, or the folder of a single run
    settings: dict[str, Any]  # those that distinguish it from other runs
    identity: dict[str, Any]  # all settings that can change its numbers


Row = tuple[int, dict[str, float]]  # step, and name -> figure at that step


class Tracker:
    """A service that shows runs. Any method may raise any exception; a new instance may then try again."""

    settings: tuple[str, ...] = ()  # TrackerConfig's fields that, beside the folder, say where runs are shown

    def __init__(self, folder: Path, config: TrackerConfig, note: Callable[[str], None]):
        """Show runs from now on. `note`: shows the user a message, each only once."""
        self.folder = folder
        self.config = config
        self.note = note
        self.runs: dict[str, Any] = {}  # run id -> the library's object for a run in progress

    def log(self, run: Run, rows: Sequence[Row]) -> None:
        """Show these rows. When this returns, the service or its library has stored the rows."""
        raise NotImplementedError

    def end(self, run: Run, outcome: str, figures: Mapping[str, float]) -> None:
        """Show how a run ended, and the run's final figures."""
        raise NotImplementedError

    def close(self) -> None:
        """Release what this instance holds open, even if runs are in progress. It is not used again."""


class TensorBoard(Tracker):
    """A tracker that writes event files to `folder/tensorboard/<study>/<run>`."""

    def log(self, run: Run, rows: Sequence[Row]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if run.run_id not in self.runs:
            folder = self.folder / "tensorboard" / run.group / run.run_id
            self.runs[run.run_id] = SummaryWriter(str(folder))
        writer = self.runs[run.run_id]
        for step, figures in rows:
            for name, value in figures.items():
                writer.add_scalar(name, value, step)
        writer.flush()

    def end(self, run: Run, outcome: str, figures: Mapping[str, float]) -> None:
        from torch.utils.tensorboard.summary import hparams

        self.log(run, [(0, dict(figures))])
        writer = self.runs.pop(run.run_id)
        writer.add_text("outcome", outcome)
        for summary in hparams({**run.settings, "outcome": outcome}, dict(figures)):
            writer.file_writer.add_summary(summary)
        writer.close()

    def close(self) -> None:
        for writer in self.runs.values():
            writer.close()


class MLflow(Tracker):
    """A tracker with one MLflow run per run, in an experiment named after the study. By default, MLflow
    stores the runs in an SQLite file in `folder`."""

    settings = ("mlflow_uri",)

    def __init__(self, folder: Path, config: TrackerConfig, note: Callable[[str], None]):
        super().__init__(folder, config, note)
        uri = config.mlflow_uri
        if uri and uri.startswith("file:"):
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # MLflow asks for this
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient(tracking_uri=uri or f"sqlite:///{folder / 'mlflow.db'}")
        self.artifacts = None if uri else (folder / "mlflow_artifacts").as_uri()

    def _id(self, run: Run) -> str:
        """Return MLflow's id of a run, creating the run in MLflow if it is not there yet."""
        from mlflow.entities import Param

        client = self.client
        if run.run_id not in self.runs:
            known = client.get_experiment_by_name(run.group)
            folder = self.artifacts
            experiment = known.experiment_id if known else client.create_experiment(run.group, folder)
            matches = client.search_runs([experiment], f"tags.ebc_lab_run = '{run.run_id}'", max_results=1)
            tags = {"ebc_lab_run": run.run_id}
            shown = matches[0] if matches else client.create_run(experiment, tags=tags, run_name=run.run_id)
            params = [Param(k, str(v)) for k, v in run.settings.items()]
            client.log_batch(shown.info.run_id, params=params)
            self.runs[run.run_id] = shown.info.run_id
        return str(self.runs[run.run_id])

    def log(self, run: Run, rows: Sequence[Row]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, x, now, step) for step, figures in rows for name, x in figures.items()]
        for first in range(0, len(metrics), METRICS_PER_CALL):
            self.client.log_batch(self._id(run), metrics=metrics[first : first + METRICS_PER_CALL])

    def end(self, run: Run, outcome: str, figures: Mapping[str, float]) -> None:
        self.log(run, [(0, dict(figures))])
        self.client.set_tag(self._id(run), "outcome", outcome)
        self.client.set_terminated(self._id(run), "FINISHED" if outcome in FINISHED else "FAILED")


class WandB(Tracker):
    """A tracker with one W&B run per run, in a group named after the study, and files in `folder/wandb`.

    A W&B run's id is a hash of the run's folder and name, so that a later process resumes the same W&B run.
    """

    settings = ("wandb_project", "wandb_mode")

    def __init__(self, folder: Path, config: TrackerConfig, note: Callable[[str], None]):
        super().__init__(folder, config, note)
        import wandb

        self.wandb = wandb
        self.mode: Any = None if config.wandb_mode == "auto" else config.wandb_mode  # None: W&B's own choice

    def _run(self, run: Run) -> Any:
        """Return W&B's object for a run in progress, opening the run in W&B if it is not open yet."""
        if run.run_id not in self.runs:
            try:
                begun = self._open(run)
            except self.wandb.errors.UsageError:  # nobody is logged in
                if self.mode is not None:
                    raise
                self.mode = "offline"
                begun = self._open(run)
            self.runs[run.run_id] = begun
            if begun.offline:
                files = f"{shlex.quote(str(self.folder / 'wandb'))}/offline-run-*"
                self.note(f"offline; once you are logged in, this uploads the runs: wandb sync {files}")
        return self.runs[run.run_id]

    def _open(self, run: Run) -> Any:
        place = f"{self.folder} {run.directory} {run.run_id}"
        begun = self.wandb.init(
            project=self.config.wandb_project or os.environ.get("WANDB_PROJECT") or "ebc-lab",
            dir=self.folder,
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
        begun.define_metric("*", step_metric="step")  # evaluations are logged after later steps
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
            shown.finish(exit_code=1)  # resumed when the run is
        self.runs.clear()
        self.wandb.teardown()


class Trackio(Tracker):
    """A tracker with one Trackio run per run, in a project named after the study, stored in `folder/trackio`.

    Trackio allows one open run at a time, so each call opens or resumes a run and closes it again.
    """

    def __init__(self, folder: Path, config: TrackerConfig, note: Callable[[str], None]):
        super().__init__(folder, config, note)
        os.environ["TRACKIO_DIR"] = str(folder / "trackio")  # read when trackio is imported
        if not any(os.environ.get(name) for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")):
            os.environ["HF_HUB_OFFLINE"] = "1"  # else trackio asks a server for a token's user name
        import trackio

        self.trackio: Any = trackio

    def _log(self, run: Run, rows: Sequence[Row], **more: str) -> None:
        """Write rows, and the run's settings with `more`. Raises OSError if Trackio warns that it failed."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            config = {**run.settings, **run.identity, **more}
            shown = self.trackio.init(run.group, run.run_id, config=config, **TRACKIO_SETTINGS)
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


TRACKERS = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB, "trackio": Trackio}
