"""The outlook of a study: one line on its first undecided stage, which becomes more certain as runs end.

The line applies the rule of that stage to the results known so far. It never claims that anything is decided.
Before the first result, it reports how far a run in progress has come, and the latest validation loss.

The process that drives the study computes the outlook whenever a run ends. It writes the outlook to a file,
together with the expected time left, so that other commands need not compute these again.
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
from ebc_lab.records.json_files import read_json, try_read, write_json
from ebc_lab.records.paths import StudyFiles

from .stages.rules import Undecidable
from .stages.runs import distinct
from .stages.stage import ResultsOf, planned_runs, stage_of

NOTHING = "nothing to compare yet"


@dataclass(frozen=True)
class SoFar:
    """The outlook on the open stage, `stage`: `done` of about `runs` training runs have a result."""

    stage: str
    said: list[str]
    done: int
    runs: int

    def line(self, running: Sequence[Mapping[str, Any]] = ()) -> str:
        """Return `Adam leads at lr 0.002, 0.0500 nats ahead of Muon at lr 0.008 (5 of about 22 runs)`, for
        example.

        `running`: a mapping for each run in progress. If it has a `val_loss`, it has `arm`, `at_step` and
        `steps`.
        """
        words = "; ".join(self.said) or NOTHING
        shown = next((r for r in running if r.get("val_loss") is not None), None)
        if shown and not self.said:
            arm, loss, step, steps = (shown[key] for key in ("arm", "val_loss", "at_step", "steps"))
            words += f"; {arm} had a validation loss of {loss:.3f} after {step} of {steps} steps"
        return f"{words} ({self.done} of about {self.runs} runs)"


class OutlookRecord(TypedDict):
    """The contents of .outlook.json."""

    driver: dict[str, Any]  # .driver.json of the process that wrote it
    written: float  # in seconds since the epoch
    left_s: float | None  # seconds still expected at `written`; None before a run has finished
    known: SoFar  # stored as a mapping


def open_stage(config: Config, decisions: Mapping[str, Decision]) -> str | None:
    """Return the first stage without a decision; None if every stage has one."""
    return next((s for s in config.study.stages if s not in decisions), None)


def so_far(
    config: Config,
    decisions: Mapping[str, Decision],
    results_of: ResultsOf,
    expected: Mapping[str, int] | None = None,
) -> SoFar | None:
    """Return the outlook on the first stage without a decision; None if every stage has a decision.

    `expected`: stage -> the number of training runs that the stage is likely to need.
    """
    stage = open_stage(config, decisions)
    if stage is None:
        return None
    specs, results = planned_runs(stage, config, decisions, results_of)
    training = [s for s in distinct(specs) if s.kind == "train"]
    done = sum(s.run_id in results for s in training)
    said: list[str] = []
    if done:
        with suppress(Undecidable):  # nothing can be said from these few results
            said = stage_of(stage).so_far(config, specs, results, decisions)
    runs = max(len(training), (expected or {}).get(stage, 0))
    return SoFar(stage, said, done, runs)


def leave_outlook(files: StudyFiles, known: SoFar, left_s: float | None) -> None:
    """Write `known` and the expected seconds left (None: unknown) to the outlook file, where other commands
    read them. A failure to write is ignored. Only the process that holds the study's lock may call this."""
    with suppress(OSError, UserError):
        driver = read_json(files.driver_file, dict[str, Any])
        about = {"driver": driver, "written": time.time(), "left_s": left_s, "known": asdict(known)}
        write_json(files.outlook_file, about, durable=False)


def outlook(files: StudyFiles, holder: Mapping[str, Any] | None) -> tuple[SoFar, float | None] | None:
    """Return the outlook and the expected seconds left (None: unknown), as last written by `holder`, the
    process that holds the study's lock. Return None if no process holds the lock, or `holder` has written no
    outlook."""
    about = try_read(files.outlook_file, OutlookRecord)
    if about is None or holder is None or about["driver"] != holder:
        return None
    left_s = about["left_s"]
    if left_s is not None:
        left_s = max(left_s - (time.time() - about["written"]), 1.0)
    return msgspec.convert(about["known"], SoFar), left_s
