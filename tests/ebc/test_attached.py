"""`attach`: the step of `EllipsotopeClip` on an optimizer that other code calls."""

import copy
import io
import math
import pickle
import warnings
from contextlib import nullcontext

import pytest
import torch
from support.tokenwise import Tokenwise, integers, loss_of
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ebc_lab.ebc import EBCWarning, EllipsotopeClip, attach, mean_kl

LR = 0.05
KEYS = ("clip_coefficient", "trial", "trial_kl", "delta", "grad_norm", "applied_kl", "slope", "surrogate")


class Net(Tokenwise):
    """With dropout where `drop` is above 0."""

    def __init__(self, drop=0.0):
        super().__init__(width=16)
        self.drop = nn.Dropout(drop)

    def forward(self, ids, labels=None):
        x = self.embedding(ids)
        return self.head(x + self.drop(torch.tanh(self.blocks[0](x))))


def adam(model):
    return [torch.optim.Adam(model.parameters(), lr=LR)]


def muon(model):
    matrix = model.blocks[0].weight
    others = [p for p in model.parameters() if p is not matrix]
    return [torch.optim.Muon([matrix], lr=LR), torch.optim.AdamW(others, lr=LR)]


def data(steps, rows=24, start=0):
    return [integers(rows, 12, seed=start + i) for i in range(steps)]


def options(**given):
    return {"target_kl": 0.002, "probe_sequences": 12, "audit_every": 3, **given}


def attached(make=adam, drop=0.0, **given):
    """Return a new model, its optimizers, and the EBC on them."""
    model = Net(drop)
    bases = make(model)
    return model, bases, attach(model, bases, **options(**given))


def loop(model, optimizers, batches, read=lambda: None):
    """An ordinary loop, which knows nothing of EBC; `read()` after each step."""
    seen = []
    for i, tokens in enumerate(batches):
        torch.manual_seed(i)  # dropout
        loss = loss_of(model(tokens), tokens)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        seen.append(read())
        for optimizer in optimizers:
            optimizer.zero_grad()
    return seen


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def identical(first, second):
    return all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def same_steps(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for key in KEYS:
            one = getattr(a, key)
            other = getattr(b, key)
            assert (one is None and other is None) or torch.equal(one, other), key


# -- the same bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "drop", "given"),
    [
        (adam, 0.0, {}),
        (muon, 0.0, {}),
        (adam, 0.3, {}),
        (adam, 0.0, {"budget": "tracked", "measure_every": 2, "controller": "log_pi"}),
        (adam, 0.0, {"budget": "surrogate", "target_kl": 1e-3}),
        (muon, 0.3, {"budget": "fisher", "grouping": "tensor"}),
        (adam, 0.0, {"target_kl": math.inf}),
    ],
)
def test_it_takes_the_step_of_the_wrapper_bit_for_bit(make, drop, given):
    wrapped = Net(drop)
    optimizer = EllipsotopeClip(wrapped, make(wrapped), **options(**given))
    wanted = []
    for i, tokens in enumerate(data(24)):
        torch.manual_seed(i)
        logits = wrapped(tokens)
        loss_of(logits, tokens).backward()
        wanted.append(optimizer.step(tokens, logits))
        optimizer.zero_grad()
    model, bases, ebc = attached(make, drop, **given)
    same_steps(loop(model, bases, data(24), lambda: ebc.last), wanted)
    assert identical(model.parameters(), wrapped.parameters())
    clipped = sum(stats.clip_coefficient.item() < 1 for stats in wanted)
    assert clipped == 0 if given.get("target_kl") == math.inf else clipped > 12


class TwoForwards(torch.optim.SGD):
    """Looks at the gradient where a first step would lead to, as SAM does."""

    @torch.no_grad()
    def step(self, closure):
        held = [p for group in self.param_groups for p in group["params"]]
        old = [p.clone() for p in held]
        for p in held:
            p.add_(0.3 * torch.sign(p))
        with torch.enable_grad():
            loss = closure()
        for p, w in zip(held, old, strict=True):
            p.copy_(w)
        super().step()
        return loss


def test_a_closure_at_other_weights_is_measured_from_the_right_ones():
    model = Net()
    optimizer = TwoForwards(model.parameters(), lr=20.0)
    ebc = attach(model, optimizer, **options())
    for tokens in data(5):
        before = copy.deepcopy(model)

        def closure(tokens=tokens):
            optimizer.zero_grad()
            loss = loss_of(model(tokens), tokens)
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            kl = mean_kl(before(tokens), model(tokens)).item()
        assert ebc.last.clip_coefficient < 0.9
        assert kl == pytest.approx(0.002, rel=0.4)


# -- what else loops do --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_scaler(fused):
    def trained(scaled):
        model = Net()
        optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=fused)
        ebc = attach(model, optimizer, **options(budget="tracked", audit_every=0))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        seen = []
        for i, tokens in enumerate(data(8)):
            loss = loss_of(model(tokens), tokens) * (math.inf if scaled and i == 4 else 1)
            if not scaled and i == 4:
                continue  # the scaler leaves this step out
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            seen.append(ebc.last)
        if scaled:
            del seen[4]
        return model, seen

    model, seen = trained(True)
    plain, wanted = trained(False)
    same_steps(seen, wanted)
    assert identical(model.parameters(), plain.parameters())


@pytest.mark.thorough
@pytest.mark.parametrize("way", ["attached before", "attached to the compiled", "compiled in place"])
def test_a_compiled_model(way):
    model = Net()
    (optimizer,) = adam(model)
    called = model
    if way == "compiled in place":
        model.compile(backend="aot_eager")
    else:
        called = torch.compile(model, backend="aot_eager")
    ebc = attach(called if way == "attached to the compiled" else model, optimizer, **options())
    seen = loop(called, [optimizer], data(6), lambda: ebc.last)
    plain, bases, ebc = attached()
    wanted = loop(plain, bases, data(6), lambda: ebc.last)
    for a, b in zip(seen, wanted, strict=True):
        assert a.clip_coefficient.item() == pytest.approx(b.clip_coefficient.item(), rel=1e-3)
    assert wanted[-1].clip_coefficient < 1


def test_an_average_of_the_weights_knows_nothing_of_it():
    model, bases, ebc = attached()
    averaged = AveragedModel(model)
    for tokens in data(4):
        averaged(tokens).sum().backward()  # a forward of the copy, with gradients on
        loop(model, bases, [tokens])
        averaged.update_parameters(model)
    assert ebc.clip.step_index == 4
    loaded = pickle.loads(pickle.dumps(model))
    assert identical(loaded.parameters(), model.parameters())
    loaded(data(1)[0]).sum().backward()
    assert ebc.capture.last is None


def test_evaluation_in_between_has_no_say():
    runs = []
    for evaluates in (False, True):
        model, (optimizer,), _ = attached(adam, 0.2)
        for i, tokens in enumerate(data(5)):
            torch.manual_seed(i)
            loss_of(model(tokens), tokens).backward()
            if evaluates:
                model.eval()
                with torch.no_grad():
                    model(integers(24, 12, seed=99))
                model.train()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(weights(model))
    assert identical(*runs)


# -- saving --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{"budget": "surrogate", "target_kl": 1e-3, "controller": "log_pi"}, {}])
@pytest.mark.parametrize("make", [adam, muon])
def test_it_resumes_from_the_optimizers_own_state(make, given):
    model, bases, ebc = attached(make, **given)
    loop(model, bases, data(7))
    file = io.BytesIO()
    torch.save([model.state_dict(), *(o.state_dict() for o in bases)], file)
    wanted = loop(model, bases, data(5, start=7), lambda: ebc.last)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, bases, ebc = attached(make, **given)
    for part, state in zip([resumed, *bases], saved, strict=True):
        part.load_state_dict(state)
    same_steps(loop(resumed, bases, data(5, start=7), lambda: ebc.last), wanted)
    assert identical(resumed.parameters(), model.parameters())


def test_what_it_says_of_itself():
    model, bases, ebc = attached(muon)
    assert repr(ebc).splitlines() == [
        "EBC on Muon, AdamW of a Net: target_kl=0.002, budget='shadow'",
        "one c for all; between their steps weights stand where the last c puts them",
        "first steps: nothing wrong so far, of 3 steps",
    ]
    loop(model, bases, data(2))
    _, chosen, together, last, _ = repr(ebc).splitlines()
    assert chosen == "c chosen by 12 rows, 144 tokens"
    assert together.startswith("one c for all")
    c, kl, trial = (float(getattr(ebc.last, key)) for key in ("clip_coefficient", "trial_kl", "trial"))
    assert last == f"2 steps, the last: c {c:.3g}, a KL of {kl:.2g} at {trial:.2g}"
    assert repr(ebc.clip).endswith(", target_kl=0.002, budget='shadow', c chosen by 12 rows, 144 tokens)")


def test_an_optimizer_whose_state_is_no_mapping_is_saved_as_it_saves_itself():
    class Listed(torch.optim.SGD):
        def state_dict(self):
            return [1]

    model = Net()
    optimizer = Listed(model.parameters(), lr=LR)
    attach(model, optimizer, **options())
    with pytest.warns(EBCWarning, match=r"Listed\.state_dict\(\) returns a list, .*: save ebc\.state_dict"):
        assert optimizer.state_dict() == [1]


def test_a_state_that_was_loaded_before_attaching_is_told():
    model, (optimizer,), _ = attached()
    loop(model, [optimizer], data(3))
    saved = copy.deepcopy(optimizer.state_dict())
    for own in (False, True):
        resumed = Net()
        (optimizer,) = adam(resumed)
        optimizer.load_state_dict(saved)
        ebc = attach(resumed, optimizer, **options())
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", EBCWarning)
            if own:
                ebc.load_state_dict(saved["ebc"])
            loop(resumed, [optimizer], data(2, start=3))
        assert sum("loaded before EBC" in str(w.message) for w in told) == (0 if own else 1)


OTHERS = [
    [],
    {"controller": 3},
    {"controller": {"delta": torch.zeros(3)}},
    {"filters": None},
    {"step_index": 1.5},
    {"peak_lr": "high"},
    {"rows": [True]},
    {"trial": torch.zeros(2)},
    {"look": {"steps": 3, "patience": 2}},
    {"last_c": "half"},
]


@pytest.mark.parametrize("other", OTHERS)
def test_a_state_that_is_none_of_ebcs_is_refused_in_a_sentence(other):
    _, _, ebc = attached()
    state = {**ebc.state_dict(), **other} if other else other
    with pytest.raises(ValueError, match=r"is not the state of this .*: load what its state_dict") as refused:
        ebc.load_state_dict(state)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "damage", [{"beta": torch.ones(1)}, {"beta": torch.ones(()).to_sparse()}, {"count": 1.5}]
)
def test_a_sensitivity_that_is_not_one_number_is_refused(damage):
    model, optimizers, ebc = attached(budget="surrogate")
    loop(model, optimizers, data(1))
    state = ebc.state_dict()
    state["filters"] = {group: {**one, **damage} for group, one in state["filters"].items()}
    with pytest.raises(ValueError, match="is not the state of this"):
        attached(budget="surrogate")[-1].load_state_dict(state)


@pytest.mark.filterwarnings("error:.*loaded before")
def test_an_optimizer_that_has_trained_or_that_makes_its_state_at_once_was_not_loaded():
    model = Net()
    for optimizer in (*adam(model), torch.optim.Adagrad(model.parameters(), lr=LR)):
        if isinstance(optimizer, torch.optim.Adam):
            loop(model, [optimizer], data(2))
        ebc = attach(model, optimizer, **options())
        loop(model, [optimizer], data(1))
        ebc.detach()


def test_a_state_without_its_own_is_told_and_works():
    model = Net()
    (optimizer,) = adam(model)
    loop(model, [optimizer], data(3))
    plain = optimizer.state_dict()
    ebc = attach(model, optimizer, **options())
    with pytest.warns(EBCWarning, match="comes without EBC's"):
        optimizer.load_state_dict(plain)
    loop(model, [optimizer], data(2))
    assert 0 < ebc.last.clip_coefficient < 1
    assert "ebc" not in plain
    other = adam(Net())[0]
    other.load_state_dict(optimizer.state_dict())  # a plain optimizer takes it too


@pytest.mark.parametrize("given", [{}, {"radius": 0.1}], ids=["nothing", "a radius"])
def test_where_nothing_is_measured_the_model_has_no_hook(given):
    model, bases, ebc = attached(target_kl=math.inf, audit_every=0, **given)
    loop(model, bases, data(4))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert ebc.clip.step_index == 4
    assert ebc.look is None


def test_of_the_first_steps_only_what_they_showed_is_left():
    model, bases, ebc = attached()
    assert ebc._first is not None
    loop(model, bases, data(12))
    assert ebc._first is ebc.capture.first is None
    assert len(ebc.look.steps) == 3
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


# -- detach, and misuse --------------------------------------------------------------------------------------


def test_detached_everything_is_as_before():
    runs = []
    for detaches in (False, True):
        model = Net()
        bases = adam(model)
        if detaches:
            ebc = attach(model, bases, **options(target_kl=math.inf))
        loop(model, bases, data(3))
        if detaches:
            ebc.detach()
            assert "ebc" not in bases[0].state_dict()
        loop(model, bases, data(3, start=3))
        runs.append(weights(model))
    assert identical(*runs)
    assert not model._forward_hooks
    assert ebc.clip.step_index == 3
    attach(model, bases, **options())  # and again


def test_an_optimizer_is_attached_to_once():
    model, bases, ebc = attached()
    assert "target_kl=0.002" in repr(ebc)
    with pytest.raises(ValueError, match=r"on this optimizer already: detach\(\)"):
        attach(model, bases, **options())
    with pytest.raises(ValueError, match="already"):
        attach(model, EllipsotopeClip(model, adam(model), **options()), **options())
    with pytest.raises(ValueError, match="must be > 0"):
        attach(Net(), adam(Net()), target_kl=0)


def test_a_module_that_training_does_not_call():
    inner = Net()
    model = nn.Sequential(inner)
    (optimizer,) = adam(model)
    attach(model, optimizer, **options())
    (tokens,) = data(1)
    before = weights(model)
    loss_of(inner(tokens), tokens).backward()
    with pytest.raises(ValueError, match="Sequential that EBC is attached to was never called"):
        optimizer.step()
    assert identical(model.parameters(), before)
    loss_of(model(tokens), tokens).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="was not called in training since its last step"):
        optimizer.step()


class Recorded(Net):
    """Tells `measured` the rows that it is measured on: measurements run in evaluation mode."""

    def __init__(self, measured):
        super().__init__()
        self.tell = measured.append

    def forward(self, ids, labels=None):
        if not self.training:
            self.tell(ids)
        return super().forward(ids)


@pytest.mark.parametrize("named", [True, False])
def test_of_two_forwards_the_last_counts_or_the_named_one(named):
    measured = []
    model = Recorded(measured)
    (optimizer,) = adam(model)
    ebc = attach(model, optimizer, **options(audit_every=0), check=False)
    one, other = data(2)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            with ebc.this_forward() if named else nullcontext():
                z = model(one)
            (loss_of(z, one) + loss_of(model(other), other)).backward()
            optimizer.step()
            optimizer.zero_grad()
    chosen = one if named else other
    assert len(measured) >= 2
    assert all(torch.equal(rows, chosen[:12]) for rows in measured)
    told = [w for w in seen if "two training forwards before one backward" in str(w.message)]
    assert len(told) == (0 if named else 1)


def test_a_bad_gradient_of_a_closure_touches_nothing():
    model, (optimizer,), ebc = attached()
    loop(model, [optimizer], data(2))
    before = weights(model)
    state = copy.deepcopy(optimizer.state_dict()["state"])

    def bad():
        (loss_of(model(data(1)[0]), data(1)[0]) * math.nan).backward()
        return 0.0

    optimizer.step(bad)
    assert ebc.last.skipped
    assert ebc.last.bad_gradient
    assert identical(model.parameters(), before)
    kept = optimizer.state_dict()["state"]
    assert all(torch.equal(kept[i][k], state[i][k]) for i in state for k in state[i])
    assert all(p.grad.isnan().any() for p in model.blocks.parameters())
    optimizer.zero_grad()
    loop(model, [optimizer], data(1, start=5))
    assert not ebc.last.skipped


def test_optimizers_step_in_any_order_and_need_not_all_step():
    runs = []
    for order in (1, -1):
        model, bases, ebc = attached(muon)
        for tokens in data(4):
            loss_of(model(tokens), tokens).backward()
            for optimizer in bases[::order]:
                optimizer.step()
            for optimizer in bases:
                optimizer.zero_grad()
        runs.append(weights(model))
        (tokens,) = data(1, start=9)
        z = model(tokens)
        loss_of(z, tokens).backward()
        before = weights(model)
        bases[1].step()  # the other one does not; the next forward finds the limited weights
        z_new = model(tokens)
        assert ebc.last.clip_coefficient < 1
        assert mean_kl(z, z_new).item() == pytest.approx(0.002, rel=0.4)
        assert torch.equal(model.blocks[0].weight, before[1])
    assert identical(*runs)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("first", [0, 1])
def test_of_two_optimizers_only_the_one_that_overflows_skips_its_step(order, first):
    """Under a GradScaler, which skips one of them, and unscales each at its own step."""
    runs = []
    for target_kl in (None, math.inf, 0.002):
        model = Net()
        bases = muon(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        ebc = attach(model, bases, **options(target_kl=target_kl)) if target_kl else None
        for i, tokens in enumerate(data(6)):
            for rows in tokens.chunk(2):
                scaler.scale(loss_of(model(rows), rows)).backward()
            if i in (2, 3):
                held = bases[first if i == 2 else 1 - first].param_groups[0]["params"]
                held[0].grad[0, 0] = math.inf
            for optimizer in bases[::order]:
                scaler.step(optimizer)
            scaler.update()
            if ebc is not None:
                assert ebc.clip.step_index == i + 1
                assert not ebc.last.skipped
                assert ebc.last.grad_norm.isfinite()
            for optimizer in bases:
                optimizer.zero_grad()
        runs.append(weights(model))
    assert identical(runs[0], runs[1])
    assert not identical(runs[0], runs[2])


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("bad", [(0,), (1,), (0, 1)])
def test_a_bad_gradient_leaves_its_own_optimizer_out_without_a_scaler(order, bad):
    model, bases, ebc = attached(muon)
    loop(model, bases, data(2))
    for _ in range(2):
        (tokens,) = data(1, start=5)
        loss_of(model(tokens), tokens).backward()
        before = {p: p.detach().clone() for p in model.parameters()}
        held = [[p for group in base.param_groups for p in group["params"]] for base in bases]
        for i in bad:
            held[i][0].grad[0] = math.nan
        for optimizer in bases[::order]:
            optimizer.step()
        for i, params in enumerate(held):
            moved = [not torch.equal(p, before[p]) for p in params]
            assert not any(moved) if i in bad else all(moved)
        assert ebc.last.skipped == ebc.last.bad_gradient == (len(bad) == 2)
        for optimizer in bases:
            optimizer.zero_grad()
    assert ebc.clip.step_index == 4
    loop(model, bases, data(1, start=9))
    assert not ebc.last.skipped


def between(model, bases, ebc, batches, act=lambda model: None):
    """Steps of two optimizers, and the KL between and after them over the target; `act(model)` in between."""
    seen = []
    for tokens in batches:
        z = model(tokens)
        loss_of(z, tokens).backward()
        bases[0].step()
        middle = measured(model, z, tokens)
        act(model)
        bases[1].step()
        seen.append((middle, measured(model, z, tokens), float(ebc.last.clip_coefficient)))
        for optimizer in bases:
            optimizer.zero_grad()
    return seen


def measured(model, z, tokens):
    """By a copy, which is no forward of the one that EBC is attached to."""
    twin = Net()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        return float(mean_kl(z, twin(tokens))) / 0.002


def parts(model):
    """All the movement is of the first."""
    others = [p for n, p in model.named_parameters() if not n.startswith("embedding")]
    return [torch.optim.Adam(model.embedding.parameters(), lr=5 * LR), torch.optim.SGD(others, lr=1e-4)]


def test_between_two_optimizers_steps_the_budget_holds_and_weights_that_something_moves_are_told_once():
    model = Net()
    bases = parts(model)
    ebc = attach(model, bases, check=False, **options(audit_every=0))
    seen = between(model, bases, ebc, data(2))
    assert all(c < 0.7 and 0.1 < middle < 1.6 for middle, _, c in seen)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", EBCWarning)
        seen = between(
            model, bases, ebc, data(2, start=2), lambda model: model.embedding.weight.data.mul_(0.9)
        )
    assert ["moved between the steps of two" in str(w.message) for w in told] == [True]
    assert all(0.5 < after < 1.5 for _, after, _ in seen)
