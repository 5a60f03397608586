"""How many runs share one GPU: measured by packing them as a worker does, kept in the user's cache (DESIGN: speed).

Only `measure_packing` needs torch, and runs as `python -m ebc_lab.bench.packing`: the driver stays without it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ebc_lab.config.dicts import from_dict, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest
from ebc_lab.config.machine import gpu_names, hardware
from ebc_lab.config.schema import DataConfig, LRScheduleConfig, RunConfig, ShockConfig
from ebc_lab.records.json_files import read_json, write_json

PACKED = (1, 2, 4, 8)  # runs that share a GPU, as far as it is tried
NEAR_BEST = 0.05  # of the best throughput: what a smaller number of runs may lack
WARM_STEPS = 40  # EBC may measure three times a step in its first 20


def _kept(run: RunConfig) -> Path:
    """Where the figure of this shape on this machine is kept."""
    from ebc_lab.records.cache import cache_dir

    shape = {
        "model": to_dict(run.model),
        "batch": run.batch_size,
        "threads": run.threads_per_run,
        "device": run.device,
    }
    about = {
        **shape,
        "torch": metadata.version("torch"),
        "cpu": hardware()["cpu"],
        "optimizer": run.optimizer.name,
    }
    about["gpus"] = gpu_names() if run.device == "cuda" else ()
    about |= {"dtype": run.dtype, "stabilizer": run.stabilizer.name, "counts": PACKED}
    return cache_dir() / f"packing-{digest(about)[:16]}.json"


def cached_packing(run: RunConfig) -> dict[str, Any] | None:
    """What `packing` found before for this shape on this machine, or None."""
    return packing(run) if run.device != "cuda" else _cached(run)


def _cached(run: RunConfig) -> dict[str, Any] | None:
    try:
        return dict(read_json(_kept(run)))
    except (FileNotFoundError, UserError):
        return None


def packing(run: RunConfig) -> dict[str, Any]:
    """How many runs of this shape a GPU should carry at a time: `runs_per_worker`, and the `tokens_per_s` of each number tried.

    From the cache or measured in a subprocess; 1 on a CPU, where runs go side by side as processes. `run` is resolved (device,
    dtype). Raises UserError.
    """
    return _measured(run) if run.device == "cuda" else {"runs_per_worker": 1, "tokens_per_s": {}}


def _measured(run: RunConfig) -> dict[str, Any]:
    known = _cached(run)
    if known:
        return known
    env = {**os.environ, "OMP_NUM_THREADS": str(run.threads_per_run)}
    command = [sys.executable, "-m", "ebc_lab.bench.packing"]
    done = subprocess.run(
        command, input=json.dumps(to_dict(run)), capture_output=True, text=True, env=env, check=False
    )
    if done.returncode != 0:
        raise UserError(
            f"measuring the packing failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
        )
    found = dict(json.loads(done.stdout))
    try:
        path = _kept(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    except OSError:
        pass  # a cache that cannot be written costs seconds, not correctness
    return found


def packing_in_words(packing: Mapping[str, Any]) -> str:
    """What `packing` found, in a sentence."""
    rates = ", ".join(f"{rate:,.0f} with {k}" for k, rate in packing["tokens_per_s"].items())
    return f"{packing['runs_per_worker']} run(s) share a GPU: tokens/s of all together {rates}"


def smallest_near_best(rates: Mapping[int, float]) -> int:
    """The smallest number of runs whose throughput is within NEAR_BEST of the best."""
    best = max(rates.values())
    return min(k for k, rate in rates.items() if rate >= (1 - NEAR_BEST) * best)


def measure_packing(
    run: RunConfig, counts: tuple[int, ...] = PACKED, steps: int = 20, stretches: int = 3
) -> dict[str, Any]:
    """Tokens/s of so many runs together, taking turns in this process as a worker's do: the median over `stretches` of `steps`
    steps a run.

    Whole runs, evaluations and records included, each with its own seed, on the text that is always there. Numbers of runs that
    the device has no memory for are left out. Raises UserError when a run ends (diverges) before it is measured.
    """
    from ebc_lab.training.outcome import is_oom
    from ebc_lab.training.run import Training
    from ebc_lab.workloads.corpus import locate

    data = DataConfig(name="pydoc", sha256=locate(DataConfig(name="pydoc"), quiet=True).sha256)
    run = replace(
        run, data=data, steps=10**6, evaluate=[], lr_schedule=LRScheduleConfig(), shock=ShockConfig()
    )
    runs: list[tuple[Training, Any]] = []

    def rate(steps: int) -> float:
        """Of all runs together, while each takes at least so many more steps."""
        begun = [one.step for one, _ in runs]
        _wait(run)
        start = time.perf_counter()
        while any(one.step < b + steps for (one, _), b in zip(runs, begun, strict=True)):
            for (one, turns), b in zip(runs, begun, strict=True):
                if one.step < b + steps and next(turns, one) is one:
                    raise UserError(f"a run ended after {one.step} steps: give another optimizer.lr")
        _wait(run)
        done = sum(one.step - b for (one, _), b in zip(runs, begun, strict=True))
        return done * run.batch_size * run.model.context / (time.perf_counter() - start)

    rates: dict[int, float] = {}
    with tempfile.TemporaryDirectory(prefix="ebc-lab-packing-") as folder:
        try:
            for count in counts:
                while len(runs) < count:
                    place = Path(folder) / str(len(runs))
                    place.mkdir()
                    one = Training(replace(run, seed=len(runs)), place)
                    runs.append((one, one.blocks()))
                rate(WARM_STEPS)
                rates[count] = statistics.median(rate(steps) for _ in range(stretches))
        except (RuntimeError, MemoryError) as error:
            if not is_oom(error) or not rates:
                raise
        finally:
            for _, turns in runs:
                turns.close()
    return {
        "runs_per_worker": smallest_near_best(rates),
        "tokens_per_s": {str(k): r for k, r in rates.items()},
    }


def _wait(run: RunConfig) -> None:
    """Until the device has done what it was given."""
    import torch

    if run.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    print(json.dumps(measure_packing(from_dict(RunConfig, json.load(sys.stdin)))))
