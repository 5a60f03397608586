"""Findings from the figures of a run's evaluations: what is wrong, and what to try (docs/ebm.md).

Nothing here looks at a model: `findings` and `alerts` judge figures by the names of `evaluate.held_out` and,
where they are there, `soc_rate`, `load_max` (the largest share of first places that an expert has) and
`dropped_mass`. A model without splats lacks most of them, and no finding is made of what is not there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from .evaluate import TREND_OVER, TREND_T, energy_trend
from .soc import AVALANCHES, PowerLaw, power_law

ALERT, FINE, UNKNOWN = "alert", "fine", "unknown"
ERRORS = 2.0  # standard errors below 0 at which the score is worse than none

# the order of a table's columns; a figure that no evaluation has is left out
TRENDS = (
    *("val_loss", "energy", "state_spread"),
    *("splat_coverage", "state_coverage", "kappa_median", "soc_rate"),
)


@dataclass(frozen=True)
class Finding:
    """One figure beside its threshold; NaN where the figure is not known."""

    cause: str  # the name of the figure
    figure: float
    threshold: float
    verdict: str  # ALERT, FINE or UNKNOWN
    recommendation: str  # one, for an alert; empty otherwise


class Limit(NamedTuple):
    """The threshold of a figure for which it is always the same."""

    threshold: float
    above: bool  # an alert above the threshold, else below it
    recommendation: str


LIMITS = {
    "load_max": Limit(0.6, True, "raise ebm.balance: most tokens go to one expert first"),
    "splat_coverage": Limit(0.8, False, "turn ebm.revive on, or choose fewer ebm.splats: many win nothing"),
    "kappa_at_limit": Limit(
        0.5, True, "move the one of ebm.kappa_min and ebm.kappa_max that kappa_median is near"
    ),
    "dropped_mass": Limit(0.01, True, "raise ebm.neighbours: splats that act on the states are left out"),
}
ENERGY_RISES = "lower the learning rate, or raise ebm.mle: the splats lose the states"
MORE_EVENTS = "lower the learning rate, or raise ebm.soc_threshold: new states appear faster than splats"
SCORE_IS_WRONG = "raise ebm.score, or ebm.states: at this noise the score points away from the states"


COMPARED = ("energy", "soc_rate")  # whose threshold is another figure of the run
COMPARED_WITH = (
    "energy: its slope an evaluation beside two standard errors; soc_rate: beside its first value over 0"
)


def alerts(figures: Mapping[str, float], curve: Sequence[Mapping[str, float]]) -> list[Finding]:
    """Return those of the `findings` that are an alert."""
    return [finding for finding in findings(figures, curve) if finding.verdict == ALERT]


def findings(figures: Mapping[str, float], curve: Sequence[Mapping[str, float]]) -> list[Finding]:
    """Judge every figure that has a threshold.

    Args:
        figures: of the latest evaluation.
        curve: of all evaluations so far, in their order, the latest included.
    """
    judged = [*_of_energy(curve)]
    if "soc_rate" in figures:
        # consolidations per 1,000 states, beside the first such figure over 0
        first = next((rate for rate in _series(curve, "soc_rate") if rate > 0), math.nan)
        judged.append(_judged("soc_rate", figures["soc_rate"], first, 1, MORE_EVENTS))
    for level in levels_of(figures):
        threshold = -ERRORS * figures.get(f"r2_se_{level}", math.nan)
        judged.append(_judged(f"r2_{level}", figures[f"r2_{level}"], threshold, -1, SCORE_IS_WRONG))
    for name, limit in LIMITS.items():
        if name in figures:
            sign = 1 if limit.above else -1
            judged.append(_judged(name, figures[name], limit.threshold, sign, limit.recommendation))
    return judged


def _judged(cause: str, figure: float, threshold: float, sign: int, recommendation: str) -> Finding:
    """Judge a figure: an alert where it lies above its threshold, with sign -1 where it lies below."""
    if not (math.isfinite(figure) and math.isfinite(threshold)):
        return Finding(cause, figure, threshold, UNKNOWN, "")
    if sign * (figure - threshold) > 0:
        return Finding(cause, figure, threshold, ALERT, recommendation)
    return Finding(cause, figure, threshold, FINE, "")


def _of_energy(curve: Sequence[Mapping[str, float]]) -> Iterator[Finding]:
    """Judge the slope of the energy in nats an evaluation, beside two of its standard errors."""
    energies = _series(curve, "energy")
    if not energies:
        return
    trend = energy_trend(energies)
    if trend == "unknown":
        yield Finding("energy", math.nan, math.nan, UNKNOWN, "")
        return
    from scipy import stats

    latest = energies[-TREND_OVER:]
    fit = stats.linregress(np.arange(len(latest)), latest)
    verdict, recommendation = (ALERT, ENERGY_RISES) if trend == "increasing" else (FINE, "")
    yield Finding("energy", float(fit.slope), TREND_T * float(fit.stderr), verdict, recommendation)


def levels_of(figures: Mapping[str, float]) -> list[str]:
    """List the noise levels among the figures, as `0p05` for 0.05 radians."""
    names = (name.removeprefix("r2_") for name in figures if name.startswith("r2_"))
    return [name for name in names if not name.startswith("se_")]


def _series(curve: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [row[name] for row in curve if name in row]


# -- a whole run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diagnosis:
    """The diagnosis of one model."""

    figures: dict[str, float]  # of its latest evaluation
    findings: list[Finding]
    trends: dict[str, str]  # of figures over the last evaluations, in the words of `energy_trend`
    avalanches: int
    law: PowerLaw | None  # of their sizes; None where there are too few to fit one
    criticality: str  # that law in a sentence


def diagnosed(curve: Sequence[Mapping[str, float]], sizes: Sequence[int] = ()) -> Diagnosis:
    """Diagnose a model from all of its evaluations, and the sizes of its avalanches."""
    figures = dict(curve[-1]) if curve else {}
    trends = {name: energy_trend(series) for name in TRENDS if (series := _series(curve, name))}
    law = power_law(list(sizes))
    return Diagnosis(
        figures, findings(figures, curve), trends, len(sizes), law, _criticality(law, len(sizes))
    )


def _criticality(law: PowerLaw | None, avalanches: int) -> str:
    """Write in a sentence what the sizes of avalanches show."""
    if law is None:
        return f"not tested: {avalanches} avalanches, and a law of their sizes takes {AVALANCHES}"
    fit = f"exponent {law.alpha:.2f} from {law.xmin} topplings on, {avalanches} avalanches"
    beside = f"log-likelihood ratio to a log-normal {law.log_likelihood_ratio:+.2f}, p = {law.p:.2g}"
    if law.critical:
        return f"critical: a power law of their sizes is not rejected ({fit}; {beside})"
    return f"not critical: their sizes follow no power law over a decade ({fit}; {beside})"


# -- in words ------------------------------------------------------------------------------------------------


def as_plain(diagnosis: Diagnosis) -> dict[str, Any]:
    """Turn a diagnosis into mappings, lists, texts and numbers."""
    law = None if diagnosis.law is None else diagnosis.law._asdict()
    return asdict(diagnosis) | {"law": law}


def alert_in_words(alert: Mapping[str, Any]) -> str:
    """Write a line of alerts.jsonl, read, as a line of text."""
    figures = f"{alert['cause']} {number(alert['figure'])}, threshold {number(alert['threshold'])}"
    return f"alert at step {alert['step']}: {figures}: {alert['recommendation']}"


def number(value: float) -> str:
    """Write a number in four figures; – for none."""
    return f"{value:.4g}" if math.isfinite(value) else "–"


def as_markdown(title: str, diagnosis: Diagnosis) -> str:
    """Write a diagnosis as a page of Markdown."""
    lines = [f"# {title}", "", "| figure | value | threshold | verdict | recommendation |"]
    lines += ["|---|---|---|---|---|"]
    for finding in diagnosis.findings:
        cells = [finding.cause, number(finding.figure), number(finding.threshold), finding.verdict]
        lines.append(f"| {' | '.join([*cells, finding.recommendation or '–'])} |")
    if any(finding.cause in COMPARED for finding in diagnosis.findings):
        lines += ["", COMPARED_WITH]
    lines += ["", f"Avalanches: {diagnosis.criticality}."]
    lines += ["", f"Over the last {TREND_OVER} evaluations:", ""]
    lines += [f"* {name}: {trend}" for name, trend in diagnosis.trends.items()]
    lines += ["", "Of the latest evaluation:", "", "| figure | value |", "|---|---|"]
    lines += [f"| {name} | {number(value)} |" for name, value in diagnosis.figures.items()]
    return "\n".join(lines) + "\n"
