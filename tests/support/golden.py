"""Texts in the repository, each beside the tests that compare it with what is shown now.

`WRITE_GOLDEN=1 pytest -m "" FILES` writes those anew that these tests compare: read their diff, which is what
a reader sees otherwise.
"""

import difflib
import os
import re
from pathlib import Path

WRITE = "WRITE_GOLDEN"  # in the environment: write the texts instead of comparing them
MOST_SHOWN = 60  # lines of a difference


def assert_golden(path: Path, text: str, *replaced: tuple[str, str]) -> None:
    """`text` is what `path` holds, once each pattern of `replaced`, which differs by machine, is its word."""
    for pattern, word in replaced:
        text = re.sub(pattern, word, text)
    now = [line.rstrip() for line in text.rstrip().splitlines()]
    if WRITE in os.environ:
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in now), encoding="utf-8")
    recorded = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if now != recorded:
        shown = "\n".join([*difflib.unified_diff(recorded, now, "recorded", "now", n=1)][:MOST_SHOWN])
        raise AssertionError(f"{path.name} is otherwise; {WRITE}=1 writes it anew, if it may be:\n{shown}")
