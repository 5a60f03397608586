"""Candidates: the runs that a stage chose from, and what became of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ebc_lab.records.decisions import Candidate, Decision
from ebc_lab.study.stages.calibrate import band_aimed_at
from ebc_lab.study.stages.lr_sweep.fair_control import schedule_in_words
from ebc_lab.study.stages.rules import band_distance

from ..text.table import PAGE, Cell, Column, Row, Table, filled, loss_column, two_digits
from ..text.words import brief, percent, role, signed
from .kind import Evidence, Kind

CANDIDATES = (
    Column("Result", short=""),
    Column("Arm", "name", short="arm", head=True),
    Column("Part", short="part"),
    Column("Learning rate", "figure", brief, "lr"),
    Column("Scale", "figure", lambda x: f"×{brief(x)}", "scale", optional=True),
    Column("δ*", "figure", brief, optional=True, notes={"": "δ* in nats"}),
    Column("Seed", "figure", str, "seed", optional=True),
    loss_column("Validation loss", "val loss"),
    loss_column("± s.e.", "±"),
    Column("Behind", "figure", signed, "behind", on=(PAGE,)),
    Column("Median c", "figure", two_digits, "c", optional=True),
    Column("Clipped", "figure", percent, "clipped", optional=True),
    Column("Notes", "prose", short="notes", optional=True),
)


class Candidates(Kind):
    shows = "candidates"
    concludes = False

    def tables(self, found: Evidence) -> list[Table]:
        return [_table(found.decision, band_aimed_at(found.config))]


KIND = Candidates()


def _table(decision: Decision, band: Sequence[float] | None) -> Table:
    """Return the runs that a stage chose from. `band`: where their median c should lie; None if anywhere."""
    stage, tracks = decision["stage"], decision["tracks"].values()
    remarks = _remarks_of_sweep(tracks)
    chosen = {d["run_id"] for d in tracks if "run_id" in d}
    ranked = {run_id for d in tracks for run_id in d.get("ranked", ())}
    at_scales = [r for d in tracks for of_role in d.get("arms", {}).values() for r in of_role]
    inert = {r["run_id"] for r in at_scales if r.get("inert")}
    best = min((d["val_loss"] for d in tracks if d.get("val_loss") is not None), default=None)
    best_of_grid = min((d["grid"]["val_loss"] for d in tracks if "grid" in d), default=best)
    scales = {c.get("lr_scale") for c in decision["candidates"] if c["role"] not in UNSCALED}
    seeds = sorted({c["seed"] for c in decision["candidates"]})
    parts = PARTS if any(has_control(d) for d in tracks) else {**PARTS, "control": "on a schedule"}
    rows: list[Row] = []
    for c in decision["candidates"]:
        lead = best_of_grid if c["role"] == "grid" else best  # a grid's runs are shorter than the others
        loss = c["val_loss"]
        won = c["run_id"] in chosen
        ebc = c["delta_star"] is not None  # without EBC nothing is clipped
        values = (
            _became(c, won, ranked),
            Cell(c["arm"], link=f"run-{c['run_id']}"),
            parts.get(c["role"]) or role(c["role"]),
            c["lr"],
            c["lr_scale"] if len(scales) > 1 else Cell(),
            c["delta_star"],
            c["seed"] if len(seeds) > 1 else Cell(),
            loss,
            c["val_se"],
            loss - lead if loss is not None and lead is not None else None,
            c.get("c_median") if ebc else None,
            c["clip_rate"] if ebc else None,
            "; ".join([*remarks.get((c["role"], c["run_id"]), ()), *_notes(c, inert, band)]),
        )
        chosen -= {c["run_id"]} if won else set()  # a run that two roles share is marked once
        rows.append(filled(CANDIDATES, values, chosen=won))
    note = "losses in nats per token" + (f"; seed {seeds[0]}" if len(seeds) == 1 else "")
    return Table(f"{stage}-candidates", f"Candidates of {stage}", CANDIDATES, rows, note)


UNSCALED = ("grid", "baseline", "replicate", "control")  # roles from before a best learning rate is known
PARTS = {"baseline": "constant rate", "control": "control’s search"}  # roles that say else in the finals


def _remarks_of_sweep(tracks: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[str]]:
    """Return (role, run id) -> what the sweep says of a run: its schedule, and if it is the fair control."""
    remarks: dict[tuple[str, str], list[str]] = {}
    for d in tracks:
        control = d.get("control", {})
        for point in control.get("grid", ()):
            schedule = schedule_in_words({"name": point["schedule"], **point})
            fair = has_control(d) and point["run_id"] == control["run_id"]
            taken = ["taken as the fair control"] if fair else []
            remarks["control", point["run_id"]] = [schedule, *taken]
    return remarks


def has_control(track: Mapping[str, Any]) -> bool:
    """Return whether anything in the study is compared with the fair control."""
    return bool(track.get("control", {}).get("used", True))


def _became(candidate: Candidate, chosen: bool, ranked: Iterable[str]) -> Cell:
    if chosen:
        return Cell("→ chosen", tone="strong")
    if candidate["outcome"] != "completed":
        return Cell(candidate["outcome"] or "open")
    return Cell("qualified" if candidate["run_id"] in ranked else "")


def _notes(c: Candidate, inert: Iterable[str], band: Sequence[float] | None) -> list[str]:
    """Return what a reader must know of a candidate beyond its figures."""
    notes = []
    middle = c.get("c_median")
    if c["outcome"] != "completed":
        notes.append(c["cause"] or "no result")
    elif band and c["delta_star"] is not None and middle is not None and band_distance(middle, band):
        notes.append(f"median c {'below' if middle < band[0] else 'above'} the band")
    return [*notes, *(["LR inert"] if c["run_id"] in inert else [])]
