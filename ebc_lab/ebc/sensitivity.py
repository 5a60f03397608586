"""beta_g: how far the logits move per unit of weight norm along group g's own proposed direction; and S, the
ellipsotope bound on their movement, from the contributions s_g = beta_g * ||dW_g|| (docs/method.md).

beta_g = rms(centre(J_g U_g)) with U_g = dW_g/||dW_g||, measured by a forward-mode derivative (`jvp`) or a
finite difference (`fd`), always in float32 outside autocast, and smoothed by `SensitivityFilter`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .grouping import group_parameters
from .logits import centre, rms_norm
from .options import AGGREGATES, CADENCES, MEASURED, check_option
from .proposal import Proposal
from .settings import ClipSettings
from .step import StepStats
from .wrapping import check_form

Forward = Callable[[dict[str, Tensor]], Tensor]  # parameters by name -> logits (..., V)
FD_MOVEMENT = 1e-2  # logits: large enough for float32, small enough to be linear
NO_DERIVATIVE = f"budget={' or '.join(map(repr, MEASURED))}"  # what takes any model


def linearised(
    forward: Forward, weights: dict[str, Tensor], direction: dict[str, Tensor], instead: str
) -> tuple[Tensor, Tensor]:
    """(z, J·direction) at `weights` by forward mode, (..., V) each; `direction` names the moving tensors.

    Fused attention has no forward-mode rule, so the plain attention path is taken. Raises ValueError, which
    says what to choose `instead`, where another operation has none.
    """
    moving = {name: weights[name] for name in direction}
    try:
        with sdpa_kernel(SDPBackend.MATH):
            z, dz = torch.func.jvp(lambda part: forward({**weights, **part}), (moving,), (direction,))[:2]
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        forward(weights)  # a model that fails without derivatives too says so itself
        said = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"this model has no forward-mode derivatives, by which EBC measures here ({said}): use {instead}."
        ) from error
    return z, dz


def probe_jvp(
    forward: Forward,
    weights: dict[str, Tensor],
    direction: dict[str, Tensor],
    mask: Tensor | None,
    instead: str = "probe='fd'",
) -> Tensor:
    """rms(centre(J·direction)) by forward mode. -> 0-dim, logits. Raises as `linearised`."""
    return rms_norm(centre(linearised(forward, weights, direction, instead)[1]), mask)


def probe_fd(
    forward: Forward,
    weights: dict[str, Tensor],
    direction: dict[str, Tensor],
    mask: Tensor | None,
    guess: float = 1.0,
) -> Tensor:
    """The same by (z(W + eps·U/2) - z(W - eps·U/2))/eps; eps moves the logits by about `FD_MOVEMENT` rms.

    A one-sided difference costs as much and is off by the curvature over its step: 1.5% has been seen.
    `guess` is a first estimate of the answer. Two passes are enough when it is off by no more than twofold,
    four when by less than a few hundred; at most eight are made. -> 0-dim, logits.
    """
    beta = torch.tensor(guess)
    for _ in range(4):
        eps = FD_MOVEMENT / max(float(beta), 1e-12)
        above, below = (
            forward({**weights, **{name: weights[name].add(u, alpha=half) for name, u in direction.items()}})
            for half in (eps / 2, -eps / 2)
        )
        seen = rms_norm(centre(above - below), mask)
        beta = seen / eps
        if not torch.isfinite(seen) or FD_MOVEMENT / 2 <= float(seen) <= FD_MOVEMENT * 2:
            break
    return beta


class SensitivityFilter:
    """A robust running mean of the observations of one group's beta.

    The n-th observation weighs max(1-decay, 1/n), and from the 4th on its residual is limited to ±huber·beta
    (Huber 1964).
    """

    def __init__(self, decay: float = 0.95, huber: float = 0.5):
        self.decay = decay
        self.huber = huber
        self.count = 0
        self.beta: Tensor | None = None

    def weight(self, n: int) -> tuple[float, bool]:
        """The weight of the n-th observation (from 1), and whether its residual is limited."""
        return max(1 - self.decay, 1 / n), n >= 4

    def update(self, observed: Tensor | float) -> Tensor:
        """One observation (logits per unit of weight norm) -> beta, 0-dim, same unit.

        One that is not finite changes nothing; before any other it is returned as it is.
        """
        observed = torch.as_tensor(observed)
        if not torch.isfinite(observed):
            return observed if self.beta is None else self.beta.clone()
        self.beta = torch.zeros_like(observed) if self.beta is None else self.beta.to(observed.device)
        self.count += 1
        weight, limited = self.weight(self.count)
        residual = observed - self.beta
        if limited:
            bound = self.huber * self.beta
            residual = residual.clamp(-bound, bound)
        self.beta.add_(weight * residual)  # in place: a CUDA graph reads the memory it was captured with
        return self.beta.clone()

    def inflate(self, factor: Tensor | float) -> None:
        """beta <- factor·beta, in beta's own dtype; nothing before the first observation."""
        if self.beta is not None:
            self.beta.mul_(torch.as_tensor(factor, dtype=self.beta.dtype, device=self.beta.device))

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "beta": None if self.beta is None else self.beta.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        count, beta = state["count"], state["beta"]
        check_form(beta, torch.zeros(()), "beta")
        if type(count) is not int:
            raise ValueError("count is not what it should be")
        self.count, self.beta = count, beta


def due_groups(step: int, groups: Sequence[str], cadence: str = "warm") -> list[str]:
    """Which groups are measured at `step` (0-based).

    `warm`: all at steps 0, 10, 20, 50, 100, 200, 400, 800, …; in between two groups in turn every 20 steps.
    `dense`: the same, with two groups in turn every 5 steps. `sweep`: all every 20 steps. A turn that falls
    on a sweep is part of it. Raises ValueError on another cadence.
    """
    check_option("cadence", cadence, CADENCES)
    if cadence == "sweep":
        return list(groups) if step % 20 == 0 else []
    hundreds = step // 100
    if step in (0, 10, 20, 50) or (step % 100 == 0 and hundreds & (hundreds - 1) == 0):
        return list(groups)
    return two_in_turn(step, groups, every=5 if cadence == "dense" else 20)


def two_in_turn(step: int, groups: Sequence[str], every: int) -> list[str]:
    """The two groups whose turn it is at `step`; none between turns, which are `every` steps apart."""
    if step % every:
        return []
    turn = 2 * (step // every - 1)
    return list(dict.fromkeys(groups[(turn + i) % len(groups)] for i in range(2)))


# -- the bound -----------------------------------------------------------------------------------------------


def aggregate(contributions: Tensor, kind: str) -> Tensor:
    """Contributions (L,) in logits per token -> S, 0-dim, same unit.

    `l1` is the triangle inequality, `sqrtl_l2` = sqrt(L)·l2 with L the groups that move, never tighter than
    l1; `l2` is NOT a bound. Raises ValueError on another kind.
    """
    check_option("aggregate", kind, AGGREGATES)
    s = torch.as_tensor(contributions)
    if kind == "l1":
        return s.sum()
    moving = s.ne(0).sum().to(s.dtype) if kind == "sqrtl_l2" else 1
    return (moving * s.square().sum()).sqrt()


class Sensitivities:
    """The groups of weights, a filter of beta for each, and when and how these are measured."""

    def __init__(self, settings: ClipSettings):
        self.settings = settings
        self.groups: dict[str, list[int]] = {}  # group -> indices of its weights
        self.filters: dict[str, SensitivityFilter] = {}
        self._members: list[Tensor] = []  # the same indices, on the weights' device

    def regroup(self, shapes: Mapping[str, Sequence[int]], device: torch.device) -> None:
        """Group the weights, {name: shape}; groups that were there before keep their sensitivities."""
        index = {name: i for i, name in enumerate(shapes)}
        named = group_parameters(shapes, self.settings.grouping, shapes)
        self.groups = {group: [index[name] for name in names] for group, names in named.items()}
        self._members = [torch.tensor(members, device=device) for members in self.groups.values()]
        self.filters = {group: self.filters.get(group) or self.make_filter() for group in self.groups}

    def make_filter(self) -> SensitivityFilter:
        return SensitivityFilter()

    @property
    def complete(self) -> bool:
        """Whether every group's beta has been measured."""
        return all(f.beta is not None for f in self.filters.values())

    def due(self, t: int, bounded: bool) -> list[str]:
        """Return the groups measured at step `t`: where c is `bounded` by them, else to be recorded."""
        if bounded:
            return due_groups(t, list(self.groups), self.settings.cadence)
        every = self.settings.sensitivity_every
        return list(self.groups) if every > 0 and t % every == 0 else []

    def measure(self, stats: StepStats, proposal: Proposal, due: Sequence[str]) -> None:
        """Measure the betas that are due or unknown, and record the contributions and S."""
        updates = proposal.updates()
        squares = torch.stack(torch._foreach_norm(updates)).double().square()
        norms = torch.stack([squares[members].sum() for members in self._members]).sqrt()
        weights = proposal.by_name(proposal.old)
        measured = torch.full_like(norms, torch.nan)
        probed = False
        for i, (group, members) in enumerate(self.groups.items()):
            wanted = group in due or self.filters[group].beta is None
            if not wanted or not norms[i] > 0:
                continue
            direction = {f"model.{proposal.names[j]}": updates[j] / norms[i].to(updates[j]) for j in members}
            direction = {n: u.to(weights[n].dtype) for n, u in direction.items()}
            measured[i] = self.filters[group].update(self._observe(group, proposal, weights, direction))
            probed = True
        contributions = self.betas(norms) * norms
        stats.contributions = torch.where(norms > 0, contributions, 0)  # a group at rest needs no beta
        stats.sensitivities = measured if probed else None
        stats.surrogate = proposal.number(aggregate(stats.contributions, self.settings.aggregate))

    def _observe(
        self, group: str, proposal: Proposal, weights: dict[str, Tensor], direction: dict[str, Tensor]
    ) -> Tensor:
        """Return one observation of a group's beta, 0-dim."""
        batch = proposal.batch
        rows = batch.probe
        if self.settings.probe == "jvp":
            remedies = {"surrogate": f"{NO_DERIVATIVE}, or probe='fd'", "calibrated": NO_DERIVATIVE}
            instead = remedies.get(self.settings.budget, "probe='fd', or sensitivity_every=0")
            observed = probe_jvp(batch.functional, weights, direction, rows.mask, instead)
        else:
            known = self.filters[group].beta
            guess = 1.0 if known is None or not known > 0 else float(known)
            observed = probe_fd(batch.functional, weights, direction, rows.mask, guess)
        return proposal.workers.rms(observed, rows.count()).to(observed.dtype)

    def betas(self, norms: Tensor) -> Tensor:
        """Return the beta of every group, (L,), in the dtype of `norms`; NaN where it is unknown."""
        unknown = torch.full_like(norms[0], torch.nan)
        return torch.stack([unknown if f.beta is None else f.beta.to(norms) for f in self.filters.values()])

    def to(self, device: torch.device) -> None:
        self._members = [members.to(device) for members in self._members]
        for f in self.filters.values():
            f.beta = None if f.beta is None else f.beta.to(device)

    def state_dict(self) -> dict[str, Any]:
        return {group: f.state_dict() for group, f in self.filters.items()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        for group, f in self.filters.items():
            f.load_state_dict(state[group])
        self.to(device)
