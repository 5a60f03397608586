"""What a judgement says beside its differences: steps to a target, lengths, and another benchmark's rule.

Each function returns a part of the record, as JSON has it, or None where the runs do not say anything of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pandas as pd

from ebc_lab.config.errors import count
from ebc_lab.study.stages.statistics import CONFIDENCE, NO_LUCK, Luck

from . import rules, steps
from .asked import Asked
from .outcomes import Losses
from .record import DifferenceRecord
from .runs import Runs

BENT = 0.2  # p of a straight line over lengths at or below which its slope is not used


def steps_section(
    runs: Runs, first: str, asked: Asked, *, pairs: bool, paired: bool
) -> dict[str, Any] | None:
    """Return `target`, `arms` (arm -> `steps.Reached`) and `ratios` (a `steps.Ratio` for each comparison).

    `first`: the reference, or the arm that pairs begin with."""
    if asked.target is None:
        return None
    table = runs.table
    reached = steps.steps_to_target(runs.curves, table, asked.target, runs.better)
    arms = steps.reached_by_arm(reached, table)
    ratios: list[steps.Ratio] = []
    if len(arms) > 1 and any(arm["reached"] for arm in arms.values()):
        ratios = steps.ratios_of_steps(reached, table, first, pairs=pairs, chain=asked.chain, paired=paired)
    return {"target": asked.target, "arms": arms, "ratios": ratios}


def lengths_section(
    every: Runs,
    judged: Runs,
    losses: Losses,
    luck: Mapping[str, Luck],
    reference: str,
    asked: Asked,
    compare: Callable[[Losses, Mapping[str, Luck]], Sequence[DifferenceRecord]],
    *,
    turn: bool,
) -> dict[str, Any] | None:
    """Return what lengths say, None where all runs have one. `every`: the runs of all lengths; `luck`: arm ->
    the luck of its tuning; `compare`: compares arms by losses and luck, as it does the outcomes.

    * `rates`: arm -> `steps.Exchange`, of arms that have runs of several lengths;
    * `ratios`: `steps.Ratio` of the lengths at which an arm ends as low as the reference;
    * `exchange`: the loss that a step is worth in `differences`, and `by`, whence it is; None where unknown;
    * `differences`: the comparisons at equal steps, each further step charged at the exchange; intervals are
      widened for what is not known of an estimated one.
    """
    if not every.step_name or asked.outcome != "last":
        return None
    table = _of_chosen(every, judged)
    table = table.assign(outcome=-table["outcome"]) if turn else table
    rates = steps.exchange_rates(table)
    longest = judged.table.groupby("arm", sort=False)["length"].max()
    # the step of each arm's outcome: as asked, else the last of its longest run
    lengths = {str(arm): float(asked.at.get(str(arm), asked.at.get("", x))) for arm, x in longest.items()}
    if not rates and len(set(lengths.values())) < 2:
        return None
    others = [arm for arm in losses if arm != reference] if reference else []
    several = [steps.ratio_of_lengths(table, arm, reference, len(others)) for arm in others]
    exchange, by, error = _exchange(rates, lengths, reference, asked)
    compared: Sequence[DifferenceRecord] = []
    if exchange is not None and len(set(lengths.values())) > 1:
        fewest = min(lengths.values())
        luck = {
            arm: luck[arm] + Luck(error.sd * (length - fewest), error.freedom)
            for arm, length in lengths.items()
        }
        compared = compare(steps.at_equal_steps(losses, lengths, exchange), luck)
    return {
        "lengths": lengths,
        "rates": rates,
        "ratios": [ratio for ratio in several if ratio],
        "exchange": exchange,
        "by": by,
        "differences": compared,
    }


def _of_chosen(every: Runs, judged: Runs) -> pd.DataFrame:
    """Return the table of `every` run but, where an arm tried several configurations at one length, only the
    one that is judged: whatever else was tried there would pass for what the length does."""
    table, settings = every.table, list(every.settings)
    if not settings:
        return table
    configuration = table.groupby(settings, sort=False, dropna=False).ngroup()
    length = table["planned"].fillna(table["length"])
    several = configuration.groupby([table["arm"], length]).transform("nunique") > 1
    chosen = judged.table[["arm", *settings]].drop_duplicates()
    known = table[["arm", *settings]].merge(chosen, how="left", indicator=True)["_merge"] == "both"
    return table[~several | known.to_numpy()]


def _exchange(
    rates: Mapping[str, steps.Exchange], lengths: Mapping[str, float], reference: str, asked: Asked
) -> tuple[float | None, str, Luck]:
    """Return the loss that a step is worth, where that is from, and its standard error: as given, else from
    the reference's lengths, else from those of the arm with most runs. It is None, and the second value says
    why, where no rate has an interval, the loss bends over the lengths, or they do not reach far enough."""
    if asked.exchange is not None:
        return asked.exchange, "as given", NO_LUCK
    known = {arm: rate for arm, rate in rates.items() if rate["low"] is not None and rate["high"] is not None}
    if not known:
        return None, "no arm has the three runs that its error needs", NO_LUCK
    known = {arm: rate for arm, rate in known.items() if rate["bends"] is None or rate["bends"] > BENT}
    if not known:
        return None, "the loss bends over the lengths of every arm that has several", NO_LUCK
    shortest, longest = min(lengths.values()), max(lengths.values())
    spans = {arm: rate["lengths"] for arm, rate in known.items()}
    known = {arm: known[arm] for arm, own in spans.items() if own[0] <= shortest and longest <= own[-1]}
    if not known:
        return None, "the arms' lengths reach beyond those of every arm that has several", NO_LUCK
    from scipy import stats

    arm = reference if reference in known else max(known, key=lambda name: known[name]["runs"])
    rate = known[arm]
    freedom = rate["runs"] - 2.0
    half = cast(float, rate["high"]) - cast(float, rate["per_step"])
    error = half / float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
    return rate["per_step"], f"from the lengths of {arm}", Luck(error, freedom)


def rule_section(runs: Runs, asked: Asked) -> dict[str, Any] | None:
    """Return what the rule of another benchmark says: `standings` and `claims`, the arms by their steps, the
    most first, and `spread`, how the runs' own σ stands to the rule's."""
    if not asked.rule:
        return None
    results = rules.standings(runs.curves, runs.table, asked.at)
    in_order = sorted(results, key=lambda one: -(one["step"] or 0.0))
    spread = rules.spread(results)
    claims = rules.claims(in_order, asked.exchange)
    reached, better = (sum(one["holds"] for one in some) for some in (results, claims))
    pooled = spread["pooled"]
    sentence = f"By track3’s rule {reached} of {count(len(results), 'arm')} reached {rules.TARGET:g}"
    if claims:
        sentence += f", and {better} of {len(claims)} beat the one before, in the order of falling steps"
    own = f"that of these runs is {pooled:.2g}." if pooled else "no arm here has a σ to compare with it."
    sentence += f". The rule assumes a σ of {rules.SIGMA:g}; {own}"
    return {
        "name": asked.rule,
        "sigma": rules.SIGMA,
        "target": rules.TARGET,
        "standings": [{k: v for k, v in one.items() if k != "losses"} for one in in_order],
        "claims": claims,
        "spread": spread,
        "sentence": sentence,
    }
