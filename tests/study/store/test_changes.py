"""What makes a study another one, and how that is said."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from ebc_lab.config.compose import compose
from ebc_lab.config.parts.data import DataConfig
from ebc_lab.config.schema import Config
from ebc_lab.study.store import changes

PART = {"name": "my_ramp", "target": "ramps:my_ramp", "sha256": "b" * 64}
ASKED = {"ablation": {"arms": {"ramp": {"settings": {"lr_schedule": PART}}}}}
EDIT = ("ablation.arms.ramp.settings.lr_schedule.sha256", "a" * 64, "b" * 64)


def run(outcome, sha256="a" * 64, problem=None, run_id="x"):
    spec = {"config": {"lr_schedule": {**PART, "sha256": sha256}}}
    brief = SimpleNamespace(outcome=outcome)
    return SimpleNamespace(run_id=run_id, spec=spec, brief=brief, problem=problem)


@pytest.mark.parametrize(
    ("asked", "now", "same"),
    [
        ({"name": "auto"}, {"name": "shakespeare"}, True),
        ({"name": "shakespeare"}, {"name": "auto"}, True),
        ({"name": "auto"}, {"name": "shakespeare", "sha256": "5" * 64}, True),
        ({"name": "auto"}, {"name": "shakespeare", "sha256": "6" * 64}, False),
        ({"name": "auto"}, {"name": "pydoc"}, False),
        ({"name": "auto"}, {"name": "path", "file": "x"}, False),
        ({"name": "path", "file": "x"}, {"name": "path", "file": "y"}, False),
    ],
)
def test_the_corpus_that_was_found_is_the_one_that_was_left_open(asked, now, same):
    found = {"name": "shakespeare" if asked["name"] == "auto" else asked["name"], "sha256": "5" * 64}
    known = {"requested": {"data": {"file": None, "sha256": None, **asked}}, "config": {"data": found}}
    assert changes.same_corpus(replace(DataConfig(), **now), known) == same
    known["requested"] = {**changes.requested(Config()), **known["requested"]}
    config = replace(Config(), data=replace(DataConfig(), **now))
    assert (changes.from_recorded(config, known) == []) == same


@pytest.mark.parametrize(
    ("runs", "free"),
    [
        ([], True),
        ([run("failed"), run(None)], True),
        ([run("failed"), run("completed", "c" * 64)], True),
        ([run("failed"), run("completed")], False),
        ([run("diverged")], False),
        ([run("failed", problem="its spec is damaged")], False),
    ],
)
def test_a_part_of_which_no_run_has_finished_may_be_edited(runs, free):
    assert (changes.refused([EDIT], ASKED, runs) == []) == free


def test_changes_are_said_in_few_words():
    arm = {"about": "x" * 700}
    found = [
        ("ablation.arms.first", arm, None),
        ("ablation.arms.hot", None, arm),
        ("ablation.arms.cold", arm, None),
        ("ablation.arms.sign_sgd", None, arm),
        ("ablation.mine.arms", ["first"], ["sign_sgd"]),
        ("mine", ["first:First"], ["sign:SignSGD"]),
        EDIT,
        ("ablation.question", "q" * 900, "why"),
        *((f"optimizer.{name}", 1, 2) for name in ("a", "b", "c")),
    ]
    said = changes.summarize(found, ASKED, ["ramps.py"])
    assert said.startswith(
        "mine: first → sign_sgd; arm hot is new; arm cold is no longer given; ramps.py was edited"
    )
    assert said.endswith("; and 3 more")
    assert len(said) < 400


def test_who_mends_a_part_that_has_worked_before_is_told_of_force():
    failed = run("failed", run_id="bad")
    for record in (failed, run("completed")):
        record.spec["config"]["optimizer"] = {"name": "adam", "sha256": None}
    assert changes.pinned([failed], "bad") == ""
    assert changes.pinned([failed, run("completed", "c" * 64)], "bad") == ""
    assert "--force where you edit ramps:my_ramp" in changes.pinned([failed, run("completed")], "bad")


def test_what_an_older_version_did_not_have_is_no_change_while_it_does_nothing():
    older = changes.requested(Config())
    del older["target"], older["optimizer"]["update_size"], older["ladder"]
    known = {"requested": older, "config": {"data": {}}}
    other_length = replace(Config(), ladder=replace(Config().ladder, steps=60))  # as scale=smoke has it
    assert changes.from_recorded(Config(), known) == changes.from_recorded(other_length, known) == []
    rms = replace(Config(), optimizer=replace(Config().optimizer, update_size="steepest"))
    assert changes.from_recorded(rms, known) == [("optimizer.update_size", "rms", "steepest")]
    older["removed_since"] = 1
    assert ("removed_since", 1, None) in changes.from_recorded(Config(), known)


def test_a_place_for_mine_that_a_suite_has_got_since_makes_it_no_other_study():
    now = changes.requested(compose(["study=calibrated", "scale=smoke"], here=False))
    before = {**now, "profiles": {key: value for key, value in now["profiles"].items() if key != "mine"}}
    found = changes.differences(changes.as_this_version_says(before), now)
    assert {key for key, _, _ in found} >= {"profiles.mine.group"}
    assert changes.refused(found, now, []) == []
