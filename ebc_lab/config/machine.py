"""What this machine has: cores, GPUs, versions. `bench/speeds.py` measures what is fastest on it."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "ebc-lab",
    "torch",
    "numpy",
    "hydra-core",
    "omegaconf",
    "submitit",
    "pandas",
    "scipy",
    "matplotlib",
)
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds, and of how many
INSTRUCTIONS: dict[str, set[str]] = {  # as ATEN_CPU_CAPABILITY names them -> flags of a CPU that has them
    "default": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
}


def installed(module: str) -> bool:
    """Whether an optional library is there, without importing it."""
    return importlib.util.find_spec(module) is not None


def cores() -> int:
    """Cores this process may use: its affinity, cut by a cgroup quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text(encoding="utf-8").split()
        if quota != "max":
            allowed = min(allowed, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return allowed


def visible_gpus() -> list[str]:
    """The ids of the GPUs that this process may use; an inherited CUDA_VISIBLE_DEVICES is respected."""
    names = gpu_names()
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
    if inherited is None or not names:
        return [str(i) for i in range(len(names))]
    return [g.strip() for g in inherited.split(",") if g.strip() not in ("", "-1", "NoDevFiles")]


def chosen_device(device: str) -> str:
    """`auto` is a GPU where one is visible."""
    if device != "auto":
        return device
    return "cuda" if visible_gpus() else "cpu"


@functools.cache
def gpu_names() -> tuple[str, ...]:
    """The models of this machine's GPUs, as nvidia-smi lists them; empty without it."""
    if not shutil.which("nvidia-smi"):
        return ()
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return tuple(
        x.split("(")[0].partition(":")[2].strip() for x in listed.stdout.splitlines() if x.startswith("GPU ")
    )


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{p: metadata.version(p) for p in PACKAGES}}


@functools.cache
def git_revision() -> str | None:
    """Return the git revision of this package's checkout; None where it is installed without one."""
    here = Path(__file__).parent
    if not shutil.which("git"):
        return None
    revision, tracked = (
        subprocess.run(["git", "-C", str(here), *asked], capture_output=True, text=True, check=False)
        for asked in (
            ["describe", "--always", "--dirty", "--abbrev=12"],
            ["ls-files", "--error-unmatch", __file__],
        )
    )
    return revision.stdout.strip() if revision.returncode == 0 and tracked.returncode == 0 else None


def _of_cpu(what: str) -> str:
    """A line of /proc/cpuinfo about the first core; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(what)), "")


def capabilities() -> tuple[str, ...]:
    """The names of the vector instructions that this CPU has."""
    flags = set(_of_cpu("flags").split())
    return tuple(name for name, needed in INSTRUCTIONS.items() if needed <= flags)


def hardware() -> dict[str, Any]:
    """The machine in a few words, without torch."""
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": _of_cpu("model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "gpus": list(gpu_names()),
    }
