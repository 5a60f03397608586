"""A kind of result is one module: page, terminal, CSV file and papers show what it says, and nothing else."""

from __future__ import annotations

from typing import ClassVar

import pytest
from rich.console import Console
from support.invented import invent

from ebc_lab.cli import screen
from ebc_lab.config.compose import compose
from ebc_lab.report import kinds
from ebc_lab.report.conclude import report
from ebc_lab.report.kinds.kind import Answer, Evidence, Kind, Tile
from ebc_lab.report.text.table import Column, Table, filled

COLUMNS = (Column("Run", head=True), Column("Source"))


class Elsewhere(Kind):
    """Results of runs that were trained elsewhere: nothing here knows of them but this class."""

    shows = "arms"
    section = "Runs from elsewhere"
    file = "elsewhere.csv"
    columns: ClassVar[dict[str, tuple[str, str]]] = {"run": ("", "its name"), "loss": ("nats", "its loss")}

    def answers(self, found: Evidence) -> list[Answer]:
        tiles = [Tile("Loss elsewhere", "1.234", "nats", "of one run")]
        return [Answer("adam_none", "meets", "They agree.", ["One line."], tiles)]

    def tables(self, found: Evidence) -> list[Table]:
        return [Table("elsewhere", "What was read", COLUMNS, [filled(COLUMNS, ("far", "a file"))], "as read")]

    def rows(self, found: Evidence) -> list[dict[str, object]]:
        return [{"run": "far", "loss": 1.234}]

    def papers(self, found: Evidence) -> dict[str, list[Table]]:
        return {"elsewhere": self.tables(found)}


@pytest.mark.thorough
def test_what_a_kind_says_reaches_page_terminal_csv_and_papers(
    tmp_path, text_file, monkeypatch, undrawn, capsys
):
    asked = ["study=controls", "data=path", f"data.file={text_file}", "study.name=own"]
    study = invent(tmp_path, asked, drawn=False)
    monkeypatch.setitem(kinds.KINDS, "arms", Elsewhere())
    report(study)
    page = study.page_file.read_text()
    for said in ("They agree.", "One line.", "Loss elsewhere", "Runs from elsewhere", "What was read"):
        assert said in page
    assert 'class="answer meets"' in page
    assert (study.root / "elsewhere.csv").read_text() == "run,loss\nfar,1.234\n"
    assert "| far | a file |" in (study.root / "elsewhere.md").read_text()
    assert (study.root / "elsewhere.tex").exists()
    shown = Evidence(study.decisions()["ablation"], compose(["scale=smoke"]))
    Console(width=100).print(screen.evidence(shown))
    assert "a file" in capsys.readouterr().out
