"""Which rows of a batch choose c, and batches that cannot be cut by their tensors."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tokenwise import Tokenwise, attached_adam, integers, learn, loss_of
from torch import nn
from torch.nn.functional import cross_entropy

from ebc_lab.ebc import EBCWarning, mean_kl
from ebc_lab.ebc.given.rows import counted_first

TARGET = 1e-3


@torch.no_grad()
def said(model, *given):
    return model(*given)


class Labelled(Tokenwise):
    def forward(self, ids, labels=None):
        return super().forward(ids)


@pytest.mark.thorough
@pytest.mark.parametrize("rows", [None, 12])
def test_rows_that_count_are_chosen_from_the_whole_batch(rows):
    """Unlabelled rows come first, after a start without any."""
    model = Labelled()
    counts = {"mask_of": lambda given: given["labels"] != -100}
    optimizer, ebc = attached_adam(model, target_kl=TARGET, probe_sequences=rows, audit_every=4, **counts)
    audited = 0
    for step in range(16):
        ids = integers(48, 12, seed=step)
        labels = ids.clone()
        if step > 3:
            labels[:30] = -100
        cross_entropy(model(ids, labels=labels).flatten(0, 1), labels.flatten()).backward()
        others = integers(48, 12, seed=1000 + step)
        before = said(model, others)
        optimizer.step()
        optimizer.zero_grad()
        audited += ebc.last.audit_tokens if step > 3 else 0
        if step > 3:
            assert ebc.last.clip_coefficient < 1
            assert 0.6 < mean_kl(before, said(model, others)) / TARGET < 1.5
    assert audited > 0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.booleans(), st.data())
def test_rows_with_positions_that_count_come_first_in_their_order(counts, drawn, data):
    k = data.draw(st.integers(1, len(counts)))
    order = data.draw(st.permutations(range(len(counts)))) if drawn else list(range(len(counts)))
    found = counted_first(torch.tensor(counts), torch.tensor(order) if drawn else None, k)
    some = [i for i in order if counts[i]]
    wanted = some + [i for i in order if not counts[i]]
    if all(counts[i] for i in order[:k]) or not any(counts[i] for i in order[k:]):
        wanted = order  # nothing better comes later
    assert (order if found is None else found.tolist()) == wanted


class Graphs(nn.Module):
    """Nodes lie behind one another, edges point at them: no tensor has a row for each graph."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, data):
        h = self.first(data["x"])
        h = h.index_add(0, data["edges"][1], h[data["edges"][0]]).tanh()
        return self.last(torch.zeros(data["graphs"], 16).index_add(0, data["of"], h))


def graphs(seed, count=300):
    g = torch.Generator().manual_seed(seed)
    of = torch.arange(count).repeat_interleave(torch.randint(3, 6, (count,), generator=g))
    edges = torch.randint(len(of), (2, 4000), generator=g)
    data = {"x": torch.randn(len(of), 8, generator=g), "edges": edges[:, of[edges[0]] == of[edges[1]]]}
    return {**data, "of": of, "graphs": count}, torch.arange(count) % 4


def some_graphs(given, rows):
    data = given["data"]
    place = torch.full((data["graphs"],), -1)
    place[rows] = torch.arange(len(rows))
    nodes = (place[data["of"]] >= 0).nonzero()[:, 0]
    nodes = nodes[place[data["of"][nodes]].argsort(stable=True)]
    number = torch.full((len(data["of"]),), -1)
    number[nodes] = torch.arange(len(nodes))
    edges = number[data["edges"]]
    edges = edges[:, edges[0] >= 0]
    cut = {"x": data["x"][nodes], "edges": edges, "of": place[data["of"][nodes]], "graphs": len(rows)}
    return {"data": cut}


class Box:
    """What EBC cannot look into, as PyG's Data."""

    def __init__(self, data):
        self.data = data


@pytest.mark.parametrize("how", ["whole", "cut", "opaque"])
def test_batches_that_no_tensor_gives_the_rows_of(how, recwarn):
    class Boxed(Graphs):
        def forward(self, data):
            return super().forward(data.data if isinstance(data, Box) else data)

    warnings.simplefilter("always", EBCWarning)  # also where one was given before
    torch.manual_seed(0)
    model = Boxed()
    rows_of = some_graphs if how == "cut" else None
    optimizer, ebc = attached_adam(model, lr=0.03, target_kl=TARGET, audit_every=4, rows_of=rows_of)
    ratios = []
    for step in range(14):
        data, labels = graphs(step)
        others, _ = graphs(1000 + step)
        before = said(model, others)
        cross_entropy(model(Box(data) if how == "opaque" else data), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        ratios.append(float(mean_kl(before, said(model, others))) / TARGET)
    sentences = [str(w.message) for w in recwarn if issubclass(w.category, EBCWarning)]
    assert len(sentences) == (0 if how == "cut" else 1), sentences
    assert all("rows_of=lambda given, rows" in sentence for sentence in sentences)
    assert 0.7 < sorted(ratios[4:])[5] < 1.3
    assert ebc.clip.chosen_by == (225, 225)


def test_an_empty_batch_takes_the_last_c():
    model = Tokenwise()
    optimizer, ebc = attached_adam(model, target_kl=TARGET)
    for step in range(4):
        learn(model, optimizer, integers(48, 12, seed=step))
    last = ebc.last
    model(integers(0, 12)).square().sum().backward()
    optimizer.step()
    assert ebc.last is not last
    assert 0 < ebc.last.clip_coefficient < 1


def test_another_axis_of_rows_is_named():
    class Heads(Tokenwise):
        def forward(self, ids):
            return super().forward(ids.expand(3, *ids.shape))

    model = Heads()
    optimizer, _ = attached_adam(model)
    ids = integers(48, 12)
    loss_of(model(ids), ids.expand(3, 48, 12)).backward()
    with pytest.warns(EBCWarning, match=r"axis 1 has: logits_of=lambda z: z\.movedim\(1, 0\)"):
        optimizer.step()
