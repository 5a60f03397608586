"""Was what a study said early right in the end? The records of a study, replayed in order of time.

usage: python scripts/early_lines.py STUDY_FOLDER [--minutes 1]

Whenever a run has ended the line is made from the results that were there by then, by the same functions as
the one that the terminal showed. A line is right if all that it says of who leads, or of the sign of a
difference, is what the stage says with all of its results. One that leaves it open (a single run, runs that
are not told apart, an interval around 0) is marked `open` and counted apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ebc_lab.config.errors import clock
from ebc_lab.config.identity import recorded_environment
from ebc_lab.records.decisions import Decision
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec
from ebc_lab.study.inspect.forecast import forecast, training_runs
from ebc_lab.study.so_far import SoFar, so_far
from ebc_lab.study.stages.stage import Said, planned_runs, stage_of
from ebc_lab.study.store import attempts
from ebc_lab.study.store.snapshot import Snapshot, read
from ebc_lab.study.store.study import Study


@dataclass
class Moment:
    """What was known `at` so many seconds after the first run began; `right`: None where nothing was said."""

    at: float
    known: SoFar
    right: bool | None = None


def ends(snapshot: Snapshot) -> dict[str, float]:
    """When each run with a result ended, seconds after the first one began; one taken from another study was
    there from the start."""
    spans = {r.run_id: attempts.spans(snapshot.study.run_dir(r.run_id)) for r in snapshot.records if r.result}
    first = min(span.begin for of_run in spans.values() for span in of_run)
    return {run_id: of_run[-1].end - first if of_run else 0.0 for run_id, of_run in spans.items()}


def moments(snapshot: Snapshot) -> Iterator[Moment]:
    """Yield what was known whenever a run had ended, in order of time."""
    ended = ends(snapshot)
    decisions: dict[str, Decision] = {}
    there: set[str] = set()

    def known(specs: list[RunSpec]) -> dict[str, RunResult]:
        return {run_id: r for run_id, r in snapshot.results_of(specs).items() if run_id in there}

    for run_id, at in sorted(ended.items(), key=lambda item: item[1]):
        there.add(run_id)
        while (early := so_far(snapshot.config, decisions, known)) is not None:
            stage = early.stage
            specs, results = planned_runs(stage, snapshot.config, decisions, known)
            if any(s.run_id not in results for s in specs):
                break
            yield Moment(at, early)  # the stage's last word before it is decided
            decisions[stage] = stage_of(stage).decide(snapshot.config, specs, results, decisions)
        if early is None:
            return
        expected = training_runs(forecast(snapshot.config, ("expected",), known)["expected"])
        if now := so_far(snapshot.config, decisions, known, expected):
            yield Moment(at, now)


def new(told: Iterator[Moment]) -> Iterator[Moment]:
    """Leave out what repeats the words before."""
    before: list[Said] = []
    for moment in told:
        if moment.known.said and moment.known.said != before:
            before = moment.known.said
            yield moment


def judged(told: list[Moment]) -> list[Moment]:
    """Compare each line with the last that its stage said of the same things; what is open at the end
    contradicts nothing."""
    last: dict[tuple[str, str], str] = {}
    for moment in told:
        last |= {(moment.known.stage, said.claim): said.holds for said in moment.known.said}
    for moment in told:
        claimed = [said for said in moment.known.said if said.holds]
        kept = [last[moment.known.stage, said.claim] in (said.holds, "") for said in claimed]
        moment.right = all(kept) if kept else None
    return told


def in_words(told: list[Moment]) -> str:
    """Return `9 of 11 lines that claimed something were right in the end, 4 left it open`."""
    claimed = [m.right for m in told if m.right is not None]
    lines = f"{sum(claimed)} of {len(claimed)} lines that claimed something were right in the end"
    return f"{lines}, {len(told) - len(claimed)} left it open"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long 'early' is")
    asked = parser.parse_args()
    snapshot = read(Study(asked.study))
    with recorded_environment(snapshot.header["environment"]):
        told = judged(list(new(moments(snapshot))))
    marks = {True: "right", False: "wrong", None: "open"}
    for moment in told:
        line = moment.known.line()
        print(f"[{clock(moment.at):>12}] {marks[moment.right]:>5}  {moment.known.stage}: {line}")
    for stage in dict.fromkeys(m.known.stage for m in told):
        print(f"{stage}: {in_words([m for m in told if m.known.stage == stage])}")
    early = [m for m in told if m.at <= 60 * asked.minutes]
    print(f"the first {asked.minutes:g} min: {in_words(early)}")


if __name__ == "__main__":
    main()
