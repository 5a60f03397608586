"""A ladder: does an advantage hold at other widths, batches and lengths, with more compute?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ebc_lab.config.schema import BASE
from ebc_lab.records.columns import LADDER_MEANINGS
from ebc_lab.records.decisions import Climb, Difference, LadderTrack, Rung, RungArm, SpeedUp
from ebc_lab.study.stages.ladder import adds_a_line, asked, in_a_line
from ebc_lab.study.stages.statistics import by_interval, centre_of
from ebc_lab.study.stages.suite import point_in_words, short_name

from ..text import glance
from ..text.table import (
    EVERYWHERE,
    PAGE,
    PAPER,
    TERMINAL,
    Cell,
    Column,
    Row,
    Table,
    filled,
    loss_column,
    noted,
    two_digits,
)
from ..text.words import NOTHING, brackets, brief, fixed, signed
from .kind import MOST_TILES, Answer, Evidence, Kind, Tile, difference_tile
from .suite import MOST_NAMED, VERDICTS

COURSES = {  # by verdict and course: what more compute makes of a difference
    ("better", "gains"): "and that grows",
    ("better", "loses"): "and that shrinks",
    ("worse", "gains"): "but catches up",
    ("worse", "loses"): "and falls further behind",
}
OTHERWISE = {  # where neither arm is ahead, or that does not matter
    "gains": "but gains on it",
    "loses": "but loses to it",
    "holds": "and that hardly changes",
}
DOUBLING = {"per doubling": "per doubling: the change with each doubling of compute"}
COMPUTE = {"": "compute: over that on base"}
FASTER = {"×": "steps, seconds: to the same validation loss, above 1 where it is faster"}
TUNED = (
    Column("Rung", "name", short="rung", head=True),
    Column("Arm", "name", short="arm"),
    Column(
        "Loss at what was carried, less that at its best",
        "figure",
        short="regret",
        optional=True,
        notes={"": "loss: test loss, nats per token"},
    ),
    Column("Interval", "figure", short="interval", optional=True),
    Column("Carried", "prose", short="carried"),
    Column(
        "Best there", "prose", short="best there", optional=True, notes={"": "best there: by validation loss"}
    ),
    Column("Points tried", "figure", brief, "points", optional=True),
    Column("At an end of what was tried", "prose", short="at an end", optional=True),
)
REACHED = (
    Column("Rung", "name", short="rung", head=True),
    Column("Arm", "name", short="arm"),
    Column("Steps to the target", "figure", brief, "steps to target"),
    Column("Seconds of training", "figure", brief, "seconds"),
    Column("Tokens", "figure", brief, "tokens"),
    Column("Runs that reached it", "figure", short="reached"),
)
OVERALL = (  # on a phone the first three are on screen
    Column("Arm", "name", short="arm", head=True),
    Column("Difference", "figure", short="difference"),
    Column("Verdict", short="verdict"),
    Column("Minus", "name", short="minus"),
    Column("Joint interval", "figure", short="joint interval"),
    Column("Per doubling of compute", "figure", short="per doubling"),
    Column("Its joint interval", "figure", short="joint interval"),
    Column("With more compute", short="with more compute"),
)


class Ladder(Kind):
    shows = "ladder"
    section = "Rungs of the ladder"
    file = "ladder.csv"
    columns = LADDER_MEANINGS

    def answers(self, found: Evidence) -> list[Answer]:
        return [_answer(found, name, track) for name, track in found.tracks.items()]

    def tables(self, found: Evidence) -> list[Table]:
        made: list[Table] = []
        for name, track in found.tracks.items():
            first, rest = _compared(found, name, track), _rest(found, name, track)
            # the page has these above, right below the answer, if the ladder has one of its own
            made += first if adds_a_line(track) else [replace(t, places=(TERMINAL,)) for t in first]
            made += rest
        return made

    def rows(self, found: Evidence) -> Iterator[dict[str, Any]]:
        """Yield a row for each comparison of two arms on each rung."""
        for name, track in found.tracks.items():
            for climb in track["climbs"]:
                for rung in climb["rungs"]:
                    yield _row(name, track["rungs"][rung], climb, rung)

    def papers(self, found: Evidence) -> Mapping[str, Sequence[Table]]:
        made: list[Table] = []
        for name, track in found.tracks.items():
            every = [*_compared(found, name, track), *_rest(found, name, track)]
            made += [
                replace(table, caption=f"{table.title}; {ladder_in_words(track)}.")
                for table in every
                if PAPER in table.places
            ]
        return {"ladder": made}


KIND = Ladder()


# -- the answer ----------------------------------------------------------------------------------------------


def by_compute(track: LadderTrack) -> list[str]:
    """Return the rungs, the one with the least compute first."""
    return sorted(track["rungs"], key=lambda name: track["rungs"][name]["compute"])


def sentence_of(track: LadderTrack) -> str:
    """Return what the ladder found, in a sentence without its full stop."""
    climbs, rungs = asked(track), len(track["rungs"])
    if not climbs:
        return "No answer: no two arms can be compared"
    if len(climbs) > MOST_NAMED:
        counts = Counter(climb["verdict"] for climb in climbs)
        counted = [f"{verdict} in {n}" for verdict, n in counts.most_common()]
        return f"Of {len(climbs)} comparisons over {rungs} rungs, the arm is {', '.join(counted)}"
    return "; ".join(_sentence(climb, rungs) for climb in climbs)


def _sentence(climb: Climb, rungs: int) -> str:
    arm, other, verdict = climb["arm"], climb["reference"], climb["verdict"]
    if climb["overall"] is None:
        return f"No answer on {arm} and {other}: {climb['lacking']}"
    found = f"{arm} {VERDICTS[verdict][1]} {other} over {rungs} rungs"
    if climb["trend"] is None:
        return found
    if climb["course"] == "undecided":
        return f"{found}; whether that changes with more compute is undecided"
    course = COURSES.get((verdict, climb["course"]), OTHERWISE[climb["course"]])
    return f"{found}, {course} with more compute"


def _answer(found: Evidence, name: str, track: LadderTrack) -> Answer:
    climbs = asked(track)
    largest = by_compute(track)[-1]
    verdicts = {climb["verdict"] for climb in climbs}
    if adds_a_line(track):
        verdicts = {d["verdict"] for climb in climbs if (d := climb["rungs"].get(largest))}
    judged = VERDICTS[verdicts.pop()][0] if len(verdicts) == 1 else "undecided"
    if adds_a_line(track):
        lines = [in_a_line(climb, track["rungs"], track["rules"]) for climb in climbs]
        return Answer(name, judged, f"{'; '.join(lines)}.", [f"{ladder_in_words(track)}."], adds=True)
    findings = [ladder_in_words(track), *(climb["sentence"] for climb in climbs)]
    findings += [line for climb in climbs for line in _further(climb, track)]
    findings += [_largest_regret(track)]
    return Answer(
        name,
        judged,
        f"{sentence_of(track)}.",
        [f"{line}." for line in findings if line],
        _tiles(climbs, track)[:MOST_TILES],
        _compared(found, name, track),
        judging=[by_interval(climb["overall"], joint=True) for climb in climbs if climb["overall"]],
    )


def ladder_in_words(track: LadderTrack) -> str:
    """Return what the ladder was: its rungs, and the least and the largest of them."""
    order = by_compute(track)
    first, last = (track["rungs"][name] for name in (order[0], order[-1]))
    times = last["compute"] / first["compute"]
    size = f"from {_size(first)} to {_size(last)}, ×{times:.3g} the floating-point operations of a run"
    return f"{len(order)} rungs, {', '.join(order)}: {size}"


def _size(rung: Rung) -> str:
    """Return `width 64, batch 8 × 64 tokens, 1,200 steps`."""
    context = rung["tokens"] // (rung["batch_size"] * rung["steps"])
    return f"width {rung['width']}, batch {rung['batch_size']} × {context} tokens, {rung['steps']:,} steps"


def _further(climb: Climb, track: LadderTrack) -> Iterator[str]:
    """Yield how much longer the other arm would have to train, and how much faster this one is."""
    arm, other, speeds = climb["arm"], climb["reference"], climb["speed"]
    if (lengths := climb["lengths"]) and lengths["times"] is not None:
        span, (short, long) = _ratios(lengths["low"], lengths["high"]), lengths["rungs"]
        times = f"{'only ' * (lengths['times'] < 1)}×{lengths['times']:.3g} as long {span}"
        end = f"to end at {arm}’s loss on {short}, by its own losses there and on {long}"
        yield f"{other} would have to train {times} {end}"
    ends = [name for name in dict.fromkeys([BASE, by_compute(track)[-1]]) if name in speeds]
    told = [
        f"on {name} {_speed(speed, 'steps').text} (in seconds {_speed(speed, 'seconds').text})"
        for name in ends
        if (speed := speeds[name])["steps"]
    ]
    if told:
        yield f"Steps to the same validation loss, {other} over {arm}: {'; '.join(told)}"


def _largest_regret(track: LadderTrack) -> str:
    regrets = [
        (centre, rung, label, d)
        for rung, label, arm in _arms(track)
        if (d := arm["regret"]) and (centre := centre_of(d)) is not None
    ]
    if not regrets:
        return ""
    centre, rung, label, d = max(regrets, key=lambda regret: regret[0])
    span = glance.limits(d, "joint_low", "joint_high")
    return f"Tuning again gained most for {label} on {rung}: {signed(centre)} nats {span}"


def _tiles(climbs: Sequence[Climb], track: LadderTrack) -> list[Tile]:
    tiles, largest = [], by_compute(track)[-1]
    for climb in climbs:
        what = f"{climb['arm']} minus {climb['reference']}"
        if climb["overall"]:
            tiles.append(difference_tile(f"{what}, mean of {len(track['rungs'])} rungs", climb["overall"]))
        if len(climbs) == 1 and climb["trend"]:
            tile = difference_tile("The same, per doubling of compute", climb["trend"])
            tiles.append(tile._replace(value=signed(centre_of(climb["trend"]))))
        speed = climb["speed"].get(largest)
        if len(climbs) == 1 and speed and speed["steps"]:
            span = _ratios(speed["steps_low"], speed["steps_high"])
            remark = f"{span}, {climb['reference']} over {climb['arm']}; seconds {_times(speed['seconds'])}"
            what = f"Steps to the same validation loss on {largest}"
            tiles.append(Tile(what, _times(speed["steps"]), "", remark))
    return tiles


def _times(ratio: float | None) -> str:
    return NOTHING if ratio is None else f"×{ratio:.2f}"


def _ratios(low: float | None, high: float | None) -> str:
    """Return the interval of a ratio; an end that is not known may lie anywhere."""
    return brackets(low, high, two_digits, least="0").replace(NOTHING, "(no interval)")


def _speed(speed: SpeedUp | None, what: str) -> Cell:
    """Return a speed-up in `steps` or `seconds`, with its interval."""
    ratio = speed and speed[what]  # type: ignore[literal-required]
    if not speed or ratio is None:
        return Cell(NOTHING)
    low, high = speed[f"{what}_low"], speed[f"{what}_high"]  # type: ignore[literal-required]
    return Cell(f"{_times(ratio)} {_ratios(low, high)}" if low or high else _times(ratio), ratio)


# -- tables --------------------------------------------------------------------------------------------------


def _compared(found: Evidence, name: str, track: LadderTrack) -> list[Table]:
    """Return what stands below the answer: its comparisons rung by rung; many of them, over all rungs."""
    climbs = _told_apart(track)
    made = [_rungs(f"climb-{name}-{i}", climb, track) for i, climb in enumerate(climbs, 1)]
    made += [_overall(f"climbs-{name}", track["climbs"])] if len(track["climbs"]) > len(climbs) else []
    return [found.titled(table, name) for table in made]


def _told_apart(track: LadderTrack) -> list[Climb]:
    return asked(track) if len(asked(track)) <= MOST_NAMED else []


def _rest(found: Evidence, name: str, track: LadderTrack) -> list[Table]:
    others = [climb for climb in track["climbs"] if climb not in _told_apart(track)]
    made = [_rungs(f"rungs-{name}-{i}", c, track, (PAGE, PAPER)) for i, c in enumerate(others, 1)]
    made += [_tuned(f"tuned-{name}", track), _reached(f"reached-{name}", track)]
    return [found.titled(table, name) for table in made if table.rows]


def _rungs(name: str, climb: Climb, track: LadderTrack, places: Sequence[str] = EVERYWHERE) -> Table:
    """Return a comparison of two arms on every rung, then over all of them, then with more compute."""
    arm, other = climb["arm"], climb["reference"]
    columns = (  # on a phone the first three are on screen
        Column("Rung", "name", short="rung", head=True, notes=DOUBLING),
        Column(f"{arm} minus {other}", "figure", short="difference"),
        Column(f"{arm} is", short=f"{arm} is"),
        Column("Joint interval", "figure", short="joint interval"),
        loss_column(f"Test loss of {arm}", arm),
        loss_column(f"Test loss of {other}", other),
        Column("Compute of a run", "figure", _times, "compute", notes=COMPUTE),
        Column("Its tokens", "figure", brief, "tokens", on=(PAGE, PAPER)),
        Column(f"Steps to the same loss, {other} over {arm}", "figure", short="steps", notes=FASTER),
        Column("Seconds of training, likewise", "figure", short="seconds", notes=FASTER),
    )
    rows: list[Row] = []
    base = track["rungs"][BASE]["compute"]
    for rung in by_compute(track):
        there, speed = track["rungs"][rung], climb["speed"].get(rung)
        arms = [there["arms"].get(label) for label in (arm, other)]
        difference, limits, verdict = glance.pair_cells(climb["rungs"].get(rung))
        if any(a is None or "untuned" in a for a in arms):
            verdict = Cell("untuned")
        losses = (_loss(a) for a in arms)
        size = (there["compute"] / base, there["tokens"])
        named = Cell(rung, page=rung, note=there["about"])
        values = (named, difference, verdict, limits, *losses, *size)
        rows.append(filled(columns, [*values, _speed(speed, "steps"), _speed(speed, "seconds")]))
    if not adds_a_line(track):
        mean, mean_limits, verdict = glance.pair_cells(climb["overall"])
        rest, course = [Cell()] * (len(columns) - 4), Cell(climb["course"])
        rows.append(filled(columns, ["mean", mean, verdict, mean_limits, *rest], chosen=True))
        slope, slope_limits = _slope(climb["trend"])
        rows.append(filled(columns, ["per doubling", slope, course, slope_limits, *rest]))
    told = glance.intervals_in_words([*climb["rungs"].values()])
    note = f"{glance.NATS}; {told}, on single rungs over the rungs too"
    return Table(name, f"{arm} beside {other} on each rung", columns, rows, note, places=places)


def _slope(trend: Difference | None) -> tuple[Cell, Cell]:
    """Return the change of a difference for each doubling of compute, which is small, and its interval."""
    _, limits, _ = glance.pair_cells(trend)
    return Cell(signed(centre_of(trend)), centre_of(trend)) if trend else Cell(NOTHING), limits


def _loss(arm: RungArm | None) -> Cell:
    """Return an arm's mean test loss on a rung, or how many of its runs diverged."""
    if not arm:
        return Cell(NOTHING)
    if lost := arm["outcomes"].get("diverged"):
        return Cell(f"{lost} of {len(arm['runs'])} diverged")
    return Cell(fixed(arm["test_loss"]), arm["test_loss"])


def _overall(name: str, climbs: Sequence[Climb]) -> Table:
    """Return every comparison over all rungs, those that the answer is about first."""
    rows = []
    for climb in sorted(climbs, key=lambda climb: not climb["asked"]):
        difference, limits, verdict = glance.pair_cells(climb["overall"])
        values = (climb["arm"], difference, verdict, climb["reference"], limits, *_slope(climb["trend"]))
        rows.append(filled(OVERALL, [*values, climb["course"]], chosen=climb["asked"]))
    note = f"{glance.NATS}; {glance.intervals_in_words(climb['overall'] for climb in climbs)}"
    return Table(name, "Every comparison, mean of the rungs", OVERALL, rows, note)


def _tuned(name: str, track: LadderTrack) -> Table:
    """Return what was carried to each rung, and what was found there: the settings that moved."""
    rows = []
    for rung, label, arm in _arms(track):
        if rung == BASE or not arm["carried"]:
            continue
        difference, limits, _ = glance.pair_cells(arm["regret"])
        base, carried, point = track["rungs"][BASE]["arms"][label]["carried"], arm["carried"], arm["point"]
        moved = [key for key in carried if not carried[key] == point[key] == base[key]]
        before, best = (point_in_words({key: of[key] for key in moved}) for of in (carried, point))
        values: list[Any] = [rung, label, difference, limits, before or "as on base"]
        if track["tuned"]:
            edges = [f"{short_name(key)} {edge}" for key, edge in arm["edges"].items()]
            again = "the same" if best == before else best
            values += [arm.get("untuned") or again, arm["trials"], ", ".join(edges)]
        rows.append(filled(TUNED, [*values, *[Cell()] * (len(TUNED) - len(values))]))
    note = "settings that are everywhere as on base are left out"
    known = [regret for *_, arm in _arms(track) if (regret := arm["regret"])]
    columns = noted(TUNED, {"Interval": {"[": glance.intervals_in_words(known)}})
    return Table(name, "What was carried to each rung, and what was best there", columns, rows, note)


def _reached(name: str, track: LadderTrack) -> Table:
    """Return how soon each arm reaches the target on each rung; empty in a study without one."""
    rows, losses = [], set()
    for rung, label, arm in _arms(track):
        if figures := arm.get("target"):
            times = (figures[f"{what}_to_target"] for what in ("steps", "seconds", "tokens"))
            n = figures["target_reached"] or 0.0
            rows.append(filled(REACHED, (rung, label, *times, Cell(f"{n:g} of {len(arm['runs'])}", n))))
            losses.add(fixed(figures["target_loss"]))
    note = f"target: validation loss {', '.join(sorted(losses))}; means, if every run reached it"
    return Table(name, "Steps to the target", REACHED, rows, note)


def _arms(track: LadderTrack) -> Iterable[tuple[str, str, RungArm]]:
    return ((rung, *item) for rung in by_compute(track) for item in track["rungs"][rung]["arms"].items())


def _row(track: str, rung: Rung, climb: Climb, name: str) -> dict[str, Any]:
    d, kept, speed = climb["rungs"][name], climb["carried"][name], climb["speed"][name]
    row: dict[str, Any] = {"track": track, "rung": name, "seeds": d["seeds"], "difference": centre_of(d)}
    whole: tuple[Mapping[str, Any], ...] = (climb, rung)
    row |= {key: of[key] for of in whole for key in LADDER_MEANINGS if key in of and key != "carried"}
    row |= {key: d.get(key) for key in ("joint_low", "joint_high", "verdict")}
    row |= {"carried": centre_of(kept), "carried_low": kept["joint_low"], "carried_high": kept["joint_high"]}
    for role, arm in (("arm", rung["arms"][climb["arm"]]), ("reference", rung["arms"][climb["reference"]])):
        regret = arm["regret"] and centre_of(arm["regret"])
        row |= {f"{role}_loss": arm["test_loss"], f"{role}_point": point_in_words(arm["point"])}
        row |= {f"{role}_trials": arm["trials"], f"{role}_regret": regret}
    ratios = {f"{what}_ratio": speed[what] for what in ("steps", "seconds")}
    return row | ratios | {key: value for key, value in speed.items() if key.endswith(("_low", "_high"))}
