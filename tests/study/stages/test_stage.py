"""A stage is one object: a new one needs a module, a dataclass and its numbers, and no other edit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ebc_lab
from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.config.own.files import conf_dir
from ebc_lab.study.stages.stage import planned_runs

MODULE = """
from .rules import best, make_decision, val_loss
from .runs import plain_run, scheduled, spec_of, tracks_of
from .stage import Choice, Figure


class WarmUp(Choice):
    name = "warm_up"
    title = "The toy stage"
    figures = (Figure("warmup_steps", "steps of warm-up"),)

    def runs(self, config, earlier, results):
        specs = []
        for name in tracks_of(earlier, "warm_up"):
            track = earlier["lr_sweep"]["tracks"][name]
            run = plain_run(config, track, config.warm_up.steps, config.study.stage_seed, 1.0)
            for steps in config.warm_up.choices:
                warmed = scheduled(run, "trapezoid", steps)
                specs.append(spec_of("warm_up", f"{steps} steps", warmed, 1.0, f"_w{steps}"))
        return specs

    def decide(self, config, specs, results, earlier):
        winner = best(specs, results)
        track = {
            "warmup_steps": winner.run.lr_schedule.warmup_steps,
            "run_id": winner.run_id,
            "val_loss": val_loss(results[winner.run_id]),
            "ranked": [s.run_id for s in specs],
            "margin_sigma": 1.0,
            "sigma": 0.01,
        }
        of_all = {"tracks": {"adam_none": track}, "notes": []}
        return make_decision("warm_up", "lowest loss", config, specs, results, earlier, **of_all)

    def headline(self, track):
        return f"{track['warmup_steps']} steps of warm-up"


STAGE = WarmUp()
"""
SETTINGS = """@dataclass
class WarmUpConfig(StageConfig):
    needs = ("lr_sweep",)
    choices: list[int] = field(default_factory=list)  # steps of warm-up


"""
FIELD = "    warm_up: WarmUpConfig = field(default_factory=WarmUpConfig)\n"
SCRIPT = """
import json, sys
from ebc_lab.config.compose import compose
from ebc_lab.report.conclude import concluding
from ebc_lab.study.autopilot import autopilot
from ebc_lab.study.inspect import forecast, status, why
from ebc_lab.study.store import replay

config = compose(sys.argv[1:])
planned = forecast.planned(config)["stages"]["warm_up"]["expected"]["runs"]
study = autopilot(config, concluding()).study
told = why.why(study, "warm_up")["warm_up"]["headline"]
print(json.dumps([planned, status.status(study)["stages"][-1], told, replay.replay(study)["same"]]))
"""


def test_a_new_stage_is_planned_trained_decided_explained_and_shown(tiny, tmp_path):
    """In a copy of the program that has one stage more."""
    package = tmp_path / "ebc_lab"
    shutil.copytree(Path(ebc_lab.__file__).parent, package)
    shutil.copytree(conf_dir(), tmp_path / "conf", dirs_exist_ok=True)
    (package / "study" / "stages" / "warm_up.py").write_text(MODULE)
    schema = package / "config" / "schema.py"
    before, head, after = schema.read_text().partition("@dataclass\nclass Config(")
    last = "    launcher: LauncherConfig ="
    schema.write_text(before + SETTINGS + head + after.replace(last, FIELD + last))
    with (tmp_path / "conf" / "scale" / "smoke.yaml").open("a") as numbers:
        numbers.write("warm_up: {steps: 12, choices: [2, 6]}\n")
    asked = [*tiny, "launcher=inline", "study.stages=[lr_sweep,warm_up]", f"output_dir={tmp_path}/out"]
    asked += ["lr_sweep.grids.adam=[1e-2]", "lr_sweep.baseline_scales=[1.0]"]
    command = [sys.executable, "-c", SCRIPT, *asked, "study.name=toy"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    planned, stage, told, replayed = json.loads(done.stdout.splitlines()[-1])
    assert (planned, stage["state"], stage["decided"], replayed) == (2, "decided", told, True)
    assert "steps of warm-up; margin" in told[0]
    assert (tmp_path / "out/toy/summary_warm_up.csv").read_text().count("\n") == 3
    assert "The toy stage" in (tmp_path / "out/toy/report.html").read_text()


def test_an_unknown_stage_is_refused():
    config = compose(["scale=smoke"])
    with pytest.raises(UserError, match=r"final is not a stage; the stages are lr_sweep"):
        planned_runs("final", config, {}, lambda specs: {})
