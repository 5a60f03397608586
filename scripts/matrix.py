"""The wheel under several Pythons, and under the newest torch: installed, used, tested. `make test-matrix`.

usage: python scripts/matrix.py

Each row is an environment of its own in build/matrix, made by pip and removed again: a Python with the torch
of constraints.txt, and last the newest Python with the newest torch that the index offers. In each the study
runs at smoke scale from an empty folder, and then the tests of `TESTS`. On Linux a torch from PyPI brings
gigabytes of CUDA.

environment: PYTHONS      the Pythons to try, python3.11 python3.12 python3.13 if unset
             TORCH_INDEX  where torch comes from, such as https://download.pytorch.org/whl/cpu (without CUDA)
exit code: 0 every row passed, 1 one did not, or no Python was found
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "matrix"
PYTHONS = "python3.11 python3.12 python3.13"
# what breaks first: the method against its reference, settings, files, results, and a run's golden figures
TESTS = ("tests/ebc", "tests/config", "tests/records", "tests/results", "tests/training/test_golden.py")
# of those, what reads the package's source, which is not there, and what several processes train for minutes
IGNORED = (
    "tests/records/test_forms.py",
    "tests/config/own/test_editor.py",
    "tests/ebc/parallel",
)
LEFT_OUT = (
    "not slow and not slurm and not nodes and not cuda and not browser and not emulated and not hypothesis"
)


class Failed(Exception):
    """A command did not succeed; its text is what it printed last."""


@dataclass(frozen=True)
class Row:
    """One Python with one torch."""

    python: str  # the command
    newest: bool  # torch; else that of constraints.txt

    @property
    def folder(self) -> Path:
        return WORK / f"{Path(self.python).name}-{'newest' if self.newest else 'pinned'}"


def run(command: Sequence[str | Path], cwd: Path, log: Path) -> None:
    """Run a command, what it prints at the end of `log`. Raises Failed."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "EBC_LAB_DATA", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment |= {"XDG_CACHE_HOME": str(cwd / "cache"), "XDG_STATE_HOME": str(cwd / "state")}
    if command[1:3] == ["-m", "pip"]:
        del environment["XDG_CACHE_HOME"]  # where pip keeps what it has downloaded
    with open(log, "a", encoding="utf-8") as out:
        print(f"\n$ {' '.join(map(str, command))}", file=out, flush=True)
        done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, stdout=out, stderr=out)
    if done.returncode:
        raise Failed(f"{log} ends with\n" + "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:]))


def version_of(python: str | Path, code: str) -> str | None:
    """What a Python prints for some code; None where it cannot be run, as a shim of none."""
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def built(log: Path) -> tuple[Path, Path]:
    """The wheel, and a folder with the tests and without the package."""
    run([sys.executable, "-m", "build", "--outdir", WORK / "dist", ROOT], ROOT, log)
    [wheel], [sdist] = (WORK / "dist").glob("*.whl"), (WORK / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(WORK / "source", filter="data")
    [source] = (WORK / "source").iterdir()
    shutil.rmtree(source / "ebc_lab")  # the installed one is tested
    return wheel, source


def installed(row: Row, wheel: Path, log: Path) -> Path:
    """An environment with this row's torch, the wheel and its extras. -> its folder of commands"""
    run([row.python, "-m", "venv", row.folder], ROOT, log)
    bin = row.folder / "bin"
    pip = [bin / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    others = row.folder / "constraints.txt"
    others.write_text(re.sub(r"^torch==.*\n", "", constraints, flags=re.MULTILINE), encoding="utf-8")
    pinned = re.findall(r"^torch==.*$", constraints, flags=re.MULTILINE)
    index = ["--index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
    run([*map(str, pip), *index, "--upgrade", *(["torch"] if row.newest else pinned)], ROOT, log)
    run([*map(str, pip), "-c", others, f"{wheel}[dev]"], ROOT, log)
    return bin


def checked(bin: Path, row: Row, source: Path, log: Path) -> None:
    """Use and test the wheel in this row's environment. Raises Failed."""
    empty = row.folder / "empty"
    empty.mkdir()
    study = ["autopilot", "scale=smoke", "data=pydoc", "device=cpu", "study.name=first"]
    run([bin / "ebc-lab", *study], empty, log)
    run([bin / "ebc-lab", "verify", "first"], empty, log)
    tests = [test for test in TESTS if (source / test).exists()]
    ignored = [f"--ignore={path}" for path in IGNORED]
    run([bin / "python", "-m", "pytest", "-n", "2", "-m", LEFT_OUT, *ignored, *tests], source, log)


def main() -> int:
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    found = {}
    for python in os.environ.get("PYTHONS", PYTHONS).split():
        if version := version_of(python, "import sys, venv; print('%d.%d.%d' % sys.version_info[:3])"):
            found[python] = version
        else:
            print(f"{python} cannot be run here", flush=True)
    if not found:
        print("no Python was found: name one by PYTHONS=…")
        return 1
    wheel, source = built(WORK / "build.log")
    newest = max(found, key=lambda python: tuple(map(int, found[python].split("."))))
    rows = [Row(python, newest=False) for python in found] + [Row(newest, newest=True)]
    failed = 0
    for row in rows:
        start = time.perf_counter()
        torch: str | None = None
        problem: Failed | None = None
        log = WORK / f"{row.folder.name}.log"
        try:
            bin = installed(row, wheel, log)
            torch = version_of(bin / "python", "import torch; print(torch.__version__)")
            checked(bin, row, source, log)
        except Failed as error:
            problem = error
            failed += 1
        which = "newest" if row.newest else "constraints"
        verdict = f"{'FAILED' if problem else 'passed'} ({time.perf_counter() - start:.0f} s)"
        print(f"Python {found[row.python]:8} torch {torch or '–':14} of {which:12} {verdict}")
        print(problem or "", end="\n" if problem else "", flush=True)
        shutil.rmtree(row.folder, ignore_errors=True)
    if not failed:
        shutil.rmtree(WORK)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
