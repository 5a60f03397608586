"""What this machine can do: cores, GPUs, precision, corpus, places to write. Measured figures come from a subprocess.

`visible_gpus` and `cores` need no torch; `measure` and `measure_packing` do, and run as `python -m ebc_lab.doctor WHAT`: the
driver stays without it. What was measured is kept in the user's cache, by machine, torch version and shape.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
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

from .config import (
    Config,
    DataConfig,
    LRScheduleConfig,
    RunConfig,
    ShockConfig,
    UserError,
    digest,
    from_dict,
    run_part,
    to_dict,
)
from .telemetry import read_json, write_json

PACKAGES = ("ebc-lab", "torch", "numpy", "hydra-core", "omegaconf", "submitit", "pandas", "scipy", "matplotlib")
PACKED = (1, 2, 4, 8)  # runs that share a GPU, as far as it is tried
NEAR_BEST = 0.05  # of the best throughput: what a smaller number of runs may lack
WARM_STEPS = 40  # EBC may measure three times a step in its first 20


def cores() -> int:
    """Cores this process may use: its affinity, cut by a cgroup quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            allowed = min(allowed, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return allowed


def visible_gpus() -> list[str]:
    """The ids that `CUDA_VISIBLE_DEVICES` would take, one a GPU; an inherited setting is respected."""
    names = gpu_names()
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
    if inherited is None or not names:
        return [str(i) for i in range(len(names))]
    return [g.strip() for g in inherited.split(",") if g.strip() not in ("", "-1", "NoDevFiles")]


def chosen_device(device: str) -> str:
    """`auto` is a GPU where one is visible."""
    return ("cuda" if visible_gpus() else "cpu") if device == "auto" else device


@functools.cache
def gpu_names() -> tuple[str, ...]:
    """The models of this machine's GPUs, as nvidia-smi lists them; empty without it."""
    if not shutil.which("nvidia-smi"):
        return ()
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return tuple(x.split("(")[0].partition(":")[2].strip() for x in listed.stdout.splitlines() if x.startswith("GPU "))


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{p: metadata.version(p) for p in PACKAGES}}


@functools.cache
def git_revision() -> str | None:
    """Of the checkout that this package runs from; None where it is installed without one."""
    here = Path(__file__).parent
    if not shutil.which("git"):
        return None
    found, tracked = (
        subprocess.run(["git", "-C", str(here), *asked], capture_output=True, text=True, check=False)
        for asked in (["describe", "--always", "--dirty", "--abbrev=12"], ["ls-files", "--error-unmatch", __file__])
    )
    return found.stdout.strip() if found.returncode == 0 and tracked.returncode == 0 else None


def hardware() -> dict[str, Any]:
    """The machine in a few words, without torch."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": model,
        "cores": cores(),
        "gpus": list(gpu_names()),
    }


# -- speed ----------------------------------------------------------------------------------------------------------------


def _kept(what: str, run: RunConfig) -> Path:
    """Where a figure of this shape on this machine is kept."""
    from .data import cache_dir

    shape = {"model": to_dict(run.model), "batch": run.batch_size, "threads": run.threads_per_run, "device": run.device}
    about = {**shape, "torch": metadata.version("torch"), "cpu": hardware()["cpu"], "optimizer": run.optimizer.name}
    about["gpus"] = gpu_names() if run.device == "cuda" else ()
    if what == "packing":
        about |= {"dtype": run.dtype, "stabilizer": run.stabilizer.name, "counts": PACKED}
    return cache_dir() / f"{what}-{digest(about)[:16]}.json"


def _cached(what: str, run: RunConfig) -> dict[str, Any] | None:
    try:
        return dict(read_json(_kept(what, run)))
    except (FileNotFoundError, UserError):
        return None


def _measured(what: str, run: RunConfig) -> dict[str, Any]:
    """A figure of this shape on this machine, from the cache or measured in a subprocess. Raises UserError."""
    known = _cached(what, run)
    if known:
        return known
    asked = json.dumps(to_dict(run))
    env = {**os.environ, "OMP_NUM_THREADS": str(run.threads_per_run)}
    command = [sys.executable, "-m", "ebc_lab.doctor", what]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env=env, check=False)
    if done.returncode != 0:
        raise UserError(f"measuring the {what} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    found = dict(json.loads(done.stdout))
    try:
        path = _kept(what, run)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    except OSError:
        pass  # a cache that cannot be written costs seconds, not correctness
    return found


def cached_speeds(run: RunConfig) -> dict[str, Any] | None:
    """What `speeds` found before for this shape on this machine, or None."""
    return _cached("speed", run)


def speeds(run: RunConfig) -> dict[str, Any]:
    """Steps/s of the run's shape in float32 and under bfloat16 autocast, from the cache or measured in a subprocess."""
    return _measured("speed", run)


def cached_packing(run: RunConfig) -> dict[str, Any] | None:
    """What `packing` found before for this shape on this machine, or None."""
    return packing(run) if run.device != "cuda" else _cached("packing", run)


def packing(run: RunConfig) -> dict[str, Any]:
    """How many runs of this shape a GPU should carry at a time: `runs_per_worker`, and the `tokens_per_s` of each number tried.

    From the cache or measured in a subprocess; 1 on a CPU, where runs go side by side as processes. `run` is resolved (device,
    dtype). Raises UserError.
    """
    return _measured("packing", run) if run.device == "cuda" else {"runs_per_worker": 1, "tokens_per_s": {}}


def measure(run: RunConfig, seconds: float = 0.6) -> dict[str, Any]:
    """Median steps/s by dtype, the two interleaved; random tokens, a vocabulary of 65."""
    import torch

    from . import model as models
    from . import optimizers
    from .evaluation import autocast, token_losses
    from .training import set_up_torch

    set_up_torch(run)
    device = torch.device(run.device)
    tokens = torch.randint(0, 65, (run.batch_size, run.model.context + 1), device=device)
    loops = {}
    for dtype in ("float32", "bfloat16"):
        model = models.build(run.model, 65, 0).to(device)
        loops[dtype] = (replace(run, dtype=dtype), model, optimizers.build(model, run.optimizer))

    def step(dtype: str) -> float:
        shape, model, bases = loops[dtype]
        start = time.perf_counter()
        with autocast(shape):
            logits = model(tokens[:, :-1])
        token_losses(logits, tokens[:, 1:]).mean().backward()
        for base in bases:
            base.step()
            base.zero_grad()
        _wait(run)
        return time.perf_counter() - start

    taken: dict[str, list[float]] = {d: [] for d in loops}
    begun = time.perf_counter()
    for d in loops:
        step(d)
    while time.perf_counter() - begun < 2 * seconds or len(taken["float32"]) < 3:
        for d in loops:
            taken[d].append(step(d))
    rate = {d: 1 / statistics.median(t) for d, t in taken.items()}
    faster = "bfloat16" if rate["bfloat16"] > 1.05 * rate["float32"] else "float32"
    return {"steps_per_s": rate, "faster": faster, "repeats": len(taken["float32"])}


def packing_in_words(packing: Mapping[str, Any]) -> str:
    """What `packing` found, in a sentence."""
    rates = ", ".join(f"{rate:,.0f} with {k}" for k, rate in packing["tokens_per_s"].items())
    return f"{packing['runs_per_worker']} run(s) share a GPU: tokens/s of all together {rates}"


def smallest_near_best(rates: Mapping[int, float]) -> int:
    """The smallest number of runs whose throughput is within NEAR_BEST of the best."""
    best = max(rates.values())
    return min(k for k, rate in rates.items() if rate >= (1 - NEAR_BEST) * best)


def measure_packing(run: RunConfig, counts: tuple[int, ...] = PACKED, steps: int = 20, stretches: int = 3) -> dict[str, Any]:
    """Tokens/s of so many runs together, taking turns in this process as a worker's do: the median over `stretches` of `steps`
    steps a run.

    Whole runs, evaluations and records included, each with its own seed, on the text that is always there. Numbers of runs that
    the device has no memory for are left out. Raises UserError when a run ends (diverges) before it is measured.
    """
    from .data import locate
    from .outcome import is_oom
    from .training import Training

    data = DataConfig(name="pydoc", sha256=locate(DataConfig(name="pydoc"), quiet=True).sha256)
    run = replace(run, data=data, steps=10**6, evaluate=[], lr_schedule=LRScheduleConfig(), shock=ShockConfig())
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
    return {"runs_per_worker": smallest_near_best(rates), "tokens_per_s": {str(k): r for k, r in rates.items()}}


def _wait(run: RunConfig) -> None:
    """Until the device has done what it was given."""
    import torch

    if run.device == "cuda":
        torch.cuda.synchronize()


def examine(config: Config) -> dict[str, Any]:
    """Everything `ebc-lab doctor` reports. Problems are listed, not raised."""
    from .data import locate

    problems: list[str] = []
    found: dict[str, Any] = {"versions": versions(), "hardware": hardware()}
    try:
        corpus = locate(config.data, quiet=True)
        found["corpus"] = {
            "name": corpus.name,
            "source": corpus.source,
            "sha256": corpus.sha256,
            "characters": len(corpus.text),
        }
        if corpus.warning:
            problems.append(corpus.warning)
    except UserError as error:
        problems.append(str(error))
    run = run_part(config)
    run.device = chosen_device(run.device)
    try:
        found["speed"] = {
            "scale": config.scale,
            "device": run.device,
            "threads_per_run": run.threads_per_run,
            **speeds(run),
        }
        if run.device == "cuda":
            found["packing"] = packing(replace(run, dtype=found["speed"]["faster"] if run.dtype == "auto" else run.dtype))
    except UserError as error:
        problems.append(str(error))
    output = Path(config.output_dir)
    existing = next(p for p in [output, *output.resolve().parents] if p.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    found["output"] = {
        "path": str(output),
        "writable": writable,
        "free_gb": round(shutil.disk_usage(existing).free / 1e9, 1),
    }
    if not writable:
        problems.append(f"{output} cannot be written: choose another output_dir.")
    found["slurm"] = shutil.which("sbatch") is not None
    found["problems"] = problems
    return found


if __name__ == "__main__":
    asked: RunConfig = from_dict(RunConfig, json.load(sys.stdin))
    print(json.dumps(measure(asked) if sys.argv[1] == "speed" else measure_packing(asked)))
