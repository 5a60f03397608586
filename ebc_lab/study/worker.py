"""One worker: `python -m ebc_lab.study.worker SESSION SLOT`. It trains the session's runs, one after the other.

The session folder holds `session.json` (where the study is) and `tasks.json` (run ids in order, and whether more may come).
A worker claims a run by its lock, so no run is ever trained twice at once. It ends when the list is closed and done, or when
the driver's lock is free: the driver is gone, however it went.
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
from ..telemetry import read_json, write_json
from .signature import identity_of
from .store import Study, claimed

POLL_S = 0.1
DRIVER_POLL_S = 1.0


def execute(
    study: Study,
    run_id: str,
    *,
    checkpoint_every_s: float,
    should_stop: Callable[[], bool],
    on_claim: Callable[[], None] = lambda: None,
) -> bool:
    """Carry one planned run to its result, unless somebody else has it. -> whether this call did.

    Raises Interrupted (with a checkpoint written) once `should_stop()`.
    """
    from ..training import run_and_record

    directory = study.run_dir(run_id)
    with claimed(directory) as mine:
        if not mine or (directory / "result.json").exists():
            return False
        on_claim()
        try:
            kind, run = study.read_spec(run_id)
        except UserError as error:
            _refuse(directory, run_id, error)
            return True
        name = digest(identity_of(kind, run))
        if kind == "overhead":
            from ..bench import overhead_and_record

            overhead_and_record(run, directory, run_id, name)
            return True

        def report(step: int, steps_per_s: float) -> None:
            now = {"step": step, "steps": run.steps, "steps_per_s": steps_per_s, "at": time.time()}
            write_json(directory / "progress.json", now, durable=False)

        report(0, 0.0)
        try:
            run_and_record(
                run, directory, run_id, checkpoint_every_s=checkpoint_every_s, should_stop=should_stop, on_progress=report
            )
        except UserError as error:
            _refuse(directory, run_id, error, name)
        (directory / "progress.json").unlink(missing_ok=True)
        return True


def _refuse(directory: Path, run_id: str, error: UserError, identity: str | None = None) -> None:
    """Record why this run cannot be made, in the words of the error; its files stay as they are."""
    result = {"run_id": run_id, "identity": identity, "outcome": "failed", "cause": str(error), "steps": 0}
    write_json(directory / "result.json", result)


class _Stop:
    """Becomes true on SIGINT or SIGTERM, or once the driver's lock is free."""

    def __init__(self, driver_lock: Path):
        self.event = threading.Event()
        self.driver_lock = driver_lock
        for sig in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sig, lambda *_: self.event.set())
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self.event.wait(DRIVER_POLL_S):
            if driver_gone(self.driver_lock):
                self.event.set()

    def __call__(self) -> bool:
        return self.event.is_set()


def driver_gone(path: Path) -> bool:
    """Whether nobody holds the driver's lock any more."""
    import fcntl

    try:
        with open(path, "rb") as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def work(session: Path, slot: int) -> int:
    """Train until nothing is left. -> exit code: 0 done, 130 stopped."""
    about: dict[str, Any] = read_json(session / "session.json")
    study = Study(Path(about["study"]))
    stop = _Stop(session / "driver.lock")
    mine = session / f"worker-{slot}.json"
    # torch is imported while the driver is still busy: one import a worker, not one a run
    from ..training import Interrupted

    while not stop():
        tasks = read_json(session / "tasks.json")
        todo = [r for r in tasks["runs"] if not (study.run_dir(r) / "result.json").exists()]
        did = False
        for run_id in todo:

            def say(run_id: str | None = run_id) -> None:
                write_json(mine, {"pid": os.getpid(), "run_id": run_id}, durable=False)

            try:
                did = execute(study, run_id, checkpoint_every_s=about["checkpoint_every_s"], should_stop=stop, on_claim=say)
            except Interrupted:
                return 130
            if did:
                say(None)
                break
        if not did:
            if tasks["closed"] and not todo:
                return 0
            stop.event.wait(POLL_S)
    return 130


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1]), int(sys.argv[2])))
