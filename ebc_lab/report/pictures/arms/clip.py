"""What EBC's clip did over the run: every arm's coefficient, and its KL over the target."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from ebc_lab.records.figures import KL_BAND

from ...text.words import capital, optimizer
from ..drawing.curves import Line, Run, applied_c, audited, by_step, smooth_line, window
from ..drawing.looks import FAINT, GOAL, GREY, REST
from ..drawing.sheet import MOST_LINES, Arms, Facts, Sheet, entry, lines, log_axis, name_band, over_steps

HIGHLIGHTED = 6  # of more lines
LEAST_RATIO = 0.01  # the log axis of KL / δ* ends there: what lies further off leaves the frame


@dataclass(frozen=True)
class Course:
    """An EBC arm over the run: its clip coefficient, and its applied KL over the target."""

    c: Line
    ratio: Line  # geometric means
    early: float | None  # c near the start and near the end of the run, mean of the completed seeds
    late: float | None
    clipped_ratio: float | None  # median KL / δ* where it was clipped, likewise

    @property
    def drift(self) -> float:
        """Return how far c moved: |log(late / early)|, 0 where it was not measured."""
        return abs(math.log(self.late / self.early)) if self.early and self.late else 0.0

    @property
    def distance(self) -> float:
        """Return how far the applied KL lies from its target: |log(KL / δ*)|, 0 where it was not measured."""
        return abs(math.log(self.clipped_ratio)) if self.clipped_ratio else 0.0

    @property
    def c_in_words(self) -> str:
        return "" if self.early is None or self.late is None else f"c {self.early:.2g} → {self.late:.2g}"

    @property
    def ratio_in_words(self) -> str:
        if self.clipped_ratio is None:
            return "never clipped at an audit"
        return f"KL / δ* {self.clipped_ratio:.2f} where clipped"


def course_of(runs: Sequence[Run]) -> Course | None:
    """Return the course of an arm with EBC; None where no run recorded its steps."""
    if not any(run.steps for run in runs):
        return None
    streams = [audited(run.steps) for run in runs]
    audits, applied = by_step(streams, "applied_kl")
    targets = np.ma.masked_less_equal(by_step(streams, "target_kl")[1], 0.0)
    c, ratio = smooth_line(*applied_c(runs)), smooth_line(audits, applied / targets, log=True)
    return Course(c, ratio, *(_mean(runs, key) for key in ("c_early", "c_late", "kl_ratio_median")))


def _mean(runs: Sequence[Run], key: str) -> float | None:
    done = [run.result for run in runs if run.outcome == "completed"]
    values = [float(result[key]) for result in done if result.get(key) is not None]
    return fmean(values) if values else None


def draw_steps(facts: Facts, track: str, arms: Arms, courses: Mapping[str, Course]) -> Sheet:
    """Draw the clip coefficient above, the applied KL over its target below, a line for every EBC arm."""
    named = _named(courses)
    last = max((float(c.c.steps[-1]) for c in courses.values() if len(c.c.steps)), default=0.0)
    sheet = Sheet(
        facts,
        "What did the clip do over the run?",
        (
            f"{optimizer(track)}: every arm with EBC ({len(courses)}), medians over the seeds",
            _farthest(courses),
        ),
        (
            "c: median near the start → near the end of the run",
            "where nothing is clipped the KL lies below its target by right",
            f"running means: of c over {window(round(last) + 1)} steps, of the KL over 3 audits",
        ),
        arms=arms,
        grid=("a", "b"),
        heights=(2.7, 3.1),
    )
    top, bottom = sheet.panels
    over_steps(facts, sheet.panels, last)
    top.set(ylabel="clip coefficient c", ylim=(-0.02, 1.06))
    bottom.set_ylabel("applied KL / target δ* (log scale)")
    log_axis(bottom, "y")
    bottom.axhline(1.0, color=GOAL, lw=1.2, ls="--", zorder=1)
    bottom.axhspan(1 - KL_BAND, 1 + KL_BAND, color=GOAL, alpha=0.13, lw=0)
    name_band(bottom, 1 + KL_BAND, f"within ±{100 * KL_BAND:g}% of the target")
    if others := len(courses) - len(named):
        label = f"{others} other arms with EBC: the {len(named)} whose c or KL / δ* moved most are named"
        sheet.key(entry(label, REST, lw=1.0))
    sheet.key(entry("each seed", GREY, **FAINT))
    for label, course in courses.items():
        panels = ((top, course.c, course.c_in_words), (bottom, course.ratio, course.ratio_in_words))
        for axes, line, words in panels:
            if label not in named:
                axes.plot(line.steps, line.middle, color=REST, lw=1.0, zorder=1.5)
            elif end := lines(axes, line, facts.look(label)):
                sheet.label(axes, [(*end, f"{label}  {words}", facts.look(label).colour)])
    seen = np.concatenate([c.ratio.middle.compressed() for c in courses.values()])
    low, high = (min(seen), max(seen)) if len(seen) else (1.0, 1.0)
    bottom.set_ylim(max(0.8 * min(low, 0.5), LEAST_RATIO), min(1.25 * max(high, 2.0), 1 / LEAST_RATIO))
    return sheet


def _named(courses: Mapping[str, Course]) -> list[str]:
    """Return the arms whose lines are named: while few all, else by turns those whose c or KL moved most."""
    if len(courses) <= MOST_LINES:
        return list(courses)
    drifted = sorted(courses, key=lambda label: -courses[label].drift)
    distant = sorted(courses, key=lambda label: -courses[label].distance)
    turns = itertools.chain(*zip(drifted, distant, strict=True))
    return list(dict.fromkeys(turns))[:HIGHLIGHTED]


def _farthest(courses: Mapping[str, Course]) -> str:
    drifted = max(courses, key=lambda label: courses[label].drift)
    distant = max(courses, key=lambda label: courses[label].distance)
    parts = []
    if courses[drifted].drift:
        parts.append(f"Largest drift of c: {drifted}, {courses[drifted].c_in_words}")
    if courses[distant].distance:
        ratio = courses[distant].clipped_ratio
        parts.append(f"farthest from its target: {distant}, median KL / δ* {ratio:.2f}")
    return capital("; ".join(parts) or "neither c nor the KL was measured")
