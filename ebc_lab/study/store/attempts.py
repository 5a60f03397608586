"""The append-only log of attempts to train a run, with one event per line.

`begin`: a worker has claimed the run; with what it sees of the machine, and its code. `restarted`: the worker
starts at the first step despite a checkpoint; with the cause. `end`: the run has ended; with the outcome.
`stopped`: the attempt was stopped on request and left a checkpoint. `cancelled`: the attempt was cancelled.
`taken`: the finished run was copied from another study. `lost`: the worker died, or was silent for so long
that the run was given to another; written by the driver. `refused`: a silent worker came back, and may no
longer write. If no event ends an attempt, worker and driver were killed together. `attempt` is its token
(`fence.py`).
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from ebc_lab import __version__
from ebc_lab.config.dicts import misfit
from ebc_lab.config.identity import NUMERICS_VERSION
from ebc_lab.records.files import read_regular
from ebc_lab.records.json_files import MOST_BYTES, parse_json, write_checksummed
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.streams import rows_in

Span = tuple[float, float, str, int]  # begin and end of an attempt (s since the epoch), its host and pid

UNRECORDED = "a version that did not record itself"
OVER = ("end", "stopped", "lost", "cancelled")  # events after which a worker is free again
SEEN = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_JOB_NODELIST",
)


class Code(TypedDict):
    """The versions of the software that makes an attempt."""

    ebc_lab: str
    numerics_version: int
    torch: str
    python: str


class History(NamedTuple):
    """What a run's log says of the attempts that made it."""

    spans: tuple[Span, ...] = ()  # of those whose begin and end are both known, oldest first
    # the software of those whose steps are in the run, in words, each version once
    software: tuple[str, ...] = ()


def note(directory: Path, event: str, **about: Any) -> None:
    """Append one event to a run's log, in a single write, so that the lines of two processes never mix."""
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
    """Return the host, the pid and the variables in SEEN: evidence of where a run trains, on what device."""
    seen = {k.lower(): os.environ[k] for k in SEEN if k in os.environ}
    return {"host": os.uname().nodename, "pid": os.getpid(), **seen}


def begin(directory: Path, attempt: str, **about: Any) -> None:
    """Append the `begin` event of an attempt by this process, with its surroundings and code."""
    note(directory, "begin", attempt=attempt, **about, **surroundings(), code=code_here())


def code_here() -> Code:
    """Return the versions of the software that is installed here."""
    return {
        "ebc_lab": __version__,
        "numerics_version": NUMERICS_VERSION,
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
    }


def code_of(begun: Mapping[str, Any]) -> Code | None:
    """Return the code of a `begin` event; None if it was not recorded, as up to 1.0."""
    code: Code | None = begun.get("code")
    return code if misfit(code, Code) is None else None


def software(code: Code | None) -> str:
    """Return the versions of an attempt's code in words."""
    if code is None:
        return UNRECORDED
    return f"ebc-lab {code['ebc_lab']} with torch {code['torch']} under Python {code['python']}"


def give_up(
    files: RunFiles, outcome: str, cause: str, identity: str | None, steps: int | None = None
) -> None:
    """Write the result of a run that will not be trained any further. Its other files are left unchanged.

    `identity`: digest of the run's identity; None if the spec cannot be read. `steps`: the steps taken; None
    stands for the number of rows in steps.csv.
    """
    result = {"run_id": files.directory.name, "identity": identity, "outcome": outcome, "cause": cause}
    write_checksummed(files.result, {**result, "steps": rows_in(files.steps) if steps is None else steps})


def log(directory: Path) -> list[dict[str, Any]]:
    """Return the events of a run's log, oldest first. Lines that a crash cut off are left out."""
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
    """Return the events of the latest attempt, from its `begin` event on; [] if no attempt is logged."""
    events = log(directory)
    begins = [i for i, event in enumerate(events) if event.get("event") == "begin"]
    return events[begins[-1] :] if begins else []


def last_begin(directory: Path) -> dict[str, Any]:
    """Return the `begin` event of the latest attempt; {} if no attempt is logged."""
    return next(iter(_latest(directory)), {})


def restarts(directory: Path) -> list[str]:
    """Return the reasons why the latest attempt restarted at the first step; [] if it did not restart."""
    return [str(event.get("cause")) for event in _latest(directory) if event.get("event") == "restarted"]


def superseded_by(directory: Path, token: str) -> str:
    """Return the message for an attempt that may no longer write, naming the one that took over, if known."""
    now = last_begin(directory)
    known = now.get("attempt") not in (None, token)
    where = f" on {now.get('host')} (process {now.get('pid')})" if known else ""
    return (
        f"{directory.name} was given to another attempt{where} while nothing was heard of this one, {token}: "
        "what it still had to write is refused, and it ends here"
    )


def history(directory: Path) -> History:
    """Return what the log of a run says. If the finished run was copied from another study, the times of the
    attempts made there are left out; an attempt that started anew hides the software of those before it."""
    spans: list[Span] = []
    used: list[str] = []
    begun: tuple[float, str, int] | None = None
    for event in log(directory):
        with suppress(KeyError, TypeError, ValueError):
            kind = event["event"]
            when = datetime.fromisoformat(event["at"]).timestamp()
            if kind == "taken":
                spans, begun = [], None
            elif kind == "restarted":
                used = used[-1:]
            elif kind == "begin":
                used.append(software(code_of(event)))
                begun = when, str(event["host"]), int(event["pid"])
            elif kind in OVER and begun is not None:
                spans.append((begun[0], when, *begun[1:]))
                begun = None
    return History(tuple(spans), tuple(dict.fromkeys(used)))
