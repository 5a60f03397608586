"""Gradients as integer sums: over any split, order and number of workers; what is repeated, refused, kept."""

import copy
import json
import math

import pytest
import torch
from support.exact_gpt import GOLDEN, batches, gpt, trained
from support.gloo_worker import start
from torch import distributed
from torch.utils.checkpoint import checkpoint

from ebc_lab.verity import Grids, VerityAdam, VerityError, VerityGPT, ops, weights_checksum

USUAL = "425673c39789c10e"  # of the golden run


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["grids", "whole"])
@pytest.mark.usefixtures("engine")
def test_the_golden_run(mode):
    losses: list[float] = []
    assert trained(grids=mode == "grids", spy=losses.append) == GOLDEN["gpt"][mode]["final"]
    assert losses == [float.fromhex(x) for x in GOLDEN["gpt"][mode]["losses"]]


@pytest.mark.thorough
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("order", [None, [2, 0, 3, 1]])
@pytest.mark.usefixtures("engine")
def test_neither_split_nor_order_changes_a_bit(parts, order):
    assert trained(parts=parts, order=order) == USUAL


def test_without_grids_the_order_changes_nothing_and_the_split_does():
    golden = GOLDEN["gpt"]["whole"]["final"]
    assert trained(grids=False, order=[3, 1, 0, 2]) == golden
    assert trained(grids=False, parts=2) != golden


@pytest.mark.thorough
@pytest.mark.parametrize("share", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_two_workers_are_as_good_as_one(share, tmp_path):
    """Each with its share of the rows, the second one's in two parts."""
    found = start("exact", tmp_path, share=share)
    assert [worker["checksum"] for worker in found] == [USUAL, USUAL]


def forward_backward(model, x, y):
    loss = ops.cross_entropy(model(x), y)
    loss.backward()
    return loss


def step_of(grids, count, *backward):
    """The backward calls of a step, once or, where a value did not fit its grid, twice."""
    for call in backward:
        call()
    if not grids.finish(count):
        for call in backward:
            call()
        assert grids.finish(count)


def test_a_step_that_does_not_fit_is_repeated_once_and_says_so():
    model = gpt()
    grids = Grids(model)
    optimizer = VerityAdam(model.parameters())
    (x, y), *_ = batches(1)
    forward_backward(model, x, y)
    assert not grids.finish(x.numel())
    before = weights_checksum(model)
    with pytest.raises(VerityError, match="finish"):
        optimizer.step()
    assert weights_checksum(model) == before
    forward_backward(model, x, y)
    assert grids.finish(x.numel())
    assert grids.redone == 1
    big = [p.grad.clone() for p in model.parameters()]
    # a thousand times the loss fits no grid, and what was written before is gone
    (ops.cross_entropy(model(x), y) * 1000).backward()
    assert not grids.finish(x.numel())
    assert all(p.grad is None for p in model.parameters())
    (ops.cross_entropy(model(x), y) * 1000).backward()
    assert grids.finish(1000 * x.numel())
    for p, g in zip(model.parameters(), big, strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-6)


def test_a_large_value_fits_for_sixteen_steps():
    """It is remembered with 15 smaller ones after it, by a checkpoint too, and forgotten after 16."""
    layer = ops.VLALinear(1, 1, bias=False)
    torch.nn.init.ones_(layer.weight)
    grids = Grids(layer)

    def step(x: float, dy: float = 1.0) -> int:
        """How often a step of one token was repeated."""
        before = grids.redone
        step_of(grids, 1, lambda: layer(torch.tensor([[x]])).backward(torch.tensor([[dy]])))
        return grids.redone - before

    # dy outgrows its grid; the grid of x stays as the step before has left it, and 2^-22 is lost on it
    assert step(1.0) == 1
    assert step(2.0**-10 + 2.0**-22, dy=2.0**10) == 1
    assert layer.weight.grad.item() == 1
    assert step(1000.0) == 1
    for smaller, repeated in ((15, 0), (16, 1)):
        assert [step(1.0) for _ in range(smaller)] == [0] * smaller
        grids.load_state_dict(grids.state_dict())
        assert step(1000.0) == repeated


@pytest.mark.thorough
@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_what_is_not_finite_stops_the_step_and_leaves_no_trace(where):
    """In the second half of a batch, whose first half is summed up already."""
    model, other = gpt(), gpt()
    runs = [(m, Grids(m), VerityAdam(m.parameters(), lr=0.01)) for m in (model, other)]
    data = batches(3)

    def step(model, grids, optimizer, x, y):
        halves = zip(x.chunk(2), y.chunk(2), strict=True)
        step_of(grids, x.numel(), *(lambda a=a, b=b: forward_backward(model, a, b) for a, b in halves))
        optimizer.step()

    for run in runs:
        step(*run, *data[0])
    state = json.dumps(runs[0][1].state_dict())
    x, y = data[1]
    forward_backward(model, x[:2], y[:2])
    loss = ops.cross_entropy(model(x[2:]), y[2:])
    kept = model.norm.weight.detach().clone()
    if where == "weight":
        model.norm.weight.data[3] = math.nan
        with pytest.raises(VerityError, match="not finite"):
            model(x[2:])
        model.norm.weight.data.copy_(kept)
    else:
        with pytest.raises(VerityError, match="not finite"):
            (loss * math.inf).backward()
    assert json.dumps(runs[0][1].state_dict()) == state
    for run in runs:
        step(*run, *data[2])
    assert weights_checksum(model) == weights_checksum(other)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state, site: state.pop("sites"),
        lambda state, site: state["sites"].pop(),
        lambda state, site: site.update(e=[10**6]),
        lambda state, site: site.update(hist=[[1] * 17]),
        lambda state, site: state.update(sites=[torch.zeros(())]),
        lambda state, site: state.update(redone=True),
        lambda state, site: site["shapes"][0].__setitem__(0, torch.ones(2)),
        lambda state, site: state.update(Grids(VerityGPT(11, 8, 24, 2, 2)).state_dict()),
    ],
)
def test_a_foreign_or_a_damaged_state_is_refused_and_changes_nothing(damage):
    grids = Grids(gpt())
    before = grids.state_dict()
    state = Grids(gpt()).state_dict()
    damage(state, state["sites"][0])
    with pytest.raises(VerityError, match=r"damaged|another model's"):
        grids.load_state_dict(state)
    assert grids.state_dict() == before


@pytest.mark.parametrize("parts", [1, 2])
def test_activation_checkpointing_changes_no_bit(parts):
    """torch ends a recomputation early by an exception of its own, which ends no step."""
    model, plain = gpt(), gpt()
    grids, usual = Grids(model), Grids(plain)
    (x, y), *_ = batches(1)
    for _ in range(2):
        for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
            checkpoint(lambda a, b: ops.cross_entropy(model(a), b), a, b, use_reentrant=False).backward()
            forward_backward(plain, a, b)
        done = grids.finish(x.numel()), usual.finish(x.numel())
    assert done == (True, True)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_more_tokens_than_a_sum_can_hold_are_refused():
    layer = ops.VLALinear(1, 1, bias=False)
    torch.nn.init.ones_(layer.weight)
    # as many as are allowed fit, though values round up to the end of their grid, and all have one sign
    below_1 = torch.full((2**21 - 1, 1), 1 - 2.0**-24)
    layer(below_1).backward(below_1)
    assert layer.weight.grad.item() == float(2**21 - 1)
    layer.weight.grad = None
    x = torch.ones(2**20 + 1, 1)
    with pytest.raises(ValueError, match="2097151 tokens at most, not 2097152"):
        layer(torch.ones(2**21, 1)).backward(torch.ones(2**21, 1))
    grids = Grids(layer)
    for _ in range(2):
        layer(x).backward(x)
    with pytest.raises(ValueError, match="2097151 tokens at most, not 2097154"):
        grids.finish(1)
    for count in (0, -1, 2.5, math.nan, True):
        with pytest.raises(ValueError, match="a whole one"):
            grids.finish(count)
    assert layer.weight.grad is None


def test_another_models_error_costs_a_model_nothing():
    """Nor does an evaluation of its own, without gradients."""
    model, other, alone = gpt(), gpt(), gpt()
    grids, _, usual = (Grids(m) for m in (model, other, alone))
    (x, y), *_ = batches(1)

    def disturbed():
        """Both halves of a batch, with refusals after each."""
        for half in (slice(2), slice(2, 4)):
            forward_backward(model, x[half], y[half])
            with torch.no_grad():
                other.norm.weight[0] = math.nan
                kept = model.norm.weight.clone()
                model.norm.weight[0] = math.inf
                for refusing in (other, model, lambda x: ops.softmax(torch.full((1, 1), math.nan))):
                    with pytest.raises(VerityError):
                        refusing(x)
                model.norm.weight.copy_(kept)

    step_of(grids, x.numel(), disturbed)
    step_of(usual, x.numel(), lambda: forward_backward(alone, x, y))
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), alone.parameters(), strict=True)
    )


def test_a_gradient_beyond_float32_is_refused_and_the_grids_stay():
    layer = ops.VLALinear(1, 1, bias=False)
    grids = Grids(layer)
    x = torch.full((4, 1), 3e38)
    for _ in range(2):
        layer(x).backward(torch.ones(4, 1))
        if grids.sums[0].grids[0].e is None:
            assert not grids.finish(1)
    before = grids.state_dict()
    with pytest.raises(VerityError, match="not finite"):
        grids.finish(1)
    assert layer.weight.grad is None
    assert grids.state_dict() == before


def test_a_copy_of_a_model_is_its_own():
    """Without the Grids it is a model without; copied with them, they are the copy's."""
    model = gpt()
    grids = Grids(model)
    (x, y), *_ = batches(1)
    alone = copy.deepcopy(model)
    forward_backward(alone, x, y)
    assert all(p.grad is not None for p in alone.parameters())
    again, sums = copy.deepcopy((model, grids))
    for m, g in ((model, grids), (again, sums)):
        step_of(g, x.numel(), lambda m=m: forward_backward(m, x, y))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_parameter_of_no_exact_layer_is_refused():
    """Somebody may vouch for what it computes, but nobody can sum its gradient."""
    model = torch.nn.Sequential(ops.VLALinear(2, 2), torch.nn.Linear(2, 2))
    with pytest.raises(VerityError, match=r"1\.weight belongs to no exact layer"):
        Grids(model, vouched=[torch.nn.Linear])


def test_a_frozen_weight_is_left_out():
    model = torch.nn.Sequential(ops.VLALinear(3, 3, bias=False), ops.VLALinear(3, 2))
    model[0].weight.requires_grad_(False)
    step_of(Grids(model), 1, lambda: model(torch.ones(5, 3)).backward(torch.ones(5, 2)))
    assert model[0].weight.grad is None
    assert model[1].bias.grad.tolist() == [5, 5]


@pytest.mark.parametrize("grids", [True, False])
def test_a_table_tied_to_the_head_has_the_gradients_of_both(grids):
    table, head = ops.VLAEmbedding(5, 3), ops.VLALinear(3, 5, bias=False)
    with torch.no_grad():
        table.weight.copy_(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    head.weight = table.weight
    model = torch.nn.Sequential(table, head)
    sums = Grids(model) if grids else None
    ids = torch.tensor([0, 3, 3, 1])
    done = False
    while not done:
        table.weight.grad = None
        ops.cross_entropy(model(ids), ids).backward()
        done = sums is None or sums.finish(1)
    wide = table.weight.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(wide[ids] @ wide.t(), ids, reduction="sum").backward()
    assert (table.weight.grad - wide.grad).norm() < 1e-5 * wide.grad.norm()


def test_what_is_all_zeros_says_nothing_about_the_grid():
    """With a head of zeros no gradient reaches the layer below: its first one chooses its grid."""
    below, head = ops.VLALinear(3, 3, bias=False), ops.VLALinear(3, 2, bias=False)
    model = torch.nn.Sequential(below, head)
    torch.nn.init.eye_(below.weight)
    grids = Grids(model)
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(4, n, generator=generator) for n in (3, 2))
    step_of(grids, 1, lambda: model(x).backward(dy))
    assert not below.weight.grad.any()
    torch.nn.init.constant_(head.weight, 2.0**-30)
    step_of(grids, 1, lambda: model(x).backward(dy))
    expected = (dy.double() @ head.weight.double()).t() @ x.double()
    assert ((below.weight.grad - expected).norm() / expected.norm()) < 1e-5


@pytest.fixture
def alone():
    """The default process group, of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_group_of_one_worker_changes_no_bit():
    ends = []
    for group in (None, True, distributed.group.WORLD):
        model = gpt()
        grids = Grids(model)
        for x, y in batches(2):
            for _ in range(2):
                forward_backward(model, x, y)
                if grids.finish(y.numel(), group):
                    break
        ends.append([p.grad for p in model.parameters()] + [torch.tensor(grids.redone)])
    for end in ends[1:]:
        assert all(torch.equal(p, q) for p, q in zip(ends[0], end, strict=True))


@pytest.mark.usefixtures("alone")
def test_a_worker_among_others_may_have_no_tokens():
    grids = Grids(gpt())
    with pytest.raises(ValueError, match="finish takes a number of tokens, a whole one, not 0"):
        grids.finish(0)
    with pytest.raises(ValueError, match="not -1"):
        grids.finish(-1, True)
