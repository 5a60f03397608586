"""report.html: a study on one page, in one file that asks the network for nothing.

A pure function of the study's files: equal files give equal bytes. Text from the study is escaped wherever it
stands, and the page's own policy lets nothing run or load but what is written in it.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebc_lab.records.files import write_atomic
from ebc_lab.study.store import manifest
from ebc_lab.study.store.study import Study

from ..pictures.catalogue import EMBEDDED, PHONE, catalogue, opening_picture, shows_curves
from ..text import words
from . import evidence
from .curves import as_script

TEMPLATES = Path(__file__).parent / "templates"
LARGE_SVG = 600_000  # bytes; of a larger one the PNG is shown, which opens sooner
KINDS = {".svg": "image/svg+xml", ".png": "image/png"}
SCRIPTS = ("curves.js", "page.js")
NOT_SAID = ("header", "settings", "setting_tables", "checksums", "curves")  # of the evidence: no text of ours


@dataclass(frozen=True)
class Picture:
    """A figure as the page embeds it. `arm` is empty for those of the whole study."""

    name: str
    section: str
    title: str
    alt: str
    arm: str
    path: Path
    phone_path: Path | None = None
    note: str = ""
    alert: str = ""

    @property
    def whole_title(self) -> str:
        """Return the title where no heading above it names the arm."""
        return f"{self.arm}: {self.title}" if self.arm and self.arm not in self.title else self.title

    @property
    def caption(self) -> str:
        """Return the title where the picture leaves it to the page: a PNG stands by itself."""
        return "" if self.path.suffix == ".png" else self.title

    @property
    def uri(self) -> Any:
        return _uri(self.path)

    @property
    def file(self) -> str:
        return self.path.name

    @property
    def phone(self) -> Any:
        """Return what a narrow screen shows instead; empty where that is the same."""
        if not self.phone_path or self.arm:
            return ""
        return in_srcset(_uri(self.phone_path))


def in_srcset(uri: Any) -> Any:
    """Return a data: URI for a srcset, in which a space would end it."""
    return _ours(uri.replace(" ", "%20"))


def _uri(path: Path) -> Any:
    content = path.read_bytes()
    if path.suffix == ".svg":
        return svg_uri(content)
    return f"data:{KINDS[path.suffix]};base64,{base64.b64encode(content).decode()}"


def svg_uri(svg: bytes) -> Any:
    """Return an SVG as a data: URI: as text, which is a fifth shorter than base64."""
    text = " ".join(svg.decode().split())
    for special in '%#&"':
        text = text.replace(special, f"%{ord(special):02X}")
    return _ours(f"data:{KINDS['.svg']},{text}")  # without " and & it stays in its attribute


def write_page(root: Path) -> Path:
    """Write the page of the study in folder `root`.

    Raises UserError when a file that it is made from is damaged.
    """
    study = Study(root)
    with study.blame_files():
        content = render(study.root, evidence.gather(study))
    manifest.remove_entries(root, study.page_file.name)
    write_atomic(study.page_file, content)
    return study.page_file


def render(root: Path, evidence_of: Mapping[str, Any], live: Mapping[str, Any] | None = None) -> str:
    """Return the page of what `evidence.gather` found.

    `live`: what `inspect.status` says, for a page that follows a study.
    """
    judged = {arm for answer in evidence_of["answers"] for arm in answer["arms"]}
    shown, left_out = chosen_pictures(pictures(root), judged)
    checked = any(answer["checks"] for answer in evidence_of["answers"])
    first = opening_picture(catalogue(root))
    opening = next((p for p in shown if p.name == first), None)
    static = [p for p in shown if shows_curves(p.name) and p is not opening]
    by_section: dict[str, list[Picture]] = {}
    for picture in shown:
        if picture is not opening and picture not in static:
            by_section.setdefault(picture.section, []).append(picture)
    said = str({k: v for k, v in evidence_of.items() if k not in NOT_SAID})
    sections = evidence_of["sections"]
    compares_arms = not sections or any(section["arms"] for section in sections)
    ebc = words.has_ebc(evidence_of["header"]["config"])
    rest = {
        "pictures": by_section,
        "opening": opening,
        "static": static,
        "left_out": left_out,
        "live": live,
        "named": evidence.NAMED,
        "words": words,
        "curves_data": _ours(as_script(evidence_of["curves"])),
        **(words.explanation(ebc, checked, said) if compares_arms else {"method": (), "terms": {}}),
    }
    return rendered("page.html.j2", **evidence_of, **rest)


def message(title: str, text: str) -> str:
    """Return a page that says one thing: what a live view shows when the study cannot be read."""
    return rendered("message.html.j2", title=title, text=text)


def rendered(template: str, *, scripts: Sequence[str] = SCRIPTS, **values: Any) -> str:
    """Return a template with these values, style and `scripts`. Raises LookupError where one is missing."""
    from jinja2 import UndefinedError

    style, sources = _source("page.css"), [_source(name) for name in scripts]
    hashes = {"style_hash": _hash(style), "script_hashes": [_hash(script) for script in sources]}
    embedded = {"style": style, "scripts": sources, **hashes}
    try:
        page: str = _environment().get_template(template).render(**values, **embedded)
    except UndefinedError as error:
        raise LookupError(str(error)) from None
    return page


# -- figures -------------------------------------------------------------------------------------------------


def pictures(root: Path) -> list[Picture]:
    """Return the study's figures in the order of figures.json, without those whose files are not there."""
    images = {p.name: p for p in root.iterdir() if p.suffix in KINDS}  # only files of this very folder
    shown = []
    for entry in catalogue(root):
        if path := _file(images, entry["name"]):
            shown.append(Picture(**entry, path=path, phone_path=images.get(f"{entry['name']}{PHONE}.svg")))
    return shown


def _file(images: Mapping[str, Path], name: str) -> Path | None:
    """Return the SVG unless it is a large one with a PNG beside it."""
    svg, png = images.get(f"{name}.svg"), images.get(f"{name}.png")
    return png if svg is None or (png and svg.stat().st_size > LARGE_SVG) else svg


def chosen_pictures(all_of_them: list[Picture], about: set[str]) -> tuple[list[Picture], list[Picture]]:
    """Return (embedded, left out): while they are few all are embedded, else the study's and judged arms'."""
    if len(all_of_them) <= EMBEDDED:
        return all_of_them, []
    shown = [p for p in all_of_them if not p.arm or p.arm in about][:EMBEDDED]
    return shown, [p for p in all_of_them if p not in shown]


# -- templates -----------------------------------------------------------------------------------------------


@functools.cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    names = ("fixed", "signed", "brief", "percent", "setting", "interval", "plural", "breakable", "clock")
    made.filters.update({name: getattr(words, name) for name in names})
    made.filters["exact"] = _exact
    return made


def _exact(value: float | None) -> str:
    """Return what a cell sorts by, with the digits of the CSV files."""
    return "" if value is None else f"{value:.9g}"


@functools.cache
def _source(name: str) -> Any:
    """Return a file of ours that the page holds whole, without its indentation."""
    lines = (TEMPLATES / name).read_text(encoding="utf-8").splitlines()
    return _ours("\n".join(line.strip() for line in lines if line.strip()))


def _ours(text: str) -> Any:
    """Return text that is not escaped, because it is not the study's or cannot become markup."""
    from markupsafe import Markup

    return Markup(text)


def _hash(text: str) -> str:
    """Return the one inline style, or script, that the page's policy allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
