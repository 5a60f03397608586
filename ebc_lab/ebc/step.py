"""What one step did, as tensors that nobody has read yet; and the one thing that it refuses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


class NonFiniteUpdateError(ArithmeticError):
    """The base optimizer proposed a non-finite update from finite gradients. The weights are restored where they were kept."""


@dataclass
class StepStats:
    """What one step did. 0-dim tensors (`contributions` and `sensitivities`: (L,)); None where not measured."""

    clip_coefficient: Tensor  # c, in [0, 1]: the applied update's norm over the proposal's
    grad_norm: Tensor  # global L2 norm of the gradient, before anything limits it
    skipped: Tensor  # bool: no usable update; the weights stayed where they were
    bad_gradient: Tensor  # bool: skipped because of the gradient; the bases' state is untouched as well
    failed: Tensor  # bool: a non-finite update from finite gradients; only `deferred` says it here, else it is raised
    gradient_scale: Tensor | None = None  # the limited gradient's norm over the gradient's
    delta: Tensor | None = None  # the budget used, nats per token
    target_kl: Tensor | None = None  # delta*, scheduled, nats per token
    radius: Tensor | None = None  # tau = 2·sqrt(delta), logits per token
    guard: Tensor | None = None  # g, the factor on tau
    trial: Tensor | None = None  # the last shadow trial scale
    trial_kl: Tensor | None = None  # the KL measured there, nats per token
    measurements: int = 0
    predicted_kl: Tensor | None = None  # q of the whole proposal, nats per token
    calibration: Tensor | None = None  # k of `calibrated`, KL over S²
    surrogate: Tensor | None = None  # S, logits per token
    contributions: Tensor | None = None  # s_g, logits per token
    sensitivities: Tensor | None = None  # beta_g, where measured at this step
    slope: Tensor | None = None  # <grad loss, dW> of the whole proposal, nats per token
    agreement: Tensor | None = None  # r, what the loss fell by over what was predicted
    applied_kl: Tensor | None = None  # on tokens that did not choose c, nats per token
    movement: Tensor | None = None  # T, logits per token, on the same tokens
    tightness: Tensor | None = None  # T/(c·S), T of the budgeted part
    audit_tokens: int = 0
