"""A run's result, and its figures as they follow from `steps.csv`, where an empty cell was not measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, cast

from ebc_lab.config.parts import PARTS
from ebc_lab.ebc.options import CLIPPED_BELOW, CURVE_SCALES, KL_FLOOR, RULED

from .columns import CURVE_COLUMNS

if TYPE_CHECKING:
    import numpy as np

WARM_STEPS = 20  # the KL of the first steps is several times larger: medians leave them out
KL_BAND = 0.30  # "within ±30% of the target"
PLATEAU_C = 0.3
LOGGED_EVERY = 20  # steps between log lines of the earlier study, whose statistics came from those alone
FINISHED = ("completed", "diverged", "raced")  # outcomes that are results, which all processes of a run see
OUTCOMES = (*FINISHED, "oom", "failed", "lost", "cancelled")


class RunResult(TypedDict, total=False):
    """result.json: how a run ended, and its figures; None where nothing was measured.

    Losses and KL divergences in nats per token, times in seconds. A failed run has the first keys only; the
    figures of the run's parts, which are declared in `config/parts`, are beside these.
    """

    run_id: str
    identity: str | None  # sha256 of what names the run; None where its spec could not be read
    outcome: str  # one of OUTCOMES
    cause: str | None
    corpus_warning: str  # of a run of `train` whose text is not the one that was asked for
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
    weights_checksum: str  # of the weights by which the run was judged, 16 hex digits
    kl_curve: list[list[float]]  # (c, median KL of c times the proposal); with curve_every
    kl_law: list[float] | None  # A, B of KL = A c² + B c through it
    workload: dict[str, Any]  # of workload=ebm: figures of the kept model
    curve: list[tuple[float, float | None, float]]  # step, loss on the fixed windows, seconds of training
    streams: dict[str, str]  # steps.csv, evals.csv, the kept model -> their sha256 when the run ended
    overhead_pct: float | None  # of a measurement of EBC's overhead, with its quartiles
    overhead_iqr_pct: list[float] | None
    step_ratio: float  # of a measurement of a step: its time over that of torch's Adam, with its quartiles
    step_ratio_iqr: list[float]
    pairs: int
    plain_steps_per_s: float | None


def longest_streak(flags: Iterable[bool]) -> int:
    """Return the largest number of consecutive true values."""
    best = now = 0
    for flag in flags:
        now = now + 1 if flag else 0
        best = max(best, now)
    return best


def summarise(steps: Mapping[str, np.ndarray], floor: float = KL_FLOOR["float32"]) -> dict[str, Any]:
    """Return a run's figures from the columns of its `steps.csv`; None where nothing was measured.

    `floor`: the smallest KL that the precision can show, nats per token; a curve leaves smaller ones out.
    Quantiles of c leave out skipped steps. `_early` and `_late` are medians near the beginning and the end of
    the run; `c_median_logged` is the median over every 20th step alone.
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
    """Return the figures of columns that only some runs have: medians, and the curve of KL against c."""
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
    """Return which steps, as booleans of shape (steps,), the KL budget limited: no others, and no radius."""
    clipped: np.ndarray = steps["c"] < CLIPPED_BELOW
    return clipped & (steps["ruled"] == RULED.index("kl")) if "ruled" in steps else clipped


def kl_law(curve: Sequence[Sequence[float]]) -> list[float] | None:
    """Return A and B >= 0 of KL = A c² + B c by least squares of the relative errors at points (c, KL > 0);
    None for fewer than two points.

    A float model has B = 0. With quantized weights as many codes flip as c is large, each by a whole step, so
    that KL falls no faster than c.
    """
    import numpy as np
    from scipy.optimize import nnls

    if len(curve) < 2:
        return None
    c, kl = np.array(curve).T
    coefficients, _ = nnls(np.stack([c * c / kl, c / kl], 1), np.ones(len(c)))
    return [float(x) for x in coefficients]


def _kl_figures(steps: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the figures of the applied KL: of the audited steps after the first 20, or of all where no audit
    was later; and over its target, of those that the KL budget clipped."""
    applied = steps["applied_kl"]
    audited = applied == applied  # not NaN
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
    """Return medians of c, S and beta (the groups' mean, each as last measured) in the run's last tenth, and
    in a tenth from step 20 on, or from half of a short run."""
    import numpy as np

    columns = {"c": steps["c"], "surrogate": steps["surrogate"]}
    betas = np.array([values for name, values in steps.items() if name.startswith("beta_")])
    if len(betas):
        # of each group the last known value, NaN before its first
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

    with np.errstate(invalid="ignore"):  # between infinities, in a run that diverged
        return float(np.quantile(values, share)) if len(values) else None


def _grid_of_quantiles(values: np.ndarray) -> list[float] | None:
    """Return 41 quantiles of the finite values, smallest first; None where none is finite."""
    import numpy as np

    known = values[np.isfinite(values)]
    return [float(q) for q in np.quantile(known, np.linspace(0, 1, 41))] if len(known) else None
