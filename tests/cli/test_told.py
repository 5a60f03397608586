"""What commands tell programs with `--json`, of the text, of EBC as the default, and of a study's answer."""

import ast
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pooch
import pytest
from rich.console import Console
from support.called import SMALL_RUN, answered, called, refused

from ebc_lab.cli import screen
from ebc_lab.records.json_files import read_json
from ebc_lab.report.text import words
from ebc_lab.study.store.study import Study

BUNDLE = Path(__file__).parents[2] / "docs/evidence/cautious.zip"
RUN = [*SMALL_RUN, "steps=4", "dtype=float32", "threads_per_run=1", "compile=off"]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """EBC_LAB_DATA without the text, and no network."""

    def fails(*args, **how):
        raise ConnectionError

    monkeypatch.setattr(pooch, "retrieve", fails)
    (tmp_path / "data").mkdir()
    return {"EBC_LAB_DATA": str(tmp_path / "data"), "XDG_CACHE_HOME": str(tmp_path / "cache")}


@pytest.mark.thorough
@pytest.mark.parametrize("sweep", [False, True])
def test_train_says_on_the_screen_in_the_log_and_in_the_result_that_the_text_is_another(
    sweep, offline, tmp_path
):
    noted = ["stabilizer=none", "optimizer=axiom", "memory=hooks"]  # a note of another thing
    own = ["-m", "seed=1,2", "hydra.sweep.dir=out"] if sweep else [*noted, "hydra.run.dir=out"]
    done = answered("train", *RUN, *own, cwd=tmp_path, **offline)
    said = f"NOT Shakespeare, since EBC_LAB_DATA={tmp_path / 'data'} has no tinyshakespeare.txt"
    assert done.stdout.count(f"warning: {said}") == 1
    for folder in ("out/0", "out/1") if sweep else ("out",):
        assert f"warning: {said}" in (tmp_path / folder / "log.txt").read_text()
        assert "corpus pydoc, sha256 " in (tmp_path / folder / "log.txt").read_text()
        assert read_json(tmp_path / folder / "result.json")["corpus_warning"].startswith(said)


@pytest.mark.thorough
def test_train_without_a_stabilizer_says_first_that_ebc_is_on_and_how_it_is_not(text_file, tmp_path):
    text = ["data=path", f"data.file={text_file}"]
    default = called("train", *RUN, *text, "hydra.run.dir=a", cwd=tmp_path).stdout
    assert default.splitlines()[0] == "adam with EBC (the default); stabilizer=none turns EBC off"
    for own in ("stabilizer=none", "stabilizer=ebc"):
        asked = called("train", *RUN, *text, own, f"hydra.run.dir={own}", cwd=tmp_path).stdout
        assert "the default" not in asked


def test_train_tells_programs_its_result_and_everything_else_on_stderr(text_file, tmp_path):
    text = ["data=path", f"data.file={text_file}"]
    one = called("train", *RUN, *text, "--json", "hydra.run.dir=one", cwd=tmp_path)
    found = json.loads(one.stdout)
    assert (found["outcome"], found["exit_code"], found["folder"]) == ("completed", 0, "one")
    assert found["val_loss"] == read_json(tmp_path / "one/result.json")["val_loss"]
    assert "completed after 4 steps" in one.stderr
    sweep = ["--json", "-m", "seed=1,2", "hydra.sweep.dir=many"]
    many = json.loads(called("train", *RUN, *text, *sweep, cwd=tmp_path).stdout)
    assert [run["outcome"] for run in many["runs"]] == ["completed"] * 2
    assert [run["folder"] for run in many["runs"]] == ["many/0", "many/1"]
    assert refused("train", *RUN, "--json", "optimizer.lr=-1", cwd=tmp_path)
    other = called("train", *RUN, *text, "--json", "steps=5", "hydra.run.dir=one", cwd=tmp_path)
    assert other.returncode == json.loads(other.stdout)["exit_code"] == 2
    assert "one holds another run (steps: 4 → 5): choose another folder" in other.stderr


@pytest.mark.thorough
def test_autopilot_and_stage_tell_programs_what_came_of_a_study(own_copy, tiny, tmp_path, undrawn):
    own = [*tiny, "launcher=inline", f"output_dir={tmp_path}", "study.name=done", "--json"]
    done = answered("autopilot", *own, cwd=tmp_path)
    found = json.loads(done.stdout)
    assert (found["outcome"], found["exit_code"], found["study"]) == ("done", 0, "done")
    assert found["answer"] == [found["answer"][0]]
    assert found["answer"][0].startswith("Adam: ")
    assert found["page"] == str(tmp_path / "done/report.html")
    assert found["verdict"]["counts"]
    assert "answer  " in done.stderr
    one = json.loads(called("stage", "lr_sweep", *own, cwd=tmp_path).stdout)
    assert one["stages"] == ["lr_sweep"]
    assert one["verdict"] is None
    limited = called("autopilot", *own, "study.name=limited", "seeds=[7,8]", "--max-runs", "1", cwd=tmp_path)
    assert limited.returncode == json.loads(limited.stdout)["exit_code"] == 3
    assert json.loads(limited.stdout)["outcome"] == "stopped"


def test_the_last_screen_explains_its_terms_and_ends_in_the_answer_the_page_and_the_next_command(
    finished, capsys
):
    console = Console(width=400)
    for stage, decision in finished[1].study.decisions().items():
        screen.View(console).decided(stage, decision)
    screen.outcome(console, finished[1])
    *_, page, decide, partly, watch, load = lines = capsys.readouterr().out.splitlines()
    [answer] = [line for line in lines if line.startswith("answer  ")]
    assert "EBC" in answer
    text = " ".join(" ".join(lines).split())
    assert "adam_none:" not in text
    assert "lr_sweep decided: Adam: baseline (" in text
    assert "best without EBC): without EBC ×" in text
    for term in ("c", "δ*", "fair control", "baseline"):
        assert f"{term}: {words.TERMS[term]}" in text
    assert page == f"page    {finished[1].study.page_file}"
    assert decide.startswith("decide  ebc-lab autopilot from=")
    assert partly == "        (a part: no number of seeds that a study takes is known to decide the rest)"
    assert watch == f"next    ebc-lab why {finished[1].study.root}"
    assert load == f"        python: ebc_lab.load({str(finished[1].study.root)!r}).runs()"


@pytest.mark.parametrize("folder", ["with space", "it's", 'a "b" [v2] \\t', "line\nbreak", "é ☃"])
def test_lines_to_be_copied_name_the_folder_to_a_shell_and_to_python(finished, folder, tmp_path, capsys):
    root = tmp_path / folder / "done"
    shutil.copytree(finished[1].study.root, root)
    screen.outcome(Console(width=400), replace(finished[1], study=Study(root)))
    shell, python = capsys.readouterr().out.splitlines()[-2:]
    tree = ast.parse(python.split("python: ")[1])
    assert [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)] == [str(root)]
    if folder.isprintable():  # a line break in a file's name is shown, and no line to be copied has one
        assert shlex.split(shell)[1:] == ["ebc-lab", "why", str(root)]
        packed = tmp_path / folder / "a copy.zip"
        said = answered("export", str(root), "-o", str(packed), cwd=tmp_path).stdout
        assert shlex.split(said.split("`")[1]) == ["ebc-lab", "verify", str(packed)]


def test_an_unknown_study_is_answered_with_those_that_there_are(finished, tmp_path):
    folder = str(finished[1].study.root.parent)
    for command in (["status"], ["why"], ["report"], ["export"], ["verify"], ["watch"], ["cancel"]):
        said = refused(*command, "unheard", "--output-dir", folder, cwd=tmp_path)
        assert " (studies there: done): start it" in said


def test_a_file_that_is_no_study_is_answered_with_what_reads_it(finished, tmp_path):
    study, place = finished[1].study.root, str(finished[1].study.root.parent)
    (tmp_path / "runs of mine.csv").write_text("seed,loss\n")
    (tmp_path / "my_opt.py").touch()
    for file, answer in (
        ("runs of mine.csv", "`ebc-lab judge 'runs of mine.csv'` answers from them"),
        ("my_opt.py", "`ebc-lab autopilot study=optimizers mine=./my_opt.py` tries what it has"),
        (str(study / "summary_final.csv"), f"a file of the study done: give the study, {study}."),
    ):
        for command in ("board", "status", "why", "report", "export", "verify", "watch", "cancel"):
            place_of = () if command == "board" else ("--output-dir", place)
            assert answer in refused(command, file, *place_of, cwd=tmp_path)
    assert "`ebc-lab status my_opt.py` shows one" in refused("list", "my_opt.py", cwd=tmp_path)


def test_cancelling_what_has_ended_says_so(own_copy, tmp_path):
    said = answered("cancel", "done", "--output-dir", ".", cwd=tmp_path).stdout
    assert said.startswith("done has finished already, so there is nothing to cancel: `ebc-lab why ")
    assert "is a bundle, in which nothing runs" in refused("cancel", str(BUNDLE), cwd=tmp_path)


def test_every_command_has_short_help(tmp_path):
    for command in ([], ["autopilot"], ["status"], ["ebm"], ["ebm", "generate"], ["train"], ["ebm", "train"]):
        done = called(*command, "-h", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert "usage: " in done.stdout.lower()
