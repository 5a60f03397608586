"""Who trains: worker processes through submitit, here or on Slurm, or this process (DESIGN: launching).

A pool is opened once a study and fed stage after stage, so that `import torch` is paid once a worker. What workers do travels
as JSON (`session.py`), and what they found is read from the runs' own files. Workers take runs from one list, so what a lost
one leaves is shared by the others.

A worker may carry several runs at a time. When it dies, which of them is to blame is known only of one that took too long or
broke the device itself: that one is charged, and no other. Else none is: each goes alone from then on, and a run that loses
its worker alone is charged, so that `max_lost` counts what a run did by itself.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebc_lab import __version__
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import NUMERICS_VERSION, digest
from ebc_lab.config.machine import cores, git_revision, versions, visible_gpus
from ebc_lab.config.schema import Config
from ebc_lab.records.json_files import write_checksummed
from ebc_lab.records.locks import run_lock

from ..stages.spec import RunSpec
from ..store import attempts
from ..store.study import FINISHED, Study
from .session import Session

STARTS_TO_GIVE_UP = 3  # workers in a row that die, or give up waiting, before they took a run
RUNS_TO_AVOID = (
    2  # different runs that lost their worker in one place, one after the other, before it is avoided
)
WATCH_S = 1.0  # between two looks at the heartbeats
# (newly done, what each busy worker is on), at every poll; raises to stop the wave
CheckIn = Callable[[Sequence[str], Sequence[Sequence[str]]], None]
Say = Callable[[str], None]


class WorkersFailed(Exception):
    """Workers die before they do anything, or all were cancelled; says where to read why."""


@dataclass(frozen=True)
class Death:
    """A worker that is no more. `clean`: it ended by itself, with nothing left that it could do; `counts`: its start was ours,
    so that failing at it says something."""

    worker: str
    cause: str
    log: Path
    clean: bool = False
    counts: bool = True


class WorkerPool(ABC):
    """Worker processes that share a list of runs; what is common to those on this machine and those in Slurm jobs."""

    poll_s = 0.1

    def __init__(self, config: Config, study: Study, session: Session, slots: int, say: Say):
        self.config, self.study, self.session, self.slots, self.say = config, study, session, slots, say
        self.at_a_time = at_a_time(config)
        self.offered: list[str] = []
        self.alone: set[str] = set()  # runs that may share no worker any more
        self.published: tuple[Any, ...] = ()
        self.seen: set[str] = set()  # runs whose results stand
        self.lost: dict[str, int] = {}
        self.killed: dict[
            str, tuple[str, list[str]]
        ] = {}  # worker -> why we killed it, and which of its runs are to blame
        self.stillborn = 0
        # place -> for each of the workers that died there, one after the other, which runs may be to blame
        self.deaths_at: dict[str, list[set[str | None]]] = {}
        self.places: set[str] = set()
        self.avoided: set[str] = set()
        self.watched = 0.0
        self.beats: dict[
            str, tuple[Any, float, dict[str, float]]
        ] = {}  # worker -> (sign of life, since, run -> since)

    @abstractmethod
    def _staff(self, wanted: int) -> None:
        """Have as many workers as that, and no more than slots."""

    @abstractmethod
    def _deaths(self) -> list[Death]:
        """Workers that have died since the last call."""

    @abstractmethod
    def _at_work(self) -> list[str]:
        """The workers that should show signs of life: started, rather than queued or gone."""

    @abstractmethod
    def _kill(self, worker: str) -> None:
        """End a worker that no longer answers."""

    @abstractmethod
    def _place(self, worker: str, note: Mapping[str, Any]) -> str | None:
        """Where a worker ran, as `avoided` names it: what may be broken when workers keep dying there."""

    @abstractmethod
    def close(self) -> None:
        """Let the workers bring what they are on to a checkpoint, and see them gone."""

    @abstractmethod
    def leave(self) -> None:
        """The driver is interrupted: close, or leave the workers to whoever comes back."""

    def run(
        self, specs: Sequence[RunSpec], spare: Sequence[RunSpec], check_in: CheckIn, *, canary: bool
    ) -> None:
        """Train `specs` to their results, longest first; a worker with nothing left to do starts on `spare`.

        With `canary` the first run goes alone until it has taken a step; where it fails, another one alone.
        Returns when `specs` are done, whatever of `spare` is. Raises what `check_in` raises, WorkersFailed, and UserError
        (a worker cannot write).
        """
        ordered = [s.run_id for s in sorted(specs, key=lambda s: -s.cost)]
        by_id = {s.run_id: s for s in specs}
        spares = [s.run_id for s in spare]
        tried = 1 if canary else len(ordered)
        left = {r: str(self.study.run_files(r).result) for r in ordered}
        self._offer([*ordered[:tried], *(spares if tried == len(ordered) else [])])
        while True:
            self._take_back()
            done = [r for r, path in left.items() if os.path.exists(path) and self._stands(r)]
            for run_id in done:
                del left[run_id]
            notes = self.session.notes()
            check_in(
                done, [runs for worker in self._at_work() if (runs := notes.get(worker, {}).get("run_ids"))]
            )
            if not left:
                return
            if tried < len(ordered):
                if any(self._flies(r) for r in ordered[:tried]):
                    tried = len(ordered)
                    self._offer([*ordered, *spares])
                elif not any(r in left for r in ordered[:tried]):
                    tried += 1
                    self._offer(ordered[:tried])
            self._look_after(notes, by_id)
            self._offer(self.offered)  # before a new worker looks
            self._staff(len(left))
            time.sleep(self.poll_s)

    def _offer(self, runs: Sequence[str]) -> None:
        """Have this list published, with which of it go alone, and over how many workers it is to be shared."""
        self.offered = list(runs)
        now = (self.offered, [r for r in runs if r in self.alone], max(1, self.slots))
        if now != self.published:
            self.published = now
            self.session.publish(now[0], alone=now[1], slots=now[2])

    def _take_back(self) -> None:
        """A run that has run out of memory where several share a worker may have lacked only what the others took: its result
        is taken back, once, and it goes alone."""
        for run_id in self.offered:
            if self._stands(run_id) or not (result := self.study.result(run_id)):
                continue
            if result["outcome"] != "oom":
                self.seen.add(run_id)
                continue
            self.say(f"{run_id} has run out of memory, maybe for what ran beside it: it is tried again alone")
            self.alone.add(run_id)
            self._offer(self.offered)  # first, so that nobody takes it in company again
            self.study.run_files(run_id).result.unlink()

    def _stands(self, run_id: str) -> bool:
        """Whether a result of this run would be kept, whatever it is."""
        return self.config.launcher.runs_per_worker <= 1 or run_id in self.alone or run_id in self.seen

    def _flies(self, run_id: str) -> bool:
        """Whether a canary has come through: a step taken, or a result."""
        result = self.study.result(run_id)
        if result is not None:
            return result["outcome"] in FINISHED
        return bool((self.study.progress(run_id) or {}).get("step"))

    def _look_after(self, notes: Mapping[str, Mapping[str, Any]], specs: Mapping[str, RunSpec]) -> None:
        for note in notes.values():
            if note.get("error"):
                raise UserError(f"{note['error']}; free or mend that, and give the same command again.")
        self.places.update(place for worker, note in notes.items() if (place := self._place(worker, note)))
        for death in self._deaths():
            self._bury(death, notes.get(death.worker) or self.session.notes().get(death.worker) or {}, specs)
        if time.monotonic() - self.watched >= min(WATCH_S, self.config.launcher.heartbeat_s / 4):
            self.watched = time.monotonic()
            at_work = self._at_work()
            for worker in set(self.beats) - set(at_work):
                del self.beats[worker]
            for worker in at_work:
                self._feel_pulse(worker, notes.get(worker, {}))

    def _feel_pulse(self, worker: str, note: Mapping[str, Any]) -> None:
        """Kill a worker that shows no sign of life, or takes longer for a run than allowed.

        Signs are its runs' progress, or where it has none the beat in its note. Time is our own clock's: none can jump.
        """
        run_ids, now = note.get("run_ids") or [], time.monotonic()
        beat = (run_ids, [self.study.progress(r) for r in run_ids] or note.get("beat"))
        known = self.beats.get(worker, (None, now, {}))
        begun = {r: known[2].get(r, now) for r in run_ids}
        since = known[1] if known[0] == beat else now
        self.beats[worker] = (beat, since, begun)
        allowed = self.config.launcher
        if worker in self.killed:
            return
        late = [r for r in run_ids if allowed.run_timeout_s and now - begun[r] > allowed.run_timeout_s]
        if now - since > allowed.heartbeat_s:
            why, on, late = f"no sign of life for {allowed.heartbeat_s:g} s", run_ids, []
        elif late:
            why, on = f"longer than launcher.run_timeout_s, {allowed.run_timeout_s:g} s", late
        else:
            return
        self.say(f"worker {worker}{' on ' + ', '.join(on) if on else ''}: {why}; it is killed")
        self.killed[worker] = why, late
        self._kill(worker)

    def _bury(self, death: Death, note: Mapping[str, Any], specs: Mapping[str, RunSpec]) -> None:
        """A worker has died: charge the run that is to blame, and give it up once it has cost too many workers; where it may
        have been any of several, let each go alone from now on."""
        why, guilty = self.killed.pop(death.worker, ("", []))
        cause = why or note.get("cause") or death.cause
        guilty = guilty or note.get("guilty") or []
        run_ids = note.get("run_ids") or []
        self.session.forget(death.worker)
        self.beats.pop(death.worker, None)
        if note.get("ran"):
            self.stillborn = 0
        elif death.counts:
            self.stillborn += 1
        if self.stillborn >= STARTS_TO_GIVE_UP:
            what = "find no run that they can claim" if death.clean else "die before they take a run"
            raise WorkersFailed(f"workers {what} ({cause}): read {death.log}.")
        if death.clean:
            return
        self._blame(
            self._place(death.worker, note), guilty or run_ids, int(note.get("ran") or 0) - len(run_ids)
        )
        lost = [r for r in run_ids if not self.study.has_result(r)]
        for run_id in lost:
            attempts.note(self.study.run_dir(run_id), "lost", worker=death.worker, cause=cause)
            self.say(f"{run_id} has lost its worker {death.worker}: {cause}")
        if len(lost) > 1 and not guilty:
            self.say(
                f"which of the {len(lost)} is to blame is not known: each goes alone from now on, and none is charged"
            )
            self.alone.update(lost)
            return
        for run_id in lost:
            if run_id not in specs or (guilty and run_id not in guilty):
                continue
            self.lost[run_id] = self.lost.get(run_id, 0) + 1
            if self.lost[run_id] > self.config.launcher.max_lost:
                self._give_up(specs[run_id], death, cause)

    def _blame(self, place: str | None, run_ids: Sequence[str], finished: int) -> None:
        """Avoid a place where workers die on one run after the other, finishing none between, while others do not.

        Deaths that one run may explain, because it was there at each, count as one.
        """
        if place is None:
            return
        deaths, suspects = self.deaths_at.setdefault(place, []), set[str | None](run_ids) or {None}
        if finished > 0:
            deaths.clear()
        alike = next((d for d in deaths if d & suspects), None)
        if alike is None:
            deaths.append(suspects)
        else:
            alike &= suspects
        if len(deaths) >= RUNS_TO_AVOID and self.places - self.avoided - set(self.deaths_at):
            self.avoided.add(place)
            self.say(f"workers keep dying in {place}, and not elsewhere: no more are started there")

    def _give_up(self, spec: RunSpec, death: Death, cause: str) -> None:
        """Record a run as lost, unless another worker has taken it up meanwhile."""
        run_id, files = spec.run_id, self.study.run_files(spec.run_id)
        with run_lock(files.directory) as mine:
            if not mine or files.result.exists():
                return
            times = "once" if self.lost[run_id] == 1 else f"{self.lost[run_id]} times"
            cause = f"its worker died {times}, at last: {cause}; its log: {death.log}"
            identity = digest(spec.identity)
            result = {"run_id": run_id, "identity": identity, "outcome": "lost", "cause": cause, "steps": 0}
            write_checksummed(files.result, result)


def slots(config: Config) -> int:
    """How many workers go at a time under a resolved configuration: jobs, or here one (or more) per GPU, or per core group."""
    launcher = config.launcher
    if launcher.name == "inline":
        return 1
    if launcher.name == "slurm" or launcher.slots:
        return launcher.slots
    gpus = visible_gpus() if config.device == "cuda" else []
    return len(gpus) * launcher.workers_per_gpu or max(1, cores() // max(1, config.threads_per_run))


def at_a_time(config: Config) -> int:
    """How many runs go at a time under a resolved configuration: so many a worker."""
    return slots(config) * max(1, config.launcher.runs_per_worker)


def habits(config: Config) -> dict[str, Any]:
    """What session.json tells every worker, wherever it runs, and which code is meant."""
    asked = config.launcher
    code = {
        "ebc_lab": __version__,
        "git": git_revision(),
        "torch": versions()["torch"],
        "numerics_version": NUMERICS_VERSION,
    }
    about = {"checkpoint_every_s": asked.checkpoint_every_s, "beat_s": asked.heartbeat_s / 10, "code": code}
    return {
        **about,
        "runs_per_worker": max(1, asked.runs_per_worker),
    }  # 0 is resolved by now, or nobody has a GPU
