#!/usr/bin/env bash
# In a group of rich's renderables, what follows a progress bar begins on the bar's own line.
#
# Guess: Group puts each of its parts on lines of its own, as it does with texts, tables and rules.
# Seen, rich 15.0.0: ProgressBar yields its segments without a line at their end, and Group adds none; in a cell of a
# table, where bars usually stand, that does not show. A Text or a Table behind the bar begins right of it.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check rich==15.0.0
"$place/venv/bin/python" - <<'PYTHON'
import io
from importlib.metadata import version

from rich.console import Console, Group
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.text import Text

print("rich", version("rich"))


def shown(first):
    out = io.StringIO()
    Console(file=out, width=20).print(Group(first, Text("next")))
    print(type(first).__name__, repr(out.getvalue()))
    return len(out.getvalue().splitlines())


assert shown(Text("text")) == 2
assert shown(Rule()) == 2
assert shown(ProgressBar(total=2, completed=1, width=10)) == 1
PYTHON
