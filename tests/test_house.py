"""The package keeps to its layers (docs/architecture.md) and to the rules that keep its code readable."""

import ast
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


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def long():\n" + "    x = 1\n" * 70, "long has 71 lines"),
        ("x = 1 if a else 2 if b else 3", "inside another"),
        ("x = [a for a in b if a.c and a.d and a.e]", "3 conditions"),
        ("x = [[a for a in b], [c for c in d], {e for e in f}]", "3 comprehensions"),
        ("x = [a for a in b if a.c and a.d]", None),
    ],
)
def test_code_that_is_hard_to_read_is_noticed(code, words):
    found = list(house.hard_to_read(Path("planted.py"), [*ast.walk(ast.parse(code))]))
    assert [words in sentence for sentence in found] == ([True] if words else [])
