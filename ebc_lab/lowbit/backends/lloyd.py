"""Lloyd's passes of an exact k-means on a grid of integers, in numpy and in torch (docs/lowbit.md).

All scores and sums are integers below 2^53, so that float64 is exact in any order and the bits are the same
everywhere. The lowest index wins a tie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]
Labels = NDArray[np.int32]

_CHUNK = 1 << 20  # numbers of a temporary matrix


def lloyd_numpy(grid: ArrayLike, start: ArrayLike, max_iter: int) -> tuple[Labels, Floats, int]:
    """Return (labels (n,), centres (k, d), passes) of integers `grid` (n, d) from integer centres `start`."""
    points = np.ascontiguousarray(grid, dtype=np.float64)
    centers = np.array(start, dtype=np.float64)
    labels = np.full(len(points), -1, dtype=np.int32)
    sums = np.zeros_like(centers)
    for passes in range(1, max_iter + 1):
        new_labels = nearest(points, centers)
        moved = np.flatnonzero(new_labels != labels)
        if not len(moved):
            return labels, centers, passes
        # sums follow the points that changed their cluster, a part of them at a time
        for before in np.array_split(moved, 1 + moved.size * points.shape[1] // _CHUNK):
            _add_rows(sums, points, before, labels, -1)
            _add_rows(sums, points, before, new_labels, 1)
        labels = new_labels
        counts = np.bincount(labels, minlength=len(centers))
        centers = _centers(points, labels, centers, sums, counts)
    return nearest(points, centers), centers, max_iter  # the labels of these centres


def nearest(points: Floats, centers: Floats) -> Labels:
    """Return the nearest centre of each point by |c|^2 - 2 x.c, which orders as the distances do."""
    squares = np.einsum("ij,ij->i", centers, centers)
    doubled = -2.0 * centers.T
    nearest = np.empty(len(points), dtype=np.int32)
    rows = max(1, _CHUNK // len(centers))
    for first in range(0, len(points), rows):
        scores = points[first : first + rows] @ doubled
        scores += squares
        nearest[first : first + rows] = scores.argmin(axis=1)  # the first of equals
    return nearest


def _add_rows(sums: Floats, points: Floats, rows: NDArray[np.int64], labels: Labels, sign: int) -> None:
    """Add the rows of `points` to the sums of their clusters; sums of integers do not mind the order."""
    rows = rows[labels[rows] >= 0]
    if not len(rows):
        return
    rows = rows[np.argsort(labels[rows], kind="stable")]
    clusters, firsts = np.unique(labels[rows], return_index=True)
    sums[clusters] += sign * np.add.reduceat(points[rows], firsts, axis=0)


def _centers(
    points: Floats, labels: Labels, centers: Floats, sums: Floats, counts: NDArray[np.int64]
) -> Floats:
    """Return rint(sum / count); an empty cluster gets a point for this update, whose label stays."""
    if not counts.all():
        sums = sums.copy()
        counts = counts.copy()
        distances = squared_distances(points, centers, labels)
        for cluster, point in _points_for_empty(labels, distances, counts):
            sums[labels[point]] -= points[point]
            sums[cluster] += points[point]
    return np.rint(sums / counts[:, None]) + 0.0


def _points_for_empty(labels: Labels, distances: Floats, counts: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return (empty cluster, its point) in order: the farthest in a cluster of more than one.

    `counts` changes with them.
    """
    distances = distances.copy()
    pairs = []
    for cluster in np.flatnonzero(counts == 0).tolist():
        point = int(np.where(counts[labels] > 1, distances, -1.0).argmax())
        counts[labels[point]] -= 1
        counts[cluster] = 1
        distances[point] = -2.0  # alone now
        pairs.append((cluster, point))
    return pairs


def squared_distances(points: Floats, centers: Floats, labels: Labels) -> Floats:
    """Return the squared distance of each point to the centre of its label, (n,)."""
    distances = np.empty(len(points))
    rows = max(1, _CHUNK // points.shape[1])
    for first in range(0, len(points), rows):
        difference = points[first : first + rows] - centers[labels[first : first + rows]]
        distances[first : first + rows] = np.einsum("ij,ij->i", difference, difference)
    return distances


def lloyd_torch(
    grid: Any, start: Any, max_iter: int, device: str | torch.device = "cpu"
) -> tuple[Any, Any, int]:
    """Do `lloyd_numpy` on `device`: arrays for an array, tensors on the device for a tensor."""
    import torch

    is_tensor = isinstance(grid, torch.Tensor)
    with torch.no_grad():
        points = torch.as_tensor(grid).to(device, torch.float64).contiguous()
        centers = torch.as_tensor(start).to(device, torch.float64, copy=True)
        labels, centers, passes = _lloyd_of_tensors(points, centers, max_iter)
    labels = labels.int()
    if is_tensor:
        return labels, centers, passes
    return labels.cpu().numpy(), centers.cpu().numpy(), passes


def _lloyd_of_tensors(
    points: torch.Tensor, centers: torch.Tensor, max_iter: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    import torch

    labels = torch.full((len(points),), -1, dtype=torch.int64, device=points.device)
    sums = torch.zeros_like(centers)
    for passes in range(1, max_iter + 1):
        new_labels = _nearest_of_tensors(points, centers)
        moved = (new_labels != labels).nonzero()[:, 0]
        if not len(moved):
            return labels, centers, passes
        for rows in torch.split(moved, max(1, _CHUNK // points.shape[1])):
            values = points[rows]
            sums.index_add_(0, new_labels[rows], values)  # integers: atomic additions may come in any order
            if passes > 1:
                sums.index_add_(0, labels[rows], values, alpha=-1)
        labels = new_labels
        counts = torch.bincount(labels, minlength=len(centers))
        filled = sums
        if not bool(counts.all()):  # each empty cluster gets a point, chosen on the host
            filled = sums.clone()
            own, host_counts = labels.int().cpu().numpy(), counts.cpu().numpy()
            distances = (points - centers[labels]).square().sum(1).cpu().numpy()
            for cluster, point in _points_for_empty(own, distances, host_counts):
                filled[int(own[point])] -= points[point]
                filled[cluster] += points[point]
            counts = torch.from_numpy(host_counts).to(counts.device)
        centers = torch.round(filled / counts[:, None].double()) + 0.0
    return _nearest_of_tensors(points, centers), centers, max_iter


def _nearest_of_tensors(points: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    import torch

    squares = (centers * centers).sum(1)
    nearest = []
    for rows in torch.split(points, max(1, _CHUNK // len(centers))):
        scores = torch.addmm(squares, rows, centers.T, alpha=-2)
        nearest.append(scores.argmin(1))  # documented: the first of equals
    return torch.cat(nearest)
