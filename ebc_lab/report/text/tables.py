"""The tables of a study: what stands in each, for the terminal, the papers and the page alike.

They show decisions as recorded; `results` (run id -> result) adds what decisions leave out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from ebc_lab.records.columns import BITS
from ebc_lab.records.decisions import Arm, Difference, Diverged, FinalsTrack, Line, SuiteTrack, Sweep
from ebc_lab.records.figures import RunResult
from ebc_lab.records.paths import SpecRecord
from ebc_lab.study.stages.compare_arms import reference_of
from ebc_lab.study.stages.statistics import WINDOW_NATS, in_octaves, level

from . import words
from .arms import BITS_TITLE, bits_column, bits_of, part_figures, point_in_words, states, test_loss
from .arms import Results as Results
from .arms import arms as arms
from .glance import NATS, intervals_in_words, limits, verdict_cell
from .table import OPEN, PAGE, SPREAD, TERMINAL, Cell, Column, Row, Table, filled, loss_column, two_digits
from .words import NOTHING, brief, fixed, signed

# -- arms ----------------------------------------------------------------------------------------------------


def further_arms(
    name: str, track: FinalsTrack | SuiteTrack, results: Results | None, names: Sequence[str] | None = None
) -> list[Table]:
    """Return the tables of arms that only some studies have: what parts of a run say of them, and the splats
    of energy-based models. `name`: a template of their names."""
    made = [part_figures(name.format("-parts"), track, results, names)]
    made.append(states(name.format("-states"), track, results or {}, names))
    return [replace(t, caption=f"{t.title}, means over the seeds.") for t in made if t is not None]


# -- windows and regrets of a suite --------------------------------------------------------------------------


SWEPT = {"lr_scale": "learning rate", "delta": "δ*"}  # a swept setting -> what it sets
BEYOND = {"": "at 4 × its best: the test loss there minus the best"}
RATES = {"": "c·LR: from one end of the window to the other"}
STARTS = {"": "worst start: its test loss minus that of the best fixed δ*"}
WINDOWS = (
    Column("Arm", "name", short="arm", head=True),
    Column("Of", short="of"),
    Column("Window, octaves", "figure", short="octaves", notes=OPEN),
    Column("Best at", "figure", brief, "best at"),
    loss_column("Best test loss", "best loss"),
    bits_column(),
    Column("At 4 × its best", "figure", lambda x: signed(x, 3), "at ×4", optional=True, notes=BEYOND),
    Column("c·LR, octaves", "figure", lambda x: fixed(x, 1), "c·LR, octaves", optional=True, notes=RATES),
    Column("Worst start", "figure", lambda x: signed(x, 3), "worst start", optional=True, notes=STARTS),
)


def windows(name: str, track: SuiteTrack) -> Table | None:
    """Return how far each swept setting of a suite's arms may be off, widest first; None without a sweep."""
    swept = track.get("windows", {}).items()
    sweeps = [(arm, key, sweep) for arm, of_arm in swept for key, sweep in of_arm.items()]
    sweeps.sort(key=lambda s: (list(SWEPT).index(s[1]), -(s[2]["window"] or {"octaves": -1.0})["octaves"]))
    rows = [filled(WINDOWS, _window(arm, key, sweep, track.get("arms", {}))) for arm, key, sweep in sweeps]
    note = f"how far a setting may be off: octaves within {WINDOW_NATS:g} nats of the arm’s best test loss"
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


AS_TUNED = {"": "minus plain as tuned: minus the arm without EBC, its settings kept as well"}
REGRETS = (
    Column("Size", short="size", head=True),
    Column("Arm", "name", short="arm"),
    Column("Regret", "figure", short="regret"),
    Column("Interval", "figure"),
    Column("Minus plain as tuned", "figure", short="minus plain", optional=True, notes=AS_TUNED),
    Column("Its interval", "figure", short="its interval", optional=True),
)


def regrets(name: str, track: SuiteTrack) -> Table | None:
    """Return what it costs to keep another size's settings, against tuning again; None without transfers."""
    rows = []
    for size in track.get("transfer", ()):
        for arm in size["kept"]:
            cells: list[Cell | str] = []
            pairs: list[Any] = [track["arms"][arm]["difference"] or {}, size["against_kept"].get(arm)]
            for pair in pairs:
                cells += ["", ""] if pair is None else [_centre(pair), limits(pair, "low", "high")]
            rows.append(filled(REGRETS, (size["shape"], arm, *cells)))
    note = (
        "test loss with kept settings minus that with settings tuned again at that size, in nats per token; "
    )
    note += f"below zero is better; {level(arm['difference'] for arm in track['arms'].values())} intervals, "
    note += "each by itself"
    return Table(name, "Regrets", REGRETS, rows, note) if rows else None


def spans(track: SuiteTrack, name: Callable[[str], str]) -> list[Table]:
    """Return the windows of what a suite sweeps, and the regrets of what it carries to other sizes.

    `name`: what a table shows, `windows` or `regrets` -> the table's name.
    """
    made = (windows(name("windows"), track), regrets(name("regrets"), track))
    return [table for table in made if table is not None]


# -- differences ---------------------------------------------------------------------------------------------


LOST = {"": "diverged: runs of the arm / of the one that it is compared with"}
ALONE = {"": "by itself: of this comparison alone"}
DETECTABLE = {"": "detectable: the least true difference that four studies in five would show"}
DIFFERENCES = (  # on a phone the first three are on screen
    Column("Arm", "name", short="arm", head=True),
    Column("Difference", "figure", short="difference"),
    Column("Verdict", short="verdict"),
    Column("Drawn", "drawing", on=(PAGE,)),
    Column("Joint interval", "figure", short="joint interval"),
    loss_column("Test loss", "test loss", on=(PAGE,), notes=SPREAD),
    bits_column(on=(PAGE,)),
    Column("Tuned to", "prose", on=(PAGE,), optional=True),
    Column("Seeds", "figure", brief, "seeds"),
    Column("Diverged", "figure", short="diverged", on=(TERMINAL,), optional=True, notes=LOST),
    Column("Interval by itself", "figure", short="by itself", notes=ALONE),
    Column("Detectable, jointly", "figure", lambda x: fixed(x, 3), "detectable", notes=DETECTABLE),
)
PAPER_TITLES = ("Arm", "Test loss", BITS_TITLE, "Difference", "Joint interval", "Verdict")


def differences(
    name: str,
    title: str,
    pairs: Mapping[str, Difference],
    track: FinalsTrack | SuiteTrack,
    reference: str = "",
    results: Results | None = None,
    family: str = "",
) -> Table:
    """Return paired differences in test loss, arm -> difference, below their `reference`, if they have one
    in common. `results` adds the spreads; `family`: of the finals' differences."""
    rows = []
    arms = track["arms"]
    if reference:
        rows.append(_reference(reference, arms[reference], results))
    for label, d in pairs.items():
        arm = arms.get(label, {})
        lost = d.get("diverged")
        values = (
            _compared(label, track, lost, reference, family),
            _centre(d),
            _judged(d) if "roles" in track else verdict_cell(d),
            Cell(page="none", interval=d),
            Cell(limits(d, "joint_low", "joint_high"), d.get("joint_low")),
            test_loss(arm, results),
            bits_of(arm),
            point_in_words(arm),
            d["seeds"],
            Cell(f"{lost['arm']} / {lost['reference']}" if lost else "", lost["arm"] if lost else None),
            Cell(limits(d, "low", "high"), d.get("low")),
            d.get("joint_detectable", d.get("detectable")),
        )
        rows.append(filled(DIFFERENCES, values))
    note = f"{NATS}; {intervals_in_words(pairs.values())}"
    return Table(name, title, DIFFERENCES, rows, note, paper=PAPER_TITLES)


def suite_pairs(track: SuiteTrack, names: Iterable[str]) -> dict[str, Difference]:
    """Return the arms of a suite that are paired with another one -> their difference."""
    return {name: d for name in names if (d := track["arms"][name]["difference"])}


def ranked(track: SuiteTrack) -> list[str]:
    """Return a suite's arms, best first; those that were judged on another text come last."""

    def place(name: str) -> tuple[bool, float]:
        arm = track["arms"][name]
        return not arm["comparable"], math.inf if arm["test_median"] is None else arm["test_median"]

    return sorted(track["arms"], key=place)


def _reference(name: str, arm: Arm, results: Results | None) -> Row:
    """Return the row of the arm that the others are compared with."""
    cells: dict[str, Any] = {
        "Arm": Cell(name, page=words.arm_label(name, arm)),
        "Difference": Cell("reference"),
        "Test loss": test_loss(arm, results),
        BITS_TITLE: bits_of(arm),
        "Tuned to": Cell(point_in_words(arm)),
    }
    return filled(DIFFERENCES, [cells.get(column.title, Cell()) for column in DIFFERENCES], chosen=True)


def _compared(
    name: str, track: FinalsTrack | SuiteTrack, lost: Diverged | None, reference: str, family: str
) -> Cell:
    """Return an arm, with what it is compared with if not with the reference, and what diverged."""
    arm = track["arms"].get(name, {})
    versus = arm.get("versus")
    if family == "rate":
        versus = reference_of(cast(FinalsTrack, track), family, name)
    notes = []
    if versus and versus not in (reference, track.get("reference")):
        notes.append(f"against {words.arm_label(versus, track['arms'][versus])}")
    if lost:
        notes.append(f"by rank: {lost['arm']} of its runs diverged, {lost['reference']} of the reference’s")
    text = f"{name} ({notes[0]})" if notes and notes[0].startswith("against") else name
    return Cell(text, page=words.arm_label(name, arm), note="; ".join(notes))


def _centre(d: Mapping[str, Any]) -> Cell:
    """Return the mean difference, or the median where a diverged run makes ranks decide."""
    if d.get("mean") is not None:
        return Cell(signed(d["mean"], 3), d["mean"])
    if d.get("median") is not None:
        median = signed(d["median"], 3)
        return Cell(f"median {median}", d["median"], page=median)
    return Cell(NOTHING)


def _judged(d: Difference) -> Cell:
    if not d.get("judged"):
        return Cell(NOTHING)
    tone, shown = words.JUDGED[d["judged"]]
    return Cell(d["judged"], page=shown, tone=tone)


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
    Column("KL", "figure", brief, optional=True, notes={"": "KL in nats per step"}),
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
        rows.append(filled(RUNS, values, id=f"run-{run_id}"))
    title = words.plural(len(rows), "run")
    return Table("runs-table", title, RUNS, rows, "losses in nats per token")


def plain(
    name: str, title: str, columns: Mapping[str, str], rows: Iterable[Sequence[str]], note: str = ""
) -> Table:
    """Return a table of text. `columns`: title -> kind; the first one names the row."""
    shown = [Column(title, kind, head=not i) for i, (title, kind) in enumerate(columns.items())]
    return Table(name, title, shown, [filled(shown, row) for row in rows], note)
