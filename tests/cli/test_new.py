"""`ebc-lab new`: what it writes and prints works as it is."""

import json
import re
import runpy
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from ebc_lab.cli.new import new, write_schema
from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.config.own.sources import PLACES


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.setenv(PLACES, "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    _, commands = new("mild_steps", tmp_path)
    yield tmp_path, commands
    sys.modules.pop("mild_steps_optimizer", None)


def composed(*overrides):
    return compose(["study=./mild_steps.yaml", *overrides], here=False)


def test_the_suite_compares_it_with_adamw_and_muon_in_a_folder_for_each_scale(written):
    folder, commands = written
    files = {"mild_steps.yaml", "mild_steps_optimizer.py", "test_mild_steps.py"}
    assert {path.name for path in folder.iterdir()} == files
    assert commands == [
        "python test_mild_steps.py",
        "ebc-lab autopilot study=./mild_steps.yaml scale=smoke",
        "ebc-lab plan study=./mild_steps.yaml",
        "ebc-lab autopilot study=./mild_steps.yaml",
    ]
    config = composed("scale=smoke")
    assert list(config.ablation.arms) == ["adamw", "muon", "mild_steps"]
    assert config.ablation.mine.arms == ["mild_steps"]
    assert set(config.own_files) == {"mild_steps.yaml", "mild_steps_optimizer.py"}
    assert config.study.name == "mild_steps_smoke"
    assert composed("scale=paper").study.name == "mild_steps_paper"


def test_its_arm_takes_a_grid_of_its_own(written):
    grid = [2e-5, 4e-5, 8e-5]
    arms = composed("scale=smoke", "ablation.arms.mild_steps.tune.lr=[2e-5,4e-5,8e-5]").ablation.arms
    assert arms["mild_steps"].tune["lr"] == grid
    assert arms["mild_steps"].tune["schedule"] == arms["adamw"].tune["schedule"]
    assert arms["adamw"].tune["lr"] != grid
    with pytest.raises(UserError, match=r"no such arm \(did you mean mild_steps\?\)"):
        composed("scale=smoke", "ablation.arms.mild_step.tune.lr=[2e-5,4e-5,8e-5]")


def test_the_arm_that_it_suggests_can_be_added_by_removing_the_number_signs(written):
    suite = Path("mild_steps.yaml")
    head, example = suite.read_text().split("#  arms:")
    suite.write_text(head + "  arms:" + example.replace("\n#", "\n"))
    assert list(composed("scale=smoke").ablation.arms) == ["adamw", "muon", "lion", "mild_steps"]


def test_its_optimizer_passes_its_own_test_without_pytest(written, monkeypatch, capsys):
    folder, commands = written
    _, script = commands[0].split()
    monkeypatch.setitem(sys.modules, "pytest", None)  # as if it were not installed
    runpy.run_path(script, run_name="__main__")
    assert capsys.readouterr().out.count("passed") == 4
    optimizer = folder / "mild_steps_optimizer.py"
    optimizer.write_text(optimizer.read_text().replace('-group["lr"])', 'group["lr"])'))  # the wrong way
    del sys.modules["mild_steps_optimizer"]
    with pytest.raises(AssertionError):
        runpy.run_path(script, run_name="__main__")


def test_an_editor_checks_it_once_it_names_the_schema(written):
    folder, _ = written
    line = write_schema(folder)
    schema = json.loads((folder / re.search(r"\$schema=(\S+)$", line)[1]).read_text())
    suite = yaml.safe_load((folder / "mild_steps.yaml").read_text())
    jsonschema.Draft7Validator(schema).validate(suite)


def test_nothing_is_overwritten_and_no_other_meaning_taken(written):
    folder, _ = written
    (folder / "test_mild_steps.py").unlink()
    with pytest.raises(UserError, match=r"mild_steps.yaml is there already"):
        new("mild_steps", folder)
    assert not (folder / "test_mild_steps.py").exists()
    for name in ("adam", "stabilizers"):
        with pytest.raises(
            UserError, match=f"{name} is ebc-lab's own already: take another name, .* my_{name}"
        ):
            new(name, folder)
    for name in ("my-opt", "none"):  # `class None` cannot be
        with pytest.raises(UserError, match="cannot be a name in Python"):
            new(name, folder)
