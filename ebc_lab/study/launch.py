"""Who trains: worker processes through submitit, here or on Slurm, or this process (DESIGN: launching).

A pool is opened once a study and fed stage after stage, so that `import torch` is paid once a worker. What workers do travels
as JSON (`session.py`), and what they found is read from the runs' own files. Workers take runs from one list, so what a lost
one leaves is shared by the others.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..config import NUMERICS_VERSION, Config, UserError, digest
from ..doctor import cores, git_revision, versions, visible_gpus
from ..telemetry import read_json, write_json, write_sealed
from ..validation import need_gpu
from . import attempts
from .session import Session
from .signature import RunSpec
from .store import FINISHED, Study, claimed

WORKER_NICENESS = 5
STARTS_TO_GIVE_UP = 3  # workers in a row that die, or give up waiting, before they took a run
RUNS_TO_AVOID = 2  # different runs that lost their worker in one place, one after the other, before it is avoided
WATCH_S = 1.0  # between two looks at the heartbeats
SCRUBBED = ("SLURM_", "PMI_", "PMIX_", "SUBMITIT_")  # of an inherited environment: another job's
CheckIn = Callable[[Sequence[str], Sequence[str]], None]  # (newly done, being trained), at every poll; raises to stop the wave
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


class WorkerCommand:
    """What submitit runs: one worker as a subprocess of its own, in an environment of its own."""

    def __init__(self, session: str, worker: str | None, env: Mapping[str, str]):
        self.session, self.worker, self.env = session, worker, dict(env)
        self.process: subprocess.Popen[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "process": None}

    def __call__(self) -> int:
        import submitit

        local = self.worker is not None
        name = self.worker or submitit.JobEnvironment().job_id
        drop = SCRUBBED if local else ("SUBMITIT_",)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
        command = [sys.executable, "-m", "ebc_lab.study.worker", self.session, name]
        # here: a process group of its own, so that Ctrl-C reaches the driver, whose freed lock lets the worker end with a
        # checkpoint. In a Slurm job: the job's own, so that Slurm finds it
        prepare = _step_back if local else _deaf_to_usr2
        self.process = subprocess.Popen(
            command, env={**inherited, **self.env}, start_new_session=local, preexec_fn=prepare, stdin=subprocess.DEVNULL
        )
        write_json(Path(self.session) / f"process-{name}.json", {"pid": self.process.pid}, durable=False)
        if local:
            for sig in (signal.SIGTERM, signal.SIGINT):
                signal.signal(sig, lambda number, _: self._tell(number))
        code = self.process.wait()
        write_json(Path(self.session) / f"exit-{name}.json", {"code": code}, durable=False)
        if code and not local:
            raise RuntimeError(f"the worker ended with exit code {code}")  # so that Slurm counts the job as failed
        return code

    def _tell(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)

    def checkpoint(self) -> Any:
        """submitit calls this in its signal handler, before a time-out or on preemption, and requeues the job."""
        import submitit

        if self.process is not None:
            self._tell(signal.SIGINT)
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)  # `wait` above holds Popen's own lock
        return submitit.helpers.DelayedSubmission(WorkerCommand(self.session, self.worker, self.env))


def _step_back() -> None:
    """A lower priority: whoever asks for `status` meanwhile does not wait in line."""
    os.nice(WORKER_NICENESS)


def _deaf_to_usr2() -> None:
    """Slurm sends its warning to every process of the job, and the default answer to it is to die."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


class InlinePool:
    """Trains in this process: for debuggers, and for `launcher=inline`."""

    def __init__(self, config: Config, study: Study):
        self.config, self.study = config, study
        self.slots = 1

    def run(self, specs: Sequence[RunSpec], spare: Sequence[RunSpec], check_in: CheckIn, *, canary: bool) -> None:
        from ..training import DeviceFailed, Interrupted
        from .worker import POLL_S, execute

        asked: list[int] = []
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        previous = {s: signal.signal(s, lambda number, _: asked.append(number)) for s in signals}
        try:
            for spec in sorted(specs, key=lambda s: -s.cost):
                every = self.config.launcher.checkpoint_every_s
                directory = self.study.run_dir(spec.run_id)
                check_in([], [])
                try:
                    while not (directory / "result.json").exists():
                        done = execute(self.study, spec.run_id, checkpoint_every_s=every, should_stop=lambda: bool(asked))
                        if not done:  # a worker of a driver that has died still holds it
                            if asked:
                                raise KeyboardInterrupt
                            check_in([], [])
                            time.sleep(POLL_S)
                except Interrupted:
                    raise KeyboardInterrupt from None
                except DeviceFailed as error:
                    raise WorkersFailed(f"the GPU is gone ({error}); the same command carries on from here.") from None
                check_in([spec.run_id], [])
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)

    def close(self) -> None:
        return

    def leave(self) -> None:
        return


class WorkerPool(ABC):
    """Worker processes that share a list of runs; what is common to those on this machine and those in Slurm jobs."""

    poll_s = 0.1

    def __init__(self, config: Config, study: Study, session: Session, slots: int, say: Say):
        self.config, self.study, self.session, self.slots, self.say = config, study, session, slots, say
        self.lost: dict[str, int] = {}
        self.killed: dict[str, str] = {}  # worker -> why we killed it
        self.stillborn = 0
        self.deaths_at: dict[str, set[str | None]] = {}  # place -> runs that lost their worker there, one after the other
        self.places: set[str] = set()
        self.avoided: set[str] = set()
        self.watched = 0.0
        self.beats: dict[str, tuple[Any, float, str | None, float]] = {}  # worker -> (sign of life, since, run, since)

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

    def run(self, specs: Sequence[RunSpec], spare: Sequence[RunSpec], check_in: CheckIn, *, canary: bool) -> None:
        """Train `specs` to their results, longest first; a worker with nothing left to do starts on `spare`.

        With `canary` the first run goes alone until it has taken a step; where it fails, another one alone.
        Returns when `specs` are done, whatever of `spare` is. Raises what `check_in` raises, WorkersFailed, and UserError
        (a worker cannot write).
        """
        ordered = [s.run_id for s in sorted(specs, key=lambda s: -s.cost)]
        by_id = {s.run_id: s for s in specs}
        spares = [s.run_id for s in spare]
        tried = 1 if canary else len(ordered)
        left = {r: str(self.study.run_dir(r) / "result.json") for r in ordered}
        self.session.publish([*ordered[:tried], *(spares if tried == len(ordered) else [])])
        while True:
            done = [r for r, path in left.items() if os.path.exists(path)]
            for run_id in done:
                del left[run_id]
            notes = self.session.notes()
            check_in(done, [run for worker in self._at_work() if (run := notes.get(worker, {}).get("run_id"))])
            if not left:
                return
            if tried < len(ordered):
                if any(self._flies(r) for r in ordered[:tried]):
                    tried = len(ordered)
                    self.session.publish([*ordered, *spares])
                elif not any(r in left for r in ordered[:tried]):
                    tried += 1
                    self.session.publish(ordered[:tried])
            self._look_after(notes, by_id)
            self._staff(len(left))
            time.sleep(self.poll_s)

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

        Signs are its run's progress, or where it has none the beat in its note. Time is our own clock's: none can jump.
        """
        run_id, now = note.get("run_id"), time.monotonic()
        beat = (run_id, self.study.progress(run_id) if run_id else note.get("beat"))
        known = self.beats.get(worker, (None, now, None, now))
        begun = known[3] if known[2] == run_id else now
        since = known[1] if known[0] == beat else now
        self.beats[worker] = (beat, since, run_id, begun)
        allowed = self.config.launcher
        if worker in self.killed:
            return
        if now - since > allowed.heartbeat_s:
            why = f"no sign of life for {allowed.heartbeat_s:g} s"
        elif run_id and allowed.run_timeout_s and now - begun > allowed.run_timeout_s:
            why = f"longer than launcher.run_timeout_s, {allowed.run_timeout_s:g} s"
        else:
            return
        self.say(f"worker {worker}{' on ' + run_id if run_id else ''}: {why}; it is killed")
        self.killed[worker] = why
        self._kill(worker)

    def _bury(self, death: Death, note: Mapping[str, Any], specs: Mapping[str, RunSpec]) -> None:
        """A worker has died: charge the run it was on; give the run up once it has cost too many workers."""
        cause = self.killed.pop(death.worker, None) or note.get("cause") or death.cause
        run_id = note.get("run_id")
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
        self._blame(self._place(death.worker, note), run_id, int(note.get("ran") or 0))
        if run_id is None:
            return
        directory = self.study.run_dir(run_id)
        if (directory / "result.json").exists():
            return
        attempts.note(directory, "lost", worker=death.worker, cause=cause)
        self.say(f"{run_id} has lost its worker {death.worker}: {cause}")
        if run_id not in specs:
            return
        self.lost[run_id] = self.lost.get(run_id, 0) + 1
        if self.lost[run_id] > self.config.launcher.max_lost:
            self._give_up(specs[run_id], death, cause)

    def _blame(self, place: str | None, run_id: str | None, ran: int) -> None:
        """Avoid a place where workers die on one run after the other, finishing none between, while others do not."""
        if place is None:
            return
        runs = self.deaths_at.setdefault(place, set())
        if ran > 1:
            runs.clear()
        runs.add(run_id)
        if len(runs) >= RUNS_TO_AVOID and self.places - self.avoided - set(self.deaths_at):
            self.avoided.add(place)
            self.say(f"workers keep dying in {place}, and not elsewhere: no more are started there")

    def _give_up(self, spec: RunSpec, death: Death, cause: str) -> None:
        """Record a run as lost, unless another worker has taken it up meanwhile."""
        run_id, directory = spec.run_id, self.study.run_dir(spec.run_id)
        with claimed(directory) as mine:
            if not mine or (directory / "result.json").exists():
                return
            times = "once" if self.lost[run_id] == 1 else f"{self.lost[run_id]} times"
            cause = f"its worker died {times}, at last: {cause}; its log: {death.log}"
            identity = digest(spec.identity)
            result = {"run_id": run_id, "identity": identity, "outcome": "lost", "cause": cause, "steps": 0}
            write_sealed(directory / "result.json", result)


Pool = InlinePool | WorkerPool


def slots(config: Config) -> int:
    """How many runs go at a time under a resolved configuration: jobs, or here one (or more) per GPU, or per core group."""
    launcher = config.launcher
    if launcher.name == "inline":
        return 1
    if launcher.name == "slurm" or launcher.slots:
        return launcher.slots
    gpus = visible_gpus() if config.device == "cuda" else []
    return len(gpus) * launcher.workers_per_gpu or max(1, cores() // max(1, config.threads_per_run))


def habits(config: Config) -> dict[str, Any]:
    """What session.json tells every worker, wherever it runs, and which code is meant."""
    asked = config.launcher
    code = {"ebc_lab": __version__, "git": git_revision(), "torch": versions()["torch"], "numerics_version": NUMERICS_VERSION}
    return {"checkpoint_every_s": asked.checkpoint_every_s, "beat_s": asked.heartbeat_s / 10, "code": code}


def worker_env(config: Config) -> dict[str, str]:
    """What every worker's environment says, wherever it runs."""
    threads = str(config.threads_per_run)
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}


@contextmanager
def opened(config: Config, study: Study, say: Say = lambda text: None) -> Iterator[Pool]:
    """The pool that `config.launcher` asks for; on the way out closed, or left to its own if the driver was interrupted."""
    pool: Pool
    if config.device == "cuda" and config.launcher.name != "slurm":
        need_gpu()  # a study that was begun on one may be carried on without
    if config.launcher.name == "inline":
        pool = InlinePool(config, study)
    elif config.launcher.name == "slurm":
        from .slurm import SlurmPool

        pool = SlurmPool(config, study, slots(config), say)
    else:
        from .local import LocalPool

        pool = LocalPool(config, study, visible_gpus() if config.device == "cuda" else [], slots(config), say)
    try:
        yield pool
    except KeyboardInterrupt:
        pool.leave()
        raise
    except BaseException:
        pool.close()
        raise
    pool.close()


def exit_cause(session: Session, worker: str) -> str:
    """How a worker process ended, in words; empty when nobody was there to say."""
    try:
        code = int(read_json(session.root / f"exit-{worker}.json")["code"])
    except (OSError, UserError):
        return ""
    if code >= 0:
        return f"it ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}" + (" (as the system does when memory runs out)" if -code == signal.SIGKILL else "")
