"""A run that trains nothing, for tests of the launchers: the kind `idle`, for workers that have imported
this. It needs no torch.

It counts its steps, reports its progress, writes checkpoints and resumes from them like any run. A file
`idle.json` in its folder makes it misbehave at a step: `{"at": 3, "do": "hold"}`. What it can do:

* `hold`: stay at this step, showing signs of life, until a file `go` appears in its folder;
* `hang`: the same without any sign of life;
* `kill`: end the worker by SIGKILL; `oom`: run out of memory; `device`: fail as if the GPU were gone, in the
  words of `says`.

With `on`, a list of GPUs as CUDA_VISIBLE_DEVICES names them, it happens on these alone, and every time
there; on others, what `elsewhere` says in the same form. Otherwise all but `hold` and `hang` happen once: the
file is removed first.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ebc_lab.config.identity import digest, identity_of
from ebc_lab.config.schema import RunConfig
from ebc_lab.records.json_files import read_json, write_checksummed, write_json
from ebc_lab.records.paths import RunFiles
from ebc_lab.study.launch.worker import KINDS
from ebc_lab.training.ends import OUT_OF_MEMORY, DeviceFailed, Interrupted

LOOK_S = 0.05  # between two looks for `go`
KINDS["idle"] = "support.idle_run:idle"


def idle(
    run: RunConfig,
    directory: Path,
    run_id: str,
    *,
    checkpoint_every_s: float,
    should_stop: Callable[[], bool],
    on_progress: Callable[[int], None],
    say: Callable[[str], None],
    retry_oom: bool,
) -> dict[str, Any]:
    """Take `run.steps` steps that do nothing. Raises Interrupted, with a checkpoint
    written."""
    files = RunFiles(directory)
    begun = time.monotonic()
    step = int(read_json(files.checkpoint)["step"]) if files.checkpoint.exists() else 0
    outcome = "completed"
    while step < run.steps:
        on_progress(step)
        try:
            for _ in _misbehave(directory, step):
                if should_stop():
                    break
                on_progress(step)
        except MemoryError:
            if retry_oom:
                raise DeviceFailed(f"{OUT_OF_MEMORY}: it is idle") from None
            outcome = "oom"
            break
        if should_stop():
            write_json(files.checkpoint, {"step": step})
            raise Interrupted
        step += 1
    identity = digest(identity_of("idle", run))
    result: dict[str, Any] = {"run_id": run_id, "identity": identity, "outcome": outcome, "steps": step}
    write_checksummed(files.result, {**result, "wall_s": time.monotonic() - begun})
    files.checkpoint.unlink(missing_ok=True)
    return result


def _misbehave(directory: Path, step: int) -> Iterator[None]:
    """Yield what idle.json asks for at this step; yields while the run is to be held."""
    asked = directory / "idle.json"
    plan = read_json(asked) if asked.exists() else {}
    there = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    once = "on" not in plan
    if not once and not set(plan["on"]) & set(there):
        plan = plan.get("elsewhere", {})
    if plan.get("at") != step:
        return
    if plan["do"] in ("hold", "hang"):
        while not (directory / "go").exists():
            select.select([], [], [], LOOK_S)
            if plan["do"] == "hold":
                yield
        return
    if once:
        asked.unlink()
    if plan["do"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if plan["do"] == "oom":
        raise MemoryError
    raise DeviceFailed(plan.get("says", "CUDA error: unspecified launch failure"))
