"""The package keeps to its layers (docs/architecture.md) and to the rules that keep its code readable."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import house
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def imports():
    """Every import of the package as it is."""
    return grimp.build_graph(house.PACKAGE, include_external_packages=True, cache_dir=None)


def test_no_rule_is_broken(imports):
    assert house.violations(ROOT, imports) == []


def test_the_pictures_show_the_imports_and_the_parts_of_now(imports):
    now = house.layers_picture(ROOT, imports), house.parts_picture()
    shown = tuple((ROOT / name).read_text() for name in (house.PICTURE, house.PARTS_PICTURE))
    assert shown == now, "run python scripts/house.py --write"


def test_imports_that_point_upwards_are_noticed(tmp_path):
    shutil.copytree(ROOT / "ebc_lab", tmp_path / "ebc_lab")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file, line in {
        "records/files.py": "from ebc_lab.study.guards import Guards",
        "ebc/controller.py": "def planted():\n    from ebc_lab.config import errors",
        "study/stages/rules.py": "from ..store import find",
        "report/text/words.py": "from ..page import html",
        "config/errors.py": "def planted():\n    import torch",
    }.items():
        with open(tmp_path / "ebc_lab" / file, "a") as code:
            code.write(f"\n{line}\n")
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    for importer, imported in {
        "ebc_lab.records": "ebc_lab.study",
        "ebc_lab.ebc": "ebc_lab.config",
        "ebc_lab.study.stages": "ebc_lab.study.store",
        "ebc_lab.report.text": "ebc_lab.report.page",
        "ebc_lab.config": "torch",
    }.items():
        assert f"{importer} is not allowed to import {imported}" in done.stdout


def test_other_rules_of_imports_are_kept(tmp_path, monkeypatch):
    for file, line in {
        "a/x.py": "from planted.b import y",
        "a/z.py": "from . import u",
        "a/u.py": "def function():\n    from . import z",
        "b/y.py": "",
        "b/w.py": "from planted.a import x\nfrom planted.b import y",
        "ebc/one.py": "import numpy, torch\nfrom ..a import u",
    }.items():
        path = tmp_path / "planted" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(f"{line}\n")
    (tmp_path / "planted/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(house, "PACKAGE", "planted")
    monkeypatch.setattr(house, "LIBRARIES", {"ebc": ()})
    graph = grimp.build_graph("planted", include_external_packages=True, cache_dir=None)
    assert [line.replace(f"{tmp_path}/", "") for line in house.violations(tmp_path, graph)] == [
        "planted.ebc.one imports numpy: ebc may import torch",
        "planted.a.u imports planted.a.z imports planted.a.u",
        "planted.a imports planted.b imports planted.a",
        "planted/b/w.py:2: relative inside a package, please",
        "planted/ebc/one.py:2: absolute between packages, please",
    ]


def test_a_crowded_folder_is_noticed(tmp_path):
    (tmp_path / "ebc_lab" / "full").mkdir(parents=True)
    for i in range(house.MOST_FILES + 1):
        (tmp_path / "ebc_lab" / "full" / f"file_{i}.py").touch()
    for i in range(house.MOST_ENTRIES):
        (tmp_path / "ebc_lab" / f"entry_{i}.py").touch()
    assert list(house.crowded(tmp_path)) == [
        f"ebc_lab/full has {house.MOST_FILES + 1} files, {house.MOST_FILES} at most",
        f"ebc_lab has {house.MOST_ENTRIES + 1} entries besides libraries, {house.MOST_ENTRIES} at most",
    ]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def long():\n" + "    x = 1\n" * 70, "long has 71 lines"),
        ("x = 1 if a else 2 if b else 3", "inside another"),
        ("x = [a for a in b if a.c and a.d and a.e]", "3 conditions"),
        ("x = [a for a in b if a.c if a.d if a.e]", "3 conditions"),
        ("x = [[a for a in b], [c for c in d], {e for e in f}]", "3 comprehensions"),
        ("x = 1 if a else 2", None),
        ("x = [a for a in b if a.c and a.d]", None),
    ],
)
def test_code_that_is_hard_to_read_is_noticed(tmp_path, code, words):
    path = tmp_path / "planted.py"
    path.write_text(code)
    found = list(house.hard_to_read(path))
    assert [words in sentence for sentence in found] == ([True] if words else [])
