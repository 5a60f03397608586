"""The texts of docs/evidence/rate.yaml: `python dev/studies/rate_texts.py texts`, in the folder of the study.

Each is 1,000,000 characters, ASCII alone, of what comes with Python and with the lab's own dependencies: the
standard library's modules, torch's C++ headers, SciPy's docstrings. Pieces are in the order of
their SHA-256, so that the end of a text, which is held out, is like its beginning. Other versions give other
texts; the study's runs record which.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import scipy
import torch

SIZE = 1_000_000
LONG = 300  # characters of a docstring that is taken
HEADERS = Path(torch.__file__).parent / "include"
STDLIB = Path(sysconfig.get_path("stdlib"))


def whole(folder: Path, pattern: str) -> Iterator[str]:
    """The files of a folder."""
    for path in folder.glob(pattern):
        yield path.read_text("utf-8", errors="ignore")


def docstrings(folder: Path, pattern: str) -> Iterator[str]:
    """The longer docstrings of modules, not indented."""
    for path in folder.glob(pattern):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) > LONG:
                    yield text + "\n\n"


def text_of(pieces: Iterable[str]) -> str:
    """The pieces in the order of their SHA-256, cut at SIZE characters."""
    shuffled = sorted(set(pieces), key=lambda piece: hashlib.sha256(piece.encode()).hexdigest())
    return re.sub(r"[^\n\x20-\x7e]", "", "".join(shuffled).expandtabs(4))[:SIZE]


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "python": text_of(whole(STDLIB, "*.py")),
        "headers": text_of(whole(HEADERS, "ATen/**/*.h")),
        "docstrings": text_of(docstrings(Path(str(scipy.__file__)).parent, "*/*.py")),
    }
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="ascii")
        print(name, len(text), len(set(text)), hashlib.sha256(text.encode()).hexdigest())


if __name__ == "__main__":
    main()
