"""TensorBoard and MLflow, opt-in (docs/trackers.md): they show what a study's files hold, and can do no run any harm.

A tracker is a process of its own, one for each name (`python -m ebc_lab.trackers`), which reads the files that runs write
anyway. They are its queue, so nothing is lost while it is slow or down; what it has shown is noted in `.trackers/` beside them,
so nothing is shown twice. Whoever drives the runs starts it, says its first complaint, and at the end waits for it so long and
no longer. The end of its standard input tells it that nothing more will come, however the driver went.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import TrackerConfig
from ebc_lab.records.sealed import read_json, write_json
from ebc_lab.records.streams import read_columns

NEEDED = {"tensorboard": ("tensorboard",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}  # modules of the extra
PLACE = ".trackers"  # beside the runs, hidden: no part of what a study records
STEP_FIGURES = ("loss", "c", "applied_kl", "target_kl", "lr")  # columns of steps.csv
EVAL_FIGURES = ("val_loss",)  # … of evals.csv
SETTINGS = {  # name -> where it stands in a run's configuration
    "seed": ("seed",),
    "steps": ("steps",),
    "lr": ("optimizer", "lr"),
    "optimizer": ("optimizer", "name"),
    "projection": ("projection", "name"),
    "stabilizer": ("stabilizer", "name"),
    "budget": ("budget", "name"),
    "target_kl": ("budget", "target_kl"),
}
POLL_S, PATIENCE_S = 2.0, 60.0  # between two looks at the files; the longest such pause after failures
QUIET = {  # for MLflow: no word to its makers, and no minutes of retries against a server that is down
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
}
METRICS_A_CALL = 1000  # MLflow's own limit


def check(config: TrackerConfig) -> None:
    """Refuse an unknown tracker, or one whose extra is not installed. Raises UserError."""
    for name in config.names:
        if name not in NEEDED:
            raise UserError(f"tracker.names takes {' and '.join(NEEDED)}, not {name}.")
        lacking = [module for module in NEEDED[name] if importlib.util.find_spec(module) is None]
        if lacking:
            raise UserError(f"tracker={name} needs {', '.join(lacking)}: python -m pip install 'ebc-lab[{name}]'.")
    uri = config.mlflow_uri
    if uri is not None and "://" not in uri and not uri.startswith("file:"):
        raise UserError(f"tracker.mlflow_uri={uri} is no URI: write sqlite:///FILE, file:FOLDER or http://HOST:PORT.")
    if uri is not None and "mlflow" not in config.names:
        raise UserError("tracker.mlflow_uri is a setting of tracker=mlflow.")
    if not config.wait_s >= 0:
        raise UserError("tracker.wait_s must be 0 or more seconds.")


# -- the driver's side -----------------------------------------------------------------------------------------------------


@contextmanager
def following(config: TrackerConfig, root: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Have the trackers follow the study, or the single run, in `root` meanwhile. Never raises by itself."""
    followers = [_Follower(name, config, root, say) for name in config.names]
    try:
        yield
    except BaseException:
        for follower in followers:
            follower.dismiss()  # it ends by itself, in its own time
        raise
    deadline = time.monotonic() + config.wait_s
    for follower in followers:
        follower.dismiss()
    for follower in followers:
        follower.finish(deadline)


class _Follower:
    """One tracker's process, as its driver sees it."""

    def __init__(self, name: str, config: TrackerConfig, root: Path, say: Callable[[str], None]):
        self.name, self.config, self.say = name, config, say
        self.said = False
        self.process: subprocess.Popen[str] | None = None
        root = root.resolve()
        folder = Path(config.folder).expanduser().resolve() if config.folder else root / PLACE
        self.log = root / PLACE / f"{name}.log"
        about = {"name": name, "root": str(root), "folder": str(folder), "uri": absolute(config.mlflow_uri)}
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log, "a") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "ebc_lab.trackers"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env={**QUIET, **os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
                    start_new_session=True,  # Ctrl-C is the driver's
                )
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps({**about, "wait_s": config.wait_s}) + "\n")  # an address is nothing for `ps`
            self.process.stdin.flush()
        except OSError as error:
            self.warn(f"cannot be started ({error.strerror})")
        if self.process is None:
            return
        self.reader = threading.Thread(target=self._listen, daemon=True)
        self.reader.start()

    def _listen(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        with suppress(ValueError, OSError):
            for line in self.process.stdout:
                if line.startswith("warning: "):
                    self.warn(line.removeprefix("warning: ").strip())

    def warn(self, what: str) -> None:
        """Say it, if it is the first complaint."""
        if not self.said:
            self.said = True
            self.say(f"warning: tracker {self.name}: {what}; the runs go on without it")

    def dismiss(self) -> None:
        if self.process and self.process.stdin:
            with suppress(OSError):
                self.process.stdin.close()

    def finish(self, deadline: float) -> None:
        if self.process is None:
            return
        try:
            code = self.process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.warn(
                f"not done {self.config.wait_s:g} s (tracker.wait_s) after the last run, and stopped: the same command again "
                "lets it carry on"
            )
            return
        self.reader.join(timeout=1.0)
        if code:
            self.warn(f"ended with exit code {code}, see {self.log}")


def absolute(uri: str | None) -> str | None:
    """A store's address that means the same in any working directory."""
    for lead in ("sqlite:///", "file:"):
        if uri and uri.startswith(lead) and not uri.removeprefix(lead).startswith("/"):
            return lead + str(Path(uri.removeprefix(lead)).resolve())
    return uri


# -- the tracker's side ----------------------------------------------------------------------------------------------------


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
        for summary in hparams({**run.settings, "outcome": outcome}, dict(figures)):
            writer.file_writer.add_summary(summary)
        writer.flush()
        self.writers.pop(run.run_id).close()

    def flush(self, run: Run) -> None:
        if run.run_id in self.writers:
            self.writers[run.run_id].flush()


class MLflow:
    """One MLflow run for each run, in an experiment named after the study; a sqlite file in `folder` unless `uri` says else."""

    def __init__(self, folder: Path, uri: str | None = None):
        if uri and uri.startswith("file:"):
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # MLflow's own way to ask for it: it is in maintenance there
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
            experiment = known.experiment_id if known else self.client.create_experiment(run.group, artifact_location=place)
            found = self.client.search_runs([experiment], f"tags.ebc_lab_run = '{run.run_id}'", max_results=1)
            own = (
                found[0] if found else self.client.create_run(experiment, tags={"ebc_lab_run": run.run_id}, run_name=run.run_id)
            )
            self._batch(own.info.run_id, params=run.settings)
            self.ids[run.run_id] = own.info.run_id
        return self.ids[run.run_id]

    def _batch(self, run: str, rows: Sequence[Row] = (), params: Mapping[str, Any] | None = None) -> None:
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for step, figures in rows for name, value in figures.items()]
        given = [Param(k, str(v)) for k, v in (params or {}).items()]
        for at in range(0, max(len(metrics), 1), METRICS_A_CALL):
            self.client.log_batch(run, metrics=metrics[at : at + METRICS_A_CALL], params=given if at == 0 else [])

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


class Reader:
    """What of the runs in `root` has been shown, and what has not."""

    def __init__(self, root: Path, name: str, to: str):
        self.root, self.path = root, root / PLACE / f"{name}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state: Any = {}
        with suppress(OSError, UserError):
            state = read_json(self.path)
        known = isinstance(state, dict) and state.get("to") == to and isinstance(state.get("runs"), dict)
        self.state: dict[str, Any] = state if known else {"to": to, "runs": {}}
        self.settled: dict[Path, int] = {}  # result.json -> its time, of runs that are shown to their end

    def measuring(self) -> bool:
        """Whether a measurement of time is under way, beside which nothing else is to be done."""
        return any(not p.with_name("result.json").exists() for p in self.root.glob("runs/overhead_*/progress.json"))

    def show(self, tracker: Tracker) -> None:
        """Show what is new, run by run."""
        single = (self.root / "spec.json").exists()
        for directory in [self.root] if single else sorted(self.root.glob("runs/*")):
            self._show_run(directory, tracker)

    def _show_run(self, directory: Path, tracker: Tracker) -> None:
        result_path = directory / "result.json"
        ended = result_path.stat().st_mtime_ns if result_path.exists() else None
        if ended is not None and self.settled.get(result_path) == ended:
            return
        try:
            result = read_json(result_path) if ended is not None else None  # before the rows, which are whole then
            spec = read_json(directory / "spec.json")
        except (FileNotFoundError, UserError):  # a folder of something else, or a damaged file, which others complain of
            return
        run = Run(spec["run_id"], self.root.name, settings_of(spec))
        shown = {"step": -1, "eval": -1, "result": None, **self.state["runs"].get(run.run_id, {})}
        if spec["kind"] == "train" and (result is None or shown["result"] != result["checksum"]):
            rows = new_rows(directory / "steps.csv", STEP_FIGURES, shown["step"])
            evals = new_rows(directory / "evals.csv", EVAL_FIGURES, shown["eval"])
            if rows or evals:
                tracker.log(run, [*rows, *evals])
            shown["step"], shown["eval"] = (new[-1][0] if new else shown[k] for k, new in (("step", rows), ("eval", evals)))
            if result is not None:
                tracker.end(run, result["outcome"], figures_of(result))
                shown["result"] = result["checksum"]
            if rows or evals or result is not None:
                tracker.flush(run)
                self.state["runs"][run.run_id] = shown
                write_json(self.path, self.state, durable=False)
        if ended is not None:
            self.settled[result_path] = ended


def settings_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a run from the others."""
    out = {k: spec[k] for k in ("arm", "stage", "role", "lr_scale") if k in spec}
    for name, keys in SETTINGS.items():
        value: Any = spec["config"]
        for key in keys:
            value = value[key]
        out[name] = value
    if out["stabilizer"] != "ebc":
        del out["budget"], out["target_kl"]
    return out


def figures_of(result: Mapping[str, Any]) -> dict[str, float]:
    """A result's plain figures, `final/<name>`."""
    numbers = {k: v for k, v in result.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {f"final/{k}": float(v) for k, v in numbers.items()}


def new_rows(path: Path, columns: Sequence[str], after: int) -> list[Row]:
    """What a stream holds behind a step, where it was measured. A file that is not there holds nothing yet."""
    try:
        found = read_columns(path)
    except (FileNotFoundError, IndexError, ValueError):  # ValueError: its last line is being written
        return []
    rows = []
    for i, step in enumerate(found["step"]):
        if step > after:
            values = ((name, float(found[name][i])) for name in columns)
            rows.append((int(step), {name: x for name, x in values if math.isfinite(x)}))
    return rows


def follow(reader: Reader, connect: Callable[[], Tracker], over: threading.Event, say: Callable[[str], None]) -> bool:
    """Show what comes until `over`, and then what is left. -> whether all of it was shown. Only the first failure is said."""
    tracker: Tracker | None = None
    pause, said = POLL_S, False
    while True:
        last, began = over.is_set(), time.monotonic()
        try:
            if last or not reader.measuring():
                tracker = tracker or connect()
                reader.show(tracker)
            pause = max(POLL_S, 10 * (time.monotonic() - began))
            if last:
                return True
        except Exception as error:
            tracker, pause = None, min(2 * pause, PATIENCE_S)
            what = re.sub(r"//[^/@\s]+@", "//…@", f"{type(error).__name__}: {error}")  # without a password
            print(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {what}", file=sys.stderr, flush=True)
            if not said:
                said = True
                say(what.splitlines()[0][:300])
            if last:
                return False
        over.wait(pause)


def main(about: Mapping[str, Any]) -> int:
    """One tracker's process, which `_Follower` starts. -> exit code."""
    over = threading.Event()

    def until_the_end() -> None:
        sys.stdin.read()
        over.set()
        time.sleep(about["wait_s"])
        os._exit(1)  # it hangs, and nobody may be left to stop it

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=until_the_end, daemon=True).start()
    with suppress(OSError):
        os.nice(10)
    folder, uri = Path(about["folder"]), about["uri"]

    def connect() -> Tracker:
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)  # where MLflow makes folders that nobody asked for
        return TRACKERS[about["name"]](folder, uri)

    def say(what: str) -> None:
        with suppress(OSError):  # the driver is gone
            print(f"warning: {what}", flush=True)

    reader = Reader(Path(about["root"]), about["name"], f"{folder} {uri or ''}")
    return 0 if follow(reader, connect, over, say) else 1


if __name__ == "__main__":
    code = main(json.loads(sys.stdin.readline()))
    sys.stdout.flush()
    os._exit(code)  # a tracker's own threads may hang
