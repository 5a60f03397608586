"""`ebc-lab cancel`: stop whatever works on a study, wherever it runs, and leave no job behind. The study itself stays."""

from __future__ import annotations

import time
from typing import Any

from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest
from ebc_lab.records.json_files import read_json, write_checksummed
from ebc_lab.records.locks import run_lock
from ebc_lab.records.paths import RunFiles

from ..store import attempts
from ..store.study import Study
from . import queue
from .pool import Say
from .worker import GRACE_S

DRIVER_S = 180.0  # for a driver to close its workers, or to come back from drawing and measuring
POLL_S = 0.2


def cancel(study: Study, say: Say) -> dict[str, Any]:
    """End the driver, its workers and its Slurm jobs; runs that were under way are recorded as `cancelled`.

    They are tried again, from their checkpoints, by the command that began the study. Raises UserError: no study, a driver
    that does not answer, a queue that cannot be asked.
    """
    study.header()
    holder = study.holder()
    if holder is not None:
        say(f"asking process {holder.get('pid', '?')} on {holder.get('host', '?')} to end …")
        study.cancel_mark.touch()
        deadline = time.monotonic() + DRIVER_S
        while study.holder() is not None:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process {holder.get('pid', '?')} on {holder.get('host', '?')} still holds study {study.name}: kill it, "
                    "then cancel again, which ends its Slurm jobs; workers on its own machine end by themselves."
                )
            time.sleep(POLL_S)
    ended, session = 0, queue.session_of(study)
    if session is not None:
        try:
            ended, left = queue.dismiss(session)
        except queue.QueueSilent as error:
            raise UserError(
                f"the jobs named {queue.job_name(session)} cannot be ended ({error}): try again."
            ) from None
        if left:
            raise UserError(
                f"Slurm still shows {', '.join(left)}, though cancelled: look with squeue, and cancel again later."
            )
    with study.held():
        runs = _record(study)
        queue.forget(study)
        study.cancel_mark.unlink(missing_ok=True)
    return {"study": study.name, "driver": holder, "jobs": ended, "runs": runs}


def _record(study: Study) -> list[str]:
    """Give every run that was begun and has no result the outcome `cancelled`. -> their ids."""
    runs = []
    for files in study.all_runs():
        if files.attempts.exists() and not files.result.exists() and _give_up(study, files):
            runs.append(files.directory.name)
    return runs


def _give_up(study: Study, files: RunFiles) -> bool:
    """Record one run as cancelled, unless it has a result; waits for a worker that is writing its last checkpoint.

    Raises UserError when the worker does not let go.
    """
    directory = files.directory
    deadline = time.monotonic() + GRACE_S + DRIVER_S / 2
    while True:
        with run_lock(directory) as mine:
            if files.result.exists():
                return False
            if mine:
                spec, now = read_json(files.spec), study.progress(directory.name) or {}
                about = {
                    "run_id": directory.name,
                    "identity": digest(spec["identity"]),
                    "outcome": "cancelled",
                }
                write_checksummed(
                    files.result,
                    {**about, "cause": "ebc-lab cancel", "steps": now.get("step", 0)},
                )
                attempts.note(directory, "cancelled")
                files.progress.unlink(missing_ok=True)
                return True
        if time.monotonic() > deadline:
            raise UserError(
                f"a worker still trains in {directory}: see {files.attempts} for where, and end it."
            )
        time.sleep(POLL_S)
