"""Who tried to train a run, when, where, and how it ended: an append-only log, one line an event.

`begin` (a worker has claimed the run; what it sees of the machine), `restarted` (it begins with the first
step although it has a checkpoint; says why), `end` (with the outcome), `stopped` (by request, with a
checkpoint), `cancelled`, `taken` (copied, finished, from another study), `lost` (its worker died, or was
silent for so long that the run is given to another; written by the driver), `refused` (it was lost so, came
back while another trained, and may write no more). After a `begin` with none of the others, worker and driver
were killed together. `attempt` is the token of each attempt (`fence.py`).
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from ebc_lab.records.files import read_regular
from ebc_lab.records.json_files import MOST_BYTES, parse_json, write_checksummed
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.streams import rows_in

Span = tuple[float, float, str, int]  # of an attempt: begin and end, in seconds since the epoch; host, pid

OVER = ("end", "stopped", "lost", "cancelled")  # events after which a worker is free again
SEEN = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_JOB_NODELIST",
)


def note(directory: Path, event: str, **about: Any) -> None:
    """Append one event to a run's log, by a single write, so that lines of two processes never mix."""
    now = datetime.now().astimezone().isoformat(timespec="milliseconds")
    line = json.dumps({"at": now, "event": event, **about}) + "\n"
    descriptor = os.open(RunFiles(directory).attempts, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size and os.pread(descriptor, 1, size - 1) != b"\n"  # a crash cut the last line off
        os.write(descriptor, (b"\n" if torn else b"") + line.encode())
    finally:
        os.close(descriptor)


def surroundings() -> dict[str, Any]:
    """Return what this process sees of the machine: evidence of where a run was trained, and on which
    device."""
    seen = {k.lower(): os.environ[k] for k in SEEN if k in os.environ}
    return {"host": os.uname().nodename, "pid": os.getpid(), **seen}


def give_up(
    files: RunFiles, outcome: str, cause: str, identity: str | None, steps: int | None = None
) -> None:
    """Write the result of a run that is not trained any further; its other files stay as they are.

    `identity`: its digest, None where its spec cannot be read. `steps`: how many it has taken, by default
    the rows of its steps.csv.
    """
    result = {"run_id": files.directory.name, "identity": identity, "outcome": outcome, "cause": cause}
    write_checksummed(files.result, {**result, "steps": rows_in(files.steps) if steps is None else steps})


def log(directory: Path) -> list[dict[str, Any]]:
    """Return the events of a run's log, oldest first; a line that a crash cut off is left out."""
    try:
        text = read_regular(RunFiles(directory).attempts, MOST_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return []
    events: list[Any] = []
    for line in text.splitlines():
        with suppress(ValueError):
            events.append(parse_json(line))
    return [event for event in events if isinstance(event, dict)]


def _latest(directory: Path) -> list[dict[str, Any]]:
    """Return the events of the latest attempt, from its `begin` on; nothing where none is logged."""
    events = log(directory)
    begins = [i for i, event in enumerate(events) if event.get("event") == "begin"]
    return events[begins[-1] :] if begins else []


def last_begin(directory: Path) -> dict[str, Any]:
    """Return the `begin` of the latest attempt; nothing where none is logged."""
    return next(iter(_latest(directory)), {})


def restarts(directory: Path) -> list[str]:
    """Return why the latest attempt began with the first step again; nothing if it did not."""
    return [str(event.get("cause")) for event in _latest(directory) if event.get("event") == "restarted"]


def superseded_by(directory: Path, token: str) -> str:
    """Return what an attempt is told that may write no more: which one has taken its place."""
    now = last_begin(directory)
    known = now.get("attempt") not in (None, token)
    where = f" on {now.get('host')} (process {now.get('pid')})" if known else ""
    return (
        f"{directory.name} was given to another attempt{where} while nothing was heard of this one, {token}: "
        "what it still had to write is refused, and it ends here"
    )


def spans(directory: Path) -> list[Span]:
    """Return the attempts of which both ends are known, oldest first; not those of the study that a finished
    run was taken from."""
    found: list[Span] = []
    begun: tuple[float, str, int] | None = None
    for event in log(directory):
        with suppress(KeyError, TypeError, ValueError):
            what = event["event"]
            at = datetime.fromisoformat(event["at"]).timestamp()
            if what == "taken":
                found, begun = [], None
            elif what == "begin":
                begun = at, str(event["host"]), int(event["pid"])
            elif what in OVER and begun is not None:
                found.append((begun[0], at, *begun[1:]))
                begun = None
    return found
