"""AXIOM as a torch optimizer, and its updates inside backward."""

import copy
import math

import pytest
import torch
from torch import nn

from ebc_lab.axiom import AXIOM, AnomalyError, checks
from ebc_lab.axiom.update import state_bytes


class Net(nn.Module):
    """A tied embedding, a matrix, a convolution and vectors."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, tokens):
        x = self.mix(self.embedding(tokens)).relu()
        x = self.conv(x.mT).mT
        return x @ self.embedding.weight.T


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def fresh(hooks: bool = False, lr: float = 0.01, **settings) -> tuple[Net, AXIOM]:
    model = net()
    optimizer = AXIOM(model.named_parameters(), lr=lr, **settings)
    if hooks:
        optimizer.register_hooks()
    return model, optimizer


def tokens(step: int) -> torch.Tensor:
    return torch.randint(0, 11, (4, 8), generator=torch.Generator().manual_seed(step))


def loss_of(model: Net, step: int) -> torch.Tensor:
    found = tokens(step)
    return nn.functional.cross_entropy(model(found[:, :-1]).flatten(0, 1), found[:, 1:].flatten())


def train(model: Net, optimizer: AXIOM, steps) -> float:
    loss = torch.zeros(())
    for step in steps:
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step(loss=loss)
        optimizer.zero_grad()
    return float(loss.detach())


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def without_hooks_and_with(make, loss_of_step, **settings) -> list[torch.Tensor]:
    """The weights of `make()` after four steps down `loss_of_step(model, step)`, in both ways."""
    ends = []
    for hooks in (False, True):
        model = make()
        optimizer = AXIOM(model.parameters(), lr=0.01, **settings)
        if hooks:
            optimizer.register_hooks()
        for step in range(4):
            loss = loss_of_step(model, step)
            loss.backward()
            optimizer.step(loss=loss)
            optimizer.zero_grad()
        ends.append(weights(model))
    return ends


# -- hooks ---------------------------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("begin", [0, 3])
def test_hooks_change_no_bit(rank, dtype, begin):
    """Nor do hooks that are switched on half-way, and off again."""
    ends = []
    for hooks in (False, True):
        model = net().to(dtype)
        optimizer = AXIOM(model.named_parameters(), lr=0.01, rank=rank)
        train(model, optimizer, range(begin))
        if hooks:
            optimizer.register_hooks()
        train(model, optimizer, range(begin, 6))
        optimizer.remove_hooks()
        train(model, optimizer, range(6, 8))
        ends.append(weights(model))
    assert torch.equal(*ends)


def test_a_closure_is_a_step_of_its_own():
    ends = []
    for hooks in (False, True):
        model, optimizer = fresh(hooks)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
            return loss

        returned = [float(optimizer.step(closure).detach()) for _ in range(3)]
        ends.append((weights(model), returned))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_checkpointed_blocks_move_too():
    """torch's activation checkpointing runs a backward inside backward."""
    ends = []
    for reentrant in (None, False, True):
        model, optimizer = fresh(hooks=True)
        for step in range(3):
            found = tokens(step)
            x = model.embedding(found)
            if reentrant is None:
                x = model.mix(x)
            else:
                x = torch.utils.checkpoint.checkpoint(model.mix, x, use_reentrant=reentrant)
            loss = (x @ model.embedding.weight.T).logsumexp(-1).mean()
            loss.backward()
            optimizer.step(loss=loss)
        ends.append(weights(model))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


# -- the limit of the gradients ------------------------------------------------------------------------------


def test_the_plain_limit_is_torchs():
    ends = []
    for own in (True, False):
        model = net()
        optimizer = AXIOM(model.parameters(), lr=0.01, max_grad_norm=0.1 if own else None)
        for step in range(4):
            loss_of(model, step).backward()
            if not own:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


def test_under_hooks_each_tensor_is_held_to_its_share():
    """Also one that joins late, whose part of the limit the others have taken by then."""
    early, late = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = AXIOM([early, late], max_grad_norm=1.0)
    optimizer.register_hooks()
    for _ in range(30):
        (early * 100).sum().backward()
        optimizer.step()
    shares = [optimizer.state[p]["share"] for p in (early, late)]
    assert sum(shares) == pytest.approx(1)
    assert 0 < shares[1] < 0.05


def test_hooks_limit_as_the_plain_step_where_each_tensors_part_is_its_share():
    """Of 9 and 16 equal elements the norms are 3/5 and 4/5 of the whole, and so are the two limits."""
    norms = (50.0, 0.8, 2.0, 0.1)  # of the gradient; over the limit and below it in turns
    ends = without_hooks_and_with(
        lambda: nn.ParameterList([torch.ones(3, 3), torch.ones(16)]),
        lambda model, step: norms[step] / 5 * sum(p.sum() for p in model),
        max_grad_norm=1.0,
    )
    torch.testing.assert_close(*ends)


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_plain_anomaly_changes_nothing(value):
    model, optimizer = fresh()
    train(model, optimizer, range(2))
    before = weights(model)
    state = copy.deepcopy(optimizer.state_dict())
    loss_of(model, 0).backward()
    model.mix.weight.grad[0, 0] = value
    with pytest.raises(AnomalyError, match=r"gradient of mix\.weight is not finite .*: nothing was changed"):
        optimizer.step()
    with pytest.raises(AnomalyError, match="the loss is"):
        optimizer.step(loss=torch.tensor(value))
    assert torch.equal(weights(model), before)
    assert str(state) == str(optimizer.state_dict())


def test_under_hooks_the_tensor_stays_and_those_that_moved_are_named():
    model, optimizer = fresh(hooks=True)
    train(model, optimizer, range(2))
    handle = model.mix.weight.register_hook(lambda g: g * math.nan)
    before = model.mix.weight.detach().clone()
    state = str(optimizer.state[model.mix.weight])
    loss = loss_of(model, 2)
    loss.backward()
    with pytest.raises(AnomalyError) as error:
        optimizer.step(loss=loss)
    assert error.value.bad == ["mix.weight"]
    assert set(error.value.moved) == {"embedding.weight", "mix.bias", "conv.weight", "conv.bias"}
    assert "conv.weight" in str(error.value)
    assert torch.equal(model.mix.weight, before)
    assert str(optimizer.state[model.mix.weight]) == state
    handle.remove()
    train(model, optimizer, range(3, 5))
    assert weights(model).isfinite().all()
    loss_of(model, 5).backward()
    with pytest.raises(AnomalyError, match=r"the loss is nan; .*conv.weight.* moved already"):
        optimizer.step(loss=torch.tensor(math.nan))


def test_a_second_backward_is_refused_before_anything_moves():
    """Also one that reaches other tensors first."""
    model, optimizer = fresh(hooks=True)
    loss = loss_of(model, 0)
    loss.backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match="second backward before step"):
        loss_of(model, 1).backward()
    with pytest.raises(RuntimeError, match="second backward before step"):
        model.unused.sum().backward()
    assert torch.equal(weights(model), before)
    optimizer.step(loss=loss)
    train(model, optimizer, [1])


def test_hooks_are_refused_twice_with_gradients_pending_without_a_scale_and_of_workers(monkeypatch):
    model, optimizer = fresh()
    for _ in range(2):
        loss_of(model, 0).backward()
        with pytest.raises(RuntimeError, match=r"embedding\.weight.* has a gradient that no step has used"):
            optimizer.register_hooks()
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="lr_scale must be above 0"):
        optimizer.register_hooks(lr_scale=0)
    optimizer.register_hooks()
    with pytest.raises(RuntimeError, match="registered already"):
        optimizer.register_hooks()
    with pytest.raises(RuntimeError, match="remove_hooks"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    optimizer.remove_hooks()
    assert not optimizer.hooked
    monkeypatch.setattr("ebc_lab.axiom.optimizer.workers", lambda: 2)
    with pytest.raises(RuntimeError, match="before 2 workers have exchanged gradients"):
        optimizer.register_hooks()


BAD = {
    "lr": [-1, math.nan, math.inf, "fast"],
    "weight_decay": [-0.1],
    "max_grad_norm": [0, -1, math.inf],
    "streak_boost": [0.5],
    "snr_floor": [-0.1, 1.1],
    "rank": [-1, 1.5],
    "momentum_weight": [-1],
    "beta1": [1, -0.1],
    "rms_limit": [0],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises((ValueError, TypeError), match=f"{name} must be"):
        AXIOM([nn.Parameter(torch.ones(2))], **{name: value})


def test_a_limit_itself_is_allowed_where_the_message_says_so():
    weights = [nn.Parameter(torch.ones(2))]
    for name, value, words in (
        ("lr", -1, "at least 0"),
        ("streak_boost", 0.5, "at least 1"),
        ("snr_floor", 1.1, "at least 0 and at most 1"),
        ("beta1", 1, "at least 0 and below 1"),
        ("rms_limit", 0, "above 0"),
        ("max_grad_norm", 0, "above 0"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be {words}, not {value}"):
            AXIOM(weights, **{name: value})
    least = {"lr": 0, "weight_decay": 0, "streak_boost": 1, "snr_floor": 0, "rank": 0, "momentum_weight": 0}
    for name, value in (*least.items(), ("beta1", 0), ("snr_floor", 1), ("rms_limit", 1e-30)):
        assert AXIOM(weights, **{name: value}).param_groups[0][name] == value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_norm_of_a_large_gradient_is_taken_by_parts(dtype, monkeypatch):
    gradient = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    monkeypatch.setattr(checks, "CHUNK", 50)
    torch.testing.assert_close(checks.norm_of(gradient).double(), gradient.double().norm(), rtol=1e-6, atol=0)
    gradient[6, 32] = torch.inf
    assert not checks.norm_of(gradient).isfinite()


def test_integers_and_sparse_gradients_are_refused():
    with pytest.raises(TypeError, match="floating ones"):
        AXIOM([torch.ones(3, dtype=torch.int64)])
    sparse = nn.Embedding(5, 3, sparse=True)
    optimizer = AXIOM(sparse.named_parameters())
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="gradient of weight is sparse"):
        optimizer.step()


# -- a torch optimizer ---------------------------------------------------------------------------------------


def test_a_state_of_another_model_is_refused_and_changes_nothing():
    model, optimizer = fresh()
    train(model, optimizer, [0])
    before = str(optimizer.state_dict())
    foreign = copy.deepcopy(optimizer.state_dict())
    foreign["state"][1]["row"] = torch.ones(3)
    with pytest.raises(ValueError, match="the state of embedding"):
        optimizer.load_state_dict(foreign)
    with pytest.raises(ValueError, match="1 parameters"):
        optimizer.load_state_dict(AXIOM([nn.Parameter(torch.ones(2))]).state_dict())
    assert str(optimizer.state_dict()) == before


def test_groups_have_their_own_settings_and_schedulers_work():
    model = net()
    groups = [{"params": [model.mix.weight], "rank": 0, "lr": 0.5}, {"params": [model.conv.weight]}]
    optimizer = AXIOM(groups, lr=0.1, rank=2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(model, optimizer, [0])
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.05]
    assert "left" not in optimizer.state[model.mix.weight]
    assert optimizer.state[model.conv.weight]["left"].shape == (2, 6)
    optimizer.set_lr(0.3)
    assert optimizer.get_lr() == 0.3
    assert {group["lr"] for group in optimizer.param_groups} == {0.3}
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.set_lr(-1)


def test_memory_usage_counts_what_is_there(capsys):
    model = net()
    optimizer = AXIOM(model.parameters(), rank=4)
    found = optimizer.memory_usage(verbose=False)
    assert capsys.readouterr().out == ""
    elements = sum(p.numel() for p in model.parameters())
    assert found["parameters"] == elements
    assert found["parameter_bytes"] == found["gradient_bytes"] == 4 * elements
    assert found["state_bytes"] == sum(state_bytes(p.shape, 4) for p in model.parameters())
    optimizer.register_hooks()
    assert optimizer.memory_usage()["gradient_bytes"] == max(p.nbytes for p in model.parameters())
    assert "state_compression" in capsys.readouterr().out
    train(model, optimizer, [0])
    held = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert sum(v.nbytes for v in held) + state_bytes((3,), 4) == found["state_bytes"]


def test_gradients_that_share_memory_are_each_ones_own():
    """autograd gives both branches of a sum the same memory."""
    draw = torch.Generator().manual_seed(0)
    a, b, target = (torch.randn(8, 8, generator=draw) for _ in range(3))
    ends = without_hooks_and_with(
        lambda: nn.ParameterList([a.clone(), b.clone()]),
        lambda pair, step: (pair[0].view(-1) + pair[1].t().reshape(-1) - target.view(-1)).square().sum(),
        rank=2,
    )
    assert torch.equal(*ends)


def test_a_copy_begins_without_hooks_and_trains():
    model, optimizer = fresh(hooks=True, max_grad_norm=0.5)
    train(model, optimizer, [0])
    other_model, other = copy.deepcopy((model, optimizer))
    assert not other.hooked
    assert other.max_grad_norm == 0.5
    before = weights(other_model)
    train(other_model, other, [1])
    assert not torch.equal(weights(other_model), before)


def test_a_tensor_unfrozen_later_is_told_of():
    model = net()
    model.mix.bias.requires_grad_(False)
    optimizer = AXIOM(model.named_parameters(), lr=0.01)
    optimizer.register_hooks()
    model.mix.bias.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"mix\.bias has a gradient and no hook"):
        train(model, optimizer, [0])


@pytest.mark.cuda
@pytest.mark.parametrize("rank", [0, 4])
def test_hooks_change_no_bit_on_a_gpu(rank):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).cuda()

    def loss(model, step):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step)).cuda()
        return (model(x) - x).square().mean()

    ends = without_hooks_and_with(make, loss, rank=rank)
    assert torch.equal(*ends)
