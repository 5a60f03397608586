"""Every suite, whole, in a fresh clone of the last commit: `make proof`, or for some of them ARGS="slow ci".

Takes hours on two cores. What has passed on the commit is remembered in build/proof/COMMIT/passed.json, so a
call that was ended goes on where it was, and one that comes after them all prints the table of suites, what
passed and how long it took. make test-slow, the longest, is remembered folder by folder. Each suite's output
lies beside it. A failure does not keep the others from running. Once the clone is installed, two calls may
run side by side: Slurm's suites, which mostly wait, and others. Uncommitted changes are not in the clone, and
are said.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ebc_lab.config.machine import hardware

ROOT = Path(__file__).parent.parent
# in this order: what needs least first, and .ci/run, which needs the machine's Slurm for itself, alone
SUITES = {
    "install": "make .venv/installed-dev",
    "lint": "make lint",
    "test": "make test",
    "all": "make test-all",
    "autopilot": "make autopilot",
    "emulated": "make test-emulated",
    "browser": "make test-browser",
    "slurm": "make test-slurm",
    "nodes": "make test-nodes",
    "package": "make package",
    "matrix": "make test-matrix",
    "ci": "bash .ci/run",
}
# make hands what it was called with to every make below it
NOT_HANDED_ON = ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS", "ARGS")
SLOW = "slow"  # and after a slash the folder of tests
CLOSING = re.compile(r"\d+ (?:passed|failed|skipped).* in .*|SKIPPED: .*")  # how pytest and .ci/run close
NONE_HERE = "] Error 5"  # what make says last of pytest where a folder has no such tests


def git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=ROOT, check=True, text=True, capture_output=True
    ).stdout.strip()


def suites(clone: Path) -> dict[str, str]:
    """Every suite's command; of the slow tests one for each folder of them."""
    tests = clone / "tests"
    folders = [f for f in sorted(tests.iterdir()) if f.is_dir() and any(f.rglob("test_*.py"))]
    files = " ".join(str(f.relative_to(clone)) for f in sorted(tests.glob("test_*.py")))
    slow = {f"{SLOW}/{f.name}": f"make test-slow ARGS=tests/{f.name}" for f in folders}
    return SUITES | slow | {f"{SLOW}/rest": f"make test-slow ARGS='{files}'"}


def ran(name: str, command: str, clone: Path) -> dict[str, Any]:
    """What became of a suite: its exit code, minutes and closing lines."""
    log = clone.parent / f"{name.replace('/', '_')}.log"
    environment = {k: v for k, v in os.environ.items() if k not in NOT_HANDED_ON}
    begun = time.monotonic()
    with open(log, "w", encoding="utf-8") as out:
        code = subprocess.run(
            shlex.split(command), cwd=clone, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=environment
        ).returncode
    lines = log.read_text(errors="replace").splitlines()
    said = [found[0] for line in lines if (found := CLOSING.search(line))] or lines[-1:]
    if lines and lines[-1].endswith(NONE_HERE):
        code, said = 0, ["no such tests"]
    return {"command": command, "exit": code, "seconds": round(time.monotonic() - begun), "said": said}


def remembered(record: Path) -> dict[str, Any]:
    """What has run so far, by suite; by another call too."""
    results: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    return results


def table(passed: dict[str, Any]) -> str:
    rows = [
        f"| `{s['command']}` | {s['exit']} | {'; '.join(s['said'])} | {s['seconds'] / 60:.1f} min |"
        for s in passed.values()
    ]
    return "\n".join(["| command | exit code | it closed with | time |", "|---|---|---|---|", *rows])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)}, {SLOW}, {SLOW}/FOLDER"
    )
    asked = parser.parse_args().suites
    commit = git("rev-parse", "--short", "HEAD")
    if changed := git("status", "--porcelain"):
        print(f"not in the clone, for it is not committed:\n{changed}", file=sys.stderr)
    folder = ROOT / "build" / "proof" / commit
    clone, record = folder / "clone", folder / "passed.json"
    if not clone.exists():
        folder.mkdir(parents=True)
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    known = suites(clone)
    wanted = [name for name in known if not asked or {name, name.partition("/")[0]} & {*asked, "install"}]
    for name in wanted:
        if remembered(record).get(name, {}).get("exit") != 0:
            print(f"{time.strftime('%H:%M')} {known[name]}", flush=True)
            result = ran(name, known[name], clone)
            record.write_text(json.dumps(remembered(record) | {name: result}, indent=1))
    passed = {name: suite for name in known if (suite := remembered(record).get(name))}
    print(f"\n{commit}, {hardware()['cpu']}, {hardware()['cores']} cores\n\n{table(passed)}")
    return int(any(suite["exit"] for suite in passed.values()))


if __name__ == "__main__":
    sys.exit(main())
