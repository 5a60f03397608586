"""launcher=local: worker processes on this machine, one per slot, each on its own GPU or core group, through
submitit.

submitit's local executor has no queue and gives every job the same GPUs, so slots and devices are assigned
here. A run that several processes train has as many GPUs, or groups of cores. A worker ends when its driver's
lock is free, for whatever reason the driver ended.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import Config
from ebc_lab.records.json_files import read_json

from ..store.study import Study
from .command import WorkerCommand, worker_env
from .pool import Death, Say, WorkerPool, worker_settings
from .session import Session, exit_cause

CLOSE_S = 15.0  # for a checkpoint, before workers are killed


class LocalPool(WorkerPool):
    """One worker process per slot."""

    def __init__(self, config: Config, study: Study, gpus: Sequence[str], slots: int, say: Say):
        session = Session.begin(study, "local", bound=True, idle_s=None, **worker_settings(config))
        super().__init__(config, study, session, slots, say)
        self.gpus = list(gpus)
        self.lock = FileLock(session.lock_path, fallback_to_soft=False)
        self.lock.acquire(timeout=0)
        self.jobs: dict[int, Any] = {}
        self.to_kill: set[str] = set()  # workers, as soon as they are there

    def _start_workers(self, wanted: int) -> None:
        usable = [slot for slot in range(self.slots) if f"slot {slot}" not in self.avoided]
        for slot in usable[:wanted]:
            if slot not in self.jobs:
                self._start(slot)

    def _start(self, slot: int) -> None:
        import submitit

        executor = submitit.LocalExecutor(folder=self.session.root / "submitit")
        executor.update_parameters(timeout_min=60 * 24 * 365, stderr_to_stdout=True)
        env = worker_env(self.config)
        if self.gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus_of(slot))
        # Ctrl-C reaches every process of this one's group, and submitit's would print a traceback each: the
        # mask is inherited, and one that comes here meanwhile is delivered afterwards
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            self.jobs[slot] = executor.submit(WorkerCommand(str(self.session.root), str(slot), env))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _gpus_of(self, slot: int) -> list[str]:
        """Return the GPUs of a slot, one for each process of a run; slots beyond the last share them in
        turn."""
        together = self.config.launcher.processes_per_run
        first = slot % (len(self.gpus) // together) * together
        return self.gpus[first : first + together]

    def _running_workers(self) -> list[str]:
        return [str(slot) for slot in self.jobs]

    def _deaths(self) -> list[Death]:
        for worker in list(self.to_kill):
            self.to_kill.remove(worker)
            self._kill(worker)
        gone = [slot for slot, job in self.jobs.items() if job.done()]
        deaths = []
        for slot in gone:
            job = self.jobs.pop(slot)
            cause = exit_cause(self.session, str(slot))
            if not cause:  # its parent was killed: the worker itself may still be running
                self._kill(str(slot))
                cause = "killed together with its parent process"
            deaths.append(Death(str(slot), cause, Path(job.paths.stdout)))
            self.to_kill.discard(str(slot))
            for left in ("exit", "process"):
                (self.session.root / f"{left}-{slot}.json").unlink(missing_ok=True)
        return deaths

    def _kill(self, worker: str) -> None:
        """Kill a worker that does not respond, with everything it started."""
        try:
            pid = read_json(self.session.root / f"process-{worker}.json", dict[str, int])["pid"]
            if pid > 1:  # 0 and 1 mean ourselves and everything
                os.killpg(pid, signal.SIGKILL)
        except FileNotFoundError:  # submitit has not started it yet
            self.to_kill.add(worker)
        except (OSError, UserError, KeyError, OverflowError):
            return

    def _place(self, worker: str, note: Mapping[str, Any]) -> str | None:
        return f"slot {worker}"

    def close(self) -> None:
        self.session.publish([], closed=True, stop=True)
        self.lock.release()
        deadline = time.monotonic() + CLOSE_S
        while any(not job.done() for job in self.jobs.values()) and time.monotonic() < deadline:
            time.sleep(self.poll_s)
        for slot, job in self.jobs.items():
            if not job.done():
                self._kill(str(slot))
                os.kill(int(job.job_id), signal.SIGKILL)

    def leave(self) -> None:
        self.close()
