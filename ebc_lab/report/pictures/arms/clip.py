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
from ..drawing.curves import Run, applied_c, audited, by_step, missing, running_mean, thinned, window
from ..drawing.looks import GOAL
from ..drawing.sheet import (
    FAINT,
    GREY,
    MOST_LINES,
    REST,
    Arms,
    Facts,
    Sheet,
    count_seeds,
    entry,
    lines,
    log_axis,
    name_band,
    over_steps,
)

HIGHLIGHTED = 6  # of more lines
LEAST_RATIO = 0.01  # the log axis of KL / δ* ends there: what lies further off leaves the frame


@dataclass(frozen=True)
class Course:
    """An EBC arm over the run: seeds' medians, and each seed, as running means."""

    steps: np.ndarray
    c: np.ma.MaskedArray
    seeds_c: np.ma.MaskedArray
    audits: np.ndarray
    ratio: np.ma.MaskedArray  # applied KL over its target, geometric means
    seeds_ratio: np.ma.MaskedArray


def course_of(runs: Sequence[Run]) -> Course:
    steps, table = applied_c(runs)
    streams = [audited(run.steps) for run in runs]
    audits, applied = by_step(streams, "applied_kl")
    ratios = np.ma.log(applied / np.ma.masked_less_equal(by_step(streams, "target_kl")[1], 0.0))
    at, then = thinned(len(steps)), thinned(len(audits))
    (c, own_c), (ratio, own_ratio) = _middle(table), _middle(ratios)
    return Course(
        steps[at], c[at], own_c[:, at], audits[then], np.ma.exp(ratio)[then], np.ma.exp(own_ratio)[:, then]
    )


def _middle(table: np.ma.MaskedArray) -> tuple[np.ma.MaskedArray, np.ma.MaskedArray]:
    """Return the seeds' median, and each seed, as running means."""
    if not table.shape[1]:
        return np.ma.masked_all(0), table
    return running_mean(np.ma.masked_array(np.ma.median(table, axis=0))[None])[0], running_mean(table)


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
    last = max((float(c.steps[-1]) for c in courses.values() if len(c.steps)), default=0.0)
    sheet = Sheet(
        facts,
        "What did the clip do over the run?",
        (
            f"{optimizer(track)}: every arm with EBC ({len(courses)}), medians over the seeds",
            _farthest(arms),
        ),
        (
            count_seeds(max(len(arm["runs"]) for arm in arms.values())),
            "c: median near the start → near the end of the run",
            "where nothing is clipped the KL lies below its target by right",
            f"running means: of c over {window(round(last) + 1)} steps, of the KL over 3 audits",
        ),
        missing(arms),
        grid=("a", "b"),
        heights=(2.7, 3.1),
        width=10.0,
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
            (top, course.steps, course.seeds_c, course.c, _c_in_words(arms[label])),
            (bottom, course.audits, course.seeds_ratio, course.ratio, _ratio_in_words(arms[label])),
        )
        for axes, x, seeds, middle, words in panels:
            if label not in named:
                axes.plot(x, middle, color=REST, lw=1.0, zorder=1.5)
            elif end := lines(axes, x, seeds, middle, facts.look(label)):
                sheet.label(axes, [(*end, f"{label}  {words}", facts.look(label).colour)])
    seen = np.concatenate([c.ratio.compressed() for c in courses.values()])
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
