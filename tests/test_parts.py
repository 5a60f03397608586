"""A part is added by two files that mirror each other, and taken away by deleting what bears its name."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("pyproject.toml", "README.md", "CHANGELOG.md")
FOLDERS = (".vscode", "ebc_lab", "benchmarks", "conf", "dev", "examples", "scripts", "tests", "docs")

SETTINGS = '''"""Gradients that are halved."""

from __future__ import annotations

from dataclasses import dataclass

from ..fields import setting
from ..part import Figure, Head, Part


@dataclass
class HalvingConfig(Part):
    """Gradients that are halved."""

    name: str = setting("none", "whether they are", group="halving")
    times: int = setting(1, "how often", "times", low=1, high=9, only=("halved",))

    off = "none"
    words = {"halved": "halved gradients"}
    columns = {"halved": ("times", "how often this step's gradients were halved")}
    figures = (
        Figure("halved", "times", "of a step's gradients, median", Head("Halved", "halved"), of_steps=True),
    )
    table = "Halved gradients"
    note = "halved: how often"
'''
HOOK = '''"""Gradients that are halved."""

from __future__ import annotations

import torch
from torch import Tensor

from ebc_lab.config.parts.halving import HalvingConfig
from ebc_lab.config.schema import RunConfig

from .hook import Built, Hook


class Halving(Hook):
    columns = ("halved",)

    def __init__(self, run: RunConfig, built: Built):
        self.times = HalvingConfig.from_run(run).times
        self.model = built.model

    @classmethod
    def acts(cls, run: RunConfig) -> bool:
        return not HalvingConfig.from_run(run).changes_nothing()

    def gradients(self, t: int, loss: Tensor, lr: float) -> dict[str, Tensor]:
        for p in self.model.parameters():
            assert p.grad is not None
            p.grad *= 0.5**self.times
        return {"halved": torch.tensor(float(self.times))}


HOOK = Halving
'''
SHOWN = """
import json, sys
from pathlib import Path
sys.path[:0] = ["scripts", "tests"]
import settings_page
from support.called import answered, called
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part
from ebc_lab.config.identity import tail_of
from ebc_lab.records.columns import ABLATION_MEANINGS, FURTHER_STEP_MEANINGS
from ebc_lab.records.json_files import read_json
from ebc_lab.report.text import arms, words
from ebc_lab.study.stages.ablation import _figures
here, settings = Path.cwd(), sys.argv[1:]
answered("train", *settings, "stabilizer=none", "halving=halved", "halving.times=2", cwd=here)
[steps] = here.glob("outputs/**/steps.csv")
header, first, *_ = steps.read_text().splitlines()
refused = called("train", *settings, "halving.times=2", cwd=here)
config = compose(["scale=smoke", "halving=halved", "halving.times=2"], study=False)
result = read_json(steps.parent / "result.json")
arm = {"runs": {"0": "x"}, "roles": ["arm"], "track": "adam_none", "ebc": False, "lr_scale": 1.0}
arm["figures"] = _figures(arm, {"x": result})
table = arms.part_figures("t", {"arms": {"halved": arm}}, {"x": result})
print(json.dumps({
    "step": dict(zip(header.split(","), first.split(",")))["halved"],
    "name": tail_of(run_part(config)),
    "label": [*words.schedules("adam_none_halved")],
    "page": "`halving.times`" in settings_page.page(),
    "meaning": [FURTHER_STEP_MEANINGS["halved"], ABLATION_MEANINGS["halved"]],
    "figure": [result["halved"], arm["figures"]["halved"]],
    "table": [table.title, [c.title for c in table.columns if c.short == "halved"], "2" in table.texts()[0]],
    "refused": [refused.returncode, " ".join(refused.stderr.split())],
}))
"""


@pytest.fixture
def copy(tmp_path):
    """A copy of the tree, to change. Modules keep their times, so what was compiled of them stays valid."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so"))
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run_in(copy, *command):
    environment = os.environ | {"PYTHONPATH": str(copy)}
    asked = [sys.executable, *command]
    done = subprocess.run(asked, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_a_part_is_added_by_two_files_and_the_choices_of_its_folder(copy, tiny):
    (copy / "ebc_lab/config/parts/halving.py").write_text(SETTINGS)
    (copy / "ebc_lab/components/halving.py").write_text(HOOK)
    (copy / "conf/halving").mkdir()
    for name in ("none", "halved"):
        (copy / f"conf/halving/{name}.yaml").write_text(f"name: {name}\n")
    settings = [o for o in tiny if not o.startswith(("lr_s", "cal", "fin"))]
    shown = json.loads(run_in(copy, "-c", SHOWN, *settings).splitlines()[-1])
    assert shown["step"] == "2"
    assert (shown["name"], shown["label"], shown["figure"]) == ("_halved", ["halved gradients"], [2, 2])
    assert shown["page"]
    assert shown["meaning"][0] == ["times", "how often this step's gradients were halved"]
    assert shown["table"] == ["Halved gradients", ["Halved"], True]
    code, said = shown["refused"]
    assert code == 2
    assert "halving.times goes with halving=halved, not halving=none" in said


SHOCK = (  # its settings, what it does, its picture, its choices with the suite that has them; its tests
    *("ebc_lab/config/parts/shock.py", "ebc_lab/components/shock.py", "ebc_lab/report/pictures/shock.py"),
    *("conf/shock", "conf/study/shocks.yaml"),
    *("tests/config/parts/test_shock.py", "tests/components/test_shock.py"),
    "tests/report/pictures/test_shock.py",
)
LAYERS = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
TESTS = ("-m", "pytest", "-p", "no:cacheprovider", "-m")


@pytest.mark.slow
def test_a_part_is_taken_away_by_deleting_what_bears_its_name(copy):
    """Rules, types and tests are then as before, but for recorded studies, whose settings hold every part."""
    for name in SHOCK:
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run_in(copy, "-m", "ruff", "check", ".")
    run_in(copy, "-c", LAYERS)
    run_in(copy, "scripts/house.py")
    run_in(copy, "scripts/json_schemas.py", "--write")  # for editors, from the settings
    run_in(copy, "-m", "mypy")
    run_in(copy, *TESTS, "not slow and not cuda", "tests/training/test_run.py")
    rooms = ("config", "records", "report", "study/stages")
    quick = (*TESTS, "not thorough and not slow and not cuda", "-k", "not shock")
    run_in(copy, *quick, "--ignore=tests/report/test_golden.py", *(f"tests/{room}" for room in rooms))
