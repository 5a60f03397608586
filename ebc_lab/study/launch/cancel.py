"""`ebc-lab cancel`: stop a study's driver, workers and Slurm jobs, wherever they run."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest
from ebc_lab.records.json_files import read_json
from ebc_lab.records.locks import run_lock
from ebc_lab.records.paths import RunFiles, SpecRecord

from ..store import attempts
from ..store.study import Study
from . import queue
from .pool import Say
from .worker import GRACE_S

DRIVER_S = 180.0  # time for a driver to close its workers, or to finish drawing or measuring
POLL_S = 0.2


def cancel(study: Study, say: Say) -> dict[str, Any]:
    """Stop a study's driver, workers and Slurm jobs, and record the study's unfinished runs as `cancelled`.

    Returns `study` (the study's name), `driver` (the driver's process, or None if there was no driver),
    `jobs` (the number of Slurm jobs) and `runs` (the ids of the cancelled runs). The command that began the
    study resumes these runs from their checkpoints. Raises UserError if there is no study, if the driver or a
    worker does not respond, or if the Slurm jobs cannot be ended.
    """
    study.header()
    if not study.resumable:
        raise UserError(f"{study.place} is a bundle, in which nothing runs: cancel the study that it is of.")
    study.must_be_ours()
    holder = study.holder()
    if holder is not None:
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        say(f"asking {who} to end …")
        study.cancel_mark.touch()
        deadline = time.monotonic() + DRIVER_S
        while study.holder() is not None:
            if time.monotonic() > deadline:
                remedy = (
                    "kill it, then cancel again, which ends its Slurm jobs; local workers end by themselves"
                )
                raise UserError(f"{who} still holds study {study.name}: {remedy}.")
            time.sleep(POLL_S)
    jobs, left = 0, list[str]()
    if session := queue.session_of(study):
        try:
            jobs, left = queue.stop_jobs(session)
        except queue.QueueUnavailable as error:
            name = queue.job_name(session)
            remedy = "cancel again where Slurm answers, on a login node"
            raise UserError(f"the jobs named {name} cannot be ended ({error}): {remedy}.") from None
    if left:
        remedy = "see squeue, and cancel again later"
        raise UserError(f"Slurm still shows {', '.join(left)}, though cancelled: {remedy}.")
    with study.held():
        runs = []
        for files in study.all_runs():
            if files.attempts.exists() and not files.result.exists() and _cancel_run(study, files):
                runs.append(files.directory.name)
        study.launcher_file.unlink(missing_ok=True)
        study.cancel_mark.unlink(missing_ok=True)
    return {"study": study.name, "driver": holder, "jobs": jobs, "runs": runs}


def _cancel_run(study: Study, files: RunFiles) -> bool:
    """Record a run as cancelled once no worker holds the run's lock. Return True, or False if the run has a
    result by then. Raises UserError if a worker keeps the lock too long."""
    deadline = time.monotonic() + GRACE_S + DRIVER_S / 2
    while True:
        with run_lock(files.directory) as mine:
            if files.result.exists():
                return False
            if mine:
                identity = None
                with suppress(OSError, UserError):  # its spec may be unreadable
                    identity = digest(read_json(files.spec, SpecRecord)["identity"])
                steps = (study.progress(files.directory.name) or {}).get("step", 0)
                attempts.give_up(files, "cancelled", "ebc-lab cancel", identity, steps)
                attempts.note(files.directory, "cancelled")
                files.progress.unlink(missing_ok=True)
                return True
        if time.monotonic() > deadline:
            where = f"see {files.attempts} for where, and end it"
            raise UserError(f"a worker still trains in {files.directory}: {where}.")
        time.sleep(POLL_S)
