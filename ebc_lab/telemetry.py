"""What is recorded of a run, step by step, and how it is written.

`steps.csv` has one row for every step and `evals.csv` one for every evaluation; both are append-only and are cut back to the
checkpoint's step on resume. Other files are written whole. An empty cell was not measured. No torch here.
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .config import UserError, digest

if TYPE_CHECKING:  # `status` reads and writes JSON only, and answers sooner without numpy
    import numpy as np

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
REPORT_S = 0.5  # seconds between two signs of life of a run
CLIPPED_BELOW = 0.999
WARM_STEPS = 20  # the KL of the first steps is several times larger: medians leave them out
KL_BAND = 0.30  # "within ±30% of the target"
PLATEAU_C = 0.3
LOGGED_EVERY = 20  # steps between log lines of the earlier study, whose clip statistics came from those steps alone
SHOCK_WINDOW = 20  # steps before a shock that say what the loss was
RECOVERY_WINDOW = 10  # steps whose mean must be back there


def write_whole(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Write a file by way of `written_whole`."""
    with written_whole(path, durable=durable) as f:
        f.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def written_whole(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Write a file so that a reader, or a crash, sees the old one or the new one: temporary name, fsync, rename.

    `durable=False` leaves out the fsync, for what may be lost with the machine (progress).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            if durable:
                os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """`write_whole` of readable JSON. NaN and infinities become null: JSON has none."""
    write_whole(path, json.dumps(as_read(value), indent=1, allow_nan=False) + "\n", durable=durable)


def as_read(value: Any) -> Any:
    """A value as it comes back from a JSON file: lists, string keys, null for NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(k): as_read(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_read(v) for v in value]
    if hasattr(value, "item"):  # a numpy scalar
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """Raises UserError, naming the file, when it is not JSON."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and the next run makes it anew.") from None


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """`write_json` with a checksum of everything else in it, by which `read_sealed` notices an edit."""
    write_json(path, with_checksum(value))


def with_checksum(value: Mapping[str, Any], key: str = "checksum") -> dict[str, Any]:
    """The value as it is read back, and under `key` the digest of all the rest of it."""
    rest = {k: v for k, v in as_read(value).items() if k != key}
    return {**rest, key: digest(rest)}


def checksum_holds(value: Any, key: str = "checksum") -> bool:
    """Whether what `with_checksum` made is still what it was; one without is not."""
    if not isinstance(value, dict):
        return False
    try:
        return bool(value.get(key) == digest({k: v for k, v in value.items() if k != key}))
    except ValueError:  # a NaN, which we never write
        return False


def read_sealed(path: Path, remedy: str) -> dict[str, Any]:
    """What `write_sealed` was given. Raises UserError, with the remedy, when the file was truncated or edited since."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:  # not JSON, or not text
        raise UserError(f"{path} is damaged ({error}): {remedy}.") from None
    if not checksum_holds(value):
        raise UserError(f"{path} was edited after it was written: {remedy}.")
    return {k: v for k, v in value.items() if k != "checksum"}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, int):
        return str(value)
    return f"{value:.9g}"


class Pulse:
    """A run's sign of life: progress.json, written at most every REPORT_S seconds however often it is called."""

    def __init__(self, path: Path, steps: int):
        self.path, self.steps, self.at = path, steps, time.monotonic()
        self.step: int | None = None  # where this attempt began, or what was written last
        self._write(0, 0.0)

    def __call__(self, step: int) -> None:
        now = time.monotonic()
        self.step = step if self.step is None else self.step
        if now - self.at >= REPORT_S:
            self._write(step, (step - self.step) / (now - self.at))
            self.at, self.step = now, step

    def _write(self, step: int, steps_per_s: float) -> None:
        now = {"step": step, "steps": self.steps, "steps_per_s": steps_per_s, "at": time.monotonic()}
        write_json(self.path, now, durable=False)


class Stream:
    """An append-only CSV. `keep_below` drops the rows at or after a step: what a killed run wrote past its checkpoint."""

    def __init__(self, path: Path, columns: Sequence[str], keep_below: int):
        self.path, self.columns = path, tuple(columns)
        kept: list[str] = []
        if keep_below and path.exists():
            lines = path.read_text().splitlines()
            if not lines or lines[0] != ",".join(self.columns):
                raise UserError(f"{path} has other columns than this version writes: delete its run folder.")
            kept = [line for line in lines[1:] if line.count(",") == len(columns) - 1 and int(line.split(",")[0]) < keep_below]
        write_whole(path, "".join(f"{line}\n" for line in [",".join(self.columns), *kept]))
        self.file = open(path, "a", buffering=1 << 16)  # noqa: SIM115 - open as long as the run

    def append(self, row: Mapping[str, Any]) -> None:
        self.file.write(",".join(_cell(row.get(c)) for c in self.columns) + "\n")

    def sync(self) -> None:
        """Everything appended so far is on disk when this returns."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.sync()
        self.file.close()


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """A stream as float arrays by column, NaN where empty. A last line that is still being written is left out."""
    import numpy as np

    with open(path, newline="") as f:
        rows = list(csv.reader(f))
    header, body = rows[0], [r for r in rows[1:] if len(r) == len(rows[0])]
    return {
        name: np.array([float(r[i]) if r[i] else math.nan for r in body], dtype=np.float64) for i, name in enumerate(header)
    }


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
    return {"shock_peak": float(means.max() - level), "shock_recovery_steps": int(back[0]) if len(back) else None}


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
        f"{k}_{when}": v for k, x in drifts.items() for when, v in zip(("early", "late"), _drift(x, steps["step"]), strict=True)
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
        "grad_norm_quantiles": [float(q) for q in np.quantile(norms, np.linspace(0, 1, 41))] if len(norms) else None,
        "skipped_steps": int((~done).sum()),
    }
