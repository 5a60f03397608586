"""Worker processes that share one list of runs: offered, watched, retried and given up.

A pool is opened once per study and fed stage after stage, so that each worker imports torch once.
Instructions to workers travel as JSON (`session.py`), and results are read from the runs' own files. Workers
take runs from one list, so the others take over what a dead worker leaves.

A worker may carry several runs at a time. When it dies, the run to blame is known only if it took too long or
broke the device itself: that one is charged, and no other. Otherwise none is charged, and each runs alone
from then on; a run that loses its worker while alone is charged. So `max_lost` counts only what a run did by
itself.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebc_lab import __version__
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import NUMERICS_VERSION, digest
from ebc_lab.config.machine import cores, git_revision, versions, visible_gpus
from ebc_lab.config.schema import Config
from ebc_lab.records.figures import FINISHED
from ebc_lab.records.json_files import write_checksummed
from ebc_lab.records.locks import run_lock
from ebc_lab.records.spec import RunSpec
from ebc_lab.records.streams import rows_in

from ..store import attempts
from ..store.study import Study
from .session import GUEST, Session, exit_cause

MAX_FAILED_STARTS = 3  # workers in a row that die, or exit, before they take a run
RUNS_TO_AVOID = 2  # different runs in a row that lost their worker in one place, before it is avoided
WATCH_S = 1.0  # between two checks of the heartbeats
PAUSE = 20  # times what a look took, before the next: a driver shares the cores with its workers
# (run ids newly done, the run ids of each busy worker), called at every poll; raises to stop the wave
# -> the spare runs from now on, None where they stay as they are
CheckIn = Callable[[Sequence[str], Sequence[Sequence[str]]], Sequence[str] | None]
Say = Callable[[str], None]


class WorkersFailed(Exception):
    """Workers die before they do anything, or all were cancelled; says where to read why."""


@dataclass(frozen=True)
class Death:
    """A worker that has ended.

    `clean`: it exited by itself because nothing was left for it. `counts`: this driver started it, so that a
    failure to start says something about the setup.
    """

    worker: str
    cause: str
    log: Path
    clean: bool = False
    counts: bool = True


@dataclass(frozen=True)
class Alive:
    """The last sign of life of a worker, on this process's own clock, which cannot jump."""

    sign: Any
    since: float
    begun: dict[str, float]  # run id -> when the worker was first seen on it
    started: bool  # it says that it has taken a step, or that it waits for a run


class WorkerPool(ABC):
    """What pools of worker processes on this machine and in Slurm jobs have in common."""

    poll_s = 0.1

    def __init__(self, config: Config, study: Study, session: Session, slots: int, say: Say):
        self.config = config
        self.study = study
        self.session = session
        self.slots = slots
        self.say = say
        self.at_a_time = at_a_time(config)
        self.offered: list[str] = []
        self.published: tuple[Any, ...] = ()
        self.alone: set[str] = set()  # runs that may no longer share a worker
        self.final: set[str] = set()  # runs whose results are not taken back
        self.lost: dict[str, int] = {}  # run id -> workers it has cost
        self.killed: dict[
            str, tuple[str, list[str]]
        ] = {}  # worker -> why we killed it, and the runs to blame
        self.failed_starts = 0
        # place -> for each worker that died there in a row, the runs that may be to blame
        self.deaths_at: dict[str, list[set[str | None]]] = {}
        self.places: set[str] = set()
        self.avoided: set[str] = set()
        self.watched = 0.0
        self.idle: dict[str, Any] = {}  # worker without a run -> how many it had begun
        self.listened = 0.0
        self.silence = attempts.Silence()
        self.alive: dict[str, Alive] = {}
        self.guests: list[str] = []  # workers that joined from elsewhere
        self.silent: set[str] = set()  # those of them that were said to show no sign of life

    @abstractmethod
    def _start_workers(self, wanted: int) -> None:
        """Have `wanted` workers, but no more than `slots`."""

    @abstractmethod
    def _deaths(self) -> list[Death]:
        """Workers that have died since the last call."""

    @abstractmethod
    def _running_workers(self) -> list[str]:
        """Return the workers that should show signs of life: started, neither queued nor gone."""

    @abstractmethod
    def _kill(self, worker: str) -> None:
        """End a worker that no longer responds."""

    @abstractmethod
    def _place(self, worker: str, note: Mapping[str, Any]) -> str | None:
        """Return where a worker ran, as named in `avoided`: what may be broken when workers keep dying
        there."""

    @abstractmethod
    def close(self) -> None:
        """Let the workers write checkpoints, and wait until they are gone."""

    @abstractmethod
    def leave(self) -> None:
        """Note that the driver is interrupted: close, or leave the workers to a later driver."""

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
        by_id = {s.run_id: s for s in specs}
        spares: Sequence[str] = [s.run_id for s in spare]
        tried = 1 if canary else len(ordered)
        left = {run_id: self.study.run_files(run_id).result for run_id in ordered}
        self._offer([*ordered[:tried], *(spares if tried == len(ordered) else [])])
        while True:
            began = time.monotonic()
            self._retry_shared_memory_failures()
            done = [r for r, path in left.items() if path.exists() and self._is_final(r)]
            for run_id in done:
                del left[run_id]
            notes = self.session.notes()
            self._see_guests(notes, by_id)
            at_work = (*self._running_workers(), *self.guests)
            busy = [notes[w]["run_ids"] for w in at_work if notes.get(w, {}).get("run_ids")]
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
            self._offer([*ordered[:tried], *(spares if tried == len(ordered) else [])])
            self._watch_workers(notes, by_id)
            self._free_silent_runs(notes, left)
            self._offer(self.offered)  # before a new worker reads the list
            self._start_workers(len(left) + self._spare_left(left))
            time.sleep(pause_s)

    def _spare_left(self, left: Mapping[str, Path]) -> int:
        """Return how many spare runs wait for a worker; counted only where the wave leaves slots free."""
        if len(left) >= self.slots:
            return 0
        return sum(r not in left and not self.study.has_result(r) for r in self.offered)

    def _offer(self, runs: Sequence[str]) -> None:
        """Publish this list, which of its runs go alone, and over how many workers it is shared."""
        self.offered = list(runs)
        sharers, barred, retired = self._sharers()
        sharers += len(self.guests)
        now = (self.offered, [r for r in runs if r in self.alone], sharers, barred, retired)
        if now != self.published:
            self.published = now
            self.session.publish(now[0], alone=now[1], slots=max(1, now[2]), barred=now[3], retired=now[4])

    def _sharers(self) -> tuple[int, dict[str, list[str]], list[str]]:
        """Return how many workers share what is left; by run, those that leave it to others; and those that
        are to take no more."""
        return self.slots, {}, []

    def _retry_shared_memory_failures(self) -> None:
        """A run that ran out of memory while sharing a worker, or on one GPU of several, may only have lacked
        what others took: its result is removed, once, and it is tried again alone."""
        if not self._memory_may_suffice():
            return
        for run_id in self.offered:
            if self._is_final(run_id) or not (result := self.study.result(run_id)):
                continue
            where = self._try_elsewhere(run_id) if result["outcome"] == "oom" else None
            if where is None:
                self.final.add(run_id)
                continue
            self.say(f"{run_id} ran out of memory, maybe because of {where}")
            self.alone.add(run_id)
            self._offer(self.offered)  # first, so that no worker takes it together with others again
            self.study.run_files(run_id).result.unlink()

    def _is_final(self, run_id: str) -> bool:
        """Tell whether any result of this run would be kept."""
        return run_id in self.alone or run_id in self.final or not self._memory_may_suffice()

    def _memory_may_suffice(self) -> bool:
        """Tell whether some run that ran out of memory might find more when it is tried again."""
        return self.config.launcher.runs_per_worker > 1

    def _try_elsewhere(self, run_id: str) -> str | None:
        """Keep a run that ran out of memory from where it did, if there is anything else. -> what may have
        taken the memory, and how it is tried again, in words; None: nothing speaks for a second try."""
        shared = self.config.launcher.runs_per_worker > 1
        return "the runs next to it: it is tried again alone" if shared else None

    def _has_started(self, run_id: str) -> bool:
        """Tell whether a canary has survived its start: it has taken a step, or it has a result."""
        result = self.study.result(run_id)
        if result is not None:
            return result["outcome"] in FINISHED
        return bool((self.study.progress(run_id) or {}).get("step"))

    # -- watching --------------------------------------------------------------------------------------------

    def _watch_workers(self, notes: Mapping[str, Mapping[str, Any]], specs: Mapping[str, RunSpec]) -> None:
        for note in notes.values():
            if note.get("error"):
                raise UserError(f"{note['error']}; fix that, and run the same command again.")
        places = (self._place(worker, note) for worker, note in notes.items())
        self.places.update(place for place in places if place)
        for death in self._deaths():
            note = notes.get(death.worker) or self.session.notes().get(death.worker) or {}
            self._record_death(death, note, specs)
        if time.monotonic() - self.watched < min(WATCH_S, self.config.launcher.heartbeat_s / 4):
            return
        self.watched = time.monotonic()
        running = self._running_workers()
        for worker in set(self.alive) - {*running, *self.guests}:
            del self.alive[worker]
        for worker in running:
            self._check_heartbeat(worker, notes.get(worker, {}))
        for worker in self.guests:
            self._check_guest(worker, notes.get(worker, {}))

    def _free_silent_runs(self, notes: Mapping[str, Mapping[str, Any]], left: Collection[str]) -> None:
        """Give the runs to another worker that a process holds of which nothing is heard: its node is cut
        off, and its job counts as over or was started again elsewhere.

        Only while a worker finds no run that it can claim: then every other one is held by somebody.
        """
        if time.monotonic() - self.listened < WATCH_S:
            return
        self.listened = time.monotonic()
        notes = {worker: notes[worker] for worker in self._running_workers() if worker in notes}
        before = self.idle
        self.idle = {w: note.get("ran") for w, note in notes.items() if not note.get("run_ids")}
        waiting = any(before.get(w, -1) == ran and notes[w].get("started") for w, ran in self.idle.items())
        if not waiting:
            return
        carried = {run_id for note in notes.values() for run_id in note.get("run_ids") or []}
        offered = [run_id for run_id in self.offered if run_id in left and run_id not in carried]
        held = [run_id for run_id in offered if not self.study.has_result(run_id)]
        for run_id in held:
            if why := self.silence.ended(self.study, run_id, self.config.launcher):
                self.say(f"{run_id}: {why}")
        self.silence.forget_all_but(held)

    def _check_heartbeat(self, worker: str, note: Mapping[str, Any]) -> None:
        """Kill a worker that shows no sign of life, or takes longer over a run than allowed.

        Signs of life are its runs' progress or, if there is none, the heartbeat in its note. Before the
        first, it imports and builds, which may take minutes on a cold disk, and has `start_s` for that.
        """
        seen = self.alive[worker] = self._sign_of(worker, note)
        if worker in self.killed:
            return
        now = time.monotonic()
        launcher = self.config.launcher
        run_ids = list(seen.begun)
        late = [r for r in run_ids if launcher.run_timeout_s and now - seen.begun[r] > launcher.run_timeout_s]
        patience = launcher.heartbeat_s if seen.started else max(launcher.start_s, launcher.heartbeat_s)
        if now - seen.since > patience:
            still = "" if seen.started else " since it was started,"
            self._kill_for(worker, f"no sign of life{still} for {patience:g} s", run_ids, [])
        elif late:
            why = f"longer than launcher.run_timeout_s, {launcher.run_timeout_s:g} s"
            self._kill_for(worker, why, late, late)

    def _check_guest(self, worker: str, note: Mapping[str, Any]) -> None:
        """Say it, once, where a worker that only its own machine could end shows no sign of life."""
        seen = self.alive[worker] = self._sign_of(worker, note)
        patience = max(self.config.launcher.start_s, self.config.launcher.heartbeat_s)
        if time.monotonic() - seen.since > patience and worker not in self.silent:
            self.silent.add(worker)
            on = f" on {', '.join(seen.begun)}" if seen.begun else ""
            where = note.get("host", "its machine")
            self.say(f"worker {worker}{on}: no sign of life for {patience:g} s; end it on {where}")

    def _sign_of(self, worker: str, note: Mapping[str, Any]) -> Alive:
        """Return what is known of a worker now, given what was known before."""
        run_ids = note.get("run_ids") or []
        now = time.monotonic()
        known = self.alive.get(worker, Alive(None, now, {}, started=False))
        sign = (run_ids, [self.study.progress(r) for r in run_ids] or note.get("beat"))
        since = known.since if known.sign == sign else now
        begun = {r: known.begun.get(r, now) for r in run_ids}
        return Alive(sign, since, begun, bool(note.get("started")))

    def _kill_for(self, worker: str, why: str, on: Sequence[str], guilty: list[str]) -> None:
        self.say(f"worker {worker}{' on ' + ', '.join(on) if on else ''}: {why}; it is killed")
        self.killed[worker] = why, guilty
        self._kill(worker)

    def _see_guests(self, notes: Mapping[str, Mapping[str, Any]], specs: Mapping[str, RunSpec]) -> None:
        """Say which workers have joined, and record those that have died: the kernel frees a guest's lock.

        What one does not finish the others take at once; they need no driver for that. A guest with a run has
        held its lock: without it, it has died, be it that it came and went between two looks.
        """
        there = self.session.guests(notes)
        for worker in (w for w in there if w not in self.guests):
            self.say(f"worker {worker} has joined, on {notes[worker].get('host', '?')}")
        at_work = (w for w, note in notes.items() if w.startswith(GUEST) and note.get("run_ids"))
        for worker in dict.fromkeys(w for w in (*self.guests, *at_work) if w not in there):
            note = notes.get(worker) or self.session.notes().get(worker)
            if note is None:
                self.say(f"worker {worker} has left")
                continue
            log = self.session.root / f"{worker}.log"
            cause = exit_cause(self.session, worker) or "its process was killed, or its machine is gone"
            clean = not any(not self.study.has_result(r) for r in note.get("run_ids") or [])
            self._record_death(Death(worker, cause, log, clean=clean, counts=False), note, specs)
        self.guests = there

    # -- deaths ----------------------------------------------------------------------------------------------

    def _record_death(self, death: Death, note: Mapping[str, Any], specs: Mapping[str, RunSpec]) -> None:
        """A worker has died: charge the run to blame, and give it up once it has cost too many workers. If
        any of several runs may be to blame, each goes alone from now on."""
        why, guilty = self.killed.pop(death.worker, ("", []))
        cause = why or note.get("cause") or death.cause
        guilty = guilty or note.get("guilty") or []
        run_ids = note.get("run_ids") or []
        self.session.forget(death.worker)
        self.alive.pop(death.worker, None)
        self._count_failed_starts(death, note, cause)
        finished = int(note.get("ran") or 0) - len(run_ids)
        if finished > 0:
            self._has_worked(death.worker)
        if death.clean:
            return
        lost = [r for r in run_ids if not self.study.has_result(r)]
        said = note.get("cause") if note.get("device_failed") else None
        blameless = not guilty and self._device_is_to_blame(death.worker, said, lost)
        if not blameless:
            self._blame_place(self._place(death.worker, note), guilty or run_ids, finished)
        for run_id in lost:
            attempts.note(self.study.run_dir(run_id), "lost", worker=death.worker, cause=cause)
            self.say(f"{run_id} has lost its worker {death.worker}: {cause}")
        if blameless:
            return
        if len(lost) > 1 and not guilty:
            self.say(
                f"any of these {len(lost)} may be to blame: each runs alone from now on, and none is charged"
            )
            self.alone.update(lost)
            return
        for run_id in lost:
            if run_id not in specs or (guilty and run_id not in guilty):
                continue
            self.lost[run_id] = self.lost.get(run_id, 0) + 1
            if self.lost[run_id] > self.config.launcher.max_lost:
                self._give_up(specs[run_id], death, cause)

    def _device_is_to_blame(self, worker: str, said: str | None, lost: Sequence[str]) -> bool:
        """Tell whether these runs lost their worker to its GPU alone. `said`: what the worker said of the
        GPU's failure, if it said anything before its end."""
        return False

    def _has_worked(self, worker: str) -> None:  # noqa: B027
        """Note that a worker that has ended had finished a run."""

    def _count_failed_starts(self, death: Death, note: Mapping[str, Any], cause: str) -> None:
        """Raise WorkersFailed once MAX_FAILED_STARTS workers in a row have ended before they took a run."""
        if note.get("ran"):
            self.failed_starts = 0
        elif death.counts and not (death.clean and self.silence.known):
            self.failed_starts += 1
        if self.failed_starts >= MAX_FAILED_STARTS:
            what = "find no run that they can claim" if death.clean else "die before they take a run"
            raise WorkersFailed(f"workers {what} ({cause}): read {death.log}.")

    def _blame_place(self, place: str | None, run_ids: Sequence[str], finished: int) -> None:
        """Avoid a place where workers die on one run after another and finish none in between, while others
        do not.

        Deaths that a single run may explain, because it was present at each, count as one.
        """
        if place is None:
            return
        deaths = self.deaths_at.setdefault(place, [])
        suspects = set[str | None](run_ids) or {None}
        if finished > 0:
            deaths.clear()
        same = next((d for d in deaths if d & suspects), None)
        if same is None:
            deaths.append(suspects)
        else:
            same &= suspects
        if len(deaths) >= RUNS_TO_AVOID and self.places - self.avoided - set(self.deaths_at):
            self._avoid(place, f"workers keep dying in {place}, and not elsewhere")

    def _avoid(self, place: str, why: str) -> None:
        self.avoided.add(place)
        self.say(f"{why}: no more are started there")

    def _give_up(self, spec: RunSpec, death: Death, cause: str) -> None:
        """Record a run as lost, unless another worker has taken it in the meantime."""
        files = self.study.run_files(spec.run_id)
        with run_lock(files.directory) as mine:
            if not mine or files.result.exists():
                return
            times = "once" if self.lost[spec.run_id] == 1 else f"{self.lost[spec.run_id]} times"
            result = {
                "run_id": spec.run_id,
                "identity": digest(spec.identity),
                "outcome": "lost",
                "cause": f"its worker died {times}, at last: {cause}; its log: {death.log}",
                "steps": rows_in(files.steps),
            }
            write_checksummed(files.result, result)


def slots(config: Config) -> int:
    """Return how many workers run at a time under a resolved configuration: jobs, or here one (or more) per
    GPU or core group."""
    launcher = config.launcher
    if launcher.name == "inline":
        return 1
    if launcher.name == "slurm" or launcher.slots:
        return launcher.slots
    together = launcher.processes_per_run
    gpus = visible_gpus(together) if config.device == "cuda" else []
    on_gpus = len(gpus) // together * launcher.workers_per_gpu
    return on_gpus or max(1, cores() // (together * max(1, config.threads_per_run)))


def at_a_time(config: Config) -> int:
    """Return how many runs go at a time under a resolved configuration."""
    return slots(config) * max(1, config.launcher.runs_per_worker)


def worker_settings(config: Config) -> dict[str, Any]:
    """Return what session.json tells every worker: how it behaves, and which version of the code is meant."""
    launcher = config.launcher
    return {
        "checkpoint_every_s": launcher.checkpoint_every_s,
        "beat_s": launcher.heartbeat_s / 10,
        "code": code_here(),
        "processes_per_run": launcher.processes_per_run,
        "nodes_per_run": launcher.nodes_per_run,
        "runs_per_worker": max(1, launcher.runs_per_worker),  # 0 is resolved by now, or there is no GPU
    }


def code_here() -> dict[str, Any]:
    """Return which version of the code this is, as far as it can change numbers."""
    return {
        "ebc_lab": __version__,
        "git": git_revision(),
        "torch": versions()["torch"],
        "numerics_version": NUMERICS_VERSION,
    }
