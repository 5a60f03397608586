"""`ebc-lab cancel`: stop whatever works on a study, wherever it runs, and leave no job behind. The study itself stays."""

from __future__ import annotations

import time
from typing import Any

from ..config import UserError, digest
from ..telemetry import read_json, write_sealed
from . import attempts
from .guards import cancel_mark
from .launch import Say, WorkersFailed
from .session import Session
from .store import Study

DRIVER_S = 45.0  # for a driver to close its workers
POLL_S = 0.2


def cancel(study: Study, say: Say) -> dict[str, Any]:
    """End the driver, its workers and its Slurm jobs; runs that were under way are recorded as `cancelled`.

    They are tried again, from their checkpoints, by the command that began the study. Raises UserError: no study, a driver
    that does not answer, a queue that cannot be asked.
    """
    from . import slurm

    study.header()
    holder = study.holder()
    if holder is not None:
        say(f"asking process {holder.get('pid', '?')} on {holder.get('host', '?')} to end …")
        cancel_mark(study).touch()
        deadline = time.monotonic() + DRIVER_S
        while study.holder() is not None:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process {holder.get('pid', '?')} on {holder.get('host', '?')} still holds study {study.name}: kill it "
                    "(its workers end by themselves), then cancel again."
                )
            time.sleep(POLL_S)
    jobs = 0
    for session in Session.of(study, "slurm"):
        try:
            jobs += slurm.dismiss(session, say)
        except (slurm.QueueSilent, WorkersFailed) as error:
            raise UserError(f"the jobs named {slurm.job_name(session)} cannot be ended: {error}") from None
    with study.held():
        runs = _record(study)
        cancel_mark(study).unlink(missing_ok=True)
    return {"study": study.name, "driver": holder, "jobs": jobs, "runs": runs}


def _record(study: Study) -> list[str]:
    """Give every run that was begun and has no result the outcome `cancelled`. -> their ids."""
    runs = []
    for path in sorted(study.runs.glob(f"*/{attempts.FILE}")):
        directory = path.parent
        if (directory / "result.json").exists():
            continue
        spec = read_json(directory / "spec.json")
        now = study.progress(directory.name) or {}
        result = {"run_id": directory.name, "identity": digest(spec["identity"]), "outcome": "cancelled"}
        write_sealed(directory / "result.json", {**result, "cause": "ebc-lab cancel", "steps": now.get("step", 0)})
        attempts.note(directory, "cancelled")
        (directory / "progress.json").unlink(missing_ok=True)
        runs.append(directory.name)
    return runs
