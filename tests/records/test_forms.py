"""Every type hint that the package checks a file against, found in its source and walked whole."""

import ast
import importlib
from pathlib import Path

import house

from ebc_lab.bench.speeds import Choice
from ebc_lab.config.kinds import check_form
from ebc_lab.config.schema import Config, RunConfig
from ebc_lab.records.figures import RunResult
from ebc_lab.records.paths import SpecRecord

ROOT = Path(__file__).parent.parent.parent
TAKES = {  # function -> the number of the argument that is a form, and its name
    "read_json": (1, "kind"),
    "read_checksummed": (2, "kind"),
    "misfit": (1, "kind"),
    "MeasurementCache": (3, "form"),
    "from_dict": (0, "cls"),
}
LOCAL = {  # (module, expression) -> what a form stands for that only the running code knows
    ("ebc_lab.config.dicts", "cls"): [RunConfig, Config],  # handed on: each call of from_dict is found itself
    ("ebc_lab.records.json_files", "kind"): [],  # handed on, as is the next
    ("ebc_lab.records.cache", "self.form"): [],
    ("ebc_lab.cli.commands", "Config"): [Config],
    ("ebc_lab.report.pictures.curves", "kind"): [SpecRecord, RunResult],
}


def declared():
    """(module, line, expression) of every form that is given to a reader."""
    for module, path in house.modules(ROOT).items():
        for node in ast.walk(house.parsed(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            function = getattr(node.func, "attr", getattr(node.func, "id", ""))
            place, name = TAKES.get(function, (0, ""))
            given = [word.value for word in node.keywords if word.arg == name] or node.args[place : place + 1]
            if name and given:
                yield module, node.lineno, ast.unparse(given[0])


def test_every_form_can_be_checked():
    forms, local, unchecked = [], set(), {}
    for module, line, expression in declared():
        try:
            named = [eval(expression, vars(importlib.import_module(module)))]
        except NameError:
            local.add((module, expression))
            named = LOCAL.get((module, expression), [])
        for form in named:
            forms.append(form)
            try:
                check_form(form)
            except TypeError as error:
                unchecked[f"{module}, line {line}"] = str(error)
    assert unchecked == {}
    assert local == set(LOCAL), "LOCAL says what each stands for, and nothing else"
    assert {Choice, Config, SpecRecord} <= {form for form in forms if isinstance(form, type)}
