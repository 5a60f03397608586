"""`attach` on optimizers of unusual kinds: nested, subclassed, of two calls, compiled; and without hooks."""

import copy
import math
import pickle
import statistics
import warnings

import pytest
import schedulefree
import torch
import torch.nn.functional as F
from mechanic_pytorch import mechanize
from pytorch_optimizer import LOMO, SAM, Lookahead, ScheduleFreeAdamW, ScheduleFreeSGD, ScheduleFreeWrapper
from support.tokenwise import Tokenwise, attached_adam, integers, learn, loss_of
from torch import nn

from ebc_lab.ebc import EBCWarning, EllipsotopeClip, attach, mean_kl

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
    optimizer, ebc = attached_adam(model, **OPTIONS)
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
            kept = copy.deepcopy(optimizer.state_dict())
            again = Tokenwise()
            again.load_state_dict(model.state_dict())
            model = again
            optimizer = Lookahead(torch.optim.Adam(model.parameters(), lr=LR), k=2)
            ebc = attach(model, optimizer, **OPTIONS)
            optimizer.load_state_dict(kept)
        runs.append(trained(model, ebc, lambda closure: optimizer.step(), data[6:]))  # noqa: B023
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(
            lambda weights: schedulefree.AdamWScheduleFree(weights, lr=LR, warmup_steps=3), id="AdamW"
        ),
        pytest.param(lambda weights: schedulefree.SGDScheduleFree(weights, lr=1.0), id="SGD"),
        pytest.param(lambda weights: schedulefree.RAdamScheduleFree(weights, lr=LR), id="RAdam"),
        pytest.param(lambda weights: mechanize(torch.optim.AdamW)(weights, lr=1.0), id="mechanic"),
    ],
)
def test_without_a_limit_packages_that_keep_other_weights_give_the_same_bits(make):
    """schedulefree evaluates an average, and mechanic scales the sum of all its steps."""
    weights = []
    for attached in (False, True):
        model = Tokenwise()
        optimizer = make(model.parameters())
        turn = {on: getattr(optimizer, "train" if on else "eval", lambda: None) for on in (True, False)}
        turn[True]()
        if attached:
            attach(model, optimizer, target_kl=math.inf)
        for part in (batches(5), batches(5, start=5)):
            for tokens in part:
                loss_of(model(tokens), tokens).backward()
                optimizer.step()
                optimizer.zero_grad()
            turn[False]()
            weights.append(model.head.weight.detach().clone())
            turn[True]()
    assert all(torch.equal(alone, beside) for alone, beside in zip(weights[:2], weights[2:], strict=True))
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.thorough
@pytest.mark.parametrize("compiled", ["beside it", "in place before", "in place after"])
def test_a_compiled_step(compiled):
    model = Tokenwise()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    if compiled == "in place before":
        optimizer.step = torch.compile(optimizer.step, backend="eager")
    ebc = attach(model, optimizer, **OPTIONS)
    step = optimizer.step if compiled == "in place before" else torch.compile(optimizer.step, backend="eager")
    if compiled == "in place after":
        optimizer.step = step
    assert on_target(trained(model, ebc, lambda closure: step(), batches(6)))


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


@pytest.mark.filterwarnings("error::ebc_lab.ebc.EBCWarning")
def test_accumulation_is_no_contrast_where_the_logits_are_made_of_the_output():
    model = Tokenwise()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    attach(model, optimizer, logits_of=lambda z: z * 1.0, **OPTIONS)
    for tokens in batches(2):
        loss_of(model(tokens), tokens).backward()
    optimizer.step()


@pytest.mark.parametrize("budget", ["shadow", "tracked"])
def test_a_batch_of_padding_takes_the_last_c_and_rows_of_padding_choose_none(budget):
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
            mask[:] = 0
        if seed == 5:
            mask[:12] = 0  # others choose
        if seed == 6:
            mask[12:] = 0
        learn(model, optimizer, tokens, attention_mask=mask)
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


# -- what a loss does to the logits --------------------------------------------------------------------------


def log_p(z):
    return z.double().log_softmax(-1)


def test_audits_notice_logits_that_differ_from_the_models_own_later_than_at_the_first_step():
    class Drawing(Tokenwise):
        late = False

        def forward(self, tokens):
            z = super().forward(tokens)
            return z + 0.05 * torch.randn_like(z) if self.late and self.training else z

    model = Drawing()
    optimizer, ebc = attached_adam(model, probe_sequences=12, audit_every=3, check=False)
    seen = []
    for step in range(10):
        model.late = step >= 4
        torch.manual_seed(step)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", EBCWarning)
            learn(model, optimizer, integers(48, 12, seed=step))
        seen.append([str(one.message) for one in told])
    assert [bool(messages) for messages in seen] == [step == 6 for step in range(10)]
    [told] = seen[6]
    assert "differ from the model's own" in told
    assert "computes them again at each step" in told
    assert ebc.clip.prober.fresh_logits


def test_a_factor_that_shows_after_the_first_step_is_a_finding():
    """A head of zeros has no logits by which it could be told before."""
    model = nn.Linear(16, 10)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer, ebc = attached_adam(model, lr=1e-3, target_kl=1e-3)

    def train():
        for seed in range(3):
            x = torch.randn(256, 16, generator=torch.Generator().manual_seed(seed))
            F.cross_entropy(model(x) / 0.1, x[:, :10].argmax(-1)).backward()
            optimizer.step()
            optimizer.zero_grad()

    with pytest.warns(EBCWarning, match=r"look wrong: the loss takes the softmax of 10 \* z"):
        train()
    assert "softmax of 10 * z" in str(ebc.look)


class Carried(nn.Module):
    """Masked diffusion: what is not masked is carried over, with no probability for anything else."""

    def __init__(self, low):
        super().__init__()
        torch.manual_seed(0)
        self.low = low
        self.embedding = nn.Embedding(12, 16)
        self.cell = nn.GRU(16, 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 11)

    def forward(self, tokens, mask=None):
        z = self.head(self.cell(self.embedding(tokens))[0])
        carried = torch.full_like(z, self.low).scatter(-1, tokens.clamp(max=10)[..., None], 0.0)
        return torch.where((tokens < 11)[..., None], carried, z)


@pytest.mark.filterwarnings("error::ebc_lab.ebc.EBCWarning")
@pytest.mark.parametrize("low", [-1e6, -math.inf])
@pytest.mark.parametrize("own_mask", [False, True])
def test_positions_at_which_nothing_is_predicted_do_not_count(low, own_mask):
    model = Carried(low)
    given = {"mask_of": lambda given: given["mask"]} if own_mask else {}
    optimizer, ebc = attached_adam(model, lr=3e-2, target_kl=5e-4, **given)
    ratios = []
    for seed in range(12):
        tokens = integers(64, 12, seed=seed)
        counts = torch.ones_like(tokens)
        counts[:, 10:] = 0
        hidden = (integers(64, 12, seed=100 + seed) < 4) & (counts > 0 if own_mask else True)
        seen = tokens.masked_fill(hidden, 11)
        with torch.no_grad():
            before = log_p(model(seen)[hidden])
        F.cross_entropy(model(seen, counts)[hidden], tokens[hidden]).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            after = log_p(model(seen)[hidden])
        ratios.append(float((before.exp() * (before - after)).sum(-1).mean()) / 5e-4)
    assert ebc.last.clip_coefficient < 1
    assert statistics.median(ratios[3:]) == pytest.approx(1, abs=0.3)


class Scratch(torch.optim.Optimizer):
    """Computes its step in the gradients' own memory."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.grad.div_(p.grad.abs().add_(1e-12))
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])


@pytest.mark.filterwarnings("error::ebc_lab.ebc.EBCWarning")
@pytest.mark.parametrize("before", ["the step", "the loop"])
@pytest.mark.parametrize("logits_of", [None, lambda z: 1.0 * z])
def test_gradients_that_something_else_rewrites_are_looked_at_as_they_came(before, logits_of):
    model = Tokenwise()
    kind = Scratch if before == "the step" else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=0.01)
    options = {"audit_every": 1, "probe_sequences": 12}
    ebc = attach(model, optimizer, logits_of=logits_of, **{**OPTIONS, **options})
    for tokens in batches(4):
        loss_of(model(tokens), tokens).backward()
        if before == "the loop":
            for p in model.parameters():
                p.grad.div_(p.grad.norm() / 100)
        optimizer.step()
        optimizer.zero_grad()
        assert ebc.last.slope < 0
    assert all(0.7 < s.share < 1.3 for s in ebc.look.steps)
    assert not any(p._backward_hooks for p in model.parameters())


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


# -- states of their own -------------------------------------------------------------------------------------


class Several(torch.optim.Optimizer):
    """Two optimizers behind one, whose state is theirs."""

    def __init__(self, params):
        held = list(params)
        self.inner = [torch.optim.Adam(held[:1], lr=LR), torch.optim.Adam(held[1:], lr=LR)]
        super().__init__(held, {"lr": LR})

    def step(self, closure=None):
        for inner in self.inner:
            inner.step()

    def state_dict(self):
        return {str(i): inner.state_dict() for i, inner in enumerate(self.inner)}

    def load_state_dict(self, state_dict, strict=True):
        for i, inner in enumerate(self.inner):
            inner.load_state_dict(state_dict[str(i)])


class Loading(torch.optim.Adam):
    """Restores its state by itself, as bitsandbytes' 8-bit optimizers do."""

    def __init__(self, params):
        super().__init__(params, lr=LR)

    def load_state_dict(self, state_dict):
        for i, p in enumerate(self.param_groups[0]["params"]):
            self.state[p] = copy.deepcopy(state_dict["state"][i])


class Calling(torch.optim.Adam):
    """Has methods of its own that call torch's."""

    def __init__(self, params):
        super().__init__(params, lr=LR)

    def state_dict(self):
        return super().state_dict()

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)


@pytest.mark.parametrize("make", [Several, Loading, Calling])
@pytest.mark.parametrize("named", [False, True])
def test_a_state_dict_of_its_own_carries_the_state_too(make, named):
    data = batches(9)
    model = Tokenwise()
    optimizer = make(model.parameters())
    ebc = attach(model, optimizer, budget="tracked", **OPTIONS)
    trained(model, ebc, lambda closure: optimizer.step(), data[:5])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    wanted = trained(model, ebc, lambda closure: optimizer.step(), data[5:])

    again = Tokenwise()
    again.load_state_dict(saved[0])
    optimizer = make(again.parameters())
    ebc = attach(again, optimizer, budget="tracked", **OPTIONS)
    if named:
        optimizer.load_state_dict(state_dict=saved[1])
    else:
        optimizer.load_state_dict(saved[1])
    assert ebc.clip.step_index == 5
    assert trained(again, ebc, lambda closure: optimizer.step(), data[5:]) == wanted
    ebc.detach()
    assert not {"state_dict", "load_state_dict"} & set(vars(optimizer))
    assert "ebc" not in optimizer.state_dict()


def test_a_copy_of_an_optimizer_saves_its_own_state():
    model = Tokenwise()
    optimizer = Calling(model.parameters())
    ebc = attach(model, optimizer, **OPTIONS)
    trained(model, ebc, lambda closure: optimizer.step(), batches(2))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert "ebc" not in twin.state_dict()
        assert [p.shape for p in twin.param_groups[0]["params"]] == [p.shape for p in model.parameters()]


# -- weights that are kept in the state, and on one memory ---------------------------------------------------


class Averaging(torch.optim.SGD):
    def train(self):
        pass

    def eval(self):
        pass


@pytest.mark.filterwarnings("error::ebc_lab.ebc.EBCWarning")
@pytest.mark.parametrize("wrapped", [True, False])
def test_an_optimizer_that_evaluates_other_weights_is_asked_where_they_are(wrapped):
    model = Tokenwise()
    make = EllipsotopeClip if wrapped else attach
    with pytest.warns(
        EBCWarning, match=r"Averaging has train\(\) and eval\(\).*optimizer.weight_copies = \("
    ):
        make(model, Averaging(model.parameters(), lr=LR), target_kl=TARGET)
    named = Averaging(model.parameters(), lr=LR)
    named.weight_copies = ()
    make(model, named, target_kl=TARGET)
    other = Tokenwise()
    make(other, Averaging(other.parameters(), lr=LR), target_kl=float("inf"))


@pytest.mark.parametrize(
    "make",
    [
        lambda params: ScheduleFreeAdamW(params, lr=LR),
        lambda params: ScheduleFreeSGD(params, lr=20 * LR),
        lambda params: ScheduleFreeWrapper(torch.optim.Adam(params, lr=LR)),
    ],
)
def test_what_schedule_free_optimizers_keep_is_scaled_with_the_weights(make):
    """The first step moves z by ΔW, and the weights by part of it: both by c of that."""
    moved = []
    scales = []
    for target in (TARGET, float("inf")):
        model = Tokenwise()
        optimizer = make(model.parameters())
        optimizer.train()
        ebc = attach(model, optimizer, **{**OPTIONS, "target_kl": target})
        before = [p.detach().clone() for p in model.parameters()]
        seen = trained(model, ebc, lambda closure: optimizer.step(), batches(1))  # noqa: B023
        moved.append([optimizer.state[p]["z"] - w for p, w in zip(model.parameters(), before, strict=True)])
        scales.append(seen[0][1])
    assert scales[0] < 0.9
    for scaled, whole in zip(*moved, strict=True):
        torch.testing.assert_close(scaled, scales[0] * whole, rtol=1e-4, atol=1e-6)


def test_two_parameters_on_one_memory_are_refused_and_neighbours_are_not():
    class Tied(nn.Module):
        def __init__(self, view):
            super().__init__()
            self.tokens = nn.Embedding(11, 16)
            self.head = nn.Linear(16, 11, bias=False)
            self.head.weight.data = view(self.tokens.weight.data)

    for view in (lambda w: w, lambda w: w[:5], lambda w: w.mT, lambda w: w[:, ::2], lambda w: w[3:, 2:7]):
        model = Tied(view)
        with pytest.raises(
            ValueError, match=r"tokens.weight and head.weight .*model.head.weight = model.tok"
        ):
            attach(model, torch.optim.SGD(model.parameters(), lr=LR), target_kl=TARGET)

    whole = torch.randn(11, 27)
    columns = nn.ParameterList([nn.Parameter(whole[:, :16]), nn.Parameter(whole[:, 16:])])
    attach(columns, torch.optim.SGD(columns.parameters(), lr=LR), target_kl=TARGET)


# -- gradients -----------------------------------------------------------------------------------------------


class LateWriter(torch.optim.SGD):
    """Writes to its gradients from the sixth step on."""

    count = 0

    def step(self, closure=None):
        super().step()
        self.count += 1
        if self.count > 5:
            for p in self.param_groups[0]["params"]:
                p.grad.mul_(100.0)


def test_a_gradient_that_is_no_longer_what_it_was_is_not_judged():
    model = Tokenwise()
    optimizer = LateWriter(model.parameters(), lr=20 * LR)
    ebc = attach(model, optimizer, **{**OPTIONS, "audit_every": 1, "probe_sequences": 12})
    slopes = []
    for tokens in batches(8):
        learn(model, optimizer, tokens)
        slopes.append(float(ebc.last.slope))
    assert math.isnan(slopes[5])  # unforeseen
    assert all(slope < 0 for i, slope in enumerate(slopes) if i != 5)
    assert max(slopes[6:]) > 10 * min(slopes[:5])


class Waves(nn.Module):
    """Mixes by complex weights, as state space models do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 16)
        self.mix = nn.Parameter(0.3 * torch.randn(16, 16, dtype=torch.complex64))
        self.head = nn.Linear(16, 11)

    def forward(self, ids):
        return self.head((self.embedding(ids).to(torch.complex64) @ self.mix @ self.mix).real)


@pytest.mark.parametrize("budget", ["shadow", "tracked", "fisher", "surrogate", "calibrated"])
def test_complex_weights_are_pairs_of_real_ones(budget):
    model = Waves()
    optimizer, ebc = attached_adam(model, probe_sequences=12, audit_every=1, budget=budget)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Cc]omplex")
        for tokens in batches(4):
            loss_of(model(tokens), tokens).backward()
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
            optimizer.step()
            optimizer.zero_grad()
            c = ebc.last.clip_coefficient
            fall = sum(
                (gradients[n].conj() * (p - before[n])).real.sum() for n, p in model.named_parameters()
            )
            assert float(ebc.last.slope) == pytest.approx(float(fall / c), rel=1e-3)
            assert 0 < c < 1


def test_weights_without_a_shape_and_those_of_a_loss_are_told():
    lazy = nn.Sequential(nn.Embedding(11, 16), nn.LazyLinear(11))
    with pytest.raises(ValueError, match=r"1.weight, 1.bias has no shape before .*call the model once"):
        attach(lazy, torch.optim.SGD(lazy.parameters(), lr=LR), target_kl=TARGET)
    lazy(batches(1)[0])
    attach(lazy, torch.optim.SGD(lazy.parameters(), lr=LR), target_kl=TARGET)

    body = nn.Embedding(11, 16)
    loss = nn.AdaptiveLogSoftmaxWithLoss(16, 11, [4])
    both = torch.optim.SGD([*body.parameters(), *loss.parameters()], lr=LR)
    with pytest.raises(ValueError, match=r"not the model's: \(5, 16\), .*a loss with weights of its own"):
        attach(body, both, target_kl=TARGET)
