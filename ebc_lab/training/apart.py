"""A run in a process of its own, whose torch uses the vector instructions of the run's `capability` and no
others: torch reads them from its environment when it is loaded, and so this process cannot change its own.

Such a process (`child.py`) serves one run after another, because starting it takes seconds. It ends when this
one does, for whatever reason: its input ends then.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ebc_lab.config.dicts import to_dict
from ebc_lab.config.errors import UserError, any_of
from ebc_lab.config.identity import digest, identity
from ebc_lab.config.machine import capabilities
from ebc_lab.config.schema import RunConfig
from ebc_lab.records.json_files import read_checksummed, write_checksummed
from ebc_lab.records.paths import RunFiles

from .turns import DeviceFailed, Interrupted, Progress, Say, quiet

VARIABLE = "ATEN_CPU_CAPABILITY"
# how a run ends there
DONE, INTERRUPTED, REFUSED, UNWRITABLE, DEVICE = "done", "interrupted", "refused", "unwritable", "device"
LISTEN_S = 0.05  # for what a process says, before another run of this one has its turn
CLOSE_S = 5.0  # for an idle process to end

_idle: dict[str, list[_Process]] = {}  # capability -> processes without a run


def wanted(run: RunConfig) -> bool:
    """Whether the run has to be trained in another process than this one."""
    return run.capability not in ("auto", os.environ.get(VARIABLE))


def recorded_run(
    run: RunConfig,
    directory: Path,
    run_id: str,
    *,
    checkpoint_every_s: float = math.inf,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[int], None] = lambda step: None,
    say: Say = quiet,
) -> Progress:
    """`outcome.recorded_run` in a process of the run's own; it yields while that trains.

    Raises UserError where this CPU lacks the run's instructions, and what that function raises.
    """
    if run.capability not in capabilities():
        raise UserError(f"capability={run.capability}: this CPU has {any_of(list(capabilities()))}.")
    idle = _idle.setdefault(run.capability, [])
    process = idle.pop() if idle else _Process(run.capability)
    end: dict[str, Any] | None = None
    told = False
    try:
        process.tell(
            run=to_dict(run), directory=str(directory), run_id=run_id, checkpoint_every_s=checkpoint_every_s
        )
        while end is None and process.alive:
            for said in process.listen():
                if "step" in said:
                    on_progress(said["step"])
                elif "say" in said:
                    say(said["say"])
                else:
                    end = said
            if end is None and not told and should_stop():
                told = True
                process.tell(stop=True)
            yield
    finally:
        if end is None or end["end"] == DEVICE:
            process.kill()
        else:
            idle.append(process)
    return _ended(end, run, RunFiles(directory), run_id, process)


def _ended(
    end: dict[str, Any] | None, run: RunConfig, files: RunFiles, run_id: str, process: _Process
) -> dict[str, Any]:
    """The result of a run, from what its process said last; without a word from it the run has failed."""
    if end is None:
        cause = f"the process that trained it ended with code {process.process.wait()}"
        name = digest(identity(run))
        lost = {"run_id": run_id, "identity": name, "outcome": "failed", "cause": cause, "steps": 0}
        write_checksummed(files.result, lost)
        return lost
    if end["end"] == INTERRUPTED:
        raise Interrupted
    if end["end"] == REFUSED:
        raise UserError(end["why"])
    if end["end"] == UNWRITABLE:
        raise OSError(*end["why"])
    if end["end"] == DEVICE:
        raise DeviceFailed(end["why"])
    return read_checksummed(files.result, "the same command trains the run again")


class _Process:
    """A process that trains runs, seen from here. What it prints goes where this process's errors go."""

    def __init__(self, capability: str):
        self.alive = True
        self.heard = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ebc_lab.training.child"],
            # threads that wait must not keep a core busy that another run needs: 2 threads on as many cores
            # beside another such run would take many times as long
            env={"OMP_WAIT_POLICY": "passive", **os.environ, VARIABLE: capability},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def tell(self, **what: Any) -> None:
        """Send a line of JSON. Where the process has ended, `listen` notices."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(what).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return

    def listen(self) -> list[dict[str, Any]]:
        """What it has said since the last call, after waiting LISTEN_S for it at most."""
        assert self.process.stdout is not None
        there, _, _ = select.select([self.process.stdout], [], [], LISTEN_S)
        if not there:
            return []
        said = os.read(self.process.stdout.fileno(), 1 << 16)
        self.alive = bool(said)
        *lines, self.heard = (self.heard + said).split(b"\n")
        return [json.loads(line) for line in lines]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it by the end of its input."""
        try:
            self.process.communicate(timeout=CLOSE_S)
        except subprocess.TimeoutExpired:
            self.kill()


@atexit.register
def _close_idle() -> None:
    for process in (p for own in _idle.values() for p in own):
        process.close()
