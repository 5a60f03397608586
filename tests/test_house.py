"""The package keeps to its layers (docs/architecture.md) and to the rules that keep its code readable."""

import shutil
from pathlib import Path

import house
import pytest

ROOT = Path(__file__).parent.parent


def test_imports_point_downwards_and_folders_stay_small():
    assert house.violations(ROOT) == []


@pytest.mark.parametrize("package", sorted({house.part(name, 1) for name in house.modules(ROOT)} - {""}))
def test_code_is_easy_to_read(package):
    found = [path for name, path in house.modules(ROOT).items() if house.part(name, 1) == package]
    assert [breach for path in found for breach in house.hard_to_read(path)] == []


def test_the_pictures_show_the_imports_and_the_parts_of_now():
    now = house.picture(house.imports(ROOT)), house.parts_picture()
    shown = tuple((ROOT / name).read_text() for name in (house.PICTURE, house.PARTS_PICTURE))
    assert shown == now, "run python scripts/house.py --write"


INSIDE = "\n\ndef planted():\n    {}\n"
CHECKED = "\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {}\n"


PLANTED = [
    ("records/files.py", "from ebc_lab.study.guards import Guards", "study is not below records"),
    ("study/launch/pool.py", INSIDE.format("import ebc_lab.report.conclude"), "report is not below study"),
    ("config/schema.py", CHECKED.format("from ebc_lab.ebc import clip"), "ebc is not below config"),
    ("study/stages/rules.py", "from ..store import find", "store is not below stages"),
    ("study/trackers/backends.py", "from ..stages import rules", "stages is not below trackers"),
    ("report/text/words.py", "from ..page import html", "page is not below text"),
    ("study/invented.py", "from .stages import rules\nfrom .inspect import why", "inspect is not below"),
    ("__init__.py", "from ebc_lab.config import schema", "config is not below"),
    ("ebc/controller.py", "import numpy", "ebc may import torch and the standard library alone"),
    ("ebc/controller.py", "from ebc_lab.config import errors", "config is not below ebc"),
    ("config/errors.py", INSIDE.format("import torch"), "config must load without torch"),
    ("integrations/figures.py", "from ebc_lab.config import errors", "config is not below integrations"),
    ("integrations/figures.py", "import accelerate", "integrations may import torch, lightning"),
    ("records/files.py", "from ..config import errors", "absolute between packages"),
    ("records/files.py", "from ebc_lab.records import locks", "relative inside a package"),
]


def violations(folder, *planted):
    """What is found in a copy of the package after these lines were added, each to its file."""
    shutil.copytree(ROOT / "ebc_lab", folder / "ebc_lab")
    for file, lines, *_ in planted:
        with open(folder / "ebc_lab" / file, "a") as code:
            code.write(f"\n{lines}\n")
    return house.violations(folder)


def test_every_planted_import_is_noticed(tmp_path):
    found = violations(tmp_path, *PLANTED)
    for file, planted, words in PLANTED:
        module = ".".join(["ebc_lab", *Path(file).with_suffix("").parts]).removesuffix(".__init__")
        assert any(s.startswith(f"{module}, line ") and words in s for s in found), (planted, found)


def test_files_that_import_each_other_are_noticed(tmp_path):
    found = violations(tmp_path, ("config/errors.py", INSIDE.format("from . import checks")))
    assert any("ebc_lab.config.errors, ebc_lab.config.hints" in sentence for sentence in found), found


def test_folders_that_import_each_other_are_noticed_though_their_files_do_not(tmp_path):
    for file, line in {
        "a/x.py": "from ebc_lab.b import y",
        "a/z.py": "",
        "b/y.py": "",
        "b/w.py": "from ebc_lab.a import z",
    }.items():
        path = tmp_path / "ebc_lab" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(line)
    found = house.imports(tmp_path)
    assert house.cycles(found) == []
    assert house.cycles(found, house.folder_of(tmp_path)) == ["ebc_lab.a, ebc_lab.b import each other"]


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
