"""What every kind of result says: answers, tables, the rows of a CSV file, and what goes into a paper."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ebc_lab.config.schema import Config
from ebc_lab.records.decisions import Acceptance, Decision, Difference, Line, Window
from ebc_lab.study.stages.statistics import by_interval, centre_of, in_octaves, level

from ..text.arms import Results
from ..text.table import Table
from ..text.words import interval, optimizer, plural, signed

MOST_TILES = 3


@dataclass(frozen=True)
class Evidence:
    """A decision, and what else may be known where it is shown: the runs of a kind may lie elsewhere."""

    decision: Decision
    config: Config
    decisions: Mapping[str, Decision] = field(default_factory=dict)  # of all the study's stages
    results: Results = field(default_factory=dict)  # run id -> result; empty where none is known

    @property
    def tracks(self) -> Mapping[str, Any]:
        return self.decision["tracks"]

    def titled(self, table: Table, track: str, **changes: Any) -> Table:
        """Return a track's table, its title with the track if there are several. `changes`: other fields."""
        title = changes.pop("title", table.title)
        suffix = f": {optimizer(track)}" if len(self.tracks) > 1 else ""
        return replace(table, title=f"{title}{suffix}", **changes)


class Tile(NamedTuple):
    """A figure that stands by itself. `remark`: its interval, or what it is to be compared with."""

    what: str
    value: str
    unit: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Check:
    """A line of the verdict in words. `between`: the labels of the two arms that it compares, if it does."""

    line: Line
    title: str
    asks: str
    means: str
    between: Sequence[str] = ()


@dataclass(frozen=True)
class Answer:
    """What a study found on one track. Without an answer, `sentence` says why there is none yet."""

    track: str
    judged: str  # beats, meets, misses or undecided: the colour of the answer
    sentence: str
    findings: Sequence[str] = ()  # at length, one line each
    tiles: Sequence[Tile] = ()
    tables: Sequence[Table] = ()  # stand below the answer
    judging: Sequence[Difference] = ()  # the differences that the answer rests on
    adds: bool = False  # it is one more line of the answer before it
    warning: str = ""
    checks: Sequence[Check] = ()
    arms: frozenset[str] = frozenset()  # whose own pictures the page shows before those of other arms


class Kind:
    """A kind of result. A subclass defines `shows` and what there is to say of such a decision."""

    shows = ""  # as the stages say it
    concludes = True  # it answers the study's question; else it chooses something for later stages
    section = ""  # the page's heading; the stage's title if empty
    file = ""  # its CSV file
    columns: Mapping[str, Any] = {}  # of that file: name -> unit and meaning

    def answers(self, found: Evidence) -> list[Answer]:
        """Return the answer on each track."""
        return []

    def tables(self, found: Evidence) -> list[Table]:
        """Return the tables that stand in its section, and on the terminal."""
        return []

    def arms(self, found: Evidence) -> Mapping[str, Mapping[str, str]]:
        """Return track -> arm -> its label, of arms that have curves and pictures of their own."""
        return {}

    def seeds(self, found: Evidence) -> Sequence[int]:
        """Return the seeds of the runs that the study ends with."""
        return found.config.seeds

    def rows(self, found: Evidence) -> Iterable[Mapping[str, Any]]:
        """Return the rows of its CSV file."""
        return []

    def acceptance(self, found: Evidence) -> Acceptance | None:
        """Return what acceptance.json holds; None if the kind judges nothing."""
        return None

    def papers(self, found: Evidence) -> Mapping[str, Sequence[Table]]:
        """Return the stem of a file -> the tables that it holds, as Markdown and as LaTeX."""
        return {}


def difference_tile(what: str, difference: Difference, joint: bool = True) -> Tile:
    """Return a paired difference with the interval that judges it."""
    d = by_interval(difference, joint)
    seeds = plural(d["seeds"], "seed")
    if d["low"] is None and d["high"] is None:
        return Tile(what, signed(centre_of(d), 3), "nats", f"no interval, {seeds}")
    over = f", joint over {d['comparisons']} comparisons" if joint and d["comparisons"] > 1 else ""
    limits = f"{interval(d['low'], d['high'], 3)} ({level([d])}{over}, {seeds})"
    return Tile(what, signed(centre_of(d), 3), "nats", limits)


def window_tile(what: str, span: Window, other: Window | None = None, whose: str = "") -> Tile:
    """Return the width of a learning-rate window beside an`other` one. Two that do not end within what was
    tried are not set against each other."""
    remark = ""
    if other and is_open(other) and is_open(span):
        remark = f"neither this window nor that {whose} ends within what was tried"
    elif other:
        remark = f"{in_octaves(other)} {whose}"
    return Tile(what, in_octaves(span).removesuffix(" octaves"), "octaves", remark)


def is_open(span: Window) -> bool:
    """Return whether a window does not end within what was tried."""
    return span["open_low"] or span["open_high"]
