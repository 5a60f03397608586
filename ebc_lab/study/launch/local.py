"""launcher=local: worker processes on this machine, one per slot, each on its own GPU or group of cores.

A run that several processes train has as many GPUs, or groups of cores. A worker ends when its driver's lock
is free, for whatever reason the driver ended. What becomes of a GPU that fails is in `devices.py`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress

from filelock import FileLock

from ebc_lab.config.schema import Config

from ..store.study import Study
from .command import start_worker, worker_env
from .devices import Devices
from .pool import Death, Note, Say, WorkerPool, WorkersFailed
from .session import GUEST, Session, describe_exit, worker_settings

CLOSE_S = 15.0  # for a checkpoint, before workers are killed


class LocalPool(WorkerPool):
    """One worker process per slot."""

    def __init__(self, config: Config, study: Study, gpus: Sequence[str], slots: int, say: Say):
        self.devices = Devices(gpus, config.launcher.processes_per_run, slots)
        about = worker_settings(config, several_gpus=self.devices.several)
        about |= {"device": config.device, "env": worker_env(config)}
        shared = config.launcher.join
        session = Session.begin(study, "local", shared=shared, bound=True, idle_s=None, **about)
        super().__init__(config, study, session, slots, say)
        self.lock = FileLock(session.lock_path, fallback_to_soft=False)
        self.lock.acquire(timeout=0)
        self.workers: dict[int, subprocess.Popen[bytes]] = {}  # by slot

    def _start_workers(self, wanted: int) -> None:
        usable = self.devices.usable
        if not usable and not self.workers:
            why = "; ".join(dict.fromkeys(self.devices.retired.values()))
            raise WorkersFailed(f"no GPU is left to train on: {why}. The same command continues from here.")
        if barred := self._barred():  # those that may take most of what is left come first
            left = [workers for run_id, workers in barred.items() if not self.study.has_result(run_id)]
            usable.sort(key=lambda slot: sum(str(slot) in workers for workers in left))
        for slot in usable[:wanted]:
            if slot not in self.workers:
                self._start(slot)

    def _start(self, slot: int) -> None:
        env = worker_env(self.config)
        if gpus := self.devices.gpus_of(slot):
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        self.workers[slot] = start_worker(self.session, str(slot), env, self.devices.places(slot))

    def _barred(self) -> dict[str, list[str]]:
        return self.devices.barred()

    def _device_is_to_blame(self, worker: str, said: str | None, run_id: str | None) -> bool:
        if worker.startswith(GUEST):
            return said is not None
        to_blame, news = self.devices.failed(int(worker), said, run_id)
        if news:
            self.say(news)
        for slot in self.devices.retired:
            self.avoided.add(_place_of(slot))  # no place that others are compared with
            if slot in self.workers:  # its GPU was that of the one that has died
                self.workers[slot].send_signal(signal.SIGINT)
        return to_blame

    def _avoid(self, place: str, why: str) -> None:
        super()._avoid(place, why)
        self.devices.retire([slot for slot in self.devices.usable if _place_of(slot) == place], why)

    def _running_workers(self) -> list[str]:
        return [str(slot) for slot in self.workers]

    def _deaths(self) -> list[Death]:
        ended = {slot: process for slot, process in self.workers.items() if process.poll() is not None}
        deaths = []
        for slot, process in ended.items():
            del self.workers[slot]
            retired = slot in self.devices.retired  # and so told to end
            log = self.session.log_path(str(slot))
            cause = describe_exit(process.returncode)
            deaths.append(Death(str(slot), cause, log, clean=retired, counts=not retired))
        return deaths

    def _kill(self, worker: str) -> None:
        """Kill a worker that does not respond, with everything it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.workers[int(worker)].pid, signal.SIGKILL)

    def _place(self, worker: str, note: Note) -> str | None:
        return f"host {note.get('host')}" if worker.startswith(GUEST) else _place_of(worker)

    def close(self) -> None:
        self.session.publish([], stop=True)
        self.lock.release()
        deadline = time.monotonic() + CLOSE_S
        for slot, process in self.workers.items():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._kill(str(slot))
                process.wait()


def _place_of(slot: int | str) -> str:
    return f"slot {slot}"
