"""What commands cost on studies of thousands of runs: processor seconds and memory, and how both grow.

    python dev/studies/scale_figures.py FOLDER [RUNS…]        studies of 1,000, 5,000 and 20,000 runs
    python dev/studies/scale_figures.py FOLDER --idle RUNS    what a driver takes for runs that train nothing
    python dev/studies/scale_figures.py FOLDER --driven RUNS  the same of a whole study, of copied runs
    python dev/studies/scale_figures.py FOLDER --studies N    `plan` in an output folder of N other studies

The studies are made of copies of a few trained runs (many.py) and stay in FOLDER for the next
call. Each command runs in a process of its own: `cold` without the index of results, `warm` with it. The
exponent is that of the last two sizes: seconds ~ runs ** exponent, start-up left out.
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import many  # noqa: E402
import support.idle  # noqa: E402, F401 - its workers know runs that train nothing

from ebc_lab.records.json_files import write_json  # noqa: E402
from ebc_lab.records.locks import study_lock  # noqa: E402
from ebc_lab.report.conclude import concluding  # noqa: E402
from ebc_lab.study.autopilot import autopilot  # noqa: E402
from ebc_lab.study.inspect.forecast import expected_left  # noqa: E402
from ebc_lab.study.launch.local import LocalPool  # noqa: E402
from ebc_lab.study.resolve import resolve_study  # noqa: E402
from ebc_lab.study.so_far import SoFar, leave_outlook  # noqa: E402
from ebc_lab.study.store.study import Study  # noqa: E402

CLI = [sys.executable, "-c", "from ebc_lab.cli import main; main()"]
SIZES = (1000, 5000, 20_000)


@dataclass(frozen=True)
class Cost:
    """Of one process: seconds of processor time, and the most memory that it held."""

    seconds: float
    megabytes: float


# a small process between: what a process held before it began another program counts as that one's memory
MEASURE = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(process.pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""


def cost_of(command: Sequence[str]) -> Cost:
    """Run a command to its end."""
    measured = [sys.executable, "-c", MEASURE, *CLI, *command]
    done = subprocess.run(measured, capture_output=True, text=True, check=True)
    code, seconds, megabytes = json.loads(done.stdout)
    if code:
        sys.exit(f"{' '.join(command)} ended with exit code {code}: {done.stderr}")
    return Cost(seconds, megabytes)


@contextmanager
def under_way(study: Study) -> Iterator[None]:
    """Have a study as it is while its last stage is open: held, its driver's outlook there, and one of its
    runs just changed."""
    recorded = study.decisions_file.read_bytes()
    *earlier, last = study.decisions().items()
    with study_lock(study):
        write_json(study.decisions_file, dict(earlier))
        leave_outlook(study, SoFar(last[0], [], 0, 1), 60.0)
        study.run_files(study.run_ids()[-1]).attempts.touch()
        try:
            yield
        finally:
            study.decisions_file.write_bytes(recorded)


def of_study(folder: Path, runs: int) -> dict[str, Cost]:
    """Return what each command costs on a study of so many runs, made first where it is not there."""
    study = Study(folder / "out" / f"many{runs}")
    if not study.manifest_file.exists():
        many.made(folder, runs, study.root.name)
    place = str(study.root)
    found: dict[str, Cost] = {}
    for name, command in {
        "status": ["status", place],
        "why": ["why", place],
    }.items():
        study.index_file.unlink(missing_ok=True)
        found[f"{name}, cold"] = cost_of(command)
        found[f"{name}, warm"] = cost_of(command)
    with under_way(study):
        found["status, running"] = cost_of(["status", place])
    found["verify"] = cost_of(["verify", place])
    bundle = folder / "bundle.zip"
    found["export"] = cost_of(["export", place, "--output", str(bundle)])
    bundle.unlink()
    found["diff"] = cost_of(["diff", place, place])
    return found


def exponent(low: Cost, high: Cost, start: Cost, ratio: float) -> float:
    """Return by which power of the runs the seconds grow between two sizes."""
    least = 1e-3
    return math.log(
        max(high.seconds - start.seconds, least) / max(low.seconds - start.seconds, least)
    ) / math.log(ratio)


def commands(folder: Path, sizes: Sequence[int]) -> None:
    """Print the table of commands."""
    found = {runs: of_study(folder, runs) for runs in sizes}
    start = cost_of(["--help"])
    print(f"a process that does nothing: {start.seconds:.2f} s, {start.megabytes:.0f} MB")
    print("| command |" + "".join(f" {runs:,} |" for runs in sizes) + " exponent | MB |")
    print("|---" * (len(sizes) + 3) + "|")
    for name in found[sizes[0]]:
        costs = [found[runs][name] for runs in sizes]
        row = "".join(f" {cost.seconds:.2f} |" for cost in costs)
        grows = exponent(costs[-2], costs[-1], start, sizes[-1] / sizes[-2]) if len(sizes) > 1 else math.nan
        print(f"| {name} |{row} {grows:.2f} | {' / '.join(f'{cost.megabytes:.0f}' for cost in costs)} |")


def idle(folder: Path, runs: int) -> None:
    """Print what a driver takes for each of `runs` runs that train nothing, its workers left out."""
    shutil.rmtree(folder / "out" / "idle", ignore_errors=True)
    study = Study(folder / "out" / "idle")
    study.prepare()
    with many.hurried():
        config, _ = resolve_study(many.config_of(folder, 4, "idle", seeds=1), study, print, force=False)
        specs = many.idle_specs(study, config, runs)
    launcher = replace(config.launcher, name="local", slots=2)
    pool = LocalPool(replace(config, launcher=launcher), study, [], 2, print)
    began, wall = time.process_time(), time.monotonic()
    try:
        pool.run(specs, [], lambda done, busy: None, canary=False)
    finally:
        cpu, wall = time.process_time() - began, time.monotonic() - wall
        pool.close()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{runs:,} idle runs in {wall:.0f} s: {1e3 * cpu / runs:.2f} ms of the driver a run, {most:.0f} MB")


def driven(folder: Path, runs: int) -> None:
    """Print what a driver takes for a whole study: plan, watch, decide, conclude; runs are copied by its
    workers, and no pictures are drawn."""
    source = many.trained(folder)
    alone = folder / "alone"  # without neighbours to take runs from
    shutil.rmtree(alone, ignore_errors=True)
    config = many.config_of(folder, runs, "driven")
    launcher = replace(config.launcher, name="local", slots=2)
    config = replace(config, output_dir=str(alone), launcher=launcher)
    listener = replace(concluding(), expect=expected_left)
    began, wall = time.process_time(), time.monotonic()
    with many.copying_workers(folder, source), mock.patch("ebc_lab.report.conclude._draw"):
        done = autopilot(config, listener)
    cpu, wall = time.process_time() - began, time.monotonic() - wall
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    each = 1e3 * cpu / done.trained
    print(f"{done.trained:,} runs in {wall:.0f} s: {each:.2f} ms of the driver a run, {most:.0f} MB")


def studies(folder: Path, count: int) -> None:
    """Print what `plan` costs beside `count` other studies, all of the same small one."""
    source = many.trained(folder).root
    out = folder / f"beside{count}"
    for i in range(count):
        if not (out / f"other{i:03d}").exists():
            shutil.copytree(source, out / f"other{i:03d}")
    command = ["plan", "scale=smoke", "study.name=mine", "device=cpu", f"output_dir={out}"]
    cost = min((cost_of(command) for _ in range(3)), key=lambda cost: cost.seconds)
    print(f"plan beside {count} studies: {cost.seconds:.2f} s, {cost.megabytes:.0f} MB")


def main(folder: Path, arguments: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if arguments[:1] == ["--idle"]:
        idle(folder, int(arguments[1]))
    elif arguments[:1] == ["--driven"]:
        driven(folder, int(arguments[1]))
    elif arguments[:1] == ["--studies"]:
        studies(folder, int(arguments[1]))
    else:
        commands(folder, [int(size) for size in arguments] or SIZES)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
