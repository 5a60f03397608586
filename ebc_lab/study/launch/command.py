"""The process and the environment that a worker is started with on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from ebc_lab.config.schema import Config

from .session import Session

WORKER = ("-m", "ebc_lab.study.launch.worker")  # what Python is given to be one
SCRUBBED = ("SLURM_", "PMI_", "PMIX_", "SUBMITIT_")  # variables of an enclosing job


def start_worker(
    session: Session, name: str, env: Mapping[str, str], locks: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """Start a worker on this machine, whose output goes to its log, and return its process.

    It has a process group of its own: Ctrl-C reaches only its driver, whose freed lock makes it end with a
    checkpoint. `locks`: what only one worker at a time may hold, of whichever driver.
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
    """Return what is set in every worker's environment."""
    threads = str(config.threads_per_run)
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
