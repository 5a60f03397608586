"""Settings of a disturbance: what is refused, and how a suite pairs its arms under each."""

import pytest
from support.named import run

from ebc_lab.config.checks import validate_run
from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.config.parts.shock import SHOCKS, ShockConfig

HOOKED = {"optimizer": {"name": "axiom"}, "stabilizer": {"name": "none"}, "memory": {"name": "hooks"}}


def test_noise_in_the_gradient_is_refused_where_there_is_none():
    with pytest.raises(UserError, match="shock=corrupt_gradient: no gradient is left"):
        validate_run(run(HOOKED, {"shock": {"name": "corrupt_gradient"}}))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["shock=lr_spike", "shock.step=60"], "beyond the run's 60 steps"),
        (["shock=label_noise", "shock.size=2"], "at most 1"),
        (["study=shocks", "shock.size=3"], "only shock.step"),
        (["study=shocks", "shock.step=60"], "beyond the run's 60 steps"),
    ],
)
def test_a_disturbance_that_cannot_be_meant_is_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        compose(["scale=smoke", *overrides], study=overrides[0] == "study=shocks")


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
