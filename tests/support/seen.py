"""What a reader sees of a page or a picture as lines of text, and their comparison with tests/golden."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.collections import Collection
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.spines import Spine
from matplotlib.text import Annotation, Text

from ebc_lab.report.pictures.catalogue import PHONE

from .golden import assert_golden

GOLDEN = Path(__file__).parents[1] / "golden"


def assert_as_recorded(name: str, text: str) -> None:
    """Fail where a text is not that of tests/golden."""
    assert_golden(GOLDEN / f"{name}.txt", text)


# -- pages ---------------------------------------------------------------------------------------------------

HIDDEN = ("script", "style", "head", "dialog")
LINES = {"p", "h1", "h2", "h3", "h4", "li", "dt", "dd", "tr", "figure", "figcaption", "summary", "ul"}
LINES |= {"table", "section", "article", "header", "footer", "div"}
SAID = ("beats", "meets", "misses", "undecided", "chosen", "better", "worse", "both", "pass", "fail", "alert")
DRAWN = ("rect", "path", "circle")
PLACES = ("d", "x", "width", "cx")
MOST_ROWS, LAST_ROWS = 5, 2  # of a long table, from its beginning and its end
DIGEST = re.compile(r"\b[0-9a-f]{16,}\b")


class _Page(HTMLParser):
    """Text in lines; cells of a table between bars; what is drawn by its places."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 0
        self.lines: list[str] = [""]

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        told = dict(attrs)
        self.hidden += tag in HIDDEN
        if self.hidden:
            return
        if tag in LINES:
            self.lines.append("")
        if tag == "tr":
            self.lines[-1] = "| "
        if tag in ("h1", "h2", "h3", "h4"):
            self.lines[-1] = "#" * int(tag[1]) + " "
        if classes := [name for name in (told.get("class") or "").split() if name in SAID]:
            self.lines[-1] += f"[{' '.join(classes)}] "
        if tag in DRAWN:
            self.lines[-1] += f"<{told['class']} {' '.join(told[key] for key in PLACES if key in told)}> "
        if tag == "img":
            self.lines[-1] += f"[image: {told['alt']}]"

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag in HIDDEN:
            self.hidden -= 1
        elif not self.hidden and tag in ("td", "th"):
            self.lines[-1] += " | "

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.lines[-1] += re.sub(r"\s+", " ", data.replace("\u200b", ""))


def page_text(html: str) -> str:
    """What a page says, in lines; of long tables the first rows and the last ones."""
    page = _Page()
    page.feed(html)
    told = [" ".join(line.split()) for line in page.lines]
    text = DIGEST.sub("(digest)", "\n".join(_shortened([line for line in told if line and line != "|"])))
    # not how many settings there are: another one would change every text
    return re.sub(r"(All|^… the) \d+ (settings|more)", r"\1 \2", text, flags=re.M)


def _shortened(lines: list[str]) -> Iterator[str]:
    rows: list[str] = []
    for line in [*lines, ""]:
        if line.startswith("|"):
            rows.append(line)
            continue
        left_out = len(rows) - 1 - MOST_ROWS - LAST_ROWS
        if left_out > 1:
            every = "the " * rows[0].startswith("| Setting | Value")
            rows[1 + MOST_ROWS : -LAST_ROWS] = [f"… {every}{left_out} more"]
        yield from rows
        rows = []
        yield line


def table_text(table: Any) -> str:
    """How many rows a frame has and, of each column that is not empty, the first two and the last."""
    shown = table.iloc[sorted({*range(min(2, len(table))), len(table) - 1})] if len(table) else table
    lines = [
        f"{name}: {' | '.join(map(as_text, shown[name]))}" for name in table if shown[name].notna().any()
    ]
    return "\n".join([f"{len(table)} rows of {len(table.columns)} columns", *lines])


def as_text(value: Any) -> str:
    """A cell of a frame."""
    if isinstance(value, float):
        return number(value)
    return str(value)


def told(kind: Any, found: Any) -> str:
    """What a kind of result says of a decision: its answers, its tables as the page has them, CSV rows."""
    lines = []
    for answer in kind.answers(found):
        lines += [f"[{answer.judged}] {answer.sentence}", *answer.findings]
        lines += [" | ".join(filter(None, tile)) for tile in answer.tiles]
    for table in kind.tables(found):
        shown = table.on("page")
        lines += [f"==== {table.title}", table.note, " | ".join(column.title for column in shown.columns)]
        lines += [" | ".join(row) for row in shown.texts()]
    rows = list(kind.rows(found))
    lines += [f"==== {len(rows)} rows", *(f"{key}: {value}" for key, value in rows[0].items())]
    return "\n".join(lines)


# -- pictures ------------------------------------------------------------------------------------------------

ALIKE = 3  # lines of one look that are shown


def number(value: Any) -> str:
    """Four digits of a figure, the same on every machine: what lies between two is rounded up."""
    if np.ma.is_masked(value) or not np.isfinite(value):
        return "–"
    short = f"{float(value) * (1 + 1e-9):.4g}"
    return "0" if float(short) == 0 or abs(float(value)) < 1e-12 else short


def point(place: Iterable[Any]) -> str:
    return f"({', '.join(map(number, place))})"


def words(text: str) -> str:
    return " / ".join(line.strip() for line in text.split("\n"))


def sheets_text(sheets: Mapping[str, Any]) -> str:
    """What pictures show and say; of one for a phone, what the wide one before it does not."""
    texts = {name: sheet_text(name, sheet) for name, sheet in sheets.items()}
    shown = []
    for name, text in texts.items():
        wide = texts.get(name.removesuffix(PHONE), "").splitlines() if name.endswith(PHONE) else ()
        shown.append(
            "\n".join(line for line in text.splitlines() if line not in wide or line.startswith("--"))
        )
    return "\n\n".join(shown)


def sheet_text(name: str, sheet: Any) -> str:
    """What a settled picture shows: its words, scales, limits, ticks; of each line its look, the number of
    its points, the first, the middle and the last one."""
    heights = sheet.panels[0].get_subplotspec().get_gridspec().get_height_ratios()
    lines = [
        f"== {name}: {'narrow' * sheet.narrow or 'wide'}, panels of {' + '.join(map(number, heights))} inches"
    ]
    told = {key: getattr(sheet, key) for key in ("title", "alt", "note", "alert", "source")}
    lines += [f"{key}: {text}" for key, text in told.items() if text]
    for axes in sheet.panels:
        lines += [f"-- panel {words(axes.get_title(loc='left'))}".rstrip(), *_panel(axes)]
    for legend in sheet.legends:
        marks = zip(legend.legend_handles, legend.get_texts(), strict=True)
        lines += ["-- key", *(f"{words(text.get_text())}: {_look(mark)}" for mark, text in marks)]
    return "\n".join(lines)


def _panel(axes: Any) -> Iterator[str]:
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        low, high = axis.get_view_interval()
        ends = sorted((low, high))
        places = [at for at in axis.get_majorticklocs() if ends[0] <= at <= ends[1]]
        ticks = axis.get_major_formatter().format_ticks(places)
        shown = axis.get_tick_params()[{"x": "labelbottom", "y": "labelleft"}[name]]
        said = f"ticks {'; '.join(map(words, ticks))}" if shown else "no tick labels"
        label = words(axis.label.get_text())
        yield f"{name} {axis.get_scale()} {number(low)} to {number(high)}, {said}; label: {label}"
    seen: dict[str, int] = {}
    for artist in axes.get_children():
        if isinstance(artist, Line2D) and artist.get_label() != "_leader":
            look, place = f"line {_look(artist)}", _course(artist)
        elif isinstance(artist, Collection):
            look = f"{type(artist).__name__} {_look(artist)}"
            place = f"{len(artist.get_paths())} paths, {_box(artist.get_datalim(axes.transData))}"
        elif isinstance(artist, Patch) and artist is not axes.patch and not isinstance(artist, Spine):
            box = artist.get_path().transformed(artist.get_patch_transform()).get_extents()
            look, place = f"area {_look(artist)}", _box(box)
        else:
            continue
        seen[look] = seen.get(look, 0) + 1
        if seen[look] <= ALIKE:
            yield f"{look}: {place}"
    yield from (f"{look}: {times} in all" for look, times in seen.items() if times > ALIKE)
    yield from (_text(axes, text) for text in axes.texts if text.get_text())


def _look(artist: Any) -> str:
    """Colour, line and marker."""
    alpha = "" if artist.get_alpha() is None else f" at {artist.get_alpha():g}"
    if isinstance(artist, Line2D):
        mark = artist.get_marker()
        marker = "" if mark in ("None", "", None) else f" {mark} {artist.get_markersize():g}"
        if marker and artist.get_markerfacecolor() in ("none", "white"):
            marker += f" {artist.get_markerfacecolor()} inside"
        line = artist.get_linestyle()
        width = "" if line in ("None", "") else f" {line} {artist.get_linewidth():g}"
        return f"{to_hex(artist.get_color())}{width}{marker}{alpha}"
    colours = [*np.atleast_2d(artist.get_facecolor()), *np.atleast_2d(artist.get_edgecolor())]
    found = dict.fromkeys(to_hex(colour) for colour in colours if len(colour))
    return f"{' '.join(found)}{alpha}"


def _course(line: Any) -> str:
    x, y = (np.ma.atleast_1d(np.ma.masked_invalid(np.ma.asarray(d, float))) for d in line.get_data())
    ends = dict.fromkeys((0, len(x) // 2, len(x) - 1)) if len(x) else ()
    own = "" if line.get_transform().contains_branch(line.axes.transData) else " of the panel"
    holes = int(np.ma.count_masked(y))
    gaps = f", {holes} not there" if holes else ""
    return f"{len(x)} at {' '.join(point((x[i], y[i])) for i in ends)}{own}{gaps}"


def _box(box: Any) -> str:
    return f"{point((box.x0, box.y0))} to {point((box.x1, box.y1))}"


def _text(axes: Any, text: Text) -> str:
    """A text, and where it stands if that is a place in the data and not one that its width decides."""
    place = ""
    if isinstance(text, Annotation):
        place = f" at {point(text.xy)}, {text.get_ha()} {text.get_va()}"
    elif text.get_transform() == axes.transData:
        place = f" at {point(text.get_position())}, {text.get_ha()} {text.get_va()}"
    return f"text {to_hex(text.get_color())}{place}: {words(text.get_text())}"
