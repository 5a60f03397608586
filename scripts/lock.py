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
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "constraints.txt"
PYTHON = (3, 11)
TOP = "# What `make` installs, tried together: all that .[dev] needs under Python {}.{} (scripts/lock.py).\n"
OF_CUDA = re.compile(r"cuda-|nvidia-|triton$")  # which a build of torch for GPUs brings


def required() -> list[Requirement]:
    """What pyproject.toml asks for, its extras resolved."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    waiting = [Requirement(line) for line in (*project["dependencies"], *extras["dev"])]
    found = []
    for requirement in waiting:  # which grows
        if canonicalize_name(requirement.name) == project["name"]:
            waiting += [Requirement(line) for extra in sorted(requirement.extras) for line in extras[extra]]
        else:
            found.append(requirement)
    return found


def needed() -> dict[str, str]:
    """The installed version of each package that is needed. Raises PackageNotFoundError."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = required()
    for requirement in waiting:  # which grows
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            package = distribution(name)
            found[name] = Version(package.version).public
            further = [Requirement(line) for line in package.requires or []]
            waiting += [one for one in further if _applies(one, extra)]
    return found


def _applies(requirement: Requirement, extra: str) -> bool:
    if OF_CUDA.match(requirement.name):
        return False
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def written(versions: dict[str, str]) -> str:
    lines = [f"{name}=={versions[name]}\n" for name in sorted(versions)]
    return "".join([TOP.format(*PYTHON), *lines])


def differences() -> list[str]:
    """What is not as the lock says, a line each."""
    try:
        now = set(written(needed()).splitlines())
    except PackageNotFoundError as error:
        return [f"{error.name} is needed and not installed: make .venv/installed-dev"]
    locked = set(LOCK.read_text(encoding="utf-8").splitlines())
    return [f"+ {line}" for line in sorted(now - locked)] + [f"- {line}" for line in sorted(locked - now)]


if __name__ == "__main__":
    if sys.version_info[:2] != PYTHON:
        print("constraints.txt is checked and written under Python {}.{} alone".format(*PYTHON))
        sys.exit(sys.argv[1:] == ["--write"])
    if sys.argv[1:] == ["--write"]:
        LOCK.write_text(written(needed()), encoding="utf-8")
    elif wrong := differences():
        print("\n".join(["constraints.txt is not what is needed (make lock renews it):", *wrong]))
        sys.exit(1)
