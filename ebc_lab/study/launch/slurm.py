"""Workers as Slurm array jobs, submitted through submitit; one job, one worker, one GPU.

Jobs outlive their driver: one that returns finds them by what the study remembers (`jobs.py`) and adopts them. submitit turns
Slurm's warning (USR2, before a time-out and on preemption) into a checkpoint and a requeue. The queue is looked at once in
`launcher.queue_every_s` at most. What runs find is read from their own files.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import Config

from ..store.study import Study
from . import queue
from .command import WorkerCommand, worker_env
from .pool import Death, Say, WorkerPool, WorkersFailed, habits
from .queue import ENDING, Job, QueueSilent, job_name
from .session import Session, exit_cause
from .submit import REFUSALS, submitted

POLL_S = 0.5
GONE_S = (
    60.0  # until a job that the queue does not show counts as gone, and one that is always ending as ended
)


class SlurmPool(WorkerPool):
    """Array jobs; the driver's part is to keep as many as are wanted, and to tell lost ones from those that are done."""

    poll_s = POLL_S

    def __init__(self, config: Config, study: Study, slots: int, say: Say):
        session, live = self._adopted(config, study, say)
        if session is None:
            session = Session.begin(
                study, "slurm", bound=False, idle_s=config.launcher.idle_s, **habits(config)
            )
            queue.remember(study, session)
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
            say(
                f"{len(live)} Slurm job(s) of an earlier call are still there: {', '.join(sorted(live))}; adopted"
            )

    def _adopted(self, config: Config, study: Study, say: Say) -> tuple[Session | None, dict[str, Job]]:
        """The session whose jobs still live and run this very code, if there is one. Raises UserError."""
        session = queue.session_of(study)
        if session is None:
            return None, {}
        try:
            live = {k: j for k, j in queue.queue(job_name(session)).items() if j.live and j.state != ENDING}
            about = session.about()
            if live and any(about.get(k) != v for k, v in habits(config).items()):
                say(
                    f"{len(live)} Slurm job(s) of an earlier call run other code or settings of the launcher: ended"
                )
                queue.dismiss(session)
                live = {}
        except QueueSilent as error:
            raise UserError(
                f"the Slurm queue cannot be asked ({error}): mend that, and give the command again."
            ) from None
        return (session, live) if live else (None, {})

    # -- what every pool does ------------------------------------------------------------------------------------------

    def _staff(self, wanted: int) -> None:
        if self.slots < 1:
            raise WorkersFailed(
                "all its jobs were cancelled from outside: the same command carries on with new ones."
            )
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
            found = queue.looked_up(self.session, self.config.launcher.queue_every_s / 2)
        except QueueSilent as error:
            self._show(f"the queue does not answer ({error}); asking again")
            return
        for key, job in found.items():
            if (
                job.live and key not in self.jobs and job.state != ENDING
            ):  # of a submission that was cut off half-way
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
            queue.scancel_one(worker)
        except QueueSilent as error:
            self.killed.pop(worker, None)  # tried again at the next look
            self._show(f"scancel {worker}: {error}")

    def close(self) -> None:
        try:
            _, left = queue.dismiss(self.session)
        except QueueSilent as error:
            self.say(
                f"the queue does not answer ({error}): `ebc-lab cancel {self.study.name}` ends what may still run"
            )
            return
        if left:
            self.say(
                f"Slurm still shows {', '.join(left)}, though cancelled: `ebc-lab cancel {self.study.name}` looks again"
            )
        else:
            queue.forget(self.study)

    def leave(self) -> None:
        if self.jobs:
            self.say(
                f"{len(self.jobs)} Slurm job(s) go on without this driver: the same command adopts them, "
                f"`ebc-lab cancel {self.study.name}` ends them"
            )
