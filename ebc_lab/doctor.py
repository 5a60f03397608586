"""What this machine can do: cores, GPUs, precision, corpus, places to write. Measured figures come from a subprocess.

`visible_gpus` and `cores` need no torch; `measure` does, and is run as `python -m ebc_lab.doctor` so that the driver stays
without it. What was measured is kept in the user's cache, by machine, torch version and shape.
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
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from .config import Config, RunConfig, UserError, digest, from_dict, run_part, to_dict
from .telemetry import read_json, write_json

PACKAGES = ("ebc-lab", "torch", "numpy", "hydra-core", "omegaconf", "submitit", "pandas", "scipy", "matplotlib")


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


def _speed_file(run: RunConfig) -> Path:
    from .data import cache_dir

    shape = {"model": to_dict(run.model), "batch": run.batch_size, "threads": run.threads_per_run, "device": run.device}
    about = {**shape, "torch": metadata.version("torch"), "cpu": hardware()["cpu"], "optimizer": run.optimizer.name}
    about["gpus"] = gpu_names() if run.device == "cuda" else ()
    return cache_dir() / f"speed-{digest(about)[:16]}.json"


def cached_speeds(run: RunConfig) -> dict[str, Any] | None:
    """What `speeds` found before for this shape on this machine, or None."""
    try:
        return dict(read_json(_speed_file(run)))
    except (FileNotFoundError, UserError):
        return None


def speeds(run: RunConfig) -> dict[str, Any]:
    """Steps/s of the run's shape in float32 and under bfloat16 autocast, from the cache or measured in a subprocess."""
    known = cached_speeds(run)
    if known:
        return known
    asked = json.dumps(to_dict(run))
    env = {**os.environ, "OMP_NUM_THREADS": str(run.threads_per_run)}
    command = [sys.executable, "-m", "ebc_lab.doctor"]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env=env, check=False)
    if done.returncode != 0:
        raise UserError(f"measuring the speed failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    found = dict(json.loads(done.stdout))
    try:
        path = _speed_file(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    except OSError:
        pass  # a cache that cannot be written costs seconds, not correctness
    return found


def measure(run: RunConfig, seconds: float = 0.6) -> dict[str, Any]:
    """Median steps/s by dtype, the two interleaved; random tokens, a vocabulary of 65."""
    import dataclasses

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
        loops[dtype] = (dataclasses.replace(run, dtype=dtype), model, optimizers.build(model, run.optimizer))

    def step(dtype: str) -> float:
        shape, model, bases = loops[dtype]
        start = time.perf_counter()
        with autocast(shape):
            logits = model(tokens[:, :-1])
        token_losses(logits, tokens[:, 1:]).mean().backward()
        for base in bases:
            base.step()
            base.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
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
    print(json.dumps(measure(from_dict(RunConfig, json.load(sys.stdin)))))
