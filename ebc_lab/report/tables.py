"""The CSV tables of a study: stable columns, one row per run, or per arm of a suite. Units and meanings are data: docs/files.md
repeats them.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebc_lab.config.identity import resolve_controller
from ebc_lab.records.files import write_whole

if TYPE_CHECKING:
    import pandas as pd

    from ebc_lab.study.stages.spec import RunSpec

NATS, SHARE, SCALE = "nats/token", "0–1", "×"
COLUMN_MEANINGS = {  # of summary_*.csv, one row a run: column -> unit, meaning
    "arm": ("", "what was trained, `<optimizer>_<projection>_<stabilizer>[_d<δ*>_<budget>]_x<scale>[_lindelta][_lrdecay]`"),
    "seed": ("", "of the initial weights and the data order; runs of one seed are pairs"),
    "lr": ("", "learning rate at its peak"),
    "lr_scale": (SCALE, "lr over the track's best plain learning rate"),
    "optimizer": ("", "the base optimizer"),
    "projection": ("", "of the weights"),
    "stabilizer": ("", "what acts between backward and the update; `none` is the plain optimizer"),
    "budget": ("", "how EBC finds c; empty without EBC"),
    "aggregate": ("", "how contributions add up to S; empty where S is not measured"),
    "controller": ("", "how EBC's δ moves; empty without EBC"),
    "delta_star": (NATS, "δ*, the target KL of a step, before its schedule"),
    "outcome": ("", "`completed`, `diverged`, `oom`, `failed`, `lost` or `cancelled`"),
    "steps": ("steps", "taken"),
    "val_loss": (NATS, "cross-entropy on the whole validation split; decisions look at this one"),
    "val_se": (NATS, "its standard error over the split's windows"),
    "test_loss": (NATS, "cross-entropy on the whole test split; the verdict looks at this one"),
    "test_se": (NATS, "its standard error over the split's windows"),
    "heldout_loss": (NATS, "validation and test split together"),
    "test_bits_per_char": ("bits/character", "test_loss over ln 2"),
    "test_accuracy": (SHARE, "next characters of the test split told right"),
    "clip_rate": (SHARE, "steps with c < 0.999"),
    "c_mean": (SHARE, "mean clip coefficient c, over steps that were not skipped, like its quantiles"),
    "c_p10": (SHARE, "10% quantile of c"),
    "c_median": (SHARE, "median of c"),
    "c_p90": (SHARE, "90% quantile of c"),
    "eta_eff_median": ("", "median of c·lr"),
    "kl_median": (NATS, "median applied KL of the audited steps from step 20 on; of a plain run: its natural KL"),
    "kl_within_30pct": (SHARE, "audited, clipped steps whose applied KL lies within ±30% of δ*"),
    "tightness_median": ("", "median of T/(c·S); above 1 the bound was too small"),
    "guard_count": ("audits", "at which the guard stepped in"),
    "skipped_steps": ("steps", "without a usable gradient or update"),
    "tokens_per_s": ("tokens/s", "of training, evaluations aside"),
    "overhead_pct": ("%", "of a step's time that EBC adds, from one paired measurement; EBC arms of the finals only"),
    "probe_pct": ("%", "of the training time that measuring took on the host"),
    "wall_s": ("s", "of the run on the clock, evaluations and earlier attempts up to their checkpoint included"),
    "run_id": ("", "its folder under runs/"),
}
COLUMNS = tuple(COLUMN_MEANINGS)
TIMING_COLUMNS = ("tokens_per_s", "overhead_pct", "probe_pct", "wall_s")
TUNED = "tuned_"
OF_A_DIFFERENCE = (
    *("low", "high", "detectable"),
    *("method", "median", "joint_low", "joint_high", "joint_detectable", "comparisons", "p", "p_joint", "sigmas"),
    *("alone", "judged"),
)
ABLATION_MEANINGS = {  # of ablation.csv, one row an arm; figures are means over its completed seeds
    "track": ("", "the optimizer and projection, `<optimizer>_<projection>`"),
    "arm": ("", "its name in the suite's file"),
    "about": ("", "what it is, in words"),
    "lr": COLUMN_MEANINGS["lr"],
    "lr_scale": COLUMN_MEANINGS["lr_scale"],
    "delta_star": COLUMN_MEANINGS["delta_star"],
    f"{TUNED}lr_scale": (SCALE, "the best of its grid, where the arm has one: LR scale"),
    f"{TUNED}delta": (SCALE, "the same: δ* over the calibrated (or natural) one"),
    f"{TUNED}strength": ("", "the same: the stabilizer's strength"),
    "strength": ("", "of the stabilizer: its own unit"),
    "seeds": ("runs", "that the arm has"),
    "completed": ("runs", "of them"),
    "diverged": ("runs", "of them"),
    **{k: COLUMN_MEANINGS[k] for k in ("val_loss", "test_loss", "heldout_loss", "c_median")},
    "c_median_logged": (SHARE, "median of c at every 20th step alone"),
    "c_early": (SHARE, "median c in a tenth of the run from step 20 on"),
    "c_late": (SHARE, "median c in the run's last tenth"),
    "clip_rate": COLUMN_MEANINGS["clip_rate"],
    "grad_clip_rate": (SHARE, "steps whose gradient was scaled below 0.999"),
    "kl_median": COLUMN_MEANINGS["kl_median"],
    "kl_ratio_median": ("", "median of applied KL over δ*, audited, clipped steps"),
    "kl_within_30pct": COLUMN_MEANINGS["kl_within_30pct"],
    "surrogate_early": ("logits/token", "median S, when as for c"),
    "surrogate_late": ("logits/token", "median S, when as for c"),
    "beta_early": ("logits/norm", "the groups' mean β, when as for c"),
    "beta_late": ("logits/norm", "the groups' mean β, when as for c"),
    **{k: COLUMN_MEANINGS[k] for k in ("tightness_median", "guard_count", "skipped_steps")},
    "shock_peak": (NATS, "how far the mean training loss of any 10 steps after a shock rose above that before it"),
    "shock_recovery_steps": ("steps", "until such a mean was back; empty where a seed's never was"),
    "shock_recovered": (SHARE, "seeds that came back"),
    "versus": ("", "the arm that it is compared with"),
    "pairs": ("seeds", "that both have"),
    "difference": (NATS, "mean of test loss, arm minus versus, paired by seed; empty where a run diverged"),
    "low": (NATS, "lower end of its 95% interval by itself; empty: none, or infinite where method is `rank`"),
    "high": (NATS, "upper end of it"),
    "detectable": (NATS, "the smallest difference that so many seeds would have shown, with power 80%"),
    "method": ("", "`t`, or `rank` where a run diverged"),
    "median": (NATS, "of the paired differences"),
    "joint_low": (NATS, "lower end of the interval that holds, at 95%, for all comparisons together"),
    "joint_high": (NATS, "upper end of it"),
    "joint_detectable": (NATS, "the smallest difference that it could have told from none"),
    "comparisons": ("", "how many that is"),
    "p": (SHARE, "of no difference, by itself"),
    "p_joint": (SHARE, "corrected for the comparisons"),
    "sigmas": ("σ", "the difference over the noise of replicate seeds"),
    "alone": ("", "`beats`, `meets`, `misses` or `undecided`, by the interval by itself"),
    "judged": ("", "the same by the joint interval, on which claims rest"),
}
FILE_OF_STAGE = {"finals": "summary_final.csv"}


def summary_path(root: Path, stage: str) -> Path:
    return root / FILE_OF_STAGE.get(stage, f"summary_{stage}.csv")


def summary(specs: Sequence[RunSpec], results: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """One row per run, in the order of the plan; empty where a run has no such figure."""
    import pandas as pd

    measured = {
        s.run.optimizer.name + s.run.projection.name: results.get(s.run_id, {}).get("overhead_pct")
        for s in specs
        if s.kind == "overhead"
    }
    rows: dict[str, dict[str, Any]] = {}
    for spec in specs:
        if spec.kind != "train" or spec.run_id in rows:
            continue
        run, result = resolve_controller(spec.run), results.get(spec.run_id, {})
        ebc = run.stabilizer.name == "ebc"
        bound = ebc and (run.budget.name in ("surrogate", "calibrated") or run.budget.sensitivity_every > 0)
        rows[spec.run_id] = {
            **{k: result.get(k) for k in COLUMNS},
            "arm": spec.arm,
            "seed": run.seed,
            "lr": run.optimizer.lr,
            "lr_scale": spec.lr_scale,
            "optimizer": run.optimizer.name,
            "projection": run.projection.name,
            "stabilizer": run.stabilizer.name,
            "budget": run.budget.name if ebc else None,
            "aggregate": run.budget.aggregate if bound else None,
            "controller": run.controller.name if ebc else None,
            "delta_star": run.budget.target_kl if ebc else None,
            "overhead_pct": measured.get(run.optimizer.name + run.projection.name) if ebc else None,
            "run_id": spec.run_id,
        }
    return pd.DataFrame(list(rows.values()), columns=list(COLUMNS))


def ablation(decision: Mapping[str, Any]) -> pd.DataFrame:
    """One row per arm of a suite: its figures (means over completed seeds) and its paired difference in test loss."""
    import pandas as pd

    rows = []
    for track, found in decision["tracks"].items():
        for label, arm in found["arms"].items():
            d = arm["difference"] or {}
            rows.append(
                {
                    "track": track,
                    "arm": label,
                    **{k: arm[k] for k in ("about", "lr", "lr_scale", "delta_star")},
                    **{f"{TUNED}{k}": v for k, v in (arm["point"] or {}).items()},
                    "strength": arm["strength"],
                    "seeds": len(arm["runs"]),
                    "completed": arm["outcomes"].get("completed", 0),
                    "diverged": arm["outcomes"].get("diverged", 0),
                    **arm["figures"],
                    "versus": arm["versus"],
                    "pairs": d.get("seeds"),
                    "difference": d.get("mean"),
                    **{k: d.get(k) for k in OF_A_DIFFERENCE},
                }
            )
    return pd.DataFrame(rows)


def write_ablation(root: Path, decision: Mapping[str, Any]) -> None:
    """ablation.csv of a suite."""
    _write(root / "ablation.csv", ablation(decision))


def write_summary(root: Path, stage: str, specs: Sequence[RunSpec], results: Mapping[str, Mapping[str, Any]]) -> None:
    """summary_<stage>.csv, or summary_final.csv."""
    _write(summary_path(root, stage), summary(specs, results))


def _write(path: Path, table: pd.DataFrame) -> None:
    """Figures carry nine significant digits."""
    buffer = io.StringIO()
    table.to_csv(buffer, index=False, float_format="%.9g", lineterminator="\n")
    write_whole(path, buffer.getvalue())
