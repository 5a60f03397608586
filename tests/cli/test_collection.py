"""`ebc-lab list` and `ebc-lab board`, as one reads them on a terminal and in JSON."""

import json
import re

import pytest
from typer.testing import CliRunner

from ebc_lab.cli.commands import app
from ebc_lab.results import load
from ebc_lab.study.store.bundle import export


@pytest.fixture
def folder(finished, tmp_path):
    export(finished[1].study, tmp_path / "done.zip")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "study.json").write_text("{")
    return tmp_path


def run(*words, columns=80):
    return CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": str(columns)})


def test_a_command_in_a_note_is_not_broken_by_a_narrow_terminal(tmp_path):
    file = tmp_path / "a bundle of somebody.zip"
    file.write_text("no zip")
    assert f"`ebc-lab verify '{file}'` lists it all." in run("board", file, columns=60).stdout


@pytest.mark.thorough
def test_list_fits_a_terminal_of_80_columns(folder):
    done = run("list", folder)
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    assert "…" not in done.output
    for shown in ("done.zip", "finished", "broken", "damaged", "smoke"):
        assert shown in done.output
    found = json.loads(run("list", folder, "--json").output)
    assert {one["name"]: one["state"] for one in found} == {"done": "finished", "broken": "damaged"}


def test_list_says_when_there_is_nothing(tmp_path):
    assert "no study in" in run("list", tmp_path).output
    assert "give one that holds studies" in str(run("list", tmp_path / "none").exception)


def test_board_fits_a_terminal_of_80_columns(folder):
    done = run("board", folder)
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    assert "broken is left out" in done.output
    assert re.search(r"\d\.\d{3} ±0\.\d{3} ", done.output)
    found = json.loads(run("board", folder, "--json").output)
    assert [row["rank"] for row in found["arms"]] == list(range(1, len(found["arms"]) + 1))
    assert set(found) == {"groups", "arms", "notes"}


def test_what_lies_in_the_working_folder_is_named(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for command in ("list", "status", "board"):
        done = run(command)
        said = f"{done.output}{done.exception or ''}"
        assert "there is no study in outputs/ebc_ablation, but this folder has broken, done.zip" in said


@pytest.mark.thorough
def test_columns_explains_every_column_of_a_study_s_files_and_of_its_tables(finished):
    explained = json.loads(run("columns", "--json").output)
    study = finished[1].study
    for path in [*study.root.glob("*.csv"), *study.runs.glob("*/*.csv")]:
        shown = json.loads(run("columns", path.name, "--json").output)
        [table] = shown
        known = {row["column"] for row in shown[table]}
        header = path.read_text().partition("\n")[0].split(",")
        assert {c for c in header if not c.startswith(("s_", "beta_", "kl_c"))} <= known, path.name
    loaded = load(study.root)
    for name, table in (("runs()", loaded.runs()), ("arms()", loaded.arms()), ("verdict", loaded.verdict)):
        assert [row["column"] for row in explained[name]] == list(table)
    assert "no table: choose among summary" in str(run("columns", "nothing").exception)
