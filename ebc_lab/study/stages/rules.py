"""What the results decide. Pure functions: configuration, earlier decisions and results in, a decision out.

Every decision uses the validation loss; only the verdict looks at the test loss. A run that did not complete never wins.
A decision holds its candidates, its rule, its margin in units of the noise sigma, and the hash of what it was made from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ebc_lab.config.dicts import to_dict
from ebc_lab.config.identity import digest
from ebc_lab.config.schema import Config
from ebc_lab.records.json_files import checksum_holds, with_checksum

from .spec import RunSpec

Results = Mapping[str, Mapping[str, Any]]
Decision = dict[str, Any]
FORM = 2  # of a recorded decision; raised by hand when what it holds changes
TIMING = ("wall_s", "train_s", "tokens_per_s", "probe_pct", "curve")  # of a run: no decision rests on them


class Undecidable(Exception):
    """A stage's results do not allow its decision; says why, and what would."""


# -- the rules, each written once ---------------------------------------------------------------------------------------


def val_loss(result: Mapping[str, Any] | None) -> float:
    """The figure that decisions compare: infinite unless the run completed with a finite loss."""
    if not result or result.get("outcome") != "completed":
        return math.inf
    loss = result.get("val_loss")
    return float(loss) if loss is not None and math.isfinite(loss) else math.inf


def best(specs: Sequence[RunSpec], results: Results) -> RunSpec | None:
    """The spec with the lowest validation loss, the lower learning rate where equal; None when none completed."""
    ranked = sorted(specs, key=lambda s: (val_loss(results.get(s.run_id)), s.run.optimizer.lr))
    return ranked[0] if ranked and math.isfinite(val_loss(results.get(ranked[0].run_id))) else None


def c_median(result: Mapping[str, Any] | None) -> float | None:
    if math.isinf(val_loss(result)):
        return None
    assert result is not None
    value = result.get("c_median")
    return None if value is None else float(value)


def band_distance(c: float | None, band: Sequence[float]) -> float:
    """How far a median c lies outside the band; 0 inside."""
    return math.inf if c is None else max(band[0] - c, c - band[1], 0.0)


def edge_of(values: Sequence[float], value: float) -> str | None:
    """Which edge of a grid a value lies on."""
    low, high = value == min(values), value == max(values)
    return "both" if low and high else "low" if low else "high" if high else None


def margin_sigma(losses: Sequence[float], sigma: float | None) -> float | None:
    """How far the runner-up lies behind the winner, in units of sigma; None where there is no runner-up or no sigma."""
    finite = sorted(x for x in losses if math.isfinite(x))
    return (finite[1] - finite[0]) / sigma if len(finite) > 1 and sigma else None


def candidate(spec: RunSpec, results: Results) -> dict[str, Any]:
    """A run as a decision shows it."""
    result = results.get(spec.run_id, {})
    shown = (
        "outcome",
        "cause",
        "val_loss",
        "val_se",
        "c_median",
        "clip_rate",
        "kl_median",
        "kl_within_30pct",
    )
    run = spec.run
    return {
        "run_id": spec.run_id,
        "role": spec.role,
        "arm": spec.arm,
        "lr": run.optimizer.lr,
        "lr_scale": spec.lr_scale,
        "delta_star": run.budget.target_kl if run.stabilizer.name == "ebc" else None,
        "seed": run.seed,
        **{k: result.get(k) for k in shown},
    }


def sealed(
    stage: str,
    rule: str,
    config: Config,
    specs: Sequence[RunSpec],
    results: Results,
    earlier: Any,
    **found: Any,
) -> Decision:
    """A decision with its evidence, the hash of its inputs, and the hash of itself."""
    there = [s for s in specs if s.run_id in results]
    decision: Decision = {
        "stage": stage,
        "form": FORM,
        "rule": rule,
        **found,
        "candidates": [candidate(s, results) for s in there if s.kind == "train"],
        "measurements": [{"run_id": s.run_id, "role": s.role} for s in there if s.kind != "train"],
    }
    decision["inputs_sha256"] = inputs_digest(config, stage, inputs_of(decision), results, earlier)
    return with_checksum(decision, "decision_sha256")


def fault(decision: Mapping[str, Any]) -> str | None:
    """Why a recorded decision cannot be read as it stands; None when it can."""
    if not checksum_holds(decision, "decision_sha256"):
        return "its record in auto_decisions.json was edited"
    return None if decision.get("form") == FORM else "it was recorded by another version of ebc-lab"


def inputs_of(decision: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(role, run id) of every run that a decision was made from."""
    return [(c["role"], c["run_id"]) for c in (*decision["candidates"], *decision["measurements"])]


def inputs_digest(
    config: Config, stage: str, runs: Sequence[tuple[str, str]], results: Results, earlier: Mapping[str, Any]
) -> str:
    """The hash of all that a decision rests on: settings, earlier decisions, results; timing figures aside."""
    settings = {
        "stage": to_dict(getattr(config, stage)),
        "scale": config.scale,
        "study": to_dict(config.study),
    }
    inputs = {
        "settings": {**settings, "seeds": config.seeds},
        "earlier": {s: d["inputs_sha256"] for s, d in earlier.items()},
        "runs": [
            [role, run_id, {k: v for k, v in results[run_id].items() if k not in TIMING}]
            for role, run_id in runs
        ],
    }
    return digest(inputs)


def refuse_without_tracks(tracks: Mapping[str, Any], stage: str, causes: Sequence[str]) -> None:
    if not tracks:
        why = "; ".join(sorted({c for c in causes if c})[:3]) or "no run completed"
        raise Undecidable(f"{stage} could not decide: {why}.")


# -- 2. calibrate -----------------------------------------------------------------------------------------------------------


def nearest_to_band(specs: Sequence[RunSpec], results: Results, band: Sequence[float]) -> RunSpec:
    """The lowest loss among those in the band; where none is, the nearest to it."""
    return min(
        specs, key=lambda s: (band_distance(c_median(results[s.run_id]), band), val_loss(results[s.run_id]))
    )
