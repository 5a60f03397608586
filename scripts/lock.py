"""constraints.txt, the lock: the version of every package that `.[dev]` needs, directly or through others.

usage: python scripts/lock.py --check    says what is missing from it, different here, or no longer needed
       python scripts/lock.py --write    writes what is installed here, which `make lock` has upgraded

It holds versions and no hashes: a hash is that of one file of one index, and of torch indexes have different
builds. What is needed depends on the Python: it is written and checked under the oldest that we support.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "constraints.txt"
PYTHON = (3, 11)
TOP = "# What `make` installs, tried together: all that .[dev] needs under Python {}.{} (scripts/lock.py).\n"
OF_CUDA = re.compile(r"cuda-|nvidia-|triton$")  # which a build of torch for GPUs brings


@dataclass
class Package:
    """An installed package that is needed, and the names of those that it needs."""

    distribution: Distribution
    requires: set[str] = field(default_factory=set)
    extras: set[str] = field(default_factory=set)  # of its own, that somebody asks for


def needed(required: Iterable[str]) -> dict[str, Package]:
    """Find the installed packages that requirements name, and all that those require in turn, by name.

    Raises PackageNotFoundError."""
    found: dict[str, Package] = {}
    waiting: list[tuple[str, str, Package | None]] = [(line, "", None) for line in required]
    for line, extra, by in waiting:  # which grows
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        package = found.get(name) or found.setdefault(name, Package(distribution(name)))
        if by is not None:
            by.requires.add(name)
        for more in {"", *requirement.extras} - package.extras:
            package.extras.add(more)
            waiting += [(further, more, package) for further in package.distribution.requires or []]
    return found


def written() -> str:
    """Return the lock as it would be written here. Raises PackageNotFoundError."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    packages = needed(line for line in asked if not line.startswith(f"{project['name']}["))
    versions = {name: Version(package.distribution.version).public for name, package in packages.items()}
    lines = [f"{name}=={versions[name]}\n" for name in sorted(versions) if not OF_CUDA.match(name)]
    return "".join([TOP.format(*PYTHON), *lines])


def differences() -> list[str]:
    """Return what is not as the lock says, a line each."""
    try:
        now = set(written().splitlines())
    except PackageNotFoundError as error:
        return [f"{error.name} is needed and not installed: make .venv/installed-dev"]
    locked = set(LOCK.read_text(encoding="utf-8").splitlines())
    return [f"+ {line}" for line in sorted(now - locked)] + [f"- {line}" for line in sorted(locked - now)]


if __name__ == "__main__":
    if sys.version_info[:2] != PYTHON:
        print("constraints.txt is checked and written under Python {}.{} alone".format(*PYTHON))
        sys.exit(sys.argv[1:] == ["--write"])
    if sys.argv[1:] == ["--write"]:
        LOCK.write_text(written(), encoding="utf-8")
    elif wrong := differences():
        print("\n".join(["constraints.txt is not what is needed (make lock renews it):", *wrong]))
        sys.exit(1)
