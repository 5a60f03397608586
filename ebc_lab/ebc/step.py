"""What one step is given (`StepInputs`), computes with (`Arithmetic`) and did (`StepStats`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .flat import joint_norm, real
from .logits import centre, mean_kl, rms_norm
from .scalars import Number


class NonFiniteUpdateError(ArithmeticError):
    """The base optimizer proposed a non-finite update from finite gradients.

    The weights are restored where a copy of them was kept.
    """


class Arithmetic(Protocol):
    """The operations of a step whose last bits depend on the machine: sums of many elements, exp, log.

    The bodies are torch's own operations, `TorchArithmetic`. Another object with these methods may replace
    them, to compute the same in an order of its own. What it returns is 0-dim, float32 or float64, and not
    finite where what it is given is not.
    """

    refusals: tuple[type[Exception], ...] = ()  # what a forward may raise for weights that have gone too far

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """L2 norm of all elements of the tensors together; 0 without any."""
        return joint_norm(tensors)

    def mean_kl(self, z: Tensor, z_new: Tensor, mask: Tensor | None = None, look: bool = True) -> Tensor:
        """See `logits.mean_kl`."""
        return mean_kl(z, z_new, mask, look)

    def movement(self, z: Tensor, z_new: Tensor, mask: Tensor | None = None) -> Tensor:
        """`logits.rms_norm` of the centred difference of logits (..., V); logits per token."""
        return rms_norm(centre(z_new) - centre(z), mask)

    def interpolate(
        self, old: Sequence[Tensor], new: Sequence[Tensor], c: Number, out: Sequence[Tensor]
    ) -> None:
        """Set each of `out` to old + c·(new - old), exact at c = 0 and 1; `out` may be `new`."""
        for a, b, to in zip(old, new, out, strict=True):
            torch.lerp(a, b, c if isinstance(c, float) else torch.as_tensor(c, dtype=b.dtype), out=to)

    def slope(self, gradients: Sequence[Tensor], old: Sequence[Tensor], new: Sequence[Tensor]) -> Tensor:
        """<gradients, new - old>, float64; of one tensor at least."""
        wide = torch.float64 if real(new[0]).dtype == torch.float64 else torch.float32
        parts = [
            torch.dot(real(g).flatten().to(wide), real(b - a).flatten().to(wide))
            for g, a, b in zip(gradients, old, new, strict=True)
        ]
        return torch.stack(parts).double().sum()


class TorchArithmetic(Arithmetic):
    """Torch's own operations."""


@dataclass(frozen=True)
class StepInputs:
    """The number and the batch of one step, as `StabilizedOptimizer.step` takes them."""

    t: int  # 0-based
    tokens: Any = None  # the batch as the forward takes it, rows first
    logits: Any = None  # the training forward's, (B, ..., V), or its output, which has them as `.logits`
    mask: Tensor | None = None  # (B, ...) bools or ones and zeros, the positions that count; None: all
    targets: Tensor | None = None  # (B, ...) class indices, for rules that need the loss of a trial step
    # (rows, targets) that choose c instead of the leading rows
    probe: tuple[Any, Tensor | None] | None = None
    stale: bool = False  # whether the logits are of other weights than W, so that z(W) is computed again


@dataclass(frozen=True)
class Forecast:
    """The loss on the probe rows at W and its derivative along dW, nats per token."""

    loss: Tensor
    slope: Tensor


@dataclass
class StepStats:
    """What one step did; None where nothing was measured.

    0-dim tensors that the host may not have read yet; from `take_step` floats, too, see `scalars`.
    `contributions` and `sensitivities` have shape (L,), one element for each group.
    """

    clip_coefficient: Number  # c, in [0, 1]: the applied update's norm over the proposal's
    grad_norm: Tensor  # global L2 norm of the gradient, before anything limits it
    skipped: Tensor  # bool: no usable update; the weights stayed where they were
    bad_gradient: Tensor  # bool: skipped because of the gradient; the bases' state is untouched as well
    failed: Tensor  # bool: a non-finite update from finite gradients; raised instead unless `deferred`
    gradient_scale: Tensor | None = None  # the limited gradient's norm over the gradient's
    delta: Number | None = None  # the budget used, nats per token
    target_kl: Number | None = None  # delta*, scheduled, nats per token
    radius: Number | None = None  # tau = 2·sqrt(delta), logits per token
    update_norm: Number | None = None  # ||dW|| of what c scales, where there is a radius
    radius_limit: Number | None = None  # r, the most that ||c·dW|| may be
    ceiling: Number | None = None  # min(1, r/||dW||), the most that c may be
    ruled: Number | None = None  # int, which bound c follows from: its place in `options.RULED`
    guard: Number | None = None  # the factor on tau under `surrogate`; 1 in the method itself
    trial: Number | None = None  # the last shadow trial scale
    trial_kl: Number | None = None  # the KL measured there, nats per token
    exponent: Number | None = None  # p of `shadow` with exponent=auto, KL being taken to grow as c^p
    measurements: int = 0
    tracked_log_ratio: Number | None = None  # x of `tracked`, ln(KL of the whole proposal / P)
    tracked_variance: Number | None = None  # v, of x; NaN: not measured yet
    tracked_flicker: Number | None = None  # the variance of ln(KL/P) about x
    tracked_scale: Number | None = None  # P
    innovation: Number | None = None  # the measured x minus the predicted one
    predicted_kl: Number | None = None  # q of the whole proposal, nats per token
    forecast: Forecast | None = None  # for controllers that compare losses
    calibration: Number | None = None  # k of `calibrated`, KL over S²
    surrogate: Number | None = None  # S, logits per token
    contributions: Tensor | None = None  # s_g, logits per token
    sensitivities: Tensor | None = None  # beta_g, where measured at this step
    slope: Number | None = None  # <grad loss, dW> of the whole proposal, nats per token
    agreement: Number | None = None  # r, the loss's real fall over its predicted one
    applied_kl: Number | None = None  # on tokens that did not choose c, nats per token
    applied_norm: Number | None = None  # ||c·dW|| over all weights, at audits; None where W was not kept
    movement: Number | None = None  # T, logits per token, on the same tokens
    tightness: Number | None = None  # T/(c·S), T of the budgeted part
    audit_tokens: int = 0
    kl_curve: Tensor | None = None  # (6,) float64, KL of CURVE_SCALES of the proposal; NaN: not finite

    def as_tensors(self) -> StepStats:
        """The same with a float64 tensor for each float (int64 for `ruled`), on the gradient's device."""
        for name, value in vars(self).items():
            if isinstance(value, float) or (name == "ruled" and isinstance(value, int)):
                dtype = torch.float64 if isinstance(value, float) else torch.int64
                setattr(self, name, torch.tensor(value, dtype=dtype, device=self.grad_norm.device))
        return self
