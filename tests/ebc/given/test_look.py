"""The first steps under `attach` are looked at: what is said where training is of something else."""

import copy
import math
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.tokenwise import Tokenwise, attached_adam, integers, learn, loss_of
from torch import nn

from ebc_lab.ebc import EBCWarning, attach, mean_kl
from ebc_lab.ebc.given.look import Look, Seen

TARGET = 0.002


class Called(Tokenwise):
    """Counts its forwards in evaluation mode, which are measurements."""

    measured = 0

    def forward(self, ids, *given):
        Called.measured += not self.training  # what a model itself keeps is put back
        return super().forward(ids)


def trained(model, loss, rows=48, **options):
    """-> what is attached, and what it warned of."""
    optimizer, ebc = attached_adam(model, **options)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", EBCWarning)
        for step in range(5):
            tokens = integers(rows, 12, seed=step)
            loss(model, tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    return ebc, [str(t.message) for t in told if issubclass(t.category, EBCWarning)]


def entropy(model, tokens):
    return loss_of(model(tokens), tokens)


def test_where_all_is_well_nothing_is_said_and_no_bit_changes():
    runs = []
    for check in (True, False):
        model = Called()
        before = Called.measured
        ebc, told = trained(model, entropy, check=check)
        assert told == []
        runs.append((list(model.parameters()), Called.measured - before, ebc.look))
    assert all(torch.equal(p, q) for p, q in zip(runs[0][0], runs[1][0], strict=True))
    assert runs[0][1] - runs[1][1] == 2 * 3  # forwards, two in each of three steps
    look, none = runs[0][2], runs[1][2]
    assert none is None
    assert len(look.steps) == 3
    for step in look.steps:
        assert step.apart < 1e-7
        assert 0.3 < step.unlike < 3
        assert 0.7 < step.share < 1.3
        assert step.idle == 0
    assert " ".join(str(look).split()[:8]) == "step KL on other rows apart share idle"
    assert str(look).endswith("nothing wrong")
    assert len(str(look).splitlines()) == 5
    assert look.rows_unlike is None


def test_a_part_of_the_loss_that_passes_other_outputs():
    class Two(Tokenwise):
        def __init__(self):
            super().__init__()
            self.value = nn.Linear(8, 1)

        def forward(self, ids):
            return super().forward(ids), self.value(self.embedding(ids))

    def loss(model, tokens):
        logits, value = model(tokens)
        return loss_of(logits, tokens) + 30 * (value[..., 0] - tokens).square().mean()

    ebc, (told,) = trained(Two(), loss, logits_of=lambda output: output[0])
    assert "of the fall of the loss passes the logits that EBC measures" in told
    assert "logits_of=" in told
    assert ebc.look.finding in told


@pytest.mark.parametrize("also", [0, 30])
@pytest.mark.parametrize("copied", ["cast", "normalised", "stacked", "in an object"])
def test_the_look_sees_through_a_logits_of_that_copies(also, copied):
    """Idle positions and the part of the loss that passes the logits, at the output that they are made of."""

    class Two(Tokenwise):
        def __init__(self):
            super().__init__()
            self.value = nn.Linear(8, 1)

        def forward(self, ids):
            z, value = super().forward(ids), self.value(self.embedding(ids))
            return SimpleNamespace(z=z, value=value) if copied == "in an object" else (z, value)

    def logits(output):
        z = output.z if copied == "in an object" else output[0]
        if copied == "stacked":
            return torch.stack([torch.zeros_like(z), z], -1)
        return z.log_softmax(-1) if copied == "normalised" else z.double()

    def loss(model, tokens):
        output = model(tokens)
        z, value = vars(output).values() if copied == "in an object" else output
        z, labels = z[:, 7:], tokens[:, 7:]
        if copied == "stacked":
            of_labels = F.binary_cross_entropy_with_logits(z, F.one_hot(labels, 11).float())
        else:
            of_labels = F.cross_entropy(z.flatten(0, 1), labels.flatten())
        return of_labels + also * (value[..., 0] - tokens).square().mean()

    ebc, (told,) = trained(Two(), loss, logits_of=logits)
    assert "does not depend on 58% of the positions" in told
    assert ("of the fall of the loss passes the logits" in told) == bool(also)
    assert all((s.share < 0.3) if also else (0.7 < s.share < 1.3) for s in ebc.look.steps)


def test_a_head_outside_the_model_hides_no_idle_positions():
    class Hidden(Tokenwise):
        def forward(self, ids):
            x = self.embedding(ids)
            return x + torch.tanh(self.blocks[0](x))

    def loss(model, tokens):
        z = model.head(model(tokens))
        return F.cross_entropy(z[:, 7:].flatten(0, 1), tokens[:, 7:].flatten())

    model = Hidden()
    _, (told,) = trained(model, loss, logits_of=lambda hidden: model.head(hidden))
    assert "does not depend on 58% of the positions" in told
    _, told = trained(
        model, lambda m, t: loss_of(m.head(m(t)), t), logits_of=lambda hidden: model.head(hidden)
    )
    assert told == []


def test_positions_whose_output_is_zero_are_not_idle_for_that():
    class Half(Tokenwise):
        def forward(self, ids):
            x = self.embedding(ids)
            return (x + torch.tanh(self.blocks[0](x))) * (torch.arange(ids.shape[1]) % 2)[:, None]

    model = Half()
    ebc, told = trained(
        model, lambda m, t: loss_of(m.head(m(t)), t), logits_of=lambda hidden: model.head(hidden)
    )
    assert [step.idle for step in ebc.look.steps] == [0, 0, 0]
    assert told == []


def test_looking_through_a_head_leaves_its_buffers_and_random_numbers_alone():
    ends = []
    for check in (True, False):
        torch.manual_seed(0)
        model = Tokenwise()
        model.norm = nn.BatchNorm1d(11)

        def logits(z, norm=model.norm):
            return norm(F.dropout(z, 0.3).movedim(-1, 1)).movedim(1, -1)

        def loss(model, tokens, logits=logits):
            return loss_of(logits(model(tokens)), tokens)

        trained(model, loss, logits_of=logits, check=check)
        ends.append([*model.parameters(), *model.buffers(), torch.rand(2)])
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


def test_a_loss_that_is_no_softmaxs():
    def loss(model, tokens):
        return F.mse_loss(model(tokens), F.one_hot(tokens, 11).float())

    _, (told,) = trained(Tokenwise(), loss)
    assert "not one of a softmax over the last axis" in told


def test_positions_that_do_not_count():
    def loss(model, tokens):
        return F.cross_entropy(model(tokens)[:, 7:].flatten(0, 1), tokens[:, 7:].flatten())

    _, (told,) = trained(Tokenwise(), loss)
    assert "does not depend on 58% of the positions" in told
    assert "mask_of=" in told

    def counted(given):
        return torch.arange(12).expand(given["tokens"].shape) >= 7

    ebc, told = trained(Tokenwise(), loss, mask_of=counted)
    assert told == []
    assert ebc.clip.chosen_by == (48, 48 * 5)


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 16)
        self.cell = nn.RNN(16, 16)
        self.head = nn.Linear(16, 11)

    def forward(self, tokens):
        return self.head(self.cell(self.embedding(tokens))[0])


def test_rows_that_are_times():
    """The first times do not depend on later ones, so that only their order tells."""
    _, (told,) = trained(TimeFirst(), entropy)
    assert "in another order, differ by a KL" in told
    assert "batch_dim=1" in told
    ebc, told = trained(TimeFirst(), entropy, batch_dim=1, rows=12)
    assert told == []
    assert len(ebc.look.steps) == 3


class Sorted(Tokenwise):
    """The rows of a second domain have larger logits."""

    def forward(self, tokens):
        return super().forward(tokens[:, 1:]) * (1 + tokens[:, :1, None])


def domains(seed, rows=96):
    """The second domain's rows lie behind those of the first."""
    tokens = integers(rows, 12, seed=seed)
    tokens[:, 0] = torch.arange(rows) // (rows // 2)
    return tokens


def on_domains(steps, start=0, state=None):
    """-> model and optimizer states, KL of each step on other rows over the target, what was said, look."""
    model = Sorted()
    optimizer, ebc = attached_adam(model, probe_sequences=24)
    if state is not None:
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    ratios = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", EBCWarning)
        for step in range(start, steps):
            tokens, others = domains(step), domains(1000 + step)
            with torch.no_grad():
                before = model(others)
            loss_of(model(tokens), tokens[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                ratios.append(float(mean_kl(before, model(others))) / TARGET)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    return state, ratios, [str(t.message) for t in told], ebc.look


@pytest.mark.thorough
def test_where_leading_rows_are_unlike_the_rest_rows_are_drawn_from_all():
    state, ratios, told, look = on_domains(16)
    assert told == []
    assert max(ratios[:3]) > 1.5
    assert 0.75 < sorted(ratios[4:])[6] < 1.25
    assert "the leading rows are unlike the others" in str(look)
    for pause in (2, 5, 9):  # before the rows change, while they are looked at again, and after that
        begun, *_ = on_domains(pause)
        resumed, *_ = on_domains(16, pause, begun)
        assert all(torch.equal(p, q) for p, q in zip(state[0].values(), resumed[0].values(), strict=True))


@pytest.mark.parametrize(
    ("ratios", "tokens", "told"),
    [
        ((1.6, 1.7, 1.1), 300, 1.6),
        ((1.6, 1.7, 0.9), 300, None),
        ((1.4, 1.7, 1.3), 300, None),
        ((0.5, 0.6, 0.9), 300, 0.6),
        ((0.5, 0.6, math.nan), 300, 0.6),
        ((1.6, 1.7, 1.6), 50, None),
        ((4.0, 5.0, 3.5), 50, 4.0),
        ((math.nan, math.nan, math.nan), 0, None),
    ],
)
def test_other_rows_are_unlike_where_all_steps_say_so(ratios, tokens, told):
    look = Look()
    look.steps = [Seen(0.0, 1e-8, 1e-3, 1e-3 * r, tokens) for r in ratios]
    assert look.rows_unlike == (None if told is None else pytest.approx(told))
    del look.steps[2]
    assert look.rows_unlike is None  # not all is seen yet


def test_weights_that_no_optimizer_of_ebcs_holds_are_named():
    model = Tokenwise()
    optimizer = torch.optim.Adam([model.embedding.weight], lr=0.05)
    ebc = attach(model, optimizer, target_kl=TARGET, audit_every=0)
    names = r"blocks.0.weight, blocks.0.bias, head.weight get gradients and are of no optimizer that EBC"
    for step in range(2):
        learn(model, optimizer, integers(48, 12, seed=step))
    with pytest.warns(EBCWarning, match=names):
        learn(model, optimizer, integers(48, 12, seed=2))
    assert ebc.look.done


def test_a_forward_that_is_not_trained():
    def loss(model, tokens):
        trained = loss_of(model(tokens), tokens)
        trained.backward()
        model(tokens.flip(0)).sum()  # with gradients on, for a figure
        return torch.zeros((), requires_grad=True)

    _, told = trained(Tokenwise(), loss)
    assert any("no gradient comes back to the last training forward before a step" in t for t in told)


def test_rows_that_must_be_sorted_are_looked_at_in_their_order():
    class Packed(Tokenwise):
        def forward(self, tokens):
            if (tokens[:, 0].diff() > 0).any():
                raise RuntimeError("the longest come first")
            return super().forward(tokens)

    def loss(model, tokens):
        return entropy(model, tokens[tokens[:, 0].argsort(descending=True)])

    ebc, told = trained(Packed(), loss)
    assert told == []
    assert len(ebc.look.steps) == 3


def test_a_look_that_fails_says_so_and_training_goes_on():
    class Frail(Called):
        def forward(self, tokens):
            if len(tokens) == 24 and not self.training:  # twice the rows that choose c
                raise RuntimeError("no memory for so many\nof them")
            return super().forward(tokens)

    ebc, (told,) = trained(Frail(), entropy, probe_sequences=12)
    assert told.endswith("a forward failed meanwhile (RuntimeError: no memory for so many).")
    assert ebc.look.finding is None
    assert 0 < ebc.last.clip_coefficient < 1


def test_steps_that_move_nothing_are_not_looked_at():
    model = Tokenwise()
    optimizer, ebc = attached_adam(model, lr=0.0)
    for step in range(3):
        learn(model, optimizer, integers(48, 12, seed=step))
    assert ebc.look.steps == []


def test_without_a_budget_nothing_is_looked_at():
    ebc, told = trained(Called(), entropy, target_kl=math.inf)
    assert ebc.look is None
    assert told == []


@pytest.mark.parametrize("before", ["accumulation", "forwards", "a rate of 0"])
def test_what_comes_before_the_first_step_that_counts_hides_nothing(before):
    """Eight forwards to a step, forwards with gradients on before training, steps that move nothing."""
    model = nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 11))
    lr = 0.0 if before == "a rate of 0" else 0.05
    optimizer, _ = attached_adam(model, lr, logits_of=lambda z: z.movedim(-1, 1))
    if before == "forwards":
        for _ in range(8):
            model(integers(48, 12))

    def train():
        for step in range(8):
            for part in range(8 if before == "accumulation" else 1):
                tokens = integers(48, 12, seed=8 * step + part)
                loss_of(model(tokens), tokens).backward()
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.05

    with pytest.raises(ValueError, match=r"z.movedim\(1, -1\)"):
        train()


def test_what_is_refused_is_taken_where_somebody_insists():
    def labels(model, tokens):
        return F.binary_cross_entropy_with_logits(model(tokens), F.one_hot(tokens, 11).float())

    with pytest.raises(ValueError, match="a label of its own"):
        trained(Tokenwise(), labels)
    ebc, _ = trained(Tokenwise(), labels, check=False)
    assert 0 < ebc.last.clip_coefficient < 1


@pytest.mark.parametrize("steps", [0, 1])
def test_what_is_refused_goes_on_in_a_run_that_has_taken_steps(steps):
    model, tokens = Tokenwise(), integers(48, 12)
    optimizer, ebc = attached_adam(model)
    ebc.load_state_dict(ebc.state_dict() | {"step_index": steps})
    F.binary_cross_entropy_with_logits(model(tokens), F.one_hot(tokens, 11).float()).backward()
    with nullcontext() if steps else pytest.raises(ValueError, match="a label of its own"):
        optimizer.step()
