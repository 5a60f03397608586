"""Files of other people, changed at random: each is read right, or refused by one sentence.

    python -m dev.fuzz TARGET [--minutes 5] [--seed 0] [--keep fuzz/TARGET] [--more FOLDER] [--again FILE]

Targets: `judge` (all that `ebc-lab judge` reads, and its pandas frames), `bundles` (studies as .zip),
`checkpoints` (states, weights and packed tensors) and `suites` (YAML files, Python files and overrides).
Real inputs are made once, in KEEP/real.pickle: runs in the formats of the tests, a small study that is
trained, the recorded studies. `--more`: a folder with further files for `judge`.

An input is one of those, changed: in its values where its format has some (JSON, tables, protocol buffers,
SQL, tensors), with checksums that fit again, so that what comes behind them is met; else in its bytes. What
is changed and how is read from a string of bytes. Where `atheris` is installed, it changes these bytes
towards lines of ebc_lab that were not reached before; otherwise they are random.

Failures: another exception than the program's own, an exit code above 2, no sentence, a control character or
markup of the input in what is printed or written, a warning of Python's, a file outside the folder, SECONDS
of processor time, GIB of memory, a process that dies. Each is kept in KEEP/NUMBER (the files, `how.json`), at
most KEPT of each place that raises; `--again KEEP/NUMBER/how.json` repeats one. The last lines are a table.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .bundles import Bundles
from .changes import Draw
from .checkpoints import Checkpoints
from .judge import Judge
from .suites import Suites
from .target import READ, REFUSED, ROOT, Overdue, Target, Wrong

sys.path.insert(0, str(ROOT / "tests"))
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "COLUMNS": "100", "NO_COLOR": "1"}

SECONDS = 30  # of processor time for one input
WALL = 300  # seconds after which a process that answers nothing is ended
GIB = 3  # of memory that an input may ask for
KEPT = 4

TARGETS: dict[str, type[Target]] = {
    "judge": Judge,
    "bundles": Bundles,
    "checkpoints": Checkpoints,
    "suites": Suites,
}

# -- one process that tries ----------------------------------------------------------------------------------


def overdue(number: int, frame: Any) -> None:
    raise Overdue


def shortest(error: BaseException) -> tuple[str, str]:
    """Where an error was raised, the innermost line of ours; and what it says."""
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "/ebc_lab/" in f.filename]
    if isinstance(error, Wrong):
        return " ".join(str(error).split()[:6]), str(error)
    inner = ours[-1] if ours else traceback.extract_tb(error.__traceback__)[-1]
    place = inner.filename.rpartition("/ebc_lab/")[2] or inner.filename
    return (
        f"{place}:{inner.name} {type(error).__name__}",
        f"{place}:{inner.lineno} {type(error).__name__}: {error}"[:400],
    )


class Trying:
    """A process that tries inputs until its time is over, and notes what became of each."""

    def __init__(self, name: str, keep: Path):
        self.target = TARGETS[name]()
        self.keep = keep
        with open(keep / "real.pickle", "rb") as file:
            self.target.begin(pickle.load(file))
        self.outer = Path(tempfile.mkdtemp(prefix="fuzz-"))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (GIB << 30), resource.RLIM_INFINITY))
        signal.signal(signal.SIGPROF, overdue)

    def one(self, data: bytes) -> None:
        """Try the input that these bytes make, and note the outcome."""
        (self.keep / "current").write_bytes(data)
        place = self.outer / "sandbox" / "in"
        shutil.rmtree(self.outer, ignore_errors=True)
        place.mkdir(parents=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            try:
                outcome = self.target.attack(Draw(data), place)
                if outside := [
                    p.name
                    for p in (self.outer, place.parent)
                    for p in p.iterdir()
                    if p.name not in ("sandbox", "in")
                ]:
                    raise Wrong(f"{outside[0]} was written outside the folder")
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            outcome = note_failure(self.keep, data, place, *shortest(error), traceback.format_exc())
        with open(self.keep / "outcomes", "a") as file:
            file.write(f"{outcome}\n")


def note_failure(keep: Path, data: bytes, place: Path | None, group: str, line: str, whole: str) -> str:
    known = [json.loads(path.read_text())["group"] for path in keep.glob("*/how.json")]
    if known.count(group) < KEPT:
        number = 1 + max([int(path.name) for path in keep.iterdir() if path.name.isdigit()], default=0)
        folder = keep / f"{number:04}"
        if place is not None:
            shutil.copytree(place, folder / "in", symlinks=True)
        folder.mkdir(exist_ok=True)
        how = {"group": group, "line": line, "data": data.hex(), "traceback": whole}
        (folder / "how.json").write_text(json.dumps(how, indent=1))
    return f"FAILURE {group}"


def try_until(name: str, keep: Path, seed: int, until: float) -> None:
    """Try inputs until `until`, towards new lines where atheris is there."""
    from support.composed import conf_read_once

    conf_read_once().__enter__()  # for good: most of a composition is the reading of files that stay
    try:
        import atheris
    except ImportError:
        atheris = None
    if atheris is None:
        trying, draw = Trying(name, keep), random.Random(seed)
        while time.time() < until:
            trying.one(draw.randbytes(64))
        return
    with atheris.instrument_imports(include=["ebc_lab"]):  # not left: much is imported where it is used
        trying = Trying(name, keep)

        def one(data: bytes) -> None:
            if time.time() > until:
                os._exit(0)
            trying.one(data)

        corpus = keep / "reached"
        corpus.mkdir(exist_ok=True)
        draw = random.Random(seed)
        if not any(corpus.iterdir()):
            for number in range(64):
                (corpus / f"first{number}").write_bytes(draw.randbytes(64))
        limits = [
            "-timeout=1000000",
            "-rss_limit_mb=0",
            "-max_len=256",
            "-detect_leaks=0",
            f"-seed={seed + 1}",
        ]
        atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={keep}/", str(corpus)], one)
        atheris.Fuzz()


# -- the process that watches --------------------------------------------------------------------------------


def watch(name: str, keep: Path, seed: int, minutes: float) -> None:
    """Keep a process that tries; another one follows one that dies or hangs, which is a failure itself."""
    until, started = time.time() + 60 * minutes, 0
    current = keep / "current"
    while time.time() < until - 5:
        given = ["--try-until", str(until), "--seed", str(seed + 1000 * started), "--keep", str(keep)]
        started += 1
        current.unlink(missing_ok=True)
        with open(keep / "log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dev.fuzz", name, *given], cwd=ROOT, stdout=log, stderr=log
            )
        begun = time.time()
        while process.poll() is None:
            time.sleep(1)
            since = max(begun, current.stat().st_mtime if current.exists() else 0)
            if time.time() - since > WALL:
                process.kill()
                process.wait()
                break
        if process.returncode and current.exists():
            how = (
                "nothing for minutes"
                if process.returncode == -signal.SIGKILL
                else f"died, {process.returncode}"
            )
            data = current.read_bytes()
            end = (keep / "log").read_bytes()[-3000:].decode("utf-8", "replace")
            outcome = note_failure(keep, data, None, f"process {how}", how, end)
            with open(keep / "outcomes", "a") as file:
                file.write(f"{outcome}\n")
        elif process.returncode:
            raise SystemExit(
                f"it does not begin: {(keep / 'log').read_bytes()[-2000:].decode('utf-8', 'replace')}"
            )


def table(keep: Path) -> Iterator[str]:
    outcomes = (
        Counter((keep / "outcomes").read_text().splitlines()) if (keep / "outcomes").exists() else Counter()
    )
    failures = {k: n for k, n in outcomes.items() if k.startswith("FAILURE")}
    yield f"| inputs | {READ} | {REFUSED} | failures | their places |"
    yield "|---|---|---|---|---|"
    counts = (outcomes.total(), outcomes[READ], outcomes[REFUSED], sum(failures.values()), len(failures))
    yield f"| {' | '.join(map(str, counts))} |"
    for group, count in sorted(failures.items(), key=lambda pair: -pair[1]):
        yield f"{count:6} {group}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder of what failed")
    parser.add_argument("--more", type=Path, help="folder of further files for `judge`")
    parser.add_argument("--again", type=Path, help="a how.json: repeat this one, with its traceback")
    parser.add_argument("--try-until", type=float, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    keep = (asked.keep or Path("fuzz") / asked.target).resolve()
    keep.mkdir(parents=True, exist_ok=True)
    os.environ |= {f"XDG_{kind}_HOME": str(keep / kind.lower()) for kind in ("CACHE", "STATE")}
    os.environ["EBC_LAB_LOWBIT_CACHE"] = str(keep / "cache")
    if asked.try_until:
        return try_until(asked.target, keep, asked.seed, asked.try_until)
    if not (keep / "real.pickle").exists():
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            real = TARGETS[asked.target]().make(Path(folder), asked.more)
        (keep / "real.pickle").write_bytes(pickle.dumps(real))
    if asked.again:
        target = TARGETS[asked.target]()
        target.begin(pickle.loads((keep / "real.pickle").read_bytes()))
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            print(
                target.attack(Draw(bytes.fromhex(json.loads(asked.again.read_text())["data"])), Path(folder))
            )
        return None
    watch(asked.target, keep, asked.seed, asked.minutes)
    print("\n".join(table(keep)))
    return None


if __name__ == "__main__":
    main()
