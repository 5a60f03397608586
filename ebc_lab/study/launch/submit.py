"""Slurm jobs submitted through submitit: arrays of workers, and a job that measures speeds on a node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ebc_lab.bench.speeds import Choice
from ebc_lab.config.dicts import run_part, to_dict
from ebc_lab.config.errors import UserError, blamed
from ebc_lab.config.schema import Config
from ebc_lab.records.json_files import read_json, write_json
from ebc_lab.training import nodes

from ..store.study import Cancelled, Study
from . import local, queue
from .session import Session, state_dir

REFUSALS = 5  # submissions in a row that Slurm refuses, after it has accepted one, before the study stops
# variables that identify the cluster and the user, not an enclosing job
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
GPUS = ("gpus", "gres", "gpus_per_node", "gpus_per_task", "gpus_per_socket")  # sbatch's options for GPUs
POLL_S = 0.5  # between two checks of the files that jobs write


def submit_jobs(
    config: Config, folder: Path, name: str, jobs: Sequence[Callable[[], Any]], *, avoid: Sequence[str] = ()
) -> list[Any]:
    """Submit an array with one Slurm job for each of `jobs`, and return submitit's job objects. `avoid`:
    nodes to exclude. Raises UserError with sbatch's message if Slurm refuses the array."""
    import submitit

    failed = (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError)
    # variables of an enclosing job or MPI, which sbatch would read as options and pass to the workers
    enclosing = {k: v for k, v in os.environ.items() if k.startswith(local.SCRUBBED) and k not in KEPT}
    try:
        executor = submitit.SlurmExecutor(
            folder=folder, max_num_timeout=10**6
        )  # in effect, any number of requeues
        executor.update_parameters(**_sbatch(config, name, len(jobs), avoid))
        for key in enclosing:
            del os.environ[key]
        with executor.batch():
            return [executor.submit(job) for job in jobs]
    except (*failed, ValueError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        message = str(error).splitlines() or ["sbatch fails without a message"]
        why = next((line.strip() for line in message if "error" in line.lower()), message[-1])
        remedy = "see launcher.partition, launcher.sbatch …"
        raise UserError(f"Slurm does not accept the job ({why}): {remedy}") from None
    finally:
        os.environ.update(enclosing)


def _sbatch(config: Config, name: str, count: int, avoid: Sequence[str]) -> dict[str, Any]:
    """Return the options of one submission, by submitit's names. `launcher.sbatch` overrides the others."""
    asked = config.launcher
    by_user = {k.replace("-", "_"): v for k, v in asked.sbatch.items()}
    count_of_nodes = asked.nodes_per_run
    together = asked.processes_per_run // count_of_nodes  # on each node
    # if one task failed, the others would wait for ever
    srun_args = [*(["--kill-on-bad-exit=1"] if count_of_nodes > 1 else []), *asked.srun_args]
    gpus = asked.gpus_per_node if asked.gpus_per_node is not None else together * (config.device == "cuda")
    options = {
        "job_name": name,
        "time": asked.timeout_min,
        "signal_delay_s": asked.signal_delay_s,
        "nodes": count_of_nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": asked.cpus_per_task or together * config.threads_per_run,
        "gpus_per_node": None if any(k in by_user for k in GPUS) else gpus or None,
        "mem": f"{round(1024 * asked.mem_gb)}M" if asked.mem_gb else None,
        **{key: getattr(asked, key) for key in ("partition", "account", "qos", "constraint")},
        "setup": asked.setup or None,
        "srun_args": srun_args or None,
        "exclude": ",".join(avoid) or None,
        "stderr_to_stdout": True,
        "array_parallelism": count,
        "additional_parameters": {"requeue": True, **by_user},
    }
    return {**{k: v for k, v in options.items() if v is not None}, "wckey": None}


@dataclass
class SlurmWorker:
    """A callable that submitit runs on each node of a Slurm job. On the first node it runs the worker, in a
    separate process and environment; on every other node it serves that worker."""

    session: str
    env: dict[str, str]
    # with the driver's Python, not the job's
    command: Sequence[str] = field(default_factory=lambda: (sys.executable, *local.WORKER))
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
            # Slurm sends its warning to every process of the job, and by default it would end the worker
            preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
            stdin=subprocess.DEVNULL,
        )
        code = self.process.wait()
        session.note("exit", job.job_id, code=code)
        if nodes_file.exists():
            nodes.dismiss(nodes_file)
        if code:  # makes Slurm count the job as failed
            raise RuntimeError(f"the worker ended with exit code {code}")

    def checkpoint(self) -> Any:
        """Stop the worker with a checkpoint, and return the submission that submitit requeues. submitit's
        signal handler calls this before a time-out or on preemption."""
        import submitit

        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            # not `process.wait()`: the one in `__call__` holds Popen's lock
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(self)


def choice_on_node(config: Config, study: Study) -> Choice:
    """Return the choice made in a Slurm job from speeds measured on a node. The driver's machine may have
    other cores, or no GPU. Raises UserError if the job or the queue fails, and Cancelled."""
    folder = Path(tempfile.mkdtemp(prefix="speeds-", dir=state_dir(study, "slurm")))
    name = f"ebc-{study.name[:40]}-{folder.name}"
    found = folder / "found.json"
    measurement = partial(_measure, json.dumps(to_dict(run_part(config))), found)
    launcher = config.launcher
    on_each = launcher.processes_per_run // launcher.nodes_per_run
    one = replace(config, launcher=replace(launcher, nodes_per_run=1, processes_per_run=on_each))
    [job] = submit_jobs(one, folder, name, [measurement])
    remedy = f"read {job.paths.stdout}, or give dtype=…"
    asked = seen = time.monotonic()  # when the queue was last asked, and when it last showed the job
    try:
        while not found.exists():
            if study.cancel_mark.exists():
                raise Cancelled(f"study {study.name} was cancelled")
            if time.monotonic() - asked > launcher.queue_every_s:
                asked = time.monotonic()
                entry = queue.jobs_named(name).get(job.job_id)
                seen = seen if entry is None else asked
                ended = asked - seen > queue.GONE_S if entry is None else not entry.live
                if ended and not found.exists():
                    state = entry.state if entry else "gone"
                    raise UserError(f"measuring the speeds on a node failed ({state}): {remedy}.")
            time.sleep(POLL_S)
        choice = read_json(found, Choice, remedy)
        with blamed("what a node measured", "give dtype=…"):
            return Choice(**choice)
    except queue.QueueUnavailable as error:
        raise UserError(f"the Slurm queue cannot be asked ({error}): fix that, or give dtype=….") from None
    finally:
        with suppress(queue.QueueUnavailable):
            queue.scancel(name)


def _measure(run: str, found: Path) -> None:
    """Measure the speeds of a run in a separate process, and write the resulting `Choice` to `found`. `run`:
    the run's settings, as JSON."""
    asked = [sys.executable, "-m", "ebc_lab.bench.speeds"]
    output = subprocess.run(asked, input=run, stdout=subprocess.PIPE, text=True, check=True).stdout
    write_json(found, json.loads(output))
