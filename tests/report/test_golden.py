"""What a reader sees of recorded studies: page, tables and pictures, which are laid out and not rendered."""

from __future__ import annotations

import json

import pytest
from support.recorded import EVIDENCE
from support.seen import assert_as_recorded, page_text, sheets_text

import ebc_lab
from ebc_lab.config.identity import digest, recorded_environment
from ebc_lab.records.paths import StudyFiles
from ebc_lab.report import pictures
from ebc_lab.report.conclude import report
from ebc_lab.report.page.serve import LivePage
from ebc_lab.study.store.study import Study

QUICK = ("default", "cautious", "robustness", "finetune", "rate_fit")
OTHERS = ("ladder", "shocks", "calibrated")


@pytest.fixture
def sheets(monkeypatch):
    """The pictures that are drawn from now on, by name; they are not rendered."""
    found = {}
    monkeypatch.setattr(pictures, "png", lambda sheet: b"PNG")
    monkeypatch.setattr(pictures, "pdf", lambda sheet: sheet.title.encode())
    monkeypatch.setattr(pictures, "svg", lambda sheet, name: found.setdefault(name, sheet) and b"<svg/>")
    return found


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.thorough) for name in OTHERS)]
)
def test_a_recorded_study_is_shown_as_it_was(name, sheets):
    loaded = ebc_lab.load(EVIDENCE / f"{name}.zip")
    root = loaded.root
    if name == "rate_fit":  # as if these very decisions were drawn already: they are drawn again
        sealed = {stage: decision["inputs_sha256"] for stage, decision in loaded.decisions.items()}
        StudyFiles(root).plotted_file.write_text(digest(sealed))
    summaries = {path: path.read_bytes() for path in root.glob("summary_*.csv")}
    report(Study(root))
    assert {path: path.read_bytes() for path in root.glob("summary_*.csv")} == summaries
    papers = [
        f"==== {path.name}\n{path.read_text()}"
        for end in ("md", "tex", "pdf")
        for path in sorted(root.glob(f"*.{end}"))
    ]
    text = "\n".join([page_text((root / "report.html").read_text()), *papers, sheets_text(sheets)])
    assert_as_recorded(name, text.replace(str(root), "STUDY"))


def test_a_page_of_a_study_under_way_says_what_is_decided_and_what_is_open():
    root = (loaded := ebc_lab.load(EVIDENCE / "default.zip")).root
    path = root / "auto_decisions.json"
    decisions = json.loads(path.read_text())
    del decisions["finals"]
    path.write_text(json.dumps(decisions))
    assert loaded.state == "interrupted"
    with recorded_environment(loaded.header["environment"]):  # another torch would have to say so
        page = LivePage(Study(root)).now()[0].decode()
    text = page_text(page).partition("## Provenance")[0]
    assert_as_recorded("under_way", text.replace(str(root), "STUDY").replace(str(root.parent), "OUTPUT"))
