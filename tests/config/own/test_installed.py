"""A part that an installed package brings is named by that package's version, too."""

import hashlib
import sys
from pathlib import Path

import pytest

from ebc_lab.config.own import sources

CODE = "from . import inside\n\ndef fast(model, config):\n    return []\n"


def install(place: Path, version: str) -> None:
    """A package as pip leaves it: only its record names the folder that it is imported from."""
    package = place / "fast_steps"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(CODE)
    for old in place.glob("quick_lib-*"):
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
    info = place / f"quick_lib-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: quick-lib\nVersion: {version}\n")
    (info / "RECORD").write_text("fast_steps/__init__.py,sha256=x,1\nfast_steps/inside.py,sha256=y,1\n")
    sources.installed_release.cache_clear()


@pytest.fixture
def packages(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "packages")])
    return tmp_path / "packages"


def test_a_part_of_an_installed_package_is_another_one_in_another_version(packages):
    install(packages, "1.0")
    first = sources.find("fast_steps:fast")
    assert sources.installed_release(first.path) == "quick-lib==1.0"
    assert sources.find("fast_steps:fast").sha256 == first.sha256
    install(packages, "1.1")  # with the same file, and others that it uses changed
    assert sources.find("fast_steps:fast").sha256 != first.sha256


def test_a_file_of_ones_own_and_one_beside_installed_packages_keep_their_checksums(packages, tmp_path):
    install(packages, "1.0")
    (packages / "loose.py").write_text(CODE)
    assert sources.installed_release(packages / "loose.py") is None
    assert sources.find("loose:fast").sha256 == hashlib.sha256(CODE.encode()).hexdigest()
    assert sources.installed_release(tmp_path / "mine.py") is None


@pytest.mark.parametrize("target", ["torch.optim.adam:Adam", "ebc_lab.config.own.sources:find"])
def test_versions_that_are_named_anyway_are_named_once(target):
    found = sources.find(target)
    assert found.sha256 == hashlib.sha256(found.path.read_bytes()).hexdigest()
