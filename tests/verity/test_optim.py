"""VerityAdam and the checksum of weights."""

import copy
import hashlib
import math

import pytest
import torch
from support.exact_gpt import GOLDEN, gpt, numbers

from ebc_lab.verity import VerityAdam, VerityError, weights_checksum


@pytest.mark.usefixtures("engine")
def test_the_golden_steps():
    g = GOLDEN["adam"]
    w = torch.nn.Parameter(numbers(g["w0"]))
    optimizer = VerityAdam([w], g["lr"], tuple(g["betas"]), g["eps"], g["weight_decay"])
    for step in g["steps"]:
        w.grad = numbers(step["g"])
        optimizer.step()
        assert torch.equal(w, numbers(step["w"]))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_adam(decay):
    draw = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.randn(7, 5, generator=draw))
    wide = torch.nn.Parameter(w.detach().double())
    ours = VerityAdam([w], lr=0.01, weight_decay=decay)
    plain = torch.optim.AdamW([wide], lr=0.01, weight_decay=decay)
    for _ in range(20):
        w.grad = torch.randn(7, 5, generator=draw)
        wide.grad = w.grad.double()
        ours.step()
        plain.step()
    assert torch.allclose(w, wide.float(), rtol=1e-5, atol=1e-6)


def test_nothing_changes_where_a_gradient_is_missing_or_not_finite():
    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = VerityAdam([a, b])
    with pytest.raises(VerityError, match="no gradient"):
        optimizer.step()
    a.grad = torch.ones(3)
    b.grad = torch.tensor([0.0, math.nan, 0.0])
    with pytest.raises(VerityError, match="not finite"):
        optimizer.step()
    assert a.tolist() == [1, 1, 1]
    assert not optimizer.state


def test_numbers_out_of_range_and_another_precision_are_refused():
    for wrong in ({"lr": -1}, {"betas": (0.9, 1.0)}, {"eps": math.nan}, {"weight_decay": -1}):
        with pytest.raises(ValueError, match="VerityAdam takes lr"):
            VerityAdam([torch.nn.Parameter(torch.ones(1))], **wrong)
    with pytest.raises(ValueError, match="float32"):
        VerityAdam([torch.nn.Parameter(torch.ones(1, dtype=torch.float64))])


OTHERS = {
    "no groups": lambda state: state.pop("param_groups"),
    "a rate": lambda state: state["param_groups"][0].update(lr="high"),
    "no powers": lambda state: state["state"][0].pop("powers"),
    "powers": lambda state: state["state"][0].update(powers=(0.5, None)),
    "another shape": lambda state: state["state"][0].update(exp_avg=torch.zeros(1)),
    "a number": lambda state: state["state"][0].update(exp_avg_sq=2.0),
    "no state": lambda state: state["state"].update({0: torch.zeros(())}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_foreign_or_a_damaged_state_is_refused_and_changes_nothing(kind):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = VerityAdam([p])
    p.grad = torch.ones(3)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    OTHERS[kind](state)
    with pytest.raises(VerityError, match="is damaged, or another model's"):
        optimizer.load_state_dict(state)
    assert set(optimizer.state[p]) == {"exp_avg", "exp_avg_sq", "powers"}
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_a_checksum_is_of_names_shapes_and_bytes():
    model = torch.nn.Linear(2, 1)
    model.load_state_dict({"weight": torch.tensor([[1.0, -0.0]]), "bias": torch.tensor([2.0])})
    said = b"bias (1,) torch.float32\n" + bytes.fromhex("00000040")
    said += b"weight (1, 2) torch.float32\n" + bytes.fromhex("0000803f00000080")
    assert weights_checksum(model) == hashlib.sha256(said).hexdigest()[:16]
    model.weight.data[0, 1] = 0.0
    assert weights_checksum(model) != hashlib.sha256(said).hexdigest()[:16]
    assert weights_checksum(gpt()) == GOLDEN["gpt"]["grids"]["initial"]
