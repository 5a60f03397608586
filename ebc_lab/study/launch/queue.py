"""A study's Slurm jobs as the queue shows them: which they are, what state they are in, how to end them.

The queue is asked by name, one `squeue` for all jobs of a study; no accounting is needed. The study records
that name, and the folder through which its jobs and their driver communicate, so that any later process finds
them.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from ebc_lab.config.errors import UserError
from ebc_lab.records.json_files import read_json, write_json

from ..store.study import Study
from .session import Session

PATIENCE_S = 60.0  # for one answer from Slurm
SOFT_S = 20.0  # for workers that are told to stop, before their jobs are cancelled
HARD_S = 300.0  # for cancelled jobs to end
LOOK_S = 2.0  # between two reads of the queue meanwhile
JOB_LINE = re.compile(r"(\d+)\|([^|]*)\|([A-Z_]+)\|(.*)")  # of `squeue_command`
NO_ANSWER = "slurm_load_jobs error"  # how squeue begins when the controller has told it nothing
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


class LauncherRecord(TypedDict):
    """What .launcher.json holds: where a study's jobs and their driver communicate."""

    session: str
    name: str
    host: str


class QueueRecord(TypedDict):
    """What queue.json holds: Slurm's last answer, job key -> state and reason, and when it came."""

    at: float
    jobs: dict[str, list[str]]


class QueueUnavailable(Exception):
    """Slurm did not answer; the message is what it said."""


@dataclass(frozen=True)
class Job:
    """One array task as the queue shows it."""

    state: str  # Slurm's: PENDING, RUNNING, COMPLETED, CANCELLED …
    reason: str

    @property
    def live(self) -> bool:
        return self.state in LIVE


def run_slurm(*command: str) -> str:
    """Return the output of a Slurm command. Raises QueueUnavailable."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PATIENCE_S, check=False
        )
    except FileNotFoundError:
        raise QueueUnavailable(f"there is no {command[0]} on this machine") from None
    except subprocess.TimeoutExpired:
        raise QueueUnavailable(f"{command[0]} takes longer than {PATIENCE_S:g} s") from None
    whole = f"{done.stdout}\n{done.stderr}"
    if done.returncode or (NO_ANSWER in whole and not parse_squeue(done.stdout)):
        told = [line for line in whole.splitlines() if line.strip()]
        errors = [line for line in told if "error" in line.lower()]  # beside a site's own notices
        raise QueueUnavailable((errors or told or [f"{command[0]} fails without a message"])[-1].strip())
    return done.stdout


def jobs_named(name: str) -> dict[str, Job]:
    """Return job key (`<array>_<task>`) -> job, of all jobs with this name that Slurm still knows. Raises
    QueueUnavailable."""
    return parse_squeue(run_slurm(*squeue_command(), f"--name={name}"))


def squeue_command() -> list[str]:
    """Return the command that lists all of this user's jobs that Slurm still knows, for `parse_squeue`."""
    return [
        "squeue",
        "--noheader",
        "--array",
        "--states=all",
        f"--user={os.getuid()}",
        "--format=%F|%K|%T|%r",
    ]


def parse_squeue(text: str) -> dict[str, Job]:
    """Return job key -> job, from the output of `squeue_command`; Slurm's warnings and a site's notices in it
    are left out."""
    jobs = {}
    for line in text.splitlines():
        if job := JOB_LINE.fullmatch(line.strip()):
            array, task, state, reason = job.groups()
            jobs[f"{array}_{task}" if task.isdigit() else array] = Job(state, reason)
    return jobs


def scancel(name: str, *options: str) -> None:
    """Cancel every job of this name (and, with `--state=PENDING`, in this state). Raises QueueUnavailable."""
    run_slurm("scancel", f"--user={os.getuid()}", f"--name={name}", *options)


def job_name(session: Session) -> str:
    """Return the name of a session's jobs: the study's, and a token of the session that no other job has."""
    study = Path(session.about()["study"]).name
    return f"ebc-{study[:40]}-{session.root.name.removeprefix('session-')}"


def remember(study: Study, session: Session) -> None:
    """Record in the study where its jobs and their driver communicate."""
    about = {"session": str(session.root), "name": job_name(session), "host": os.uname().nodename}
    write_json(study.launcher_file, about)


def forget(study: Study) -> None:
    """Note that no job of the study is left."""
    study.launcher_file.unlink(missing_ok=True)


def session_of(study: Study) -> Session | None:
    """Return where the study's jobs and their driver communicate, or None without jobs. Raises UserError
    where that folder is out of reach."""
    path = study.launcher_file
    if not path.exists():
        return None
    remedy = "once squeue shows none of the study's jobs, delete it"
    known = read_json(path, LauncherRecord, remedy)
    session = Session(Path(known["session"]))
    if not (session.root / "session.json").exists():
        raise UserError(
            f"the Slurm jobs of study {study.name}, named {known['name']}, were started on {known['host']} "
            f"with the state folder {session.root}, which does not exist here: go there, or set "
            f"XDG_STATE_HOME as it was then; once `squeue --name={known['name']}` shows none, delete {path}."
        )
    return session


def cached_jobs(session: Session, every_s: float) -> dict[str, Job]:
    """Return a session's jobs, asking Slurm at most once every `every_s` seconds over all processes: its last
    answer is kept in the session. Raises QueueUnavailable."""
    path = session.root / "queue.json"
    try:
        last = read_json(path, QueueRecord)
        if abs(time.time() - last["at"]) < every_s:
            return {k: Job(*v) for k, v in last["jobs"].items()}
    except (OSError, UserError, TypeError):  # TypeError: more or fewer than two texts
        pass
    jobs = jobs_named(job_name(session))
    answer = {"at": time.time(), "jobs": {k: [j.state, j.reason] for k, j in jobs.items()}}
    with suppress(OSError):  # then Slurm is only asked again sooner
        write_json(path, answer, durable=False)
    return jobs


def stop_jobs(session: Session) -> tuple[int, list[str]]:
    """Stop a session's jobs and wait until they are gone: ask the workers first, then cancel.

    Returns how many there were, and the keys of those that Slurm still shows after minutes. Raises
    QueueUnavailable.
    """
    name = job_name(session)
    session.publish([], stop=True)
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


def _live(name: str) -> dict[str, str]:
    """Return key -> state of the jobs of this name that are not over."""
    return {key: job.state for key, job in jobs_named(name).items() if job.live}
