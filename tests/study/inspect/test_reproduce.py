"""Commands that do something again are tried by composing them."""

import shlex
from dataclasses import replace

import pytest
from support.invented import invent

from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import from_dict, run_part
from ebc_lab.config.overrides import check_overrides
from ebc_lab.config.schema import Config
from ebc_lab.study.inspect.reproduce import (
    continuing,
    deciding,
    override_value,
    reproduce,
    study_command,
)
from ebc_lab.study.store import changes
from ebc_lab.study.store.study import Study


def requested(overrides):
    return changes.requested(compose(overrides, here=False))


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["scale=laptop"], marks=pytest.mark.slow),
        pytest.param(["scale=smoke", "study.name=other", "seeds=[3,4]"], marks=pytest.mark.slow),
        ["scale=smoke", "study=published", "calibrate.multiples=[0.5,1]"],
        ["scale=smoke", "study=controls", "ablation.steps=40", "model.blocks=1"],
        ["scale=paper", "optimizer=adam", "data=path", 'data.file="/a folder/it\'s, here & there.txt"'],
        ["scale=smoke", "study=stabilizers", "lr_sweep.grids.adam=[1e-3,0.25]"],
        pytest.param(
            ["scale=laptop", "study=determinism", "circumstances.parts=[1,2]"], marks=pytest.mark.slow
        ),
    ],
)
def test_the_command_of_a_study_asks_for_exactly_its_settings(overrides):
    asked = requested(overrides)
    found = study_command(asked)
    program, command, *words = shlex.split(found.command)
    assert (program, command) == ("ebc-lab", "autopilot")
    assert requested(words) == asked
    assert len(words) <= len(overrides)
    assert found.unsaid == []


def test_the_command_of_a_study_with_an_own_optimizer_says_all_of_it():
    own = ["optimizer=custom", "optimizer.target=json:loads"]
    arguments = "optimizer.arguments={betas: [0.8, {a: 'b, c'}], inner: {empty: null, flag: true}}"
    asked = requested(["scale=smoke", *own, arguments, "lr_sweep.grids.custom=[1e-3,2e-3]"])
    found = study_command(asked)
    assert found.unsaid == []
    assert requested(shlex.split(found.command)[2:]) == asked


def test_arms_that_a_suite_does_not_have_and_those_left_out_are_said():
    asked = requested(["scale=smoke", "study=controls"])
    arms = asked["ablation"]["arms"]
    arms["mine"] = {**arms["baseline"], "lr_scale": 3.0}
    found = study_command(asked)
    assert found.unsaid == []
    assert requested(shlex.split(found.command)[2:]) == asked
    gone = [name for name in arms if name not in ("mine", asked["ablation"]["reference"])][-1]
    del arms[gone]
    found = study_command(asked)
    assert found.unsaid == []
    assert f"'~ablation.arms.{gone}'" in found.command
    assert "study=controls" in found.command
    assert requested(shlex.split(found.command)[2:]) == asked


@pytest.mark.parametrize(
    "value",
    [
        "a b",
        "it's",
        'it"s',
        'it\'s "both"',
        "a\\b",
        "a\\",
        'q\\"x',
        "",
        "./own/x.py:F",
        ["/a/b.py:F.g", "b c"],
    ],
)
def test_a_value_is_read_as_it_was_written_and_quoted_once(value):
    written = f"ablation.question={override_value(value)}"
    assert check_overrides([written]) == {"ablation.question": value}
    if "'" not in str(value):
        assert shlex.quote(written).count("'") in (0, 2)


@pytest.mark.parametrize(("name", "said"), [("shakespeare", False), ("pydoc", True)])
def test_a_run_s_command_names_the_text_s_checksum_where_its_name_may_mean_several(name, said):
    config = compose(["scale=smoke", f"data={name}"], here=False)
    run = run_part(config)
    command = reproduce(config, replace(run, data=replace(run.data, sha256="0" * 64)))
    assert ("data.sha256" in command) == said


def test_what_departs_from_the_scale_is_listed_with_its_default():
    found = study_command(requested(["scale=smoke", "batch_size=7", "study.name=x"]))
    assert found.changed == [("batch_size", 24, 7)]


def test_the_command_that_decides_asks_for_fresh_seeds_and_for_nothing_else_anew(
    tmp_path, text_file, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_opt.py").write_text("import torch\n\n\nclass Cautious(torch.optim.AdamW):\n    pass\n")
    asked = ["study=optimizers", "mine=./my_opt.py:Cautious", "data=path", f"data.file={text_file}"]
    study = invent(tmp_path / "out", asked, stages=1, drawn=False)
    header = study.header()
    answers = {"cautious": {"verdict": "undecided", "seeds": list(range(9)), "seeds_needed": 9}}
    decision = {"tracks": {"adam_none": {"answers": answers}}}
    words = shlex.split(deciding(study, header, decision))
    made = compose(words[2:], here=False)
    before = from_dict(Config, {**header["requested"], "data": header["config"]["data"]})
    assert made.seeds == list(range(5, 14))
    assert made.study.name == f"{header['study']}_seeds_5_to_13"
    assert made.output_dir == str(tmp_path / "out")
    assert (made.ablation, made.tune, made.scale) == (before.ablation, before.tune, before.scale)
    invent(tmp_path / "out", [*asked, "seeds=[6,8]", "study.name=other"], stages=1, drawn=False)
    assert "seeds=[5,7,9,10,11,12,13,14,15]" in deciding(study, header, decision)  # none trained with there
    answers["cautious"]["verdict"] = "better"
    assert deciding(study, header, decision) is None


def test_a_study_that_was_moved_is_continued_where_it_is_now(own_copy, tmp_path):
    _, study = own_copy
    study.note_command(["ebc-lab", "autopilot", "scale=smoke"])
    assert continuing(study, study.header()) == "ebc-lab autopilot scale=smoke"
    (tmp_path / "a place").mkdir()
    moved = Study(study.root.rename(tmp_path / "a place" / "renamed"))
    program, command, *words = shlex.split(continuing(moved, moved.header()))
    assert (program, command) == ("ebc-lab", "autopilot")
    asked = compose(words)
    assert (asked.output_dir, asked.launcher.name) == (str(moved.root.parent), "inline")
    assert asked.study.name == "renamed"
    words = [word for word in words if not word.startswith("study.name=")]
    assert requested([*words, f"study.name={study.name}"]) == moved.header()["requested"]
