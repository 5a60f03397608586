"""What reading costs on studies of thousands of runs: processor seconds of commands and of their parts.

usage: python dev/studies/engine_speed.py FOLDER [RUNS]    a study of 20,000 runs, made there; and units.zip

The study is made of copies of a few trained runs (many.py). It stays in FOLDER for the next
call, and so does docs/evidence/units.zip, rebuilt. PYTHONPATH says which checkout is measured: to compare
two, call the script with each in turns, with a FOLDER for each. Each command runs in a process of its own,
and the best of three calls counts. `cold` is without the index of runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ebc_lab
from ebc_lab.study.store.study import Study

ROOT = Path(ebc_lab.__file__).parent.parent
CLI = [sys.executable, "-c", "from ebc_lab.cli import main; main()"]
TRIES = 3
MEASURE = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(process.pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""


def measured(command: Sequence[str]) -> tuple[float, float]:
    """Return processor seconds and megabytes of a command. Ends the script where the command fails."""
    call = [sys.executable, "-c", MEASURE, *CLI, *command]
    code, seconds, megabytes = json.loads(subprocess.run(call, capture_output=True, check=True).stdout)
    if code:
        sys.exit(f"{' '.join(command)} ended with exit code {code}.")
    return seconds, megabytes


def best(command: Sequence[str], study: Study, *, cold: bool = False) -> str:
    """Return the least processor seconds and megabytes of a few calls of a command, in words."""
    found = []
    for _ in range(TRIES):
        if cold:
            study.index_file.unlink(missing_ok=True)
        found.append(measured(command))
    seconds, megabytes = min(found)
    return f"{seconds:.2f} s, {megabytes:.0f} MB"


def microseconds(ask: Callable[[str], Any], run_ids: Sequence[str]) -> float:
    """Return the processor time that a question takes for each run, in microseconds: the best of a few."""
    times = []
    for _ in range(TRIES):
        began = time.process_time()
        for run_id in run_ids:
            ask(run_id)
        times.append(time.process_time() - began)
    return min(times) / len(run_ids) * 1e6


def made(folder: Path, runs: int) -> Study:
    """Return the study of copied runs in a folder, made first where it is not there."""
    study = Study(folder / "out" / f"many{runs}")
    if not study.manifest_file.exists():
        import many

        many.made(folder, runs, study.root.name)
    return study


def rebuilt(folder: Path) -> Study:
    """Return the study of units.zip in a folder, unpacked and rebuilt first where it is not there."""
    study = Study(folder / "units")
    if not study.manifest_file.exists():
        bundle = ROOT / "docs" / "evidence" / "units.zip"
        subprocess.run([*CLI, "report", str(bundle), "--output", str(study.root)], check=True)
    return study


def main(folder: Path, runs: int) -> None:
    """Print the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    units, many = rebuilt(folder), made(folder, runs)
    print(f"{ROOT}\n\na process that does nothing: {best(['--help'], units)}")
    for study in (units, many):
        run_ids = study.run_ids()
        print(f"\n{len(run_ids):,} runs")
        for name in ("spec", "result", "record"):
            print(f"{name}, each run: {microseconds(getattr(study, name), run_ids[:4000]):.0f} µs")
        for name in ("status", "why"):
            command = [name, str(study.root)]
            print(f"{name}, cold: {best(command, study, cold=True)}")
            print(f"{name}, warm: {best(command, study)}")
    bundle = folder / "exported.zip"
    print(f"verify: {best(['verify', str(many.root)], many)}")
    print(f"export: {best(['export', str(many.root), '--output', str(bundle)], many)}")
    bundle.unlink()


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20_000)
