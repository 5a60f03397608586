"""exp, log, the normal distribution and random numbers from single operations."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.exact_gpt import GOLDEN, numbers

from ebc_lab.verity import cos2pi, normal_
from ebc_lab.verity.bits import pow2
from ebc_lab.verity.functions import exp64, gelu64, log64, rotations, silu64, sqrt32, sqrt64


@pytest.mark.parametrize(("name", "function"), [("exp64", exp64), ("log64", log64), ("cos2pi", cos2pi)])
def test_the_golden_values(name, function):
    golden = GOLDEN[name]
    found = function(numbers(golden["x"], dtype=torch.float64))
    assert torch.equal(found, numbers(golden["y"], dtype=torch.float64))


def test_the_golden_gelu():
    golden = GOLDEN["gelu"]
    y, slope = gelu64(numbers(golden["x"], dtype=torch.float64))
    assert torch.equal(y.float(), numbers(golden["y"]))
    assert torch.equal(slope.float(), numbers(golden["dy"]))


def test_exp_and_log_are_as_close_as_they_say():
    x = -torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 690
    assert (exp64(x) / x.exp() - 1).abs().max() < 3e-13
    y = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 10 + 1e-9
    assert ((log64(y) - y.log()).abs() <= 3e-13 * y.log().abs().clamp(min=1e-3)).all()
    assert exp64(torch.tensor([0.0, -701.0, -math.inf], dtype=torch.float64)).tolist() == [1, 0, 0]
    assert exp64(torch.tensor([math.nan], dtype=torch.float64)).isnan().all()


@pytest.mark.parametrize(
    ("function", "expected", "tolerance"), [(gelu64, F.gelu, 1e-11), (silu64, F.silu, 1e-12)]
)
def test_an_activation_and_its_slope_are_torchs(function, expected, tolerance):
    x = torch.cat([torch.linspace(-9, 9, 3001), torch.tensor([-699.0, 699.0])]).double().requires_grad_()
    wanted = expected(x)
    wanted.sum().backward()
    y, slope = function(x.detach())
    assert torch.allclose(y, wanted.detach(), rtol=tolerance, atol=1e-13)
    assert torch.allclose(slope, x.grad, rtol=tolerance, atol=tolerance)


def test_rotations_are_those_of_cosine_and_sine():
    angles = torch.arange(2000).double()[:, None] * 500.0 ** (-torch.arange(0, 6, 2).double() / 6)
    cosine, sine = rotations(2000, 6, 500.0, torch.device("cpu"))
    assert (cosine - angles.cos()).abs().max() < 1e-9
    assert (sine - angles.sin()).abs().max() < 1e-9


def test_a_root_is_rounded_correctly():
    x = torch.tensor([2.0, 3.0, 1e-45, 1 + 2**-23])
    assert sqrt32(x).tolist() == [torch.tensor(math.sqrt(v)).item() for v in x.tolist()]


def test_roots_of_float64_are_rounded_correctly_where_torch_may_err():
    draw = torch.Generator().manual_seed(0)
    scale = pow2(torch.randint(-300, 300, (200_000,), generator=draw))
    x = torch.cat([torch.rand(200_000, dtype=torch.float64, generator=draw) * scale, torch.zeros(1)])
    assert sqrt64(x).tolist() == [math.sqrt(v) for v in x.tolist()]
    special = sqrt64(torch.tensor([math.inf, math.nan, 4.0], dtype=torch.float64))
    assert special[0] == math.inf
    assert special[1].isnan()
    assert special[2] == 2


def test_the_golden_normal_numbers_and_their_moments():
    first = normal_(torch.empty(8), 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(first, numbers(GOLDEN["normal_seed0"]))
    many = normal_(torch.empty(300, 400), 0.5, torch.Generator().manual_seed(1))
    assert abs(float(many.mean())) < 0.005
    assert abs(float(many.std()) - 0.5) < 0.005
    assert abs(float((many.abs() < 0.5).double().mean()) - 0.6827) < 0.01
