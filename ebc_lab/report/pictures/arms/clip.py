"""What EBC's clip did over the run: every arm's coefficient, and its KL over the target."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


def course_of(runs: Sequence[Run]) -> Course | None:
    """None where no run recorded its steps."""
    if not any(run.steps for run in runs):
        return None
    streams = [audited(run.steps) for run in runs]
    audits, applied = by_step(streams, "applied_kl")
    targets = np.ma.masked_less_equal(by_step(streams, "target_kl")[1], 0.0)
    return Course(smooth_line(*applied_c(runs)), smooth_line(audits, applied / targets, log=True))


def drift(arm: Mapping[str, Any]) -> float:
    """Return how far c moved over the run: |log(c late / c early)|, 0 where it was not measured."""
    early, late = arm["figures"].get("c_early"), arm["figures"].get("c_late")
    return abs(math.log(late / early)) if early and late else 0.0


def distance(arm: Mapping[str, Any]) -> float:
    """Return how far the applied KL lies from its target: |log(KL / δ*)|, 0 where it was not measured."""
    ratio = arm["figures"].get("kl_ratio_median")
    return abs(math.log(ratio)) if ratio else 0.0


def draw_steps(facts: Facts, track: str, arms: Arms, courses: Mapping[str, Course]) -> Sheet:
    """Draw the clip coefficient above, the applied KL over its target below, a line for every EBC arm."""
    named = _named(arms, courses)
    last = max((float(c.c.at[-1]) for c in courses.values() if len(c.c.at)), default=0.0)
    sheet = Sheet(
        facts,
        "What did the clip do over the run?",
        (
            f"{optimizer(track)}: every arm with EBC ({len(courses)}), medians over the seeds",
            _farthest(arms),
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
        panels = (
            (top, course.c, _c_in_words(arms[label])),
            (bottom, course.ratio, _ratio_in_words(arms[label])),
        )
        for axes, line, words in panels:
            if label not in named:
                axes.plot(line.at, line.middle, color=REST, lw=1.0, zorder=1.5)
            elif end := lines(axes, line, facts.look(label)):
                sheet.label(axes, [(*end, f"{label}  {words}", facts.look(label).colour)])
    seen = np.concatenate([c.ratio.middle.compressed() for c in courses.values()])
    low, high = (min(seen), max(seen)) if len(seen) else (1.0, 1.0)
    bottom.set_ylim(max(0.8 * min(low, 0.5), LEAST_RATIO), min(1.25 * max(high, 2.0), 1 / LEAST_RATIO))
    return sheet


def _named(arms: Arms, courses: Mapping[str, Course]) -> list[str]:
    """Return the arms whose lines are named: all while they are few, else those whose c or KL moved most, by
    turns."""
    if len(courses) <= MOST_LINES:
        return list(courses)

    def farthest(by: Callable[[Mapping[str, Any]], float]) -> list[str]:
        return sorted(courses, key=lambda label: -by(arms[label]))

    turns = itertools.chain(*zip(farthest(drift), farthest(distance), strict=True))
    return list(dict.fromkeys(turns))[:HIGHLIGHTED]


def _farthest(arms: Arms) -> str:
    most, farthest = max(arms, key=lambda x: drift(arms[x])), max(arms, key=lambda x: distance(arms[x]))
    parts = []
    if drift(arms[most]):
        parts.append(f"Largest drift of c: {most}, {_c_in_words(arms[most])}")
    if distance(arms[farthest]):
        ratio = arms[farthest]["figures"]["kl_ratio_median"]
        parts.append(f"farthest from its target: {farthest}, median KL / δ* {ratio:.2f}")
    return capital("; ".join(parts) or "neither c nor the KL was measured")


def _c_in_words(arm: Mapping[str, Any]) -> str:
    early, late = arm["figures"].get("c_early"), arm["figures"].get("c_late")
    return f"c {early:.2g} → {late:.2g}" if early is not None and late is not None else ""


def _ratio_in_words(arm: Mapping[str, Any]) -> str:
    ratio = arm["figures"].get("kl_ratio_median")
    return f"KL / δ* {ratio:.2f} where clipped" if ratio is not None else "never clipped at an audit"
