"""One worker: `python -m ebc_lab.study.launch.worker SESSION NAME [PLACE…]`. It trains the session's runs,
up to `runs_per_worker` at a time. It holds its PLACEs, a GPU each, for as long as it lives, and waits for
them first: a worker of a driver that was killed may still be there, writing a checkpoint.

Runs that share a worker take turns in one thread, a block of steps each; on a GPU each has a stream of its
own. Sharing changes no bit of any run. `Worker.sharing_class` says which runs share a worker.

A worker claims a run by its lock, so no run is ever trained twice at once. On this machine (`bound`) it ends
when the list is closed and done, or when the driver's lock is free: the driver is gone, for whatever reason.
In a Slurm job it survives its driver, until the list is done and it has been idle for `idle_s`.
"""

from __future__ import annotations

import functools
import importlib
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

from filelock import FileLock, Timeout

from ebc_lab.config.errors import UserError, any_of
from ebc_lab.config.identity import canonical_json, digest, identity_of
from ebc_lab.config.own.sources import remember
from ebc_lab.records.fence import Superseded
from ebc_lab.records.json_files import read_json, write_checksummed
from ebc_lab.records.locks import locked, run_lock
from ebc_lab.records.paths import RunFiles, SpecRecord
from ebc_lab.records.streams import Heartbeat, rows_in
from ebc_lab.training.nodes import Nodes
from ebc_lab.training.turns import DeviceFailed, Interrupted, Progress, to_the_end

from ..store import attempts
from ..store.study import Study
from .session import Session

# Kind of run -> the function that trains it, as "module:function", imported only when such a run is claimed.
# It is called with (run, directory, run_id, checkpoint_every_s=…, should_stop=…, on_progress=…, say=…),
# writes result.json, and is a generator that yields between blocks of steps. `train` also takes processes=….
KINDS = {
    "train": "ebc_lab.training.outcome:recorded_run",
    "overhead": "ebc_lab.bench.pairs:overhead_run",
    "step": "ebc_lab.bench.pairs:step_run",
    "idle": "ebc_lab.study.launch.idle:idle",
}
TOGETHER = "train"  # the kind that several processes can train together
MEASUREMENTS = ("overhead", "step")  # kinds that measure time, and so share a worker with nothing
POLL_S = 0.1
POLL_SHARED_S = 1.0  # in a Slurm job: every worker reads the same folder on a shared file server
WATCH_S = 1.0
LOOK_SHARE = 20  # times what a look through the list took, before the next
GRACE_S = 60.0  # for a checkpoint, once asked to stop; then this process ends itself
PAUSE_S = 60.0  # after SIGTERM in a Slurm job: time for Slurm to do what it announced
CANNOT_WRITE = 74  # exit codes, from sysexits.h: an input/output error
DEVICE_FAILED = 75  # a temporary failure

NOTHING_TO_DO: dict[str, Any] = {  # while the list cannot be read
    "runs": [],
    "alone": [],
    "barred": {},
    "retired": [],
    "slots": 1,
    "closed": False,
}

Turns = Generator[None, None, bool]  # of a claimed run; yields between blocks of steps


def function_of(kind: str) -> Callable[..., Progress]:
    """Return the function that trains a kind of run. Raises UserError for an unknown kind."""
    if kind not in KINDS:
        raise UserError(f"a run of kind {kind!r} is unknown here; the kinds are {any_of(list(KINDS))}.")
    module, _, name = KINDS[kind].partition(":")
    function: Callable[..., Progress] = getattr(importlib.import_module(module), name)
    return function


def carry(
    study: Study,
    run_id: str,
    *,
    checkpoint_every_s: float,
    should_stop: Callable[[], bool],
    still_wanted: Callable[[], bool] = lambda: True,
    beside: Callable[[], int] = lambda: 0,
    processes: int = 1,
    nodes: Nodes | None = None,
) -> Turns:
    """Train one planned run to its result, unless another process has it, yielding between blocks of steps.

    The first `yield` means that the run is claimed; the value is whether this call trained it.
    `still_wanted`: asked once the run's lock is held, for a driver that takes a result back says first what
    is to become of the run; `beside`: says how many other runs the same worker is on, for the log;
    `processes`: how many train it together, on so many `nodes`. Raises Interrupted (with a checkpoint
    written) once `should_stop()`, OSError if the folder cannot be written, DeviceFailed, and Superseded where
    another attempt has begun although this one was under way.
    """
    files = study.run_files(run_id)
    with run_lock(files.directory) as mine:
        if not mine or files.result.exists() or not still_wanted():
            return False
        problem: UserError | None = None
        try:
            kind, run = study.read_spec(run_id)
            train = function_of(kind)
        except UserError as error:
            problem = error
        several = problem is None and kind == TOGETHER and processes > 1
        together: dict[str, Any] = {"processes": processes} if several else {}
        note = functools.partial(attempts.note, files.directory, attempt=mine)
        note("begin", beside=beside(), **together, **attempts.surroundings())
        yield
        if problem is not None:
            _record_refusal(files, run_id, problem)
            return True
        hooks: dict[str, Any] = {
            "checkpoint_every_s": checkpoint_every_s,
            "should_stop": should_stop,
            "on_progress": Heartbeat(files.progress, run.steps),
            **({"nodes": nodes} if several else {}),
            "say": lambda why: note(attempts.RESTARTED, cause=why),
        }
        try:
            result = yield from train(run, files.directory, run_id, **hooks, **together)
            note("end", outcome=result["outcome"], beside=beside())
        except Superseded:
            cause = attempts.superseded_by(files.directory, mine)
            if not files.result.exists():  # else the log is over, too, and the manifest may have recorded it
                note(attempts.REFUSED, cause=cause)
            print(cause, file=sys.stderr)
            raise
        except UserError as error:
            _record_refusal(files, run_id, error, digest(identity_of(kind, run)))
        except Interrupted:
            note("stopped")
            raise
        files.progress.unlink(missing_ok=True)
        return True


def execute(study: Study, run_id: str, **how: Any) -> bool:
    """Return `carry` without yielding to other runs. -> whether this call trained the run."""
    return to_the_end(carry(study, run_id, **how))


def _record_refusal(files: RunFiles, run_id: str, error: UserError, identity: str | None = None) -> None:
    """Record why this run cannot be trained, in the error's words; its files stay as they are."""
    result = {"run_id": run_id, "identity": identity, "outcome": "failed", "cause": str(error)}
    write_checksummed(files.result, {**result, "steps": rows_in(files.steps)})
    attempts.note(files.directory, "end", outcome="failed")


class _Stop:
    """Whether to stop the runs of this worker, and whether the worker is to end as well.

    SIGINT, a freed driver's lock, or `stop` in the session: both. SIGTERM in a Slurm job: it may be preempted
    and requeued, or killed; each run is stopped with a checkpoint, and resumed if nothing happens.
    """

    def __init__(self, session: Session, name: str, *, bound: bool):
        self.session = session
        self.name = name
        self.here = (os.uname().nodename, os.getpid())
        self.parent = os.getppid()
        self.noted = False  # who started this process has noted it
        self.replaced = False  # nobody takes this process for the worker any more
        self.bound = bound
        self.event = threading.Event()
        self.final = threading.Event()
        self.told_to_end = False
        signal.signal(signal.SIGINT, lambda *_: self._end())
        signal.signal(signal.SIGHUP, lambda *_: self._end())
        signal.signal(signal.SIGTERM, lambda *_: self._end() if bound else self.event.set())
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm warns every process; submitit's answers
        threading.Thread(target=self._watch, daemon=True).start()

    def _end(self) -> None:
        self.final.set()
        self.event.set()

    def _watch(self) -> None:
        while not self.final.is_set():
            if why := self._nobody_waits():
                self.replaced = True
                print(
                    f"worker {self.name}, process {self.here[1]} on {self.here[0]}, ends: {why}",
                    file=sys.stderr,
                )
            if self.replaced or self._session_is_over():
                self.told_to_end = True
                self._end()
            self.final.wait(WATCH_S)
        time.sleep(GRACE_S)
        os._exit(1)

    def _nobody_waits(self) -> str:
        """Say why nobody takes this process for the worker any more; empty as long as somebody does."""
        process = self.session.process(self.name)
        self.noted |= process == self.here
        if not self.noted:
            return ""
        if process is not None and process != self.here:
            return f"its job was started again on {process[0]} (process {process[1]})"
        if os.getppid() != self.parent:
            return "the process that started it, and with it its job, is gone"
        return ""

    def _session_is_over(self) -> bool:
        if not self.session.root.exists() or (self.bound and not locked(self.session.lock_path)):
            return True
        tasks = self.session.tasks()
        return tasks is not None and tasks["stop"]

    def __call__(self) -> bool:
        return self.event.is_set()


class Worker:
    """The runs of this process, and what it tells the driver about them."""

    def __init__(self, session: Session, name: str, *places: str):
        self.session = session
        self.name = name
        folder = session.root.parent
        self.held = [FileLock(folder / f"{place}.lock", fallback_to_soft=False) for place in places]
        self.about = session.about()
        self.study = Study((session.root / self.about["study"]).resolve())
        if self.study.own.is_dir():
            remember(self.study.own)
        self.surroundings = attempts.surroundings()
        count = self.about.get("nodes_per_run", 1)
        self.nodes = Nodes(count, session.nodes_file(name)) if count > 1 else None
        self.turns: dict[str, Turns] = {}  # run id -> the run, for each run in progress
        self.sharing: dict[str, str | None] = {}  # run id -> its `sharing_class`, for each run in progress
        self.taken = 0
        self.started = False  # everything is imported, and the first run is built
        self.left: list[str] = []  # runs on the list that had no result when it was last looked through
        self.listed: dict[str, Any] | None = None  # that list
        self.results_due = 0.0  # when to look through it again
        self.leaving = False  # every run is stopped with a checkpoint, because one of them cannot write
        self.look_at = 0.0  # while runs are in progress: when to look for another one
        self.stop = _Stop(session, name, bound=self.about["bound"])
        self.say()

    def say(self, **more: Any) -> None:
        if self.stop.replaced:  # the note is the other one's
            return
        now = {"run_ids": list(self.turns), "ran": self.taken, "started": self.started}
        self.session.note(self.name, **now, **self.surroundings, **more)

    def work(self) -> int:
        """Train until nothing is left. -> exit code: 0 done or told to end, 74 cannot write, 75 GPU lost, 130
        stopped."""
        self._import_ahead()
        try:
            if not all(self._wait_for(place) for place in self.held):
                return 0 if self.stop.told_to_end else 130
            return self._work()
        except DeviceFailed as error:  # the driver counts the runs as lost, and starts another worker
            for turns in self.turns.values():
                with suppress(Exception):  # nothing can be saved from a device that is gone
                    turns.close()
            own_fault = [r for r in self.turns if self.study.has_result(r)]
            self.say(cause=str(error), device_failed=True, **({"guilty": own_fault} if own_fault else {}))
            return DEVICE_FAILED
        except OSError as error:
            what = f"{error.filename or self.study.root}: {error.strerror or error}"
            self._checkpoint_all()
            self.say(error=what)
            return CANNOT_WRITE

    def _import_ahead(self) -> None:
        """Import what the first run on the list needs, before it is claimed: torch takes seconds."""
        with suppress(OSError, UserError, LookupError, TypeError):
            first = (self.session.tasks() or {"runs": []})["runs"][0]
            function_of(read_json(self.study.run_files(first).spec, SpecRecord)["kind"])

    def _wait_for(self, place: FileLock) -> bool:
        """Hold a GPU of this worker, once no other worker does. -> False if it is asked to end before."""
        while not self.stop.final.is_set():
            try:
                place.acquire(timeout=min(WATCH_S, self.about["beat_s"]), poll_interval=POLL_S)
                return True
            except Timeout:
                self.say(beat=time.monotonic())
        return False

    def _work(self) -> int:
        poll_s = POLL_S if self.about["bound"] else POLL_SHARED_S
        worked = beat = time.monotonic()
        while self.turns or not self.stop.final.is_set():
            if self.stop() and not self.turns:
                self.stop.final.wait(min(PAUSE_S, self.about["beat_s"]))
                self.stop.event.clear()
                continue
            tasks: dict[str, Any] = {"closed": False}
            if not self.stop() and self._may_take_another():
                tasks = self.session.tasks() or NOTHING_TO_DO
                self.look_at = 0.0 if self._take(tasks) else time.monotonic() + poll_s
            if self.turns:
                for run_id in list(self.turns):
                    self._advance(run_id)
                worked = time.monotonic()
                continue
            if (tasks["closed"] and not self.left) or self.name in tasks.get("retired", ()):
                return 0
            if self.about["idle_s"] is not None and time.monotonic() - worked > self.about["idle_s"]:
                return 0
            if time.monotonic() - beat > self.about["beat_s"]:
                beat = time.monotonic()
                self.started = True
                self.say(beat=beat)
            self.stop.event.wait(poll_s)
        return 0 if self.stop.told_to_end else 130

    # -- which runs ------------------------------------------------------------------------------------------

    def _may_take_another(self) -> bool:
        """Tell whether to look for another run; while some are in progress, no more often than an idle worker
        does."""
        if not self.turns:
            return True
        return len(self.turns) < self.about["runs_per_worker"] and time.monotonic() >= self.look_at

    def _take(self, tasks: dict[str, Any]) -> bool:
        """Claim the next run on the list, if it may share with those in progress. -> whether one was claimed.

        A worker takes no more than its share of what is left over the slots. A run that has to go alone is
        not skipped: nothing after it on the list is begun until those in progress are done, and then it is
        its turn.
        """
        self._look_for_results(tasks)
        share = math.ceil(len(self.left) / tasks["slots"])
        if len(self.turns) >= min(self.about["runs_per_worker"], share) or self.name in tasks["retired"]:
            return False
        for run_id in self.left:
            if run_id in self.turns or self._is_barred(run_id, tasks):
                continue
            if self.study.has_result(run_id):  # since the last look
                continue
            sharing = None if run_id in tasks["alone"] else self.sharing_class(run_id)
            if self.turns and (sharing is None or any(s != sharing for s in self.sharing.values())):
                if locked(self.study.run_files(run_id).lock):  # another worker has it
                    continue
                return False
            turns = carry(
                self.study,
                run_id,
                checkpoint_every_s=self.about["checkpoint_every_s"],
                should_stop=lambda: self.leaving or self.stop(),
                still_wanted=functools.partial(self._still_wanted, run_id, run_id in tasks["alone"]),
                beside=functools.partial(self._beside, run_id),
                processes=self.about["processes_per_run"],
                nodes=self.nodes,
            )
            try:
                next(turns)
            except StopIteration:  # another process has it
                continue
            self.turns[run_id] = turns
            self.sharing[run_id] = sharing
            self.taken += 1
            self.say()
            return True
        return False

    def _look_for_results(self, tasks: dict[str, Any]) -> None:
        """Find what is left of the list. A result may be taken back, so all of it is looked up again and
        again; of thousands of runs only so often that it takes a small part of the time."""
        began = time.monotonic()
        if tasks is not self.listed or began >= self.results_due:
            self.listed = tasks
            self.left = [r for r in tasks["runs"] if not self.study.has_result(r)]
            now = time.monotonic()
            self.results_due = now + LOOK_SHARE * (now - began)

    def _still_wanted(self, run_id: str, alone: bool) -> bool:
        """Tell whether the list as it is now leaves this run to this worker, and as it was thought: `alone`,
        or not. The list that it was chosen from may be older than its driver's last word on the run."""
        tasks = self.session.tasks()
        if tasks is None or self._is_barred(run_id, tasks):
            return False
        return (run_id in tasks["alone"]) == alone

    def _is_barred(self, run_id: str, tasks: dict[str, Any]) -> bool:
        """Tell whether this worker is to leave a run to others."""
        return self.name in tasks["barred"].get(run_id, ())

    def _beside(self, run_id: str) -> int:
        """Return how many runs are in progress beside this one."""
        return len(self.turns.keys() - {run_id})

    def sharing_class(self, run_id: str) -> str | None:
        """Return runs of the same class may share this worker; None: the run goes alone.

        Measurements of time go alone, and so do runs with a model of the user's, which may keep something
        for all models of its process. The number of threads belongs to the process and changes bits on a
        CPU, as deterministic kernels do, so runs share with runs of the same number and the same determinism.
        """
        if self.about["runs_per_worker"] == 1:
            return None
        try:
            spec = read_json(self.study.run_files(run_id).spec, SpecRecord)
            alone = spec["kind"] in MEASUREMENTS or spec["config"]["model"].get("target") is not None
            settings = [int(spec["config"]["threads_per_run"]), spec["config"].get("determinism")]
            return None if alone else canonical_json(settings)
        except (OSError, UserError, KeyError, TypeError, ValueError):
            return None  # the problem is reported when the run is claimed

    # -- the runs in progress --------------------------------------------------------------------------------

    def _advance(self, run_id: str) -> None:
        """Take one block of steps of one run. Raises DeviceFailed, and OSError if its folder cannot be
        written."""
        try:
            next(self.turns[run_id])
            if not self.started:
                self.started = True
                self.say()
            return
        except (StopIteration, Interrupted, Superseded):
            del self.turns[run_id], self.sharing[run_id]
        self.started = True
        self.look_at = 0.0
        self.say()

    def _checkpoint_all(self) -> None:
        """Stop every run with a checkpoint, as far as they can still write."""
        self.leaving = True
        for turns in self.turns.values():
            with suppress(Exception):
                while True:
                    next(turns)
        self.turns = {}


if __name__ == "__main__":
    sys.exit(Worker(Session(Path(sys.argv[1])), *sys.argv[2:4]).work())
