"""The table of a study's arms, that of what parts of a run say of them, and, of energy-based models, that of
what their splats know of the states.

They show decisions as recorded; `results` (run id -> result) adds spreads and times.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ebc_lab.config.part import Figure, Head
from ebc_lab.config.parts import PARTS
from ebc_lab.records.columns import BITS, PART_FIGURES
from ebc_lab.records.decisions import Arm, ComparedTrack, Efficiency, TunedArm, Window
from ebc_lab.records.figures import RunResult
from ebc_lab.study.stages import suite
from ebc_lab.study.stages.compare_arms import completed_runs, completed_values, spread

from . import words
from .table import (
    EVERYWHERE,
    PAGE,
    PAPER,
    SPREAD,
    TERMINAL,
    Cell,
    Column,
    Row,
    Table,
    filled,
    loss_column,
    two_digits,
)
from .words import NOTHING, brief, fixed, percent

Results = Mapping[str, RunResult]
MEANS = "means over the completed seeds"


def lr_window(tuned: TunedArm | None) -> Window | None:
    """Return the LR window that an arm's tuning shows; None if only one rate was tried at its best point."""
    return tuned.get("window") if tuned and len(tuned.get("curve", ())) > 1 else None


def point_in_words(arm: Arm | TunedArm) -> str:
    """Return what an arm was tuned to; empty where nothing was."""
    return suite.point_in_words(arm.get("point"))


def _drift(symbol: str) -> Column:
    form = lambda ends: f"{ends[0]:.2g}→{ends[1]:.2g}" if ends else ""  # noqa: E731
    return Column(f"{symbol} early→late", form=form, on=(TERMINAL,))


def _page_column(title: str, form: Callable[[Any], str], *also: str) -> Column:
    return Column(title, "figure", form, title, on=(PAGE, *also), optional=True)


BITS_TITLE = "Bits per character"


def bits_column(**how: Any) -> Column:
    """Make the column of bits per character, in studies where these are not nats by another factor."""
    return Column(BITS_TITLE, "figure", lambda bits: fixed(bits, 3), "bits/char", optional=True, **how)


FORMS: dict[str, Callable[[Any], str]] = {  # of a `Figure` -> how its value is written
    "brief": brief,
    "two_digits": two_digits,
    "four_digits": fixed,
    "percent": percent,
    "tenths_of_percent": lambda x: percent(x, 1),
    "times": lambda x: NOTHING if x is None else f"{x:.1f}×",
    "factor": lambda x: NOTHING if x is None else f"×{brief(x)}",
    "size": words.size,
}
SCREENS = (TERMINAL, PAGE)  # a paper has no room


def _part_columns(place: str) -> dict[str, Head]:
    """Return the columns that parts of a run ask for beside the loss or beside the steps."""
    return {key: f.head for key, f in PART_FIGURES.items() if f.head and f.head.beside == place}


LOSS_COLUMNS, STEPS_COLUMNS = _part_columns("loss"), _part_columns("steps")


def _column_of(head: Head, on: Sequence[str], optional: bool = True) -> Column:
    form, short, notes = FORMS[head.form], head.short or head.title, {"": head.note} if head.note else {}
    return Column(head.title, "figure", form, short, on=on, optional=optional, notes=notes)


TO_BASELINE = {"": "steps, time to the baseline’s loss: to its last validation loss"}
ARMS = (
    Column("Arm", "name", short="arm", head=True),
    Column("What it is", "prose", on=(PAGE,), optional=True),
    Column("Tuned to", "prose", on=(PAGE,), optional=True),
    _page_column("Learning rate", brief),
    _page_column("δ*", brief),
    Column("Seeds completed", "figure", short="seeds"),
    loss_column("Validation loss", "val. loss"),
    loss_column("Test loss", "test loss", notes=SPREAD),
    bits_column(),
    *(_column_of(head, SCREENS) for head in LOSS_COLUMNS.values()),
    Column("ms per step", "figure", brief, "ms/step", on=SCREENS, optional=True),
    Column("Median c", "figure", two_digits, "c", optional=True),
    _drift("c"),
    _drift("S"),
    _drift("β"),
    _page_column("Clipped", percent),
    _page_column("KL per step", brief, TERMINAL),
    Column("KL/δ*", "figure", two_digits, optional=True),
    _page_column("KL within ±30%", percent, TERMINAL),
    *(_column_of(head, (TERMINAL,), optional=False) for head in STEPS_COLUMNS.values()),
    replace(_page_column("Steps to the baseline’s loss", brief), notes=TO_BASELINE),
    _page_column("Time to it", words.clock),
    Column("Outcomes", "prose", short="outcomes", on=(TERMINAL, PAGE), optional=True),
)


def arms(
    name: str, track: ComparedTrack, results: Results | None = None, names: Iterable[str] | None = None
) -> Table:
    """Return the arms of the finals or of a suite, in the order of `names`: their figures, means over
    completed seeds; where any has few levels or a policy, also bits per weight, how much smaller the whole
    model is, and the time of a step. Without `results`, the means of the decision, no spreads and no times.
    """
    parts = _figures_present(track, results)
    rows = _rows(ARMS, track, names, lambda label: _arm(label, track, results or {}, bool(parts)))
    return Table(name, "Arms", ARMS, rows, f"{MEANS}; losses in nats per token")


def _rows(
    columns: Sequence[Column],
    track: ComparedTrack,
    names: Iterable[str] | None,
    values: Callable[[str], Iterable[Any]],
) -> list[Row]:
    """Return a row for each arm in the order of `names`: its name and `values`. The reference stands out."""
    rows = []
    for label in names or track["arms"]:
        chosen = label == track.get("reference")
        named = _named(label, track["arms"][label], chosen)
        rows.append(filled(columns, (named, *values(label)), chosen=chosen))
    return rows


def _arm(label: str, track: ComparedTrack, results: Results, timed: bool) -> tuple[Any, ...]:
    """Return an arm's cells after its name; the time of a step only if `timed`."""
    arm = track["arms"][label]
    done, runs = arm["outcomes"].get("completed", 0), len(arm["runs"])
    diverged = arm["outcomes"].get("diverged")
    lost = Cell(f"{diverged} of {runs} diverged", page=f"{diverged} diverged") if diverged else None

    def mean(key: str) -> float | None:
        return _mean(arm, results, key)

    loss = _with_spread(arm, results)
    efficiency = track.get("efficiency")
    reached = (efficiency or {}).get(label)
    ebc = arm["ebc"]
    in_suite = "about" in arm  # the finals' table has other columns instead
    return (
        arm.get("about"),
        point_in_words(arm),
        arm.get("lr"),
        arm.get("delta_star"),
        Cell(f"{done} of {runs}" if done < runs else str(runs), done),
        lost or mean("val_loss"),
        lost or replace(loss, text=fixed(loss.value), page=loss.text),
        bits_of(arm),
        *map(mean, LOSS_COLUMNS),
        _ms_per_step(arm, results) if timed else None,
        mean("c_median") if ebc else None,
        _ends(arm, "c") if ebc else None,
        _ends(arm, "surrogate"),
        _ends(arm, "beta"),
        mean("clip_rate"),
        mean("kl_median"),
        mean("kl_ratio_median") if ebc else None,
        mean("kl_within_30pct") if ebc and in_suite else None,
        *map(mean, STEPS_COLUMNS),
        _steps_to_baseline(efficiency, reached, runs),
        reached["train_s"] if reached else None,
        ", ".join(f"{n} {o}" for o, n in arm["outcomes"].items()) if in_suite and done < runs else "",
    )


def test_loss(arm: Arm, results: Results | None) -> Cell:
    """Return an arm's mean test loss with its spread over the seeds, or how many of its runs diverged."""
    if diverged := arm["outcomes"].get("diverged"):
        return Cell(f"{diverged} of {len(arm['runs'])} diverged")
    return _with_spread(arm, results or {})


def _mean(arm: Arm, results: Results, key: str) -> float | None:
    """Return a figure's mean over completed runs: the decision's, or if it has none (finals), the runs'."""
    recorded: Mapping[str, Any] = arm.get("figures", arm)
    figure = PART_FIGURES.get(key, Figure(key, "", ""))
    if key in recorded or not figure.averaged:
        return recorded.get(key)
    return figure.mean(completed_runs(arm, results))


def bits_of(arm: Arm) -> float | None:
    """Return mean bits per character on the test split; None if a run diverged, or of losses in nats."""
    recorded: Mapping[str, Any] = arm.get("figures", arm)
    return None if arm.get("outcomes", {}).get("diverged") else recorded.get(BITS)


def _with_spread(arm: Arm, results: Results) -> Cell:
    mean = _mean(arm, results, "test_loss")
    deviation = spread(completed_values(arm, results, "test_loss"))
    return Cell(fixed(mean) + (f" ± {fixed(deviation)}" if deviation is not None else ""), mean)


def _ends(arm: Arm, key: str) -> tuple[float, float] | None:
    """Return a figure near the start and near the end of the run."""
    figures = arm.get("figures", {})
    early, late = figures.get(f"{key}_early"), figures.get(f"{key}_late")
    return None if early is None or late is None else (early, late)


def _named(label: str, arm: Arm, reference: bool) -> Cell:
    """Return a suite's arm by its own name, a final one in words where there is room for them."""
    if "about" not in arm and "roles" in arm:
        roles = ", ".join(map(words.role, arm["roles"]))
        return Cell(label, page=words.arm_label(label, arm), note=roles, code=label)
    remarks = ["reference"] if reference else []
    remarks += [] if arm.get("comparable", True) else ["judged on another text"]
    return Cell(label, note=", ".join(remarks))


def _steps_to_baseline(efficiency: Any, reached: Efficiency | None, runs: int) -> Cell:
    """Return when an arm's loss is down to the baseline's final one, and how many of its runs get there, if
    not all; nothing for a suite."""
    if efficiency is None:
        return Cell()
    if reached is None:
        return Cell("not reached")
    some = f"{reached['seeds']} of {runs} seeds" if reached["seeds"] < runs else ""
    return Cell(brief(reached["steps"]), reached["steps"], note=some)


# -- figures of parts ----------------------------------------------------------------------------------------


TABLED = tuple(part for part in PARTS if part.table)  # whose figures have a table of their own
FIGURE_COLUMNS = {  # figure of an arm -> its column
    figure.key: _column_of(figure.head, figure.head.places)
    for part in TABLED
    for figure in part.figures
    if figure.head
}
PART_COLUMNS = (
    Column("Arm", "name", short="arm", head=True),
    *FIGURE_COLUMNS.values(),
    Column("ms per step", "figure", brief, "ms/step", on=(PAPER,), optional=True),
)


def part_figures(
    name: str, track: ComparedTrack, results: Results | None = None, names: Iterable[str] | None = None
) -> Table | None:
    """Return what parts of a run say of the arms, such as what few levels took or what is kept beside the
    weights, in the order of `names`; None where no arm has any of it."""
    present = _figures_present(track, results)
    if not present:
        return None
    parts = [part.table for part in TABLED if present & {figure.key for figure in part.figures}]

    def values(label: str) -> list[float | None]:
        arm = track["arms"][label]
        figures = [_mean(arm, results or {}, key) for key in FIGURE_COLUMNS]
        return [*figures, _ms_per_step(arm, results or {})]

    rows = _rows(PART_COLUMNS, track, names, values)
    return Table(name, " and ".join(parts).capitalize(), PART_COLUMNS, rows, MEANS)


def _figures_present(track: ComparedTrack, results: Results | None) -> set[str]:
    """Return the figures of parts that any arm has."""
    arms = track["arms"].values()
    return {key for arm in arms for key in FIGURE_COLUMNS if _mean(arm, results or {}, key) is not None}


def _ms_per_step(arm: Arm, results: Results) -> float | None:
    """Return the time of a training step, evaluations aside; None where no completed run says it."""
    done = completed_runs(arm, results)
    timed = [1000 * r["train_s"] / r["steps"] for r in done if r.get("train_s") and r.get("steps")]
    return statistics.fmean(timed) if timed else None


# -- energy-based models -------------------------------------------------------------------------------------


def _state_column(
    title: str, form: Callable[[Any], str], short: str, note: str = "", on: Sequence[str] = EVERYWHERE
) -> Column:
    notes = {"": note} if note else {}
    return Column(title, "figure", form, short, on=on, optional=True, notes=notes)


STATE_COLUMNS = {  # key of `workload` in result.json -> its column; those of levels stand before `winners`
    "sampled": _state_column(
        "Sampled loss",
        fixed,
        "sampled",
        "sampled: nats per token over a few tokens, an upper bound from several latents",
    ),
    "settled": _state_column(
        "The same, settled", fixed, "settled", "settled: without chance, on the same tokens", on=SCREENS
    ),
    "energy": _state_column(
        "Energy", two_digits, "energy", "energy in nats, less that of the uniform law", on=SCREENS
    ),
    "winners": _state_column("Splats that win", percent, "winning", on=SCREENS),
    "state_coverage": _state_column(
        "States covered",
        percent,
        "covered",
        "covered: states no further from their splat than its concentration expects",
    ),
    "kappa_median": _state_column("Median κ", two_digits, "κ", "κ per degree of freedom", on=SCREENS),
    "kappa_at_limit": _state_column("κ at a limit", percent, "at limit", on=SCREENS),
    "state_spread": _state_column(
        "Spread", two_digits, "spread", "spread: 0 where all states are one", on=SCREENS
    ),
}
SCORED = "r2_"
SCORES_BEFORE = "winners"
SCORES = {
    "": "R²: share of the score explained of states noised by so many radians",
    "/": "after the stroke: what states spread as their own splats would give",
}


def states(
    name: str, track: ComparedTrack, results: Results, names: Iterable[str] | None = None
) -> Table | None:
    """Return what energy-based models' splats know of held-out states; None if no arm is such a model."""
    every = {label: _workload_means(completed_runs(arm, results)) for label, arm in track["arms"].items()}
    there = {key for figures in every.values() for key in figures}
    if not there:
        return None
    levels = sorted((key for key in there if re.match(rf"{SCORED}\d", key)), key=_sigma)
    shown = [*STATE_COLUMNS]
    place = shown.index(SCORES_BEFORE)
    shown[place:place] = levels
    scores = {
        key: Column(f"R² at {_sigma(key):g}", "figure", short=f"R² {_sigma(key):g}", notes=SCORES)
        for key in levels
    }
    own = [(STATE_COLUMNS | scores)[key] for key in shown]

    def values(label: str) -> list[Any]:
        figures = every[label]
        return [_score(figures, key) if key in scores else figures.get(key) for key in shown]

    columns = (Column("Arm", "name", short="arm", head=True), *own)
    note = f"{MEANS}, on validation text"
    return Table(name, "States and splats", columns, _rows(columns, track, names, values), note)


def _sigma(key: str) -> float:
    """Return the noise level, radians, in the name of its figure: 0.05 of `r2_0p05`."""
    return float(key.removeprefix(SCORED).replace("p", "."))


def _score(figures: Mapping[str, float], key: str) -> Cell:
    """Return R² and, after a stroke, its matched value."""
    r2, matched = figures.get(key), figures.get(f"matched_{key.removeprefix(SCORED)}")
    if r2 is None:
        return Cell(NOTHING)
    beside = f"/{matched:.2g}" if matched is not None else ""
    return Cell(f"{r2:.2g}{beside}".replace("-", "−"), r2)


def _workload_means(completed: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the figures of these runs' models, as means."""
    models = [r["workload"] for r in completed if r.get("workload")]
    keys = {key for figures in models for key, value in figures.items() if isinstance(value, int | float)}
    known = {key: [f[key] for f in models if f.get(key) is not None] for key in sorted(keys)}
    return {key: statistics.fmean(values) for key, values in known.items()}
