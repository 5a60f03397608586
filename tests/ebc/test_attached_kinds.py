"""`attach` on optimizers of unusual kinds: nested, subclassed, of two calls, compiled; and without hooks."""

import io
import warnings

import pytest
import torch
from pytorch_optimizer import LOMO, SAM, Lookahead, ScheduleFreeAdamW
from support.tokenwise import Tokenwise, integers, loss_of
from torch import nn

from ebc_lab.ebc import EBCWarning, attach, mean_kl

TARGET = 0.002
LR = 0.05
OPTIONS = {"target_kl": TARGET, "probe_sequences": 24, "audit_every": 0}


def batches(steps, start=0):
    return [integers(24, 12, seed=start + i) for i in range(steps)]


def trained(model, ebc, step, data):
    """Trains; `step(closure)` is a whole step after the first backward. -> (KL over target, c), for each."""
    seen = []
    for tokens in data:

        def closure(tokens=tokens):
            with torch.enable_grad():
                loss = loss_of(model(tokens), tokens)
                loss.backward()
            return loss

        with torch.no_grad():
            before = model(tokens)
        closure()
        step(closure)
        model.zero_grad()
        with torch.no_grad():
            kl = mean_kl(before, model(tokens))
        seen.append((float(kl) / TARGET, float(ebc.last.clip_coefficient)))
    return seen


def on_target(seen):
    """Whether steps were limited, and all limited ones to the target, since every row chooses c."""
    limited = [kl for kl, c in seen if c < 0.999]
    return len(limited) > 0 and all(0.9 < kl < 1.1 for kl in limited) and max(kl for kl, _ in seen) < 1.1


class Pushing(torch.optim.Adam):
    """Does more than its parent, whose step has the hooks, too, once there has been an Adam."""

    def step(self, closure=None):
        loss = super().step()
        with torch.no_grad():
            self.param_groups[0]["params"][0].mul_(1.5)
        return loss


def test_what_a_subclass_does_after_its_parents_step_is_limited():
    torch.optim.Adam([torch.zeros(1)])
    model = Tokenwise()
    optimizer = Pushing(model.parameters(), lr=LR)
    ebc = attach(model, optimizer, **OPTIONS)
    assert on_target(trained(model, ebc, lambda closure: optimizer.step(), batches(6)))
    assert ebc.clip.step_index == 6


def test_after_a_step_that_failed_the_next_one_is_a_new_one():
    model = Tokenwise()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    ebc = attach(model, optimizer, **OPTIONS)
    data = batches(4)
    trained(model, ebc, lambda closure: optimizer.step(), data[:1])
    optimizer.param_groups[0]["betas"] = None
    with pytest.raises(TypeError):
        trained(model, ebc, lambda closure: optimizer.step(), data[1:2])
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    model.zero_grad()
    assert on_target(trained(model, ebc, lambda closure: optimizer.step(), data[2:]))


@pytest.mark.parametrize("in_two_calls", [True, False])
def test_of_sam_the_base_is_limited_from_the_weights_that_it_moves(in_two_calls):
    """The gradients, and the last forward, are of weights that SAM has moved meanwhile."""
    model = Tokenwise()
    sam = SAM(model.parameters(), torch.optim.Adam, lr=LR, rho=0.5)
    ebc = attach(model, sam.base_optimizer, **OPTIONS)

    def step(closure):
        if not in_two_calls:
            sam.step(closure)
            return
        sam.first_step(zero_grad=True)
        closure()
        sam.second_step()

    assert on_target(trained(model, ebc, step, batches(6)))


def test_an_optimizer_whose_steps_nothing_sees_is_refused():
    model = Tokenwise()
    with pytest.raises(ValueError, match="SAM moves the weights twice in a step: `attach` to its base"):
        attach(model, SAM(model.parameters(), torch.optim.Adam, lr=LR), **OPTIONS)
    with pytest.raises(ValueError, match="LOMO moves the weights inside backward"):
        attach(model, LOMO(model, lr=LR), **OPTIONS)

    class Unhooked(torch.optim.SGD):
        def __init__(self, inner):
            self.inner = inner
            self.param_groups = inner.param_groups

    with pytest.raises(ValueError, match=r"Unhooked was made without .*hooks: attach to the"):
        attach(model, Unhooked(torch.optim.SGD(model.parameters(), lr=LR)), **OPTIONS)


def test_nested_optimizers_are_limited_as_one_and_save_its_state():
    runs = []
    data = batches(12)
    for saved in (False, True):
        model = Tokenwise()
        optimizer = Lookahead(torch.optim.Adam(model.parameters(), lr=LR), k=2)
        ebc = attach(model, optimizer, **OPTIONS)
        seen = trained(model, ebc, lambda closure: optimizer.step(), data[:6])  # noqa: B023
        assert on_target(seen)
        if saved:
            kept = io.BytesIO()
            torch.save(optimizer.state_dict(), kept)
            kept.seek(0)
            again = Tokenwise()
            again.load_state_dict(model.state_dict())
            model = again
            optimizer = Lookahead(torch.optim.Adam(model.parameters(), lr=LR), k=2)
            ebc = attach(model, optimizer, **OPTIONS)
            optimizer.load_state_dict(torch.load(kept))
        runs.append(trained(model, ebc, lambda closure: optimizer.step(), data[6:]))  # noqa: B023
    assert runs[0] == runs[1]


def test_a_compiled_step():
    model = Tokenwise()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    ebc = attach(model, optimizer, **OPTIONS)
    step = torch.compile(optimizer.step, backend="eager")
    assert on_target(trained(model, ebc, lambda closure: step(), batches(6)))


@pytest.mark.parametrize("compiled_first", [False, True])
def test_a_step_that_is_compiled_in_place(compiled_first):
    model = Tokenwise()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    if compiled_first:
        optimizer.step = torch.compile(optimizer.step, backend="eager")
    ebc = attach(model, optimizer, **OPTIONS)
    if not compiled_first:
        optimizer.step = torch.compile(optimizer.step, backend="eager")
    assert on_target(trained(model, ebc, lambda closure: optimizer.step(), batches(6)))


@pytest.mark.parametrize("kind", ["schedule-free", "mechanic"])
def test_without_a_budget_the_bits_are_the_optimizers_own(kind):
    ends = []
    for attached in (False, True):
        model = Tokenwise()
        if kind == "mechanic":
            optimizer = pytest.importorskip("mechanic_pytorch").mechanize(torch.optim.Adam)(
                model.parameters(), lr=LR
            )
        else:
            optimizer = ScheduleFreeAdamW(model.parameters(), lr=LR)
            optimizer.train()
        ebc = attach(model, optimizer, target_kl=float("inf")) if attached else None
        for tokens in batches(6):
            loss_of(model(tokens), tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert ebc is None or float(ebc.last.clip_coefficient) == 1
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


def test_without_a_budget_a_step_needs_no_forward():
    model = Tokenwise()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    ebc = attach(model, optimizer, target_kl=float("inf"))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert ebc.last is not None
    assert float(ebc.last.clip_coefficient) == 1


def test_sparse_gradients_of_a_bare_tensor():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(11, 11))

        def forward(self, ids):
            return nn.functional.embedding(ids, self.table, sparse=True)

    model = Rows()
    optimizer = torch.optim.SGD(model.parameters(), lr=50.0)
    ebc = attach(model, optimizer, **OPTIONS)
    assert on_target(trained(model, ebc, lambda closure: optimizer.step(), batches(4)))


def test_low_precision_weights_under_autocast():
    """The forward takes float32 inputs that bfloat16 weights do not take outside of it."""
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 5)).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ebc = attach(model, optimizer, target_kl=0.01, probe_sequences=100, audit_every=0)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(128, 6)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ebc.clip.budget.floor == 1e-5


def test_accumulation_is_no_contrast_where_the_logits_are_made_of_the_output():
    model = Tokenwise()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    attach(model, optimizer, logits_of=lambda z: z * 1.0, **OPTIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EBCWarning)
        for tokens in batches(2):
            loss_of(model(tokens), tokens).backward()
        optimizer.step()


def test_dropout_without_a_module_of_its_own():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(11, 16),
            "cell": nn.LSTM(16, 16, 2, batch_first=True, dropout=0.3),
            "head": nn.Linear(16, 11),
        }
    )

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, tokens):
            return model["head"](model["cell"](model["embedding"](tokens))[0])

    net = Recurrent()
    optimizer = torch.optim.Adam(net.parameters(), lr=LR)
    ebc = attach(net, optimizer, target_kl=1e-3, probe_sequences=12, audit_every=10)
    lowest = 1.0
    for seed in range(21):
        tokens = integers(24, 12, seed=seed)
        loss_of(net(tokens), tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        lowest = min(lowest, float(ebc.last.clip_coefficient))
    assert lowest > 1e-3  # dropout's noise, taken for movement, made it fall below 1e-6
    assert 0.5 < ebc.last.applied_kl / ebc.last.target_kl < 2


def test_rows_that_depend_on_other_rows_are_told_at_an_audit():
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 16)
            self.cell = nn.RNN(16, 16)
            self.head = nn.Linear(16, 11)

        def forward(self, tokens):
            return self.head(self.cell(self.embedding(tokens))[0])

    torch.manual_seed(0)
    model = TimeFirst()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    attach(model, optimizer, target_kl=0.005, probe_sequences=8, audit_every=5)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", EBCWarning)
        for seed in range(16):
            tokens = integers(12, 24, seed=seed)
            loss_of(model(tokens), tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert sum("a row's logits depend on other rows" in str(t.message) for t in told) == 1


@pytest.mark.parametrize("budget", ["shadow", "tracked"])
def test_a_batch_whose_probe_rows_are_padding_takes_the_last_c(budget):
    class Padded(Tokenwise):
        def forward(self, tokens, attention_mask=None):
            return super().forward(tokens)

    model = Padded()
    optimizer = torch.optim.SGD(model.parameters(), lr=20.0)
    ebc = attach(model, optimizer, target_kl=1e-4, probe_sequences=12, audit_every=6, budget=budget)
    seen = []
    for seed in range(7):
        tokens = integers(24, 12, seed=seed)
        mask = torch.ones_like(tokens)
        if seed in (3, 4):
            mask[:12] = 0
        if seed == 6:
            mask[12:] = 0
        loss_of(model(tokens, attention_mask=mask), tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not ebc.last.skipped
        seen.append(float(ebc.last.clip_coefficient))
    assert 0 < seen[2] < 1
    assert seen[3] == seen[4] == seen[2]
    assert seen[5] > seen[2] / 10
    assert ebc.last.applied_kl is None  # none of an audit's rows has a token that counts


def test_weights_that_another_optimizer_moves_do_not_count():
    def last(other_lr):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 11))
        optimizer = torch.optim.Adam(model[1].parameters(), lr=LR)
        other = torch.optim.SGD(model[0].parameters(), lr=other_lr)
        ebc = attach(model, optimizer, target_kl=0.005, probe_sequences=12)
        tokens = integers(24, 12)
        loss_of(model(tokens), tokens).backward()
        other.step()
        optimizer.step()
        return float(ebc.last.clip_coefficient)

    assert last(20.0) > 0.5 * last(0.0)


def test_what_attach_does_not_take_is_refused():
    model = Tokenwise()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    for error, wrong in (
        (r"no forward, since", {"forward": lambda model, batch: model(batch)}),
        (r"drop=\('labels',\)", {"drop": "labels"}),
        (r"probe_sequences must be a whole number, not 2.5", {"probe_sequences": 2.5}),
    ):
        with pytest.raises(TypeError, match=error):
            attach(model, optimizer, target_kl=0.005, **wrong)
    with pytest.raises(ValueError, match="audit_every must be at least 0, not -1"):
        attach(model, optimizer, target_kl=0.005, audit_every=-1)
    with pytest.raises(TypeError, match=r"generator is no torch.nn.Module"):
        attach(model.parameters(), optimizer, target_kl=0.005)
