"""The neighbour index: exact search, faiss's graph and lists, their recall, bytes and distance counts."""

import importlib.util
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.ebm_states import unit

from ebc_lab.ebm.index import KINDS, NeighbourIndex, chosen, exact_search, first_largest, largest
from ebc_lab.ebm.sphere import normalise

needs_faiss = pytest.mark.skipif(
    importlib.util.find_spec("faiss") is None, reason="faiss-cpu is not installed"
)
approximate = pytest.mark.parametrize("kind", ["hnsw", "ivf"])


def uniform(points, n, seed=0):
    return unit(points, n, seed=seed, dtype=torch.float32)


def structured(points, n, seed=0):
    """Points about a random subspace of 8 dimensions, as states of text lie about one."""
    generator = torch.Generator().manual_seed(seed)
    plane = torch.randn(8, n, generator=torch.Generator().manual_seed(9)) / math.sqrt(8)
    near = torch.randn(points, 8, generator=generator) @ plane
    return normalise(near + 0.05 * torch.randn(points, n, generator=generator))


def clustered(points, n, seed=0):
    """Points about 200 centres, at an rms angle of 0.5."""
    generator = torch.Generator().manual_seed(seed)
    picked = uniform(200, n, seed=9)[torch.randint(200, (points,), generator=generator)]
    return normalise(picked + 0.5 * torch.randn(points, n, generator=generator) / math.sqrt(n))


def noisy(points, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    picked = points[torch.randint(len(points), (count,), generator=generator)]
    return normalise(
        picked + 0.3 * torch.randn(picked.shape, generator=generator) / math.sqrt(points.shape[1])
    )


def recall(found, exact):
    return (found.unsqueeze(2) == exact.unsqueeze(1)).any(2).double().mean().item()


# -- exact ---------------------------------------------------------------------------------------------------


def test_exact_search_sorts_all_inner_products():
    mu, x = uniform(300, 5), uniform(20, 5, seed=1)
    for row, found in zip(x, exact_search(x, mu, 7), strict=True):
        products = [(float(row @ m), i) for i, m in enumerate(mu)]
        assert found.tolist() == [i for _, i in sorted(products, reverse=True)[:7]]


def test_of_equal_values_the_first_is_the_largest():
    values = torch.tensor([[1.0, 3.0, 3.0], [-1.0, -2.0, -1.0]])
    assert first_largest(values).tolist() == [1, 0]
    assert first_largest(uniform(50, 9)).tolist() == uniform(50, 9).argmax(1).tolist()


def test_rows_are_searched_in_pieces_without_a_trace(monkeypatch):
    mu, x = uniform(50, 6), uniform(33, 6, seed=1)
    whole = exact_search(x, mu, 3)
    monkeypatch.setattr("ebc_lab.ebm.index.CHUNK", 200)
    assert torch.equal(exact_search(x, mu, 3), whole)


@given(st.integers(1, 70), st.integers(1, 12), st.integers(0, 10**6))
def test_the_largest_by_blocks_are_those_of_a_sort(width, k, seed):
    k = min(k, width)
    values = torch.randn(4, width, generator=torch.Generator().manual_seed(seed))
    values[values < -1] = -math.inf  # places without a splat
    found, columns = largest(values, k)
    assert torch.equal(found, values.sort(dim=1, descending=True).values[:, :k])
    assert torch.equal(values.gather(1, columns), found)
    assert all(len(set(row)) == k for row in columns.tolist())


def test_the_largest_are_found_under_a_transform_too():
    """As `budget=fisher` and `surrogate` call the model: without it their runs failed once there were enough
    splats."""
    values = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    (_, columns), _ = torch.func.jvp(lambda x: largest(x, 4), (values,), (torch.ones_like(values),))
    assert torch.equal(columns, largest(values, 4)[1])


def test_an_exact_index_searches_exactly():
    mu, x = uniform(100, 4), uniform(9, 4, seed=1)
    index = NeighbourIndex("exact").build(mu)
    assert torch.equal(index.search(x, 5), exact_search(x, mu, 5))
    assert (index.recall, index.effort, index.computations(x, 5)) == (1.0, 0, 100.0)


@pytest.mark.parametrize("k", [0, 11])
def test_more_neighbours_than_points_are_refused(k):
    mu = uniform(10, 4)
    with pytest.raises(ValueError, match=f"{k} neighbours were asked of 10 points: ask for 1 to 10"):
        exact_search(mu, mu, k)
    with pytest.raises(ValueError, match="of 10 points"):
        NeighbourIndex("exact").build(mu).search(mu, k)


# -- which kind ----------------------------------------------------------------------------------------------


def test_auto_is_exact_for_few_splats_or_a_gpu():
    assert chosen("auto", 16_384, on_gpu=False) == "exact"
    assert chosen("auto", 16_385, on_gpu=False) == "hnsw"
    assert chosen("auto", 10**6, on_gpu=True) == "exact"
    assert [chosen(kind, 10**6, on_gpu=True) for kind in KINDS] == list(KINDS)


def test_an_unknown_kind_is_refused_with_the_nearest_name_and_a_recall_outside_0_to_1():
    for wanted in (0.0, 1.01, -1.0, math.nan):
        with pytest.raises(ValueError, match="recall"):
            NeighbourIndex("exact", wanted)
    with pytest.raises(ValueError, match="'hnws' is unknown, did you mean 'hnsw'"):
        NeighbourIndex("hnws")
    with pytest.raises(ValueError, match="did you mean 'auto'"):
        chosen("aut", 10, on_gpu=False)


@approximate
def test_without_faiss_the_approximate_kinds_say_what_to_install(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match=r"needs faiss-cpu: pip install 'ebc-lab\[ebm\]'"):
        NeighbourIndex(kind)
    mu = uniform(10, 4)
    assert NeighbourIndex("exact").build(mu).search(mu, 1).flatten().tolist() == list(range(10))


# -- approximate ---------------------------------------------------------------------------------------------


@pytest.mark.thorough
@needs_faiss
@approximate
@pytest.mark.parametrize("cloud", [uniform, structured, clustered])
def test_the_effort_is_raised_until_the_recall_is_the_one_wanted(kind, cloud):
    mu = cloud(2000, 32)
    index = NeighbourIndex(kind).build(mu)
    assert index.recall >= 0.95
    x = noisy(mu, 400)  # points other than those it was tuned on
    assert recall(index.search(x, 32), exact_search(x, mu, 32)) >= 0.93


@needs_faiss
@approximate
def test_answers_are_sorted_distinct_and_complete(kind):
    mu = uniform(500, 16)
    index = NeighbourIndex(kind, 0.3).build(mu)  # so low that lists alone do not hold 200 points
    x = noisy(mu, 50)
    found = index.search(x, 200)
    cosines = (x.unsqueeze(1) * mu[found]).sum(2)
    assert (found >= 0).all()
    assert (cosines.diff(dim=1) <= 1e-6).all()
    assert all(len(set(row)) == 200 for row in found.tolist())


@needs_faiss
@approximate
@pytest.mark.parametrize("points", [1, 2, 17])
def test_a_handful_of_points_can_be_indexed(kind, points):
    mu = uniform(points, 3)
    index = NeighbourIndex(kind).build(mu)
    assert index.recall == 1.0
    assert index.search(mu, 1).flatten().tolist() == list(range(points))


@needs_faiss
@approximate
def test_points_that_lie_on_each_other_count_as_found(kind):
    mu = uniform(20, 8).repeat(40, 1)
    assert NeighbourIndex(kind).build(mu).recall >= 0.95


@needs_faiss
@approximate
def test_two_builds_are_the_same_bytes(kind):
    mu = structured(800, 16)
    first, second = (NeighbourIndex(kind, seed=3).build(mu).to_bytes() for _ in range(2))
    assert torch.equal(first, second)


@needs_faiss
def test_lists_compare_with_their_centres_and_with_the_points_they_hold():
    mu = uniform(400, 8)
    index = NeighbourIndex("ivf", 1.0).build(mu)
    counted = index.computations(mu, 1)
    assert 80 < counted <= 480  # 4 sqrt(400) centres, at most all points
    assert index.computations(mu, 1) == counted  # a count begins anew


@pytest.mark.slow
@needs_faiss
@pytest.mark.parametrize("n", [64, 640])
@pytest.mark.parametrize("cloud", [structured, clustered, uniform])
@approximate
def test_distances_a_query_grow_slower_than_the_root_where_points_have_structure(kind, cloud, n):
    """It prints a table: distances for a query at both sizes, and how they grow."""
    counts = []
    for points in (2000, 16_000):
        mu = cloud(points, n)
        index = NeighbourIndex(kind).build(mu)
        assert index.recall >= 0.95
        counts.append(index.computations(noisy(mu, 512), 32))
    print(f"{kind} {cloud.__name__} n={n}: {counts[0]:.0f} -> {counts[1]:.0f}")
    if kind == "hnsw" and cloud is not uniform:
        assert counts[1] <= 8**0.5 * counts[0]


# -- bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", *(pytest.param(kind, marks=needs_faiss) for kind in KINDS[1:])])
def test_an_index_read_from_bytes_searches_identically(kind):
    mu = uniform(1500, 24)
    index = NeighbourIndex(kind, 0.9, seed=5).build(mu)
    again = NeighbourIndex.from_bytes(kind, index.to_bytes())
    x = noisy(mu, 200)
    assert torch.equal(index.search(x, 40), again.search(x, 40))
    assert index.computations(x, 40) == again.computations(x, 40)
    assert (again.recall, again.effort, again.wanted, again.seed) == (index.recall, index.effort, 0.9, 5)
    assert torch.equal(again.to_bytes(), index.to_bytes())
    with pytest.raises(ValueError, match=r"truncated, .* build it anew"):
        NeighbourIndex.from_bytes(kind, index.to_bytes()[:-7])


def test_bytes_of_something_else_are_refused():
    data = NeighbourIndex("exact").build(uniform(10, 4)).to_bytes()
    with pytest.raises(ValueError, match="no index of this program"):
        NeighbourIndex.from_bytes("exact", data[:20])
    with pytest.raises(ValueError, match="no index of this program"):
        NeighbourIndex.from_bytes("exact", data + 1)
    with pytest.raises(ValueError, match="kind exact, not hnsw"):
        NeighbourIndex.from_bytes("hnsw", data)
