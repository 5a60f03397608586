"""The wheel and the sdist, built, installed in clean environments and used there. `make package` calls it.

usage: python scripts/package.py [DIST]    the folder that the two files are built in, `dist` if left out

They are built twice, in other folders, from files of other dates and modes, and must be the same bytes.

An environment is clean: it holds the built package and links to the packages that it declares as required, to
what those require, and to nothing else of this interpreter's. So an undeclared import fails, and gigabytes of
torch need not be copied. The environment of the method alone has torch and what torch requires.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import venv
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PathDistribution, packages_distributions
from pathlib import Path

import lock
import sbom
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "package"  # always here, so that mypy's cache holds from one call to the next
METHOD = ROOT / "examples" / "method_alone.py"
MISSING = """
import importlib, pkgutil, ebc_lab
for module in pkgutil.walk_packages(ebc_lab.__path__, "ebc_lab."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            print(error.name.partition(".")[0])
        except ImportError as error:
            assert "pip install 'ebc-lab[" in str(error), error
"""
README = (ROOT / "README.md").read_text(encoding="utf-8")
# of a directive of the site, ```{toctree}, or a cell of the notebook, its name is the language
FENCE = re.compile(r"^```([\w{}-]*).*?\n(.*?)^```", re.MULTILINE | re.DOTALL)
STEPS = 20  # of each run of the README's studies below
# as little of a study as still tunes, compares and answers
SHORT = (
    *("scale=smoke", "data=pydoc", "device=cpu", "seeds=[0,1]"),
    *("tune.seeds=1", "tune.finalists=0", "tune.max_extensions=0", "tune.window=false"),
    *("lr_sweep.steps=10", *(f"{stage}.steps={STEPS}" for stage in ("finals", "tune", "ablation"))),
)
SHOWN = f"""
import sys, ebc_lab
study = ebc_lab.load("cautious_smoke")
assert len(study.steps(arm="cautious", seed=0)) == {STEPS}
assert set(study.arms().arm) >= {{"adamw", "muon", "cautious"}}, study.arms()
assert "torch" not in sys.modules
print(study.answer)
"""
PLACES = "import ebc_lab, ebc_lab.config.choices as c; print(ebc_lab.__file__, c.conf_dir(), sep='\\n')"


def run(command: Sequence[str | Path], cwd: Path, *, umask: int = -1, **more: str) -> str:
    """What a command prints, with `more` in its environment; where it fails, that ends this script."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "EBC_LAB_DATA")
    own = {"XDG_CACHE_HOME": str(WORK / "cache"), "XDG_STATE_HOME": str(WORK / "state")}
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | own | more
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        umask=umask,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\nFAILED with {done.returncode}: {' '.join(map(str, command))}")
    return done.stdout


# -- environments --------------------------------------------------------------------------------------------


class Environment:
    """A virtual environment without pip, in a folder of its own."""

    def __init__(self, name: str):
        self.folder = WORK / name
        venv.create(self.folder, with_pip=False)
        self.bin = self.folder / "bin"
        [self.packages] = (self.folder / "lib").glob("python*/site-packages")
        self.elsewhere = WORK / f"{name}-elsewhere"  # where its commands run
        self.elsewhere.mkdir()

    def link(self, required: Iterable[str]) -> None:
        """Make the packages that requirements name importable, and what those require."""
        for package in lock.needed(required).values():
            found = package.distribution
            for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
                if not (self.packages / top).exists():
                    (self.packages / top).symlink_to(Path(str(found.locate_file(top))))

    def install(self, built: Path) -> PathDistribution:
        """Install a wheel or an sdist without what it requires. -> its metadata"""
        pip = (sys.executable, "-m", "pip", "--python", self.bin / "python")
        quick = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile")
        run([*pip, "install", *quick, built], ROOT)
        [info] = self.packages.glob("ebc_lab-*.dist-info")
        return PathDistribution(info)

    def run(self, *command: str | Path) -> str:
        """What a command of this environment prints, run outside the source tree's folders."""
        return run([self.bin / command[0], *command[1:]], self.elsewhere)


# -- how they are built --------------------------------------------------------------------------------------


class Builder:
    """`python -m build`, with what pyproject.toml asks for to build, and with dates that are the commit's."""

    def __init__(self) -> None:
        self.there = Environment("builder")
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        pip = (sys.executable, "-m", "pip", "--python", self.there.bin / "python", "install")
        run([*pip, "--quiet", "--disable-pip-version-check", *project["build-system"]["requires"]], ROOT)
        self.there.link(["build"])
        self.date = source_date()

    def build(self, source: Path, into: Path, *kinds: str, umask: int = -1) -> list[Path]:
        """Build the sdist and the wheel from it, or the `kinds` named. -> the files, the sdist first"""
        python = (self.there.bin / "python", "-m", "build", "--no-isolation")
        run([*python, *kinds, "--outdir", into, source], ROOT, umask=umask, SOURCE_DATE_EPOCH=self.date)
        return sorted(into.glob("ebc_lab-*"), key=lambda path: path.suffix)


def source_date() -> str:
    """The time of the last commit, in seconds; in an unpacked sdist its files have it."""
    if (ROOT / ".git").exists():
        return run(["git", "log", "-1", "--format=%ct"], ROOT).strip()
    return str(int((ROOT / "pyproject.toml").stat().st_mtime))


def unpacked(sdist: Path, into: Path) -> Path:
    """The folder that an sdist holds."""
    with tarfile.open(sdist) as archive:
        archive.extractall(into, filter="data")
    [folder] = into.iterdir()
    return folder


def built_twice(dist: Path) -> tuple[Path, Path]:
    """Build both from what belongs in an sdist, with the bill of materials, and once more from a copy whose
    files are new and nobody else's to read. -> the wheel, the sdist"""
    builder = Builder()
    [plain] = builder.build(ROOT, WORK / "plain", "--sdist")
    first, again = unpacked(plain, WORK / "tree"), unpacked(plain, WORK / "another" / "tree")
    bill = sbom.sbom()
    for folder in (first, again):
        (folder / sbom.NAME).write_text(bill, encoding="utf-8")
    for path in again.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)
        os.utime(path)
    sdist, wheel = builder.build(first, dist)
    for one, other in zip((sdist, wheel), builder.build(again, WORK / "again", umask=0o077), strict=True):
        if not filecmp.cmp(one, other, shallow=False):
            sys.exit(f"{one} and {other}, built from the same files, differ: diffoscope says where")
    with tarfile.open(sdist) as archive:
        assert any(name.endswith(f"/{sbom.NAME}") for name in archive.getnames())
    return wheel, sdist


# -- what must hold ------------------------------------------------------------------------------------------


def method_alone(wheel: Path) -> None:
    """The method trains, and its types hold, beside torch alone."""
    there = Environment("method")
    there.link(["torch"])
    there.install(wheel)
    print(there.run("python", METHOD).strip())
    mypy = (sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml")
    places = ("--cache-dir", ROOT / ".mypy_cache" / "package", "--python-executable", there.bin / "python")
    print(run([*mypy, *places, METHOD], there.elsewhere).strip())


def lab(wheel: Path) -> dict[str, str]:
    """The lab works with the packages that it declares. -> the hash of each installed file"""
    there = Environment("lab")
    metadata = there.install(wheel)
    assert set(hashes(metadata)) == ours(), set(hashes(metadata)) ^ ours()
    there.link(metadata.requires or [])
    run([sys.executable, "-m", "pip", "--python", there.bin / "python", "check"], ROOT)
    declared = {
        canonicalize_name(Requirement(line).name) for line in metadata.requires or []
    }  # by extras too
    owners = packages_distributions()
    for missing in set(there.run("python", "-W", "ignore", "-c", MISSING).split()):
        assert any(canonicalize_name(owner) in declared for owner in owners.get(missing, [])), missing
    for place in there.run("python", "-c", PLACES).split():
        assert Path(place).is_relative_to(there.packages), place
    assert there.run("ebc-lab", "--version").split() == ["ebc-lab", metadata.version]
    assert "autopilot" in there.run("ebc-lab", "--help")
    there.run("ebc-lab", "train", "scale=smoke", "steps=3", "data=pydoc", "device=cpu")
    assert list(there.elsewhere.rglob("result.json"))
    return hashes(metadata)


def as_the_readme_says() -> None:
    """An empty environment, an empty folder, and every command of the README, its studies shortened."""
    there = Environment("readme")
    programs = ("pip", "make", "ebc-lab")
    blocks = [body for language, body in FENCE.findall(README) if not language]
    lines = [line.partition(" #")[0].strip() for body in blocks for line in body.splitlines()]
    lines = [line.partition(" && ")[0] for line in lines if line.split(" ")[0] in programs]
    assert {line.split(" ")[0] for line in lines} == set(programs)
    for line in lines:
        program, *words = shlex.split(line)
        if program == "pip":
            assert words == ["install", "."]
            metadata = there.install(ROOT)
            there.link([*(metadata.requires or []), *("pytest", "pytest-xdist", "hypothesis")])
        elif program == "make":
            make(words[0], there)
        else:
            there.run(program, *words, *(shorter(words) if words[0] == "autopilot" else ()))
    for test in (["test_cautious.py"], ["-m", "pytest", "-q", "test_cautious.py"]):
        print(there.run("python", *test).strip())
    print(there.run("python", "-c", SHOWN).strip())


def shorter(given: Sequence[str] = ()) -> list[str]:
    """Settings that make a study small, but for those that are given."""
    names = {word.partition("=")[0] for word in given}
    return [setting for setting in SHORT if setting.partition("=")[0] not in names]


def make(target: str, there: Environment) -> None:
    """A target of the Makefile, with the commands of an environment that is installed already."""
    results = f"output_dir={there.elsewhere / 'outputs/ebc_ablation'}"
    arguments = {"autopilot": " ".join([*shorter(), results]), "test": "tests/records/test_json_files.py"}
    installed = [word for mark in ("installed", "installed-dev") for word in ("-o", f".venv/{mark}")]
    given = [f"BIN={there.bin}", f"ARGS={arguments.get(target, '')}"]
    run(["make", *installed, target, *given], ROOT)


def from_source(sdist: Path, as_wheel: dict[str, str]) -> None:
    """The sdist installs the same files as the wheel, and brings tests that pass on them."""
    there = Environment("source")
    metadata = there.install(sdist)
    assert hashes(metadata) == as_wheel
    there.link([*(metadata.requires or []), "pytest", "hypothesis"])
    folder = unpacked(sdist, there.elsewhere)
    packed = {str(path.relative_to(folder)) for path in (folder / "tests").rglob("*.py")}
    assert packed == {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")}
    shutil.rmtree(folder / "ebc_lab")  # the installed one is tested
    print(run([there.bin / "python", "-m", "pytest", "tests/ebc/test_grouping.py"], folder).strip())


def hashes(metadata: PathDistribution) -> dict[str, str]:
    """Each installed file of the package and its hash, as pip has recorded it."""
    files = metadata.files or []
    return {str(f): f.hash.value for f in files if f.hash and f.parts[0] == "ebc_lab"}


def ours() -> set[str]:
    """The files that an installed package consists of."""
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "ebc_lab").rglob("*") if path.is_file()}
    settings = {f"ebc_lab/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    cases = {f"ebc_lab/lowbit/benchmarks/{path.name}" for path in (ROOT / "benchmarks/lowbit").glob("*.py")}
    return {path for path in package if "__pycache__" not in path} | settings | cases


def main() -> None:
    start = time.perf_counter()
    dist = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist").resolve()
    shutil.rmtree(WORK, ignore_errors=True)
    for earlier in [*dist.glob("ebc_lab-*.whl"), *dist.glob("ebc_lab-*.tar.gz")]:
        earlier.unlink()
    WORK.mkdir(parents=True)
    wheel, sdist = built_twice(dist)
    with ThreadPoolExecutor() as beside:
        others = [beside.submit(method_alone, wheel), beside.submit(as_the_readme_says)]
        from_source(sdist, lab(wheel))
        for other in others:
            other.result()
    shutil.rmtree(WORK)
    for file in (wheel, sdist):
        print(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}")
    print(f"{wheel.name} and {sdist.name} hold what they promise ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
