"""The unit sphere: golden values, exact geometry in both precisions, derivatives, refusals."""

import math

import pytest
import torch
from support.ebm_states import GOLDEN, tensor

from ebc_lab.ebm.sphere import distance, exp, geodesic, log, normalise, project, transport

ANGLES = [1e-4, 1e-3, 1e-2, 0.1, 1.0, 2.0, 2.7]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
dimensions = pytest.mark.parametrize("n", [3, 640], ids=["S2", "S639"])
angles = pytest.mark.parametrize("angle", ANGLES)


def frames(n: int, seed: int = 0, rows: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Points and unit tangents of the geodesics the tests follow, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.linalg.qr(torch.randn(rows, n, 2, generator=generator, dtype=torch.float64)).Q
    return x[..., 0], x[..., 1]


def largest(difference: torch.Tensor) -> float:
    return float(difference.double().norm(dim=-1).max())


@pytest.mark.parametrize("case", GOLDEN["sphere"]["cases"], ids=lambda case: f"{case['angle']} rad")
def test_golden_values(case):
    x, y, towards = tensor(case["x"]), tensor(case["y"]), tensor(case["log"])
    point, velocity = geodesic(x, case["speed"] * towards / case["angle"], case["time"])
    found = [distance(x, y), log(x, y), exp(x, towards), project(x, tensor(case["ambient"])), point, velocity]
    names = ["angle", "log", "y", "tangent", "geodesic_x", "geodesic_v"]
    for name, value in zip(names, found, strict=True):
        torch.testing.assert_close(value, tensor(case[name]), rtol=1e-8, atol=1e-10)
    transported = transport(x, y, tensor(case["tangent"]))
    torch.testing.assert_close(transported, tensor(case["transported"]), rtol=1e-8, atol=1e-10)


# -- against points and tangents known from their construction -----------------------------------------------


@dtypes
@dimensions
@angles
def test_angles_logarithms_exponentials_and_geodesics_are_exact_from_1e_4_to_2_7_rad(dtype, n, angle):
    x, u = frames(n)
    y = math.cos(angle) * x + math.sin(angle) * u
    tolerance = TOLERANCE[dtype]
    X, Y = x.to(dtype), y.to(dtype)
    assert float((distance(X, Y).double() - angle).abs().max()) <= tolerance
    assert largest(log(X, Y) - angle * u) <= tolerance
    assert largest(exp(X, (angle * u).to(dtype)) - y) <= tolerance
    assert log(X, Y).dtype == exp(X, Y).dtype == distance(X, Y).dtype == dtype
    point, velocity = geodesic(X, (2 * u).to(dtype), angle / 2)
    assert largest(point - y) <= tolerance
    assert largest(velocity - 2 * (math.cos(angle) * u - math.sin(angle) * x)) <= tolerance


@dtypes
@dimensions
@angles
def test_transport_turns_the_geodesics_plane_and_leaves_the_rest(dtype, n, angle):
    x, u = frames(n, seed=2)
    y = math.cos(angle) * x + math.sin(angle) * u
    v = project(x, torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    v = v / v.norm(dim=-1, keepdim=True)
    along = (v * u).sum(-1, keepdim=True)
    carried = v - along * u + along * (math.cos(angle) * u - math.sin(angle) * x)
    assert largest(transport(x.to(dtype), y.to(dtype), v.to(dtype)) - carried) <= TOLERANCE[dtype]


def test_leading_shapes_broadcast():
    x, u = frames(6, rows=4)
    y = exp(x, u)
    assert distance(x.unsqueeze(1), y).shape == (4, 4)
    torch.testing.assert_close(log(x.unsqueeze(1), y)[2, 3], log(x[2], y[3]))
    torch.testing.assert_close(transport(x[0], y, u[0].expand(4, 6))[1], transport(x[0], y[1], u[0]))
    points, _ = geodesic(x, u, torch.linspace(0.1, 2, 4, dtype=torch.float64))
    torch.testing.assert_close(points[3], geodesic(x[3], u[3], 2.0)[0])


# -- edges ---------------------------------------------------------------------------------------------------


def test_equal_points_are_at_angle_0_with_gradient_0_and_a_projection_as_the_logarithms_derivative():
    x, u = frames(5, rows=1)
    x, u = x[0], u[0]
    angle, slope = torch.func.jvp(lambda y: distance(x, y), (x,), (u,))
    assert (float(angle), float(slope)) == (0.0, 0.0)
    y = x.clone().requires_grad_(True)
    distance(x, y).backward()
    assert torch.equal(y.grad, torch.zeros(5, dtype=torch.float64))
    assert float(log(x, x).abs().max()) < 1e-16
    jacobian = torch.autograd.functional.jacobian(lambda y: log(x, y), x)
    torch.testing.assert_close(jacobian, torch.eye(5).double() - torch.outer(x, x))


def test_a_zero_vector_stays_zero_and_a_zero_velocity_stays_put():
    x, _ = frames(4)
    zero = torch.zeros_like(x)
    assert torch.equal(normalise(zero), zero)
    torch.testing.assert_close(exp(x, zero), x)
    torch.testing.assert_close(geodesic(x, zero, 3.0), (x, zero))


def test_opposite_points_are_refused():
    x, u = frames(8)
    nearly = exp(x, (math.pi - 1e-5) * u)
    for y in (-x, nearly):
        with pytest.raises(ValueError, match="no one geodesic"):
            log(x, y)
        with pytest.raises(ValueError, match="no one geodesic"):
            transport(x, y, u)
    away = exp(x, (math.pi - 1e-3) * u)
    assert largest(log(x, away) - (math.pi - 1e-3) * u) < 1e-9
    assert float((distance(x, -x) - math.pi).abs().max()) < 1e-15


def test_half_precision_is_computed_in_float32_also_under_autocast():
    x, u = (t.bfloat16() for t in frames(64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [normalise(x), exp(x, u), log(normalise(x), normalise(u)), project(x, u), distance(x, u)]
        expected = exp(x.float(), u.float())
    assert {t.dtype for t in found} == {torch.float32}
    torch.testing.assert_close(found[1], expected)


@pytest.mark.parametrize(
    "function", [normalise, exp, log, project, distance, lambda x, v: geodesic(x, v, 0.7)[1], transport]
)
def test_derivatives_agree_in_both_modes_with_differences(function):
    x, u = frames(4, rows=2)
    count = {normalise: 1, transport: 3}.get(function, 2)
    inputs = [t.detach().requires_grad_(True) for t in (x, exp(x, 0.8 * u), u)[:count]]
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
