"""A stage is one object: a new one needs a module, a dataclass and its numbers, and no other edit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ebc_lab
from ebc_lab.config.choices import conf_dir
from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.study.stages.stage import planned_runs

MODULE = '''
"""warm_up: how many steps of warm-up the best baseline learning rate wants."""

from .rules import best, losses_of, make_decision, margin_sigma, refuse_without_tracks, val_loss
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
        tracks = {}
        for name, swept in earlier["lr_sweep"]["tracks"].items():
            own = [s for s in specs if s.track == name]
            if winner := best(own, results):
                losses = losses_of(own, results)
                tracks[name] = {
                    "warmup_steps": winner.run.lr_schedule.warmup_steps,
                    "run_id": winner.run_id,
                    "val_loss": val_loss(results[winner.run_id]),
                    "ranked": [s.run_id for s in own],
                    "margin_sigma": margin_sigma(losses, swept["sigma"]),
                    "sigma": swept["sigma"],
                }
        refuse_without_tracks(tracks, "warm_up", specs, results)
        rule = "lowest loss"
        return make_decision("warm_up", rule, config, specs, results, earlier, tracks=tracks, notes=[])

    def headline(self, track):
        return f"{track['warmup_steps']} steps of warm-up"


STAGE = WarmUp()
'''
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
from ebc_lab.study.inspect import compare, forecast, status, why
from ebc_lab.study.store import replay

config = compose(sys.argv[1:])
planned = forecast.planned(config)
study = autopilot(config, concluding()).study
found = {
    "planned": planned["stages"]["warm_up"]["expected"],
    "status": status.status(study),
    "why": why.why(study, "warm_up")["warm_up"],
    "diff": compare.compare(study, study)["decisions"]["warm_up"],
    "replayed": replay.replay(study)["same"],
}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def extended(tiny, tmp_path_factory: pytest.TempPathFactory):
    """A copy of the program with one more stage trains a study. -> what it says of it, and its folder."""
    house = tmp_path_factory.mktemp("house")
    package = house / "ebc_lab"
    shutil.copytree(Path(ebc_lab.__file__).parent, package)
    shutil.copytree(conf_dir(), house / "conf", dirs_exist_ok=True)
    (package / "study" / "stages" / "warm_up.py").write_text(MODULE)
    schema = package / "config" / "schema.py"
    before, head, after = schema.read_text().partition("@dataclass\nclass Config(")
    last = "    launcher: LauncherConfig ="
    schema.write_text(before + SETTINGS + head + after.replace(last, FIELD + last))
    with (house / "conf" / "scale" / "smoke.yaml").open("a") as numbers:
        numbers.write("warm_up: {steps: 12, choices: [2, 6]}\n")
    asked = [*tiny, "launcher=inline", "study.stages=[lr_sweep,warm_up]", f"output_dir={house / 'out'}"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *asked, "study.name=toy"],
        capture_output=True,
        text=True,
        cwd=house,
        env={**os.environ, "PYTHONPATH": str(house)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), house / "out" / "toy"


def test_a_new_stage_is_planned_trained_decided_explained_and_compared(extended):
    found, root = extended
    assert found["planned"]["runs"] == 2
    assert [(s["stage"], s["state"]) for s in found["status"]["stages"]][-1] == ("warm_up", "decided")
    assert found["status"]["state"] == "finished"
    assert found["replayed"]
    assert (root / "summary_warm_up.csv").read_text().count("\n") == 3
    assert json.loads((root / "results_final.json").read_text())["stage"] == "warm_up"
    [line] = found["why"]["headline"]
    assert "steps of warm-up; margin" in line
    assert "nats better" in found["why"]["flips"][0]
    assert found["status"]["stages"][-1]["decided"] == [line]
    assert list(found["diff"]["adam_none"]) == ["warmup_steps"]
    page = (root / "report.html").read_text()
    assert "The toy stage" in page
    assert "steps of warm-up" in page


def test_an_unknown_stage_is_refused():
    config = compose(["scale=smoke"])
    with pytest.raises(UserError, match=r"final is not a stage; the stages are lr_sweep"):
        planned_runs("final", config, {}, lambda specs: {})
