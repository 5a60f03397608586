"""The texts of docs/evidence/rate.yaml: `python dev/studies/rate_texts.py FOLDER`.

Each is the first 1,000,000 characters, ASCII alone, of files that come with Python and with the lab's own
dependencies, in alphabetical order: modules of the standard library, torch's C++ headers, and the docstrings
of SciPy and torch. Other versions give other texts; the study's runs record their SHA-256.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import scipy
import torch

SIZE = 1_000_000
STDLIB = Path(sysconfig.get_path("stdlib"))
HEADERS = Path(torch.__file__).parent / "include"
PACKAGES = [Path(package.__file__).parent for package in (scipy, torch)]


def whole(folder: Path, pattern: str) -> Iterator[str]:
    """The files of a folder."""
    for path in sorted(folder.glob(pattern)):
        yield path.read_text("utf-8", errors="ignore")


def docstrings(folder: Path) -> Iterator[str]:
    """The longer docstrings of a package's modules, not indented."""
    for path in sorted(folder.rglob("*.py")):
        if "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) > 300:
                    yield text + "\n\n"


def ascii_of(parts: Iterator[str]) -> str:
    """The leading SIZE characters of the parts together."""
    made = ""
    for part in parts:
        made += re.sub(r"[^\n\x20-\x7e]", "", part.expandtabs(4))
        if len(made) >= SIZE:
            break
    return made[:SIZE]


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    scipys, torchs = (docstrings(package) for package in PACKAGES)
    half = SIZE // 2
    texts = {
        "python": ascii_of(whole(STDLIB, "*.py")),
        "headers": ascii_of(whole(HEADERS, "ATen/**/*.h")),
        "docstrings": ascii_of(scipys)[:half] + ascii_of(torchs)[:half],
    }
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="ascii")
        print(name, len(text), hashlib.sha256(text.encode()).hexdigest())


if __name__ == "__main__":
    main()
