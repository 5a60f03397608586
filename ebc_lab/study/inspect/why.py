"""The reasons for a study's decisions, and what would have changed them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ebc_lab.records.decisions import Decision, NoiseFloor

from ..stages.stage import stage_of
from ..stages.statistics import noise
from ..store.snapshot import read
from ..store.study import Study
from .reproduce import deciding


def why(study: Study, stage: str | None) -> dict[str, Any]:
    """Return stage -> decision, with what would have changed the decision and the command that would settle
    what it leaves open, for one stage or for all decided stages. Raises UserError if the stage does not exist
    or is undecided."""
    snapshot = read(study)
    if stage is not None:
        study.must_have(stage, snapshot.config.study.stages)
    decisions = snapshot.sound_decisions()
    asked = snapshot.decided(stage)
    with study.blame_files():
        because = snapshot.stale_decisions()
        floors = noise_floor(decisions)
        return {
            name: {
                **decisions[name],
                "headline": stage_of(name).headlines(decisions[name]),
                "flips": stage_of(name).would_change(decisions[name]),
                "decide": deciding(study, snapshot.header, {name: decisions[name]}),
                "stale_because": because.get(name),
                "noise": floors,
            }
            for name in asked
        }


def noise_floor(decisions: Mapping[str, Decision]) -> dict[str, NoiseFloor]:
    """Return track -> noise between seeds (`stages.statistics.noise`), the unit of margins; empty before the
    sweep is decided."""
    tracks = decisions["lr_sweep"]["tracks"] if "lr_sweep" in decisions else {}
    return {track: noise(d["replicate_losses"]) for track, d in tracks.items()}


def noise_in_words(floor: NoiseFloor) -> str:
    """Return a one-line description of the noise floor: σ, its interval, and the smallest difference
    detectable between two single runs."""
    if floor["sigma"] is None:
        return "σ unknown"
    return (
        f"σ of the validation loss {floor['sigma']:.4f} nats (95% interval {floor['low']:.4f} to "
        f"{floor['high']:.4f}, from {floor['seeds']} replicate seeds); "
        f"smallest detectable difference between two single runs: {floor['detectable']:.4f} nats"
    )
