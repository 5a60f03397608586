"""What tuning there was: which of an arm's configurations wins, and how much of that is budget or luck.

An arm that tried more configurations has the better best one, even where it is no better. So arms are also
compared at equal budgets: by the expected best of k configurations that are drawn at random from those tried.

* Dodge et al. 2019 (arXiv:1909.03004) draw the k *with* replacement. Then some are drawn twice, the best is
  one of fewer than k, and its loss is estimated too high; most so where k is near the number tried.
* Tang et al. 2020 (arXiv:2004.14454) draw *without* replacement, which is unbiased, as here. They also find
  that bootstrap intervals cover too seldom. The interval here is exact, and is one for the median best of k,
  a quantile of the configurations' losses (order statistics; Thompson 1936).

All take the configurations for independent draws from one distribution: a random search is that, a grid or a
sequential search (Bayesian, by hand) is not, and for these the figures describe and do not infer.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import numpy as np
import pandas as pd

from ebc_lab.records.decisions import Window
from ebc_lab.study.stages.statistics import (
    CONFIDENCE,
    NO_LUCK,
    ROUNDING,
    Luck,
    chances_of_lowest,
    finite_or_none,
    noise_of_runs,
    pooled_deviation,
    variance_under,
    window,
)

ERRORS = 2  # standard errors in the upper limit by which a configuration is chosen
REPLICATED = 3  # runs
NOISES = 2.0  # standard deviations of a run: the height of a learning-rate window
MOST_BUDGETS = 50  # of how many budgets k the expected best is given
ENDS = (("low", "high"), ("joint_low", "joint_high"), ("median_low", "median_high"), ("lowest", "highest"))
# figures that change sign with the loss
TURNED = {"mean", "median", "loss", "outcome", "expected", *(end for pair in ENDS for end in pair)}
LEARNING_RATE = re.compile(r"(.*[./_])?(lr|learning_?rate)(_init|_max|_peak)?", re.IGNORECASE)


@dataclass(frozen=True)
class Configuration:
    """One configuration of an arm: its settings by name, as the source has them, and of each of its runs, by
    seed or by number, the loss that chooses and the loss that is reported (lower is better, infinite if it
    diverged). `rows`: the runs' numbers in the table that they come from."""

    settings: Mapping[str, Any]
    runs: Mapping[str, tuple[float, float]]
    rows: tuple[int, ...] = ()


class Expected(TypedDict):
    """The reported loss of the best of k configurations. None stands for what is infinite."""

    k: int
    expected: float | None
    median: float | None  # half of the draws of k find one at least as good
    low: float | None  # 95% interval of the median, for this k alone; an infinite end is None, and both ends
    high: float | None  # are None where one loss chooses and another is reported


class Edge(TypedDict):
    """A numeric setting of which the chosen value is the lowest or the highest that the arm tried."""

    setting: str
    value: float
    values: int  # how many different ones were tried
    end: str | None  # "low" or "high" among all that were tried; None: within
    beside: str | None  # likewise among configurations that are like the chosen one in every other setting


class Tried(TypedDict):
    """One configuration and what its runs came to. None stands for what is infinite."""

    number: int  # in the order in which the arm's configurations were given, from 0
    settings: dict[str, Any]
    runs: int
    loss: float | None  # mean over its runs of the loss that chooses
    outcome: float | None  # mean of the loss that is reported


class Tuned(TypedDict):
    """An arm's tuning."""

    configurations: int
    runs: int
    chosen: Tried
    ties: int  # further configurations that the choosing loss does not tell from the chosen one
    expected: list[Expected]  # for budgets k up to the smallest of any arm
    edges: list[Edge]
    window: Window | None  # of the learning rate, the other settings as in the chosen configuration
    noise: float | None  # standard deviation of a run's choosing loss; None: no configuration has two runs
    luck: dict[str, float] | None  # fields of `Luck`, in the reported loss; None: nothing is known of it
    repeated: bool  # the chosen one alone was repeated over seeds, as after a search
    optimism: float | None  # see `_luck`; None where it is unknown, another loss is reported, or `repeated`


class Tuning(TypedDict):
    """The tuning of all arms."""

    chosen_by: str
    reported: str
    same: bool  # every run's choosing loss is the one that is reported, which flatters the chosen one
    budget: int  # the smallest number of configurations of any arm
    equal: bool  # all arms tried as many
    arms: dict[str, Tuned]


def configurations_of(
    table: pd.DataFrame, settings: Sequence[str], *, higher: bool = False
) -> dict[str, list[Configuration]]:
    """Return each arm's configurations in the order of their first runs.

    `table`: a row a run, with columns arm, seed, outcome, chosen_by and those named in `settings`.
    `higher`: whether larger outcomes are better; their signs are turned. Runs go by seed where each run of
    the table has one and no configuration has one twice, and by number otherwise.
    """
    by = ["arm", *settings]
    seeds = table["seed"].notna().all() and not table.duplicated([*by, "seed"]).any()
    keys = table["seed"].tolist() if seeds else [str(i) for i in range(len(table))]
    sign = -1.0 if higher else 1.0
    choosing, outcomes = ((sign * table[name]).tolist() for name in ("chosen_by", "outcome"))
    arms, *values = (table[name].tolist() for name in by)
    numbers: dict[int, list[int]] = {}
    for i, number in enumerate(table.groupby(by, sort=False, dropna=False).ngroup().tolist()):
        numbers.setdefault(number, []).append(i)
    found: dict[str, list[Configuration]] = {}
    for rows in numbers.values():
        known = {name: of_all[rows[0]] for name, of_all in zip(settings, values, strict=True)}
        runs = {keys[i]: (choosing[i], outcomes[i]) for i in rows}
        found.setdefault(str(arms[rows[0]]), []).append(Configuration(known, runs, tuple(rows)))
    return found


def tuning_of(
    arms: Mapping[str, Sequence[Configuration]],
    *,
    chosen_by: str = "loss",
    reported: str = "loss",
    lr: str = "",
) -> Tuning | None:
    """Return what the configurations of each arm show of its tuning, or None if no arm has two.

    `chosen_by`, `reported`: names of the losses that choose and that are reported. `lr`: the setting that is
    the learning rate; empty: the only one with such a name that varies. Its window is twice the standard
    deviation of a run high; without replicates there is none.

    The chosen configuration of an arm is the only one of which the runs are compared with another arm's; all
    others are tuning, even if they have as many runs. Where one configuration has at least REPLICATED runs
    and every other at most half as many, it is that one, which the arm's owner chose to repeat, say after a
    search. Otherwise it is the one with the lowest upper limit of the
    choosing loss: its mean plus two standard errors, from the noise that all configurations share. Where each
    has the same number of runs, that is the lowest mean; otherwise, one lucky run does not beat a mean of
    several. A diverged run makes a mean infinite. If all are infinite, the smallest share of diverged runs
    wins, then the lowest mean of the others, then the first.
    """
    if all(len(configurations) < 2 for configurations in arms.values()):
        return None
    budget = min(map(len, arms.values()))
    same = all(a == b for tried in arms.values() for c in tried for a, b in c.runs.values())
    return {
        "chosen_by": chosen_by,
        "reported": reported,
        "same": same,
        "budget": budget,
        "equal": max(map(len, arms.values())) == budget,
        "arms": {arm: _tuned(tried, same, budget, lr) for arm, tried in arms.items()},
    }


def counted(tuning: Tuning, everywhere: Mapping[str, int]) -> Tuning:
    """Return the tuning with the numbers of configurations that arms tried at any length. Where there were
    others than those of the judged length, their losses are not comparable, and no best of k is given."""
    if all(everywhere[arm] == of_arm["configurations"] for arm, of_arm in tuning["arms"].items()):
        return tuning
    arms = {
        arm: {**of_arm, "configurations": everywhere[arm], "expected": []}
        for arm, of_arm in tuning["arms"].items()
    }
    counts = set(everywhere.values())
    return cast(Tuning, {**tuning, "arms": arms, "equal": len(counts) == 1, "budget": min(counts)})


def turned(tuning: Tuning) -> Tuning:
    """Return the tuning of losses as that of scores: figures change signs, ends of intervals places."""
    arms = {}
    for arm, of_arm in tuning["arms"].items():
        window = of_arm["window"]  # whose ends are of the learning rate
        arms[arm] = {
            **of_arm,
            "chosen": turned_figures(of_arm["chosen"]),
            "expected": [turned_figures(one) for one in of_arm["expected"]],
            "window": {**window, "loss": -window["loss"]} if window else None,
        }
    return cast(Tuning, {**tuning, "arms": arms})


def turned_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures of losses as those of scores, of which larger ones are better."""
    made = {k: -v if k in TURNED and v is not None else v for k, v in figures.items()}
    for low, high in ENDS:
        if low in made:
            made[low], made[high] = made[high], made[low]
    return made


def luck_of(tuning: Tuning | None, arm: str) -> Luck:
    """Return the luck of an arm's tuning; none where nothing is known of it."""
    known = tuning["arms"][arm]["luck"] if tuning else None
    return Luck(**known) if known else NO_LUCK


def _tuned(tried: Sequence[Configuration], same: bool, budget: int, lr: str) -> Tuned:
    """Return one arm's tuning."""
    choosing, outcomes = _means(tried, 0), _means(tried, 1)
    counts = [len(c.runs) for c in tried]
    noise = _noise(tried)
    sd = noise[0] if noise else 0.0

    def rank(i: int) -> tuple[float, float, float]:
        losses = [a for a, _ in tried[i].runs.values()]
        finite = [x for x in losses if math.isfinite(x)]
        lost = 1 - len(finite) / len(losses)
        return choosing[i] + ERRORS * sd / math.sqrt(counts[i]), lost, statistics.fmean(finite or [0.0])

    def described(i: int) -> Tried:
        settings = {name: _plain(value) for name, value in tried[i].settings.items()}
        loss, outcome = finite_or_none(choosing[i]), finite_or_none(outcomes[i])
        return {"number": i, "settings": settings, "runs": counts[i], "loss": loss, "outcome": outcome}

    best = min(range(len(tried)), key=rank)
    most = max(counts)
    repeated = most >= REPLICATED and sum(2 * n > most for n in counts) == 1
    if repeated:
        best = counts.index(most)
    luck, optimism = _luck(choosing, outcomes, counts, noise)
    return {
        "configurations": len(tried),
        "runs": sum(counts),
        "chosen": described(best),
        "ties": sum(rank(i) == rank(best) for i in range(len(tried))) - 1,
        "expected": expected_best(choosing, outcomes, budgets(budget)),
        "edges": _edges(tried, best),
        "window": _window(tried, best, choosing, lr, NOISES * sd) if noise else None,
        "noise": noise[0] if noise else None,
        "luck": None if luck is None else {"sd": luck.sd, "freedom": luck.freedom},
        "repeated": repeated,
        "optimism": optimism if same and not repeated else None,
    }


def budgets(most: int) -> list[int]:
    """Return the numbers of configurations 1 … `most`, or some of them in equal ratios if they are many."""
    if most <= MOST_BUDGETS:
        return list(range(1, most + 1))
    return sorted({round(most ** (i / (MOST_BUDGETS - 1))) for i in range(MOST_BUDGETS)})


def expected_best(choosing: Sequence[float], outcomes: Sequence[float], ks: Iterable[int]) -> list[Expected]:
    """Return, for each k (1 … the number of configurations), the outcome of that one of k random
    configurations which has the lowest choosing loss. Among equal choosing losses, chance decides.

    Both losses: one value a configuration, infinite if it diverged. An infinite one has the weight of any
    other, so the expectation is infinite as soon as k draws may all diverge; the median is finite longer.
    """
    from scipy import stats

    loss = np.asarray(choosing, dtype=float)
    order = np.argsort(loss, kind="stable")
    ties = np.unique(loss[order], return_inverse=True)[1]
    values = np.asarray(outcomes, dtype=float)[order]
    same = bool((values == loss[order]).all())
    by_value = np.argsort(values, kind="stable")
    ranked, n = values[by_value], len(values)
    upto = np.arange(1, n + 1)
    tails = (1 - CONFIDENCE) / 2
    found: list[Expected] = []
    for k in ks:
        # the chance that none of k is among the best 1 … n; ties share theirs
        none = np.cumprod(np.clip(n - k - upto + 1, 0, None) / (n - upto + 1))
        weights = -np.diff(none, prepend=1.0)
        weights = (np.bincount(ties, weights) / np.bincount(ties))[ties]
        middle = int(np.searchsorted(np.cumsum(weights[by_value]), 0.5 - 1e-9))
        low = high = None
        if same:
            first, last = stats.binom.ppf([tails, 1 - tails], n, 1 - 0.5 ** (1 / k)).astype(int)
            low = finite_or_none(ranked[first - 1]) if first else None
            high = finite_or_none(ranked[last]) if last < n else None
        found.append(
            {
                "k": k,
                "expected": finite_or_none(float(values[weights > 0] @ weights[weights > 0])),  # never 0 × ∞
                "median": finite_or_none(ranked[middle]),
                "low": low,
                "high": high,
            }
        )
    return found


def _means(tried: Sequence[Configuration], which: int) -> list[float]:
    """Return each configuration's mean of the choosing (0) or the reported loss (1)."""
    return [math.fsum(x[which] for x in c.runs.values()) / len(c.runs) for c in tried]


def _noise(tried: Sequence[Configuration]) -> tuple[float, float] | None:
    """Return the standard deviation of a run's choosing loss within a configuration, and its degrees of
    freedom; None if no configuration without a diverged run has two.

    Where all have the same seeds, the seeds' common effects do not count (`noise_of_runs`). Otherwise the
    variances within the better half of those with several runs are pooled.
    """
    known = [{key: a for key, (a, _) in c.runs.items()} for c in tried]
    known = [losses for losses in known if all(map(math.isfinite, losses.values()))]
    if known and all(losses.keys() == known[0].keys() for losses in known):
        found = noise_of_runs([[losses[key] for key in known[0]] for losses in known])
        if found is not None:
            return found
    several = sorted((list(x.values()) for x in known if len(x) > 1), key=statistics.fmean)
    if not several:
        return None
    return pooled(several[: max(2, math.ceil(len(several) / 2))])


def pooled(samples: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Return the standard deviation within samples of two values or more, and its degrees of freedom."""
    return pooled_deviation([(statistics.stdev(values), len(values) - 1) for values in samples])


def _luck(
    choosing: Sequence[float],
    outcomes: Sequence[float],
    counts: Sequence[int],
    noise: tuple[float, float] | None,
) -> tuple[Luck | None, float | None]:
    """Return the luck of the choice, in the reported loss, and its optimism; None and None where no
    configuration has a second run to tell noise from difference.

    Luck: with other seeds another configuration might have won. The optimism is the amount by which the
    lowest of the noisy means lies below that configuration's mean over many seeds, on average; it takes the
    means that were seen for the true ones, which lie closer together, and so is rather too small.
    """
    if len(choosing) == 1:
        return NO_LUCK, 0.0
    if noise is None:
        return None, None
    both = np.array([choosing, outcomes], dtype=float)
    finite = np.isfinite(both).all(axis=0)
    if finite.sum() < 2 or not noise[0] > ROUNDING:
        return Luck(0.0, noise[1]), 0.0
    means, values = both[:, finite]
    chance, lowest = chances_of_lowest(means, noise[0] / np.sqrt(np.asarray(counts)[finite]))
    sd, optimism = math.sqrt(variance_under(chance, values)), float(chance @ means) - lowest
    return Luck(float(f"{sd:.6g}"), noise[1]), optimism if optimism > ROUNDING else 0.0


def _edges(tried: Sequence[Configuration], best: int) -> list[Edge]:
    """Return the numeric settings of which the best configuration has the lowest or highest of at least two
    values. A lowest value of 0 is no edge: there, a setting has its own end (no weight decay, no dropout)."""
    found: list[Edge] = []
    for name in tried[best].settings:
        values = _numbers(tried, name)
        value, different = values.get(best), len(set(values.values()))
        if value is None or different < 2:
            continue
        end = _end(value, values.values())
        beside = _end(value, [x for i, x in values.items() if _alike(tried[i], tried[best], name)])
        if end or beside:
            found.append({"setting": name, "value": value, "values": different, "end": end, "beside": beside})
    return found


def _end(value: float, values: Iterable[float]) -> str | None:
    """Return at which end of the values this one is; None within them, and if there is no other."""
    some = list(values)
    low, high = min(some), max(some)
    if low == high or low < value < high or value == low == 0:
        return None
    return "low" if value == low else "high"


def _numbers(tried: Sequence[Configuration], name: str) -> dict[int, float]:
    """Return a setting's known values by number of the configuration; empty if one is not a finite number."""
    found = {}
    for i, c in enumerate(tried):
        value = _plain(c.settings.get(name))
        if value is None:
            continue
        try:
            found[i] = float("nan" if isinstance(value, bool) else value)
        except ValueError:
            return {}
        if not math.isfinite(found[i]):
            return {}
    return found


def _alike(a: Configuration, b: Configuration, name: str) -> bool:
    """Return whether two configurations are the same in every setting but this one."""
    names = (a.settings.keys() | b.settings.keys()) - {name}
    return all(_plain(a.settings.get(x)) == _plain(b.settings.get(x)) for x in names)


def _window(
    tried: Sequence[Configuration], best: int, losses: Sequence[float], lr: str, within: float
) -> Window | None:
    """Return the window of the learning rate around its best value, from configurations that are like the
    best one in every other setting; None if they have fewer than two rates above 0, or if none is known."""
    named = [lr] if lr else [x for x in tried[best].settings if LEARNING_RATE.fullmatch(x)]
    varied = {x: rates for x in named if len(set((rates := _numbers(tried, x)).values())) > 1}
    if len(varied) != 1:
        return None
    [(name, rates)] = varied.items()
    like = {x: losses[i] for i, x in rates.items() if x > 0 and _alike(tried[i], tried[best], name)}
    return window(like, within) if len(like) > 1 else None


def _plain(value: Any) -> Any:
    """Return a setting's value as JSON has it: None if it is missing, text for what JSON does not know."""
    value = value.item() if hasattr(value, "item") else value
    if value is None or value != value:
        return None
    plain = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if plain else str(value)
