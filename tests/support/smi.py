"""A machine with GPUs that are not there: an `nvidia-smi` on PATH that prints what the real one would.

What it knows is in a file beside it, which a test may change while others ask. It answers what the lab
asks, `-L` and `--query-compute-apps`, in the forms of driver R535 and later, and refuses all else. A GPU that
fell off the bus is a sentence in place of its line, and exit code 15.
"""

from __future__ import annotations

import json
import os
import sys
import uuid
from pathlib import Path
from typing import Any

MODEL = "NVIDIA A100-SXM4-80GB"
LOST = (
    "Unable to determine the device handle for GPU{number}: 0000:{bus:02X}:00.0: GPU is lost.  Reboot the "
    "system to recover this GPU"
)
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
    "NVIDIA driver is installed and running.\n"
)
PROCESSES = "--query-compute-apps=gpu_uuid,pid,process_name,used_memory"
BUSY = "CUDA error: CUDA-capable device(s) is/are busy or unavailable"  # as torch says it


def gpu_uuid(number: int) -> str:
    """The UUID of a fake GPU; all begin differently."""
    return f"GPU-{uuid.uuid5(uuid.NAMESPACE_OID, f'gpu {number}')}"


def mig_uuid(number: int, instance: int) -> str:
    return f"MIG-{uuid.uuid5(uuid.NAMESPACE_OID, f'gpu {number}, instance {instance}')}"


class Machine:
    """Fake GPUs in a folder, whose `bin` is to be put on PATH."""

    def __init__(self, folder: Path, count: int, mig: dict[int, list[str]] | None = None):
        """`mig`: GPU number -> the sizes of its instances, such as 1g.10gb."""
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        self.state = folder / "gpus.json"
        self.gpus = [self._gpu(number, (mig or {}).get(number, [])) for number in range(count)]
        self.failure: tuple[str, int] | None = None
        self._write()
        command = self.bin / "nvidia-smi"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -S {Path(__file__)} {self.state} "$@"\n')
        command.chmod(0o755)

    @staticmethod
    def _gpu(number: int, sizes: list[str]) -> dict[str, Any]:
        instances = [[size, mig_uuid(number, i)] for i, size in enumerate(sizes)]
        about = {"number": number, "name": MODEL, "uuid": gpu_uuid(number), "instances": instances}
        return {**about, "lost": False, "processes": []}

    @property
    def path(self) -> str:
        """PATH with this nvidia-smi before all others."""
        return f"{self.bin}{os.pathsep}{os.environ['PATH']}"

    def lose(self, number: int) -> None:
        """Let a GPU fall off the bus."""
        self._change(number, lost=True)

    def hold(self, number: int, pid: int, mib: int) -> None:
        """Let another user's process compute on a GPU."""
        self._change(number, processes=[f"{gpu_uuid(number)}, {pid}, python, {mib} MiB"])

    def rename(self, number: int, name: str) -> None:
        self._change(number, name=name)

    def fail(self, text: str, code: int) -> None:
        """Let nvidia-smi itself fail."""
        self.failure = text, code
        self._write()

    def replace(self, command: str) -> None:
        """Let nvidia-smi be this instead."""
        (self.bin / "nvidia-smi").write_text(command)

    def _change(self, number: int, **what: Any) -> None:
        self.gpus[number] |= what
        self._write()

    def _write(self) -> None:
        whole = self.state.with_suffix(".new")
        whole.write_text(json.dumps({"gpus": self.gpus, "failure": self.failure}))
        whole.replace(self.state)


def answer(state: Path, asked: list[str]) -> tuple[str, int]:
    """What nvidia-smi prints, and its exit code."""
    known = json.loads(state.read_text())
    if known["failure"]:
        text, code = known["failure"]
        return text, code
    if not known["gpus"]:
        return "No devices were found\n", 6
    lost = [
        LOST.format(number=gpu["number"], bus=7 + 4 * gpu["number"]) for gpu in known["gpus"] if gpu["lost"]
    ]
    there = [gpu for gpu in known["gpus"] if not gpu["lost"]]
    if asked == ["-L"]:
        lines = [line for gpu in there for line in _listed(gpu)]
    elif asked == [PROCESSES, "--format=csv,noheader"]:
        lines = [line for gpu in there for line in gpu["processes"]]
    else:
        return f"Invalid combination of input arguments: {asked}\n", 2
    return "".join(f"{line}\n" for line in [*lost, *lines]), 15 if lost else 0


def _listed(gpu: dict[str, Any]) -> list[str]:
    whole = f"GPU {gpu['number']}: {gpu['name']} (UUID: {gpu['uuid']})"
    parts = enumerate(gpu["instances"])
    return [whole, *(f"  MIG {size:<11} Device {i:>2}: (UUID: {name})" for i, (size, name) in parts)]


if __name__ == "__main__":
    said, exit_code = answer(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.write(said)
    sys.exit(exit_code)
