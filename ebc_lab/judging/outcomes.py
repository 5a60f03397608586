"""The one figure that a run is judged by, and which of an arm's runs are judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from ebc_lab.config.errors import UserError, any_of, listed, require

from . import steps
from .asked import Asked
from .record import Caution
from .runs import Curves, Runs
from .tuning import REPLICATED, Configuration, Tuning

BY_CHANCE = 0.05  # how often rounding alone may make so many outcomes equal: less often, they are copies
Losses = dict[str, dict[str, float]]  # arm -> run or seed -> loss, lower is better, inf: diverged or missing


def of_chain(runs: Runs, chain: Sequence[str]) -> Runs:
    """Return the runs of the arms of a chain, in its order; all where there is none.

    Raises UserError where an arm is not there."""
    if not chain:
        return runs
    arms = list(dict.fromkeys(runs.table["arm"]))
    unknown = [arm for arm in chain if arm not in arms]
    require(not unknown, f"--chain names {', '.join(unknown)}, which is no arm: there are {any_of(arms)}.")
    return only(runs, runs.table["arm"].isin(chain))


def copies(runs: Runs) -> list[list[int]]:
    """Return the numbers of runs that seem to be one run, a list for each such run, the one with the most
    evaluations first. Copies agree at every step after 0 that both have. Of a single evaluation, and without
    curves, so many are equal that rounding would hardly make them so."""
    table, curves = runs.table, runs.by_run
    if not len(curves.run):
        known = table[table["outcome"].abs() < math.inf]
        if _by_rounding(known):
            return []
        equal = known.groupby("outcome", sort=False).groups.values()
        return [rows.tolist() for rows in equal if len(rows) > 1]
    last = curves.end - 1
    rows = curves.end - curves.start
    ends = pd.DataFrame({"step": curves.step[last], "loss": curves.loss[last], "rows": rows})
    of_arm = table[table["arm"].isin(table.loc[curves.run[rows == 1], "arm"])].groupby(["arm", "length"])
    telling = {key for key, known in of_arm if not _by_rounding(known)}
    arms = table["arm"].to_numpy()[curves.run]
    found = []
    ends = ends.sort_values("rows", ascending=False, kind="stable")
    for _, alike in ends.groupby(["step", "loss"], sort=False):
        groups: list[list[int]] = []
        for place in alike.index:
            for group in groups:
                one = arms[place] == arms[group[0]] and (arms[place], curves.step[last[place]]) in telling
                if _agree(curves, place, group[0], 1 if one else 2):
                    group.append(place)
                    break
            else:
                groups.append([place])
        found += [curves.run[group].tolist() for group in groups if len(group) > 1]
    return sorted(found, key=min)


def _by_rounding(known: pd.DataFrame) -> bool:
    """Return whether equal finite outcomes are no wonder: they are all equal, or as many would be by chance
    more often than BY_CHANCE, with this spread within arms and rounded to these digits."""
    from scipy import stats

    known = known[np.isfinite(known["outcome"])]
    if known["outcome"].nunique() < 2:
        return True
    digits = max(len(repr(float(x)).partition("e")[0].partition(".")[2]) for x in known["outcome"])
    apart = (known["outcome"] - known.groupby("arm")["outcome"].transform("median")).abs()
    spread = float(apart[apart > 0].median()) if (apart > 0).any() else float(known["outcome"].std())
    pairs = len(known) * (len(known) - 1) / 2
    alike = known.groupby("outcome").size()
    equal = float((alike * (alike - 1) / 2).sum())
    expected = pairs * 10.0**-digits / (2 * np.sqrt(np.pi) * spread)
    return bool(stats.poisson.sf(equal - 1, expected) >= BY_CHANCE)


def _agree(curves: Curves, one: int, other: int, fewest: int) -> bool:
    """Return whether two curves agree at every step after 0 that both have, at least `fewest` of them."""
    mine, its = (slice(curves.start[i], curves.end[i]) for i in (one, other))
    steps_of_both = (curves.step[mine], curves.step[its])
    shared, here, there = np.intersect1d(*steps_of_both, assume_unique=True, return_indices=True)
    after = shared > 0
    return bool(after.sum() >= fewest and (curves.loss[mine][here] == curves.loss[its][there])[after].all())


def distinct_runs(runs: Runs) -> tuple[Runs, list[Caution]]:
    """Return the runs without copies of another run of their arm, and a caution that names these."""
    table = runs.table
    groups = (table.loc[group] for group in copies(runs))
    copied = [number for group in groups for number in group.index[group["arm"].duplicated()]]
    if not copied:
        return runs, []
    names = runs.names(sorted(copied))
    sentence = f"Left out, as asked, as copies of other runs: {listed(names)}."
    kept = ~table.index.isin(copied)
    return only(runs, kept), [Caution(kind="copies", sentence=sentence, runs=names)]


def at_one_length(runs: Runs) -> tuple[Runs, list[Caution]]:
    """Return the runs without those of other lengths, where an arm has runs of several: kept is a length at
    which a configuration was repeated, then the one that most arms have, that of most runs, the longest.

    Lengths are the planned ones or, without a column that has them, last steps that several runs of an arm
    share; a diverged run was to be longer than its curve."""
    table = runs.table
    planned = bool(table["planned"].notna().any())
    column = "planned" if planned else "length"
    finished = (table["outcome"].abs() < math.inf) | planned
    lengths: dict[str, dict[Any, int]] = {}  # arm -> length -> number of runs
    for name, rows in table[finished].groupby("arm", sort=False):
        counts = rows[column].value_counts().sort_index()
        lengths[str(name)] = (counts if planned else counts[counts > 1]).to_dict()
    several = {arm: of_arm for arm, of_arm in lengths.items() if len(of_arm) > 1}
    if not several or not (runs.step_name or planned):
        return runs, []
    alike = table.groupby(["arm", column, *runs.settings], dropna=False).size()
    keys = zip(alike.index, alike.tolist(), strict=True)
    repeated = {(arm, length) for (arm, length, *_), number in keys if number >= REPLICATED}

    def weight(arm: str, length: float) -> tuple[bool, int, int, float]:
        having = [of_arm[length] for of_arm in lengths.values() if length in of_arm]
        return (arm, length) in repeated, len(having), sum(having), length

    kept = table.index >= 0
    judged = []
    for arm, of_arm in several.items():
        longest = max(of_arm, key=lambda length: weight(arm, length))
        others = [length for length in of_arm if length != longest]
        kept &= (table["arm"] != arm) | ~(table[column].isin(others) & finished)
        judged.append(f"{longest:g} of {arm} (it has {listed(f'{length:g}' for length in of_arm)})")
    if kept.all():
        return runs, []
    sentence = (
        f"Arms have runs of several lengths in {runs.step_name or 'step'}s; judged are {listed(judged)}. "
        f"The other {int((~kept).sum())} runs are left out of it; --where COLUMN=VALUE takes others."
    )
    return only(runs, kept), [Caution(kind="lengths", sentence=sentence, runs=runs.names(~kept))]


def only(runs: Runs, kept: Any) -> Runs:
    """Return these runs alone, numbered afresh. `kept`: a flag for each row of the table."""
    kept = np.asarray(kept)
    if kept.all():
        return runs
    numbers = np.full(len(kept), -1, dtype=np.int64)
    numbers[kept] = np.arange(int(kept.sum()))
    curves = runs.curves[kept[runs.curves["run"].to_numpy()]]
    curves = curves.assign(run=numbers[curves["run"].to_numpy()]).reset_index(drop=True)
    return replace(runs, table=runs.table[kept].reset_index(drop=True), curves=curves)


def with_outcome(runs: Runs, asked: Asked) -> tuple[Runs, list[Caution]]:
    """Return the runs with the outcome that is asked for. Raises UserError where runs have no curves and it
    is one of a curve, or an arm has no evaluation at the step that is asked for."""
    for option, given in (
        ("--target", asked.target is not None),
        ("--rule", bool(asked.rule)),
        (f"--outcome {asked.outcome}", asked.outcome != "last"),
        ("--at", bool(asked.at)),
    ):
        lacking = f"{option} needs curves, and these runs have one {runs.loss} each."
        require(bool(runs.step_name) or not given, lacking)
    require(runs.better == "lower" or not asked.rule, f"--rule {asked.rule} is one of losses.")
    if asked.outcome == "last" and not asked.at:
        return runs, []
    if asked.outcome == "target":
        assert asked.target is not None  # `check` saw to it
        reached = steps.steps_to_target(runs.curves, runs.table, asked.target, runs.better)
        return _replaced(runs, reached["step"], math.inf), []
    if asked.outcome == "best":
        best = runs.curves.groupby("run")["loss"].agg("min" if runs.better == "lower" else "max")
        return _replaced(runs, best.reindex(runs.table.index), runs.worst), []
    values, missing = _at(runs, asked.at)
    names = runs.names(missing)
    sentence = (
        f"{len(names)} runs have no evaluation at the step that is asked for, and rank behind the others."
    )
    cautions = [Caution(kind="no_step", sentence=sentence, runs=names)] if names else []
    return _replaced(runs, values, runs.worst), cautions


def _replaced(runs: Runs, outcome: Any, worst: float) -> Runs:
    same = runs.table["outcome"].equals(runs.table["chosen_by"])
    outcome = np.where(np.isfinite(outcome), outcome, worst)
    table = runs.table.assign(outcome=outcome)
    return replace(runs, table=table.assign(chosen_by=outcome) if same else table)


def _at(runs: Runs, at: Mapping[str, float]) -> tuple[Any, Any]:
    """Return the outcome of each run where a step is asked for its arm, and which have no value there.

    Raises UserError where no run of an arm has one."""
    table, curves = runs.table, runs.curves
    arms = list(dict.fromkeys(table["arm"]))
    unknown = [arm for arm in at if arm and arm not in arms]
    require(
        not unknown, f"--at names the arm {', '.join(unknown)}, which is not there: there are {any_of(arms)}."
    )
    wanted = table["arm"].map(lambda arm: at.get(arm, at.get("", math.nan))).to_numpy(dtype=float)
    there = curves[curves["step"].to_numpy() == wanted[curves["run"].to_numpy()]]
    values = np.where(np.isnan(wanted), table["outcome"], math.nan)
    values[there["run"].to_numpy()] = there["loss"].to_numpy()
    missing = np.isnan(values)
    for arm in arms:
        of_arm = (table["arm"] == arm).to_numpy()
        if missing[of_arm].all():
            step = wanted[of_arm][0]
            near = curves["step"][of_arm[curves["run"].to_numpy()]]
            nearest = f"{near.iloc[(near - step).abs().argmin()]:g}" if len(near) else "none"
            raise UserError(
                f"{arm} has no evaluation at {runs.step_name} {step:g}: the nearest is {nearest}."
            )
    return values, missing


def chosen_runs(runs: Runs, tried: Mapping[str, Sequence[Configuration]], tuned: Tuning | None) -> Runs:
    """Return each arm's runs in the configuration that is chosen for it; all where no arm had a choice."""
    if tuned is None:
        return runs
    rows: set[int] = set()
    for arm, configurations in tried.items():
        rows.update(configurations[tuned["arms"][arm]["chosen"]["number"]].rows)
    return only(runs, [number in rows for number in range(len(runs.table))])


def losses_by_arm(runs: Runs, *, turn: bool, by: str = "run") -> Losses:
    """Return the arms' losses by number of the run or by seed. `turn`: larger outcomes are better."""
    keys = runs.table.index if by == "run" else runs.table[by]
    found: Losses = {}
    for arm, key, value in zip(runs.table["arm"], keys, runs.table["outcome"], strict=True):
        found.setdefault(arm, {})[str(key)] = -value if turn else value
    return found
