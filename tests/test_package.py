"""What a user who installs the package is promised: its version, and how little the method loads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint, packages_distributions
from itertools import chain
from pathlib import Path

import grimp
import pytest
import sbom
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.called import called

import ebc_lab

ROOT = Path(__file__).parent.parent


def test_the_newest_entry_of_the_changelog_is_this_version(tmp_path):
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert headings in (released, ["Unreleased", *released])
    versions = [re.fullmatch(r"(\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)", heading) for heading in released]
    assert all(versions), released
    assert versions[0][1] == ebc_lab.__version__
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["version"], str(cited["date-released"])) == (versions[0][1], versions[0][2])
    newest_first = [(tuple(map(int, v[1].split("."))), v[2]) for v in versions]
    assert newest_first == sorted(newest_first, reverse=True)
    assert called("--version", cwd=tmp_path).stdout == f"ebc-lab {ebc_lab.__version__}\n"


def test_what_is_imported_anywhere_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *chain.from_iterable(v for k, v in extras.items() if k != "dev")]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    declared.add("cupy")  # which build of it is the user's choice
    owners = packages_distributions()
    graph = grimp.build_graph("ebc_lab", include_external_packages=True, cache_dir=None)
    imported = {module for module in graph.modules if graph.is_module_squashed(module)}
    for module in imported - sys.stdlib_module_names:
        names = {canonicalize_name(owner) for owner in owners.get(module, [module])}
        assert names & declared, module


def test_what_an_entry_point_names_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {"console_scripts": project["scripts"], **project["entry-points"]}
    found = [EntryPoint(name, at, group).load() for group in named for name, at in named[group].items()]
    assert len(found) > 1
    assert all(map(callable, found))


def test_everything_that_an_extra_brings_is_brought_by_dev_too():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [chosen] = [line for line in extras["dev"] if line.startswith("ebc-lab[")]
    assert set(re.findall(r"[\w-]+", chosen.partition("[")[2])) == set(extras) - {"dev"}


IMPORTED = """
import sys, torch
before = set(sys.modules)
import ebc_lab.ebc as ebc
for name in ebc.__all__:
    getattr(ebc, name)
print(*sorted(set(sys.modules) - before))
"""


@pytest.mark.thorough
def test_the_method_loads_nothing_but_torch():
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert "ebc_lab.ebc.clip" in loaded
    ours = {module for module in loaded if module.startswith("ebc_lab.")}
    assert {module for module in ours if not module.startswith("ebc_lab.ebc")} == set()
    others = {module.partition(".")[0] for module in loaded} - {"ebc_lab", "torch"}
    assert others - sys.stdlib_module_names == set()


def test_the_bill_of_materials_lists_what_runs_with_version_and_licence():
    parts = {part["name"]: part for part in json.loads(sbom.sbom())["components"]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    assert required <= {name for name, part in parts.items() if part["scope"] == "required"}
    locked = (ROOT / "constraints.txt").read_text().splitlines()
    for name, part in parts.items():
        assert f"{name}=={part['version']}" in locked
        assert part["purl"] == f"pkg:pypi/{name}@{part['version']}"
        assert part["licenses"], name
        assert (part["scope"] == "optional") == ("properties" in part), name
    assert {"name": "ebc-lab:extra", "value": "wandb"} in parts["wandb"]["properties"]
    assert not {"pytest", "sphinx", "cyclonedx-python-lib"} & set(parts)
    assert "://" not in json.dumps(list(parts.values()))


@pytest.mark.thorough
def test_the_bill_of_materials_is_the_same_bytes_from_another_process(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "sbom.py", tmp_path / sbom.NAME]
    subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "1"}, check=True)
    assert (tmp_path / sbom.NAME).read_text() == sbom.sbom()


@pytest.mark.parametrize("licence", ["UNKNOWN", "LGPL-3.0-or-later"])
def test_a_licence_that_nobody_has_judged_ends_the_release(licence, monkeypatch):
    monkeypatch.setattr(sbom, "licences", lambda package: [licence])
    with pytest.raises(SystemExit, match=rf"the licence of [\w-]+ is {licence}: see .* CONTRIBUTING"):
        sbom.sbom()
