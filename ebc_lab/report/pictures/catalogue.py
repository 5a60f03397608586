"""figures.json: the pictures of a study in reading order, each with its title and what it shows in words.

Written when the pictures are drawn, read by the page. No matplotlib here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from ebc_lab.config.schema import STAGES
from ebc_lab.records.json_files import read_json, write_json
from ebc_lab.records.paths import StudyFiles

EMBEDDED = 60  # figures of a page; where there are more, those of arms that nothing is judged of are left out
PHONE = "_phone"  # ends the name of an SVG that is drawn for a phone
SECTIONS = ("verdict", *STAGES, "arms", "timeline")  # in reading order


class Entry(TypedDict):
    """A picture as figures.json lists it."""

    name: str  # stem of its .png and .svg
    section: str  # one of SECTIONS
    title: str
    alt: str  # what is seen and was found
    arm: str  # whose picture it is, empty where it is of several arms


def write_catalogue(root: Path, entries: Iterable[Mapping[str, Any]]) -> Path:
    """Write the pictures' list in reading order. `entries`: as `catalogue` returns them. -> the file."""
    path = StudyFiles(root).figures_file
    write_json(path, sorted(entries, key=lambda entry: SECTIONS.index(entry["section"])))
    return path


def catalogue(root: Path) -> list[Entry]:
    """The study's pictures in reading order; empty while none is drawn."""
    path = StudyFiles(root).figures_file
    try:
        return list(read_json(path, list[Entry], "`ebc-lab report` draws the pictures again"))
    except FileNotFoundError:
        return []
