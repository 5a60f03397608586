"""The columns of every CSV file, with their units and meanings."""

from __future__ import annotations

STEP_COLUMNS = (
    "step",
    "loss",  # nats per token, on the batch, before the update
    "lr",
    "c",  # clip coefficient
    "eta_eff",  # c·lr
    "delta",  # KL budget, nats per token
    "target_kl",  # delta* at this step
    "radius",  # tau = 2·sqrt(delta), logits per token
    "guard",  # g, the factor on tau
    "trial",  # last shadow trial scale
    "trial_kl",  # KL measured there, on the tokens that choose c
    "measurements",
    "predicted_kl",  # q of the whole proposal, nats per token
    "calibration",  # k of `calibrated`: KL over S^2
    "slope",  # <gradient, dW> of the whole proposal, nats per token
    "agreement",  # r: what the loss fell by over what was predicted
    "applied_kl",  # on tokens that did not choose c
    "audit_tokens",
    "movement",  # T, logits per token
    "surrogate",  # S, logits per token
    "tightness",  # T/(c·S)
    "grad_norm",  # before anything limits it
    "grad_scale",  # the limited gradient's norm over it
    "skipped",
)
EVAL_COLUMNS = ("step", "val_loss", "val_se", "tokens", "train_s")
