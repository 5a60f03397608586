"""Rivals that set the rate of whatever optimizer they wrap, from what they measure of the loss.

A stabilizer scales an update by c <= 1, and these choose a rate, which may rise. So they are run as EBC is,
at a learning rate above any that they would take, and c is the share of it that they choose. None takes a
rate above that one; their papers know no such limit. The run's learning-rate schedule multiplies the rate
chosen.

What they measure they measure on the rows of the batch that the audit leaves out, not on all of it, and the
cost is counted as every other measurement's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from ebc_lab.ebc import Proposal, StepStats
from ebc_lab.ebc.flat import Copy
from ebc_lab.ebc.given import checks
from ebc_lab.ebc.logits import mean_cross_entropy
from ebc_lab.ebc.options import check_option
from ebc_lab.ebc.probe import Batch
from ebc_lab.ebc.proposal import Opened
from ebc_lab.ebc.step import StepInputs

from .rivals import Rival

GEOMETRIES = ("spectral", "elementwise", "frobenius")


class RateRival(Rival):
    """One whose c is a share of the proposal's rate, and which reads the loss, hence `targets`.

    Raises ValueError where a step is given none, and where several processes train together.
    """

    keeps_old = True
    carried: ClassVar[tuple[str, ...]]  # numbers that go from step to step

    def _own_state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.carried}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        for name in self.carried:
            setattr(self, name, type(getattr(self, name))(state[name]))

    def _check_workers(self) -> None:
        super()._check_workers()
        if not self.workers.alone:
            raise ValueError(f"{type(self).__name__} looks at the rows of one process: process_group=None.")

    def _batch(self, inputs: StepInputs, held: bool) -> Batch:
        batch = super()._batch(inputs, held)
        if self._measures(inputs.t) and batch.probe.targets is None:
            raise self._without_targets()
        return batch

    def _without_targets(self) -> ValueError:
        name = type(self).__name__
        return ValueError(f"{name} reads the loss: give step(tokens, logits, targets=...).")

    def _take(self, stats: StepStats, proposal: Proposal, share: float) -> None:
        self._apply(stats, proposal, torch.full_like(self._one, share))


class GeN(RateRival):
    """The rate at the minimum of a parabola through the loss at W, W + x·dW and W - x·dW, x being its share.

    Bu & Xu, arXiv:2407.02772, as in the authors' code. With the losses L0, L+ and L- the minimum lies at
    x/2·(L- - L+)/(L+ + L- - 2·L0). It counts if the loss falls along dW and the parabola opens upwards; it is
    limited to half and twice the present rate, multiplied by `strength`, which is 1 in the paper, and the
    rate moves a tenth of the way there. A loss that is not finite halves the rate. Measured at every
    `every`-th step; the rate begins at `start` of the proposal's.

    The authors' code measures on the next batch, which a run here has not seen yet, and steps the base twice
    at a step that measures.
    """

    default = 1.0
    every = 8
    start = 0.125
    smoothing = 0.9
    most = 2.0  # how far one parabola may move the rate, as a factor
    carried = ("rate",)

    def __init__(self, model: nn.Module, optimizers: Optimizer | Sequence[Optimizer], **options: Any):
        super().__init__(model, optimizers, **options)
        self.rate = self.start  # a share of the peak rate

    def _measures(self, t: int) -> bool:
        return t % self.every == 0

    def _limit_update(self, stats: StepStats, proposal: Proposal) -> None:
        scheduled = self._lr_ratio()
        if self._measures(proposal.t) and scheduled > 0:
            x = self.rate / scheduled
            here = float(proposal.batch.probe_loss(proposal.batch.probe.z))
            self.rate = self._chosen(here, loss_at(proposal, x), loss_at(proposal, -x))
            stats.measurements = 2
        self._take(stats, proposal, self.rate)

    def _chosen(self, here: float, ahead: float, behind: float) -> float:
        """The rate, from the losses at W and a step of the present rate ahead and behind."""
        slope = (behind - ahead) / 2
        curvature = ahead + behind - 2 * here
        if not math.isfinite(curvature):
            return self.rate / 2
        if slope <= 0 or curvature <= 0:
            return self.rate
        factor = min(max(slope / curvature, 1 / self.most), self.most)
        chosen = self.smoothing * self.rate + (1 - self.smoothing) * self.strength * factor * self.rate
        return min(1.0, chosen)


class CDAT(RateRival):
    """The rate at the edge of stability along the update: `strength` · (-g'u)/|u'Hu|, both running averages.

    Roulet et al., arXiv:2407.06183: g the gradient, H the Hessian of the loss, u the direction of the update,
    max(-g'u, 0) averaged. 2 is on the edge, where a quadratic loss would end as high as it began; 1 would
    minimise it. g'u and u'Hu are the derivatives of the loss along the update, on the same rows, by a
    backward pass through a backward pass, in float32 outside autocast.

    That both are averaged is the paper's. The weight of the past, `smoothing`, is ours: none that we could
    read states it.
    """

    default = 2.0
    smoothing = 0.9
    carried = ("fall", "curvature")

    def __init__(self, model: nn.Module, optimizers: Optimizer | Sequence[Optimizer], **options: Any):
        super().__init__(model, optimizers, **options)
        self.fall = 0.0  # of the loss, nats per token for a step of the peak rate
        self.curvature = 0.0

    def _measures(self, t: int) -> bool:
        return True

    def _limit_update(self, stats: StepStats, proposal: Proposal) -> None:
        scheduled = self._lr_ratio()
        if scheduled > 0:
            slope, curvature = (float(x) for x in derivatives_along(proposal))
            if math.isfinite(slope) and math.isfinite(curvature):
                past = self.smoothing
                self.fall = past * self.fall + (1 - past) * max(-slope, 0.0) / scheduled
                self.curvature = past * self.curvature + (1 - past) * abs(curvature) / scheduled**2
            stats.measurements = 1
        # no curvature: nothing has moved the loss yet, or all of it is a slope
        share = min(1.0, self.strength * self.fall / self.curvature) if self.curvature > 0 else 1.0
        self._take(stats, proposal, share)


class AdaptiveWarmUp(RateRival):
    """A warm-up that ends by itself: the share of the rate follows from the gap, the loss less `strength`.

    Riabinin et al., arXiv:2602.05813, and their code. For optimizers whose steps have a fixed length (Muon,
    Lion) curvature that falls with the gap makes the best rate gap/(K0 + K1·gap + K2·gap²). It is 1/`div` of
    its peak at the first loss and has its peak at the gap that `peak_gap` finds. From the first loss at that
    gap or below on, all of the rate is taken, and the run's schedule decides on the decay. `strength` is the
    loss, nats per token, that the run is expected to reach.

    The loss is the whole batch's, that of the step itself; the authors' code applies it at the next step, and
    starts its decay, half a cosine, where the warm-up ends.

    Args:
        geometry: the norm in which steps have a fixed length: `spectral` (Muon), `elementwise` (Lion; Adam
            about) or `frobenius` (normalised SGD).
    """

    default = 2.0
    div = 100.0
    carried = ("first_gap", "peak_gap", "share", "warming")

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        *,
        geometry: str = "elementwise",
        **options: Any,
    ):
        check_option("geometry", geometry, GEOMETRIES)
        super().__init__(model, optimizers, **options)
        self.geometry = geometry
        self.first_gap = math.nan  # nats per token, as the next
        self.peak_gap = math.nan
        self.share = 1 / self.div
        self.warming = True

    def open_step(self, inputs: StepInputs, kept: Copy | None = None) -> Opened:
        if self.warming:
            if inputs.logits is None or inputs.targets is None:
                raise self._without_targets()
            self._see(float(batch_loss(inputs)))
        return super().open_step(inputs, kept)

    def _see(self, loss: float) -> None:
        """Choose the share from the loss at W; a loss that is not finite leaves it."""
        gap = loss - self.strength
        if not math.isfinite(gap):
            return
        if math.isnan(self.first_gap):
            self.first_gap = gap
            self.peak_gap = peak_gap(gap, kappa(self.weights, self.geometry), self.div)
        self.warming = gap > self.peak_gap
        self.share = warm_up_share(gap, self.first_gap, self.peak_gap, self.div) if self.warming else 1.0

    def _limit_update(self, stats: StepStats, proposal: Proposal) -> None:
        self._take(stats, proposal, self.share)


# -- what they measure ---------------------------------------------------------------------------------------


def loss_at(proposal: Proposal, x: float) -> float:
    """The cross-entropy on the probe rows at W + x·dW, nats per token."""
    return float(proposal.batch.probe_loss(proposal.logits_at(x, proposal.batch.probe)))


def derivatives_along(proposal: Proposal) -> tuple[Tensor, Tensor]:
    """The first and the second derivative of the cross-entropy on the probe rows along dW at W, 0-dim."""
    batch = proposal.batch
    start = proposal.by_name(proposal.old)
    direction = proposal.by_name(proposal.updates())

    def loss(x: Tensor) -> Tensor:
        return batch.probe_loss(
            batch.functional({name: w + x * direction[name] for name, w in start.items()})
        )

    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has one derivative only
        x = next(iter(start.values())).new_zeros((), requires_grad=True)
        here = loss(x)
        with batch.prober.measuring():  # the forward has been timed
            (slope,) = torch.autograd.grad(here, x, create_graph=True)
            (curvature,) = torch.autograd.grad(slope, x)
    return slope.detach(), curvature


def batch_loss(inputs: StepInputs) -> Tensor:
    """The cross-entropy of the whole batch, nats per token; negative targets do not count."""
    z = checks.logits_in(inputs.logits)
    targets = inputs.targets
    assert targets is not None
    counted = targets >= 0 if inputs.mask is None else (targets >= 0) & inputs.mask.bool()
    return mean_cross_entropy(z, targets.clamp(min=0), counted)


# -- the warm-up of fixed step lengths -----------------------------------------------------------------------


def kappa(weights: Sequence[Tensor], geometry: str) -> float:
    """How much larger the dual norm of a step may be than its norm, over the matrices."""
    largest: dict[str, Callable[[torch.Size], int]] = {
        "spectral": min,  # singular values that are all the largest
        "elementwise": math.prod,
        "frobenius": lambda shape: 1,
    }
    return float(sum(largest[geometry](w.shape) for w in weights if w.ndim == 2))


def warm_up_share(gap: Any, first: float, peak: Any, div: float) -> Any:
    """gap/(K0 + K1·gap + K2·gap²) over its peak: 1 at `peak`, where it is largest, and 1/div at `first`."""
    return gap / (gap + first * (div - 1) * ((gap - peak) / (first - peak)) ** 2)


def peak_gap(first: float, kappa: float, div: float) -> float:
    """The gap at which the rate is largest: of 500, the one whose curve is nearest to a usual schedule, which
    falls linearly from there to `first` and as half a cosine to 0.

    The mean of the squared difference is weighted with exp(-width·kappa/2·(distance from the peak)²), all as
    in the authors' code. inf, which is no warm-up, where the first gap is too small for one.
    """
    margin = 0.01  # nats
    width = 1e-3
    if first <= 2 * margin:
        return math.inf
    nodes, weights = np.polynomial.legendre.leggauss(50)
    peaks = np.linspace(margin, first - margin, 500)[:, None]

    def difference(low: Any, high: Any, early: bool) -> Any:
        x = low + (high - low) * (nodes + 1) / 2
        linear = 1 - (1 - 1 / div) * (x - peaks) / (first - peaks)
        usual = linear if early else (1 - np.cos(np.pi * x / peaks)) / 2
        near = np.exp(-width * kappa / 2 * (x - peaks) ** 2)
        squared = near * (warm_up_share(x, first, peaks, div) - usual) ** 2
        return (squared * weights).sum(1) * (high - low)[:, 0] / 2

    reach = 6 / math.sqrt(width * kappa)  # where the weight is still above 1e-8: a panel of its own
    low = np.maximum(peaks - reach, 0)
    high = np.minimum(peaks + reach, first)
    before = [difference(a, b, early=False) for a, b in ((0 * peaks, low), (low, peaks))]
    after = [difference(a, b, early=True) for a, b in ((peaks, high), (high, 0 * peaks + first))]
    return float(peaks[sum(before + after).argmin(), 0])
