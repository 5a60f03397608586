"""A candidate with a lower loss than the chosen one: its tile, the headline and `why` say why it was passed
over."""

import pytest
from support.played import DIVERGED, by_lr, config_of, decided, decided_through, done

from ebc_lab.study.stages.stage import stage_of

TRACK = "adam_none"
ONE_RATE = ("optimizer=adam", "lr_sweep.baseline_scales=[0.5]", "lr_scale.scales=[1,2,4,8]")
SWEPT = by_lr(4e-3)  # replicates 0.01 apart, a natural KL of 0.01
SETTLED = ("optimizer=adam", "calibrate.max_extra=0")


def calibrated(losses, *overrides, c=None):
    """calibrate's decision. `losses`: by δ* or by (δ*, seed); None where a run diverged."""

    def answer(spec):
        target = spec.run.budget.target_kl
        loss = losses.get((target, spec.run.seed), losses.get(target, 2.5))
        return DIVERGED if loss is None else done(loss, (c or {}).get(target, 0.6))

    config = config_of(*SETTLED, *overrides)
    return "calibrate", decided("calibrate", config, decided_through("lr_sweep", config, SWEPT), answer)


def scaled(losses, *overrides, plain=2.5, **more):
    """lr_scale's decision. `losses`: of EBC by its scale; `plain`: without it; `more`: a figure by scale."""

    def answer(spec):
        ebc = spec.role == "ebc"
        own = {k: v.get(spec.lr_scale, 0.5) for k, v in more.items()} if ebc else {}
        return done(losses[spec.lr_scale] if ebc else plain, **own)

    config = config_of(*ONE_RATE, *overrides)
    return "lr_scale", decided("lr_scale", config, decided_through("calibrate", config, SWEPT), answer)


def searched():
    """controller_search's decision: the candidate with the lowest loss is off its target."""

    def answer(spec):
        best = spec.role == "rsl"
        return done(1.9 if best else 2.0, kl_ratio_median=0.4 if best else 1.1)

    config = config_of("optimizer=adam", "study.stages=[lr_sweep,calibrate,controller_search]")
    earlier = decided_through("calibrate", config, SWEPT)
    return "controller_search", decided("controller_search", config, earlier, answer)


BAND = "calibrate.choose=band"
INERT = {2: 1.0, 4: 1.0, 8: 1.0}
CASES = {
    "another seed diverged": (
        lambda: calibrated({0.0125: 2.0, (0.016, 100): 1.9, (0.016, 101): None}, "calibrate.seeds=2"),
        "δ* 0.016, 1.9000: seed 101 diverged there",
    ),
    "lucky with one seed": (
        lambda: calibrated({0.0125: 2.0, (0.016, 100): 1.9, (0.016, 101): 2.3}, "calibrate.seeds=2"),
        "δ* 0.016, 1.9000: the mean of its seeds is 2.1000",
    ),
    "outside the band": (
        lambda: calibrated({0.0125: 2.0, 0.016: 1.9}, BAND, c={0.016: 0.9}),
        "δ* 0.016, 1.9000: its median c, 0.90, is outside the band",
    ),
    "a scale outside the band": (
        lambda: scaled({1: 2.1, 2: 2.0, 4: 1.9, 8: 2.2}, BAND, c={1: 0.6, 2: 0.6, 4: 0.1, 8: 0.9}),
        "×4, 1.9000: its median c, 0.10, is outside the band",
    ),
    "inert": (
        lambda: scaled({1: 2.5, 2: 2.02, 4: 2.01, 8: 2.0}, clip_rate=INERT),
        "×8, 2.0000: LR inert, ×2 stands for it; 1 more",
    ),
    "without EBC": (
        lambda: scaled({1: 2.1, 2: 2.0, 4: 2.1, 8: 2.2}, plain=1.9),
        "×1, 1.9000: without EBC, and this stage chooses a scale for EBC; 3 more",
    ),
    "off its target": (searched, "rsl, 1.9000: its median KL is 0.40 × δ*, not within ±30%"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_tile_the_headline_and_why_name_what_was_passed_over(case):
    make, said = CASES[case]
    name, decision = make()
    stage = stage_of(name)
    tiles = {label: remark for label, _, remark in stage.rows(TRACK, decision)}
    assert tiles["validation loss"] == f"nats per token; lower, but passed over: {said}"
    assert f"; lower, but passed over: {said}" in stage.headlines(decision)[0]
    assert said.partition(";")[0] in stage.would_change(decision)[0]


def test_nothing_is_said_where_the_lowest_loss_was_chosen():
    name, decision = calibrated({0.0125: 2.0})
    told = [*stage_of(name).headlines(decision), *map(str, stage_of(name).rows(TRACK, decision))]
    assert not any("passed over" in text for text in told)


def test_another_tracks_candidate_is_not_passed_over():
    """Every optimizer has a choice of its own."""
    config = config_of("lr_sweep.optimizers=[adam,muon]", "lr_sweep.keep=all", "calibrate.max_extra=0")

    def answer(spec):
        return done(1.5 if spec.track == "muon_none" else 2.0 + spec.run.budget.target_kl)

    decision = decided("calibrate", config, decided_through("lr_sweep", config, SWEPT), answer)
    assert not any("passed over" in line for line in stage_of("calibrate").headlines(decision))
