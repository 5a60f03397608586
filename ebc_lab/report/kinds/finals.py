"""The finals: what EBC buys against the plain optimizer, at a constant rate and on a tuned schedule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from ebc_lab.records.decisions import Acceptance, Difference, FinalsTrack, Line, RateWindow, Window
from ebc_lab.study.stages.compare_arms import seeds_of
from ebc_lab.study.stages.statistics import by_interval, level, show_difference
from ebc_lab.study.stages.verdict import acceptance

from ..text import glance, tables
from ..text.arms import bits_of, test_loss
from ..text.table import PAGE, SPREAD, TERMINAL, Cell, Column, Table, filled, noted
from ..text.words import FAMILIES, NOTHING, arm_label, capital, interval, optimizer, plural
from .kind import MOST_TILES, Answer, Check, Evidence, Kind, Tile, difference_tile, is_open, window_tile

CONTROL, BASELINE, WINDOW = "best_ebc_no_worse_than_control", "x2_no_worse_than_baseline", "lr_window"
PAPER_COLUMNS = (
    Column("arm", "label"),
    Column("test loss", "figure", notes=SPREAD),
    Column("bits/char", "figure", lambda bits: "" if bits is None else f"{bits:.3f}", optional=True),
    Column("minus baseline", "figure"),
    Column("minus control", "figure"),
    Column("verdict"),
)


class Finals(Kind):
    shows = "verdict"
    section = "Finals"

    def answers(self, found: Evidence) -> list[Answer]:
        return [_answer(found, name, track) for name, track in found.tracks.items()]

    def tables(self, found: Evidence) -> list[Table]:
        """Return the verdict, for the terminal, and the arms."""
        lines = [{"track": name, **line} for name, track in found.tracks.items() for line in track["verdict"]]
        made = [replace(tables.verdict(cast(list[Line], lines)), places=(TERMINAL,))]
        for name, track in found.tracks.items():
            arms = tables.arms(f"finals-{name}", track, found.results)
            every = [arms, *tables.further_arms(f"finals{{}}-{name}", track, found.results)]
            made += [found.titled(table, name, places=(PAGE,)) for table in every]
        return made

    def arms(self, found: Evidence) -> Mapping[str, Mapping[str, str]]:
        tracks = found.tracks.items()
        return {name: {n: arm_label(n, arm) for n, arm in track["arms"].items()} for name, track in tracks}

    def acceptance(self, found: Evidence) -> Acceptance:
        return acceptance(found.config, found.decision)

    def seeds(self, found: Evidence) -> Sequence[int]:
        return seeds_of(found.decision)

    def papers(self, found: Evidence) -> Mapping[str, Sequence[Table]]:
        judged = acceptance(found.config, found.decision)
        counts = ", ".join(f"{n} {verdict}" for verdict, n in judged["counts"].items())
        verdict = replace(
            tables.verdict(judged["lines"]),
            caption=f"The verdict, on test losses where it is on losses: {counts}.",
        )
        made = []
        for name, track in found.tracks.items():
            made.append(_for_papers(found, name, track))
            made += tables.further_arms(f"{name}{{}}", track, found.results)
        return {"summary_final": made, "acceptance": [verdict]}


KIND = Finals()


def _for_papers(found: Evidence, name: str, track: FinalsTrack) -> Table:
    """Return each arm with its differences from the baseline and from the fair control."""
    rows = []
    for label, arm in track["arms"].items():
        cells: list[Any] = [arm_label(label, arm), test_loss(arm, found.results), bits_of(arm)]
        for family in ("baseline", "control"):
            itself = label == track["roles"].get(family)
            difference = track["differences"].get(family, {}).get(label)
            cells.append(Cell("itself") if itself else _difference_in_brackets(difference))
        against_control = track["differences"].get("control", {})
        judged = against_control[label]["judged"] if label in against_control else ""
        cells.append(Cell(judged or ""))
        rows.append(filled(PAPER_COLUMNS, cells))
    together = [d for of in ("baseline", "control") for d in track["differences"].get(of, {}).values()]
    caption = (
        f"{optimizer(name)}: test loss, paired differences [joint intervals], verdict against the control."
    )
    note = f"{glance.NATS}; {glance.intervals_in_words(together)}"
    return Table(name, "Arms of the finals", PAPER_COLUMNS, rows, note, caption)


def _difference_in_brackets(difference: Difference | None) -> Cell:
    centre, limits, _ = glance.pair_cells(difference)
    return Cell(f"{centre.text} {limits.text}".removesuffix(f" {NOTHING}"), centre.value)


# -- the answer ----------------------------------------------------------------------------------------------


HEADLINES = {  # judgement against the fair control -> the clause on it
    "beats": "EBC beats a tuned schedule",
    "meets": "EBC keeps up with a tuned schedule but is not shown to beat it",
    "misses": "EBC loses to a tuned schedule",
    "undecided": "whether EBC keeps up with a tuned schedule is undecided",
}
TO_BE_TUNED = "The setting to be tuned instead is EBC’s budget δ*: how far one step may move the predictions."


def judgement(line: Line) -> str:
    """Return beats, meets, misses or undecided, of a line of the verdict that compares two arms."""
    passed = "beats" if line.get("beats") else "meets"
    return {"pass": passed, "fail": "misses"}.get(line["verdict"], "undecided")


def _answer(found: Evidence, name: str, track: FinalsTrack) -> Answer:
    span = track["lr_windows"].get("ebc")
    judged, sentence = answer_of(track["verdict"], span)
    checks = [_check(line, track, found.config.study.band) for line in track["verdict"]]
    compared = [check for check in checks if "difference" in check.line]
    findings = [_finding(check, span) for check in compared]
    return Answer(
        name,
        judged,
        sentence,
        [*findings, TO_BE_TUNED] if span else findings,
        _tiles(found, name, {line["name"]: line for line in track["verdict"]})[:MOST_TILES],
        _differences(found, name, track),
        judging=[by_interval(check.line["difference"], check.line["joint"]) for check in compared],
        warning=_warning(track),
        checks=checks,
        arms=frozenset(arm for check in compared for arm in (check.line["arm"], check.line["reference"])),
    )


def answer_of(verdict: Sequence[Line], span: RateWindow | None) -> tuple[str, str]:
    """Return the answer's colour and the answer in a sentence. `span`: the rates `lr_window` compares."""
    lines = {line["name"]: line for line in verdict if line.get("difference")}
    fair, window = lines.get(CONTROL), lines.get(WINDOW)
    if fair is None:
        return "undecided", "No answer: no arm with EBC is compared with the fair control."
    clauses, judged = [HEADLINES[judgement(fair)]], [judgement(fair)]
    if window and span:
        clauses.insert(0, _over_the_rates(window, span))
        # where the plain optimizer passes, too, the window says nothing for EBC
        judged += [] if _as_without_ebc(window) else [judgement(window)]
    return _colour(judged, verdict), f"{capital('; '.join(clauses))}."


def _colour(judged: Sequence[str], verdict: Sequence[Line]) -> str:
    """Return the colour of several judgements: a success's only where none is open and no check failed."""
    kinds = set(judged)
    if kinds == {"misses"}:
        return "misses"
    failed = Counter(line["verdict"] for line in verdict)["fail"]
    if kinds & {"misses", "undecided"} or failed:
        return "undecided"
    return "beats" if kinds == {"beats"} else "meets"


def _finding(check: Check, span: RateWindow | None) -> str:
    """Return a comparison in a line: what was asked, what the verdict means, and its figures."""
    line = check.line
    text = f"{check.title} {check.means} {capital(gap(line['difference'], line['joint']))}"
    plain = line.get("plain")
    if span and plain and (without := _without_ebc(plain, span)):
        text += f"; without EBC, on the fair control’s schedule, {without}"
    return f"{text}."


def _over_the_rates(window: Line, span: RateWindow) -> str:
    """Return the clause on whether the loss stays where it is while the learning rate rises."""
    low, high = span["scales"]
    margin = window["difference"]["margin"]
    over = f"within {margin:g} nats from ×{low:g} to ×{high:g} of the tuned learning rate"
    if window["verdict"] == "undecided":
        return f"whether EBC keeps the loss {over} is undecided"
    if window["verdict"] == "fail":
        return f"EBC does not keep the loss {over}"
    return f"EBC keeps the loss {over}{', as the plain optimizer does' * _as_without_ebc(window)}"


def _as_without_ebc(window: Line) -> bool:
    """Return whether the plain optimizer passes the line of the LR window, too."""
    plain = window.get("plain")
    passes = plain is not None and plain["difference"]["alone"] in ("beats", "meets")
    return window["verdict"] == "pass" and passes


def _without_ebc(plain: RateWindow, span: RateWindow) -> str:
    """Return what the same step of the learning rate does without EBC; empty where that is not known."""
    d = plain["difference"]
    if d["mean"] is not None:
        return f"{abs(d['mean']):.3f} nats {'lower' if d['mean'] < 0 else 'higher'}"
    lost = d.get("diverged")
    if not lost:
        return ""
    ends = zip((lost["reference"], lost["arm"]), span["scales"], strict=True)
    return " and ".join(f"{n} of {plural(d['seeds'], 'run')} diverged at ×{rate:g}" for n, rate in ends if n)


def gap(difference: Difference, joint: bool) -> str:
    """Return a paired difference in words, from the arm's side, with the interval that judges it."""
    d = by_interval(difference, joint)
    if d["mean"] is None:
        return show_difference(difference, joint=joint)
    text = f"test loss {abs(d['mean']):.3f} nats {'lower' if d['mean'] < 0 else 'higher'}"
    if d["low"] is None and d["high"] is None:
        return f"{text}, from one pair of runs"
    limits = f"{level([d])} interval {interval(d['low'], d['high'], 3)}"
    limits += f", joint over {d['comparisons']} comparisons" if joint and d["comparisons"] > 1 else ""
    return f"{text} ({limits}; {plural(d['seeds'], 'paired seed')})"


def _warning(track: FinalsTrack) -> str:
    """Return what a reader must know of a fair control that is worse than the baseline; else empty."""
    difference = track["differences"].get("baseline", {}).get(track["roles"].get("control", ""))
    if not difference or (difference["mean"] or 0.0) <= 0:
        return ""
    return (
        f"The fair control came out worse than the baseline: {gap(difference, joint=True)}. To beat the "
        "control shows little; the comparison with the baseline is the one to look at."
    )


# -- figures and tables below it -----------------------------------------------------------------------------


def _tiles(found: Evidence, name: str, lines: Mapping[str, Line]) -> list[Tile]:
    tiles = []
    scaled = found.decisions["lr_scale"]["tracks"].get(name) if "lr_scale" in found.decisions else None
    windows: Mapping[str, Window] = scaled["lr_window"] if scaled else {}
    span = windows.get("ebc")
    if span and not (is_open(span) and span["octaves"] == 0):  # one rate has no window
        what = "Learning-rate window with EBC"
        tiles.append(window_tile(what, span, windows.get("none"), "without EBC"))
    if fair := lines.get(CONTROL):
        what = "Best EBC arm minus the fair control, test loss"
        tiles.append(difference_tile(what, fair["difference"], fair["joint"]))
    if cost := lines.get("overhead"):
        tiles.append(_overhead(cost))
    if twice := lines.get(BASELINE):
        what = "EBC at ×2 minus the baseline, test loss"
        tiles.append(difference_tile(what, twice["difference"], twice["joint"]))
    return tiles


def _overhead(line: Line) -> Tile:
    value, _, quartiles = line["figure"].partition(" (")
    target = line["question"].partition("≤")[2].partition("%")[0].strip()
    what = "Time that EBC adds to a step"
    if line.get("overhead_pct") is None:
        return Tile(what, NOTHING, "", value)
    remarks = [quartiles.rstrip(")"), f"target at most {target}%: {line['verdict']}"]
    return Tile(what, value, "", ", ".join(filter(None, remarks)))


def _differences(found: Evidence, name: str, track: FinalsTrack) -> list[Table]:
    """Return the differences from each reference, with the study's target on their drawn axis."""
    made = []
    margin = found.config.finals.margin
    for family in ("control", "baseline", "rate"):
        if pairs := track["differences"].get(family):
            title = f"Difference in test loss from {FAMILIES[family]}"
            reference = track["roles"].get(family, "")
            table = tables.differences(
                f"{family}-{name}", title, pairs, track, reference, found.results, family
            )
            drawn = {"Drawn": {"": f"dashed: {margin:g} nats worse, the target"}}
            made.append(found.titled(table, name, target=margin, columns=noted(table.columns, drawn)))
    return made


# -- the checks in words -------------------------------------------------------------------------------------


CHECKS = {  # name -> title, what it asks, and what each verdict means
    "kl_on_target": (
        "Does the bound hold?",
        "The KL divergence of EBC’s steps, measured on tokens that had no part in choosing them, "
        "against its target δ*.",
        {
            "pass": "It does: clipped steps move the predictions about as far as they were allowed to.",
            "fail": "It does not: clipped steps move the predictions clearly more, or less, than asked.",
            "undecided": "No step was clipped, so there was nothing to measure.",
        },
    ),
    "c_in_band": (
        "Is EBC at work, without throttling?",
        "The median of the clip coefficient c over the run: 1 leaves a step as it is, 0.5 halves it.",
        {
            "pass": "It is: the typical step is shortened, but not to a crawl.",
            "fail": "It is not: the median lies outside the band.",
            "undecided": "No run with EBC came to its end.",
        },
    ),
    "no_plateau": (
        "Does it ever choke the training?",
        "The longest stretch of steps that were all cut down hard.",
        {
            "pass": "It does not.",
            "fail": "It does: there is a long stretch in which hardly any of each update was applied.",
            "undecided": "The runs are too short to tell.",
        },
    ),
    "x2_no_worse_than_baseline": (
        "Does EBC make a doubled learning rate safe?",
        "EBC at twice the best plain learning rate, against the plain optimizer at its best one.",
        {},
    ),
    "best_ebc_no_worse_than_control": (
        "Is EBC worth having where a tuned schedule is at hand?",
        "The EBC arm with the lowest validation loss, against the fair control: the same optimizer on "
        "a schedule that was tuned for it.",
        {},
    ),
    "lr_window": (
        "Does EBC make the learning rate irrelevant?",
        "EBC at its highest learning rate against EBC at its lowest, everything else the same; beside it, "
        "what the plain optimizer loses by the same step on the fair control’s schedule.",
        {
            "pass": "Between these two rates it does: the higher one costs no more than the target.",
            "fail": "It does not: the higher rate costs more than the target.",
            "undecided": "Undecided: the higher rate may cost no more than the target, or more.",
        },
    ),
    "overhead": (
        "What does it cost?",
        "The time that EBC adds to a training step, from one paired measurement on this machine.",
        {
            "pass": "No more than was aimed for.",
            "fail": "More than was aimed for.",
            "undecided": "The measurement is missing, or the limit lies within its spread.",
        },
    ),
}


def _check(line: Line, track: FinalsTrack, band: Sequence[float]) -> Check:
    title, asks, _ = CHECKS.get(line["name"], (line["question"], "", {}))
    fair = line.get("reference") == track["roles"].get("control")
    means = explain_verdict(line, "the fair control" if fair else "the baseline", band)
    ends = [line[end] for end in ("arm", "reference")] if "difference" in line else []
    between = [arm_label(name, track["arms"][name]) for name in ends]
    return Check(line, title, asks, means or line["figure"], between)


def explain_verdict(line: Line, reference: str, band: Sequence[float]) -> str:
    """Return what a line's verdict means, for somebody who does not know the method."""
    c = line.get("c_median")
    if line["name"] == "c_in_band" and line["verdict"] == "fail" and c is not None:
        if c > band[1]:
            return (
                "It hardly acts: over a full-length run the typical step is within the budget anyway, or "
                "nearly so."
            )
        return "It cuts deep: the typical step is shortened further than the band allows."
    meanings = CHECKS.get(line["name"], ("", "", {}))[2]
    if meanings or not line.get("difference"):
        return str(meanings.get(line["verdict"], ""))
    margin = line["difference"]["margin"]
    return {
        "beats": f"It beats {reference}: the whole interval lies below zero.",
        "meets": f"It meets the target, at most {margin:g} nats worse than {reference}, but is not shown to "
        "beat it.",
        "misses": f"It misses the target: the whole interval lies more than {margin:g} nats above "
        f"{reference}.",
        "undecided": f"Undecided: losing no more than {margin:g} nats to {reference} is possible, and so is "
        "losing more.",
    }[judgement(line)]
