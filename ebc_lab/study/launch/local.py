"""launcher=local: worker processes on this machine, one per slot. A worker uses CPU cores, or one GPU for
each process of a run. However a driver ends, its workers end once the driver's lock is free.

A slot is avoided for the rest of the command if nvidia-smi no longer lists the slot's GPU, or if the worker
cannot use that GPU, perhaps because another process holds it. Neither counts against a run. If memory runs
out on one of several GPUs, another process may have taken the memory. The run is then tried once more, on
another GPU, and the second attempt counts.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from filelock import FileLock

from ebc_lab.config.machine import listing, named_by, processes_on
from ebc_lab.config.schema import Config
from ebc_lab.training.ends import OUT_OF_MEMORY, UNUSABLE

from ..store.study import Study
from .pool import Death, Note, Say, WorkerPool, WorkersFailed
from .session import GUEST, Session, describe_exit, worker_settings

WORKER = ("-m", "ebc_lab.study.launch.worker")  # Python's arguments for a worker process
SCRUBBED = ("SLURM_", "PMI_", "PMIX_", "SUBMITIT_")  # prefixes of an enclosing job's environment variables
CLOSE_S = 15.0  # time for workers to write checkpoints before they are killed


def start_worker(
    session: Session, name: str, env: Mapping[str, str], locks: Sequence[str]
) -> subprocess.Popen[bytes]:
    """Start a worker on this machine, which writes its output to a log, and return the worker's process.

    The worker has its own process group, so Ctrl-C reaches only the driver. The driver then frees its lock,
    which makes the worker end with a checkpoint. `locks`: the names of locks that the worker waits for first.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(SCRUBBED)}
    with open(session.log_path(name), "ab") as log:
        return subprocess.Popen(
            [sys.executable, *WORKER, str(session.root), name, *locks],
            env={**inherited, **env},
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def worker_env(config: Config) -> dict[str, str]:
    """Return the environment variables that are set for every worker."""
    threads = str(config.threads_per_run)
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}


class LocalPool(WorkerPool):
    """A pool with one worker process per slot."""

    def __init__(self, config: Config, study: Study, gpus: Sequence[str], slots: int, say: Say):
        """Begin a session, and hold its lock. `gpus`: identifiers, as CUDA_VISIBLE_DEVICES accepts them."""
        launcher = config.launcher
        together = launcher.processes_per_run
        self.groups = [tuple(gpus[i * together : (i + 1) * together]) for i in range(len(gpus) // together)]
        # by slot, one GPU for each process of a run; slots beyond the last group share the groups in turn
        self.gpus = [self.groups[slot % len(self.groups)] if self.groups else () for slot in range(slots)]
        about = worker_settings(config, several_gpus=len(set(self.gpus)) > 1)
        about |= {"bound": True, "idle_s": None, "device": config.device, "env": worker_env(config)}
        session = Session.begin(study, "local", shared=launcher.join, **about)
        super().__init__(config, study, session, slots, say)
        self.lock = FileLock(session.lock_path, fallback_to_soft=False)
        self.lock.acquire(timeout=0)
        self.workers: dict[int, subprocess.Popen[bytes]] = {}  # by slot
        self.failed_on: dict[str, set[int]] = {}  # run id -> slots whose GPUs failed during it

    def _usable(self) -> list[int]:
        return [slot for slot in range(self.slots) if _place_of(slot) not in self.avoided]

    def _start_workers(self, wanted: int) -> None:
        usable = self._usable()
        if not usable and not self.workers:
            why = "; ".join(dict.fromkeys(self.avoided[_place_of(slot)] for slot in range(self.slots)))
            raise WorkersFailed(f"no GPU is left to train on: {why}. The same command continues from here.")
        if barred := self._barred():  # slots that may take the most of the remaining runs come first
            left = [workers for run_id, workers in barred.items() if not self.study.has_result(run_id)]
            usable.sort(key=lambda slot: sum(str(slot) in workers for workers in left))
        for slot in usable[:wanted]:
            if slot not in self.workers:
                env = worker_env(self.config)
                if self.gpus[slot]:
                    env["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[slot])
                self.workers[slot] = start_worker(self.session, str(slot), env, self._locks(slot))

    def _locks(self, slot: int) -> list[str]:
        """Return the names of the locks that a slot's worker holds while it lives: one for each of the slot's
        GPUs, numbered because workers may share a GPU. The names do not depend on which other GPUs are
        visible. They are sorted, so that workers with overlapping groups of GPUs never deadlock."""
        gpus = self.gpus[slot]
        return sorted(re.sub(r"[^\w.-]", "_", f"{gpu}-{slot // len(self.groups)}") for gpu in gpus)

    def _barred(self) -> dict[str, list[str]]:
        usable = set(self._usable())
        return {
            run_id: sorted(map(str, slots)) if usable - slots else []  # no other slot is usable
            for run_id, slots in self.failed_on.items()
        }

    def _device_is_to_blame(self, worker: str, failure: str | None, run_id: str | None) -> bool:
        if worker.startswith(GUEST):
            return failure is not None
        slot = int(worker)
        gpus = self.gpus[slot]
        if not gpus:
            return False
        if failure is not None and run_id is not None:
            same = {other for other, theirs in enumerate(self.gpus) if theirs == gpus}
            self.failed_on.setdefault(run_id, set()).update(same)
        listed = listing()  # a lost GPU may also hang its worker, or end it by a signal
        gone = [name for name in gpus if not listed.failure and not named_by(name, listed.gpus)]
        where = " and ".join(gpus)
        if gone:
            sharing = [other for other, theirs in enumerate(self.gpus) if set(theirs) & set(gone)]
            self._retire(sharing, f"{' and '.join(gone)} is not listed by nvidia-smi any more")
        elif failure is not None and any(words in failure for words in UNUSABLE):
            held = "".join(_holders(name, only=len(gpus) == 1) for name in gpus)
            self._retire([slot], f"{where} cannot be used ({failure}{held})")
        elif failure is not None and failure.startswith(OUT_OF_MEMORY):
            self.say(f"{run_id} ran out of memory on {where}: it is tried again on another GPU")
        else:
            return False
        return True

    def _retire(self, slots: Iterable[int], why: str) -> None:
        """Stop using these slots for the rest of the command, and end their workers."""
        self.say(f"{why}: no more workers are started there, and its runs go to others")
        for slot in slots:
            self.avoided.setdefault(_place_of(slot), why)
            if slot in self.workers:
                self.workers[slot].send_signal(signal.SIGINT)

    def _running_workers(self) -> list[str]:
        return [str(slot) for slot in self.workers]

    def _deaths(self) -> list[Death]:
        deaths = []
        for slot, process in list(self.workers.items()):
            if (code := process.poll()) is not None:
                del self.workers[slot]
                retired = _place_of(slot) in self.avoided  # so the worker was told to end
                log = self.session.log_path(str(slot))
                deaths.append(Death(str(slot), describe_exit(code), log, clean=retired, counts=not retired))
        return deaths

    def _kill(self, worker: str) -> None:
        """Kill a worker and every process that the worker has started."""
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


def _holders(name: str, *, only: bool) -> str:
    """Return a phrase that names the processes on a GPU, or an empty string if nvidia-smi shows none. `only`:
    whether this GPU is the worker's only one."""
    where = "it" if only else name
    if name.isdecimal():  # CUDA may number GPUs differently
        where = f"nvidia-smi's GPU {name}"
    elif name.startswith("MIG-"):
        where = "its GPU, all instances together,"
    processes = processes_on(name)
    return f"; on {where} is process {', '.join(processes)}" if processes else ""
