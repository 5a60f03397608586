"""Who trains: a pool of local worker processes started through submitit, or this process (DESIGN: launching).

A pool is opened once a study and fed stage after stage, so that `import torch` is paid once a worker. submitit starts and
watches the processes; what they do travels as JSON, and what they found is read from the runs' own files. submitit keeps
pickles of its own: its folder lies in a per-user 0700 state directory, outside the study.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..config import Config, UserError, digest
from ..doctor import cores, visible_gpus
from ..telemetry import read_json, write_json
from .signature import RunSpec
from .store import Study

POLL_S = 0.1
WORKER_NICENESS = 5
STARTS_TO_GIVE_UP = 3  # workers that die before they took a run
SCRUBBED = ("SLURM_", "PMI_", "PMIX_", "SUBMITIT_")
CheckIn = Callable[[], None]  # called at every poll: draws the view, raises to stop the wave


class WorkersFailed(Exception):
    """Workers die before they do anything; names the log."""


class WorkerCommand:
    """What submitit runs: one worker as a subprocess of its own, in an environment of its own."""

    def __init__(self, session: str, slot: int, env: dict[str, str]):
        self.session, self.slot, self.env = session, slot, env

    def __call__(self) -> int:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(SCRUBBED)}
        command = [sys.executable, "-m", "ebc_lab.study.worker", self.session, str(self.slot)]
        # its own process group: Ctrl-C reaches the driver, whose freed lock lets the worker end with a checkpoint;
        # a lower priority: whoever asks for `status` meanwhile does not wait in line
        worker = subprocess.Popen(command, env={**inherited, **self.env}, start_new_session=True, preexec_fn=_step_back)
        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, lambda number, _: worker.send_signal(number))
        return worker.wait()


def _step_back() -> None:
    os.nice(WORKER_NICENESS)


class InlinePool:
    """Trains in this process: for debuggers, and for `launcher=inline`."""

    def __init__(self, config: Config, study: Study):
        self.config, self.study = config, study
        self.slots = 1

    def run(self, specs: Sequence[RunSpec], spare: Sequence[RunSpec], check_in: CheckIn) -> None:
        from ..training import Interrupted
        from .worker import execute

        asked: list[int] = []
        previous = {s: signal.signal(s, lambda number, _: asked.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            for spec in sorted(specs, key=lambda s: -s.cost):
                every = self.config.launcher.checkpoint_every_s
                directory = self.study.run_dir(spec.run_id)
                try:
                    while not (directory / "result.json").exists():
                        done = execute(self.study, spec.run_id, checkpoint_every_s=every, should_stop=lambda: bool(asked))
                        if not done:  # a worker of a driver that has just died still holds it
                            time.sleep(POLL_S)
                except Interrupted:
                    raise KeyboardInterrupt from None
                check_in()
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)

    def close(self) -> None:
        return


class LocalPool:
    """One worker process a slot, each on its own GPU or core group."""

    def __init__(self, config: Config, study: Study, gpus: Sequence[str], slots: int):
        self.config, self.study, self.gpus, self.slots = config, study, list(gpus), slots
        state = state_dir(study)
        for old in state.glob("session-*"):  # a worker that is still in one takes its vanished lock for a free one
            shutil.rmtree(old, ignore_errors=True)
        self.session = Path(tempfile.mkdtemp(prefix="session-", dir=state))
        about = {"study": str(study.root.resolve()), "checkpoint_every_s": config.launcher.checkpoint_every_s}
        write_json(self.session / "session.json", about)
        self.lock = FileLock(self.session / "driver.lock")
        self.lock.acquire(timeout=0)
        self._tasks([], closed=False)
        self.jobs: dict[int, Any] = {}
        self.lost: dict[str, int] = {}
        self.stillborn = 0

    def _tasks(self, runs: Sequence[str], *, closed: bool) -> None:
        write_json(self.session / "tasks.json", {"closed": closed, "runs": list(runs)})

    def _start(self, slot: int) -> None:
        import submitit

        executor = submitit.LocalExecutor(folder=self.session / "submitit")
        executor.update_parameters(timeout_min=60 * 24 * 365, stderr_to_stdout=True)
        threads = str(self.config.threads_per_run)
        env = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
        if self.gpus:
            env["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        (self.session / f"worker-{slot}.json").unlink(missing_ok=True)
        self.jobs[slot] = executor.submit(WorkerCommand(str(self.session), slot, env))

    def warm(self, runs: int) -> None:
        """Start workers before there is anything to do: torch is imported while the driver still plans."""
        for slot in range(min(self.slots, runs)):
            if slot not in self.jobs:
                self._start(slot)

    def run(self, specs: Sequence[RunSpec], spare: Sequence[RunSpec], check_in: CheckIn) -> None:
        """Train `specs` to their results, longest first; a worker with nothing left to do starts on `spare`.

        Returns when `specs` are done, whatever of `spare` is. Raises what `check_in` raises, and WorkersFailed.
        """
        ordered = [s.run_id for s in sorted(specs, key=lambda s: -s.cost)]
        by_id = {s.run_id: s for s in specs}
        self._tasks([*ordered, *(s.run_id for s in spare)], closed=False)
        self.warm(len(ordered))
        while True:
            todo = [r for r in ordered if not (self.study.run_dir(r) / "result.json").exists()]
            check_in()
            if not todo:
                return
            for slot, job in list(self.jobs.items()):
                if job.done():
                    self._bury(slot, job, by_id)
                    if len(todo) > slot or not any(not j.done() for j in self.jobs.values()):
                        self._start(slot)
            time.sleep(POLL_S)

    def _bury(self, slot: int, job: Any, specs: dict[str, RunSpec]) -> None:
        """A worker has died: charge the run it was on; give the run up once it has cost too many workers."""
        try:
            run_id = read_json(self.session / f"worker-{slot}.json")["run_id"]
        except (FileNotFoundError, UserError):
            run_id = None
        del self.jobs[slot]
        if run_id is None:
            self.stillborn += 1
            if self.stillborn >= STARTS_TO_GIVE_UP:
                raise WorkersFailed(f"workers die before they take a run: read {job.paths.stdout}.")
            return
        directory = self.study.run_dir(run_id)
        if run_id not in specs or (directory / "result.json").exists():
            return
        self.lost[run_id] = self.lost.get(run_id, 0) + 1
        if self.lost[run_id] > self.config.launcher.max_lost:
            cause = f"its worker died {self.lost[run_id]} times; last log: {job.paths.stdout}"
            result = {
                "run_id": run_id,
                "identity": digest(specs[run_id].identity),
                "outcome": "lost",
                "cause": cause,
                "steps": 0,
            }
            write_json(directory / "result.json", result)

    def close(self) -> None:
        """Let the workers finish what they are on to a checkpoint, and go."""
        self._tasks([], closed=True)
        self.lock.release()
        deadline = time.monotonic() + 15
        while any(not job.done() for job in self.jobs.values()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        for job in self.jobs.values():
            if not job.done():
                job.cancel()


Pool = InlinePool | LocalPool


def slots(config: Config) -> int:
    """How many runs go at a time under a resolved configuration on this machine: one per GPU, or per core group."""
    if config.launcher.name == "inline":
        return 1
    gpus = visible_gpus() if config.device == "cuda" else []
    return config.launcher.slots or len(gpus) or max(1, cores() // config.threads_per_run)


@contextmanager
def opened(config: Config, study: Study) -> Iterator[Pool]:
    """The pool that `config.launcher` asks for; closed, with its workers gone, on the way out."""
    pool: Pool
    if config.launcher.name == "inline":
        pool = InlinePool(config, study)
    else:
        pool = LocalPool(config, study, visible_gpus() if config.device == "cuda" else [], slots(config))
    try:
        yield pool
    finally:
        pool.close()


def state_dir(study: Study) -> Path:
    """A private folder for this study's launcher, outside the study."""
    from platformdirs import user_state_path

    name = f"{study.name}-{hashlib.sha256(str(study.root.resolve()).encode()).hexdigest()[:10]}"
    path = user_state_path("ebc-lab") / "local" / name
    try:
        path.mkdir(parents=True, exist_ok=True)
        for level in (path, path.parent, path.parent.parent):
            level.chmod(0o700)
    except OSError as error:
        raise UserError(f"{path} cannot be made ({error.strerror}): set XDG_STATE_HOME to a folder you own.") from None
    return path
