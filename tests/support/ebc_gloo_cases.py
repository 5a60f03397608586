"""What the processes of `ebc_gloo_worker` are asked to do, and what two of them have to agree on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support import ebc_gloo_worker, gloo_worker
from support.gloo_worker import Results

POLICY = {"param_dtype": "bfloat16", "reduce_dtype": "float32"}
SHARDED = {"wrap": "fsdp", "steps": 5}
# the same rows choose c, and audit it, as in one process with twice as many of each batch
HALF = {"probe_sequences": 3, "audit_tokens": 22}

DOUBLE = {"budget": "tracked", "measure": "when_needed", "radius": 0.01, "radius_unit": "initial"}

CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "inner": {"by": "attach_inner", "steps": 5},
    "looked at": {"check": True, "steps": 5},
    "clip": {"by": "clip", "steps": 5},
    "clip inner": {"by": "clip_inner", "steps": 5},
    "given": {"group": "given", "steps": 5},
    "alone": {"group": "none", "steps": 5},
    "accumulated": {"steps": 40, "accumulate": 2, "short": True},
    "masked": {"masked": True, "steps": 5},
    "masked clip": {"masked": True, "steps": 5, "by": "clip"},
    "half": {"options": HALF, "steps": 9},
    "bad": {"bad_at": 2, "steps": 5},
    "bad on one": {"bad_at": 2, "bad_from": "gradients", "steps": 5},
    "scaled": {"bad_at": 2, "scaler": True, "optimizer": "fused", "steps": 5},
    "resumed": {"resume_at": 6},
    "tracked": {"options": {"budget": "tracked"}, "steps": 5},
    "double": {"options": DOUBLE, "steps": 5},
    "fisher": {"options": {"budget": "fisher"}, "steps": 5},
    "surrogate": {"options": {"budget": "surrogate", "controller": "log_pi"}, "steps": 6},
    "calibrated": {"options": {"budget": "calibrated", "probe": "fd", "controller": "rsl"}, "steps": 6},
    "fsdp": {"wrap": "fsdp"},
    "fsdp not resharding": {**SHARDED, "reshard": False},
    "fsdp clip": {**SHARDED, "by": "clip"},
    "fsdp looked at": {**SHARDED, "check": True},
    "fsdp masked": {**SHARDED, "masked": True},
    "fsdp bad on one": {**SHARDED, "bad_at": 2, "bad_from": "gradients"},
    "fsdp tracked": {**SHARDED, "options": {"budget": "tracked"}},
    "fsdp double": {**SHARDED, "options": DOUBLE},
    "fsdp bfloat16": {**SHARDED, "policy": POLICY},
    "fsdp bfloat16 fresh": {**SHARDED, "policy": POLICY, "options": {"fresh_logits": True}},
    "fsdp after attach": {**SHARDED, "attach_first": True},
    "fsdp resumed": {"wrap": "fsdp", "resume_at": 6, "folder": "checkpoint"},
}

DISTURBED = {"bad_at": 2, "scaler": True, "steps": 5}
RARER: dict[str, dict[str, Any]] = {  # under DDP and under FSDP
    "accumulated": {"steps": 40, "accumulate": 2, "short": True},
    "two": {"optimizer": "two"},
    "frozen": {"frozen": ["embed", "blocks.0"]},
    "mixed": {"bfloat16": ["blocks"]},
    "plainly scaled": DISTURBED,
    "scaled": {**DISTURBED, "optimizer": "fused"},
    "clipped": {"max_norm": 0.1},
    "rich": {"options": {"exponent": "auto", "curve_every": 3, "controller": "log_pi"}},
    "closure": {"closure": True},
    "sparing": {"options": {"measure_every": 3}, "steps": 26},
}
SLOW_CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    **RARER,
    **{f"fsdp {name}": {**case, "wrap": "fsdp"} for name, case in RARER.items()},
    "mixed fresh": {"bfloat16": ["blocks"], "options": {"fresh_logits": True}},
    "compiled inside": {"compiled": "inside", "steps": 5},
    "compiled around": {"compiled": "around", "steps": 5},
    "fsdp compiled": {"compiled": "around", "steps": 5, "wrap": "fsdp"},
    "columns": {"columns": True, "wrap": "fsdp"},
    "resumed clip": {"resume_at": 6, "by": "clip"},
    "fsdp bfloat16 to float32": {**SHARDED, "policy": {**POLICY, "output_dtype": "float32"}},
}


def start(cases: dict[str, dict[str, Any]], folder: Path) -> Results:
    """The result of each rank, by case."""
    placed = {
        name: {**case, "folder": str(folder / case["folder"])} if "folder" in case else case
        for name, case in cases.items()
    }
    return gloo_worker.start("train", folder, script=ebc_gloo_worker.__file__, cases=placed)


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference between two results' weights."""
    pairs = zip(one["weights"], other["weights"], strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def agree(results: Results, name: str) -> None:
    """Assert that all ranks took the same steps of a case, and limited some of them."""
    first, second = (rank[name] for rank in results)
    for figure in ("c", "measured", "kl"):
        assert first[figure] == second[figure], (name, figure)
    assert apart(first, second) == 0.0, name
    assert any(0 < c < 1 for c in first["c"]), name
