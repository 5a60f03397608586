"""What is recorded of a run, step by step, and how it is written.

`steps.csv` has one row for every step and `evals.csv` one for every evaluation; both are append-only and are cut back to the
checkpoint's step on resume. Other files are written whole. An empty cell was not measured. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    import numpy as np


CLIPPED_BELOW = 0.999
WARM_STEPS = 20  # the KL of the first steps is several times larger: medians leave them out
KL_BAND = 0.30  # "within ±30% of the target"
PLATEAU_C = 0.3
LOGGED_EVERY = (
    20  # steps between log lines of the earlier study, whose clip statistics came from those steps alone
)
SHOCK_WINDOW = 20  # steps before a shock that say what the loss was
RECOVERY_WINDOW = 10  # steps whose mean must be back there


class RunResult(TypedDict, total=False):
    """result.json: how a run ended, and its figures; None where nothing was measured. A failed run has the first keys.

    Losses in nats per token, KL divergences in nats per token and step, times in seconds.
    """

    run_id: str
    identity: str  # sha256 of what names the run
    outcome: str  # completed | diverged | oom | failed | lost | cancelled
    cause: str | None
    steps: int
    wall_s: float
    val_loss: float | None
    val_se: float | None
    test_loss: float | None
    heldout_loss: float | None
    c_median: float | None
    clip_rate: float | None
    plateau_steps: int
    kl_median: float | None
    kl_ratio_median: float | None
    kl_within_30pct: float | None
    kl_clipped_audits: int
    surrogate_median: float | None
    descent_median: float | None
    grad_norm_quantiles: list[float] | None
    shock_peak: float | None
    shock_recovery_steps: int | None
    curve: list[Any]  # (step, loss on the fixed windows, seconds of training)
    overhead_pct: float | None  # of a measurement of EBC's overhead, with its quartiles
    overhead_iqr_pct: list[float] | None


def longest_streak(flags: Iterable[bool]) -> int:
    """The most consecutive true values."""
    best = now = 0
    for flag in flags:
        now = now + 1 if flag else 0
        best = max(best, now)
    return best


def _median(values: np.ndarray) -> float | None:
    import numpy as np

    return float(np.median(values)) if len(values) else None


def recovery(losses: np.ndarray, shock: int) -> dict[str, Any]:
    """What a disturbance at step `shock` did to the training loss, and how long it took to pass.

    Before: mean and spread of the 20 steps until it. `shock_peak`: how far the mean of any 10 later steps rose above that;
    `shock_recovery_steps`: steps until such a mean is back within two standard errors, None if it never is.
    """
    import numpy as np

    before, after = losses[max(0, shock - SHOCK_WINDOW) : shock], losses[shock + 1 :]
    if len(before) < 2 or len(after) < RECOVERY_WINDOW:
        return {"shock_peak": None, "shock_recovery_steps": None}
    means = np.convolve(after, np.full(RECOVERY_WINDOW, 1 / RECOVERY_WINDOW), mode="valid")
    level, error = before.mean(), before.std(ddof=1) / math.sqrt(RECOVERY_WINDOW)
    back = np.flatnonzero(means <= level + 2 * error)
    return {
        "shock_peak": float(means.max() - level),
        "shock_recovery_steps": int(back[0]) if len(back) else None,
    }


def _drift(values: np.ndarray, step: np.ndarray) -> tuple[float | None, float | None]:
    """Median of what was measured early (a tenth of the run from step 20 on, half of a short run) and in its last tenth."""
    import numpy as np

    n = len(step)
    span = max(n // 10, 1)
    first = min(WARM_STEPS, n // 2)
    seen = ~np.isnan(values)
    early, late = seen & (step >= first) & (step < first + span), seen & (step >= n - span)
    return _median(values[early]), _median(values[late])


def _carried(rows: np.ndarray) -> np.ndarray:
    """Each row with its last known value carried forward, NaN before the first."""
    import numpy as np

    known = np.where(np.isnan(rows), 0, np.arange(rows.shape[1]))
    return np.take_along_axis(rows, np.maximum.accumulate(known, axis=1), axis=1)


def summarise(steps: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """One run's figures, from every step of `steps.csv`; None where nothing was measured.

    `kl_median` (of a plain run: its natural KL) leaves out the first 20 steps where the run is longer; `kl_within_30pct` is
    the share of audited, clipped steps whose applied KL lies within 30% of delta*; c quantiles are over all steps that were not
    skipped; `_early` and `_late` are medians near the two ends of the run (of beta: the groups' mean, each as last measured);
    `c_median_logged` is the median of every 20th step alone.
    """
    import numpy as np

    done = steps["skipped"] == 0
    c = steps["c"][done]
    audited = ~np.isnan(steps["applied_kl"])
    clipped = audited & (steps["c"] < CLIPPED_BELOW) & ~np.isnan(steps["target_kl"])
    late = audited & (steps["step"] >= WARM_STEPS)
    kl = steps["applied_kl"][late if late.any() else audited]
    ratio = steps["applied_kl"][clipped] / steps["target_kl"][clipped]
    tightness = steps["tightness"][~np.isnan(steps["tightness"])]
    surrogate = steps["surrogate"][~np.isnan(steps["surrogate"])]
    quantile = (lambda q: float(np.quantile(c, q))) if len(c) else (lambda q: None)
    losses = steps["loss"]
    warm = steps["step"] >= WARM_STEPS
    descent = -steps["slope"][warm & ~np.isnan(steps["slope"])]
    norms = steps["grad_norm"][done]
    scales = steps["grad_scale"][~np.isnan(steps["grad_scale"])]
    betas = np.array([v for k, v in steps.items() if k.startswith("beta_")])
    logged = c[steps["step"][done] % LOGGED_EVERY == 0]
    drifts = {"c": steps["c"], "surrogate": steps["surrogate"]}
    if len(betas):
        drifts["beta"] = _carried(betas).mean(0)
    drift = {
        f"{k}_{when}": v
        for k, x in drifts.items()
        for when, v in zip(("early", "late"), _drift(x, steps["step"]), strict=True)
    }
    return {
        "initial_loss": float(losses[0]) if len(losses) else None,
        "last_loss": float(losses[-min(50, len(losses)) :].mean()) if len(losses) else None,
        "clip_rate": float((c < CLIPPED_BELOW).mean()) if len(c) else None,
        "c_mean": float(c.mean()) if len(c) else None,
        "c_p10": quantile(0.1),
        "c_median": quantile(0.5),
        "c_p90": quantile(0.9),
        "plateau_steps": longest_streak(c < PLATEAU_C),
        "eta_eff_median": _median(steps["eta_eff"][done]),
        "kl_median": _median(kl),
        "kl_ratio_median": _median(ratio),
        "kl_within_30pct": float((np.abs(ratio - 1) <= KL_BAND).mean()) if len(ratio) else None,
        "kl_audits": int(audited.sum()),
        "kl_clipped_audits": int(clipped.sum()),
        "surrogate_median": _median(surrogate),
        "tightness_median": _median(tightness),
        "descent_median": _median(descent),
        "c_median_logged": _median(logged),
        **drift,
        "grad_clip_rate": float((scales < CLIPPED_BELOW).mean()) if len(scales) else None,
        "grad_norm_quantiles": [float(q) for q in np.quantile(norms, np.linspace(0, 1, 41))]
        if len(norms)
        else None,
        "skipped_steps": int((~done).sum()),
    }
