"""What is attacked, and the command line in this process: what it may answer, and what not."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .changes import MARKUP, Draw, Tree

ROOT = Path(__file__).parents[2]
READ, REFUSED = "read", "refused by a sentence"


class Wrong(Exception):
    """The program answered, and not as it should."""


class Overdue(BaseException):
    """The time of an input is over."""


class Target:
    """What is attacked. `make` returns real inputs; `attack` reads one of them, changed."""

    def make(self, folder: Path, more: Path | None) -> Any:
        raise NotImplementedError

    def begin(self, real: Any) -> None:
        self.real = real

    def attack(self, draw: Draw, folder: Path) -> str:
        """Write a changed input into `folder` and have it read there. -> READ or REFUSED; else it raises."""
        raise NotImplementedError


def ask(arguments: Sequence[str], folder: Path) -> str:
    """Call the command line in `folder`. -> whether it read or refused. Raises what it should not raise."""
    from support.called import called

    from ebc_lab.config.errors import HIDDEN

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        warnings.simplefilter("ignore", ResourceWarning)
        done = called(*arguments, cwd=folder)
    if told:
        where = told[0].filename.rpartition("site-packages/")[2].removeprefix(f"{ROOT}/")
        raise Wrong(f"a warning, {where}: {str(told[0].message)[:200]}")
    said = done.stdout + done.stderr
    checks = "verify" in arguments or "--replay" in arguments
    if done.returncode not in (0, 1, 2, *([4] if checks else [])):
        raise Wrong(f"exit code {done.returncode}")
    if "Traceback (most" in said:
        raise Wrong("a traceback is printed")
    if found := HIDDEN.search(said):
        raise Wrong(f"the control character {found[0]!r} is printed")
    if done.returncode == 2:
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        if len(lines) != 1 or not done.stderr.rstrip().splitlines()[-1].startswith("error: "):
            raise Wrong(f"no sentence, or several: {done.stderr[-300:]!r}")
        if len(lines[0]) > 6000:
            raise Wrong(f"a sentence of {len(lines[0])} characters: {lines[0][:100]}")
        return REFUSED
    if "--json" in arguments:
        json.loads(done.stdout, parse_constant=lambda word: (_ for _ in ()).throw(Wrong(f"{word} in JSON")))
    for page in folder.rglob("*.html"):
        if MARKUP in page.read_text(encoding="utf-8", errors="replace"):
            raise Wrong(f"markup of the input is in {page.name}")
    return READ


def write_tree(tree: Tree, folder: Path) -> None:
    for name, content in tree.items():
        path = folder / name
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def tree_of(folder: Path) -> Tree:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def module_of_tests(path: str) -> Any:
    """A file of tests, for what it writes."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "tests" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_text() -> str:
    draw = random.Random(0)
    words = "the cat sat on a mat and saw rain run down to sea under moon".split()  # noqa: SIM905
    return "".join(" ".join(draw.choices(words, k=6)) + ".\n" for _ in range(510))


SMALL = [
    *("scale=smoke", "data=path", "model.blocks=1", "model.width=16", "model.context=16", "batch_size=10"),
    *("budget.probe_sequences=2", "eval_every=10", "eval_windows=8", "device=cpu"),
]
SMALL_STUDY = [
    *("lr_sweep.steps=15", "lr_sweep.grids.adam=[1e-2,2e-2,4e-2]", "lr_sweep.max_extensions=0"),
    *("calibrate.max_extra=1", "finals.steps=25", "launcher=inline", "study.name=done"),
]


def small_study(folder: Path) -> Path:
    """A study that is trained in `folder`, whole."""
    from support.called import answered

    (folder / "words.txt").write_text(small_text())
    given = [*SMALL, "data.file=words.txt", *SMALL_STUDY, f"output_dir={folder / 'outputs'}"]
    answered("autopilot", *given, cwd=folder)
    return folder / "outputs" / "done"
