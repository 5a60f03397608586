"""Exact k-means, and what the lab clusters with it: windows of text into batches, tensors into groups.

The points are put on a grid of integers so coarse that every score and every sum stays below 2^53. float64 is
then exact in any order, and numpy, torch, C and a GPU return the same bits on any number of threads
(docs/lowbit.md). A near tie is decided by the numbers, never by rounding: the lowest index wins.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .backends import BackendUnavailableError, get_backend
from .backends.lloyd import Floats, Labels, lloyd_numpy, nearest, squared_distances
from .names import Familiar, Settings, Spellings, misnamed

if TYPE_CHECKING:
    import torch

BACKENDS = ("auto", "numpy", "torch", "c", "cpp", "cuda")
MOST_BITS = 24  # an integer of the grid is exact in float32, too
_SCORED_ROWS = 2000
_NOTHING_STANDS_OUT = 0.05  # silhouette
_BATCHES = 0x62617463  # keeps these draws apart from others of the same seed and step


@dataclass(frozen=True)
class KMeansResult:
    """`labels` (n,) int32 of the `centroids` (k, d) float64; `inertia` is the sum of squared distances.

    Both are in X's units. `iterations` counts passes, the last one included. `grid_bits`: X was resolved to
    2^-grid_bits of its largest distance from the middle of its box, or to half of that.
    """

    labels: Labels
    centroids: Floats
    inertia: float
    iterations: int
    grid_bits: int


@dataclass(frozen=True)
class SuggestedK:
    """`k` of the `scores` {k: score}; `warning` says why not to trust it, or is None."""

    k: int
    scores: dict[int, float]
    method: str
    warning: str | None


@dataclass(frozen=True)
class _Grid:
    """Integers G for values X of (n, d): X = origin + G 2^-shift, up to rounding, |G| <= 2^bits."""

    origin: Floats
    shift: int
    bits: int

    def integers(self, values: Floats) -> Floats:
        grid = values - self.origin
        if abs(self.shift) < 1000:
            grid *= 2.0**self.shift
        else:  # a power that float64 does not hold
            np.ldexp(grid, self.shift, out=grid)
        np.rint(grid, out=grid)
        return grid

    def values(self, integers: Floats) -> Floats:
        return self.origin + np.ldexp(integers, -self.shift)


def kmeans(
    X: ArrayLike | torch.Tensor,
    k: int,
    *,
    seed: int = 0,
    init: ArrayLike | torch.Tensor | None = None,
    max_iter: int = 300,
    backend: str = "auto",
) -> KMeansResult:
    """Do Lloyd's k-means of the rows of X (n, d), from k-means++ centres of `seed` or from `init` (k, d).

    Lloyd 1982; Arthur & Vassilvitskii 2007.

    The labels are always those of the centroids returned, also after `max_iter` passes. A cluster that runs
    empty takes the point farthest from its own centre. `init` is clipped to X's box. `backend` changes the
    time alone; `auto` is the compiled C if there is one, else numpy. ValueError: an X that is not 2-D, is
    complex, of objects, or with NaN or infinity; k outside [1, n]; an init of another shape.
    """
    return _cluster(_rows(X, "X"), k, seed, init, max_iter, backend)[0]


def _cluster(
    points: Floats,
    k: int,
    seed: int,
    init: ArrayLike | torch.Tensor | None = None,
    max_iter: int = 300,
    backend: str = "auto",
) -> tuple[KMeansResult, _Grid, Floats]:
    """Return the result, the grid and the centres (k, d) on it."""
    _check_counts(points, k, max_iter)
    low, high = _box(points, "X")
    grid = _grid_of(low, high)
    integers = grid.integers(points)
    if init is None:
        start = _plus_plus(integers, k, seed)
    else:
        start = _rows(init, "init")
        shape = (k, points.shape[1])
        if start.shape != shape:
            raise ValueError(f"init has shape {start.shape}: give k centres of X's width, {shape}.")
        _box(start, "init")
        start = grid.integers(np.clip(start, low, high))
    labels, centers, passes = _lloyd(integers, start, max_iter, backend)
    total = _total(squared_distances(integers, centers, labels))
    try:
        inertia = math.ldexp(float(total), -2 * grid.shift)
    except OverflowError:
        inertia = math.inf
    return KMeansResult(labels, grid.values(centers), inertia, passes, grid.bits), grid, centers


def _rows(values: ArrayLike | torch.Tensor, name: str) -> Floats:
    if hasattr(values, "detach"):  # a tensor, of any device and precision
        values = values.detach().cpu()
        if not values.is_complex():
            values = values.double()
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} holds {array.dtype} values: k-means needs real numbers.")
    if array.ndim != 2:
        raise ValueError(
            f"{name} has {array.ndim} dimensions: give rows of features; one feature is of shape (n, 1)."
        )
    return np.ascontiguousarray(array, dtype=np.float64)


def _check_counts(points: Floats, k: int, max_iter: int) -> None:
    n, d = points.shape
    operator.index(k)  # TypeError for a float
    if d < 1:
        raise ValueError("X has no features: give it one column at least.")
    if k < 1:
        raise ValueError(f"k is {k}: ask for one cluster at least.")
    if k > n:
        raise ValueError(f"k is {k}, but X has only {n} points: ask for no more clusters than points.")
    if max_iter < 1:
        raise ValueError(f"max_iter is {max_iter}: allow one pass at least.")


def _box(values: Floats, name: str) -> tuple[Floats, Floats]:
    """Return the least and largest value of each column; NaN and infinity show in them, at no extra pass."""
    low = values.min(axis=0)
    high = values.max(axis=0)
    if not np.isfinite(low).all() or not np.isfinite(high).all():
        wrong = np.argwhere(~np.isfinite(values))
        row, column = wrong[0].tolist()
        raise ValueError(
            f"{name} has {len(wrong)} values that are NaN or infinite, the first at ({row}, {column}): "
            "remove or replace them."
        )
    return low, high


def _grid_of(low: Floats, high: Floats) -> _Grid:
    with np.errstate(over="ignore", invalid="ignore"):
        origin = (low + high) / 2
        reach = float(np.maximum(high - origin, origin - low).max())
    if not math.isfinite(reach):
        raise ValueError("X is too large for float64: scale it down.")
    bits = min(MOST_BITS, (50 - (len(origin) - 1).bit_length()) // 2)
    exponent = math.frexp(reach)[1]
    return _Grid(origin, bits - exponent if reach else 0, bits)


def _plus_plus(grid: Floats, k: int, seed: int) -> Floats:
    """Choose centres (k, d) by k-means++: of 2 + floor(ln k) trials for each, the one that leaves least."""
    rng = np.random.default_rng(seed)
    squares = np.einsum("ij,ij->i", grid, grid)
    chosen = [int(rng.integers(len(grid)))]
    distances = _to_candidates(grid, squares, chosen)[0]
    while len(chosen) < k:
        sums = np.cumsum(distances)
        if sums[-1] == 0:  # every point lies on a centre
            chosen.append(int(rng.integers(len(grid))))
            continue
        # trials in proportion to the squared distance; the one that leaves the smallest sum is a centre
        draws = rng.random(2 + int(math.log(k))) * sums[-1]
        trials = np.searchsorted(sums, draws, side="right").tolist()
        left = np.minimum(distances, _to_candidates(grid, squares, trials))
        totals = [_total(row) for row in left]
        best = totals.index(min(totals))
        chosen.append(trials[best])
        distances = left[best]
    return grid[chosen]


def _to_candidates(grid: Floats, squares: Floats, candidates: list[int]) -> Floats:
    """Return squared distances, (candidates, n)."""
    return squares[candidates][:, None] - 2.0 * (grid[candidates] @ grid.T) + squares


def _total(integers: Floats) -> int:
    """Return the exact sum of integers below 2^53, which float64 could not hold."""
    whole = integers.astype(np.int64)
    return (int((whole >> 26).sum()) << 26) + int((whole & ((1 << 26) - 1)).sum())


def _lloyd(grid: Floats, start: Floats, max_iter: int, backend: str) -> tuple[Labels, Floats, int]:
    if wrong := misnamed([backend], BACKENDS, "k-means", "backend"):
        raise ValueError(wrong)
    try:
        kmeans_of = get_backend("c" if backend == "auto" else backend).kmeans
    except BackendUnavailableError:
        if backend != "auto":
            raise
        kmeans_of = lloyd_numpy
    return kmeans_of(grid, start, max_iter)


@dataclass(eq=False, repr=False)
class KMeansClustering(Settings):
    """`kmeans` behind the familiar names: `fit`, `predict`, `labels_`, `cluster_centers_`, `inertia_`."""

    SPELLINGS: ClassVar[Spellings] = {"random_state": lambda value: {"seed": 0 if value is None else value}}

    n_clusters: int = 10
    seed: int = 0
    max_iter: int = 300
    backend: str = "auto"
    _clusters: tuple[KMeansResult, _Grid, Floats] | None = field(default=None, init=False)

    def fit(self, X: ArrayLike | torch.Tensor) -> KMeansClustering:
        """Cluster the rows of X (n, d); ValueError as `kmeans`."""
        points = _rows(X, "X")
        self._clusters = _cluster(points, self.n_clusters, self.seed, None, self.max_iter, self.backend)
        return self

    def predict(self, X: ArrayLike | torch.Tensor) -> Labels:
        """Return the nearest centre of each row, (n,): for the rows of `fit` its `labels_`, bit for bit."""
        _, grid, centers = self._fitted()
        points = _rows(X, "X")
        features = centers.shape[1]
        if points.shape[1] != features:
            raise ValueError(f"X has {points.shape[1]} features, but {features} were fitted: give the same.")
        if len(points):
            _box(points, "X")
        return nearest(grid.integers(points), centers)

    def fit_predict(self, X: ArrayLike | torch.Tensor) -> Labels:
        return self.fit(X).labels_

    def _fitted(self) -> tuple[KMeansResult, _Grid, Floats]:
        if self._clusters is None:
            raise ValueError("nothing is clustered yet: call fit(X) first.")
        return self._clusters

    @property
    def labels_(self) -> Labels:
        return self._fitted()[0].labels

    @property
    def cluster_centers_(self) -> Floats:
        return self._fitted()[0].centroids

    @property
    def inertia_(self) -> float:
        return self._fitted()[0].inertia

    @property
    def n_iter_(self) -> int:
        return self._fitted()[0].iterations


def suggest_k(
    X: ArrayLike | torch.Tensor, ks: Iterable[int], method: str = "silhouette", seed: int = 0
) -> SuggestedK:
    """Return the k of `ks` that suits X (n, d) best, the smaller one on ties.

    `silhouette`: the largest mean silhouette (Rousseeuw 1987; scikit-learn's, of at most 2000 rows drawn with
    `seed`), 0 where there are not two clusters or no cluster has two rows. `elbow`: the point of the
    normalised curve (k, inertia) that lies farthest below the chord between its ends. ValueError: no k, a k
    that `kmeans` refuses, another method.
    """
    if method not in ("silhouette", "elbow"):
        raise ValueError(f"method is {method!r}: it is 'silhouette' or 'elbow'.")
    candidates = sorted(set(ks))
    if not candidates:
        raise ValueError("ks is empty: name the numbers of clusters to choose from.")
    points = _rows(X, "X")
    results = {k: _cluster(points, k, seed)[0] for k in candidates}
    if method == "elbow":
        scores, least = _elbows(results), 1e-9
    else:
        scores, least = _silhouettes(points, results, seed), _NOTHING_STANDS_OUT
    best = max(scores, key=scores.__getitem__)  # the first of equals
    warning = None
    if scores[best] < least:
        best = candidates[0]
        warning = (
            f"nothing stands out: no k of {candidates} has a {method} score of {least:g}; {best} is the least"
        )
    return SuggestedK(best, scores, method, warning)


def _silhouettes(points: Floats, results: Mapping[int, KMeansResult], seed: int) -> dict[int, float]:
    try:
        from sklearn.metrics import silhouette_score
    except ImportError:
        raise ImportError(
            "silhouettes need scikit-learn: pip install 'ebc-lab[lowbit]', or use method='elbow'."
        ) from None

    rows = np.arange(len(points))
    if len(rows) > _SCORED_ROWS:
        rows = np.sort(np.random.default_rng(seed).choice(len(rows), _SCORED_ROWS, replace=False))
    scores = {}
    for k, result in results.items():
        labels = result.labels[rows]
        scores[k] = 0.0
        if 2 <= len(np.unique(labels)) < len(rows):
            scores[k] = float(silhouette_score(points[rows], labels))
    return scores


def _elbows(results: Mapping[int, KMeansResult]) -> dict[int, float]:
    """Return how far each (k, inertia) lies below the chord, both scaled to [0, 1]."""
    inertias = {k: result.inertia for k, result in results.items()}
    ks = sorted(inertias)
    fall = inertias[ks[0]] - inertias[ks[-1]]
    scores = {}
    for k in ks:
        scores[k] = 0.0  # a straight line has no elbow
        if fall > 0:
            along = (k - ks[0]) / (ks[-1] - ks[0])
            height = (inertias[k] - inertias[ks[-1]]) / fall
            scores[k] = (1 - along - height) / math.sqrt(2)
    return scores


def window_features(tokens: ArrayLike | torch.Tensor, context: int, vocabulary: int) -> Floats:
    """Return (windows, vocabulary) roots of the tokens' frequencies in disjoint windows of `context` tokens.

    The rest of the text, shorter than a window, is left out. The distance between two rows is Hellinger's,
    up to a factor of the root of two. ValueError: no 1-D integers within [0, vocabulary), less than a window.
    """
    text = np.asarray(tokens)
    if text.ndim != 1 or text.dtype.kind not in "iu":
        raise ValueError(f"tokens are {text.dtype} of {text.ndim} dimensions: give a 1-D array of integers.")
    if context < 1 or len(text) < context:
        raise ValueError(f"{len(text)} tokens do not fill a window of {context}: give a longer text.")
    windows = len(text) // context
    text = text[: windows * context].astype(np.int64)
    wrong = np.flatnonzero((text < 0) | (text >= vocabulary))
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} tokens lie outside [0, {vocabulary}), the first at {wrong[0]}: "
            "give the size of the text's own vocabulary."
        )
    cells = np.repeat(np.arange(windows) * vocabulary, context) + text
    counts = np.bincount(cells, minlength=windows * vocabulary).reshape(windows, vocabulary)
    roots: Floats = np.sqrt(counts / context)
    return roots


class DataClustering(Familiar):
    """Batches of rows by cluster: which rows, as a pure function of (seed, step).

    `fit(features)` clusters the rows (windows of a text, or examples) into `n_clusters`; `labels` (n,) and
    `sizes` (n_clusters,) say what came out.
    """

    def __init__(self, n_clusters: int = 8, seed: int = 0, backend: str = "auto") -> None:
        self.n_clusters = n_clusters
        self.seed = seed
        self.backend = backend
        self.labels: Labels = np.empty(0, dtype=np.int32)
        self.sizes: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._members: list[NDArray[np.int64]] = []

    def fit(self, features: ArrayLike | torch.Tensor) -> DataClustering:
        """Cluster the rows of `features` (n, d); ValueError as `kmeans`."""
        points = _rows(features, "features")
        k = self.n_clusters
        self.labels = _cluster(points, k, self.seed, backend=self.backend)[0].labels
        self.sizes = np.bincount(self.labels, minlength=k)
        self._members = [np.flatnonzero(self.labels == cluster) for cluster in range(k)]
        return self

    def rows(self, step: int, batch_size: int, how: str) -> NDArray[np.int64]:
        """Draw (batch_size,) indices of rows; over all steps each row is drawn equally often.

        `clustered`: all of one cluster, drawn in proportion to its size. `stratified`: of each cluster its
        share, rounded up or down by systematic sampling. No row twice, unless its cluster is too small.
        """
        if not self._members:
            raise ValueError("nothing is clustered yet: call fit(features) first.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: ask for one row at least.")
        rng = np.random.default_rng([self.seed, step, _BATCHES])
        n = len(self.labels)
        if how == "clustered":
            shares = np.zeros(len(self.sizes), dtype=np.int64)
            shares[self.labels[rng.integers(n)]] = batch_size
        elif how == "stratified":
            # equidistant places on the rows laid out cluster by cluster
            places = (np.arange(batch_size) + rng.random()) * (n / batch_size)
            places = np.minimum(places, n - 0.5)  # the last one could be rounded to n
            clusters = np.searchsorted(np.cumsum(self.sizes), places, side="right")
            shares = np.bincount(clusters, minlength=len(self.sizes))
        else:
            raise ValueError(f"how is {how!r}: it is 'clustered' or 'stratified'.")
        drawn = [
            rng.choice(self._members[cluster], shares[cluster], replace=shares[cluster] > self.sizes[cluster])
            for cluster in np.flatnonzero(shares)
        ]
        return rng.permutation(np.concatenate(drawn))


@dataclass(eq=False, repr=False)
class ParameterClustering(Familiar):
    """Groups of a model's tensors that are alike in size, scale, shape and depth."""

    n_clusters: int = 6
    seed: int = 0
    backend: str = "auto"

    def groups(self, named: Mapping[str, Any]) -> dict[str, list[str]]:
        """Group {name: tensor or (shape, rms)}, in the model's order, into {`cluster0`, ...: names}.

        The features are ln numel, ln rms, ln rows/columns (columns = numel/rows: a vector is a column) and
        depth, the place in the model's order from 0 to 1, each standardised; one that is the same everywhere
        counts for nothing. A tensor of zeros has the rms of the smallest that is not. ValueError: fewer
        tensors than clusters, an empty one, NaN or infinity.
        """
        if not 1 <= self.n_clusters <= len(named):
            raise ValueError(
                f"{len(named)} tensors cannot make {self.n_clusters} clusters: ask for 1 to {len(named)}."
            )
        features = _tensor_features(named)
        spread = features.std(axis=0)
        spread[spread < 1e-12] = np.inf  # what is left of equal values is rounding
        features = (features - features.mean(axis=0)) / spread
        labels = _cluster(features, self.n_clusters, self.seed, backend=self.backend)[0].labels
        members: dict[int, list[str]] = {}
        for name, label in zip(named, labels.tolist(), strict=True):
            members.setdefault(label, []).append(name)
        return {f"cluster{index}": names for index, names in enumerate(members.values())}


def _tensor_features(named: Mapping[str, Any]) -> Floats:
    sizes = []
    scales = []
    for name, value in named.items():
        shape, rms = _shape_and_rms(value)
        numel = math.prod(shape)
        if numel < 1 or not math.isfinite(rms) or rms < 0:
            raise ValueError(
                f"tensor {name!r} of shape {tuple(shape)} has an rms of {rms}: give values that are finite."
            )
        rows = shape[0] if shape else 1
        sizes.append((math.log(numel), math.log(rows / (numel / rows))))
        scales.append(rms)
    least = min((rms for rms in scales if rms > 0), default=1.0)
    roots = np.log(np.maximum(scales, least))
    depth = np.linspace(0.0, 1.0, len(sizes))
    logs = np.array(sizes)
    return np.column_stack((logs[:, 0], roots, logs[:, 1], depth))


def _shape_and_rms(value: Any) -> tuple[tuple[int, ...], float]:
    if not hasattr(value, "shape"):
        shape, rms = value
        return tuple(shape), float(rms)
    if hasattr(value, "detach"):
        value = value.detach().cpu().double().numpy()
    array = np.asarray(value, dtype=np.float64)
    if array.size == 0:
        return array.shape, 0.0
    largest = float(np.abs(array).max())
    if largest == 0.0 or not math.isfinite(largest):
        return array.shape, largest
    return array.shape, largest * math.sqrt(float(np.mean(np.square(array / largest))))
