"""An append-only log of a run's training attempts: who, when, where and how each ended; one event a line.

`begin`: a worker claimed the run, with what it sees of the machine. `restarted`: it starts over from the
first step despite a checkpoint, with the cause. `end`: with the outcome. `stopped`: on request, with a
checkpoint. `cancelled`. `taken`: the finished run was copied from another study. `lost`, written by the
driver: the worker died or stopped responding, and another gets the run. `refused`: a worker that was declared
lost came back during the next attempt, and may write no more. A `begin` with no later event means that worker
and driver were killed together. `attempt` is the token of each attempt (`fence.py`).
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

Span = tuple[float, float, str, int]  # one attempt: begin and end in seconds since the epoch, host, pid

RESTARTED = "restarted"
REFUSED = "refused"
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
    """Append one event to a run's log in a single write, so that lines of two processes never mix."""
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
    """Return the host, the process id and those variables of `SEEN` that are set (names in lower case). They
    show where and on which device a run was trained."""
    seen = {k.lower(): os.environ[k] for k in SEEN if k in os.environ}
    return {"host": os.uname().nodename, "pid": os.getpid(), **seen}


def give_up(
    files: RunFiles, outcome: str, cause: str, identity: str | None, steps: int | None = None
) -> None:
    """Write the result of a run that is not trained any further; its other files stay as they are.

    `identity`: its digest, None where its spec cannot be read. `steps`: how many it has taken, by default
    the number of rows in its steps.csv.
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
    """Return the `begin` event of the latest attempt; an empty dictionary where none is logged."""
    return next(iter(_latest(directory)), {})


def restarts(directory: Path) -> list[str]:
    """Return why the latest attempt started over from the first step; an empty list if it did not."""
    return [str(event.get("cause")) for event in _latest(directory) if event.get("event") == RESTARTED]


def superseded_by(directory: Path, token: str) -> str:
    """Return the sentence for an attempt that may write no more, which names the one that replaced it."""
    now = last_begin(directory)
    known = now.get("attempt") not in (None, token)
    where = f" on {now.get('host')} (process {now.get('pid')})" if known else ""
    return (
        f"{directory.name} was given to another attempt{where} while nothing was heard of this one, {token}: "
        "what it still had to write is refused, and it ends here"
    )


def spans(directory: Path) -> list[Span]:
    """Return the attempts whose begin and end are both logged, oldest first. Those before a `taken` are left
    out: they were made in the study that the run was copied from."""
    found: list[Span] = []
    begun: tuple[float, str, int] | None = None
    for event in log(directory):
        with suppress(KeyError, TypeError, ValueError):
            what = event["event"]
            when = datetime.fromisoformat(event["at"]).timestamp()
            if what == "taken":
                found, begun = [], None
            elif what == "begin":
                begun = when, str(event["host"]), int(event["pid"])
            elif what in OVER and begun is not None:
                found.append((begun[0], when, *begun[1:]))
                begun = None
    return found
