"""Weights side by side: the same values, fewer operations, whoever moves them."""

import pytest
import torch
from torch import nn
from torch.nn.utils import get_total_norm

from ebc_lab.ebc import EllipsotopeClip, flat
from ebc_lab.ebc.flat import ALIGNMENT, joint_norm, lay_flat, segments


def weights_of(*shapes, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=draw).to(dtype)) for s in shapes]


def test_weights_laid_flat_keep_their_values_and_become_one_segment():
    weights = weights_of((3, 5), (7,), (2, 2, 2))
    before = [w.clone() for w in weights]
    lay_flat(weights)
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    assert all(w.data_ptr() % ALIGNMENT == weights[0].data_ptr() % ALIGNMENT for w in weights)
    (segment,) = segments(weights, [True] * 3)
    segment.tensor.zero_()
    assert all(not w.any() for w in weights)


def test_one_dtype_does_not_lie_among_another():
    weights = [*weights_of((3,), (4,)), *weights_of((5,), dtype=torch.bfloat16)]
    lay_flat(weights)
    assert [s.members for s in segments(weights, [True] * 3)] == [(0, 1), (2,)]


@pytest.mark.parametrize("dtypes", [[torch.float32] * 3, [torch.float32, torch.bfloat16, torch.float32]])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_joint_norm_has_the_bits_of_torchs(dtypes, count):
    shapes = ((31, 5), (700,), (2, 3, 4))
    weights = [w for shape, dtype in zip(shapes, dtypes, strict=True) for w in weights_of(shape, dtype=dtype)]
    tensors = [w.detach() for w in weights[:count]]
    assert torch.equal(joint_norm(tensors), get_total_norm(tensors))


@pytest.mark.thorough
@pytest.mark.parametrize("grouping", ["block", "matrices"])
def test_the_layout_changes_no_bit_and_may_change_under_way(make_gpt, batches, train, grouping):
    losses = {}
    for layout in ("scattered", "flat", "flat, then moved"):
        model = make_gpt()
        if layout != "scattered":
            lay_flat(model.parameters())
        adam = torch.optim.Adam(model.parameters(), lr=1e-2)
        optimizer = EllipsotopeClip(model, adam, target_kl=1e-4, grouping=grouping)
        assert train(model, optimizer, batches(6))[-1].clip_coefficient < 1
        if layout == "flat, then moved":
            for p in model.parameters():
                p.data = p.data.clone()
        train(model, optimizer, batches(12)[6:])
        losses[layout] = [p.detach().clone() for p in model.parameters()]
    for other in ("flat", "flat, then moved"):
        assert all(torch.equal(a, b) for a, b in zip(losses["scattered"], losses[other], strict=True))


@pytest.mark.parametrize("options", [{}, {"budget": "tracked", "radius": 0.05}, {"grouping": "matrices"}])
def test_few_weights_are_gathered_and_many_are_not_to_the_same_end(
    make_gpt, batches, train, monkeypatch, options
):
    ends = []
    for few in (0, flat.FEW):
        monkeypatch.setattr(flat, "FEW", few)
        model = make_gpt()
        adam = torch.optim.Adam(model.parameters(), lr=1e-2)
        clip = EllipsotopeClip(model, adam, target_kl=1e-4, audit_every=3, **options)
        stats = train(model, clip, batches(8))
        assert (len(clip._layout.segments) > 2) is (few == 0)
        assert stats[-1].clip_coefficient < 1
        ends.append([*model.parameters(), stats[6].applied_norm, stats[6].applied_kl])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


class Rebinding(torch.optim.SGD):
    """Gives its weights other memory, as some do."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.data = p.data - self.param_groups[0]["lr"] * p.grad


@pytest.mark.parametrize("flat", [False, True])
def test_an_optimizer_may_give_its_weights_other_memory(make_gpt, batches, train, flat):
    found = []
    for kind in (torch.optim.SGD, Rebinding):
        model = make_gpt()
        if flat:
            lay_flat(model.parameters())
        clip = EllipsotopeClip(model, kind(model.parameters(), lr=5.0), target_kl=0.002)
        train(model, clip, batches(4))
        found.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(*found)
