"""The energy-based model on a GPU, in less than eight minutes.

    python dev/studies/gpu_ebm.py [FILE] [OVERRIDES…]

At the shape of scale=paper (n = 640, 50,000 splats, 64 x 256 tokens), or as OVERRIDES say, minutes=N among
them. Prints one JSON, and writes it to FILE: steps/s beside a GPT's at the same shape, the losses and figures
that it came to in the time, whether its steps are captured, what EBC's shadow budget adds, and the memory at
its peak.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ebc_lab.bench.pairs import paired_overhead
from ebc_lab.config.choices import changed
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part
from ebc_lab.config.machine import hardware
from ebc_lab.config.schema import RunConfig
from ebc_lab.records.streams import read_columns
from ebc_lab.training.run import Training
from ebc_lab.workloads.starts import pinned
from ebc_lab.workloads.text import checked_text

MINUTES = 6.0  # two thirds of them train the model
WARM = 10
SETTINGS = (
    "workload=ebm",
    "scale=paper",
    "device=cuda",
    "dtype=bfloat16",
    "threads_per_run=1",
    "compile=off",
)


def trained(run: RunConfig, folder: Path, seconds: float) -> dict[str, Any]:
    """Steps/s after the warm-up, the last losses and the figures of an evaluation, after so many seconds."""
    folder.mkdir(parents=True)
    on_gpu = run.device == "cuda"
    training = Training(run, folder)
    training.advance(WARM)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    while training.step < run.steps and time.perf_counter() - begun < seconds:
        training.advance(50)
    if on_gpu:
        torch.cuda.synchronize()
    took = time.perf_counter() - begun
    steps = training.step - WARM
    training._record_evaluation(lambda: None)
    training.recording.close()
    rows, evals = read_columns(folder / "steps.csv"), read_columns(folder / "evals.csv")
    return {
        "steps": training.step,
        "steps_per_s": steps / took,
        "captured": training.graphs is not None,
        "last_losses": rows["loss"][-5:].tolist(),
        "evaluation": {name: float(values[-1]) for name, values in evals.items()},
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


def main() -> None:
    words = sys.argv[1:]
    limits = [word for word in words if word.startswith("minutes=")]
    seconds = 60 * float(limits[-1].removeprefix("minutes=")) if limits else 60 * MINUTES
    given = [word for word in words if "=" in word and word not in limits]
    run = run_part(compose([*SETTINGS, *given], study=False))
    run = pinned(run, *checked_text(run))
    plain = changed(run, {"stabilizer": {"name": "none"}})
    shadow = changed(replace(run, steps=400), {"stabilizer": {"name": "ebc"}, "budget": {"name": "shadow"}})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        measurements: dict[str, Callable[[], Any]] = {
            "ebm": lambda: trained(plain, folder / "ebm", seconds * 2 / 3),
            "gpt": lambda: trained(
                changed(plain, {"workload": {"name": "gpt"}}), folder / "gpt", seconds / 12
            ),
            "overhead_of_shadow": lambda: paired_overhead(shadow, limit_s=seconds / 6),
        }
        found: dict[str, Any] = {"machine": hardware(), "torch": torch.__version__}
        for name, measure in measurements.items():
            try:
                found[name] = measure()
            except Exception as error:  # one figure that fails does not cost the others
                traceback.print_exc()
                found[name] = f"{type(error).__name__}: {error}"
            print(f"{name}: {json.dumps(found[name])}", file=sys.stderr, flush=True)
    text = json.dumps(found, indent=1)
    print(text)
    for path in (word for word in words if "=" not in word):
        Path(path).write_text(text)


if __name__ == "__main__":
    main()
