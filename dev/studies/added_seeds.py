"""How often an answer is false where seeds are added because the one before it was undecided.

    python dev/studies/added_seeds.py [STUDIES [ANSWERS]]      20,000 of each kind, 2 answers at most

Each study compares two arms, paired by seed: 3 or 5 differences with a standard deviation of 0.03 nats,
normal or Student's t with 3 degrees of freedom, of a true mean of 0, or of 0.02 nats. It claims a difference
where the interval excludes 0, level where it lies within ±0.01. Undecided, it tells how many seeds would
decide it (`seeds_needed`), and is asked again with so many, if they are 100 at most:

    reused      the first seeds and those that lack, at 95%: what the command asked for up to version 1.0
    reused, /2  the same, the error divided by 2 for each answer before
    fresh       as many new seeds alone, at 95%

`any`: studies in which one of the answers claims a difference, after so many answers; `right`: one that is
there. `next`: of the second answers, how many do. `seeds`: trained in two answers, on average.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from ebc_lab.study.stages.statistics import CONFIDENCE, POWER, paired, seeds_needed

SD, MARGIN, TRUE = 0.03, 0.01, 0.02  # nats
MOST = 100  # seeds of a study
SCHEMES = {
    "reused": (True, 1),
    "reused, /2": (True, 2),
    "fresh": (False, 1),
}  # first seeds judge too, divisor
Array = np.ndarray


@dataclass
class Judged:
    """Mean, spread and verdict of each study's differences."""

    mean: Array
    sd: Array
    claims: Array
    level: Array

    @property
    def undecided(self) -> Array:
        return ~(self.claims | self.level)


def judge(sums: Array, squares: Array, seeds: Array, divided: float) -> Judged:
    """Judge studies by the sums and sums of squares of their differences, and how many these are."""
    mean = sums / seeds
    sd = np.sqrt((squares - seeds * mean**2) / (seeds - 1))
    half = stats.t.ppf(1 - (1 - CONFIDENCE) / divided / 2, seeds - 1) * sd / np.sqrt(seeds)
    claims = np.abs(mean) > half
    return Judged(mean, sd, claims, ~claims & (np.abs(mean) + half <= MARGIN))


def needed(found: Judged, had: Array) -> Array:
    """`seeds_needed` of many differences at once; more than MOST where it gives up, or takes more."""

    def decides(seeds: Array) -> Array:
        error, freedom = found.sd / np.sqrt(seeds), seeds - 1
        critical = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)

        def above(true: Array) -> Array:
            far = stats.nct.sf(critical, freedom, true / error)
            return np.where(np.isnan(far), stats.norm.sf(critical - true / error), far)

        apart = above(found.mean) + above(-found.mean)
        level = above(found.mean + MARGIN) + above(MARGIN - found.mean) - 1
        return np.maximum(apart, level) >= POWER

    low, high = had + 1, np.full_like(had, MOST + 1)
    while (low < high).any():
        middle = (low + high) // 2
        at = decides(middle)
        low, high = np.where(at, low, np.minimum(middle + 1, high)), np.where(at, middle, high)
    return low


@dataclass
class Studies:
    """The differences of many studies in the order of their use, as running sums (studies, seeds + 1)."""

    sums: Array
    squares: Array
    first: int  # seeds of the first answer

    def judged(self, rows: Array, begin: Array, end: Array, divided: float) -> Judged:
        """Judge these studies by their seeds from `begin` to before `end`."""
        sums, squares = (s[rows, end] - s[rows, begin] for s in (self.sums, self.squares))
        return judge(sums, squares, end - begin, divided)

    @cached_property
    def needed_first(self) -> Array:
        """How many seeds each study asks for after its first answer."""
        rows = np.arange(len(self.sums))
        had = np.full(len(rows), self.first)
        return needed(self.judged(rows, 0 * had, had, 1), had)

    def asked(self, answers: int, *, reuses: bool, divided: int) -> dict[str, float]:
        """Ask each of them so many times at most, and count."""
        studies = len(self.sums)
        rows = np.arange(studies)
        begin, end = np.zeros(studies, int), np.full(studies, self.first)
        claimed, right = np.zeros(studies, bool), np.zeros(studies, bool)
        found: dict[str, float] = {}
        for nth in range(answers):
            judged = self.judged(rows, begin, end, divided**nth)
            claimed[rows] |= judged.claims
            right[rows] |= judged.claims & (judged.mean > 0)
            found |= {f"any {nth + 1}": claimed.mean(), f"right {nth + 1}": right.mean()}
            if nth == 1:
                found |= {"next": judged.claims.mean(), "asked again": len(rows) / studies}
                found["seeds"] = (self.first * (studies - len(rows)) + end.sum()) / studies
            if nth + 1 == answers:
                break
            more = needed(judged, end - begin) if nth else self.needed_first
            on = judged.undecided & (more <= MOST)
            rows, more = rows[on], more[on]
            begin, end = (begin[on], begin[on] + more) if reuses else (end[on], end[on] + more)
        return found


def check(draws: Array) -> None:
    """Fail where the verdicts and numbers above are not those of the program."""
    for row in draws[:40]:
        seeds = np.array([len(row)])
        mine = judge(row.sum(keepdims=True), (row**2).sum(keepdims=True), seeds, 1)
        losses = {str(nth): float(x) for nth, x in enumerate(row)}
        theirs = paired(losses, dict.fromkeys(losses, 0.0), margin=MARGIN)
        assert mine.claims[0] == (theirs["low"] > 0 or theirs["high"] < 0)
        assert min(seeds_needed(theirs) or MOST + 1, MOST + 1) == needed(mine, seeds)[0]


def main(studies: int, answers: int) -> None:
    draw = np.random.default_rng(0)
    for first in (3, 5):
        for noise in ("normal", "heavy-tailed"):
            shape = (studies, first + (answers - 1) * MOST)
            plain = draw.standard_normal(shape) if noise == "normal" else draw.standard_t(3, shape) / 3**0.5
            check(plain[:, :first] * SD)
            for true in (0.0, TRUE):
                sums, squares = (
                    np.pad(np.cumsum(x, axis=1), ((0, 0), (1, 0)))
                    for x in (plain * SD + true, (plain * SD + true) ** 2)
                )
                of_all = Studies(sums, squares, first)
                for name, (reuses, divided) in SCHEMES.items():
                    found = of_all.asked(answers, reuses=reuses, divided=divided)
                    of = "right" if true else "any"
                    shares = ", ".join(f"{n} {found[f'{of} {n}']:.1%}" for n in range(1, answers + 1))
                    print(
                        f"{first} seeds, {noise}, true {true:g}, {name}: {of} {shares}; "
                        f"asked again {found['asked again']:.1%}, next {found['next']:.1%}, "
                        f"seeds {found['seeds']:.1f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main(*([int(x) for x in sys.argv[1:]] + [20_000, 2][len(sys.argv) - 1 :]))
