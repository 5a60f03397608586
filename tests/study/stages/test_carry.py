"""One constant in every setting: what is trained, which constant is carried where, and what is concluded."""

import math
from dataclasses import replace

import pytest
from support.played import CARRY, DIVERGED, FAILED, config_of, decided, done

from ebc_lab.config.errors import UserError
from ebc_lab.config.study_checks import validate
from ebc_lab.study.stages.carry import run_at
from ebc_lab.study.stages.rules import Undecidable
from ebc_lab.study.stages.stage import stage_of

# where each arm is best, and how far in octaves from there its loss is 0.1 nats higher
BEST = {
    "kl": {"base": 0.02, "muon": 0.02, "long": 0.02, "wide": 0.01},
    "radius": {"base": 0.5, "muon": 2.0, "long": 0.5, "wide": 0.5},
    "lr": {"base": 0.01, "muon": 0.01, "long": 0.01, "wide": 0.01},
}
SETTINGS = list(BEST["kl"])


def study(*more):
    return config_of(f"study={CARRY}", *more, scale="smoke")


def place_of(config, spec):
    """The setting that a run belongs to: its arm's name begins with arm and setting."""
    return next(name for name in config.carry.settings if spec.arm.startswith(f"{spec.role}_{name}_"))


def landscape(config, best=BEST, **fates):
    """Every arm is best at its own constant of each setting; a fate is of the runs of an arm's name."""

    def answer(spec):
        if spec.arm in fates:
            return fates[spec.arm]
        place = place_of(config, spec)
        group, _, key = config.carry.arms[spec.role].over.partition(".")
        off = math.log2(getattr(getattr(spec.run, group), key) / best.get(spec.role, best["lr"])[place])
        loss = 2 + 0.1 * SETTINGS.index(place) + 0.1 * off**2 + 0.01 * spec.run.seed
        return done(loss, test_loss=loss + 0.05, initial_loss=4.0)

    return answer


def carried(*overrides, best=BEST, **fates):
    """The stage's decision, and what it holds of its only track."""
    config = study(*overrides)
    decision = decided("carry", config, {}, landscape(config, best, **fates))
    [track] = decision["tracks"].values()
    return decision, track


@pytest.mark.thorough
def test_every_arm_is_trained_in_every_setting_and_equal_runs_once():
    config = study()
    specs = stage_of("carry").runs(config, {}, {})
    assert len({s.run_id for s in specs}) == len(specs)
    # of lr_width only those at twice the width are other runs than lr's, and half of 0.02 is 0.01
    assert len(specs) == 2 * 4 * (3 + 3 + 2) + 2
    kl, radius, lr, by_width = config.carry.arms.values()
    long, wide = config.carry.settings["long"], config.carry.settings["wide"]
    base = config.carry.steps, config.batch_size, config.model.width
    run = run_at(config, kl, long, 0.02)
    assert (run.steps, run.batch_size, run.model.width) == (2 * base[0], base[1] // 2, base[2])
    assert (run.budget.target_kl, run.optimizer.lr, run.evaluate) == (0.02, 8 * 4e-3, ["val", "test"])
    muon = run_at(config, radius, config.carry.settings["muon"], 0.25)
    assert (muon.optimizer.name, muon.optimizer.lr, muon.stabilizer.strength) == ("muon", 8 * 0.016, 0.25)
    rates = [run_at(config, unit, wide, 0.02).optimizer.lr for unit in (lr, by_width)]
    assert (rates, run_at(config, lr, wide, 0.02).model.width) == ([0.02, 0.01], 2 * base[2])


def test_the_constant_is_chosen_on_the_other_settings_and_judged_on_the_one_left_out():
    decision, track = carried()
    kl, radius = track["arms"]["kl"], track["arms"]["radius"]
    assert {name: c["constant"] for name, c in kl["carried"].items()} == dict.fromkeys(SETTINGS, 0.02)
    # wide, which is kept, would have regretted it
    assert [c["regret"] for c in kl["carried"].values()] == pytest.approx([0] * 4)
    # muon asks for 2, which is not on the common grid: it draws the others' constant to 1 where it is in
    # them, and gets theirs, 0.5, where it is left out
    constants = {name: c["constant"] for name, c in radius["carried"].items()}
    assert constants == {"base": 1.0, "muon": 0.5, "long": 1.0, "wide": 1.0}
    excess = {name: c["excess"] for name, c in radius["carried"].items()}
    assert excess == pytest.approx({"base": 0.1, "muon": 0.4, "long": 0.1, "wide": 0.1})
    assert (radius["worst"], radius["excess"]) == ("muon", pytest.approx(0.175))
    assert radius["carried"]["muon"]["tuned"] == pytest.approx(0)  # its own best, which was grown to
    assert (radius["octaves"], kl["octaves"]) == (2, 1)
    assert radius["curves"]["muon"]["best"] == 2
    assert kl["carried"]["wide"]["excess"] == pytest.approx(0.1)  # kept for the judgement: it chose nothing
    assert radius["broken"] == {"runs": 8, "broken": 2}  # in muon, where the median is the others'
    assert track["against"]["kl"]["mean"] == pytest.approx((0.1 - 0.7) / 4)
    assert track["by_setting"]["kl"]["muon"]["mean"] == pytest.approx(-0.4)
    assert track["verdicts"] == {"kl": "earns"}
    [line] = stage_of("carry").headlines(decision)
    assert "kl earns its cost: -0.1500 nats" in line
    assert not any("on the edge" in note for note in decision["notes"])  # where it was, the grid has grown


def test_of_starts_the_worst_in_each_setting_counts_and_no_best_is_theirs():
    decision, track = carried("carry.arms.kl.starts=true")
    kl = track["arms"]["kl"]
    assert [p["value"] for p in kl["curves"]["wide"]["points"]] == [0.01, 0.02, 0.04]  # not grown
    for name, one in kl["carried"].items():
        worst = max(kl["curves"][name]["points"], key=lambda point: point["mean"])
        assert one["constant"] == worst["value"]
        assert one["excess"] == pytest.approx(worst["mean"] - track["settings"][name]["val_loss"])
    assert all(found["arm"] != "kl" for found in track["settings"].values())
    assert "kl: the worst of 3 starts counts in each setting" in decision["notes"]
    assert [arm for arm, found in track["arms"].items() if found.get("starts")] == ["kl"]
    assert "of starts the worst in the setting counts" in decision["rule"]
    with pytest.raises(UserError, match="must name one without starts"):
        study(*(f"carry.arms.{arm}.starts=true" for arm in track["arms"]))


def test_a_best_constant_on_the_edge_of_what_was_tried_is_noted():
    decision, _ = carried("carry.arms.lr.starts=true", "carry.max_extensions=0")
    edge = "the best constant lies on the edge of what was tried in"
    notes = [note for note in decision["notes"] if edge in note]
    assert notes[:2] == [f"kl: {edge} wide (low)", f"radius: {edge} muon (high)"]
    assert not any(note.startswith("lr:") for note in notes)


@pytest.mark.thorough
def test_a_diverged_run_counts_with_its_first_loss_and_is_broken():
    _, track = carried(kl_muon_0p02={**DIVERGED, "initial_loss": 4.0})
    kl = track["arms"]["kl"]
    point = next(p for p in kl["curves"]["muon"]["points"] if p["value"] == 0.02)
    assert (point["mean"], point["diverged"]) == (4.0, ["0", "1"])
    assert kl["carried"]["muon"]["constant"] == 0.02  # the others know nothing of it
    assert kl["carried"]["base"]["constant"] != 0.02  # here it is one of those that choose
    assert kl["broken"] == {"runs": 8, "broken": 2}
    assert kl["broken_anywhere"] == {"runs": 24, "broken": 4}  # and 0.04 in wide, 2 octaves off


def test_a_point_without_all_its_runs_is_not_used():
    decision, track = carried(kl_base_0p02=FAILED)
    kl = track["arms"]["kl"]["carried"]
    assert "base" not in kl
    assert {c["constant"] for c in kl.values()} == {0.01}
    assert any("kl: runs are missing, so not used: base at 0.02" in note for note in decision["notes"])
    assert track["against"]["kl"]["seeds"] == 2  # over the settings that both were judged in
    with pytest.raises(Undecidable, match="carry could not decide: a bug"):
        decided("carry", study(), {}, lambda s: FAILED)


@pytest.mark.thorough
def test_it_takes_two_arms_and_two_settings_that_choose():
    config = study("carry.reference=lr", "carry.challengers=[kl]")
    carry = config.carry
    arms = {name: carry.arms[name] for name in ("kl", "lr")}
    base, *others = carry.settings.values()
    places = {"base": replace(base, kept=False), "other": replace(others[0], kept=False)}
    least = replace(carry, arms=arms, settings=places)
    validate(replace(config, carry=least), study=True)
    refused = {
        "must name at least two arms": replace(least, arms={"lr": arms["lr"]}),
        "at least two that are not kept": replace(
            least, settings=places | {"other": replace(others[0], kept=True)}
        ),
        "must name one without starts": replace(
            least, arms={name: replace(arm, starts=True) for name, arm in arms.items()}
        ),
        "challengers must name the arms": replace(least, challengers=[]),
        "carry.challengers=lr is unknown": replace(least, challengers=["lr"]),
        "carry.reference=radius is unknown": replace(least, reference="radius"),
        "arms.Kl: a name is lower-case": replace(least, arms=arms | {"Kl": arms["kl"]}),
        "settings.a b: a name is lower-case": replace(least, settings=places | {"a b": base}),
    }
    for problem, asked in refused.items():
        with pytest.raises(UserError, match=problem):
            validate(replace(config, carry=asked), study=True)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("carry.arms.kl.over=budget.schedule", "must be a number of a run's part"),
        ("carry.challengers=[radius]", "carry.challengers=radius is unknown"),
        ("carry.arms.lr.lr_scale=2", "the constant is the rate itself"),
        ("carry.settings.muon.settings={optimizer: {name: muno}}", "carry.settings.muon: optimizer=muno"),
        ("carry.arms.kl.settings={stabilizer: {name: agc}}", "carry.arms.kl in carry.settings.base"),
        ("carry.arms.kl.grid=[0.02,0.01]", "must be increasing"),
    ],
)
def test_what_cannot_be_meant_is_refused(override, said):
    with pytest.raises(UserError, match=said):
        study(override)
