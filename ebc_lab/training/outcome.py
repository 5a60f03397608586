"""One run trained to an outcome in its result.json: `completed`, `diverged`, `raced`, `oom` or `failed`."""

from __future__ import annotations

import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ebc_lab.config.checks import warnings_of
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest, identity
from ebc_lab.config.own.sources import line_of_fault
from ebc_lab.config.schema import RunConfig
from ebc_lab.records.figures import FINISHED
from ebc_lab.records.files import STORAGE_ERRORS
from ebc_lab.records.json_files import read_checksummed, write_checksummed
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.streams import rows_in

from . import apart
from .ends import OUT_OF_MEMORY, UNUSABLE, DeviceFailed, Interrupted, Say, quiet
from .nodes import Nodes
from .ranks import ALONE, Ranks, lost_another
from .run import Training

OOM = (MemoryError, torch.OutOfMemoryError)
OOM_WORDS = (
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "CUDA error: out of memory",  # outside torch's allocator: for a context, or for a library
    "CUBLAS_STATUS_ALLOC_FAILED",
)
DEVICE_WORDS = ("CUDA error", "CUDNN_STATUS_INTERNAL_ERROR", *UNUSABLE)
# in the first line of a device failure that the run's own code caused; the lines after it advise on
# device-side assertions, whatever has happened
OWN_FAULT = ("device-side assert", "illegal memory access", "misaligned address")


def run_and_record(
    run: RunConfig,
    directory: Path,
    run_id: str,
    *,
    processes: int = 1,
    nodes: Nodes | None = None,
    ranks: Ranks = ALONE,
    say: Say = quiet,
    corpus_warning: str | None = None,
    retry_oom: bool = False,
    **hooks: Any,
) -> dict[str, Any]:
    """Train one run to an outcome, write its result.json and return the result; if there is one already,
    return that as it is.

    `say` goes to `Training`, `hooks` to its `run`. A crash is the run's outcome, its traceback in log.txt.
    So many `processes` train it together, on several `nodes`; `ranks`: this is the first. `corpus_warning` is
    for log and result. `retry_oom`: memory that runs out is no outcome of a run of one process, but a failure
    of the GPU, of which something else may have taken it.

    Raises:
        Interrupted: it was asked to stop; its checkpoint is written.
        UserError: the folder holds another run or a damaged file, which is left as it is; Superseded, where
            another attempt has begun, and nothing of this one is written any more.
        OSError: the folder cannot be written, or not be read.
        DeviceFailed: the GPU failed, or a process of the run; there is a result only if its own code did it.
    """
    files, name = RunFiles(directory), digest(identity(run))
    if files.result.exists():
        return _earlier_result(files, name)
    if ranks.count == 1 and apart.wanted(run, processes):
        hooks |= {"processes": processes, "nodes": nodes, "say": say, "corpus_warning": corpus_warning}
        return apart.run_and_record(run, directory, run_id, **hooks)
    directory.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    _log(files, f"{run_id} begins or resumes", *_about(run, ranks, corpus_warning))
    broken = False

    def told(why: str) -> None:
        say(why)
        _log(files, why)

    try:
        training = Training(run, directory, told, ranks)
        _log(files, *training.numerics.log_lines())
        result = training.run(**hooks)
    except (Interrupted, KeyboardInterrupt, UserError):
        raise
    except Exception as error:
        outcome, cause = outcome_of(error, files)
        broken = is_device_failure(error)
        if retry_oom and outcome == "oom":
            raise DeviceFailed(f"{OUT_OF_MEMORY}: {cause}") from error
        lost = {"outcome": outcome, "cause": cause, "steps": rows_in(files.steps)}
        result = {**lost, "wall_s": time.perf_counter() - started}
    warned = {"corpus_warning": corpus_warning} if corpus_warning else {}
    result = {"run_id": run_id, "identity": name, **warned, **result}
    _record(result, files)
    if broken:  # this process can train no other run
        raise DeviceFailed(result["cause"])
    return result


def _about(run: RunConfig, ranks: Ranks, corpus_warning: str | None) -> list[str]:
    """What a log says first: the text, how many processes train together, what is remarkable."""
    text = f"corpus {run.data.name}, sha256 {str(run.data.sha256)[:12]}…"
    warned = [f"warning: {corpus_warning}"] if corpus_warning else []
    together = [f"{ranks.count} processes together"] if ranks.count > 1 else []
    return [text, *warned, *together, *warnings_of(run)]


def _record(result: dict[str, Any], files: RunFiles) -> None:
    """Write the result, after which there is nothing to resume unless the run has failed."""
    write_checksummed(files.result, result)
    if result["outcome"] in FINISHED:
        files.checkpoint.unlink(missing_ok=True)
    _log(files, f"{result['outcome']} {result.get('cause') or ''}")


def outcome_of(error: Exception, files: RunFiles | None = None) -> tuple[str, str]:
    """Return the outcome of a run that has ended by this error, and its cause. The traceback goes into the
    run's log, without `files` to stderr.

    Raises the error, or DeviceFailed, where it is no outcome of the run.
    """
    if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
        raise error
    with open(files.log, "a", encoding="utf-8") if files else nullcontext(sys.stderr) as log:
        traceback.print_exception(error, file=log)
    if lost_another(error):
        raise DeviceFailed("another process of those that train the run is gone") from error
    cause = cause_of(error)
    if is_device_failure(error) and not any(words in cause for words in OWN_FAULT):
        raise DeviceFailed(cause) from error
    return "oom" if is_oom(error) else "failed", cause


def _earlier_result(files: RunFiles, name: str) -> dict[str, Any]:
    result = read_checksummed(
        files.result, f"delete {files.directory}, and the same command trains the run again"
    )
    if result.get("identity") != name:
        raise UserError(f"{files.result} is another run's result: choose another folder, or delete this one.")
    return result


def _log(files: RunFiles, *lines: str) -> None:
    with open(files.log, "a", encoding="utf-8") as log:
        log.writelines(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {line}\n" for line in lines)


def cause_of(error: BaseException) -> str:
    """What went wrong, in one line; where a user's own part was at work with its file and line."""
    place = line_of_fault(error)
    return f"{f'{place}: ' if place else ''}{type(error).__name__}: {error}".splitlines()[0][:500]


def is_oom(error: BaseException) -> bool:
    """Whether memory ran out; torch's CPU allocator, CUDA and cuBLAS say so only in the message."""
    named = any(words in str(error) for words in OOM_WORDS)
    return isinstance(error, OOM) or (isinstance(error, RuntimeError | OSError) and named)


def is_device_failure(error: BaseException) -> bool:
    """Whether the GPU vanished or its context is broken, so that this process can do nothing more with it."""
    named = any(words in str(error) for words in DEVICE_WORDS)
    return isinstance(error, RuntimeError) and named and not is_oom(error)
