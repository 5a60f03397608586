import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from support.called import CLI
from support.drivers import site
from support.runs import short_run
from support.s3 import free_port

from ebc_lab.config.compose import compose, configurations
from ebc_lab.config.dicts import to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import Config, TrackerConfig
from ebc_lab.records.json_files import read_json, write_json
from ebc_lab.records.streams import read_columns
from ebc_lab.study import trackers
from ebc_lab.study.autopilot import Listener, autopilot
from ebc_lab.study.store import manifest
from ebc_lab.study.store.study import Study
from ebc_lab.study.store.verify import verify
from ebc_lab.study.trackers import backends, process
from ebc_lab.training.outcome import run_and_record

TIMES = ("wall_s", "train_s", "tokens_per_s", "probe_pct", "curve", "streams", "checksum")


class Kept:
    """A tracker that keeps what it is shown, and fails as often as it is told to."""

    def __init__(self, failures: int = 0):
        self.rows: list[tuple[str, int, dict[str, float]]] = []
        self.ends: list[tuple[str, str]] = []
        self.failures = failures
        self.closed = False

    def log(self, run, rows):
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the server is down")
        self.rows += [(run.run_id, step, figures) for step, figures in rows]

    def end(self, run, outcome, figures):
        self.ends.append((run.run_id, outcome))

    def close(self):
        self.closed = True


def shown(study, tracker, name="kept"):
    process.Reader(study.root, name, "here").show(tracker)
    return tracker


def trained(study):
    return sorted(p.name for p in study.runs.iterdir() if not p.name.startswith("overhead"))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value), as TensorBoard reads an event folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def as_measured(path: Path, column: str) -> list[tuple[int, float]]:
    found = read_columns(path)
    return [(int(s), pytest.approx(v)) for s, v in zip(found["step"], found[column], strict=True) if v == v]


def one_stage(tiny, out: Path, said: list[str], *tracker: str) -> tuple[Config, Study]:
    asked = ["launcher=inline", f"output_dir={out}", "study.name=done", "study.stages=[lr_sweep]"]
    asked += ["lr_sweep.grids.adam=[1e-2,2e-2]", *tracker]
    config = compose([*tiny, *asked])
    return config, autopilot(config, Listener(say=said.append)).study


@pytest.fixture(scope="module")
def logged_out(tmp_path_factory):
    """Nobody is logged in to W&B, and nothing in the environment speaks to it or to Trackio."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("WANDB_", "TRACKIO_", "HF_"))]:
            patch.delenv(name)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("nobody")))
        yield


@pytest.fixture(scope="module")
def tracked(tiny, tmp_path_factory, own_places, logged_out):
    """A study followed by all trackers, and what was said."""
    said: list[str] = []
    names = "tracker.names=[tensorboard,mlflow,wandb,trackio]"
    return one_stage(tiny, tmp_path_factory.mktemp("tracked"), said, names, "tracker.wait_s=600")[1], said


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory, own_places):
    """The same without trackers: (configuration, study)."""
    return one_stage(tiny, tmp_path_factory.mktemp("plain"), [])


@pytest.fixture
def empty_study(tmp_path):
    """The folder of a study that has nothing to show."""
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.fixture
def own_copy(plain, tmp_path):
    """A copy for a test that changes it, or follows it."""
    config, study = plain
    shutil.copytree(study.root, tmp_path / "done")
    return replace(config, output_dir=str(tmp_path)), Study(tmp_path / "done")


@pytest.mark.thorough
def test_a_tracked_study_has_the_same_numbers_and_no_other_files(plain, tracked):
    plain = plain[1]
    study, said = tracked
    assert trained(study) == trained(plain)
    for run_id in trained(study):
        for name in ("steps.csv", "spec.json"):
            assert (study.run_dir(run_id) / name).read_bytes() == (plain.run_dir(run_id) / name).read_bytes()
        pair = [{k: v for k, v in s.result(run_id).items() if k not in TIMES} for s in (study, plain)]
        assert pair[0] == pair[1]
    assert verify(study)["ok"]
    assert not any("warning: tracker" in line for line in said)
    assert {p.name for p in study.root.iterdir()} - {".trackers"} == {p.name for p in plain.root.iterdir()}


def assert_shown(study: Study, run_id: str, history, told: dict) -> None:
    """`history(figure)` has each step that a run measured once; what was `told` of it besides is true."""
    spec, result = (read_json(study.run_dir(run_id) / name) for name in ("spec.json", "result.json"))
    streams = dict.fromkeys(process.STEP_FIGURES, "steps.csv") | {"val_loss": "evals.csv"}
    for figure, stream in streams.items():
        assert history(figure) == as_measured(study.run_dir(run_id) / stream, figure), (run_id, figure)
    true = {"arm": spec["arm"], "lr": spec["config"]["optimizer"]["lr"], "outcome": "completed"}
    assert told == {key: true[key] for key in told if key in true} | {
        "final/val_loss": pytest.approx(result["val_loss"])
    }


def test_tensorboard_reads_every_step_once_and_the_outcome(tracked):
    study, _ = tracked
    for run_id in trained(study):
        found = scalars(study.root / ".trackers/tensorboard/done" / run_id)
        told = {"final/val_loss": found["final/val_loss"][0][1]}
        assert_shown(study, run_id, lambda name, found=found: found.get(name, []), told)


def test_mlflow_reads_every_step_once_and_settings_and_the_outcome(tracked):
    from mlflow.tracking import MlflowClient

    study, _ = tracked
    client = MlflowClient(f"sqlite:///{study.root}/.trackers/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("done").experiment_id])
    assert sorted(r.info.run_name for r in runs) == trained(study)
    for run in runs:

        def history(name: str, run_id: str = run.info.run_id) -> list[tuple[int, float]]:
            return sorted((m.step, m.value) for m in client.get_metric_history(run_id, name))

        told = {"arm": run.data.params["arm"], "lr": float(run.data.params["lr"])}
        told |= {"outcome": run.data.tags["outcome"], "final/val_loss": run.data.metrics["final/val_loss"]}
        assert_shown(study, run.info.run_name, history, told)
        assert run.info.status == "FINISHED"
    assert not (Path.cwd() / "mlruns").exists()


def recorded_by_wandb(folder: Path, run_id: str) -> list[list[dict]]:
    """The records in W&B's files of a run, as its own command prints them, file by file."""
    found = []
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        if run_id.encode() in path.read_bytes():
            command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found.append([json.loads(line) for line in printed.splitlines()])
    return found


def history(records: list[dict], name: str) -> list[tuple[int, float]]:
    """(step, value) of a figure in the records of a W&B file."""
    items = [r["history"]["item"] for r in records if r["type"] == "history"]
    return [(item["step"], item[name]) for item in items if name in item]


def test_wandb_reads_every_step_once_and_settings_and_the_outcome(tracked):
    study, said = tracked
    assert [line.partition("wandb sync ")[0] for line in said if "tracker wandb" in line] == [
        "tracker wandb: offline; once you are logged in, this uploads the runs: "
    ]
    run_id = trained(study)[0]
    [records] = recorded_by_wandb(study.root / ".trackers", run_id)
    [run] = [r["run"] for r in records if r["type"] == "run"]
    assert (run["run_group"], run["project"]) == ("done", "ebc-lab")
    updates = dict(u for r in records if r["type"] == "summary" for u in r["summary"]["update"].items())
    told = {key: updates[key] for key in ("outcome", "final/val_loss")}
    told |= {"arm": run["config"]["update"]["arm"], "lr": run["config"]["update"]["optimizer"]["lr"]}
    assert_shown(study, run_id, lambda name: history(records, name), told)
    assert len(list((study.root / ".trackers/wandb").glob("offline-run-*"))) == len(trained(study))


def begun(study: Study):
    """Leave a study one run, without its result. -> study, folder, its rows, and what lets the run end."""
    run = study.run_dir(trained(study)[0])
    for other in set(study.runs.iterdir()) - {run}:
        (other / "spec.json").unlink()
    rows = (run / "steps.csv").read_text().splitlines(keepends=True)
    result = (run / "result.json").read_bytes()
    (run / "result.json").unlink()

    def end() -> None:
        (run / "steps.csv").write_text("".join(rows))
        (run / "result.json").write_bytes(result)

    return study, run, rows, end


def followed_alone(name: str, study: Study, folder: Path, **settings: str):
    """Follow a study by a tracker's process, whose input ends at once, as when its driver is gone."""
    config = {"folder": str(folder), "wait_s": 600.0, **settings}
    asked = json.dumps({"name": name, "root": str(study.root), "config": config})
    command = [sys.executable, "-m", "ebc_lab.study.trackers.process"]
    return subprocess.run(command, input=asked + "\n", capture_output=True, text=True)


def of_trackio(folder: Path, *words: str) -> dict:
    """What Trackio's own command prints."""
    command = [sys.executable, "-m", "trackio.cli", *words, "--json"]
    places = {**os.environ, "TRACKIO_DIR": str(folder / "trackio")}
    return json.loads(subprocess.run(command, env=places, capture_output=True, text=True, check=True).stdout)


def of_trackio_metric(folder: Path, run_id: str, name: str) -> list[tuple[int, float]]:
    asked = ("--project", "done", "--run", run_id, "--metric", name)
    with suppress(subprocess.CalledProcessError):  # there is no such figure
        return [(v["step"], v["value"]) for v in of_trackio(folder, "get", "metric", *asked)["values"]]
    return []


@pytest.mark.thorough
def test_trackio_reads_every_step_once_and_settings_and_the_outcome(tracked):
    study, said = tracked
    folder = study.root / ".trackers"
    [note] = [line for line in said if "tracker trackio" in line]
    assert note.endswith(f"TRACKIO_DIR={folder}/trackio trackio show --project done")
    assert sorted(of_trackio(folder, "list", "runs", "--project", "done")["runs"]) == trained(study)
    run_id = trained(study)[0]
    config = of_trackio(folder, "get", "run", "--project", "done", "--run", run_id)["config"]
    told = {"arm": config["arm"], "outcome": config["outcome"], "lr": config["optimizer"]["lr"]}
    [(_, told["final/val_loss"])] = of_trackio_metric(folder, run_id, "final/val_loss")
    assert_shown(study, run_id, lambda name: of_trackio_metric(folder, run_id, name), told)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_that_is_interrupted_loses_nothing_and_is_continued(own_copy, logged_out, name):
    study, run, whole, end = begun(own_copy[1])
    (run / "steps.csv").write_text("".join(whole[:9]))
    folder = study.root / "some where"
    settings = {"wandb_project": "mine", "wandb_mode": "offline"} if name == "wandb" else {}
    for _ in range(2):  # the second time the run is over
        done = followed_alone(name, study, folder, **settings)
        assert (done.returncode, done.stdout.count("note: ")) == (0, 1), done.stderr
        end()
    expected = as_measured(run / "steps.csv", "loss")
    if name == "trackio":
        assert of_trackio_metric(folder, run.name, "loss") == expected
        return
    assert f"wandb sync '{folder}/wandb'/offline-run-*" in done.stdout
    first, second = recorded_by_wandb(folder, run.name)
    assert history(first, "loss") + history(second, "loss") == expected
    assert len(history(first, "loss")) == 8
    ids = {r["run"]["run_id"] for records in (first, second) for r in records if r["type"] == "run"}
    assert len(ids) == 1  # so that `wandb sync` makes one run of both files


def test_nothing_is_shown_twice_and_a_tracker_added_later_shows_everything(own_copy):
    study = own_copy[1]
    tracker = shown(study, Kept())
    assert len(tracker.ends) == len(trained(study))
    assert shown(study, Kept()).rows == []
    other = Kept()
    process.Reader(study.root, "kept", "another place").show(other)
    assert other.rows == tracker.rows


def test_a_run_that_resumes_from_its_checkpoint_is_shown_without_repeats(own_copy):
    study, run, lines, end = begun(own_copy[1])
    tracker = Kept()
    for upto in (1, 9, 5, 12):  # at 5 it was cut back to its checkpoint
        (run / "steps.csv").write_text("".join(lines[: upto + 1]))
        shown(study, tracker)
    (run / "steps.csv").write_text("".join(lines[:14]) + lines[14][:9])  # a row that is being written
    shown(study, tracker)
    assert tracker.ends == []
    end()
    shown(study, tracker)
    steps = [step for _, step, figures in tracker.rows if "loss" in figures]
    assert steps == list(range(len(lines) - 1))
    assert tracker.ends == [(run.name, "completed")]


def test_a_failing_tracker_is_reported_and_loses_nothing(own_copy, monkeypatch):
    study = own_copy[1]
    monkeypatch.setattr(process, "POLL_S", 0.0)
    tracker = Kept(failures=3)
    over = threading.Event()
    said: list[str] = []

    reader = process.Reader(study.root, "kept", "here")

    def show_then_end(to):
        process.Reader.show(reader, to)
        over.set()

    monkeypatch.setattr(reader, "show", show_then_end)
    assert process.follow(reader, lambda: tracker, over, said.append)
    assert said == ["ConnectionError: the server is down"] * 3
    assert len(tracker.ends) == len(trained(study))
    assert tracker.rows == shown(study, Kept(), "compared").rows
    assert tracker.closed


def test_nothing_is_shown_during_a_measurement_of_time(own_copy):
    study = own_copy[1]
    reader = process.Reader(study.root, "kept", "here")
    assert not reader.measuring()
    overhead = study.run_dir("overhead_1")
    overhead.mkdir()
    (overhead / "progress.json").write_text("{}")
    assert reader.measuring()


def test_a_run_that_failed_is_so_in_mlflow_and_what_trackio_only_warns_of_is_a_failure():
    tracker = Mock()
    backends.MLflow.end(tracker, Mock(), "failed", {})
    assert tracker.client.set_terminated.call_args.args[1] == "FAILED"
    tracker.trackio.init.return_value.finish = lambda: warnings.warn("trackio failed", stacklevel=1)
    with pytest.raises(OSError, match="trackio failed"):
        backends.Trackio._log(tracker, Mock(settings={}, identity={}), [])


# -- down, broken, hanging -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_run(tiny):
    return short_run(tiny, "steps=30")


def train(run, folder: Path) -> bytes:
    """A run as `ebc-lab train` leaves it -> its steps.csv."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "spec.json", {"run_id": "x", "kind": "train", "identity": {}, "config": to_dict(run)})
    assert run_and_record(run, folder, "x")["outcome"] == "completed"
    return (folder / "steps.csv").read_bytes()


@pytest.fixture(scope="module")
def untracked(tmp_path_factory, small_run):
    return train(small_run, tmp_path_factory.mktemp("untracked") / "run")


# a sitecustomize.py for the tracker's process alone
HERE = "import os, signal, sys\nif 'ebc_lab.study.trackers.process' in sys.orig_argv:\n    "
GOES_ON = "the runs continue without it"
LATE = "not done 1 s (tracker.wait_s) after the last run"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "settings", "code", "words"),
    [
        ("mlflow", {"mlflow_uri": "http://127.0.0.1:{port}"}, "", GOES_ON),
        ("tensorboard", {"wait_s": 1.0}, HERE + "signal.pause()\n", LATE),
        ("tensorboard", {}, HERE + "os.kill(os.getpid(), 9)\n", "ended with exit code -9"),
        pytest.param("tensorboard", {"folder": "{file}"}, "", "FileExistsError", marks=pytest.mark.slow),
        pytest.param("wandb", {"wandb_mode": "online"}, "", "No API key configured", marks=pytest.mark.slow),
    ],
)
def test_a_tracker_that_is_down_never_harms_a_run(
    untracked, logged_out, small_run, tmp_path, monkeypatch, name, settings, code, words
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYTHONPATH", site(tmp_path, code))
    places = {"port": free_port(), "file": tmp_path / "file"}
    given = {k: v.format(**places) if isinstance(v, str) else v for k, v in settings.items()}
    said: list[str] = []
    config = TrackerConfig([name], **{"wait_s": 300.0, **given})
    with trackers.following(config, tmp_path / "run", said.append):
        assert train(small_run, tmp_path / "run") == untracked
    assert len(said) == 1, said
    assert said[0].startswith(f"warning: tracker {name}: ")
    assert words in said[0]


@pytest.mark.slow
def test_ebc_lab_train_continues_without_a_tracker_that_is_down(tmp_path, text_file):
    words = ["train", "scale=smoke", "data=path", f"data.file={text_file}", "steps=30", "device=cpu"]
    words += ["hydra.run.dir=run", "tracker.names=[tensorboard,mlflow]", "tracker.wait_s=300"]
    words += [f"tracker.mlflow_uri=http://127.0.0.1:{free_port()}"]
    done = subprocess.run([*CLI, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "completed after 30 steps" in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.startswith("warning: tracker mlflow")]) == 1
    run_id = read_json(tmp_path / "run/spec.json")["run_id"]
    assert scalars(tmp_path / "run/.trackers/tensorboard/run" / run_id)["loss"][29][0] == 29


def test_what_failed_is_told_in_its_first_line_without_a_password(empty_study, monkeypatch, capsys):
    """To the user and, whole, to the tracker's log."""
    error = ConnectionError("http://me:secret@host/x?a=b@c: " + "y" * 400 + "\nand more")
    over, said = threading.Event(), []
    over.set()
    monkeypatch.setattr(process.Reader, "show", Mock(side_effect=error))
    tracker = Mock(close=Mock(side_effect=ValueError))
    assert not process.follow(process.Reader(empty_study, "kept", "here"), lambda: tracker, over, said.append)
    whole = "ConnectionError: http://…@host/x?a=b@c: " + "y" * 400
    assert said == [whole[:300]]
    assert capsys.readouterr().err.endswith(f" {whole}\nand more\n")
    assert tracker.close.called


def test_a_tracker_that_cannot_be_started_is_warned_of_and_only_notes_and_the_first_warning_are_said(
    empty_study, monkeypatch
):
    said: list[str] = []
    config = TrackerConfig(["mlflow"], wait_s=1.0)
    monkeypatch.setattr(subprocess, "Popen", Mock(side_effect=OSError(12, "Cannot allocate memory")))
    with trackers.following(config, empty_study, said.append):
        pass
    gone = "warning: tracker mlflow: cannot be started (Cannot allocate memory); "
    assert said == [gone + GOES_ON]
    said.clear()
    lines = ["note: a: b\n", "of MLflow's own\n", "warning: one\n", "warning: two\n", "note: c\n"]
    begun = Mock(stdout=lines, wait=Mock(return_value=1))
    monkeypatch.setattr(subprocess, "Popen", Mock(return_value=begun))
    with trackers.following(config, empty_study, said.append):
        pass
    assert said == ["tracker mlflow: a: b", f"warning: tracker mlflow: one; {GOES_ON}", "tracker mlflow: c"]
    [asked] = [call.args[0] for call in begun.stdin.write.call_args_list]
    assert json.loads(asked)["config"]["folder"] == str(empty_study / ".trackers")


def test_a_stores_relative_address_means_the_folder_of_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    same = ["sqlite:////x/y.db", "file:/x", "http://host/x", "x", "", None]
    changed = {"sqlite:///y.db": f"sqlite:///{tmp_path}/y.db", "file:runs": f"file:{tmp_path}/runs"}
    assert {uri: trackers.absolute(uri) for uri in (*same, *changed)} == {
        **{uri: uri for uri in same},
        **changed,
    }


# -- what is refused, and what is kept out of a study --------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tracker.names=[aim]", "aim is unknown; it takes tensorboard, mlflow, wandb or trackio"),
        ("tracker.wandb_mode=offline", "go with tracker=wandb"),
        ("tracker=wandb tracker.wandb_mode=disabled", "disabled is unknown"),
        ("tracker=tensorbored", "did you mean tensorboard"),
        ("tracker.mlflow_uri=sqlite:///x", "goes with tracker=mlflow"),
        ("tracker=mlflow tracker.mlflow_uri=/some/folder", "is no URI"),
        ("tracker.wait_s=-1", "must be a finite number >= 0"),
    ],
)
def test_impossible_settings_are_refused(override, words):
    with pytest.raises(UserError, match=words):
        configurations(["scale=smoke", *override.split()])


@pytest.mark.parametrize(
    ("name", "modules"),
    [("mlflow", "mlflow, sqlalchemy, alembic"), ("wandb", "wandb"), ("trackio", "trackio")],
)
def test_a_missing_extra_is_refused_with_the_command_that_installs_it(monkeypatch, name, modules):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words = rf"tracker={name} needs {modules}: .*pip install 'ebc-lab\[{name}\]'"
    with pytest.raises(UserError, match=words):
        configurations(["scale=smoke", f"tracker={name}"])


@pytest.mark.thorough
def test_trackers_may_change_between_calls_and_their_address_is_not_recorded(own_copy):
    config, study = own_copy
    before = (study.root / "study.json").read_bytes()
    uri = "http://me:secret@127.0.0.1:9"
    tracker = TrackerConfig(names=["mlflow"], mlflow_uri=uri, wait_s=30.0)
    said: list[str] = []
    assert autopilot(replace(config, tracker=tracker), Listener(say=said.append)).trained == 0
    assert (study.root / "study.json").read_bytes() == before
    assert "tracker" not in study.header()["config"]
    told = [line for line in said if line.startswith("warning: tracker mlflow")]
    assert len(told) == 1
    assert "secret" not in told[0]
    assert not any(b"secret" in (study.root / name).read_bytes() for name in manifest.files(study.root))
