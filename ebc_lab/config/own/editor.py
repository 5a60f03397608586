"""The JSON schema with which editors check a suite: this version's, with the choices of installed packages.

`scripts/json_schemas.py` writes the files in `config/schemas` from the settings.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..choices import OFFERED, offered

FOLDER = Path(__file__).parent.parent / "schemas"
FILE = "ebc-lab.schema.json"  # written beside a suite
NAMES_OF = "choices_of_{}"  # key of the schema's definition of a group's choices


def suite_schema() -> str:
    """Return the JSON schema of a suite as text, including the choices that installed packages offer."""
    schema = json.loads((FOLDER / "suite.json").read_text(encoding="utf-8"))
    for group in OFFERED:
        names = schema["definitions"][NAMES_OF.format(group)]["enum"]
        names += [name for name in offered().get(group, ()) if name not in names]
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
