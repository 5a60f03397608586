"""The CSV tables of a study: stable columns, one row per run. Units stand beside the columns."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import resolve_controller
from ..telemetry import write_whole

if TYPE_CHECKING:
    import pandas as pd

    from ..study.signature import RunSpec

COLUMNS = (
    "arm",
    "seed",
    "lr",
    "lr_scale",  # times the track's best baseline learning rate
    "optimizer",
    "projection",
    "stabilizer",
    "budget",
    "aggregate",
    "controller",
    "delta_star",  # nats per token, before its schedule
    "outcome",
    "steps",
    "val_loss",  # nats per token, whole split
    "val_se",
    "test_loss",
    "test_se",
    "heldout_loss",  # val and test together
    "test_bits_per_char",
    "test_accuracy",
    "clip_rate",  # share of steps with c < 0.999
    "c_mean",
    "c_p10",
    "c_median",
    "c_p90",
    "eta_eff_median",  # c·lr
    "kl_median",  # applied KL, nats per token, steps >= 20
    "kl_within_30pct",  # share of audited, clipped steps
    "tightness_median",  # T/(c·S)
    "guard_count",
    "skipped_steps",
    "tokens_per_s",
    "overhead_pct",  # of EBC, from one paired measurement; EBC arms of the finals only
    "probe_pct",  # of the run's training time
    "wall_s",
    "run_id",
)
TIMING_COLUMNS = ("tokens_per_s", "overhead_pct", "probe_pct", "wall_s")
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
                    "about": arm["about"],
                    "lr": arm["lr"],
                    "lr_scale": arm["lr_scale"],
                    "delta_star": arm["delta_star"],
                    **{f"tuned_{k}": v for k, v in (arm["point"] or {}).items()},
                    "strength": arm["strength"],
                    "seeds": len(arm["runs"]),
                    "completed": arm["outcomes"].get("completed", 0),
                    "diverged": arm["outcomes"].get("diverged", 0),
                    **arm["figures"],
                    "versus": arm["versus"],
                    "pairs": d.get("seeds"),
                    "difference": d.get("mean"),  # test loss, arm minus reference, nats per token
                    "low": d.get("low"),  # 95% t-interval over the paired seeds
                    "high": d.get("high"),
                    "detectable": d.get("detectable"),
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
