"""A run's result, and the figures computed from its `steps.csv`. An empty cell there means not measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, cast

from ebc_lab.config.parts import PARTS
from ebc_lab.ebc.options import CLIPPED_BELOW, CURVE_SCALES, KL_FLOOR, RULED

from .columns import CURVE_COLUMNS

if TYPE_CHECKING:
    import numpy as np

WARM_STEPS = 20  # first steps, left out of medians because their KL is several times larger
KL_BAND = 0.30  # relative: "within ±30% of the target"
PLATEAU_C = 0.3  # clip coefficients below this count as a plateau
LOGGED_EVERY = 20  # steps between log lines of the earlier study, whose statistics used only these
FINISHED = ("completed", "diverged", "raced")  # outcomes that are results; all processes of a run see them
OUTCOMES = (*FINISHED, "oom", "failed", "lost", "cancelled")


class RunResult(TypedDict, total=False):
    """The contents of result.json: how a run ended, and the run's figures. None means not measured.

    Losses and KL divergences are in nats per token, times in seconds. A failed run has only the first keys.
    Figures of the run's parts, which are declared in `config/parts`, are further keys.
    """

    run_id: str
    identity: str | None  # sha256 of the run's identity (`config.identity`); None if its spec was unreadable
    outcome: str  # one of OUTCOMES
    cause: str | None
    corpus_warning: str  # from `ebc-lab train`, if the text is not the requested one
    steps: int
    wall_s: float
    val_loss: float | None
    val_se: float | None
    test_loss: float | None
    test_se: float | None
    test_bits_per_char: float | None
    test_accuracy: float | None
    initial_loss: float | None
    last_loss: float | None
    heldout_loss: float | None
    c_median: float | None
    c_mean: float | None
    c_p10: float | None
    c_p90: float | None
    c_median_logged: float | None
    c_early: float | None
    c_late: float | None
    beta_early: float | None
    beta_late: float | None
    surrogate_early: float | None
    surrogate_late: float | None
    tightness_median: float | None
    eta_eff_median: float | None
    grad_clip_rate: float | None
    skipped_steps: int
    guard_count: int
    tokens_per_s: float | None
    probe_pct: float | None
    train_s: float
    kl_audits: int
    clip_rate: float | None
    plateau_steps: int
    kl_median: float | None
    kl_ratio_median: float | None
    kl_within_30pct: float | None
    kl_clipped_audits: int
    surrogate_median: float | None
    descent_median: float | None
    grad_norm_quantiles: list[float] | None
    weights_checksum: str  # of the weights that were evaluated at the end, 16 hex digits
    kl_curve: list[list[float]]  # (c, median KL of c times the proposal); with curve_every
    kl_law: list[float] | None  # A and B of the fit KL = A c² + B c to that curve
    workload: dict[str, Any]  # with workload=ebm: figures of the kept model
    curve: list[tuple[float, float | None, float]]  # step, loss on the fixed windows, seconds of training
    streams: dict[str, str]  # file name of each stream and kept model -> sha256 when the run ended
    overhead_pct: float | None  # kind=overhead: time that EBC adds to a step, %
    overhead_iqr_pct: list[float] | None  # its quartiles
    step_ratio: float  # kind=step: time of a step over that of torch's Adam
    step_ratio_iqr: list[float]  # its quartiles
    pairs: int
    plain_steps_per_s: float | None


def longest_streak(flags: Iterable[bool]) -> int:
    """Return the length of the longest streak of true values."""
    return max((len(list(streak)) for flag, streak in itertools.groupby(flags) if flag), default=0)


def summarise(steps: Mapping[str, np.ndarray], floor: float = KL_FLOOR["float32"]) -> dict[str, Any]:
    """Return a run's figures, computed from the columns of its `steps.csv`. None means not measured.

    `floor`: the smallest KL, in nats per token, that the run's precision can resolve. `kl_curve` omits
    smaller KLs. Quantiles of c omit skipped steps. Figures in `_early` and `_late` are medians near the
    beginning and the end of the run. `c_median_logged` is a median over every 20th step.
    """
    done = steps["skipped"] == 0
    c = steps["c"][done]
    losses = steps["loss"]
    slope = steps["slope"][steps["step"] >= WARM_STEPS]
    return {
        "initial_loss": float(losses[0]) if len(losses) else None,
        "last_loss": _mean(losses[-50:]),
        "clip_rate": _mean(c < CLIPPED_BELOW),
        "c_mean": _mean(c),
        "c_p10": _quantile(c, 0.1),
        "c_median": _quantile(c, 0.5),
        "c_p90": _quantile(c, 0.9),
        "plateau_steps": longest_streak(c < PLATEAU_C),
        "eta_eff_median": _median(steps["eta_eff"][done]),
        **_kl_figures(steps),
        "surrogate_median": _median(_measured(steps["surrogate"])),
        "tightness_median": _median(_measured(steps["tightness"])),
        "descent_median": _median(-_measured(slope)),
        "c_median_logged": _median(c[steps["step"][done] % LOGGED_EVERY == 0]),
        **_drifts(steps),
        **_further(steps, floor),
        "grad_clip_rate": _mean(_measured(steps["grad_scale"]) < CLIPPED_BELOW),
        "grad_norm_quantiles": _grid_of_quantiles(steps["grad_norm"][done]),
        "skipped_steps": int((~done).sum()),
    }


def _further(steps: Mapping[str, np.ndarray], floor: float) -> dict[str, Any]:
    """Return the figures computed from columns that only some runs record: medians, shares of steps, the
    curve of KL against c (values of at least `floor`), and the law fitted to it."""
    of_steps = [figure.key for part in PARTS for figure in part.figures if figure.of_steps]
    figures: dict[str, Any] = {key: _median(_measured(steps[key])) for key in of_steps if key in steps}
    if "ruled" in steps:
        sound = steps["skipped"] == 0
        figures |= {f"{name}_ruled": _mean(steps["ruled"][sound] == RULED.index(name)) for name in RULED[1:]}
        figures["measured"] = _mean(steps["measurements"][sound] > 0)
    if CURVE_COLUMNS[0] in steps:
        medians = [_median(_measured(steps[name])) for name in CURVE_COLUMNS]
        measured = zip(CURVE_SCALES, medians, strict=True)
        curve = [[c, kl] for c, kl in measured if kl is not None and kl >= floor]
        figures |= {"kl_curve": curve, "kl_law": kl_law(curve)}
    return figures


def limited_by_kl(steps: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return a boolean array of shape (steps,): whether the KL budget, not a radius, limited each step."""
    clipped: np.ndarray = steps["c"] < CLIPPED_BELOW
    return clipped & (steps["ruled"] == RULED.index("kl")) if "ruled" in steps else clipped


def kl_law(curve: Sequence[Sequence[float]]) -> list[float] | None:
    """Return A and B, at least 0, of the law KL = A c² + B c. They are fitted to the points (c, KL > 0) by
    least squares of the relative errors. Return None for fewer than two points.

    With float weights, B is 0. With quantized weights, the number of codes that flip is proportional to c,
    and each flips by a whole level, so KL falls no faster than c.
    """
    import numpy as np
    from scipy.optimize import nnls

    if len(curve) < 2:
        return None
    c, kl = np.array(curve).T
    coefficients, _ = nnls(np.stack([c * c / kl, c / kl], 1), np.ones(len(c)))
    return [float(x) for x in coefficients]


def _kl_figures(steps: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the figures of the applied KL: its median over audited steps from step 20 on, or over all if no
    audit was that late, and its ratio to the target over the audited steps that the KL budget clipped."""
    applied = steps["applied_kl"]
    audited = applied == applied  # False for NaN
    late = audited & (steps["step"] >= WARM_STEPS)
    clipped = audited & limited_by_kl(steps) & (steps["target_kl"] == steps["target_kl"])
    ratio = applied[clipped] / steps["target_kl"][clipped]
    return {
        "kl_median": _median(applied[late if late.any() else audited]),
        "kl_ratio_median": _median(ratio),
        "kl_within_30pct": _mean(abs(ratio - 1) <= KL_BAND),
        "kl_audits": int(audited.sum()),
        "kl_clipped_audits": int(clipped.sum()),
    }


def _drifts(steps: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """Return the medians of c, S and beta early and late in a run. Each window is a tenth of the run's steps:
    the late one is the last tenth; the early one starts at step 20, or at the midpoint of a run shorter than
    40 steps. Beta at a step is the mean over groups of each group's last measured value."""
    import numpy as np

    columns = {"c": steps["c"], "surrogate": steps["surrogate"]}
    betas = np.array([values for name, values in steps.items() if name.startswith("beta_")])
    if len(betas):
        # forward-fill: each group's last known value, NaN before its first
        known = np.where(np.isnan(betas), 0, np.arange(betas.shape[1]))
        columns["beta"] = np.take_along_axis(betas, np.maximum.accumulate(known, axis=1), axis=1).mean(0)
    step = steps["step"]
    span = max(len(step) // 10, 1)
    first = min(WARM_STEPS, len(step) // 2)
    windows = {"early": (step >= first) & (step < first + span), "late": step >= len(step) - span}
    return {
        f"{name}_{when}": _median(_measured(values[window]))
        for name, values in columns.items()
        for when, window in windows.items()
    }


def _measured(values: np.ndarray) -> np.ndarray:
    return cast("np.ndarray", values[values == values])  # without NaN


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _median(values: np.ndarray) -> float | None:
    import numpy as np

    return float(np.median(values)) if len(values) else None


def _quantile(values: np.ndarray, share: float) -> float | None:
    import numpy as np

    with np.errstate(invalid="ignore"):  # interpolation between infinities, in a run that diverged
        return float(np.quantile(values, share)) if len(values) else None


def _grid_of_quantiles(values: np.ndarray) -> list[float] | None:
    """Return the 0%, 2.5%, …, 100% quantiles of the finite values; None if no value is finite."""
    import numpy as np

    known = values[np.isfinite(values)]
    return [float(q) for q in np.quantile(known, np.linspace(0, 1, 41))] if len(known) else None
