"""Everything that only a GPU can show, in under eight minutes.

    python dev/studies/gpu_figures.py [FILE [NAME …]]

At the paper study's shape (64 x 256 tokens). Prints one JSON, and writes it to FILE: whether graphs change
results, whether the hot path ever waits, tokens/s of the plain loop, in which kernels a step's time goes,
the overhead of EBC's budgets, the share of the matrix peak, and the wall time of a whole `paper` autopilot,
or how far it got in the time that was left. NAMES choose from these, minutes=N is another limit.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ebc_lab.bench.costs import compute
from ebc_lab.bench.pairs import Effort, paired_overhead, throughput
from ebc_lab.config.choices import changed
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part
from ebc_lab.config.machine import hardware
from ebc_lab.config.schema import RunConfig
from ebc_lab.records.streams import read_columns
from ebc_lab.training.graphs import StepGraphs
from ebc_lab.training.run import Training
from ebc_lab.workloads.corpus import locate

MINUTES = 7.5
PROFILED = 100  # steps
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"stabilizer": {"name": "none"}},
    "tracked": {"stabilizer": {"name": "ebc"}},
    "shadow": {"stabilizer": {"name": "ebc"}, "budget": {"name": "shadow"}},
    "tracked, muon": {"stabilizer": {"name": "ebc"}, "optimizer": {"name": "muon"}},
    "surrogate": {"stabilizer": {"name": "ebc"}, "budget": {"name": "surrogate"}},
}


def losses(run: RunConfig, folder: Path, graphs: StepGraphs | None = None) -> Any:
    """The training losses of a run of its own, by step."""
    folder.mkdir(parents=True)
    training = Training(run, folder)
    training.graphs = graphs or training.graphs
    training.run()
    return read_columns(folder / "steps.csv")["loss"]


def sameness(run: RunConfig, folder: Path) -> dict[str, Any]:
    """By arm: graphed against eager losses, the largest relative difference."""
    found = {}
    for name, settings in ARMS.items():
        one = changed(replace(run, steps=150, eval_every=50, evaluate=[]), settings)
        place = folder / name.replace(", ", "_")
        graphed = losses(one, place / "graphed")
        eager = losses(one, place / "eager", StepGraphs(None))
        found[name] = {"graphed_vs_eager": float(abs(graphed / eager - 1).max())}
    return found


def warm(run: RunConfig, name: str, folder: Path) -> Training:
    """A run of this arm past its warm-up."""
    place = folder / name.replace(", ", "_")
    place.mkdir(parents=True)
    training = Training(changed(run, ARMS[name]), place)
    training.advance(230)
    torch.cuda.synchronize()
    return training


def waits(run: RunConfig, folder: Path) -> dict[str, str]:
    """What `torch.cuda.set_sync_debug_mode` says of nine steps past the warm-up, by arm."""
    found = {}
    for name in ARMS:
        training = warm(replace(run, steps=400), name, folder)
        torch.cuda.set_sync_debug_mode("error")
        try:
            training.take_steps(9)
            found[name] = f"never; graphs of {len(training.graphs.graphs) if training.graphs else 0} kinds"
        except RuntimeError as error:
            found[name] = str(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


def kernels(run: RunConfig, folder: Path) -> dict[str, Any]:
    """By arm, of a step: its ms, the ms in kernels, how many these are, and the dearest of them."""
    found = {}
    for name in ARMS:
        training = warm(replace(run, steps=800, evaluate=[]), name, folder)
        begun = time.perf_counter()
        training.advance(PROFILED)
        torch.cuda.synchronize()
        ms = 1e3 * (time.perf_counter() - begun) / PROFILED
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
            training.advance(PROFILED)
            torch.cuda.synchronize()
        each = [event for event in profiled.key_averages() if event.self_device_time_total]
        each.sort(key=lambda event: -event.self_device_time_total)
        found[name] = {
            "ms": ms,
            "ms_in_kernels": sum(event.self_device_time_total for event in each) / PROFILED / 1e3,
            "kernels": sum(event.count for event in each) / PROFILED,
            "dearest": [
                (event.key[:90], event.count / PROFILED, event.self_device_time_total / PROFILED / 1e3)
                for event in each[:30]
            ],
        }
        training.recording.close()
    return found


def study(folder: Path, seconds: float) -> dict[str, Any]:
    """The wall time of `ebc-lab autopilot scale=paper`, or how far it came in `seconds`."""
    command = [sys.executable, "-c", "from ebc_lab.cli import main; main()"]
    begun = time.perf_counter()
    with open(folder / "autopilot.log", "w", encoding="utf-8") as log:
        try:
            asked = ["autopilot", "scale=paper", f"output_dir={folder}", "study.name=paper"]
            code = subprocess.run(
                [*command, *asked], stdout=log, stderr=log, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    said = (folder / "autopilot.log").read_text().splitlines()
    finished = len(list(folder.glob("paper/runs/*/result.json")))
    return {
        "exit_code": code,
        "wall_s": time.perf_counter() - begun,
        "runs_finished": finished,
        "said": said[-12:],
    }


def main() -> None:
    begun = time.perf_counter()
    words = sys.argv[1:]
    minutes = next((float(word.removeprefix("minutes=")) for word in words if "=" in word), MINUTES)
    names = [word for word in words if "=" not in word]
    file, chosen = names[:1], names[1:]
    run = run_part(
        compose(
            ["scale=paper", "device=cuda", "dtype=bfloat16", "threads_per_run=1", "compile=off"], study=False
        )
    )
    run = replace(run, data=replace(run.data, sha256=locate(run.data).sha256))
    found: dict[str, Any] = {
        "machine": hardware(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        measurements: dict[str, Callable[[], Any]] = {
            "results_change": lambda: sameness(run, folder / "same"),
            "the_hot_path_waits": lambda: waits(run, folder / "waits"),
            "against_the_plain_loop": lambda: throughput(run, Effort(rounds=5, limit_s=20)),
            "kernels": lambda: kernels(run, folder / "kernels"),
            "overhead": lambda: {
                name: paired_overhead(replace(changed(run, settings), steps=600), limit_s=15)
                for name, settings in ARMS.items()
            },
            "compute": lambda: compute(run, Effort(rounds=30)),
            "paper_autopilot": lambda: study(folder, 60 * minutes - (time.perf_counter() - begun)),
        }
        for name, measure in measurements.items():
            if chosen and name not in chosen:
                continue
            started = time.perf_counter()
            try:
                found[name] = measure()
            except Exception as error:  # the others are still worth having
                traceback.print_exc()
                found[name] = f"{type(error).__name__}: {error}"
            print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    text = json.dumps(found, indent=1, default=str)
    print(text)
    for path in file:
        Path(path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
