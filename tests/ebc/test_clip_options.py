"""What each option of a budgeted step does: weight copies, controllers, low precision, checkpoints …"""

import copy
import math

import pytest
import torch
from support.pairwise import contract
from support.stepping import assert_resumes, go, same, snapshot

from ebc_lab.components.library_optimizers import ScheduleFree
from ebc_lab.ebc import ClipSettings, EllipsotopeClip
from ebc_lab.ebc.options import AGGREGATES, BUDGETS, CADENCES, CONTROLLERS, LEAST_MULTIPLIER

LR = 0.02
GAINS = {"energy": {"a": 0.1}}
every_budget = pytest.mark.parametrize("budget", BUDGETS)


def clip(model, base=None, **options):
    options = {"target_kl": 0.002, "gains": GAINS.get(options.get("controller")), **options}
    return EllipsotopeClip(model, base or torch.optim.Adam(model.parameters(), lr=LR), **options)


def proposal_of(model, optimizer, kind, **settings):
    """Where the base optimizer alone would take the weights from here, by name; gradients are in place."""
    twin = copy.deepcopy(model)
    base = kind(twin.parameters(), **settings)
    base.load_state_dict(copy.deepcopy(optimizer.bases[0].state_dict()))
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        p.grad = q.grad.clone()
    base.step()
    return snapshot(twin), {name: base.state[p] for name, p in twin.named_parameters()}


# -- optimizers whose state holds a copy of the weights ------------------------------------------------------


@pytest.mark.parametrize("grouping", ["block", "matrices"])
@every_budget
def test_a_step_without_a_usable_c_leaves_everything_where_it_was(
    make_gpt, batches, backward, budget, grouping
):
    model = make_gpt()
    broken = [False]
    forward = lambda m, x: m(x) * (math.nan if broken[0] else 1)  # noqa: E731
    optimizer = clip(
        model,
        ScheduleFree(model.parameters(), lr=LR),
        budget=budget,
        grouping=grouping,
        forward=forward,
        cadence="sweep",
    )
    data = batches(3)
    if budget in ("surrogate", "calibrated"):  # betas of the past would do: none is known at the first step
        data = data[2:]
    else:
        for batch in data[:2]:
            assert not go(model, optimizer, batch, backward).skipped
    before = snapshot(model)
    copies = {p: optimizer.bases[0].state[p]["z"].clone() for p in model.parameters() if len(data) > 1}
    broken[0] = True
    stats = go(model, optimizer, data[-1], backward)
    assert (stats.skipped, stats.clip_coefficient, stats.applied_kl) == (True, 0, None)
    assert same(snapshot(model), before)
    for name, p in model.named_parameters():
        assert torch.equal(optimizer.bases[0].state[p]["z"], copies.get(p, before[name]))
    broken[0] = False
    stats = go(model, optimizer, data[0], backward)  # not a step of a sweep, yet every beta is measured
    assert not stats.skipped
    assert stats.sensitivities is None or (stats.sensitivities > 0).all()


@pytest.mark.parametrize("grouping", ["block", "matrices"])
def test_schedule_frees_z_is_scaled_as_the_weights_are(make_gpt, batches, backward, grouping):
    """By c where the budget holds; what it leaves out goes where the base sends it."""
    model = make_gpt()
    optimizer = clip(model, ScheduleFree(model.parameters(), lr=LR), grouping=grouping, target_kl=2e-5)
    for t, batch in enumerate(batches(4)):
        logits = backward(model, batch)
        before = snapshot(model)
        copies = {
            n: optimizer.bases[0].state[p]["z"].clone() if t else before[n]
            for n, p in model.named_parameters()
        }
        proposal, states = proposal_of(model, optimizer, ScheduleFree, lr=LR)
        stats = optimizer.step(batch[:, :-1], logits)
        c = stats.clip_coefficient.item()
        assert 0 < c < 1
        for name, p in model.named_parameters():
            hidden = name.startswith("blocks.") and "norm" not in name
            share = c if hidden or grouping == "block" else 1.0
            assert torch.equal(p, torch.lerp(before[name], proposal[name], share))
            z = optimizer.bases[0].state[p]["z"]
            assert torch.equal(z, torch.lerp(copies[name], states[name]["z"], share))
            assert not torch.equal(z, copies[name])


# -- controllers that look at the loss -----------------------------------------------------------------------


@every_budget
def test_agreement_asks_for_targets_at_audits_alone(make_gpt, batches, backward, budget):
    batch, other = batches(2)
    for given in ({}, {"targets": batch[:, 1:], "probe": (batch[:, :-1], None)}):
        model = make_gpt()
        logits = backward(model, batch)
        with pytest.raises(ValueError, match=r"compares losses: give step\(tokens, logits, targets=\.\.\.\)"):
            clip(model, budget=budget, controller="agreement").step(batch[:, :-1], logits, **given)
    optimizer = clip(model, budget=budget, controller="agreement")
    go(model, optimizer, batch, backward)
    assert not optimizer.step(other[:, :-1], backward(model, other)).skipped


@pytest.mark.thorough
@every_budget
def test_energy_rests_while_the_proposal_climbs(make_gpt, batches, backward, budget):
    model = make_gpt()
    uphill = torch.optim.SGD(model.parameters(), lr=0.5, maximize=True)
    optimizer = clip(model, uphill, budget=budget, controller="energy", audit_every=4)
    first, *others = batches(4)
    assert go(model, optimizer, first, backward).slope > 0
    before = snapshot(model)
    for batch in others:
        stats = go(model, optimizer, batch, backward)
        assert (stats.skipped, stats.clip_coefficient, stats.delta) == (False, 0, 0)
    assert same(snapshot(model), before)


@every_budget
def test_confidence_asks_for_logits_and_targets_at_every_step(make_gpt, batches, backward, budget):
    first, second = batches(2)
    for lacking in ("logits", "targets"):
        model = make_gpt()
        optimizer = clip(model, budget=budget, controller="confidence")
        go(model, optimizer, first, backward)
        given = {"logits": backward(model, second), "targets": second[:, 1:], lacking: None}
        with pytest.raises(ValueError, match="controller='confidence' compares predictions with targets"):
            optimizer.step(second[:, :-1], **given)


# -- low precision and checkpoints ---------------------------------------------------------------------------


def test_the_length_of_a_bfloat16_step_has_more_digits_than_bfloat16(make_gpt, batches, backward):
    model = make_gpt(dtype=torch.bfloat16)
    optimizer = clip(model, radius=1e-3, radius_unit="initial", budget="shadow", target_kl=1.0)
    start = math.sqrt(sum(p.detach().double().square().sum() for p in model.parameters()))
    for batch in batches(5):
        logits = backward(model, batch)
        proposal, _ = proposal_of(model, optimizer, torch.optim.Adam, lr=LR)
        before = snapshot(model)
        stats = optimizer.step(batch[:, :-1], logits, targets=batch[:, 1:])
        moved = math.sqrt(sum((proposal[n] - before[n]).double().square().sum() for n in before))
        assert stats.update_norm.item() == pytest.approx(moved, rel=1e-5)
        assert stats.radius_limit.item() == pytest.approx(1e-3 * start, rel=1e-5)


RULES = (BUDGETS, CONTROLLERS, AGGREGATES, CADENCES, ("constant", *LEAST_MULTIPLIER))


@pytest.mark.thorough
@contract(("budget", "controller", "aggregate", "cadence", "schedule"), *RULES)
def test_a_checkpoint_restores_every_rule_bit_for_bit(
    make_gpt, batches, backward, budget, controller, aggregate, cadence, schedule
):
    rules = {"controller": controller, "aggregate": aggregate, "cadence": cadence, "schedule": schedule}

    def build():
        model = make_gpt(blocks=1, width=8)
        return model, clip(
            model, budget=budget, **rules, total_steps=30, audit_every=4, sensitivity_every=3, target_kl=0.005
        )

    assert_resumes(build, batches(20), backward)


@pytest.mark.thorough
@every_budget
def test_a_state_with_every_budgets_numbers_is_read(make_gpt, batches, backward, budget):
    """As they were when one class carried the numbers of every budget."""
    formerly = {"trial": 0.1, "kl_rate": 0.0, "log_ratio": math.nan, "variance": math.nan, "log_k": math.nan}
    model = make_gpt()
    optimizer = clip(model, budget=budget)
    go(model, optimizer, *batches(1), backward)
    state = optimizer.state_dict()
    assert set(state) & set(formerly) == set(optimizer.budget.initial) - {"flicker"}  # which came later
    resumed = clip(model, budget=budget)
    resumed.load_state_dict({name: torch.tensor(value) for name, value in formerly.items()} | state)
    assert str(resumed.state_dict()) == str(state)


# -- measuring one step in k ---------------------------------------------------------------------------------


def test_between_measurements_c_follows_from_the_last_kl_per_squared_norm(make_gpt, batches, backward):
    model = make_gpt()
    optimizer = clip(model, measure_every=2, refine_steps=0, audit_every=0)
    measured = None
    carried = 0
    for batch in batches(12):
        logits = backward(model, batch)
        before = snapshot(model)
        proposal, _ = proposal_of(model, optimizer, torch.optim.Adam, lr=LR)
        norm = math.sqrt(sum((proposal[n] - before[n]).double().square().sum().item() for n in before))
        stats = optimizer.step(batch[:, :-1], logits)
        if stats.measurements:
            measured = stats.trial_kl.item() / (stats.trial.item() * norm) ** 2
        else:
            carried += 1
            assert stats.clip_coefficient.item() == pytest.approx(
                min(1, math.sqrt(0.002 / measured) / norm), rel=1e-3
            )
    assert carried == 6


def test_every_step_is_measured_by_default_and_never_none(make_gpt, batches, train):
    model = make_gpt()
    assert all(s.measurements for s in train(model, clip(model), batches(8)))
    with pytest.raises(ValueError, match="measure_every must be at least 1"):
        clip(make_gpt(), measure_every=0)


# -- only the first part of a run ----------------------------------------------------------------------------


def test_after_its_share_of_the_run_every_update_is_applied_in_full(make_gpt, batches, backward):
    model = make_gpt()
    optimizer = clip(model, total_steps=12, until=1 / 3, audit_every=3)
    for t, batch in enumerate(batches(12)):
        logits = backward(model, batch)
        proposal, _ = proposal_of(model, optimizer, torch.optim.Adam, lr=LR)
        stats = optimizer.step(batch[:, :-1], logits)
        free = t >= 4
        assert same(proposal, snapshot(model)) is free
        assert (stats.measurements == 0) is free
        assert (stats.applied_kl is not None) is (t % 3 == 0)  # what the plain optimizer does is audited too


def test_the_share_must_be_one_of_a_known_length(make_gpt):
    with pytest.raises(ValueError, match="until must be a share"):
        clip(make_gpt(), until=0.0, total_steps=10)
    with pytest.raises(ValueError, match="needs total_steps"):
        clip(make_gpt(), until=0.5)


# -- what others hand in: a grouping, and a factor on the radius ---------------------------------------------


def test_a_grouping_that_was_made_elsewhere(make_gpt, batches, train):
    names = [name for name, _ in make_gpt().named_parameters()]
    groups = {"cluster0": names[::2], "cluster1": names[1::2]}
    settings = ClipSettings(target_kl=0.002, budget="surrogate", grouping=groups)
    assert hash(settings) == hash(ClipSettings(target_kl=0.002, budget="surrogate", grouping=dict(groups)))
    model = make_gpt()
    optimizer = EllipsotopeClip(model, torch.optim.Adam(model.parameters(), lr=LR), settings=settings)
    for stats in train(model, optimizer, batches(2)):
        assert stats.contributions.shape == (2,)
    assert list(optimizer.groups) == list(groups)
    assert set(optimizer.state_dict()["filters"]) == set(groups)


@pytest.mark.thorough
@pytest.mark.parametrize("budget", ["shadow", "tracked", "surrogate", "fisher"])
def test_a_factor_on_the_radius_widens_one_step(make_gpt, batches, backward, budget):
    found = []
    for factor in (1.0, 0.5):
        model = make_gpt()
        optimizer = clip(model, budget=budget, audit_every=0)
        *start, last = batches(26)
        for batch in start:
            go(model, optimizer, batch, backward)
        kind = optimizer.kind(25)
        # a CUDA graph can hold a step that looks at no measured value and measures no sensitivity
        assert (kind is not None) == (budget in ("surrogate", "fisher"))
        optimizer.radius_factor = factor
        assert optimizer.kind(25) == (kind if factor == 1 else None)
        found.append(go(model, optimizer, last, backward))
        assert not any("radius" in key for key in optimizer.state_dict())
        assert optimizer.controller.delta == 0.002
    full, half = found
    assert (full.delta.item(), half.delta.item()) == pytest.approx((0.002, 0.0005))
    assert half.radius == full.radius / 2
    assert half.target_kl == full.target_kl
    assert full.clip_coefficient < 1
    assert half.clip_coefficient.item() == pytest.approx(full.clip_coefficient.item() / 2, rel=0.02)
