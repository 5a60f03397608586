"""judgement.html and its neighbours: what runs that somebody else made can say, as files.

All of them are pure functions of the judgement: equal runs give equal bytes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ebc_lab.config.errors import UserError
from ebc_lab.judging.record import ArmRecord, DifferenceRecord, Record
from ebc_lab.records.files import write_atomic
from ebc_lab.records.json_files import json_bytes

from ..kinds import judged as kind
from ..text import papers
from ..text.table import PAGE, PAPER, Table
from . import html
from .ruler import draw_intervals

if TYPE_CHECKING:
    from ebc_lab.judging.judgement import Judgement
    from ebc_lab.judging.runs import Runs

    from ..pictures.drawing.sheet import Sheet

PAGE_FILE, FIGURE = "judgement.html", "figure.pdf"
INDEX = "judgement.json"  # the record, and the checksums of the files beside it
MOST_ROWS = 500  # of a table of the page
SECTIONS = {  # id -> title, the names of its tables
    "arms-compared": ("Arms and differences", ("arms", "differences")),
    "tuned": ("How the arms were tuned", ("tuning",)),
    "speed": ("Curves and steps", ("steps", "ratios", "exchange", "equal", "speedups")),
    "rules": ("Another benchmark’s rule", ("rule", "claims")),
}


@dataclass(frozen=True)
class Drawing:
    """A picture that the page embeds: what `parts.figure` shows of it."""

    name: str
    whole_title: str
    alt: str
    alert: str
    note: str
    uri: Any
    phone: Any  # what a narrow screen shows instead
    file: str  # empty: it lies in the page alone
    arm: str = ""  # it is of all of them

    @property
    def caption(self) -> str:
        return self.whole_title


def write(judgement: Judgement, folder: Path) -> list[Path]:
    """Write page, tables and picture of a judgement into a folder, made if need be. -> files, the page first.

    Raises UserError: a file of one of these names is there and is not as we wrote it.
    """
    made = files_of(judgement.record, judgement.data, folder.resolve().name)
    index = {**judgement.record, "files": {name: _checksum(content) for name, content in made.items()}}
    made = {INDEX: json_bytes(index), **made}
    refuse_foreign(folder, made)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in made.items():
        write_atomic(folder / name, content)
    return [folder / name for name in (PAGE_FILE, *(name for name in made if name != PAGE_FILE))]


def files_of(record: Record, runs: Runs, name: str) -> dict[str, bytes]:
    """Return file -> content of a judgement, without its index. `name`: what the page calls it."""
    every = kind.tables(record)
    drawings, figure = _drawn(record, runs)
    on_paper = [table.on(PAPER) for table in every if PAPER in table.places]
    about = f"From {'; '.join(record['sources'])}. {record['method']}"
    own = [name for name in ArmRecord.__annotations__ if name != "configuration"]
    arms = [{**arm, "configuration": json.dumps(arm["configuration"], default=str)} for arm in record["arms"]]
    texts = {
        PAGE_FILE: render(record, every, drawings, name),
        "arms.csv": as_csv([*own, "configuration"], arms),
        "differences.csv": as_csv(list(DifferenceRecord.__annotations__), record["differences"]),
        "runs.csv": as_csv(*_runs(record)),
        "judgement.md": papers.markdown(on_paper, about),
        "judgement.tex": papers.latex(on_paper, name, about),
    }
    return {**{file: text.encode() for file, text in texts.items()}, FIGURE: figure}


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def refuse_foreign(folder: Path, made: Mapping[str, bytes]) -> None:
    """Raise UserError where a file would be overwritten that an earlier judgement did not leave so."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder for the page and the tables.")
    written = _written(folder / INDEX)
    for name, content in made.items():
        path = folder / name
        if not path.exists() or (name == INDEX and written):
            continue
        there = path.read_bytes() if path.is_file() else b""
        if there != content and written.get(name) != _checksum(there):
            raise UserError(
                f"{path} is there and is not as ebc-lab wrote it: move it away, or name another folder."
            )


def _written(index: Path) -> Mapping[str, str]:
    """Return the files of an earlier judgement with their checksums; empty where there is none."""
    try:
        files = json.loads(index.read_bytes())["files"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return cast(Mapping[str, str], files) if isinstance(files, dict) else {}


# -- tables of figures in full -------------------------------------------------------------------------------


def as_csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as CSV, figures in full; what is not known is empty."""
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([row.get(name) for name in columns] for row in rows)
    return made.getvalue()


def _runs(record: Record) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the columns of the runs and their rows, a column for each setting."""
    own = [key for key in record["runs"][0] if key != "settings"]
    rows = [{**run["settings"], **{key: run[key] for key in own}} for run in record["runs"]]
    return list(dict.fromkeys([*own, *(name for row in rows for name in row)])), rows


# -- the page ------------------------------------------------------------------------------------------------


def _drawn(record: Record, runs: Runs) -> tuple[list[Drawing], bytes]:
    """Return the page's pictures, and the one of the outcomes as PDF."""
    import matplotlib

    from ..pictures.catalogue import PHONE
    from ..pictures.drawing.sheet import STYLE
    from ..pictures.judged import Source, draw_curves, draw_outcomes
    from ..pictures.render import pdf, svg

    source = "; ".join(record["sources"])
    draw: dict[str, Callable[[Source], Sheet | None]] = {
        "outcomes": partial(draw_outcomes, record),
        "curves": partial(draw_curves, record, runs),
    }
    made, sheets = [], []
    with matplotlib.rc_context(fname=STYLE), warnings.catch_warnings():
        # a letter that the font lacks is a box in the PDF; in the SVG the reader's own fonts show it
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        for name, drawn in draw.items():
            wide, narrow = drawn(Source(source)), drawn(Source(source, narrow=True))
            if wide is None or narrow is None:
                continue
            wide.settle()
            narrow.settle()
            sheets.append(wide)
            uris = [html.svg_uri(svg(wide, name)), html.svg_uri(svg(narrow, f"{name}{PHONE}"))]
            told = (wide.title, wide.alt, wide.alert, wide.note)
            file = FIGURE if name == "outcomes" else ""
            made.append(Drawing(name, *told, uris[0], html.in_srcset(uris[1]), file))
        figure = pdf(sheets[0])
    return made, figure


def render(record: Record, every: Sequence[Table], drawings: Sequence[Drawing], name: str) -> str:
    """Return the page. `every`: the tables as `kinds.judged.tables` makes them."""
    pictures = {drawing.name: drawing for drawing in drawings}
    shown = {}
    for table in every:
        if PAGE in table.places:
            short = draw_intervals(table).on(PAGE)
            shown[table.name] = short.shortened(MOST_ROWS, "all of them lie beside this page as CSV files")
    sections = []
    for id, (title, names) in SECTIONS.items():
        found = [shown[table] for table in names if table in shown]
        picture = pictures.get("curves") if id == "speed" else None
        if found or picture:
            sections.append({"id": id, "title": title, "tables": found, "picture": picture})
    cautions = [{**caution, "runs": kind.runs_of_caution(caution)} for caution in record["cautions"]]
    headline = kind.headline(record)
    return html.rendered(
        "judged.html.j2",
        scripts=("page.js",),
        name=name,
        record=record,
        question=kind.question(record),
        headline=headline,
        findings=record["answer"][1:] if headline in record["answer"] else record["answer"],
        judged=kind.judged(record),
        tiles=kind.tiles(record),
        cautions=cautions,
        outcomes=pictures.get("outcomes"),
        sections=sections,
        columns=shown["columns"],
    )
