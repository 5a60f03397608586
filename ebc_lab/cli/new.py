"""`ebc-lab new NAME`: a suite, an optimizer and its test to begin with, in the working folder."""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template

from ebc_lab.config.choices import groups
from ebc_lab.config.errors import require, shown
from ebc_lab.config.own.editor import FILE, suite_schema

NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")
STARTER = Path(__file__).parent / "starter"


def new(name: str, folder: Path) -> tuple[list[str], list[str]]:
    """Write NAME.yaml, NAME_optimizer.py and test_NAME.py. -> their names, and the commands that come next.

    Raises UserError for a name that means something else, and where one of the files is there already.
    """
    made = "".join(map(str.capitalize, name.split("_")))
    require(
        bool(NAME.fullmatch(name)) and not keyword.iskeyword(made),
        f"{shown(name)} cannot be a name in Python: take small letters, digits and _, such as cautious.",
    )
    require(
        name not in (*groups()["optimizer"], *groups()["study"]),
        f"{name} is ebc-lab's own already: take another name, such as my_{name}.",
    )
    templates = {
        f"{name}.yaml": "suite.yaml.template",
        f"{name}_optimizer.py": "optimizer.py.template",
        f"test_{name}.py": "test.py.template",
    }
    for file in templates:
        require(
            not (folder / file).exists(), f"{file} is there already: choose another name, or move it away."
        )
    for file, template in templates.items():
        text = Template((STARTER / template).read_text(encoding="utf-8"))
        whole = text.substitute(name=name, file=f"{name}_optimizer", made=made)
        (folder / file).write_text(whole, encoding="utf-8")
    commands = [
        f"python test_{name}.py",
        f"ebc-lab autopilot study=./{name}.yaml scale=smoke",
        f"ebc-lab plan study=./{name}.yaml",
        f"ebc-lab autopilot study=./{name}.yaml",
    ]
    return list(templates), commands


def write_schema(folder: Path) -> str:
    """Write what an editor checks suites against, of this version. -> the line by which a suite names it.

    `new` writes neither: the path of an installed package would be another on every machine, and would enter
    the copies of the suite that studies keep.
    """
    (folder / FILE).write_text(suite_schema(), encoding="utf-8")
    return f"# yaml-language-server: $schema=./{FILE}"
