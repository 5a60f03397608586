"""How an arm's best point is searched: the same for all, and until it is found."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from support.played import DECIDED, DIVERGED, FAILED, config_of, done, played

from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import ArmConfig
from ebc_lab.config.study_checks import validate
from ebc_lab.study.inspect.forecast import SCENARIOS, forecast
from ebc_lab.study.stages.stage import stage_of
from ebc_lab.study.stages.statistics import WINDOW_NATS

BEST = {"adamw": 4e-3, "muon": 0.5, "mine": 6e-5}  # far outside of two of the grids
SHAPES = {"trapezoid": 0.01, "warmup_linear": 0.0, "cosine": 0.02, "constant": 0.05}


def suite(*overrides, **arms):
    """study=optimizers with an arm that takes the place of one of the user's own."""
    plain = ("tune.trials=0", "tune.finalists=0", "tune.combined=[]")
    config = config_of("study=optimizers", "study.name=nowhere", *plain, *overrides)
    mine = replace(config.ablation.arms["adamw"], settings={"optimizer": {"name": "lion"}})
    suite = replace(config.ablation, arms={**config.ablation.arms, "mine": mine, **arms})
    config = replace(config, ablation=suite)
    validate(config, study=True)
    return config


def landscape(spec):
    """A valley around each arm's best rate, deeper on one shape and with one warm-up."""
    run = spec.run
    octaves = abs(math.log2(run.optimizer.lr / BEST[spec.role]))
    share = run.lr_schedule.warmup_share or 0.0333  # a constant rate has none
    extra = SHAPES[run.lr_schedule.name] + abs(share - 0.0333) / 10
    return done(2 + 0.03 * octaves + extra + 0.0001 * (run.seed % 2), steps=run.steps)


def decided(config, answer):
    _, specs, results = played("tune", config, DECIDED, answer)
    decision = stage_of("tune").decide(config, specs, results, DECIDED)
    return decision, decision["tracks"]["adam_none"]["arms"], specs


@pytest.fixture(scope="module")
def plain():
    return decided(suite(), landscape)


@pytest.mark.thorough
def test_every_arm_gets_to_its_best_rate_however_far_from_its_grid_that_is(plain):
    decision, arms, _ = plain
    for label, arm in arms.items():
        assert abs(math.log2(arm["point"]["lr"] / BEST[label])) <= 0.5, label
        assert arm["point"].items() >= {"warmup_share": 0.0333, "schedule": "warmup_linear"}.items()
        assert arm["edges"] == {"warmup_share": "low"}  # the shortest of three
    grown = [note for note in decision["notes"] if "grid grown" in note]
    assert len(grown) == 3
    assert grown[2].startswith("mine: lr grid grown down to ")
    assert "adamw's best warmup_share, 0.0333, is the lowest tried" in decision["notes"]
    [headline] = stage_of("tune").headlines(decision)
    assert headline.startswith("adamw lr 0.004 → 2.00")
    assert " · muon lr 0.512 → 2.0" in headline
    assert "passed over" not in headline  # of two seeds one nearly always lies lower


def test_the_curve_is_that_of_the_chosen_shape_and_closes_the_window(plain):
    for arm in plain[1].values():
        curve = arm["curve"]
        assert [p["lr"] for p in curve] == sorted(p["lr"] for p in curve)
        assert all(math.isclose(b["lr"] / a["lr"], 2, rel_tol=1e-3) for a, b in pairwise(curve))
        assert {len(p["seeds"]) for p in curve} == {2}
        span = arm["window"]
        assert not span["open_low"]
        assert not span["open_high"]
        assert span["octaves"] == pytest.approx(2 * WINDOW_NATS / 0.03, abs=0.6)
        assert curve[0]["val_loss"] > arm["val_loss"] + WINDOW_NATS


def test_a_rate_that_diverges_ends_the_window_and_is_in_the_curve():
    def answer(spec):
        return DIVERGED if spec.run.optimizer.lr > 0.01 and spec.role == "adamw" else landscape(spec)

    arm = decided(suite(), answer)[1]["adamw"]
    assert arm["curve"][-1]["val_loss"] is None
    assert arm["window"]["high"] == pytest.approx(0.008)
    assert not arm["window"]["open_high"]


def test_extensions_are_the_same_for_all_and_come_to_an_end():
    _, arms, specs = decided(suite("tune.max_extensions=1", "tune.window=false"), landscape)
    # one octave by growing, and one as the neighbour of the best on the better shape
    assert max(s.run.optimizer.lr for s in specs if s.role == "muon") == pytest.approx(0.128)
    assert arms["muon"]["edges"]["lr"] == "high"
    assert arms["muon"]["window"]["open_high"]  # of the points that there are


@pytest.mark.parametrize(
    ("tune", "words"),
    [
        ({"schedule": ["trapezoid", "wave"]}, "tune.schedule=wave is unknown"),
        ({"schedule": [1]}, "takes names, not 1|is unknown"),
        ({"warmup_share": [0.1, 1.5]}, "must be a finite number >= 0 and < 1"),
        ({"lr": [2e-3, 1e-3]}, "must be increasing"),
        ({"lr": [1e-3], "lr_scale": [1]}, "lr and lr_scale are both the learning rate"),
        ({"lr": [1e-3], "schedule": ["cosine"]}, "every tuned arm must get the same number of runs"),
    ],
)
def test_a_grid_that_cannot_be_meant_is_refused(tune, words):
    with pytest.raises(UserError, match=words):
        suite("tune.search=grid", other=ArmConfig(tune=tune))


# -- an arm whose rate is far below its grid -----------------------------------------------------------------


def only_below(limit, usual=landscape):
    """Arm `mine` diverges above a learning rate."""
    return lambda spec: DIVERGED if spec.role == "mine" and spec.run.optimizer.lr > limit else usual(spec)


@pytest.mark.parametrize("limit", [1e-3, 1e-5])
def test_while_every_rate_diverges_the_grid_goes_down_to_where_the_best_is(limit):
    own = decided(suite(), only_below(limit))[1]["mine"]
    best = min(BEST["mine"], limit)
    assert abs(math.log2(own["point"]["lr"] / best)) <= 1
    rates = [p["lr"] for p in own["curve"]]
    at = rates.index(own["point"]["lr"])
    assert rates[at] / rates[at - 1] == pytest.approx(2, rel=1e-3)
    assert rates[at + 1] / rates[at] == pytest.approx(2, rel=1e-3)  # nor is a rate above it left out
    assert "lr" not in own["edges"]


def test_an_arm_that_never_completes_is_untuned_and_not_trained_further():
    config = suite()
    decision, arms, specs = decided(config, only_below(0.0))
    own = arms["mine"]
    lowest = min(s.run.optimizer.lr for s in specs if s.role == "mine")
    assert lowest < 2e-3 / 256
    assert own["untuned"] == f"no rate between {lowest:.4g} and 0.008 completes"
    assert own["run_id"] is own["val_loss"] is None
    assert any(note.startswith("mine could not be tuned: no rate between") for note in decision["notes"])
    assert "mine could not be tuned" in stage_of("tune").headlines(decision)[0]
    assert len({s.run_id for s in specs}) <= len(forecast(config, scenario=SCENARIOS[-1])["tune"])
    trained = stage_of("ablation").runs(config, DECIDED | {"tune": decision}, {})
    assert {s.role for s in trained if s.kind == "train"} == {"adamw", "muon"}
    _, arms, _ = decided(config, lambda s: FAILED if s.role == "mine" else landscape(s))
    assert arms["mine"]["untuned"] == "no point of its grid completed, and a run failed"


# -- what is chosen, and what is said of it ------------------------------------------------------------------


def test_a_point_counts_as_its_worst_seed():
    """A rate with the lowest mean that trains badly with one of the seeds is not the best."""

    def answer(spec):
        lucky = spec.role == "adamw" and spec.run.optimizer.lr == pytest.approx(8e-3)
        return done(1.5 if spec.run.seed % 2 else 2.3) if lucky else landscape(spec)

    decision, arms, _ = decided(suite(), answer)
    assert arms["adamw"]["point"]["lr"] == pytest.approx(4e-3)
    assert arms["adamw"]["worst_loss"] >= arms["adamw"]["val_loss"]
    [change] = stage_of("tune").would_change(decision)
    assert "one run alone would have chosen adamw_lr0p008" in change
    assert "its worst seed has 2.3" in change


def test_a_constant_rate_is_among_the_shapes_without_a_warmup_at_two_rates():
    def answer(spec):
        better = spec.role == "adamw" and spec.run.lr_schedule.name == "constant"
        return done(landscape(spec)["val_loss"] - 0.2 * better)

    _, arms, specs = decided(suite("tune.window=false"), answer)
    assert arms["adamw"]["point"].items() >= {"lr": 4e-3, "schedule": "constant"}.items()
    assert "warmup_share" not in arms["adamw"]["point"]
    constant = {(s.role, s.run.optimizer.lr) for s in specs if s.run.lr_schedule.name == "constant"}
    assert sum(role == "muon" for role, _ in constant) == 2
    assert sum(role == "adamw" for role, _ in constant) == 3  # and, being best, at the rate above
    assert not any("constant_w0" in s.arm or "w0p0333_constant" in s.arm for s in specs)


# -- any setting of an arm, and as many points for each ------------------------------------------------------

DECAY, BETA = "optimizer.weight_decay", "optimizer.beta2"


def with_decay(spec):
    """Better the nearer the decay is to 1000, three steps beyond the grid, and the nearer beta2 to 0.95."""
    own = spec.run.optimizer
    far = abs(math.log10(own.weight_decay / 1000)) / 50 if own.weight_decay else 0.0
    return done(landscape(spec)["val_loss"] + far + abs(own.beta2 - 0.95) / 10)


def test_any_setting_is_tuned_and_its_grid_grows_by_its_rule_twice_at_most():
    decision, arms, specs = decided(suite("tune.window=false", "tune.max_extensions=4"), with_decay)
    for label in ("adamw", "muon"):
        point = arms[label]["point"]
        assert (point[DECAY], point[BETA]) == (100.0, 0.95)
        assert arms[label]["edges"] == {DECAY: "high", BETA: "low", "warmup_share": "low"}
    decays = {s.run.optimizer.weight_decay for s in specs if s.role == "adamw"}
    assert decays == {0.01, 0.1, 1.0, 10.0, 100.0}
    assert "adamw: weight_decay grid grown up to 100" in decision["notes"]
    assert "adamw's best weight_decay, 100, lies on its grid's high edge" in decision["notes"]
    assert any("_weight_decay100_beta20p95" in s.arm for s in specs)


def test_the_best_of_every_arm_is_chosen_among_the_same_number_of_points():
    """However many settings an arm has, and however far its grid grew; without the window's own points."""
    few = ArmConfig(settings={"optimizer": {"name": "nadamw"}}, tune={"lr": [2e-3, 4e-3, 8e-3]})
    BEST["few"] = 4.4e-3
    decision, arms, specs = decided(suite("tune.trials=20", few=few), with_decay)
    assert {label: arm["trials"] for label, arm in arms.items()} == dict.fromkeys(arms, 20)
    points = {label: [s for s in specs if s.role == label and s.run.seed == 100] for label in arms}
    assert len(points["few"]) > 20  # the window's
    assert arms["few"]["point"]["lr"] == pytest.approx(BEST["few"], rel=0.01)  # half-way, and half-way again
    [cut] = [note for note in decision["notes"] if "trials were used up" in note]
    assert cut.startswith("mine: its 20 trials were used up before all of beta2 was tried: give it a nearer")


def test_trials_are_counted_alike_whether_the_runs_have_results_or_not():
    """A search that is resumed asks for the runs that it asked for before."""
    config = suite("tune.trials=20", "tune.finalists=3", "tune.combined=[warmup_share]")
    _, specs, results = played("tune", config, DECIDED, with_decay)
    for known in range(0, len(results), 7):
        part = dict(list(results.items())[:known])
        asked = {s.run_id for s in stage_of("tune").runs(config, DECIDED, part)}
        assert asked <= {s.run_id for s in specs}


# -- rates with a warm-up, and finalists ---------------------------------------------------------------------


def test_settings_that_matter_together_are_found_together():
    """With the longest warm-up the best rate is two octaves higher: one after the other stays below."""

    def answer(spec):
        octaves = math.log2(spec.run.optimizer.lr / 2e-3)
        long = spec.run.lr_schedule.warmup_share == pytest.approx(0.3333)
        return done(1.9 + 0.1 * abs(octaves - 2) if long else 2.0 + 0.1 * abs(octaves), steps=spec.run.steps)

    chosen = [
        decided(suite("tune.window=false", combined), answer)[1]["adamw"]["point"]
        for combined in ("tune.combined=[]", "tune.combined=[warmup_share]")
    ]
    assert [point["lr"] for point in chosen] == [2e-3, 8e-3]


def test_what_no_arm_tunes_cannot_be_combined():
    with pytest.raises(UserError, match=r"tune.combined=warmup is unknown.*warmup_share"):
        suite("tune.combined=[warmup]")


def lucky_beta(other):
    """At the best rate a beta2 of 0.999 is better on the seeds that search; on others its loss is `other`."""

    def answer(spec):
        near = abs(math.log2(spec.run.optimizer.lr / BEST[spec.role])) < 0.4
        lucky = near and spec.run.optimizer.beta2 == pytest.approx(0.999)
        if lucky and spec.run.seed >= 102:
            return done(other) if math.isfinite(other) else DIVERGED
        return done(landscape(spec)["val_loss"] - 0.05 * lucky)

    return answer


@pytest.mark.parametrize(
    ("other", "words"), [(3.0, "the mean of its seeds is 2."), (math.inf, "diverged there")]
)
def test_a_point_that_only_its_two_seeds_show_good_is_not_chosen(other, words):
    asked = ("tune.window=false", "tune.finalists=6", "tune.final_seeds=4")
    lucky = decided(suite("tune.window=false"), lucky_beta(other))[1]
    decision, arms, specs = decided(suite(*asked), lucky_beta(other))
    for label, arm in arms.items():
        assert lucky[label]["point"][BETA] == 0.999
        assert arm["point"][BETA] < 0.999
        assert arm["finalists"] == 6
        finals = [s for s in specs if s.role == label and s.run.seed >= 102]
        assert sorted({s.run.seed for s in finals}) == [102, 103, 104, 105]
        assert len(finals) == 6 * 4
    assert "trained on 4 further seeds" in decision["rule"]
    [change] = stage_of("tune").would_change(decision)
    assert words in change


def test_where_every_finalist_diverges_on_a_further_seed_the_next_best_point_wins():
    arms = decided(suite("tune.window=false", "tune.finalists=1"), lucky_beta(math.inf))[1]
    for arm in arms.values():
        assert arm["point"][BETA] < 0.999
        assert arm["val_loss"] < 2.1
        margin = arm["margin_sigma"] * DECIDED["lr_sweep"]["tracks"]["adam_none"]["sigma"]
        assert margin < 0.04  # to the next, not to the finalist, which lies 0.05 below


def test_the_seeds_of_finalists_judge_nothing():
    with pytest.raises(UserError, match=r"104"):
        suite("tune.finalists=3", "seeds=[0,1,104]")
    suite("tune.finalists=0", "seeds=[0,1,104]")


@pytest.mark.parametrize(
    ("tune", "more", "words"),
    [
        ({"optimizer.beta9": [0.9]}, {}, r"tune.optimizer.beta9 is no setting of a part \(did you mean opt"),
        ({"beta2": [0.9]}, {}, r"did you mean optimizer.beta2"),
        ({"optimizer.beta2": [0.9, 1.5]}, {}, "must be a finite number >= 0 and < 1, not 1.5"),
        ({"optimizer.lr": [1e-3]}, {}, "an arm tunes it as ablation.arms.other.tune.lr"),
        ({"model.width": [32]}, {}, "of what is trained, not of how"),
        ({"optimizer.momentum": [0.9]}, {}, "momentum=0.9: optimizer.momentum goes with optimizer=sgd"),
        ({"optimizer.arguments.beta": [0.9]}, {}, "goes with a part of your own"),
        ({DECAY: [0.0, 0.1]}, {DECAY: "log"}, "=log needs values above 0: choose linear"),
        ({DECAY: [0.1]}, {DECAY: "log"}, "only two numbers or more can grow"),
        ({"lr": [1e-3]}, {"lr": "log"}, "the others grow by themselves, or never"),
        ({DECAY: [0.1, 0.1]}, {}, "must not name anything twice"),
    ],
)
def test_a_grid_of_a_setting_that_cannot_be_meant_is_refused(tune, more, words):
    with pytest.raises(UserError, match=words):
        suite("tune.trials=20", other=ArmConfig(tune=tune, grows=more))


def test_fewer_trials_than_the_grids_begin_with_are_refused():
    with pytest.raises(UserError, match=r"tune.trials=5 is fewer than the points .*: adamw 12, muon 12"):
        suite("tune.trials=5")
