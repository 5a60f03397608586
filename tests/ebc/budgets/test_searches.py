"""How c is found: the golden bound and the golden shadow searches, entry for entry."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ebc_lab.ebc import clip_coefficient, mean_kl, trust_radius
from ebc_lab.ebc.budgets.measured import shadow_search
from ebc_lab.ebc.budgets.tracked import Track, proposal_scale
from ebc_lab.ebc.options import DRIFT, EARLY_DRIFT, FLICKER, FLICKER_RATE, KL_FLOOR, SURPRISE

positive = st.floats(1e-6, 1e6)


def f64(value) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def linear_kl(golden):
    """c -> the KL of c·dW on the golden linear model."""
    values = golden["linear_model"]
    x, w, dw = (f64(values[k]) for k in ("X", "W", "dW"))
    return lambda c: mean_kl((x @ w).sum(0), (x @ (w + c * dw)).sum(0))


def test_golden_radius(golden):
    values = golden["linear_model"]
    tau = trust_radius(f64(values["delta"]))
    tokens = len(values["X"][0])
    assert tau.item() == pytest.approx(values["tau_rms"], rel=1e-6)
    assert tau.item() * math.sqrt(tokens) == pytest.approx(values["tau_sum"], rel=1e-6)


@given(positive, positive)
def test_c_is_at_most_one_and_spends_the_radius(radius, surrogate):
    c = clip_coefficient(f64(radius), f64(surrogate)).item()
    assert 0 < c <= 1
    assert c * surrogate == pytest.approx(min(radius, surrogate))


def test_no_movement_is_not_clipped_and_an_unknown_one_is_not_applied():
    assert clip_coefficient(0.1, 0.0) == 1
    assert math.isnan(clip_coefficient(0.1, math.nan))
    assert math.isnan(clip_coefficient(0.1, math.inf))


@pytest.mark.parametrize(
    ("case", "measurements"),
    [
        ("start_0p1", 3),
        ("start_1e3", 3),
        ("start_1e5_below_floor", 3),
        ("first_nonfinite", 3),
        ("all_nonfinite", 3),
        ("one_measurement", 1),
        ("large_budget", 3),
    ],
)
def test_golden_shadow(golden, case, measurements):
    shadow = golden["linear_model"]["shadow"]
    values = shadow[case]
    true_kl = linear_kl(golden)
    scripted = [entry["kl"] is None for entry in values["trace"]]
    trace = []

    def measure(trial: Tensor) -> Tensor:
        kl = f64(math.nan) if scripted[len(trace)] else true_kl(trial)
        trace.append((trial.item(), kl.item()))
        return kl

    trial = f64(values["trace"][0]["c_try"])
    found = shadow_search(
        measure, f64(values["delta"]), trial, measurements=measurements, floor=shadow["floor"]
    )

    want = [(entry["c_try"], math.nan if entry["kl"] is None else entry["kl"]) for entry in values["trace"]]
    assert [t for t, _ in trace] == pytest.approx([t for t, _ in want], rel=1e-6)
    assert [kl for _, kl in trace] == pytest.approx([kl for _, kl in want], rel=1e-6, nan_ok=True)
    assert found.measurements == len(want)
    c = math.nan if values["skipped"] else values["c"]
    assert found.c.item() == pytest.approx(c, rel=1e-6, nan_ok=True)
    assert found.next_trial.item() == pytest.approx(values["next_c_try"], rel=1e-6)
    assert bool(found.skipped) == values["skipped"]
    assert (found.trial.item(), found.kl.item()) == pytest.approx(want[-1], rel=1e-6, nan_ok=True)
    applied = 0.0 if found.skipped else true_kl(found.c).item()
    assert applied == pytest.approx(values["applied_kl"], rel=1e-6)


def search(kl, *, delta=1e-2, trial=0.1, measurements=3):
    return shadow_search(kl, f64(delta), f64(trial), measurements=measurements, floor=KL_FLOOR["float32"])


@given(st.floats(1e-4, 1e3), st.floats(1e-4, 1.0), st.integers(1, 3))
def test_a_quadratic_kl_is_met_exactly(curvature, trial, measurements):
    found = search(lambda c: curvature * c**2, trial=trial, measurements=measurements)
    if curvature * trial**2 >= KL_FLOOR["float32"]:
        assert found.c.item() == pytest.approx(min(1.0, math.sqrt(1e-2 / curvature)))
    assert 0 < found.c <= 1
    assert 0 < found.next_trial <= 1


@given(st.lists(st.floats(0.0, 1e3), min_size=3, max_size=3), st.floats(1e-4, 1.0), st.integers(1, 3))
def test_a_step_goes_little_further_than_was_measured_whatever_the_kl_does(kls, trial, measurements):
    seen = iter(kls)
    arguments = {"measurements": measurements, "floor": 1e-7}
    found = shadow_search(lambda c: f64(next(seen)), f64(1e-2), f64(trial), stretch=1.5, **arguments)
    assert 0 < found.c <= 1.5 * found.trial
    seen = iter(kls)
    free = shadow_search(lambda c: f64(next(seen)), f64(1e-2), f64(trial), **arguments)
    assert found.c == min(free.c, 1.5 * free.trial)
    assert (found.next_trial, found.trial) == (free.next_trial, free.trial)  # measured again, it may go on


def test_nothing_seen_at_the_whole_update_gives_one():
    found = search(lambda c: torch.zeros_like(c), trial=0.1)
    assert (found.c.item(), found.measurements) == (1, 2)  # never unmeasured: 0.1 first, then 1


def test_nothing_seen_and_nothing_left_accepts_the_trial():
    found = search(lambda c: torch.zeros_like(c), trial=0.1, measurements=1)
    assert (found.c.item(), found.next_trial.item(), bool(found.skipped)) == (0.1, 1.0, False)


def test_rounding_below_zero_counts_as_nothing():
    found = search(lambda c: f64(-1e-9), trial=0.01, measurements=1)
    assert (found.kl.item(), found.c.item()) == (0, 0.01)


@pytest.mark.parametrize(("ratio", "measured"), [(1.49, 1), (1.51, 2), (1 / 1.49, 1), (1 / 1.51, 2)])
def test_a_far_answer_is_measured_again(ratio, measured):
    at_trial = 1e-2 / ratio**2  # one measurement answers c = ratio · trial
    found = search(lambda c: at_trial * (c / 0.1) ** 2, trial=0.1)
    assert found.c.item() == pytest.approx(0.1 * ratio)
    assert found.measurements == measured


# -- predicted and measured ----------------------------------------------------------------------------------

UNKNOWN = Track(f64(math.nan), f64(math.nan), f64(FLICKER))


def test_golden_track(own_golden):
    values = own_golden["tracked"]
    track = UNKNOWN
    steps = []
    for i, seen in enumerate(values["seen"]):
        track = track.later(EARLY_DRIFT if i < values["early"] else DRIFT)
        innovation = f64(math.nan)
        if seen is not None:
            innovation = track.innovation(f64(seen))
            track = track.measured(f64(seen), 9 / values["tokens"])
        steps.append([n.item() for n in (track.log_ratio, track.variance, track.flicker, innovation)])
    for i, name in enumerate(("log_ratio", "variance", "flicker", "innovation")):
        want = [math.nan if v is None else v for v in values[name]]
        assert [step[i] for step in steps] == pytest.approx(want, rel=1e-12, nan_ok=True), name


def test_golden_proposal_scale(own_golden):
    values = own_golden["tracked"]
    found = proposal_scale(*(f64(values[name]) for name in ("fall", "grad_norm", "norm")))
    assert found.tolist() == pytest.approx(values["scale"], rel=1e-12)


@pytest.mark.thorough
@pytest.mark.parametrize("flicker", [0.01, 0.16])
@pytest.mark.parametrize("tokens", [64, 256])
def test_its_variances_are_those_of_its_errors_where_the_ratio_moves_as_assumed(tokens, flicker):
    generator = torch.Generator().manual_seed(0)
    noise = 9 / tokens

    def draw(variance):
        return variance**0.5 * torch.randn(4000, generator=generator, dtype=torch.float64)

    ratio = torch.zeros(4000, dtype=torch.float64)
    track = Track(*(torch.full_like(ratio, start) for start in (math.nan, math.nan, FLICKER)))
    for _ in range(200):
        ratio = ratio + draw(DRIFT)
        here = ratio + draw(flicker)
        seen = here + draw(noise)
        track = track.later(DRIFT).measured(seen, noise)
    assert track.flicker.mean().item() == pytest.approx(flicker, rel=0.1, abs=0.12 * noise)
    error = (track.log_ratio - ratio).square().mean().item()
    assert error == pytest.approx(track.variance.mean().item(), rel=0.2)
    assert error < 0.5 * (seen - ratio).square().mean().item()
    # of this step's own: as good as what is seen and as what is known, at least
    believed = (track.log_ratio + track.here - here).square().mean().item()
    assert believed < 0.9 * (seen - here).square().mean().item()
    assert believed < 1.1 * (track.log_ratio - here).square().mean().item()


@given(st.floats(-3, 3), st.floats(-3, 3))
def test_a_measurement_never_leads_beyond_itself(predicted, seen):
    after = Track(f64(predicted), f64(0.05), f64(0.02)).measured(f64(seen), 0.07)
    low, high = min(predicted, seen) - 1e-12, max(predicted, seen) + 1e-12
    here = (after.log_ratio + after.here).item()
    assert low <= after.log_ratio.item() <= high
    assert low <= here <= high
    assert abs(seen - here) <= abs(seen - after.log_ratio.item()) + 1e-12
    spread = 0.05 + 0.02 + 0.07
    if abs(seen - predicted) > 1.01 * SURPRISE * spread**0.5:  # a jump: nearly nothing of the old is kept
        assert abs(seen - after.log_ratio.item()) <= (0.02 + 0.07) / (SURPRISE * spread**0.5)
        most = (SURPRISE**2 - 1) * spread
        assert after.flicker.item() == pytest.approx(0.02 + FLICKER_RATE * most)
