"""The field-sized study at 1/1000 of its size: shards with the real header, Muon and AdamW, a budget of
tokens and a target."""

import csv
import json
from dataclasses import replace

import pytest
from support.called import answered, refused
from support.shards import VOCABULARY, folder_of_shards, overrides_of

from ebc_lab.config.choices import changed
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import ProfiledWorkloadConfig
from ebc_lab.records.json_files import read_json
from ebc_lab.study.resolve import adopt
from ebc_lab.study.stages.runs import check_lengths
from ebc_lab.study.store.changes import from_recorded
from ebc_lab.workloads.starts import arms_pinned, pinned
from ebc_lab.workloads.text import checked_text

A_THOUSANDTH = [
    *("model.blocks=2", "model.width=32", "model.heads=2", "model.context=32", "batch_size=8"),
    *("dtype=float32", "device=cpu", "threads_per_run=1", "compile=off", "launcher=inline", "audit_every=10"),
    *("budget.probe_sequences=1", "audit_tokens=64", "eval_every=5", "eval_windows=32", "seeds=[0,1]"),
    "accumulate=2",
    *("lr_sweep.steps=10", "lr_sweep.long_steps=10", "ablation.train_tokens=7500", "target.loss=4.7"),
]
FEWER_ARMS = "~ablation.arms.double_x2"


def study_of(folder, *overrides: str) -> list[str]:
    return ["study=fineweb", *overrides_of(folder), *A_THOUSANDTH, *overrides]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of_shards(tmp_path_factory.mktemp("fineweb"))


@pytest.fixture(scope="module")
def finished(folder, own_places):
    """The study, trained once."""
    answered("autopilot", *study_of(folder, FEWER_ARMS), cwd=folder)
    return folder / "outputs" / "ebc_ablation" / "fineweb"


@pytest.mark.thorough
def test_the_study_tells_how_soon_and_how_surely_each_arm_reaches_the_target(finished, folder):
    rows = {row["arm"]: row for row in csv.DictReader((finished / "ablation.csv").open())}
    assert set(rows) == {"muon", "ebc", "ebc_x2", "radius_x2"}
    for row in rows.values():
        assert (float(row["target_loss"]), float(row["target_runs"])) == (4.7, 2)
        assert float(row["target_final_loss"]) == pytest.approx(float(row["val_loss"]))
        assert 0 <= float(row["target_p"]) <= 1
    assert rows["muon"]["steps_difference"] == ""  # the reference itself
    reached = [row for row in rows.values() if row["steps_to_target"]]
    assert reached
    for row in reached:
        assert float(row["target_reached"]) == 2
        assert float(row["tokens_to_target"]) == 256 * float(row["steps_to_target"])
        assert float(row["seconds_to_target"]) > 0
    page = (finished / "report.html").read_text()
    assert "Steps to the target" in page
    specs = [read_json(path) for path in finished.glob("runs/*/spec.json")]
    steps = {spec["config"]["steps"] for spec in specs}
    assert steps == {10, 30}  # 7,500 tokens are 29.3 steps of 256
    of_arm = next(s["config"]["optimizer"] for s in specs if s["config"]["steps"] == 30)
    assert (of_arm["update_size"], of_arm["rest_decay"], of_arm["head_scale"]) == ("shape", 0.001, 0.16)


@pytest.mark.thorough
def test_its_decisions_follow_from_its_files_and_another_target_needs_no_run(finished, folder):
    replayed = answered("why", str(finished), "--replay", cwd=folder)
    assert "differ" not in replayed.stdout
    other = study_of(folder, FEWER_ARMS, "target.loss=4.6", "study.name=other")
    again = answered("autopilot", *other, cwd=folder)
    assert "taken from fineweb" in again.stdout + again.stderr
    there = finished.with_name("other") / "ablation.csv"
    rows = {row["arm"]: row for row in csv.DictReader(there.open())}
    assert {row["target_loss"] for row in rows.values()} == {"4.6"}


def test_the_plan_of_the_full_size_says_gpu_hours_and_that_they_are_an_estimate(folder, tmp_path):
    told = answered("plan", "study=fineweb", "scale=paper", cwd=tmp_path)
    assert "an estimate and no measurement" in told.stdout
    assert told.stderr.startswith("warning: data.files=data/fineweb10B/fineweb_train_*.bin names no file")
    plan = json.loads(answered("plan", "study=fineweb", "scale=paper", "--json", cwd=tmp_path).stdout)
    config = compose(["study=fineweb", "scale=paper"])
    assert config.ablation.steps == 3250
    elements = 12 * 12 * 768**2 + 50304 * 768
    flops = plan["stages"]["ablation"]["expected"]["tokens"] * (6 * elements + 12 * 12 * 1024 * 768)
    hours = plan["stages"]["ablation"]["expected"]["flop_hours"]
    assert hours == pytest.approx(flops / (0.4 * 989.4e12) / 3600)
    assert plan["stages"]["ablation"]["expected"]["runs"] == 5 * 4
    assert plan["stages"]["total"]["expected"]["gpu_hours"] is None
    assert "GPU hours" not in answered("plan", *study_of(folder), cwd=tmp_path).stdout


@pytest.mark.thorough
def test_steps_of_the_command_line_stand_in_the_place_of_a_suites_tokens():
    assert compose(["study=fineweb", "ablation.steps=10"]).ablation.steps == 10
    both = ["study=fineweb", "ablation.steps=10", "ablation.train_tokens=null"]
    assert compose(both).ablation.steps == 10
    assert compose(["study=fineweb", "ablation.train_tokens=1048577"]).ablation.steps == 3
    with pytest.raises(UserError, match=r"ablation\.steps and ablation\.train_tokens both say"):
        compose([*both[:2], "ablation.train_tokens=1e5"])


ARMS = ("steps: 3", "batch_scale: 3", "settings: {batch_size: 24}")
LONGER = ["ablation.train_tokens=1e5", *(f"+ablation.arms.long={{about: longer, {arm}}}" for arm in ARMS)]


@pytest.mark.parametrize("setting", LONGER)
def test_what_is_longer_than_its_shards_is_refused_before_anything_is_written(folder, tmp_path, setting):
    said = refused("autopilot", *study_of(folder, setting), cwd=tmp_path)
    assert said.startswith("error: ablation.arms.long: " if "arms" in setting else "error: 391 steps")
    assert "steps are too many" in said


@pytest.mark.thorough
def test_a_workload_with_too_few_shards_of_its_own_is_refused_before_the_study_begins(folder):
    files = {"files": [f"{folder}/*_train_*.bin"], "val_files": [f"{folder}/*_val_*.bin"]}
    data = {"name": "bin", **files, "vocabulary": VOCABULARY, "val_tokens": 1024}
    own = ProfiledWorkloadConfig(about="theirs", settings={"data": data})

    def check(steps: int) -> None:
        small = ("scale=smoke", "batch_size=8", "model.context=32", "device=cpu", f"profiles.steps={steps}")
        config = compose(["study=calibrated", *small])
        workloads = {**config.profiles.workloads, "own": own}
        config = replace(config, profiles=replace(config.profiles, workloads=workloads))
        corpus, tokenizer = checked_text(config)
        check_lengths(pinned(config, corpus, tokenizer), corpus)

    whole = 20_000 // (8 * 32) // 2  # a method may take twice the steps
    check(whole - 1)
    with pytest.raises(UserError, match=r"^profiles\.workloads\.own: .* steps are too many"):
        check(whole + 1)


def test_an_arm_may_read_the_same_shards_in_another_order(folder):
    arm = "+ablation.arms.shuffled={about: drawn, settings: {data: {order: random}}}"
    config = compose(study_of(folder, "ablation.train_tokens=7500", arm))
    corpus, tokenizer = checked_text(config)
    config = arms_pinned(pinned(config, corpus, tokenizer))
    run = changed(run_part(config), config.ablation.arms["shuffled"].settings)
    assert (run.data.order, run.data.sha256, run.data.files) == ("random", corpus.sha256, config.data.files)


def test_a_studys_shards_may_move_and_nothing_else_of_them_may_change(finished, folder, tmp_path):
    known = read_json(finished / "study.json")
    for path in folder.glob("*.bin"):
        (tmp_path / path.name).symlink_to(path)
    moved = compose(study_of(tmp_path, FEWER_ARMS))
    assert from_recorded(moved, known) == []
    adopted = adopt(moved, known)
    assert adopted.data.files == moved.data.files
    assert checked_text(adopted)[0].sha256 == known["corpus"]["sha256"]
    for setting in ("data.order=random", "data.val_tokens=512", "data.vocabulary=200"):
        paths = [path for path, _, _ in from_recorded(compose(study_of(folder, FEWER_ARMS, setting)), known)]
        assert setting.partition("=")[0] in paths


@pytest.mark.thorough
def test_seeds_that_would_all_be_one_run_are_refused(folder, tmp_path):
    same = ["init=run", f"init.run={tmp_path}"]
    with pytest.raises(UserError, match="every seed is the same run: choose"):
        compose(study_of(folder, *same))
    assert compose(study_of(folder, *same, "data.order=random")).seeds == [0, 1]
    assert compose(study_of(folder, *same, "seeds=[0]")).seeds == [0]


def test_validation_shards_are_no_training_text(folder, tmp_path):
    said = refused("data", "data=bin", f"data.files={folder}/*.bin", *overrides_of(folder)[2:], cwd=tmp_path)
    assert "text_val_000000.bin, whose tokens are among data.val_files" in said
