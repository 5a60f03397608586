"""The rules that several stages share, and how a decision is made and checked.

Pure functions: configuration, earlier decisions and results in, a decision out. Every decision uses the
validation loss; only the verdict looks at the test loss. A run that did not complete never wins. A decision
holds its candidates, its rule, its margin in units of the noise sigma, and the hash of what it was made from.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from ebc_lab.config.dicts import misfit, study_part, to_dict
from ebc_lab.config.identity import canonical_json
from ebc_lab.config.parts.tokens import TRAIN_TOKENS
from ebc_lab.config.schema import Config
from ebc_lab.records.decisions import Candidate, Decision
from ebc_lab.records.figures import FINISHED, RunResult
from ebc_lab.records.json_files import checksum_holds, with_checksum
from ebc_lab.records.spec import RunSpec

Specs = Sequence[RunSpec]
Results = Mapping[str, RunResult]  # by run id
OTHER_VERSION = "it was recorded by another version of ebc-lab"
NEEDED = ("stage", "rule", "tracks", "notes", "candidates", "measurements", "inputs_sha256")
FORM = 4  # of a recorded decision; raised by hand when what it holds changes
# of a result: they differ when it is trained again. The losses of `curve`, on which `profiles` rests, are
# those of the run that the other figures are of
TIMING = ("wall_s", "train_s", "tokens_per_s", "probe_pct", "curve", "streams")


class Undecidable(Exception):
    """Raised where a stage's results do not allow its decision; its text says why."""


def val_loss(result: RunResult | None) -> float:
    """Return the figure that decisions compare: infinite unless the run completed with a finite loss."""
    if not result or result.get("outcome") != "completed":
        return math.inf
    loss = result.get("val_loss")
    return float(loss) if loss is not None and math.isfinite(loss) else math.inf


def is_conclusive(run: Mapping[str, Any] | None) -> bool:
    """Tell whether a result, or a candidate, says something about its settings: it completed, diverged or was
    raced, and was not lost or failed."""
    return run is not None and run.get("outcome") in FINISHED


def losses_of(specs: Sequence[RunSpec], results: Results) -> list[float]:
    """Return the validation loss of each run, infinite where it did not complete."""
    return [val_loss(results.get(s.run_id)) for s in specs]


def best(specs: Sequence[RunSpec], results: Results) -> RunSpec | None:
    """Return the spec with the lowest validation loss, the lower learning rate where equal; None when none
    completed."""
    ranked = sorted(specs, key=lambda s: (val_loss(results.get(s.run_id)), s.run.optimizer.lr))
    return ranked[0] if ranked and math.isfinite(val_loss(results.get(ranked[0].run_id))) else None


def c_median(result: RunResult | None) -> float | None:
    """Return the median clip coefficient of a completed run."""
    if result is None or math.isinf(val_loss(result)):
        return None
    value = result.get("c_median")
    return None if value is None else float(value)


def band_distance(c: float | None, band: Sequence[float]) -> float:
    """Return how far a median c lies outside the band; 0 inside."""
    return math.inf if c is None else max(band[0] - c, c - band[1], 0.0)


def edge_of(values: Sequence[float], value: float) -> str | None:
    """Name the edge of a grid that a value lies on: `low`, `high`, `both`, or None."""
    edges = [edge for edge, end in (("low", min(values)), ("high", max(values))) if value == end]
    return "both" if len(edges) == 2 else next(iter(edges), None)


def margin_sigma(losses: Sequence[float], sigma: float | None) -> float | None:
    """Return how far the runner-up lies behind the winner, in units of sigma; None without a runner-up or
    without sigma."""
    finite = sorted(x for x in losses if math.isfinite(x))
    return (finite[1] - finite[0]) / sigma if len(finite) > 1 and sigma else None


def candidate(spec: RunSpec, results: Results) -> Candidate:
    """Return a run as a decision records it."""
    result = results.get(spec.run_id, RunResult())
    run = spec.run
    shown: Candidate = {
        "run_id": spec.run_id,
        "role": spec.role,
        "arm": spec.arm,
        "lr": run.optimizer.lr,
        "lr_scale": spec.lr_scale,
        "delta_star": run.budget.target_kl if run.stabilizer.name == "ebc" else None,
        "seed": run.seed,
        "outcome": result.get("outcome"),
        "cause": result.get("cause"),
        "val_loss": result.get("val_loss"),
        "val_se": result.get("val_se"),
        "c_median": result.get("c_median"),
        "clip_rate": result.get("clip_rate"),
        "kl_median": result.get("kl_median"),
        "kl_within_30pct": result.get("kl_within_30pct"),
    }
    if shown["outcome"] == "raced":
        shown["raced"] = result["steps"]
    return shown


def make_decision(
    stage: str,
    rule: str,
    config: Config,
    specs: Sequence[RunSpec],
    results: Results,
    earlier: Mapping[str, Decision],
    **chosen: Any,
) -> Decision:
    """Return a decision with its evidence, the hash of its inputs, and its own hash."""
    known = [s for s in specs if s.run_id in results]
    decision: dict[str, Any] = {
        "stage": stage,
        "form": FORM,
        "rule": rule,
        **chosen,
        "candidates": [candidate(s, results) for s in known if s.kind == "train"],
        "measurements": [{"run_id": s.run_id, "role": s.role} for s in known if s.kind != "train"],
    }
    decision["inputs_sha256"] = inputs_digest(
        config, stage, inputs_of(decision), results.__getitem__, earlier
    )
    return cast(Decision, with_checksum(decision, "decision_sha256"))


def decision_problem(decision: Mapping[str, Any]) -> str | None:
    """Return why a recorded decision cannot be used; None where it can."""
    if not checksum_holds(decision, "decision_sha256"):
        return "its record in auto_decisions.json was edited"
    if decision.get("form") != FORM:
        return OTHER_VERSION
    lacking = [key for key in NEEDED if key not in decision]
    wrong = f"{lacking[0]} is missing" if lacking else misfit(decision, Decision)
    return f"its record in auto_decisions.json is no decision ({wrong})" if wrong else None


def inputs_of(decision: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (role, run id) of every run that a decision was made from."""
    return [(c["role"], c["run_id"]) for c in (*decision["candidates"], *decision["measurements"])]


def inputs_digest(
    config: Config,
    stage: str,
    runs: Sequence[tuple[str, str]],
    result_of: Callable[[str], Mapping[str, Any]],
    earlier: Mapping[str, Decision],
) -> str:
    """Return the hash of all that a decision rests on: settings, earlier decisions, results without their
    timings. `result_of`: returns a run's result, by its id."""
    sha256 = hashlib.sha256()  # of the canonical JSON of all that, piece by piece: there may be many runs
    before = {s: d["inputs_sha256"] for s, d in earlier.items()}
    sha256.update(f'{{"earlier":{canonical_json(before)},"runs":['.encode())
    for nth, (role, run_id) in enumerate(runs):
        one = canonical_json([role, run_id, untimed(result_of(run_id))])
        sha256.update(f"{',' if nth else ''}{one}".encode())
    sha256.update(f'],"settings":{canonical_json(settings_of_stage(config, stage))}}}'.encode())
    return sha256.hexdigest()


def settings_of_stage(config: Config, stage: str) -> dict[str, Any]:
    """Return the settings that a stage's decision rests on."""
    # its length is told by its steps
    of_stage = {k: v for k, v in to_dict(getattr(config, stage)).items() if k != TRAIN_TOKENS}
    settings: dict[str, Any] = {
        "stage": of_stage,
        "scale": config.scale,
        "study": study_part(config),
        "seeds": config.seeds,
    }
    if config.answered_before and getattr(config, stage).judges:
        settings["answered_before"] = config.answered_before
    return settings


def error_divided(config: Config) -> int:
    """Return by what the error of an answer is divided: by 2 for each earlier answer on some of its seeds
    (`statistics` says why)."""
    return int(2**config.answered_before)


def divided_in_words(config: Config) -> str:
    """Return the clause of a rule about that; empty where no seed was judged before."""
    by = error_divided(config)
    return (
        f"; the error is divided by {by}, since earlier answers rest on some of the seeds" if by > 1 else ""
    )


def untimed(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a result that is the same whenever the run is trained."""
    return {k: v for k, v in result.items() if k not in TIMING}


def refuse_without_tracks(
    tracks: Mapping[str, Any], stage: str, specs: Sequence[RunSpec], results: Results
) -> None:
    """Raise Undecidable, with the causes of the failed runs, where no track is left."""
    if not tracks:
        causes = {result.get("cause") for s in specs if (result := results.get(s.run_id))}
        why = "; ".join(sorted(c.rstrip(".") for c in causes if c)[:3]) or "no run completed"
        raise Undecidable(f"{stage} could not decide: {why}.")
