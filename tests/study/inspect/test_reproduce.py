"""Commands that do something again are tried by composing them."""

import json
import os
import shlex
from dataclasses import replace

import pytest
from support.invented import invent

from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import from_dict, run_part, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import identity
from ebc_lab.config.overrides import check_overrides
from ebc_lab.config.parts.init import InitConfig
from ebc_lab.config.schema import Config, RunConfig
from ebc_lab.study.inspect.forecast import planned
from ebc_lab.study.inspect.reproduce import (
    again,
    continuing,
    departures,
    override_value,
)
from ebc_lab.study.inspect.rerun import settings_of
from ebc_lab.study.resolve import adopt
from ebc_lab.study.store import bundle, changes
from ebc_lab.study.store.study import Study, run_again


def words(command, program):
    ours, name, *overrides = shlex.split(command)
    assert (ours, name) == ("ebc-lab", program)
    return overrides


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_opt.py").write_text("import torch\n\n\nclass Cautious(torch.optim.AdamW):\n    pass\n")
    return tmp_path


def test_a_study_on_a_folder_goes_on_from_any_place_and_notices_another_file(place, text_file):
    (place / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (place / "texts" / name).write_text(text_file.read_text() + name)
    study = invent(place / "out", ["data=path", "data.file=texts", "study.name=x"], stages=0, drawn=False)
    header = study.header()
    characters = 2 * len(text_file.read_text()) + 10
    assert header["corpus"]["title"] == f"a.txt and 1 more file, {characters:,} characters"
    config = from_dict(Config, header["requested"] | {"output_dir": str(place / "out")})
    (place / "elsewhere").mkdir()
    os.chdir("elsewhere")
    assert adopt(config, header).data.file == header["config"]["data"]["file"] == str(place / "texts")
    assert planned(config)["text"] == header["corpus"]["title"]
    (place / "texts" / "c.txt").write_text("c" * 99)
    with pytest.raises(UserError, match=r"a\.txt and 2 more has changed"):
        planned(config)


def test_the_text_that_is_forgotten_may_be_several_files(place):
    (place / "own.yaml").write_text("init: {name: run, run: x, text: path, file: [a.txt, b.txt]}\n")
    run = run_part(compose(["scale=smoke", "study=./own.yaml"]))
    assert InitConfig.from_run(from_dict(RunConfig, to_dict(run))).file == ["a.txt", "b.txt"]


OWN = ["optimizer=custom", "optimizer.target=./my_opt.py:Cautious", "lr_sweep.grids.custom=[1e-3,2e-3]"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "overrides",
    [
        ["study=controls", "ablation.steps=40", "~ablation.arms.control", "+ablation.arms.new.lr_scale=3"],
        ["study=optimizers", "mine=./my_opt.py:Cautious", "lr_sweep.grids.adam=[1e-3,0.25]"],
        [*OWN, "optimizer.arguments={betas: [0.8, {a: 'b, c'}], inner: {empty: null, flag: true}}"],
    ],
)
def test_the_command_of_a_study_asks_for_exactly_its_settings(place, text_file, overrides):
    asked = ["data=path", f"data.file={text_file}", *overrides]
    if "optimizer=custom" in overrides:
        study = Study(place / "out" / "own")
        config = compose(["scale=smoke", "study.name=own", *asked], here=False)
        study.root.mkdir(parents=True)
        resolved = replace(config, data=replace(config.data, sha256="0" * 64))
        header = {"requested": changes.requested(config), "config": changes.requested(resolved)}
        study.header_file.write_text(json.dumps(header))
    else:
        study = invent(place / "out", asked, stages=1, drawn=False)
        header = study.header()
    found = compose(words(again(study), "autopilot"), here=False)
    assert changes.from_recorded(found, header) == []
    assert found.data.sha256 == header["config"]["data"]["sha256"]  # the very text
    assert found.study.name == study.name


def test_settings_after_the_file_win_and_a_group_is_chosen_anew(place, text_file):
    asked = ["data=path", f"data.file={text_file}", "batch_size=7"]
    began = f"from={invent(place / 'out', asked, stages=1, drawn=False).header_file}"
    changed = ["batch_size=9", "quantizer=ternary", "study.name=b", "launcher=inline"]
    found = compose([began, *changed], here=False)
    assert (found.batch_size, found.quantizer.name, found.launcher.name) == (9, "ternary", "inline")
    with pytest.raises(UserError, match="has a scale and a suite already: leave study=controls out"):
        compose([began, "study=controls"], here=False)
    with pytest.raises(UserError, match=r"optimizer.lr is decided by the study itself"):
        compose([began, "optimizer.lr=1e-3"], here=False)


@pytest.mark.thorough
def test_a_run_begins_from_its_spec_under_its_own_name(place, text_file):
    asked = ["study=optimizers", "mine=./my_opt.py:Cautious", "data=path", f"data.file={text_file}"]
    study = invent(place / "out", asked, drawn=False)
    (place / "my_opt.py").rename(place / "elsewhere.py")  # the study has its copy
    for run_id in [*study.run_ids()][::5]:
        spec = study.spec(run_id)
        if spec["kind"] != "train":
            continue
        assert identity(run_part(settings_of(study, spec))) == spec["identity"]
    assert any(run_id.startswith("cautious") for run_id in study.run_ids())


def test_a_file_that_nothing_can_begin_from_is_refused_in_a_sentence(place, text_file):
    study = invent(place / "out", ["data=path", f"data.file={text_file}"], drawn=False)
    content = study.header_file.read_text()
    other, lacking = (json.loads(content) for _ in range(2))
    other["requested"]["hallucinations"] = 3
    del other["checksum"], lacking["checksum"], lacking["config"]["data"]
    again = "get the file again"
    contents = {
        content[:500]: f"cannot be read .*: {again}",
        content.replace('"smoke"', '"laptop"'): "was edited after it was written",
        json.dumps(other): "Config has no hallucinations: the file was written by another version",
        json.dumps(lacking): f"is damaged .*: {again}",
        "[[[]]]": "holds no settings of a study or a run",
    }
    refused = {
        place / "missing.json": "is not there: give the study.json",
        study.root: "is a folder: give the study.json",
        bundle.export(study, place / "it.zip")["bundle"]: "is a bundle: unpack it with `ebc-lab report`",
        study.run_files(study.run_ids()[0]).spec: "is a run's: `ebc-lab train from=",
        place / "pipe.json": "is not a file but a pipe",
    }
    os.mkfifo(place / "pipe.json")
    for number, (text, said) in enumerate(contents.items()):
        (place / f"{number}.json").write_text(text)
        refused[place / f"{number}.json"] = said
    for path, said in refused.items():
        with pytest.raises(UserError, match=said) as error:
            compose([f"from={path}"], here=False)
        assert str(error.value).startswith("from=")
        assert str(error.value).count("\n") == 0


def test_the_command_of_a_run_is_quoted_for_the_shell():
    assert run_again("my study.zip", "a [b]") == "ebc-lab rerun 'my study.zip' --run 'a [b]'"


@pytest.mark.parametrize(
    "value",
    ["a b", "it's", 'it"s', 'it\'s "both"', "a\\b", "a\\", 'q\\"x', "", "./x.py:F", ["/a/b.py:F.g", "b c"]],
)
def test_a_value_is_read_as_it_was_written_and_quoted_once(value):
    written = f"ablation.question={override_value(value)}"
    assert check_overrides([written]) == {"ablation.question": value}
    if "'" not in str(value):
        assert shlex.quote(written).count("'") in (0, 2)


def test_what_departs_from_the_scale_and_the_suite_is_listed_with_its_default(place, text_file):
    asked = ["study=controls", "batch_size=7", "data=path", f"data.file={text_file}", "study.name=x"]
    new = "+ablation.arms.new={about: another, lr_scale: 2}"
    study = invent(place / "out", [*asked, new, "~ablation.arms.control"], stages=1, drawn=False)
    found = {key: (old, here) for key, old, here in departures(study, study.header())}
    assert found["batch_size"] == (24, 7)
    assert found["ablation.arms.new"] == (None, "another")
    assert found["ablation.arms.control"][1] is None
    assert not any(key.startswith(("ablation.arms.baseline", "study.name")) for key in found)


def test_a_study_that_was_moved_is_continued_where_it_is_now(own_copy, tmp_path):
    _, study = own_copy
    study.note_command(["ebc-lab", "autopilot", "scale=smoke"])
    assert continuing(study, study.header()) == "ebc-lab autopilot scale=smoke"
    (tmp_path / "a place").mkdir()
    moved = Study(study.root.rename(tmp_path / "a place" / "renamed"))
    asked = compose(words(continuing(moved, moved.header()), "autopilot"))
    assert (asked.output_dir, asked.launcher.name) == (str(moved.root.parent), "inline")
    assert asked.study.name == "renamed"
    renamed = replace(asked, study=replace(asked.study, name=study.name))
    assert changes.from_recorded(renamed, moved.header()) == []
