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
# nothing of the tracker's own process, which is not the run
WANDB_SETTINGS: dict[str, Any] = {"console": "off", "disable_code": True, "disable_git": True, "silent": True}
WANDB_SETTINGS |= {"x_disable_machine_info": True, "x_disable_meta": True, "x_disable_stats": True}
WANDB_SETTINGS["init_timeout"] = 20.0  # s; its own 90 are longer than a driver waits
TRACKIO_SETTINGS: dict[str, Any] = {"resume": "allow", "embed": False}
TRACKIO_SETTINGS |= {"auto_log_cpu": False, "auto_log_gpu": False}  # nothing of its own process either
TRACKIO_ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")  # set by a user who wants the runs there, too


@dataclass(frozen=True)
class Run:
    """A run as a tracker shows it."""

    directory: Path
    run_id: str
    group: str  # the study, or the folder of a single run
    settings: dict[str, Any]  # those that distinguish it from the others
    identity: dict[str, Any]  # all that can change its numbers


Row = tuple[int, dict[str, float]]  # step, figures measured there


class Tracker:
    """What shows runs. A call may raise any exception; another instance may then repeat it."""

    settings: tuple[str, ...] = ()  # of TrackerConfig, which say where, beyond the folder

    def __init__(self, folder: Path, config: TrackerConfig, note: Callable[[str], None]):
        """`note`: tells the user something, once however often it is called."""
        self.folder = folder
        self.config = config
        self.note = note
        self.runs: dict[str, Any] = {}  # run id -> what the tracker's library has for a run in progress

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
    """One MLflow run for each run, in an experiment named after the study; by default in a sqlite file."""

    settings = ("mlflow_uri",)

    def __init__(self, folder: Path, config: TrackerConfig, note: Callable[[str], None]):
        super().__init__(folder, config, note)
        uri = config.mlflow_uri
        if uri and uri.startswith("file:"):
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # which MLflow only maintains, and asks for
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient(tracking_uri=uri or f"sqlite:///{folder / 'mlflow.db'}")
        self.artifacts = None if uri else (folder / "mlflow_artifacts").as_uri()

    def _id(self, run: Run) -> str:
        """Return MLflow's id of a run, which is created if there is none yet."""
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
    """One W&B run for each run, in a group named after the study; their files are in `folder/wandb`.

    A run's id at W&B is made of its place and name, so that whoever shows it later continues it there.
    """

    settings = ("wandb_project", "wandb_mode")

    def __init__(self, folder: Path, config: TrackerConfig, note: Callable[[str], None]):
        super().__init__(folder, config, note)
        import wandb

        self.wandb = wandb
        self.mode: Any = None if config.wandb_mode == "auto" else config.wandb_mode  # None: W&B's own choice

    def _run(self, run: Run) -> Any:
        """Return W&B's object for a run in progress."""
        if run.run_id not in self.runs:
            try:
                begun = self._begun(run)
            except self.wandb.errors.UsageError:  # nobody is logged in
                if self.mode is not None:
                    raise
                self.mode = "offline"
                begun = self._begun(run)
            self.runs[run.run_id] = begun
            if begun.offline:
                files = f"{shlex.quote(str(self.folder / 'wandb'))}/offline-run-*"
                self.note(f"offline; once you are logged in, this uploads the runs: wandb sync {files}")
        return self.runs[run.run_id]

    def _begun(self, run: Run) -> Any:
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

    def __init__(self, folder: Path, config: TrackerConfig, note: Callable[[str], None]):
        super().__init__(folder, config, note)
        os.environ["TRACKIO_DIR"] = str(folder / "trackio")  # read when it is imported
        if not any(os.environ.get(name) for name in TRACKIO_ELSEWHERE):
            os.environ["HF_HUB_OFFLINE"] = "1"  # it would ask a server for the name of a user who has a token
        import trackio

        self.trackio: Any = trackio

    def _log(self, run: Run, rows: Sequence[Row], **more: str) -> None:
        """Write rows, and settings with `more`. Raises OSError where Trackio, which only warns, could not."""
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
