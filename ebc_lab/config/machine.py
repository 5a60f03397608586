"""What this machine has: cores, GPUs, versions. `bench/speeds.py` measures what is fastest on it."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

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
SMI_PATIENCE_S = 60.0  # for an answer of nvidia-smi, which may hang on a broken GPU, or of scontrol
NONE_LEFT = (6, 15)  # exit codes of nvidia-smi: no such device, a GPU is lost
GPU_LINE = re.compile(r"GPU (\d+): (.+?)(?: \(UUID: ([^)]+)\))?")
MIG_LINE = re.compile(r"\s+MIG (\S+)\s+Device\s+\d+: \(UUID: ([^)]+)\)")
NUMBERED_INSTANCE = re.compile(r"MIG-(GPU-[^/]+)/(\d+/\d+)")  # of a GPU: its parts, for graphics and compute
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


class Gpu(NamedTuple):
    """What CUDA can be given as one device: a GPU, or an instance of one that is divided (MIG mode)."""

    number: int  # nvidia-smi's index; of an instance, that of its GPU
    name: str  # the model, and the size of an instance
    uuid: str  # as CUDA_VISIBLE_DEVICES takes it
    divided: str | None = None  # of an instance: the UUID of its GPU, which no process can use as a whole

    @property
    def model(self) -> str:
        return self.name.partition(" MIG ")[0]


class _Answer(NamedTuple):
    lines: list[str]
    failure: str = ""  # in words; empty: this is all there is to know


def _smi(*options: str) -> _Answer:
    if not shutil.which("nvidia-smi"):
        return _Answer([], "nvidia-smi is not on PATH")
    try:
        process = subprocess.Popen(
            ["nvidia-smi", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        return _Answer([], f"nvidia-smi cannot be started ({error.strerror})")
    try:
        told, _ = process.communicate(timeout=SMI_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()  # not waited for: in a call of a broken driver it does not die, whoever kills it
        return _Answer([], f"nvidia-smi does not answer within {SMI_PATIENCE_S:g} s")
    lines = told.splitlines()
    if process.returncode in (0, *NONE_LEFT):
        return _Answer(lines)
    first = f": {lines[0].rstrip('.')}" if lines else ""
    return _Answer(lines, f"nvidia-smi fails with exit code {process.returncode}{first}")


class Listing(NamedTuple):
    """The devices that nvidia-smi lists."""

    gpus: tuple[Gpu, ...]
    failure: str  # why none is known, in words; empty: it says what is there


def listing() -> Listing:
    """Ask nvidia-smi now which devices are there. A GPU that has fallen off the bus is not listed any more.

    A GPU that is divided stands there by its instances alone.
    """
    answer = _smi("-L")
    found: list[Gpu] = []
    divided: set[str] = set()
    for line in answer.lines:  # for a lost GPU there is a sentence in place of its line
        if match := GPU_LINE.fullmatch(line.rstrip()):
            number, name, uuid = match.groups()
            found.append(Gpu(int(number), name, uuid or number))
        elif found and (match := MIG_LINE.fullmatch(line.rstrip())):
            size, uuid = match.groups()
            above = found[-1]
            whole = above.divided or above.uuid
            divided.add(whole)
            found.append(Gpu(above.number, f"{above.model} MIG {size}", uuid, whole))
    there = tuple(gpu for gpu in found if gpu.uuid not in divided)
    return Listing(there, "" if found else answer.failure)


@functools.cache
def first_listing() -> Listing:
    """What nvidia-smi listed when this process first asked."""
    return listing()


def gpus() -> tuple[Gpu, ...]:
    """The devices of this machine, as nvidia-smi listed them when this process first asked."""
    return first_listing().gpus


def processes_on(name: str) -> list[str]:
    """Ask nvidia-smi now which processes compute on a device, named as in CUDA_VISIBLE_DEVICES: such as
    `4242 (python, 8142 MiB)`.

    An index is nvidia-smi's, for an instance the processes on all of its GPU are shown, and those of other
    containers are not.
    """
    whole = {gpu.divided or gpu.uuid for gpu in meant(name, gpus())}
    fields = "gpu_uuid,pid,process_name,used_memory"
    rows = (row.split(", ") for row in _smi(f"--query-compute-apps={fields}", "--format=csv,noheader").lines)
    return [f"{row[1]} ({row[2]}, {row[3]})" for row in rows if len(row) == 4 and row[0] in whole]


def gpu_names() -> tuple[str, ...]:
    """The models of this machine's GPUs, and the sizes of instances; empty without nvidia-smi."""
    return tuple(gpu.name for gpu in gpus())


def visible_gpus(together: int = 1) -> list[str]:
    """The devices that this process may use, each as CUDA_VISIBLE_DEVICES takes it for a worker.

    They are UUIDs: once a GPU is lost, CUDA counts those behind it anew, and an index means another one. An
    inherited CUDA_VISIBLE_DEVICES is read as CUDA reads it; without one, what Slurm gave to this job counts.
    With `together` > 1, only those that so many processes of one run can share: no instances of a GPU, of
    which a process sees one.
    """
    bound, _ = _bound_gpus()
    return [name for gpu, name in bound if together == 1 or gpu.divided is None]


def why_no_gpu() -> str:
    """Why `visible_gpus` is empty, to follow `device=cuda, but`."""
    return _bound_gpus()[1]


def _bound_gpus() -> tuple[list[tuple[Gpu, str]], str]:
    """Return the devices bound to this process, each with its name for CUDA, and why there are none."""
    here = gpus()
    if not here:
        failure = first_listing().failure
        return [], f"no GPU is found: {failure}" if failure else "nvidia-smi lists no GPU here"
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
    if inherited is not None:
        return _chosen(inherited.split(","), f"CUDA_VISIBLE_DEVICES={inherited}")
    for variable in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        if given := os.environ.get(variable):
            ids = given.split(",")
            # the numbers are the node's; where a job can open no other devices, it lists those alone
            if len({gpu.number for gpu in here}) <= len(ids):
                break
            return _chosen(ids, f"{variable}={given}")
    else:
        if _slurm_gave_none():
            return [], "Slurm gave no GPU to this job: ask for one, --gpus-per-node=1"
    return [(gpu, gpu.uuid) for gpu in here], ""


def _chosen(entries: Sequence[str], said: str) -> tuple[list[tuple[Gpu, str]], str]:
    """Return the devices that a list like CUDA_VISIBLE_DEVICES means, and why there are none. As for CUDA,
    the list ends before the first entry that means no device, and one that repeats a device means none."""
    here = gpus()
    alike = len({gpu.model for gpu in here}) == 1 or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    chosen: list[tuple[Gpu, str]] = []
    for entry in map(str.strip, entries):
        named = meant(entry, here)
        if not named:
            break
        if any(gpu in named for gpu, _ in chosen):
            return [], f"{said} names a GPU twice ({entry}), and CUDA then shows none"
        # CUDA may count GPUs of different models in another order than nvidia-smi: there an index stays one
        certain = alike or not entry.isdecimal() or named[0].divided is not None
        chosen += [(gpu, gpu.uuid if certain else entry) for gpu in named]
    count = f"{len(here)} GPU{'s' * (len(here) != 1)}"
    return chosen, f"{said} leaves none of the {count} here" if not chosen else ""


def meant(entry: str, listed: Sequence[Gpu]) -> list[Gpu]:
    """Return the listed devices that an index, a UUID or the beginning of a UUID means: of a divided GPU all
    its instances; none where it means nothing, or more than one.

    Slurm names an instance by its GPU and two numbers, as old drivers list it. Newer ones do not say which of
    theirs that is, but CUDA knows: it is a device of its own.
    """
    if entry.isdecimal():
        return [gpu for gpu in listed if gpu.number == int(entry)]
    if exact := [gpu for gpu in listed if entry in (gpu.uuid, gpu.divided)]:
        return exact
    if numbered := NUMBERED_INSTANCE.fullmatch(entry):
        whole, instance = numbered.groups()
        parts = [gpu for gpu in listed if gpu.divided == whole and not NUMBERED_INSTANCE.fullmatch(gpu.uuid)]
        return [gpu._replace(name=f"{gpu.model} MIG {instance}", uuid=entry) for gpu in parts[:1]]
    if not entry.startswith(("GPU-", "MIG-")):
        return []
    known = {name for gpu in listed for name in (gpu.uuid, gpu.divided) if name and name.startswith(entry)}
    return meant(known.pop(), listed) if len(known) == 1 else []


@functools.cache
def _slurm_gave_none() -> bool:
    """Whether this is a job on a node whose GPUs Slurm gives out, and it has been given none."""
    node = os.environ.get("SLURMD_NODENAME")
    if not node or os.environ.get("SLURM_GPUS_ON_NODE"):
        return False
    asked = ["scontrol", "show", "node", node]
    try:
        said = subprocess.run(
            asked, capture_output=True, text=True, errors="replace", check=False, timeout=SMI_PATIENCE_S
        )
    except (OSError, subprocess.TimeoutExpired):  # a node as good as a job's own
        return False
    return bool(re.search(r"\bGres=\S*gpu", said.stdout))


def chosen_device(device: str) -> str:
    """`auto` is a GPU where one is visible."""
    if device != "auto":
        return device
    return "cuda" if visible_gpus() else "cpu"


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
