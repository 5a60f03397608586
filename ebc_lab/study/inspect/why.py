"""Why a study decided as it did, and what would have changed it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ebc_lab.config.errors import UserError

from ..stages import stage_of
from ..stages.statistics import noise
from ..store.snapshot import read
from ..store.study import Study


def headline(stage: str, decision: Mapping[str, Any]) -> list[str]:
    """A decision in one line a track."""
    return stage_of(stage).headlines(decision)


def why(study: Study, stage: str | None) -> dict[str, Any]:
    """Stage -> its decision with what would have changed it, for one stage or all. Raises UserError."""
    if stage is not None:
        stage_of(stage)
    snapshot = read(study)
    decisions = snapshot.sound_decisions()
    asked = [stage] if stage else list(decisions)
    if not asked or any(s not in decisions for s in asked):
        raise UserError(
            f"{stage or 'no stage'} of study {study.name} is {'not ' if stage else ''}decided yet."
        )
    because = snapshot.stale_decisions()
    found, floors = {}, noise_floor(decisions)
    for s in asked:
        found[s] = {
            **decisions[s],
            "headline": headline(s, decisions[s]),
            "flips": flips(s, decisions[s]),
            "stale_because": because.get(s),
            "noise": floors,
        }
    return found


def noise_floor(decisions: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Track -> the noise that margins are counted in: see `inference.noise`."""
    return {
        track: noise(d["replicate_losses"])
        for track, d in decisions.get("lr_sweep", {"tracks": {}})["tracks"].items()
    }


def noise_in_words(floor: Mapping[str, Any]) -> str:
    """The noise floor in a line: σ, its interval, and what two single runs could show."""
    if floor["sigma"] is None:
        return "σ unknown"
    return (
        f"σ {floor['sigma']:.4f} nats (95%: {floor['low']:.4f} to {floor['high']:.4f}, {floor['seeds']} replicate seeds); "
        f"smallest detectable difference of two single runs {floor['detectable']:.4f}"
    )


def flips(stage: str, decision: Mapping[str, Any]) -> list[str]:
    """What would have changed the decision, one sentence a track."""
    return stage_of(stage).would_change(decision)
