"""Splats to start with: how many at a step, and where k-means puts them among the states (docs/ebm.md).

Sums over states are added as integers: they have the same bits in any order, on any device.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor

from .index import first_largest, rows_at_once
from .sphere import normalise

PHASES: Final = (1, 6, 10)  # tenths of the splats, in each third of the steps
FEWEST: Final = 16
TOKENS_EACH: Final = 20  # of the training text, at least, for one splat
UNITS: Final = 2.0**32  # to the integer in which sums are added


def phase_at(step: int, steps: int) -> int:
    """Return which third of the steps a step is in: 0, 1 or 2."""
    return int(step >= steps // 3) + int(step >= 2 * steps // 3)


def splats_at(step: int, steps: int, most: int, tokens: int) -> int:
    """Return the splats in use at a step: 0.1, 0.6 and 1 of them in the thirds of the steps, at least 16.

    `most` are allowed, and no more than one for 20 of the `tokens` of training text.
    """
    phase = phase_at(step, steps)
    return min(most, max(FEWEST, min(most, tokens // TOKENS_EACH) * PHASES[phase] // 10))


def spherical_kmeans(
    states: Tensor, k: int, rng: np.random.Generator, rounds: int = 4
) -> tuple[Tensor, Tensor]:
    """Find centres (k, n), unit vectors, and the centre of each state, int64 (M,), by a few rounds.

    Dhillon & Modha 2001.

    Starts from k of the states (M, n), drawn without replacement. A centre that nobody is near moves to the
    state farthest from its own. ValueError for k outside 1 to M.
    """
    if not 1 <= k <= len(states):
        raise ValueError(f"{k} centres were asked of {len(states)} states: ask for 1 to {len(states)}.")
    with torch.no_grad():
        points = normalise(states)
        centres = points[torch.from_numpy(rng.choice(len(points), k, replace=False)).to(points.device)]
        for _ in range(rounds):
            cosine, labels = closest(points, centres)
            sums = totals(labels, points, k)
            empty = (sums == 0).all(dim=1)  # centres that nobody is near
            farthest = cosine.argsort(stable=True)[: int(empty.sum())]
            centres = normalise(sums.to(points.dtype))
            centres[empty] = points[farthest]
        return centres, closest(points, centres)[1]


def closest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest cosine of each point with the centres, and whose it is: (M,) each."""
    cosines, labels = [], []
    with torch.autocast(points.device.type, enabled=False):
        for part in torch.split(points, rows_at_once(len(centres))):
            values = part @ centres.T
            best = first_largest(values)
            cosines.append(values.gather(1, best.unsqueeze(1)).squeeze(1))
            labels.append(best)
    return torch.cat(cosines), torch.cat(labels)


def totals(winner: Tensor, values: Tensor, places: int) -> Tensor:
    """Add up values (M,) or (M, n) over the states of each place, float64 (places,) or (places, n).

    Added as integers in units of 2^-32, so that the order of the states changes no bit.
    """
    counted = (values.double() * UNITS).round().long()
    sums = torch.zeros((places, *values.shape[1:]), dtype=torch.int64, device=values.device)
    return sums.index_add_(0, winner, counted).double() / UNITS


def counts_of(winner: Tensor, places: int) -> Tensor:
    """Count the states (M,) of each place, int64 (places,)."""
    counts = torch.zeros(places, dtype=torch.int64, device=winner.device)
    return counts.scatter_add_(0, winner, torch.ones_like(winner))
