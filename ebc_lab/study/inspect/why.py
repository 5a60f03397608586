"""Why a study decided as it did, and what would have changed it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ebc_lab.config.dicts import from_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import STAGES, Config

from ..stages.statistics import noise
from ..store import reuse
from ..store.reuse import seen_from
from ..store.study import Study

# -- why ------------------------------------------------------------------------------------------------------------------


def headline(stage: str, decision: Mapping[str, Any]) -> list[str]:
    """A decision in one line a track."""
    lines = []
    for track, d in decision["tracks"].items():
        if stage == "lr_sweep":
            lines.append(
                f"{track}: lr {d['lr']:g}, val {d['val_loss']:.4f}, σ {d['sigma']:.4f}; natural KL {d['natural_kl']:.4g} nats; "
                f"fair control lr {d['control']['lr']:g} (×{d['control']['lr_scale']:g}), val {d['control']['val_loss']:.4f}"
            )
        elif stage == "calibrate":
            lines.append(
                f"{track}: δ* {d['delta_star']:g} nats ({d['times_natural']:.2f} × natural) by {d['budget']}{d['bound']}, "
                f"median c {d['c_median']:.2f}{'' if d['in_band'] else ' (outside the band)'}, val {d['val_loss']:.4f}"
            )
        elif stage == "controller_search":
            lines.append(
                f"{track}: {d['candidate']} of {len(d['kl_ratios'])}, median KL/δ* {d['kl_ratio']:.2f}, val {d['val_loss']:.4f}"
            )
        elif stage == "tune":
            best = {a: f for a, f in d["arms"].items() if f["val_loss"] is not None}
            first = min(best, key=lambda a: best[a]["val_loss"], default="none")
            margins = [f["margin_sigma"] for f in d["arms"].values() if f["margin_sigma"] is not None]
            least = f"; margins of {min(margins):.1f} to {max(margins):.1f} σ" if margins else ""
            lines.append(f"{track}: {len(d['arms'])} arms tuned; the best is {first}{least}")
        elif stage == "ablation":
            known = {a: f["val_median"] for a, f in d["arms"].items() if f["comparable"]}
            done = {a: x for a, x in known.items() if x is not None}
            first = sorted(done, key=lambda a: done[a])[:1]
            lowest = f"; lowest median validation loss {first[0]}, {done[first[0]]:.4f}" if first else ""
            lines.append(f"{track}: {len(d['arms'])} arms{lowest}")
        elif stage == "lr_scale":
            rooms = ", ".join(
                f"{arm} {'none' if x is None else f'×{x:g}'}" for arm, x in d["headroom"].items()
            )
            note = (
                " (LR inert under EBC, so its headroom is a tautology)" if d["headroom_is_tautology"] else ""
            )
            lines.append(
                f"{track}: ×{d['lr_scale']:g}, median c {d['c_median']:.2f}, val {d['val_loss']:.4f}; headroom {rooms}{note}"
            )
        else:
            counts = {v: sum(x["verdict"] == v for x in d["verdict"]) for v in ("pass", "fail", "undecided")}
            gap = (
                ""
                if d["margin_sigma"] is None
                else f"; best EBC arm from the fair control {d['margin_sigma']:+.1f} σ"
            )
            lines.append(f"{track}: " + ", ".join(f"{n} {v}" for v, n in counts.items()) + gap)
        if "ranked" in d:  # one winner
            margin = d["margin_sigma"]
            lines[-1] += "; no runner-up" if margin is None else f"; margin {margin:.1f} σ"
    return lines


def why(study: Study, stage: str | None) -> dict[str, Any]:
    """Stage -> its decision with what would have changed it, for one stage or all. Raises UserError."""
    if stage is not None and stage not in STAGES:
        raise UserError(f"{stage} is not a stage; the stages are {', '.join(STAGES)}.")
    header, decisions, records = study.header(), study.true_decisions(), study.records()
    asked = [stage] if stage else list(decisions)
    if not asked or any(s not in decisions for s in asked):
        raise UserError(
            f"{stage or 'no stage'} of study {study.name} is {'not ' if stage else ''}decided yet."
        )
    with seen_from(study, header):
        because = reuse.stale(from_dict(Config, header["config"]), header, decisions, records)
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
    out = []
    for track, d in decision["tracks"].items():
        if stage == "finals":
            close = [x for x in d["verdict"] if x["verdict"] == "undecided"]
            out.append(
                f"{track}: more seeds (seeds=…, or finals.max_seeds=…) could settle {', '.join(x['name'] for x in close)}"
                if close
                else f"{track}: nothing is open"
            )
            continue
        if stage in ("tune", "ablation"):
            continue  # a table, not one winner
        others = [
            c for c in decision["candidates"] if c["run_id"] != d["run_id"] and c["val_loss"] is not None
        ]
        ranked = [c for c in others if c["run_id"] in d["ranked"]]
        words = []
        if ranked:
            second = min(ranked, key=lambda c: c["val_loss"])
            gap = second["val_loss"] - d["val_loss"]
            sigma = f" ({gap / d['sigma']:.1f} σ)" if d["sigma"] else ""
            which = f"δ* {second['delta_star']:g}" if stage == "calibrate" else f"lr {second['lr']:g}"
            words.append(f"{second['arm']} at {which} would have had to be {gap:.4f} nats better{sigma}")
        if stage != "lr_sweep":
            passed = [
                c
                for c in others
                if c["role"] == "ebc" and c["run_id"] not in d["ranked"] and c["val_loss"] < d["val_loss"]
            ]
            if passed:
                low = min(passed, key=lambda c: c["val_loss"])
                words.append(
                    f"{low['arm']} has the lowest loss, {low['val_loss']:.4f}, but its median c, {low['c_median']:.2f}, did "
                    "not qualify: another band would have chosen it"
                )
        for pair in decision.get("pairs", []):
            if pair["track"] != track and pair["val_loss"] is not None:
                words.append(
                    f"{pair['track']} would have had to be {pair['val_loss'] - d['val_loss']:.4f} nats better"
                )
        out.append(f"{track}: " + ("; ".join(words) or "there was no other candidate"))
    return out
