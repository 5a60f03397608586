"""A run with bounds ends where its loss is above one, and its result is that of its settings."""

from dataclasses import replace

import pytest
from support.runs import assert_run_resumes, plain, short_run, untimed

from ebc_lab.components.race import Race
from ebc_lab.config.checks import validate_run
from ebc_lab.config.dicts import from_dict, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import run_id
from ebc_lab.config.parts.race import RaceConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.records.streams import read_columns
from ebc_lab.training.outcome import run_and_record


@pytest.fixture
def run(tiny):
    return plain(short_run(tiny, "steps=40"))


def bounded(run, **above):
    return replace(run, race=RaceConfig("bounds", {step.removeprefix("at_"): x for step, x in above.items()}))


@pytest.mark.thorough
def test_a_run_above_its_bound_ends_there_and_one_below_is_the_run_without_bounds(run, tmp_path):
    whole = run_and_record(run, tmp_path / "whole", "x")
    loss = dict(row[:2] for row in whole["curve"])[20]
    lost = run_and_record(bounded(run, at_20=loss - 1e-3, at_30=9.0), tmp_path / "lost", "x")
    assert lost["outcome"] == "raced"
    assert lost["steps"] == 20
    assert lost["cause"] == f"at step 20 its loss, {loss:.4f}, was above {loss - 1e-3:.4f}: " + (
        "it could not win any more"
    )
    assert lost["val_loss"] is None
    assert [row[:2] for row in lost["curve"]] == [row[:2] for row in whole["curve"][:2]]
    assert not (tmp_path / "lost/checkpoint.pt").exists()
    kept = run_and_record(bounded(run, at_20=loss + 1e-3, at_30=9.0), tmp_path / "kept", "x")
    assert untimed(kept) | {"identity": 0} == untimed(whole) | {"identity": 0}
    steps = [read_columns(tmp_path / name / "steps.csv")["loss"] for name in ("whole", "kept", "lost")]
    assert (steps[0] == steps[1]).all()
    assert (steps[0][:20] == steps[2]).all()


@pytest.mark.parametrize("stops", [[7], [19], [10, 15]])
def test_an_interrupted_run_is_raced_at_the_same_step(run, tmp_path, stops):
    assert_run_resumes(bounded(run, at_20=0.0), tmp_path, stops, outcome="raced")


def test_bounds_are_part_of_what_names_a_run_and_no_bounds_are_not(run):
    race = bounded(run, at_20=2.5)
    ids = {run_id("train", r) for r in (run, race, bounded(run, at_20=2.6))}
    assert len(ids) == 3
    assert len({name.rpartition("-")[0] for name in ids}) == 1  # the same words before the hash
    assert run_id("train", run) == run_id("train", replace(run, race=RaceConfig()))
    assert from_dict(RunConfig, to_dict(race)) == race


def test_a_loss_that_is_not_finite_is_for_the_rules_of_divergence(run):
    race = Race(bounded(run, at_20=2.5), None)
    assert race.ends(20, float("nan")) is None
    assert race.ends(20, 2.5) is None
    assert race.ends(10, 9.0) is None
    assert "step 20" in race.ends(20, float("inf"))


@pytest.mark.parametrize(
    ("above", "words"),
    [
        ({"at_15": 2.0}, "a multiple of eval_every=10 below 40"),
        ({"at_40": 2.0}, "a multiple of eval_every=10 below 40"),
        ({"at_x": 2.0}, "'x' is no step"),
        ({"at_20": float("inf")}, "finite"),
        ({}, "ends no run without race.above"),
    ],
)
def test_bounds_that_cannot_be_meant_are_refused(run, above, words):
    with pytest.raises(UserError, match=words):
        validate_run(bounded(run, **above))
