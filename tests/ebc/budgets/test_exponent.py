"""`exponent=auto`: KL taken to grow as c^p, with p measured at audits."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.stepping import assert_resumes, go, same, snapshot

from ebc_lab.ebc import ClipSettings, EllipsotopeClip
from ebc_lab.ebc.budgets.measured import shadow_search
from ebc_lab.ebc.budgets.shadow import ExponentEstimate, exponent_between, power_scale

LR = 0.02
GOLDEN = json.loads((Path(__file__).parents[2] / "lowbit/golden.json").read_text())


def clip(model, base=None, **options):
    options = {"target_kl": 0.002, "exponent": "auto", "audit_every": 4, "audit_tokens": 48, **options}
    return EllipsotopeClip(model, base or torch.optim.Adam(model.parameters(), lr=LR), **options)


def number(x):
    return torch.tensor(x, dtype=torch.float64)


# -- the formulas --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["exponent"])
def test_c_follows_from_one_measurement(case):
    scale = power_scale(number(case["delta"]), number(float(case["p"])))
    c = scale(number(case["kl"]), number(case["trial"])).item()
    assert min(1.0, c) == pytest.approx(case["c"], rel=1e-12)


@pytest.mark.parametrize("case", GOLDEN["exponent_estimate"])
def test_the_exponent_between_two_measurements(case):
    p = exponent_between(number(case["kl_c"]), number(case["kl_quarter"]), 1e-7)
    assert p.item() == pytest.approx(case["p"], rel=1e-9)


@given(st.floats(1, 2), st.floats(1e-4, 1), st.floats(1e-4, 1), st.floats(1e-5, 1e3))
def test_one_measurement_is_enough_where_the_power_is_known(p, delta, trial, size):
    def measure(c):
        return size * c**p

    delta, trial = number(delta), number(trial)
    scale = power_scale(delta, number(p))
    found = shadow_search(measure, delta, trial, measurements=1, floor=1e-300, scale=scale)
    assert found.c.item() == pytest.approx(min(1.0, (delta.item() / size) ** (1 / p)), rel=1e-9)
    between = exponent_between(measure(trial), measure(trial / 4), 1e-300)
    assert between.item() == pytest.approx(p, rel=1e-9)


@given(st.floats(1e-9, 1e3), st.floats(0, 1), st.floats(1e-6, 1))
def test_a_power_of_two_has_the_bits_of_the_square_root(kl, delta, trial):
    arguments = {"measurements": 1, "floor": 1e-7}
    delta, trial = number(delta), number(trial)
    square = shadow_search(lambda c: number(kl), delta, trial, **arguments)
    scale = power_scale(delta, number(2.0))
    auto = shadow_search(lambda c: number(kl), delta, trial, scale=scale, **arguments)
    assert auto == square


@pytest.mark.parametrize(
    ("kl", "below", "p"),
    [
        (0.01, 0.01 / 3.9**0.5, 1.0),  # flatter than flips alone: noise
        (0.01, 0.01 / 80, 2.0),
        (0.01, 9e-8, 2.0),  # below the floor, where it would have been clamped to 2 as well
        (2e-7, 9e-8, 2.0),  # and where it would have been 1
        (9e-8, 2e-7, 2.0),
        (0.0, 0.0, 2.0),
        (math.inf, 0.01, math.nan),
        (0.01, math.nan, math.nan),
        (math.nan, 1e-9, math.nan),
    ],
)
def test_what_noise_and_floors_leave_of_it(kl, below, p):
    assert exponent_between(number(kl), number(below), 1e-7).item() == pytest.approx(p, nan_ok=True)


@given(st.lists(st.floats(1, 2), max_size=12))
def test_the_estimate_is_the_median_of_the_last_five(observed):
    estimate = ExponentEstimate("cpu")
    assert estimate.value == 2
    for i, p in enumerate(observed, 1):
        estimate.observe(number(p), torch.tensor(True))
        assert estimate.value.item() == pytest.approx(statistics.median(observed[max(0, i - 5) : i]))


# -- in a step -----------------------------------------------------------------------------------------------


def test_a_checkpoint_restores_it_and_is_as_ever_without_it(make_gpt, batches, backward):
    def build():
        model = make_gpt(blocks=1, width=8)
        return model, clip(model)

    assert_resumes(build, batches(14), backward)
    kept = clip(make_gpt()).state_dict()
    plain = clip(make_gpt(), exponent="square").state_dict()
    assert set(kept) - set(plain) == {"exponent"}
    assert set(kept) >= set(plain)


def test_a_bad_step_observes_nothing_whether_deferred_or_not(make_gpt, batches, backward):
    found = []
    for deferred in (False, True):
        model = make_gpt()
        optimizer = clip(model, torch.optim.Adam(model.parameters(), lr=LR, fused=True), refine_steps=0)
        for t, batch in enumerate(batches(9)):
            optimizer.deferred = deferred
            logits = backward(model, batch)
            if t == 4:
                model.head.weight.grad[0, 0] = torch.nan
            stats = optimizer.step(batch[:, :-1], logits)
            assert bool(stats.skipped) == (t == 4)
        assert optimizer.budget.exponent.seen.isfinite().sum() == 2
        found.append((snapshot(model), optimizer.budget.exponent.seen.nan_to_num(-1)))
    assert same(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_step_without_a_usable_c_observes_nothing(make_gpt, batches, backward):
    model = make_gpt()
    # of the probe's two rows, not of the audit's three
    optimizer = clip(model, forward=lambda m, x: m(x) * (math.nan if len(x) == 2 else 1))
    assert go(model, optimizer, *batches(1), backward).skipped
    assert optimizer.budget.exponent.seen.isnan().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exponent": "cube"}, "exponent='cube' is unknown; it takes square, auto"),
        ({"budget": "tracked"}, "exponent='auto' goes with budget='shadow'"),
        ({"budget": "fisher"}, "exponent='auto' goes with budget='shadow'"),
        ({"measure_every": 2}, "exponent='auto' needs measure_every=1"),
    ],
)
def test_what_takes_kl_to_grow_as_a_square_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ClipSettings(target_kl=0.01, **{"exponent": "auto", **options})
