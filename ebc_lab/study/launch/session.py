"""The folder of JSON files through which a driver and its workers communicate.

`session.json` says where the study is and how workers behave; `tasks.json` lists the runs to train, in order;
`worker-<name>.json` says which run a worker is training. Results never pass through the folder. It lies in
the user's state directory, with mode 0700 because it also holds submitit's pickles. With `launcher.join`,
which excludes Slurm, it lies in the study's folder, where workers on other machines find it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ebc_lab.config.errors import UserError
from ebc_lab.config.machine import git_revision
from ebc_lab.config.schema import Config
from ebc_lab.records.files import stamp_of
from ebc_lab.records.json_files import read_json, try_read, write_json
from ebc_lab.records.locks import is_locked

from ..store import attempts
from ..store.study import Study

GUEST = "guest-"  # prefix of the names of workers that no driver started


class SessionRecord(TypedDict):
    """The content of session.json."""

    study: str  # the study's folder, absolute or relative to the session's
    bound: bool  # whether workers end with their driver
    idle_s: float | None  # after which a worker without a run ends; None: never
    checkpoint_every_s: float
    beat_s: float  # between two heartbeats of a worker without a run
    processes_per_run: int
    nodes_per_run: NotRequired[int]
    several_gpus: bool  # whether the workers have different GPUs
    code: dict[str, Any]  # see `code_to_match`
    device: NotRequired[str]  # like `env`, only with launcher=local, for workers that join
    env: NotRequired[dict[str, str]]


class Tasks(TypedDict):
    """The content of tasks.json; `Session.publish` describes the fields."""

    runs: list[str]
    barred: dict[str, list[str]]
    stop: bool


class Note(TypedDict, total=False):
    """A worker's report on itself. It also has all fields of `attempts.surroundings`."""

    run_id: str | None  # of the run in progress
    ran: int  # how many runs it has begun, including that one
    started: bool  # whether it has ended a run, or has found none to train
    beat: float  # a heartbeat: only its changes count
    host: str
    cause: str  # why its device failed
    device_failed: bool
    error: str  # what it cannot write, and why


class ProcessRecord(TypedDict):
    """The process of a worker. If Slurm starts the worker's job again, a new process replaces it."""

    pid: int
    host: str


class ExitRecord(TypedDict):
    """How a worker ended, recorded for a driver that did not start the worker."""

    code: int  # exit code as Popen reports it


NOTES = {"worker": Note, "process": ProcessRecord, "exit": ExitRecord}  # content of <kind>-<worker>.json


class Session:
    """The session of one driver and its workers, in the folder `root`."""

    def __init__(self, root: Path):
        self.root = root
        self.lock_path = root / "driver.lock"
        # stamp and content of tasks.json when it was read last
        self.read: tuple[tuple[int, ...], dict[str, Any]] | None = None

    @classmethod
    def begin(cls, study: Study, launcher: str, *, shared: bool = False, **about: Any) -> Session:
        """Return a new session, and remove those of earlier drivers. `shared`: whether the new one lies in
        the study's folder, for workers on other machines. `about`: the rest of session.json. Raises what
        `state_dir` raises."""
        state = study.sessions if shared else state_dir(study, launcher)
        state.mkdir(exist_ok=True)
        for old in state.glob("session-*"):  # a worker still there takes the missing lock for a free one
            shutil.rmtree(old, ignore_errors=True)
        session = cls(Path(tempfile.mkdtemp(prefix="session-", dir=state)))
        # another machine may see a shared folder under another path
        root = os.path.relpath(study.root, session.root) if shared else str(study.root.resolve())
        write_json(session.root / "session.json", {"study": root, **about})
        session.publish([])
        return session

    def about(self) -> dict[str, Any]:
        """Return the content of session.json. Raises UserError if it is damaged."""
        return dict(read_json(self.root / "session.json", SessionRecord, "run the study's command again"))

    def publish(
        self, runs: Sequence[str], *, barred: Mapping[str, Sequence[str]] | None = None, stop: bool = False
    ) -> None:
        """Publish the runs that workers are to train, in this order. `barred`: run id -> workers that leave
        the run to others. `stop`: whether workers are to end, with a checkpoint of any run in progress."""
        tasks = {"runs": list(runs), "barred": dict(barred or {}), "stop": stop}
        write_json(self.root / "tasks.json", tasks, durable=False)

    def tasks(self) -> dict[str, Any] | None:
        """Return the content of tasks.json, or None if the file is missing or unreadable, as it briefly may
        be on NFS. The same object is returned until the driver publishes again."""
        path = self.root / "tasks.json"
        try:
            which = stamp_of(path.stat())
            if self.read is None or self.read[0] != which:
                self.read = which, dict(read_json(path, Tasks))
            return self.read[1]
        except (OSError, UserError):
            return None

    def note(self, kind: str, worker: str, **about: Any) -> None:
        """Write a worker's record of this kind. NOTES lists the kinds and their fields."""
        write_json(self.root / f"{kind}-{worker}.json", about, durable=False)

    def noted(self, kind: str, worker: str) -> dict[str, Any] | None:
        """Return what `note` wrote last, or None if the file is missing, damaged, or stale on NFS."""
        noted: dict[str, Any] | None = try_read(self.root / f"{kind}-{worker}.json", NOTES[kind])
        return noted

    def notes(self) -> dict[str, dict[str, Any]]:
        """Return the latest `Note` of each worker, by the worker's name."""
        workers = (path.stem.removeprefix("worker-") for path in self.root.glob("worker-*.json"))
        noted = {worker: self.noted("worker", worker) for worker in workers}
        return {worker: note for worker, note in noted.items() if note is not None}

    def forget(self, worker: str) -> None:
        """Remove the note of a worker that has ended."""
        (self.root / f"worker-{worker}.json").unlink(missing_ok=True)

    def guests(self, notes: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Return the workers in `notes` that joined from elsewhere and are alive: each holds its own lock."""
        return [w for w in notes if w.startswith(GUEST) and is_locked(self.root / f"{w}.lock")]

    def log_path(self, worker: str) -> Path:
        """Return the path of the log of a worker that launcher=local or `ebc-lab worker` started."""
        return self.root / f"{worker}.log"

    def nodes_file(self, worker: str) -> Path:
        """Return the path of the file through which a worker commands the other nodes of its job."""
        return self.root / f"nodes-{worker}.json"

    def exit_cause(self, worker: str) -> str:
        """Return a phrase that says how a worker ended, or an empty string if no exit was recorded."""
        noted = self.noted("exit", worker)
        return describe_exit(noted["code"]) if noted else ""


def state_dir(study: Study, launcher: str) -> Path:
    """Return a launcher's private folder for a study, which lies outside the study's own folder. The folder
    is created if it does not exist. Raises UserError if it cannot be created."""
    from platformdirs import user_state_path

    name = f"{study.name}-{hashlib.sha256(str(study.root.resolve()).encode()).hexdigest()[:10]}"
    path = user_state_path("ebc-lab") / launcher / name
    try:
        path.mkdir(parents=True, exist_ok=True)
        for level in (path, path.parent, path.parent.parent):
            level.chmod(0o700)
    except OSError as error:
        remedy = "set XDG_STATE_HOME to a folder you own"
        raise UserError(f"{path} cannot be made ({error.strerror}): {remedy}.") from None
    return path


def sessions_in(study: Study) -> list[Session]:
    """Return the sessions in a study's folder whose driver is alive. There is at most one."""
    sessions = [Session(path.parent) for path in study.sessions.glob("session-*/session.json")]
    return [session for session in sessions if is_locked(session.lock_path)]


def worker_settings(config: Config, *, several_gpus: bool = False) -> dict[str, Any]:
    """Return the items of session.json that depend on the settings and on the version of the code."""
    launcher = config.launcher
    return {
        "checkpoint_every_s": launcher.checkpoint_every_s,
        "beat_s": launcher.heartbeat_s / 10,
        "code": code_to_match(),
        "processes_per_run": launcher.processes_per_run,
        "nodes_per_run": launcher.nodes_per_run,
        "several_gpus": several_gpus,
    }


def code_to_match() -> dict[str, Any]:
    """Return the versions of the installed code that all workers of a session must share."""
    software = {k: v for k, v in attempts.code_here().items() if k != "python"}
    return {**software, "git": git_revision()}


def describe_exit(code: int) -> str:
    """Return a phrase that says how a process ended. `code`: the exit code as Popen reports it."""
    if code >= 0:
        return f"it ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (as the system does when memory runs out)" if -code == signal.SIGKILL else ""
    return f"killed by {name}{hint}"
