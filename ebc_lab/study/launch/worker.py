"""A worker process: `python -m ebc_lab.study.launch.worker SESSION NAME [LOCK…]` trains a session's runs, one
after another. It first acquires its LOCKs, one for each GPU, and holds them while it lives. It may have to
wait for them: a worker of a driver that was killed may still be writing a checkpoint.

A worker claims a run by the run's lock, so no run is ever trained twice at once. A `bound` worker (under
launcher=local) ends when the session tells it to, or when the driver's lock is free because the driver has
ended. A worker in a Slurm job survives its driver, and ends once it has been idle for `idle_s` seconds.
"""

from __future__ import annotations

import functools
import os
import pkgutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ebc_lab.config.errors import UserError, any_of
from ebc_lab.config.identity import digest, identity_of
from ebc_lab.config.own.sources import remember
from ebc_lab.records.fence import Superseded
from ebc_lab.records.json_files import read_json
from ebc_lab.records.locks import is_locked, run_lock
from ebc_lab.records.paths import SpecRecord
from ebc_lab.records.streams import Heartbeat
from ebc_lab.training.ends import DeviceFailed, Interrupted
from ebc_lab.training.nodes import Nodes

from ..store import attempts
from ..store.study import Study
from .session import GUEST, Session

# Kind of run -> the function that trains it, as "module:function", imported only when such a run is claimed.
# It is called with (run, directory, run_id, checkpoint_every_s=…, should_stop=…, on_progress=…, say=…,
# retry_oom=…), and writes and returns the result. That of `train` also takes processes=… and nodes=….
KINDS = {
    "train": "ebc_lab.training.outcome:run_and_record",
    "overhead": "ebc_lab.bench.pairs:overhead_run",
    "step": "ebc_lab.bench.pairs:step_run",
}
POLL_S = 0.1
POLL_SHARED_S = 1.0  # in a Slurm job: every worker reads the same folder on a shared file server
WATCH_S = 1.0
GRACE_S = 60.0  # time for a checkpoint once a worker is to end; then it kills itself
PAUSE_S = 60.0  # after SIGTERM in a Slurm job: time for Slurm to do what it announced


def load_function(kind: str) -> Callable[..., dict[str, Any]]:
    """Return the function that trains a kind of run. Raises UserError if the kind is unknown."""
    if kind not in KINDS:
        raise UserError(f"a run of kind {kind!r} is unknown here; the kinds are {any_of(list(KINDS))}.")
    function: Callable[..., dict[str, Any]] = pkgutil.resolve_name(KINDS[kind])
    return function


def train_claimed(
    study: Study,
    run_id: str,
    *,
    checkpoint_every_s: float,
    should_stop: Callable[[], bool],
    on_claim: Callable[[], None] = lambda: None,
    processes: int = 1,
    nodes: Nodes | None = None,
    retry_oom: bool = False,
) -> bool:
    """Claim a planned run and train it to its result. Return whether the run was free: False means that it
    already has a result, or that another process holds it.

    `on_claim`: called once the run is claimed and the claim is in the run's log. `processes`: how many
    processes train the run together, on `nodes`. `retry_oom`: whether to raise DeviceFailed and leave no
    result if a GPU's memory runs out.

    Raises Interrupted, with a checkpoint written, once `should_stop()` returns True; OSError if the folder
    cannot be written; DeviceFailed; and Superseded if another attempt at the run has begun since.
    """
    files = study.run_files(run_id)
    with run_lock(files.directory) as attempt:
        if attempt is None or files.result.exists():
            return False
        note = functools.partial(attempts.note, files.directory, attempt=attempt)
        begin = functools.partial(attempts.begin, files.directory, attempt)
        try:
            kind, run = study.read_spec(run_id)
            train = load_function(kind)
        except UserError as error:
            begin()
            on_claim()
            attempts.give_up(files, "failed", str(error), None)
            note("end", outcome="failed")
            return True
        together = {"processes": processes} if kind == "train" and processes > 1 else {}
        begin(**together)
        on_claim()
        try:
            result = train(
                run,
                files.directory,
                run_id,
                checkpoint_every_s=checkpoint_every_s,
                should_stop=should_stop,
                on_progress=Heartbeat(files.progress, run.steps),
                say=lambda why: note("restarted", cause=why),
                retry_oom=retry_oom,
                **({**together, "nodes": nodes} if together else {}),
            )
            note("end", outcome=result["outcome"])
        except Superseded:
            cause = attempts.superseded_by(files.directory, attempt)
            if not files.result.exists():  # else the log is complete, and the manifest may have it
                note("refused", cause=cause)
            print(cause, file=sys.stderr)
            raise
        except UserError as error:
            attempts.give_up(files, "failed", str(error), digest(identity_of(kind, run)))
            note("end", outcome="failed")
        except Interrupted:
            note("stopped")
            raise
        files.progress.unlink(missing_ok=True)
        return True


class Worker:
    """The state of this worker process, and its reports to the driver.

    The event `stop` stops the run in progress with a checkpoint; the event `end` also ends the worker. Both
    are set on SIGINT, when a bound worker's driver has ended, and when the session says so. In a Slurm job,
    SIGTERM sets only `stop`: the job may be preempted and requeued, or killed. If the job goes on, the worker
    resumes the run.
    """

    def __init__(self, session: Session, name: str, *locks: str):
        self.session = session
        self.name = name
        files = [session.root.parent / f"{lock}.lock" for lock in locks]
        self.locks = [FileLock(file, fallback_to_soft=False) for file in files]
        self.about = session.about()
        self.bound = self.about["bound"]
        if self.bound:
            os.nice(5)  # so that `status` and other commands answer quickly while workers train
        self.study = Study((session.root / self.about["study"]).resolve())
        if self.study.own.is_dir():
            remember(self.study.own)
        self.surroundings = attempts.surroundings()
        count = self.about.get("nodes_per_run", 1)
        self.nodes = Nodes(count, session.nodes_file(name)) if count > 1 else None
        self.run_id: str | None = None  # of the run in progress
        self.taken = 0
        self.started = False  # everything is imported, and a run has ended or there was none
        self.listed: dict[str, Any] | None = None  # the list that was searched last
        self.done: set[str] = set()  # runs on that list that are known to have a result
        self.stop, self.end = threading.Event(), threading.Event()
        self.told_to_end = False  # by the session or a driver's end, not by a signal
        self.replaced = False  # this process no longer counts as the worker
        self.process = {"pid": os.getpid(), "host": os.uname().nodename}
        self.parent = os.getppid()
        session.note("process", name, **self.process)
        signal.signal(signal.SIGINT, lambda *_: self._end())
        signal.signal(signal.SIGHUP, lambda *_: self._end())
        signal.signal(signal.SIGTERM, lambda *_: self._end() if self.bound else self.stop.set())
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm warns every process; submitit's responds
        threading.Thread(target=self._watch, daemon=True).start()
        self.say()

    def _end(self) -> None:
        self.end.set()
        self.stop.set()

    def _watch(self) -> None:
        """End this worker once the session says so, its driver is gone, or this process no longer counts as
        the worker. Kill this process if it has not ended GRACE_S seconds later."""
        while not self.end.is_set():
            why = ""  # why this process no longer counts as the worker
            process = self.session.noted("process", self.name) or self.process
            if process != self.process:
                why = f"its job was started again on {process['host']} (process {process['pid']})"
            elif os.getppid() != self.parent:
                why = "the process that started it is gone"
            if why:
                self.replaced = True
                who = f"worker {self.name}, process {self.process['pid']} on {self.process['host']}"
                print(f"{who}, ends: {why}", file=sys.stderr)
            gone = not self.session.root.exists() or (self.bound and not is_locked(self.session.lock_path))
            tasks = None if gone else self.session.tasks()
            if self.replaced or gone or (tasks is not None and tasks["stop"]):
                self.told_to_end = True
                self._end()
            self.end.wait(WATCH_S)
        time.sleep(GRACE_S)
        os._exit(1)

    def say(self, **more: Any) -> None:
        """Publish this worker's note for the driver, unless this process no longer counts as the worker."""
        if not self.replaced:
            now = {"run_id": self.run_id, "ran": self.taken, "started": self.started}
            self.session.note("worker", self.name, **now, **self.surroundings, **more)

    def work(self) -> int:
        """Train runs until this worker is to end. Return 0 if the worker was told to end or was idle for too
        long, 130 after a signal, EX_IOERR if it cannot write, and EX_TEMPFAIL if its device failed."""
        with suppress(OSError, UserError, LookupError, TypeError):
            # import what the first run needs before claiming it: torch takes seconds
            first = (self.session.tasks() or {"runs": []})["runs"][0]
            load_function(read_json(self.study.run_files(first).spec, SpecRecord)["kind"])
        try:
            for lock in self.locks:  # a GPU's, once no other worker holds it
                while not lock.is_locked and not self.end.is_set():
                    try:
                        lock.acquire(timeout=min(WATCH_S, self.about["beat_s"]), poll_interval=POLL_S)
                    except Timeout:
                        self.say(beat=time.monotonic())
            self._work()
        except DeviceFailed as error:  # the driver counts the run as lost, and starts another worker
            self.say(cause=str(error), device_failed=True)
            return os.EX_TEMPFAIL
        except OSError as error:
            self.say(error=f"{error.filename or self.study.root}: {error.strerror or error}")
            return os.EX_IOERR
        return 130 if self.end.is_set() and not self.told_to_end else 0

    def _work(self) -> None:
        """Train one run after another until this worker is to end, or has been idle for `idle_s` seconds."""
        poll_s = POLL_S if self.bound else POLL_SHARED_S
        idle_s = float("inf") if self.about["idle_s"] is None else self.about["idle_s"]
        worked = beat = time.monotonic()
        while not self.end.is_set():
            if self.stop.is_set():
                self.end.wait(min(PAUSE_S, self.about["beat_s"]))
                self.stop.clear()
            elif self._train_next():
                worked = time.monotonic()
            elif time.monotonic() - worked > idle_s:
                return
            else:
                if time.monotonic() - beat > self.about["beat_s"]:
                    beat = time.monotonic()
                    self.started = True
                    self.say(beat=beat)
                self.stop.wait(poll_s)

    def _train_next(self) -> bool:
        """Train the first free run on the list. Return whether there was a free one."""
        tasks = self.session.tasks()
        if tasks is None:  # the list cannot be read at the moment
            return False
        if tasks is not self.listed:  # a later driver may have removed results
            self.listed, self.done = tasks, set()
        for run_id in tasks["runs"]:
            if run_id in self.done or self.name in tasks["barred"].get(run_id, ()):
                continue
            if self.study.has_result(run_id):
                self.done.add(run_id)
            elif self._train(run_id, last_try=run_id in tasks["barred"]):
                return True
        return False

    def _train(self, run_id: str, *, last_try: bool) -> bool:
        """Train a run unless another worker has it. Return whether the run was free. `last_try`: whether a
        GPU has already failed during the run; if so, this attempt leaves a result even if memory runs out."""

        def claimed() -> None:
            self.run_id = run_id
            self.taken += 1
            self.say()

        elsewhere = self.about["several_gpus"] and not last_try and not self.name.startswith(GUEST)
        with suppress(Interrupted, Superseded):
            free = train_claimed(
                self.study,
                run_id,
                checkpoint_every_s=self.about["checkpoint_every_s"],
                should_stop=self.stop.is_set,
                on_claim=claimed,
                processes=self.about["processes_per_run"],
                nodes=self.nodes,
                retry_oom=elsewhere,
            )
            if not free:
                return False
        self.run_id = None
        self.started = True
        self.say()
        return True


def main() -> None:
    """Run the worker that the command line describes, and exit with the worker's exit code."""
    sys.exit(Worker(Session(Path(sys.argv[1])), *sys.argv[2:]).work())


if __name__ == "__main__":
    main()
