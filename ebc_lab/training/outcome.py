"""One run carried to an outcome: `completed`, `diverged`, `oom` or `failed`, in its `result.json` (DESIGN: the study)."""

from __future__ import annotations

import errno
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest, identity
from ebc_lab.config.schema import RunConfig
from ebc_lab.records.json_files import read_checksummed, write_checksummed
from ebc_lab.records.paths import RunFiles

from .run import Interrupted, Progress, Training, to_the_end


class DeviceFailed(Exception):
    """The GPU under a run is gone or broken; says how. Another process may carry the run on."""


STORAGE_ERRORS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.ESTALE, errno.EDQUOT)
OWN_FAULT = (
    "device-side assert",
    "illegal memory access",
    "misaligned address",
)  # CUDA errors that a run's code makes
OOM = (MemoryError, torch.OutOfMemoryError)


def is_oom(error: BaseException) -> bool:
    """An exhausted device or host allocator; torch's CPU allocator says so only in words, which differ by system."""
    words = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
    return isinstance(error, OOM) or (
        isinstance(error, RuntimeError | OSError) and any(w in str(error) for w in words)
    )


def is_device_failure(error: BaseException) -> bool:
    """A GPU that vanished, or whose context is broken: nothing more can be done with it in this process."""
    words = ("CUDA error", "CUDNN_STATUS_INTERNAL_ERROR", "No CUDA GPUs are available")
    return isinstance(error, RuntimeError) and any(w in str(error) for w in words)


def run_and_record(run: RunConfig, directory: Path, run_id: str, **hooks: Any) -> dict[str, Any]:
    """`recorded_run` by itself, to its end."""
    return to_the_end(recorded_run(run, directory, run_id, **hooks))


def recorded_run(run: RunConfig, directory: Path, run_id: str, **hooks: Any) -> Progress:
    """Carry one run to an outcome and write its `result.json`; a result that is already there is returned as it is.

    A generator that gives way between blocks of steps, so that one process can carry several runs in turn.

    `hooks` go to `Training.blocks`. A crash of the run becomes its outcome (`oom` or `failed`), with the traceback in
    `log.txt`. Raises Interrupted; UserError when the folder holds another run or a damaged file, which is left as it is;
    OSError when the folder itself cannot be written; and DeviceFailed when the GPU can do no more in this process (with no
    result, unless the run's own code has broken it).
    """
    files = RunFiles(directory)
    path = files.result
    name = digest(identity(run))
    if path.exists():
        found = read_checksummed(path, f"delete {directory}, and the same command trains the run again")
        if found.get("identity") != name:
            raise UserError(f"{path} is another run's result: choose another folder, or delete this one.")
        return found
    directory.mkdir(parents=True, exist_ok=True)
    log = files.log
    started = time.perf_counter()
    with open(log, "a") as f:
        f.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {run_id} begins or resumes\n")
    broken = False
    try:
        result = yield from Training(run, directory).blocks(**hooks)
    except (Interrupted, KeyboardInterrupt, UserError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
            raise
        with open(log, "a") as f:
            f.write(traceback.format_exc())
        cause = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        broken = is_device_failure(error) and not is_oom(error)
        if broken and not any(w in cause for w in OWN_FAULT):
            raise DeviceFailed(cause) from error
        kind = "oom" if is_oom(error) else "failed"
        result = {"outcome": kind, "cause": cause, "steps": 0, "wall_s": time.perf_counter() - started}
    result = {"run_id": run_id, "identity": name, **result}
    write_checksummed(path, result)
    if result["outcome"] in ("completed", "diverged"):
        files.checkpoint.unlink(missing_ok=True)
    with open(log, "a") as f:
        f.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {result['outcome']} {result.get('cause') or ''}\n")
    if broken:  # the run is to blame, and no other can be trained in this process any more
        raise DeviceFailed(result["cause"])
    return result
