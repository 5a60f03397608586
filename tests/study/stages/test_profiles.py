"""One configuration for all workloads: how targets are set, which configuration is chosen, and the scores."""

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
from support.called import SMALLEST, answered, called
from support.drawn import check_sheet, settled
from support.played import DIVERGED, FAILED, config_of, decided, done, played
from support.seen import assert_as_recorded, sheets_text, told

from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import RunConfig
from ebc_lab.config.study_checks import validate
from ebc_lab.report.kinds import Evidence, profiles
from ebc_lab.report.pictures.drawing.sheet import Facts
from ebc_lab.report.pictures.profiles import draw_profiles
from ebc_lab.study.stages.profiles import scores
from ebc_lab.study.stages.profiles.calibration import tokens_per_step
from ebc_lab.study.stages.rules import Undecidable
from ebc_lab.study.stages.stage import stage_of


def study(*more):
    who = ["profiles.yardstick=adamw", "profiles.calibrate_on=[gpt,ebm]"]
    return config_of("study=calibrated", "profiles.steps=100", "profiles.evaluations=20", *who, *more)


def course(spec, step, level=2.0):
    """A completed run whose loss on the fixed windows is 3 until `step`, and then `level`."""
    every = range(5, spec.run.steps + 1, 5)
    curve = [[at, level if at >= step else 3.0, 0.1 * at] for at in every]
    return done(level, initial_loss=5.0, curve=curve)


def rate(spec):
    return spec.run.optimizer.lr


def answer(spec):
    """AdamW at 0.004 is best, and reaches 2 after 60 steps, elsewhere 2.1; double after 30 at radius 0.01,
    but diverges on the EBM; Muon never; Lion fails; all others after 120 steps, whatever their grid."""
    if spec.role == "adamw":
        return course(spec, 60, 2.0 if rate(spec) == 0.004 else 2.1)
    if spec.role == "double":
        if spec.run.workload.name == "ebm":
            return {**DIVERGED, "curve": [[5, 3.0, 0.5]], "initial_loss": 5.0}
        return course(spec, 30 if spec.run.budget.radius == 0.01 else 90)
    if spec.role == "lion":
        return FAILED
    return course(spec, math.inf if spec.role == "muon" else 120)


def test_scores_of_a_hand_worked_example():
    found = [scores.over_the_best(times) for times in ([10, 20], [30, 15], [40, None])]  # of a and b
    assert found == [(10, [1, 2]), (15, [2, 1]), (40, [1, None])]
    a, b = zip(*(ratios for _, ratios in found), strict=True)
    assert scores.score(a) == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert scores.score(b) == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert scores.score([4.0, 9.0, None]) == 0
    shares = [scores.share_within([2, 1, math.inf], tau) for tau in np.linspace(1, 4, 30001)]
    assert np.mean(shares) == pytest.approx(scores.score(b), abs=1e-4)
    # of three seeds one misses: the median counts; of two misses, neither does
    assert scores.median([10, None, 12]) == 12
    assert scores.median([10, None, None]) is scores.median([]) is None
    assert scores.over_the_best([None, None]) == (None, [None, None])
    spans = scores.intervals({"a": {"u": [10, 10, 10]}, "b": {"u": [10, 20, None]}})
    assert spans["a"] == (1, 1)
    assert spans["b"] == (0, 1)  # three seeds may all be the one that missed, or the fastest
    assert scores.mean_time({"u": 0.5, "v": math.inf}) == pytest.approx(math.sqrt(0.5 * 4))


def test_the_yardstick_sets_the_targets_and_one_configuration_is_scored_on_all():
    config = study("profiles.asked_about=[muon]", "profiles.target_slack=0.125")
    waves, specs, results = played("profiles", config, {}, answer)
    decision = stage_of("profiles").decide(config, specs, results, {})
    [track] = decision["tracks"].values()
    for target in track["workloads"].values():
        assert (target["point"], target["steps"], target["longest"]) == ({"optimizer.lr": 0.004}, 100, 200)
        assert target["loss"] == 2.125
        assert len(target["lowest"]) == 3
    # no seed that sets a target or chooses a configuration is scored
    deciding = {s.run.seed for wave in waves[:-1] for s in wave}
    scored = [s for s in waves[-1] if s.role == "double"]
    assert {s.run.seed for s in scored} == set(config.seeds)
    assert not deciding & set(config.seeds)
    assert len(scored) == len(config.seeds) * len(track["workloads"])
    assert {s.run.steps for s in specs} == {100, 200}  # none is longer than its budget
    for spec in waves[0]:
        assert isinstance(spec.run, RunConfig)
        assert (spec.run.eval_every, spec.run.evaluate) == (5, ["val"])
        assert spec.run.optimizer.lr != 4e-3 or "optimizer.lr" in config.profiles.methods[spec.role].grid
    limited = {s.role: s.run for s in waves[0] if s.role in ("kl", "radius", "double", "confidence_radius")}
    assert {run.optimizer.lr for run in limited.values()} == {0.032}
    assert limited["double"].budget.radius_unit == "initial"
    points = {name: math.prod(map(len, of.grid.values())) for name, of in config.profiles.methods.items()}
    assert len(points) >= 10
    assert points.pop("untuned") == 1  # nothing of it is chosen
    assert set(points.values()) == {10}
    found = track["methods"]["double"]
    assert found["point"]["budget.radius"] == 0.01
    assert {s.run.budget.radius for s in scored} == {0.01}
    assert found["calibration"] == pytest.approx((0.3 * 4) ** (1 / 2))
    at = found["workloads"]
    assert (at["gpt"]["steps"], at["gpt"]["ratio"]) == ({"0": 30, "1": 30, "2": 30}, 1)
    assert (at["gpt"]["median_seconds"], at["ebm"]["ratio"]) == (3.0, None)
    a_step = scored[0].run.batch_size * scored[0].run.model.context
    each = tokens_per_step(config)
    assert each["gpt"] == a_step
    assert each["cnn"] == 4 * scored[0].run.batch_size  # images
    assert track["methods"]["adamw"]["workloads"]["gpt"]["ratio"] == 2
    assert track["methods"]["adamw"]["workloads"]["ebm"]["ratio"] == 1
    places = len(track["workloads"])
    assert found["score"] == pytest.approx((places - 1) / places)
    assert found["low"] == pytest.approx(found["score"])  # whichever seeds are drawn: they are all alike
    assert track["methods"]["muon"]["score"] == 0
    assert "lion" not in track["methods"]
    notes = decision["notes"]
    assert "double diverged on ebm, 3 of its seeds" in notes
    assert "lion has no configuration: none of its runs ended by themselves" in notes
    assert any(note.startswith("muon missed the target on gpt") for note in notes)
    lr = track["methods"]["adamw"]["sensitivity"]["gpt"]
    assert lr["sensitivity"] == pytest.approx(0.1 * 4 / 5)
    assert lr["window"]["octaves"] == pytest.approx(1)
    [line] = stage_of("profiles").headlines(decision)
    assert " scores highest, 0." in line
    assert "; muon 0.000 [0.00, 0.00], place " in line
    shown = Evidence(decision, config)
    _, table = profiles.KIND.tables(shown)
    cells = {row.cells[0].text: [cell.text for cell in row.cells[1:]] for row in table.rows}
    assert cells["adamw"][0] == "2.00"
    assert "missed" in cells["double"]
    rows = list(profiles.KIND.rows(shown))
    assert len(rows) == places * len(track["methods"])
    assert {row["tokens"] for row in rows if row["workload"] == "gpt" and row["steps"] == 30} == {30 * a_step}
    assert f"gpt 30 steps, {30 * a_step:,} tokens, to 2.1250" in table.note
    facts = Facts("profiles", "tiny Shakespeare", None, "smoke", 32, 64, (0.5, 0.7))
    figure = settled(draw_profiles, facts, track)
    check_sheet(figure, "profiles")
    assert_as_recorded("profiles", f"{told(profiles.KIND, shown)}\n{sheets_text({'profiles': figure})}")
    asked = list(track["methods"])[:6]
    lines = settled(draw_profiles, facts, {**track, "asked_about": asked}).axes[0].lines
    thick = {(line.get_color(), line.get_linestyle()) for line in lines if line.get_linewidth() == 2.4}
    assert len(thick) == len(asked)  # however many it asks about, each is thick and told apart


def test_a_method_without_the_right_to_a_workload_misses_it_and_nothing_is_chosen_without_targets():
    config = study("profiles.methods.double.cannot=[ebm]")
    _, specs, _ = played("profiles", config, {}, answer)
    assert not [s for s in specs if s.role == "double" and s.run.workload.name == "ebm"]
    [track] = decided("profiles", config, {}, answer)["tracks"].values()
    assert track["methods"]["double"]["workloads"]["ebm"]["ratio"] is None
    with pytest.raises(Undecidable, match="profiles could not decide: a bug"):
        decided("profiles", config, {}, lambda s: FAILED)


@pytest.mark.thorough
def test_what_cannot_be_scored_is_refused():
    config = study()
    profiles = config.profiles
    adamw, gpt = profiles.methods["adamw"], profiles.workloads["gpt"]
    rates = {"optimizer.lr": [0.1]}
    refused = {
        "needs its learning rate": {"grid": {"horizon": [0.5, 1]}},
        "both set it": {"grid": {**rates, "optimizer.name": ["adam"]}},
        "no setting of a run": {"grid": {**rates, "optimizer.rate": [1]}},
        r"adamw on \w+: .*quantizer": {"settings": {**adamw.settings, "quantizer": {"name": "ternary"}}},
    }
    made = {
        problem: replace(profiles, methods={**profiles.methods, "adamw": replace(adamw, **own)})
        for problem, own in refused.items()
    }
    own = {**profiles.workloads, "gpt": replace(gpt, settings={"optimizer": {}})}
    made["the methods' to set"] = replace(profiles, workloads=own)
    two = {name: replace(profiles.methods[name], cannot=[]) for name in ("adamw", "muon")}
    least = replace(profiles, methods=two, calibrate_on=["gpt"], yardstick="muon", asked_about=["adamw"])
    least = replace(least, workloads={"gpt": gpt})
    validate(replace(config, profiles=least), study=True)
    made |= {
        "must name at least two": replace(least, methods={"adamw": adamw}, yardstick="adamw"),
        "workloads must name at least one": replace(least, workloads={}),
        "calibrate_on must name the workloads": replace(least, calibrate_on=[]),
        "profiles.yardstick=lion is unknown": replace(least, yardstick="lion"),
        "profiles.calibrate_on=vit is unknown": replace(least, calibrate_on=["gpt", "vit"]),
        "profiles.asked_about=lion is unknown": replace(least, asked_about=["adamw", "lion"]),
        "adamw.cannot=vit is unknown": replace(
            least, methods=two | {"adamw": replace(adamw, cannot=["vit"])}
        ),
        "methods.Adam: a name is lower-case": replace(least, methods=two | {"Adam": adamw}),
        "workloads.a b: a name is lower-case": replace(least, workloads={"gpt": gpt, "a b": gpt}),
    }
    for problem, asked in made.items():
        with pytest.raises(UserError, match=problem):
            validate(replace(config, profiles=asked), study=True)
    last = config.study.stage_seed + profiles.calibration_seeds + profiles.target_seeds - 1
    with pytest.raises(UserError, match="seeds must not contain"):
        study(f"seeds=[{last}]")
    assert study(f"seeds=[{last + 1}]")


PROFILED = """\
study: {name: profiled, stages: [profiles]}
dtype: float32
compile: "off"
profiles:
  steps: 4
  evaluations: 2
  target_seeds: 1
  yardstick: adamw
  calibrate_on: [gpt]
  workloads:
    gpt: {about: GPT}
    gru: {about: GRU, settings: {model: {name: gru}}}
  methods:
    adamw: {about: AdamW, settings: {optimizer: {name: adamw}}, grid: {optimizer.lr: [0.004, 0.016]}}
    sgd: {about: SGD, settings: {optimizer: {name: sgd}}, grid: {optimizer.lr: [0.1, 0.3]}}
  mine: {group: optimizer, template: {grid: {optimizer.lr: [0.004, 0.016]}}}
"""
OWN = "import torch\n\n\nclass Slow(torch.optim.Adam):\n    def step(self):\n        {}super().step()\n"


@pytest.mark.thorough
def test_an_optimizer_of_mine_is_tried_first_and_scored_like_the_others(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 300)
    (tmp_path / "profiled.yaml").write_text(PROFILED)
    own = tmp_path / "profiled_opt.py"
    own.write_text(OWN.format("raise TypeError('no flour')  # "))
    small = [*SMALLEST, f"data.file={text}", "launcher=inline", "seeds=[0,1]", "threads_per_run=1"]
    asked = ["autopilot", "study=./profiled.yaml", "mine=./profiled_opt.py:Slow", *small]
    failed = called(*asked, cwd=tmp_path)
    assert "error: method slow: profiled_opt.py:6: TypeError: no flour: mend it" in failed.stderr
    own.write_text(OWN.format(""))
    told = answered(*asked, cwd=tmp_path).stdout
    assert "slow 0." in told or "slow scores highest" in told
    study = tmp_path / "outputs" / "ebc_ablation" / "profiled"
    assert (study / "own" / "profiled_opt.py").read_text() == own.read_text()
    rows = list(csv.DictReader((study / "profiles.csv").open()))
    assert {row["method"] for row in rows} == {"adamw", "sgd", "slow"}
    assert "Score of slow" in (study / "report.html").read_text()
    own.write_text(OWN.format("") + "# edited\n")
    assert "profiled_opt.py was edited since" in called(*asked, cwd=tmp_path).stderr
