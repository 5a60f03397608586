"""Policies: what chooses the factors on the learning rate and on the trust radius, step by step.

A policy sees values on the host (the loss, two norms, how far the run is, whether the last step was clipped)
and answers two factors in [1/4, 4]: f multiplies the learning rate, rho the radius. `constant` answers 1,
`random` draws both anew each step, `auxnn` is a small network that learns from the one-step derivative of
the loss. That derivative is greedy: it prefers steps that are too small for the long run, so a comparison
names all three. The maths is in docs/lowbit.md, "Policies".

That derivative moves the learning rate itself in Baydin et al., arXiv:1703.04782; why it is greedy: Wu et
al., arXiv:1803.02021.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .names import Familiar

SIGNALS = 6
UNITS = 16
RATE = 0.05  # of the gradient descent on the network's weights
LARGEST = 4.0  # the largest factor; the smallest is its reciprocal
CLIPPED_AT = 3.0  # standard deviations, of a signal
SLOWEST = 0.01  # the least weight of an observation in a signal's running moments
LOSS_WEIGHT = 0.1  # the same for the loss's own running mean and variance: decay 0.9

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Observed:
    """What a policy sees before a step."""

    loss: float  # of this step's batch
    grad_norm: float  # of the whole gradient
    update_norm: float  # of the last update as it was applied; 0 before the first
    progress: float  # t/steps, in [0, 1]
    clipped: bool  # whether a stabilizer shortened the last step


class RunningMoments:
    """A running mean and variance; the n-th observation weighs max(1/n, `least`).

    An observation that is not finite changes nothing.
    """

    def __init__(self, least: float):
        self.least = least
        self.count = 0
        self.mean = 0.0
        self.variance = 0.0

    def update(self, observed: float) -> None:
        if not math.isfinite(observed):
            return
        self.count += 1
        weight = max(1 / self.count, self.least)
        deviation = observed - self.mean
        self.mean += weight * deviation
        self.variance = (1 - weight) * (self.variance + weight * deviation * deviation)

    def standardised(self, observed: float) -> float:
        """Return the deviation in standard deviations, within ±3; 0 where it or the variance says nothing."""
        if not (math.isfinite(observed) and 0 < self.variance < math.inf):
            return 0.0
        deviation = (observed - self.mean) / math.sqrt(self.variance)
        return min(max(deviation, -CLIPPED_AT), CLIPPED_AT)

    def state(self) -> list[float]:
        return [float(self.count), self.mean, self.variance]

    def load(self, state: Sequence[float]) -> None:
        count, self.mean, self.variance = state
        self.count = int(count)


class Signals:
    """Six signals of a run, each standardised by its own running mean and variance.

    In order: ln loss, ln gradient norm, ln norm of the last update, t/steps, ln variance of the loss about
    its running mean, clipped (0, 1). A signal without a finite value (the logarithm of 0, a loss that is NaN)
    is 0 and leaves its moments as they were.
    """

    def __init__(self) -> None:
        self.loss = RunningMoments(LOSS_WEIGHT)
        self.moments = [RunningMoments(SLOWEST) for _ in range(SIGNALS)]

    def update(self, seen: Observed) -> Floats:
        """Turn one step's observation into the six signals, (6,), in standard deviations."""
        self.loss.update(seen.loss)
        raw = (
            _ln(seen.loss),
            _ln(seen.grad_norm),
            _ln(seen.update_norm),
            seen.progress,
            _ln(self.loss.variance if math.isfinite(seen.loss) else math.nan),
            float(seen.clipped),
        )
        signals = np.zeros(SIGNALS)
        for i, (moments, value) in enumerate(zip(self.moments, raw, strict=True)):
            moments.update(value)
            signals[i] = moments.standardised(value)
        return signals

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss.state(), "moments": [m.state() for m in self.moments]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loss.load(state["loss"])
        for moments, loaded in zip(self.moments, state["moments"], strict=True):
            moments.load(loaded)


def _ln(value: float) -> float:
    """Return ln of a positive number, NaN of everything else."""
    return math.log(value) if 0 < value < math.inf else math.nan


class AuxiliaryNetwork(Familiar):
    """h = tanh(W1·z + b1), o = tanh(W2·h + b2), f = 4^o₁, rho = 4^o₂, in float64.

    W2, b1 and b2 begin at 0, so that both factors begin at 1; W1 ~ N(0, 1/6) from `seed`. Arrays: `w1`
    (16, 6), `b1` (16,), `w2` (2, 16), `b2` (2,).
    """

    def __init__(self, seed: int = 0, *, rate: float = RATE):
        self.rate = rate
        self.w1: Floats = np.random.default_rng(seed).normal(0.0, math.sqrt(1 / SIGNALS), (UNITS, SIGNALS))
        self.b1: Floats = np.zeros(UNITS)
        self.w2: Floats = np.zeros((2, UNITS))
        self.b2: Floats = np.zeros(2)
        self.last: Floats | None = None  # the signals that the last prediction was made from

    def predict(self, signals: Sequence[float] | Floats) -> tuple[float, float]:
        """Turn six standardised signals into (f, rho), each in [1/4, 4].

        Raises ValueError unless there are six, all finite.
        """
        z = np.array(signals, dtype=np.float64)
        if z.shape != (SIGNALS,) or not np.isfinite(z).all():
            raise ValueError(
                f"predict takes {SIGNALS} finite signals, but got {signals!r}: standardise them."
            )
        self.last = z
        f, rho = LARGEST ** self._outputs(z)[1]
        return float(f), float(rho)

    def feedback(self, gradient: float | Sequence[float]) -> None:
        """Do one step of gradient descent, given the loss's derivative by ln f, or by (ln f, ln rho).

        A single number is by ln f. A positive one says that a larger step raises the loss, so it lowers the
        factor. One that is not finite, or one before the first prediction, changes nothing.
        """
        by_factor = np.zeros(2)
        by_factor[: np.size(gradient)] = gradient
        if self.last is None or not np.isfinite(by_factor).all():
            return
        h, o = self._outputs(self.last)
        by_output = by_factor * math.log(LARGEST) * (1 - o * o)
        by_hidden = (by_output @ self.w2) * (1 - h * h)
        self.w2 = self.w2 - self.rate * np.outer(by_output, h)
        self.b2 = self.b2 - self.rate * by_output
        self.w1 = self.w1 - self.rate * np.outer(by_hidden, self.last)
        self.b1 = self.b1 - self.rate * by_hidden

    def _outputs(self, z: Floats) -> tuple[Floats, Floats]:
        h = np.tanh(self.w1 @ z + self.b1)
        return h, np.tanh(self.w2 @ h + self.b2)

    def state_dict(self) -> dict[str, Any]:
        """Return lists of floats: `torch.load(weights_only=True)` and JSON both return them bit for bit."""
        state = {name: getattr(self, name).tolist() for name in ("w1", "b1", "w2", "b2")}
        return state | {"last": None if self.last is None else self.last.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. ValueError when a shape is not this network's, or something is no number."""
        try:
            arrays = {name: np.array(state[name], dtype=np.float64) for name in ("w1", "b1", "w2", "b2")}
            last = None if state["last"] is None else np.array(state["last"], dtype=np.float64)
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"this is no state of an AuxiliaryNetwork ({error}): load one of its own."
            ) from None
        if last is not None and last.shape != (SIGNALS,):
            raise ValueError(
                f"the last signals of the saved policy have shape {last.shape}, not {(SIGNALS,)}."
            )
        for name, loaded in arrays.items():
            if loaded.shape != getattr(self, name).shape:
                raise ValueError(
                    f"{name} of the saved policy has shape {loaded.shape}, not {getattr(self, name).shape}: "
                    "it is of another network."
                )
            setattr(self, name, loaded)
        self.last = last


class Policy:
    """The contract, and `constant`: both factors are 1."""

    name = "constant"

    def factors(self, step: int, seen: Observed) -> tuple[float, float]:
        """Return (f, rho) of step `step` (0-based): on the learning rate and on the trust radius."""
        return 1.0, 1.0

    def feedback(self, cosine: float, clipped: bool) -> None:
        """Hear what the step that the last factors led to did to the loss on a fresh batch.

        `cosine` is that between the fresh gradient and the applied update: positive where a longer step would
        have been worse. It judges rho if the step was `clipped` to the radius, else f. A skipped step has
        none.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later factors depend on, as plain numbers and lists."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as the policy that `state` was taken from."""


class RandomPolicy(Policy):
    """Both factors log-uniform in [1/4, 4], a function of (seed, step)."""

    name = "random"

    def __init__(self, seed: int):
        self.seed = seed

    def factors(self, step: int, seen: Observed) -> tuple[float, float]:
        f, rho = LARGEST ** np.random.default_rng((self.seed, step)).uniform(-1.0, 1.0, 2)
        return float(f), float(rho)


class AuxiliaryPolicy(Policy):
    """`auxnn`: an `AuxiliaryNetwork` on the run's signals."""

    name = "auxnn"

    def __init__(self, seed: int):
        self.signals = Signals()
        self.network = AuxiliaryNetwork(seed)

    def factors(self, step: int, seen: Observed) -> tuple[float, float]:
        return self.network.predict(self.signals.update(seen))

    def feedback(self, cosine: float, clipped: bool) -> None:
        self.network.feedback((0.0, cosine) if clipped else (cosine, 0.0))

    def state_dict(self) -> dict[str, Any]:
        return {"signals": self.signals.state_dict(), "network": self.network.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.signals.load_state_dict(state["signals"])
        self.network.load_state_dict(state["network"])


POLICIES: dict[str, Callable[[int], Policy]] = {
    "constant": lambda seed: Policy(),
    "random": RandomPolicy,
    "auxnn": AuxiliaryPolicy,
}


def make_policy(name: str, seed: int) -> Policy:
    """Make the policy `name` (`constant`, `random` or `auxnn`); raises ValueError on another name."""
    if name not in POLICIES:
        raise ValueError(f"policy={name!r} is unknown: choose one of {', '.join(POLICIES)}.")
    return POLICIES[name](seed)
