"""What each command prints of recorded studies and of given facts, in full: whoever changes a word, a
figure or their order sees it in a diff."""

import datetime
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.called import called
from support.golden import assert_golden
from support.recorded import EVIDENCE
from support.runs_of_others import row_a_run

from ebc_lab.cli import collection, options, screen
from ebc_lab.config.identity import recorded_environment
from ebc_lab.records.json_files import read_json, write_checksummed
from ebc_lab.study.autopilot import Outcome
from ebc_lab.study.mirror.upload import mirroring
from ebc_lab.study.store.bundle import unpack
from ebc_lab.study.store.study import recorded_config

GOLDEN = Path(__file__).with_name("golden")
USED = ["as_run", "controls", "default", "double_adam", "double_muon", "drift", "finetune"]
WRITTEN = 1_750_000_000  # seconds after 1970: when all of them were, in these tests
OF_ONE = {
    "status_as_run": "status as_run.zip",
    "status_default": "status default.zip",
    "verify_bundle": "verify as_run.zip",
    "why_as_run": "why as_run.zip",
    "why_controls": "why controls.zip",
    "why_default": "why default.zip",
    "why_drift": "why drift.zip",
    "why_finetune": "why finetune.zip",
    "why_double_adam": "why double_adam.zip",
    "why_replay": "why controls.zip --replay",
    "why_stage": "why default.zip calibrate",
}
OF_SEVERAL = {
    "board": "board as_run.zip controls.zip",
    "columns": "columns",
    "columns_evals": "columns evals.csv",
    "data": "data data=path data.file=words.txt",
    "diff_doubles": "diff double_adam.zip double_muon.zip",
    "diff_same": "diff as_run.zip as_run.zip",
    "judge": "judge runs.csv --no-page",
    "list": "list .",
    "plan": "plan scale=smoke data=path data.file=words.txt device=cpu launcher.slots=2",
    "watch_several": "watch as_run.zip controls.zip",
}


@pytest.fixture(autouse=True)
def usual_width(monkeypatch):
    for name in ("COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_text):
    """A folder with recorded studies, a text, and a table of somebody's runs. Tests must not change it."""
    made = tmp_path_factory.mktemp("golden")
    for name, age in zip(USED, (0, 59, 60, 4000, 86_399, 90_000, 8_000_000), strict=True):
        shutil.copy(EVIDENCE / f"{name}.zip", made)
        os.utime(made / f"{name}.zip", (WRITTEN - age, WRITTEN - age))
    (made / "words.txt").write_text(small_text)
    row_a_run().to_csv(made / "runs.csv", index=False)
    return made


class ThatDay(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(WRITTEN, tz)


@pytest.mark.parametrize("name", OF_ONE)
def test_a_command_prints_what_it_printed_of_a_recorded_study(name, folder):
    assert_golden(GOLDEN / f"{name}.txt", said(called(*OF_ONE[name].split(), cwd=folder)))


@pytest.mark.parametrize("name", OF_SEVERAL)
def test_a_command_prints_what_it_printed_of_a_folder(name, folder, monkeypatch):
    monkeypatch.setattr(collection, "datetime", ThatDay)
    wide = {"COLUMNS": "999"} if name == "data" else {}  # it names the folder, which may be long
    done = called(*OF_SEVERAL[name].split(), cwd=folder, **wide)
    assert_golden(GOLDEN / f"{name}.txt", said(done), (re.escape(str(folder)), "FOLDER"))


def said(done):
    return f"{done.stdout}{done.stderr}exit code {done.returncode}\n"


# -- a study that something has happened to ------------------------------------------------------------------


@pytest.fixture
def unpacked(tmp_path):
    """A recorded study of 15 runs as a folder of its own, outputs/as_run."""
    return unpack(EVIDENCE / "as_run.zip", tmp_path / "outputs/as_run")


def one_failed(study):
    result = study.run_files(sorted(study.run_ids())[0]).result
    write_checksummed(result, {**read_json(result), "outcome": "failed", "cause": "RuntimeError: no room"})


def one_gone(study):
    study.run_files(sorted(study.run_ids())[0]).result.unlink()


def undecided(study):
    decisions = read_json(study.decisions_file)
    study.decisions_file.write_text(json.dumps({"lr_sweep": decisions["lr_sweep"]}))


def mirrored(study):
    config = recorded_config(study.header())
    config.study.mirror = f"file://{study.root.parents[1]}/mirror"
    with mirroring(config, study, lambda text: None):
        pass
    shutil.rmtree(study.root)


def damaged_there(study):
    mirrored(study)
    files = sorted((study.root.parents[1] / "mirror/as_run/files").rglob("*.csv*"))
    files[0].write_text("cut")


def as_it_is(study):
    pass


HERE = "--output-dir outputs"
STATES = {
    "cancel_finished": (as_it_is, f"cancel as_run {HERE}"),
    "cancel_interrupted": (undecided, f"cancel as_run {HERE}"),
    "status_failed": (one_failed, f"status as_run {HERE}"),
    "status_interrupted": (undecided, f"status as_run {HERE}"),
    "status_stale": (one_gone, f"status as_run {HERE}"),
    "verify_changed": (one_gone, f"verify as_run {HERE}"),
    "worker_finished": (as_it_is, f"worker as_run {HERE}"),
}
WRITING = {
    "export": (as_it_is, f"export as_run {HERE} --brief"),
    "new": (as_it_is, "new cautious"),
    "new_schema": (as_it_is, "new --schema"),
    "pull": (mirrored, "pull file://FOLDER/mirror outputs"),
    "pull_damaged": (damaged_there, "pull file://FOLDER/mirror outputs"),
    "pull_nothing": (as_it_is, "pull file://FOLDER/mirror outputs --if-there"),
    "report": (undecided, f"report as_run {HERE}"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_command_prints_what_it_printed_of_a_study_in_another_state(name, unpacked, tmp_path):
    assert_same_after(*STATES[name], name, unpacked, tmp_path)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", WRITING)
def test_a_command_that_writes_prints_what_it_printed(name, unpacked, tmp_path):
    assert_same_after(*WRITING[name], name, unpacked, tmp_path)


def assert_same_after(change, words, name, study, folder):
    with recorded_environment(study.header()["environment"]):  # this version might call the runs otherwise
        change(study)
        done = called(*words.replace("FOLDER", str(folder)).split(), cwd=folder)
    different = (re.escape(str(folder)), "FOLDER"), (r"[0-9.]+ kB; (.*\nsha256: ).*", r"… kB; \1…")
    assert_golden(GOLDEN / f"{name}.txt", said(done), *different)


# -- what is shown of given facts ----------------------------------------------------------------------------


@pytest.fixture
def shown(capsys):
    """What a function prints on a console of 100 characters."""

    def show(draw, *arguments):
        console = options.console()
        draw(console, *arguments)
        return capsys.readouterr().out

    return show


RUNNING = {
    "state": "running",
    "corpus": {"title": "words.txt", "warning": "NOT Shakespeare"},
    "upgraded": "3 runs were trained by an earlier version",
    "holder": {"pid": 77, "host": "node1", "since": "2025-06-15T15:06:40"},
    "joined": [
        {"worker": "w1", "host": "node2", "run_ids": ["adam_none_baseline_s1-0123456789"]},
        {"worker": "w2", "host": "node3", "run_ids": []},
    ],
    "queue": {"RUNNING": 2, "PENDING": 11},
    "running": [
        {"arm": "baseline", "seed": 3, "progress": {"step": 40, "steps": 2000, "steps_per_s": 51.23}},
    ],
    "so_far": {"stage": "ablation", "line": "adam_none: 2 of 3 arms"},
    "eta_s": 4000.0,
    "slots": {"slots": 2, "seconds": 751.0, "idle": {"whole": 0.07, "lr_sweep": 0.09}},
}
LONG = "/a/folder" * 11  # wider than a console: what holds it is not broken, so that it can be copied
STALE = {
    "state": "stale",
    "eta_s": 40.0,
    "continue": "ebc-lab autopilot",
    "anew": False,
    "problems": [f"a.csv of {LONG} is damaged"],
}
FAILED = {"outcome": "oom", "cause": "out of memory", "runs": ["a", "b"], "log": f"{LONG}/log.txt"}


def facts_of_states(state):
    """Of a finished study's status: a running one's, an interrupted one's, one whose runs failed."""
    yield {**state, **RUNNING}
    yield {**state, **RUNNING, "holder": None, "state": "interrupted", "joined": []}
    stages = [
        {**state["stages"][0], "stale_because": "a run is missing", "would_train": count}
        for count in (None, 0, 3)
    ]
    yield {**state, **STALE, "stages": stages}
    failures = [{**FAILED, "command": "ebc-lab rerun x"}, {**FAILED, "outcome": "lost", "command": None}]
    yield {**state, **STALE, "state": "finished_with_failures", "anew": True, "failures": failures}


def test_a_status_shows_what_it_showed_of_each_state(folder, shown):
    state = json.loads(called("status", "as_run.zip", "--json", cwd=folder).stdout)
    texts = [shown(screen.status, state) for state in facts_of_states(state)]
    assert_golden(GOLDEN / "facts_status.txt", "\n".join(texts))


def endings():
    nothing = {"study": "mine", "driver": None, "jobs": 0, "runs": [], "continue": "ebc-lab autopilot"}
    state = {"state": "interrupted", "root": "a folder/mine", "failures": []}
    cancelled = {**state, "failures": [FAILED, {**FAILED, "outcome": "cancelled"}]}
    yield nothing, state
    yield {**nothing, "continue": None}, cancelled
    yield nothing, {**state, "state": "finished"}
    yield nothing, {**cancelled, "state": "finished_with_failures"}
    yield {**nothing, "driver": {"pid": 7}}, state
    yield {**nothing, "jobs": 1, "runs": ["a", "b"]}, state


def verdicts():
    sound = {
        "study": "mine",
        "files": 41,
        "under_way": False,
        "unrecorded": 0,
        "growing": 0,
        "bad": [],
        "ok": True,
    }
    yield {**sound, "under_way": True, "unrecorded": 3, "growing": 2}
    bad = [{"file": "a.csv", "what": "missing", "remedy": "ebc-lab report mine"}]
    yield {**sound, "bad": bad, "ok": False, "sha256": "0" * 64}


def bundles():
    yield {
        "bundle": f"{LONG}/it's.zip",
        "files": 41,
        "bytes": 1_234_567,
        "sha256": "1" * 64,
        "replaced": "2" * 64,
    }


def machines():
    hardware = {"host": "node1", "cpu": "a CPU", "cores": 4, "gpus": []}
    found = {
        "hardware": hardware,
        "versions": {"python": "3.13", "torch": "2.13"},
        "verity": "c",
        "output": {"path": "outputs", "writable": True, "free_gb": 3.1},
        "slurm": False,
        "problems": [],
    }
    yield {**found, "corpus": {"name": "path", "characters": 4327, "source": "words.txt", "sha256": "3" * 64}}
    rates = [(2, 2, "float32", 51.26), (1, 4, "float32", 100.0), (1, 4, "bfloat16", 120.04)]
    reasons = {
        "dtype": "bfloat16",
        "threads_per_run": 1,
        "why": {"dtype": "faster", "threads_per_run": "given"},
    }
    compiling = {"threads": 1, "dtype": "float32", "compile_s": 23.4, "eager_ms": 33.33, "compiled_ms": 30.06}
    speed = {
        "scale": "smoke",
        "device": "cpu",
        "cached": True,
        "rates": [dict(zip(("threads", "processes", "dtype", "steps_per_s"), r, strict=True)) for r in rates],
        "compile": [compiling],
        "study": reasons,
        "single_run": {**reasons, "why": {"dtype": "faster"}},
        "rules": {"dtype": "the faster one"},
    }
    worse = {
        "output": {**found["output"], "writable": False},
        "slurm": True,
        "problems": ["no room", "no text"],
    }
    yield {**found, "hardware": {**hardware, "gpus": ["H", "A"]}, "speed": speed, **worse}
    yield {**found, "speed": {**speed, "cached": False}}


def comparisons():
    arms = {
        "ours": {"test_loss": [2.0, 1.98765], "bits_per_char": [2.9, 2.86], "difference": -0.01235},
        "theirs": {"test_loss": [None, 2.5], "difference": None},
    }
    line = {"track": "adam_none", "name": "no_worse", "verdict": ["pass", None], "figure": ["+0.1", None]}
    yield {
        "studies": ["first", "second"],
        "answers": [["one is better"], ["none is", "or so"]],
        "corpus": [{"title": "words", "sha256": "4" * 64}, {"title": "other", "sha256": "5" * 64}],
        "same_corpus": False,
        "tuned": {"ours": ["lr 1", None]},
        "settings": {"seeds": [[0], [1]]},
        "resolved": {"dtype": ["float32", "bfloat16"]},
        "machine": {},
        "runs": {
            "counts": [
                {"training": 1, "measurements": 1, "unused": 0},
                {"training": 5, "measurements": 0, "unused": 2},
            ],
            "common": 4,
            "equal": 3,
            "weights": {"compared": 2, "equal": 1},
            "different": {"a_run-0123456789": {k: [0, 1] for k in "abcd"}},
        },
        "decisions": {"lr_sweep": {"adam_none": {"lr": [0.002, 0.00400000001], "sigma": [None, 1]}}},
        "verdict": [{**line, "flipped": True}, {**line, "verdict": ["fail", "fail"], "flipped": False}],
        "arms": arms,
    }


FORECAST = {"runs": 3, "steps": 1234, "tokens": 56789, "eta_s": 100.0, "done": 1, "copied": 2}


def forecasts():
    hours = {"gpu_hours": 0.25, "flop_hours": None}
    stage = {
        k: {**FORECAST, **hours, "runs": n, "eta_s": 50.0 * n}
        for k, n in (("min", 1), ("expected", 3), ("max", 9))
    }
    told = {
        "study": "mine",
        "scale": "smoke",
        "device": "cuda",
        "slots": 2,
        "text": None,
        "changed": list("abcde"),
        "beyond_sensible": "much too long",
        "begun": True,
        "stages": {"lr_sweep": stage, "total": stage},
        "eta_from": "12 runs",
        "launcher": "local",
        "gpu_hours_from": "at 40% of an H100",
    }
    yield told
    guessed = {
        k: {**s, "gpu_hours": None, "flop_hours": h}
        for (k, s), h in zip(stage.items(), (1.0, 2.5, 9e3), strict=True)
    }
    yield {**told, "eta_from": None, "launcher": "slurm", "begun": False, "stages": {"total": guessed}}
    little = {k: {**s, "gpu_hours": None, "flop_hours": 0.099, "copied": 0} for k, s in stage.items()}
    plain = {"changed": [], "beyond_sensible": "", "begun": False, "text": "words.txt", "eta_from": None}
    yield {**told, **plain, "stages": {"total": little}}


SCREENS = {
    "facts_compared": lambda show: [show(screen.compared, facts) for facts in comparisons()],
    "facts_cancelled": lambda show: [screen.cancelled(*facts) for facts in endings()],
    "facts_doctor": lambda show: [show(screen.doctor, facts) for facts in machines()],
    "facts_exported": lambda show: [show(screen.exported, facts) for facts in bundles()],
    "facts_plan": lambda show: [
        show(screen.plan, facts, ["scale=smoke", "seeds=[1]"]) for facts in forecasts()
    ],
    "facts_verified": lambda show: [show(screen.verified, facts) for facts in verdicts()],
}


@pytest.mark.parametrize("name", SCREENS)
def test_given_facts_are_shown_as_they_were(name, shown):
    assert_golden(GOLDEN / f"{name}.txt", "\n".join(SCREENS[name](shown)))


ACCEPTANCE = {"lines": [{"question": "median c in 0.5–0.7", "figure": "KL/δ* 0.93"}]}


@pytest.mark.parametrize("name", ["default", "controls"])
def test_a_study_ends_with_the_screen_that_it_ended_with(name, shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = unpack(EVIDENCE / f"{name}.zip", Path(name))
    decisions = study.decisions()

    def draw(console):
        view = screen.View(console)
        view.started = math.inf  # the time since then is a dash
        for stage, decision in decisions.items():
            view.decided(stage, decision)
        runs = {"training": 7, "measurements": 1, "unused": 2}
        done = Outcome(study, runs, ["a", "b"], [*decisions], [], decisions, "one thing", ACCEPTANCE)
        screen.outcome(console, done)
        screen.outcome(
            console, replace(done, failed=[], stages=[], warning=None, decisions={}, answer=["so so"])
        )

    assert_golden(GOLDEN / f"end_{name}.txt", shown(draw))
