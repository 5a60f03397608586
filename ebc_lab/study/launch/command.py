"""The process and the environment that a worker is started with: on this machine, and in a Slurm job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ebc_lab.config.schema import Config
from ebc_lab.training import nodes

from .session import Session

WORKER = ("-m", "ebc_lab.study.launch.worker")  # what Python is given to be one
SCRUBBED = ("SLURM_", "PMI_", "PMIX_", "SUBMITIT_")  # variables of an enclosing job


def start_worker(
    session: Session, name: str, env: Mapping[str, str], places: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """Start a worker on this machine, whose output goes to its log, and return its process.

    It has a process group of its own: Ctrl-C reaches only its driver, whose freed lock makes it end with a
    checkpoint. `places`: what only one worker at a time may hold, of whichever driver.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(SCRUBBED)}
    with open(session.log_path(name), "ab") as log:
        return subprocess.Popen(
            [sys.executable, *WORKER, str(session.root), name, *places],
            env={**inherited, **env},
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


@dataclass
class SlurmWorker:
    """What submitit runs in a Slurm job: one worker in a process and an environment of its own."""

    session: str
    env: dict[str, str]
    command: Sequence[str] = field(default_factory=lambda: (sys.executable, *WORKER))  # as its driver has it
    process: subprocess.Popen[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "process": None}

    def __call__(self) -> None:
        import submitit

        job = submitit.JobEnvironment()
        session = Session(Path(self.session))
        nodes_file = session.nodes_file(job.job_id)
        env = {k: v for k, v in os.environ.items() if not k.startswith("SUBMITIT_")} | self.env
        if job.global_rank > 0:
            nodes.serve(nodes_file, job.global_rank, env)
            return
        self.process = subprocess.Popen(
            [*self.command, self.session, job.job_id],
            env=env,
            # Slurm sends its warning to every process of the job, and by default it would end this one
            preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
            stdin=subprocess.DEVNULL,
        )
        code = self.process.wait()
        session.note_exit(job.job_id, code)
        if nodes_file.exists():
            nodes.dismiss(nodes_file)
        if code:  # Slurm then counts the job as failed
            raise RuntimeError(f"the worker ended with exit code {code}")

    def checkpoint(self) -> Any:
        """Stop the worker with a checkpoint. submitit calls this in its signal handler, before a time-out or
        on preemption, and requeues the job."""
        import submitit

        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            # not `process.wait()`: the one in `__call__` holds Popen's lock
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(self)


def worker_env(config: Config) -> dict[str, str]:
    """Return what is set in every worker's environment."""
    threads = str(config.threads_per_run)
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
