"""Workers as Slurm array jobs, submitted through submitit; one job, one worker, one GPU.

Jobs outlive their driver: one that returns finds them by their name and adopts them. submitit turns Slurm's warning (USR2,
before a time-out and on preemption) into a checkpoint and a requeue. The queue is asked by name, one `squeue` for all jobs, at
most every `launcher.queue_every_s`; no accounting is needed. What runs find is read from their own files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config, LauncherConfig, UserError, run_part, to_dict
from ..telemetry import read_json, write_json
from .launch import SCRUBBED, Death, Say, WorkerCommand, WorkerPool, WorkersFailed, habits, worker_env
from .session import Session, state_dir
from .store import Study

POLL_S = 0.5
CLOSE_S = 20.0  # for workers that are told to stop, before their jobs are cancelled
GONE_S = 60.0  # until a job that the queue has never shown counts as gone
LIVE = (
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "STOPPED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SPECIAL_EXIT",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
)
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")  # where the cluster is, not whose job this is
NEVER = 10**6  # requeues after time-outs before submitit gives a job up


class QueueSilent(Exception):
    """squeue did not answer; says what it said."""


@dataclass(frozen=True)
class Job:
    """One array task as the queue shows it."""

    state: str  # Slurm's: PENDING, RUNNING, COMPLETED, CANCELLED …
    reason: str

    @property
    def live(self) -> bool:
        return self.state in LIVE


def job_name(session: Session) -> str:
    """What a session's jobs are called: the study, and the session's own token, which no other cluster's job can have."""
    study = Path(session.about()["study"]).name
    return f"ebc-{study[:40]}-{session.root.name.removeprefix('session-')}"


def queue(name: str) -> dict[str, Job]:
    """Job key (`<array>_<task>`) -> the job, of all with this name that Slurm still knows. Raises QueueSilent."""
    command = ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", f"--name={name}"]
    try:
        found = subprocess.run([*command, "--format=%F|%K|%T|%r"], capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise QueueSilent("there is no squeue on this machine") from None
    except subprocess.TimeoutExpired:
        raise QueueSilent("squeue takes longer than 60 s") from None
    if found.returncode:
        raise QueueSilent((found.stderr.strip().splitlines() or ["no message"])[-1])
    jobs = {}
    for line in found.stdout.splitlines():
        array, task, state, reason = line.split("|", 3)
        jobs[f"{array}_{task}" if task.isdigit() else array] = Job(state, reason)
    return jobs


def looked_up(session: Session, every_s: float) -> dict[str, Job]:
    """`queue`, but no oftener than `every_s`, whoever asks: the last answer lies in the session. Raises QueueSilent."""
    path = session.root / "queue.json"
    try:
        last = read_json(path)
        if abs(time.time() - last["at"]) < every_s:
            return {k: Job(*v) for k, v in last["jobs"].items()}
    except (FileNotFoundError, UserError):
        pass
    jobs = queue(job_name(session))
    write_json(path, {"at": time.time(), "jobs": {k: [j.state, j.reason] for k, j in jobs.items()}}, durable=False)
    return jobs


def scancel(name: str, *options: str) -> None:
    """Cancel every job of this name (and, with `--state=PENDING`, in this state)."""
    subprocess.run(
        ["scancel", f"--user={os.getuid()}", f"--name={name}", *options], capture_output=True, timeout=60, check=False
    )


def dismiss(session: Session, say: Say) -> int:
    """Stop a session's jobs and see them gone. -> how many there were. Raises QueueSilent, WorkersFailed."""
    name = job_name(session)
    session.publish([], closed=True, stop=True)
    live = [k for k, j in queue(name).items() if j.live]
    if not live:
        return 0
    scancel(name, "--state=PENDING")
    begun, hard = time.monotonic(), False
    while any(j.live for j in queue(name).values()):
        waited = time.monotonic() - begun
        if waited > CLOSE_S and not hard:
            scancel(name)
            hard = True
        if waited > CLOSE_S + 10 * GONE_S:
            raise WorkersFailed(f"jobs named {name} do not end: ask `squeue --name={name}`, and your administrators.")
        time.sleep(2 * POLL_S)
    return len(live)


class SlurmPool(WorkerPool):
    """Array jobs; the driver's part is to keep as many as are wanted, and to tell lost ones from those that are done."""

    poll_s = POLL_S

    def __init__(self, config: Config, study: Study, slots: int, say: Say):
        session, jobs = self._adopted(study)
        if session is None:
            session = Session.begin(study, "slurm", bound=False, idle_s=config.launcher.idle_s, **habits(config))
        super().__init__(config, study, session, slots, say)
        self.jobs = jobs
        self.submitted = dict.fromkeys(jobs, time.monotonic())
        self.fresh: list[Death] = []
        self.looked = time.monotonic()
        self.shown = ""
        for worker in set(session.notes()) - set(jobs):
            session.forget(worker)
        if jobs:
            say(f"{len(jobs)} Slurm job(s) of an earlier call are still there: {', '.join(sorted(jobs))}; adopted")

    def _adopted(self, study: Study) -> tuple[Session | None, dict[str, Job]]:
        """The session whose jobs still live, if there is one."""
        for session in Session.of(study, "slurm"):
            try:
                jobs = {k: j for k, j in queue(job_name(session)).items() if j.live}
            except QueueSilent as error:
                raise UserError(f"the Slurm queue cannot be asked ({error}): mend that, and give the command again.") from None
            if jobs:
                return session, jobs
        return None, {}

    # -- what every pool does ------------------------------------------------------------------------------------------

    def _staff(self, wanted: int) -> None:
        if self.slots < 1:
            raise WorkersFailed("all its jobs were cancelled from outside: the same command carries on with new ones.")
        missing = min(self.slots, wanted) - len(self.jobs)
        if missing > 0:
            self._submit(missing)

    def _submit(self, count: int) -> None:
        command = WorkerCommand(str(self.session.root), None, worker_env(self.config))
        jobs = submitted(self.config, self.session.root / "submitit", job_name(self.session), [command] * count)
        for job in jobs:
            self.jobs[job.job_id] = Job("PENDING", "submitted")
            self.submitted[job.job_id] = time.monotonic()
        self.say(f"submitted {count} Slurm job(s): {', '.join(job.job_id for job in jobs)}")

    def _at_work(self) -> list[str]:
        return [key for key, job in self.jobs.items() if job.state == "RUNNING"]

    def _deaths(self) -> list[Death]:
        if time.monotonic() - self.looked >= self.config.launcher.queue_every_s:
            self._look()
        deaths, self.fresh = self.fresh, []
        return deaths

    def _look(self) -> None:
        self.looked = time.monotonic()
        try:
            jobs = looked_up(self.session, self.config.launcher.queue_every_s / 2)
        except QueueSilent as error:
            self._show(f"the queue does not answer ({error}); asking again")
            return
        for key in list(self.jobs):
            job = jobs.get(key)
            if job is None and time.monotonic() - self.submitted[key] < GONE_S:
                continue
            if job is not None and job.live:
                self.jobs[key] = job
                continue
            del self.jobs[key]
            self._mourn(key, job)
        waiting = [j for j in self.jobs.values() if j.state != "RUNNING"]
        reasons = sorted({j.reason for j in waiting if j.reason not in ("None", "submitted")})
        why = f" ({', '.join(reasons)})" if reasons else ""
        self._show(f"{len(self.jobs) - len(waiting)} job(s) running, {len(waiting)} waiting{why}")

    def _mourn(self, key: str, job: Job | None) -> None:
        state = job.state if job else "gone from the queue"
        log = self.session.root / "submitit" / f"{key}_0_log.out"
        if state.startswith("CANCELLED") and key not in self.killed:
            self.slots -= 1
            self.say(f"job {key} was cancelled from outside; {max(self.slots, 0)} job(s) share what is left")
        self.fresh.append(Death(key, f"its job was {state}", log, clean=state == "COMPLETED"))

    def _show(self, text: str) -> None:
        if text != self.shown:
            self.shown = text
            self.say(text)

    def _kill(self, worker: str, note: Mapping[str, Any]) -> None:
        subprocess.run(["scancel", worker], capture_output=True, timeout=60, check=False)

    def close(self) -> None:
        try:
            dismiss(self.session, self.say)
        except QueueSilent as error:
            self.say(f"the queue does not answer ({error}): `ebc-lab cancel {self.study.name}` ends what may still run")

    def leave(self) -> None:
        if self.jobs:
            self.say(
                f"{len(self.jobs)} Slurm job(s) go on without this driver: the same command adopts them, "
                f"`ebc-lab cancel {self.study.name}` ends them"
            )


def submitted(config: Config, folder: Path, name: str, commands: Sequence[Callable[[], Any]]) -> list[Any]:
    """Submit one job, or an array of them. -> submitit's jobs. Raises UserError with what sbatch said."""
    import submitit

    errors = (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError, ValueError, RuntimeError)
    try:
        executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=NEVER)
        executor.update_parameters(**_sbatch(config, name, len(commands)))
        with _own_environment(), executor.batch():
            return [executor.submit(command) for command in commands]
    except errors as error:
        said = str(error).splitlines()
        lines = [x.strip() for x in said if "error" in x.lower()] or said[-1:]
        raise UserError(f"Slurm does not take the job ({lines[0]}): see launcher.partition, launcher.sbatch …") from None


def speeds_on_node(config: Config, study: Study) -> dict[str, Any]:
    """What `doctor.speeds` finds on a node, by a job of its own: the driver's machine may have other cores, or no GPU."""
    name = f"ebc-{study.name[:40]}-speed"
    [job] = submitted(config, state_dir(study, "slurm") / "speed", name, [_Measurement(json.dumps(to_dict(run_part(config))))])
    result = Path(job.paths.result_pickle)
    while not result.exists():
        state = queue(name).get(job.job_id)
        if state is not None and not state.live and not result.exists():
            raise UserError(f"measuring the speed on a node failed ({state.state}): read {job.paths.stdout}, or give dtype=….")
        time.sleep(2 * POLL_S)
    return dict(json.loads(job.result()))


class _Measurement:
    """What submitit runs on the node for `speeds_on_node`."""

    def __init__(self, run: str):
        self.run = run

    def __call__(self) -> str:
        command = [sys.executable, "-m", "ebc_lab.doctor"]
        return subprocess.run(command, input=self.run, stdout=subprocess.PIPE, text=True, check=True).stdout


def _sbatch(config: Config, name: str, count: int) -> dict[str, Any]:
    """The options of one submission, in submitit's names."""
    asked: LauncherConfig = config.launcher
    gpus = asked.gpus_per_node if asked.gpus_per_node is not None else int(config.device == "cuda")
    options = {
        "job_name": name,
        "time": asked.timeout_min,
        "signal_delay_s": asked.signal_delay_s,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": asked.cpus_per_task or config.threads_per_run,
        "gpus_per_node": gpus or None,
        "mem": f"{round(1024 * asked.mem_gb)}M" if asked.mem_gb else None,
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "setup": asked.setup or None,
        "srun_args": asked.srun_args or None,
        "stderr_to_stdout": True,
        "array_parallelism": count,
        "additional_parameters": {"requeue": True, **{k.replace("_", "-"): v for k, v in asked.sbatch.items()}},
    }
    return {**{k: v for k, v in options.items() if v is not None}, "wckey": None}


@contextmanager
def _own_environment() -> Iterator[None]:
    """Without what an enclosing job or MPI has set: sbatch would take it for wishes, and pass it on to the workers."""
    taken = {k: v for k, v in os.environ.items() if k.startswith(SCRUBBED) and k not in KEPT}
    for key in taken:
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(taken)
