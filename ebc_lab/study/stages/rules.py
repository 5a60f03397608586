"""The rules that several stages share, and the making and checking of decisions.

All are pure functions of the configuration, earlier decisions and results. Choices are made by validation
loss; the test loss serves only for judging what was chosen. `best` never returns a run that did not complete.
A decision holds its candidates, its rule, its margin in units of the noise σ, and a hash of its inputs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from ebc_lab.config.dicts import misfit, named, study_part
from ebc_lab.config.identity import canonical_json
from ebc_lab.config.parts.target import finite_rows
from ebc_lab.config.parts.tokens import TRAIN_TOKENS
from ebc_lab.config.schema import Config
from ebc_lab.records.decisions import Candidate, Decision
from ebc_lab.records.figures import FINISHED, RunResult
from ebc_lab.records.json_files import checksum_holds, with_checksum
from ebc_lab.records.spec import RunSpec

Specs = Sequence[RunSpec]
Results = Mapping[str, RunResult]  # by run id
Decisions = Mapping[str, Decision]  # by stage
SEAL = "decision_sha256"  # the checksum of all else in a decision
OTHER_VERSION = "it was recorded by another version of ebc-lab"
NEEDED = ("stage", "rule", "tracks", "notes", "candidates", "measurements", "inputs_sha256")
FORM = 4  # version of the contents of a recorded decision; raised by hand when they change
# the figures of a result that a decision records beside the settings of the run
SHOWN = ("outcome", "cause", "val_loss", "val_se", "c_median", "clip_rate", "kl_median", "kl_within_30pct")
# the figures of a result that differ when its run is trained again. `curve` holds times as well as the losses
# that `profiles` uses; the other figures of the run stand for those losses in a hash
TIMING = ("wall_s", "train_s", "tokens_per_s", "probe_pct", "curve", "streams")


class Undecidable(Exception):
    """Raised when a stage's results do not allow a decision; the message says why."""


def val_loss(result: RunResult | None) -> float:
    """Return the validation loss in nats. It is infinite unless the run completed with a finite loss."""
    if not result or result.get("outcome") != "completed":
        return math.inf
    loss = result.get("val_loss")
    return float(loss) if loss is not None and math.isfinite(loss) else math.inf


def is_conclusive(run: Mapping[str, Any] | None) -> bool:
    """Return whether a result or candidate is conclusive: its run completed, diverged or was stopped in a
    race, rather than failed or got lost."""
    return run is not None and run.get("outcome") in FINISHED


def losses_of(specs: Specs, results: Results) -> list[float]:
    """Return the validation loss of each run; infinite for a run that did not complete."""
    return [val_loss(results.get(s.run_id)) for s in specs]


def best(specs: Specs, results: Results) -> RunSpec | None:
    """Return the run with the lowest validation loss, or None if no run completed. Among runs with equal
    losses, the one with the lowest learning rate wins."""
    ranked = sorted(specs, key=lambda s: (val_loss(results.get(s.run_id)), s.run.optimizer.lr))
    return ranked[0] if ranked and math.isfinite(val_loss(results.get(ranked[0].run_id))) else None


def c_median(result: RunResult | None) -> float | None:
    """Return the median clip coefficient c of a run, or None if the run did not complete or recorded none."""
    if result is None or math.isinf(val_loss(result)):
        return None
    value = result.get("c_median")
    return None if value is None else float(value)


def curve_of(result: Mapping[str, Any]) -> dict[int, float]:
    """Return the loss on the fixed windows by step; empty if no curve was recorded, as in a forecast."""
    return {step: loss for step, loss, _ in finite_rows(result.get("curve") or [])}


def band_distance(c: float | None, band: Sequence[float]) -> float:
    """Return how far a median c lies outside the band: 0 if it lies inside, infinite if it is None."""
    return math.inf if c is None else max(band[0] - c, c - band[1], 0.0)


def edge_of(values: Sequence[float], value: float) -> str | None:
    """Return the edge of a grid that a value lies on, `low`, `high` or `both`; None if it lies inside."""
    edges = [edge for edge, end in (("low", min(values)), ("high", max(values))) if value == end]
    return "both" if len(edges) == 2 else next(iter(edges), None)


def margin_sigma(losses: Sequence[float], sigma: float | None) -> float | None:
    """Return the difference between the two lowest losses in units of sigma, or None without sigma or without
    two finite losses."""
    finite = sorted(x for x in losses if math.isfinite(x))
    return (finite[1] - finite[0]) / sigma if len(finite) > 1 and sigma else None


def candidate(spec: RunSpec, results: Results) -> Candidate:
    """Return the entry for a run in a decision's list of candidates."""
    result = results.get(spec.run_id, RunResult())
    run = spec.run
    shown: dict[str, Any] = {
        "run_id": spec.run_id,
        "role": spec.role,
        "arm": spec.arm,
        "lr": run.optimizer.lr,
        "lr_scale": spec.lr_scale,
        "delta_star": run.budget.target_kl if run.stabilizer.name == "ebc" else None,
        "seed": run.seed,
        **{key: result.get(key) for key in SHOWN},
    }
    if shown["outcome"] == "raced":
        shown["raced"] = result["steps"]
    return cast(Candidate, shown)


def make_decision(
    stage: str, rule: str, config: Config, specs: Specs, results: Results, earlier: Decisions, **chosen: Any
) -> Decision:
    """Return a decision with its evidence and hashes. `chosen`: `tracks` and its further keys. Raises
    Undecidable if there are no tracks."""
    refuse_without_tracks(chosen["tracks"], stage, specs, results)
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
    return cast(Decision, with_checksum(decision, SEAL))


def decision_problem(decision: Mapping[str, Any]) -> str | None:
    """Return why a recorded decision cannot be used, or None if it can."""
    if not checksum_holds(decision, SEAL):
        return "its record in auto_decisions.json was edited"
    if decision.get("form") != FORM:
        return OTHER_VERSION
    lacking = [key for key in NEEDED if key not in decision]
    wrong = f"{lacking[0]} is missing" if lacking else misfit(decision, Decision)
    return f"its record in auto_decisions.json is no decision ({wrong})" if wrong else None


def inputs_of(decision: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (role, run id) of every run on which a decision rests."""
    return [(c["role"], c["run_id"]) for c in (*decision["candidates"], *decision["measurements"])]


def inputs_digest(
    config: Config,
    stage: str,
    runs: Sequence[tuple[str, str]],
    result_of: Callable[[str], Mapping[str, Any]],
    earlier: Decisions,
) -> str:
    """Return the hash of everything on which a decision rests: settings, earlier decisions, and the results
    of `runs`, (role, run id) each, without timings. `result_of` returns the result for a run id."""
    sha256 = hashlib.sha256()  # of one canonical JSON object, fed in pieces: there may be many runs
    before = {s: d["inputs_sha256"] for s, d in earlier.items()}
    sha256.update(f'{{"earlier":{canonical_json(before)},"runs":['.encode())
    for nth, (role, run_id) in enumerate(runs):
        one = canonical_json([role, run_id, untimed(result_of(run_id))])
        sha256.update(f"{',' if nth else ''}{one}".encode())
    sha256.update(f'],"settings":{canonical_json(settings_of_stage(config, stage))}}}'.encode())
    return sha256.hexdigest()


def settings_of_stage(config: Config, stage: str) -> dict[str, Any]:
    """Return the settings on which a stage's decision rests."""
    of_stage = named(getattr(config, stage))
    of_stage.pop(TRAIN_TOKENS, None)  # `steps` holds the same
    settings: dict[str, Any] = {"stage": of_stage, "scale": config.scale}
    settings |= {"study": study_part(config), "seeds": config.seeds}
    if config.answered_before and getattr(config, stage).judges:
        settings["answered_before"] = config.answered_before
    return settings


def error_divided(config: Config) -> int:
    """Return the number that divides the error probability of an answer. It doubles with each earlier answer
    on some of the same seeds; the docstring of `statistics` says why."""
    return int(2**config.answered_before)


def divided_in_words(config: Config) -> str:
    """Return the clause with which a rule mentions that the error is divided; empty if it is not."""
    by, why = error_divided(config), "since earlier answers rest on some of the seeds"
    return f"; the error is divided by {by}, {why}" if by > 1 else ""


def untimed(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result without its timing figures, which change each time the run is trained."""
    return {k: v for k, v in result.items() if k not in TIMING}


def refuse_without_tracks(tracks: Mapping[str, Any], stage: str, specs: Specs, results: Results) -> None:
    """Raise Undecidable if there are no tracks. The message gives the causes of failed runs."""
    if not tracks:
        causes = {result.get("cause") for s in specs if (result := results.get(s.run_id))}
        why = "; ".join(sorted(c.rstrip(".") for c in causes if c)[:3]) or "no run completed"
        raise Undecidable(f"{stage} could not decide: {why}.")
