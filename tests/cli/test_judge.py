"""`ebc-lab judge` as a user types it: what it prints, writes and refuses; and who points to it."""

import json
import subprocess
import sys

import pytest
from support.called import answered, called, refused
from support.runs_of_others import row_a_run, row_a_step, with_cell

from ebc_lab.judging.judgement import judge

RUNS = row_a_run()
CURVES = row_a_step()


@pytest.fixture
def folder(tmp_path):
    RUNS.to_csv(tmp_path / "runs.csv", index=False)
    CURVES.to_csv(tmp_path / "curves.csv", index=False)
    return tmp_path


def test_it_says_what_it_took_for_what_and_answers(folder):
    said = answered("judge", "runs.csv", "--no-page", cwd=folder).stdout
    lines = said.splitlines()
    assert lines[0].startswith("read: ")
    assert "runs.csv" in lines[0]
    for line in ("arm: column optimizer, by its name", "seed: column seed, by its name"):
        assert line in lines
    assert "reference: adam, by its name" in lines
    answer = judge(RUNS).answer
    assert " ".join(answer.split()) in " ".join(said.split())
    assert "paired by seed" in said
    assert sorted(path.name for path in folder.iterdir()) == ["curves.csv", "runs.csv"]


def test_where_memory_runs_out_it_is_one_sentence(folder, monkeypatch):
    def runs_out(*_, **__):  # not for real: a test must not take what others need
        raise MemoryError

    monkeypatch.setattr("ebc_lab.judging.judgement.judged", runs_out)
    assert "there is not enough memory for this" in refused("judge", "runs.csv", "--no-page", cwd=folder)


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ([], {}),
        (["--reference", "muon"], {"reference": "muon"}),
        (["--better", "higher"], {"better": "higher"}),
        (["--pairs", "--unpaired", "--margin", "0.1"], {"pairs": True, "paired": False, "margin": 0.1}),
        (["--at", "300", "--at", "muon=400"], {"at": {"": 300, "muon": 400}}),
        (["--outcome", "target", "--target", "3.4"], {"outcome": "target", "target": 3.4}),
        (["--outcome", "best", "--paired"], {"outcome": "best", "paired": True}),
        (["--sigma", "0.01", "--exchange", "0.0045/100"], {"sigma": "0.01", "exchange": 4.5e-5}),
        (["--chain", "muon, adam", "--distinct"], {"chain": ("muon", "adam"), "distinct": True}),
        (
            ["--arm=optimizer", "--seed=seed", "--step=step", "--loss=val_loss", "--lr=lr", "--setting=wd"],
            {
                "arm": "optimizer",
                "seed": "seed",
                "step": "step",
                "loss": "val_loss",
                "lr": "lr",
                "settings": "wd",
            },
        ),
        (
            ["--planned", "due", "--run", "id", "--choose", "other"],
            {"planned": "due", "run": "id", "choose": "other"},
        ),
    ],
)
def test_json_is_the_record_of_the_same_options(options, asked, folder):
    more = CURVES.assign(lr=0.1, wd=0.2, due=500, other=CURVES.val_loss)
    more["id"] = [f"{arm}{seed}" for arm, seed in zip(more.optimizer, more.seed, strict=True)]
    more.to_csv(folder / "more.csv", index=False)
    done = answered("judge", "more.csv", *options, "--json", cwd=folder)

    def strict(constant):
        raise ValueError(constant)

    found = json.loads(done.stdout, parse_constant=strict)
    assert found == judge(folder / "more.csv", **asked).record | {"sources": found["sources"]}
    assert not (folder / "judgement").exists()
    assert done.stderr == ""


def test_the_page_and_the_tables_are_written_and_written_again(folder):
    first = answered("judge", "runs.csv", "--no-page", cwd=folder).stdout
    done = answered("judge", "runs.csv", cwd=folder)
    assert done.stdout.startswith(first.rstrip("\n")[:200])
    assert "page judgement/" in done.stdout
    names = {path.name for path in (folder / "judgement").iterdir()}
    assert {"arms.csv", "differences.csv", "runs.csv"} <= names
    answered("judge", "curves.csv", cwd=folder)
    assert {path.name for path in (folder / "judgement").iterdir()} == names
    answered("judge", "runs.csv", "-o", "other", cwd=folder)
    assert {path.name for path in (folder / "other").iterdir()} == names
    with_json = answered("judge", "runs.csv", "--json", "-o", "third", cwd=folder)
    assert json.loads(with_json.stdout)["reference"] == "adam"
    assert "page third/" in with_json.stderr


def test_a_file_that_is_not_its_own_is_left_alone(folder):
    (folder / "judgement").mkdir()
    (folder / "judgement" / "runs.csv").write_text("mine")
    done = called("judge", "runs.csv", cwd=folder)
    assert done.returncode == 2
    assert "judgement/runs.csv" in done.stderr
    assert [path.name for path in (folder / "judgement").iterdir()] == ["runs.csv"]
    assert (folder / "judgement" / "runs.csv").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.csv"], "there is no file or folder nowhere.csv"),
        (["poem.bin"], "holds none of the formats that ebc-lab reads"),
        (["runs.csv", "--loss", "val_los"], "which --loss names (did you mean val_loss?)"),
        (["runs.csv", "--setting", "wd"], "there is no column wd, which --setting names"),
        (["runs.csv", "--reference", "sgd"], "there is no arm sgd: there are adam or muon"),
        (["runs.csv", "--outcome", "target"], "needs a --target"),
        (["runs.csv", "--outcome", "first"], "--outcome is last, target or best"),
        (["runs.csv", "--better", "big"], "--better is lower or higher, not big"),
        (["runs.csv", "--rule", "track2"], "--rule is track3"),
        (["runs.csv", "--sigma", "big"], "--sigma is pooled or a number above 0, not big"),
        (["runs.csv", "--exchange", "0.1/0"], "--exchange is a loss over the steps"),
        (["runs.csv", "--at", "100"], "--at needs curves"),
        (["runs.csv", "--target", "low"], "'--target'"),
        (["bad.csv"], "column val_loss is taken as the loss and holds crashed in row 3"),
        (["runs.csv", "-o", "poem.bin"], "poem.bin is a file"),
        (["runs.csv", "-o", "poem.bin/x"], "poem.bin"),
        ([], "missing argument 'paths'"),
        (["runs.csv", "--settings", "wd"], "--setting"),
    ],
)
def test_bad_input_is_one_sentence_exit_2_and_nothing_written(arguments, words, folder):
    with_cell(RUNS, "val_loss", 3, "crashed").to_csv(folder / "bad.csv", index=False)
    (folder / "poem.bin").write_bytes(b"\x00\x01\x02 no runs")
    if "-o" in arguments:  # found out after the answer
        done = called("judge", *arguments, cwd=folder)
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1
        return
    assert words in refused("judge", *arguments, cwd=folder)


def test_names_are_shown_as_they_are(folder):
    row_a_run(["[red]a[/red]", "adam"]).to_csv(folder / "odd.csv", index=False)
    assert "[red]a[/red] is better than adam" in answered(
        "judge", "odd.csv", "--no-page", cwd=folder
    ).stdout.replace("\n", " ")


def test_neither_torch_nor_matplotlib_is_imported_for_an_answer(folder):
    code = (
        "import sys; from ebc_lab.cli import main\n"
        "sys.argv = ['ebc-lab', 'judge', 'curves.csv', '--no-page', '--target', '3.4']\n"
        "try: main()\nexcept SystemExit as ended: assert not ended.code\n"
        "print([name for name in ('torch', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["board", "report", "why", "status", "verify", "watch", "export"])
@pytest.mark.parametrize("place", ["runs.csv", "./runs.csv"])
def test_commands_of_studies_point_a_file_of_runs_to_judge(command, place, folder):
    sentence = refused(command, place, cwd=folder)
    assert "runs.csv is a file and no study" in sentence
    assert "`ebc-lab judge runs.csv`" in sentence


def test_a_large_csv_with_a_rule_is_answered(folder):
    arms = {"first": 3.2790, "second": 3.2780}
    frame = row_a_step(arms, seeds=8, last=3000, noise=0.0004)
    final = frame.optimizer.map(arms)
    gap = frame.optimizer.map({"first": 0.0, "second": 0.05})
    frame["val_loss"] += final - 3 - gap
    frame.assign(planned=3000).to_csv(folder / "track.csv", index=False)
    said = answered(
        "judge", "track.csv", "--target", "3.28", "--rule", "track3", "--no-page", cwd=folder
    ).stdout
    assert "By track3’s rule" in said
    assert "second is better than first" in " ".join(said.split())
