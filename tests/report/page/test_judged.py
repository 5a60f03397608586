"""judgement.html and the files beside it: what they hold, that they agree, and what they never replace."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest
from support.judged import judgement
from support.runs_of_others import tuned_runs
from support.seen import assert_as_recorded, page_text, sheets_text

from ebc_lab import __version__
from ebc_lab.config.errors import UserError
from ebc_lab.judging.judgement import judge
from ebc_lab.report.page.judged import write
from ebc_lab.report.pictures import render

HOSTILE = '<script>alert("1")</script> & $x_1$'
ARMS = {
    "muon": [3.2705, 3.272, 3.2735, 3.272],
    "adamw": [3.2785, 3.2815, 3.28, 3.28],
    "sgd": [3.284, 3.285, math.inf, 3.286],
}
FILES = ["judgement.html", "judgement.json", "arms.csv", "differences.csv", "runs.csv"]
FILES += ["judgement.md", "judgement.tex", "figure.pdf"]


def cautioned(**changes):
    caution = {
        "kind": "diverged",
        "sentence": "1 run of sgd diverged.",
        "runs": [f"sgd-{i}" for i in range(3)],
    }
    return judgement(ARMS, "adamw", cautions=[caution], **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("there") / "mine"
    assert [path.name for path in write(cautioned(), made)] == FILES
    return made


ASKED = {
    "judged_against": {"reference": "adamw", "target": 3.1, "rule": "track3", "sigma": "pooled"},
    "judged_pairs": {"pairs": True, "better": "higher"},
    "judged_to_target": {"outcome": "target", "target": 3.12},
    "judged_chain": {"chain": ("lion", "adamw", "muon"), "at": {"": 400}, "rule": "track3"},
}
ASKED["judged_against"] |= {"exchange": 1e-4, "margin": 0.005}


@pytest.mark.parametrize(
    "name", [k if k in list(ASKED)[:2] else pytest.param(k, marks=pytest.mark.thorough) for k in ASKED]
)
def test_page_papers_tables_and_pictures_are_as_they_were(name: str, tmp_path: Path, monkeypatch):
    sheets: dict[str, object] = {}
    monkeypatch.setattr(render, "svg", lambda sheet, name: sheets.setdefault(name, sheet) and b"<svg/>")
    monkeypatch.setattr(render, "pdf", lambda sheet: b"")
    first, *others = write(judge(tuned_runs(), **ASKED[name]), tmp_path / "out")
    texts = [f"==== {path.name}\n{path.read_text()}" for path in others if path.suffix in (".md", ".tex")]
    rows = [
        f"==== {path.name}\n" + "\n".join(path.read_text().splitlines()[:4])
        for path in others
        if path.suffix == ".csv"
    ]
    text = "\n".join([page_text(first.read_text()), *texts, *rows, sheets_text(sheets)])
    assert_as_recorded(name, text.replace(f"ebc-lab {__version__} from", "ebc-lab VERSION from"))


def test_the_page_begins_with_question_answer_and_cautions(folder: Path):
    page = (folder / "judgement.html").read_text().partition("<body>")[2]
    order = [
        page.index(text)
        for text in ("Is any arm better", "muon is better", "1 run of sgd", "How did the runs")
    ]
    assert order == sorted(order)
    assert "sgd-0, sgd-1" in page
    assert "−0.0080" in page
    assert "val_loss" in page
    assert "nats" not in page


def test_the_page_asks_for_nothing_and_lets_nothing_run_but_its_own(folder: Path):
    page = (folder / "judgement.html").read_text()
    assert "default-src 'none'" in page
    assert not re.findall(r"""(?:src|href)="(?!data:|#)""", page)
    assert page.count("<script>") == 1 == page.count("script-src")


def test_the_files_hold_the_figures_of_the_record(folder: Path):
    record = json.loads((folder / "judgement.json").read_text())
    arms = pd.read_csv(folder / "arms.csv").set_index("arm")
    assert arms["mean"].loc["muon"] == record["arms"][0]["mean"]
    assert math.isnan(arms["mean"].loc["sgd"])
    differences = pd.read_csv(folder / "differences.csv")
    assert differences["joint_low"].tolist()[0] == record["differences"][0]["joint_low"]
    runs = list(csv.DictReader((folder / "runs.csv").open()))
    assert len(runs) == 12
    assert runs[0]["lr"] == "0.1"
    assert runs[10]["outcome"] == ""
    assert "| `muon` | 3.2720 |" in (folder / "judgement.md").read_text()
    assert r"\texttt{muon} & 3.2720" in (folder / "judgement.tex").read_text()
    assert (folder / "figure.pdf").read_bytes().startswith(b"%PDF")


def test_equal_runs_give_equal_bytes_and_are_written_again(folder: Path):
    before = {name: (folder / name).read_bytes() for name in FILES}
    write(cautioned(), folder)
    assert {name: (folder / name).read_bytes() for name in FILES} == before
    write(cautioned(answer=["Nothing is known."]), folder)
    assert "Nothing is known." in (folder / "judgement.html").read_text()
    write(cautioned(), folder)
    assert {name: (folder / name).read_bytes() for name in FILES} == before


@pytest.mark.parametrize("name", ["arms.csv", "judgement.html", "judgement.json"])
def test_what_we_did_not_write_is_not_replaced(tmp_path: Path, name: str):
    (tmp_path / "other.txt").write_text("mine")
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} is there and is not as ebc-lab wrote it"):
        write(cautioned(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["other.txt", name])
    assert (tmp_path / name).read_text() == "mine"


def test_what_was_edited_since_is_not_replaced(tmp_path: Path):
    write(cautioned(), tmp_path)
    (tmp_path / "arms.csv").write_text("edited")
    with pytest.raises(UserError, match=r"arms\.csv is there"):
        write(cautioned(answer=["Else."]), tmp_path)
    assert "Else." not in (tmp_path / "judgement.html").read_text()


def test_a_file_in_place_of_the_folder_is_said(tmp_path: Path):
    (tmp_path / "page").write_text("")
    with pytest.raises(UserError, match="is a file: name a folder"):
        write(cautioned(), tmp_path / "page")


def test_names_of_others_stay_text(tmp_path: Path):
    arms = {HOSTILE: [1.0, 1.1, 1.2], "b": [2.0, 2.1, 2.2]}
    made = judgement(arms, "b", loss=HOSTILE, answer=[HOSTILE], sources=[HOSTILE])
    write(made, tmp_path / "x")
    page = (tmp_path / "x" / "judgement.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert f"`{HOSTILE}`" in (tmp_path / "x" / "judgement.md").read_text(), "as code, which is no markup"
    assert next(csv.DictReader((tmp_path / "x" / "arms.csv").open()))["arm"] == HOSTILE


def test_a_row_a_run_has_a_page_without_curves(tmp_path: Path):
    made = judgement(ARMS, "adamw", step="")
    made.data = type(made.data)(made.data.table, made.data.curves.iloc[:0], (), "val_loss", "lower", "")
    write(made, tmp_path)
    page = (tmp_path / "judgement.html").read_text()
    assert "How did the runs" in page
    assert "Curves and steps" not in page
