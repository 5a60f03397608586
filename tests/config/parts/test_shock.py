"""Settings of a disturbance: what is refused, and how a suite pairs its arms under each."""

import pytest
from support.named import run

from ebc_lab.config.checks import validate_run
from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.config.parts.shock import SHOCKS, ShockConfig

EXACT = {"determinism": {"name": "verity"}, "stabilizer": {"name": "none"}}
HOOKED = {"optimizer": {"name": "axiom"}, "stabilizer": {"name": "none"}, "memory": {"name": "hooks"}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (EXACT, "corrupt_gradient: .* choose shock=label_noise, lr_spike or none"),
        (HOOKED, "shock=corrupt_gradient: no gradient is left"),
    ],
)
def test_noise_in_the_gradient_is_refused_where_there_is_none_or_it_is_exact(settings, words):
    with pytest.raises(UserError, match=words):
        validate_run(run(settings, {"shock": {"name": "corrupt_gradient"}}))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["shock.size=3"], "size goes with shock=label_noise, lr_spike or corrupt_gradient, not"),
        (["shock=lr_spike", "shock.step=60"], "beyond the run's 60 steps"),
        (["shock=label_noise", "shock.size=2"], "at most 1"),
    ],
)
def test_a_run_that_cannot_be_meant_is_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        compose(["scale=smoke", *overrides], study=False)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [("shock.size=3", "only shock.step"), ("shock.step=60", "beyond the run's 60 steps")],
)
def test_a_suite_of_shocks_leaves_their_step_alone_to_choose(overrides, words):
    with pytest.raises(UserError, match=words):
        compose(["scale=smoke", "study=shocks", overrides])


def test_shocked_arms_are_paired_with_themselves():
    arms = compose(["scale=smoke", "study=shocks"]).ablation.all_arms()
    assert list(arms)[:4] == ["none", "none_label_noise", "none_lr_spike", "none_corrupt_gradient"]
    assert {arms[f"ebc_{name}"].versus for name in SHOCKS} == {"ebc"}
    assert arms["ebc_lr_spike"].settings == {**arms["ebc"].settings, "shock": {"name": "lr_spike"}}


def test_a_seed_that_never_recovers_is_not_averaged_away():
    peak, steps, share = ShockConfig.figures
    results = [{"shock_peak": 0.5, "shock_recovery_steps": back} for back in (4, None)]
    assert [figure.mean(results) for figure in (peak, steps, share)] == [0.5, None, 0.5]
    assert [figure.mean(results[:1]) for figure in (peak, steps, share)] == [0.5, 4, 1]
    assert share.mean([{}]) is None
