"""The pile on the splats: novelty, toppling, its memory, consolidation, and the law of its avalanches."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.ebm_states import GOLDEN, assert_same

from ebc_lab.ebm import vmf
from ebc_lab.ebm.soc import HistoryBuffer, Pile, drive, novelty, power_law, topple
from ebc_lab.ebm.sphere import distance, normalise
from ebc_lab.ebm.store import SplatStore, Wins

N = 16
E = torch.eye(N)


def about(direction, count, kappa, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return vmf.sample(normalise(direction).expand(count, N), kappa * (N - 1), generator)


def turned(angle, towards=1):
    """The first axis turned by an angle towards another."""
    return math.cos(angle) * E[0] + math.sin(angle) * E[towards]


# -- novelty -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", GOLDEN["novelty"]["rows"])
def test_the_golden_novelty(row):
    angle = torch.tensor(row["angle"], dtype=torch.float64)
    assert novelty(angle, row["kappa"], row["n"]).item() == pytest.approx(row["novelty"], rel=1e-8, abs=1e-12)


# -- toppling ------------------------------------------------------------------------------------------------


def test_the_golden_pile():
    case = GOLDEN["soc"]
    stress = torch.tensor(case["stress"], dtype=torch.float64)
    after, topplings, sweeps = topple(
        stress, torch.tensor(case["neighbours"]), case["threshold"], case["conserved"]
    )
    torch.testing.assert_close(after, torch.tensor(case["after"], dtype=torch.float64), rtol=1e-12, atol=0)
    assert topplings.tolist() == case["topplings"]
    assert sweeps == case["sweeps"]
    assert stress.tolist() == case["stress"]  # the input is left alone


def plain_topple(stress, neighbours, threshold, conserved):
    stress, counts, sweeps = list(stress), [0] * len(stress), []
    while any(s >= threshold for s in stress):
        over = [k for k, s in enumerate(stress) if s >= threshold]
        given_away = [stress[k] for k in over]
        for k in over:
            stress[k] = 0.0
            counts[k] += 1
        for k, amount in zip(over, given_away, strict=True):
            for neighbour in neighbours[k]:
                stress[neighbour] += conserved * amount / len(neighbours[k])
        sweeps.append(len(over))
    return stress, counts, sweeps


@st.composite
def piles(draw):
    size = draw(st.integers(2, 12))
    degree = draw(st.integers(1, min(4, size - 1)))
    stress = draw(st.lists(st.floats(0, 30), min_size=size, max_size=size))
    others = [[j for j in range(size) if j != k] for k in range(size)]
    neighbours = [draw(st.permutations(row))[:degree] for row in others]
    return stress, neighbours, draw(st.floats(0.1, 5)), draw(st.floats(0, 0.95))


@given(piles())
def test_a_pile_comes_to_rest_within_the_bound(pile):
    stress, neighbours, threshold, conserved = pile
    start = torch.tensor(stress, dtype=torch.float64)
    after, topplings, sweeps = topple(start, torch.tensor(neighbours), threshold, conserved)
    assert (after < threshold).all()
    assert (after >= 0).all()
    assert int(topplings.sum()) == sum(sweeps)
    assert sum(sweeps) <= start.sum() / ((1 - conserved) * threshold) * (1 + 1e-9)
    assert after.sum() <= start.sum() * (1 + 1e-12)
    plain = plain_topple(stress, neighbours, threshold, conserved)
    if math.isclose(sum(plain[0]), float(after.sum()), rel_tol=1e-9):  # no rounding at the threshold
        torch.testing.assert_close(after, torch.tensor(plain[0], dtype=torch.float64), rtol=1e-9, atol=1e-12)
        assert topplings.tolist() == plain[1]
        assert sweeps == plain[2]


def test_a_splat_without_neighbours_loses_its_stress():
    after, topplings, _ = topple(torch.tensor([5.0]), torch.empty(1, 0, dtype=torch.int64))
    assert (after.item(), topplings.item()) == (0, 1)


def test_what_is_no_pile_is_refused():
    for conserved in (1.0, 1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="comes to rest only if it loses stress"):
            topple(torch.ones(2), torch.tensor([[1], [0]]), conserved=conserved)
        with pytest.raises(ValueError, match=r"conserved must lie in \[0, 1\)"):
            Pile(N, conserved=conserved)
    for threshold in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="threshold"):
            Pile(N, threshold=threshold)
    for stress in (math.inf, math.nan, -1.0):
        with pytest.raises(ValueError, match="finite and not negative"):
            topple(torch.tensor([1.0, stress]), torch.tensor([[1], [0]]))
    with pytest.raises(ValueError, match="room"):
        HistoryBuffer(0, 3)


# -- drive ---------------------------------------------------------------------------------------------------


def test_stress_leaks_with_wins_and_gathers_novelty():
    store = SplatStore(4, N)
    store.add(E[:3], kappa=torch.tensor([10.0, 20.0, 30.0]))
    store.kappa_divisor = 4.0  # a curriculum's temperature changes nothing of what is novel
    store.stress.copy_(torch.tensor([1.0, 1.5, 0.5, 0.0]))
    angles = [0.1, 0.9, 0.4, 0.8, 1.2]
    winner = [0, 0, 0, 2, 0]
    expected = [1.0 * 0.99**4, 1.5, 0.5 * 0.99, 0.0]
    for angle, k in zip(angles, winner, strict=True):
        expected[k] += novelty(torch.tensor(angle), [10.0, 20.0, 30.0][k], N).item()
    drive(store, Wins(torch.tensor(winner), torch.tensor(angles)))
    torch.testing.assert_close(store.stress, torch.tensor(expected))


# -- history -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 15), max_size=6))
def test_a_history_keeps_the_latest_states(batches):
    history = HistoryBuffer(7, 3)
    states = torch.arange(3.0 * max(1, sum(batches))).reshape(-1, 3)
    start = 0
    for size in batches:
        part = slice(start, start + size)
        winner = torch.arange(part.start, part.stop)
        history.add(states[part], Wins(winner, 0.1 * winner))
        start += size
    kept = (history.winners >= 0).nonzero().flatten()
    assert sorted(history.winners[kept].tolist()) == list(range(max(0, start - 7), start))
    assert history.count.item() == len(kept) == min(7, start)
    for place in kept:
        k = history.winners[place]
        assert torch.equal(history.states[place], states[k])
        assert history.angles[place] == 0.1 * k


def test_a_history_forgets_splats_that_moved():
    history = HistoryBuffer(6, 2)
    history.add(torch.ones(5, 2), Wins(torch.tensor([0, 1, 2, 1, 3]), torch.zeros(5)))
    history.forget(torch.tensor([1, 3]))
    assert history.winners.tolist() == [0, -1, 2, -1, -1, -1]


# -- consolidation -------------------------------------------------------------------------------------------


def world(capacity=8, splats=4, angle=1.0, near=60, far=20, spread=50.0):
    """Splat 0 of a store on the first axes won `near` states of its own and `far` ones at an angle to it."""
    store, pile = SplatStore(capacity, N, neighbours=2), Pile(N, capacity=500)
    store.add(E[:splats], alpha=40.0, kappa=20.0)
    store.frequency[:splats] = 100.0
    states = torch.cat([about(E[0], near, 20.0), about(turned(angle, 5), far, spread, seed=1)])
    wins = Wins(torch.zeros(near + far, dtype=torch.int64), distance(states, E[:1]))
    pile.buffer.add(states, wins)
    store.stress[0] = 2.5
    return store, pile, states, wins


def members(pile_states, wins, kappa=20.0):
    return pile_states[novelty(wins.angle, kappa, N) > 0]


def test_far_states_become_a_splat_of_their_own():
    store, pile, states, wins = world()
    event = pile.check(store, limit=8)
    assert (event.rows_changed.tolist(), event.consolidations) == ([4], 1)
    assert (event.topplings, event.sweeps, pile.sizes) == (1, [1], [1])
    far = members(states, wins)
    assert 20 <= len(far) < 26
    torch.testing.assert_close(store.directions()[4], normalise(far.mean(0)))
    rho = float(far.mean(0).norm())
    assert store.kappa()[4].item() == pytest.approx(min(rho / (1 - rho**2), 50), rel=1e-4)
    share = len(far) / 80
    assert store.alpha[[0, 4]].tolist() == pytest.approx([40 * (1 - share), 40 * share])
    assert store.frequency[[0, 4]].tolist() == pytest.approx([100 * (1 - share), 100 * share])
    assert (store.kappa()[0], store.age[4], store.stress[4], len(store)) == (20, 0, 0, 5)
    assert torch.equal(store.directions()[:4], E[:4])

    mine = pile.buffer.winners == 4  # what it took it remembers as its own
    assert torch.equal(pile.buffer.states[mine], far)
    torch.testing.assert_close(pile.buffer.angles[mine], distance(far, store.directions()[4].detach()))
    store.stress[0] = 2.5
    assert pile.check(store, limit=8).consolidations == 0  # nothing far is left


def test_stress_goes_to_the_nearest_splats():
    store, pile, *_ = world(splats=6)
    with torch.no_grad():
        store.mu[1:5] = torch.stack([turned(0.3, axis) for axis in range(1, 5)])
    pile.check(store, limit=6)
    torch.testing.assert_close(store.stress[:6], torch.tensor([0.0, 0.5, 0.5, 0.5, 0.5, 0.0]))


def test_members_about_their_splat_make_it_wider():
    store, pile, _, _ = world(far=0, near=0)
    shell = normalise(torch.randn(400, N, generator=torch.Generator().manual_seed(3)) + 6 * E[0])
    pile.buffer.add(shell, Wins(torch.zeros(400, dtype=torch.int64), distance(shell, E[:1])))
    far = members(shell, Wins(torch.zeros(400), distance(shell, E[:1])))
    assert distance(normalise(far.mean(0)), E[0]) < 0.1
    before = store.mu.detach().clone(), store.alpha.clone()
    event = pile.check(store, limit=8)
    assert (event.consolidations, event.rows_changed.tolist(), len(store)) == (1, [], 4)
    rho = float((shell @ E[0]).mean())
    assert store.kappa()[0].item() == pytest.approx(rho / (1 - rho**2), rel=1e-4)
    assert store.kappa()[0] < 20
    assert torch.equal(store.mu, before[0])
    assert torch.equal(store.alpha, before[1])


@pytest.mark.parametrize(("far", "stress"), [(0, 2.5), (1, 2.5), (20, 1.99)])
def test_one_far_state_makes_no_splat_and_a_pile_at_rest_changes_nothing(far, stress):
    store, pile, *_ = world(near=0, far=far)
    store.stress[0] = stress
    before = copy.deepcopy(store.state_dict())
    event = pile.check(store, limit=8)
    topplings = 0 if stress < 2 else 1
    assert (event.topplings, event.consolidations, len(event.rows_changed)) == (topplings, 0, 0)
    assert pile.sizes == [1] * topplings
    store.stress[:4] = before["stress"][:4]
    assert_same(store.state_dict(), before)


@pytest.mark.parametrize(("near", "far", "share"), [(0, 30, 0.5), (300, 2, 0.05)])
def test_a_new_splat_takes_between_a_twentieth_and_a_half(near, far, share):
    store, pile, *_ = world(near=0, far=far)
    own = E[:1].expand(near, N)
    pile.buffer.add(own, Wins(torch.zeros(near, dtype=torch.int64), torch.zeros(near)))
    pile.check(store, limit=8)
    assert store.alpha[[0, 4]].tolist() == pytest.approx([40 * (1 - share), 40 * share])


def test_without_a_free_place_the_least_frequent_splat_gives_its_own():
    store, pile, states, wins = world(splats=8)
    store.frequency[3] = 7.0
    store.alpha[3] = 12.0
    with torch.no_grad():
        store.mu[6] = normalise(E[3] + 0.2 * E[6])  # nearest to the splat that goes
    pile.buffer.add(E[3:4].expand(5, N), Wins(torch.full((5,), 3), torch.full((5,), 1.5)))
    event = pile.check(store, limit=8)
    assert event.rows_changed.tolist() == [3]
    far = members(states, wins)
    torch.testing.assert_close(store.directions()[3], normalise(far.mean(0)))
    assert (store.alpha[6].item(), store.frequency[6].item()) == (52.0, 107.0)
    assert (pile.buffer.winners == 3).sum() == len(far)  # what the old one won is forgotten
    assert len(store) == 8


def test_no_splat_gives_its_place_to_fewer_states_than_it_wins():
    store, pile, *_ = world(splats=8)
    before = store.mu.detach().clone()
    event = pile.check(store, limit=8)
    assert (event.consolidations, event.rows_changed.tolist()) == (0, [])
    assert torch.equal(store.mu, before)


def test_places_of_later_phases_stay_free():
    store, pile, *_ = world(capacity=8, splats=4)
    store.frequency[2] = 1.0
    event = pile.check(store, limit=4)
    assert event.rows_changed.tolist() == [2]
    assert len(store) == 4


def test_splats_that_are_new_in_a_check_are_not_replaced_in_it():
    store, pile, *_ = world(splats=4)
    store.frequency[:4] = torch.tensor([0.5, 0.5, 0.4, 0.3])
    states = about(turned(0.8, 9), 30, 50.0, seed=4)
    pile.buffer.add(states, Wins(torch.ones(30, dtype=torch.int64), torch.full((30,), 1.4)))
    store.stress[1] = 2.5
    event = pile.check(store, limit=4)
    assert event.rows_changed.tolist() == [3, 2]
    assert event.consolidations == 2
    assert pile.sizes == [event.topplings] == [sum(event.sweeps)]


def test_a_single_splat_topples_and_splits():
    store, pile, *_ = world(splats=1)
    event = pile.check(store, limit=8)
    assert (event.rows_changed.tolist(), event.topplings) == ([1], 1)


def test_trained_weights_are_set_where_a_place_is_used_anew():
    store = SplatStore(8, N, adapt="gradient")
    _, pile, states, wins = world()
    store.add(E[:4], alpha=3.0, kappa=20.0)
    store.stress[0] = 2.5
    pile.check(store, limit=8)
    share = len(members(states, wins)) / 80
    assert store.log_alpha.exp()[[0, 4]].tolist() == pytest.approx([3 * (1 - share), 3 * share])
    rho = float(members(states, wins).mean(0).norm())
    assert store.kappa()[4].item() == pytest.approx(rho / (1 - rho**2), rel=1e-4)


# -- the law -------------------------------------------------------------------------------------------------


def sizes(law, count, seed=0):
    rng = np.random.default_rng(seed)
    drawn = {
        "power 1.5": lambda: np.minimum(rng.zipf(1.5, count), 10**9),
        "power 2": lambda: rng.zipf(2.0, count),
        "power 2.5": lambda: rng.zipf(2.5, count),
        "log-normal": lambda: np.rint(rng.lognormal(2, 0.8, count)).clip(1),
        "broad log-normal": lambda: np.rint(rng.lognormal(3, 1.5, count)).clip(1),
        "geometric": lambda: rng.geometric(0.1, count),
        "broad geometric": lambda: rng.geometric(0.03, count),
        "poisson": lambda: 1 + rng.poisson(20, count),
    }[law]()
    return drawn.astype(np.int64).tolist()


@pytest.mark.parametrize(("law", "alpha"), [("power 1.5", 1.5), ("power 2", 2.0), ("power 2.5", 2.5)])
@pytest.mark.parametrize("seed", range(3))
def test_a_power_law_is_recognised(law, alpha, seed):
    found = power_law(sizes(law, 1000, seed))
    assert found.critical
    assert found.p > 0.1 or found.log_likelihood_ratio > 0
    assert found.alpha == pytest.approx(alpha, abs=0.12)
    assert found.xmin <= 5


@pytest.mark.parametrize("law", ["log-normal", "broad log-normal", "geometric", "broad geometric", "poisson"])
@pytest.mark.parametrize("seed", [2, 0, 1])
def test_other_laws_are_not_called_critical(law, seed):
    found = power_law(sizes(law, 1000, seed))
    assert not found.critical
    assert found.log_likelihood_ratio < 0
    assert found.p < 0.01


def test_under_50_avalanches_no_law_is_fitted():
    data = sizes("power 2", 50)
    assert power_law(data[:49]) is None
    assert power_law([]) is None
    assert power_law(data) is not None
    assert power_law(torch.tensor(data)) == power_law(data)


@pytest.mark.parametrize("data", [[1] * 60, [3] * 60, [1] * 40 + [2] * 30, [1, 2, 3, 4] * 20])
def test_sizes_that_span_no_decade_are_not_critical(data):
    found = power_law(data)
    assert not found.critical
    assert math.isfinite(found.alpha)
    assert 0 <= found.p <= 1


def test_an_avalanche_without_a_toppling_is_refused():
    with pytest.raises(ValueError, match="not 0: leave out the checks without one"):
        power_law([0, *range(1, 60)])
