"""What can be said of a study before it is decided: one line that gets better as its runs end.

It is about the stage that is open, in the words of that stage's own rule applied to the results that are
there, and never says that anything is decided. Before there is a result it says how far the runs in progress
have come, and what they were last evaluated at.

The driver of a study works it out whenever a run ends, and leaves it with what it expects still, so that
whoever asks need not do so again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

import msgspec

from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import Config
from ebc_lab.records.decisions import Decision
from ebc_lab.records.json_files import read_json, write_json
from ebc_lab.records.paths import StudyFiles

from .stages.rules import Undecidable
from .stages.runs import distinct
from .stages.stage import ResultsOf, planned_runs, stage_of

NOTHING = "nothing to compare yet"


@dataclass(frozen=True)
class SoFar:
    """What is known of the stage that is open: `done` of about `runs` of its training runs are there."""

    stage: str
    said: list[str]
    done: int
    runs: int

    def line(self, running: Sequence[Mapping[str, Any]] = ()) -> str:
        """Return `Adam leads at lr 0.002, 0.0500 nats ahead of Muon at lr 0.008 (5 of about 22 runs)`.

        `running`: what is known of each run in progress, by `arm`, `step`, `steps` and `val_loss`.
        """
        words = "; ".join(self.said) or NOTHING
        shown = next((r for r in running if r.get("val_loss") is not None), None)
        if shown and not self.said:
            arm, loss, step, steps = (shown[key] for key in ("arm", "val_loss", "at_step", "steps"))
            words += f"; {arm} had a validation loss of {loss:.3f} after {step} of {steps} steps"
        return f"{words} ({self.done} of about {self.runs} runs)"


class OutlookRecord(TypedDict):
    """What .outlook.json holds."""

    driver: dict[str, Any]  # .driver.json of the process that wrote it
    written: float  # seconds since the epoch
    left_s: float | None  # from then on; None before a run has finished
    known: SoFar  # as a mapping


def open_stage(config: Config, decisions: Mapping[str, Decision]) -> str | None:
    """Return the first stage without a decision; None where all are decided."""
    return next((s for s in config.study.stages if s not in decisions), None)


def so_far(
    config: Config,
    decisions: Mapping[str, Decision],
    results_of: ResultsOf,
    expected: Mapping[str, int] | None = None,
) -> SoFar | None:
    """Return what is known of the first stage without a decision; None where all are decided.

    `expected`: stage -> the training runs that it is likely to make.
    """
    stage = open_stage(config, decisions)
    if stage is None:
        return None
    specs, results = planned_runs(stage, config, decisions, results_of)
    training = [s for s in distinct(specs) if s.kind == "train"]
    done = sum(s.run_id in results for s in training)
    said: list[str] = []
    if done:
        with suppress(Undecidable):  # not from these results yet
            said = stage_of(stage).so_far(config, specs, results, decisions)
    runs = max(len(training), (expected or {}).get(stage, 0))
    return SoFar(stage, said, done, runs)


def leave_outlook(files: StudyFiles, known: SoFar, left_s: float | None) -> None:
    """Leave what the driver of a study knows for whoever asks, where that can be written: for the process
    that holds the study's lock."""
    with suppress(OSError, UserError):
        driver = read_json(files.driver_file, dict[str, Any])
        about = {"driver": driver, "written": time.time(), "left_s": left_s, "known": asdict(known)}
        write_json(files.outlook_file, about, durable=False)


def outlook(files: StudyFiles, holder: Mapping[str, Any] | None) -> tuple[SoFar, float | None] | None:
    """Return what the process that holds the study's lock has left there, with the seconds from now on; None
    where it has said nothing yet, or nobody holds it."""
    try:
        about = read_json(files.outlook_file, OutlookRecord)
    except (OSError, UserError):
        return None
    if holder is None or about["driver"] != holder:
        return None
    left_s = about["left_s"]
    if left_s is not None:
        left_s = max(left_s - (time.time() - about["written"]), 1.0)
    return msgspec.convert(about["known"], SoFar), left_s
