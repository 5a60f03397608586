"""What an editor checks a suite against: the JSON schema of this version, with what is installed here.

`scripts/json_schemas.py` makes the files in `config/schemas` from the settings.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..choices import OFFERED, offered

FOLDER = Path(__file__).parent.parent / "schemas"
FILE = "ebc-lab.schema.json"  # beside a suite
NAMES_OF = "choices_of_{}"  # the definition with the names of a group


def suite_schema() -> str:
    """Return the JSON schema of a suite, in which the choices that installed packages offer are choices
    too."""
    schema = json.loads((FOLDER / "suite.json").read_text(encoding="utf-8"))
    for group in OFFERED:
        names = schema["definitions"][NAMES_OF.format(group)]["enum"]
        names += [name for name in offered(group) if name not in names]
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
