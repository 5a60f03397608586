"""figures.json: the pictures of a study in reading order, each with its title and what it shows in words.

Written when the pictures are drawn, read by the page. No matplotlib here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from ebc_lab.config.schema import STAGES
from ebc_lab.records.json_files import read_json, write_json
from ebc_lab.records.paths import StudyFiles

EMBEDDED = 60  # figures of a page; where there are more, those of arms that nothing is judged of are left out
CURVES = ("curves", "ablation_curves")
PHONE = "_phone"  # ends the name of an SVG that is drawn for a phone
SECTIONS = ("verdict", *STAGES, "arms", "timeline")  # in reading order


class Entry(TypedDict):
    """A picture as figures.json lists it."""

    name: str  # stem of its .png and .svg
    section: str  # one of SECTIONS
    title: str
    alt: str  # what is seen and was found
    arm: str  # whose picture it is, empty where it is of several arms
    note: NotRequired[str]  # how to read it; older studies draw it
    alert: NotRequired[str]  # what is missing in it


def write_catalogue(root: Path, entries: Iterable[Entry]) -> Path:
    """Write the pictures' list in reading order. `entries`: as `catalogue` returns them. -> the file."""
    path = StudyFiles(root).figures_file
    write_json(path, in_reading_order(entries))
    return path


def in_reading_order(entries: Iterable[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: SECTIONS.index(entry["section"]))


def catalogue(root: Path) -> list[Entry]:
    """The study's pictures in reading order; empty while none is drawn."""
    path = StudyFiles(root).figures_file
    try:
        return list(read_json(path, list[Entry], "`ebc-lab report` draws the pictures again"))
    except FileNotFoundError:
        return []


def opening_picture(entries: Sequence[Entry]) -> str:
    """Return the name of the picture beside a study's answer and in papers: of rates with and without EBC, or
    the verdict's first that the page's script does not draw as well. Empty for none."""
    rates = [entry for entry in entries if entry["section"] == "lr_scale"]
    others = [entry for entry in entries if entry["section"] == "verdict" and not shows_curves(entry["name"])]
    curves = [entry for entry in entries if entry["section"] == "verdict"]
    return next((entry["name"] for entry in (*rates, *others, *curves)), "")


def shows_curves(name: str) -> bool:
    """Return whether a picture shows the loss curves, which the page's script draws too."""
    return any(name == curves or name.startswith(f"{curves}_") for curves in CURVES)
