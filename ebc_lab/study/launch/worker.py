"""One worker: `python -m ebc_lab.study.launch.worker SESSION NAME`. It carries the session's runs, up to `runs_per_worker` at a time.

Runs that share a worker take turns in one thread, a block of steps each; on a GPU each has a stream of its own (DESIGN: speed).
Which runs share one changes no bit of any. Those for which it would go alone: see `Worker.company`.

A worker claims a run by its lock, so no run is ever trained twice at once. On this machine (`bound`) it ends when the list is
closed and done, or when the driver's lock is free: the driver is gone, however it went. In a Slurm job it lives on without its
driver, until the list is done and it has been idle for `idle_s`.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest
from ebc_lab.records.json_files import read_json, write_checksummed
from ebc_lab.records.locks import locked, run_lock
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.streams import Heartbeat

from ..stages.spec import identity_of
from ..store import attempts
from ..store.study import Study
from .session import Session

POLL_S = 0.1
POLL_SHARED_S = 1.0  # in a Slurm job: the folder is every worker's, and its server is everybody's
WATCH_S = 1.0
GRACE_S = (
    60.0  # for a checkpoint, once asked to go; then this process ends itself, so that none is left hanging
)
PAUSE_S = 60.0  # after SIGTERM in a Slurm job: time for Slurm to carry out what it announced
CANNOT_WRITE, DEVICE_FAILED = 74, 75  # exit codes, of sysexits.h: an I/O error; a temporary failure


Turns = Generator[None, None, bool]  # of a run that gives way between blocks of steps


def carried(
    study: Study, run_id: str, *, checkpoint_every_s: float, should_stop: Callable[[], bool], beside: int = 0
) -> Turns:
    """Carry one planned run to its result, unless somebody else has it, giving way between blocks of steps.

    The first `yield` says that the run is claimed; the value is whether this call carried it. `beside`: how many other runs
    the same worker is on, for the log. Raises Interrupted (with a checkpoint written) once `should_stop()`, OSError where the
    folder cannot be written, and DeviceFailed.
    """
    from ebc_lab.training.outcome import recorded_run
    from ebc_lab.training.turns import Interrupted

    files = study.run_files(run_id)
    directory = files.directory
    with run_lock(directory) as mine:
        if not mine or files.result.exists():
            return False
        attempts.note(directory, "begin", beside=beside, **attempts.surroundings())
        yield
        try:
            kind, run = study.read_spec(run_id)
        except UserError as error:
            _refuse(directory, run_id, error)
            return True
        name = digest(identity_of(kind, run))

        report = Heartbeat(files.progress, run.steps)
        if kind == "overhead":
            from ebc_lab.bench.pairs import overhead_and_record

            overhead_and_record(run, directory, run_id, name, on_progress=report)
            attempts.note(directory, "end")
            files.progress.unlink(missing_ok=True)
            return True
        try:
            result = yield from recorded_run(
                run,
                directory,
                run_id,
                checkpoint_every_s=checkpoint_every_s,
                should_stop=should_stop,
                on_progress=report,
            )
            attempts.note(directory, "end", outcome=result["outcome"])
        except UserError as error:
            _refuse(directory, run_id, error, name)
        except Interrupted:
            attempts.note(directory, "stopped")
            raise
        files.progress.unlink(missing_ok=True)
        return True


def execute(study: Study, run_id: str, *, checkpoint_every_s: float, should_stop: Callable[[], bool]) -> bool:
    """`carried` by itself, to its end. -> whether this call carried the run."""
    from ebc_lab.training.turns import to_the_end

    return to_the_end(carried(study, run_id, checkpoint_every_s=checkpoint_every_s, should_stop=should_stop))


def _refuse(directory: Path, run_id: str, error: UserError, identity: str | None = None) -> None:
    """Record why this run cannot be made, in the words of the error; its files stay as they are."""
    result = {"run_id": run_id, "identity": identity, "outcome": "failed", "cause": str(error), "steps": 0}
    write_checksummed(RunFiles(directory).result, result)
    attempts.note(directory, "end", outcome="failed")


class _Stop:
    """Whether to leave the runs that this worker is on, and whether to end as well.

    SIGINT, a freed driver's lock, or `stop` in the session: both. SIGTERM in a Slurm job: it may be preempted and requeued, or
    killed; the runs are left with a checkpoint each, and taken up again if nothing happens.
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


class Worker:
    """What this process is on, and what it tells the driver about that."""

    def __init__(self, session: Session, name: str):
        self.session, self.name, self.about = session, name, session.about()
        self.study = Study(Path(self.about["study"]))
        self.seen = attempts.surroundings()
        self.turns: dict[str, Turns] = {}  # run id -> the run, one of those under way
        self.with_whom: dict[str, int | None] = {}  # of the runs under way: their `company`
        self.taken = 0
        self.left: list[
            str
        ] = []  # of the runs on the list those without a result, when it was last looked at
        self.leaving = False  # every run goes to a checkpoint, because one of them cannot write
        self.look_at = 0.0  # while runs are under way: when to look for another one
        self.say()
        self.stop = _Stop(session, bound=self.about["bound"])

    def say(self, **more: Any) -> None:
        self.session.note(self.name, run_ids=list(self.turns), ran=self.taken, **self.seen, **more)

    def work(self) -> int:
        """Train until nothing is left. -> exit code: 0 done or dismissed, 74 cannot write, 75 no GPU any more, 130 stopped."""
        # torch is imported while the driver is still busy: one import a worker, not one a run
        from ebc_lab.training.turns import DeviceFailed

        try:
            return self._work()
        except DeviceFailed as error:  # the driver counts the runs as lost, and starts another worker
            for turns in self.turns.values():
                with suppress(Exception):  # on a device that is gone nothing can be saved
                    turns.close()
            own_fault = [r for r in self.turns if self.study.has_result(r)]
            self.say(cause=str(error), **({"guilty": own_fault} if own_fault else {}))
            return DEVICE_FAILED
        except OSError as error:
            what = f"{error.filename or self.study.root}: {error.strerror or error}"
            self._leave()
            self.say(error=what)
            return CANNOT_WRITE

    def _work(self) -> int:
        stop, about = self.stop, self.about
        poll_s = POLL_S if about["bound"] else POLL_SHARED_S
        worked = beat = time.monotonic()
        while self.turns or not stop.final.is_set():
            if stop() and not self.turns:
                stop.final.wait(min(PAUSE_S, about["beat_s"]))
                stop.event.clear()
                continue
            tasks: dict[str, Any] = {"closed": False}
            if not stop() and self._may_look():
                tasks = self.session.tasks() or {"runs": [], "alone": [], "slots": 1, "closed": False}
                self.look_at = 0.0 if self._take(tasks) else time.monotonic() + poll_s
            if self.turns:
                for run_id in list(self.turns):
                    self._advance(run_id)
                worked = time.monotonic()
                continue
            if tasks["closed"] and not self.left:
                return 0
            if about["idle_s"] is not None and time.monotonic() - worked > about["idle_s"]:
                return 0
            if time.monotonic() - beat > about["beat_s"]:
                beat = time.monotonic()
                self.say(beat=beat)
            stop.event.wait(poll_s)
        return 0 if stop.dismissed else 130

    # -- which runs ----------------------------------------------------------------------------------------------------

    def _may_look(self) -> bool:
        """Whether this worker could carry another run; while some are under way it looks no oftener than an idle one."""
        if not self.turns:
            return True
        return len(self.turns) < self.about["runs_per_worker"] and time.monotonic() >= self.look_at

    def _take(self, tasks: dict[str, Any]) -> bool:
        """Claim the next run on the list, if it goes with those under way. -> whether one was claimed.

        No worker hoards: it carries no more than its share, what is left over the slots. A run that has to go alone is not
        passed by: nothing behind it on the list is begun until those under way are done, and then it is its turn.
        """
        self.left = [
            r for r in tasks["runs"] if not self.study.has_result(r)
        ]  # a result may be taken back: looked up anew
        if len(self.turns) >= min(self.about["runs_per_worker"], math.ceil(len(self.left) / tasks["slots"])):
            return False
        for run_id in self.left:
            if run_id in self.turns:
                continue
            company = None if run_id in tasks["alone"] else self.company(run_id)
            if self.turns and (company is None or any(c != company for c in self.with_whom.values())):
                if locked(self.study.run_files(run_id).lock):  # another worker's
                    continue
                return False
            turns = carried(
                self.study,
                run_id,
                checkpoint_every_s=self.about["checkpoint_every_s"],
                should_stop=lambda: self.leaving or self.stop(),
                beside=len(self.turns),
            )
            try:
                next(turns)
            except StopIteration:  # somebody else has it
                continue
            self.turns[run_id], self.with_whom[run_id] = turns, company
            self.taken += 1
            self.say()
            return True
        return False

    def company(self, run_id: str) -> int | None:
        """Which runs a run may share this worker with: those of the same company; None: it goes alone.

        Alone go measurements of time, and runs with dropout, which draw from the device's one generator. Threads are the
        process's, and their number changes bits on a CPU: runs share a worker with runs of as many.
        """
        if self.about["runs_per_worker"] == 1:
            return None
        try:
            spec = read_json(self.study.run_files(run_id).spec)
            alone = spec["kind"] != "train" or spec["config"]["model"]["dropout"] > 0
            return None if alone else int(spec["config"]["threads_per_run"])
        except (OSError, UserError, KeyError, TypeError, ValueError):
            return None  # what is wrong with it is said when its turn comes

    # -- the runs under way --------------------------------------------------------------------------------------------

    def _advance(self, run_id: str) -> None:
        """One block of steps of one run. Raises DeviceFailed, and OSError where its folder cannot be written."""
        from ebc_lab.training.turns import Interrupted

        try:
            next(self.turns[run_id])
            return
        except (StopIteration, Interrupted):
            del self.turns[run_id], self.with_whom[run_id]
        self.look_at = 0.0
        self.say()

    def _leave(self) -> None:
        """Bring every run to a checkpoint, as far as they can still write."""
        self.leaving = True
        for turns in self.turns.values():
            with suppress(Exception):
                while True:
                    next(turns)
        self.turns = {}


def work(root: Path, name: str) -> int:
    """`Worker.work` in the session that lies in `root`."""
    return Worker(Session(root), name).work()


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1]), sys.argv[2]))
