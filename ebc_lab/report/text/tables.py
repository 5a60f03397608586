"""The tables of a study: what stands in each, for the terminal, the papers and the page alike.

Everything is told from decisions as they were recorded; `results` (run id -> result) adds what these leave
out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

from ebc_lab.records.columns import BITS
from ebc_lab.records.decisions import (
    Arm,
    Candidate,
    Decision,
    Difference,
    Diverged,
    FinalsTrack,
    Line,
    SuiteTrack,
    Sweep,
)
from ebc_lab.records.figures import RunResult
from ebc_lab.records.paths import SpecRecord
from ebc_lab.study.stages.compare_arms import reference_of
from ebc_lab.study.stages.lr_sweep.fair_control import schedule_in_words
from ebc_lab.study.stages.rules import band_distance
from ebc_lab.study.stages.statistics import WINDOW_NATS, in_octaves, level

from . import words
from .arms import PAGE_NOTE as PAGE_NOTE
from .arms import Results as Results
from .arms import arms as arms
from .arms import bits_column, point_in_words
from .arms import bits_of as bits_of
from .arms import low_bit as low_bit
from .arms import states as states
from .beside import beside_weights as beside_weights
from .glance import intervals_in_words, verdict_cell
from .modes import modes as modes
from .profiles import ratios as ratios
from .profiles import scores as scores
from .table import PAGE, PAPER, TERMINAL, Cell, Column, Row, Table, filled, loss_column, two_digits
from .units import settings as settings
from .units import units as units
from .words import NOTHING, brief, fixed, percent, signed

Draw = Callable[[Difference], Any]


# -- decisions -----------------------------------------------------------------------------------------------


CANDIDATES = (
    Column("Result", short=""),
    Column("Arm", "name", short="arm", head=True),
    Column("Part", short="part"),
    Column("Learning rate", "figure", brief, "lr"),
    Column("Scale", "figure", lambda x: f"×{brief(x)}", "scale", optional=True),
    Column("δ*", "figure", brief, optional=True),
    Column("Seed", "figure", str, "seed", optional=True),
    loss_column("Validation loss", "val loss"),
    loss_column("± s.e.", "±"),
    Column("Behind", "figure", signed, "behind", on=(PAGE,)),
    Column("Median c", "figure", two_digits, "c", optional=True),
    Column("Clipped", "figure", percent, "clipped", optional=True),
    Column("Notes", "prose", short="notes", optional=True),
)


def candidates(stage: str, decision: Decision, band: Sequence[float] | None) -> Table:
    """Return the runs that a stage chose from, with what became of each. `band`: where the rule wants their
    median c; None where it does not ask for one."""
    tracks = decision["tracks"].values()
    remarks = _of_the_sweep(tracks)
    chosen = {d["run_id"] for d in tracks if "run_id" in d}
    ranked = {run_id for d in tracks for run_id in d.get("ranked", ())}
    inert = {
        r["run_id"]
        for d in tracks
        for of_role in d.get("arms", {}).values()
        for r in of_role
        if r.get("inert")
    }
    best = min((d["val_loss"] for d in tracks if d.get("val_loss") is not None), default=None)
    best_of_grid = min((d["grid"]["val_loss"] for d in tracks if "grid" in d), default=best)
    scales = {c.get("lr_scale") for c in decision["candidates"] if c["role"] not in UNSCALED}
    seeds = sorted({c["seed"] for c in decision["candidates"]})
    parts = PARTS if any(has_control(d) for d in tracks) else {**PARTS, "control": "on a schedule"}
    rows: list[Row] = []
    for c in decision["candidates"]:
        lead = best_of_grid if c["role"] == "grid" else best  # a grid's runs are shorter than the others
        loss = c["val_loss"]
        won = c["run_id"] in chosen
        ebc = c["delta_star"] is not None  # without EBC nothing is clipped
        values = (
            _became(c, won, ranked),
            Cell(c["arm"], link=f"run-{c['run_id']}"),
            parts.get(c["role"]) or words.role(c["role"]),
            c["lr"],
            c["lr_scale"] if len(scales) > 1 else Cell(),
            c["delta_star"],
            c["seed"] if len(seeds) > 1 else Cell(),
            loss,
            c["val_se"],
            loss - lead if loss is not None and lead is not None else None,
            c.get("c_median") if ebc else None,
            c["clip_rate"] if ebc else None,
            "; ".join([*remarks.get((c["role"], c["run_id"]), ()), *_notes(c, inert, band)]),
        )
        chosen -= {c["run_id"]} if won else set()  # a run that two roles share is marked once
        rows.append(filled(CANDIDATES, values, chosen=won))
    note = "losses in nats per token, KL in nats" + (f"; seed {seeds[0]}" if len(seeds) == 1 else "")
    return Table(f"{stage}-candidates", f"Candidates of {stage}", CANDIDATES, rows, note)


UNSCALED = (
    "grid",
    "baseline",
    "replicate",
    "control",
)  # roles that come before a best learning rate is known
PARTS = {"baseline": "constant rate", "control": "control’s search"}  # roles that say else in the finals


def _of_the_sweep(tracks: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[str]]:
    """Return (role, run id) -> what the sweep's decision says of it: its schedule, and what it was taken
    for."""
    remarks: dict[tuple[str, str], list[str]] = {}
    for d in tracks:
        control = d.get("control", {})
        for point in control.get("grid", ()):
            schedule = schedule_in_words({"name": point["schedule"], **point})
            fair = has_control(d) and point["run_id"] == control["run_id"]
            taken = ["taken as the fair control"] if fair else []
            remarks["control", point["run_id"]] = [schedule, *taken]
    return remarks


def has_control(track: Mapping[str, Any]) -> bool:
    """Tell whether anything in the study is compared with the fair control."""
    return bool(track.get("control", {}).get("used", True))


def _became(candidate: Candidate, chosen: bool, ranked: Iterable[str]) -> Cell:
    if chosen:
        return Cell("→ chosen", tone="strong")
    if candidate["outcome"] != "completed":
        return Cell(candidate["outcome"] or "open")
    return Cell("qualified" if candidate["run_id"] in ranked else "")


def _notes(c: Candidate, inert: Iterable[str], band: Sequence[float] | None) -> list[str]:
    """Return what a reader must know of a candidate beyond its figures."""
    notes = []
    middle = c.get("c_median")
    if c["outcome"] != "completed":
        notes.append(c["cause"] or "no result")
    elif band and c["delta_star"] is not None and middle is not None and band_distance(middle, band):
        notes.append(f"median c {'below' if middle < band[0] else 'above'} the band")
    return [*notes, *(["LR inert"] if c["run_id"] in inert else [])]


TUNED = (
    Column("Arm", "name", short="arm", head=True),
    Column("Best point", short="best point"),
    loss_column("Validation loss", "val loss"),
    loss_column("Its worst seed", "worst seed"),
    Column("Margin", "figure", fixed, "margin"),
    Column("Runs", "figure", brief, "runs"),
    Column("Edge of its grid", "prose", short="edge of its grid"),
)


def tuned(stage: str, decision: Decision) -> Table:
    """Return each arm's best point."""
    rows = []
    for track in decision["tracks"].values():
        for name, arm in track["arms"].items():
            edges = ", ".join(f"{k}: {e}" for k, e in arm["edges"].items())
            sigmas = arm["margin_sigma"]
            margin = None if sigmas is None else sigmas * track["sigma"]
            worst = arm.get("worst_loss")
            values = (name, point_in_words(arm), arm["val_loss"], worst, margin, arm["runs"], edges)
            rows.append(filled(TUNED, values))
    note = (
        "validation loss in nats per token, mean of the tuning seeds and its worst one, by which a point is "
        "chosen; margin: to the second best point by its worst seed, in nats"
    )
    return Table(f"{stage}-tuned", "Each arm’s best point", TUNED, rows, note)


# -- windows and regrets of a suite --------------------------------------------------------------------------


SWEPT = {"lr_scale": "learning rate", "delta": "δ*"}  # a swept setting -> what it sets
WINDOWS = (
    Column("Arm", "name", short="arm", head=True),
    Column("Of", short="of"),
    Column("Window, octaves", "figure", short="octaves"),
    Column("Best at", "figure", brief, "best at"),
    loss_column("Best test loss", "best loss"),
    bits_column(),
    Column("At 4 × its best", "figure", lambda x: signed(x, 3), "at ×4", optional=True),
    Column("c·LR, octaves", "figure", lambda x: fixed(x, 1), "c·LR, octaves", optional=True),
    Column("Worst start", "figure", lambda x: signed(x, 3), "worst start", optional=True),
)


def windows(name: str, track: SuiteTrack) -> Table | None:
    """Return how far each swept setting of a suite's arms may be off, widest first; None without a sweep."""
    sweeps = [
        (arm, key, sweep) for arm, swept in track.get("windows", {}).items() for key, sweep in swept.items()
    ]
    sweeps.sort(key=lambda s: (list(SWEPT).index(s[1]), -(s[2]["window"] or {"octaves": -1.0})["octaves"]))
    rows = [filled(WINDOWS, _window(arm, key, sweep, track.get("arms", {}))) for arm, key, sweep in sweeps]
    note = (
        f"how far a setting may be off: octaves within {WINDOW_NATS:g} nats of the arm’s own best test loss; "
        "≥ where the window does not end within what was tried; “worst start” against the best fixed δ*"
    )
    return Table(name, "Windows", WINDOWS, rows, note) if rows else None


def _window(arm: str, key: str, sweep: Sweep, arms: Mapping[str, Arm]) -> tuple[Any, ...]:
    span = sweep["window"]
    if span is None:
        return (arm, SWEPT[key], Cell("every run diverged"), *(None,) * (len(WINDOWS) - 3))
    best = next(p for p in sweep["points"] if p["value"] == span["best"])
    width = Cell(in_octaves(span).removesuffix(" octaves"), span["octaves"])
    rate = sweep["rate_octaves"] if key == "delta" else None
    bits = bits_of(arms.get(best["arm"], {}))
    at = best["lr"] if key == "lr_scale" else best["delta_star"]
    values = (at, span["loss"], bits, sweep["regret_x4"], abs(rate) if rate is not None else None)
    return arm, SWEPT[key], width, *values, sweep.get("worst")


REGRETS = (
    Column("Size", short="size", head=True),
    Column("Arm", "name", short="arm"),
    Column("Regret", "figure", short="regret"),
    Column("Interval", "figure"),
    Column("Minus plain as tuned", "figure", short="minus plain", optional=True),
    Column("Its interval", "figure", short="its interval", optional=True),
)


def regrets(name: str, track: SuiteTrack) -> Table | None:
    """Return what it costs to keep the settings of another size, against tuning again; None without
    transfers."""
    rows = []
    for size in track.get("transfer", ()):
        for arm in size["kept"]:
            cells: list[Cell | str] = []
            pairs: list[Any] = [track["arms"][arm]["difference"] or {}, size["against_kept"].get(arm)]
            for pair in pairs:
                cells += ["", ""] if pair is None else [_centre(pair), _interval(pair, "low", "high")]
            rows.append(filled(REGRETS, (size["shape"], arm, *cells)))
    note = "nats per token: kept settings minus settings tuned again at that size; below zero is better; "
    note += f"{level(arm['difference'] for arm in track['arms'].values())} intervals"
    return Table(name, "Regrets", REGRETS, rows, note) if rows else None


def spans(track: SuiteTrack, name: Callable[[str], str]) -> list[Table]:
    """Return the windows of what a suite sweeps and the regrets of what it carries to other sizes, if it
    does.

    `name`: what a table shows, `windows` or `regrets` -> the table's name.
    """
    made = (windows(name("windows"), track), regrets(name("regrets"), track))
    return [table for table in made if table is not None]


# -- differences ---------------------------------------------------------------------------------------------


DIFFERENCES = (
    Column("Arm", "name", short="arm", head=True),
    Column("Interval", "drawing", on=(PAGE,)),
    Column("Seeds", "figure", brief, "seeds"),
    Column("Diverged", "figure", short="diverged", on=(TERMINAL, PAPER), optional=True),
    Column("Difference", "figure", short="difference"),
    Column("Interval by itself", "figure", short="interval"),
    Column("Interval, all comparisons together", "figure", short="joint", optional=True),
    Column("Detectable, all together", "figure", lambda x: fixed(x, 3), "detectable"),
    Column("Judged", short="judged", optional=True),
)


def differences(
    name: str,
    title: str,
    pairs: Mapping[str, Difference],
    track: FinalsTrack | SuiteTrack,
    draw: Draw = lambda difference: None,
    family: str = "",
) -> Table:
    """Return paired differences in test loss, arm -> difference. `draw`: an interval's drawing for the page;
    `family`: of the finals' differences, where each arm may have a reference of its own."""
    rows = []
    for label, d in pairs.items():
        arm = track["arms"].get(label, {})
        elsewhere = arm.get("versus") not in (None, track.get("reference"))
        lost = d.get("diverged")
        rival = reference_of(cast(FinalsTrack, track), family, label) if family == "rate" else ""
        beside = f"against {words.short(rival, track['arms'][rival])}" if rival else ""
        values = (
            _compared(label, arm, elsewhere, lost, beside),
            Cell(page="none", drawing=draw(d)),
            d["seeds"],
            Cell(f"{lost['arm']} / {lost['reference']}" if lost else "", lost["arm"] if lost else None),
            _centre(d),
            Cell(_interval(d, "low", "high"), d.get("low")),
            Cell(_interval(d, "joint_low", "joint_high"), d.get("joint_low")),
            d.get("joint_detectable", d.get("detectable")),
            _judged(d) if "roles" in track else _said(d),
        )
        rows.append(filled(DIFFERENCES, values))
    note = "nats per token, arm minus reference; below zero is better; detectable by the interval that "
    note += f"judges; {intervals_in_words(pairs.values(), joint=False)}"
    return Table(name, title, DIFFERENCES, rows, note)


def suite_pairs(track: SuiteTrack, names: Iterable[str]) -> dict[str, Difference]:
    """Return the arms of a suite that are paired with another one -> their difference."""
    return {name: d for name in names if (d := track["arms"][name]["difference"])}


def ranked(track: SuiteTrack) -> list[str]:
    """Return a suite's arms, best first; those that were judged on another text come last."""

    def place(name: str) -> tuple[bool, float]:
        arm = track["arms"][name]
        return not arm["comparable"], math.inf if arm["test_median"] is None else arm["test_median"]

    return sorted(track["arms"], key=place)


def _compared(label: str, arm: Arm, elsewhere: bool, lost: Diverged | None, beside: str) -> Cell:
    """Return the arm, what it is compared with if not with the reference, and on the page what diverged and
    what is its `own` reference."""
    against = f"against {arm['versus']}" if elsewhere else ""
    name = label if "about" in arm or "roles" not in arm else words.short(label, arm)
    text = f"{label} ({against})" if against else label
    by_rank = (
        f"by rank: {lost['arm']} of its runs diverged, {lost['reference']} of the reference’s" if lost else ""
    )
    return Cell(text, page=name, note="; ".join(filter(None, (against, beside, by_rank))))


def _centre(d: Mapping[str, Any]) -> Cell:
    """Return the mean difference, or the median where a diverged run makes ranks decide."""
    if d.get("mean") is not None:
        return Cell(signed(d["mean"], 3), d["mean"])
    if d.get("median") is not None:
        median = signed(d["median"], 3)
        return Cell(f"median {median}", d["median"], page=median)
    return Cell(NOTHING)


def _interval(d: Mapping[str, Any], low: str, high: str) -> str:
    """Return a limit that is absent is infinite by rank, and not known by t."""
    if low not in d or (d[low] is None and d[high] is None and d.get("method") != "rank"):
        return NOTHING
    left = "(−∞" if d[low] is None else f"[{signed(d[low], 3)}"
    right = "∞)" if d[high] is None else f"{signed(d[high], 3)}]"
    return f"{left}, {right}"


def _said(d: Difference) -> Cell:
    return verdict_cell(d) if d["seeds"] else Cell(NOTHING)


def _judged(d: Difference) -> Cell:
    if not d.get("judged"):
        return Cell(NOTHING)
    tone, words_of = words.JUDGED[d["judged"]]
    return Cell(d["judged"], page=words_of, tone=tone)


# -- verdict and runs ----------------------------------------------------------------------------------------


VERDICT = (
    Column("Optimizer", short="optimizer", optional=True),
    Column("Question", "prose", short="question"),
    Column("Verdict", short="verdict"),
    Column("Figure", "prose", short="figure"),
)


def verdict(lines: Sequence[Line]) -> Table:
    """Return the lines of the verdict; their track only where there are several."""
    several = len({line["track"] for line in lines}) > 1
    rows = []
    for line in lines:
        track = words.optimizer(line["track"]) if several else ""
        judged = Cell(line["verdict"], tone=line["verdict"])
        rows.append(filled(VERDICT, (track, line["question"], judged, line["figure"])))
    return Table("verdict", "Verdict", VERDICT, rows)


RUNS = (
    Column("Stage"),
    Column("Arm", "name"),
    Column("Seed", "figure", str),
    Column("Learning rate", "figure", brief),
    Column("δ*", "figure", brief, optional=True),
    Column("Outcome"),
    Column("Validation loss", "figure", fixed),
    Column("Test loss", "figure", fixed),
    bits_column(),
    Column("Median c", "figure", two_digits, optional=True),
    Column("KL", "figure", brief, optional=True),
    Column("Time", "figure", words.clock),
    Column("Files", "links", optional=True),
    Column("Run", "code"),
)
Files = Callable[[str], Sequence[tuple[str, str]]]  # run id -> words, and the file that they lead to


def runs(
    specs: Sequence[tuple[str, SpecRecord, RunResult]],
    *,
    bits: bool = False,
    files: Files = lambda run_id: (),
) -> Table:
    """Return all runs, each given as its id, its spec and its result (empty while there is none). `bits`:
    losses in bits per character, too; `files`: of a run, that the page leads to."""
    figures = ("val_loss", "test_loss", BITS, "c_median", "kl_median", "wall_s")
    rows = []
    for run_id, spec, result in specs:
        run, outcome = spec["config"], result.get("outcome") or "open"
        ebc = run["stabilizer"]["name"] == "ebc"
        clipped = {} if ebc else {"c_median": Cell()}  # without EBC it is 1
        values = (
            spec["stage"],
            spec["arm"],
            run["seed"],
            run["optimizer"]["lr"],
            run["budget"]["target_kl"] if ebc else None,
            Cell(outcome, note=result.get("cause") or ""),
            *(clipped.get(k, result.get(k)) if bits or k != BITS else Cell() for k in figures),
            Cell(files=files(run_id)),
            run_id,
        )
        data = {"stage": spec["stage"], "outcome": outcome}
        rows.append(filled(RUNS, values, id=f"run-{run_id}", data=data))
    title = words.plural(len(rows), "run")
    return Table("runs-table", title, RUNS, rows, "losses in nats per token, KL in nats per step")


def plain(
    name: str, title: str, columns: Mapping[str, str], rows: Iterable[Sequence[str]], note: str = ""
) -> Table:
    """Return a table of text. `columns`: title -> kind; the first one names the row."""
    shown = [Column(title, kind, head=not i) for i, (title, kind) in enumerate(columns.items())]
    return Table(name, title, shown, [filled(shown, row) for row in rows], note)
