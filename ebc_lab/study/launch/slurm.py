"""launcher=slurm: each worker is one job of a Slurm array, submitted through submitit.

Jobs outlive their driver. A later driver finds them through what the study records (`queue.py`), and adopts
them. Slurm sends a warning (USR2) before a time-out and on preemption, which submitit turns into a checkpoint
and a requeue. The queue is read at most once every `launcher.queue_every_s` seconds. Results are read from
the runs' own files.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import Config
from ebc_lab.records.json_files import write_json

from ..store.study import Study
from . import queue
from .local import worker_env
from .pool import Death, Note, Say, Signs, WorkerPool, WorkersFailed
from .queue import ENDING, Job, QueueUnavailable, job_name
from .session import Session, worker_settings
from .submit import POLL_S, REFUSALS, SlurmWorker, submit_jobs


class SlurmPool(WorkerPool):
    """A pool of Slurm jobs, kept at the wanted number while runs are left."""

    poll_s = POLL_S

    def __init__(self, config: Config, study: Study, slots: int, say: Say):
        session = queue.session_of(study)
        settings = worker_settings(config)
        live: dict[str, Job] = {}  # jobs of an earlier call that run the same code
        try:
            if session is not None:
                jobs = queue.jobs_named(job_name(session))
                live = {k: j for k, j in jobs.items() if j.live and j.state != ENDING}
                about = session.about()
                if live and any(about.get(k) != v for k, v in settings.items()):
                    which = f"{len(live)} Slurm job(s) of an earlier call"
                    say(f"cancelled {which} that run other code or settings")
                    queue.stop_jobs(session)
                    live = {}
        except QueueUnavailable as error:
            remedy = "fix that, and run the command again"
            raise UserError(f"the Slurm queue cannot be read ({error}): {remedy}.") from None
        if session is None or not live:
            session = Session.begin(study, "slurm", bound=False, idle_s=config.launcher.idle_s, **settings)
            about = {"session": str(session.root), "name": job_name(session), "host": os.uname().nodename}
            write_json(study.launcher_file, about)
        super().__init__(config, study, session, slots, say)
        self.jobs = live
        self.submitted_here: set[str] = set()  # jobs submitted by this driver
        self.accepted = bool(live)  # whether Slurm has accepted a job of this study
        self.states = Signs()  # by job; the sign is its state in the queue
        self.refused = 0  # how many submissions in a row
        self.submit_at = 0.0  # time of the earliest next submission
        self.looked = time.monotonic()
        self.last_said = ""
        for worker in set(session.notes()) - set(live):
            session.forget(worker)
        if live:
            say(f"adopted {len(live)} Slurm job(s) of an earlier call: {', '.join(sorted(live))}")

    def _start_workers(self, wanted: int) -> None:
        if self.slots < 1:
            remedy = "the same command continues with new ones"
            raise WorkersFailed(f"all its jobs were cancelled by somebody: {remedy}.")
        missing = min(self.slots, wanted) - len(self.jobs)
        if missing <= 0 or time.monotonic() < self.submit_at:
            return
        command = SlurmWorker(str(self.session.root), worker_env(self.config))
        folder, name = self.session.root / "submitit", job_name(self.session)
        try:
            made = submit_jobs(self.config, folder, name, [command] * missing, avoid=sorted(self.avoided))
        except UserError as error:
            self.refused += 1
            if not self.accepted or self.refused >= REFUSALS:
                raise
            self.submit_at = time.monotonic() + self.config.launcher.queue_every_s
            self._say_once(f"{error} Trying again.")
            return
        self.refused = 0
        self.accepted = True
        self.jobs |= {job.job_id: Job("PENDING", "submitted") for job in made}
        self.submitted_here |= {job.job_id for job in made}
        self.say(f"submitted {missing} Slurm job(s): {', '.join(job.job_id for job in made)}")

    def _running_workers(self) -> list[str]:
        return [key for key, job in self.jobs.items() if job.state == "RUNNING" or job.reason == "submitted"]

    def _deaths(self) -> list[Death]:
        if time.monotonic() - self.looked >= self.config.launcher.queue_every_s:
            self.looked = time.monotonic()
            try:
                return self._update(queue.cached_jobs(self.session, self.config.launcher.queue_every_s / 2))
            except QueueUnavailable as error:
                self._say_once(f"the queue does not answer ({error}); trying again")
        return []

    def _update(self, jobs: Mapping[str, Job]) -> list[Death]:
        """Record the jobs as the queue shows them, and return the deaths of workers whose jobs are over."""
        for key, job in jobs.items():  # including those of a submission that was interrupted half-way
            if key not in self.jobs and job.live and job.state != ENDING:
                self.jobs[key] = job
        deaths = []
        for key in list(self.jobs):
            seen = jobs.get(key)
            unchanged_s = self.states.unchanged_s(key, seen and seen.state)
            # a job that is ending may still be requeued
            alive = unchanged_s < queue.GONE_S if seen is None or seen.state == ENDING else seen.live
            if alive:
                self.jobs[key] = seen or self.jobs[key]
            else:
                del self.jobs[key]
                deaths.append(self._death(key, seen.state if seen else "gone from the queue"))
        waiting = [j for j in self.jobs.values() if j.state != "RUNNING"]
        reasons = sorted({j.reason for j in waiting if j.reason not in ("None", "submitted")})
        why = f" ({', '.join(reasons)})" if reasons else ""
        self._say_once(f"{len(self.jobs) - len(waiting)} job(s) running, {len(waiting)} waiting{why}")
        return deaths

    def _death(self, key: str, state: str) -> Death:
        if state.startswith("CANCELLED") and key not in self.killed:
            self.slots -= 1
            self.say(f"job {key} was cancelled by somebody; {max(self.slots, 0)} job(s) share what is left")
        log = self.session.root / "submitit" / f"{key}_0_log.out"
        cause = f"its job was {state}"
        if ended := self.session.exit_cause(key):
            cause += f", {ended}"
        if not log.exists():
            cause += "; it wrote no log: is the state folder shared with the nodes?"
        clean, counts = state == "COMPLETED", key in self.submitted_here
        return Death(key, cause, log, clean=clean, counts=counts)

    def _say_once(self, text: str) -> None:
        if text != self.last_said:
            self.last_said = text
            self.say(text)

    def _place(self, worker: str, note: Note) -> str | None:
        return note.get("host")

    def _kill(self, worker: str) -> None:
        try:
            queue.run_slurm("scancel", worker)
        except QueueUnavailable as error:
            self.killed.pop(worker, None)  # tried again at the next check
            self._say_once(f"scancel {worker}: {error}")

    def close(self) -> None:
        cancel = f"`ebc-lab cancel {self.study.name}`"
        try:
            _, left = queue.stop_jobs(self.session)
        except QueueUnavailable as error:
            self.say(f"the queue does not answer ({error}): {cancel} ends what may still be running")
            return
        if left:
            self.say(f"Slurm still shows {', '.join(left)}, though cancelled: {cancel} checks again")
        else:
            self.study.launcher_file.unlink(missing_ok=True)

    def leave(self) -> None:
        if self.jobs:
            how = f"the same command adopts them, `ebc-lab cancel {self.study.name}` ends them"
            self.say(f"{len(self.jobs)} Slurm job(s) continue without this driver: {how}")
