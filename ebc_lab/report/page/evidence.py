"""What the page shows, as plain data: gathered from a study's files and from nothing else.

`gather` reads, the templates lay out. Nothing here is decided again: decisions and verdict are told as they were recorded.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ebc_lab.config import errors
from ebc_lab.config.dicts import flat, from_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import STAGES, Config
from ebc_lab.records.paths import StudyFiles
from ebc_lab.study.inspect import status, why
from ebc_lab.study.inspect.reproduce import study_command
from ebc_lab.study.stages.compare_arms import seeds_of
from ebc_lab.study.stages.statistics import by_interval
from ebc_lab.study.store import manifest
from ebc_lab.study.store.study import FINISHED, Record, Study

from ..text import words
from ..text.words import brief, fixed, plural

DECIDED = (
    "lr_sweep",
    "calibrate",
    "controller_search",
    "lr_scale",
    "tune",
)  # the stages that choose something
CHECKED = ("*.json", "*.csv", "*.md", "*.tex")  # files whose checksums the page states


def gather(study: Study, *, lenient: bool = False) -> dict[str, Any]:
    """Everything the page tells of a study. `lenient`: what is damaged is said in `problems`, as far as that is possible.

    Raises UserError: there is no study, or a file of it was truncated or edited.
    """
    problems: list[str] = []
    try:
        header = study.header()
    except UserError as error:
        if not lenient:
            raise
        header = study.header(checked=False)
        if not isinstance(header.get("config"), dict):
            raise
        problems.append(str(error))
    config: Config = from_dict(Config, header["config"])
    try:
        decisions = study.true_decisions()
    except UserError as error:
        if not lenient:
            raise
        decisions = {}
        problems.append(str(error))
    records = study.records()
    problems += [r.problem for r in records if r.problem]
    trained = [r for r in records if r.spec and r.spec["kind"] == "train"]
    floors = why.noise_floor(decisions)
    tracks = next((list(d["tracks"]) for d in reversed(decisions.values())), [])
    return {
        "name": header["study"],
        "header": header,
        "config": config,
        "problems": problems,
        "question": _question(config),
        "facts": _facts(config, header, decisions, trained),
        "tracks": tracks,
        "verdict": [_verdict(t, f, config) for t, f in decisions["finals"]["tracks"].items()]
        if "finals" in decisions
        else [],
        "suite": _suite(decisions["ablation"], config) if "ablation" in decisions else None,
        "decided": {s: _decision(s, decisions[s], config, floors) for s in DECIDED if s in decisions},
        "open": [s for s in config.study.stages if s not in decisions],
        "finals": _finals(decisions["finals"], config) if "finals" in decisions else None,
        "broken": _broken(study, config, trained),
        "runs": _runs(trained),
        "again": study_command(header["requested"]),
        "settings": {k: v for k, v in flat(header["config"]).items() if k != "output_dir"},
        "checksums": _checksums(study.root),
        "hashes": {s: d["decision_sha256"] for s, d in decisions.items()},
    }


def optimizer(track: str) -> str:
    from ..text.words import optimizer as named  # late: it brings matplotlib

    return named(track)


def untracked(lines: Iterable[str], tracks: Iterable[str]) -> list[str]:
    """Sentences without the track that they begin with, where there is one only."""
    alone = list(tracks)
    return [line.removeprefix(f"{alone[0]}: ") if len(alone) == 1 else line for line in lines]


def label(name: str, arm: Mapping[str, Any]) -> str:
    """An arm as the tables name it: a suite's by its own name, a final one in words."""
    from ..text.words import short

    return name if "about" in arm else short(name, arm)


# -- the whole -----------------------------------------------------------------------------------------------------------


def _question(config: Config) -> str:
    asked = config.ablation.question if "ablation" in config.study.stages else ""
    return asked[:1].upper() + asked[1:] if asked else words.QUESTION


def _facts(
    config: Config, header: Mapping[str, Any], decisions: Mapping[str, Any], trained: Sequence[Record]
) -> list[tuple[str, str]]:
    model, results = config.model, [r.result for r in trained if r.result]
    optimizers = list(dict.fromkeys(optimizer(t) for d in decisions.values() for t in d["tracks"]))
    hours = sum(r.get("wall_s") or 0.0 for r in results)
    last = "finals" if "finals" in config.study.stages else "ablation"
    steps = getattr(config, last).steps
    return [
        ("Corpus", header["corpus"]["title"]),
        (
            "Model",
            f"{model.name.upper()}, {plural(model.blocks, 'block')}, width {model.width}, context {model.context}",
        ),
        ("Optimizer", ", ".join(optimizers) or "not chosen yet"),
        ("Scale", f"{config.scale}: {steps:,} steps of {config.batch_size} × {model.context} tokens"),
        ("Seeds", _seeds(seeds_of(decisions[last]) if last in decisions else config.seeds)),
        ("Runs", f"{len(results)}, {errors.clock(hours)} of training"),
    ]


def _seeds(seeds: Sequence[int]) -> str:
    return (
        ", ".join(map(str, seeds)) if len(seeds) <= 8 else f"{len(seeds)}, from {min(seeds)} to {max(seeds)}"
    )


def _runs(trained: Iterable[Record]) -> list[dict[str, Any]]:
    rows = []
    for r in trained:
        spec, result = r.spec or {}, r.result or {}
        run = spec["config"]
        rows.append(
            {
                "run_id": r.run_id,
                "stage": spec["stage"],
                "arm": spec["arm"],
                "seed": run["seed"],
                "lr": run["optimizer"]["lr"],
                "lr_scale": spec.get("lr_scale"),
                "delta_star": run["budget"]["target_kl"] if run["stabilizer"]["name"] == "ebc" else None,
                "outcome": result.get("outcome") or "open",
                **{
                    k: result.get(k)
                    for k in ("cause", "val_loss", "test_loss", "c_median", "kl_median", "wall_s")
                },
            }
        )
    return sorted(rows, key=lambda r: (STAGES.index(r["stage"]), r["arm"], r["lr"], r["seed"], r["run_id"]))


def _broken(study: Study, config: Config, trained: Iterable[Record]) -> list[dict[str, Any]]:
    """Runs that did not complete, grouped by cause; `result`: diverging is one, failing is none."""
    told = [status.run_status(study, r.run_id, r.spec, r.result) for r in trained if r.spec and r.result]
    groups = status.failures_of(study, config, [r for r in told if r["outcome"] != "completed"])
    for group in groups:
        group["result"] = group["outcome"] in FINISHED
        group["log"] = str(Path(group["log"]).relative_to(study.root))
    return groups


def _checksums(root: Path) -> list[tuple[str, str]]:
    paths = {p for pattern in CHECKED for p in root.glob(pattern) if not p.name.startswith(".")}
    return [(p.name, manifest.sha256_of(p)) for p in sorted(paths) if p != StudyFiles(root).manifest_file]


# -- decisions -----------------------------------------------------------------------------------------------------------


def _decision(
    stage: str, decision: Mapping[str, Any], config: Config, floors: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    title, about = words.STAGES[stage]
    return {
        "title": title,
        "about": about,
        "rule": decision["rule"],
        "headline": untracked(why.headline(stage, decision), decision["tracks"]),
        "flips": untracked(why.flips(stage, decision), decision["tracks"]),
        "notes": untracked(decision["notes"], decision["tracks"]),
        "tracks": [
            {"track": t, "name": optimizer(t), "chosen": _chosen(stage, f, floors[t])}
            for t, f in decision["tracks"].items()
        ],
        "candidates": _candidates(decision, config) if stage != "tune" else [],
        "tuned": _tuned(decision) if stage == "tune" else [],
        "with_scale": stage == "lr_scale",
    }


def _chosen(stage: str, d: Mapping[str, Any], floor: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, figure, remark) of what a stage chose for a track."""
    val = ("validation loss", fixed(d.get("val_loss")), "nats per token")
    margin = _margin(d, floor)
    if stage == "lr_sweep":
        c = d["control"]
        spread = f"95% interval {fixed(floor['low'])} to {fixed(floor['high'])}"
        replicates = plural(floor["seeds"], "replicate seed")
        return [
            ("optimizer", optimizer(f"{d['optimizer']}_{d['projection']}"), ""),
            (
                "learning rate",
                brief(d["lr"]),
                f"on the grid’s {d['edge']} edge" if d["edge"] else "inside its grid",
            ),
            val,
            margin,
            ("noise σ", fixed(d["sigma"]), f"nats, {replicates}; {spread}"),
            ("natural KL", brief(d["natural_kl"]), "nats per step, without EBC"),
            (
                "fair control",
                f"lr {brief(c['lr'])}",
                f"×{c['lr_scale']:g}, loss {fixed(c['val_loss'])}"
                + (f"; {c['edge']} edge of its grid" if c["edge"] else ""),
            ),
        ]
    if stage == "calibrate":
        band = "in the band" if d["in_band"] else "outside the band: the nearest was taken"
        return [
            (
                "KL budget δ*",
                brief(d["delta_star"]),
                f"nats per step, {d['times_natural']:.2f} × the natural KL",
            ),
            ("measured by", d["budget"] + d["bound"], ""),
            ("median c", fixed(d["c_median"], 2), band),
            val,
            margin,
        ]
    if stage == "controller_search":
        return [
            ("controller", d["candidate"], ""),
            ("median KL/δ*", fixed(d["kl_ratio"], 2), ""),
            val,
            margin,
        ]
    if stage == "lr_scale":
        rooms = [
            (
                f"headroom, {words.ROLES.get(a, a)}",
                "none" if x is None else f"×{x:g}",
                "within one σ of the baseline",
            )
            for a, x in d["headroom"].items()
        ]
        return [
            ("chosen scale", f"×{d['lr_scale']:g}", "LR inert there" if d["inert"] else ""),
            ("median c", fixed(d["c_median"], 2), "in the band" if d["in_band"] else "outside the band"),
            val,
            margin,
            *rooms,
        ]
    return []


def _margin(d: Mapping[str, Any], floor: Mapping[str, Any]) -> tuple[str, str, str]:
    sigmas = d.get("margin_sigma")
    if sigmas is None:
        return ("margin", words.NOTHING, "no runner-up qualified")
    within = floor["detectable"] is not None and sigmas * floor["sigma"] < floor["detectable"]
    remark = (
        "within the noise: another seed could have chosen otherwise" if within else "ahead of the runner-up"
    )
    return ("margin", f"{sigmas:.1f} σ", f"{remark}; smallest detectable {fixed(floor['detectable'])} nats")


def _candidates(decision: Mapping[str, Any], config: Config) -> list[dict[str, Any]]:
    """The candidates with what became of each: chosen, qualified, inert, out of the band, not completed."""
    tracks = decision["tracks"].values()
    chosen = {d["run_id"] for d in tracks}
    controls = {d["control"]["run_id"] for d in tracks if "control" in d}
    ranked = {r for d in tracks for r in d["ranked"]}
    inert = {
        r["run_id"] for d in tracks for rows in d.get("arms", {}).values() for r in rows if r.get("inert")
    }
    best = min((d["val_loss"] for d in tracks if d.get("val_loss") is not None), default=None)
    sigma = next((d["sigma"] for d in tracks if d.get("sigma")), None)
    low, high = config.study.band
    rows: list[dict[str, Any]] = []
    for c in decision["candidates"]:
        notes = []
        if c["run_id"] in controls:
            notes.append("taken as the fair control")
        if c["outcome"] != "completed":
            notes.append(c["cause"] or "no result")
        elif c["delta_star"] is not None and c["c_median"] is not None and not low <= c["c_median"] <= high:
            notes.append(f"median c {'below' if c['c_median'] < low else 'above'} the band")
        if c["run_id"] in inert:
            notes.append("LR inert")
        behind = (
            (c["val_loss"] - best) / sigma
            if sigma and best is not None and c["val_loss"] is not None
            else None
        )
        state = "chosen" if c["run_id"] in chosen else "qualified" if c["run_id"] in ranked else ""
        if c["run_id"] in chosen and any(r["run_id"] == c["run_id"] and r["state"] == "chosen" for r in rows):
            state = ""
        role = words.ROLES.get(c["role"], c["role"])
        rows.append({**c, "role": role, "state": state, "behind": behind, "notes": "; ".join(notes)})
    return rows


def _tuned(decision: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "track": t,
            "arm": a,
            "point": ", ".join(f"{k} {v:g}" for k, v in arm["point"].items()),
            "val_loss": arm["val_loss"],
            "runs": arm["runs"],
            "edges": ", ".join(f"{k}: {e}" for k, e in arm["edges"].items()),
        }
        for t, found in decision["tracks"].items()
        for a, arm in found["arms"].items()
    ]


# -- verdict, finals, suite ------------------------------------------------------------------------------------------------


def _verdict(track: str, found: Mapping[str, Any], config: Config) -> dict[str, Any]:
    margin = config.finals.margin
    differences = [by_interval(x["difference"], x["joint"]) for x in found["verdict"] if "difference" in x]
    ruler = Ruler.over(differences, margin)
    lines = []
    for line in found["verdict"]:
        title, asks, _ = words.CHECKS.get(line["name"], (line["question"], "", {}))
        d = by_interval(line["difference"], line["joint"]) if "difference" in line else None
        reference = (
            "the fair control" if line.get("reference") == found["roles"].get("control") else "the baseline"
        )
        lines.append(
            {
                **line,
                "title": title,
                "asks": asks,
                "means": words.means(line, margin, reference, config.study.band),
                "judged": words.judgement(line) if d else None,
                "drawn": ruler.drawn(d) if d else None,
                "least": d["detectable"] if d else None,
                "at_once": d["comparisons"] if d and line["joint"] else 1,
                "between": [label(n, found["arms"][n]) for n in (line["arm"], line["reference"])]
                if d
                else [],
            }
        )
    return {
        "track": track,
        "name": optimizer(track),
        "answer": words.answer(found["verdict"], margin),
        "counts": {v: sum(x["verdict"] == v for x in lines) for v in ("pass", "fail", "undecided")},
        "lines": lines,
        "least": [d["detectable"] for d in differences if d.get("detectable") is not None],
        "seeds": max((d["seeds"] for d in differences), default=0),
        "ruler": ruler,
    }


def _finals(decision: Mapping[str, Any], config: Config) -> dict[str, Any]:
    margin = config.finals.margin
    tracks = []
    for track, found in decision["tracks"].items():
        arms = []
        for name, arm in found["arms"].items():
            reached = (found.get("efficiency") or {}).get(name)
            arms.append(
                {**arm, "name": name, "label": label(name, arm), "said": _roles(arm), "reached": reached}
            )
        compared = [
            _compared(f"against the {words.ROLES[against]}", found["arms"], pairs, margin)
            for against, pairs in found["differences"].items()
        ]
        tracks.append({"track": track, "name": optimizer(track), "arms": arms, "compared": compared})
    return {
        "rule": decision["rule"],
        "notes": untracked(decision["notes"], decision["tracks"]),
        "flips": untracked(why.flips("finals", decision), decision["tracks"]),
        "sequential": decision.get("sequential"),
        "tracks": tracks,
        "margin": margin,
    }


def _roles(arm: Mapping[str, Any]) -> str:
    return ", ".join(words.ROLES.get(r, r) for r in arm["roles"])


def _compared(
    title: str, arms: Mapping[str, Any], pairs: Mapping[str, Mapping[str, Any]], margin: float | None
) -> dict[str, Any]:
    """Paired differences as rows with a drawn interval each, on one ruler."""
    ruler = Ruler.over([by_interval(d, joint=True) for d in pairs.values()], margin)
    rows = [
        {
            "name": n,
            "label": label(n, arms[n]),
            "versus": arms[n].get("versus"),
            **d,
            "drawn": ruler.drawn(d),
            "all": ruler.drawn(by_interval(d, joint=True)),
        }
        for n, d in pairs.items()
    ]
    return {
        "title": title,
        "rows": rows,
        "ruler": ruler,
        "joint": any(r.get("joint_low") is not None for r in rows),
    }


def _suite(decision: Mapping[str, Any], config: Config) -> dict[str, Any]:
    tracks = []
    for track, found in decision["tracks"].items():
        ranked = sorted(found["arms"].items(), key=lambda item: item[1]["test_median"] or math.inf)
        pairs = {n: a["difference"] for n, a in ranked if a["difference"]}
        arms = [{**a, "name": n, "label": n, "point": a.get("point") or {}} for n, a in ranked]
        tracks.append(
            {
                "track": track,
                "name": optimizer(track),
                "answer": words.suite_answer(found),
                "reference": found["reference"],
                "arms": arms,
                "compared": [_compared("against its reference", found["arms"], pairs, None)] if pairs else [],
                "least": [d["detectable"] for d in pairs.values() if d.get("detectable") is not None],
            }
        )
    return {
        "rule": decision["rule"],
        "notes": untracked(decision["notes"], decision["tracks"]),
        "tracks": tracks,
    }


class Ruler:
    """Where paired differences lie on a drawn axis of width 240, zero in its middle; what lies beyond is cut off."""

    WIDTH, EDGE = 240.0, 8.0

    def __init__(self, reach: float, margin: float | None):
        self.reach, self.margin = reach, margin
        self.zero, self.target = self.x(0.0), self.x(margin) if margin is not None else None

    @classmethod
    def over(cls, differences: Sequence[Mapping[str, Any]], margin: float | None) -> Ruler:
        """An axis that shows most intervals whole: one wild arm does not squash the others."""
        limits = ((abs(d[k]) for k in ("low", "high", "mean") if d.get(k) is not None) for d in differences)
        sizes = [m for own in limits if (m := max(own, default=0.0)) > 0]
        reach = min(max(sizes), 1.5 * statistics.median(sizes)) if sizes else 1.0
        return cls(1.1 * max(reach, 2 * (margin or 0.0)), margin)

    def x(self, value: float) -> float:
        share = max(-1.0, min(1.0, value / self.reach))
        return round(self.WIDTH / 2 + share * (self.WIDTH / 2 - self.EDGE), 1)

    def drawn(self, d: Mapping[str, Any]) -> dict[str, Any] | None:
        """The ends of the interval and its middle on the axis; None where there is no interval."""
        low, high, middle = d.get("low"), d.get("high"), d.get("mean", d.get("median"))
        middle = d.get("median") if middle is None else middle
        if low is None and high is None:
            return None
        ends = (-math.inf if low is None else low, math.inf if high is None else high)
        side = "below" if ends[1] < 0 else "above" if ends[0] > 0 else "both"
        return {
            "low": self.x(ends[0]),
            "high": self.x(ends[1]),
            "middle": None if middle is None or abs(middle) > self.reach else self.x(middle),
            "cut_low": ends[0] < -self.reach,
            "cut_high": ends[1] > self.reach,
            "side": side,
        }
