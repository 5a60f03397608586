"""Workers as Slurm array jobs, submitted through submitit; one job, one worker, one GPU.

Jobs outlive their driver: one that returns finds them by what the study remembers (`jobs.py`) and adopts them. submitit turns
Slurm's warning (USR2, before a time-out and on preemption) into a checkpoint and a requeue. The queue is looked at once in
`launcher.queue_every_s` at most. What runs find is read from their own files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ebc_lab.bench.packing import packing_in_words
from ebc_lab.bench.speeds import Choice
from ebc_lab.config.dicts import run_part, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest
from ebc_lab.config.machine import versions
from ebc_lab.config.schema import Config, LauncherConfig
from ebc_lab.records.sealed import read_json, write_json

from . import jobs
from .guards import Cancelled, cancel_mark
from .jobs import ENDING, Job, QueueSilent, job_name
from .launch import SCRUBBED, Death, Say, WorkerCommand, WorkerPool, WorkersFailed, habits, worker_env
from .session import Session, exit_cause, state_dir
from .store import Study

POLL_S = 0.5
GONE_S = 60.0  # until a job that the queue does not show counts as gone, and one that is always ending as ended
REFUSALS = 5  # submissions in a row that Slurm refuses, after it has taken one, before the study stops
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")  # where the cluster is and who we are, not whose job this is
NEVER = 10**6  # requeues after time-outs before submitit gives a job up
GPUS = ("gpus", "gres", "gpus_per_node", "gpus_per_task", "gpus_per_socket")  # ways to ask sbatch for one


class SlurmPool(WorkerPool):
    """Array jobs; the driver's part is to keep as many as are wanted, and to tell lost ones from those that are done."""

    poll_s = POLL_S

    def __init__(self, config: Config, study: Study, slots: int, say: Say):
        session, live = self._adopted(config, study, say)
        if session is None:
            session = Session.begin(study, "slurm", bound=False, idle_s=config.launcher.idle_s, **habits(config))
            jobs.remember(study, session)
        super().__init__(config, study, session, slots, say)
        self.jobs = live
        self.own: set[str] = set()  # submitted by this driver, and known to be complete
        self.since = dict.fromkeys(live, time.monotonic())  # submitted or adopted
        self.ending: dict[str, float] = {}
        self.fresh: list[Death] = []
        self.refused, self.again = 0, 0.0
        self.looked = time.monotonic()
        self.shown = ""
        for worker in set(session.notes()) - set(live):
            session.forget(worker)
        if live:
            say(f"{len(live)} Slurm job(s) of an earlier call are still there: {', '.join(sorted(live))}; adopted")

    def _adopted(self, config: Config, study: Study, say: Say) -> tuple[Session | None, dict[str, Job]]:
        """The session whose jobs still live and run this very code, if there is one. Raises UserError."""
        session = jobs.session_of(study)
        if session is None:
            return None, {}
        try:
            live = {k: j for k, j in jobs.queue(job_name(session)).items() if j.live and j.state != ENDING}
            about = session.about()
            if live and any(about.get(k) != v for k, v in habits(config).items()):
                say(f"{len(live)} Slurm job(s) of an earlier call run other code or settings of the launcher: ended")
                jobs.dismiss(session)
                live = {}
        except QueueSilent as error:
            raise UserError(f"the Slurm queue cannot be asked ({error}): mend that, and give the command again.") from None
        return (session, live) if live else (None, {})

    # -- what every pool does ------------------------------------------------------------------------------------------

    def _staff(self, wanted: int) -> None:
        if self.slots < 1:
            raise WorkersFailed("all its jobs were cancelled from outside: the same command carries on with new ones.")
        missing = min(self.slots, wanted) - len(self.jobs)
        if missing <= 0 or time.monotonic() < self.again:
            return
        try:
            self._submit(missing)
            self.refused = 0
        except UserError as error:
            self.refused += 1
            if not self.since or self.refused >= REFUSALS:
                raise
            self.again = time.monotonic() + self.config.launcher.queue_every_s
            self._show(f"{error} Trying again.")

    def _submit(self, count: int) -> None:
        command = WorkerCommand(str(self.session.root), None, worker_env(self.config))
        folder, name = self.session.root / "submitit", job_name(self.session)
        made = submitted(self.config, folder, name, [command] * count, avoid=sorted(self.avoided))
        for job in made:
            self.jobs[job.job_id] = Job("PENDING", "submitted")
            self.since[job.job_id] = time.monotonic()
            self.own.add(job.job_id)
        self.say(f"submitted {count} Slurm job(s): {', '.join(job.job_id for job in made)}")

    def _at_work(self) -> list[str]:
        return [key for key, job in self.jobs.items() if job.state == "RUNNING" or job.reason == "submitted"]

    def _deaths(self) -> list[Death]:
        if time.monotonic() - self.looked >= self.config.launcher.queue_every_s:
            self._look()
        deaths, self.fresh = self.fresh, []
        return deaths

    def _look(self) -> None:
        self.looked = now = time.monotonic()
        try:
            found = jobs.looked_up(self.session, self.config.launcher.queue_every_s / 2)
        except QueueSilent as error:
            self._show(f"the queue does not answer ({error}); asking again")
            return
        for key, job in found.items():
            if job.live and key not in self.jobs and job.state != ENDING:  # of a submission that was cut off half-way
                self.jobs[key] = job
                self.since.setdefault(key, now)
        for key in list(self.jobs):
            seen = found.get(key)
            if seen is not None and seen.state == ENDING:  # it may be requeued yet
                if now - self.ending.setdefault(key, now) < GONE_S:
                    self.jobs[key] = seen
                    continue
            else:
                self.ending.pop(key, None)
                if seen is None and now - self.since[key] < GONE_S:
                    continue
                if seen is not None and seen.live:
                    self.jobs[key] = seen
                    continue
            del self.jobs[key]
            self._mourn(key, seen)
        waiting = [j for j in self.jobs.values() if j.state != "RUNNING"]
        reasons = sorted({j.reason for j in waiting if j.reason not in ("None", "submitted")})
        why = f" ({', '.join(reasons)})" if reasons else ""
        self._show(f"{len(self.jobs) - len(waiting)} job(s) running, {len(waiting)} waiting{why}")

    def _mourn(self, key: str, job: Job | None) -> None:
        state = job.state if job else "gone from the queue"
        if state.startswith("CANCELLED") and key not in self.killed:
            self.slots -= 1
            self.say(f"job {key} was cancelled from outside; {max(self.slots, 0)} job(s) share what is left")
        log = self.session.root / "submitit" / f"{key}_0_log.out"
        ended = exit_cause(self.session, key)
        cause = f"its job was {state}" + (f", {ended}" if ended else "")
        if not log.exists():
            cause += "; it wrote no log: is the state folder shared with the nodes?"
        self.fresh.append(Death(key, cause, log, clean=state == "COMPLETED", counts=key in self.own))

    def _show(self, text: str) -> None:
        if text != self.shown:
            self.shown = text
            self.say(text)

    def _place(self, worker: str, note: Mapping[str, Any]) -> str | None:
        return note.get("host")

    def _kill(self, worker: str) -> None:
        try:
            jobs.scancel_one(worker)
        except QueueSilent as error:
            self.killed.pop(worker, None)  # tried again at the next look
            self._show(f"scancel {worker}: {error}")

    def close(self) -> None:
        try:
            _, left = jobs.dismiss(self.session)
        except QueueSilent as error:
            self.say(f"the queue does not answer ({error}): `ebc-lab cancel {self.study.name}` ends what may still run")
            return
        if left:
            self.say(f"Slurm still shows {', '.join(left)}, though cancelled: `ebc-lab cancel {self.study.name}` looks again")
        else:
            jobs.forget(self.study)

    def leave(self) -> None:
        if self.jobs:
            self.say(
                f"{len(self.jobs)} Slurm job(s) go on without this driver: the same command adopts them, "
                f"`ebc-lab cancel {self.study.name}` ends them"
            )


def submitted(
    config: Config, folder: Path, name: str, commands: Sequence[Callable[[], Any]], *, avoid: Sequence[str] = ()
) -> list[Any]:
    """Submit one job, or an array of them. -> submitit's jobs. Raises UserError with what sbatch said."""
    import submitit

    errors = (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError, ValueError, RuntimeError)
    try:
        executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=NEVER)
        executor.update_parameters(**_sbatch(config, name, len(commands), avoid))
        with _own_environment(), executor.batch():
            return [executor.submit(command) for command in commands]
    except (*errors, OSError, subprocess.SubprocessError) as error:
        said = str(error).splitlines() or ["sbatch fails without a word"]
        lines = [x.strip() for x in said if "error" in x.lower()] or said[-1:]
        raise UserError(f"Slurm does not take the job ({lines[0]}): see launcher.partition, launcher.sbatch …") from None


def packing_on_node(config: Config, study: Study, say: Say) -> dict[str, Any]:
    """What `packing` finds on a node; kept beside the study's sessions, for its later calls. Raises as `_on_node`."""
    about = [to_dict(run_part(config)), config.launcher.partition, config.launcher.constraint, versions()["torch"]]
    kept = state_dir(study, "slurm") / f"packing-{digest(about)[:16]}.json"
    if not kept.exists():
        say("measuring on a node how many runs of this shape should share a GPU …")
        found = _on_node("packing", config, study, "launcher.runs_per_worker=…")
        write_json(kept, found)
        say(packing_in_words(found))
    return dict(read_json(kept))


def choice_on_node(config: Config, study: Study) -> Choice:
    """What `speeds.settle` chooses on a node. Raises as `_on_node`."""
    return Choice(**_on_node("speeds", config, study, "dtype=…"))


def _on_node(what: str, config: Config, study: Study, otherwise: str) -> dict[str, Any]:
    """What the module `ebc_lab.<what>` measures on a node, in a job of its own: the driver's machine may have other
    cores, or no GPU. `otherwise`: the setting that makes it needless.

    Raises UserError when the job or the queue fails, Cancelled.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{what}-", dir=state_dir(study, "slurm")))
    name, out = f"ebc-{study.name[:40]}-{folder.name}", folder / "found.json"
    [job] = submitted(config, folder, name, [_Measurement(what, json.dumps(to_dict(run_part(config))), str(out))])
    remedy = f"read {job.paths.stdout}, or give {otherwise}"
    looked = seen = time.monotonic()
    try:
        while not out.exists():
            if cancel_mark(study).exists():
                raise Cancelled(f"study {study.name} was cancelled; the same command carries on from here")
            if time.monotonic() - looked > config.launcher.queue_every_s:
                looked = time.monotonic()
                found = jobs.queue(name).get(job.job_id)
                seen = looked if found is not None else seen
                ended = looked - seen > GONE_S if found is None else not found.live
                if ended and not out.exists():
                    raise UserError(f"measuring the {what} on a node failed ({found.state if found else 'gone'}): {remedy}.")
            time.sleep(POLL_S)
        return dict(read_json(out))
    except QueueSilent as error:
        raise UserError(f"the Slurm queue cannot be asked ({error}): mend that, or give {otherwise}.") from None
    finally:
        with suppress(QueueSilent):
            jobs.scancel(name)


class _Measurement:
    """What submitit runs on the node for `_on_node`."""

    def __init__(self, what: str, run: str, out: str):
        self.what, self.run, self.out = what, run, out

    def __call__(self) -> None:
        command = [sys.executable, "-m", f"ebc_lab.{self.what}"]
        found = subprocess.run(command, input=self.run, stdout=subprocess.PIPE, text=True, check=True).stdout
        write_json(Path(self.out), json.loads(found))


def _sbatch(config: Config, name: str, count: int, avoid: Sequence[str]) -> dict[str, Any]:
    """The options of one submission, in submitit's names; what the user gives in `launcher.sbatch` takes the place of ours."""
    asked: LauncherConfig = config.launcher
    own = {k.replace("-", "_"): v for k, v in asked.sbatch.items()}
    gpus = asked.gpus_per_node if asked.gpus_per_node is not None else int(config.device == "cuda")
    options = {
        "job_name": name,
        "time": asked.timeout_min,
        "signal_delay_s": asked.signal_delay_s,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": asked.cpus_per_task or config.threads_per_run,
        "gpus_per_node": None if any(k in own for k in GPUS) else gpus or None,
        "mem": f"{round(1024 * asked.mem_gb)}M" if asked.mem_gb else None,
        "partition": asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "setup": asked.setup or None,
        "srun_args": asked.srun_args or None,
        "exclude": ",".join(avoid) or None,
        "stderr_to_stdout": True,
        "array_parallelism": count,
        "additional_parameters": {"requeue": True, **own},
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
