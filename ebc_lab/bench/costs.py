"""What is paid once a command or once a run, beside its steps: start-up, building, evaluating, checkpoint, finishing."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import RunConfig, StabilizerConfig
from ebc_lab.workloads.batches import windows
from ebc_lab.workloads.losses import evaluate

from .loops import opened, synchronise, take_steps
from .pairs import spread

COMMANDS = {
    "help_s": ("from ebc_lab.cli import main; main()", "--help"),  # `ebc-lab --help`
    "worker_import_s": ("import ebc_lab.study.worker, ebc_lab.training.run",),  # what a worker waits for before its first run
}


def timed(run: RunConfig, call: Callable[[], Any]) -> float:
    """Seconds that a call takes, the GPU's part included."""
    synchronise(run)
    start = time.perf_counter()
    call()
    synchronise(run)
    return time.perf_counter() - start


def start_up(repeats: int) -> dict[str, Any]:
    """Seconds of whole processes of this Python, from nothing to their end. Raises UserError when one fails."""
    found = {}
    for name, (program, *arguments) in COMMANDS.items():
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
            taken.append(time.perf_counter() - start)
            if done.returncode:
                raise UserError(f"{name} cannot be measured: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        found[name] = spread(taken)
    return found


def fixed_costs(run: RunConfig, steps: int, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds, each the median of `repeats`, of what a run without stabilizer does beside its `steps` steps.

    `finish_s` is the end of a run with its evaluation left out: reading back the steps' rows and summing them up.
    """
    say("start-up and what a run costs beside its steps")
    short = dataclasses.replace(run, steps=steps, evaluate=[], stabilizer=StabilizerConfig())
    taken: dict[str, list[float]] = {
        k: [] for k in ("build_s", "evaluate_val_s", "evaluate_test_s", "checkpoint_s", "finish_s")
    }
    for _ in range(repeats):
        start = time.perf_counter()
        with opened(short) as training:
            synchronise(run)
            taken["build_s"].append(time.perf_counter() - start)
            take_steps(training, steps)
            for split in ("val", "test"):
                whole = windows(training.tokens[split], run.model.context)
                seconds = timed(run, lambda whole=whole: evaluate(training.model, run, whole))  # type: ignore[misc]
                taken[f"evaluate_{split}_s"].append(seconds)
            taken["checkpoint_s"].append(timed(run, training.save_checkpoint))
            taken["finish_s"].append(timed(run, training.run))
            checkpoint = (training.directory / "checkpoint.pt").stat().st_size
    costs: dict[str, Any] = {name: spread(values) for name, values in taken.items()}
    return {**start_up(repeats), **costs, "steps": steps, "checkpoint_bytes": checkpoint, "repeats": repeats}
