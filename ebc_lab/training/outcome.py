"""One run trained to an outcome in its result.json: `completed`, `diverged`, `oom` or `failed`."""

from __future__ import annotations

import errno
import time
import traceback
from pathlib import Path
from typing import Any

from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest, identity
from ebc_lab.config.schema import RunConfig
from ebc_lab.records.json_files import read_checksummed, write_checksummed
from ebc_lab.records.paths import RunFiles

from .result import is_device_failure, is_oom, is_own_fault
from .run import Training
from .turns import DeviceFailed, Interrupted, Progress, to_the_end

STORAGE_ERRORS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.ESTALE, errno.EDQUOT)


def run_and_record(run: RunConfig, directory: Path, run_id: str, **hooks: Any) -> dict[str, Any]:
    """`recorded_run` without yielding to other runs."""
    return to_the_end(recorded_run(run, directory, run_id, **hooks))


def recorded_run(run: RunConfig, directory: Path, run_id: str, **hooks: Any) -> Progress:
    """Train one run to an outcome and write its result.json; if that is already there, return it as it is.

    A generator that yields between blocks of steps, so that one process can train several runs in turn.
    `hooks` go to `Training.blocks`. A crash of the run is its outcome, with a traceback in log.txt.

    Raises:
        Interrupted: it was asked to stop; its checkpoint is written.
        UserError: the folder holds another run or a damaged file, which is left as it is.
        OSError: the folder cannot be written.
        DeviceFailed: the GPU failed; there is a result only if the run's own code caused it.
    """
    files = RunFiles(directory)
    name = digest(identity(run))
    if files.result.exists():
        return _earlier_result(files, name)
    directory.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    _log(files, f"{run_id} begins or resumes")
    device_error: str | None = None
    try:
        result = yield from Training(run, directory).blocks(**hooks)
    except (Interrupted, KeyboardInterrupt, UserError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
            raise
        with open(files.log, "a") as log:
            log.write(traceback.format_exc())
        cause = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        if is_device_failure(error):
            if not is_own_fault(cause):
                raise DeviceFailed(cause) from error
            device_error = cause
        outcome = "oom" if is_oom(error) else "failed"
        result = {"outcome": outcome, "cause": cause, "steps": 0, "wall_s": time.perf_counter() - started}
    result = {"run_id": run_id, "identity": name, **result}
    write_checksummed(files.result, result)
    if result["outcome"] in ("completed", "diverged"):
        files.checkpoint.unlink(missing_ok=True)
    _log(files, f"{result['outcome']} {result.get('cause') or ''}")
    if device_error:  # no other run can be trained in this process any more
        raise DeviceFailed(device_error)
    return result


def _earlier_result(files: RunFiles, name: str) -> dict[str, Any]:
    found = read_checksummed(
        files.result, f"delete {files.directory}, and the same command trains the run again"
    )
    if found.get("identity") != name:
        raise UserError(f"{files.result} is another run's result: choose another folder, or delete this one.")
    return found


def _log(files: RunFiles, text: str) -> None:
    with open(files.log, "a") as log:
        log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}\n")
