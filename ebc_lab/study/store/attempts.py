"""Who tried to train a run, when, where, and how it went: an append-only log in the run's folder.

One line a happening: `begin` (a worker has claimed the run, and what it sees of the machine), `end` (with the outcome),
`stopped` (asked to, checkpoint written), `lost` (its worker died; written by the driver). A `begin` followed by none of the
others was cut off together with its driver.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from ebc_lab.records.paths import RunFiles

SEEN = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
)


def note(directory: Path, event: str, **about: Any) -> None:
    """Append one happening; a single write, so that lines of two processes never mix."""
    line = json.dumps({"at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **about}) + "\n"
    descriptor = os.open(RunFiles(directory).attempts, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size and os.pread(descriptor, 1, size - 1) != b"\n"  # a crash cut the last line off
        os.write(descriptor, (b"\n" if torn else b"") + line.encode())
    finally:
        os.close(descriptor)


def surroundings() -> dict[str, Any]:
    """What this process sees of the machine: the proof of where a run was trained, and on which device."""
    return {
        "host": os.uname().nodename,
        "pid": os.getpid(),
        **{k.lower(): os.environ[k] for k in SEEN if k in os.environ},
    }


def log(directory: Path) -> list[dict[str, Any]]:
    """Every happening so far, oldest first; a line that a crash cut off is left out."""
    path = RunFiles(directory).attempts
    out = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            out.append(dict(json.loads(line)))
        except ValueError:
            continue
    return out
