"""Extremes of settings are refused in one sentence that names the setting, or planned."""

import pytest

from ebc_lab.config.compose import compose, configurations
from ebc_lab.config.errors import UserError
from ebc_lab.study.inspect.forecast import planned

SMOKE = ["scale=smoke"]
SEARCH = "study.stages=[lr_sweep,calibrate,controller_search,lr_scale,finals]"
ENDLESS = "1" + "0" * 400


def refused(overrides, **how):
    with pytest.raises(UserError) as caught:
        compose([*SMOKE, *overrides], **how)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 400, said
    return said


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("finals.max_seeds=1000", ["finals.max_seeds", "<= 100", "1000"]),
        ("lr_sweep.replicates=1000000000", ["lr_sweep.replicates", "<= 100"]),
        (f"seeds=[{','.join(map(str, range(200, 800)))}]", ["seeds", "at most 100", "600"]),
        (f"seeds=[{','.join(map(str, range(200, 100_200)))}]", ["seeds", "characters"]),
        ("study.stages=[]", ["study.stages", "must not be empty"]),
        ("study.stages=[[lr_sweep]]", ["study.stages"]),
        ("study.band=[1,[2]]", ["study.band", "[2]"]),
        ("lr_sweep.grids.adam=[1e307,1e308]", ["lr_sweep.grids.adam", "1e+307"]),
        (f"finals.steps={ENDLESS}", ["finals.steps", "401 digits"]),
        (f"seeds=[{ENDLESS}]", ["seeds", "401 digits"]),
        (f"optimizer.eps={ENDLESS}", ["optimizer.eps", "401 digits"]),
        (f"finals.steps=1{'0' * 5000}", ["finals.steps", "characters"]),
        (f"study.stage_seed={2**64}", ["study.stage_seed", "<= 1000000000"]),
        (f"seeds={'[' * 500}{']' * 500}", ["seeds", "500 deep"]),
        (f"ablation.question={'{a:' * 500}1{'}' * 500}", ["ablation.question", "500 deep"]),
        ("threads_per_run=1000", ["threads_per_run", "<= 512"]),
        ("study.name=x.zip", ["study.name", ".zip", "bundle"]),
        (f"study.name={'x' * 3000}", ["study.name", "at most 1000"]),
        (f"study.name={'x' * 81}", ["study.name", "at most 80"]),
        ("study.name=a/b", ["study.name", "plain folder name"]),
        ("study.name='a\x07b'", ["study.name"]),
        ("study.name=-x", ["study.name", "plain folder name"]),
        ("study.name=''", ["study.name", "plain folder name"]),
        ("study.name='größe'", ["study.name", "plain folder name"]),
        ("study.name=größe", ["study.name", "in quotes"]),
        (f"output_dir={'x/' * 1000}", ["output_dir", "at most 1000 characters"]),
        (f"output_dir={'x' * 300}", ["output_dir", "255 bytes"]),
        ("output_dir='a\x1b[2Jb'", ["output_dir", "control character"]),
        (f"output_dir={'x' * 10_000}", ["output_dir", "characters"]),
        (f"ablation.question={'x' * 1_000_000}", ["ablation.question", "characters"]),
        (f"ablation.question={'x' * 3000}", ["ablation.question", "at most 1000 characters"]),
        ("ablation.question='a\x00b'", ["ablation.question", "control character"]),
        ("ablation.question='a\udcffb'", ["ablation.question", "UTF-8"]),
        ("model.width=1000000", ["model.width", "<= 16384"]),
        ("model={width: 16384, blocks: 256}", ["model"]),
        ("batch_size=1000000000", ["batch_size", "<= 65536"]),
        ("lr_sweep.warmup=1e300", ["lr_sweep.warmup"]),
        ("lr_schedule.warmup_steps=1000000000000", ["lr_schedule.warmup_steps"]),
        ("lr_sweep.skip_threshold=nan", ["lr_sweep.skip_threshold", "finite"]),
        ("lr_sweep.skip_threshold=inf", ["lr_sweep.skip_threshold", "finite"]),
        ("launcher.gpus_per_node=-1", ["launcher.gpus_per_node"]),
        ("seeds=[true]", ["seeds"]),
        ("seeds=[1.5]", ["seeds"]),
        ("finals.steps=${finals.steps}", ["Recursive"]),
        ("seeds=null", ["seeds"]),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_an_extreme_is_refused_in_one_sentence_that_names_the_setting(override, words):
    said = refused([override], study="lr_schedule" not in override)
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.width=16384", "model.blocks=256"], ["memory", "model.width"]),
        (["batch_size=65536", "model.context=65536"], ["memory", "batch_size"]),
        (["study=controls", "ablation.lr_scales=[1e-6,1]"], ["ablation.lr_scales", ">= 0.0001"]),
        (["study=controls", "ablation.deltas=[1e-6,1]"], ["ablation.deltas", ">= 0.0001"]),
        (["study=target_kl", "ablation.lr_scales=[1,1.0001]"], ["ablation.lr_scales", "three digits"]),
        (["finals.arms=[baseline,control,ebc_x2,ebc_x" + "9" * 400 + "]"], ["finals.arms"]),
        (["finals.arms=[baseline,control,ebc_x2,ebc_x99999]"], ["finals.arms", "10000"]),
        (["finals.max_seeds=100", "finals.seeds_per_look=1"], ["finals.seeds_per_look", "looks"]),
        (
            [
                "study=stabilizers",
                f"seeds=[{','.join(map(str, range(200, 300)))}]",
                f"ablation.lr_scales=[{','.join(map(str, range(1, 40)))}]",
            ],
            ["ablation", "runs", "2000"],
        ),
        ([SEARCH, "+controller_search.candidates.x={steps: 10.5}"], ["candidates.x", "whole number"]),
        ([SEARCH, "+controller_search.candidates.x={optimizer: {name: [1]}}"], ["candidates.x", "optimizer"]),
        ([SEARCH, "+controller_search.candidates.x={1: 2}"], ["candidates.x", "1 is not a setting"]),
        ([SEARCH, "+controller_search.candidates.x={data: {file: [1]}}"], ["candidates.x", "data.file"]),
        ([SEARCH, "+controller_search.candidates.x={compile: true}"], ["candidates.x", "compile"]),
        (["launcher=slurm", "launcher.slots=1", "device=cpu", "launcher.mem_gb=0"], ["launcher.mem_gb"]),
        (["seeds=[0,1,2,3,4,5]"] * 2500, ["overrides", "characters"]),
    ],
    ids=lambda value: value[-1][:60] if value else "",
)
def test_an_extreme_that_lies_in_a_combination_is_refused(overrides, words):
    said = refused(overrides)
    assert all(word in said for word in words), said


@pytest.mark.parametrize("study", [[], ["study=stabilizers"], ["study=controls"]])
@pytest.mark.parametrize(
    "override",
    [
        "ablation.question=${oc.env:HOME}",
        "ablation.question=$\\{oc.env:HOME\\}",
        "ablation.question='in ${oc.env:HOME} or not'",
        "ablation.question='${oc.decode:${oc.env:HOME}}'",
        "ablation.question=${oc.create:x}",
        "ablation.question=${hydra:runtime.cwd}",
        "ablation.question=${now:%Y}",
        "ablation.question=${tracker.mlflow_uri}",
        "ablation.question=${tracker}",
        "ablation.question=${..output_dir}",
        "ablation.question=${launcher[setup]}",
        "study.name=${oc.env:USER}",
        "data.file=${oc.env:HOME}/x",
        "seeds=['${oc.env:HOME}']",
        "launcher.setup=[a,'${oc.env:HOME}']",
        "+launcher.sbatch={a: {b: ['${oc.env:HOME}']}}",
        "+launcher.sbatch.x=${oc.env:HOME}",
        "tracker.mlflow_uri=${oc.env:HOME}",
    ],
)
def test_nothing_of_the_environment_is_read_through_a_setting(override, study, monkeypatch):
    monkeypatch.setenv("HOME", "/a/secret")
    said = refused([*study, override])
    assert "/a/secret" not in said
    assert "another setting" in said
    assert override.lstrip("+").partition("=")[0].split(".")[0] in said


def test_a_setting_may_still_follow_another():
    assert compose([*SMOKE, "finals.steps=${batch_size}"]).finals.steps == 24
    assert compose([*SMOKE, "study.name=mine_${scale}"]).study.name == "mine_smoke"


def test_a_file_of_conf_cannot_read_the_environment_either(tmp_path, monkeypatch):
    import shutil

    from ebc_lab.config import choices
    from ebc_lab.config import compose as compose_module

    shutil.copytree(choices.conf_dir(), tmp_path / "conf")
    text = "# @package _global_\nstudy: {name: mine}\nablation: {question: '${oc.env:HOME}'}\n"
    (tmp_path / "conf" / "study" / "mine.yaml").write_text(text)
    monkeypatch.setattr(choices, "conf_dir", lambda: tmp_path / "conf")
    monkeypatch.setattr(compose_module, "conf_dir", lambda: tmp_path / "conf")
    choices.groups.cache_clear()
    try:
        assert "ablation.question" in refused(["study=mine"])
    finally:
        choices.groups.cache_clear()


@pytest.mark.parametrize("sweep", ["seeds=range(0,1000000000)", "model.blocks=range(1,90)"])
def test_a_sweep_of_too_many_studies_is_counted_before_it_is_expanded(sweep):
    with pytest.raises(UserError, match="at most 1000"):
        configurations([*SMOKE, sweep, "batch_size=range(1,60)"], multirun=True)


@pytest.mark.parametrize(
    "overrides",
    [
        [f"seeds=[{','.join(map(str, range(200, 300)))}]"],
        ["finals.max_seeds=40", "finals.seeds_per_look=2"],
        ["finals.max_seeds=100", "finals.seeds_per_look=10"],
        ["lr_sweep.max_extensions=20", "lr_sweep.control_extensions=20", "calibrate.max_extra=20"],
        ["lr_sweep.replicates=100"],
        ["finals.steps=100000000"],
        ["study=target_kl", f"ablation.lr_scales=[{','.join(map(str, range(1, 60)))}]"],
    ],
    ids=lambda value: value[0][:40],
)
def test_the_most_that_is_allowed_is_planned(overrides, tmp_path):
    [config] = configurations([*SMOKE, *overrides, f"output_dir={tmp_path / 'none'}", "device=cpu"])
    assert 0 < planned(config)["stages"]["total"]["max"]["runs"] <= 2000
    assert not (tmp_path / "none").exists()
