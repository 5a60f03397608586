"""The precision of Slurm jobs, measured on a node, because the login machine may differ."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ebc_lab.bench.speeds import Choice
from ebc_lab.config.dicts import run_part, to_dict
from ebc_lab.config.errors import UserError, blamed
from ebc_lab.config.schema import Config
from ebc_lab.records.json_files import read_json, write_json

from ..store.study import Cancelled, Study
from . import queue
from .queue import QueueUnavailable
from .session import state_dir
from .slurm import GONE_S, POLL_S
from .submit import submit_jobs


def choice_on_node(config: Config, study: Study) -> Choice:
    """Return what `speeds.choose` chooses in a job of its own: the driver's machine may have other cores, or
    no GPU. Raises UserError when the job or the queue fails, Cancelled."""
    folder = Path(tempfile.mkdtemp(prefix="speeds-", dir=state_dir(study, "slurm")))
    name = f"ebc-{study.name[:40]}-{folder.name}"
    found = folder / "found.json"
    measurement = _Measurement(json.dumps(to_dict(run_part(config))), str(found))
    launcher = config.launcher
    on_each = launcher.processes_per_run // launcher.nodes_per_run
    one = replace(config, launcher=replace(launcher, nodes_per_run=1, processes_per_run=on_each))
    [job] = submit_jobs(one, folder, name, [measurement])
    remedy = f"read {job.paths.stdout}, or give dtype=…"
    asked = time.monotonic()  # when the queue was last asked
    seen = asked  # when it last showed the job
    try:
        while not found.exists():
            if study.cancel_mark.exists():
                raise Cancelled(f"study {study.name} was cancelled")
            if time.monotonic() - asked > launcher.queue_every_s:
                asked = time.monotonic()
                entry = queue.jobs_named(name).get(job.job_id)
                if entry is not None:
                    seen = asked
                ended = asked - seen > GONE_S if entry is None else not entry.live
                if ended and not found.exists():
                    state = entry.state if entry else "gone"
                    raise UserError(f"measuring the speeds on a node failed ({state}): {remedy}.")
            time.sleep(POLL_S)
        choice = read_json(found, Choice, remedy)
        with blamed("what a node measured", "give dtype=…"):
            return Choice(**choice)
    except QueueUnavailable as error:
        remedy = "fix that, or give dtype=…"
        raise UserError(f"the Slurm queue cannot be asked ({error}): {remedy}.") from None
    finally:
        with suppress(QueueUnavailable):
            queue.scancel(name)


@dataclass
class _Measurement:
    """What submitit runs on the node: `speeds` in a process of its own; what that prints goes into a file."""

    run: str  # its settings as JSON
    found: str  # the file

    def __call__(self) -> None:
        command = [sys.executable, "-m", "ebc_lab.bench.speeds"]
        output = subprocess.run(command, input=self.run, stdout=subprocess.PIPE, text=True, check=True).stdout
        write_json(Path(self.found), json.loads(output))
