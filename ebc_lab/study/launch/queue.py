"""A study's Slurm jobs: find them in the queue, read their states, and stop them.

All jobs of a study share one name, by which a single `squeue` lists them; no accounting is needed. The study
records this name and the session's folder, so any later process finds the jobs. The jobs and their driver
communicate through that folder.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypedDict

from ebc_lab.config.errors import UserError, require
from ebc_lab.records.json_files import read_json, write_json

from ..store.study import Study
from .session import Session

PATIENCE_S = 60.0  # for one answer from Slurm
SOFT_S = 20.0  # time for workers to stop before their jobs are cancelled
HARD_S = 300.0  # time for all jobs to end
LOOK_S = 2.0  # between two reads of the queue while jobs end
GONE_S = 60.0  # until a job that the queue does not show, or shows as COMPLETING, counts as over
PROGRAMS = ("srun", "sbatch", "squeue", "scancel", "sinfo")  # those that we and submitit call
USER = f"--user={os.getuid()}"
# lists all of this user's jobs that Slurm still knows
SQUEUE = ("squeue", "--noheader", "--array", "--states=all", USER, "--format=%F|%K|%T|%r")
JOB_LINE = re.compile(r"(\d+)\|([^|]*)\|([A-Z_]+)\|(.*)")  # one line of SQUEUE's output
NO_ANSWER = "slurm_load_jobs error"  # in squeue's message when Slurm's controller does not answer
ENDING = "COMPLETING"
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
LIVE = (*WAITING, "RUNNING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT", ENDING)


class LauncherRecord(TypedDict):
    """The content of .launcher.json, which lets later processes find a study's jobs."""

    session: str  # the folder through which the jobs and their driver communicate
    name: str  # of the jobs
    host: str  # where the driver ran that began the session


class QueueUnavailable(Exception):
    """Slurm gave no usable answer; the message says why."""


class Job(NamedTuple):
    """One task of a job array, as the queue shows it."""

    state: str  # Slurm's: PENDING, RUNNING, COMPLETED, CANCELLED …
    reason: str

    @property
    def live(self) -> bool:
        """Return whether the job is waiting, running or ending."""
        return self.state in LIVE


Answer = tuple[float, dict[str, Job]]  # in queue.json: time of the query (s since the epoch), job key -> job


def run_slurm(*command: str) -> str:
    """Return what a Slurm command writes to stdout. Raises QueueUnavailable if the command fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PATIENCE_S, check=False
        )
    except FileNotFoundError:
        raise QueueUnavailable(f"`{command[0]}` not found") from None
    except subprocess.TimeoutExpired:
        raise QueueUnavailable(f"{command[0]} takes longer than {PATIENCE_S:g} s") from None
    whole = f"{done.stdout}\n{done.stderr}"
    if done.returncode or (NO_ANSWER in whole and not parse_squeue(done.stdout)):
        lines = [line for line in whole.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()]  # a site may print notices of its own
        raise QueueUnavailable((errors or lines or [f"{command[0]} fails without a message"])[-1].strip())
    return done.stdout


def refuse_without_slurm(instead: str) -> None:
    """Raise UserError if one of Slurm's programs is missing here, or if Slurm does not answer. `instead`: the
    setting that does without Slurm."""
    elsewhere = f"use {instead}, or run this on a login node"
    for program in PROGRAMS:
        require(shutil.which(program) is not None, f"`{program}` not found; {elsewhere}.")
    try:
        run_slurm("sinfo", "--noheader")
    except QueueUnavailable as error:
        raise UserError(f"Slurm does not answer here ({error}); {elsewhere}.") from None


def jobs_named(name: str) -> dict[str, Job]:
    """Return all jobs of this name, by key (`<array>_<task>`). Raises QueueUnavailable."""
    return parse_squeue(run_slurm(*SQUEUE, f"--name={name}"))


def parse_squeue(text: str) -> dict[str, Job]:
    """Return the jobs in the output of SQUEUE, by key. Slurm's warnings and a site's notices are skipped."""
    jobs = {}
    for line in text.splitlines():
        if job := JOB_LINE.fullmatch(line.strip()):
            array, task, state, reason = job.groups()
            jobs[f"{array}_{task}" if task.isdigit() else array] = Job(state, reason)
    return jobs


def scancel(name: str, *options: str) -> None:
    """Cancel the jobs of this name that match `options` (all without options). Raises QueueUnavailable."""
    run_slurm("scancel", USER, f"--name={name}", *options)


def job_name(session: Session) -> str:
    """Return the name of a session's jobs, made from the study's name and the session's unique token."""
    study = Path(session.about()["study"]).name
    return f"ebc-{study[:40]}-{session.root.name.removeprefix('session-')}"


def session_of(study: Study) -> Session | None:
    """Return the session for which a study's jobs were submitted, or None if the study records no jobs.
    Raises UserError if the session's folder does not exist on this machine."""
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
    """Return all jobs of a session, by key. Slurm's last answer is kept in the session's folder, so that all
    processes together ask Slurm at most once every `every_s` seconds. Raises QueueUnavailable."""
    path = session.root / "queue.json"
    try:
        asked, jobs = read_json(path, Answer)
        if abs(time.time() - asked) < every_s:
            return {key: Job(*seen) for key, seen in jobs.items()}
    except (OSError, UserError):
        pass
    jobs = jobs_named(job_name(session))
    with suppress(OSError):  # without the file, Slurm is only asked again sooner
        write_json(path, [time.time(), jobs], durable=False)
    return jobs


def stop_jobs(session: Session) -> tuple[int, list[str]]:
    """Stop a session's jobs and wait until they are gone. The workers are first told to stop; jobs that
    remain after SOFT_S seconds are cancelled. Returns how many jobs there were, and the keys of those still
    in the queue when the wait ends. Raises QueueUnavailable."""

    def live() -> dict[str, Job]:
        return {key: job for key, job in jobs_named(name).items() if job.live}

    name = job_name(session)
    session.publish([], stop=True)
    first = live()
    if not first:
        return 0, []
    scancel(name, "--state=PENDING")
    begun, hard = time.monotonic(), False
    while left := live():
        waited_s = time.monotonic() - begun
        if waited_s > SOFT_S and not hard:
            scancel(name)
            hard = True
        ending = all(job.state == ENDING for job in left.values())
        if waited_s > HARD_S or (waited_s > 2 * SOFT_S and ending):
            return len(first), sorted(left)
        time.sleep(LOOK_S)
    return len(first), []
