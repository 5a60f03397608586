"""How many runs share one GPU: measured by training them in turns as a worker does, and kept in a cache.

Only `measure_packing` needs torch; it runs as `python -m ebc_lab.bench.packing`: the driver needs none.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

from ebc_lab.config.dicts import from_dict, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.machine import visible_gpus
from ebc_lab.config.parts import PARTS
from ebc_lab.config.parts.data import DataConfig
from ebc_lab.config.parts.lr_schedule import LRScheduleConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.records.cache import MeasurementCache

from .speeds import run_module, shape_here

COUNTS = (1, 2, 4, 8)  # runs per GPU that are tried
NEAR_BEST = 0.05  # the share of the best throughput that a smaller number of runs may lack
WARM_STEPS = 40  # EBC may measure three times a step in its first 20


class Packing(TypedDict):
    """What is measured."""

    runs_per_worker: int
    tokens_per_s: dict[str, float]  # by number of runs
    eager: list[str]  # settings for which no step becomes a CUDA graph


def packing_cache(run: RunConfig) -> MeasurementCache:
    about = {**shape_here(run), "threads": run.threads_per_run, "dtype": run.dtype}
    about |= {"stabilizer": run.stabilizer.name, "counts": COUNTS}
    return MeasurementCache("packing", about, form=Packing)


def packing(run: RunConfig, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """How many runs of this shape a GPU should train at a time.

    Args:
        run: with its device and dtype resolved.
        say: told of a measurement, before and after it.
    Returns:
        `runs_per_worker`, `tokens_per_s` by number of runs and what keeps steps `eager`, from the cache or
        measured in a subprocess; 1 on a CPU, where runs are processes of their own.
    Raises:
        UserError: the measurement failed.
    """
    if run.device != "cuda":
        return {"runs_per_worker": 1, "tokens_per_s": {}, "eager": []}

    def measure() -> dict[str, Any]:
        say("measuring how many runs of this shape should share a GPU …")
        figures = measured(run)
        say(describe(figures))
        return figures

    return dict(packing_cache(run).read_or_measure(measure))


def measured(run: RunConfig) -> dict[str, Any]:
    """`measure_packing` in a process of its own. Raises UserError."""
    try:
        env = {"OMP_NUM_THREADS": str(run.threads_per_run)}
        if gpus := visible_gpus():  # what the first worker has
            env["CUDA_VISIBLE_DEVICES"] = gpus[0]
        return dict(run_module("packing", to_dict(run), env))
    except UserError as error:
        raise UserError(f"measuring the packing failed: {error}") from None


def describe(packing: Mapping[str, Any]) -> str:
    """What `packing` found, in a sentence."""
    rates = ", ".join(f"{rate:,.0f} with {k}" for k, rate in packing["tokens_per_s"].items())
    eager = ", ".join(packing["eager"])
    steps = f"are taken eagerly ({eager})" if eager else "come from CUDA graphs"
    return f"{packing['runs_per_worker']} run(s) share a GPU: tokens/s of all together {rates}; steps {steps}"


def smallest_near_best(rates: Mapping[int, float]) -> int:
    """The smallest number of runs whose throughput is within NEAR_BEST of the best."""
    best = max(rates.values())
    return min(k for k, rate in rates.items() if rate >= (1 - NEAR_BEST) * best)


def measure_packing(
    run: RunConfig, counts: tuple[int, ...] = COUNTS, steps: int = 20, stretches: int = 3
) -> dict[str, Any]:
    """`runs_per_worker`, the `tokens_per_s` of all runs together by their number, and `eager`.

    Each rate is the median over `stretches` stretches of `steps` steps per run. Evaluations and records are
    included; each run has its own seed, and trains on the text that is always there. Numbers of runs that do
    not fit into memory are left out. Raises UserError when a run ends (diverges) before it is measured.
    """
    from ebc_lab.training.outcome import is_oom
    from ebc_lab.workloads.corpus import locate

    data = DataConfig(name="pydoc", sha256=locate(DataConfig(name="pydoc"), quiet=True).sha256)
    untimed: dict[str, Any] = {part.group_name: part() for part in PARTS if not part.timed}
    schedule = LRScheduleConfig()
    endless = replace(run, data=data, steps=10**6, evaluate=[], lr_schedule=schedule, **untimed)
    rates: dict[int, float] = {}
    with tempfile.TemporaryDirectory(prefix="ebc-lab-packing-") as folder:
        packed = PackedRuns(endless, Path(folder))
        try:
            for count in counts:
                packed.grow_to(count)
                packed.tokens_per_s(WARM_STEPS)
                rates[count] = statistics.median(packed.tokens_per_s(steps) for _ in range(stretches))
        except (RuntimeError, MemoryError) as error:
            if not is_oom(error) or not rates:
                raise
        finally:
            packed.close()
    by_count = {str(count): rate for count, rate in rates.items()}
    return {"runs_per_worker": smallest_near_best(rates), "tokens_per_s": by_count, "eager": packed.eager}


class PackedRuns:
    """Runs that take turns in this process, as those of a worker do."""

    def __init__(self, run: RunConfig, folder: Path):
        self.run = run
        self.folder = folder
        self.runs: list[tuple[Any, Any]] = []  # a Training, and its blocks
        self.eager: list[str] = []

    def grow_to(self, count: int) -> None:
        """Build further runs until there are `count`."""
        from ebc_lab.training.run import Training

        while len(self.runs) < count:
            place = self.folder / str(len(self.runs))
            place.mkdir()
            training = Training(replace(self.run, seed=len(self.runs)), place)
            self.runs.append((training, training.blocks()))
            self.eager = training.eager

    def tokens_per_s(self, steps: int) -> float:
        """Return the rate of all runs together over about `steps` more steps of each. Raises UserError."""
        from .loops import synchronise

        begun = [training.step for training, _ in self.runs]
        goals = [step + steps for step in begun]
        synchronise(self.run)
        start = time.perf_counter()
        while any(t.step < goal for (t, _), goal in zip(self.runs, goals, strict=True)):
            for (training, blocks), goal in zip(self.runs, goals, strict=True):
                # `next` answers with its default, the training itself, once a run has ended
                if training.step < goal and next(blocks, training) is training:
                    raise UserError(f"a run ended after {training.step} steps: give another optimizer.lr.")
        synchronise(self.run)
        taken = sum(training.step for training, _ in self.runs) - sum(begun)
        tokens: int = taken * self.run.batch_size * self.run.model.context
        return tokens / (time.perf_counter() - start)

    def close(self) -> None:
        for _, blocks in self.runs:
            blocks.close()


if __name__ == "__main__":
    print(json.dumps(measure_packing(from_dict(RunConfig, json.load(sys.stdin)))))
