"""Gradients between workers: the compressor against a plain one, the hook in one process and in two."""

import json
import math
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support import gloo_worker as gloo
from support.tensors import normal
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ebc_lab.axiom.distributed import AXIOM_DDP, AxiomDDPState, axiom_hook

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())["ddp"]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def slow(g: Tensor, k: int) -> Tensor:
    """What is left of a gradient, (n,), value by value. Values of equal magnitude: the first of them."""
    restored = torch.zeros(g.numel())
    values = g.float()
    for start in range(0, g.numel(), 256):
        block = values[start : start + 256]
        kept = sorted(range(len(block)), key=lambda i: -abs(block[i].item()))[:k]
        s = block[kept[0]].abs().to(torch.bfloat16).float()
        for i in kept:
            q = torch.round(7 * block[i] / s) if s > 0 else torch.tensor(0.0)
            restored[start + i] = q / 7 * s
    return restored


def round_trip(g: Tensor, percent: float = 6.25) -> Tensor:
    compressor = AXIOM_DDP(g.numel(), percent)
    return compressor.decompress(*compressor.compress(g))


# The compressor


def test_it_agrees_with_the_golden_values():
    compressor = AXIOM_DDP(GOLDEN["n"])
    vals, idx, count = compressor.compress(torch.tensor(GOLDEN["g"]))
    assert (tuple(vals.shape), tuple(idx.shape)) == ((2, 10), (2, 16))
    assert (vals.dtype, idx.dtype, count) == (torch.uint8, torch.uint8, GOLDEN["count"])
    assert compressor.payload_bytes() == GOLDEN["payload_bytes"]
    torch.testing.assert_close(compressor.decompress(vals, idx, count), torch.tensor(GOLDEN["restored"]))
    assert 4e6 / AXIOM_DDP(10**6).payload_bytes() == pytest.approx(GOLDEN["payload_ratio_1e6"])


def test_the_bytes_of_a_payload_are_those_documented():
    g = torch.cat([normal(300), torch.zeros(300)])  # the last block is zeros alone
    vals, idx, count = AXIOM_DDP(600).compress(g)
    expected = torch.zeros(768)
    for block, (stored, places) in enumerate(zip(vals.tolist(), idx.tolist(), strict=True)):
        (s,) = struct.unpack("<f", bytes([0, 0, *stored[:2]]))  # the upper half of a float32
        for j, place in enumerate(places):
            q = (stored[2 + j // 2] >> 4 * (j % 2) & 15) - 8
            assert -7 <= q <= 7
            expected[256 * block + place] = q * s / 7
    torch.testing.assert_close(AXIOM_DDP(600).decompress(vals, idx, count), expected[:600])


def test_the_saving_falls_with_the_number_of_workers():
    compressor = AXIOM_DDP(256 * 10**4)
    for world, ratio in GOLDEN["ratio_by_workers_256e4"].items():
        assert compressor.bandwidth(int(world))["ratio"] == pytest.approx(ratio)
    assert compressor.bandwidth(4) == {
        "ring_all_reduce_bytes": 2 * 3 / 4 * 4 * 256e4,
        "all_gather_bytes": 3 * 26e4,
        "ratio": pytest.approx(19.692, abs=1e-3),
    }


@given(
    st.integers(1, 700),
    st.sampled_from([0.8, 1.0, 6.25, 50.0, 100.0]),
    st.sampled_from(DTYPES),
    st.integers(-3, 3),
    st.integers(0, 99),
)
def test_it_agrees_with_the_slow_reference(n, percent, dtype, exponent, seed):
    g = (normal(n, seed=seed) * 10.0**exponent).to(dtype)
    g[n // 2 :] *= 3  # blocks differ
    compressor = AXIOM_DDP(n, percent)
    vals, idx, count = compressor.compress(g)
    assert vals.nbytes + idx.nbytes == compressor.payload_bytes()
    assert count == idx.numel() == math.ceil(n / 256) * compressor.k
    restored = compressor.decompress(vals, idx, count)
    # of equal magnitudes, common in 16 bits, any may be kept: block by block the same values
    expected = slow(g, compressor.k)
    for start in range(0, n, 256):
        ours = restored[start : start + 256].sort().values
        assert torch.equal(ours.abs().sort().values, expected[start : start + 256].abs().sort().values)
    kept = restored != 0
    assert torch.equal(restored[kept].sign(), g[kept].sign().float())
    if dtype is torch.float32:
        assert torch.equal(restored, expected)


@pytest.mark.parametrize("scale", [0.0, 1e-45, 3e-41, 1e-38, 3e38])
def test_zeros_the_smallest_and_the_largest_numbers_come_back(scale):
    g = (normal(600).sign() * scale).float()
    restored = round_trip(g, 100)
    assert bool(restored.isfinite().all())
    assert float((restored - g).abs().max()) <= max(scale * 2**-8, 2.0**-134)  # half bfloat16's smallest


def test_shape_and_strides_of_a_gradient_do_not_matter():
    g = normal(30, 40)
    flat = round_trip(g.flatten())
    assert not round_trip(g.clone().requires_grad_() * 2).requires_grad
    assert torch.equal(round_trip(g), flat)
    assert torch.equal(round_trip(g.t().contiguous().t()), flat)
    assert torch.equal(round_trip(g.repeat_interleave(2, 1)[:, ::2]), flat)


@pytest.mark.parametrize("percent", [0, -1, 101, 0.3, math.nan, math.inf])
@pytest.mark.parametrize("make", [lambda p: AXIOM_DDP(300, p), AxiomDDPState])
def test_a_percentage_out_of_range_is_refused(make, percent):
    with pytest.raises(ValueError, match="does not keep 2 to 256 values"):
        make(percent)
    counts = {0.4: 2, 0.8: 2, 6.25: 16, 33: 84, 100: 256}  # of a block, all of them even
    assert {good: make(good).k for good in counts} == counts


@pytest.mark.parametrize(
    ("g", "error", "words"),
    [
        (torch.zeros(299), ValueError, "another length, 299 values in place of 300"),
        (torch.zeros(300, dtype=torch.int32), TypeError, "torch.int32 cannot"),
        (torch.zeros(300, dtype=torch.complex64), TypeError, "torch.complex64 cannot"),
        (torch.zeros(300).to_sparse(), TypeError, "torch.sparse_coo cannot"),
        (torch.full((300,), torch.nan), FloatingPointError, "NaN or infinite"),
        (torch.full((300,), -torch.inf), FloatingPointError, "NaN or infinite"),
        (torch.full((300,), 1e39, dtype=torch.float64), FloatingPointError, "NaN or infinite in float32"),
    ],
)
def test_a_gradient_it_cannot_compress_is_refused(g, error, words):
    with pytest.raises(error, match=words):
        AXIOM_DDP(300).compress(g)


def test_a_payload_it_cannot_read_is_refused():
    compressor = AXIOM_DDP(300)
    vals, idx, count = compressor.compress(normal(300))
    for other in [(vals[:1], idx, count), (vals, idx[:, :-1], count), (vals, idx, count - 1)]:
        with pytest.raises(ValueError, match="a payload of another size"):
            compressor.decompress(*other)
    with pytest.raises(ValueError, match="a payload of another size"):
        AXIOM_DDP(600).decompress(vals, idx, count)
    with pytest.raises(TypeError, match=r"torch\.float32 and torch\.uint8 cannot"):
        compressor.decompress(vals.float(), idx, count)


@pytest.mark.parametrize("workers", [2, 4, 8])
@pytest.mark.parametrize(
    "scale", [0.0, 1e-6, 1e3]
)  # of the last workers: in the bytes of s, the sums overflow
def test_a_sum_of_payloads_is_refused_whichever_part_was_summed(workers, scale):
    compressor = AXIOM_DDP(300)
    scales = [1.0] + [scale] * (workers - 1)
    payloads = [compressor.compress(s * normal(300, seed=i)) for i, s in enumerate(scales)]
    vals, idx, count = payloads[0]
    sums = [torch.stack(parts).sum(0, dtype=torch.uint8) for parts in list(zip(*payloads, strict=True))[:2]]
    for summed in [(sums[0], idx), (vals, sums[1]), sums]:
        with pytest.raises(ValueError, match="register axiom_hook"):
            compressor.decompress(*summed, count)


def test_equal_payloads_and_those_of_equal_blocks_are_refused_when_summed_too():
    for g in (torch.zeros(5000), torch.ones(5000), torch.arange(5000.0) % 256):
        vals, idx, count = AXIOM_DDP(5000).compress(g)
        with pytest.raises(ValueError, match="all_reduce"):
            AXIOM_DDP(5000).decompress(vals + vals, idx + idx, count)


def test_sizes_without_a_meaning_are_refused():
    with pytest.raises(ValueError, match="n=0 values"):
        AXIOM_DDP(0)
    with pytest.raises(TypeError, match=r"of a model, wrap it in DistributedDataParallel.*axiom_hook"):
        AXIOM_DDP(gloo.small_model())
    for world in (0, 1):
        with pytest.raises(ValueError, match="nothing is sent"):
            AXIOM_DDP(300).bandwidth(world)


# The hook in a world of one worker


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "")  # put back afterwards
        patch.delenv("GLOO_SOCKET_IFNAME")
        gloo.join(0, 1, str(tmp_path_factory.mktemp("world") / "store"))
        yield
        dist.destroy_process_group()


def wrap(model: nn.Module, state: AxiomDDPState, **settings: Any) -> DistributedDataParallel:
    wrapped = DistributedDataParallel(model, **settings)
    wrapped.register_comm_hook(state, axiom_hook)
    return wrapped


def backward(wrapped: nn.Module, inputs: Tensor) -> list[Tensor]:
    """The gradients of one backward."""
    wrapped.zero_grad()
    wrapped(inputs).square().mean().backward()
    return [p.grad.clone() for p in wrapped.parameters()]


@pytest.mark.usefixtures("alone")
def test_one_worker_gets_what_its_message_holds_and_keeps_the_rest():
    inputs = normal(8, 24)
    exact = backward(gloo.small_model(), inputs)
    state = AxiomDDPState()
    wrapped = wrap(gloo.small_model(), state)
    told = backward(wrapped, inputs)
    left = gloo.own_residuals(state)
    for g, seen, residual in zip(exact, told, left, strict=True):
        assert torch.equal(seen, round_trip(g).view(g.shape))
        assert torch.equal(residual, g - seen)
    late = backward(wrapped, inputs)
    for g, seen, residual in zip(exact, late, left, strict=True):
        assert torch.equal(seen, round_trip(g + residual).view(g.shape))
    assert (state.sent, state.dense) == (2 * 16 * 26, 2 * 4 * 2706)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_gradients_keep_their_dtype_and_residuals_are_float32(dtype):
    state = AxiomDDPState(100)
    inputs = normal(8, 24).to(dtype)
    exact = backward(gloo.small_model().to(dtype), inputs)
    told = backward(wrap(gloo.small_model().to(dtype), state), inputs)
    for g, seen, residual in zip(exact, told, gloo.own_residuals(state), strict=True):
        assert seen.dtype == dtype
        assert torch.equal(seen, round_trip(g, 100).view(g.shape).to(dtype))
        assert residual.dtype == torch.float32


@pytest.mark.usefixtures("alone")
def test_parameters_in_another_order_of_memory_keep_their_own_residuals():
    def convolution() -> nn.Module:
        torch.manual_seed(0)
        return nn.Conv2d(5, 7, 3, padding=1).to(memory_format=torch.channels_last)

    images = normal(2, 5, 6, 6)
    exact = backward(convolution(), images)
    state = AxiomDDPState()
    seen = backward(wrap(convolution(), state), images)
    kept = gloo.own_residuals(state)
    for g, ours, residual in zip(exact, seen, kept, strict=True):
        assert torch.equal(residual, g - ours)


@pytest.mark.usefixtures("alone")
def test_unused_parameters_wait_in_peace():
    model = nn.ModuleDict({"used": nn.Linear(24, 3), "unused": nn.Linear(24, 3)})
    model.forward = lambda x: model["used"](x)
    wrapped = wrap(model, AxiomDDPState(), find_unused_parameters=True)
    for _ in range(2):
        wrapped(normal(8, 24)).square().mean().backward()
    assert model["used"].weight.grad.any()
    assert model["unused"].weight.grad is None


@pytest.mark.usefixtures("alone")
def test_sparse_gradients_are_refused():
    wrapped = wrap(nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 4)), AxiomDDPState())
    with pytest.raises(TypeError, match="sparse gradients cannot be cut into blocks"):
        wrapped(torch.arange(3)).sum().backward()


@pytest.fixture
def trained(alone) -> tuple[AxiomDDPState, DistributedDataParallel]:
    state = AxiomDDPState(12.5)
    wrapped = wrap(gloo.small_model(), state, bucket_cap_mb=0.004)
    for seed in range(2):
        backward(wrapped, normal(8, 24, seed=seed))
    return state, wrapped


def test_a_pickled_state_goes_on_where_it_was(trained):
    state, wrapped = trained
    state.process_group = dist.group.WORLD  # cannot be pickled
    copy = pickle.loads(pickle.dumps(state))
    assert copy.process_group is None
    assert (copy.top_k_percent, copy.sent, copy.dense) == (12.5, state.sent, state.dense)
    inputs = normal(8, 24, seed=2)
    assert all(map(torch.equal, backward(wrap(gloo.small_model(), copy), inputs), backward(wrapped, inputs)))


def test_a_state_can_be_rolled_back_and_is_saved_as_plain_tensors(trained, tmp_path):
    state, wrapped = trained
    saved = state.state_dict()
    torch.save(saved, tmp_path / "state.pt")
    before = gloo.own_residuals(state)
    for kept in saved["residuals"]:
        kept[0].zero_()
    assert all(map(torch.equal, gloo.own_residuals(state), before))
    inputs = normal(8, 24, seed=2)
    once = backward(wrapped, inputs)
    state.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    again = backward(wrapped, inputs)
    assert all(map(torch.equal, once, again))
    assert not all(map(torch.equal, once, backward(wrapped, inputs)))


def test_residuals_that_do_not_fit_are_refused_and_change_nothing(trained):
    state, _ = trained
    other = AxiomDDPState()
    backward(wrap(nn.Linear(24, 4), other), normal(8, 24))
    before = gloo.own_residuals(state)
    with pytest.raises(ValueError, match="do not fit"):
        state.load_state_dict(other.state_dict())
    assert all(map(torch.equal, gloo.own_residuals(state), before))
    with pytest.raises(ValueError, match="set error_feedback=True"):
        AxiomDDPState(error_feedback=False).load_state_dict(state.state_dict())
    fresh = AxiomDDPState()
    for change in ({"residuals": 3}, {"residuals": [[{}]]}, {"sent": "3"}):
        with pytest.raises(ValueError, match="this is no state of AxiomDDPState"):
            fresh.load_state_dict(other.state_dict() | change)
    fresh.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="load the state of the same model"):
        backward(wrap(gloo.small_model(), fresh), normal(8, 24))


# Two processes


@pytest.fixture(scope="module")
def both(once) -> gloo.Results:
    return once("short", lambda folder: gloo.start("short", folder))


def test_payloads_that_all_reduce_has_summed_are_refused(both):
    for worker in both:
        with pytest.raises(ValueError, match="all_gather instead of all_reduce"):
            AXIOM_DDP(300).decompress(*worker["summed"], 32)


def test_bytes_are_those_of_the_messages(both):
    for worker in both:
        for mode in ("axiom", "forgetful", "small buckets"):
            assert worker[mode]["sent"] == gloo.SHORT_STEPS * 16 * 26  # 2,706 values in 16 blocks
            assert worker[mode]["dense"] == gloo.SHORT_STEPS * 4 * 2706


def test_the_bits_depend_neither_on_buckets_nor_on_an_interruption(both):
    for worker in both:
        straight = worker["axiom"]
        assert set(straight["buckets"]) == {2706}
        for other in ("small buckets", "views", "resumed"):
            assert worker[other]["buckets"][0] == 2706
            assert max(worker[other]["buckets"][1:]) < 2706, "the buckets were not rebuilt"
            for name in ("weights", "residuals"):
                assert all(map(torch.equal, worker[other][name], straight[name]))


@pytest.mark.thorough
@pytest.mark.parametrize(("mode", "feedback"), [("axiom", True), ("forgetful", False)])
def test_two_workers_do_what_one_process_does_step_by_step(both, mode, feedback):
    model = gloo.small_model()
    optimizer = gloo.sgd(model)
    shapes = [p.shape for p in model.parameters()]
    residuals = [[torch.zeros(shape) for shape in shapes] for _ in range(2)]
    for step in range(gloo.SHORT_STEPS):
        means = [torch.zeros(shape) for shape in shapes]
        for rank in range(2):
            model.zero_grad()
            gloo.small_loss(model, rank, step).backward()
            for p, mean, residual in zip(model.parameters(), means, residuals[rank], strict=True):
                e = p.grad + residual
                sent = slow(e.flatten(), 16).view(e.shape)
                mean += sent / 2
                if feedback:
                    residual.copy_(e - sent)
        for p, mean in zip(model.parameters(), means, strict=True):
            p.grad = mean
        optimizer.step()
    for worker in both:
        assert all(map(torch.equal, worker[mode]["weights"], model.parameters()))
    assert all(map(torch.equal, *(worker["bfloat16"]["weights"] for worker in both)))
    if feedback:
        for worker, expected in zip(both, residuals, strict=True):
            assert all(map(torch.equal, worker[mode]["residuals"], expected))


def test_a_bad_gradient_of_one_worker_reaches_all_and_leaves_its_residuals(both):
    spoilt = [[bool(g.isnan().all()) for g in worker["bad"]["gradients"]] for worker in both]
    assert spoilt[0] == spoilt[1]
    assert spoilt[0][-1]
    assert not spoilt[0][0]  # which lies in another bucket
    for worker in both:
        for g, bad in zip(worker["bad"]["gradients"], spoilt[0], strict=True):
            assert bad or bool(g.isfinite().all())
        assert all(bool(r.isfinite().all()) for r in worker["bad"]["after"])
    for before, after, bad in zip(both[1]["bad"]["before"], both[1]["bad"]["after"], spoilt[0], strict=True):
        assert torch.equal(before, after) == bad
