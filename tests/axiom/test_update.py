"""One step of one tensor: against golden values, and against the formulas written out over whole matrices."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ebc_lab.axiom import update as module
from ebc_lab.axiom.optimizer import AXIOM
from ebc_lab.axiom.update import EPSILON, state_bytes
from ebc_lab.bench.memory import peak_on_cpu

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
PHI = (1 + math.sqrt(5)) / 2


class Reference:
    """Formulas of docs/axiom.md on whole matrices in float64, the momentum formed in full."""

    def __init__(self, w: Tensor, settings: dict[str, Any]):
        self.w = w.double().clone()
        self.s = settings
        self.t = 0
        self.streak = 0
        self.matrix = w.ndim >= 2 and min(w.shape[0], w[0].numel()) >= 2
        flat = self.w.flatten(1) if self.matrix else self.w.flatten()[None]
        self.row = torch.zeros(flat.shape[0], dtype=torch.float64)
        self.col = torch.zeros(flat.shape[1], dtype=torch.float64)
        self.square = torch.zeros_like(flat)
        self.momentum = torch.zeros_like(flat)
        self.left = torch.zeros(flat.shape[0], 0)
        self.right = torch.zeros(flat.shape[1], 0)

    def step(self, g: Tensor) -> None:
        s = self.s
        self.t += 1
        w = self.w.flatten(1) if self.matrix else self.w.flatten()[None]
        g = g.double().reshape(w.shape)
        fresh = 1 - min(0.999, 1 - self.t**-0.8)
        if self.matrix:
            self.row += fresh * ((g**2 + EPSILON).mean(1) - self.row)
            self.col += fresh * ((g**2 + EPSILON).mean(0) - self.col)
            x = g / (self.row[:, None] * self.col / self.row.mean()).sqrt()
        else:
            self.square += fresh * (g**2 + EPSILON - self.square)
            x = g / self.square.sqrt()
        old = self.momentum.clone()
        u = x.clone()
        if s["rank"] and self.matrix:
            u = x + s["momentum_weight"] * old
            self._follow(x)
        elif s["rank"]:
            self.momentum = s["beta1"] * old + (1 - s["beta1"]) * x
            u = self.momentum / (1 - s["beta1"] ** self.t)
        boost = 1.0
        gain = torch.ones(len(w), 1, dtype=torch.float64)
        if s["rank"] and self.t > 1:
            self.streak = self.streak + 1 if (x * old).sum() > 0 else 0
            boost = 1 + (s["streak_boost"] - 1) * min(self.streak, 8) / 8
            power = (old**2).sum(1, keepdim=True)
            if self.matrix and power.sum() > 0:
                gain = (power / power.mean()).sqrt().clamp(s["snr_floor"], 1)
        u = s["lr_scale"] * u
        u = gain * u / max(1.0, float(u.square().mean().sqrt()) / s["rms_limit"])
        kappa = max(1e-3, float(w.square().mean().sqrt())) if s["relative"] else 1.0
        w.mul_(1 - s["lr"] * s["weight_decay"]).sub_(s["lr"] * kappa * boost * u)

    def _follow(self, x: Tensor) -> None:
        """One step of subspace iteration, on the momentum formed in full."""
        m, n = x.shape
        r = min(self.s["rank"], m, n)
        beta = self.s["beta1"]
        if self.t == 1:
            j, k = torch.arange(1, n + 1.0), torch.arange(1, r + 1.0)
            seen = x @ (0.5 + PHI * j[:, None].double() * k).cos()
            whole = (1 - beta) * x
        else:
            whole = beta * self.momentum + (1 - beta) * x
            seen = whole @ self.right
        basis = torch.linalg.qr(seen).Q
        self.right = whole.T @ basis
        self.momentum = basis @ self.right.T


def settings(**given: Any) -> dict[str, Any]:
    usual = {"lr": 0.02, "weight_decay": 0.1, "rank": 2, "streak_boost": 1.5, "snr_floor": 0.5, "beta1": 0.9}
    return usual | {"momentum_weight": 0.5, "relative": False, "rms_limit": 1.0, "lr_scale": 1.0} | given


def axiom(p: nn.Parameter, s: dict[str, Any]) -> AXIOM:
    optimizer = AXIOM([p], **{k: v for k, v in s.items() if k != "lr_scale"})
    optimizer.lr_scale = s["lr_scale"]
    return optimizer


@pytest.mark.parametrize("case", GOLDEN["optimizer"], ids=lambda c: c["name"])
def test_golden(case):
    p = nn.Parameter(torch.tensor(case["w0"]).view(case["shape"]))
    chosen = {"streak_boost": 1.5, **case["settings"]}
    optimizer = AXIOM([p], lr=case["lr"], weight_decay=case["weight_decay"], **chosen)
    for step in case["steps"]:
        p.grad = torch.tensor(step["g"]).view(case["shape"])
        optimizer.step()
        assert optimizer.state[p]["streak"] == step["streak"]
        close = GOLDEN["tolerance"]
        torch.testing.assert_close(p.detach().flatten(), torch.tensor(step["w"]), **close)
    if case["row"]:
        torch.testing.assert_close(optimizer.state[p]["row"], torch.tensor(case["row"]), **close)


SHAPES = st.sampled_from([(5, 3), (3, 7), (2, 2), (4, 3, 2), (1, 6), (6, 1), (5,), (), (1, 1)])


@given(
    shape=SHAPES,
    rank=st.integers(0, 3),
    chunk=st.sampled_from([2, 5, 1000]),
    relative=st.booleans(),
    boost=st.sampled_from([1.0, 2.0]),
    floor=st.sampled_from([0.0, 0.5, 1.0]),
    lr_scale=st.sampled_from([0.1, 1.0, 25.0]),
    seed=st.integers(0, 1000),
)
def test_the_chunked_update_is_that_of_whole_matrices(
    shape, rank, chunk, relative, boost, floor, lr_scale, seed
):
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=draw)
    s = settings(rank=rank, relative=relative, streak_boost=boost, snr_floor=floor, lr_scale=lr_scale)
    reference = Reference(w, s)
    p = nn.Parameter(w.clone())
    optimizer = axiom(p, s)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        for _ in range(4):
            g = torch.randn(shape, generator=draw) + 0.5
            reference.step(g)
            p.grad = g.clone()
            optimizer.step()
            assert torch.equal(p.grad, g)
    torch.testing.assert_close(p.detach().double(), reference.w, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("rank", [0, 3])
def test_zero_gradients_move_nothing_and_later_ones_do(rank):
    p = nn.Parameter(torch.ones(4, 3))
    optimizer = AXIOM([p], weight_decay=0, rank=rank)
    for _ in range(3):
        p.grad = torch.zeros(4, 3)
        optimizer.step()
    assert torch.equal(p, torch.ones(4, 3))
    p.grad = torch.ones(4, 3)
    optimizer.step()
    assert p.isfinite().all()
    assert (p < 1).all()


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_dtype_have_float32_state(rank, dtype):
    draw = torch.Generator().manual_seed(0)
    w, g = torch.randn(2, 8, 6, generator=draw)
    p = nn.Parameter(w.to(dtype))
    wide = nn.Parameter(w.to(dtype).float())
    for q in (p, wide):
        q.grad = g.to(dtype).to(q.dtype)
        optimizer = AXIOM([q], lr=0.1, rank=rank)
        optimizer.step()
    torch.testing.assert_close(p.detach().float(), wide.detach(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    optimizer = AXIOM([p], rank=rank)
    optimizer.step()
    tensors = {k: v for k, v in optimizer.state[p].items() if isinstance(v, Tensor)}
    assert {v.dtype for v in tensors.values()} == {torch.float32}
    assert sum(v.nbytes for v in tensors.values()) == state_bytes(p.shape, rank)


def test_weights_that_are_not_contiguous_move_as_others_do():
    draw = torch.Generator().manual_seed(0)
    w, g = torch.randn(2, 2, 3, 4, 5, generator=draw)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(w.clone(memory_format=layout))
        p.grad = g.contiguous(memory_format=layout)
        AXIOM([p], lr=0.1).step()
        found.append(p.detach().contiguous())
    assert torch.equal(*found)


def test_large_tensors_need_64_mib_beside_the_gradient_at_most():
    """Counted by the allocator, at a chunk a thousand times smaller."""
    w = nn.Parameter(torch.randn(512, 257))
    w.grad = torch.randn(512, 257)
    optimizer = AXIOM([w], rank=4)
    optimizer.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", 2**12)
        assert peak_on_cpu(optimizer.step) <= 4 * 4 * 2**12 + 2 * state_bytes(w.shape, 8)
