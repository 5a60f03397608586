"""The process of one tracker (docs/running.md). It shows what a study's files contain, and cannot harm a
run. The driver starts it as `python -m ebc_lab.study.trackers.process`.

The process reads the files that runs write anyway. These files act as a queue, so nothing is lost while a
tracker is slow or down. `.trackers/` records what has been shown, so nothing is shown twice. Once standard
input ends, nothing more will come, however the driver ended. The process then has `tracker.wait_s` seconds to
show the rest.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict

from ebc_lab.config.dicts import flat
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import TrackerConfig
from ebc_lab.records.files import Stamp, stamp
from ebc_lab.records.json_files import read_json, try_read, write_json
from ebc_lab.records.paths import RunFiles, SpecRecord, StudyFiles
from ebc_lab.records.streams import read_columns

from .backends import FOLDER, TRACKERS, Row, Run, Tracker

STEP_FIGURES = ("loss", "c", "applied_kl", "target_kl", "lr")  # columns of steps.csv
SETTINGS = {  # name in trackers -> setting
    "seed": "seed",
    "steps": "steps",
    "lr": "optimizer.lr",
    "optimizer": "optimizer.name",
    "projection": "projection.name",
    "stabilizer": "stabilizer.name",
    "budget": "budget.name",
    "target_kl": "budget.target_kl",
}
POLL_S = 2.0  # between two checks of the files
MAX_PAUSE_S = 60.0  # the same, after repeated failures


class ShownRecord(TypedDict):
    """The content of .trackers/<tracker>.json: what has been shown of each run, and where."""

    to: str  # the tracker's folder and address
    runs: dict[str, dict[str, Any]]


class Reader:
    """A reader of the runs in `root` for one tracker, which records what has been shown. If `to`, the place
    where runs are shown, has changed since the last record, everything is shown again."""

    def __init__(self, root: Path, name: str, to: str):
        self.root = root
        self.path = root / FOLDER / f"{name}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        known: ShownRecord | None = try_read(self.path, ShownRecord)
        self.shown: ShownRecord = known if known and known["to"] == to else {"to": to, "runs": {}}
        self.complete: dict[Path, Stamp] = {}  # run's folder -> stamp of its result, once shown

    def measuring(self) -> bool:
        """Return whether a timing run, which must not be disturbed, is in progress."""
        runs = StudyFiles(self.root).all_runs()
        timed = (run for run in runs if run.directory.name.startswith("overhead_"))
        return any(run.progress.exists() and not run.result.exists() for run in timed)

    def show(self, tracker: Tracker) -> None:
        """Show what is new, run by run. Raises what the tracker raises."""
        single = RunFiles(self.root)
        for files in [single] if single.spec.exists() else StudyFiles(self.root).all_runs():
            ended = stamp(files.result)
            if ended is not None and self.complete.get(files.directory) == ended:
                continue
            try:  # first the result, because the rows are complete once it exists
                result = None if ended is None else read_json(files.result, dict[str, Any])
                spec = read_json(files.spec, SpecRecord)
            except (FileNotFoundError, UserError):  # no run, or a damaged file, which `verify` reports
                continue
            if spec["kind"] == "train":
                self._show_run(files, spec, result, tracker)
            if ended is not None:
                self.complete[files.directory] = ended

    def _show_run(
        self, files: RunFiles, spec: Mapping[str, Any], result: Mapping[str, Any] | None, tracker: Tracker
    ) -> None:
        settings = distinguishing_settings(spec)
        run = Run(files.directory, spec["run_id"], self.root.name, settings, spec["identity"])
        shown = {"step": -1, "eval": -1, "result": None, **self.shown["runs"].get(run.run_id, {})}
        if result is not None and shown["result"] == result["checksum"]:
            return
        rows: list[Row] = []
        streams = {"step": (files.steps, STEP_FIGURES), "eval": (files.evals, ("val_loss",))}
        for kind, (path, columns) in streams.items():
            news = new_rows(path, columns, shown[kind])
            shown[kind] = news[-1][0] if news else shown[kind]
            rows += news
        if not (rows or result):
            return
        tracker.log(run, rows)
        if result is not None:
            numbers = {k: v for k, v in result.items() if type(v) in (int, float)}
            tracker.end(run, result["outcome"], {f"final/{k}": float(v) for k, v in numbers.items()})
            shown["result"] = result["checksum"]
        self.shown["runs"][run.run_id] = shown
        write_json(self.path, self.shown, durable=False)


def distinguishing_settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return what distinguishes a run from the other runs of its study, by the name that trackers show: arm,
    stage, role, LR scale and those of SETTINGS that it reads."""
    out = {k: spec[k] for k in ("arm", "stage", "role", "lr_scale") if k in spec}
    config = flat(spec["config"])
    out |= {name: config[key] for name, key in SETTINGS.items()}
    if out["stabilizer"] != "ebc":
        del out["budget"], out["target_kl"]
    return out


def new_rows(path: Path, columns: Sequence[str], after: int) -> list[Row]:
    """Return the rows of a CSV file after the step `after`, or none if the file cannot be read yet."""
    try:
        table = read_columns(path)
    except (FileNotFoundError, UserError):  # UserError: its last line is being written
        return []
    rows = []
    for i, step in enumerate(table["step"]):
        if step > after:
            values = ((name, float(table[name][i])) for name in columns)
            rows.append((int(step), {name: x for name, x in values if math.isfinite(x)}))
    return rows


def follow(
    reader: Reader, connect: Callable[[], Tracker], over: threading.Event, warn: Callable[[str], None]
) -> bool:
    """Show what is new until `over` is set, then show the rest. Return whether everything was shown."""
    tracker: Tracker | None = None
    pause = POLL_S
    while True:
        last = over.is_set()
        began = time.monotonic()
        try:
            if last or not reader.measuring():
                tracker = tracker or connect()
                reader.show(tracker)
                if last:
                    tracker.close()
                    return True
            pause = max(POLL_S, 10 * (time.monotonic() - began))
        except Exception as error:
            if tracker is not None:
                with suppress(Exception):
                    tracker.close()
            tracker, pause = None, min(2 * pause, MAX_PAUSE_S)
            what = re.sub(r"//[^/@\s]+@", "//…@", f"{type(error).__name__}: {error}")  # without a password
            print(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {what}", file=sys.stderr, flush=True)
            warn(what.splitlines()[0][:300])
            if last:
                return False
        over.wait(pause)


def main(name: str, root: str, config: TrackerConfig) -> int:
    """Follow a study with one tracker until stdin ends. Return 0 if everything was shown, and otherwise 1."""
    over = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        over.set()
        time.sleep(config.wait_s)
        os._exit(1)  # it hangs, and there may be no driver to stop it

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=wait_for_the_end, daemon=True).start()
    with suppress(OSError):
        os.nice(10)

    @functools.cache  # prints each line once
    def say(line: str) -> None:
        with suppress(OSError):  # the driver is gone
            print(line, flush=True)

    assert config.folder is not None
    folder = Path(config.folder)

    def connect() -> Tracker:
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)  # where MLflow creates folders of its own
        return TRACKERS[name](folder, config, lambda text: say(f"note: {text}"))

    address = " ".join(filter(None, (getattr(config, key) for key in TRACKERS[name].settings)))
    reader = Reader(Path(root), name, f"{folder} {address}")
    return 0 if follow(reader, connect, over, lambda what: say(f"warning: {what}")) else 1


if __name__ == "__main__":
    about = json.loads(sys.stdin.readline())
    code = main(about["name"], about["root"], TrackerConfig(**about["config"]))
    sys.stdout.flush()
    os._exit(code)  # a tracker's own threads may hang
