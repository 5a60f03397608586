"""Measurements that launcher=slurm makes on a node, because the login machine may differ."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ebc_lab.bench.packing import Packing, describe
from ebc_lab.bench.speeds import Choice
from ebc_lab.config.dicts import run_part, to_dict
from ebc_lab.config.errors import UserError, blamed
from ebc_lab.config.machine import versions
from ebc_lab.config.schema import Config
from ebc_lab.records.cache import MeasurementCache
from ebc_lab.records.json_files import read_json, write_json

from ..store.study import Cancelled, Study
from . import queue
from .pool import Say
from .queue import QueueUnavailable
from .session import state_dir
from .slurm import GONE_S, POLL_S
from .submit import submitted

FOUND: dict[str, Any] = {"packing": Packing, "speeds": Choice}  # module -> what it prints


def packing_on_node(config: Config, study: Study, say: Say) -> dict[str, Any]:
    """Return what `packing` finds on a node, kept with the study's sessions. Raises as
    `_measured_on_node`."""

    def measure() -> dict[str, Any]:
        say("measuring on a node how many runs of this shape should share a GPU …")
        packing = _measured_on_node("packing", config, study, "launcher.runs_per_worker=…")
        say(describe(packing))
        return packing

    launcher = config.launcher
    about = [to_dict(run_part(config)), launcher.partition, launcher.constraint, versions()["torch"]]
    cache = MeasurementCache("packing", about, state_dir(study, "slurm"), form=Packing)
    return dict(cache.read_or_measure(measure))


def choice_on_node(config: Config, study: Study) -> Choice:
    """Return what `speeds.choose` chooses on a node. Raises as `_measured_on_node`."""
    choice = _measured_on_node("speeds", config, study, "dtype=…")
    with blamed("what a node measured", "give dtype=…"):
        return Choice(**choice)


def _measured_on_node(module: str, config: Config, study: Study, setting: str) -> dict[str, Any]:
    """Return what `ebc_lab.bench.<module>` prints in a job of its own: the driver's machine may have other
    cores, or no GPU.

    `setting`: what makes the measurement unnecessary. Raises UserError when the job or the queue fails,
    Cancelled.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{module}-", dir=state_dir(study, "slurm")))
    name = f"ebc-{study.name[:40]}-{folder.name}"
    out = folder / "found.json"
    measurement = _Measurement(module, json.dumps(to_dict(run_part(config))), str(out))
    launcher = config.launcher
    on_each = launcher.processes_per_run // launcher.nodes_per_run
    one = replace(config, launcher=replace(launcher, nodes_per_run=1, processes_per_run=on_each))
    [job] = submitted(one, folder, name, [measurement])
    asked = time.monotonic()  # when the queue was last asked
    seen = asked  # when it last showed the job
    try:
        while not out.exists():
            if study.cancel_mark.exists():
                raise Cancelled(f"study {study.name} was cancelled")
            if time.monotonic() - asked > config.launcher.queue_every_s:
                asked = time.monotonic()
                entry = queue.jobs_named(name).get(job.job_id)
                if entry is not None:
                    seen = asked
                ended = asked - seen > GONE_S if entry is None else not entry.live
                if ended and not out.exists():
                    state = entry.state if entry else "gone"
                    remedy = f"read {job.paths.stdout}, or give {setting}"
                    raise UserError(f"measuring the {module} on a node failed ({state}): {remedy}.")
            time.sleep(POLL_S)
        remedy = f"read {job.paths.stdout}, or give {setting}"
        return dict(read_json(out, FOUND[module], remedy))
    except QueueUnavailable as error:
        remedy = f"fix that, or give {setting}"
        raise UserError(f"the Slurm queue cannot be asked ({error}): {remedy}.") from None
    finally:
        with suppress(QueueUnavailable):
            queue.scancel(name)


class _Measurement:
    """What submitit runs on the node for `_measured_on_node`."""

    def __init__(self, module: str, run: str, out: str):
        self.module = module
        self.run = run
        self.out = out

    def __call__(self) -> None:
        command = [sys.executable, "-m", f"ebc_lab.bench.{self.module}"]
        output = subprocess.run(command, input=self.run, stdout=subprocess.PIPE, text=True, check=True).stdout
        write_json(Path(self.out), json.loads(output))
