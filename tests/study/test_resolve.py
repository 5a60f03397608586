"""What is chosen by measurement is chosen once a study, and a later change of mind retrains nothing."""

from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from ebc_lab.bench import speeds
from ebc_lab.bench.speeds import Choice
from ebc_lab.config import machine as machine_module
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import from_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import identity
from ebc_lab.config.schema import Config
from ebc_lab.records.json_files import write_json
from ebc_lab.report.conclude import concluding
from ebc_lab.study import resolve
from ebc_lab.study.autopilot import autopilot
from ebc_lab.study.inspect.forecast import planned
from ebc_lab.study.launch import submit
from ebc_lab.study.launch.pool import slots
from ebc_lab.study.store.study import Study
from ebc_lab.training import run as run_module

OPEN = ["dtype=auto", "threads_per_run=0", "compile=auto"]
ONE_THREAD = {(1, 1): 300.0, (2, 1): 200.0}
TWO_THREADS = {(1, 1): 100.0, (2, 1): 900.0}


@pytest.fixture
def config(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(machine_module, "cores", lambda: 2)
    return compose([*tiny, *OPEN, "launcher=inline", f"output_dir={tmp_path}", "study.name=x"])


def machine(monkeypatch, rates, bfloat16=1.0):
    """Have measurements find these steps/s by (threads, processes), and so many times them under bfloat16."""
    factor = {"float32": 1.0, "bfloat16": bfloat16}

    def measured(run, cases):
        return {case: rates[case[:2]] * factor[case[2]] for case in cases}

    monkeypatch.setattr(speeds, "measured_rates", measured)


def begun(config, monkeypatch):
    machine(monkeypatch, ONE_THREAD)
    said: list[str] = []
    outcome = autopilot(config, concluding(say=said.append), stages=["lr_sweep"])
    return outcome, said


def test_what_was_left_open_is_chosen_once_and_said_and_recorded(config, monkeypatch):
    outcome, said = begun(config, monkeypatch)
    header = outcome.study.header()
    chosen = {k: header["config"][k] for k in resolve.CHOSEN}
    assert chosen == {"dtype": "float32", "threads_per_run": 1, "compile": "off"}
    asked = {k: header["requested"][k] for k in resolve.CHOSEN}
    assert asked == {"dtype": "auto", "threads_per_run": 0, "compile": "auto"}
    assert set(header["chosen"]) == set(resolve.CHOSEN)
    for setting, value in chosen.items():
        assert f"{setting}={value}: {header['chosen'][setting]}" in said


def test_another_machine_later_retrains_nothing_and_keeps_every_name(config, monkeypatch):
    outcome, _ = begun(config, monkeypatch)
    named = identity(from_dict(Config, outcome.study.header()["config"]))
    before = {p: p.read_bytes() for p in outcome.study.root.rglob("*") if p.is_file()}
    machine(monkeypatch, TWO_THREADS, bfloat16=5.0)
    monkeypatch.setattr(machine_module, "cores", lambda: 64)
    monkeypatch.setattr(run_module, "Training", None)
    again = autopilot(config, concluding(), stages=["lr_sweep"])
    assert again.trained == 0
    assert identity(from_dict(Config, again.study.header()["config"])) == named
    assert {p: p.read_bytes() for p in outcome.study.root.rglob("*") if p.is_file()} == before
    assert planned(config)["stages"]["lr_sweep"]["expected"]["done"] > 0


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threads_per_run": 2}, "threads_per_run: 0 → 2"),
        ({"compile": "on"}, "compile: 'auto' → 'on'"),
        ({"dtype": "bfloat16"}, "dtype: 'auto' → 'bfloat16'"),
    ],
)
def test_a_value_given_to_a_study_that_chose_is_a_change(config, monkeypatch, change, words):
    outcome, _ = begun(config, monkeypatch)
    with pytest.raises(UserError, match=f"{words}.*--force.*lr_sweep: all 3 would be trained"):
        autopilot(replace(config, **change), concluding())
    # what it had chosen: a change of settings, but the runs are the same
    same = replace(config, threads_per_run=1)
    with pytest.raises(UserError, match=r"threads_per_run: 0 → 1.*--force.*lr_sweep: all \d+ kept"):
        autopilot(same, concluding())
    forced, _ = resolve.resolve_study(same, outcome.study, lambda text: None, force=True)
    assert forced.threads_per_run == 1
    assert set(outcome.study.header()["chosen"]) == set(resolve.CHOSEN)


def test_slurm_jobs_take_their_cores_and_only_precision_is_measured_on_a_node(config, monkeypatch, tmp_path):
    study, other = (Study(tmp_path / name) for name in ("jobs", "others"))
    for folder in (study.root, other.root):
        folder.mkdir()
    asked = []

    def job_that_chooses(config, folder, name, commands):
        asked.append((config.threads_per_run, config.compile))
        choice = Choice("bfloat16", *asked[-1], {"dtype": "measured there"}, (1, 1, "bfloat16", 3.5))
        write_json(commands[0].args[1], asdict(choice))
        return [SimpleNamespace(job_id="1", paths=SimpleNamespace(stdout="log"))]

    monkeypatch.setattr(submit, "submit_jobs", job_that_chooses)
    monkeypatch.setattr(speeds, "measured_rates", None)
    slurm = replace(config.launcher, name="slurm", slots=4, cpus_per_task=3)
    found, _ = resolve.resolve_study(replace(config, launcher=slurm), study, lambda text: None, force=False)
    assert (found.dtype, found.threads_per_run, found.compile) == ("bfloat16", 3, "off")
    assert asked == [(3, "off")]
    assert study.header()["chosen"]["dtype"] == "measured there"
    one = replace(config, dtype="float32", launcher=replace(slurm, cpus_per_task=0))
    found, _ = resolve.resolve_study(one, other, lambda text: None, force=False)
    assert (found.dtype, found.threads_per_run) == ("float32", 1)
    assert len(asked) == 1


def test_a_plan_made_before_anything_is_measured_takes_one_thread(config):
    local = replace(config, launcher=replace(config.launcher, name="local"))
    found = planned(local)
    assert (found["dtype"], found["threads_per_run"], found["eta_from"]) == ("auto", 0, None)
    assert found["slots"] == slots(local) == slots(replace(local, threads_per_run=1))
    rates = {(1, 2, "float32"): 10.0, (1, 2, "bfloat16"): 5.0, (2, 1, "float32"): 40.0}
    rates[2, 1, "bfloat16"] = 5.0
    for case, cache in speeds.rate_caches(local, list(rates)).items():
        cache.write(rates[case])
    found = planned(local)
    assert (found["dtype"], found["threads_per_run"]) == ("float32", 2)
    total = found["stages"]["total"]["expected"]
    assert total["eta_s"] == pytest.approx(total["steps"] / 40)  # of all runs together
