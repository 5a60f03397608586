"""What somebody should know before they believe an answer from runs that were not made for it.

Each kind of caution has a function of its own here. It looks at the runs as they are and returns one
sentence, or none: which runs it means, with figures, and what to do about it. None changes a figure of the
answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from ebc_lab.config.errors import count, listed

from .asked import Asked
from .columns import CHOOSING, TESTING, TRAINING, direction_of, plain
from .joint import Floats
from .outcomes import copies
from .record import Caution
from .runs import Curves, Runs
from .tuning import Tuning

UNEQUAL_SPREAD = 5.0  # one arm's standard deviation over another's from which it is said
# lag-one correlation of a curve's third differences: of 30 real arms, −0.82 to −0.42 as logged, and −0.27 or
# more under a running mean of weight 0.9
SMOOTH = -0.4
BY_CHANCE = 0.01  # how often a rise of an arm's curves, or unequal spreads, may be warned of and not be there
MOST_STEPS = 200  # of a curve that are looked at for a rise
FEW_RUNS = {
    1: "of its judged configuration, and one run says nothing of how far another would lie from it; "
    "train more seeds, or say how far runs scatter if you know it (--sigma)",
    2: "from two runs a standard deviation is known to a factor of about thirty only, and the interval is as "
    "wide; train at least three seeds",
}
LONGEST_TAIL = 500  # rows of a curve, from its end, in which smoothing is looked for

CHOSEN_STEP = {"best", "min", "max", "minimum", "maximum", "lowest", "highest"}
# an optimizer's own settings, each tuned for it, and names that stand for the arm or for the run itself
OWN = re.compile(
    r"lr|rate|decay|wd|warmup\w*|sched\w*|stabilizer|delta|star|momentum|betas?\d*|eps|epsilon|nesterov|rho|damping|ns|precond\w*|optim\w*|opt|method|algo\w*"
    r"|arm|name|group|tags?|notes?|host|dir|path|id|date|time|timestamp|seed"
)


def cautions(runs: Runs, judged: Runs, asked: Asked, tuned: Tuning | None) -> list[Caution]:
    """Return what warns about these runs, the gravest first. `judged`: the runs whose outcomes are compared,
    those of each arm's chosen configuration; `tuned`: how these were chosen, None if no arm had a choice."""
    curves = runs.by_run
    found = [
        _constant(runs, asked),
        _accuracy(runs, curves),
        _mixed_units(runs),
        _identical(runs),
        _seed_twice(runs),
        _diverged(runs, asked, curves),
        _at_edge(runs, tuned) if tuned else None,
        _rising(judged, asked),
        None if asked.sigma else _few_runs(judged, 1),
        _chosen_by_reported(runs, tuned) if tuned else None,
        _best_over_steps(runs, asked, curves),
        _training_loss(runs),
        _confounded(runs),
        _unequal_tuning(runs, tuned) if tuned else None,
        _ended_early(runs, asked, curves),
        _unequal_lengths(judged, asked),
        _unused_exchange(judged, asked),
        _unequal_cadence(runs, asked, curves),
        _smoothed(runs, curves),
        _seeds_added(runs),
        _unequal_spread(judged),
        _few_runs(judged, 2),
        _seed_is_an_index(runs),
    ]
    return [caution for caution in found if caution]


# Words


def _units(runs: Runs) -> str:
    """Return the unit of steps in the plural."""
    name = runs.step_name or "step"
    return name + "s" * (not name.endswith("s"))


def _arms(counts: Mapping[Any, int] | pd.Series[Any]) -> str:
    """Return counts by arm in words: `adam 3, muon 12`."""
    return listed(f"{arm} {count:,}" for arm, count in counts.items())


# The outcome: is it what it is taken for?


def _constant(runs: Runs, asked: Asked) -> Caution | None:
    outcome = runs.table["outcome"]
    if (
        asked.outcome == "target"
        or len(outcome) < 2
        or outcome.nunique() != 1
        or not abs(outcome.iloc[0]) < float("inf")
    ):
        return None
    sentence = (
        f"All {len(outcome):,} runs have the same {runs.loss}, {outcome.iloc[0]:g}: a column that does "
        "not vary cannot tell arms apart; name the column that was measured (--loss COLUMN)."
    )
    return Caution(kind="constant", sentence=sentence, runs=runs.names(outcome.index))


def _accuracy(runs: Runs, curves: Curves) -> Caution | None:
    """A name of something of which more is better, or values within 0–100 that rise in nine runs of ten."""
    if runs.better != "lower":
        return None
    long = curves.end - curves.start >= 3
    first, last = curves.start[long], curves.end[long] - 1
    middle = curves.loss[(first + last) // 2]
    rising = (curves.loss[first] < middle) & (middle < curves.loss[last])
    if direction_of(runs.loss) == "higher":
        why = f"is called {runs.loss}, of which larger is usually better"
    elif len(rising) and rising.mean() >= 0.9 and curves.loss.min() >= 0 and curves.loss.max() <= 100:
        why = f"rises over the steps in {rising.sum():,} of {len(rising):,} runs and stays between 0 and 100"
    else:
        return None
    sentence = (
        f"What is judged {why}, but lower counts as better here: give --better higher if it is an "
        "accuracy, or name the loss (--loss COLUMN)."
    )
    return Caution(kind="accuracy", sentence=sentence, runs=runs.names())


def _mixed_units(runs: Runs) -> Caution | None:
    outcome = runs.table["outcome"]
    known = outcome[np.isfinite(outcome)]
    shares, percent = known[known.between(0, 1)], known[known.between(20, 100)]
    if direction_of(runs.loss) != "higher" or not len(shares) or not len(percent):
        return None
    few = min(shares, percent, key=len)
    sentence = (
        f"{runs.loss} is at most 1 in {count(len(shares), 'run')} and between 20 and 100 in "
        f"{len(percent):,}: shares and percentages seem to be mixed (the fewer: "
        f"{listed(runs.names(few.index))}); bring them to one unit before you compare."
    )
    return Caution(kind="mixed_units", sentence=sentence, runs=runs.names(few.index))


def _training_loss(runs: Runs) -> Caution | None:
    words = plain(runs.loss).split()
    if {word.rstrip("0123456789") for word in words} & (CHOOSING | TESTING):
        return None
    if TRAINING & {*words}:
        why = "is a training loss by its name"
    elif words == ["loss"]:
        why = "does not say of which data it is; most trackers call the training loss so"
    else:
        return None
    sentence = (
        f"The column {runs.loss} {why}: an arm may be lower in it because it fits the training data "
        "closer, or because its batches were others; judge a validation loss if there is one (--loss "
        "COLUMN)."
    )
    return Caution(kind="training_loss", sentence=sentence, runs=runs.names())


def _best_over_steps(runs: Runs, asked: Asked, curves: Curves) -> Caution | None:
    if asked.outcome == "best":
        words, instead = "An outcome is", "(--outcome last)"
    elif CHOSEN_STEP & {*plain(runs.loss).split()}:
        words, instead = f"By its name, {runs.loss} is", "if it was logged (--loss COLUMN)"
    else:
        return None
    size = ""
    if asked.outcome == "best" and len(curves.run):
        bias, at_end = _bias_of_best(curves, runs.better)
        bias = bias if len(bias) and bias.mean() > 2 * bias.std() / len(bias) ** 0.5 else bias[:0]
        size = f" ({count(at_end, 'run')} of {len(curves.run):,} had it at the end of the curve)"
        if len(bias):
            size = (
                f", here by {bias.mean():.2g} at most: so far it lies beyond what its neighbours predict, in "
                f"{count(len(bias), 'run')}{size}"
            )
    sentence = (
        f"{words} the best over a run's steps, and the best of many noisy values is too good{size}, the more "
        f"so the more often and the more noisily a run was evaluated; use the last value {instead}."
    )
    return Caution(kind="best_over_steps", sentence=sentence, runs=runs.names())


def _bias_of_best(curves: Curves, better: str) -> tuple[Floats, int]:
    """Return how far each best value within a curve lies beyond it, and how many runs have theirs at the end.

    The curve at that step is estimated from the two rows on either side, by the cubic through these four: the
    value itself, which was chosen for being low, has no part in it, and a bend of the curve does no harm.
    """
    loss = curves.loss if better == "lower" else -curves.loss
    lowest = np.minimum.reduceat(loss, curves.start)
    rows = np.flatnonzero(loss == np.repeat(lowest, curves.end - curves.start))
    at = rows[np.searchsorted(rows, curves.start)]
    i = at[(at - 2 >= curves.start) & (at + 2 < curves.end) & np.isfinite(lowest)]
    with np.errstate(invalid="ignore"):  # beside the best, a run may have diverged
        bias = (4 * (loss[i - 1] + loss[i + 1]) - loss[i - 2] - loss[i + 2]) / 6 - loss[i]
    return bias[np.isfinite(bias)], int((at == curves.end - 1).sum())


# Runs that failed


def _diverged(runs: Runs, asked: Asked, curves: Curves) -> Caution | None:
    """Runs without a finite outcome; of those whose curve ends in NaN or inf, from which step on it does."""
    table = runs.table
    lost = table.index[~np.isfinite(table["outcome"])]
    if not len(lost):
        return None
    per_arm = table.loc[lost].groupby("arm", sort=False).size()
    words = "never reached the target" if asked.outcome == "target" else "diverged or have no value"
    steps = []
    for i in np.flatnonzero(np.isin(curves.run, lost)):
        loss = curves.loss[curves.start[i] : curves.end[i]]
        finite = np.flatnonzero(np.isfinite(loss))
        after = (finite[-1] if len(finite) else -1) + 1
        if after < len(loss):
            steps.append(float(curves.step[curves.start[i] + after]))
    since = f", the earliest from {runs.step_name} {min(steps):g} on" if steps else ""
    sentence = (
        f"{len(lost):,} of {count(len(table), 'run')} {words} ({_arms(per_arm)}{since}): "
        f"{listed(runs.names(lost))}. They rank behind every other run, and none is dropped."
    )
    return Caution(kind="diverged", sentence=sentence, runs=runs.names(lost))


def _ended_early(runs: Runs, asked: Asked, curves: Curves) -> Caution | None:
    """Runs whose last row comes before the planned end by more than the distance of their last two rows."""
    table = runs.table
    distance = np.ones(len(table))
    several = curves.end - curves.start > 1
    last = curves.end[several] - 1
    distance[curves.run[several]] = curves.step[last] - curves.step[last - 1]
    early = table["planned"] - table["length"] > np.maximum(distance, 1)
    short = table[(early & ~table["arm"].isin(list(asked.at))).to_numpy()]
    if short.empty:
        return None
    ends = short.groupby("arm", sort=False)["length"].agg(["size", "nunique"])
    alike = ends.index[(ends["nunique"] == 1) & (ends["size"] == table["arm"].value_counts()[ends.index])]
    meant = f" All runs of {listed(alike)} ended at one step, which looks intended." * (len(alike) > 0)
    sentence = (
        f"{count(len(short), 'run')} ended before the planned {_units(runs)} ({_arms(ends['size'])}): where "
        f"a schedule of the learning rate did not finish, the last loss is too high.{meant} Leave runs out "
        "only for a reason that does not depend on their loss."
    )
    return Caution(kind="ended_early", sentence=sentence, runs=runs.names(short.index))


# Runs that are fewer than they seem


def _identical(runs: Runs) -> Caution | None:
    groups = copies(runs)
    if not groups:
        return None
    names = [runs.names(group) for group in groups]
    arms = [runs.table.loc[group, "arm"] for group in groups]
    what = "curve" if len(runs.curves) else "outcome"
    sentence = (
        f"{count(sum(map(len, names)), 'run')} have the same {what} as another to the last digit "
        f"({listed((' = '.join(group[:3]) + ' …' * (len(group) > 3) for group in names), 3)}): copies, or "
        "a seed that the training ignores."
    )
    if any(not of_group.is_unique for of_group in arms):
        sentence += " Count those of one arm once (--distinct)."
    if any(of_group.nunique() > 1 for of_group in arms):
        sentence += " Where the arms differ, see to which of them the run belongs."
    return Caution(kind="identical", sentence=sentence, runs=[name for group in names for name in group])


def _seed_twice(runs: Runs) -> Caution | None:
    table = runs.table
    key = ["arm", "seed", "planned", *runs.settings]
    twice = table[table["seed"].notna() & table.duplicated(key, keep=False)]
    if twice.empty:
        return None
    pairs = twice.drop_duplicates(key)
    sentence = (
        f"{count(len(twice), 'run')} share arm, configuration and seed with another ("
        f"{listed(f'{r.arm}, seed {r.seed}' for r in pairs.itertuples())}): counted as separate runs "
        "they may make intervals too narrow; leave out all but one, or name the column in which they "
        "differ (--setting COLUMN)."
    )
    return Caution(kind="seed_twice", sentence=sentence, runs=runs.names(twice.index))


def _few_runs(judged: Runs, n: int) -> Caution | None:
    """Arms of which so many runs are judged: one, or two."""
    counts = judged.table.groupby("arm", sort=False).size()
    few = counts[counts == n]
    if few.empty:
        return None
    sentence = (
        f"{count(len(few), 'arm')} of {len(counts):,} {'has' if len(few) == 1 else 'have'} "
        f"{count(n, 'run')} ({listed(few.index)}): {FEW_RUNS[n]}."
    )
    meant = judged.names(judged.table["arm"].isin(few.index))
    return Caution(kind="one_run" if n == 1 else "few_runs", sentence=sentence, runs=meant)


def _seed_is_an_index(runs: Runs) -> Caution | None:
    """Seeds that count through all runs, in arms of two runs and more, so that no two arms share one."""
    table = runs.table
    arms = table["arm"].value_counts()
    if table["seed"].isna().any() or not table["seed"].is_unique or len(arms) < 2 or arms.min() < 2:
        return None
    if not table["seed"].str.fullmatch(r"\d{1,9}(\.0)?").all():
        return None
    seeds = table["seed"].astype(float)
    if seeds.max() - seeds.min() != len(seeds) - 1:
        return None
    sentence = (
        f"The seeds count through all {len(table):,} runs, from {seeds.min():g} to {seeds.max():g}, and "
        "no two arms share one: they look like a running number, and runs are compared unpaired; name "
        "the column of the seed if there is another (--seed COLUMN)."
    )
    return Caution(kind="seed_is_an_index", sentence=sentence, runs=runs.names())


# Arms that were not treated alike


def _at_edge(runs: Runs, tuned: Tuning) -> Caution | None:
    """Arms of which the chosen configuration has the lowest or highest value of a setting that was tried."""
    found = {}
    for arm, tuned_arm in tuned["arms"].items():
        edges = [
            f"{one['setting']} {one['value']:g} is the {one['beside'] or one['end']}est tried"
            for one in tuned_arm["edges"]
        ]
        if edges:
            found[arm] = listed(edges)
    if not found:
        return None
    places = listed(f"{arm} ({words})" for arm, words in found.items())
    sentence = (
        f"Tuning ended at the edge of what was tried: {places}. Beyond it the arm may be better: its tuning "
        "is not finished, and what is found against it may not last."
    )
    return Caution(kind="edge", sentence=sentence, runs=runs.names(runs.table["arm"].isin(list(found))))


def _rising(judged: Runs, asked: Asked) -> Caution | None:
    """Arms whose judged curves were better at an earlier step than at their end, both over three evaluations.

    The best of many noisy steps looks better than the end even where the curve is level. So the step at which
    a run is compared with its end is the best of the arm's other runs.
    """
    from scipy import special

    if asked.outcome != "last" or asked.at or not judged.step_name:
        return None
    sign = 1.0 if judged.better == "lower" else -1.0
    curves = judged.by_run
    arms = judged.table["arm"].to_numpy()[curves.run]
    rises, meant = [], []
    for arm in dict.fromkeys(arms):
        rows = [slice(*ends) for ends in zip(curves.start[arms == arm], curves.end[arms == arm], strict=True)]
        n, steps = len(rows), curves.step[rows[0]]
        if n < 2 or len(steps) < 6 or not all(np.array_equal(curves.step[x], steps) for x in rows):
            continue
        thin = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_STEPS)).round().astype(int))
        values = sign * np.array([curves.loss[x][thin] for x in rows]).T
        if not np.isfinite(values).all():
            continue
        smooth = (values[:-2] + values[1:-1] + values[2:]) / 3
        total = smooth.sum(axis=1, keepdims=True)
        rise = smooth[-1] - smooth[(total - smooth).argmin(axis=0), np.arange(n)]
        chance = special.stdtrit(n - 1, 1 - BY_CHANCE) * rise.std(ddof=1) / np.sqrt(n)
        best = int(total.argmin())
        if rise.mean() > chance and best < len(smooth) - 3:
            rises.append(f"{arm} since {judged.step_name} {steps[thin[best + 1]]:g}, by {rise.mean():.2g}")
            meant += judged.names(curves.run[arms == arm])
    if not rises:
        return None
    sentence = (
        f"The {judged.loss} of some arms got worse before their end ({listed(rises)}): judged at another "
        "step (--at, or --outcome best) the order of the arms may be another."
    )
    return Caution(kind="rising", sentence=sentence, runs=meant)


def _chosen_by_reported(runs: Runs, tuned: Tuning) -> Caution | None:
    chosen = {arm: one for arm, one in tuned["arms"].items() if one["configurations"] > 1}
    after_search = [arm for arm, one in chosen.items() if one["repeated"]]
    several = {arm: one for arm, one in chosen.items() if not one["repeated"]}
    if tuned["same"] and after_search and not several:
        sentence = (
            f"The configurations of {listed(after_search)} were repeated after a search, and the run by "
            "which each was found may be among those that are judged: leave it out (--where COLUMN=VALUE) to "
            "be strict."
        )
        meant = runs.table["arm"].isin(after_search)
        return Caution(kind="after_search", sentence=sentence, runs=runs.names(meant))
    if not several or not tuned["same"]:
        return None
    tried = _arms({arm: one["configurations"] for arm, one in several.items()})
    noises = [one["noise"] for one in several.values() if one["noise"]]
    largest = max(abs(one["optimism"] or 0.0) for one in several.values())
    visible = bool(noises) and largest > 0.05 * max(noises)
    size = f", here by about {largest:.2g} where most (optimism)" if visible else ""
    sentence = (
        f"The configurations were selected on {tuned['reported']}, which is also the metric reported (tried: "
        f"{tried}), so the mean of the best of several is too good{size}: select on another split "
        "(--choose COLUMN), or train the chosen configurations on fresh seeds."
    )
    meant = runs.table["arm"].isin(list(several))
    return Caution(kind="chosen_by_reported", sentence=sentence, runs=runs.names(meant))


def _unequal_tuning(runs: Runs, tuned: Tuning) -> Caution | None:
    if tuned["equal"] or len(tuned["arms"]) < 2:
        return None
    tried = {arm: one["configurations"] for arm, one in tuned["arms"].items()}
    tried = dict(sorted(tried.items(), key=lambda item: item[1]))
    comparable = any(one["expected"] for one in tuned["arms"].values())
    remedy = f"; compare the expected best of {tuned['budget']:,}, which all of them tried" * comparable
    sentence = (
        f"The arms tried unequal numbers of configurations ({_arms(tried)}): the best of more tends to "
        f"be better even where the arm is not{remedy}."
    )
    return Caution(kind="unequal_tuning", sentence=sentence, runs=runs.names())


def _confounded(runs: Runs) -> Caution | None:
    """Settings that are constant within every arm that has them, and not the same in all. An optimizer's own
    settings are passed over: each arm tunes its own."""
    table = runs.table
    differ: list[str] = []
    for name in runs.settings:
        words = plain(name).split()
        if not words or any(OWN.fullmatch(word) for word in words):
            continue
        per_arm = table.groupby("arm", sort=False)[name]
        values = per_arm.first().dropna()
        if len(values) > 1 and per_arm.nunique().max() == 1 and values.nunique() > 1:
            differ.append(f"{name}: " + listed(f"{arm} {value}" for arm, value in values.items()))
    if not differ:
        return None
    sentence = (
        f"The arms differ in more than their name ({listed(differ, 3)}): what such a setting does "
        "cannot be told from what the arm does; compare arms that are alike in it."
    )
    return Caution(kind="confounded", sentence=sentence, runs=runs.names())


def _unequal_lengths(judged: Runs, asked: Asked) -> Caution | None:
    """Arms whose runs had different plans, or end at different steps. At one step, or by their steps to a
    target, schedules are compared, too."""
    chosen = judged.table
    column = "planned" if chosen["planned"].notna().any() else "length"
    table = chosen[chosen[column].notna()]
    ends = table.groupby("arm", sort=False)[column].agg(["min", "max"])
    length = chosen.groupby("arm", sort=False)["length"].agg(["min", "max"]).dropna()
    ragged = length[length["min"] != length["max"]]
    unequal = []
    if ends["max"].nunique() > 1:
        by_end = ends["max"].sort_values()
        unequal.append(
            f"arms {'were to take' if column == 'planned' else 'end at'} between {by_end.iloc[0]:g} "
            f"{_units(judged)} ({by_end.index[0]}) and {by_end.iloc[-1]:g} ({by_end.index[-1]})"
        )
    if len(ragged) and asked.outcome == "last" and not asked.at:
        some = listed((f"{r.Index} {r.min:g} to {r.max:g}" for r in ragged.itertuples()), 3)
        unequal.append(f"within {count(len(ragged), 'arm')} runs end unequally ({some})")
    if not unequal:
        return None
    sentence = (
        f"Runs of different lengths are compared: {' and '.join(unequal)}. A longer run is usually "
        "lower, and one that is cut short, or met at a target on its way, has not had the end of its "
        "schedule: compare runs that were planned alike."
    )
    return Caution(kind="unequal_lengths", sentence=sentence, runs=judged.names(table.index))


def _unused_exchange(judged: Runs, asked: Asked) -> Caution | None:
    if asked.exchange is None or judged.table["length"].nunique() > 1 or asked.at:
        return None
    sentence = "--exchange changes nothing here: all arms are judged at one length."
    return Caution(kind="unused_exchange", sentence=sentence, runs=[])


def _unequal_cadence(runs: Runs, asked: Asked, curves: Curves) -> Caution | None:
    """Arms that were evaluated more than 1.5 times as often as others in the last tenth of their steps, where
    a best value or a first step below a target comes the earlier the more often it is looked for."""
    if (asked.outcome == "last" and asked.target is None) or len(curves.run) < 2:
        return None
    last = curves.step[curves.end - 1]
    late = curves.step >= np.repeat(0.9 * last, curves.end - curves.start)
    rate = np.add.reduceat(late, curves.start, dtype=float) / np.maximum(0.1 * last, 1e-9)
    arms = runs.table["arm"].to_numpy()[curves.run]
    apart = 1 / pd.Series(rate).groupby(arms, sort=False).median()  # steps from one evaluation to the next
    apart = apart.sort_values()
    if apart.iloc[-1] <= 1.5 * apart.iloc[0]:
        return None
    sentence = (
        f"Near their ends the arms were evaluated from every {apart.iloc[0]:.3g} {_units(runs)} "
        f"({apart.index[0]}) to every {apart.iloc[-1]:.3g} ({apart.index[-1]}): whoever looks more often "
        "finds a first step below a target earlier, and a better best value."
    )
    return Caution(kind="unequal_cadence", sentence=sentence, runs=runs.names(curves.run))


def _seeds_added(runs: Runs) -> Caution | None:
    """Arms of which some runs began while another arm had runs to come, and the rest when it had none, after
    a pause more than twice as long as any before."""
    table = runs.table
    started = table["started"].dropna().sort_values(kind="stable")
    if len(started) < 4 or started.nunique() < 3:
        return None
    arm = table["arm"].loc[started.index].to_numpy()
    when = (started - started.iloc[0]).dt.total_seconds().to_numpy()
    longest = np.maximum.accumulate(np.diff(when, prepend=0.0))  # pause up to and before each start
    of_arm = {name: when[rows] for name, rows in pd.Series(arm).groupby(arm, sort=False).indices.items()}
    over = np.array([own[-1] for own in of_arm.values() if len(own) > 1])  # the last start of each arm
    added: list[Any] = []
    for name, own in of_arm.items():
        split = np.searchsorted(own, over, "right")
        split = split[(split > 0) & (split < len(own))]  # an arm was over between two runs of this one
        if not len(split):
            continue
        at = np.searchsorted(when, own[split.max()])
        if when[at] - when[at - 1] > 2 * longest[at - 1]:
            added.extend(started.index[(arm == name) & (when >= when[at])])
    if not added:
        return None
    first = pd.Timestamp(started.loc[added].min())
    sentence = (
        f"{count(len(added), 'run')} of {_arms(table.loc[added].groupby('arm', sort=False).size())} "
        f"began on {first:%Y-%m-%d %H:%M} or later, when the arm's earlier runs and all of another arm "
        "had begun and after a long pause: if they were added because of what was seen, the interval "
        "does not hold; say how many seeds were planned, or judge fresh ones."
    )
    return Caution(kind="seeds_added", sentence=sentence, runs=runs.names(added))


# Noise


def _unequal_spread(judged: Runs) -> Caution | None:
    """Two arms of which one has UNEQUAL_SPREAD times the other's deviation, where all arms together show that
    their spreads are unequal (Bartlett 1937): of many arms, two lie far apart by chance."""
    chosen = judged.table
    outcome = chosen[np.isfinite(chosen["outcome"])].groupby("arm", sort=False)["outcome"]
    spread = outcome.std()[outcome.size() >= 3].sort_values()
    if len(spread) < 2:
        return None
    from scipy import stats

    low, high = spread.iloc[0], spread.iloc[-1]
    n_low, n_high = (outcome.size()[spread.index[i]] for i in (0, -1))
    if high == 0 or high < UNEQUAL_SPREAD * low:
        return None
    if low > 0 and stats.bartlett(*(outcome.get_group(arm) for arm in spread.index)).pvalue > BY_CHANCE:
        return None
    of_high = outcome.get_group(spread.index[-1])
    far = (of_high - of_high.median()).abs().idxmax()
    sentence = (
        f"The runs of {spread.index[-1]} scatter "
        f"{f'{high / low:.1f} times as widely as' if low > 0 else 'and not'} those of {spread.index[0]} "
        f"(standard deviations {high:.2g} of {n_high} runs, {low:.2g} of {n_low}): look whether its "
        "runs are replicates and whether a single one is far off (the farthest from the median: "
        f"{chosen.loc[far, 'run']}, {of_high[far]:g})."
    )
    return Caution(kind="unequal_spread", sentence=sentence, runs=judged.names(of_high.index))


def _smoothed(runs: Runs, curves: Curves) -> Caution | None:
    """Arms of three runs and more whose noise goes on in the direction that it took.

    A run's noise is its distance from the mean of its arm's runs at the same step. If its values are
    independent, the lag-one correlation of its differences is −1/2; if it is a random walk, 0: what lies
    clearly above 0 is a running mean, or the trends of runs that are no replicates. These do not outlast a
    second difference (independent values −2/3, a random walk −1/2), nor make the third differences of the
    curves themselves (−3/4, −2/3) as smooth as a running mean does: one of the two must tell of it as well.
    Smoothing of noise that is independent from one row to the next cannot be told from a random walk.
    """
    arm_of = runs.table["arm"].to_numpy()[curves.run]
    found: dict[str, float] = {}
    for arm in dict.fromkeys(arm_of.tolist()):
        of_steps: dict[bytes, list[Floats]] = {}
        for i in np.flatnonzero(arm_of == arm):
            start, end = curves.start[i], curves.end[i]
            start = max(start + (end - start) // 5, end - LONGEST_TAIL)
            if end - start >= 8 and np.isfinite(curves.loss[start:end]).all():
                of_steps.setdefault(curves.step[start:end].tobytes(), []).append(curves.loss[start:end])
        losses = np.array(max(of_steps.values(), key=len, default=[]))
        if len(losses) < 3:
            continue
        noise = np.diff(losses - losses.mean(axis=0))
        curved = np.diff(losses, n=3)
        curved /= np.sqrt((curved**2).mean(axis=0)) + 1e-300
        goes_on, error = _lag_one(noise), 1 / np.sqrt((len(losses) - 1) * noise.shape[1])
        least = max(SMOOTH, 3 / np.sqrt(curved.size) - 3 / 4)
        smooth = _lag_one(np.diff(noise)) > 3 * error - 1 / 2 or _lag_one(curved) > least
        if goes_on > 3 * error and smooth:
            found[str(arm)] = goes_on
    if not found:
        return None
    sentence = (
        f"The curves of {listed(found)} seem to be smoothed: their noise goes on in the direction that "
        "it took (lag-one correlation of its differences "
        f"{listed(f'{x:+.2f}' for x in found.values())}; −0.5 if evaluations are independent): "
        "smoothed values lag behind and hide the spread; export what was logged, unsmoothed."
    )
    meant = runs.table["arm"].isin(list(found))
    return Caution(kind="smoothed", sentence=sentence, runs=runs.names(meant))


def _lag_one(values: Floats) -> float:
    """Return the lag-one correlation along the second axis of values around zero."""
    a, b = values[:, :-1], values[:, 1:]
    size = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / size if size > 0 else -0.5
