"""What EBC measures under verity: torch's figures in float64, whose bits are not the machine's."""

import math

import pytest
import torch
from support.exact_gpt import batches
from support.tensors import normal
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ebc_lab.ebc import EllipsotopeClip, StabilizedOptimizer
from ebc_lab.ebc.step import TorchArithmetic
from ebc_lab.verity import Arithmetic

EXACT, TORCH = Arithmetic(), TorchArithmetic()
CLOSE = {"rel": 1e-12, "abs": 0}


@pytest.fixture
def logits():
    """z and z_new, 4 rows of 50 tokens, and a mask of most of these."""
    z = 3 * normal(4, 50, 65)
    return z, z + normal(4, 50, 65, seed=1), normal(4, 50, seed=2) > -1


@pytest.mark.parametrize("masked", [False, True])
def test_kl_and_movement_are_torchs_in_float64(logits, masked):
    z, z_new, mask = logits
    mask = mask if masked else None
    for name in ("mean_kl", "movement"):
        found = getattr(EXACT, name)(z, z_new, mask)
        assert (found.dtype, found.shape) == (torch.float64, ())
        expected = getattr(TORCH, name)(z.double(), z_new.double(), mask)
        assert found.item() == pytest.approx(expected.item(), **CLOSE)


@pytest.mark.parametrize("scale", [1e-3, 1e-30, 1e18])
def test_small_and_large_movements_are_not_lost(scale):
    """Squares go from 1e-60 to 1e38: their sum fits into integers all the same."""
    z = torch.zeros(3, 7)
    z_new = normal(3, 7) * scale
    expected = TORCH.movement(z.double(), z_new.double()).item()
    assert EXACT.movement(z, z_new).item() == pytest.approx(expected, **CLOSE)
    assert EXACT.movement(z, z) == 0
    assert EXACT.mean_kl(z, z) == 0


def test_means_do_not_depend_on_the_order_of_the_tokens(logits):
    z, z_new, mask = (x.flatten(0, 1) for x in logits)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(3))
    for measure in (EXACT.mean_kl, EXACT.movement):
        assert torch.equal(measure(z, z_new, mask), measure(z[order], z_new[order], mask[order]))
        assert torch.equal(measure(z, z_new, mask), measure(z[mask], z_new[mask]))
    assert (EXACT.mean_kl(z[:64], z_new[:64]) * 64 * 2.0**40).frac() == 0  # a sum of whole numbers


def test_masked_words_and_masked_tokens_do_not_count(logits):
    z, z_new, mask = logits
    expected = EXACT.mean_kl(z[..., :60], z_new[..., :60], mask)
    by_torch = TORCH.mean_kl(z[..., :60].double(), z_new[..., :60].double(), mask)
    assert by_torch == pytest.approx(expected.item())
    z, z_new = (x.masked_fill(torch.arange(65) >= 60, -math.inf) for x in (z, z_new))
    z_new[~mask] = math.nan
    assert EXACT.mean_kl(z, z_new, mask).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_results_that_are_not_finite(logits, broken):
    z, z_new, mask = logits
    z_new[mask.nonzero()[0].tolist()[0], mask.nonzero()[0].tolist()[1], 5] = broken
    weights = [normal(3, 4), torch.tensor([1.0, broken])]
    ones = [torch.ones_like(w) for w in weights]
    found = [
        *(measure(z, z_new, m) for m in (None, mask) for measure in (EXACT.mean_kl, EXACT.movement)),
        EXACT.norm(weights),
        EXACT.slope(ones, ones, weights),
    ]
    assert not torch.stack(found).isfinite().any()


def test_a_kl_too_large_for_the_sum_is_infinite():
    z = torch.tensor([[0.0, 1e6], [0.0, 0.0]])
    assert EXACT.mean_kl(z[:1], -z[:1]) == 1e6
    assert EXACT.mean_kl(z, -z).item() == 5e5
    assert EXACT.mean_kl(10 * z, -10 * z) == math.inf


def test_norm_and_slope_are_torchs_in_float64():
    shapes = ((31, 5), (700,), (2, 3, 4), ())
    g, old, new = ([normal(*s, seed=10 * k + len(s)) * 1e20 for s in shapes] for k in range(3))
    wide = [[t.double() for t in ts] for ts in (g, old, new)]
    assert EXACT.norm(g).item() == pytest.approx(TORCH.norm(wide[0]).item(), **CLOSE)
    assert EXACT.slope(g, old, new).item() == pytest.approx(TORCH.slope(*wide).item(), rel=1e-11)
    assert EXACT.norm([]) == 0
    assert EXACT.norm([torch.full((9,), 3e38)]).item() == pytest.approx(9e38, rel=1e-6)
    assert torch.equal(EXACT.norm([normal(8, 6).t()]), EXACT.norm([normal(8, 6).t().contiguous()]))


@pytest.mark.parametrize("c", [0.0, 1.0, 0.3, 1e-9])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_interpolation_rounds_once_and_is_exact_at_its_ends(c, as_tensor):
    old = [normal(300, 1000), normal(7), normal(), normal(0), torch.tensor([-0.0, 1e30])]
    new = [w + 0.1 * normal(*w.shape, seed=1) for w in old[:-1]] + [torch.tensor([0.0, -1e-30])]
    out = [torch.empty_like(w) for w in old]
    EXACT.interpolate(old, new, torch.tensor(c, dtype=torch.float64) if as_tensor else c, out)
    for a, b, found in zip(old, new, out, strict=True):
        expected = {0.0: a, 1.0: b}.get(c, ((b.double() - a.double()) * c + a.double()).float())
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    EXACT.interpolate(old, new, c, new)
    assert all(map(torch.equal, new, out))


# -- in the optimizer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [EllipsotopeClip, StabilizedOptimizer])
def test_a_step_uses_no_operation_whose_bits_are_the_machines(cls):
    class Used(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            used.append(function._schema.name.removeprefix("aten::"))
            return function(*args, **(kwargs or {}))

    used: list[str] = []
    model = nn.Embedding(11, 11)
    settings = {"target_kl": 0.01} if cls is EllipsotopeClip else {}
    optimizer = cls(
        model, torch.optim.SGD(model.parameters(), lr=9.0), arithmetic=EXACT, audit_every=1, **settings
    )
    (x, _), *_ = batches(1)
    model.weight.grad = normal(11, 11)
    with Used():
        stats = optimizer.step(x)
    assert (stats.clip_coefficient < 1) == (cls is EllipsotopeClip)
    assert stats.applied_kl > 0
    # a sum, of the new weights, only says whether they are finite
    of_the_machine = (
        "exp log _log_softmax _softmax mean dot lerp _foreach_norm linalg_vector_norm pow var addcmul"
    )
    assert set(of_the_machine.split()).isdisjoint(used)
