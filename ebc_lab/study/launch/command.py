"""The command and the environment that a worker process is started with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ebc_lab.config.schema import Config
from ebc_lab.records.json_files import write_json
from ebc_lab.training import nodes

from .session import Session

WORKER_NICENESS = 5
SCRUBBED = ("SLURM_", "PMI_", "PMIX_", "SUBMITIT_")  # variables of an enclosing job


class WorkerCommand:
    """What submitit runs: one worker in a subprocess and an environment of its own."""

    def __init__(self, session: str, worker: str | None, env: Mapping[str, str], places: Sequence[str] = ()):
        """`places`: what only one worker at a time may hold, of whichever driver."""
        self.session = session
        self.worker = worker
        self.places = places
        self.env = dict(env)
        self.process: subprocess.Popen[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "process": None}

    def __call__(self) -> int:
        import submitit

        local = self.worker is not None
        node = 0 if local else submitit.JobEnvironment().global_rank
        name = self.worker or submitit.JobEnvironment().job_id
        drop = SCRUBBED if local else ("SUBMITIT_",)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
        nodes_file = Session(Path(self.session)).nodes_file(name)
        if node > 0:
            nodes.serve(nodes_file, node, {**inherited, **self.env})
            return 0
        command = [sys.executable, "-m", "ebc_lab.study.launch.worker", self.session, name, *self.places]
        # on this machine: a process group of its own, so that Ctrl-C reaches only the driver, whose freed
        # lock makes the worker end with a checkpoint. In a Slurm job: the job's group, so that Slurm finds it
        prepare = _be_a_worker if local else _ignore_usr2
        self.process = subprocess.Popen(
            command,
            env={**inherited, **self.env},
            start_new_session=local,
            preexec_fn=prepare,
            stdin=subprocess.DEVNULL,
        )
        Session(Path(self.session)).note_process(name, self.process.pid)
        if local:
            for sig in (signal.SIGTERM, signal.SIGINT):
                signal.signal(sig, lambda number, _: self._tell(number))
        code = self.process.wait()
        write_json(Path(self.session) / f"exit-{name}.json", {"code": code}, durable=False)
        if nodes_file.exists():
            nodes.dismiss(nodes_file)
        if code and not local:
            raise RuntimeError(
                f"the worker ended with exit code {code}"
            )  # Slurm then counts the job as failed
        return code

    def _tell(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)

    def checkpoint(self) -> Any:
        """submitit calls this in its signal handler, before a time-out or on preemption, and requeues the
        job."""
        import submitit

        if self.process is not None:
            self._tell(signal.SIGINT)
            # not `process.wait()`: the one in `__call__` holds Popen's lock
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(WorkerCommand(self.session, self.worker, self.env))


def _be_a_worker() -> None:
    """Lower its priority, so that `status` and other commands answer quickly while workers train; and hear
    SIGINT, which its parent blocks."""
    os.nice(WORKER_NICENESS)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def _ignore_usr2() -> None:
    """Slurm sends its warning to every process of the job, and by default it would end this one."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def worker_env(config: Config) -> dict[str, str]:
    """Return what is set in every worker's environment."""
    threads = str(config.threads_per_run)
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
