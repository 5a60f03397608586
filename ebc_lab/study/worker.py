"""One worker: `python -m ebc_lab.study.worker SESSION NAME`. It trains the session's runs, one after the other.

A worker claims a run by its lock, so no run is ever trained twice at once. On this machine (`bound`) it ends when the list is
closed and done, or when the driver's lock is free: the driver is gone, however it went. In a Slurm job it lives on without its
driver, until the list is done and it has been idle for `idle_s`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import UserError, digest
from ..telemetry import Pulse, write_sealed
from . import attempts
from .session import Session
from .signature import identity_of
from .store import Study, claimed, locked

POLL_S = 0.1
POLL_SHARED_S = 1.0  # in a Slurm job: the folder is every worker's, and its server is everybody's
WATCH_S = 1.0
GRACE_S = 60.0  # for a checkpoint, once asked to go; then this process ends itself, so that none is left hanging
PAUSE_S = 60.0  # after SIGTERM in a Slurm job: time for Slurm to carry out what it announced
CANNOT_WRITE, DEVICE_FAILED = 74, 75  # exit codes, of sysexits.h: an I/O error; a temporary failure


def execute(
    study: Study,
    run_id: str,
    *,
    checkpoint_every_s: float,
    should_stop: Callable[[], bool],
    on_claim: Callable[[], None] = lambda: None,
) -> bool:
    """Carry one planned run to its result, unless somebody else has it. -> whether this call did.

    Raises Interrupted (with a checkpoint written) once `should_stop()`, and OSError where the folder cannot be written.
    """
    from ..outcome import run_and_record
    from ..training import Interrupted

    directory = study.run_dir(run_id)
    with claimed(directory) as mine:
        if not mine or (directory / "result.json").exists():
            return False
        attempts.note(directory, "begin", **attempts.surroundings())
        on_claim()
        try:
            kind, run = study.read_spec(run_id)
        except UserError as error:
            _refuse(directory, run_id, error)
            return True
        name = digest(identity_of(kind, run))

        report = Pulse(directory / "progress.json", run.steps)
        if kind == "overhead":
            from ..bench import overhead_and_record

            overhead_and_record(run, directory, run_id, name, on_progress=report)
            attempts.note(directory, "end")
            (directory / "progress.json").unlink(missing_ok=True)
            return True
        try:
            result = run_and_record(
                run, directory, run_id, checkpoint_every_s=checkpoint_every_s, should_stop=should_stop, on_progress=report
            )
            attempts.note(directory, "end", outcome=result["outcome"])
        except UserError as error:
            _refuse(directory, run_id, error, name)
        except Interrupted:
            attempts.note(directory, "stopped")
            raise
        (directory / "progress.json").unlink(missing_ok=True)
        return True


def _refuse(directory: Path, run_id: str, error: UserError, identity: str | None = None) -> None:
    """Record why this run cannot be made, in the words of the error; its files stay as they are."""
    result = {"run_id": run_id, "identity": identity, "outcome": "failed", "cause": str(error), "steps": 0}
    write_sealed(directory / "result.json", result)
    attempts.note(directory, "end", outcome="failed")


class _Stop:
    """Whether to leave the run that this worker is on, and whether to end as well.

    SIGINT, a freed driver's lock, or `stop` in the session: both. SIGTERM in a Slurm job: it may be preempted and requeued, or
    killed; the run is left with a checkpoint, and taken up again if nothing happens.
    """

    def __init__(self, session: Session, *, bound: bool):
        self.session, self.bound = session, bound
        self.event, self.final, self.dismissed = threading.Event(), threading.Event(), False
        signal.signal(signal.SIGINT, lambda *_: self._end())
        signal.signal(signal.SIGHUP, lambda *_: self._end())
        signal.signal(signal.SIGTERM, lambda *_: self._end() if bound else self.event.set())
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm warns every process; the one above this answers
        threading.Thread(target=self._watch, daemon=True).start()

    def _end(self) -> None:
        self.final.set()
        self.event.set()

    def _watch(self) -> None:
        while not self.final.wait(WATCH_S):
            if self._dismissed():
                self.dismissed = True
                self._end()
        time.sleep(GRACE_S)
        os._exit(1)

    def _dismissed(self) -> bool:
        if not self.session.root.exists() or (self.bound and not locked(self.session.lock_path)):
            return True
        tasks = self.session.tasks()
        return tasks is not None and tasks["stop"]

    def __call__(self) -> bool:
        return self.event.is_set()


def work(root: Path, name: str) -> int:
    """Train until nothing is left. -> exit code: 0 done or dismissed, 74 cannot write, 75 no GPU any more, 130 stopped."""
    session = Session(root)
    about: dict[str, Any] = session.about()
    study = Study(Path(about["study"]))
    seen = attempts.surroundings()
    ran = 0
    session.note(name, run_id=None, ran=ran, **seen)
    stop = _Stop(session, bound=about["bound"])
    # torch is imported while the driver is still busy: one import a worker, not one a run
    from ..outcome import DeviceFailed
    from ..training import Interrupted

    offered: list[str] = []
    done: set[str] = set()
    worked = beat = time.monotonic()
    while not stop.final.is_set():
        if stop():
            stop.final.wait(min(PAUSE_S, about["beat_s"]))
            stop.event.clear()
            continue
        tasks = session.tasks() or {"runs": [], "closed": False}
        if tasks["runs"] != offered:  # what was done may have been taken back meanwhile
            offered, done = tasks["runs"], set()
        todo = [r for r in offered if r not in done]
        did = False
        for run_id in todo:
            if (study.run_dir(run_id) / "result.json").exists():
                done.add(run_id)
                continue

            def say(run_id: str | None = run_id, ran: int = ran + 1) -> None:
                session.note(name, run_id=run_id, ran=ran, **seen)

            try:
                did = execute(study, run_id, checkpoint_every_s=about["checkpoint_every_s"], should_stop=stop, on_claim=say)
            except Interrupted:
                say(None)
                break
            except DeviceFailed as error:  # the driver counts the run as lost, and starts another worker
                session.note(name, run_id=run_id, ran=ran + 1, cause=str(error), **seen)
                return DEVICE_FAILED
            except OSError as error:
                what = f"{error.filename or study.root}: {error.strerror or error}"
                session.note(name, run_id=None, ran=ran + 1, error=what, **seen)
                return CANNOT_WRITE
            if did:
                say(None)
                ran += 1
                worked = time.monotonic()
                break
        if not did:
            if tasks["closed"] and done.issuperset(offered):
                return 0
            if about["idle_s"] is not None and time.monotonic() - worked > about["idle_s"]:
                return 0
            if time.monotonic() - beat > about["beat_s"]:
                beat = time.monotonic()
                session.note(name, run_id=None, ran=ran, beat=beat, **seen)
            stop.event.wait(POLL_S if about["bound"] else POLL_SHARED_S)
    return 0 if stop.dismissed else 130


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1]), sys.argv[2]))
