"""Functions by their targets: found and hashed without importing anything, then loaded."""

import hashlib
import shutil
import sys
from pathlib import Path

import pytest

from ebc_lab.config.own.sources import PLACES, find, installed_release, line_of_fault, load

PLAIN = "import os\n\nraise RuntimeError('imported')\n\n\ndef wanted():\n    return 7\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory; what is imported from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_modules_inside_folders_and_packages_are_found(folder):
    inner = folder / "found_outer" / "inner"
    inner.mkdir(parents=True)
    (inner / "leaf.py").write_text("class Kind:\n    def made(): return 5\n")
    source = find("found_outer.inner.leaf.Kind.made")
    assert load("found_outer.inner.leaf:Kind.made", source.sha256)() == 5
    (inner / "__init__.py").write_text(PLAIN)
    (inner.parent / "__init__.py").write_text(PLAIN)
    assert find("found_outer.inner.leaf.Kind.made").target == "found_outer.inner.leaf:Kind.made"
    assert find("sqlalchemy.orm:Session").path.name == "__init__.py"  # installed, and not imported for this
    assert find("torch.optim.NAdam").target == "torch.optim:NAdam"


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("found_typed:wantde", r"no wantde \(did you mean wanted\?\) in .*found_typed.py"),
        ("found_tiped:wanted", r"no module found_tiped \(did you mean found_typed\?\) in "),
        ("found_typed.below:wanted", "no module below in found_typed"),
        ("found_typed", "written module:function"),
        ("found typed:wanted", "written module:function"),
        ("found_typed:wanted:twice", "written module:function"),
        ("../found_typed:wanted", "written module:function"),
        ("found_empty:wanted", "found_empty has no file"),
        ("sys:exit", "sys has no file"),
    ],
)
def test_what_is_not_there_is_said_in_a_clause(folder, written, words):
    (folder / "found_typed.py").write_text(PLAIN)
    (folder / "found_empty").mkdir()
    with pytest.raises(LookupError, match=words):
        find(written)


@pytest.mark.parametrize(
    "text",
    [
        "from json import *\n",
        "if True:\n    a, (wanted, *b) = 1, (2, 3)\n",
        "def __getattr__(name):\n    return len\n",
        "globals()['wan' + 'ted'] = len\n",
    ],
)
def test_names_that_are_bound_in_other_ways_are_not_refused(folder, text):
    (folder / "found_bound.py").write_text(text)
    assert find("found_bound:wanted").name == "wanted"


def test_a_function_is_loaded_from_the_file_that_was_planned_and_from_no_other(folder):
    path = folder / "load_planned.py"
    path.write_text("def f():\n    return 1\n\n\nvalue = 3\n")
    planned = find("load_planned:f").sha256
    assert load("load_planned:f", planned)() == 1
    with pytest.raises(LookupError, match=r"value in .* is int, not a function"):
        load("load_planned:value", planned)
    with pytest.raises(LookupError, match=r"there is no f\.gone in"):
        load("load_planned:f.gone", planned)
    (folder / "load_broken.py").write_text("def f(:\n")
    with pytest.raises(SyntaxError) as broken:
        load("load_broken:f", find("load_broken:f").sha256)
    assert line_of_fault(broken.value) == "load_broken.py:1"
    path.write_text("def f():\n    return 22\n")
    with pytest.raises(LookupError, match="has changed since the run was planned"):
        load("load_planned:f", planned)
    with pytest.raises(LookupError, match="has changed since this process imported it"):
        load("load_planned:f", find("load_planned:f").sha256)


def test_a_module_that_another_hides_is_refused(folder):
    (folder / "hashlib.py").write_text("def f():\n    return 3\n")
    with pytest.raises(LookupError, match=r"Python imports hashlib from .*: rename yours"):
        load("hashlib:f", find("hashlib:f").sha256)


def test_a_path_means_the_same_from_any_folder(folder, monkeypatch):
    monkeypatch.setenv(PLACES, "")
    path = folder / "load_placed.py"
    path.write_text("def f():\n    return 9\n")
    ways = ["./load_placed.py:f", "load_placed.py:f", "load_placed:f", "load_placed.f", f"{path}:f"]
    assert {(s.target, s.path, s.sha256) for s in map(find, ways)} == {
        ("load_placed:f", path, hashlib.sha256(path.read_bytes()).hexdigest())
    }
    assert "load_placed" not in sys.modules
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    source = find("../load_placed.py:f")
    assert source.path == path
    assert find("load_placed:f") == source  # from now on, also in processes that this one starts
    assert load("load_placed:f", source.sha256)() == 9
    with pytest.raises(LookupError, match=r"no load_place.py \(did you mean load_placed\?\) in "):
        find("../load_place.py:f")
    (folder / "load-dashed.py").write_text("def f(): pass\n")
    with pytest.raises(LookupError, match=r"load-dashed.py cannot be imported by Python: rename it"):
        find("../load-dashed.py:f")


def test_what_a_module_imports_from_its_folder_belongs_to_it(folder, monkeypatch):
    monkeypatch.setenv(PLACES, "")
    alone = "import json\nimport torch\n\n\ndef f():\n    return 1\n"
    (folder / "load_alone.py").write_text(alone)
    assert find("load_alone:f").sha256 == hashlib.sha256(alone.encode()).hexdigest()
    (folder / "load_lib" / "deep").mkdir(parents=True)
    (folder / "load_lib" / "__init__.py").write_text("from .one import value\n")
    (folder / "load_lib" / "one.py").write_text("import load_leaf\nvalue = load_leaf.value\n")
    (folder / "load_leaf.py").write_text("value = 3\n")
    (folder / "load_other.py").write_text("value = 4\n")
    (folder / "load_whole.py").write_text("def f():\n    from load_lib import value\n    return value\n")
    source = find("load_whole:f")
    assert set(source.files) == {"load_whole.py", "load_lib/__init__.py", "load_lib/one.py", "load_leaf.py"}
    copied = folder / "copied"
    for name, path in source.files.items():
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).write_bytes(path.read_bytes())
    monkeypatch.chdir(copied)
    assert find("load_whole:f").sha256 == source.sha256  # wherever they are
    assert load("load_whole:f", source.sha256)() == 3
    (copied / "load_leaf.py").write_text("value = 5\n")
    with pytest.raises(LookupError, match=r"or what it imports \(.*load_leaf.py.*\), has changed"):
        load("load_whole:f", source.sha256)


INSTALLED = "from . import inside\n\ndef fast(model, config):\n    return []\n"


def install(place: Path, version: str) -> None:
    """A package as pip leaves it: only its record names the folder that it is imported from."""
    package = place / "fast_steps"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(INSTALLED)
    for old in place.glob("quick_lib-*"):
        shutil.rmtree(old)
    info = place / f"quick_lib-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: quick-lib\nVersion: {version}\n")
    (info / "RECORD").write_text("fast_steps/__init__.py,sha256=x,1\nfast_steps/inside.py,sha256=y,1\n")
    installed_release.cache_clear()


def test_a_part_of_an_installed_package_is_another_one_in_another_version(tmp_path, monkeypatch):
    packages = tmp_path / "packages"
    monkeypatch.setattr(sys, "path", [*sys.path, str(packages)])
    install(packages, "1.0")
    first = find("fast_steps:fast")
    assert installed_release(first.path) == "quick-lib==1.0"
    install(packages, "1.1")  # with the same file, and others that it uses changed
    assert find("fast_steps:fast").sha256 != first.sha256
    (packages / "loose.py").write_text(INSTALLED)  # beside them, and of none
    assert find("loose:fast").sha256 == hashlib.sha256(INSTALLED.encode()).hexdigest()


@pytest.mark.parametrize("target", ["torch.optim.adam:Adam", "ebc_lab.config.own.sources:find"])
def test_versions_that_are_named_anyway_are_named_once(target):
    found = find(target)
    assert found.sha256 == hashlib.sha256(found.path.read_bytes()).hexdigest()
