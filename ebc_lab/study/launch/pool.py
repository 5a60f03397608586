"""Worker processes that share one list of runs: how the runs are offered, watched, retried and given up.

A pool is opened once per study and given one stage after another, so that each worker imports torch once.
Workers read the list as JSON (`session.py`) and take one run at a time. If a worker dies, the others take
over its run. Results are read from the runs' own files. A worker's death counts against its run, unless only
the worker's GPU is to blame. A run that has lost more than `max_lost` workers is given up.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ebc_lab.config.errors import UserError
from ebc_lab.config.machine import cores, visible_gpus
from ebc_lab.config.schema import Config, LauncherConfig
from ebc_lab.records import fence
from ebc_lab.records.figures import FINISHED
from ebc_lab.records.locks import is_locked, run_lock
from ebc_lab.records.spec import RunSpec

from ..store import attempts
from ..store.study import Study
from .session import GUEST, Session

MAX_FAILED_STARTS = 3  # workers in a row that end before they take a run, after which none is started
RUNS_TO_AVOID = 2  # different runs in a row that lose their worker in one place, after which it is avoided
WATCH_S = 1.0  # between two checks for signs of life
PAUSE = 20  # ratio of a pause to the poll before it: a driver shares the cores with its workers
# Called at every poll with the ids of the runs newly done and of those in progress. Returns the spare runs
# from now on, or None to keep them as they are; raises an exception to stop training.
CheckIn = Callable[[Sequence[str], Sequence[str]], Sequence[str] | None]
Say = Callable[[str], None]
Note = Mapping[str, Any]  # a worker's `session.Note`


class WorkersFailed(Exception):
    """No worker can train any more; the message says why."""


class Death(NamedTuple):
    """The end of a worker."""

    worker: str
    cause: str
    log: Path
    clean: bool = False  # it ended because nothing was left for it, or because it was told to
    counts: bool = True  # if it took no run, that counts as a failed start


class Signs:
    """For each key, the latest sign of life and when it last changed, on this process's monotonic clock."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[Any, float]] = {}  # key -> the sign, and when it was first seen

    def unchanged_s(self, key: str, sign: Any) -> float:
        """Record the current sign of a key, and return the seconds since the key's sign last changed."""
        now = time.monotonic()
        if key not in self.known or self.known[key][0] != sign:
            self.known[key] = sign, now
        return now - self.known[key][1]

    def forget(self, key: str) -> None:
        """Forget a key, so that its next sign counts as its first."""
        self.known.pop(key, None)


class WorkerPool(ABC):
    """A pool of worker processes, on this machine or in Slurm jobs.

    A subclass begins a `Session` and starts workers as `python -m ebc_lab.study.launch.worker SESSION NAME`.
    The session's `bound` says whether workers end with the driver. If so, the driver holds the session's
    lock, and workers end once that lock is free. Every worker also ends once the process that started it is
    gone. The lock of a run is free a moment before the process that held it is gone. That process has ended
    once its parent notes "exit" in the session.
    """

    poll_s = 0.1

    def __init__(self, config: Config, study: Study, session: Session, slots: int, say: Say):
        self.config = config
        self.study = study
        self.session = session
        self.slots = slots
        self.say = say
        self.specs: dict[str, RunSpec] = {}  # run id -> spec, for the runs that `run` was called with last
        self.offered: list[str] = []
        self.published: Any = None  # the list and the barred workers as last published
        self.lost: Counter[str] = Counter()  # run id -> how many workers it has lost
        self.killed: dict[str, str] = {}  # worker -> why we killed it
        self.failed_starts = 0
        # place where workers run -> the runs that lost their worker there since a run was finished there
        self.places: defaultdict[str, set[str | None]] = defaultdict(set)
        self.avoided: dict[str, str] = {}  # place where no more workers are started -> why
        self.watched = 0.0  # time of the last check for signs of life
        self.signs = Signs()  # by worker
        self.trained = Signs()  # by worker; the sign is the run that it trains
        self.unclaimed = Signs()  # by run id, for runs that other processes hold
        self.guests: list[str] = []  # workers that joined from elsewhere
        self.silent: set[str] = set()  # guests that were already reported to show no sign of life

    @abstractmethod
    def _start_workers(self, wanted: int) -> None:
        """Start workers until there are `wanted` of them, but no more than `slots`."""

    @abstractmethod
    def _deaths(self) -> list[Death]:
        """Return a Death for each worker that has ended since the last call."""

    @abstractmethod
    def _running_workers(self) -> list[str]:
        """Return the workers that should show signs of life: those neither queued nor gone."""

    @abstractmethod
    def _kill(self, worker: str) -> None:
        """Kill a worker that no longer responds."""

    @abstractmethod
    def _place(self, worker: str, note: Note) -> str | None:
        """Return the node or slot where a worker runs, or None if that is unknown."""

    @abstractmethod
    def close(self) -> None:
        """Tell the workers to write checkpoints and stop, and wait until they have ended."""

    def leave(self) -> None:
        """Close the pool of an interrupted driver. A subclass may leave its workers to a later driver."""
        self.close()

    def run(
        self, specs: Sequence[RunSpec], spare: Sequence[RunSpec], check_in: CheckIn, *, canary: bool
    ) -> None:
        """Train `specs` to their results, costliest first. Idle workers train `spare`, which `check_in` may
        replace.

        With `canary`, the first run starts alone, and the others wait until it has taken a step. If it fails
        before that, the next run starts alone. Returns when `specs` are done, whatever the state of the spare
        runs. Raises what `check_in` raises, WorkersFailed, and UserError if a worker cannot write.
        """
        ordered = [s.run_id for s in sorted(specs, key=lambda s: -s.cost)]
        self.specs = {s.run_id: s for s in specs}
        spares: Sequence[str] = [s.run_id for s in spare]
        tried = 1 if canary else len(ordered)
        left = {run_id: str(self.study.run_files(run_id).result) for run_id in ordered}
        self._offer(ordered[:tried], spares if tried == len(ordered) else [])
        while True:
            began = time.monotonic()
            done = [run_id for run_id, result in left.items() if os.path.exists(result)]
            for run_id in done:
                del left[run_id]
            notes = self.session.notes()
            self._see_guests(notes)
            at_work = (*self._running_workers(), *self.guests)
            busy = [notes[w]["run_id"] for w in at_work if notes.get(w, {}).get("run_id")]
            pause_s = max(self.poll_s, PAUSE * (time.monotonic() - began))
            more = check_in(done, busy)
            if not left:
                return
            spares = spares if more is None else more
            if tried < len(ordered):
                if any(self._has_started(r) for r in ordered[:tried]):
                    tried = len(ordered)
                elif not any(r in left for r in ordered[:tried]):
                    tried += 1
            self._watch_workers(notes, left)
            # published before any new worker reads it
            self._offer(ordered[:tried], spares if tried == len(ordered) else [])
            wanted = len(left)
            if wanted < self.slots:  # the other slots train spare runs
                wanted += sum(r not in left and not self.study.has_result(r) for r in self.offered)
            self._start_workers(wanted)
            time.sleep(pause_s)

    def _offer(self, runs: Sequence[str], spares: Sequence[str]) -> None:
        """Publish these runs in this order, with the spares last, unless workers already have that list."""
        self.offered = [*runs, *spares]
        now = (self.offered, self._barred())
        if now != self.published:
            self.published = now
            self.session.publish(self.offered, barred=now[1])

    def _barred(self) -> dict[str, list[str]]:
        """Return, by run id, the workers that must not take the run, because a GPU of theirs failed in it."""
        return {}

    def _has_started(self, run_id: str) -> bool:
        """Return whether a run has survived its start: it has taken a step, or finished without failing."""
        if result := self.study.result(run_id):
            return result["outcome"] in FINISHED
        return bool((self.study.progress(run_id) or {}).get("step"))

    # -- watching --------------------------------------------------------------------------------------------

    def _watch_workers(self, notes: Mapping[str, Note], left: Collection[str]) -> None:
        """Record the workers that have ended, and check all others for signs of life. Raises UserError if a
        worker has reported that it cannot write."""
        for worker, note in notes.items():
            if note.get("error"):
                raise UserError(f"{note['error']}; fix that, and run the same command again.")
            if place := self._place(worker, note):
                self.places.setdefault(place, set())
        for death in self._deaths():
            note = notes.get(death.worker) or self.session.noted("worker", death.worker) or {}
            self._record_death(death, note)
        launcher = self.config.launcher
        if time.monotonic() - self.watched < min(WATCH_S, launcher.heartbeat_s / 4):
            return
        self.watched = time.monotonic()
        running = self._running_workers()
        for worker in set(self.signs.known) - {*running, *self.guests}:  # its job may be queued again
            self._forget_signs(worker)
        for worker in running:
            self._check_heartbeat(worker, notes.get(worker, {}))
        patience_s = _patience_s(launcher, started=False)
        for worker in self.guests:  # only its own machine can end one, so say it, once
            note = notes.get(worker, {})
            if self._silence_of(worker, note)[0] > patience_s and worker not in self.silent:
                self.silent.add(worker)
                where = note.get("host", "its machine")
                self.say(f"{_on(worker, note)}: no sign of life for {patience_s:g} s; end it on {where}")
        self._free_silent_runs([notes[worker] for worker in running if worker in notes], left)

    def _check_heartbeat(self, worker: str, note: Note) -> None:
        """Kill a worker that shows no sign of life, or that exceeds `launcher.run_timeout_s` on its run."""
        silent_s, started = self._silence_of(worker, note)
        run_id = note.get("run_id")
        limit_s = self.config.launcher.run_timeout_s
        patience_s = _patience_s(self.config.launcher, started=started)
        if silent_s > patience_s:
            still = "" if started else " since it was started,"
            why = f"no sign of life{still} for {patience_s:g} s"
        elif self.trained.unchanged_s(worker, run_id) > limit_s > 0 and run_id:
            why = f"longer than launcher.run_timeout_s, {limit_s:g} s"
        else:
            return
        if worker not in self.killed:
            self.say(f"{_on(worker, note)}: {why}; it is killed")
            self.killed[worker] = why
            self._kill(worker)

    def _silence_of(self, worker: str, note: Note) -> tuple[float, bool]:
        """Return the seconds since a worker's last sign of life, and whether the worker has started. A sign
        of life is progress of the worker's run or, without any progress, the heartbeat in the worker's note.
        A worker has started once it has taken a step, ended a run, or found no run to train."""
        run_id = note.get("run_id")
        progress = self.study.progress(run_id) if run_id else None
        silent_s = self.signs.unchanged_s(worker, (run_id, progress or note.get("beat")))
        return silent_s, bool(note.get("started") or (progress or {}).get("step"))

    def _forget_signs(self, worker: str) -> None:
        self.signs.forget(worker)
        self.trained.forget(worker)

    def _free_silent_runs(self, notes: Sequence[Note], left: Collection[str]) -> None:
        """Free the runs whose lock is held by a process that shows no sign of life. The node of such a
        process may be cut off while Slurm counts the job as over or has started it again elsewhere."""
        # only while a worker finds no run to claim: then some process holds each run that is left
        if not any(note.get("started") and note.get("beat") and not note.get("run_id") for note in notes):
            return
        trained = {note.get("run_id") for note in notes}
        for run_id in self.offered:
            if run_id not in left or run_id in trained or self.study.has_result(run_id):
                self.unclaimed.forget(run_id)
            elif why := release_if_silent(self.study, run_id, self.config.launcher, self.unclaimed):
                self.say(f"{run_id}: {why}")

    def _see_guests(self, notes: Mapping[str, Note]) -> None:
        """Report guest workers that have joined, and record those that have ended (they no longer hold
        their lock). One that came and went between two checks is seen only if its note still names a run."""
        alive = self.session.guests(notes)
        for worker in (w for w in alive if w not in self.guests):
            self.say(f"worker {worker} has joined, on {notes[worker].get('host', '?')}")
        at_work = (w for w, note in notes.items() if w.startswith(GUEST) and note.get("run_id"))
        for worker in dict.fromkeys(w for w in (*self.guests, *at_work) if w not in alive):
            note = notes.get(worker) or self.session.noted("worker", worker)
            if note is None:
                self.say(f"worker {worker} has left")
                continue
            cause = self.session.exit_cause(worker) or "its process was killed, or its machine is gone"
            run_id = note.get("run_id")
            clean = not run_id or self.study.has_result(run_id)
            log = self.session.log_path(worker)
            self._record_death(Death(worker, cause, log, clean=clean, counts=False), note)
        self.guests = alive

    # -- deaths ----------------------------------------------------------------------------------------------

    def _record_death(self, death: Death, note: Note) -> None:
        """Record a worker's end. A death counts against the run, unless the GPU is to blame; a run that has
        lost too many workers is given up. Raises WorkersFailed if MAX_FAILED_STARTS workers in a row took no
        run."""
        worker = death.worker
        cause = self.killed.pop(worker, "") or note.get("cause") or death.cause
        self.session.forget(worker)
        self._forget_signs(worker)
        if note.get("ran"):
            self.failed_starts = 0
        elif death.counts and not (death.clean and self.unclaimed.known):
            self.failed_starts += 1
        if self.failed_starts >= MAX_FAILED_STARTS:
            what = "find no run that they can claim" if death.clean else "die before they take a run"
            raise WorkersFailed(f"workers {what} ({cause}): read {death.log}.")
        if death.clean:
            return
        run_id = note.get("run_id")
        failure = note.get("cause") if note.get("device_failed") else None
        device_failed = self._device_is_to_blame(worker, failure, run_id)
        if not device_failed:
            finished = note.get("ran", 0) > (1 if run_id else 0)
            self._blame_place(self._place(worker, note), run_id, finished=finished)
        if run_id is None or self.study.has_result(run_id):
            return
        attempts.note(self.study.run_dir(run_id), "lost", worker=worker, cause=cause)
        self.say(f"{run_id} has lost its worker {worker}: {cause}")
        if device_failed or run_id not in self.specs:
            return
        self.lost[run_id] += 1
        if self.lost[run_id] <= self.config.launcher.max_lost:
            return
        files = self.study.run_files(run_id)
        with run_lock(files.directory) as mine:
            if mine and not files.result.exists():  # no other worker has taken it in the meantime
                times = "once" if self.lost[run_id] == 1 else f"{self.lost[run_id]} times"
                whole = f"its worker died {times}, at last: {cause}; its log: {death.log}"
                attempts.give_up(files, "lost", whole, self.specs[run_id].identity_sha256)

    def _device_is_to_blame(self, worker: str, failure: str | None, run_id: str | None) -> bool:
        """Return whether only the GPU is to blame for a worker's death. `failure`: what went wrong with the
        GPU, or None if the worker reported nothing."""
        return False

    def _blame_place(self, place: str | None, run_id: str | None, *, finished: bool) -> None:
        """Record a death in a place. Avoid the place if workers die there on one run after another and finish
        none in between, while other places work. `finished`: whether this worker had finished a run."""
        if place is None:
            return
        runs = self.places[place]
        if finished:
            runs.clear()
        runs.add(run_id)
        works = any(not lost for other, lost in self.places.items() if other not in self.avoided)
        if len(runs) >= RUNS_TO_AVOID and works:
            why = f"workers keep dying in {place}, and not elsewhere"
            self.avoided.setdefault(place, why)
            self.say(f"{why}: no more are started there")


def _on(worker: str, note: Note) -> str:
    """Return the subject of a sentence about a worker: its name and, if it has a run, the run's id."""
    return f"worker {worker} on {note['run_id']}" if note.get("run_id") else f"worker {worker}"


def _patience_s(launcher: LauncherConfig, *, started: bool) -> float:
    """Return for how many seconds a worker may show no sign of life. A worker that has not started gets
    longer, since importing modules and building a model may take minutes on a cold disk."""
    return launcher.heartbeat_s if started else max(launcher.start_s, launcher.heartbeat_s)


def release_if_silent(study: Study, run_id: str, launcher: LauncherConfig, signs: Signs) -> str | None:
    """Remove a run's lock if its holder has shown no sign of life for too long. Another process can then
    claim the run, and the holder can no longer write. Return the reason, or None if the lock stays."""
    files = study.run_files(run_id)
    if not is_locked(files.lock):
        signs.forget(run_id)
        return None
    attempt = fence.attempt_at(files.directory)
    progress = study.progress(run_id) or {}
    patience_s = _patience_s(launcher, started=bool(progress.get("step")))
    if signs.unchanged_s(run_id, (attempt, progress)) <= patience_s:
        return None
    begun = attempts.last_begin(files.directory)
    who = f"process {begun.get('pid', '?')} on {begun.get('host', '?')}"
    why = f"no sign of life for {patience_s:g} s of {who}, which holds it: it is given to another"
    attempts.note(files.directory, "lost", attempt=attempt, cause=why)
    files.lock.unlink(missing_ok=True)  # the silent process then holds a file that nobody checks
    signs.forget(run_id)
    return why


def slots(config: Config) -> int:
    """Return how many workers run at a time under a resolved configuration. Each worker trains one run at a
    time. With launcher=slurm, workers are jobs. With launcher=local, they are processes: by default
    `workers_per_gpu` for each GPU (or group of GPUs), or one for each group of cores."""
    launcher = config.launcher
    if launcher.name == "inline":
        return 1
    if launcher.name == "slurm" or launcher.slots:
        return launcher.slots
    together = launcher.processes_per_run
    gpus = visible_gpus(together) if config.device == "cuda" else []
    on_gpus = len(gpus) // together * launcher.workers_per_gpu
    return on_gpus or max(1, cores() // (together * max(1, config.threads_per_run)))
