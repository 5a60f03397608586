"""Measurements that launcher=slurm makes on a node, because the login machine says nothing about it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ebc_lab.bench.packing import packing_in_words
from ebc_lab.bench.speeds import Choice
from ebc_lab.config.dicts import run_part, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest
from ebc_lab.config.machine import versions
from ebc_lab.config.schema import Config
from ebc_lab.records.json_files import read_json, write_json

from ..store.study import Cancelled, Study, cancel_mark
from . import queue
from .pool import Say
from .queue import QueueSilent
from .session import state_dir
from .slurm import GONE_S, POLL_S
from .submit import submitted


def packing_on_node(config: Config, study: Study, say: Say) -> dict[str, Any]:
    """What `packing` finds on a node; kept beside the study's sessions, for its later calls. Raises as `_on_node`."""
    about = [
        to_dict(run_part(config)),
        config.launcher.partition,
        config.launcher.constraint,
        versions()["torch"],
    ]
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
    [job] = submitted(
        config, folder, name, [_Measurement(what, json.dumps(to_dict(run_part(config))), str(out))]
    )
    remedy = f"read {job.paths.stdout}, or give {otherwise}"
    looked = seen = time.monotonic()
    try:
        while not out.exists():
            if cancel_mark(study).exists():
                raise Cancelled(f"study {study.name} was cancelled; the same command carries on from here")
            if time.monotonic() - looked > config.launcher.queue_every_s:
                looked = time.monotonic()
                found = queue.queue(name).get(job.job_id)
                seen = looked if found is not None else seen
                ended = looked - seen > GONE_S if found is None else not found.live
                if ended and not out.exists():
                    raise UserError(
                        f"measuring the {what} on a node failed ({found.state if found else 'gone'}): {remedy}."
                    )
            time.sleep(POLL_S)
        return dict(read_json(out))
    except QueueSilent as error:
        raise UserError(
            f"the Slurm queue cannot be asked ({error}): mend that, or give {otherwise}."
        ) from None
    finally:
        with suppress(QueueSilent):
            queue.scancel(name)


class _Measurement:
    """What submitit runs on the node for `_on_node`."""

    def __init__(self, what: str, run: str, out: str):
        self.what, self.run, self.out = what, run, out

    def __call__(self) -> None:
        command = [sys.executable, "-m", f"ebc_lab.{self.what}"]
        found = subprocess.run(command, input=self.run, stdout=subprocess.PIPE, text=True, check=True).stdout
        write_json(Path(self.out), json.loads(found))
