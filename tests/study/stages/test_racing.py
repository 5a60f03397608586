"""Racing in the stage tune: who races whom, what becomes of a search, and what is said of it."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from support.played import DECIDED, DIVERGED, SWEPT, config_of, done, played

from ebc_lab.config.choices import changed
from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import ArmConfig
from ebc_lab.config.study_checks import validate
from ebc_lab.report.conclude import concluding
from ebc_lab.study.autopilot import Listener, autopilot
from ebc_lab.study.inspect.status import status
from ebc_lab.study.inspect.why import why
from ebc_lab.study.stages.runs import RACED_FROM, raced
from ebc_lab.study.stages.stage import stage_of

SIGMA = SWEPT["sigma"]
TRAPEZOID = {"lr_schedule": {"name": "trapezoid", "warmup_share": 0.1667}}
ARMS = {
    "plain": ArmConfig(settings=TRAPEZOID, tune={"lr_scale": [0.5, 1, 2, 4, 8]}),
    "other": ArmConfig(settings={"optimizer": {"name": "lion"}}, tune={"lr_scale": [0.5, 1, 2, 4, 8]}),
}


def suite(*overrides, arms=ARMS, sigmas=5):
    config = config_of("study=stabilizers", "study.name=nowhere", f"tune.race_sigmas={sigmas}", *overrides)
    config = replace(config, ablation=replace(config.ablation, arms=dict(arms), reference="plain"))
    validate(config, study=True)
    return config


def curve(run, ends):
    """The evaluations of a run that ends so: a loss that falls to it."""
    at = range(run.eval_every, run.steps + 1, run.eval_every)
    return [[step, ends + 1 - step / run.steps, 0.1] for step in at]


def answer(spec, best=1.0):
    """A valley around a multiple of the track's rate; a run that its bounds end is raced."""
    run = spec.run
    ends = 2 + 0.1 * abs(math.log2(spec.lr_scale / best)) + 0.001 * (run.seed % 2)
    rows = curve(run, ends)
    for step, loss, _ in rows:
        if loss > run.race.above.get(str(step), math.inf):
            return {"outcome": "raced", "cause": f"at step {step} …", "val_loss": None, "steps": step}
    return done(ends, steps=run.steps, curve=rows)


def decided(config, made=answer):
    waves, specs, results = played("tune", config, DECIDED, made)
    return stage_of("tune").decide(config, specs, results, DECIDED), waves, results


@pytest.fixture(scope="module")
def plain():
    return decided(suite())


@pytest.mark.thorough
def test_the_middle_of_a_grid_comes_first_and_the_others_race_against_it(plain):
    decision, (first, second, *_), _ = plain
    assert {s.lr_scale for s in first} == {2.0}  # of each arm, with all its seeds
    assert len(first) == 4
    assert not any(s.run.race.above for s in first)
    assert all(s.run.race.above for s in second)
    for spec in second:
        rival = next(s for s in first if (s.role, s.run.seed) == (spec.role, 101))
        ends = answer(rival)["val_loss"]  # of the worst seed
        bounds = {step: round(loss + 5 * SIGMA, 4) for step, loss, _ in curve(rival.run, ends)}
        late = {s: x for s, x in bounds.items() if RACED_FROM * rival.run.steps <= s < rival.run.steps}
        assert spec.run.race.above == {str(s): x for s, x in late.items()}
        assert len(late) == 3
    arms = decision["tracks"]["adam_none"]["arms"]
    assert {arm["point"]["lr_scale"] for arm in arms.values()} == {1.0}
    lost = [c for c in decision["candidates"] if c["outcome"] == "raced"]
    assert lost
    assert all(c["val_loss"] is None and c["raced"] == 450 and "step 450" in c["cause"] for c in lost)
    assert not {arm["run_id"] for arm in arms.values()} & {c["run_id"] for c in lost}
    assert "is stopped where its loss" in decision["rule"]
    assert "5 sigma" in decision["rule"]
    assert any(note.startswith(f"{len(lost)} of ") for note in decision["notes"])


def beyond(spec):
    """The best point is far below the grid, where every rate diverges."""
    return DIVERGED if spec.lr_scale > 0.2 else answer(spec, best=0.1)


# a strength that limits nothing makes ties, and racing trains the middle of a grid before its head
TIES = {"stabilizer": {"name": "zclip"}}
TIED = {"other": ArmConfig(settings=TIES, tune={"strength": [1.5, 2, 2.5, 3, 4]})}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("made", "raced_at", "arms", "raced"),
    [
        (answer, 5, {}, True),
        (lambda spec: answer(spec, best=30.0), 5, {}, True),
        (beyond, 5, {}, False),
        (answer, 1000, TIED, False),
    ],
)
def test_the_same_point_wins_as_without_racing_and_no_arm_loses_its_search(made, raced_at, arms, raced):
    outcomes, choices = [], []
    for sigmas in (0, raced_at):
        config = suite("tune.max_extensions=6", sigmas=sigmas, arms=ARMS | arms)
        decision, _, results = decided(config, made)
        outcomes.append({r["outcome"] for r in results.values()})
        tuned = decision["tracks"]["adam_none"]["arms"]
        choices.append({k: (arm["point"], arm["val_loss"], arm["extended"]) for k, arm in tuned.items()})
    assert ["raced" in ended for ended in outcomes] == [False, raced]
    assert choices[0] == choices[1]


def test_one_raced_seed_takes_its_point_out():
    """Though its other seed has the lowest loss of all."""

    def made(spec):
        if spec.lr_scale == 1.0 and spec.role == "plain":
            lost = {"outcome": "raced", "cause": "at step 450 …", "val_loss": None, "steps": 450}
            return lost if spec.run.seed == 101 else done(1.0, steps=600)
        return answer(spec)

    decision, _, _ = decided(suite(), made)
    assert decision["tracks"]["adam_none"]["arms"]["plain"]["point"] != {"lr_scale": 1.0}
    assert "seed 101 was stopped at step 450 there" in " ".join(stage_of("tune").would_change(decision))


def test_only_what_differs_in_rate_alone_is_a_rival(plain):
    _, waves, _ = plain
    pilot = [s for s in waves[0] if s.role == "plain"]
    results = {s.run_id: answer(s) for s in pilot}
    run = changed(pilot[0].run, {"optimizer": {"lr": 1.0}})
    assert raced(run, [pilot], results, 0.05).race.above
    assert raced(replace(run, seed=7), [pilot], results, 0.05).race.above
    for own in (
        {"lr_schedule": {"warmup_share": 0.3}},
        {"steps": 1200},
        {"batch_size": 32},
        {"optimizer": {"name": "lion"}},
        {"stabilizer": {"name": "agc"}},
    ):
        other = changed(run, own)
        assert raced(other, [pilot], results, 0.05) == other
    for lost in ({}, DIVERGED, {**answer(pilot[0]), "curve": None}):
        assert raced(run, [pilot], results | {pilot[1].run_id: lost}, 0.05) == run


def test_what_a_run_races_against_does_not_depend_on_when_it_is_planned():
    """Every run that was ever planned is in the last plan, so no result is trained in vain."""
    config = suite()
    _, specs, results = played("tune", config, DECIDED, answer)
    everything = {s.run_id for s in specs}
    ids = list(results)
    for known in range(len(ids)):
        part = {run_id: results[run_id] for run_id in ids[:known]}
        assert {s.run_id for s in stage_of("tune").runs(config, DECIDED, part)} <= everything


@pytest.mark.thorough
def test_bounds_elsewhere_and_with_a_window_are_refused():
    with pytest.raises(UserError, match="how far the LR window reaches"):
        validate(config_of("study=optimizers", "study.name=x", "tune.race_sigmas=5"), study=True)
    with pytest.raises(UserError, match="no other run has any"):
        validate(config_of("race=bounds", "race.above.450=2.0", "study.name=x"), study=True)
    bounds = {"race": {"name": "bounds", "above": {"450": 2.0}}}
    with pytest.raises(UserError, match="no other run has any"):
        suite(arms=ARMS | {"raced": ArmConfig(settings=bounds)})


def test_a_curve_with_a_raced_point_has_no_window():
    grid = {"lr": [5e-4, 1e-3, 2e-3, 4e-3]}
    decision, _, _ = decided(suite(arms={k: replace(arm, tune=grid) for k, arm in ARMS.items()}))
    arm = decision["tracks"]["adam_none"]["arms"]["plain"]
    assert all(a["lr"] < b["lr"] for a, b in pairwise(arm["curve"]))
    lost = [p for p in arm["curve"] if p["val_loss"] is None]
    assert [p["raced"] for p in lost] == [2] * len(lost) != []
    assert arm["window"] is None


@pytest.mark.thorough
def test_stopped_runs_are_results_are_said_to_be_and_are_not_trained_again(tiny, tmp_path):
    clipped = {**TRAPEZOID, "stabilizer": {"name": "norm_clip", "strength": 0.5}}
    arms = {"plain": TRAPEZOID, "clipped": clipped}
    arms = {k: ArmConfig(settings=own, tune={"lr_scale": [0.125, 0.5, 2]}) for k, own in arms.items()}
    config = compose([*tiny, "launcher=inline", "seeds=[3]", "eval_every=5", f"output_dir={tmp_path}"])
    config = replace(
        config,
        study=replace(config.study, stages=["lr_sweep", "tune", "ablation"]),
        tune=replace(config.tune, steps=40, seeds=2, max_extensions=1, race_sigmas=2),
        ablation=replace(config.ablation, steps=10, arms=arms, reference="plain"),
    )
    study = autopilot(config, concluding()).study
    state = status(study)
    assert (state["state"], state["failures"]) == ("finished", [])
    assert set(next(s for s in state["stages"] if s["stage"] == "tune")["outcomes"]) == {"completed", "raced"}
    decision = why(study, "tune")["tune"]
    assert decision["stale_because"] is None
    assert any(c.get("raced") in (30, 35) for c in decision["candidates"])
    assert "it could not win any more" in study.page_file.read_text()
    assert autopilot(config, Listener()).trained == 0
