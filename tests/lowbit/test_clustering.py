"""k-means against its definition in Python integers, across backends, and what is clustered with it."""

from __future__ import annotations

import functools
import math
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support import low_bit

from ebc_lab.lowbit.backends import BackendUnavailableError, get_backend
from ebc_lab.lowbit.backends.lloyd import lloyd_numpy, lloyd_torch
from ebc_lab.lowbit.clustering import (
    DataClustering,
    KMeansClustering,
    ParameterClustering,
    kmeans,
    suggest_k,
    window_features,
)

GOLDEN = low_bit.GOLDEN["kmeans"]
BACKENDS = ("numpy", "torch", "c", "cpp")
Rows = list[list[int]]
Problem = tuple[np.ndarray, np.ndarray, int]  # grid, start, passes at the most


def lloyd_of(name: str, threads: int = 1) -> Any:
    """`(grid, start, max_iter) -> (labels, centres, passes)`; skips, saying why, without a compiler."""
    if name == "numpy":
        return lloyd_numpy
    if name == "torch":
        return functools.partial(lloyd_torch, device="cpu")
    try:
        return get_backend(name, threads=threads).kmeans
    except BackendUnavailableError as error:
        pytest.skip(str(error))


# The definition, slowly: Python integers, lists and loops.


def plain_grid(X: list[list[float]]) -> tuple[Rows, list[float], int]:
    """(integers, origin, exponent of the spacing)."""
    columns = list(zip(*X, strict=True))
    origin = [(min(column) + max(column)) / 2 for column in columns]
    reach = max(abs(x - o) for row in X for x, o in zip(row, origin, strict=True))
    bits = min(24, (50 - math.ceil(math.log2(len(columns)))) // 2)
    exponent = math.frexp(reach)[1] - bits if reach else 0
    spacing = Fraction(2) ** exponent
    grid = [[round(Fraction(x - o) / spacing) for x, o in zip(row, origin, strict=True)] for row in X]
    return grid, origin, exponent


def distance(a: list[int], b: list[int]) -> int:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def plain_labels(grid: Rows, centers: Rows) -> list[int]:
    everyone = [[distance(row, center) for center in centers] for row in grid]
    return [distances.index(min(distances)) for distances in everyone]


def plain_update(grid: Rows, labels: list[int], centers: Rows) -> Rows:
    own = [distance(row, centers[label]) for row, label in zip(grid, labels, strict=True)]
    members = list(labels)
    for cluster in range(len(centers)):
        if cluster not in members:
            crowded = [i for i, label in enumerate(members) if members.count(label) > 1]
            members[max(crowded, key=lambda i: (own[i], -i))] = cluster
    result = []
    for cluster in range(len(centers)):
        rows = [row for row, label in zip(grid, members, strict=True) if label == cluster]
        result.append([round(Fraction(sum(column), len(rows))) for column in zip(*rows, strict=True)])
    return result


def plain_lloyd(grid: Rows, centers: Rows, max_iter: int) -> tuple[list[int], Rows, int]:
    labels = [-1] * len(grid)
    for passes in range(1, max_iter + 1):
        found = plain_labels(grid, centers)
        if found == labels:
            return labels, centers, passes
        labels = found
        centers = plain_update(grid, labels, centers)
    return plain_labels(grid, centers), centers, max_iter


def plain_plus_plus(grid: Rows, k: int, seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    chosen = [int(rng.integers(len(grid)))]
    while len(chosen) < k:
        nearest = [min(distance(row, grid[c]) for c in chosen) for row in grid]
        if sum(nearest) == 0:
            chosen.append(int(rng.integers(len(grid))))
            continue
        cumulated = np.cumsum(np.array(nearest, dtype=float))
        draws = rng.random(2 + math.floor(math.log(k))) * cumulated[-1]
        trials = [next(i for i, total in enumerate(cumulated) if total > draw) for draw in draws]
        left = [
            sum(min(n, distance(row, grid[t])) for n, row in zip(nearest, grid, strict=True)) for t in trials
        ]
        chosen.append(trials[left.index(min(left))])
    return [grid[c] for c in chosen]


@st.composite
def integer_problems(draw: Any) -> Problem:
    """Few different values, so that ties, duplicates and emptied clusters are common; or wide ones."""
    n = draw(st.integers(1, 24))
    d = draw(st.integers(1, 4))
    k = draw(st.integers(1, min(n, 6)))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    width = draw(st.sampled_from([1, 2, 5, 2**23]))
    grid = rng.integers(-width, width + 1, size=(n, d)).astype(float)
    start = rng.integers(-width, width + 1, size=(k, d)).astype(float)
    return grid, start, draw(st.sampled_from([1, 2, 3, 300]))


def ints(values: np.ndarray) -> Rows:
    return values.astype(int).tolist()


EMPTIED = np.array([[0.0], [1.0], [2.0], [10.0], [-8.0]]), np.ones((3, 1)), 1  # 10 and -8 are as far from 1
LONE = np.array([[0.0], [2.0], [100.0], [3.0]]), np.array([[1.0], [60.0], [1.0]]), 1  # 100 stays, 3 goes


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=integer_problems())
@example(problem=EMPTIED)
@example(problem=LONE)
def test_lloyd_is_its_definition(backend: str, problem: Problem) -> None:
    grid, start, max_iter = problem
    expected = plain_lloyd(ints(grid), ints(start), max_iter)
    labels, centers, passes = lloyd_of(backend)(grid, start, max_iter)
    assert (labels.tolist(), ints(centers), passes) == expected
    assert labels.dtype == np.int32
    assert centers.dtype == np.float64
    assert not np.signbit(centers[centers == 0]).any()


@given(problem=integer_problems(), scale=st.sampled_from([1.0, 0.1, 3e-7, 1e200]), seed=st.integers(0, 9))
def test_kmeans_is_its_definition(problem: Problem, scale: float, seed: int) -> None:
    X = problem[0] * scale
    k = len(problem[1])
    grid, origin, exponent = plain_grid(X.tolist())
    labels, centers, passes = plain_lloyd(grid, plain_plus_plus(grid, k, seed), 300)
    result = kmeans(X, k, seed=seed, backend="numpy")
    assert (result.labels.tolist(), result.iterations) == (labels, passes)
    np.testing.assert_array_equal(result.centroids, np.ldexp(np.array(centers, float), exponent) + origin)
    inertia = sum(distance(row, centers[label]) for row, label in zip(grid, labels, strict=True))
    assert result.inertia == math.ldexp(inertia, 2 * exponent) if scale < 1e100 else result.inertia >= 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_golden_values(case: dict[str, Any], backend: str) -> None:
    lloyd_of(backend)
    result = kmeans(case["X"], len(case["init"]), init=case["init"], backend=backend)
    assert result.labels.tolist() == case["labels"]
    assert result.iterations == case["iterations"]
    assert result.grid_bits == case["bits"]
    np.testing.assert_allclose(result.centroids, case["centroids"], rtol=1e-9)
    assert result.inertia == pytest.approx(case["inertia"], rel=1e-9)


def mixture(n: int, d: int, clusters: int, seed: int, spread: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(clusters, d)) * spread
    return centers[rng.integers(clusters, size=n)] + rng.normal(size=(n, d))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("n", "d", "k"), [(5003, 64, 40), (700, 16, 10), (333, 40, 17), (1000, 1, 5), (97, 128, 6), (64, 3, 64)]
)
def test_backends_and_threads_agree_bit_for_bit(n: int, d: int, k: int, backend: str) -> None:
    grid = np.random.default_rng(n).integers(-(2**21), 2**21, size=(n, d)).astype(float)
    expected = lloyd_numpy(grid, grid[:k], 6)
    for threads in (1, 2, 3, 7):
        labels, centers, passes = lloyd_of(backend, threads)(grid, grid[:k], 6)
        assert labels.tobytes() == expected[0].tobytes()
        assert centers.tobytes() == expected[1].tobytes()
        assert passes == expected[2]


def near_ties(points: int, half: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points whose scores for two centres a, -a differ by 4t, t in {-1, 0, 1}: float32 sees noise of 2^26."""
    rng = np.random.default_rng(11)
    u, v = rng.integers(-(2**21), 2**21, size=(2, half)).astype(float)
    v[0] = 1.0
    signs = rng.choice([-1.0, 1.0], size=(points, half))
    t = rng.integers(-1, 2, size=points).astype(float)
    grid = np.hstack((signs * u, signs * v))  # orthogonal to a = (v, -u)
    grid[:, 0] += t
    a = np.concatenate((v, -u))
    return grid, np.stack((a, -a)), np.where(t < 0, 1, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_near_tie_is_decided_exactly(backend: str) -> None:
    grid, start, expected = near_ties(200, 32)
    assert plain_labels(ints(grid), ints(start)) == expected.tolist()
    centers = lloyd_of(backend)(grid, start, 1)[1]
    sums = [grid[expected == cluster].mean(axis=0) for cluster in (0, 1)]
    np.testing.assert_array_equal(centers, np.rint(sums))


@pytest.mark.parametrize(
    ("d", "bits"), [(1, 24), (4, 24), (5, 23), (100, 21), (128, 21), (129, 21), (300, 20)]
)
def test_the_grid_is_as_fine_as_exact_sums_allow(d: int, bits: int) -> None:
    X = mixture(12, d, 2, seed=d)
    result = kmeans(X, 2, init=X[:2], backend="numpy")
    assert result.grid_bits == bits
    grid, _, _ = plain_grid(X.tolist())
    assert result.labels.tolist() == plain_lloyd(grid, grid[:2], 300)[0]


@pytest.mark.parametrize("scale", [5e-324, 1e-310, 1e-300, 1e300])
def test_any_scale_of_float64(scale: float) -> None:
    result = kmeans(np.array([[0.0], [1.0], [20.0], [22.0]]) * scale, 2, backend="numpy")
    assert len(set(result.labels[:2])) == 1
    assert len(set(result.labels[2:])) == 1
    assert result.labels[0] != result.labels[2]
    assert np.isfinite(result.centroids).all()


def test_tensors_and_other_types_are_the_same_points() -> None:
    X = mixture(60, 3, 3, seed=1).round(2).astype(np.float32)
    expected = kmeans(X, 3, backend="numpy")
    for same in (X.tolist(), torch.tensor(X, requires_grad=True), np.asfortranarray(X.astype(float))):
        assert kmeans(same, 3, backend="numpy").labels.tolist() == expected.labels.tolist()  # type: ignore[arg-type]
    grid = torch.arange(12.0).reshape(6, 2)
    labels, centers, _ = lloyd_torch(grid, grid[:2].numpy(), 300)
    assert isinstance(labels, torch.Tensor)
    assert centers.dtype == torch.float64


@pytest.mark.parametrize(
    ("X", "k", "settings", "words"),
    [
        ([[1.0, math.nan], [math.inf, 2.0]], 1, {}, r"2 values .* first at \(0, 1\)"),
        ([[1.0], [2.0]], 3, {}, "only 2 points"),
        ([[1.0], [2.0]], 0, {}, "k is 0"),
        ([[1.0], [2.0]], 1.5, {}, "integer"),
        ([1.0, 2.0], 1, {}, "1 dimensions"),
        ([[1j]], 1, {}, "complex128"),
        (np.array([[None]]), 1, {}, "object"),
        (np.zeros((2, 0)), 1, {}, "no features"),
        (np.zeros((0, 2)), 1, {}, "only 0 points"),
        ([[1.0], [2.0]], 2, {"init": [[1.0]]}, r"init has shape \(1, 1\).*\(2, 1\)"),
        ([[1.0], [2.0]], 1, {"init": [[math.nan]]}, "init has 1 values"),
        ([[1.0], [2.0]], 1, {"max_iter": 0}, "max_iter is 0"),
        ([[1.0], [2.0]], 1, {"backend": "nunpy"}, "'numpy'"),
        ([[1.7e308], [1.6e308]], 1, {}, "scale it down"),
    ],
)
def test_refusals(X: Any, k: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        kmeans(X, k, **settings)


def test_the_familiar_class() -> None:
    X = mixture(300, 5, 4, seed=7, spread=3.0)
    model = KMeansClustering(n_clusters=4, seed=2, backend="numpy")
    with pytest.raises(ValueError, match="call fit"):
        model.predict(X)
    labels = model.fit_predict(X)
    expected = kmeans(X, 4, seed=2, backend="numpy")
    assert labels.tolist() == expected.labels.tolist() == model.predict(X).tolist()
    assert model.cluster_centers_.tolist() == expected.centroids.tolist()
    assert (model.inertia_, model.n_iter_) == (expected.inertia, expected.iterations)
    assert model.predict(model.cluster_centers_).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="5 were fitted"):
        model.predict(X[:, :2])


@pytest.mark.parametrize("method", ["silhouette", "elbow"])
def test_suggest_k_finds_the_blobs(method: str) -> None:
    X = np.random.default_rng(0).normal(size=(2100, 2)) * 0.3
    X += np.array([[0, 0], [9, 0], [0, 9], [9, 9]])[np.arange(len(X)) % 4]
    suggestion = suggest_k(X, [7, 2, 3, 4, 5, 6, 4], method=method)
    assert suggestion.k == 4
    assert suggestion.warning is None
    assert list(suggestion.scores) == [2, 3, 4, 5, 6, 7]
    assert suggestion == suggest_k(X, range(2, 8), method=method)
    if method == "silhouette":
        from sklearn.metrics import silhouette_score

        expected = silhouette_score(X[:300], kmeans(X[:300], 3, seed=5, backend="numpy").labels)
        assert suggest_k(X[:300], [3, 2], seed=5).scores[3] == pytest.approx(expected, rel=1e-12)


def test_suggest_k_says_when_nothing_stands_out() -> None:
    noise = np.random.default_rng(0).normal(size=(400, 60))
    suggestion = suggest_k(noise, [4, 3, 5])
    assert suggestion.k == 3
    assert suggestion.warning is not None
    assert "nothing stands out" in suggestion.warning
    equal = suggest_k(np.ones((5, 2)), [2, 3, 5])
    assert (equal.k, equal.scores) == (2, {2: 0.0, 3: 0.0, 5: 0.0})
    assert suggest_k(np.ones((5, 2)), [2, 3], method="elbow").warning is not None
    with pytest.raises(ValueError, match="ks is empty"):
        suggest_k(noise, [])
    with pytest.raises(ValueError, match="'silhouette' or 'elbow'"):
        suggest_k(noise, [2], method="gap")


def test_window_features_are_roots_of_frequencies() -> None:
    features = window_features([0, 0, 1, 2, 2, 2, 2, 2, 1], context=4, vocabulary=4)
    root = math.sqrt(0.5)
    np.testing.assert_array_equal(features, [[root, 0.5, 0.5, 0.0], [0.0, 0.0, 1.0, 0.0]])
    for tokens, words in (([0, 1], "do not fill"), ([0, 1, 2, 9], "first at 3"), ([0.0] * 4, "float64")):
        with pytest.raises(ValueError, match=words):
            window_features(tokens, context=4, vocabulary=4)


def fitted(sizes: list[int], seed: int = 0) -> DataClustering:
    points = np.repeat(np.arange(len(sizes)) * 10.0, sizes)[:, None]
    return DataClustering(len(sizes), seed, backend="numpy").fit(points)


def test_batches_are_a_pure_function_of_seed_and_step() -> None:
    first, again, other = fitted([30, 50, 20]), fitted([30, 50, 20]), fitted([30, 50, 20], seed=1)
    for how in ("clustered", "stratified"):
        late = first.rows(9, 8, how)
        first.rows(3, 8, how)
        assert late.tolist() == again.rows(9, 8, how).tolist()
        assert late.tolist() != first.rows(10, 8, how).tolist()
        assert late.tolist() != other.rows(9, 8, how).tolist()
        assert late.dtype == np.int64


def test_a_clustered_batch_is_of_one_cluster_drawn_by_size() -> None:
    data = fitted([60, 30, 10])
    drawn = [data.rows(step, 6, "clustered") for step in range(900)]
    clusters = [set(data.labels[rows].tolist()) for rows in drawn]
    assert all(len(found) == 1 for found in clusters)
    assert all(len(set(rows.tolist())) == 6 for rows in drawn)
    shares = np.bincount([found.pop() for found in clusters], minlength=3) / 900
    np.testing.assert_allclose(shares, data.sizes / 100, atol=0.05)
    assert len(data.rows(0, 80, "clustered")) == 80  # more than any cluster has


@pytest.mark.thorough
@pytest.mark.parametrize("batch", [1, 7, 16, 100, 130])
def test_a_stratified_batch_has_each_cluster_share(batch: int) -> None:
    data = fitted([57, 30, 12, 1])
    quota = batch * data.sizes / data.sizes.sum()
    totals = np.zeros(4)
    uses = np.zeros(100)
    for step in range(600):
        rows = data.rows(step, batch, "stratified")
        counts = np.bincount(data.labels[rows], minlength=4)
        assert len(rows) == batch
        assert (counts >= np.floor(quota)).all()
        assert (counts <= np.ceil(quota)).all()
        if batch <= 100:
            assert len(set(rows.tolist())) == batch
        totals += counts
        np.add.at(uses, rows, 1)
    np.testing.assert_allclose(totals / 600, quota, atol=0.06)
    assert uses.min() > 0  # every row has its turn


def test_batches_refuse() -> None:
    data = fitted([4, 6])
    assert data.sizes.tolist() == np.bincount(data.labels).tolist()
    with pytest.raises(ValueError, match="'clustered' or 'stratified'"):
        data.rows(0, 4, "uniform")
    with pytest.raises(ValueError, match="batch_size is 0"):
        data.rows(0, 0, "stratified")
    with pytest.raises(ValueError, match="call fit"):
        DataClustering().rows(0, 4, "stratified")


def test_parameter_groups_by_each_feature_alone() -> None:
    """Depth is in the order: tensors that differ in nothing else split into an earlier and a later half."""
    two = ParameterClustering(2, backend="numpy")
    same = {f"w{i}": ((4, 4), 1.0) for i in range(4)}
    assert two.groups(same) == {"cluster0": ["w0", "w1"], "cluster1": ["w2", "w3"]}
    # two and four, where depth alone would make it three and three
    for first, second in (
        (((2, 32), 1.0), ((32, 2), 1.0)),
        (((4, 4), 1.0), ((4, 4), 1e-3)),
        (((4, 4), 1.0), ((8, 8), 1.0)),
    ):
        named = {f"w{i}": first if i < 2 else second for i in range(6)}
        assert two.groups(named) == {"cluster0": ["w0", "w1"], "cluster1": ["w2", "w3", "w4", "w5"]}
    zeros = {"a": ((4, 4), 0.0), "b": ((4, 4), 0.0)}
    assert ParameterClustering(1, backend="numpy").groups(zeros) == {"cluster0": ["a", "b"]}
    tensors = {"q": np.full((2, 8), -3.0), "v": torch.full((2, 8), 0.5)}
    sizes = {"q": ((2, 8), 3.0), "v": ((2, 8), 0.5)}
    assert two.groups(tensors) == two.groups(sizes) == {"cluster0": ["q"], "cluster1": ["v"]}


def test_parameter_groups_refuse() -> None:
    with pytest.raises(ValueError, match="2 tensors cannot make 6 clusters"):
        ParameterClustering().groups({"a": ((2, 2), 1.0), "b": ((2, 2), 1.0)})
    for value in (((0, 4), 1.0), np.array([1.0, math.nan])):
        with pytest.raises(ValueError, match="'bad'"):
            ParameterClustering(1).groups({"bad": value})


def test_without_scikit_learn_silhouettes_are_refused_and_elbows_are_not(monkeypatch):
    for module in ("sklearn", "sklearn.metrics"):
        monkeypatch.setitem(sys.modules, module, None)
    points = np.random.default_rng(0).normal(size=(40, 2))
    assert suggest_k(points, [2, 3, 4], method="elbow").k in (2, 3, 4)
    with pytest.raises(ImportError, match=r"pip install 'ebc-lab\[lowbit\]', or use method='elbow'"):
        suggest_k(points, [2, 3, 4])
