"""Submission of array jobs through submitit."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import Config

from .command import SCRUBBED

REFUSALS = 5  # submissions in a row that Slurm refuses, after it has accepted one, before the study stops
# where the cluster is and who we are, not whose job this is
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
NEVER = 10**6  # requeues after time-outs before submitit gives a job up
GPUS = ("gpus", "gres", "gpus_per_node", "gpus_per_task", "gpus_per_socket")  # ways to ask sbatch for one


def submit_jobs(
    config: Config,
    folder: Path,
    name: str,
    commands: Sequence[Callable[[], Any]],
    *,
    avoid: Sequence[str] = (),
) -> list[Any]:
    """Submit one job for each command, as an array, and return submitit's jobs. Raises UserError with what
    sbatch said."""
    import submitit

    failed = (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError)
    # variables of an enclosing job or MPI, which sbatch would read as options and pass to the workers
    enclosing = {k: v for k, v in os.environ.items() if k.startswith(SCRUBBED) and k not in KEPT}
    try:
        executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=NEVER)
        executor.update_parameters(**_sbatch(config, name, len(commands), avoid))
        for key in enclosing:
            del os.environ[key]
        with executor.batch():
            return [executor.submit(command) for command in commands]
    except (*failed, ValueError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        message = str(error).splitlines() or ["sbatch fails without a message"]
        lines = [x.strip() for x in message if "error" in x.lower()] or message[-1:]
        raise UserError(
            f"Slurm does not accept the job ({lines[0]}): see launcher.partition, launcher.sbatch …"
        ) from None
    finally:
        os.environ.update(enclosing)


def _sbatch(config: Config, name: str, count: int, avoid: Sequence[str]) -> dict[str, Any]:
    """Return the options of one submission by submitit's names; `launcher.sbatch` overrides ours."""
    asked = config.launcher
    by_user = {k.replace("-", "_"): v for k, v in asked.sbatch.items()}
    nodes = asked.nodes_per_run
    together = asked.processes_per_run // nodes  # on each node
    # where one task ends badly the others would wait for ever
    srun_args = [*(["--kill-on-bad-exit=1"] if nodes > 1 else []), *asked.srun_args]
    gpus = asked.gpus_per_node if asked.gpus_per_node is not None else together * (config.device == "cuda")
    options = {
        "job_name": name,
        "time": asked.timeout_min,
        "signal_delay_s": asked.signal_delay_s,
        "nodes": nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": asked.cpus_per_task or together * config.threads_per_run,
        "gpus_per_node": None if any(k in by_user for k in GPUS) else gpus or None,
        "mem": f"{round(1024 * asked.mem_gb)}M" if asked.mem_gb else None,
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "setup": asked.setup or None,
        "srun_args": srun_args or None,
        "exclude": ",".join(avoid) or None,
        "stderr_to_stdout": True,
        "array_parallelism": count,
        "additional_parameters": {"requeue": True, **by_user},
    }
    return {**{k: v for k, v in options.items() if v is not None}, "wckey": None}
