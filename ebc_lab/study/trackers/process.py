"""TensorBoard and MLflow, opt-in (docs/trackers.md): they show what a study's files hold, and can do no run
any harm.

A tracker is a process of its own, one for each name (`python -m ebc_lab.study.trackers.process`), which reads
the files that runs write anyway. They are its queue, so nothing is lost while it is slow or down; what it has
shown is noted in `.trackers/` beside them, so nothing is shown twice. Whoever drives the runs starts it, says
its first complaint, and at the end waits for it so long and no longer. The end of its standard input tells it
that nothing more will come, however the driver went.
"""

from __future__ import annotations

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
from typing import Any

from ebc_lab.config.errors import UserError
from ebc_lab.records.json_files import read_json, write_json
from ebc_lab.records.paths import RunFiles, StudyFiles
from ebc_lab.records.streams import read_columns

from .backends import PLACE, TRACKERS, Row, Run, Tracker

STEP_FIGURES = ("loss", "c", "applied_kl", "target_kl", "lr")  # columns of steps.csv
EVAL_FIGURES = ("val_loss",)  # … of evals.csv
SETTINGS = {  # name -> where it stands in a run's configuration
    "seed": ("seed",),
    "steps": ("steps",),
    "lr": ("optimizer", "lr"),
    "optimizer": ("optimizer", "name"),
    "projection": ("projection", "name"),
    "stabilizer": ("stabilizer", "name"),
    "budget": ("budget", "name"),
    "target_kl": ("budget", "target_kl"),
}
POLL_S, PATIENCE_S = 2.0, 60.0  # between two looks at the files; the longest such pause after failures


class Reader:
    """What of the runs in `root` has been shown, and what has not."""

    def __init__(self, root: Path, name: str, to: str):
        self.root, self.path = root, root / PLACE / f"{name}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state: Any = {}
        with suppress(OSError, UserError):
            state = read_json(self.path)
        known = isinstance(state, dict) and state.get("to") == to and isinstance(state.get("runs"), dict)
        self.state: dict[str, Any] = state if known else {"to": to, "runs": {}}
        self.settled: dict[Path, int] = {}  # result.json -> its time, of runs that are shown to their end

    def measuring(self) -> bool:
        """Whether a measurement of time is under way, beside which nothing else is to be done."""
        return any(
            run.progress.exists() and not run.result.exists()
            for run in StudyFiles(self.root).all_runs()
            if run.directory.name.startswith("overhead_")
        )

    def show(self, tracker: Tracker) -> None:
        """Show what is new, run by run."""
        single = RunFiles(self.root)
        for files in [single] if single.spec.exists() else StudyFiles(self.root).all_runs():
            self._show_run(files, tracker)

    def _show_run(self, files: RunFiles, tracker: Tracker) -> None:
        result_path = files.result
        ended = result_path.stat().st_mtime_ns if result_path.exists() else None
        if ended is not None and self.settled.get(result_path) == ended:
            return
        try:
            result = (
                read_json(result_path) if ended is not None else None
            )  # before the rows, which are whole then
            spec = read_json(files.spec)
        except (
            FileNotFoundError,
            UserError,
        ):  # a folder of something else, or a damaged file, which others complain of
            return
        run = Run(spec["run_id"], self.root.name, settings_of(spec))
        shown = {"step": -1, "eval": -1, "result": None, **self.state["runs"].get(run.run_id, {})}
        if spec["kind"] == "train" and (result is None or shown["result"] != result["checksum"]):
            rows = new_rows(files.steps, STEP_FIGURES, shown["step"])
            evals = new_rows(files.evals, EVAL_FIGURES, shown["eval"])
            if rows or evals:
                tracker.log(run, [*rows, *evals])
            shown["step"], shown["eval"] = (
                new[-1][0] if new else shown[k] for k, new in (("step", rows), ("eval", evals))
            )
            if result is not None:
                tracker.end(run, result["outcome"], figures_of(result))
                shown["result"] = result["checksum"]
            if rows or evals or result is not None:
                tracker.flush(run)
                self.state["runs"][run.run_id] = shown
                write_json(self.path, self.state, durable=False)
        if ended is not None:
            self.settled[result_path] = ended


def settings_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a run from the others."""
    out = {k: spec[k] for k in ("arm", "stage", "role", "lr_scale") if k in spec}
    for name, keys in SETTINGS.items():
        value: Any = spec["config"]
        for key in keys:
            value = value[key]
        out[name] = value
    if out["stabilizer"] != "ebc":
        del out["budget"], out["target_kl"]
    return out


def figures_of(result: Mapping[str, Any]) -> dict[str, float]:
    """A result's plain figures, `final/<name>`."""
    numbers = {k: v for k, v in result.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {f"final/{k}": float(v) for k, v in numbers.items()}


def new_rows(path: Path, columns: Sequence[str], after: int) -> list[Row]:
    """What a stream holds behind a step, where it was measured. A file that is not there holds nothing yet."""
    try:
        found = read_columns(path)
    except (FileNotFoundError, IndexError, ValueError):  # ValueError: its last line is being written
        return []
    rows = []
    for i, step in enumerate(found["step"]):
        if step > after:
            values = ((name, float(found[name][i])) for name in columns)
            rows.append((int(step), {name: x for name, x in values if math.isfinite(x)}))
    return rows


def follow(
    reader: Reader, connect: Callable[[], Tracker], over: threading.Event, say: Callable[[str], None]
) -> bool:
    """Show what comes until `over`, and then what is left. -> whether all of it was shown. Only the first
    failure is said."""
    tracker: Tracker | None = None
    pause, said = POLL_S, False
    while True:
        last, began = over.is_set(), time.monotonic()
        try:
            if last or not reader.measuring():
                tracker = tracker or connect()
                reader.show(tracker)
            pause = max(POLL_S, 10 * (time.monotonic() - began))
            if last:
                return True
        except Exception as error:
            tracker, pause = None, min(2 * pause, PATIENCE_S)
            what = re.sub(r"//[^/@\s]+@", "//…@", f"{type(error).__name__}: {error}")  # without a password
            print(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {what}", file=sys.stderr, flush=True)
            if not said:
                said = True
                say(what.splitlines()[0][:300])
            if last:
                return False
        over.wait(pause)


def main(about: Mapping[str, Any]) -> int:
    """One tracker's process, which `_Follower` starts. -> exit code."""
    over = threading.Event()

    def until_the_end() -> None:
        sys.stdin.read()
        over.set()
        time.sleep(about["wait_s"])
        os._exit(1)  # it hangs, and nobody may be left to stop it

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=until_the_end, daemon=True).start()
    with suppress(OSError):
        os.nice(10)
    folder, uri = Path(about["folder"]), about["uri"]

    def connect() -> Tracker:
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)  # where MLflow makes folders that nobody asked for
        return TRACKERS[about["name"]](folder, uri)

    def say(what: str) -> None:
        with suppress(OSError):  # the driver is gone
            print(f"warning: {what}", flush=True)

    reader = Reader(Path(about["root"]), about["name"], f"{folder} {uri or ''}")
    return 0 if follow(reader, connect, over, say) else 1


if __name__ == "__main__":
    code = main(json.loads(sys.stdin.readline()))
    sys.stdout.flush()
    os._exit(code)  # a tracker's own threads may hang
