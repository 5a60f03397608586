"""The mistakes of the earlier study: each does what it did there, chosen by the run's settings."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.against_reference import DIFFERENCES, EXACT, STEPS, clipped_steps, compare, run_both
from support.forensic_reference import ForensicReference
from support.pairwise import contract
from support.stepping import assert_resumes, go

from ebc_lab.components import stabilizers
from ebc_lab.components.forensics import (
    ForensicClip,
    ForensicFilter,
    ForensicSettings,
    Guard,
    UncorrectedAdam,
)
from ebc_lab.config.parts.budget import BudgetConfig
from ebc_lab.config.parts.controller import ControllerConfig
from ebc_lab.config.parts.stabilizer import StabilizerConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.ebc import EllipsotopeClip
from ebc_lab.ebc.options import BETA_INITS, CADENCES, GUARDS, UNITS

LR = 0.02


def clip(model, base=None, **options):
    base = base or torch.optim.Adam(model.parameters(), lr=LR)
    return ForensicClip(model, base, **{"target_kl": 0.002, **options})


# -- when the lab chooses it ---------------------------------------------------------------------------------

MISTAKES = {
    "guard": "shrink",
    "beta_init": "zero",
    "units": "per_lr",
    "cadence": "published",
    "controller": "pi",
}


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_a_run_that_asks_for_a_mistake_gets_the_subclass_and_any_other_the_method(make_gpt, mistake):
    given = {key: value for key, value in MISTAKES.items() if key == mistake}
    controller = ControllerConfig(given.pop("controller", "fixed"))
    budget = BudgetConfig("surrogate", target_kl=0.002, **given)
    run = RunConfig(stabilizer=StabilizerConfig("ebc"), budget=budget, controller=controller)
    model = make_gpt()
    built = stabilizers.build(model, [torch.optim.Adam(model.parameters(), lr=LR)], None, run)
    assert type(built) is (EllipsotopeClip if mistake is None else ForensicClip)


@pytest.mark.thorough
def test_without_a_mistake_the_subclass_is_the_method_bit_for_bit(make_gpt, batches, backward):
    ends = []
    for cls in (EllipsotopeClip, ForensicClip):
        model = make_gpt()
        adam = torch.optim.Adam(model.parameters(), lr=LR)
        optimizer = cls(model, adam, target_kl=0.002, budget="surrogate", audit_every=3)
        for batch in batches(7):
            go(model, optimizer, batch, backward)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("key", MISTAKES)
def test_unknown_names_are_refused_with_those_there_are(key):
    known = ", ".join(ForensicSettings.names[key])
    with pytest.raises(ValueError, match=f"{key}='else' is unknown; it takes {known}"):
        ForensicSettings(target_kl=0.01, budget="surrogate", **{key: "else"})


# -- against the slow transcription --------------------------------------------------------------------------

RUNS = {
    "shadow-pi-linear": {"budget": "shadow", "controller": "pi", "schedule": "linear"},
    "l1-pi-published": {"controller": "pi", "cadence": "published", "target_kl": 0.02},
    "l1-per_lr-log_pi": {"units": "per_lr", "controller": "log_pi"},
    "sqrtl_l2-rsl-shrink-sweep": {
        "aggregate": "sqrtl_l2", "controller": "rsl",
        "guard": "shrink", "cadence": "sweep", "target_kl": 0.02,
    },
    "matrices-shrink": {
        "aggregate": "l2",
        "guard": "shrink", "grouping": "matrices", "cadence": "published", "target_kl": 0.02,
    },
    "matrices-shrink_published": {
        "guard": "shrink_published", "grouping": "matrices", "cadence": "published", "target_kl": 0.02,
        "audit_every": 12,  # before c is so small that the movement is rounding
    },
    "l2-shrink": {"aggregate": "l2", "guard": "shrink", "grouping": "tensor", "target_kl": 0.02},
    "l2-shrink_inflate-log_pi": {"aggregate": "l2", "guard": "shrink_inflate", "controller": "log_pi"},
}  # fmt: skip


SLOWLY = ("l1-per_lr-log_pi", "matrices-shrink", "l2-shrink")


@pytest.mark.parametrize(
    "options",
    [pytest.param(RUNS[n], id=n, marks=pytest.mark.slow if n in SLOWLY else ()) for n in RUNS],
)
def test_it_is_what_the_slow_transcription_does(make_gpt, batches, backward, options):
    options = {"budget": "surrogate", **options}
    classes = (ForensicClip, ForensicReference)
    fast_steps, slow_steps, *models = run_both(make_gpt, batches, backward, options, classes=classes)
    compare(fast_steps, slow_steps, *models, rel=EXACT if options["budget"] == "shadow" else DIFFERENCES)
    assert clipped_steps(slow_steps) > STEPS // 2
    assert {step.guard < 1 for step in slow_steps} == ({True, False} if "guard" in options else {False})


FORENSIC = (GUARDS, BETA_INITS, UNITS, (*CADENCES, "published"), ("fixed", "log_pi", "pi"))


@contract(("guard", "beta_init", "units", "cadence", "controller"), *FORENSIC)
def test_a_checkpoint_restores_each_bit_for_bit(
    make_gpt, batches, backward, guard, beta_init, units, cadence, controller
):
    options = {"guard": guard, "beta_init": beta_init, "units": units, "cadence": cadence}

    def build():
        model = make_gpt(blocks=1, width=8)
        schedule = {"schedule": "cosine", "total_steps": 30, "audit_every": 4, "target_kl": 0.005}
        return model, clip(
            model, budget="surrogate", aggregate="l2", controller=controller, **options, **schedule
        )

    assert_resumes(build, batches(20), backward)


# -- beta ----------------------------------------------------------------------------------------------------


def test_golden_published_filter(golden):
    values = golden["beta_filter"]
    tracked = ForensicFilter(published=True)
    betas = [tracked.update(torch.tensor(o, dtype=torch.float64)).item() for o in values["observed"]]
    assert betas == pytest.approx(values["published"], rel=1e-6)


def test_a_filter_from_zero_stays_small():
    zero = ForensicFilter(published=True, zero=True)
    first = ForensicFilter(published=True)
    for _ in range(20):
        slow = zero.update(2.0)
        immediate = first.update(2.0)
    assert slow.item() == pytest.approx(2 * (1 - 0.95**20), rel=1e-5)
    assert immediate == 2


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("when", [0, 1, 5])
def test_an_observation_that_is_not_finite_changes_nothing(published, zero, when):
    plain = ForensicFilter(published, zero)
    disturbed = ForensicFilter(published, zero)
    for i, value in enumerate([2.0, 2.2, 3.0, 2.1, 1.0, 2.0]):
        if i == when:
            disturbed.update(math.nan)
            disturbed.update(math.inf)
        assert torch.equal(plain.update(value), disturbed.update(value))


def test_the_published_cadence_sweeps_every_200_steps_with_two_groups_in_turn_between(make_gpt):
    optimizer = clip(make_gpt(), budget="surrogate", cadence="published")
    groups = list(optimizer.groups)
    due = {t: optimizer.sensitivities.due(t, optimizer.budget.bounded) for t in range(1000)}
    assert [t for t in due if due[t] == groups] == [0, 200, 400, 600, 800]
    assert {t for t in due if due[t]} == set(range(0, 1000, 20))
    assert [due[t] for t in (20, 40, 60)] == [groups[:2], groups[2:], groups[:2]]


# -- the guard and units -------------------------------------------------------------------------------------


rhos = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20)
moving = pytest.mark.parametrize("kind", ["shrink", "shrink_inflate", "shrink_published"])


@moving
def test_golden_guard(golden, kind):
    values = golden["guard_shrink"]
    guard = Guard(kind)
    factors = []
    for i, rho in enumerate(values["rho"]):
        guard.audit(rho, i * values["audit_every"])
        factors.append(guard.factor.item())
    assert factors == pytest.approx(values["factor"], rel=1e-6)
    assert guard.count == 2


def test_no_guard_corrects_nothing_and_a_step_that_one_corrects_is_not_captured(make_gpt, monkeypatch):
    assert Guard("none").audit(5.0, 0).item() == 1
    monkeypatch.setattr(EllipsotopeClip, "kind", lambda self, t: ("audit",) if self.audits(t) else ())
    for guard, audits in (("none", ("audit",)), ("shrink", None)):
        optimizer = clip(make_gpt(), budget="surrogate", audit_every=2, guard=guard)
        assert [optimizer.kind(t) for t in range(4)] == [audits, (), audits, ()]


@given(rhos)
def test_a_guard_never_widens_the_radius_and_counts_what_shrank_it(values):
    guard = Guard("shrink")
    for i, rho in enumerate(values):
        before = guard.factor.item()
        guard.audit(rho, 10 * i)
        assert guard.factor <= 1
        assert (guard.factor >= before * (1 - 1e-12)) if rho <= 1 else (guard.factor <= 1 / rho * (1 + 1e-12))
    assert guard.count == sum(rho > 1 for rho in values)


@moving
@given(rho=st.floats(1.01, 1e3), start=st.integers(0, 500), cuts=st.lists(st.integers(1, 199), max_size=5))
def test_half_of_ln_g_is_recovered_in_200_steps_however_many_audits(kind, rho, start, cuts):
    guard = Guard(kind)
    guard.audit(rho, start)
    assert guard.log_factor.item() == pytest.approx(-math.log(rho))  # no recovery before the first
    for cut in sorted(set(cuts)):
        guard.audit(0.5, start + cut)
    guard.audit(0.5, start + 200)
    assert guard.log_factor.item() == pytest.approx(-0.5 * math.log(rho))


@given(rhos)
def test_only_shrink_inflate_asks_for_larger_betas(values):
    shrink = Guard("shrink")
    inflate = Guard("shrink_inflate")
    for i, rho in enumerate(values):
        assert shrink.audit(rho, i) == 1
        assert inflate.audit(torch.tensor(rho), i).item() == pytest.approx(max(rho, 1.0), rel=1e-6)
    assert inflate.factor.item() == pytest.approx(shrink.factor.item(), rel=1e-5)


@moving
@pytest.mark.parametrize("rho", [math.nan, math.inf, -math.inf])
def test_after_a_rho_that_is_not_finite_only_time_has_passed(kind, rho):
    told = Guard(kind)
    untold = Guard(kind)
    for guard in (told, untold):
        guard.audit(2.0, 0)
    assert told.audit(rho, 100) == 1
    assert told.count == 1
    for guard in (told, untold):
        guard.audit(0.5, 200)
    assert told.factor.item() == pytest.approx(untold.factor.item()) == pytest.approx(2**-0.5)


@pytest.mark.parametrize("budget", ["shadow", "fisher", "calibrated"])
@pytest.mark.parametrize("guard", ["shrink", "shrink_inflate", "shrink_published"])
def test_a_guard_goes_with_a_bound(make_gpt, budget, guard):
    with pytest.raises(
        ValueError, match=f"guard='{guard}' corrects a bound: it goes with budget='surrogate'"
    ):
        clip(make_gpt(), budget=budget, guard=guard)


@pytest.mark.parametrize("lr", [0.5, 0.02])
def test_units_per_lr_divide_by_the_learning_rate(make_gpt, batches, backward, lr):
    seen = {}
    for units in ("logits", "per_lr"):
        model = make_gpt(dtype=torch.float64)
        optimizer = clip(model, torch.optim.Adam(model.parameters(), lr=lr), budget="surrogate", units=units)
        seen[units] = go(model, optimizer, batches(1)[0], backward)
    plain = seen["logits"]
    per_lr = seen["per_lr"]
    assert per_lr.surrogate.item() == pytest.approx(plain.surrogate.item() / lr)
    assert per_lr.contributions.tolist() == pytest.approx((plain.contributions / lr).tolist())
    assert per_lr.clip_coefficient.item() == pytest.approx(plain.clip_coefficient.item() * lr)


# -- Adam ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_uncorrected_adam_corrects_in_no_implementation(implementation):
    """Bit for bit where both corrections are 1: the moments by hand, over several steps."""
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    adam = UncorrectedAdam([p], lr=LR, betas=(0.9, 0.999), eps=1e-8, **implementation)
    w = p.detach().clone()
    m = torch.zeros(3, dtype=torch.float64)
    v = torch.zeros(3, dtype=torch.float64)
    for i in range(5):
        p.grad = torch.tensor([1.0, -0.5, 0.1 * i], dtype=torch.float64)
        adam.step()
        m = 0.9 * m + 0.1 * p.grad
        v = 0.999 * v + 0.001 * p.grad**2
        w = w - LR * m / (v.sqrt() + 1e-8)
    torch.testing.assert_close(p.detach(), w, rtol=1e-14, atol=0)
    assert 1 - 0.99996**UncorrectedAdam.STEP == 1
