"""Texts in the repository, each beside the test that compares it with what is printed now."""

import os
import re
from pathlib import Path

WRITE = "WRITE_GOLDEN"  # in the environment: write the texts instead of comparing them


def assert_golden(path: Path, text: str, *replaced: tuple[str, str]) -> None:
    """`text` is what `path` holds, once each pattern of `replaced`, which differs by machine, is its word."""
    for pattern, word in replaced:
        text = re.sub(pattern, word, text)
    text = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    if WRITE in os.environ:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), (
        f"{path.name}: {WRITE}=1 writes it anew, if it may change"
    )
