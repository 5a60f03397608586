"""A run in processes of its own: one whose torch uses the vector instructions of the run's `capability` and
no others, which torch reads from its environment when it is loaded; or several that train it together
(`ranks.py`), which torchrun starts and brings together on this machine.

Such processes (`child.py`) serve one run after another, because starting them takes seconds. They end when
this one does, for whatever reason: the input of the first ends then, and torchrun ends the others.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ebc_lab.config.dicts import to_dict
from ebc_lab.config.errors import UserError, any_of
from ebc_lab.config.identity import digest, identity
from ebc_lab.config.machine import capabilities
from ebc_lab.config.modes import check_processes
from ebc_lab.config.schema import RunConfig
from ebc_lab.records import fence
from ebc_lab.records.fence import Superseded
from ebc_lab.records.figures import FINISHED
from ebc_lab.records.json_files import read_checksummed, write_checksummed
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.streams import rows_in

from .ends import DeviceFailed, Interrupted, Say, quiet
from .nodes import CHILD, Nodes, invite, started

VARIABLE = "ATEN_CPU_CAPABILITY"
# how a run ends there
DONE, INTERRUPTED, REFUSED, UNWRITABLE, DEVICE = "done", "interrupted", "refused", "unwritable", "device"
SUPERSEDED = "superseded"
FAILED = "failed"  # of another than the first of several; with its outcome and cause
LISTEN_S = 0.05  # for what a process says, before it is told to stop
CLOSE_S = 5.0  # for an idle process to end

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--local-addr=localhost")
LAST_WORDS = 20_000  # bytes of what torchrun prints that are kept
Kind = tuple[str, int, int]  # capability, how many processes train a run together, on how many nodes
_idle: dict[Kind, list[_Process]] = {}  # without a run


def wanted(run: RunConfig, processes: int = 1) -> bool:
    """Whether the run has to be trained elsewhere than in this process."""
    return processes > 1 or run.capability not in ("auto", os.environ.get(VARIABLE))


def run_and_record(
    run: RunConfig,
    directory: Path,
    run_id: str,
    *,
    processes: int = 1,
    nodes: Nodes | None = None,
    checkpoint_every_s: float = math.inf,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[int], None] = lambda step: None,
    say: Say = quiet,
    corpus_warning: str | None = None,
) -> dict[str, Any]:
    """Do as `outcome.run_and_record` in a process of the run's own, or in several, and return the result.

    Raises UserError where this CPU lacks the run's instructions, or several processes would train another
    run than one, and what that function raises.
    """
    if run.capability not in ("auto", *capabilities()):
        raise UserError(f"capability={run.capability}: this CPU has {any_of(list(capabilities()))}.")
    check_processes(run, processes)
    kind = (run.capability, processes, nodes.count if nodes else 1)
    idle = _idle.setdefault(kind, [])
    idle[:] = [p for p in idle if p.process.poll() is None]
    process = idle.pop() if idle else _Process(kind, nodes)
    end: dict[str, Any] | None = None
    was_told = False
    try:
        about = {"run_id": run_id, "directory": str(directory), "corpus_warning": corpus_warning}
        about["attempt"] = fence.token_in(directory)
        process.tell(run=to_dict(run), checkpoint_every_s=checkpoint_every_s, **about)
        while end is None and process.alive:
            for message in process.listen():
                if "step" in message:
                    on_progress(message["step"])
                elif "say" in message:
                    say(message["say"])
                elif end is None or "rank" not in end:  # another than the first speaks before its end
                    end = message
            if end is None and not was_told and should_stop():
                was_told = True
                process.tell(stop=True)
    finally:
        if end is not None and process.serves_again(end):
            idle.append(process)
        else:
            process.kill()
    return _ended(end, run, RunFiles(directory), run_id, process)


def _ended(
    end: dict[str, Any] | None, run: RunConfig, files: RunFiles, run_id: str, process: _Process
) -> dict[str, Any]:
    """The result of a run, from what its process said last; without a word from it the run has failed, or,
    where several trained it, is lost: who killed one of them has not judged the run."""
    if process.together and (end is None or end["end"] in (FAILED, DEVICE)):
        files.directory.mkdir(parents=True, exist_ok=True)  # they may have failed before anything else
        with open(files.log, "a", encoding="utf-8") as log:
            log.write(process.complaints())
    if end is None and process.together:
        raise DeviceFailed("a process of those that trained it was killed")
    if end is None or end["end"] == FAILED:
        outcome, cause = ("failed", f"the process that trained it ended with code {process.process.wait()}")
        if end is not None:
            outcome, cause = end["why"]
        name = digest(identity(run))
        steps = rows_in(files.steps)
        lost = {"run_id": run_id, "identity": name, "outcome": outcome, "cause": cause, "steps": steps}
        write_checksummed(files.result, lost)
        return lost
    if end["end"] == INTERRUPTED:
        raise Interrupted
    if end["end"] == SUPERSEDED:
        raise Superseded(files.directory)
    if end["end"] == REFUSED:
        raise UserError(end["why"])
    if end["end"] == UNWRITABLE:
        raise OSError(*end["why"])
    if end["end"] == DEVICE:
        raise DeviceFailed(end["why"])
    return read_checksummed(files.result, "the same command trains the run again")


class _Process:
    """A process that trains runs, or torchrun above several, seen from here.

    What it prints goes where this process's errors go. Torchrun's pages about ranks that have ended are kept
    apart: they belong into the log of the run that failed.
    """

    def __init__(self, kind: Kind, nodes: Nodes | None = None):
        capability, processes, _ = kind
        self.together = processes > 1
        self.errors = tempfile.TemporaryFile() if self.together else None  # noqa: SIM115
        self.alive = True
        self.heard = b""
        here = invite(nodes, processes) if nodes else [*LAUNCHER, f"--nproc-per-node={processes}"]
        chosen = {} if capability == "auto" else {VARIABLE: capability}
        if self.together:
            chosen["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")  # torchrun remarks on none
        how: dict[str, Any] = {
            # threads that wait must not keep a core busy that another run needs: 2 threads on as many cores
            # beside another such run would take many times as long
            "env": {"OMP_WAIT_POLICY": "passive", **os.environ, **chosen},
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": self.errors,
        }
        if self.together:
            self.process = started(here, **how)
        else:
            self.process = subprocess.Popen([sys.executable, "-m", CHILD], **how)

    def tell(self, **what: Any) -> None:
        """Send a line of JSON. Where the process has ended, `listen` notices."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(what).encode() + b"\n")
            self.process.stdin.flush()

    def listen(self) -> list[dict[str, Any]]:
        """What it has said since the last call, after waiting LISTEN_S for it at most."""
        assert self.process.stdout is not None
        there, _, _ = select.select([self.process.stdout], [], [], LISTEN_S)
        if not there:
            return []
        received = os.read(self.process.stdout.fileno(), 1 << 16)
        self.alive = bool(received)
        *lines, self.heard = (self.heard + received).split(b"\n")
        return [json.loads(line) for line in lines]

    def complaints(self) -> str:
        """What torchrun and its ranks have printed, the last of it; of several processes only."""
        assert self.errors is not None
        length = self.errors.seek(0, os.SEEK_END)
        self.errors.seek(max(0, length - LAST_WORDS))
        return self.errors.read().decode(errors="replace")

    def serves_again(self, end: Mapping[str, Any]) -> bool:
        """Whether it can train another run after this end: one of several that has failed has left the others
        waiting for it."""
        if self.together:
            return end["end"] == INTERRUPTED or (end["end"] == DONE and end["why"] in FINISHED)
        return bool(end["end"] != DEVICE)

    def kill(self) -> None:
        if self.together and self.process.poll() is None:
            self.close()  # once torchrun itself is killed, nothing is there to end the others at once
            return
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it by the end of its input."""
        try:
            self.process.communicate(timeout=CLOSE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@atexit.register
def _close_idle() -> None:
    for process in (p for of_kind in _idle.values() for p in of_kind):
        process.close()
