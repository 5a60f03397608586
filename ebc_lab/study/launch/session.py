"""Where a driver and its workers communicate: a private folder outside the study, read and written as JSON.

`session.json` says where the study is and how workers behave, `tasks.json` which runs to train, in order, and
`worker-<name>.json` which of them a worker is on. Results never travel through it. The folder lies in the
user's state directory with mode 0700, because submitit's pickles are beside it; with `launcher.join`, which
is not for Slurm, it lies in the study's folder, where workers of other machines find it.
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

from ebc_lab import __version__
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import NUMERICS_VERSION
from ebc_lab.config.machine import git_revision, versions
from ebc_lab.config.schema import Config
from ebc_lab.records.files import stamp_of
from ebc_lab.records.json_files import read_json, write_json
from ebc_lab.records.locks import is_locked

from ..store.study import Study

GUEST = "guest-"  # how the names of workers begin that no driver started


class SessionRecord(TypedDict):
    """What session.json holds."""

    study: str
    bound: bool
    idle_s: float | None
    checkpoint_every_s: float
    beat_s: float
    processes_per_run: int
    nodes_per_run: NotRequired[int]
    several_gpus: bool
    code: dict[str, Any]
    device: NotRequired[str]  # of a session that can be joined, like `env`
    env: NotRequired[dict[str, str]]


class Tasks(TypedDict):
    """What tasks.json holds: see `Session.publish`."""

    runs: list[str]
    barred: dict[str, list[str]]
    stop: bool


class Note(TypedDict, total=False):
    """What a worker says of itself, beside what it sees of the machine."""

    run_id: str | None  # of the run in progress
    ran: int  # how many it has begun, this one included
    started: bool
    beat: float
    host: str
    cause: str
    device_failed: bool
    error: str


class ProcessRecord(TypedDict):
    """Which process a worker is: another one than before where Slurm starts its job again."""

    pid: int
    host: str


class ExitRecord(TypedDict):
    """How a worker has ended, for a driver that did not start it."""

    code: int  # as Popen has it


NOTES = {"worker": Note, "process": ProcessRecord, "exit": ExitRecord}  # what <kind>-<worker>.json holds


class Session:
    """The folder of one driver and its workers."""

    def __init__(self, root: Path):
        self.root = root
        self.lock_path = root / "driver.lock"
        # which tasks.json was read last, and what it said
        self.read: tuple[tuple[int, ...], dict[str, Any]] | None = None

    @classmethod
    def begin(cls, study: Study, launcher: str, *, shared: bool = False, **about: Any) -> Session:
        """Make a session, remove those that earlier drivers left behind, and return it. `shared`: in the
        study's own folder, for workers that see no other."""
        state = study.sessions if shared else state_dir(study, launcher)
        state.mkdir(exist_ok=True)
        for old in state.glob("session-*"):  # a worker still in one takes its vanished lock for a free one
            shutil.rmtree(old, ignore_errors=True)
        session = cls(Path(tempfile.mkdtemp(prefix="session-", dir=state)))
        # another machine may see the folder under another path
        root = os.path.relpath(study.root, session.root) if shared else str(study.root.resolve())
        write_json(session.root / "session.json", {"study": root, **about})
        session.publish([])
        return session

    def about(self) -> dict[str, Any]:
        """Return what session.json says. Raises UserError where it is damaged."""
        return dict(read_json(self.root / "session.json", SessionRecord, "run the study's command again"))

    def publish(
        self, runs: Sequence[str], *, barred: Mapping[str, Sequence[str]] | None = None, stop: bool = False
    ) -> None:
        """Publish what workers are to train, in this order. `barred`: by run under which a GPU has
        failed, the workers that leave it to others; `stop`: end, with a checkpoint of the run in progress."""
        tasks = {"runs": list(runs), "barred": dict(barred or {}), "stop": stop}
        write_json(self.root / "tasks.json", tasks, durable=False)

    def tasks(self) -> dict[str, Any] | None:
        """Return what is to be trained, the same object until the driver publishes again; None while it
        cannot be read: gone, or on NFS briefly stale."""
        path = self.root / "tasks.json"
        try:
            which = stamp_of(path.stat())
            if self.read is None or self.read[0] != which:
                self.read = which, dict(read_json(path, Tasks))
            return self.read[1]
        except (OSError, UserError):
            return None

    def note(self, kind: str, worker: str, **about: Any) -> None:
        """Write what is to be known of a worker, in the form that NOTES has for this kind."""
        write_json(self.root / f"{kind}-{worker}.json", about, durable=False)

    def noted(self, kind: str, worker: str) -> dict[str, Any] | None:
        """Return what `note` wrote last; None where there is nothing, or on NFS only a stale file."""
        try:
            return dict(read_json(self.root / f"{kind}-{worker}.json", NOTES[kind]))
        except (OSError, UserError):
            return None

    def notes(self) -> dict[str, dict[str, Any]]:
        """Return worker -> its last `Note`."""
        workers = (path.stem.removeprefix("worker-") for path in self.root.glob("worker-*.json"))
        noted = {worker: self.noted("worker", worker) for worker in workers}
        return {worker: note for worker, note in noted.items() if note is not None}

    def forget(self, worker: str) -> None:
        """Remove the note of a worker that has ended."""
        (self.root / f"worker-{worker}.json").unlink(missing_ok=True)

    def guests(self, notes: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Return the workers that joined from elsewhere and are there, each under the lock that it holds."""
        return [w for w in notes if w.startswith(GUEST) and is_locked(self.root / f"{w}.lock")]

    def log_path(self, worker: str) -> Path:
        """Return the log of a worker that a process of this machine started."""
        return self.root / f"{worker}.log"

    def nodes_file(self, worker: str) -> Path:
        """Return the file that the other nodes of a worker's job read."""
        return self.root / f"nodes-{worker}.json"

    def exit_cause(self, worker: str) -> str:
        """Return in words how a worker ended; empty where the process that started it left no note."""
        noted = self.noted("exit", worker)
        return describe_exit(noted["code"]) if noted else ""


def state_dir(study: Study, launcher: str) -> Path:
    """Return a private folder for a study's launcher, outside the study. Raises UserError if it cannot be
    made."""
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
    """Return the sessions in a study's folder whose driver lives: one, or none."""
    there = [Session(path.parent) for path in study.sessions.glob("session-*/session.json")]
    return [session for session in there if is_locked(session.lock_path)]


def worker_settings(config: Config, *, several_gpus: bool = False) -> dict[str, Any]:
    """Return what session.json tells every worker: how it behaves, and which version of the code is meant."""
    launcher = config.launcher
    return {
        "checkpoint_every_s": launcher.checkpoint_every_s,
        "beat_s": launcher.heartbeat_s / 10,
        "code": code_here(),
        "processes_per_run": launcher.processes_per_run,
        "nodes_per_run": launcher.nodes_per_run,
        "several_gpus": several_gpus,
    }


def code_here() -> dict[str, Any]:
    """Return which version of the code this is, as far as it can change numbers."""
    torch, git = versions()["torch"], git_revision()
    return {"ebc_lab": __version__, "git": git, "torch": torch, "numerics_version": NUMERICS_VERSION}


def describe_exit(code: int) -> str:
    """Return in words how a process ended, from its exit code as Popen reports it."""
    if code >= 0:
        return f"it ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " (as the system does when memory runs out)" if -code == signal.SIGKILL else ""
    return f"killed by {name}{hint}"
