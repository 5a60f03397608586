"""The trust region by group, the one of effective weights, and what the lab hands to those that take it."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.perceptron import backward, grads, norm, sgd, small_model, values
from support.quantized import TernaryLinear
from torch import nn

from ebc_lab.components.optimizer import build as build_optimizers
from ebc_lab.components.stabilizers import STABILIZERS, build
from ebc_lab.components.stabilizers.rivals import TrustRegion
from ebc_lab.config.parts.budget import BudgetConfig
from ebc_lab.config.parts.controller import ControllerConfig
from ebc_lab.config.parts.model import ModelConfig
from ebc_lab.config.parts.stabilizer import StabilizerConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.ebc import EllipsotopeClip
from ebc_lab.workloads.gpt import build as build_model
from ebc_lab.workloads.gpt import hidden_matrices

GOLDEN = json.loads((Path(__file__).parents[2] / "lowbit/golden.json").read_text())["trust_region"]


# -- by group ------------------------------------------------------------------------------------------------


def of_sizes(sizes, squared_norms):
    """A model of one vector for each size, and gradients of these squared norms."""
    model = nn.Module()
    for i, (n, square) in enumerate(zip(sizes, squared_norms, strict=True)):
        p = nn.Parameter(torch.zeros(n, dtype=torch.float64))
        p.grad = torch.full_like(p, math.sqrt(square / n))
        setattr(model, f"w{i}", p)
    return model


def test_each_group_has_its_share_of_the_radius():
    squares = GOLDEN["squared_norms"]
    for per in ("all", "group"):
        model = of_sizes(GOLDEN["numel"], squares)
        region = TrustRegion(
            model, sgd(model, lr=1.0), strength=GOLDEN["radius"], per=per, grouping="tensor", audit_every=0
        )
        stats = region.step()
        c = [norm([p]) / math.sqrt(square) for p, square in zip(values(model), squares, strict=True)]
        expected = GOLDEN["groups"] if per == "group" else 3 * [GOLDEN["whole"]]
        assert c == pytest.approx(expected, rel=1e-12)
        moved = norm(values(model))
        assert moved <= GOLDEN["radius"] * (1 + 1e-12)
        assert stats.clip_coefficient.item() == pytest.approx(moved / math.sqrt(sum(squares)), rel=1e-12)


def test_a_group_is_limited_as_one_and_other_groups_are_not():
    model = of_sizes([30, 50, 20], [0.09, 0.16, 1e-4])
    groups = {"large": ["w1", "w0"], "small": ["w2"]}
    region = TrustRegion(model, sgd(model, lr=1.0), strength=0.1, per="group", grouping=groups, audit_every=0)
    region.step()
    c = [norm([p]) / math.sqrt(square) for p, square in zip(values(model), [0.09, 0.16, 1e-4], strict=True)]
    assert c == pytest.approx(2 * [0.1 * math.sqrt(0.8) / 0.5] + [1.0], rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"per": "group", "grouping": "tensor"}])
def test_schedule_and_factor_multiply_the_radius(options):
    model = small_model()
    region = TrustRegion(
        model, sgd(model), strength=0.01, schedule="linear", total_steps=4, audit_every=0, **options
    )
    for step, (part, factor) in enumerate([(1.0, 1.0), (0.75, 0.5), (0.5, 3.0)]):
        backward(model, step)
        old = values(model)
        region.radius_factor = factor
        region.step()
        moved = norm([new - w for new, w in zip(values(model), old, strict=True)])
        assert moved == pytest.approx(0.01 * math.sqrt(part) * factor, rel=1e-3)


# -- of effective weights ------------------------------------------------------------------------------------


def mixed_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(TernaryLinear(5, 32), nn.Tanh(), TernaryLinear(32, 8, bias=False), nn.Linear(8, 4))


def ternary_parts(model):
    def parts():
        found = []
        for module in model:
            if isinstance(module, TernaryLinear):
                found += [module.effective()] + [p for n, p in module.named_parameters() if n == "bias"]
            else:
                found += list(module.parameters())
        return found

    return parts


@pytest.mark.parametrize("strength", [0.05, 0.3, 1.0, 1e3])
def test_c_is_the_largest_power_of_a_half_that_holds_the_effective_movement(strength):
    model = mixed_model()
    parts = ternary_parts(model)
    region = TrustRegion(
        model, sgd(model, lr=0.5), strength=strength, norm="effective", effective=parts, audit_every=0
    )
    seen = set()
    for step in range(6):
        backward(model, step)
        old = values(model)
        before = [w.detach().clone() for w in parts()]
        updates = [-0.5 * g for g in grads(model)]

        def movement(c, before=before, updates=updates):
            moved = copy.deepcopy(model)
            for p, dw in zip(moved.parameters(), updates, strict=True):
                p.data.add_(dw, alpha=c)
            return norm([a - b for a, b in zip(ternary_parts(moved)(), before, strict=True)])

        expected = next((c for c in (0.5**i for i in range(11)) if movement(c) <= strength), None)
        stats = region.step()
        assert bool(stats.skipped) == (expected is None)
        if expected is None:
            assert all(torch.equal(a, b) for a, b in zip(values(model), old, strict=True))
            continue
        seen.add(expected)
        assert stats.clip_coefficient == expected
        reached = [torch.lerp(w, w + dw, expected) for w, dw in zip(old, updates, strict=True)]
        torch.testing.assert_close(values(model), reached)
    assert (seen == {1.0}) == (strength >= 1)


@pytest.mark.parametrize(
    ("times", "c"), [(1.1, 1.0), (0.9, 1 / 2), (0.3, 1 / 4), (1.2 / 1024, 1 / 1024), (0.9 / 1024, None)]
)
def test_of_weights_that_are_used_as_they_are_it_is_the_latent_norm_in_halves(times, c):
    model = small_model()
    parts = lambda: list(model.parameters())  # noqa: E731
    backward(model)
    strength = times * 0.5 * norm(grads(model))
    region = TrustRegion(
        model, sgd(model), strength=strength, norm="effective", effective=parts, audit_every=0
    )
    stats = region.step()
    assert bool(stats.skipped) == (c is None)
    assert stats.clip_coefficient == (c or 0)


def test_what_does_not_go_together_is_refused():
    model = small_model()
    parts = lambda: list(model.parameters())  # noqa: E731
    for options, words in (
        ({"per": "row"}, "per='row' is unknown; it takes all, group"),
        ({"norm": "raw"}, "norm='raw' is unknown; it takes latent, effective"),
        ({"norm": "effective"}, "norm='effective' needs `effective`"),
        ({"norm": "effective", "effective": parts, "per": "group"}, "halves the whole update"),
        ({"per": "group", "grouping": {"a": ["0.weight"]}}, "is in no group"),
        ({"per": "group", "grouping": "kmeans"}, "grouping='kmeans' is unknown"),
    ):
        with pytest.raises(ValueError, match=words):
            TrustRegion(model, sgd(model), **options)
    gpt = build_model(ModelConfig(blocks=1, width=8, heads=2, context=8), 11, 0)
    with pytest.raises(ValueError, match="grouping='matrices' leaves some out"):
        TrustRegion(gpt, sgd(gpt), per="group", grouping="matrices")


# -- in the lab ----------------------------------------------------------------------------------------------


def built(run, **given):
    model = build_model(run.model, 11, run.seed)
    bases = build_optimizers(model, run.optimizer, hidden_matrices(model))
    return model, lambda **more: build(model, bases, None, run, **given, **more)


RUN = RunConfig(
    steps=12,
    audit_every=4,
    audit_tokens=16,
    curve_every=2,
    model=ModelConfig(blocks=1, width=8, heads=2, context=8),
    budget=BudgetConfig("shadow", target_kl=2e-3, grouping="type"),
    controller=ControllerConfig("fixed"),
)


def test_the_lab_hands_groups_and_effective_weights_to_those_that_take_them():
    for name in STABILIZERS:
        run = replace(RUN, stabilizer=StabilizerConfig(name, per="group"))
        model, make = built(run)
        names = [n for n, _ in model.named_parameters()]
        groups = {"cluster0": names[:3], "cluster1": names[3:]}
        wrapped = make(groups=groups, effective=lambda model=model: list(model.parameters()))
        assert wrapped.curve_every == 2
        if name in ("ebc", "trust_region"):
            assert list(wrapped.groups) == list(groups)
            assert list(make().groups) == ["embedding", "norm", "attention", "mlp", "head"]
    run = replace(RUN, stabilizer=StabilizerConfig("trust_region", norm="effective"))
    model, make = built(run)
    parts = lambda: list(model.parameters())  # noqa: E731
    assert make(effective=parts).effective is parts


def test_a_grouping_by_clusters_is_no_mistake_of_the_earlier_study():
    budget = replace(RUN.budget, grouping="kmeans", exponent="auto")
    model, make = built(replace(RUN, stabilizer=StabilizerConfig("ebc"), budget=budget))
    wrapped = make(groups={"cluster0": [n for n, _ in model.named_parameters()]})
    assert type(wrapped) is EllipsotopeClip
    assert wrapped.settings.exponent == "auto"


@pytest.mark.thorough
@pytest.mark.parametrize("name", STABILIZERS)
def test_a_curve_of_kl_changes_no_stabilizer(name):
    found = []
    for every in (0, 2):
        run = replace(RUN, stabilizer=StabilizerConfig(name), curve_every=every)
        model, make = built(run)
        wrapped = make()
        curves = []
        for step in range(6):
            tokens = torch.randint(11, (6, 8), generator=torch.Generator().manual_seed(step))
            model.zero_grad()
            logits = model(tokens)
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
            curves.append(wrapped.step(tokens, logits, targets=tokens.roll(-1, 1)).kl_curve)
        assert [curve is not None for curve in curves] == [bool(every) and t in (2, 4) for t in range(6)]
        found.append(values(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
