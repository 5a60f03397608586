"""Adam's moments in few bits: their codes, the arithmetic between them, exact resumption, and their cost."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import low_bit
from support.low_bit import NO_GPU
from torch import Tensor, nn

from ebc_lab.lowbit.levels import quantize_stochastic, rounding_key, uniforms
from ebc_lab.lowbit.packing import unpack
from ebc_lab.lowbit.state import CODES, FORMS, MAXIMA, STREAM, Bytes, Levels, QuantizedAdam

GOLDEN = low_bit.GOLDEN["state_int8"]
STATES = tuple(FORMS)
V_LEVELS = {"ternary": (1 / 256, 1 / 16, 1.0), "five": (1 / 256, 1 / 64, 1 / 16, 1 / 4, 1.0)}
SHAPES = ((20, 32), (7, 11), (3,))


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 0.1


def run(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for t in steps:
        set_gradients(params, t)
        optimizer.step()


def same(a: list[nn.Parameter], b: list[nn.Parameter]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def moments(n: int) -> tuple[Tensor, Tensor]:
    """m and v whose magnitudes range over several powers of ten."""
    generator = torch.Generator().manual_seed(3)
    m = torch.randn(n, generator=generator) * torch.exp(torch.randn(n, generator=generator))
    return m * 1e-3, m**2 * 1e-6 * torch.exp(2 * torch.randn(n, generator=generator))


# -- the codes -----------------------------------------------------------------------------------------------


def test_golden_int8() -> None:
    packed = Bytes().pack(torch.tensor(GOLDEN["m"]), torch.tensor(GOLDEN["v"]), (0, 0))
    assert packed["exp_avg_codes"].tolist() == GOLDEN["m_codes"]
    assert packed["exp_avg_sq_codes"].tolist() == GOLDEN["v_codes"]
    assert packed["exp_avg_codes"].dtype == torch.int8
    assert packed["exp_avg_sq_codes"].dtype == torch.uint8
    m, v = Bytes().unpack(packed, 6)
    steps = np.float32(GOLDEN["m_step"]), np.float32(GOLDEN["v_step"])
    assert np.array_equal(m.numpy(), steps[0] * np.array(GOLDEN["m_codes"], np.float32))
    assert np.array_equal(v.numpy(), (steps[1] * np.array(GOLDEN["v_codes"], np.float32)) ** 2)


def test_int8_has_a_maximum_for_each_block_of_256_and_keeps_every_v_above_zero() -> None:
    m, v = moments(1000)
    v[10:400:7] = 0
    v[5] = 1e-30
    packed = Bytes().pack(m, v, (0, 0))
    for start in range(0, 1000, 256):
        part = slice(start, start + 256)
        step = np.float32(m[part].abs().max()) / np.float32(127)
        codes = np.rint(m[part].numpy() / step)
        assert np.array_equal(packed["exp_avg_codes"][part].numpy(), codes)
        root = v[part].sqrt().numpy()
        step = root.max() / np.float32(255)
        codes = np.where(v[part].numpy() > 0, np.maximum(np.rint(root / step), 1), 0)
        assert np.array_equal(packed["exp_avg_sq_codes"][part].numpy(), codes)
    back_m, back_v = Bytes().unpack(packed, 1000)
    assert torch.equal(back_v == 0, v == 0)
    assert (back_m - m).abs().max() <= m.abs().max() / 254 * 1.001
    again = Bytes().pack(back_m, back_v, (0, 0))
    assert torch.equal(again["exp_avg_codes"], packed["exp_avg_codes"])


def test_int8_linear_rounds_small_v_to_zero() -> None:
    v = torch.tensor([1.0, 0.6, 1e-3, 0.0019, 0.0021])
    packed = Bytes(linear=True).pack(v, v, (0, 0))
    assert packed["exp_avg_sq_codes"].tolist() == [255, 153, 0, 0, 1]
    back = Bytes(linear=True).unpack(packed, 5)[1]
    assert back.tolist() == pytest.approx([1, 0.6, 0, 0, 1 / 255], rel=1e-6)


@pytest.mark.parametrize("levels", ["ternary", "five"])
def test_levels_round_by_the_streams_of_the_matrix(levels: str) -> None:
    """m by the library's stochastic codes; v between neighbouring levels, a draw below the share takes hi."""
    m, v = moments(300)
    v[3] = 0
    keys = (rounding_key(1, 2, STREAM + 6), rounding_key(1, 2, STREAM + 7))
    packed = Levels(levels).pack(m, v, keys)
    top = {"ternary": 1, "five": 2}[levels]
    m_codes = unpack(packed["exp_avg_codes"].numpy(), 300, levels)
    v_codes = unpack(packed["exp_avg_sq_codes"].numpy(), 300, levels) + top
    u = uniforms(300, keys[1])
    table = np.array(V_LEVELS[levels], np.float32)
    for i in range(300):
        block = slice(i // 64 * 64, i // 64 * 64 + 64)
        y = np.float32(v[i]) / np.float32(v[block].max())
        below = max(0, int(np.searchsorted(table, y, side="right")) - 1)
        if below == len(table) - 1:
            expected = below
        else:
            gap = table[below + 1] - table[below]
            expected = below + int(u[i] < (y - table[below]) / gap)
        assert v_codes[i] == expected
    m_steps = [m[i : i + 64].abs().max().item() / top for i in range(0, 300, 64)]
    scaled = m.numpy() / np.repeat(m_steps, 64)[:300].astype(np.float32)
    assert np.array_equal(m_codes, quantize_stochastic(scaled, levels, step=1.0, key=keys[0]))
    back_m, back_v = Levels(levels).unpack(packed, 300)
    steps = torch.stack([part.max() for part in m.abs().split(64)]) / top
    assert torch.equal(back_m, torch.from_numpy(m_codes).float() * steps.repeat_interleave(64)[:300])
    largest = torch.stack([part.max() for part in v.split(64)]).repeat_interleave(64)[:300]
    assert torch.equal(back_v, torch.from_numpy(table)[torch.from_numpy(v_codes).long()] * largest)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("state", STATES)
def test_blocks_of_zeros_stay_zero_and_what_is_not_finite_stays_so(state: str) -> None:
    form = FORMS[state]()
    m = torch.zeros(520)
    v = torch.zeros(520)
    m[300] = 0.5
    v[300] = 0.25
    m[515] = math.nan
    v[515] = math.inf
    back_m, back_v = form.unpack(form.pack(m, v, (1, 2)), 520)
    assert not back_m[:256].any()
    assert not back_v[:256].any()
    assert back_m[300] == pytest.approx(0.5)
    assert back_v[300] == pytest.approx(0.25)
    assert not back_m[515].isfinite()
    assert not back_v[515].isfinite()


# -- the optimizer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [None, True])
def test_with_nothing_quantized_it_is_torchs_adam(kind: Callable[..., Any], fused: bool | None) -> None:
    settings: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
    ours, theirs = parameters(), parameters()
    decoupled = kind is torch.optim.AdamW
    optimizer = QuantizedAdam(ours, **settings, state="int8", quantized=[], decoupled=decoupled, fused=fused)
    run(ours, optimizer, range(5))
    run(theirs, kind(theirs, **settings, fused=fused), range(5))
    assert same(ours, theirs)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("decoupled", [False, True])
def test_a_step_is_torchs_on_the_unpacked_moments(state: str, decoupled: bool) -> None:
    """At each step torch's Adam, given the unpacked moments, moves the weights to the same bits."""
    params = parameters()
    optimizer = QuantizedAdam(
        params, 1e-2, state=state, quantized=params[:2], seed=5, weight_decay=0.1, decoupled=decoupled
    )
    form = FORMS[state]()
    for t in range(4):
        others = [nn.Parameter(p.detach().clone()) for p in params]
        kind = torch.optim.AdamW if decoupled else torch.optim.Adam
        theirs = kind(others, 1e-2, weight_decay=0.1)
        for p, other in zip(params, others, strict=True):
            saved = dict(optimizer.state[p])
            if "exp_avg_codes" in saved:
                m, v = form.unpack(saved, p.numel())
                saved = {"step": saved["step"], "exp_avg": m.view(p.shape), "exp_avg_sq": v.view(p.shape)}
            if saved:
                theirs.state[other] = {name: value.clone() for name, value in saved.items()}
        set_gradients(params, t)
        set_gradients(others, t)
        optimizer.step()
        theirs.step()
        assert same(params, others)
        for j, (p, other) in enumerate(zip(params[:2], others[:2], strict=True)):
            exact = theirs.state[other]
            keys = tuple(rounding_key(5, t + 1, STREAM + 2 * j + k) for k in (0, 1))
            packed = form.pack(exact["exp_avg"].flatten(), exact["exp_avg_sq"].flatten(), keys)  # type: ignore[arg-type]
            for name, value in packed.items():
                assert torch.equal(optimizer.state[p][name], value)
        assert set(optimizer.state[params[2]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_a_copy_goes_on_by_itself() -> None:
    params = parameters()
    optimizer = QuantizedAdam(params, 1e-2, state="five", quantized=params[:2], seed=6)
    run(params, optimizer, range(2))
    copied, second = copy.deepcopy((params, optimizer))
    run(params, optimizer, range(2, 5))
    run(copied, second, range(2, 5))
    assert same(params, copied)


@pytest.mark.parametrize("state", STATES)
def test_zero_and_missing_gradients_move_nothing(state: str) -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = QuantizedAdam(params, 1e-2, state=state, quantized=params[:2])
    optimizer.step()
    assert not optimizer.state
    assert optimizer.state_bytes() == 0
    assert optimizer.bits_per_weight == 0
    params[0].grad = torch.zeros_like(params[0])
    for _ in range(3):
        optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    assert params[1] not in optimizer.state


@pytest.mark.parametrize(
    ("state", "bits"), [("int8", 16.25), ("int8_linear", 16.25), ("ternary", 4.2), ("five", 2 * 7 / 3 + 1)]
)
def test_what_the_moments_cost(state: str, bits: float) -> None:
    matrix = nn.Parameter(torch.randn(480, 256))  # whole blocks and whole packs
    rest = nn.Parameter(torch.randn(10))
    optimizer = QuantizedAdam([matrix, rest], state=state, quantized=[matrix])
    for p in (matrix, rest):
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.bits_per_weight == pytest.approx(bits)
    assert optimizer.state_bytes() == round(matrix.numel() * bits / 8) + 2 * 4 * 10


@pytest.mark.parametrize("state", STATES)
def test_a_bad_step_on_the_device_leaves_everything(state: str) -> None:
    """`found_inf`, as torch's fused optimizers heed it: neither weights nor packed moments change."""
    params = parameters()
    optimizer = QuantizedAdam(params, 1e-2, state=state, quantized=params[:2], fused=True)
    run(params, optimizer, range(3))
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    run(params, optimizer, range(3, 4))
    assert same(params, before[0])
    for number, kept in optimizer.state_dict()["state"].items():
        for name, value in kept.items():
            assert torch.equal(value, before[1][number][name])


@pytest.mark.cuda
@NO_GPU
@pytest.mark.parametrize("state", STATES)
def test_a_gpu_packs_to_the_same_bits(state: str) -> None:
    form = FORMS[state]()
    m, v = moments(1000)
    host = form.pack(m, v, (3, 4))
    device = form.pack(m.cuda(), v.cuda(), (3, 4))
    for name, value in host.items():
        assert torch.equal(value, device[name].cpu())
    for a, b in zip(form.unpack(host, 1000), form.unpack(device, 1000), strict=True):
        assert torch.equal(a, b.cpu())


def test_a_closure_and_hooks_are_called_once() -> None:
    torch.optim.Adam(parameters())  # torch then wraps Adam.step in hooks of its own
    params = parameters()
    optimizer = QuantizedAdam(params, 1e-2, state="int8", quantized=params[:2])
    called: list[str] = []
    optimizer.register_step_post_hook(lambda *_: called.append("hook"))

    def closure() -> float:
        called.append("closure")
        set_gradients(params, 0)
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert called == ["closure", "hook"]


def test_mistakes_are_named() -> None:
    params = parameters()
    with pytest.raises(ValueError, match="int8, int8_linear, ternary, five"):
        QuantizedAdam(params, state="int4", quantized=[])
    with pytest.raises(ValueError, match=r"quantized\[0\] is none"):
        QuantizedAdam(params, state="int8", quantized=[nn.Parameter(torch.zeros(2))])
    half = nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="float32 only"):
        QuantizedAdam([half], state="int8", quantized=[half])


@pytest.mark.parametrize("state", STATES)
def test_a_loaded_state_goes_on_to_the_bit_and_is_the_callers_own(state: str) -> None:
    params, others = parameters(), parameters()
    optimizer, twin = (QuantizedAdam(p, state=state, quantized=p[:2], seed=5) for p in (params, others))
    run(params, optimizer, range(2))
    saved = low_bit.saved_and_loaded(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    twin.load_state_dict(saved)
    for t in range(2, 4):
        run(params, optimizer, range(t, t + 1))
        run(others, twin, range(t, t + 1))
        assert same(params, others)
    for i, values in kept["state"].items():
        for name in {*CODES, *MAXIMA} & set(values):  # the others torch itself shares with what it loads
            assert torch.equal(saved["state"][i][name], values[name]), name
