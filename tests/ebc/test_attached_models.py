"""`attach` on models of unusual kinds: hidden random numbers, baked-in batches, losses alone, time first."""

import copy
import dataclasses
import math
import random

import numpy
import pytest
import torch
import torch.nn.functional as F
from support.tokenwise import Tokenwise, attached_adam, integers, learn, loss_of
from torch import nn

from ebc_lab.ebc import EBCWarning, EllipsotopeClip, attach, mean_kl

LR = 0.05
TARGET = 0.002


def trained(model, steps=12, loss=None, **options):
    """-> (KL of each limited step on other rows, over the target), and what is attached."""
    optimizer, ebc = attached_adam(model, **options)
    seen = []
    for step in range(steps):
        tokens = integers(48, 12, seed=step)
        others = integers(48, 12, seed=1000 + step)
        (loss or entropy)(model, tokens).backward()
        before = said(model, others)
        optimizer.step()
        optimizer.zero_grad()
        if ebc.last.clip_coefficient < 0.999:
            seen.append(float(mean_kl(before, said(model, others))) / TARGET)
    return seen, ebc


def entropy(model, tokens):
    return loss_of(model(tokens), tokens)


def said(model, tokens):
    model.eval()
    with torch.no_grad():
        z = model(tokens)
    model.train()
    return getattr(z, "logits", z)


def held(seen, least=8):
    return len(seen) >= least and 0.7 < sorted(seen)[len(seen) // 2] < 1.3 and max(seen) < 2


# -- random numbers that no module shows ---------------------------------------------------------------------


class Noisy(Tokenwise):
    """Dropout as a function; its head is zero at first, so that two forwards agree at the first step."""

    def __init__(self):
        super().__init__()
        self.p = 0.4
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = F.dropout(x + torch.tanh(self.blocks[0](x)), self.p, self.training)
        return self.head(x)


@pytest.mark.filterwarnings("error::ebc_lab.ebc.EBCWarning")
def test_functional_dropout_is_seen_by_the_numbers_that_it_draws():
    torch.manual_seed(0)
    seen, ebc = trained(Noisy(), steps=24)
    assert held(seen)
    assert ebc.clip.prober.fresh_logits
    assert ebc.state_dict()["fresh_logits"]


class Later(Tokenwise):
    """Draws numbers in training from the fifth forward on, of a generator of its own."""

    def __init__(self):
        super().__init__()
        self.own = torch.Generator().manual_seed(0)
        self.forwards = 0

    def forward(self, tokens):
        z = super().forward(tokens)
        if not self.training:
            return z
        self.forwards += 1
        noise = torch.randn(z.shape, generator=self.own) if self.forwards > 4 else 0.0
        return z + 0.5 * noise


def test_what_nothing_shows_is_seen_when_c_collapses_and_a_checkpoint_keeps_it():
    with pytest.warns(EBCWarning, match=r"without what it does in training alone.*fresh_logits=True"):
        seen, ebc = trained(Later(), steps=20)
    assert ebc.clip.prober.fresh_logits
    assert held(seen[-12:])
    assert sum(kl < 0.1 for kl in seen) <= 2  # the step in which it began, and the one that looked
    _, again = attached_adam(Tokenwise())
    again.load_state_dict(ebc.state_dict())
    assert again.clip.prober.fresh_logits


@pytest.mark.parametrize("asked", [True, False])
def test_what_was_asked_for_is_not_changed(asked):
    torch.manual_seed(0)
    _, ebc = trained(Noisy(), steps=2, fresh_logits=asked)
    assert ebc.clip.prober.fresh_logits is asked
    assert "fresh_logits" not in ebc.state_dict()


def test_dropout_of_a_recurrent_layer_is_known_from_the_start():
    model = nn.Sequential(nn.Embedding(11, 8), nn.LSTM(8, 8, 2, dropout=0.3))
    _, ebc = attached_adam(model)
    assert ebc.clip.prober.fresh_logits


class Coin(Tokenwise):
    """Tosses one of Python's coins in every forward, in evaluation too, as teacher forcing does."""

    def forward(self, tokens):
        z = super().forward(tokens)
        return 1.5 * z if random.random() < 0.5 else z


@pytest.mark.filterwarnings("error::ebc_lab.ebc.EBCWarning")
def test_numbers_that_are_drawn_in_evaluation_are_the_same_at_both_weights():
    random.seed(0)
    model = Coin()
    optimizer, _ = attached_adam(model)
    for step in range(16):
        entropy(model, integers(48, 12, seed=step)).backward()
        before = copy.deepcopy(model)
        optimizer.step()
        optimizer.zero_grad()
        tokens = integers(48, 12, seed=1000 + step)
        with torch.no_grad():
            z, z_new = (Tokenwise.forward(m, tokens) for m in (before, model))
            kls = [mean_kl(scale * z, scale * z_new) for scale in (1, 1.5)]
        assert 0.5 * min(kls) < TARGET < 2 * max(kls)


@pytest.mark.parametrize("draw", [random.random, lambda: float(torch.rand(())), lambda: numpy.random.rand()])
def test_measuring_draws_nothing_of_what_training_would(draw):
    class Draws(Tokenwise):
        def forward(self, tokens):
            return super().forward(tokens) * (1 + draw())

    runs = []
    for limited in (False, True):
        random.seed(0)
        torch.manual_seed(0)
        numpy.random.seed(0)
        model = Draws()
        optimizer, ebc = attached_adam(model, target_kl=1e9, audit_every=2)
        if not limited:
            ebc.detach()
        for step in range(8):
            learn(model, optimizer, integers(48, 12, seed=step))
        runs.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


class Evaluated(Tokenwise):
    """Returns probabilities where it is not trained; batch norm keeps its logits from being compared."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(11)

    def forward(self, tokens):
        z = self.norm(super().forward(tokens).movedim(1, -1)).movedim(1, -1)
        return z if self.training else z.softmax(-1)


def test_probabilities_in_evaluation_alone_are_refused_with_their_remedy():
    with pytest.raises(ValueError, match=r"in evaluation mode.*lambda z: z if model.training else z.log\(\)"):
        trained(Evaluated())
    model = Evaluated()
    trained(model, logits_of=lambda z: z if model.training else z.log())


def test_a_loss_of_each_position_is_no_logits():
    class Losses(Tokenwise):
        def forward(self, tokens):
            z = super().forward(tokens)
            return F.cross_entropy(z.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)

    with pytest.raises(ValueError, match=r"this is the loss of each position, and not logits"):
        trained(Losses(), loss=lambda model, tokens: model(tokens).mean())


def test_rows_whose_length_is_that_of_the_longest_are_called_together():
    class Shortened(Tokenwise):
        def forward(self, tokens, lengths):
            return super().forward(F.dropout(tokens[:, : int(lengths.max())].float(), 0.0, True).long())

    model = Shortened()
    model.rate = nn.Dropout(0.1)  # z(W) is computed anew, on some rows
    optimizer, _ = attached_adam(model, mask_of=lambda given: given["tokens"] >= 0, probe_sequences=12)
    lengths = torch.tensor([6] * 24 + [12] * 24)
    tokens = integers(48, 12)
    loss_of(model(tokens, lengths), tokens).backward()
    with pytest.warns(EBCWarning, match=r"logits of shape \(12, 6, 11\), which are \(12, 12\) among all"):
        optimizer.step()


@pytest.mark.filterwarnings("error::ebc_lab.ebc.EBCWarning")
def test_logits_that_are_written_to_are_computed_again():
    def masking(model, tokens):
        z = model(tokens)
        z[..., :3] = -math.inf
        return F.cross_entropy(z.flatten(0, 1), 3 + tokens.flatten() % 8)

    seen, _ = trained(Tokenwise(), loss=masking)
    assert held(seen)


# -- what counts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "length", "audit_every", "chosen"),
    [
        (64, 12, 20, (21, 252)),  # the fewest rows with 250 tokens
        (64, 200, 20, (2, 400)),  # two at least
        (16, 12, 20, (12, 144)),  # a quarter stays for audits
        (16, 12, 0, (16, 192)),  # unless there are none
        (1, 400, 20, (1, 400)),
    ],
)
def test_rows_are_chosen_by_their_tokens_and_it_says_so(rows, length, audit_every, chosen):
    model = Tokenwise()
    optimizer, ebc = attached_adam(model, audit_every=audit_every)
    tokens = integers(rows, length)
    entropy(model, tokens).backward()
    optimizer.step()
    assert ebc.clip.chosen_by == chosen
    assert f"c chosen by {chosen[0]} rows, {chosen[1]} tokens" in repr(ebc)


# -- models that cannot be called on some rows, or return something else -------------------------------------


class Baked(Tokenwise):
    def __init__(self, rows):
        super().__init__()
        self.start = nn.Parameter(torch.zeros(rows, 1, 8))

    def forward(self, tokens):
        x = torch.cat([self.start, self.embedding(tokens)], 1)
        return self.head(x + torch.tanh(self.blocks[0](x)))[:, 1:]


def test_a_model_of_one_batch_size_is_called_on_whole_batches():
    with pytest.warns(
        EBCWarning, match=r"on 21 of the batch's 48 rows.*RuntimeError.*on all 48 rows"
    ) as told:
        seen, ebc = trained(Baked(48), audit_every=5)
    assert len([w for w in told if "all 48 rows" in str(w.message)]) == 1
    assert held(seen)
    assert ebc.last.applied_kl is None or ebc.last.audit_tokens == 27 * 12
    _, again = attached_adam(Baked(48))
    again.load_state_dict(ebc.state_dict())
    assert again.clip.prober.whole
    seen, _ = trained(Baked(48), probe_sequences="all")
    assert held(seen)


class InPairs(Tokenwise):
    """Classes are the rows themselves, as in contrastive learning."""

    def forward(self, tokens):
        x = self.embedding(tokens).mean(1)
        return 5 * x @ self.blocks[0](x).T


def test_rows_that_are_classes_are_called_together():
    def loss(model, tokens):
        return F.cross_entropy(model(tokens), torch.arange(len(tokens)))

    with pytest.warns(EBCWarning, match=r"gets logits of shape \(12, 12\), which are \(12, 48\) among all"):
        _, ebc = trained(InPairs(), loss=loss, probe_sequences=12)
    assert ebc.look.finding is None
    _, ebc = trained(InPairs(), loss=loss, probe_sequences="all")
    assert ebc.look.finding is None


class Mixing(Tokenwise):
    """A row's logits depend on the mean of all rows."""

    def forward(self, tokens):
        return super().forward(tokens) + 3 * super().forward(tokens).mean(0)


def test_rows_that_depend_on_each_other_are_called_together():
    with pytest.warns(EBCWarning, match=r"a row's logits depend on other rows.*probe_sequences='all'"):
        seen, _ = trained(Mixing(), probe_sequences=24)
    assert held(seen)
    seen, ebc = trained(Mixing(), probe_sequences="all")
    assert held(seen)
    assert ebc.look.finding is None


@dataclasses.dataclass
class Output:
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class Fused(Tokenwise):
    """Head and loss are one: with labels its output holds no logits, and with `fused` it needs them."""

    def forward(self, ids, labels=None, fused=False, scale=1.0):
        z = scale * super().forward(ids)
        if labels is None and not fused:
            return Output(logits=z)
        return Output(loss=loss_of(z, labels))


@pytest.mark.parametrize("given", [{}, {"fused": True}, {"scale": 2.0}])
def test_a_model_that_holds_its_loss_and_no_logits_is_called_without_what_makes_it_so(given):
    seen, ebc = trained(Fused(), loss=lambda model, tokens: model(tokens, labels=tokens, **given).loss)
    assert (len(seen) >= 8) if given.get("scale") else held(seen)
    assert ebc.look.finding is None


def test_a_model_whose_logits_cannot_be_found_names_its_arguments():
    class Never(Fused):
        def forward(self, ids, labels=None, weights=None):
            return Output(loss=loss_of(Tokenwise.forward(self, ids), labels) * weights.mean())

    message = (
        r"no logits, and called without labels, num_items_in_batch .*of ids, weights too, in drop=\('labels'"
    )
    model = Never()
    optimizer, _ = attached_adam(model)
    tokens = integers(48, 12)
    model(ids=tokens, labels=tokens, weights=torch.ones(3)).loss.backward()
    with pytest.raises(ValueError, match=message):
        optimizer.step()


class Words(nn.Module):
    """Time first, with a hidden state that is handed on, and flat log-probabilities."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 16)
        self.cell = nn.LSTM(16, 16)
        self.head = nn.Linear(16, 11)

    def forward(self, tokens, hidden):
        x, hidden = self.cell(self.embedding(tokens), hidden)
        return self.head(x).log_softmax(-1).flatten(0, 1), hidden


def test_time_first_batches_that_are_flattened():
    rows, length = 48, 12
    model = Words()
    optimizer, ebc = attached_adam(model, logits_of=lambda out: out[0])
    hidden = (torch.zeros(1, rows, 16), torch.zeros(1, rows, 16))
    model(integers(length, rows), hidden)[0].mean().backward()
    with pytest.raises(ValueError, match=r"z.unflatten\(0, \(T, -1\)\) and batch_dim=1"):
        optimizer.step()
    ebc.detach()

    given = {"logits_of": lambda out: out[0].unflatten(0, (length, -1)), "batch_dim": 1, "audit_every": 3}
    ebc = attach(model, optimizer, target_kl=TARGET, **given)
    kls = []
    for step in range(9):
        tokens = integers(length, rows, seed=step)
        start = tuple(h.detach() for h in hidden)
        optimizer.zero_grad()
        z, hidden = model(tokens, start)
        F.nll_loss(z, tokens.flatten()).backward()
        optimizer.step()
        with torch.no_grad():
            kls.append(float(mean_kl(z, model(tokens, start)[0])) / TARGET)
        assert ebc.last.clip_coefficient < 0.999
    assert held(kls)
    assert ebc.clip.chosen_by == (21, 252)
    assert ebc.look.finding is None


class Doubled(torch.autograd.Function):
    """One of a user's own, which torch.func does not take."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


UNDERIVED = {
    "lstm": lambda model, x: model.lstm(x)[0],
    "cdist": lambda model, x: torch.cdist(x, model.embedding.weight),
    "bag": lambda model, x: F.embedding_bag(x.argmax(-1), model.embedding.weight)[:, None],
    "own": lambda model, x: Doubled.apply(x),
}


class Underived(nn.Module):
    """A model with an operation that has no forward-mode derivative, by name."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        self.operation = UNDERIVED[name]
        self.embedding = nn.Embedding(12, 12)
        self.lstm = nn.LSTM(12, 12, batch_first=True)

    def forward(self, tokens):
        return self.operation(self, self.embedding(tokens))


@pytest.mark.parametrize("name", UNDERIVED)
@pytest.mark.parametrize(
    ("options", "instead"),
    [
        ({"budget": "fisher"}, "budget='shadow' or 'tracked'"),
        ({"budget": "calibrated"}, "budget='shadow' or 'tracked'"),
        ({"budget": "surrogate"}, "budget='shadow' or 'tracked', or probe='fd'"),
        ({"sensitivity_every": 1}, "probe='fd', or sensitivity_every=0"),
    ],
)
def test_a_model_without_forward_mode_derivatives_is_told_what_takes_it(name, options, instead):
    model = Underived(name)
    optimizer, _ = attached_adam(model, check=False, **options)
    tokens = integers(8, 12)
    z = model(tokens)
    F.cross_entropy(z.flatten(0, -2), tokens[:, : z.shape[1]].flatten()).backward()
    with pytest.raises(ValueError, match=rf"no forward-mode derivatives.*: use {instead}\.$") as refused:
        optimizer.step()
    assert isinstance(refused.value.__cause__, RuntimeError)  # torch's own


def test_a_controller_that_needs_a_derivative_is_named():
    model = Underived("lstm")
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    clip = EllipsotopeClip(model, optimizer, target_kl=TARGET, controller="agreement", audit_every=1)
    tokens = integers(8, 12)
    z = model(tokens)
    entropy(model, tokens).backward()
    with pytest.raises(ValueError, match=r": use a controller other than 'agreement'\.$"):
        clip.step(tokens, z, targets=tokens)
