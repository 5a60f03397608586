"""A study of the real format whose losses are invented: planned, decided, judged and written by the program
itself, only never trained. Hundreds of runs take seconds, and the same call gives the same bytes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ebc_lab.config.compose import compose
from ebc_lab.config.schema import ArmConfig
from ebc_lab.records.columns import EVAL_COLUMNS, STEP_COLUMNS
from ebc_lab.records.json_files import write_checksummed
from ebc_lab.records.spec import RunSpec
from ebc_lab.report.conclude import write_conclusions, write_table
from ebc_lab.study.resolve import resolve_study
from ebc_lab.study.stages.stage import planned_runs, stage_of
from ebc_lab.study.store import manifest
from ebc_lab.study.store.study import Study, study_of

RESOLVED = [
    "device=cpu",
    "dtype=float32",
    "threads_per_run=1",
    "compile=off",
]  # nothing is left to be measured
BEST_LR = 4e-3
Fate = Callable[[RunSpec], Mapping[str, Any]]


def invent(
    folder: Path,
    overrides: Sequence[str],
    *,
    fate: Fate = lambda spec: {},
    stages: int | None = None,
    drawn: bool = True,
    arms: Mapping[str, ArmConfig] | None = None,
) -> Study:
    """`fate`: what of a run's result is otherwise than made up, e.g. its outcome.

    `stages`: decide only so many of them; `arms`: of a suite of its own, the first one the reference.
    """
    config = compose(["scale=smoke", *RESOLVED, *overrides, f"output_dir={folder}"])
    if arms:
        own = replace(config.ablation, arms=dict(arms), reference=next(iter(arms)))
        chain = replace(config.study, stages=["lr_sweep", "ablation"])
        config = replace(config, study=chain, ablation=own)
    study = study_of(config)
    study.prepare()
    with study.held():
        config, _ = resolve_study(config, study, lambda text: None, force=False)
        decisions: dict[str, Any] = {}

        def results_of(specs: list[RunSpec]) -> dict[str, dict[str, Any]]:
            for spec in specs:
                study.write_spec(spec)
                if not study.has_result(spec.run_id):
                    made_up(study, spec, fate(spec))
            return study.results(specs)

        manifest.begin(study.root)
        for stage in config.study.stages[:stages]:
            specs, results = planned_runs(stage, config, decisions, results_of)
            decisions[stage] = stage_of(stage).decide(config, specs, results, decisions)
            study.write_decision(stage, decisions[stage])
            write_table(study, stage, specs, results)
        if config.study.stages[-1] in decisions and drawn:
            write_conclusions(config, study, decisions, print)
        manifest.complete(study.root)
    return study


def made_up(study: Study, spec: RunSpec, otherwise: Mapping[str, Any]) -> None:
    """A result as a worker writes one, and short streams."""
    run, folder, draw = spec.run, study.run_dir(spec.run_id), random.Random(spec.run_id)
    if spec.kind != "train":
        found = {
            "outcome": "completed",
            "cause": None,
            "overhead_pct": 4.2,
            "overhead_iqr_pct": [3.9, 4.6],
            "wall_s": 9.0,
        }
        return _seal(folder, spec, found | dict(otherwise))
    ebc = run.stabilizer.name == "ebc"
    off = math.log2(run.optimizer.lr / BEST_LR)
    decayed = run.lr_schedule.name == "warmup_linear"
    loss = 2.0 + 0.03 * off**2 * (0.4 if ebc else 1) - 0.05 * decayed - 0.03 * ebc + draw.gauss(0, 0.008)
    loss += 0.2 * (run.optimizer.name == "muon")
    # a wide budget lets every step pass, a narrow one halves it and more
    c = min(1.0, 0.6 * math.sqrt(run.budget.target_kl / 0.01) * 2 / spec.lr_scale) if ebc else 1.0
    steps = max(2, run.steps)
    found = {
        "outcome": "completed",
        "cause": None,
        "steps": steps,
        "val_loss": loss,
        "val_se": 0.007,
        "test_loss": loss + 0.04 if "test" in run.evaluate else None,
        "test_se": 0.008,
        "heldout_loss": loss + 0.02,
        "test_bits_per_char": (loss + 0.04) / math.log(2),
        "test_accuracy": 0.4,
        "clip_rate": 0.9 if c < 1 else 0.0,
        "c_mean": c,
        "c_p10": c,
        "c_median": c,
        "c_p90": c,
        "plateau_steps": 0,
        "eta_eff_median": c * run.optimizer.lr,
        "kl_median": 0.0098 + draw.random() * 1e-4,
        "kl_ratio_median": 1.02 if ebc else None,
        "kl_audits": 6,
        "kl_within_30pct": 0.8 if ebc else None,
        "kl_clipped_audits": 5 if ebc else 0,
        "skipped_steps": 0,
        "guard_count": 0,
        "grad_norm_quantiles": [0.1 * k for k in range(1, 102)],
        "tokens_per_s": 2e4,
        "probe_pct": 2.0,
        "wall_s": 12.5,
        "train_s": 12.0,
        "curve": [[steps * k / 4, loss + 1 / k - 0.25, 3.0 * k] for k in (1, 2, 3, 4)],
    }
    found |= dict(otherwise)
    if found["outcome"] != "completed":
        found |= dict.fromkeys(("val_loss", "test_loss", "heldout_loss", "c_median"))
    _stream(
        folder / "steps.csv",
        STEP_COLUMNS,
        [{"step": k, "loss": loss + 2 / (k + 1), "c": c} for k in range(steps)],
    )
    _stream(
        folder / "evals.csv",
        EVAL_COLUMNS,
        [{"step": s, "val_loss": x, "train_s": t} for s, x, t in found["curve"]],
    )
    _seal(folder, spec, found)


def _stream(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    lines = [",".join(columns), *(",".join(str(row.get(c, "")) for c in columns) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def _seal(folder: Path, spec: RunSpec, found: Mapping[str, Any]) -> None:
    write_checksummed(
        folder / "result.json", {"run_id": spec.run_id, "identity": spec.identity_sha256, **found}
    )
