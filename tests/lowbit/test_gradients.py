"""Gradients in few levels: golden error feedback, unbiased rounding, the two phases, and exact resumption."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.low_bit import GOLDEN, LEVELS, NO_GPU
from torch import Tensor

from ebc_lab.lowbit.gradients import GradientQuantizer, drawn_on_device, drawn_on_host
from ebc_lab.lowbit.levels import quantize, quantize_stochastic, rounding_key, stochastic_step

SHAPES = ((16, 12), (5, 7), (130, 40))


def gradients(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 10.0 ** -(i + 1) for i, shape in enumerate(SHAPES)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("levels", LEVELS)
def test_golden_error_feedback(levels: str) -> None:
    golden = GOLDEN["error_feedback"]
    quantizer = GradientQuantizer(levels, error_feedback=True)
    for step, (given_, expected) in enumerate(zip(golden["gradients"], golden[levels], strict=True)):
        (sent,) = quantizer.compress([torch.tensor(given_)], step)
        quantizer.commit()
        values = np.float32(expected["step"]) * np.array(expected["codes"], dtype=np.float32)
        assert np.array_equal(sent.numpy(), values)
        assert quantizer.residuals is not None
        assert np.array_equal(quantizer.residuals[0].numpy(), np.array(expected["residual"], np.float32))


@pytest.mark.parametrize("levels", LEVELS)
def test_nearest_is_quantize_of_each_matrix(levels: str) -> None:
    given_ = gradients(0)
    sent = GradientQuantizer(levels).compress(given_, 3)
    for g, s in zip(gradients(0), sent, strict=True):
        assert np.array_equal(s.numpy(), quantize(g.numpy(), levels).values())
    assert equal(given_, gradients(0))  # left alone


@pytest.mark.parametrize("levels", LEVELS)
def test_stochastic_codes_come_from_seed_step_and_matrix(levels: str) -> None:
    given_ = gradients(1)
    sent = GradientQuantizer(levels, rounding="stochastic", seed=11).compress(given_, 5)
    for index, (g, s) in enumerate(zip(given_, sent, strict=True)):
        size = stochastic_step(g.numpy(), levels)
        key = rounding_key(11, 5, index)
        codes = quantize_stochastic(g.numpy(), levels, step=float(size), key=key)
        assert np.array_equal(s.numpy(), size * codes.astype(np.float32))
    again = GradientQuantizer(levels, rounding="stochastic", seed=11)
    assert equal(again.compress(given_, 5), sent)
    assert not equal(again.compress(given_, 6), sent)
    assert not equal(GradientQuantizer(levels, rounding="stochastic", seed=12).compress(given_, 5), sent)
    assert not torch.equal(*again.compress([given_[0], given_[0]], 5))


@pytest.mark.parametrize("levels", LEVELS)
def test_a_device_that_is_not_read_draws_the_same_bits(levels: str) -> None:
    for g in (*gradients(15), torch.zeros(3, 4), torch.full((2, 2), 1e-45), torch.tensor([[-0.0, 1e30]])):
        host = drawn_on_host(g, levels, 77)
        assert host.numpy().tobytes() == drawn_on_device(g, levels, 77).numpy().tobytes()
    assert not drawn_on_device(torch.tensor([1.0, math.nan]), levels, 77).isfinite().any()


@pytest.mark.cuda
@NO_GPU
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_gpu_sends_and_keeps_the_same_bits(levels: str, rounding: str) -> None:
    on = {
        device: GradientQuantizer(levels, rounding=rounding, error_feedback=True)
        for device in ("cpu", "cuda")
    }
    for t in range(4):
        given_ = gradients(t)
        if t == 2:
            given_[0][1, 1] = math.nan
        sent = {d: q.compress([g.to(d) for g in given_], t) for d, q in on.items()}
        for a, b in zip(sent["cpu"], sent["cuda"], strict=True):
            assert a.numpy().tobytes() == b.cpu().numpy().tobytes()
        for device, quantizer in on.items():
            quantizer.commit(torch.tensor(t != 1, device=device))
        kept = {d: q.state_dict()["residuals"] for d, q in on.items()}
        assert equal(kept["cpu"], [r.cpu() for r in kept["cuda"]])


@given(
    steps=st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=5, max_size=5), min_size=1, max_size=4),
    levels=st.sampled_from(LEVELS),
    rounding=st.sampled_from(("nearest", "stochastic")),
)
def test_what_is_not_sent_is_kept(steps: list[list[float]], levels: str, rounding: str) -> None:
    """a = sent + e after every step, in float32: nothing is lost, nothing is sent twice."""
    quantizer = GradientQuantizer(levels, rounding=rounding, error_feedback=True, seed=1)
    residual = np.zeros(5, np.float32)
    for t, values in enumerate(steps):
        a = np.array(values, np.float32) + residual
        (sent,) = quantizer.compress([torch.tensor(values)], t)
        quantizer.commit()
        assert quantizer.residuals is not None
        residual = quantizer.residuals[0].numpy().copy()
        assert np.array_equal(residual, a - sent.numpy())
        assert np.allclose(sent.numpy() + residual, a, rtol=0, atol=1e-6 * max(1.0, np.abs(a).max()))


@pytest.mark.parametrize("taken", [False, torch.tensor(False)])
def test_a_step_that_is_not_taken_leaves_the_residuals(taken: Any) -> None:
    quantizer = GradientQuantizer("ternary", error_feedback=True)
    quantizer.compress(gradients(5), 0)
    quantizer.commit(taken)
    fresh = GradientQuantizer("ternary", error_feedback=True)
    assert equal(quantizer.compress(gradients(6), 1), fresh.compress(gradients(6), 1))
    for one in (quantizer, fresh):
        one.commit(torch.tensor(True))
    kept = quantizer.state_dict()["residuals"]
    first = quantizer.compress(gradients(7), 2)
    assert equal(quantizer.compress(gradients(7), 2), first)
    quantizer.commit(taken)
    quantizer.commit(True)  # which finds nothing that is still to be kept
    assert equal(quantizer.state_dict()["residuals"], kept)
    assert any(r.any() for r in kept)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_gradients_that_are_not_finite_pass_unchanged_and_nothing_is_kept(bad: float, rounding: str) -> None:
    quantizer = GradientQuantizer("five", rounding=rounding, error_feedback=True)
    quantizer.compress(gradients(9), 0)
    quantizer.commit()
    kept = quantizer.state_dict()["residuals"]
    given_ = gradients(10)
    given_[1][2, 3] = bad
    sent = quantizer.compress(given_, 1)
    for g, s in zip(given_, sent, strict=True):
        assert g.numpy().tobytes() == s.numpy().tobytes()
    assert quantizer.last_error.isnan()
    quantizer.commit(True)
    assert equal(quantizer.state_dict()["residuals"], kept)
    assert all(s.isfinite().all() for s in quantizer.compress(gradients(11), 2))


def test_the_state_is_a_copy_in_float32() -> None:
    quantizer = GradientQuantizer("ternary", error_feedback=True)
    assert quantizer.state_dict() == {"residuals": None}
    (sent,) = quantizer.compress([gradients(0)[0].bfloat16()], 0)
    quantizer.commit()
    assert sent.dtype == torch.bfloat16
    assert quantizer.state_dict()["residuals"][0].dtype == torch.float32
    state = quantizer.state_dict()
    kept = [r.clone() for r in state["residuals"]]
    other = GradientQuantizer("ternary", error_feedback=True)
    other.load_state_dict(state)
    for r in state["residuals"]:
        r.zero_()
    assert equal(quantizer.state_dict()["residuals"], kept)
    assert equal(other.state_dict()["residuals"], kept)


def test_what_is_recorded() -> None:
    quantizer = GradientQuantizer("ternary")
    assert quantizer.grad_bits == 0
    assert quantizer.last_error.isnan()
    given_ = gradients(13)
    sent = quantizer.compress(given_, 0)
    lost = sum(((g - s).double() ** 2).sum().item() for g, s in zip(given_, sent, strict=True))
    all_ = sum((g.double() ** 2).sum().item() for g in given_)
    assert quantizer.last_error.item() == pytest.approx(lost / all_, rel=1e-5)
    assert quantizer.last_error.shape == ()
    elements = sum(g.numel() for g in given_)
    assert quantizer.grad_bits == 8 * (39 + 7 + 1040 + 3 * 4) / elements
    quantizer.compress([torch.zeros(3, 4)], 1)
    assert quantizer.last_error.item() == 0
    five = GradientQuantizer("five")
    five.compress([torch.ones(48)], 0)
    assert five.grad_bits == 8 * (14 + 4) / 48


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="levels"):
        GradientQuantizer("two")
    with pytest.raises(ValueError, match="nearest, stochastic"):
        GradientQuantizer("five", rounding="up")
    quantizer = GradientQuantizer("five", error_feedback=True)
    quantizer.compress(gradients(0), 0)
    quantizer.commit()
    with pytest.raises(ValueError, match="same order"):
        quantizer.compress(gradients(0)[::-1], 1)
    with pytest.raises(ValueError, match="error_feedback=True"):
        GradientQuantizer("five").load_state_dict(quantizer.state_dict())
    for state in ({}, {"residuals": 0.5}, {"residuals": [0.5]}):
        with pytest.raises(ValueError, match="no state of a GradientQuantizer"):
            quantizer.load_state_dict(state)
    assert GradientQuantizer("five").compress([], 0) == []
