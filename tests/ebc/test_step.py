"""Another arithmetic in the place of torch's operations: whatever a step measures goes through it."""

import math

import pytest
import torch
from torch import nn

from ebc_lab.components.stabilizers.rivals import NormClip
from ebc_lab.ebc import EllipsotopeClip, LaggedClip, StabilizedOptimizer
from ebc_lab.ebc.flat import lay_flat
from ebc_lab.ebc.step import TorchArithmetic


class Scaled(TorchArithmetic):
    """Torch's, one of whose results is scaled."""

    def __init__(self, name, factor):
        self.changed = getattr(super(), name)
        self.factor = factor
        setattr(self, name, self.scaled)

    def scaled(self, *given):
        return self.changed(*given) * self.factor


class Still(TorchArithmetic):
    """No part of an update is any."""

    def interpolate(self, old, new, c, out):
        super().interpolate(old, new, 0.0, out)


@pytest.fixture
def stepped(make_gpt, batches, train):
    """stepped(arithmetic) -> the stats of one step of an audited EBC, and how far the weights moved."""

    def step(arithmetic=None, cls=EllipsotopeClip, flat=True):
        model = make_gpt()
        if flat:
            lay_flat(model.parameters())
        before = [p.detach().clone() for p in model.parameters()]
        settings = {"target_kl": 0.01, "refine_steps": 20, "stretch": None} if cls is EllipsotopeClip else {}
        optimizer = cls(
            model,
            torch.optim.Adam(model.parameters(), lr=0.02),
            arithmetic=arithmetic,
            curve_every=1,
            **settings,
        )
        optimizer.step_index = 20  # an audit, a curve, and one measurement
        (stats,) = train(model, optimizer, batches(1))
        return stats, sum((p - w).abs().sum() for p, w in zip(model.parameters(), before, strict=True)).item()

    return step


def test_without_one_it_is_torchs(stepped):
    for cls in (EllipsotopeClip, StabilizedOptimizer):
        assert str(stepped(cls=cls)) == str(stepped(TorchArithmetic(), cls=cls))


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("norm", {"grad_norm"}),
        ("mean_kl", {"applied_kl", "kl_curve"}),
        ("movement", {"movement"}),
        ("slope", {"slope"}),
    ],
)
def test_every_figure_of_a_step_is_the_arithmetics(stepped, name, changed):
    plain, _ = stepped(cls=StabilizedOptimizer)
    scaled, _ = stepped(Scaled(name, 0.25), cls=StabilizedOptimizer)
    for figure in ("grad_norm", "applied_kl", "kl_curve", "movement", "slope"):
        factor = 0.25 if figure in changed else 1
        assert torch.equal(getattr(scaled, figure), getattr(plain, figure) * factor), figure


@pytest.mark.parametrize(
    ("dtype", "rel"),
    [(torch.float64, 1e-14), (torch.complex128, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)],
)
def test_a_slope_is_summed_up_in_float32_at_least_and_in_float64_where_weights_are(dtype, rel):
    draw = torch.Generator().manual_seed(0)
    g, old, new = ([torch.randn(n, generator=draw).to(dtype) for n in (7, 300)] for _ in range(3))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    products = [a.to(wide) * (c - b).to(wide).conj() for a, b, c in zip(g, old, new, strict=True)]
    slope = TorchArithmetic().slope(g, old, new)
    assert slope.dtype == torch.float64
    assert slope.item() == pytest.approx(sum(p.real.sum().item() for p in products), rel=rel)


def test_c_follows_from_the_arithmetics_kl(stepped):
    plain, moved = stepped()
    scaled, moved_scaled = stepped(Scaled("mean_kl", 4.0))
    assert plain.clip_coefficient < 1
    assert scaled.clip_coefficient.item() == pytest.approx(plain.clip_coefficient.item() / 2)
    assert moved_scaled == pytest.approx(moved / 2, rel=1e-4)
    assert scaled.trial_kl == plain.trial_kl * 4


@pytest.mark.parametrize("flat", [True, False])
def test_trial_weights_and_new_ones_are_the_arithmetics(stepped, flat):
    stats, moved = stepped(Still(), flat=flat)
    assert stats.trial_kl == 0
    assert moved == 0
    assert not stats.kl_curve.any()


def test_what_computes_beside_it_is_refused(make_gpt):
    model = make_gpt()
    adam = torch.optim.Adam(model.parameters())
    beside = {
        "budget": "tracked",
        "controller": "log_pi",
        "schedule": "cosine",
        "exponent": "auto",
        "measure_every": 2,
        "sensitivity_every": 5,
    }
    for key, value in beside.items():
        with pytest.raises(ValueError, match=f"{key}=.*torch's own operations"):
            EllipsotopeClip(
                model, adam, target_kl=0.01, total_steps=9, arithmetic=TorchArithmetic(), **{key: value}
            )
    for cls, settings in ((NormClip, {}), (LaggedClip, {"target_kl": 0.01})):
        adam.hooked = cls is LaggedClip
        with pytest.raises(ValueError, match=f"{cls.__name__} computes with torch's own"):
            cls(model, adam, arithmetic=TorchArithmetic(), **settings)
    adam.hooked = False
    adam.weight_copies = ("z",)
    with pytest.raises(ValueError, match="Adam computes with torch's own"):
        StabilizedOptimizer(model, adam, arithmetic=TorchArithmetic())


class Lenient(TorchArithmetic):
    """For forwards that refuse."""

    refusals = (FloatingPointError,)


class Refusing(nn.Module):
    """Its forward refuses large weights instead of returning what is not finite."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 6))

    def forward(self, x):
        if self.weight.abs().max() > 100:
            raise FloatingPointError("a value is not finite")
        return x[..., None] * self.weight


def test_a_forward_that_refuses_a_trial_step_has_a_kl_that_is_not_finite():
    model = Refusing()
    before = model.weight.detach().clone()
    optimizer = EllipsotopeClip(
        model,
        torch.optim.SGD([model.weight], lr=1.0),
        target_kl=0.01,
        audit_every=0,
        refine_steps=0,
        arithmetic=Lenient(),
    )
    model.weight.grad = torch.full((6,), 1e6)
    stats = optimizer.step(torch.rand(4, 3))
    assert stats.skipped
    assert math.isnan(stats.trial_kl)
    assert optimizer.budget.trial.item() == pytest.approx(0.01)
    assert torch.equal(model.weight, before)


def test_a_forward_that_refuses_the_new_weights_has_an_audit_that_is_not_finite():
    model = Refusing()
    optimizer = StabilizedOptimizer(model, torch.optim.SGD([model.weight], lr=1.0), arithmetic=Lenient())
    model.weight.grad = torch.full((6,), 1e6)
    stats = optimizer.step(torch.rand(4, 3))
    assert stats.applied_kl.isnan()
    assert stats.movement.isnan()
    assert not stats.skipped


def test_an_error_of_a_forward_is_no_kl():
    """With torch's own operations nothing that a forward raises is taken for a step that went too far."""
    model = Refusing()
    optimizer = EllipsotopeClip(model, torch.optim.SGD([model.weight], lr=1.0), target_kl=0.01)
    model.weight.grad = torch.full((6,), 1e6)
    with pytest.raises(ValueError, match="FloatingPointError: a value is not finite"):
        optimizer.step(torch.rand(4, 3))
