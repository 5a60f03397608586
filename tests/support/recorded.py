"""What the recorded studies of docs/evidence decided."""

import json
import zipfile
from pathlib import Path
from typing import Any

EVIDENCE = Path(__file__).parents[2] / "docs/evidence"


def read_decisions(name: str) -> dict[str, Any]:
    """Return the decisions of a recorded study, by stage."""
    with zipfile.ZipFile(EVIDENCE / f"{name}.zip") as bundle:
        decisions: dict[str, Any] = json.loads(bundle.read("auto_decisions.json"))
    return decisions
