"""launcher=local: worker processes on this machine, one per slot, each on its own GPU or core group, through
submitit.

submitit's local executor has no queue and gives every job the same GPUs, so slots and devices are assigned
here. A run that several processes train has as many GPUs, or groups of cores. A worker ends when its driver's
lock is free, for whatever reason the driver ended. What becomes of a GPU that fails is in `devices.py`.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import Config
from ebc_lab.records.figures import FINISHED
from ebc_lab.records.json_files import read_json

from ..store import attempts
from ..store.study import Study
from .command import WorkerCommand, worker_env
from .devices import Devices
from .pool import Death, Say, WorkerPool, WorkersFailed, worker_settings
from .session import CLEAN, GUEST, ProcessRecord, Session, exit_cause, state_dir

CLOSE_S = 15.0  # for a checkpoint, before workers are killed


class LocalPool(WorkerPool):
    """One worker process per slot."""

    def __init__(self, config: Config, study: Study, gpus: Sequence[str], slots: int, say: Say):
        shared = config.launcher.join
        about = {**worker_settings(config), "device": config.device, "env": worker_env(config)}
        session = Session.begin(study, "local", shared=shared, bound=True, idle_s=None, **about)
        super().__init__(config, study, session, slots, say)
        # pickles, which nobody else may write
        self.started_from = tempfile.mkdtemp(dir=state_dir(study, "local")) if shared else session.root
        self.devices = Devices(gpus, config.launcher.processes_per_run, slots)
        self.lock = FileLock(session.lock_path, fallback_to_soft=False)
        self.lock.acquire(timeout=0)
        self.jobs: dict[int, Any] = {}
        self.to_kill: set[str] = set()  # workers, as soon as they are there

    def _start_workers(self, wanted: int) -> None:
        self._judge_memory()
        usable = self.devices.usable
        if not usable and not self.jobs:
            why = "; ".join(dict.fromkeys(self.devices.retired.values()))
            raise WorkersFailed(f"no GPU is left to train on: {why}. The same command continues from here.")
        if barred := self.devices.all_barred():  # those that may take most of what is left come first
            left = [workers for run_id, workers in barred.items() if not self.study.has_result(run_id)]
            usable.sort(key=lambda slot: sum(str(slot) in workers for workers in left))
        for slot in usable[:wanted]:
            if slot not in self.jobs:
                self._start(slot)

    def _start(self, slot: int) -> None:
        import submitit

        executor = submitit.LocalExecutor(folder=Path(self.started_from) / "submitit")
        executor.update_parameters(timeout_min=60 * 24 * 365, stderr_to_stdout=True)
        env = worker_env(self.config)
        if gpus := self.devices.of(slot):
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        # Ctrl-C reaches every process of this one's group, and submitit's would print a traceback each: the
        # mask is inherited, and one that comes here meanwhile is delivered afterwards
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            command = WorkerCommand(str(self.session.root), str(slot), env, self.devices.places(slot))
            self.jobs[slot] = executor.submit(command)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    # -- GPUs that fail, or lack memory ----------------------------------------------------------------------

    def _sharers(self) -> tuple[int, dict[str, list[str]], list[str]]:
        retired = [str(slot) for slot in self.devices.retired]
        return len(self.devices.usable), self.devices.all_barred(), retired

    def _has_worked(self, worker: str) -> None:
        if not worker.startswith(GUEST):
            self.devices.worked(int(worker))

    def _device_is_to_blame(self, worker: str, said: str | None, lost: Sequence[str]) -> bool:
        if worker.startswith(GUEST):
            return said is not None
        blameless, told = self.devices.failed(int(worker), said, lost)
        self._say_retired(told)
        return blameless

    def _memory_may_suffice(self) -> bool:
        return super()._memory_may_suffice() or self.devices.several

    def _try_elsewhere(self, run_id: str) -> str | None:
        last = self._last_attempt(run_id)
        gpus = last.get("cuda_visible_devices", "")
        # a result is there before the end is logged
        alone = self.config.launcher.runs_per_worker == 1 or (last["event"] == "end" and last["beside"] == 0)
        if not self.devices.ran_short(run_id, gpus, alone=alone):
            return super()._try_elsewhere(run_id)
        return f"what else is on {gpus}: it is tried again on another GPU, alone"

    def _last_attempt(self, run_id: str) -> dict[str, Any]:
        """Return what is logged of the last attempt at a run: its begin, and over it what came after."""
        known: dict[str, Any] = {"event": None}
        for event in attempts.log(self.study.run_dir(run_id)):
            known = event if event.get("event") == "begin" else known | event
        return known

    def _judge_memory(self) -> None:
        """Retire GPUs on which runs ran out of memory that then fitted elsewhere."""
        for run_id in self.devices.waiting_for():
            if (result := self.study.result(run_id)) is not None:
                fits = result["outcome"] in FINISHED
                gpus = self._last_attempt(run_id).get("cuda_visible_devices", "") if fits else ""
                self._say_retired(self.devices.fitted(run_id, gpus))

    def _say_retired(self, told: str) -> None:
        """Say why slots are retired, if they are, and leave them out of what is compared with a place where
        workers die."""
        if told:
            self.avoided |= {_place_of(slot) for slot in self.devices.retired}
            self.say(told)

    def _avoid(self, place: str, why: str) -> None:
        super()._avoid(place, why)
        self.devices.retire([slot for slot in self.devices.usable if _place_of(slot) == place], why)

    # -- watching --------------------------------------------------------------------------------------------

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
            told_to_end = slot in self.devices.retired and cause == CLEAN
            deaths.append(
                Death(str(slot), cause, Path(job.paths.stdout), clean=told_to_end, counts=not told_to_end)
            )
            self.to_kill.discard(str(slot))
            for left in ("exit", "process"):
                (self.session.root / f"{left}-{slot}.json").unlink(missing_ok=True)
        return deaths

    def _kill(self, worker: str) -> None:
        """Kill a worker that does not respond, with everything it started."""
        try:
            pid = read_json(self.session.process_file(worker), ProcessRecord)["pid"]
            if pid > 1:  # 0 and 1 mean ourselves and everything
                os.killpg(pid, signal.SIGKILL)
        except FileNotFoundError:  # submitit has not started it yet
            self.to_kill.add(worker)
        except (OSError, UserError, KeyError, OverflowError):
            return

    def _place(self, worker: str, note: Mapping[str, Any]) -> str | None:
        return f"host {note.get('host')}" if worker.startswith(GUEST) else _place_of(worker)

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


def _place_of(slot: int | str) -> str:
    return f"slot {slot}"
