"""A study's Slurm jobs as the queue shows them: which they are, where they stand, how to end them.

The queue is asked by name, one `squeue` for all jobs of a study; no accounting is needed. Which name, and in which folder the
jobs and their driver meet, stands in the study itself, so that whoever comes later, on whichever machine, finds them.
"""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebc_lab.config.errors import UserError
from ebc_lab.records.json_files import read_json, write_json

from ..store.study import Study
from .session import Session

PATIENCE_S = 60.0  # for one answer of Slurm's
SOFT_S = 20.0  # for workers that are told to stop, before their jobs are cancelled
HARD_S = 300.0  # for cancelled jobs to end
LOOK_S = 2.0  # between two looks while they do
ENDING = "COMPLETING"
LIVE = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    ENDING,
    "SUSPENDED",
    "STOPPED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SPECIAL_EXIT",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
)


class QueueSilent(Exception):
    """Slurm did not answer; says what it said."""


@dataclass(frozen=True)
class Job:
    """One array task as the queue shows it."""

    state: str  # Slurm's: PENDING, RUNNING, COMPLETED, CANCELLED …
    reason: str

    @property
    def live(self) -> bool:
        return self.state in LIVE


def _ask(*command: str) -> str:
    """What a command of Slurm's says. Raises QueueSilent."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    except FileNotFoundError:
        raise QueueSilent(f"there is no {command[0]} on this machine") from None
    except subprocess.TimeoutExpired:
        raise QueueSilent(f"{command[0]} takes longer than {PATIENCE_S:g} s") from None
    if done.returncode:
        raise QueueSilent((done.stderr.strip().splitlines() or [f"{command[0]} fails without a word"])[-1])
    return done.stdout


def queue(name: str) -> dict[str, Job]:
    """Job key (`<array>_<task>`) -> the job, of all with this name that Slurm still knows. Raises QueueSilent."""
    return listed(_ask(*squeue(), f"--name={name}"))


def squeue() -> list[str]:
    """The command whose answer `listed` reads: all of this user's jobs that Slurm still knows."""
    return [
        "squeue",
        "--noheader",
        "--array",
        "--states=all",
        f"--user={os.getuid()}",
        "--format=%F|%K|%T|%r",
    ]


def listed(text: str) -> dict[str, Job]:
    """Job key -> the job, from what `squeue` says."""
    found = {}
    for line in text.splitlines():
        array, task, state, reason = line.split("|", 3)
        found[f"{array}_{task}" if task.isdigit() else array] = Job(state, reason)
    return found


def scancel(name: str, *options: str) -> None:
    """Cancel every job of this name (and, with `--state=PENDING`, in this state). Raises QueueSilent."""
    _ask("scancel", f"--user={os.getuid()}", f"--name={name}", *options)


def scancel_one(key: str) -> None:
    """Cancel one array task. Raises QueueSilent."""
    _ask("scancel", key)


def job_name(session: Session) -> str:
    """What a session's jobs are called: the study, and the session's own token, which no other cluster's job can have."""
    study = Path(session.about()["study"]).name
    return f"ebc-{study[:40]}-{session.root.name.removeprefix('session-')}"


def remember(study: Study, session: Session) -> None:
    """Write into the study where its jobs and their driver meet."""
    about = {"session": str(session.root), "name": job_name(session), "host": os.uname().nodename}
    write_json(study.launcher_file, about)


def forget(study: Study) -> None:
    """No job of the study is left."""
    study.launcher_file.unlink(missing_ok=True)


def session_of(study: Study) -> Session | None:
    """Where the study's jobs and their driver meet; None when it has none. Raises UserError where that is not to be seen."""
    path = study.launcher_file
    if not path.exists():
        return None
    known = read_json(path)
    session = Session(Path(known["session"]))
    if not (session.root / "session.json").exists():
        raise UserError(
            f"the Slurm jobs of study {study.name} are called {known['name']} and were begun on {known['host']} with the state "
            f"folder {session.root}, which is not to be seen here: go there, or set XDG_STATE_HOME as it was; once `squeue "
            f"--name={known['name']}` shows none, delete {path}."
        )
    return session


def looked_up(session: Session, every_s: float) -> dict[str, Job]:
    """`queue`, but no oftener than `every_s`, whoever asks: the last answer lies in the session. Raises QueueSilent."""
    path = session.root / "queue.json"
    try:
        last = read_json(path)
        if abs(time.time() - last["at"]) < every_s:
            return {k: Job(*v) for k, v in last["jobs"].items()}
    except (OSError, UserError):
        pass
    found = queue(job_name(session))
    with suppress(OSError):  # then it is asked again sooner, that is all
        write_json(
            path,
            {"at": time.time(), "jobs": {k: [j.state, j.reason] for k, j in found.items()}},
            durable=False,
        )
    return found


def dismiss(session: Session) -> tuple[int, list[str]]:
    """Stop a session's jobs and see them gone: softly, then with scancel. -> how many there were, and the keys of those
    that Slurm still shows after minutes. Raises QueueSilent."""
    name = job_name(session)
    session.publish([], closed=True, stop=True)
    first = _live(name)
    if not first:
        return 0, []
    scancel(name, "--state=PENDING")
    begun, hard = time.monotonic(), False
    while left := _live(name):
        waited = time.monotonic() - begun
        if waited > SOFT_S and not hard:
            scancel(name)
            hard = True
        if waited > HARD_S or (waited > 2 * SOFT_S and all(state == ENDING for state in left.values())):
            return len(first), sorted(left)
        time.sleep(LOOK_S)
    return len(first), []


def _live(name: str) -> dict[str, Any]:
    return {key: job.state for key, job in queue(name).items() if job.live}
