"""The splats of the energy: directions that are trained, widths and weights by statistics (docs/ebm.md).

* Places are allocated once and never change shape; `active` marks those in use.
* `mu` is normalised where it is read. It is the only parameter, unless `adapt="gradient"` trains ln alpha and
  ln kappa as well.
* After each step a splat wins the states it is nearest to in angle: frequency and weight count them, and the
  concentration follows from their mean cosine. By responsibility, broad splats would take all.
* Splats that hardly win move to states nobody is near: an encoder that is trained outruns them otherwise.
* Approximate search takes candidates from where the splats were when the index was built; they are ranked
  anew where the splats are now.

Sums over states have the same bits in any order, on any device (`totals`).
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from . import vmf
from .index import NeighbourIndex, best_logits, check_kind, exact_search, largest, rows_at_once
from .sphere import distance, normalise
from .starts import closest, counts_of, spherical_kmeans, totals
from .vmf import concentration_of, mean_cosine

ADAPT: Final = ("statistics", "gradient")
KEEP: Final = 0.99  # of a splat's frequency, each step
RESULTANT_KEEP: Final = 0.95  # of its mean cosine, each win
DEAD: Final = 0.1  # of a fair share of the states
TELLING: Final = 4  # states a splat below which a count of none does not show that a splat is dead
FIRST_KAPPA: Final = 10.0
FIRST_ALPHA: Final = 1.0

COVERED_OVER: Final = 20  # states a splat: the latest that `coverage` looks at


class Wins(NamedTuple):
    """The splat nearest to each state, int64 (M,), and the angle between them in radians (M,)."""

    winner: Tensor
    angle: Tensor


class Gathered(NamedTuple):
    """The splats chosen for each state: mu (M, K, n); log_pi, kappa, log_peak (M, K), log_peak in float64."""

    mu: Tensor
    log_pi: Tensor
    kappa: Tensor
    log_peak: Tensor


# -- the store -----------------------------------------------------------------------------------------------


class SplatStore(nn.Module):
    """`capacity` places for splats in n dimensions; `index` and `neighbours` say how the nearest are found.

    kappa is held within [kappa_min, kappa_max], per degree of freedom. `kappa_divisor`, 1 unless a curriculum
    sets it, divides what `kappa()` gives. ValueError for limits out of order and unknown names.
    """

    mu: nn.Parameter
    active: Tensor
    alpha: Tensor
    concentration: Tensor
    frequency: Tensor
    age: Tensor
    resultant: Tensor
    stress: Tensor
    seen: Tensor
    last_won: Tensor
    rows: Tensor

    def __init__(
        self,
        capacity: int,
        n: int,
        index: str = "exact",
        neighbours: int = 32,
        kappa_min: float = 1.0,
        kappa_max: float = 50.0,
        adapt: str = "statistics",
    ) -> None:
        super().__init__()
        if capacity < 1 or neighbours < 1:
            raise ValueError(f"a store needs places and neighbours, not {capacity} and {neighbours}.")
        if n < 2:
            raise ValueError(f"a sphere needs n >= 2 dimensions around it, not {n}.")
        if not 0 < kappa_min <= kappa_max < math.inf:
            limits = f"{kappa_min} and {kappa_max}"
            raise ValueError(f"the limits of kappa must be over 0 and in order, not {limits}.")
        if adapt not in ADAPT:
            raise ValueError(f"store.adapt {adapt!r} is unknown: choose one of {', '.join(ADAPT)}.")
        NeighbourIndex(index)  # refuses now what it would refuse at the first search
        self.capacity, self.n, self.neighbours = capacity, n, neighbours
        self.kind = check_kind(index)
        self.kappa_min, self.kappa_max, self.adapt = kappa_min, kappa_max, adapt
        self.kappa_divisor = 1.0
        self._index: NeighbourIndex | None = None
        self._rows = torch.empty(0, dtype=torch.int64)  # the place of each point of the index
        self._peak: tuple[Tensor, Tensor] | None = None  # concentrations and their log_peak
        first = min(max(FIRST_KAPPA, kappa_min), kappa_max)
        self.mu = nn.Parameter(torch.eye(n)[torch.arange(capacity) % n])
        if adapt == "gradient":
            self.log_alpha = nn.Parameter(torch.zeros(capacity))
            self.log_kappa = nn.Parameter(torch.full((capacity,), math.log(first)))
        self.register_buffer("active", torch.zeros(capacity, dtype=torch.bool))
        self.register_buffer("alpha", torch.zeros(capacity))
        self.register_buffer("concentration", torch.full((capacity,), first))
        self.register_buffer("frequency", torch.zeros(capacity))
        self.register_buffer("age", torch.zeros_like(self.active, dtype=torch.int64))
        self.register_buffer("resultant", mean_cosine(self.concentration))
        self.register_buffer("stress", torch.zeros(capacity))
        self.register_buffer("seen", torch.tensor(0))  # states observed so far
        self.register_buffer("last_won", torch.zeros_like(self.age))  # `seen` after its last win
        self.register_buffer("rows", torch.empty(0, dtype=torch.int64), persistent=False)  # of `active`

    def __len__(self) -> int:
        return len(self.rows)

    def check_filled(self) -> None:
        """Raise ValueError where no splat is in use. Nothing is read from the device for it."""
        if len(self) == 0:
            raise ValueError(
                "the store has no splats yet: first call `model.store.grow(states, count, rng)`, with "
                "`states, _ = model.encode(tokens)` and a numpy Generator, or `model.store.add(directions)`."
            )

    def extra_repr(self) -> str:
        return f"{len(self)} of {self.capacity} places, n={self.n}, index={self.kind}, adapt={self.adapt}"

    # -- what the energy reads -------------------------------------------------------------------------------

    def directions(self) -> Tensor:
        """Return mu with unit rows (capacity, n), also where no splat is; gradients pass."""
        return normalise(self.mu)

    def width(self) -> Tensor:
        """Return kappa within its limits (capacity,), before `kappa_divisor`: how wide the states lie."""
        if self.adapt == "statistics":
            return self.concentration.clamp(self.kappa_min, self.kappa_max)
        return self.log_kappa.clamp(math.log(self.kappa_min), math.log(self.kappa_max)).exp()

    def kappa(self) -> Tensor:
        """Return the concentrations per degree of freedom that the energy uses, width / kappa_divisor."""
        return self.width() if self.kappa_divisor == 1 else self.width() / self.kappa_divisor

    def log_pi(self) -> Tensor:
        """Return ln of each splat's share of alpha among the active ones (capacity,); -inf where none is.

        Every energy, score and logit reads it: ValueError while the store is empty, where shares are 0 / 0.
        """
        self.check_filled()
        if self.adapt == "gradient":
            return self.log_alpha.masked_fill(~self.active, -math.inf).log_softmax(0)
        weights = torch.where(self.active, self.alpha, 0.0)
        return torch.log(weights / weights.sum())

    def log_peak(self) -> Tensor:
        """Return ln of each splat's density at its own mu, float64 (capacity,), at `kappa()`.

        A step reads it many times between two changes of kappa: the latest answer is kept.
        """
        kappa = self.kappa()
        if self.adapt == "gradient" or kappa.is_cuda:  # a kept answer has no tangent; a GPU would wait for it
            return vmf.log_peak(self.n, (self.n - 1) * kappa)
        if self._peak is None or not torch.equal(self._peak[0], kappa):
            self._peak = kappa, vmf.log_peak(self.n, (self.n - 1) * kappa)
        return self._peak[1]

    def gather(self, indices: Tensor) -> Gathered:
        """Gather the splats of indices (M, K), differentiable in whatever is trained."""
        mu = functional.embedding(indices, self.directions())
        return Gathered(mu, self.log_pi()[indices], self.kappa()[indices], self.log_peak()[indices])

    # -- search ----------------------------------------------------------------------------------------------

    def nearest(self, x: Tensor, k: int) -> Tensor:
        """Find the k active splats with the largest mu.x for each x (M, n), falling: int64 (M, k).

        ValueError where fewer than k are active. An approximate index may miss some.
        """
        self.check_filled()
        if not 1 <= k <= len(self):
            raise ValueError(f"{k} neighbours were asked of {len(self)} splats: ask for 1 to {len(self)}.")
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            directions, x = self.directions(), x.to(self.mu.dtype)
            if self._approximate(k):
                return self._rank(x, directions, None, None, k)[1]
            return self.rows[exact_search(x, directions[self.rows], k)]

    def best(
        self, x: Tensor, k: int, kappa: Tensor | None = None, log_peak: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Find the k splats of the largest logits for each x (M, n), int64 (M, k), and the others' mean mass.

        The logit is ln pi + log_peak - kappa (n - 1) (1 - mu.x), at `kappa()` or the `kappa` and `log_peak`
        given (capacity,). The dropped mass is 0-dim, NaN where an approximate index cannot tell. Where fewer
        than k splats are active, the others have a log share of -inf.
        """
        if not 1 <= k <= self.capacity:
            raise ValueError(f"{k} splats a state were asked of {self.capacity} places: ask for fewer.")
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            directions, x = self.directions(), x.to(self.mu.dtype)
            raw = (self.n - 1) * (self.kappa() if kappa is None else kappa)
            if log_peak is None:
                log_peak = self.log_peak() if kappa is None else vmf.log_peak(self.n, raw)
            offset = (self.log_pi().double() + log_peak - raw.double()).to(x.dtype)
            raw = raw.to(x.dtype)
            if self._approximate(k):
                return self._rank(x, directions, offset, raw, k)[1], x.new_full((), math.nan)
            whole = not k <= len(self) < self.capacity
            rows = slice(None) if whole else self.rows
            scaled = raw[rows].unsqueeze(1) * directions[rows]
            places, dropped = best_logits(x, scaled, offset[rows], k)
            return places if whole else self.rows[places], dropped

    def rebuild_index(self) -> None:
        """Build the approximate index where the splats are now; the exact kind has none."""
        if self.kind == "exact" or len(self) == 0:
            return
        self._rows = self.rows
        points = self.directions().detach()[self._rows]
        self._index = NeighbourIndex(self.kind).build(points, self.neighbours)

    def _approximate(self, k: int) -> bool:
        """Tell whether the index is asked for k splats; few of them are searched exactly."""
        return self.kind != "exact" and len(self) >= 2 * max(k, self.neighbours)

    def _rank(
        self, x: Tensor, directions: Tensor, offset: Tensor | None, raw: Tensor | None, k: int
    ) -> tuple[Tensor, Tensor]:
        """Rank the index's candidates where the splats are now: values and rows of the best k, (M, k)."""
        if self._index is None:
            self.rebuild_index()
        assert self._index is not None
        count = 2 * max(k, self.neighbours)
        values, rows = [], []
        for part in torch.split(x, rows_at_once(count * self.n)):
            candidates = self._rows.to(x.device)[self._index.search(part, count)]
            scores = (directions[candidates] @ part.unsqueeze(2)).squeeze(2)
            if offset is not None and raw is not None:
                scores = offset[candidates] + raw[candidates] * scores
            top, places = largest(scores, k)
            values.append(top)
            rows.append(candidates.gather(1, places))
        return torch.cat(values), torch.cat(rows)

    # -- places ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add(
        self, mu: Tensor, alpha: float | Tensor | None = None, kappa: float | Tensor | None = None
    ) -> Tensor:
        """Put splats with directions mu (m, n) in the first free places: their rows, int64 (m,).

        alpha is 1 and kappa 10 where left out; kappa is clamped. ValueError when they do not fit, for rows
        without a direction and for an alpha that is not over 0.
        """
        free = (~self.active).nonzero().squeeze(1)
        if len(mu) > len(free):
            raise ValueError(
                f"the store has {len(free)} of {self.capacity} places free, not {len(mu)}: allocate more."
            )
        rows = free[: len(mu)]
        self.place(rows, mu, alpha, kappa)
        return rows

    @torch.no_grad()
    def place(
        self,
        rows: Tensor,
        mu: Tensor,
        alpha: float | Tensor | None = None,
        kappa: float | Tensor | None = None,
        frequency: float | Tensor = 0.0,
    ) -> None:
        """Put splats in the given rows (m,), whatever was there; age and stress start at 0."""
        mu = mu.detach().to(self.mu)
        if mu.shape != (len(rows), self.n) or not bool((mu.isfinite().all(1) & (mu != 0).any(1)).all()):
            raise ValueError(f"splats need finite directions of shape (m, {self.n}) that are not zero.")
        weight = torch.as_tensor(FIRST_ALPHA if alpha is None else alpha).to(self.alpha)
        if not bool((weight > 0).all()):
            raise ValueError("a splat needs a weight alpha over 0.")
        width = torch.as_tensor(FIRST_KAPPA if kappa is None else kappa).to(self.concentration)
        self.mu[rows] = normalise(mu)
        self.active[rows] = True
        self.frequency[rows] = torch.as_tensor(frequency).to(self.frequency)
        self.age[rows] = 0
        self.stress[rows] = 0
        self.last_won[rows] = self.seen
        self.weigh(rows, weight)
        self._set_kappa(rows, width)
        self.resultant[rows] = mean_cosine(self.concentration[rows])
        self.rows = self.active.nonzero().squeeze(1)
        self._index = None

    @torch.no_grad()
    def weigh(self, rows: Tensor, alpha: Tensor) -> None:
        """Give the splats of rows (m,) the weights alpha (m,) or ()."""
        self.alpha[rows] = alpha.to(self.alpha)
        if self.adapt == "gradient":
            self.log_alpha[rows] = alpha.to(self.alpha).log()

    @torch.no_grad()
    def set_resultant(self, rows: Tensor, resultant: Tensor) -> None:
        """Give the splats of rows (m,) a mean cosine (m,) or (), and the concentration it stands for."""
        self.resultant[rows] = resultant.to(self.resultant)
        self._set_kappa(rows, self._kappa_of(resultant))

    def _kappa_of(self, resultant: Tensor) -> Tensor:
        """Return a mean cosine's concentration within its limits; rounding lifts one state's over 1."""
        low, high = mean_cosine(self.kappa_min), mean_cosine(self.kappa_max)
        return concentration_of(resultant.clamp(low, high)).clamp_(self.kappa_min, self.kappa_max)

    def _set_kappa(self, rows: Tensor, kappa: Tensor) -> None:
        self.concentration[rows] = kappa.to(self.concentration).clamp(self.kappa_min, self.kappa_max)
        if self.adapt == "gradient":
            self.log_kappa[rows] = self.concentration[rows].log()

    def weights(self) -> Tensor:
        """Return alpha of each place (capacity,), trained or counted; without meaning where no splat is."""
        return self.log_alpha.exp() if self.adapt == "gradient" else self.alpha

    # -- statistics ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, states: Tensor) -> Wins:
        """Count who wins the states (M, n) of one step and move weights and concentrations after them.

        frequency <- 0.99 frequency + wins; the mean cosine moves by 1 - 0.95^wins to that of the states won;
        kappa = clamp(rho / (1 - rho^2)), alpha = frequency + mean frequency, age += 1. With
        `adapt="gradient"` alpha and kappa stay the optimizer's; ln kappa is put back within its limits.
        """
        if states.dim() != 2 or states.shape[1] != self.n:
            shape = tuple(states.shape)
            raise ValueError(f"a store cannot observe states of shape {shape}: give (M, {self.n}).")
        _, wins, counts, sums = self._win(states)
        # a moving count of wins, and a mean cosine that moves with each of them
        self.frequency.mul_(KEEP).add_(counts)
        mean = torch.where(counts > 0, sums / counts.clamp_min(1), self.resultant)
        self.resultant.lerp_(mean, 1 - RESULTANT_KEEP**counts)
        self.age.add_(self.active)
        self.seen.add_(len(states))
        self.last_won.copy_(torch.where(counts > 0, self.seen, self.last_won))
        self._follow()
        return wins

    def coverage(self) -> float:
        """Return the share of active splats that won one of the last 20 N states observed, or are newer."""
        recent = self.last_won > self.seen - COVERED_OVER * len(self)
        return float((recent & self.active).sum()) / max(1, len(self))

    def _win(self, states: Tensor) -> tuple[Tensor, Wins, Tensor, Tensor]:
        """Find each state's nearest splat: its mu.s (M,), who it is, and, in the buffers' dtype, how many
        states each place won and the sum of their cosines, (capacity,) each."""
        self.check_filled()
        with torch.autocast(states.device.type, enabled=False):
            states, directions = states.detach().to(self.mu.dtype), self.directions()
            if self._approximate(1):
                values, rows = self._rank(states, directions, None, None, 1)
                cosine, winner = values[:, 0], rows[:, 0]
            else:
                cosine, place = closest(states, directions[self.rows])
                winner = self.rows[place]
            wins = Wins(winner, distance(states, directions[winner]))
        counts = counts_of(winner, self.capacity).to(self.frequency)
        return cosine, wins, counts, totals(winner, cosine, self.capacity).to(self.resultant)

    def _follow(self) -> None:
        """Take alpha and kappa from frequency and resultant; put trained ones back in their limits."""
        if self.adapt == "gradient":
            self.log_kappa.clamp_(math.log(self.kappa_min), math.log(self.kappa_max))
            return
        kappa = self._kappa_of(self.resultant)
        self.concentration.copy_(torch.where(self.active, kappa, self.concentration))
        fair = self.frequency.sum() / self.active.sum()
        self.alpha.copy_(torch.where(self.active, self.frequency + fair, 0.0))

    # -- events ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def revive(self, states: Tensor, rng: np.random.Generator) -> Tensor:
        """Move splats that win under 0.1 of a fair share of the states (M, n) to states nobody is near.

        Those are drawn with probability proportional to 1 - max_k mu_k.s, each at most once; frequency and
        mean cosine of all splats are then taken anew from the states. With under 4 states a splat, a count of
        none proves nothing: a splat must also be rare by its frequency, and only moved ones are taken anew.
        Returns the rows moved, int64; their optimizer state and what remembers their wins is the caller's.
        """
        cosine, _, counts, _ = self._win(states)
        dead = self.active & (counts < DEAD * len(states) / len(self))
        if len(states) < TELLING * len(self):
            dead &= self.frequency < DEAD * self.frequency.sum() / len(self)
        # to states that are far from every splat
        chance = (1 - cosine.double()).clamp_min(0).cpu().numpy()
        rows = dead.nonzero().squeeze(1)[: np.count_nonzero(chance)]
        if len(rows) == 0:
            return rows
        drawn = rng.choice(len(states), len(rows), replace=False, p=chance / chance.sum())
        self.place(rows, states[torch.from_numpy(drawn).to(states.device)], self._mean_alpha())
        self._renew(states, rows)
        return rows

    @torch.no_grad()
    def grow(self, states: Tensor, count: int, rng: np.random.Generator) -> Tensor:
        """Add `count` splats where spherical k-means puts them among the states (M, n): their rows.

        Frequency and mean cosine of all are then taken anew from the states, as after a revival.
        """
        centres, _ = spherical_kmeans(states, count, rng)
        rows = self.add(centres, self._mean_alpha() if len(self) else None)
        self._renew(states, rows)
        return rows

    def _mean_alpha(self) -> Tensor:
        """Return the mean weight of the active splats, the geometric mean where it is trained."""
        if self.adapt == "gradient":
            return self.log_alpha[self.active].mean().exp()
        return self.alpha[self.active].mean()

    def _renew(self, states: Tensor, moved: Tensor) -> None:
        """Renew the statistics from these states alone: of all splats, where states are few of moved ones."""
        cosine, _, counts, sums = self._win(states)
        pooled = cosine.mean().to(sums)  # for splats that won none of them
        resultant = torch.where(counts > 0, sums / counts.clamp_min(1), pooled)
        if len(states) < TELLING * len(self):
            rows, others = moved, self.frequency.sum()
            fair = others / max(1, len(self) - len(moved))
            self.frequency[rows] = torch.where(others > 0, fair, counts[rows])
        else:
            rows = self.rows
            self.frequency[rows] = counts[rows]
        self.resultant[rows] = resultant[rows]
        if self.adapt == "gradient":  # what is trained changes only where a splat is new
            self.set_resultant(moved, resultant[moved])
        self._follow()

    # -- resume ----------------------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return what no parameter or buffer holds: the divisor of kappa, the index's bytes and its rows."""
        data = torch.empty(0, dtype=torch.uint8) if self._index is None else self._index.to_bytes()
        divisor = torch.tensor(self.kappa_divisor, dtype=torch.float64)
        return {"kappa_divisor": divisor, "index": data, "rows": self._rows.cpu()}

    def set_extra_state(self, state: Any) -> None:
        saved = cast(dict[str, Tensor], state)
        self.kappa_divisor = float(saved["kappa_divisor"])
        data = saved["index"]
        self._index = NeighbourIndex.from_bytes(self.kind, data) if len(data) else None
        self._rows = saved["rows"].to(self.mu.device)
        self.rows = self.active.nonzero().squeeze(1)  # the buffers are read before this
