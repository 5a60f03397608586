"""The commands as a user types them: what they print and exit with; a mistake writes nothing."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from support.called import CLI, SMALL_RUN, answered, refused
from support.called import called as call

from ebc_lab.records.json_files import read_json, write_checksummed
from ebc_lab.records.spec import RunSpec


@pytest.fixture(scope="module")
def study(finished):
    return finished[1].study


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["autopilot", "scal=smoke"], "did you mean scale"),
        (["stage", "final"], "the stages are lr_sweep"),
        (["stage", "finals", "scale=smoke", "data=pydoc"], "needs the decision of lr_sweep"),
        (["autopilot", "scale=smoke", "data=pydoc", "output_dir=taken"], "cannot be written"),
        (["autopilot", "scale=smoke", "data=pydoc", "study.name=../x"], "plain folder name"),
        (["train", "scale=smoke", "optimizer.lr=-1"], ">= 1e-12"),
        (["train", "scale=smoke", "output_dir=x"], "the folder of a run is hydra.run.dir=…"),
        (["train", "scale=smoke", "data=path", "data.file=nowhere.txt"], "does not exist"),
        (["train", "scale=smoke", "data=shakespeare"], "has sha256"),
        (["train", "scale=smoke", "data=pydoc", "hydra.run.dir=taken/x"], "cannot be written"),
        (
            ["train", "-m", "scale=smoke", "data=pydoc", "seed=1,2", "hydra.sweep.dir=taken"],
            "cannot be written",
        ),
        (["plan", "optimizer=adam,sgd"], "needs -m"),
        (
            ["plan", "scale=smoke", "data=path", "data.file=nowhere.txt"],
            "data.file=nowhere.txt does not exist",
        ),
        (
            ["plan", "scale=smoke", "data=bin", "data.files=no", "data.val_files=x"],
            "data.files=no does not exist",
        ),
        (["plan", "scale=smoke", "init=run", "init.run=no"], "init.run=no: there is no such run"),
        (["plan", "scale=smoke", "tokens=gpt2", "tokens.folder=no"], "tokens.folder=no is not a folder"),
        (["autopilot", "-m", "scale=smoke", "optimizer=glob(a*)", "seeds=range(-1,1)"], "seed"),
        (["status", "nothing"], "there is no study"),
        (["status", "optimizers"], "start it with `ebc-lab autopilot study=optimizers`"),
        (["autopilt"], "no such command 'autopilt' (did you mean autopilot?); the commands are "),
        (["plan", "--nonsense"], "no such option: --nonsense"),
        (["bench", "--record"], "type `ebc-lab bench --json` (--record: `> FILE` after it keeps the"),
        (["autopilot", "--nonsense"], "`ebc-lab autopilot --help` lists the options"),
        (["autopilot", "--max-runs", "many"], "invalid value for '--max-runs'"),
        (["plan", "study=memry"], "(did you mean memory?); study takes aggregator, "),
        (["autopilot", "--scale", "smoke"], "given without dashes: type `ebc-lab autopilot scale=smoke`"),
        (["plan", "--config-dir", "conf", "scale=smoke"], "launcher=mine for conf/launcher/mine.yaml"),
        (["status", "./nothing"], "there is no study at ./nothing"),
        *(
            (["board", f"missing{end}"], f"there is no file missing{end}: ")
            for end in (".zip", ".csv", ".py")
        ),
    ],
)
def test_bad_input_is_one_sentence_exit_2_and_nothing_written(arguments, words, tmp_path):
    (tmp_path / "taken").write_text("")
    (tmp_path / "tinyshakespeare.txt").write_text("not it")
    assert words in refused(*arguments, cwd=tmp_path, EBC_LAB_DATA=str(tmp_path))


def test_a_text_with_a_comma_in_its_name_is_quoted_and_a_plan_refuses_it_if_it_is_too_short(
    tmp_path,
):
    (tmp_path / "a,b.txt").write_text("a few words " * 20)
    told = refused("plan", "scale=smoke", "data=path", "data.file=a,b.txt", cwd=tmp_path)
    [file] = shlex.split(told.partition("is written in quotes, ")[2].strip(".\n"))  # as a shell reads it
    arm = "+ablation.arms.own.settings={data: {name: path, file: 'a,b.txt'}}"
    asked = [("plan", "data=path", file)]
    asked += [(command, "data=pydoc", "study=target_kl", arm) for command in ("plan", "autopilot")]
    said = [refused(*words, "scale=smoke", cwd=tmp_path) for words in asked]
    assert "a,b.txt is too short: its 12 test characters must hold two windows of 32" in said[0]
    assert said[1] == said[2] == said[0].replace("error: ", "error: ablation.arms.own: ")


def test_status_of_a_finished_study_is_read_only(study, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in study.root.rglob("*")}
    done = answered("status", str(study.root), cwd=tmp_path)
    assert "done finished" in done.stdout
    found = json.loads(call("status", str(study.root), "--json", cwd=tmp_path).stdout)
    assert found["state"] == "finished"
    assert [s["state"] for s in found["stages"]] == ["decided"] * 4
    assert found["failures"] == []
    assert {p: p.stat().st_mtime_ns for p in study.root.rglob("*")} == before


def test_a_failure_comes_with_a_command_that_does_it_again(own_copy, tmp_path):
    """The command that status prints, run as it is, trains the same run to the loss that it had."""
    _, study = own_copy
    chosen = study.decisions()["calibrate"]["tracks"]["adam_none"]["run_id"]
    trained = study.result(chosen)
    failed = {"outcome": "failed", "cause": "RuntimeError: x", "steps": 0}
    write_checksummed(study.run_files(chosen).result, failed)
    found = json.loads(call("status", str(study.root), "--json", cwd=tmp_path).stdout)
    [failure] = found["failures"]
    assert failure["cause"] == "RuntimeError: x"
    words = shlex.split(failure["command"])
    assert words[:2] == ["ebc-lab", "rerun"]
    done = call(*words[1:], "--output", "again", cwd=tmp_path)
    assert done.returncode == 1
    assert "\noutcome: failed recorded, completed now\n" in done.stdout
    assert read_json(tmp_path / "again/result.json")["val_loss"] == trained["val_loss"]


def test_why_shows_candidates_rule_margin_and_what_would_have_changed_it(study, tmp_path):
    done = answered("why", str(study.root), cwd=tmp_path, FORCE_COLOR="1")  # as in a notebook's cell
    assert "\x1b" not in done.stdout
    assert done.stdout.startswith("answer  ")
    assert "adam_none:" not in done.stdout
    for shown in (
        "rule:",
        "margin ",
        "σ",
        "smallest detectable",
        "→",
        "what would have changed it",
        "replicate",
        "control",
    ):
        assert shown in done.stdout
    found = json.loads(call("why", str(study.root), "--json", cwd=tmp_path).stdout)
    assert list(found) == ["lr_sweep", "calibrate", "lr_scale", "finals"]
    assert all(d["flips"] and d["rule"] for d in found.values())
    assert call("why", str(study.root), "nonsense", cwd=tmp_path).returncode == 2


def test_verify_says_as_recorded_or_names_the_file_and_what_to_do(own_copy, tmp_path):
    _, study = own_copy
    good = call("verify", str(study.root), cwd=tmp_path)
    assert (good.returncode, good.stderr) == (0, "")
    assert "as recorded" in good.stdout
    (study.root / "summary_final.csv").write_text("mine")
    bad = call("verify", str(study.root), cwd=tmp_path)
    assert bad.returncode == 4
    assert "summary_final.csv: changed since it was recorded" in bad.stdout
    assert "ebc-lab report done" in bad.stdout
    found = call("verify", str(study.root), "--json", cwd=tmp_path)
    assert found.returncode == 4
    assert [b["file"] for b in json.loads(found.stdout)["bad"]] == ["summary_final.csv"]
    (study.root / "manifest.json").unlink()
    none = call("verify", str(study.root), cwd=tmp_path)
    assert none.returncode == 2
    assert "has no manifest.json" in none.stderr


def test_why_replay_compares_and_its_exit_code_says_so(own_copy, tmp_path):
    _, study = own_copy
    good = answered("why", str(study.root), "--replay", cwd=tmp_path)
    assert good.stdout.splitlines() == [
        f"{s}: the same" for s in ("lr_sweep", "calibrate", "lr_scale", "finals")
    ]
    decisions = read_json(study.root / "auto_decisions.json")
    decisions["calibrate"]["tracks"]["adam_none"]["delta_star"] = 5.0
    (study.root / "auto_decisions.json").write_text(json.dumps(decisions))
    bad = call("why", str(study.root), "calibrate", "--replay", cwd=tmp_path)
    assert bad.returncode == 4
    assert "tracks.adam_none.delta_star: 5.0 → 0." in bad.stdout
    found = json.loads(call("why", str(study.root), "--replay", "--json", cwd=tmp_path).stdout)
    assert found["same"] is False
    refused = call("why", str(study.root), cwd=tmp_path)
    assert refused.returncode == 2
    assert "calibrate: its record in auto_decisions.json was edited" in refused.stderr


def test_a_name_that_is_nearly_a_study_s_is_followed_by_the_study_s(study, tmp_path):
    said = refused("status", f"{study.name}s", "--output-dir", str(study.root.parent), cwd=tmp_path)
    assert f"(did you mean {study.name}?)" in said


@pytest.mark.thorough
def test_diff_shows_two_studies_side_by_side(study, own_copy, tmp_path):
    done = answered("diff", str(study.root), str(own_copy[1].root), cwd=tmp_path)
    for shown in (
        "settings: the same",
        "with equal results",
        "natural_kl",
        "Mean test loss",
        "adam_none_baseline_x1",
        "+0.0000",
    ):
        assert shown in done.stdout
    narrow = call("diff", str(study.root), str(own_copy[1].root), cwd=tmp_path, COLUMNS="100").stdout
    verdict = narrow.partition("Verdict")[2]
    assert verdict.count("undecided") + verdict.count("fail") + verdict.count("pass") >= 2 * 7, narrow
    assert "x2_no_worse_than_baseline" in verdict
    found = json.loads(call("diff", str(study.root), str(own_copy[1].root), "--json", cwd=tmp_path).stdout)
    assert found["runs"]["common"] == found["runs"]["equal"]


def test_an_edited_result_is_named_by_every_command_that_reads_it(own_copy, tiny, tmp_path):
    _, study = own_copy
    won = study.decisions()["lr_sweep"]["tracks"]["adam_none"]["run_id"]
    path = study.run_dir(won) / "result.json"
    path.write_text(re.sub(r'"val_loss": [^,]*', '"val_loss": 0.5', path.read_text()))
    own = [*tiny, "launcher=inline", f"output_dir={tmp_path}", "study.name=done"]
    root = str(study.root)
    for command, code in (
        (["autopilot", *own], 2),
        (["report", root], 2),
        (["plan", *own], 2),
        (["diff", root, root], 2),
        (["status", root], 0),
        (["verify", root], 4),
        (["why", root], 0),
        (["why", root, "--replay"], 4),
    ):
        done = call(*command, cwd=tmp_path)
        assert done.returncode == code, (command, done.stdout, done.stderr)
        assert won in done.stdout + done.stderr, command
        assert "edited" in done.stdout + done.stderr or command[0] == "verify", command


def test_status_says_what_is_stale_why_and_what_would_be_trained(own_copy, tmp_path):
    _, study = own_copy
    gone = study.decisions()["calibrate"]["tracks"]["adam_none"]["run_id"]
    (study.run_dir(gone) / "result.json").unlink()
    done = answered("status", str(study.root), cwd=tmp_path)
    assert "done stale" in done.stdout
    assert re.search(
        rf"calibrate is stale: 1 of its \d+ runs is missing \({gone}\); 1 run\(s\) would be trained",
        done.stdout,
    )
    assert "finals is stale: it builds on lr_scale" in done.stdout
    found = json.loads(call("status", str(study.root), "--json", cwd=tmp_path).stdout)
    assert [s["would_train"] for s in found["stages"]] == [None, 1, None, None]


def test_plan_counts_every_stage_and_writes_nothing(tmp_path):
    done = call("plan", "scale=laptop", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert list(found["stages"]) == ["lr_sweep", "calibrate", "lr_scale", "finals", "total"]
    total = found["stages"]["total"]
    assert total["min"]["runs"] <= total["expected"]["runs"] <= total["max"]["runs"]
    assert total["expected"]["tokens"] == total["expected"]["steps"] * 16 * 64
    shown = call("plan", "scale=smoke", cwd=tmp_path).stdout
    assert "finals" in shown
    assert "other settings" not in shown  # no study of this name has begun
    assert list(tmp_path.iterdir()) == []


def test_data_describes_the_corpus(text_file, tmp_path):
    found = json.loads(call("data", "data=path", f"data.file={text_file}", "--json", cwd=tmp_path).stdout)
    assert found["source"] == str(text_file.resolve())
    assert len(found["sha256"]) == 64
    assert "train" in call("data", "data=pydoc", cwd=tmp_path).stdout


@pytest.mark.thorough
def test_doctor_measures_and_plan_then_knows_the_time(tiny, tmp_path):
    done = answered("doctor", *tiny, "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert found["hardware"]["cores"] >= 1
    assert found["corpus"]["characters"] > 1000
    speed = found["speed"]
    assert set(speed["steps_per_s"]) == {"float32", "bfloat16"}
    cores = found["hardware"]["cores"]
    assert {(r["threads"], r["processes"]) for r in speed["rates"]} == {(1, 1), (1, cores)}
    assert all(r["steps_per_s"] > 0 for r in speed["rates"])
    assert speed["study"]["why"]["dtype"] == "already set"
    assert set(speed["rules"]) == {"dtype", "threads_per_run", "compile", "optimizers"}
    assert found["problems"] == []
    assert re.search(r"^measuring the speed of \d+ settings at this shape: some 15 s …$", done.stderr, re.M)
    assert not speed["cached"]
    again = call("doctor", *tiny, cwd=tmp_path)
    assert "measured here before, from the cache" in " ".join(again.stdout.split())
    assert "measuring" not in again.stderr
    planned = json.loads(call("plan", *tiny, "--json", cwd=tmp_path).stdout)
    assert planned["stages"]["total"]["expected"]["eta_s"] > 0


def test_relative_paths_mean_the_folder_of_the_command_also_where_hydra_would_leave_it(text_file, tmp_path):
    shutil.copy(text_file, tmp_path / "book.txt")
    (tmp_path / "mine.py").write_text("from torch.optim import SGD as plain\n")
    run = [
        *SMALL_RUN,
        "data=path",
        "data.file=book.txt",
        "steps=2",
        "hydra.job.chdir=true",
        "stabilizer=none",
    ]
    own = ["optimizer=custom", "optimizer.target=./mine.py:plain", "init.keep=true", "hydra.run.dir=first"]
    done = answered("train", *run, *own, cwd=tmp_path)
    assert "note: hydra.job.chdir=true changes nothing" in done.stdout
    start = ["init=run", "init.run=first", "init.text=path", "init.file=book.txt"]
    again = [*start, "seed=1,2", "hydra.sweep.dir=many"]
    answered("train", "-m", *run, *own[:2], *again, cwd=tmp_path)
    spec = read_json(tmp_path / "many/1/spec.json")
    assert spec["config"]["data"]["file"] == read_json(tmp_path / "first/spec.json")["config"]["data"]["file"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.txt", "first", "many", "mine.py"]


def test_plan_status_diff_and_autopilot_count_the_runs_of_a_study_alike(own_copy, finished, tiny, tmp_path):
    """Also with a run that a worker began ahead and no decision uses, which is not one of them."""
    _, study = own_copy
    used = study.decisions()["calibrate"]["tracks"]["adam_none"]["run_id"]
    _, run = study.read_spec(used)
    ahead = RunSpec("calibrate", "ebc", "begun ahead", 1.0, replace(run, seed=999))
    study.write_spec(ahead)
    named = {"run_id": ahead.run_id, "identity": ahead.identity_sha256}
    write_checksummed(study.run_files(ahead.run_id).result, study.result(used) | named)
    own = [*tiny, "launcher=inline", f"output_dir={tmp_path}", "study.name=done"]
    done = answered("plan", *own, "--json", cwd=tmp_path)
    planned = json.loads(done.stdout)["stages"]
    runs = planned["total"]["expected"]["runs"]
    assert planned["total"]["expected"]["done"] == runs
    other = call("plan", *own, "calibrate.steps=30", cwd=tmp_path).stdout
    assert "begun with other settings (calibrate.steps: 25 → 30" in other
    shown = call("status", str(study.root), cwd=tmp_path).stdout
    words = f"{runs} training runs, 1 measurement of time"
    assert f"{words}, 1 run that no decision uses" in shown
    found = json.loads(call("status", str(study.root), "--json", cwd=tmp_path).stdout)
    assert found["runs"] == {"training": runs, "measurements": 1, "unused": 1}
    assert sum(s["runs"] for s in found["stages"]) == runs
    assert {s["stage"]: s["runs"] for s in found["stages"]} == {
        stage: planned[stage]["expected"]["runs"] for stage in planned if stage != "total"
    }
    assert finished[1].runs == {"training": runs, "measurements": 1, "unused": 0}
    both = str(finished[1].study.root), str(study.root)
    beside = json.loads(call("diff", *both, "--json", cwd=tmp_path).stdout)
    assert [counts["training"] for counts in beside["runs"]["counts"]] == [runs, runs]
    assert beside["runs"]["common"] == runs
    assert words in call("diff", str(study.root), str(study.root), cwd=tmp_path).stdout


@pytest.mark.thorough
@pytest.mark.parametrize("command", [["why"], ["status"], ["diff"]])
def test_a_terminal_without_unicode_gets_the_answer_nevertheless(study, command, tmp_path):
    """What it cannot show is a question mark; no command ends in a UnicodeEncodeError."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    env |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    words = [*command, *[str(study.root)] * (2 if command == ["diff"] else 1)]
    done = subprocess.run([*CLI, *words], capture_output=True, cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"lr_sweep" in done.stdout


@pytest.mark.thorough
def test_a_terminal_that_says_it_has_no_size_gets_the_answer_nevertheless(study, tmp_path):
    for command in (["--help"], ["status", str(study.root)]):
        usual = answered(*command, cwd=tmp_path, COLUMNS="", LINES="").stdout
        sizeless = answered(*command, cwd=tmp_path, COLUMNS="0", LINES="0").stdout
        assert sizeless == usual != "", command


OTHER = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


@pytest.mark.thorough
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_study_of_another_user_is_read_and_not_changed(study):
    """Its lock cannot even be opened."""
    with tempfile.TemporaryDirectory(prefix="ebc-lab-") as shelf:
        home = Path(shelf) / "home"
        copy = shutil.copytree(study.root, Path(shelf) / "done")
        (copy / ".lock").touch()
        (copy / ".lock").chmod(0o600)
        home.mkdir()
        home.chmod(0o777)
        Path(shelf).chmod(0o755)
        places = {"XDG_STATE_HOME": str(home / "state"), "XDG_CACHE_HOME": str(home / "cache")}
        env = {**os.environ, "HOME": str(home), **places}
        for command, code in (
            (["status"], 0),
            (["verify"], 0),
            (["export", "--output", str(home / "mine.zip")], 0),
            (["report"], 2),
            (["cancel"], 2),
        ):
            words = [command[0], str(copy), *command[1:]]
            done = subprocess.run([*OTHER, *CLI, *words], capture_output=True, text=True, cwd=home, env=env)
            assert done.returncode == code, (command, done.stdout, done.stderr)
            assert ("belongs to another user and cannot be changed" in done.stderr) == (code == 2)
            assert len(done.stderr.splitlines()) == (code == 2)


@pytest.mark.parametrize(
    "command",
    ["autopilot", "autopilot -m", "stage lr_sweep", "plan", "train", "train -m", "bench", "doctor", "data"],
)
def test_no_command_lets_a_setting_read_the_environment(command, tmp_path):
    words = [*command.split(), "scale=smoke", "ablation.question=${oc.env:A_SECRET}"]
    said = refused(*words, cwd=tmp_path, A_SECRET="hush")
    assert "ablation.question" in said
    assert "hush" not in said


def test_a_plan_without_times_says_which_command_measures_them(tmp_path):
    done = call("plan", "scale=smoke", "seeds=[7,8]", cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path))
    assert "ebc-lab doctor scale=smoke 'seeds=[7,8]'" in done.stdout


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("command", "without"),
    [
        ("--help", "numpy omegaconf pydantic msgspec"),
        ("list {study.root.parent}", "numpy omegaconf yaml"),
        ("status {study.root}", "numpy omegaconf"),
        ("why {study.root}", "scipy.stats omegaconf"),
        ("plan scale=smoke data=pydoc", "numpy"),
    ],
)
def test_a_command_loads_only_what_it_needs(study, command, without, tmp_path):
    heavy = {*without.split(), "torch", "pandas", "matplotlib"}
    script = "import atexit, sys; from ebc_lab.cli import main; "
    script += "atexit.register(lambda: print(*sys.modules)); main()"
    words = command.format(study=study).split()
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "typer" in loaded
    assert not heavy & loaded
