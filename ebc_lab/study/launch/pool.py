"""Worker processes that share one list of runs: offered, watched, retried and given up.

A pool is opened once per study and fed stage after stage, so that each worker imports torch once.
Instructions to workers travel as JSON (`session.py`), and results are read from the runs' own files. Workers
take runs from one list, each one at a time, so the others take over what a dead worker leaves.

A run that loses its worker is charged for it, and given up once it has cost more than `max_lost`; where the
worker's GPU alone is to blame it is not.
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

MAX_FAILED_STARTS = 3  # workers in a row that die, or exit, before they take a run
RUNS_TO_AVOID = 2  # different runs in a row that lost their worker in one place, before it is avoided
WATCH_S = 1.0  # between two checks of the signs of life
PAUSE = 20  # times what a look took, before the next: a driver shares the cores with its workers
# (run ids newly done, the run id of each busy worker), called at every poll; raises to stop the wave
# -> the spare runs from now on, None where they stay as they are
CheckIn = Callable[[Sequence[str], Sequence[str]], Sequence[str] | None]
Say = Callable[[str], None]
Note = Mapping[str, Any]  # of a worker: `session.Note`


class WorkersFailed(Exception):
    """Workers die before they do anything, or all were cancelled; says where to read why."""


class Death(NamedTuple):
    """A worker that has ended."""

    worker: str
    cause: str
    log: Path
    clean: bool = False  # it exited by itself because nothing was left for it
    counts: bool = True  # this driver started it, so that a failure to start says something about the setup


class Signs:
    """The last sign of life of each of several things, and since when it has been the same, on this process's
    own clock, which cannot jump."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[Any, float]] = {}  # what it is of -> the sign, and when it was first seen

    def unchanged_s(self, key: str, sign: Any) -> float:
        """Note the sign that is seen now, and return for how many seconds it has been the same."""
        now = time.monotonic()
        if key not in self.known or self.known[key][0] != sign:
            self.known[key] = sign, now
        return now - self.known[key][1]

    def forget(self, key: str) -> None:
        """Drop what is known of one thing, so that its next sign counts as its first."""
        self.known.pop(key, None)


class WorkerPool(ABC):
    """What pools of worker processes on this machine and in Slurm jobs have in common."""

    poll_s = 0.1

    def __init__(self, config: Config, study: Study, session: Session, slots: int, say: Say):
        self.config = config
        self.study = study
        self.session = session
        self.slots = slots
        self.say = say
        self.specs: dict[str, RunSpec] = {}  # of the wave that is trained
        self.offered: list[str] = []
        self.published: Any = None  # what workers read now
        self.lost: Counter[str] = Counter()  # run id -> workers it has cost
        self.killed: dict[str, str] = {}  # worker -> why we killed it
        self.failed_starts = 0
        # place where workers run -> the runs that lost theirs there since one was finished there
        self.places: defaultdict[str, set[str | None]] = defaultdict(set)
        self.avoided: dict[str, str] = {}  # place where no more workers are started -> why
        self.watched = 0.0  # when signs of life were last looked for
        self.signs = Signs()  # of workers
        self.trained = Signs()  # worker -> its run, and how long it has been on it
        self.unclaimed = Signs()  # of runs that other processes hold
        self.guests: list[str] = []  # workers that joined from elsewhere
        self.silent: set[str] = set()  # those of them that were said to show no sign of life

    @abstractmethod
    def _start_workers(self, wanted: int) -> None:
        """Have `wanted` workers, but no more than `slots`."""

    @abstractmethod
    def _deaths(self) -> list[Death]:
        """Return the workers that have died since the last call."""

    @abstractmethod
    def _running_workers(self) -> list[str]:
        """Return the workers that should show signs of life: started, neither queued nor gone."""

    @abstractmethod
    def _kill(self, worker: str) -> None:
        """Kill a worker that no longer responds."""

    @abstractmethod
    def _place(self, worker: str, note: Note) -> str | None:
        """Return what may be broken where workers keep dying: a node, or a slot with its GPU."""

    @abstractmethod
    def close(self) -> None:
        """Let the workers write checkpoints, and wait until they are gone."""

    def leave(self) -> None:
        """Close, or leave the workers to a later driver, because this one was interrupted."""
        self.close()

    def run(
        self, specs: Sequence[RunSpec], spare: Sequence[RunSpec], check_in: CheckIn, *, canary: bool
    ) -> None:
        """Train `specs` to their results, longest first; a worker with nothing left to do starts on `spare`,
        to which `check_in` may add.

        With `canary` the first run goes alone until it has taken a step; if it fails, the next one goes
        alone. Returns when `specs` are done, whatever the state of the spare ones. Raises what `check_in`
        raises, WorkersFailed, and UserError (a worker cannot write).
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
            # before a new worker reads the list
            self._offer(ordered[:tried], spares if tried == len(ordered) else [])
            wanted = len(left)
            if wanted < self.slots:  # then spare runs are trained, too
                wanted += sum(r not in left and not self.study.has_result(r) for r in self.offered)
            self._start_workers(wanted)
            time.sleep(pause_s)

    def _offer(self, runs: Sequence[str], spares: Sequence[str]) -> None:
        """Publish this list, unless workers have it already."""
        self.offered = [*runs, *spares]
        now = (self.offered, self._barred())
        if now != self.published:
            self.published = now
            self.session.publish(self.offered, barred=now[1])

    def _barred(self) -> dict[str, list[str]]:
        """Return, by run under which a GPU has failed, the workers that leave it to others."""
        return {}

    def _has_started(self, run_id: str) -> bool:
        """Return whether a canary has survived its start: it has taken a step, or it has a result."""
        if result := self.study.result(run_id):
            return result["outcome"] in FINISHED
        return bool((self.study.progress(run_id) or {}).get("step"))

    # -- watching --------------------------------------------------------------------------------------------

    def _watch_workers(self, notes: Mapping[str, Note], left: Collection[str]) -> None:
        """Record the workers that have died, and look for signs of life of the others."""
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
        for worker in set(self.signs.known) - {*running, *self.guests}:  # a job may wait in the queue again
            self._forget_signs(worker)
        for worker in running:
            self._check_heartbeat(worker, notes.get(worker, {}))
        patience_s = _patience_s(launcher, started=False)
        for worker in self.guests:  # only its own machine could end one, so this is only said, once
            note = notes.get(worker, {})
            if self._silence_of(worker, note)[0] > patience_s and worker not in self.silent:
                self.silent.add(worker)
                where = note.get("host", "its machine")
                self.say(f"{_on(worker, note)}: no sign of life for {patience_s:g} s; end it on {where}")
        self._free_silent_runs([notes[worker] for worker in running if worker in notes], left)

    def _check_heartbeat(self, worker: str, note: Note) -> None:
        """Kill a worker that shows no sign of life, or takes longer over a run than allowed."""
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
        """Return for how long a worker has shown no sign of life (progress of its run or, without any, the
        heartbeat in its note), and whether it has started: it has taken a step, or waits for a run."""
        run_id = note.get("run_id")
        progress = self.study.progress(run_id) if run_id else None
        silent_s = self.signs.unchanged_s(worker, (run_id, progress or note.get("beat")))
        return silent_s, bool(note.get("started") or (progress or {}).get("step"))

    def _forget_signs(self, worker: str) -> None:
        self.signs.forget(worker)
        self.trained.forget(worker)

    def _free_silent_runs(self, notes: Sequence[Note], left: Collection[str]) -> None:
        """Free the runs that are held by a process from which nothing is heard: its node is cut off, and its
        job counts as over or was started again elsewhere."""
        # only while a worker finds no run that it can claim: then every other one is held by somebody
        if not any(note.get("started") and note.get("beat") and not note.get("run_id") for note in notes):
            return
        trained = {note.get("run_id") for note in notes}
        for run_id in self.offered:
            if run_id not in left or run_id in trained or self.study.has_result(run_id):
                self.unclaimed.forget(run_id)
            elif why := release_if_silent(self.study, run_id, self.config.launcher, self.unclaimed):
                self.say(f"{run_id}: {why}")

    def _see_guests(self, notes: Mapping[str, Note]) -> None:
        """Say which workers have joined, and record those that have died: the kernel frees a guest's lock. A
        guest that has a run has held its lock; without it, it has died, even between two looks."""
        there = self.session.guests(notes)
        for worker in (w for w in there if w not in self.guests):
            self.say(f"worker {worker} has joined, on {notes[worker].get('host', '?')}")
        at_work = (w for w, note in notes.items() if w.startswith(GUEST) and note.get("run_id"))
        for worker in dict.fromkeys(w for w in (*self.guests, *at_work) if w not in there):
            note = notes.get(worker) or self.session.noted("worker", worker)
            if note is None:
                self.say(f"worker {worker} has left")
                continue
            cause = self.session.exit_cause(worker) or "its process was killed, or its machine is gone"
            run_id = note.get("run_id")
            clean = not run_id or self.study.has_result(run_id)
            log = self.session.log_path(worker)
            self._record_death(Death(worker, cause, log, clean=clean, counts=False), note)
        self.guests = there

    # -- deaths ----------------------------------------------------------------------------------------------

    def _record_death(self, death: Death, note: Note) -> None:
        """Charge the run of a worker that has died, unless its GPU is to blame, and give the run up once it
        has cost too many workers. Raises WorkersFailed once MAX_FAILED_STARTS workers in a row have ended
        before they took a run."""
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
        said = note.get("cause") if note.get("device_failed") else None
        device_failed = self._device_is_to_blame(worker, said, run_id)
        if not device_failed:
            finished = int(note.get("ran") or 0) > (1 if run_id else 0)
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

    def _device_is_to_blame(self, worker: str, said: str | None, run_id: str | None) -> bool:
        """Return whether a run lost its worker to its GPU alone. `said`: what the worker said of the GPU's
        failure, if it said anything before its end."""
        return False

    def _blame_place(self, place: str | None, run_id: str | None, *, finished: bool) -> None:
        """Avoid a place where workers die on one run after another and finish none in between, while others
        do not. `finished`: this one had finished a run."""
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
    """Return what a sentence about a worker begins with: which it is, and which run it is on."""
    return f"worker {worker} on {note['run_id']}" if note.get("run_id") else f"worker {worker}"


def _patience_s(launcher: LauncherConfig, *, started: bool) -> float:
    """Return for how long a worker may show no sign of life. Before its first step it imports and builds,
    which may take minutes on a cold disk."""
    return launcher.heartbeat_s if started else max(launcher.start_s, launcher.heartbeat_s)


def release_if_silent(study: Study, run_id: str, launcher: LauncherConfig, signs: Signs) -> str | None:
    """Take the lock of a run away from a process that has shown no sign of life for long; another may claim
    the run then, and the first can write no more. Returns why, in words; None where the run is left as it is.
    """
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
    files.lock.unlink(missing_ok=True)  # what the process holds from now on is a lock that nobody asks for
    signs.forget(run_id)
    return why


def slots(config: Config) -> int:
    """Return how many workers run at a time, each with one run, under a resolved configuration: jobs, or here
    one (or more) per GPU or core group."""
    launcher = config.launcher
    if launcher.name == "inline":
        return 1
    if launcher.name == "slurm" or launcher.slots:
        return launcher.slots
    together = launcher.processes_per_run
    gpus = visible_gpus(together) if config.device == "cuda" else []
    on_gpus = len(gpus) // together * launcher.workers_per_gpu
    return on_gpus or max(1, cores() // (together * max(1, config.threads_per_run)))
