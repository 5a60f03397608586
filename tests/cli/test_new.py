"""`ebc-lab new`: what it writes works as it is."""

import importlib.util
import json
import re
import sys

import jsonschema
import pytest
import yaml

from ebc_lab.cli.new import new
from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.config.own.sources import PLACES


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.setenv(PLACES, "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    commands = new("mild_steps", tmp_path)
    yield tmp_path, commands
    sys.modules.pop("mild_steps_optimizer", None)


def test_the_suite_compares_it_with_adam_and_muon(written):
    folder, commands = written
    assert sorted(path.name for path in folder.iterdir()) == [
        "ebc-lab.schema.json",
        "mild_steps.yaml",
        "mild_steps_optimizer.py",
        "test_mild_steps.py",
    ]
    assert "ebc-lab plan study=./mild_steps.yaml scale=smoke" in commands
    config = compose(["study=./mild_steps.yaml", "scale=smoke"], here=False)
    assert config.study.name == "mild_steps"
    assert list(config.ablation.arms) == ["adam", "muon", "mild_steps"]
    assert config.ablation.mine.arms == ["mild_steps"]
    assert set(config.own_files) == {"mild_steps.yaml", "mild_steps_optimizer.py"}
    suite = (folder / "mild_steps.yaml").read_text()
    [schema] = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", suite, re.MULTILINE)
    jsonschema.Draft7Validator(json.loads((folder / schema).read_text())).validate(yaml.safe_load(suite))


def test_its_optimizer_passes_its_own_test(written):
    folder, _ = written
    spec = importlib.util.spec_from_file_location("test_mild_steps", folder / "test_mild_steps.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tests = [name for name in dir(module) if name.startswith("test_")]
    assert len(tests) == 4
    for name in tests:
        getattr(module, name)()


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
    with pytest.raises(UserError, match="cannot be a name in Python"):
        new("my-opt", folder)
