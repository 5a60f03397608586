"""A stage is one object: which runs it needs, what it decides from their results, and how both are shown.

To add a stage: a module here that exports `STAGE`, a subclass of `StageConfig` with a field of the stage's
name in `config.schema.Config` (it says what the stage needs, and its place in the order), and its numbers in
`conf/scale/`. Autopilot, `status`, `why`, `diff`, `plan`, the page and the tables ask the stage; nothing
branches on its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ebc_lab.config.schema import STAGE_NEEDS, Config, StageConfig
from ebc_lab.records.figures import RunResult

from .rules import Decision, Results
from .spec import RunSpec

Track = Mapping[str, Any]  # what a stage decided for one (optimizer, projection)
MISSING = object()


@dataclass(frozen=True)
class Figure:
    """A figure of a decided track. `diff` compares all of them; the page shows those that have a label."""

    path: str  # into the track, `control.lr`
    label: str = ""
    form: str = "{}"  # for str.format
    remark: str | Callable[[Track], str] = ""  # its unit, or what is to be said of it

    def value(self, track: Any, missing: Any = None) -> Any:
        """The figure of this track, or `missing` where the track has none."""
        for key in self.path.split("."):
            if not isinstance(track, Mapping) or key not in track:
                return missing
            track = track[key]
        return track

    def row(self, track: Track) -> tuple[str, str, str]:
        """(label, the figure as text, remark)."""
        value = self.value(track)
        remark = self.remark if isinstance(self.remark, str) else self.remark(track)
        return self.label, "none" if value is None else self.form.format(value), remark


@dataclass(frozen=True)
class Scenario:
    """How results that do not exist yet might turn out, for the forecast of how many runs there will be."""

    name: str
    edge: bool  # the best learning rate lies on the edge until the extensions are used up
    extra: int  # calibration runs beyond the grid
    merged: bool  # the chosen scale is the calibrated one, so that arms coincide
    open: bool  # the verdict stays undecided, so that finals that may add seeds add all of them


def runner_up(
    name: str, track: Track, decision: Mapping[str, Any], *, setting: str = "lr {lr:g}"
) -> str | None:
    """What the next best candidates lacked to be chosen; None where a stage does not choose one winner."""
    if "ranked" not in track:
        return None
    others = [c for c in decision["candidates"] if c["run_id"] != track["run_id"]]
    others = [c for c in others if c["val_loss"] is not None]
    parts = []
    means = {c["run_id"]: c["val_loss"] for c in others} | track.get("ranked_losses", {})
    ranked = [c for c in others if c["run_id"] in track["ranked"]]
    if ranked:
        second = min(ranked, key=lambda c: means[c["run_id"]])
        gap = means[second["run_id"]] - track["val_loss"]
        sigmas = f" ({gap / track['sigma']:.1f} σ)" if track["sigma"] else ""
        at = setting.format_map(second)
        parts.append(f"{second['arm']} at {at} would have had to be {gap:.4f} nats better{sigmas}")
    # neither another seed of a ranked arm nor an inert rate, which is a ranked run under another name
    told = {c["arm"] for c in decision["candidates"] if c["run_id"] in track["ranked"]}
    inert = {r["run_id"] for rows in track.get("arms", {}).values() for r in rows if r["inert"]}
    unranked = [c for c in others if c["role"] == "ebc" and c["run_id"] not in inert]
    lower = [c for c in unranked if c["arm"] not in told and c["val_loss"] < track["val_loss"]]
    if lower:
        lowest = min(lower, key=lambda c: c["val_loss"])
        parts.append(
            f"{lowest['arm']} has the lowest loss, {lowest['val_loss']:.4f}, but its median c, "
            f"{lowest['c_median']:.2f}, did not qualify: another band would have chosen it"
        )
    return "; ".join([*parts, *_other_tracks(name, track, decision)]) or "there was no other candidate"


def _other_tracks(name: str, track: Track, decision: Mapping[str, Any]) -> list[str]:
    losses = {p["track"]: p["val_loss"] for p in decision.get("pairs", []) if p["val_loss"] is not None}
    gaps = {other: loss - track["val_loss"] for other, loss in losses.items() if other != name}
    return [f"{other} would have had to be {gap:.4f} nats better" for other, gap in gaps.items()]


def invented(config: Config, scenario: Scenario, spec: RunSpec, nth: int) -> RunResult:
    """What the forecast assumes of a run in addition to its loss: a median c in the band at the scale that is
    chosen."""
    return {"c_median": 0.6 if scenario.merged == (spec.lr_scale == 2) else 0.3}


@dataclass(frozen=True)
class Stage:
    """One stage. The fields from `figures` on have defaults that serve a stage which chooses one winner per
    track."""

    name: str
    # (config, earlier decisions, results so far) -> its runs; the list may grow with the results
    runs: Callable[[Config, Mapping[str, Decision], Results], list[RunSpec]]
    # (config, its runs, their results, earlier decisions); raises Undecidable
    decide: Callable[[Config, Sequence[RunSpec], Results, Mapping[str, Decision]], Decision]
    headline: Callable[[Track], str]  # a decided track in one line
    figures: tuple[Figure, ...] = ()
    flips: Callable[[str, Track, Mapping[str, Any]], str | None] = (
        runner_up  # (name, track, decision): what would change it
    )
    grows: bool = True  # its list of runs grows with its own results; if not, asking once is enough
    concludes: bool = False  # no later stage builds on its decision
    # while this run is still in progress, the one that would follow if it wins: an idle worker may start on
    # it
    follow_up: Callable[[Config, RunSpec], RunSpec | None] = lambda config, spec: None
    # (config, scenario, run, how many runs the stage has made before it) -> figures of a result that the
    # forecast invents
    invented: Callable[[Config, Scenario, RunSpec, int], RunResult] = invented
    title: str = ""
    about: str = ""  # what it is for, in a sentence for readers who do not know the method
    question: Callable[[Config], str] = lambda config: ""  # the question of a study that ends with this stage
    shows: Literal["candidates", "points", "verdict", "arms"] = (
        "candidates"  # the table that explains its decision
    )
    pictures: tuple[str, ...] = ()  # names of the pictures drawn of its decision
    summary: str = ""  # name of its table of runs, if not summary_<name>.csv

    @property
    def needs(self) -> tuple[str, ...]:
        """The stages without which it cannot be asked for."""
        return STAGE_NEEDS[self.name]

    @property
    def summary_csv(self) -> str:
        return self.summary or f"summary_{self.name}.csv"

    def settings(self, config: Config) -> StageConfig:
        """Its part of the configuration."""
        found: StageConfig = getattr(config, self.name)
        return found

    def headlines(self, decision: Mapping[str, Any]) -> list[str]:
        """A decision in one line per track, with the winner's margin where there is one winner."""
        return [f"{name}: {self.headline(d)}{_margin(d)}" for name, d in decision["tracks"].items()]

    def would_change(self, decision: Mapping[str, Any]) -> list[str]:
        """What would have changed the decision, one sentence per track."""
        tracks = decision["tracks"].items()
        return [f"{name}: {words}" for name, d in tracks if (words := self.flips(name, d, decision))]

    def rows(self, track: Track) -> list[tuple[str, str, str]]:
        """(label, figure, remark) of what was decided for a track, as the page shows it."""
        shown = [f for f in self.figures if f.label and f.value(track, MISSING) is not MISSING]
        return [f.row(track) for f in shown]


def _margin(track: Track) -> str:
    if "ranked" not in track:
        return ""
    margin = track["margin_sigma"]
    return "; no runner-up" if margin is None else f"; margin {margin:.1f} σ"
