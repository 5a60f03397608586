"""How often `judge` says better or worse of arms without any difference, and how often it finds one.

    python dev/studies/judge_rates.py [DRAWS]        4,000 invented families a cell; minutes on one core

A family is a reference and some arms that are each compared with it. `sd` is that of the arms in units of the
reference's; `n` are the runs of an arm and, after a colon, of the reference where it has others. Runs are
normal, or t with 3 degrees of freedom. `false` is the share of families in which any arm is said to be better
or worse, ± its Monte Carlo error; where runs are shifted alike, 1 - `false` is the coverage of all of the
family's joint intervals at once. `Bonferroni` is the same of Welch's own p-values times the comparisons.
`found` is the share of arms that are said to be better where each is by 1, 2 or 3 of the reference's sd.

The joint intervals are drawn from fewer families here than `judge` draws, so that this ends.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy import stats

from ebc_lab.judging import differences, joint
from ebc_lab.judging.differences import ERROR, compare, welch

DRAWS = 4_000
INNER = 499  # families drawn for a joint interval
Draw = Callable[[np.random.Generator, tuple[int, ...]], Any]


def normal(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return random.standard_normal(shape)


def heavy(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Return runs of standard deviation 1 with heavy tails."""
    return random.standard_t(3, shape) / math.sqrt(3)


def unpaired(
    draws: int, k: int, n: int, others: int, sd: float, run: Draw = normal, shift: float = 0.0
) -> dict[str, float]:
    """Return the shares of families with a false claim by the joint p-values and by Bonferroni's, and the
    share of arms that are said to be better, of `k` arms of `n` runs and a reference of `others`."""
    random = np.random.default_rng(zlib.crc32(repr((k, n, others, round(10 * sd))).encode()))
    first, second = np.arange(1, k + 1), np.zeros(k, dtype=int)
    runs = np.array([others, *[n] * k])
    any_of, bonferroni, better = 0, 0, 0
    for i in range(draws):
        losses = [run(random, (others,)), *(sd * run(random, (k, n)) - shift)]
        means = np.array([x.mean() for x in losses])
        errors = np.array([x.std(ddof=1) for x in losses]) / np.sqrt(runs)
        mean = means[first] - means[second]
        error, freedom, pool = welch(errors, runs - 1.0, runs, first, second)
        p = joint.two_sided(mean / error, freedom)
        p_joint = np.minimum(1.0, k * p)
        if pool.all():
            _, p_joint = joint.joint(errors, runs - 1.0, first, second, p, ERROR, draws=INNER, seed=i)
        plain, free = joint.welch(errors, runs - 1.0, first, second)
        any_of += bool((p_joint < ERROR).any())
        bonferroni += bool((joint.two_sided(mean / plain, free) < ERROR / k).any())
        better += int(((p_joint < ERROR) & (mean < 0)).sum())
    return {"false": any_of / draws, "bonferroni": bonferroni / draws, "found": better / draws / k}


def paired(draws: int, k: int, n: int, sd: float, run: Draw = normal, shift: float = 0.0) -> dict[str, float]:
    """Return the same of arms and a reference that share `n` seeds, each comparison at Bonferroni's level.
    The spread between seeds, which pairing removes, is left out."""
    random = np.random.default_rng(zlib.crc32(repr((k, n, round(10 * sd))).encode()))
    between = sd * run(random, (draws, k, n)) - shift - run(random, (draws, 1, n))
    p = stats.ttest_1samp(between, 0.0, axis=2).pvalue
    sure = p < ERROR / k
    false = float(sure.any(axis=1).mean())
    return {"false": false, "bonferroni": false, "found": float((sure & (between.mean(axis=2) < 0)).mean())}


def diverging(draws: int, k: int, n: int, share: float, pairs: bool) -> dict[str, float]:
    """Return the share of families with a false claim, by `compare` itself, if a `share` of runs diverges."""
    random = np.random.default_rng(zlib.crc32(repr((k, n, round(10 * share), pairs)).encode()))
    false = 0
    for _ in range(draws):
        losses = random.standard_normal((k + 1, n))
        losses[random.random((k + 1, n)) < share] = math.inf
        arms = {
            f"arm{i}": {str(j) if pairs else f"{i}.{j}": float(x) for j, x in enumerate(row)}
            for i, row in enumerate(losses)
        }
        false += any(c["verdict"] in ("better", "worse") for c in compare(arms, "arm0", paired=pairs))
    return {"false": false / draws}


def cells(draws: int) -> Iterator[tuple[str, int, str, str, dict[str, float]]]:
    """Yield the rows of the table: what is compared, comparisons, runs, sd, and the shares."""
    few = (2, 3, 4, 5, 8, 12, 20)
    for name, run in (("unpaired", normal), ("unpaired, t3", heavy)):
        for k in (1, 5, 30):
            for n in few if run is normal else (3, 5, 20):
                for sd in (1.0, 5.0) if run is normal else (1.0,):
                    yield name, k, str(n), f"{sd:g}", unpaired(draws, k, n, n, sd, run)
    for k in (1, 5, 30):
        for n, others in ((2, 20), (20, 2), (3, 5), (4, 20), (20, 4)):
            for sd in (1.0, 5.0, 0.2):
                yield "unpaired", k, f"{n}:{others}", f"{sd:g}", unpaired(draws, k, n, others, sd)
    for name, run in (("paired", normal), ("paired, t3", heavy)):
        for k in (1, 5, 30):
            for n in few:
                for sd in (1.0, 5.0):
                    yield name, k, str(n), f"{sd:g}", paired(draws, k, n, sd, run)
    for k in (1, 5):
        for n in (2, 5, 20):
            for share in (0.1, 0.3):
                for pairs in (False, True):
                    name = f"{'' if pairs else 'un'}paired, {share:.0%} diverge"
                    yield name, k, str(n), "1", diverging(draws, k, n, share, pairs)


def main(draws: int = DRAWS) -> None:
    joint.DRAWS = joint.FEWEST_DRAWS = INNER
    # slow, and not counted here
    differences.MOST_SEEDS = 2
    differences.seeds_needed = lambda difference: None
    differences.detectable_errors = lambda freedom, level: 1.0
    print("| runs | comparisons | n | sd | false | Bonferroni |\n|---|---|---|---|---|---|")
    for name, k, n, sd, found in cells(draws):
        false = found["false"]
        error = math.sqrt(false * (1 - false) / draws)
        other = f"{found['bonferroni']:.1%}" if "bonferroni" in found else ""
        print(f"| {name} | {k} | {n} | {sd} | {false:.1%} ± {error:.1%} | {other} |", flush=True)
    print("\n| runs | comparisons | n | found at 1 sd | 2 sd | 3 sd |\n|---|---|---|---|---|---|")
    for k in (1, 5):
        for n in (2, 3, 4, 5, 8, 12, 20):
            for name, way in (
                ("unpaired", lambda *a, **b: unpaired(*a[:3], *a[2:], **b)),
                ("paired", paired),
            ):
                shares = [way(draws, k, n, 1.0, shift=s)["found"] for s in (1.0, 2.0, 3.0)]
                print(f"| {name} | {k} | {n} | " + " | ".join(f"{x:.0%}" for x in shares) + " |", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
