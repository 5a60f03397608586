"""The splat store: places, search, statistics, revival, growth, and resuming bit for bit."""

import copy
import importlib.util
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.ebm_states import GOLDEN, assert_same

from ebc_lab.ebm import vmf
from ebc_lab.ebm.sphere import distance, normalise
from ebc_lab.ebm.starts import spherical_kmeans, splats_at
from ebc_lab.ebm.store import SplatStore

needs_faiss = pytest.mark.skipif(
    importlib.util.find_spec("faiss") is None, reason="faiss-cpu is not installed"
)
KINDS = ["exact", *(pytest.param(kind, marks=needs_faiss) for kind in ("hnsw", "ivf"))]
kinds = pytest.mark.parametrize("kind", KINDS)
adaptations = pytest.mark.parametrize("adapt", ["statistics", "gradient"])


def unit(rows, n, seed=0, dtype=torch.float32):
    return normalise(torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=dtype))


def about(centres, count, kappa=10.0, seed=0):
    """`count` states about centres drawn with replacement, of the concentration kappa."""
    generator = torch.Generator().manual_seed(seed)
    picked = centres[torch.randint(len(centres), (count,), generator=generator)]
    return vmf.sample(picked, kappa * (centres.shape[1] - 1), generator)


def filled(capacity=40, active=30, n=6, seed=0, widest=30.0, **settings):
    """A store with splats of many widths and weights, and places left over."""
    store = SplatStore(capacity, n, **settings)
    generator = torch.Generator().manual_seed(seed)
    alpha, kappa = 0.1 + torch.rand(2, active, generator=generator)
    store.add(unit(active, n, seed), alpha, widest * kappa)
    return store


def rng(seed=0):
    return np.random.Generator(np.random.Philox(seed))


# -- curriculum and k-means ----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", GOLDEN["curriculum"]["rows"])
def test_the_golden_curriculum(row):
    assert splats_at(row["step"], row["steps"], row["most"], row["tokens"]) == row["splats"]


@given(st.integers(0, 50), st.integers(1, 50), st.integers(1, 10**5), st.integers(0, 10**7))
def test_a_curriculum_never_shrinks(step, steps, most, tokens):
    now, then = (splats_at(at, steps, most, tokens) for at in (step, step + 1))
    assert min(16, most) <= now <= then <= most


def test_rounds_of_kmeans_raise_the_mean_cosine():
    states = about(unit(12, 8), 600, kappa=20.0)
    means = []
    for rounds in range(6):
        centres, labels = spherical_kmeans(states, 12, rng(3), rounds)
        assert torch.equal(labels, (states @ centres.T).argmax(dim=1))
        torch.testing.assert_close(centres.norm(dim=1), torch.ones(12))
        means.append(float((states * centres[labels]).sum(1).mean()))
    assert all(later >= earlier - 1e-6 for earlier, later in itertools.pairwise(means))
    assert means[4] > means[0] + 0.01


def test_kmeans_leaves_no_centre_empty_where_states_repeat_and_refuses_more_centres_than_states():
    states = torch.cat([unit(1, 4).expand(50, 4), unit(5, 4, seed=1)])
    _, labels = spherical_kmeans(states, 4, rng())
    assert len(labels.unique()) == 4
    for k in (0, 56):
        with pytest.raises(ValueError, match=f"{k} centres were asked of 55 states"):
            spherical_kmeans(states, k, rng())


# -- places --------------------------------------------------------------------------------------------------


def test_splats_take_the_first_free_places():
    store = SplatStore(5, 3)
    assert (len(store), store.active.sum()) == (0, 0)
    assert store.add(unit(2, 3)).tolist() == [0, 1]
    store.active[0] = False
    assert store.add(2 * unit(3, 3, seed=1)).tolist() == [0, 2, 3]
    assert len(store) == 4
    torch.testing.assert_close(store.directions()[[0, 2, 3]], unit(3, 3, seed=1))


def test_a_splat_starts_with_weight_1_and_concentration_10():
    store = SplatStore(4, 3)
    rows = store.add(unit(2, 3))
    assert store.kappa()[rows].tolist() == [10, 10]
    torch.testing.assert_close(store.log_pi()[rows], torch.full((2,), math.log(0.5)))
    assert store.log_pi()[2:].tolist() == [-math.inf] * 2


@adaptations
def test_kappa_is_clamped_and_divided(adapt):
    store = SplatStore(4, 3, adapt=adapt, kappa_min=2, kappa_max=20)
    store.add(unit(3, 3), kappa=torch.tensor([0.1, 7.0, 99.0]))
    torch.testing.assert_close(store.kappa()[:3], torch.tensor([2.0, 7.0, 20.0]))
    store.kappa_divisor = 4.0
    torch.testing.assert_close(store.kappa()[:3], torch.tensor([0.5, 1.75, 5.0]))
    torch.testing.assert_close(store.width()[:3], torch.tensor([2.0, 7.0, 20.0]))
    torch.testing.assert_close(store.log_peak(), vmf.log_peak(3, 2 * store.kappa()))


@pytest.mark.parametrize(
    ("mu", "settings", "sentence"),
    [
        (torch.zeros(1, 4), {}, "not zero"),
        (torch.full((1, 4), math.nan), {}, "finite"),
        (torch.ones(1, 5), {}, r"shape \(m, 4\)"),
        (torch.ones(1, 4), {"alpha": 0.0}, "over 0"),
        (torch.ones(1, 4), {"alpha": torch.tensor([math.nan])}, "over 0"),
        (torch.ones(3, 4), {}, "2 of 8 places free, not 3"),
    ],
)
def test_splats_that_mean_nothing_are_refused(mu, settings, sentence):
    store = filled(8, 6, 4)
    before = copy.deepcopy(store.state_dict())
    with pytest.raises(ValueError, match=sentence):
        store.add(mu, **settings)
    assert_same(store.state_dict(), before)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"n": 1}, "n >= 2"),
        ({"capacity": 0}, "places"),
        ({"neighbours": 0}, "neighbours"),
        ({"kappa_min": 5.0, "kappa_max": 4.0}, "in order"),
        ({"kappa_min": 0.0}, "over 0"),
        ({"kappa_max": math.inf}, "in order"),
        ({"index": "flat"}, "unknown"),
        ({"adapt": "gradients"}, "statistics, gradient"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        SplatStore(**{"capacity": 4, "n": 3, **settings})


# -- search --------------------------------------------------------------------------------------------------


def plain_logits(store, x):
    """ln pi + ln vMF of every active splat, one by one, in float64; -inf elsewhere."""
    weights, kappa, mu = store.weights().detach(), store.kappa().detach(), store.mu.detach()
    total = float(weights[store.active].double().sum())
    logits = torch.full((len(x), store.capacity), -math.inf, dtype=torch.float64)
    for k in store.active.nonzero().flatten().tolist():
        raw = float(kappa[k]) * (store.n - 1)
        cosine = x.double() @ normalise(mu[k].double())
        share = math.log(float(weights[k]) / total)
        logits[:, k] = share + vmf.log_peak(store.n, raw) - raw * (1 - cosine)
    return logits


@adaptations
@pytest.mark.parametrize(("widest", "k", "least", "most"), [(3.0, 7, 1e-3, 1), (10.0, 20, 1e-15, 1e-7)])
def test_the_best_are_those_with_the_largest_logits_and_the_rest_is_counted(adapt, widest, k, least, most):
    store, x = filled(adapt=adapt, widest=widest), unit(25, 6, seed=5)
    found, dropped = store.best(x, k)
    logits = plain_logits(store, x)
    assert torch.equal(found, logits.topk(k, dim=1).indices)
    rest = logits.softmax(1).sort(dim=1, descending=True).values[:, k:].sum(1).mean()
    torch.testing.assert_close(dropped.double(), rest, rtol=1e-3, atol=0)
    assert least < dropped < most


def test_places_without_a_splat_come_last_and_weigh_nothing():
    store, x = filled(40, 5), unit(9, 6, seed=5)
    found, dropped = store.best(x, 8)
    assert (found[:, :5].sort(dim=1).values == torch.arange(5)).all()
    assert dropped == pytest.approx(0, abs=1e-30)
    assert (store.gather(found).log_pi[:, 5:] == -math.inf).all()
    assert store.best(x, 40)[1] == 0


@kinds
def test_the_nearest_are_active_and_sorted_by_cosine(kind):
    store, x = filled(400, 300, index=kind, neighbours=8), unit(9, 6, seed=5)
    found = store.nearest(x, 6)
    cosines = x @ store.directions().detach().T
    cosines[:, ~store.active] = -2
    expected = cosines.topk(6, dim=1)
    hits = (found.unsqueeze(2) == expected.indices.unsqueeze(1)).any(2)
    assert hits.float().mean() >= (1.0 if kind == "exact" else 0.9)
    assert (cosines.gather(1, found).diff(dim=1) <= 0).all()


@kinds
def test_more_neighbours_than_splats_are_refused(kind):
    store = filled(40, 30, index=kind)
    with pytest.raises(ValueError, match="31 neighbours were asked of 30 splats"):
        store.nearest(unit(2, 6), 31)
    with pytest.raises(ValueError, match="41 splats a state were asked of 40 places"):
        store.best(unit(2, 6), 41)


@pytest.mark.thorough
@needs_faiss
@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_an_approximate_search_ranks_its_candidates_where_the_splats_are_now(kind):
    store = filled(600, 500, 16, index=kind, neighbours=8)
    x = about(store.directions().detach()[:500], 60)
    store.rebuild_index()
    with torch.no_grad():
        store.mu.add_(0.05 * unit(600, 16, seed=8))  # a few optimizer steps later
    found, dropped = store.best(x, 8)
    assert dropped.isnan()
    assert dropped.dim() == 0
    logits = plain_logits(store, x)
    assert (logits.gather(1, found).diff(dim=1) <= 1e-4).all()
    mass = logits.softmax(1).gather(1, found).sum(1)
    best = logits.softmax(1).topk(8, dim=1).values.sum(1)
    assert (mass / best).mean() > 0.99


@needs_faiss
def test_splats_placed_after_building_are_found():
    store = filled(600, 500, 16, index="hnsw", neighbours=8)
    store.rebuild_index()
    new = unit(3, 16, seed=77)
    rows = store.add(new)
    assert store.nearest(new, 1).flatten().tolist() == rows.tolist()
    assert store.observe(new).winner.tolist() == rows.tolist()


@kinds
def test_autocast_does_not_reach_the_search(kind):
    store, x = filled(index=kind, neighbours=4), unit(50, 6, seed=5)
    expected = store.best(x, 4)[0], store.nearest(x, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(store.best(x, 4)[0], expected[0])
        assert torch.equal(store.nearest(x, 4), expected[1])


# -- gather --------------------------------------------------------------------------------------------------


# -- statistics ----------------------------------------------------------------------------------------------


def plain_observe(store, states):
    """One step of the statistics, splat by splat; returns frequency, resultant, kappa, alpha, winner."""
    frequency, resultant = store.frequency.tolist(), store.resultant.tolist()
    directions = store.directions().detach()
    places = store.active.nonzero().flatten().tolist()
    won = {k: [] for k in places}
    winner = [max(places, key=lambda k: float(s @ directions[k])) for s in states]
    for s, k in zip(states, winner, strict=True):
        won[k].append(float(s @ directions[k]))
    for k in places:
        frequency[k] = 0.99 * frequency[k] + len(won[k])
        if won[k]:
            share = 1 - 0.95 ** len(won[k])
            resultant[k] += share * (sum(won[k]) / len(won[k]) - resultant[k])
    mean = sum(frequency[k] for k in places) / len(places)
    kappa, alpha = store.concentration.tolist(), [0.0] * store.capacity
    for k in places:
        kappa[k] = min(max(resultant[k] / (1 - resultant[k] ** 2), store.kappa_min), store.kappa_max)
        alpha[k] = frequency[k] + mean
    return frequency, resultant, kappa, alpha, winner


def test_statistics_are_those_of_the_transcription():
    store = filled()
    for step in range(4):
        states = about(unit(10, 6, seed=2), 50, seed=step)
        expected = plain_observe(store, states)
        wins = store.observe(states)
        found = store.frequency, store.resultant, store.concentration, store.alpha
        for values, plain in zip(found, expected[:4], strict=True):
            torch.testing.assert_close(values, torch.tensor(plain), rtol=1e-5, atol=1e-5)
        assert wins.winner.tolist() == expected[4]
        torch.testing.assert_close(wins.angle, distance(states, store.directions()[wins.winner]).detach())
    assert store.age.tolist() == [4] * 30 + [0] * 10
    assert torch.equal(store.frequency[30:], torch.zeros(10))


def test_the_order_of_the_states_changes_no_bit():
    first, second = filled(), filled()
    states = unit(300, 6, seed=4)
    first.observe(states)
    second.observe(states.flip(0))
    assert_same(first.state_dict(), second.state_dict())


def test_trained_weights_are_left_to_the_optimizer_and_kappa_returns_to_its_limits():
    store = filled(adapt="gradient")
    with torch.no_grad():
        store.log_kappa[:2] = torch.tensor([-3.0, 9.0])
    before = store.log_alpha.clone(), store.log_kappa.clone(), store.mu.clone()
    store.observe(unit(50, 6, seed=3))
    assert torch.equal(store.log_alpha, before[0])
    assert torch.equal(store.mu, before[2])
    torch.testing.assert_close(store.log_kappa[:2].exp(), torch.tensor([1.0, 50.0]))
    assert torch.equal(store.log_kappa[2:], before[1][2:])
    assert store.frequency.sum() == 50
    store.width().sum().backward()
    assert (store.log_kappa.grad[:2] > 0).all()  # a limit is not a place that gradients cannot leave


@pytest.mark.parametrize("shape", [(3, 5), (6,), (1, 2, 6)])
def test_states_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"give \(M, 6\)"):
        filled().observe(torch.ones(shape))


def test_coverage_counts_the_splats_that_won_lately():
    store = SplatStore(6, 8)
    assert store.coverage() == 0
    store.add(torch.eye(8)[:5])
    assert store.coverage() == 1  # no splat has had its chance yet
    store.observe(torch.eye(8)[:2])
    store.observe(torch.eye(8)[:1].expand(98, 8))
    assert store.coverage() == 0.4
    store.observe(torch.eye(8)[:1].expand(100, 8))  # 20 states a splat later
    assert store.coverage() == 0.2
    store.place(torch.tensor([1]), torch.eye(8)[5:6])  # another splat, whose chance begins
    assert store.coverage() == 0.4
    store.observe(torch.eye(8)[:1].expand(100, 8))
    assert store.coverage() == 0.2


# -- revival and growth --------------------------------------------------------------------------------------


def test_a_revival_takes_statistics_anew_and_zeroes_the_moved():
    store = SplatStore(20, 8)
    store.add(unit(20, 8))
    for _ in range(3):
        store.observe(unit(200, 8, seed=7))
    store.stress.fill_(1.5)
    states = about(store.directions().detach()[:5], 400, kappa=40.0)
    kept = store.directions().detach().clone()
    rows = store.revive(states, rng())
    others = [k for k in range(20) if k not in rows.tolist()]
    assert set(others) == set((states @ kept.T).argmax(1).unique().tolist())  # those that win states
    assert torch.equal(store.directions()[others], kept[others])
    assert store.stress[rows].tolist() == store.age[rows].tolist() == [0] * len(rows)
    assert (store.stress[others] == 1.5).all()
    assert (store.age[others] == 3).all()
    cosines = states @ store.directions().detach().T
    counts = cosines.argmax(dim=1).bincount(minlength=20)
    assert torch.equal(store.frequency, counts.float())
    for k in counts.nonzero().flatten().tolist():
        mean = cosines[cosines.argmax(dim=1) == k, k].mean()
        torch.testing.assert_close(store.resultant[k], mean)
        ratio = min(float(mean), 0.9999)
        expected = min(max(ratio / (1 - ratio**2), 1), 50)
        assert store.concentration[k].item() == pytest.approx(expected, rel=1e-3)
    moved = store.directions().detach()[rows]
    assert ((moved @ states.T).amax(dim=1) > 1 - 1e-6).all()  # each lies on a state
    assert len(moved.unique(dim=0)) == len(rows)


@adaptations
def test_a_splat_that_lies_on_its_only_state_is_as_narrow_as_can_be(adapt):
    states = unit(50, 24)
    store = SplatStore(51, 24, adapt=adapt)
    store.add(torch.eye(24)[:1].expand(51, 24))
    store.observe(states)
    moved = store.revive(states, rng())
    assert len(moved) == 50
    torch.testing.assert_close(store.width()[moved].detach(), torch.full((50,), 50.0))
    store.observe(states)
    torch.testing.assert_close(store.width()[moved].detach(), torch.full((50,), 50.0))


def test_splats_move_where_nobody_is_near():
    store = SplatStore(25, 8)
    store.add(torch.eye(8)[[0] * 5 + [1] * 20])
    near, far = about(torch.eye(8)[:1], 900, 50.0), about(-torch.eye(8)[:1], 100, 50.0, seed=1)
    rows = store.revive(torch.cat([near, far]), rng())
    assert set(range(6, 25)) <= set(rows.tolist())
    assert (store.directions()[rows, 0] < 0).float().mean() > 0.7  # of 10% of the states


def test_states_that_all_lie_on_splats_revive_nothing():
    store = SplatStore(5, 4)
    store.add(torch.eye(4)[[0, 1, 2, 3, 3]])
    assert len(store.revive(torch.eye(4).repeat(10, 1), rng())) == 0


def test_a_few_states_do_not_declare_splats_dead_that_were_frequent():
    store = SplatStore(200, 8)
    store.add(unit(200, 8))
    for step in range(20):
        store.observe(unit(500, 8, seed=step))
    frequency = store.frequency.clone()
    rare = frequency < 0.1 * frequency.mean()
    states = unit(100, 8, seed=99)
    rows = store.revive(states, rng())
    assert rare[rows].all()
    kept = ~torch.isin(torch.arange(200), rows)
    assert torch.equal(store.frequency[kept], frequency[kept])
    assert (store.alpha > 0).all()


@adaptations
def test_growth_puts_splats_among_the_states(adapt):
    store = SplatStore(100, 16, adapt=adapt)
    centres = unit(40, 16)
    states = about(centres, 1500, kappa=30.0)
    assert store.grow(states, 10, rng()).tolist() == list(range(10))
    store.observe(states)
    rows = store.grow(states, 50, rng(1))
    assert rows.tolist() == list(range(10, 60))
    assert len(store) == 60
    assert (store.frequency.sum(), store.age.tolist()) == (1500, [1] * 10 + [0] * 90)
    winners = store.observe(about(centres, 1500, kappa=30.0, seed=3)).winner
    assert len(winners.unique()) > 50
    assert store.log_pi().exp().sum().item() == pytest.approx(1, abs=1e-5)


# -- kept and copied -----------------------------------------------------------------------------------------


@needs_faiss
def test_the_index_of_a_checkpoint_is_the_one_that_was_built_not_a_new_one():
    store = filled(600, 500, 16, index="hnsw", neighbours=8)
    store.rebuild_index()
    with torch.no_grad():
        store.mu.copy_(unit(600, 16, seed=50))  # so far that candidates of the old graph are others
    x = unit(100, 16, seed=51)
    stale = store.nearest(x, 8)
    again = SplatStore(600, 16, index="hnsw", neighbours=8)
    again.load_state_dict(store.state_dict())
    assert torch.equal(again.nearest(x, 8), stale)
    again.rebuild_index()
    assert not torch.equal(again.nearest(x, 8), stale)


@kinds
def test_a_copy_of_a_store_searches_like_the_store(kind):
    store, x = filled(80, 60, 8, index=kind, neighbours=4), unit(30, 8, seed=3)
    store.rebuild_index()
    again = copy.deepcopy(store)
    assert torch.equal(again.nearest(x, 4), store.nearest(x, 4))
    again.add(unit(1, 8))
    assert (len(again), len(store)) == (61, 60)
