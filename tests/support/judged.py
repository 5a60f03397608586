"""A judgement's record of invented runs, by plain formulas: for what shows one, not for what makes one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from ebc_lab.judging.record import Record
from ebc_lab.judging.runs import Runs

TWO_SIDED = 2.5  # about Student's t at 5%, of a few runs


def judgement(arms: Mapping[str, Sequence[float]], reference: str, **changes: Any) -> Any:
    """What `write` takes: the record, and the runs with their curves, which fall to each outcome."""
    record = record_of(arms, reference, **changes)
    return SimpleNamespace(record=record, data=runs_of(record))


def record_of(arms: Mapping[str, Sequence[float]], reference: str, **changes: Any) -> Record:
    """The record of arms, each given as its runs' outcomes (inf or -inf: diverged); in the order in which
    they are given, which is to be the best first."""
    higher = changes.get("better") == "higher"
    record: Any = {
        "ebc_lab": "0",
        "sources": ["runs.csv: 40 rows"],
        "loss": "val_loss",
        "better": "lower",
        "outcome": "the last val_loss of each run",
        "step": "step",
        "reference": reference,
        "paired": False,
        "pairing": "The arms do not have the same seeds, so nothing is paired.",
        "method": "Intervals are Welch's t of two groups of runs.",
        "margin": 0.0,
        "confidence": 0.95,
        "taken": [{"role": "loss", "column": "val_loss", "sentence": "val_loss, less is better"}],
        "answer": ["muon is better than adamw."],
        "cautions": [],
        "arms": [_arm(arm, values) for arm, values in arms.items()],
        "differences": [
            _difference(arm, reference, values, arms[reference], len(arms) - 1, higher)
            for arm, values in arms.items()
            if arm != reference
        ],
        "tuning": None,
        "steps": None,
        "lengths": None,
        "rule": None,
        "runs": [
            {"run": f"{arm}-{seed}", "arm": arm, "seed": str(seed), "source": "runs.csv", "planned": None}
            | {"length": 1000.0, "outcome": _known(value), "settings": {"lr": 0.1}}
            for arm, values in arms.items()
            for seed, value in enumerate(values)
        ],
        **changes,
    }
    return record  # type: ignore[no-any-return]


def runs_of(record: Record, steps: int = 50) -> Runs:
    table = pd.DataFrame(record["runs"]).drop(columns="settings")
    ends = table["outcome"].astype(float).fillna(math.inf).to_numpy()
    step = np.linspace(0, 1000, steps)
    curves = pd.DataFrame(
        {
            "run": np.repeat(np.arange(len(table)), steps),
            "step": np.tile(step, len(table)),
            "loss": (ends[:, None] + np.exp(-step / 100)).ravel(),
        }
    )
    return Runs(table, curves, (), record["loss"], record["better"], record["step"])


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _arm(arm: str, values: Sequence[float]) -> dict[str, Any]:
    done = [x for x in values if math.isfinite(x)]
    whole = len(done) == len(values)
    mean = statistics.fmean(values) if whole else None
    sd = statistics.stdev(values) if whole and len(values) > 1 else None
    half = None if sd is None else TWO_SIDED * sd / math.sqrt(len(values))
    return {
        "arm": arm,
        "configuration": {"lr": 0.1},
        "runs": len(values),
        "completed": len(done),
        "diverged": len(values) - len(done),
        "mean": mean,
        "sd": sd,
        "low": None if half is None else mean - half,  # type: ignore[operator]
        "high": None if half is None else mean + half,  # type: ignore[operator]
        "median": _known(statistics.median(values)),
        "median_low": _known(min(values)) if len(values) > 1 else None,
        "median_high": _known(max(values)) if len(values) > 1 else None,
        "median_confidence": 1 - 2 ** (1 - len(values)) if len(values) > 1 else None,
        "lowest": _known(min(values)),
        "highest": _known(max(values)),
        "length": 1000.0,
        "at": None,
    }


def _difference(
    arm: str, reference: str, values: Sequence[float], others: Sequence[float], comparisons: int, higher: bool
) -> dict[str, Any]:
    figures = ["mean", "median", "low", "high", "p", "detectable", "joint_low", "joint_high", "p_joint"]
    found: dict[str, Any] = dict.fromkeys([*figures, "joint_detectable", "seeds_needed", "luck"])
    found |= {"arm": arm, "reference": reference, "method": None, "verdict": "undecided", "margin": 0.0}
    found |= {"n_arm": len(values), "n_reference": len(others), "comparisons": comparisons}
    found |= {"alone": "undecided", "judged": "undecided"}
    if min(len(values), len(others)) < 2 or not all(map(math.isfinite, [*values, *others])):
        return found
    mean = statistics.fmean(values) - statistics.fmean(others)
    error = math.sqrt(statistics.variance(values) / len(values) + statistics.variance(others) / len(others))
    low, high = mean - TWO_SIDED * error, mean + TWO_SIDED * error
    better, worse = (low > 0, high < 0) if higher else (high < 0, low > 0)
    found |= {"method": "welch", "mean": mean, "median": mean, "low": low, "high": high, "p": 0.01}
    found |= {"joint_low": low, "joint_high": high, "p_joint": 0.02, "joint_detectable": 3 * error}
    return found | {"verdict": "better" if better else "worse" if worse else "undecided"}
