"""The ladder: what is carried and tuned on each rung, and what is said of two arms over all of them."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from support.played import DECIDED, DIVERGED, config_of, done, played

from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import BASE
from ebc_lab.study.stages.ladder import compared
from ebc_lab.study.stages.ladder.climb import Rungs
from ebc_lab.study.stages.stage import stage_of
from ebc_lab.study.stages.statistics import NO_LUCK

DECAY, BETA = "optimizer.weight_decay", "optimizer.beta2"
POINT = {"lr": 4e-3, "warmup_share": 0.1667, "schedule": "cosine", DECAY: 0.1, BETA: 0.99}
SEEDS = range(5)


def tuned(**losses):
    """A decision of `tune` by which these arms have these validation losses, all at the same point."""
    found = {"point": POINT, "luck": {"sd": 0.004, "freedom": 8.0}}
    arms = {name: found | {"val_loss": loss} for name, loss in losses.items()}
    return DECIDED | {"tune": {"tracks": {"adam_none": {"arms": arms}}, "inputs_sha256": "y"}}


def ladder_of(*overrides, study="ladder"):
    return config_of(f"study={study}", "ladder.steps=300", "ablation.steps=300", "eval_every=20", *overrides)


def climbed(config, loss, earlier=None, **more):
    """The decision where a run has the loss `loss(arm, rung, run, seed)`; of an infinite one it diverged."""
    earlier = earlier or tuned(adamw=2.0, muon=1.9)

    def answer(spec):
        arm = spec.role
        rung = spec.arm.removeprefix(arm).split("_lr")[0].strip("_") or BASE
        run = spec.run
        found = loss(arm, rung, run, run.seed)
        if math.isinf(found):
            return DIVERGED
        steps = range(run.eval_every, run.steps + 1, run.eval_every)
        curve = [(s, found + 2 * (1 - s / run.steps), 0.01 * s) for s in steps]
        return done(found, steps=run.steps, curve=curve, train_s=1.0, **more)

    _, specs, results = played("ladder", config, earlier, answer)
    decision = stage_of("ladder").decide(config, specs, results, earlier)
    [track] = decision["tracks"].values()
    return decision, track, specs


def valley(arm, rung, run, seed):
    """A best rate on each rung, below the carried one on `wide`; muon leads by less where more is trained."""
    best = {"wide": 1e-3}.get(rung, 4e-3 * {"batch": 2**0.5, "long": 2**-0.32}.get(rung, 1.0))
    best *= 0.5 * 2**0.5 * 2**-0.32 if rung == "corner" else 1.0
    lead = {BASE: 0.20, "wide": 0.12, "batch": 0.16, "long": 0.16, "corner": 0.04}[rung] * (arm == "muon")
    noise = random.Random(f"{arm}{rung}{seed}{run.optimizer.lr}").gauss(0, 0.003)
    return 2 - lead + 0.02 * abs(math.log2(run.optimizer.lr / best)) + 0.01 * seed + noise


@pytest.fixture(scope="module")
def plain():
    return climbed(ladder_of(), valley)


# -- what is trained -----------------------------------------------------------------------------------------


def test_settings_are_carried_by_the_stated_rules():
    """By hand: lr · 1/2 · √2 · 2^−0.32; the decay so that lr · decay · steps stays; 1 − β₂ over the batch."""
    rungs = Rungs(ladder_of(), tuned(adamw=2.0, muon=1.9), "adam_none", {})
    assert rungs.carried("adamw", BASE) == POINT
    assert rungs.carried("adamw", "wide") == POINT | {"lr": 2e-3, DECAY: 0.2}
    assert rungs.carried("adamw", "batch") == POINT | {"lr": 5.657e-3, DECAY: 0.07071, BETA: 0.98}
    assert rungs.carried("adamw", "long") == POINT | {"lr": 3.204e-3, DECAY: 0.06242}
    corner = rungs.carried("adamw", "corner")
    lr = 4e-3 / 2 * 2**0.5 * 2**-0.32
    assert corner["lr"] == pytest.approx(lr, rel=1e-3)
    assert corner["lr"] * corner[DECAY] * 2 == pytest.approx(4e-3 * 0.1, rel=1e-3)
    own = Rungs(
        ladder_of("+ladder.rules_of.muon={lr: {width: 0}}"), tuned(adamw=2.0, muon=1.9), "adam_none", {}
    )
    assert own.carried("muon", "wide")["lr"] == 4e-3
    assert own.carried("adamw", "wide")["lr"] == 2e-3


def test_every_arm_has_as_many_points_on_every_rung_and_the_base_is_the_suites_own(plain):
    _, track, specs = plain
    for name, rung in track["rungs"].items():
        assert {arm["trials"] for arm in rung["arms"].values()} == {0 if name == BASE else 6}
    tuning = {s.run_id for s in specs if s.run.seed >= 100}
    assert len(tuning) == 2 * 4 * (6 * 2 + 3 * 3)  # arms, rungs; points, finalists, and their seeds
    judged = {s.run_id for s in specs if s.arm == "adamw"}
    config = ladder_of()
    suite = stage_of("ablation").runs(config, tuned(adamw=2.0, muon=1.9), {})
    assert judged == {s.run_id for s in suite if s.arm == "adamw" and s.kind == "train"}
    wide, corner = (track["rungs"][name] for name in ("wide", "corner"))
    assert (wide["width"], wide["steps"], wide["batch_size"]) == (256, 300, 16)
    assert corner["tokens"] == 4 * track["rungs"][BASE]["tokens"]
    assert {s.run.eval_every for s in specs if "_corner" in s.arm} == {40}  # as many evaluations


def test_an_arm_is_tuned_again_where_the_carried_rate_is_wrong(plain):
    _, track, specs = plain
    wide = track["rungs"]["wide"]["arms"]["adamw"]
    assert wide["point"]["lr"] == pytest.approx(1e-3)
    assert wide["regret"]["mean"] == pytest.approx(0.02, abs=0.01)  # one octave beside it
    long = track["rungs"]["long"]["arms"]["adamw"]
    assert long["point"]["lr"] == long["carried"]["lr"]
    kept = {s.run_id for s in specs if s.arm.startswith("adamw_long") and s.run.seed < 100}
    assert len(kept) == 5  # the same runs are judged, once


def test_what_was_carried_is_judged_as_it_is_without_trials():
    _, track, specs = climbed(ladder_of("ladder.trials=0"), valley)
    assert not [s for s in specs if s.run.seed >= 100]
    assert not track["tuned"]
    assert all(arm["regret"] is None for rung in track["rungs"].values() for arm in rung["arms"].values())
    [climb] = track["climbs"]
    one_choice = pytest.approx(0.004 * 2**0.5)  # of two arms, the same on all rungs
    for difference in (climb["overall"], climb["overall_carried"], *climb["carried"].values()):
        assert difference["luck"]["sd"] == one_choice
    assert "luck" not in climb["trend"]  # it moves all rungs alike


def test_a_bigger_check_trains_the_arm_that_is_asked_about_and_its_rival_alone():
    arms = ("rivals=soap", "ablation.mine.arms=[adamw]", "check=bigger")
    config = config_of("study=optimizers", *arms)
    rungs = Rungs(config, tuned(adamw=2.0, muon=1.9, soap=1.8), "adam_none", {})
    assert rungs.compared == [("adamw", "soap", True)]
    assert rungs.carried("adamw", "bigger") == POINT
    unasked = config_of("study=optimizers", "rivals=soap", "check=bigger")
    best = Rungs(unasked, tuned(adamw=2.0, muon=1.9, soap=1.8), "adam_none", {})
    assert best.compared == [("soap", "muon", True)]  # the best two by validation


# -- what is said --------------------------------------------------------------------------------------------


def test_the_contrast_and_the_trend_are_those_of_a_plain_calculation(plain):
    _, track, _ = plain
    [climb] = track["climbs"]
    assert (climb["arm"], climb["reference"], climb["asked"]) == ("muon", "adamw", True)
    seeds, names = [str(s) for s in SEEDS], list(track["rungs"])
    lucks = [arm["luck"]["sd"] for rung in track["rungs"].values() for arm in rung["arms"].values()]
    assert any(lucks)
    by_rung = {}
    for name, rung in track["rungs"].items():
        runs = [rung["arms"][arm] for arm in ("muon", "adamw")]
        of = [{s: valley_of(name, arm, rung, s) for s in seeds} for arm in ("muon", "adamw")]
        by_rung[name] = np.array([of[0][s] - of[1][s] for s in seeds])
        assert [len(arm["runs"]) for arm in runs] == [5, 5]
        assert climb["rungs"][name]["mean"] == pytest.approx(by_rung[name].mean())
    whole = np.array([by_rung[name] for name in names])  # (rungs, seeds)
    assert climb["overall"]["mean"] == pytest.approx(whole.mean())
    plain_t = stats.ttest_1samp(whole.mean(axis=0), 0).confidence_interval(0.95)
    assert climb["overall"]["low"] <= plain_t.low  # the luck of the tunings widens it
    assert climb["overall"]["high"] >= plain_t.high
    doublings = [math.log2(track["rungs"][name]["compute"]) for name in names]
    slopes = np.polyfit(doublings, whole, 1)[0]
    assert climb["trend"]["mean"] == pytest.approx(slopes.mean())
    assert (climb["verdict"], climb["course"]) == ("better", "loses")
    assert "muon against adamw, mean of 5 rungs: −0.1" in climb["sentence"]
    assert "it loses to adamw with more compute: +0.0" in climb["sentence"]


def valley_of(name, arm, rung, seed):
    run = type("Run", (), {"optimizer": type("O", (), {"lr": rung["arms"][arm]["point"]["lr"]})})
    return valley(arm, name, run, int(seed))


def test_with_luck_of_nothing_the_contrast_is_the_t_interval_itself():
    draw = np.random.default_rng(0)
    losses = [{f"r{k}": dict(zip("abcde", draw.normal(size=5), strict=True)) for k in range(3)} for _ in "xy"]
    weights = {"r0": 0.5, "r1": -1.5, "r2": 1.0}
    found = compared.contrast(weights, *losses, comparisons=2, luck=NO_LUCK)
    sums = [sum(w * (losses[0][r][s] - losses[1][r][s]) for r, w in weights.items()) for s in "abcde"]
    plain = stats.ttest_1samp(sums, 0)
    assert (found["low"], found["high"]) == pytest.approx(tuple(plain.confidence_interval(0.95)))
    assert (found["joint_low"], found["joint_high"]) == pytest.approx(tuple(plain.confidence_interval(0.975)))


def test_a_diverged_run_leaves_no_trend_and_a_rung_without_a_loss_no_contrast():
    def one_diverges(arm, rung, run, seed):
        return math.inf if (arm, rung, seed) == ("muon", "corner", 3) else valley(arm, rung, run, seed)

    _, track, _ = climbed(ladder_of(), one_diverges)
    [climb] = track["climbs"]
    assert climb["overall"]["method"] == "rank"
    assert climb["trend"] is None
    assert climb["course"] == "undecided"

    def none_trains(arm, rung, run, seed):
        return math.inf if (arm, rung) == ("muon", "corner") else valley(arm, rung, run, seed)

    decision, track, _ = climbed(ladder_of(), none_trains)
    [climb] = track["climbs"]
    assert (climb["overall"], climb["verdict"]) == (None, "undecided")
    assert climb["sentence"] == "muon against adamw: nothing to compare on corner"
    assert "muon on corner: no point that was tried there completed" in decision["notes"]
    assert stage_of("ladder").headlines(decision)


def test_an_arm_that_could_not_be_tuned_is_said_and_not_trained():
    earlier = tuned(adamw=2.0, muon=1.9)
    earlier["tune"]["tracks"]["adam_none"]["arms"]["muon"] |= {
        "untuned": "no rate completes",
        "val_loss": None,
    }
    _, track, specs = climbed(ladder_of(), valley, earlier)
    assert {s.role for s in specs} == {"adamw"}
    [climb] = track["climbs"]
    assert (climb["verdict"], climb["sentence"]) == ("untuned", "muon could not be tuned: no rate completes")


# -- speed ---------------------------------------------------------------------------------------------------


def runs_of(*curves):
    """An arm and the results of its runs, whose losses at steps 10, 20, … are these."""
    made = {}
    for seed, losses in enumerate(curves):
        rows = [(10 * (i + 1), loss, float(i + 1)) for i, loss in enumerate(losses)]
        made[str(seed)] = {"outcome": "completed", "curve": rows}
    return made


def test_a_speed_up_is_the_ratio_of_steps_to_the_loss_that_both_reach():
    """The first arm ends lower, and is at the second's last loss at step 20 of 40: twice as fast. It may be
    3/2 (the second may have been there soon after step 30) or four times (the first soon after 10)."""
    arm, other = runs_of((4.0, 2.0, 1.5, 1.0), (4.0, 2.0, 1.5, 1.0)), runs_of((5, 4, 3, 2.0), (5, 4, 3, 2.0))
    results = {f"a{s}": r for s, r in arm.items()} | {f"b{s}": r for s, r in other.items()}
    first, second = ({"runs": {s: f"{x}{s}" for s in arm}} for x in "ab")
    found = compared.speed_up(first, second, results, 1, 1)
    assert found["steps"] == pytest.approx(2.0)
    assert (found["steps_low"], found["steps_high"]) == pytest.approx((1.5, 4.0))
    assert found["seconds"] == pytest.approx(2.0)
    slower = compared.speed_up(second, first, results, 1, 1)
    assert slower["steps"] == pytest.approx(0.5)
    assert (slower["steps_low"], slower["steps_high"]) == pytest.approx((0.25, 1 / 1.5))
    assert compared.speed_up(first, first, results, 1, 1)["steps"] == 1.0
    del results["b1"]
    assert compared.speed_up(first, second, results, 1, 1)["seeds"] == 1


def test_the_length_at_which_the_rival_would_end_there_has_fiellers_interval():
    """Its ends are where a t-test of `lead − x · gain` has just that p, which a search over x finds."""
    draw = np.random.default_rng(1)
    seeds = [str(s) for s in range(8)]
    short = dict(zip(seeds, 2.0 + draw.normal(0, 0.02, 8), strict=True))
    arm = {s: x - 0.10 + draw.normal(0, 0.01) for s, x in short.items()}
    long = {s: x - 0.20 + draw.normal(0, 0.02) for s, x in short.items()}
    rungs = {"base": {"steps": 100}, "long": {"steps": 400}}
    found = compared.lengths(("base", "long"), rungs, arm, {"base": short, "long": long}, 3)
    lead = np.array([short[s] - arm[s] for s in seeds])
    gain = np.array([short[s] - long[s] for s in seeds])
    assert found["times"] == pytest.approx(4 ** (lead.mean() / gain.mean()))
    tried = np.linspace(0, 2, 20_001)
    inside = tried[stats.ttest_1samp(lead - tried[:, None] * gain, 0, axis=1).pvalue >= 0.05 / 3]
    assert (found["low"], found["high"]) == pytest.approx((4 ** inside[0], 4 ** inside[-1]), rel=1e-3)
    assert compared.lengths(("base", "long"), rungs, arm, {"base": short, "long": short}, 3) is None


# -- refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["ladder.rungs.wide.width_scale=1"], "ladder.rungs.wide has the suite's own size"),
        (
            ["+ladder.rungs.broad={width_scale: 2}"],
            "ladder.rungs.broad and ladder.rungs.wide have the same size",
        ),
        (["+ladder.rungs.base={steps: 2}"], "ladder.rungs.base is the suite's own size: take another name"),
        (["ladder.trials=2"], "three points at least"),
        (["ladder.rules.lr={depth: 1}"], "ladder.rules.lr=depth is unknown"),
        (["+ladder.rules_of.lion={lr: {width: 0}}"], "ladder.rules_of=lion is unknown"),
        (["+ladder.rungs.other={settings: {optimizer: {lr: 1}}}"], "may change its size and the model alone"),
        (["ladder.arms=some"], "ladder.arms=some is unknown"),
        (["study.stages=[lr_sweep,ablation,ladder]"], "ladder needs tune as well"),
        (["check=bigger"], "check=bigger goes with study=optimizers"),
    ],
)
def test_a_ladder_that_cannot_be_meant_is_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        compose(["study=ladder", *overrides])


def test_a_rung_may_have_another_model():
    config = compose(["study=ladder", "+ladder.rungs.deep={settings: {model: {blocks: 6}}}"])
    config = replace(config, data=replace(config.data, sha256="0" * 64))
    rungs = Rungs(config, tuned(adamw=2.0, muon=1.9), "adam_none", {})
    [deep] = {s.run.model.blocks for s in rungs.kept("adamw", "deep")}
    assert deep == 6
