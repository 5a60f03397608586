"""Tables as data: what a column shows and in which format, stated once for the terminal, the papers and the
page.

`tables` builds them; `cli.screen`, `papers` and the page's templates only write the cells down.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .words import NOTHING, fixed

TERMINAL, PAPER, PAGE = "terminal", "paper", "page"
EVERYWHERE = (TERMINAL, PAPER, PAGE)


@dataclass(frozen=True)
class Cell:
    """What one cell shows, already formatted."""

    text: str = ""
    value: float | None = None  # of a figure, in the column's unit: the page sorts by it
    page: str = ""  # what the page, which has more room, says instead
    note: str = ""  # a remark after the text, less prominent
    code: str = ""  # a recorded name below it
    tone: str = ""  # pass, fail or undecided of a judgement; strong of what was chosen
    link: str = ""  # id of the row on the page that it leads to
    files: Sequence[tuple[str, str]] = ()  # on the page: words, and the file of the study that they lead to
    interval: Any = None  # a `Difference`, which the page draws
    drawing: Any = None  # the same, drawn

    @property
    def empty(self) -> bool:
        return self.text in ("", NOTHING) and self.interval is None and not self.files


@dataclass(frozen=True)
class Column:
    """A column. `kind`: text, name (a recorded one, in code type), label (a short one), prose (wraps) or
    figure (to the right); on the page also code, drawing and links."""

    title: str
    kind: str = "text"
    form: Callable[[Any], str] = lambda value: "" if value is None else str(value)
    short: str = ""  # its title on paper and on the terminal
    on: Sequence[str] = EVERYWHERE
    head: bool = False  # names the row
    optional: bool = False  # left out where no row has anything in it
    # what the table's caption says of it: a text that one of its cells must show ("": anything) -> the words
    notes: Mapping[str, str] = field(default_factory=dict)

    def cell(self, value: Any) -> Cell:
        """Return a value in this column's format; a Cell stays as it is."""
        if isinstance(value, Cell):
            return value
        return Cell(self.form(value), value if isinstance(value, int | float) else None)


SPREAD = {"±": "± one standard deviation over the seeds"}  # notes of a loss
OPEN = {"≥": "≥ where it does not end within what was tried"}  # of a window


def loss_column(title: str, short: str, **how: Any) -> Column:
    return Column(title, "figure", fixed, short, **how)


def two_digits(value: float | None) -> str:
    return fixed(value, 2)


@dataclass(frozen=True)
class Row:
    """A row of cells. `chosen`: it stands out; `id`: by which links on the page lead to it."""

    cells: Sequence[Cell]
    id: str = ""
    chosen: bool = False


@dataclass(frozen=True)
class Table:
    """`name` identifies it on the page and in a paper; `note`: units and what else a reader needs at its
    head, to which `on` adds the notes of the columns that are shown."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    note: str = ""
    caption: str = ""  # in a paper
    paper: Sequence[str] = ()  # titles of the columns of a paper, in their order there; empty: as columns say
    places: Sequence[str] = EVERYWHERE
    target: float | None = None  # of its drawn intervals: how much worse still counts as no worse
    higher: bool = False  # of its drawn intervals: whether what lies above zero is better

    def on(self, place: str) -> Table:
        """Return the columns shown in a place; on the terminal, which is narrow, without the empty ones."""
        if place == PAPER and self.paper:
            titles = [column.title for column in self.columns]
            there = [titles.index(title) for title in self.paper]
        else:
            there = [i for i, column in enumerate(self.columns) if place in column.on]

        def wanted(i: int) -> bool:
            droppable = self.columns[i].optional or place == TERMINAL
            return not (droppable and all(row.cells[i].empty for row in self.rows))

        places = [i for i in there if wanted(i)]
        rows = [replace(row, cells=[row.cells[i] for i in places]) for row in self.rows]
        shown = replace(self, columns=[self.columns[i] for i in places], rows=rows)
        return replace(shown, note=shown._caption(place))

    def _caption(self, place: str) -> str:
        """Return the note, then what the columns say of what they show in a place."""
        told = [self.note]
        for i, column in enumerate(self.columns):
            cells = [row.cells[i] for row in self.rows]
            texts = {(place == PAGE and cell.page) or cell.text for cell in cells} - {"", NOTHING}
            told += [note for mark, note in column.notes.items() if any(mark in text for text in texts)]
        return "; ".join(dict.fromkeys(filter(None, told)))

    def shortened(self, most: int, where: str, keep: Collection[str] = ()) -> Table:
        """Return the first rows of a long table, among them those that were chosen and those whose ids are to
        be kept; its note says how many there are, and `where` all of them can be read."""
        if len(self.rows) <= most:
            return self
        wanted = {id(row) for row in self.rows if row.chosen or row.id in keep}
        others = [id(row) for row in self.rows if id(row) not in wanted]
        wanted.update(others[: max(0, most - len(wanted))])
        rows = [row for row in self.rows if id(row) in wanted]
        short = f"the first {len(rows):,} of {len(self.rows):,} rows; {where}"
        return replace(self, rows=rows, note=f"{self.note}; {short}" if self.note else short)

    def linked_to(self, shown: Collection[str]) -> Table:
        """Return the table without links to rows that are not among those shown."""
        rows = [
            replace(
                row, cells=[replace(c, link="") if c.link and c.link not in shown else c for c in row.cells]
            )
            for row in self.rows
        ]
        return replace(self, rows=rows)

    def texts(self) -> list[list[str]]:
        """Return the cells as plain text, row by row."""
        return [[cell.text for cell in row.cells] for row in self.rows]


def noted(columns: Sequence[Column], notes: Mapping[str, Mapping[str, str]]) -> list[Column]:
    """Return the columns with further `notes` of those with these titles."""
    return [replace(c, notes={**c.notes, **notes.get(c.title, {})}) for c in columns]


def filled(columns: Sequence[Column], values: Iterable[Any], **row: Any) -> Row:
    """Return a row of values, each in its column's format. `row`: the Row's other fields."""
    return Row([column.cell(value) for column, value in zip(columns, values, strict=True)], **row)
