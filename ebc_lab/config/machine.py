"""This machine's cores, GPUs and library versions. `bench/speeds.py` measures what is fastest here."""

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

from .errors import count

PACKAGES = (
    *("ebc-lab", "torch", "numpy", "hydra-core", "omegaconf"),
    *("submitit", "pandas", "scipy", "matplotlib"),
)
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of CPU time per period
SMI_PATIENCE_S = 60.0  # for nvidia-smi, which hangs on a broken GPU, and for scontrol
NONE_LEFT = (6, 15)  # exit codes of nvidia-smi for no such device and for a lost GPU
GPU_LINE = re.compile(r"GPU (\d+): (.+?)(?: \(UUID: ([^)]+)\))?")
MIG_LINE = re.compile(r"\s+MIG (\S+)\s+Device\s+\d+: \(UUID: ([^)]+)\)")
NUMBERED_INSTANCE = re.compile(r"MIG-(GPU-[^/]+)/(\d+/\d+)")  # a GPU and its instance
INSTRUCTIONS: dict[str, set[str]] = {  # name in ATEN_CPU_CAPABILITY -> flags in /proc/cpuinfo that it needs
    "default": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
}


def installed(module: str) -> bool:
    """Return whether an optional library is installed, without importing it."""
    return importlib.util.find_spec(module) is not None


def cores() -> int:
    """Return how many cores this process may use, given its CPU affinity and the quota of a container."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = QUOTA.read_text(encoding="utf-8").split()
        if quota != "max":
            allowed = min(allowed, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return allowed


class Gpu(NamedTuple):
    """A device that CUDA can use: a whole GPU, or one instance of a GPU that is divided (MIG mode)."""

    number: int  # nvidia-smi's index; an instance has that of its GPU
    name: str  # the model, followed by the size of an instance
    uuid: str  # as CUDA_VISIBLE_DEVICES takes it
    divided: str | None = None  # of an instance: the UUID of its GPU, which cannot be used whole

    @property
    def model(self) -> str:
        return self.name.partition(" MIG ")[0]


def _ask_smi(*options: str) -> tuple[list[str], str]:
    """Return the lines that nvidia-smi prints, and why it failed (empty if it did not)."""
    if not shutil.which("nvidia-smi"):
        return [], "nvidia-smi is not on PATH"
    asked = ["nvidia-smi", *options]
    try:
        process = subprocess.Popen(
            asked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        return [], f"nvidia-smi cannot be started ({error.strerror})"
    try:
        lines = process.communicate(timeout=SMI_PATIENCE_S)[0].splitlines()
    except subprocess.TimeoutExpired:
        process.kill()  # not waited for: stuck in a call of a broken driver, it outlives any signal
        return [], f"nvidia-smi does not answer within {SMI_PATIENCE_S:g} s"
    if process.returncode in (0, *NONE_LEFT):
        return lines, ""
    first = f": {lines[0].rstrip('.')}" if lines else ""
    return lines, f"nvidia-smi fails with exit code {process.returncode}{first}"


class Listing(NamedTuple):
    """The devices that nvidia-smi lists."""

    gpus: tuple[Gpu, ...]
    failure: str  # why no device is known; empty where the listing is complete


def listing() -> Listing:
    """Return the devices that nvidia-smi lists now. A GPU that has fallen off the bus is missing. A divided
    GPU is replaced by its instances."""
    lines, failure = _ask_smi("-L")
    found: list[Gpu] = []
    divided: set[str] = set()
    for line in map(str.rstrip, lines):  # a lost GPU has a sentence in place of its line
        if match := GPU_LINE.fullmatch(line):
            number, name, uuid = match.groups()
            found.append(Gpu(int(number), name, uuid or number))
        elif found and (match := MIG_LINE.fullmatch(line)):
            size, uuid = match.groups()
            whole = found[-1].divided or found[-1].uuid
            divided.add(whole)
            found.append(Gpu(found[-1].number, f"{found[-1].model} MIG {size}", uuid, whole))
    return Listing(tuple(gpu for gpu in found if gpu.uuid not in divided), "" if found else failure)


@functools.cache
def first_listing() -> Listing:
    """Return what nvidia-smi listed when this process first asked."""
    return listing()


def processes_on(name: str) -> list[str]:
    """Return the processes that nvidia-smi sees on a device now, such as `4242 (python, 8142 MiB)`.

    `name` is an entry of CUDA_VISIBLE_DEVICES; an index means the same device as in nvidia-smi. For an
    instance, the processes on the whole GPU are listed. Processes in other containers are never listed.
    """
    whole = {gpu.divided or gpu.uuid for gpu in named_by(name, first_listing().gpus)}
    fields = "gpu_uuid,pid,process_name,used_memory"
    lines, _ = _ask_smi(f"--query-compute-apps={fields}", "--format=csv,noheader")
    rows = [line.split(", ") for line in lines]
    return [f"{row[1]} ({row[2]}, {row[3]})" for row in rows if len(row) == 4 and row[0] in whole]


def gpu_names() -> tuple[str, ...]:
    """Return the models of this machine's GPUs, with the sizes of instances; empty without nvidia-smi."""
    return tuple(gpu.name for gpu in first_listing().gpus)


def visible_gpus(together: int = 1) -> list[str]:
    """Return the devices that this process may use, each as a worker's CUDA_VISIBLE_DEVICES takes it.

    Devices are named by UUID if possible: when a GPU is lost, CUDA renumbers the later ones, and an index
    then means another GPU. An inherited CUDA_VISIBLE_DEVICES is read as CUDA reads it. Without that variable,
    the devices are those that Slurm gave to this job, or otherwise all. With `together` > 1, instances are
    left out: processes that train one run together cannot use them, since each process sees only one
    instance.
    """
    return [name for gpu, name in _bound_gpus()[0] if together == 1 or gpu.divided is None]


def why_no_gpu() -> str:
    """Return why `visible_gpus` is empty, as the end of a sentence that begins `device=cuda, but`."""
    return _bound_gpus()[1]


def _bound_gpus() -> tuple[list[tuple[Gpu, str]], str]:
    """Return this process's devices, each with its name for CUDA, and the reason if there are none."""
    here, failure = first_listing()
    if not here:
        return [], f"no GPU is found: {failure}" if failure else "nvidia-smi lists no GPU here"
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
    if inherited is not None:
        return _chosen(inherited, "CUDA_VISIBLE_DEVICES")
    given = [name for name in ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS") if os.environ.get(name)]
    if not given and _slurm_gave_none():
        return [], "Slurm gave no GPU to this job: ask for one, --gpus-per-node=1"
    # the numbers count all GPUs of the node; nvidia-smi may list only those that the job can open
    if given and len({gpu.number for gpu in here}) > len(os.environ[given[0]].split(",")):
        return _chosen(os.environ[given[0]], given[0])
    return [(gpu, gpu.uuid) for gpu in here], ""


def _chosen(value: str, variable: str) -> tuple[list[tuple[Gpu, str]], str]:
    """Return the devices that the `value` of a variable like CUDA_VISIBLE_DEVICES names, and the reason if
    there are none. As in CUDA, an entry that names no device ends the list; a repeated device empties it."""
    here = first_listing().gpus
    alike = len({gpu.model for gpu in here}) == 1 or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    chosen: list[tuple[Gpu, str]] = []
    for entry in map(str.strip, value.split(",")):
        named = named_by(entry, here)
        if not named:
            break
        if any(gpu in named for gpu, _ in chosen):
            return [], f"{variable}={value} names a GPU twice ({entry}), and CUDA then shows none"
        # CUDA may order GPUs of different models unlike nvidia-smi: an index is then kept as it is
        certain = alike or not entry.isdecimal() or named[0].divided is not None
        chosen += [(gpu, gpu.uuid if certain else entry) for gpu in named]
    return chosen, "" if chosen else f"{variable}={value} leaves none of the {count(len(here), 'GPU')} here"


def named_by(entry: str, listed: Sequence[Gpu]) -> list[Gpu]:
    """Return the listed devices that an index, a UUID or the beginning of a UUID names. For a divided GPU,
    these are all its instances. Return an empty list if the entry is unknown or ambiguous.

    Slurm names an instance by its GPU and two numbers, as old drivers list instances. Newer drivers do not
    say which instance has these numbers, but CUDA knows, so such an entry becomes a device of its own.
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
    return named_by(known.pop(), listed) if len(known) == 1 else []


@functools.cache
def _slurm_gave_none() -> bool:
    """Return whether this process is in a Slurm job without a GPU, on a node whose GPUs Slurm allocates."""
    node = os.environ.get("SLURMD_NODENAME")
    if not node or os.environ.get("SLURM_GPUS_ON_NODE"):
        return False
    asked = ["scontrol", "show", "node", node]
    try:
        answer = subprocess.run(
            asked, capture_output=True, text=True, errors="replace", check=False, timeout=SMI_PATIENCE_S
        )
    except (OSError, subprocess.TimeoutExpired):  # then the listing of nvidia-smi counts
        return False
    return bool(re.search(r"\bGres=\S*gpu", answer.stdout))


def chosen_device(device: str) -> str:
    """Return `cuda` or `cpu` for a value of `device`. For `auto`, return `cuda` if a GPU is visible."""
    if device != "auto":
        return device
    return "cuda" if visible_gpus() else "cpu"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a study records."""
    return {"python": platform.python_version(), **{p: metadata.version(p) for p in PACKAGES}}


@functools.cache
def git_revision() -> str | None:
    """Return the git revision of this package's checkout, or None if the package does not run from one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpuinfo(field: str) -> str:
    """Return the value of a field of the first core in /proc/cpuinfo, or an empty string."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")


def capabilities() -> tuple[str, ...]:
    """Return the vector instructions that this CPU has, by their names in ATEN_CPU_CAPABILITY."""
    flags = set(_cpuinfo("flags").split())
    return tuple(name for name, needed in INSTRUCTIONS.items() if needed <= flags)


def hardware() -> dict[str, Any]:
    """Return what a study records about this machine, without importing torch."""
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "gpus": list(gpu_names()),
    }
