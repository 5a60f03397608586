"""The wheel under several Pythons with the torch of constraints.txt, and with older and newer packages.

`make test-matrix` runs this by nox, which skips a Python that is not on this machine. In each environment a
study runs at smoke scale from an empty folder, and then the tests of `TESTS`.

environment: PYTHONS      the Pythons, oldest first: python3.11 python3.12 python3.13 python3.14 if unset
             TORCH_INDEX  where torch comes from, such as https://download.pytorch.org/whl/cpu: one from PyPI
                          brings gigabytes of CUDA on Linux
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import nox

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "matrix"
PYTHONS = os.environ.get("PYTHONS", "python3.11 python3.12 python3.13 python3.14").split()
# torch that pyproject.toml allows, and torchao, which goes with few of its versions each
OLDEST = dict(
    re.findall(r'"(torch|torchao)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
)
INDEX = ["--index-url", os.environ["TORCH_INDEX"]] if "TORCH_INDEX" in os.environ else []
STUDY = ("scale=smoke", "data=pydoc", "device=cpu", "study.name=first")
# what breaks first: the method against its reference, settings, files, results, and a run's golden figures
# and Verity's bits, which are those of every torch
TESTS = (
    *("tests/ebc", "tests/config", "tests/records", "tests/results", "tests/training/test_golden.py"),
    "tests/verity",
)
# of those, what reads the package's source, which is not there, and what several processes train for minutes
NOT_HERE = (
    "tests/records/test_forms.py",
    "tests/config/own/test_editor.py",
    "tests/ebc/parallel",
    "tests/verity/test_source.py",
    "tests/config/test_kinds.py::test_every_typed_dict_of_the_package_can_be_checked",
)
LEFT_OUT = (
    "not slow and not slurm and not nodes and not cuda and not browser and not emulated and not hypothesis"
)

nox.options.envdir = str(WORK / "environments")
nox.options.default_venv_backend = "venv"


@nox.session(venv_backend="none")
def build(session: nox.Session) -> None:
    """Build the wheel, and unpack the tests without the package and conf/: those installed are tested."""
    for folder in (WORK / "dist", WORK / "source"):
        shutil.rmtree(folder, ignore_errors=True)
    session.run(sys.executable, "-m", "build", "--outdir", str(WORK / "dist"), str(ROOT), silent=True)
    [sdist] = (WORK / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(WORK / "source", filter="data")
    [source] = (WORK / "source").iterdir()
    shutil.rmtree(source / "ebc_lab")
    shutil.rmtree(source / "conf")  # choices of one's own there, since it is not the installed one's


@nox.session(python=PYTHONS, requires=["build"])
def pinned(session: nox.Session) -> None:
    """The torch of constraints.txt."""
    use_and_test(session)


@nox.session(python=PYTHONS[0], requires=["build"])
def oldest(session: nox.Session) -> None:
    """The oldest torch that is allowed."""
    use_and_test(session, instead=OLDEST)


@nox.session(python=PYTHONS[-1], requires=["build"])
def newest(session: nox.Session) -> None:
    """The newest torch that the index offers."""
    use_and_test(session, "torch")


@nox.session(python=PYTHONS[-1], requires=["build"])
def candidates(session: nox.Session) -> None:
    """The newest hydra-core and omegaconf, release candidates too: a run must keep its name."""
    use_and_test(session, "hydra-core", "omegaconf", tests=("tests/config",))


def use_and_test(
    session: nox.Session, *newer: str, instead: Mapping[str, str] | None = None, tests: Sequence[str] = TESTS
) -> None:
    """Install the wheel with the locked packages, but `newer` as new as there is, and `instead` in these
    versions; run a study and `tests`."""
    [wheel] = (WORK / "dist").glob("*.whl")
    [source] = (WORK / "source").iterdir()
    locked = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    other = instead or {}
    kept = [line for line in locked if line.partition("==")[0] not in (*newer, *other)]
    others = Path(session.create_tmp()) / "constraints.txt"
    others.write_text("\n".join(kept + [f"{name}=={version}" for name, version in other.items()]), "utf-8")
    session.install("--no-compile", "-c", str(others), *INDEX, "torch")
    session.install("--no-compile", "-c", str(others), f"{wheel}[dev]")
    if newer and "torch" not in newer:
        session.install("--no-compile", "-c", str(others), "--upgrade", "--pre", *newer)

    empty = Path(session.create_tmp()) / "empty"
    shutil.rmtree(empty, ignore_errors=True)
    empty.mkdir()
    session.env.update(XDG_CACHE_HOME=str(empty / "cache"), XDG_STATE_HOME=str(empty / "state"))
    for name in ("PYTHONPATH", "EBC_LAB_DATA"):
        session.env[name] = None
    session.chdir(empty)
    session.run("ebc-lab", "autopilot", *STUDY)
    session.run("ebc-lab", "verify", "first")
    session.chdir(source)
    left_out = [f"--deselect={path}" for path in NOT_HERE]
    session.run("python", "-m", "pytest", "-n", "2", "-m", LEFT_OUT, *left_out, *tests)
