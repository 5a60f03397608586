"""Self-organised criticality: a pile of stress on the splats that topples and places new ones (docs/ebm.md).

A pile of Olami, Feder & Christensen 1992 on the graph of the splats' nearest neighbours. A splat gathers
stress when its states lie beyond the shell in which a bump of its width holds them; at the threshold it
topples onto the neighbours, and the states that drove it may become a splat of their own. Each toppling loses
a part of the stress, so an avalanche ends. Whether the sizes of avalanches follow a power law, the mark of
criticality, is for their statistics to tell: `power_law`.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from .sphere import distance, normalise
from .starts import counts_of, totals
from .store import SplatStore, Wins
from .vmf import mean_cosine

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

LEAK: Final = 0.99  # of a splat's stress, each win
MERGE: Final = 0.1  # radians: members this close to their splat make it wider instead of a new one
SHARE: Final = (0.05, 0.5)  # limits of the part of its parent's weight that a new splat takes
NOBODY: Final = -1  # the winner of a state whose splat is gone

AVALANCHES: Final = 50  # below which no law is fitted
REJECTED: Final = 0.1  # p of the likelihood-ratio test under which the law is given up
DECADE: Final = 10  # the least ratio of the largest avalanche to the smallest of the law
STEEPEST: Final = 30.0


# -- the pile ------------------------------------------------------------------------------------------------


def novelty(angle: Tensor, kappa: float | Tensor, n: int) -> Tensor:
    """Measure how far a state lies beyond its splat's shell, as a share of the shell's angle.

    max(0, angle / arccos a(kappa) - 1 - 2 / sqrt(2 (n - 1))), angles in radians, any shape; kappa per degree
    of freedom. The angles of a bump's own states differ from arccos a(kappa) by a share of
    1 / sqrt(2 (n - 1)): two standard deviations are no novelty.
    """
    width = torch.arccos(mean_cosine(torch.as_tensor(kappa, dtype=angle.dtype, device=angle.device)))
    return (angle / width - 1 - 2 / math.sqrt(2 * (n - 1))).clamp_min(0)


def topple(
    stress: Tensor, neighbours: Tensor, threshold: float = 2.0, conserved: float = 0.8
) -> tuple[Tensor, Tensor, list[int]]:
    """Let a pile come to rest: stress (N,), neighbours (N, d) -> stress, topplings (N,) int64, sweeps.

    All at or over the threshold at once give `conserved` of their stress, in equal parts, to their neighbours
    and fall to 0; again until none is left. `sweeps` counts the splats of each round. A toppling loses at
    least (1 - conserved) threshold, so there are at most sum(stress) / ((1 - conserved) threshold) of them.
    ValueError where that is no bound: conserved outside [0, 1), threshold not over 0, stress that is
    negative or not finite.
    """
    check_pile(threshold, conserved)
    if not bool((stress.isfinite() & (stress >= 0)).all()):
        raise ValueError(
            "the stress of a splat must be finite and not negative: look for states that are not."
        )
    stress, topplings, sweeps = stress.clone(), torch.zeros_like(stress, dtype=torch.int64), []
    part = conserved / max(1, neighbours.shape[1])
    while bool((over := stress >= threshold).any()):
        rows = over.nonzero().squeeze(1)
        # all at once: what they give is taken before any of them receives
        passed_on = (part * stress[rows]).unsqueeze(1).expand(-1, neighbours.shape[1])
        stress[rows] = 0
        stress.index_add_(0, neighbours[rows].flatten(), passed_on.flatten())
        topplings[rows] += 1
        sweeps.append(len(rows))
    return stress, topplings, sweeps


def check_pile(threshold: float, conserved: float) -> None:
    """Raise ValueError for a pile that would not come to rest."""
    if not 0 <= conserved < 1:
        raise ValueError(
            f"a pile comes to rest only if it loses stress: conserved must lie in [0, 1), not {conserved}."
        )
    if not 0 < threshold < math.inf:
        raise ValueError(f"the threshold of a pile must be over 0 and finite, not {threshold}.")


@torch.no_grad()
def drive(store: SplatStore, wins: Wins) -> None:
    """Add the novelty of each state to the stress of the splat that won it, after a leak for each win.

    stress_k <- 0.99^wins stress_k + sum of novelty: at threshold 2 a splat topples whose states lie 2% too
    far out on average, at any number of splats or states a step.
    """
    new = novelty(wins.angle, store.width()[wins.winner], store.n)
    counts = counts_of(wins.winner, store.capacity)
    store.stress.mul_(LEAK ** counts.to(store.stress)).add_(totals(wins.winner, new, store.capacity))


class HistoryBuffer(nn.Module):
    """The latest `capacity` states with their winners and angles: the newest takes the oldest's place.

    `winners` is -1 where there is no state yet, or where its splat has moved away.
    """

    states: Tensor
    winners: Tensor
    angles: Tensor
    count: Tensor
    position: Tensor

    def __init__(self, capacity: int, n: int) -> None:
        super().__init__()
        if capacity < 1:
            raise ValueError(f"a history needs room for a state, not {capacity}.")
        self.capacity = capacity
        self.register_buffer("states", torch.zeros(capacity, n))
        self.register_buffer("winners", torch.full((capacity,), NOBODY))
        self.register_buffer("angles", torch.zeros(capacity))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("position", torch.tensor(0))

    @torch.no_grad()
    def add(self, states: Tensor, wins: Wins) -> None:
        """Keep states (M, n) and who won them; of more than `capacity`, the last."""
        states, winner, angle = (values[-self.capacity :] for values in (states, *wins))
        places = (self.position + torch.arange(len(states), device=self.position.device)) % self.capacity
        self.states.index_copy_(0, places, states.detach().to(self.states.dtype))
        self.winners.index_copy_(0, places, winner)
        self.angles.index_copy_(0, places, angle.to(self.angles.dtype))
        self.position.add_(len(states)).remainder_(self.capacity)
        self.count.add_(len(states)).clamp_(max=self.capacity)

    @torch.no_grad()
    def forget(self, rows: Tensor) -> None:
        """Leave the states of splats whose place (m,) is used anew without a winner."""
        self.winners.masked_fill_(torch.isin(self.winners, rows), NOBODY)


class Event(NamedTuple):
    """The outcome of one check.

    `rows_changed`: places used anew, int64 (m,), whose optimizer state and copies are stale.
    `consolidations`: new splats and widened ones. `topplings`: the size of the avalanche. `sweeps`: the
    splats of each round.
    """

    rows_changed: Tensor
    consolidations: int
    topplings: int
    sweeps: list[int]


class Pile(nn.Module):
    """The pile of a store in n dimensions: the states it remembers, and the sizes of its avalanches so far.

    Call `buffer.add` and `drive` after each step's `store.observe`, `check` every 50 steps, and
    `buffer.forget` with the rows that a revival moved. ValueError for what `topple` refuses.
    """

    def __init__(
        self,
        n: int,
        capacity: int = 8192,
        threshold: float = 2.0,
        conserved: float = 0.8,
        neighbours: int = 4,
    ) -> None:
        super().__init__()
        check_pile(threshold, conserved)
        self.threshold, self.conserved, self.neighbours = threshold, conserved, neighbours
        self.buffer = HistoryBuffer(capacity, n)
        self.sizes: list[int] = []

    @torch.no_grad()
    def check(self, store: SplatStore, limit: int) -> Event:
        """Let the pile come to rest and consolidate each splat that toppled, in the order of their rows.

        `limit` is the number of places the curriculum has opened.
        """
        rows = store.rows
        stress = store.stress[rows].double().cpu()
        if not bool((stress >= self.threshold).any()):  # no graph is needed
            return Event(rows[:0], 0, 0, [])
        graph = _graph(store, rows, self.neighbours).cpu()
        stress, topplings, sweeps = topple(stress, graph, self.threshold, self.conserved)
        store.stress[rows] = stress.to(store.stress)
        changed: list[int] = []
        consolidations = 0
        for parent in rows.cpu()[topplings > 0].tolist():
            if parent not in changed:
                consolidations += self._consolidate(store, parent, limit, changed)
        self.sizes.append(int(topplings.sum()))
        rows_changed = torch.tensor(changed, dtype=torch.int64, device=rows.device)
        return Event(rows_changed, consolidations, self.sizes[-1], sweeps)

    def _consolidate(self, store: SplatStore, parent: int, limit: int, changed: list[int]) -> bool:
        """Make a splat of the far states `parent` won, or widen `parent` to all it won; tell whether."""
        won = (self.buffer.winners == parent).nonzero().squeeze(1)
        far = won[novelty(self.buffer.angles[won], store.width()[parent], store.n) > 0]
        if len(far) < 2:
            return False
        # close to its splat, the members' mean makes that one wider
        mean = normalise(self.buffer.states[far]).mean(0)
        centre, home = normalise(mean), normalise(store.mu[parent])
        if float(distance(centre, home)) < MERGE:
            resultant = (normalise(self.buffer.states[won]) @ home).mean()
            store.set_resultant(torch.tensor([parent], device=won.device), resultant)
            return True
        row = _room(store, len(far), limit, [parent, *changed])
        if row is None:
            return False
        # else a splat of their own, which takes its share of the parent's weight
        share = min(max(len(far) / len(won), SHARE[0]), SHARE[1])
        self._split(store, parent, row, share, mean)
        self.buffer.winners[far] = row
        self.buffer.angles[far] = distance(self.buffer.states[far], centre).to(self.buffer.angles)
        changed.append(row)
        return True

    def _split(self, store: SplatStore, parent: int, row: int, share: float, mean: Tensor) -> None:
        """Put a splat in `row` at the mean of its members, with its share of the parent's weight and wins."""
        rows = torch.tensor([row], device=mean.device)
        old = torch.tensor([parent], device=mean.device)
        self.buffer.forget(rows)
        weight, frequency = store.weights()[old].clone(), store.frequency[old].clone()
        store.place(rows, mean.unsqueeze(0), share * weight, None, share * frequency)
        store.set_resultant(rows, torch.linalg.vector_norm(mean))
        store.weigh(old, (1 - share) * weight)
        store.frequency[old] = (1 - share) * frequency

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return the sizes of the avalanches, int64."""
        return {"sizes": torch.tensor(self.sizes, dtype=torch.int64)}

    def set_extra_state(self, state: Any) -> None:
        self.sizes = cast(dict[str, Tensor], state)["sizes"].tolist()


def _graph(store: SplatStore, rows: Tensor, neighbours: int) -> Tensor:
    """Find the nearest other splats of each of rows (N,), as places in `rows`: (N, d), d <= neighbours."""
    count = min(neighbours + 1, len(rows))
    nearest = store.nearest(store.directions()[rows], count)
    itself = (nearest == rows.unsqueeze(1)).long()
    others = nearest.gather(1, itself.argsort(dim=1, stable=True))[:, : count - 1]
    places = torch.empty(store.capacity, dtype=torch.int64, device=rows.device)
    places[rows] = torch.arange(len(rows), device=rows.device)
    return places[others]


def _room(store: SplatStore, members: int, limit: int, spared: list[int]) -> int | None:
    """Find a free place within the limit, else the least frequent splat's if it is rarer than the members.

    Its weight and wins go to its nearest neighbour. None where every other splat is more frequent.
    """
    free = (~store.active[:limit]).nonzero()
    if len(free):
        return int(free[0])
    frequency = store.frequency.masked_fill(~store.active, math.inf)
    frequency[spared] = math.inf
    row = frequency.argmin()
    if not float(frequency[row]) < members:
        return None
    directions = store.directions()
    cosine = (directions @ directions[row]).masked_fill(~store.active, -math.inf)
    cosine[row] = -math.inf
    heir = cosine.argmax().unsqueeze(0)
    weights = store.weights()
    store.weigh(heir, weights[heir] + weights[row])
    store.frequency[heir] += store.frequency[row]
    return int(row)


# -- the law -------------------------------------------------------------------------------------------------


class PowerLaw(NamedTuple):
    """A power law p(s) ~ s^-alpha over the sizes s >= xmin, beside a log-normal on the same sizes.

    `log_likelihood_ratio` is over 0 where the power law fits better, `p` the chance of a ratio this far from
    0 if neither did (Vuong's test). `critical`: the power law is not rejected and spans a decade or more.
    """

    alpha: float
    xmin: int
    log_likelihood_ratio: float
    p: float
    critical: bool


def power_law(sizes: list[int] | Tensor) -> PowerLaw | None:
    """Fit avalanche sizes by maximum likelihood; None for fewer than 50 avalanches.

    The discrete law of Clauset, Shalizi & Newman, arXiv:0706.1062, xmin by the least Kolmogorov-Smirnov
    distance among those that keep at least half of the avalanches, and 50: a law of a few extremes is no law
    of the pile. The rival is a log-normal rounded to integers and cut at xmin. ValueError for sizes under 1.
    """
    data = np.sort(np.asarray(sizes, dtype=np.int64))
    if len(data) and data[0] < 1:
        raise ValueError(
            f"an avalanche has one toppling or more, not {data[0]}: leave out the checks without one."
        )
    if len(data) < AVALANCHES:
        return None
    fewest = max(AVALANCHES, len(data) // 2)
    starts = [int(x) for x in np.unique(data) if np.count_nonzero(data >= x) >= fewest]
    fits = [_fitted_power(data[data >= xmin], xmin) for xmin in starts]
    _, alpha, xmin = min(fits)
    values, counts = np.unique(data[data >= xmin], return_counts=True)
    ratio, p = _vuong(_power_logs(values, alpha, xmin) - _lognormal_logs(values, counts, xmin), counts)
    wide = bool(values[-1] >= DECADE * xmin) and alpha < STEEPEST - 1
    return PowerLaw(alpha, xmin, ratio, p, wide and not (ratio < 0 and p < REJECTED))


def _power_logs(values: Integers, alpha: float, xmin: int) -> Floats:
    """Return ln p of each value under the power law from xmin on."""
    from scipy.special import zeta

    return cast(Floats, -alpha * np.log(values) - np.log(zeta(alpha, xmin)))


def _fitted_power(tail: Integers, xmin: int) -> tuple[float, float, int]:
    """Return the Kolmogorov-Smirnov distance of the tail's likeliest power law, its exponent, and xmin."""
    from scipy.optimize import minimize_scalar
    from scipy.special import zeta

    values, counts = np.unique(tail, return_counts=True)

    def loss(alpha: float) -> float:
        return -float(counts @ _power_logs(values, alpha, xmin))

    alpha = float(minimize_scalar(loss, bounds=(1.0001, STEEPEST), method="bounded").x)
    above = zeta(alpha, values + 1.0) / zeta(alpha, xmin)
    return float(np.abs(np.cumsum(counts) / len(tail) - (1 - above)).max()), alpha, xmin


def _lognormal_logs(values: Integers, counts: Integers, xmin: int) -> Floats:
    """Return ln p of each value under the likeliest log-normal, rounded to integers and cut at xmin."""
    from scipy.optimize import minimize

    logs = np.log(values)
    mean = float(counts @ logs / counts.sum())
    spread = math.sqrt(float(counts @ (logs - mean) ** 2 / counts.sum())) + 1e-3

    def loss(place: Floats) -> float:
        nats = -float(counts @ _lognormal_at(values, xmin, place))
        return nats if math.isfinite(nats) else 1e300

    starts = ([mean, math.log(spread)], [mean - 10 * spread, math.log(4 * spread)])
    options = {"maxiter": 2000, "xatol": 1e-6, "fatol": 1e-8}
    fits = [minimize(loss, start, method="Nelder-Mead", options=options) for start in starts]
    return _lognormal_at(values, xmin, min(fits, key=lambda fit: float(fit.fun)).x)


def _lognormal_at(values: Integers, xmin: int, place: Floats) -> Floats:
    from scipy.special import log_ndtr

    mean, sigma = place[0], math.exp(min(float(place[1]), 50.0))
    low, high = (np.log(values - 0.5) - mean) / sigma, (np.log(values + 0.5) - mean) / sigma
    low, high = np.where(low > 0, -high, low), np.where(low > 0, -low, high)  # in the tail that is not near 1
    inside = log_ndtr(high)
    inside = inside + np.log1p(-np.exp(np.minimum(log_ndtr(low) - inside, -1e-300)))
    return cast(Floats, inside - log_ndtr(-(math.log(xmin - 0.5) - mean) / sigma))


def _vuong(differences: Floats, counts: Integers) -> tuple[float, float]:
    """Return the sum of log-likelihood differences and its two-sided p, by their own spread (Vuong 1989)."""
    total = int(counts.sum())
    ratio = float(counts @ differences)
    variance = float(counts @ (differences - ratio / total) ** 2) / total
    if variance <= 1e-18:  # the two laws are the same on these sizes
        return ratio, 1.0
    return ratio, math.erfc(abs(ratio) / math.sqrt(2 * total * variance))
